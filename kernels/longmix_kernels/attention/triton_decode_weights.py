"""Compute the weights of cached keys once the logsumexp of all keys is known, on a GPU."""

import triton
import triton.language as tl

from longmix_kernels.attention.triton_decode_codes import CodeNumbers, code_scores
from longmix_kernels.attention.triton_decode_exact import (
    bounds_of_rows,
    load_slots,
    query_places,
    slots_of_step,
)
from longmix_kernels.attention.triton_split import load_placed
from longmix_kernels.attention.triton_tiles import inner
from longmix_kernels.tensors import PerRow, Strided
from longmix_kernels.tiles import head_rows, head_vector


@triton.jit(do_not_specialize=["places", "rows", "row_tiles", "key_heads", "key_repeats", "queries", "group"])
def decode_weights_kernel(
    query: Strided,  # [B, T, Hq, D]
    key: Strided,  # [R, S, Hk, D], or uint8 [R, S, Hk, D * KEY_BITS / 8]
    count: PerRow,  # int32 [B or 1, Hk or 1, 1], or None
    first: PerRow,  # int32 [B or 1, 1, 1], or None
    index: PerRow,  # int32 [B, Hk, places], or None: the slots that are read, or -1
    key_low: CodeNumbers,  # or None
    key_step: CodeNumbers,  # or None
    key_scale: CodeNumbers,  # or None
    logsumexp,  # float32 [B, T, Hq], contiguous
    weights,  # float32 [B, Hk, G, T, places], contiguous
    scale,
    places,  # S, or the length of `index`
    rows,
    row_tiles,
    key_heads,
    key_repeats,  # B / R with `index`, and else 1, since then rows that share keys are one group
    queries,
    group,  # Hq / Hk
    KEY_BITS: tl.constexpr,  # 0 for keys that are no codes
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    FULL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write exp(s - logsumexp) of one tile of query rows and `KEYS` places."""
    BOUNDS: tl.constexpr = count is not None or first is not None
    steps = tl.cdiv(places, KEYS)
    program = tl.program_id(0)
    start = program % steps * KEYS
    key_head = (program // steps % key_heads).to(tl.int64)
    tile = program // steps // key_heads % row_tiles
    batch = (program // steps // key_heads // row_tiles).to(tl.int64)
    key_row = batch // key_repeats
    key_rows = head_rows(key, key_row, key_head)
    query_rows, own, inside = query_places(query, batch, tile, key_head, rows, queries, group, ROWS)
    row_begin, row_end = bounds_of_rows(count, first, own, key_head, places, inside)
    numbers = index if index is None else head_vector(index, batch, key_head, places)
    end = tl.minimum(start + KEYS, places)
    slot, visible, there = slots_of_step(numbers, row_begin, row_end, start, end, KEYS, BOUNDS)
    if KEY_BITS > 0:
        scores = code_scores(
            query_rows,
            inside,
            key_rows,
            key_low,
            key_step,
            key_scale,
            key_row,
            key_head,
            start,
            slot,
            there,
            KEY_BITS,
            WIDTH,
            COUNT,
            FULL,
        )
    else:
        q = load_placed(query_rows, inside, DIM)
        k = load_slots(key_rows, start, slot, there, end, DIM, BOUNDS or index is not None)
        scores = inner(q, k, None, DIM, UPCAST)

    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // group % queries
    head = key_head * group + row % group
    subtrahend = tl.load(logsumexp + (own * queries + token) * (key_heads * group) + head, mask=inside, other=0.0)
    # A row that sees no key at all has -inf, and no weight but 0.
    found = tl.exp2((scores * scale - subtrahend[:, None]) * 1.4426950408889634)
    found = tl.where(visible, found, 0.0)
    place = (own * (key_heads * group) + head) * queries + token
    column = start + tl.arange(0, KEYS)
    stored = inside[:, None] & (column < places)[None, :]
    tl.store(weights + place[:, None] * places + column[None, :], found, mask=stored)
