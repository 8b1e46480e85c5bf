"""Row bounds against masks written out pair by pair, and the tiles planned from them."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, TINY, TINY_CUT

from longmix_kernels.attention import key_bounds, positions_from_document_ids, row_bounds
from longmix_kernels.attention.bounds import check_row_bounds
from longmix_kernels.attention.panels import FLASH, MATMUL
from longmix_kernels.attention.tiling import Panel, TileSizes, plan_tiles

IDS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 7, 9, 9], [3] * 12], dtype=torch.int32)


def visible_pairs(lo: torch.Tensor, hi: torch.Tensor, keys: int) -> torch.Tensor:
    """The mask [..., Tq, Tk] that bounds stand for."""
    key = torch.arange(keys)
    return (lo.unsqueeze(-1) <= key) & (key < hi.unsqueeze(-1))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("ids", [None, IDS], ids=["no-documents", "documents"])
@pytest.mark.parametrize("queries", [1, 5, 12, 20])
def test_builder_against_pairwise_definition(queries, ids, window, causal):
    keys = 12
    if (window is not None and not causal) or (ids is not None and queries > keys):
        with pytest.raises(ValueError, match=r"window must be at least 1 and needs|document_ids needs a key"):
            row_bounds(queries, keys, causal=causal, window=window, document_ids=ids)
        return
    lo, hi = row_bounds(queries, keys, causal=causal, window=window, document_ids=ids)
    assert lo.dtype == hi.dtype == torch.int32
    assert lo.shape == hi.shape == (1 if ids is None else 2, 1, queries)
    check_row_bounds(lo, hi, keys)
    got = visible_pairs(lo, hi, keys)
    for batch, row, key in itertools.product(range(lo.shape[0]), range(queries), range(keys)):
        position = row + keys - queries
        wanted = (
            (not causal or key <= position)
            and (window is None or position - key < window)
            and (ids is None or ids[batch, key] == ids[batch, position])
        )
        assert got[batch, 0, row, key] == wanted, (batch, row, key)


def test_builder_takes_segments_per_head():
    ids = torch.stack([IDS, IDS.flip(0)], dim=1)
    lo, hi = row_bounds(12, 12, document_ids=ids)
    assert lo.shape == (2, 2, 12)
    for head, own in enumerate((IDS, IDS.flip(0))):
        expected = row_bounds(12, 12, document_ids=own)
        assert torch.equal(lo[:, head : head + 1], expected[0])
        assert torch.equal(hi[:, head : head + 1], expected[1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_key_bounds_transpose_row_bounds(case):
    lo, hi = case.bounds(case)
    keys = case.keys or case.queries
    first, end = key_bounds(lo, hi, keys)
    assert first.dtype == end.dtype == torch.int32
    row = torch.arange(case.queries).unsqueeze(-1)
    seen_by = (first.unsqueeze(-2) <= row) & (row < end.unsqueeze(-2))
    assert torch.equal(seen_by, visible_pairs(lo, hi, keys))
    check_row_bounds(first, end, case.queries)


def test_positions_restart_in_every_document():
    assert positions_from_document_ids(IDS).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 1], list(range(12))]
    assert positions_from_document_ids(IDS).dtype == torch.int32


def single_tiles(lo: torch.Tensor, hi: torch.Tensor, sizes: TileSizes) -> Iterator[tuple[slice, list[Panel]]]:
    """Rows and panels of every tile, repetitions written out."""
    for rows, panels, repeats in plan_tiles(lo, hi, sizes):
        for shift in range(0, repeats * (rows.stop - rows.start), rows.stop - rows.start):
            shifted = [Panel(slice(p.keys.start + shift, p.keys.stop + shift), p.kind) for p in panels]
            yield slice(rows.start + shift, rows.stop + shift), shifted


@pytest.mark.parametrize("sizes", [FLASH.sizes, MATMUL.sizes, TINY, TINY_CUT], ids=["flash", "matmul", "tiny", "cut"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tiles_cover_what_is_visible_once(case, sizes):
    lo, hi = (x[-1, -1] for x in case.bounds(case))
    keys = case.keys or case.queries
    visible = visible_pairs(lo, hi, keys)
    covered = torch.zeros(case.queries, keys, dtype=torch.int32)
    for rows, panels in single_tiles(lo, hi, sizes):
        assert panels
        for panel in panels:
            part = visible[rows, panel.keys]
            if panel.kind == "full":
                assert part.all()
            if panel.kind == "masked":
                assert not part.all()
            if panel.kind == "causal":
                assert part.shape[0] == part.shape[1]
                assert torch.equal(part, torch.ones_like(part).tril())
            covered[rows, panel.keys] += 1
    assert covered.max() <= 1
    assert torch.equal(visible & (covered == 1), visible)


def test_a_sliding_window_repeats_its_tiles():
    lo, hi = (x[0, 0] for x in row_bounds(500, 500, window=50))
    sizes = replace(TINY_CUT, masked_keys=100, repeated_keys=650)
    repeats = [tile.repeats for tile in plan_tiles(lo, hi, sizes)]
    assert max(repeats) == 650 // (50 + sizes.rows - 1)
    assert sum(repeats) == len(list(single_tiles(lo, hi, sizes))) > 2 * len(repeats)


def test_only_the_edges_of_a_wide_tile_are_masked():
    lo, hi = (x[0, 0] for x in row_bounds(500, 500, window=300))
    for rows, panels in single_tiles(lo, hi, TINY_CUT):
        masked = sum(panel.keys.stop - panel.keys.start for panel in panels if panel.kind == "masked")
        seen = int(hi[rows][-1] - lo[rows][0])
        assert masked <= 2 * (TINY_CUT.rows - 1) or seen <= TINY_CUT.masked_keys


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: row_bounds(4, 4, window=0), r"window=0 with causal=True; window must be at least 1"),
        (lambda: row_bounds(4, 4, document_ids=IDS), r"document_ids has shape \[2, 12\]; allowed are \[B, 4\]"),
        (lambda: row_bounds(12, 12, document_ids=IDS.float()), r"document_ids has dtype torch.float32; allowed are"),
        (lambda: row_bounds(12, 12, document_ids=IDS.flip(1)), r"document_ids must not decrease"),
        (lambda: positions_from_document_ids(IDS[0]), r"document_ids has shape \[12\]"),
    ],
    ids=["window", "length", "dtype", "order", "dimensions"],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_window_beyond_int32_sees_everything():
    whole = row_bounds(5, 7)
    huge = row_bounds(5, 7, window=2**40)
    assert all(torch.equal(a, b) for a, b in zip(whole, huge, strict=True))
