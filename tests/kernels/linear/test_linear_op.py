"""The public function: errors, dtypes, autograd, autocast and torch.compile."""

import pytest
import torch
from linear_cases import CASES, INPUTS, STATE, Case, assert_close, call, gradients, meaning

from longmix_kernels.linear import LinearState, linear_attention
from longmix_kernels.linear.state import empty_state

CASE = Case("op", documents=(13, 40, 3), with_carried=True)
BOTH = pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])


def results(case: Case, inputs: dict, **options) -> list[torch.Tensor]:
    """Output, meaning of the final state, and all gradients."""
    got = call(linear_attention, case, inputs, **options)
    return [got[0], *meaning(got[1:]), *gradients(got, inputs).values()]


def test_the_default_on_the_cpu_is_blocked():
    inputs = CASE.inputs(torch.float32)
    for a, b in zip(
        call(linear_attention, CASE, inputs), call(linear_attention, CASE, inputs, backend="blocked"), strict=True
    ):
        assert torch.equal(a, b)


@BOTH
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_results_follow_the_contract(backend, normalize):
    case = Case("contract", normalize=normalize, with_state=False)
    for dtype, exact in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        output, *state = call(linear_attention, case, case.inputs(dtype), backend=backend)
        assert output.dtype == dtype and output.shape == (2, 100, 2, 24) and output.is_contiguous()
        shapes = [(2, 2, 16, 24), (2, 2, 16), (2, 2)][: 3 if normalize else 1]
        assert [tuple(x.shape) for x in state] == shapes and all(x.dtype == exact for x in state)


def test_a_decay_per_head_gets_the_sum_of_its_gradients():
    case = Case("retention", normalize=False, gated=False)
    inputs = case.inputs(torch.float64)
    decay = torch.tensor([0.9, 0.5], dtype=torch.float64).log().requires_grad_()
    grads = []
    for log_decay in (decay, decay.repeat(2, 100, 1)):
        output, state = linear_attention(*(inputs[name] for name in INPUTS[:3]), log_decay=log_decay)
        grads.append(torch.autograd.grad(output.square().sum() + state.memory.sum(), decay)[0])
    assert_close(*grads, 1e-12, "log_decay")


@BOTH
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_no_state_is_the_zero_state(backend, normalize):
    case = Case("zero", normalize=normalize, with_state=False)
    inputs = case.inputs(torch.float64)
    zero = empty_state(inputs["query"], inputs["value"], normalize)
    a = call(linear_attention, case, inputs, backend=backend)
    b = call(linear_attention, case, {**inputs, **zero._asdict()}, backend=backend)
    for x, y in zip(a, b, strict=True):
        assert_close(x, y, 1e-14, "state")


def plain(query, key, value, log_decay, log_input, normalize):
    """The form with all weights, its large products in the dtype of the inputs, as one would write it in torch."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    total = log_decay.transpose(1, 2).cumsum(-1)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    log_weight = total.unsqueeze(-1) - total.unsqueeze(-2) + log_input.transpose(1, 2).unsqueeze(-2)
    log_weight = log_weight.masked_fill(hidden, -torch.inf)
    highest = log_weight.amax(-1, keepdim=True).detach() if normalize else torch.zeros_like(log_weight[..., :1])
    scores = (q @ k.mT) * q.shape[-1] ** -0.5 * (log_weight - highest).exp().to(q.dtype)
    read = scores @ v
    if normalize:
        read = read / torch.maximum(scores.sum(-1, keepdim=True).abs(), (-highest).exp().to(q.dtype))
    return read.transpose(1, 2)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_plain_torch(dtype, normalize):
    """Error at most twice that of a plain implementation in the same dtype, both against float64."""
    case = Case("half", length=257, normalize=normalize, with_state=False, regime="init")
    inputs = [x.detach().requires_grad_() for x in case.inputs(dtype).values() if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(2, 257, 2, 24).to(dtype)
    ours = linear_attention(*inputs[:3], log_decay=inputs[3], log_input=inputs[4], normalize=normalize)[0]
    outputs = plain(*exact, normalize), plain(*inputs, normalize), ours
    expected, plain_results, got = (
        [o, *torch.autograd.grad(o, x, grad.to(o.dtype))] for o, x in zip(outputs, (exact, inputs, inputs), strict=True)
    )
    for want, plain_result, result in zip(expected, plain_results, got, strict=True):
        assert result.dtype == plain_result.dtype
        error, allowed = ((x.double() - want).square().mean().sqrt() for x in (result, plain_result))
        assert error <= 2 * allowed


@BOTH
def test_gradient_through_either_result_alone(normalize):
    case = Case("parts", normalize=normalize, documents=(13, 40, 3))
    inputs = case.inputs(torch.float64)
    wanted = [x for x in inputs.values() if x is not None]
    outputs = call(linear_attention, case, inputs)[: 2 + normalize]
    both = torch.autograd.grad(sum(x.sum() for x in outputs), wanted, retain_graph=True)
    parts = [torch.autograd.grad(x.sum(), wanted, retain_graph=True, materialize_grads=True) for x in outputs]
    for whole, *some in zip(both, *parts, strict=True):
        assert_close(sum(some), whole, 1e-12, "sum of gradients")


@pytest.mark.parametrize("name", INPUTS)
def test_only_the_wanted_gradient(name):
    inputs = {other: x.detach() for other, x in CASE.inputs(torch.float32).items() if x is not None}
    inputs[name].requires_grad_()
    output = call(linear_attention, CASE, inputs)[0]
    output.sum().backward()
    assert inputs[name].grad.shape == inputs[name].shape and inputs[name].grad.isfinite().all()
    assert all(x.grad is None for other, x in inputs.items() if other != name)


@BOTH
def test_any_strides_and_inputs_left_as_they_were(normalize):
    case = Case("strides", normalize=normalize, documents=(13, 40, 3))
    inputs = case.inputs(torch.float64)
    turned = {name: None if x is None else x.detach().mT.contiguous().mT.requires_grad_() for name, x in inputs.items()}
    assert not turned["query"].is_contiguous()
    before = {name: None if x is None else x.detach().clone() for name, x in turned.items()}
    for a, b in zip(results(case, inputs), results(case, turned), strict=True):
        assert_close(a, b, 1e-12, "strides")
    assert all(x is None or torch.equal(x, turned[name]) for name, x in before.items())


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_autocast_leaves_the_call_alone(backend):
    outside = results(CASE, CASE.inputs(torch.float32), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(CASE, CASE.inputs(torch.float32), backend=backend)
    for a, b in zip(outside[:3], inside[:3], strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)
    if backend == "blocked":
        assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic, normalize):
    case = Case("compiled", normalize=normalize)

    def run(query, key, value, log_decay, log_input, document_ids, *state):
        output, final = linear_attention(
            query, key, value, log_decay=log_decay, log_input=log_input, normalize=normalize,
            initial_state=LinearState(*state), document_ids=document_ids,
        )  # fmt: skip
        return output, *final[: 1 + normalize]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ids = (torch.arange(100) // 30).int().expand(2, -1).contiguous()
    for length in (100, 70):
        inputs = case.inputs(torch.float64)
        tokens = [inputs[name].detach()[:, :length].clone().requires_grad_() for name in INPUTS[:5]]
        state = [inputs[name] for name in STATE if inputs[name] is not None]
        arguments = *tokens, ids[:, :length].contiguous(), *state
        got, want = compiled(*arguments), run(*arguments)
        grads = [torch.autograd.grad(sum(x.square().sum() for x in r), [*tokens, *state]) for r in (got, want)]
        for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
            assert_close(a, b, 1e-12, "compiled")


@pytest.mark.sampled(3)
# What a dtype can break, only half precision breaks: results and gradients of several dtypes.
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["exp-T17", "sig-T17", "exp-carried-state", "decay-only", "exp-no-input-gate"])
def test_operators_are_registered_correctly(name, dtype):
    case = next(case for case in CASES if case.name == name)
    inputs = list(case.inputs(dtype).values())
    options = case.document_ids(), case.normalize, 0.25, 16
    torch.library.opcheck(torch.ops.longmix.linear_blocked.default, (*inputs, *options))
    inputs = [None if x is None else x.detach() for x in inputs]
    output, memory, normalizer, _, *rows = torch.ops.longmix.linear_blocked(*inputs, *options)
    for grads in ((None, None), (memory, normalizer if case.normalize else None)):
        torch.library.opcheck(
            torch.ops.longmix.linear_blocked_backward.default, (output, *grads, output, *rows, *inputs, *options)
        )


def test_a_second_derivative_is_refused():
    inputs = CASE.inputs(torch.float64)
    output = call(linear_attention, CASE, inputs)[0]
    (grad,) = torch.autograd.grad(output.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|grad"):
        grad.sum().backward()


def tokens(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


MEMORY, VECTOR, NUMBER = tokens(2, 4, 16, 24), tokens(2, 4, 16), tokens(2, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": tokens(100, 4, 16)}, r"query has shape \[100, 4, 16\]; allowed is \[B, T, H, D\]"),
        ({"query": tokens(2, 0, 4, 16)}, r"query has shape \[2, 0, 4, 16\]; allowed .* at least 1"),
        ({"key": tokens(2, 100, 4, 8)}, r"key has shape \[2, 100, 4, 8\]; allowed is \[2, 100, 4, 16\], as query"),
        ({"key": tokens(2, 100, 2, 16)}, r"key has shape \[2, 100, 2, 16\]"),
        ({"value": tokens(2, 99, 4, 24)}, r"value has shape \[2, 99, 4, 24\]; allowed is \[2, 100, 4\] and Dv"),
        ({"value": tokens(2, 100, 4, 24).half()}, r"value has dtype torch.float16; allowed is torch.float32"),
        ({"query": tokens(2, 100, 4, 16).int()}, r"query has dtype torch.int32; allowed is torch.float16, torch"),
        ({"key": tokens(2, 100, 4, 16, device="meta")}, r"key is on meta; allowed is cpu, where query is"),
        ({"log_decay": tokens(2, 100)}, r"log_decay has shape \[2, 100\]; allowed is \[2, 100, 4\] or \[4\]"),
        ({"log_decay": tokens(2, 100, 4).double()}, r"log_decay has dtype torch.float64; allowed is torch.float32"),
        ({"log_decay": tokens(2, 100, 4).bfloat16()}, r"log_decay .* gates are never rounded to half precision"),
        ({"log_input": tokens(4)}, r"log_input has shape \[4\]; allowed is \[2, 100, 4\]$"),
        ({"log_input": tokens(2, 100, 4, device="meta")}, r"log_input is on meta; allowed is cpu"),
        ({"document_ids": tokens(2, 50).int()}, r"document_ids is torch.int32 \[2, 50\]; allowed is .* \[2, 100\]"),
        ({"document_ids": tokens(2, 100)}, r"document_ids is torch.float32 \[2, 100\]; allowed is torch.int32"),
        ({"document_ids": torch.arange(200).flip(0).view(2, 100)}, r"document_ids must not decrease"),
        ({"chunk_size": 24}, r"chunk_size is 24; allowed are powers of two from 16 on, or None"),
        ({"chunk_size": 8}, r"chunk_size is 8; allowed"),
        ({"initial_state": LinearState(MEMORY)}, r"initial_state.normalizer is missing with normalize=True"),
        ({"initial_state": LinearState(MEMORY, VECTOR)}, r"initial_state.log_scale is missing"),
        (
            {"initial_state": LinearState(MEMORY, VECTOR, NUMBER), "normalize": False},
            r"initial_state.normalizer is given with normalize=False",
        ),
        (
            {"initial_state": LinearState(MEMORY.mT, VECTOR, NUMBER)},
            r"initial_state.memory is torch.float32 \[2, 4, 24, 16\]; allowed is torch.float32 \[2, 4, 16, 24\]",
        ),
        ({"initial_state": LinearState(MEMORY, VECTOR.double(), NUMBER)}, r"initial_state.normalizer is torch.float64"),
        ({"initial_state": LinearState(MEMORY, VECTOR, NUMBER.to("meta"))}, r"initial_state.log_scale is on meta"),
        ({"backend": "tritan"}, r"backend='tritan' is not available here; allowed are None, 'reference', 'blocked'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_errors_name_the_argument(changed, message, backend):
    arguments = {
        "query": tokens(2, 100, 4, 16),
        "key": tokens(2, 100, 4, 16),
        "value": tokens(2, 100, 4, 24),
        "log_decay": tokens(2, 100, 4),
        "normalize": True,
        "backend": backend,
        **changed,
    }
    query, key, value = (arguments.pop(name) for name in INPUTS[:3])
    with pytest.raises(ValueError, match=message):
        linear_attention(query, key, value, **arguments)
