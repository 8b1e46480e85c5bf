"""Carry the sums of blocks from slot to slot: forward to the blocks that see them, in reverse to the blocks they see.

Forward, a block sees what its predecessor saw, and the keys that leave the exact part with it. In reverse, the keys
that leave with it are seen by its queries, and by all queries that see the keys of the next block. A program keeps
`FEATURE_BLOCK` features with all their columns in float32, and loads `STAGES` slots ahead.

The results have memory of their own. In place, each slot would need a barrier, since several warps load a scale that
one warp stores; and Triton loads nothing ahead over a barrier. While the scan runs, that costs 4 m (Dv + 2) / C bytes
per token of a head in blocks of C tokens, and 4 m (Dv + 3) / C in reverse.
"""

import triton
import triton.language as tl

from longmix_kernels.scatter.triton_tiles import LOWEST, load_slot
from longmix_kernels.tiles import program_head


@triton.jit
def joined(scale, own_scale):
    """Return the scale of the total of two sums, and the factors that bring both sums to it."""
    new_scale = tl.maximum(scale, own_scale)
    return new_scale, tl.exp(scale - new_scale), tl.exp(own_scale - new_scale)


@triton.jit(do_not_specialize=["slots", "heads", "stride_blocks"])
def scan_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    scales,  # float32 [B, H, slots, FEATURES]
    weights,  # as scales
    sums,  # float32 [B, H, slots, FEATURES, VALUE_DIM]
    memory,  # float32 [B, H, FEATURES, VALUE_DIM], contiguous, or None
    normalizer,  # float32 [B, H, FEATURES], contiguous, or None
    log_scale,  # as normalizer
    all_scales,  # as scales, and so on: all that are written
    all_weights,
    all_sums,
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
    scales += sequence * slots * FEATURES + features
    weights += sequence * slots * FEATURES + features
    sums += sequence * slots * (FEATURES * VALUE_DIM) + within
    all_scales += sequence * slots * FEATURES + features
    all_weights += sequence * slots * FEATURES + features
    all_sums += sequence * slots * (FEATURES * VALUE_DIM) + within

    scale = tl.full([FEATURE_BLOCK], LOWEST, tl.float32)
    weight = tl.zeros([FEATURE_BLOCK], tl.float32)
    total = tl.zeros([FEATURE_BLOCK, VALUE_BLOCK], tl.float32)
    for slot in tl.range(0, slots, num_stages=STAGES):
        begin, end, key_row, begins = load_slot(blocks, slot)
        adding = features < tl.where(key_row >= 0, FEATURES, 0)
        own_scale = tl.load(scales, mask=adding, other=LOWEST)
        own_weight = tl.load(weights, mask=adding, other=0.0)
        own = tl.load(sums, mask=adding[:, None] & column_inside, other=0.0)
        scale = tl.where(begins == 1, LOWEST, scale)
        weight = tl.where(begins == 1, 0.0, weight)
        total = tl.where(begins == 1, 0.0, total)
        if memory is not None:
            place = sequence * FEATURES + features
            if begins == 2:
                scale = tl.load(log_scale + place, mask=inside, other=LOWEST)
                weight = tl.load(normalizer + place, mask=inside, other=0.0)
                total = tl.load(
                    memory + sequence * (FEATURES * VALUE_DIM) + within, mask=inside[:, None] & column_inside, other=0.0
                )
        scale, kept, added = joined(scale, own_scale)
        weight = weight * kept + own_weight * added
        total = total * kept[:, None] + own * added[:, None]
        read = features < tl.where(end > begin, FEATURES, 0)
        tl.store(all_scales, scale, mask=read)
        tl.store(all_weights, weight, mask=read)
        tl.store(all_sums, total, mask=read[:, None] & column_inside)
        scales += FEATURES
        weights += FEATURES
        sums += FEATURES * VALUE_DIM
        all_scales += FEATURES
        all_weights += FEATURES
        all_sums += FEATURES * VALUE_DIM


@triton.jit(do_not_specialize=["slots", "heads", "stride_blocks"])
def grad_scan_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    scales,  # float32 [B, H, slots, FEATURES]
    weights,  # as scales
    deltas,  # as scales
    sums,  # float32 [B, H, slots, FEATURES, VALUE_DIM]
    memory,  # float32 [B, H, FEATURES, VALUE_DIM], contiguous, or None
    normalizer,  # float32 [B, H, FEATURES], contiguous, or None
    log_scale,  # as normalizer
    grad_memory,  # as memory
    grad_normalizer,  # as normalizer
    grad_log_scale,  # as normalizer
    all_scales,  # as scales, and so on: all that are written
    all_weights,
    all_deltas,
    all_sums,
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
    last = (sequence + 1) * slots - 1
    scales += last * FEATURES + features
    weights += last * FEATURES + features
    deltas += last * FEATURES + features
    sums += last * (FEATURES * VALUE_DIM) + within
    all_scales += last * FEATURES + features
    all_weights += last * FEATURES + features
    all_deltas += last * FEATURES + features
    all_sums += last * (FEATURES * VALUE_DIM) + within

    scale = tl.full([FEATURE_BLOCK], LOWEST, tl.float32)
    weight = tl.zeros([FEATURE_BLOCK], tl.float32)
    delta = tl.zeros([FEATURE_BLOCK], tl.float32)
    total = tl.zeros([FEATURE_BLOCK, VALUE_BLOCK], tl.float32)
    for done in tl.range(0, slots, num_stages=STAGES):
        begin, end, key_row, begins = load_slot(blocks, slots - 1 - done)
        adding = features < tl.where(end > begin, FEATURES, 0)
        own_scale = tl.load(scales, mask=adding, other=LOWEST)
        own_weight = tl.load(weights, mask=adding, other=0.0)
        own_delta = tl.load(deltas, mask=adding, other=0.0)
        own = tl.load(sums, mask=adding[:, None] & column_inside, other=0.0)
        scale, kept, added = joined(scale, own_scale)
        weight = weight * kept + own_weight * added
        delta = delta * kept + own_delta * added
        total = total * kept[:, None] + own * added[:, None]
        read = features < tl.where(key_row >= 0, FEATURES, 0)
        tl.store(all_scales, scale, mask=read)
        tl.store(all_weights, weight, mask=read)
        tl.store(all_deltas, delta, mask=read)
        tl.store(all_sums, total, mask=read[:, None] & column_inside)
        if memory is not None:
            place = sequence * FEATURES + features
            if begins == 2:
                factor = tl.exp(scale + tl.load(log_scale + place, mask=inside, other=LOWEST))
                found, found_delta = total * factor[:, None], -delta * factor
                place_sums = sequence * (FEATURES * VALUE_DIM) + within
                along = tl.sum(found * tl.load(memory + place_sums, mask=inside[:, None] & column_inside, other=0.0), 1)
                along += found_delta * tl.load(normalizer + place, mask=inside, other=0.0)
                tl.store(grad_memory + place_sums, found, mask=inside[:, None] & column_inside)
                tl.store(grad_normalizer + place, found_delta, mask=inside)
                tl.store(grad_log_scale + place, along, mask=inside)
        # Where sums begin anew, the block before is of another document: no query so far sees its keys.
        scale = tl.where(begins > 0, LOWEST, scale)
        weight = tl.where(begins > 0, 0.0, weight)
        delta = tl.where(begins > 0, 0.0, delta)
        total = tl.where(begins > 0, 0.0, total)
        scales -= FEATURES
        weights -= FEATURES
        deltas -= FEATURES
        sums -= FEATURES * VALUE_DIM
        all_scales -= FEATURES
        all_weights -= FEATURES
        all_deltas -= FEATURES
        all_sums -= FEATURES * VALUE_DIM
