"""The public function: errors, dtypes, autograd, autocast and torch.compile."""

from dataclasses import replace

import pytest
import torch
from scatter_cases import CASES, INPUTS, Case, assert_close, call, everything, gradients, plain

from longmix_kernels.scatter import FeatureState, ScatterResult, scatter_attention

CASE = Case("op", length=70, heads=4, documents=(30, 11), with_state=True)
every_backend = pytest.mark.parametrize("backend", ["reference", "blocked"])


@every_backend
def test_results_follow_the_contract(backend):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        inputs = CASE.inputs(dtype)
        result = call(CASE, inputs, backend=backend)
        exact = torch.promote_types(dtype, torch.float32)
        assert isinstance(result, ScatterResult) and all(x.is_contiguous() for x in result)
        assert result.output.shape == (2, 70, 4, 12) and result.output.dtype == dtype
        assert result.logsumexp.shape == result.exact_logsumexp.shape == (2, 70, 4)
        assert result.logsumexp.dtype == result.exact_logsumexp.dtype == exact
        assert not result.exact_logsumexp.requires_grad
        assert (result.exact_logsumexp <= result.logsumexp + 1e-5).all()
        for name, grad in gradients(result, inputs).items():
            assert grad.dtype == inputs[name].dtype and grad.shape == inputs[name].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    half = CASE.inputs(dtype)
    single = {name: x.detach().float().requires_grad_() for name, x in half.items()}
    for a, b in zip(call(CASE, half), call(CASE, single), strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_bfloat16_is_as_accurate_as_plain_torch():
    """Error at most twice that of a plain implementation in bfloat16, both against float64."""
    case = Case("half", length=257, dim=64, value_dim=64, features=32, block_size=32)
    found = []
    for dtype, run in (
        (torch.float64, lambda inputs: plain(case, inputs, torch.float64)),
        (torch.bfloat16, lambda inputs: plain(case, inputs, torch.bfloat16)),
        (torch.bfloat16, lambda inputs: call(case, inputs)),
    ):
        inputs = {name: None if x is None else x.detach() for name, x in case.inputs(torch.bfloat16).items()}
        inputs = {n: x if x is None or dtype != torch.float64 else x.double() for n, x in inputs.items()}
        inputs = {n: None if x is None else x.requires_grad_() for n, x in inputs.items()}
        result = run(inputs)
        found.append({"output": result.output, **gradients(result, inputs)})
    for name, exact in found[0].items():
        allowed, error = ((x[name].double() - exact).square().mean().sqrt() for x in found[1:])
        assert error <= 2 * allowed, name


def test_gradient_through_either_result_alone():
    inputs = CASE.inputs(torch.float64)
    output, logsumexp, _ = call(CASE, inputs)
    tensors = list(inputs.values())
    both = torch.autograd.grad(output.sum() + logsumexp.sum(), tensors, retain_graph=True)
    from_output = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    from_logsumexp = torch.autograd.grad(logsumexp.sum(), tensors)
    for name, a, b, c in zip(INPUTS, both, from_output, from_logsumexp, strict=True):
        assert_close(b + c, a, 1e-12, name)


@pytest.mark.parametrize("wanted", INPUTS)
def test_only_wanted_gradients(wanted):
    inputs = CASE.inputs(torch.float64)
    expected = gradients(call(CASE, inputs), inputs)[wanted]
    inputs = {name: x.detach().requires_grad_(name == wanted) for name, x in inputs.items()}
    grads = gradients(call(CASE, inputs), {wanted: inputs[wanted]})
    assert_close(grads[wanted], expected, 1e-14, wanted)


@pytest.mark.parametrize("documents", [(30, 11), ()], ids=["documents", "one"])
@pytest.mark.parametrize("axes", [(-2, -1), (0, 1), (1, 2)], ids=str)
def test_any_strides_and_inputs_left_as_they_were(axes, documents):
    case = replace(CASE, documents=documents)
    inputs = case.inputs(torch.float64)
    copies = {name: x.detach().clone() for name, x in inputs.items()}
    turned = {name: x.detach().transpose(*axes).contiguous().transpose(*axes) for name, x in inputs.items()}
    turned = {name: x.requires_grad_() for name, x in turned.items()}
    expected, got = everything(case, inputs), everything(case, turned)
    for name in expected:
        assert_close(got[name], expected[name], 1e-13, name)
    assert all(torch.equal(copies[name], x) for name, x in inputs.items())


@every_backend
def test_autocast_leaves_the_call_alone(backend):
    outside = everything(CASE, CASE.inputs(torch.float32), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(CASE, CASE.inputs(torch.float32), backend=backend)
    for name in ("output", "logsumexp", *(outside if backend == "blocked" else ())):
        assert inside[name].dtype == torch.float32 and torch.equal(outside[name], inside[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("changed", [{}, {"features": 0, "with_state": False}], ids=str)
def test_compiles_as_one_graph(changed, dynamic):
    def run(inputs, document_ids):
        return call(CASE, inputs, document_ids=document_ids)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (70, 45):
        case = Case("compiled", length=length, heads=4, documents=(30, 11), **{"with_state": True, **changed})
        found = []
        for function in (compiled, run):
            inputs = case.inputs(torch.float64)
            result = function(inputs, case.document_ids())
            found.append([*result, *gradients(result, inputs).values()])
        for a, b in zip(*found, strict=True):
            assert_close(a, b, 1e-12, "compiled")


OPERATOR_CASES = ["T17", "no-features", "documents", "grouped", "some-queries-state-documents"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OPERATOR_CASES)
# What a dtype can break, only half precision breaks: results and gradients of several dtypes.
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_operators_are_registered_correctly(name, dtype):
    case = next(case for case in CASES if case.name == name)
    inputs = case.inputs(dtype)
    options = case.document_ids(), case.block_size, case.past_blocks, 0.5
    torch.library.opcheck(torch.ops.longmix.scatter_blocked.default, (*inputs.values(), *options))
    tensors = [None if x is None else x.detach() for x in inputs.values()]
    output, logsumexp, _ = torch.ops.longmix.scatter_blocked(*tensors, *options)
    for grad in (None, torch.ones_like(logsumexp)):
        backward = torch.ops.longmix.scatter_blocked_backward.default
        torch.library.opcheck(backward, (torch.ones_like(output), grad, output, logsumexp, *tensors, *options))


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


IDS = torch.arange(100).int().expand(2, -1) // 30


def state(**changed) -> FeatureState:
    parts = {"memory": zeros(2, 2, 8, 24), "normalizer": zeros(2, 2, 8), "log_scale": zeros(2, 2, 8), **changed}
    return FeatureState(**parts)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": zeros(100, 4, 16)}, r"query has shape \[100, 4, 16\]; allowed is \[B, Tq, Hq, D\] with every size"),
        ({"key": zeros(2, 100, 3, 16), "value": zeros(2, 100, 3, 24)}, r"key has 3 heads; allowed are the divisors"),
        ({"value": zeros(2, 99, 2, 24)}, r"value has shape \[2, 99, 2, 24\]; allowed is \[2, 100, 2, Dv\] as key"),
        ({"query": zeros(2, 101, 4, 16)}, r"query has 101 rows and key 100; allowed are at most as many"),
        ({"block_size": 0}, r"block_size is 0 and past_blocks is 1; allowed are at least 1 and at least 0"),
        ({"past_blocks": -1}, r"block_size is 16 and past_blocks is -1; allowed are"),
        ({"query_features": None}, r"query_features is missing; query_features and key_features come together"),
        ({"key_features": None}, r"key_features is missing; "),
        ({"query_features": zeros(2, 100, 2, 8)}, r"query_features has shape .*; allowed is \[2, 100, 4\] and m"),
        ({"key_features": zeros(2, 100, 4, 8)}, r"key_features has shape .*; allowed is \[2, 100, 2\] and m"),
        ({"key_features": zeros(2, 100, 2, 0)}, r"key_features has shape .*; allowed is .* and m, at least 1"),
        (
            {"key_features": zeros(2, 100, 2, 7)},
            r"key_features has shape .*; allowed are 8 features, as query_features",
        ),
        (
            {"query_features": zeros(2, 100, 4, 8).half()},
            r"query_features has dtype torch.float16; allowed is torch.fl",
        ),
        ({"key_features": zeros(2, 100, 2, 8, device="meta")}, r"key_features is on meta; allowed is cpu"),
        (
            {"initial_state": state(memory=zeros(2, 2, 24, 8))},
            r"initial_state.memory is .*; allowed is torch.float32 \[",
        ),
        (
            {"initial_state": state(normalizer=zeros(2, 4, 8))},
            r"initial_state.normalizer is .* \[2, 4, 8\]; allowed is",
        ),
        (
            {"initial_state": state(log_scale=zeros(2, 2, 8).half())},
            r"initial_state.log_scale is torch.float16 .*; allo",
        ),
        ({"initial_state": state(memory=zeros(2, 2, 8, 24, device="meta"))}, r"initial_state.memory is on meta"),
        (
            {"initial_state": state(), "query_features": None, "key_features": None},
            r"initial_state is given without key_features; allowed is None",
        ),
        ({"document_ids": IDS[:, 1:]}, r"document_ids is torch.int32 \[2, 99\]; allowed is torch.int32 or torch.int64"),
        ({"document_ids": IDS.float()}, r"document_ids is torch.float32 .*; allowed is torch.int32 or torch.int64"),
        ({"document_ids": IDS.to("meta")}, r"document_ids is on meta; allowed is cpu"),
        ({"document_ids": IDS.flip(1)}, r"document_ids must not decrease along its last axis"),
        ({"backend": "tritan"}, r"backend='tritan' is not available here; allowed are None, 'reference', 'blocked'"),
        ({"backend": "triton"}, r"backend='triton' got tensors on cpu; allowed are a CUDA device"),
    ],
)
@every_backend
def test_errors_name_the_argument(changed, message, backend):
    arguments = {"query": zeros(2, 100, 4, 16), "key": zeros(2, 100, 2, 16), "value": zeros(2, 100, 2, 24)}
    arguments |= {"query_features": zeros(2, 100, 4, 8), "key_features": zeros(2, 100, 2, 8)}
    arguments |= {"block_size": 16, "past_blocks": 1, "backend": backend, **changed}
    with pytest.raises(ValueError, match=message):
        scatter_attention(**arguments)


def test_a_second_derivative_is_refused():
    inputs = CASE.inputs(torch.float64)
    output = call(CASE, inputs).output
    (grad,) = torch.autograd.grad(output.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|grad"):
        grad.sum().backward()
