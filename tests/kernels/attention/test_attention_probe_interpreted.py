"""The Triton kernels of attention with a probe against the definition, in Triton's interpreter on the CPU, in float32.

Runs only where TRITON_INTERPRET=1 is set before triton is imported; `test_attention_probe_triton.py` starts such a
process. Inputs lie in larger buffers of NaN; what kernels write is NaN before and lies between guard bands.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from attention_cases import Case, alibi, assert_close, built, documents, permuted, ragged, sorted_buckets, together
from guarded import guarded_buffers, surrounded
from probe_cases import RESULTS, called, incoming, probe_inputs

from longmix_kernels.attention import attention, launch, probe_attention, probe_launch, split_launch
from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.probe_reference import reference_forward

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own")

TOLERANCE = 1e-5


def shape(name: str, bounds=None, **changed) -> Case:
    """A small case: one batch row and two heads, unless said otherwise; bounds are None where options say it all."""
    return Case(name, bounds, **{"batch": 1, "queries": 63, **changed})


CASES: list[tuple[Case, dict]] = [
    *((shape(f"causal-T{n}", queries=n), {}) for n in (17, 63, 100)),
    (shape("causal-d48-v24-gqa", dim=48, value_dim=24, heads=4), {}),
    (shape("causal-d80-mqa-two-batch-rows", dim=80, heads=3, key_heads=1, batch=2, queries=40), {}),
    (shape("full-T40", queries=40), {"causal": False}),
    (shape("more-queries-than-keys-window", queries=70, keys=40), {"window": 9}),
    (shape("window-50-T100-gqa", queries=100, heads=4), {"window": 50}),
    (shape("prefill-chunk-documents", queries=40, keys=100), {"document_ids": [30, 50]}),
    (shape("documents-T100-v48", value_dim=48, queries=100), {"document_ids": [50, 1, 40]}),
    (shape("documents-window"), {"document_ids": [13, 30, 3], "window": 9}),
    (shape("ragged-empty-rows-mqa", ragged(sparse=True), heads=3, key_heads=1, batch=2), {}),
    (shape("ragged-wide", ragged(), queries=40, keys=100), {}),
    (shape("scores-150", spread=3.0, queries=40), {}),
    (shape("scale-negative", queries=40), {"scale": -0.7}),
    (shape("alibi-gqa", heads=4, extras=alibi), {"window": 30}),
]
PERMUTED: list[tuple[Case, dict]] = [
    (shape("documents-gqa", sorted_buckets(3), heads=4, extras=permuted), {"hi": None}),
    (shape("ragged-empty-rows-v48", ragged(sparse=True), value_dim=48, extras=permuted), {}),
    (shape("alibi-cross", ragged(), queries=40, keys=70, extras=together(alibi, permuted)), {}),
]
FEW: list[tuple[Case, dict]] = [
    (shape("one-gqa-two-batch-rows", queries=1, keys=100, heads=4, batch=2), {}),
    (shape("three-d48", queries=3, keys=100, dim=48), {}),
    (shape("window", queries=5, keys=100), {"window": 40}),
    (shape("documents", queries=9, keys=100, batch=2), {"document_ids": [30, 65]}),
    (shape("ragged-empty-rows", ragged(sparse=True), queries=9, keys=100), {}),
    (shape("alibi", queries=3, keys=100, extras=alibi), {}),
]


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    # Forward: two outputs and two numbers per row. Backward: four gradients, and four numbers per row.
    with guarded_buffers(monkeypatch, least=4):
        yield


def compare(case: Case, options: dict) -> None:
    extras, options = case.extras(case), dict(options)
    if case.bounds is not None:
        lo, hi = case.bounds(case)
        options = {"lo": lo, "hi": hi, **options}
    else:
        if "document_ids" in options:
            options["document_ids"] = documents(case, options["document_ids"])
        arguments = {name: x for name, x in options.items() if name != "scale"}
        lo, hi = row_bounds(case.queries, case.keys or case.queries, **arguments)
    pattern = Pattern(lo, hi, **extras)
    given = Case(**{**vars(case), "bounds": lambda case: (lo, hi), "extras": lambda case: {}})
    tensors, _, scale = probe_inputs(given, torch.float32)
    scale = options.pop("scale", scale)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = reference_forward(called(exact, pattern, scale))[0]
    grad = incoming(expected)
    expected = [expected, *torch.autograd.grad(expected, exact, grad)]

    probe, query, key, value = ours = [surrounded(x) for x in tensors]
    found = probe_attention(query, probe, key, value, scale=scale, backend="triton", **options, **extras)
    found = [found, *torch.autograd.grad(found, ours, surrounded(grad.float()).detach())]
    for name, result, wanted in zip(RESULTS, found, expected, strict=True):
        assert_close(result, wanted, TOLERANCE, name)


@pytest.mark.parametrize(("case", "options"), CASES, ids=[case.name for case, _ in CASES])
def test_matches_reference(case, options):
    compare(case, options)


@pytest.mark.parametrize("where", ["in-kernel", "before"])
@pytest.mark.parametrize(("case", "options"), PERMUTED, ids=[case.name for case, _ in PERMUTED])
def test_permuted_rows_match_reference(case, options, where):
    with launch.gathered_before() if where == "before" else nullcontext():
        compare(case, options)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(("case", "options"), FEW, ids=[case.name for case, _ in FEW])
def test_few_queries_over_keys_in_parts(case, options, parts, monkeypatch):
    monkeypatch.setattr(split_launch, "splits_of", lambda programs, keys, processors: parts)
    compare(case, options)


def test_parts_without_keys(monkeypatch):
    monkeypatch.setattr(split_launch, "splits_of", lambda programs, keys, processors: 16)
    compare(shape("documents", queries=2, keys=40, heads=1, key_heads=1), {"document_ids": [25]})


@pytest.mark.parametrize("tiles", [(16, 64), (64, 16)], ids=str)
def test_any_tile_sizes(tiles):
    config = probe_launch.LaunchConfig(*tiles, warps=1, stages=1, fold=tiles[0] > 16)
    with (
        probe_launch.TABLE.override("probe_forward", config),
        probe_launch.TABLE.override("probe_grad_query", config),
        probe_launch.TABLE.override("probe_grad_key_value", config),
    ):
        compare(shape("ragged", ragged(), queries=100), {})
        compare(shape("window", queries=100), {"window": 70})


def test_without_a_probe_the_output_is_that_of_attention_bit_for_bit():
    tensors, _, scale = probe_inputs(shape("plain", built(), heads=4), torch.float32)
    _, query, key, value = (x.detach() for x in tensors)
    config = launch.LaunchConfig(32, 32, 1, 1)
    with launch.TABLE.override("forward", config):
        wanted = attention(query, key, value, scale=scale, backend="triton")
    assert torch.equal(probe_attention(query, 0 * query, key, value, scale=scale, backend="triton"), wanted)


def test_half_precision_is_as_accurate_with_a_probe_where_keys_share_an_offset():
    """Weights are rounded to bfloat16 before they meet values; everything else in the interpreter is float32."""
    tensors, _, scale = probe_inputs(shape("half", built(), queries=130, dim=32), torch.float64)
    probe, query, key, value = (x.detach().bfloat16() for x in tensors)
    key = key + 4
    exact = [x.double() for x in (query, probe, key, value)]

    def error(found, wanted):
        return ((found.double() - wanted).norm() / wanted.norm()).item()

    plain = error(
        attention(query, key, value, scale=scale, backend="triton"),
        attention(exact[0], *exact[2:], scale=scale, backend="reference"),
    )
    found = error(
        probe_attention(query, probe, key, value, scale=scale, backend="triton"),
        probe_attention(*exact, scale=scale, backend="reference"),
    )
    print(f"relative errors: {plain:.2%} without a probe, {found:.2%} with one")
    assert found < 2 * plain
