"""Carry the sums of blocks from slot to slot: forward to the blocks that see them, in reverse to the blocks they see.

Forward, a block sees what its predecessor saw, and the keys that leave the exact part with it. In reverse, the keys
that leave with it are seen by its queries, and by all queries that see the keys of the next block. A program keeps
`FEATURE_BLOCK` features with all their columns in float32, and loads `STAGES` slots ahead.

The results have memory of their own. In place, each slot would need a barrier, since several warps load a scale that
one warp stores; and Triton loads nothing ahead over a barrier. While the scan runs, that costs 4 m (Dv + 2) / C bytes
per token of a head in blocks of C tokens, and 4 m (Dv + 3) / C in reverse.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from longmix_kernels.scatter.launch import Sums
from longmix_kernels.scatter.triton_tiles import LOWEST, load_slot, sums_at
from longmix_kernels.tiles import program_head


class Total(NamedTuple):
    """Sums that are carried: scale, weight and delta [FEATURE_BLOCK], and rows [FEATURE_BLOCK, VALUE_BLOCK].

    Forward, delta is 0.
    """

    scale: tl.tensor
    weight: tl.tensor
    delta: tl.tensor
    rows: tl.tensor


@triton.jit
def nothing(FEATURE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, QUERIES: tl.constexpr):
    """Return the total before any sum."""
    delta = 0.0
    if QUERIES:
        delta = tl.zeros([FEATURE_BLOCK], tl.float32)
    scale, weight = tl.full([FEATURE_BLOCK], LOWEST, tl.float32), tl.zeros([FEATURE_BLOCK], tl.float32)
    return Total(scale, weight, delta, tl.zeros([FEATURE_BLOCK, VALUE_BLOCK], tl.float32))


@triton.jit
def restarted(total, restart, QUERIES: tl.constexpr):
    """Return nothing if sums begin anew, else the total."""
    delta = total.delta
    if QUERIES:
        delta = tl.where(restart, 0.0, delta)
    scale, weight = tl.where(restart, LOWEST, total.scale), tl.where(restart, 0.0, total.weight)
    return Total(scale, weight, delta, tl.where(restart, 0.0, total.rows))


@triton.jit
def places(sums, place, features, within, FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Return pointers to the numbers of the program in the slot at this place; `within` is where rows are in a slot."""
    found = sums_at(sums, place, FEATURES, VALUE_DIM)
    return Sums(found.scales + features, found.weights + features, found.deltas + features, found.sums + within)


@triton.jit
def advanced(at, step, FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Return the places that are `step` slots further on."""
    one, all_rows = step * FEATURES, step * (FEATURES * VALUE_DIM)
    return Sums(at.scales + one, at.weights + one, at.deltas + one, at.sums + all_rows)


@triton.jit
def with_slot(total, at, there, columns, QUERIES: tl.constexpr):
    """Return the total and the sums of a slot, which are none where they are not `there`; both have scales."""
    own_scale = tl.load(at.scales, mask=there, other=LOWEST)
    own_weight = tl.load(at.weights, mask=there, other=0.0)
    own_rows = tl.load(at.sums, mask=there[:, None] & columns, other=0.0)
    scale = tl.maximum(total.scale, own_scale)
    kept, added = tl.exp(total.scale - scale), tl.exp(own_scale - scale)
    delta = total.delta
    if QUERIES:
        delta = delta * kept + tl.load(at.deltas, mask=there, other=0.0) * added
    rows = total.rows * kept[:, None] + own_rows * added[:, None]
    return Total(scale, total.weight * kept + own_weight * added, delta, rows)


@triton.jit
def store_total(at, total, there, columns, QUERIES: tl.constexpr):
    """Store the total as the sums of a slot, where it is read."""
    tl.store(at.scales, total.scale, mask=there)
    tl.store(at.weights, total.weight, mask=there)
    if QUERIES:
        tl.store(at.deltas, total.delta, mask=there)
    tl.store(at.sums, total.rows, mask=there[:, None] & columns)


@triton.jit(do_not_specialize=["slots", "heads", "stride_blocks"])
def scan_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    sums: Sums,  # over keys, [B, H, slots, ..]
    memory,  # float32 [B, H, FEATURES, VALUE_DIM], contiguous, or None
    normalizer,  # float32 [B, H, FEATURES], contiguous, or None
    log_scale,  # as normalizer
    all_sums: Sums,  # written, as sums
    slots,
    heads,
    stride_blocks,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the sums over all keys that each block of queries sees, from those over the keys that it sees first."""
    block, batch, head = program_head((FEATURES + FEATURE_BLOCK - 1) // FEATURE_BLOCK, heads)
    features, columns = block * FEATURE_BLOCK + tl.arange(0, FEATURE_BLOCK), tl.arange(0, VALUE_BLOCK)
    inside, column_inside = features < FEATURES, (columns < VALUE_DIM)[None, :]
    within = features[:, None] * VALUE_DIM + columns[None, :]
    sequence = batch * heads + head
    blocks += batch * stride_blocks
    at = places(sums, sequence * slots, features, within, FEATURES, VALUE_DIM)
    out = places(all_sums, sequence * slots, features, within, FEATURES, VALUE_DIM)
    total = nothing(FEATURE_BLOCK, VALUE_BLOCK, False)
    for slot in tl.range(0, slots, num_stages=STAGES):
        begin, end, key_row, begins = load_slot(blocks, slot)
        total = restarted(total, begins == 1, False)
        if memory is not None:
            place = sequence * FEATURES + features
            if begins == 2:
                scale = tl.load(log_scale + place, mask=inside, other=LOWEST)
                weight = tl.load(normalizer + place, mask=inside, other=0.0)
                place_rows = memory + sequence * (FEATURES * VALUE_DIM) + within
                rows = tl.load(place_rows, mask=inside[:, None] & column_inside, other=0.0)
                total = Total(scale, weight, total.delta, rows)
        total = with_slot(total, at, features < tl.where(key_row >= 0, FEATURES, 0), column_inside, False)
        store_total(out, total, features < tl.where(end > begin, FEATURES, 0), column_inside, False)
        at, out = advanced(at, 1, FEATURES, VALUE_DIM), advanced(out, 1, FEATURES, VALUE_DIM)


@triton.jit(do_not_specialize=["slots", "heads", "stride_blocks"])
def grad_scan_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    sums: Sums,  # over queries, [B, H, slots, ..]
    memory,  # float32 [B, H, FEATURES, VALUE_DIM], contiguous, or None
    normalizer,  # float32 [B, H, FEATURES], contiguous, or None
    log_scale,  # as normalizer
    grad_memory,  # as memory
    grad_normalizer,  # as normalizer
    grad_log_scale,  # as normalizer
    all_sums: Sums,  # written, as sums
    slots,
    heads,
    stride_blocks,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the sums over all queries that see each block of keys, from those over the queries that see it first."""
    block, batch, head = program_head((FEATURES + FEATURE_BLOCK - 1) // FEATURE_BLOCK, heads)
    features, columns = block * FEATURE_BLOCK + tl.arange(0, FEATURE_BLOCK), tl.arange(0, VALUE_BLOCK)
    inside, column_inside = features < FEATURES, (columns < VALUE_DIM)[None, :]
    within = features[:, None] * VALUE_DIM + columns[None, :]
    sequence = batch * heads + head
    blocks += batch * stride_blocks
    at = places(sums, (sequence + 1) * slots - 1, features, within, FEATURES, VALUE_DIM)
    out = places(all_sums, (sequence + 1) * slots - 1, features, within, FEATURES, VALUE_DIM)
    total = nothing(FEATURE_BLOCK, VALUE_BLOCK, True)
    for done in tl.range(0, slots, num_stages=STAGES):
        begin, end, key_row, begins = load_slot(blocks, slots - 1 - done)
        total = with_slot(total, at, features < tl.where(end > begin, FEATURES, 0), column_inside, True)
        store_total(out, total, features < tl.where(key_row >= 0, FEATURES, 0), column_inside, True)
        if memory is not None:
            place = sequence * FEATURES + features
            if begins == 2:
                factor = tl.exp(total.scale + tl.load(log_scale + place, mask=inside, other=LOWEST))
                found, found_delta = total.rows * factor[:, None], -total.delta * factor
                place_sums = sequence * (FEATURES * VALUE_DIM) + within
                along = tl.sum(found * tl.load(memory + place_sums, mask=inside[:, None] & column_inside, other=0.0), 1)
                along += found_delta * tl.load(normalizer + place, mask=inside, other=0.0)
                tl.store(grad_memory + place_sums, found, mask=inside[:, None] & column_inside)
                tl.store(grad_normalizer + place, found_delta, mask=inside)
                tl.store(grad_log_scale + place, along, mask=inside)
        # Where sums begin anew, the block before is of another document: no query so far sees its keys.
        total = restarted(total, begins > 0, True)
        at, out = advanced(at, -1, FEATURES, VALUE_DIM), advanced(out, -1, FEATURES, VALUE_DIM)
