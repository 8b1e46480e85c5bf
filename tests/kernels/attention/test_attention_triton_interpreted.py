"""Rung 3: the Triton kernels against the definition, in Triton's interpreter on the CPU, in float32.

Runs only where TRITON_INTERPRET=1 is set before triton is imported; `test_attention_triton.py` starts such a process.
Inputs lie in larger buffers of NaN, so that a load without mask or without `other` shows, and every buffer that the
kernels are given to write is NaN before and lies between guard bands.
"""

import os

import pytest
import torch
from attention_cases import Case, assert_close, built, documents, ragged, sorted_buckets

from longmix_kernels.attention import attention, launch
from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.reference import attention_reference

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own")

TOLERANCE = 1e-5
GUARD = 64
RESULTS = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")


def shape(name: str, bounds=None, **changed) -> Case:
    """A small case: one batch row and two heads, unless said otherwise; bounds are None where options say it all."""
    return Case(name, bounds, **{"batch": 1, "queries": 63, **changed})


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
]


@pytest.fixture(autouse=True)
def guarded_buffers(monkeypatch):
    """Give out new tensors that are NaN and lie between NaN; check afterwards that nothing was written beside them."""
    buffers: list[tuple[torch.Tensor, int]] = []
    original = torch.Tensor.new_empty

    def new_empty(self, *size, dtype=None, **options):
        if options:
            return original(self, *size, dtype=dtype, **options)  # the interpreter's own
        size = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        buffer = torch.full((size.numel() + 2 * GUARD,), torch.nan, dtype=dtype or self.dtype)
        buffers.append((buffer, size.numel()))
        return buffer[GUARD : GUARD + size.numel()].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    # Forward: output and logsumexp. Backward: three gradients, and two numbers per row.
    assert len(buffers) >= 2
    for buffer, size in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[GUARD + size :].isnan().all()
        assert not buffer[GUARD : GUARD + size].isnan().any()


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """The same tensor [B, T, H, D] as a view into NaN, with other strides."""
    batch, length, heads, dim = x.shape
    buffer = torch.full((batch, length + 3, heads + 1, dim + 5), torch.nan, dtype=x.dtype)
    view = buffer[:, 1 : length + 1, :heads, 2 : dim + 2]
    return view.copy_(x.detach()).requires_grad_()


def call_options(case: Case, options: dict) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """What to call the public function with, and the bounds that this means."""
    options = dict(options)
    if case.bounds is not None:
        lo, hi = case.bounds(case)
        return {**options, "lo": lo, "hi": hi}, lo, hi
    if "document_ids" in options:
        options["document_ids"] = documents(case, options["document_ids"])
    arguments = {name: x for name, x in options.items() if name != "scale"}
    return options, *row_bounds(case.queries, case.keys or case.queries, **arguments)


def compare(case: Case, options: dict, through_logsumexp: bool = True) -> None:
    options, lo, hi = call_options(case, options)
    case = Case(**{**vars(case), "bounds": lambda case: (lo, hi)})
    tensors, _, scale = case.inputs(torch.float32)
    scale = options.pop("scale", scale)
    ours = [surrounded(x) for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    generator = torch.Generator().manual_seed(3)
    expected = attention_reference(*exact, Pattern(lo, hi), scale)
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


def test_without_a_gradient_of_the_logsumexp():
    compare(shape("documents-gqa", heads=4), {"document_ids": [13, 20, 3]}, through_logsumexp=False)


@pytest.mark.parametrize("tiles", [(16, 64), (64, 16), (32, 16)], ids=str)
def test_any_tile_sizes(tiles):
    config = launch.LaunchConfig(*tiles, warps=1, stages=1)
    with (
        launch.overridden("forward", config),
        launch.overridden("grad_query", config),
        launch.overridden("grad_key_value", config),
    ):
        compare(shape("ragged", ragged(), queries=130), {})
        compare(shape("window", queries=130), {"window": 70})


def test_a_gradient_without_strides():
    """The gradient of a sum is one number seen everywhere."""
    tensors, _, _ = Case("sum", built(), batch=1, queries=40).inputs(torch.float32)
    ours = torch.autograd.grad(attention(*tensors, backend="triton").sum(), tensors)
    wanted = torch.autograd.grad(attention(*tensors, backend="reference").sum(), tensors)
    for name, a, b in zip(RESULTS[2:], ours, wanted, strict=True):
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
