"""Few queries over keys in parts against the definition, in Triton's interpreter on the CPU, in float32.

Runs only where TRITON_INTERPRET=1 is set before triton is imported; `test_attention_split.py` starts such a process.
"""

import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, alibi, assert_close, built, documents, permuted, ragged, sorted_buckets, together
from guarded import guarded_buffers, surrounded

from longmix_kernels.attention import attention, launch, split_launch
from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.reference import reference_forward

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own")


def shape(name: str, bounds=None, **changed) -> Case:
    """A small case: one query, and keys for seven steps."""
    return Case(name, bounds, **{"batch": 1, "queries": 1, "keys": 100, **changed})


def only(name: str):
    """Just one of the two orders."""
    return lambda case: {name: permuted(case)[name]}


CASES: list[tuple[Case, dict]] = [
    *((shape(f"causal-Tq{n}", queries=n), {}) for n in (1, 2, 15)),
    *((shape(f"causal-Tk{n}", keys=n), {}) for n in (32, 33, 257)),
    *((shape(f"causal-d{d}", dim=d, queries=3), {}) for d in (1, 24, 48, 144)),
    (shape("causal-d64-v24", dim=64, value_dim=24), {}),
    (shape("causal-d16-v80", value_dim=80), {}),
    (shape("gqa", heads=6, queries=3), {}),
    (shape("gqa-more-than-a-tile", heads=10, queries=7, batch=2), {}),
    (shape("mqa", heads=5, key_heads=1, batch=3), {}),
    (shape("full", queries=5), {"causal": False}),
    (shape("as-many-queries-as-keys", queries=15, keys=15), {}),
    (shape("more-queries-than-keys", queries=15, keys=8), {}),
    (shape("window", queries=3), {"window": 50}),
    (shape("window-1", queries=4, heads=4), {"window": 1}),
    (shape("window-longer-than-T"), {"window": 2**31 - 1}),
    (shape("documents", batch=2, queries=5), {"document_ids": [30, 40]}),
    (shape("documents-border-between-queries", queries=9, heads=4), {"document_ids": [96]}),
    (shape("documents-window", queries=5), {"document_ids": [30], "window": 40}),
    (shape("documents-full", batch=2, queries=5), {"document_ids": [30, 40], "causal": False}),
    (shape("bounds-equal-causal", built(), queries=5), {}),
    (shape("buckets-per-head-gqa", sorted_buckets(3), heads=4, queries=15, keys=15), {}),
    (shape("ragged-d48", ragged(), dim=48, queries=11), {}),
    (shape("ragged-heads-apart-gqa", ragged(), heads=6, queries=2, batch=2), {}),
    (shape("ragged-shared-by-heads", ragged(per_head=False), queries=6, heads=4), {}),
    (shape("ragged-empty-rows", ragged(sparse=True), queries=15, batch=2), {}),
    (shape("ragged-empty-rows-mqa", ragged(sparse=True), queries=9, heads=3, key_heads=1), {}),
    (shape("nothing-visible", lambda case: (torch.full((1, 1, 3), 7, dtype=torch.int32),) * 2, queries=3), {}),
    (shape("scores-150", spread=3.0), {}),
    (shape("scale-negative", queries=4), {"scale": -0.7}),
    (shape("scale-zero", queries=4), {"scale": 0.0}),
    (shape("alibi-gqa", heads=6, queries=3, extras=alibi), {}),
    (shape("alibi-window-d48", dim=48, queries=3, extras=alibi), {"window": 30}),
    (shape("alibi-documents", batch=2, queries=3, extras=alibi), {"document_ids": [30, 40]}),
    (shape("alibi-scale-negative", queries=3, extras=alibi), {"scale": -0.7}),
]
PERMUTED: list[tuple[Case, dict]] = [
    (shape("ragged", ragged(), queries=7, extras=permuted), {}),
    (shape("ragged-gqa-v48", ragged(), queries=7, heads=6, batch=2, value_dim=48, extras=permuted), {}),
    (shape("buckets", sorted_buckets(2), queries=15, keys=15, heads=4, extras=permuted), {"hi": None}),
    (shape("queries", ragged(), queries=9, heads=4, extras=only("query_rows")), {}),
    (shape("keys", ragged(sparse=True), queries=9, extras=only("key_rows")), {}),
    (shape("alibi-gqa", ragged(), queries=5, heads=4, extras=together(alibi, permuted)), {}),
]


@pytest.fixture
def parts(request, monkeypatch) -> int:
    """Let a call be cut into so many parts."""
    monkeypatch.setattr(split_launch, "splits_of", lambda programs, keys, processors: request.param)
    return request.param


def compare(case: Case, options: dict, monkeypatch) -> None:
    extras, options = case.extras(case), dict(options)
    if case.bounds is not None:
        lo, hi = case.bounds(case)
        options = {"lo": lo, "hi": hi, **options}
    else:
        if "document_ids" in options:
            options["document_ids"] = documents(case, options["document_ids"])
        arguments = {name: x for name, x in options.items() if name != "scale"}
        lo, hi = row_bounds(case.queries, case.keys, **arguments)
    pattern = Pattern(lo, hi, **extras)
    tensors, _, scale = replace(case, bounds=lambda case: (lo, hi)).inputs(torch.float32)
    scale = options.pop("scale", scale)
    expected = reference_forward(Inputs(*(x.detach().double() for x in tensors), pattern, scale))
    # Parts, their logsumexps, output and logsumexp: all are written, and nothing beside them.
    with torch.no_grad(), guarded_buffers(monkeypatch, least=4):
        found = attention(
            *map(surrounded, tensors), scale=scale, return_logsumexp=True, backend="triton", **options, **extras
        )
    for name, result, wanted in zip(("output", "logsumexp"), found, expected, strict=True):
        assert_close(result, wanted, 1e-5, name)


@pytest.mark.parametrize("parts", [2, 4], indirect=True)
@pytest.mark.parametrize(("case", "options"), CASES, ids=[case.name for case, _ in CASES])
def test_matches_reference(case, options, parts, monkeypatch):
    compare(case, options, monkeypatch)


@pytest.mark.parametrize("parts", [4], indirect=True)
@pytest.mark.parametrize("where", ["in-kernel", "before"])
@pytest.mark.parametrize(("case", "options"), PERMUTED, ids=[case.name for case, _ in PERMUTED])
def test_permuted_rows_match_reference(case, options, where, parts, monkeypatch):
    with launch.gathered_before() if where == "before" else nullcontext():
        compare(case, options, monkeypatch)


@pytest.mark.parametrize("parts", [8, 64], indirect=True)
def test_parts_without_keys(parts, monkeypatch):
    compare(shape("seven-steps", heads=4, queries=3), {}, monkeypatch)
    compare(shape("documents", queries=3), {"document_ids": [90]}, monkeypatch)


@pytest.mark.parametrize("keys", [16, 64])
@pytest.mark.parametrize("parts", [4], indirect=True)
def test_any_tile_sizes(keys, parts, monkeypatch):
    with split_launch.TABLE.override("split_forward", launch.LaunchConfig(16, keys, 1, 1)):
        compare(shape("ragged", ragged(), queries=9, keys=300), {}, monkeypatch)


def test_one_part_is_left_to_the_forward_kernel():
    """As where a batch is large, or there are few keys."""
    query, key, value = torch.randn(3, 1, 40, 2, 16)
    found = attention(query[:, :3], key, value, backend="triton")
    with_gradient = attention(query[:, :3].clone().requires_grad_(), key, value, backend="triton")
    assert torch.equal(found, with_gradient)
