"""Rung 3: the Triton kernels against the definition, in Triton's interpreter on the CPU, in float32.

Runs only where TRITON_INTERPRET=1 is set before triton is imported; `test_attention_triton.py` starts such a process.
Inputs lie in larger buffers of NaN, so that a load without mask or without `other` shows, and every buffer that the
kernels are given to write is NaN before and lies between guard bands.
"""

import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    Case,
    alibi,
    assert_close,
    built,
    documents,
    in_blocks,
    permuted,
    ragged,
    random_blocks,
    sorted_buckets,
    together,
)
from guarded import beside, guarded_buffers, surrounded

from longmix_kernels.attention import (
    attention,
    attention_to_blocks,
    butterfly_blocks,
    key_blocks,
    launch,
    sink_and_local_blocks,
    stripe_blocks,
)
from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.reference import reference_forward

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own")

TOLERANCE = 1e-5
RESULTS = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")


def shape(name: str, bounds=None, **changed) -> Case:
    """A small case: one batch row and two heads, unless said otherwise; bounds are None where options say it all."""
    return Case(name, bounds, **{"batch": 1, "queries": 63, **changed})


def one_head(name: str, bounds=None, **changed) -> Case:
    """For cases of what lies within a head, such as tiles."""
    return shape(name, bounds, **{"heads": 1, "key_heads": 1, **changed})


def only(name: str):
    """Just one of the two orders."""
    return lambda case: {name: permuted(case)[name]}


def shared(case: Case) -> dict[str, object]:
    """One order for all batch rows and heads."""
    return {name: rows[:1, :1] for name, rows in permuted(case).items()}


def blocks_of_64(case: Case) -> dict[str, object]:
    """Blocks of more than one tile."""
    return {"blocks": random_blocks(case.keys or case.queries, 64)}


SMALL_KEYS = {"queries": 100, "keys": 40}
CASES: list[tuple[Case, dict]] = [
    *((shape(f"causal-T{n}", queries=n), {}) for n in (1, 15, 17, 63, 100, 130)),
    *((shape(f"causal-d{d}", dim=d), {}) for d in (1, 48, 80)),
    (shape("causal-d64-v24", dim=64, value_dim=24, queries=17), {}),
    (shape("causal-d16-v48", value_dim=48), {}),
    (shape("causal-d96-v16-gqa", dim=96, value_dim=16, heads=4), {}),
    (shape("causal-d144", dim=144, queries=17, heads=1, key_heads=1), {}),
    (shape("causal-mqa-two-batch-rows", heads=3, key_heads=1, batch=2, queries=40), {}),
    (shape("full-T17", queries=17), {"causal": False}),
    (shape("full-T100-gqa", queries=100, heads=4), {"causal": False}),
    (shape("cross", **SMALL_KEYS), {"causal": False}),
    (shape("more-queries-than-keys", **SMALL_KEYS), {}),
    (shape("more-queries-than-keys-window", **SMALL_KEYS), {"window": 9}),
    (shape("window-1", queries=40), {"window": 1}),
    (shape("window-7-d48", dim=48), {"window": 7}),
    (shape("window-50-T130-gqa", queries=130, heads=4), {"window": 50}),
    (shape("window-longer-than-T"), {"window": 2**31 - 1}),
    (shape("decode", queries=1, keys=100), {}),
    (shape("decode-window", queries=1, keys=100), {"window": 20}),
    (shape("prefill-chunk", queries=40, keys=130), {}),
    (shape("prefill-chunk-window", queries=40, keys=130), {"window": 30}),
    (shape("documents", batch=2), {"document_ids": [13, 20, 3]}),
    (shape("documents-T130-gqa-v48", heads=4, value_dim=48, queries=130), {"document_ids": [50, 1, 40]}),
    (shape("documents-window"), {"document_ids": [13, 30, 3], "window": 9}),
    (shape("documents-full", batch=2), {"document_ids": [13, 20, 3], "causal": False}),
    (shape("prefill-chunk-documents", queries=40, keys=100), {"document_ids": [30, 50]}),
    (shape("bounds-equal-causal", built()), {}),
    (shape("buckets-per-head-gqa", sorted_buckets(3), heads=4), {}),
    (shape("buckets-window", sorted_buckets(3, window=20), batch=2), {}),
    (shape("ragged-d48", ragged(), dim=48, queries=100), {}),
    (shape("ragged-shared-by-heads", ragged(per_head=False), batch=2), {}),
    (shape("ragged-empty-rows", ragged(sparse=True), batch=2), {}),
    (shape("ragged-empty-rows-T130-mqa", ragged(sparse=True), queries=130, heads=3, key_heads=1), {}),
    (shape("ragged-wide", ragged(), queries=40, keys=130), {}),
    (shape("nothing-visible", lambda case: (torch.full((1, 1, 63), 7, dtype=torch.int32),) * 2), {}),
    (shape("scores-150", spread=3.0), {}),
    (shape("scale-negative", queries=40), {"scale": -0.7}),
    (shape("scale-zero", queries=40), {"scale": 0.0}),
    (shape("alibi-T130-gqa", queries=130, heads=4, extras=alibi), {}),
    (shape("alibi-window-d48", dim=48, extras=alibi), {"window": 30}),
    (shape("alibi-documents", batch=2, extras=alibi), {"document_ids": [13, 20, 3]}),
    (shape("alibi-prefill-chunk", queries=40, keys=130, extras=alibi), {}),
    (shape("alibi-scale-negative", queries=40, extras=alibi), {"scale": -0.7}),
    (shape("alibi-scale-zero", queries=40, extras=alibi), {"scale": 0.0}),
    (
        shape(
            "alibi-steep-T257",
            queries=257,
            heads=1,
            key_heads=1,
            extras=lambda c: {"alibi_slopes": torch.tensor([3.7])},
        ),
        {},
    ),
    (
        shape("blocks-sink-local-gqa", queries=130, heads=4, extras=in_blocks(sink_and_local_blocks, sink=1, local=2)),
        {},
    ),
    (shape("blocks-stripe-window", queries=130, extras=in_blocks(stripe_blocks, local=1, stride=3)), {"window": 70}),
    (shape("blocks-butterfly-chunk", queries=84, keys=132, extras=in_blocks(butterfly_blocks)), {}),
    (shape("blocks-chunk-window", queries=84, keys=132, extras=in_blocks(random_blocks)), {"window": 50}),
    (shape("blocks-random", queries=130, batch=2, dim=48, extras=in_blocks(random_blocks)), {}),
    (shape("blocks-random-full", queries=130, value_dim=48, extras=in_blocks(random_blocks)), {"causal": False}),
    (shape("blocks-of-64-T257", queries=257, extras=blocks_of_64), {}),
    (shape("blocks-of-64-full-chunk", queries=72, keys=200, extras=blocks_of_64), {"causal": False}),
    (shape("blocks-documents", queries=130, batch=2, extras=in_blocks(random_blocks)), {"document_ids": [50, 1, 40]}),
    (
        shape("blocks-documents-full", queries=130, batch=2, extras=in_blocks(random_blocks)),
        {"document_ids": [50, 1, 40], "causal": False},
    ),
    (shape("blocks-alibi-gqa", queries=100, heads=4, extras=together(alibi, in_blocks(butterfly_blocks))), {}),
]
# Rows in another order; "hi" of None is where a row's own place ends what it sees.
PERMUTED: list[tuple[Case, dict]] = [
    (shape("documents-T130-gqa", sorted_buckets(3), queries=130, heads=4, extras=permuted), {"hi": None}),
    (shape("buckets-d48-two-batch-rows", sorted_buckets(3), batch=2, dim=48, extras=permuted), {}),
    (shape("ragged-T100-v48", ragged(), queries=100, value_dim=48, extras=permuted), {}),
    (shape("ragged-empty-rows-T130-mqa", ragged(sparse=True), queries=130, heads=3, key_heads=1, extras=permuted), {}),
    (shape("cross", ragged(per_head=False), queries=40, keys=130, extras=permuted), {}),
    (shape("one-order-for-all", built(window=20), batch=2, extras=shared), {}),
    (shape("queries", ragged(), extras=only("query_rows")), {}),
    (shape("keys", ragged(sparse=True), batch=2, extras=only("key_rows")), {}),
    (shape("alibi-ragged-gqa", ragged(), heads=4, extras=together(alibi, permuted)), {}),
    (shape("alibi-documents", sorted_buckets(2), extras=together(alibi, permuted)), {"hi": None}),
    (shape("alibi-cross", ragged(), queries=40, keys=100, extras=together(alibi, permuted)), {}),
]


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    # Forward: output and logsumexp. Backward: three gradients, and two numbers per row.
    with guarded_buffers(monkeypatch, least=2):
        yield


def call_options(case: Case, options: dict) -> tuple[dict, Pattern]:
    """What to call the public function with, and the pattern that this means."""
    extras = case.extras(case)
    if case.bounds is not None:
        lo, hi = case.bounds(case)
        return {"lo": lo, "hi": hi, **extras, **options}, Pattern(lo, hi, **extras)
    options = dict(options)
    if "document_ids" in options:
        options["document_ids"] = documents(case, options["document_ids"])
    arguments = {name: x for name, x in options.items() if name != "scale"}
    bounds = row_bounds(case.queries, case.keys or case.queries, **arguments)
    return {**options, **extras}, Pattern(*bounds, **extras)


def compare(case: Case, options: dict, through_logsumexp: bool = True, laid=surrounded) -> None:
    options, pattern = call_options(case, options)
    case = replace(case, bounds=lambda case: pattern.bounds())
    tensors, _, scale = case.inputs(torch.float32)
    scale = options.pop("scale", scale)
    ours = [laid(x) for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    generator = torch.Generator().manual_seed(3)
    expected = reference_forward(Inputs(*exact, pattern, scale))
    grad_output = torch.randn(expected[0].shape, generator=generator)
    grad_logsumexp = torch.randn(expected[1].shape, generator=generator)
    # What arrives for a row that sees nothing must not matter.
    empty = expected[1].isneginf()
    hostile = grad_logsumexp.masked_fill(empty, torch.nan)

    loss = (expected[0] * grad_output).sum()
    if through_logsumexp:
        loss = loss + (expected[1].masked_fill(empty, 0.0) * grad_logsumexp).sum()
    expected = [*expected, *torch.autograd.grad(loss, exact)]

    results = attention(*ours, scale=scale, return_logsumexp=True, backend="triton", **options)
    outputs = results if through_logsumexp else results[:1]
    grads = (surrounded(grad_output).detach(), hostile)[: len(outputs)]
    results = [*results, *torch.autograd.grad(outputs, ours, grads)]
    for name, result, wanted in zip(RESULTS, results, expected, strict=True):
        assert_close(result, wanted, TOLERANCE, name)


@pytest.mark.parametrize(("case", "options"), CASES, ids=[case.name for case, _ in CASES])
def test_matches_reference(case, options):
    compare(case, options)


@pytest.mark.parametrize("where", ["in-kernel", "before"])
@pytest.mark.parametrize(("case", "options"), PERMUTED, ids=[case.name for case, _ in PERMUTED])
def test_permuted_rows_match_reference(case, options, where):
    with launch.gathered_before() if where == "before" else nullcontext():
        compare(case, options)


def test_without_a_gradient_of_the_logsumexp():
    compare(shape("documents-gqa", heads=4), {"document_ids": [13, 20, 3]}, through_logsumexp=False)


@pytest.mark.parametrize("tiles", [(16, 64), (64, 16), (32, 16)], ids=str)
def test_any_tile_sizes(tiles):
    config = launch.LaunchConfig(*tiles, warps=1, stages=1)
    with (
        launch.TABLE.override("forward", config),
        launch.TABLE.override("grad_query", config),
        launch.TABLE.override("grad_key_value", config),
    ):
        compare(one_head("ragged", ragged(), queries=130), {})
        compare(one_head("window", queries=130), {"window": 70})
        compare(one_head("permuted", ragged(), queries=100, extras=permuted), {})
        compare(one_head("blocks-of-64", queries=200, extras=blocks_of_64), {"window": 150})


DESCRIBED: list[tuple[Case, dict]] = [
    (shape("causal", queries=130), {}),
    (one_head("full", queries=130), {"causal": False}),
    (one_head("window", queries=130), {"window": 70}),
    (shape("prefill-gqa", batch=2, queries=40, keys=130, heads=4), {}),
    (one_head("documents", queries=130), {"document_ids": [100, 1, 29]}),
    (one_head("ragged", ragged(), queries=130), {}),
    (one_head("values-wider", queries=130, dim=16, value_dim=32), {}),
    (one_head("blocks-of-64", queries=200, extras=blocks_of_64), {}),
    (one_head("alibi", queries=130, extras=alibi), {}),
]


@pytest.mark.parametrize(("case", "options"), DESCRIBED, ids=[case.name for case, _ in DESCRIBED])
def test_loads_through_tensor_descriptors(case, options, monkeypatch):
    made = []
    steps = launch.Call.steps
    monkeypatch.setattr(launch.Call, "steps", lambda call, kernel: made.append(steps(call, kernel)) or made[-1])
    with launch.TABLE.override("forward", launch.LaunchConfig(16, 32, warps=1, stages=1, descriptors=True)):
        compare(case, options, laid=beside)
    assert all(x is not None for pair in made for x in pair)


def test_a_gradient_without_strides():
    """The gradient of a sum is one number seen everywhere."""
    tensors, _, _ = Case("sum", built(), batch=1, queries=40).inputs(torch.float32)
    ours = torch.autograd.grad(attention(*tensors, backend="triton").sum(), tensors)
    wanted = torch.autograd.grad(attention(*tensors, backend="reference").sum(), tensors)
    for name, a, b in zip(RESULTS[2:], ours, wanted, strict=True):
        assert_close(a, b, TOLERANCE, name)


def test_blocks_that_queries_choose():
    """More rows than keys, sorted by block."""
    tensors = [torch.randn(1, 40, heads, 16).requires_grad_() for heads in (4, 2, 2)]
    blocks = key_blocks(40, 8)
    chosen = torch.rand(1, 40, 2, 6).argsort(-1)[..., :3]
    results = []
    for backend in ("triton", "reference"):
        output, logsumexp = attention_to_blocks(*tensors, chosen, blocks, backend=backend)
        results.append([output, logsumexp, *torch.autograd.grad(output.square().sum() + logsumexp.sum(), tensors)])
    for name, a, b in zip(RESULTS, *results, strict=True):
        assert_close(a, b, TOLERANCE, name)


def test_two_runs_are_equal_bit_for_bit():
    case = shape("documents-gqa", heads=4)
    ids = documents(case, [13, 20, 3])
    runs = []
    for _ in range(2):
        tensors, _, _ = Case(**{**vars(case), "bounds": built()}).inputs(torch.float32)
        output = attention(*tensors, document_ids=ids, backend="triton")
        runs.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_half_precision_inputs_are_stored_in_their_own_dtype():
    """Products are upcast in the interpreter, so this is about loads, casts and stores only."""
    tensors, _, _ = Case("half", built(), batch=1, queries=40).inputs(torch.bfloat16)
    output, logsumexp = attention(*tensors, backend="triton", return_logsumexp=True)
    wanted = attention(*tensors, backend="reference")
    assert output.dtype == torch.bfloat16 and logsumexp.dtype == torch.float32
    assert_close(output, wanted, 0.02, "output")
    for grad in torch.autograd.grad(output.sum(), tensors):
        assert grad.dtype == torch.bfloat16
