"""The public function: errors, dtypes, autograd, autocast and torch.compile."""

import pytest
import torch
from delta_cases import CASES, INPUTS, TOLERANCE, Case, assert_close, call, gradients

from longmix_kernels.delta import delta_rule

CASE = Case("op", length=70, documents=(30, 11), with_carried=True)
every_backend = pytest.mark.parametrize("backend", ["reference", "blocked"])


def results(inputs: dict, **options) -> list[torch.Tensor]:
    """Output, final state and the gradients of both."""
    found = call(delta_rule, CASE, inputs, **options)
    return [*found, *gradients(found, inputs).values()]


@pytest.mark.parametrize(
    "changed",
    [{}, {"low_rank": False}, {"with_state": False}, {"scalar_decay": True}, {"documents": ()}],
    ids=lambda changed: "-".join(changed) or "default",
)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_backends_agree(changed, scale):
    case = Case("agree", **{"length": 70, "documents": (30, 11), **changed})
    found = {}
    for backend in ("blocked", "reference"):
        inputs = case.inputs(torch.float64)
        pair = call(delta_rule, case, inputs, backend=backend, scale=scale)
        found[backend] = {"output": pair[0], "state": pair[1], **gradients(pair, inputs)}
    for name, expected in found["reference"].items():
        assert_close(found["blocked"][name], expected, TOLERANCE[torch.float64], name)
    assert torch.equal(call(delta_rule, case, inputs, scale=scale)[0], found["blocked"]["output"])


@every_backend
def test_results_follow_the_contract(backend):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        inputs = CASE.inputs(dtype)
        output, state = call(delta_rule, CASE, inputs, backend=backend)
        assert output.shape == (2, 70, 2, 24) and state.shape == (2, 2, 16, 24)
        assert output.is_contiguous() and state.is_contiguous()
        assert output.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)
        for name, grad in gradients([output, state], inputs).items():
            assert grad.dtype == inputs[name].dtype and grad.shape == inputs[name].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    half = CASE.inputs(dtype)
    single = {name: x.detach().float().requires_grad_() for name, x in half.items() if x is not None}
    for a, b in zip(call(delta_rule, CASE, half), call(delta_rule, CASE, single), strict=True):
        assert torch.equal(a, b.to(a.dtype))


def plain(inputs: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    """The definition, every tensor and operation in one dtype."""
    query, key, value, decay, read, write, state = (inputs[name].to(dtype) for name in INPUTS[:7])
    outputs = []
    for t in range(query.shape[1]):
        removed = torch.einsum("bhk,bhkv->bhv", read[:, t], state)
        state = decay[:, t].exp().unsqueeze(-1) * state + write[:, t].unsqueeze(-1) * removed.unsqueeze(-2)
        state = state + key[:, t].unsqueeze(-1) * value[:, t].unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return [torch.stack(outputs, 1), state]


def test_bfloat16_is_as_accurate_as_plain_torch():
    """Error at most twice that of a plain implementation in bfloat16, both against float64."""
    case = Case("half", length=257, dim=64, value_dim=64)
    found = []
    for dtype, run in (
        (torch.float64, lambda inputs: plain(inputs, torch.float64)),
        (torch.bfloat16, lambda inputs: plain(inputs, torch.bfloat16)),
        (torch.bfloat16, lambda inputs: call(delta_rule, case, inputs)),
    ):
        inputs = {name: x.detach().to(x.dtype) for name, x in case.inputs(torch.bfloat16).items() if x is not None}
        inputs = {name: (x.to(dtype) if dtype == torch.float64 else x).requires_grad_() for name, x in inputs.items()}
        pair = run(inputs)
        found.append({"output": pair[0], "state": pair[1], **gradients(pair, inputs)})
    for name, exact in found[0].items():
        allowed, error = ((x[name].double() - exact).square().mean().sqrt() for x in found[1:])
        assert error <= 2 * allowed, name


def test_gradient_through_either_result_alone():
    inputs = CASE.inputs(torch.float64)
    output, state = call(delta_rule, CASE, inputs)
    tensors = list(inputs.values())
    both = torch.autograd.grad(output.sum() + state.sum(), tensors, retain_graph=True)
    from_output = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    from_state = torch.autograd.grad(state.sum(), tensors, allow_unused=True)
    for name, a, b, c in zip(INPUTS, both, from_output, from_state, strict=True):
        assert_close(b + c, a, 1e-12, name)


@pytest.mark.parametrize("wanted", INPUTS)
def test_only_wanted_gradients(wanted):
    expected = gradients(call(delta_rule, CASE, inputs := CASE.inputs(torch.float64)), inputs)[wanted]
    inputs = {name: x.detach().requires_grad_(name == wanted) for name, x in inputs.items() if x is not None}
    found = call(delta_rule, CASE, inputs)
    grads = gradients(found, {wanted: inputs[wanted]})
    assert_close(grads[wanted], expected, 1e-14, wanted)
    assert all(x.grad is None for x in inputs.values())


def test_any_strides_and_inputs_left_as_they_were():
    inputs = CASE.inputs(torch.float64)
    copies = {name: x.detach().clone() for name, x in inputs.items() if x is not None}
    turned = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, x in inputs.items()
        if x is not None
    }
    packed = torch.stack([inputs[name].detach() for name in ("query", "key")], 3)
    turned["query"], turned["key"] = (packed[:, :, :, i].requires_grad_() for i in range(2))
    for a, b in zip(results(inputs), results(turned), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(copies[name], x) for name, x in inputs.items())


def test_a_decay_of_all_channels_may_be_expanded():
    inputs = Case("scalar", length=70, scalar_decay=True).inputs(torch.float64)
    expanded = {**inputs, "log_decay": inputs["log_decay"].detach().unsqueeze(-1).expand(-1, -1, -1, 16)}
    expanded["log_decay"].requires_grad_()
    output, state = call(delta_rule, CASE, expanded)
    grads = gradients([output, state], expanded)
    assert_close(output, call(delta_rule, CASE, inputs)[0], 1e-14, "output")
    expected = gradients(call(delta_rule, CASE, inputs), inputs)["log_decay"]
    assert_close(grads["log_decay"].sum(-1), expected, 1e-12, "log_decay")


@every_backend
def test_autocast_leaves_the_call_alone(backend):
    outside = results(CASE.inputs(torch.float32), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(CASE.inputs(torch.float32), backend=backend)
    for a, b in zip(outside[:2], inside[:2], strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)
    if backend == "blocked":
        assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("changed", [{}, {"low_rank": False, "with_state": False}, {"scalar_decay": True}], ids=str)
def test_compiles_as_one_graph(changed, dynamic):
    def run(inputs, document_ids):
        return call(delta_rule, CASE, inputs, document_ids=document_ids)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (70, 45):
        case = Case("compiled", length=length, documents=(30, 11), **changed)
        ids = case.document_ids()
        found = []
        for function in (compiled, run):
            inputs = case.inputs(torch.float64)
            pair = list(function(inputs, ids))
            found.append([*pair, *gradients(pair, inputs).values()])
        for a, b in zip(*found, strict=True):
            assert_close(a, b, 1e-12, "compiled")


OPERATOR_CASES = ["T17", "gated-linear-attention", "no-state", "documents", "scalar-decay"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OPERATOR_CASES)
# What a dtype can break, only half precision breaks: results and gradients of several dtypes.
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_operators_are_registered_correctly(name, dtype):
    case = next(case for case in CASES if case.name == name)
    inputs = case.inputs(dtype)
    if case.scalar_decay:
        inputs["log_decay"] = inputs["log_decay"].unsqueeze(-1).expand_as(inputs["query"])
    options = case.document_ids(), 0.5, case.chunk_size
    torch.library.opcheck(torch.ops.longmix.delta_blocked.default, (*inputs.values(), *options))
    tensors = [None if x is None else x.detach() for x in inputs.values()]
    output, state, kept = torch.ops.longmix.delta_blocked(*tensors, *options)
    for grad_state in (None, torch.ones_like(state)):
        backward = torch.ops.longmix.delta_blocked_backward.default
        torch.library.opcheck(backward, (torch.ones_like(output), grad_state, kept, *tensors, *options))


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


IDS = torch.arange(100).int().expand(2, -1) // 30


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": zeros(100, 4, 16)}, r"query has shape \[100, 4, 16\]; allowed is \[B, T, H, D\] with every size"),
        ({"key": zeros(2, 0, 4, 16)}, r"key has shape \[2, 0, 4, 16\]; allowed .* at least 1"),
        ({"key": zeros(2, 100, 4, 8)}, r"key has shape \[2, 100, 4, 8\]; allowed is \[2, 100, 4, 16\], as query"),
        ({"value": zeros(2, 99, 4, 24)}, r"value has shape \[2, 99, 4, 24\]; allowed is \[2, 100, 4, 24\], as query"),
        ({"low_rank_read": zeros(2, 100, 4, 24)}, r"low_rank_read has shape .*; allowed is \[2, 100, 4, 16\]"),
        ({"low_rank_write": zeros(2, 100, 2, 16)}, r"low_rank_write has shape .*; allowed is \[2, 100, 4, 16\]"),
        ({"low_rank_read": None}, r"low_rank_read is missing; low_rank_read and low_rank_write come together"),
        ({"low_rank_write": None}, r"low_rank_write is missing; "),
        ({"query": zeros(2, 100, 4, 16).int()}, r"query has dtype torch.int32; allowed is torch.float16, torch.bf"),
        ({"value": zeros(2, 100, 4, 24).half()}, r"value has dtype torch.float16; allowed is torch.float32"),
        ({"low_rank_write": zeros(2, 100, 4, 16).double()}, r"low_rank_write has dtype torch.float64; allowed is"),
        ({"key": zeros(2, 100, 4, 16, device="meta")}, r"key is on meta; allowed is cpu, where query is"),
        (
            {"log_decay": zeros(2, 100)},
            r"log_decay has shape \[2, 100\]; allowed is \[2, 100, 4, 16\] or \[2, 100, 4\]",
        ),
        ({"log_decay": zeros(2, 100, 2)}, r"log_decay has shape .*; allowed is \[2, 100, 4, 16\] or \[2, 100, 4\]"),
        ({"log_decay": zeros(2, 100, 4).half()}, r"log_decay has dtype torch.float16; allowed is torch.float32"),
        ({"log_decay": zeros(2, 100, 4, device="meta")}, r"log_decay is on meta; allowed is cpu"),
        ({"initial_state": zeros(2, 4, 24, 16)}, r"initial_state is .*; allowed is torch.float32 \[2, 4, 16, 24\]"),
        ({"initial_state": zeros(2, 4, 16, 24).half()}, r"initial_state is torch.float16 .*; allowed is torch.float32"),
        ({"initial_state": zeros(2, 4, 16, 24, device="meta")}, r"initial_state is on meta; allowed is cpu"),
        ({"document_ids": IDS[:, 1:]}, r"document_ids is torch.int32 \[2, 99\]; allowed is torch.int32 or torch.int64"),
        ({"document_ids": IDS.float()}, r"document_ids is torch.float32 .*; allowed is torch.int32 or torch.int64"),
        ({"document_ids": IDS.to("meta")}, r"document_ids is on meta; allowed is cpu"),
        ({"document_ids": IDS.flip(1)}, r"document_ids must not decrease along its last axis"),
        ({"chunk_size": 8}, r"chunk_size is 8; allowed are powers of two from 16 on, or None"),
        ({"chunk_size": 48}, r"chunk_size is 48; allowed are powers of two from 16 on, or None"),
        ({"backend": "tritan"}, r"backend='tritan' is not available here; allowed are None, 'reference', 'blocked'"),
        ({"backend": "triton"}, r"backend='triton' got tensors on cpu; allowed are a CUDA device"),
    ],
)
@every_backend
def test_errors_name_the_argument(changed, message, backend):
    arguments = {name: zeros(2, 100, 4, 16) for name in ("query", "key", "low_rank_read", "low_rank_write")}
    arguments |= {"value": zeros(2, 100, 4, 24), "log_decay": zeros(2, 100, 4, 16), "backend": backend, **changed}
    with pytest.raises(ValueError, match=message):
        delta_rule(**arguments)


def test_a_second_derivative_is_refused():
    inputs = CASE.inputs(torch.float64)
    output = call(delta_rule, CASE, inputs)[0]
    (grad,) = torch.autograd.grad(output.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|grad"):
        grad.sum().backward()
