"""The public function: errors, dtypes, autograd, autocast and torch.compile."""

import pytest
import torch
from attention_cases import CASES, TOLERANCE, Case, assert_close, built, permuted, ragged
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longmix_kernels.attention import attention, blocked, butterfly_blocks, row_bounds, sink_and_local_blocks
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.panels import MATMUL

CASE = Case("op", built([40, 30], window=20), heads=4, value_dim=24)


def tensors(dtype: torch.dtype = torch.float32, case: Case = CASE) -> list[torch.Tensor]:
    return case.inputs(dtype)[0]


def ids(length: int = 100) -> torch.Tensor:
    return (torch.arange(length) // 30).int().expand(2, -1).contiguous()


def results(inputs, grads=None, **options):
    """Output, logsumexp and the gradients of both."""
    output, logsumexp = attention(*inputs, return_logsumexp=True, **options)
    if grads is None:
        grads = torch.cos(output.detach()), torch.cos(logsumexp.detach())
    return [output, logsumexp, *torch.autograd.grad((output, logsumexp), inputs, grads)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 9},
        {"document_ids": ids()},
        {"document_ids": ids(), "window": 9, "scale": 0.5},
        {"document_ids": ids(), "causal": False},
        dict(zip(("lo", "hi"), ragged()(CASE), strict=True)),
        {**dict(zip(("lo", "hi"), ragged()(CASE), strict=True)), **permuted(CASE)},
        {"lo": torch.arange(100).int()[None, None] // 30 * 30, **permuted(CASE)},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 1.0, 0.0]), "window": 30},
        {"blocks": butterfly_blocks(100, 16), "document_ids": ids()},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_backends_agree(options):
    got = results(tensors(torch.float64), backend="blocked", **options)
    want = results(tensors(torch.float64), backend="reference", **options)
    for name, a, b in zip(("output", "logsumexp", "query", "key", "value"), got, want, strict=True):
        assert_close(a, b, TOLERANCE[torch.float64], name)
    assert torch.equal(attention(*tensors(torch.float64), **options), got[0])


def test_results_follow_the_contract():
    query, key, value = tensors()
    output, logsumexp = attention(query, key, value, return_logsumexp=True)
    assert output.shape == (2, 100, 4, 24) and logsumexp.shape == (2, 100, 4)
    assert output.is_contiguous() and output.dtype == logsumexp.dtype == torch.float32
    assert isinstance(attention(query, key, value), torch.Tensor)
    half = attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), return_logsumexp=True)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_plain_torch(dtype):
    """Error at most twice that of a plain implementation in the same dtype, both against float64."""
    case = Case("half", built(), queries=257, heads=4, key_heads=4, dim=64)
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors(torch.float64, case)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(2, 257, 4, 64).to(dtype)

    def plain(query, key, value):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        hidden = torch.ones(257, 257, dtype=torch.bool).triu(1)
        return ((q @ k.mT) * 64**-0.5).masked_fill(hidden, -torch.inf).softmax(-1).matmul(v).transpose(1, 2)

    outputs = [plain(*exact), plain(*inputs), attention(*inputs)]
    expected, plain_results, ours = (
        [o, *torch.autograd.grad(o, x, grad.to(o.dtype))] for o, x in zip(outputs, (exact, inputs, inputs), strict=True)
    )
    for want, plain_result, result in zip(expected, plain_results, ours, strict=True):
        assert result.dtype == dtype
        error, allowed = ((x.double() - want).square().mean().sqrt() for x in (result, plain_result))
        assert error <= 2 * allowed


def test_gradient_through_either_result_alone():
    inputs = tensors(torch.float64)
    output, logsumexp = attention(*inputs, return_logsumexp=True)
    both = torch.autograd.grad(output.sum() + logsumexp.sum(), inputs, retain_graph=True)
    from_output = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    from_logsumexp = torch.autograd.grad(logsumexp.sum(), inputs)
    for a, b, c in zip(both, from_output, from_logsumexp, strict=True):
        assert_close(b + c, a, 1e-12, "sum of gradients")


def test_an_unused_logsumexp_costs_nothing_in_the_backward():
    received = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.longmix.attention_blocked_backward.default:
                received.append(args[1])
            return func(*args, **(kwargs or {}))

    with Spy():
        attention(*tensors()).sum().backward()
    assert received == [None]


@pytest.mark.parametrize("queries", [1, 30, 32, 90])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_queries_that_begin_within_a_block(queries, backend):
    query, key, value = tensors(torch.float64)
    options = {"blocks": sink_and_local_blocks(100, 16, sink=1, local=2), "return_logsumexp": True, "backend": backend}
    whole = attention(query, key, value, **options)
    last = attention(query[:, -queries:], key, value, **options)
    for name, a, b in zip(("output", "logsumexp"), last, whole, strict=True):
        assert_close(a, b[:, -queries:], 1e-12, name)


def test_only_the_wanted_gradient():
    query, key, value = (x.detach() for x in tensors())
    key.requires_grad_()
    attention(query, key, value).sum().backward()
    assert key.grad.isfinite().all() and query.grad is None and value.grad is None


def test_any_strides_and_inputs_left_as_they_were():
    packed = torch.randn(2, 100, 3, 4, 16, dtype=torch.float64)
    inputs = [packed[:, :, i].requires_grad_() for i in range(3)]
    turned = [x.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_() for x in inputs]
    before = packed.clone()
    for a, b in zip(results(inputs), results(turned), strict=True):
        assert_close(a, b, 1e-12, "strides")
    assert torch.equal(before, packed)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_autocast_leaves_the_call_alone(backend):
    plain = attention(*tensors(), backend=backend, return_logsumexp=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention(*tensors(), backend=backend, return_logsumexp=True)
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


def test_autocast_leaves_the_backward_alone(monkeypatch):
    monkeypatch.setattr(blocked, "panel_math", lambda device: MATMUL)  # torch's own kernel is no autocast operation
    plain = results(tensors())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(tensors())
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("reference", False), ("blocked", False), ("blocked", True)],
    ids=["reference", "blocked", "blocked-dynamic"],
)
def test_compiles_as_one_graph(backend, dynamic):
    def call(query, key, value, document_ids):
        return attention(query, key, value, document_ids=document_ids, window=9, return_logsumexp=True, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (100, 70):
        inputs = [x.detach()[:, :length].clone().requires_grad_() for x in tensors(torch.float64)]
        got, want = compiled(*inputs, ids(length)), call(*inputs, ids(length))
        grads = [torch.autograd.grad(sum(x.square().sum() for x in pair), inputs) for pair in (got, want)]
        for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
            assert_close(a, b, 1e-12, "compiled")


OPERATOR_CASES = ["causal-T17", "documents-gqa-v48", "ragged-empty-rows", "permuted-buckets-gqa", "blocks-chunk-alibi"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OPERATOR_CASES)
# What a dtype can break, only half precision breaks: results and gradients of several dtypes.
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_operators_are_registered_correctly(name, dtype):
    case = next(case for case in CASES if case.name == name)
    inputs, pattern, scale = case.inputs(dtype)
    torch.library.opcheck(torch.ops.longmix.attention_blocked.default, Inputs(*inputs, pattern, scale).flat())
    flat = Inputs(*(x.detach() for x in inputs), pattern, scale).flat()
    output, logsumexp = torch.ops.longmix.attention_blocked(*flat)
    for grad_logsumexp in (None, torch.ones_like(logsumexp)):
        torch.library.opcheck(
            torch.ops.longmix.attention_blocked_backward.default,
            (torch.ones_like(output), grad_logsumexp, output, logsumexp, *flat),
        )


def bounds(**changed):
    lo, hi = row_bounds(100, 100)
    return {"lo": lo, "hi": hi, **changed}


def rows():
    return torch.arange(100, dtype=torch.int32)[None, None]


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"query": torch.zeros(100, 4, 16)}, {}, r"query has shape \[100, 4, 16\]; allowed is \[B, Tq, Hq, D\]"),
        ({"key": torch.zeros(2, 0, 2, 16)}, {}, r"key has shape \[2, 0, 2, 16\]; allowed .* at least 1"),
        ({"key": torch.zeros(2, 100, 2, 8)}, {}, r"key has shape \[2, 100, 2, 8\]; allowed is \[2, Tk, Hkv, 16\]"),
        ({"key": torch.zeros(1, 100, 2, 16)}, {}, r"key has shape \[1, 100, 2, 16\]; allowed is \[2, Tk"),
        ({"value": torch.zeros(2, 99, 2, 16)}, {}, r"value has shape \[2, 99, 2, 16\]; allowed is \[2, 100, 2, Dv\]"),
        ({"query": torch.zeros(2, 100, 3, 16)}, {}, r"key has 2 heads; allowed are the divisors of the 3 heads"),
        ({"value": torch.zeros(2, 100, 2, 16).half()}, {}, r"value has dtype torch.float16; allowed is torch.float32"),
        ({"query": torch.zeros(2, 100, 4, 16).int()}, {}, r"query has dtype torch.int32; allowed is torch.float16, t"),
        ({"key": torch.zeros(2, 100, 2, 16, device="meta")}, {}, r"key is on meta; allowed is cpu, where query is"),
        ({}, {"window": 0}, r"window=0 with causal=True; window must be at least 1"),
        ({}, {"window": 5, "causal": False}, r"window=5 with causal=False; .* needs causal=True"),
        ({}, {"document_ids": ids(50)}, r"document_ids has shape \[2, 50\]; allowed is \[2, 100\]"),
        ({}, {"document_ids": ids()[:1]}, r"document_ids has shape \[1, 100\]; allowed is \[2, 100\]"),
        ({}, {"document_ids": ids().to("meta")}, r"document_ids is on meta; allowed is cpu, where query is"),
        ({}, {"document_ids": ids().flip(1)}, r"document_ids must not decrease"),
        ({}, {"document_ids": ids().float()}, r"document_ids has dtype torch.float32; allowed are torch.int32"),
        ({}, {"hi": bounds()["hi"]}, r"got hi; hi, query_rows and key_rows come with lo"),
        ({}, {"query_rows": rows()}, r"got query_rows; hi, query_rows and key_rows come with lo"),
        ({}, bounds(window=4), r"got lo, hi, window; .* without window, document_ids, blocks, causal=False"),
        ({}, bounds(causal=False), r"got lo, hi, causal=False; "),
        ({}, bounds(document_ids=ids()), r"got lo, hi, document_ids; "),
        ({}, bounds(blocks=butterfly_blocks(100, 16)), r"got lo, hi, blocks; "),
        (
            {},
            bounds(query_rows=rows()[..., :99]),
            r"query_rows has shape \[1, 1, 99\]; allowed is \[2 or 1, 4 or 1, 100",
        ),
        ({}, bounds(key_rows=rows().expand(1, 4, 100)), r"key_rows has shape .*; allowed is \[2 or 1, 2 or 1, 100\]"),
        ({}, bounds(key_rows=rows().long()), r"key_rows has dtype torch.int64; allowed is torch.int32"),
        ({}, bounds(key_rows=rows() + 1), r"key_rows must hold every row number from 0 to 99 once"),
        ({}, bounds(query_rows=rows() // 2), r"query_rows must hold every row number from 0 to 99 once"),
        ({}, {"alibi_slopes": torch.ones(3)}, r"alibi_slopes is torch.float32 \[3\]; allowed is torch.float32 \[4\]"),
        ({}, {"alibi_slopes": torch.ones(4).double()}, r"alibi_slopes is torch.float64"),
        ({}, {"alibi_slopes": torch.ones(4, requires_grad=True)}, r"alibi_slopes requires a gradient"),
        ({}, {"alibi_slopes": torch.ones(4), "causal": False}, r"alibi_slopes with causal=False"),
        ({}, {"blocks": butterfly_blocks(100, 16)._replace(size=24)}, r"blocks.size is 24; allowed are powers of two"),
        ({}, {"blocks": butterfly_blocks(200, 16)}, r"blocks.row_offsets has 14 entries; allowed are 8 for 100 keys"),
        (
            {"query": torch.zeros(2, 101, 4, 16)},
            {"blocks": butterfly_blocks(100, 16)},
            r"blocks got 101 queries and 100",
        ),
        ({}, bounds(lo=torch.zeros(1, 1, 99).int()), r"lo has shape \[1, 1, 99\]; allowed is \[2 or 1, 4 or 1, 100\]"),
        ({}, bounds(hi=torch.zeros(3, 1, 100).int()), r"hi has shape \[3, 1, 100\]; allowed is"),
        ({}, bounds(hi=torch.zeros(1, 2, 100).int()), r"hi has shape \[1, 2, 100\]; allowed is"),
        ({}, bounds(hi=torch.zeros(1, 1, 100)), r"hi has dtype torch.float32; allowed is torch.int32"),
        ({}, bounds(lo=torch.zeros(1, 1, 100, device="meta").int()), r"lo is on meta; allowed is cpu"),
        ({}, bounds(hi=bounds()["hi"].flip(-1)), r"hi must not decrease along its last axis, but row 1 is below"),
        ({}, bounds(hi=bounds()["hi"] + 1), r"hi ends at 101; lo must be >= 0 and hi <= 100"),
        ({}, bounds(lo=bounds()["lo"] - 1), r"lo starts at -1 .* lo must be >= 0"),
        (
            {},
            {"backend": "tritan"},
            r"backend='tritan' is not available here; allowed are None, 'reference', 'blocked'",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_errors_name_the_argument(changed, options, message, backend):
    inputs = {
        "query": torch.zeros(2, 100, 4, 16),
        "key": torch.zeros(2, 100, 2, 16),
        "value": torch.zeros(2, 100, 2, 16),
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        attention(**inputs, **{"backend": backend, **options})


def test_a_second_derivative_is_refused():
    inputs = tensors(torch.float64)
    (grad,) = torch.autograd.grad(attention(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|grad"):
        grad.sum().backward()


def test_equals_torch_attention_at_its_defaults():
    query, key, value = tensors(torch.float64)
    oracle = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), is_causal=True, enable_gqa=True
    )
    assert_close(attention(query, key, value), oracle.transpose(1, 2), 1e-12, "output")
