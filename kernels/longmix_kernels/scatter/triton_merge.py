"""Merge what queries read of far keys with what they read exactly. The far keys act as one more key for each feature.

t_ia = log phi_a(q_i) + log Z_a      u_a = S_a / Z_a      L = log(exp(L_exact) + sum_a exp(t_ia))
o = exp(L_exact - L) o_exact + sum_a exp(t_ia - L) u_a
"""

import triton
import triton.language as tl

from longmix_kernels.scatter.triton_tiles import LOWEST, load_averages, load_logs, load_slot
from longmix_kernels.tiles import load_tile, product, program_head, store_tile


@triton.jit(do_not_specialize=["row_tiles", "slots", "heads", "group", "queries", "stride_blocks"])
def merge_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    query_features,  # float32 [B, Tq, Hq, FEATURES]
    scales,  # float32 [B, Hkv, slots, FEATURES]
    weights,  # as scales
    sums,  # float32 [B, Hkv, slots, FEATURES, VALUE_DIM]
    exact_logsumexp,  # float32 [B, Tq, Hq], contiguous
    logsumexp,  # as exact_logsumexp
    output,  # [B, Tq, Hq, VALUE_DIM], contiguous; the output over exact keys before, and over all keys after
    row_tiles,
    slots,
    heads,  # Hq
    group,  # Hq / Hkv
    queries,
    stride_blocks,
    stride_features_batch,
    stride_features_row,
    stride_features_head,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Merge `VALUE_BLOCK` columns of `ROWS` rows of one block and head."""
    VALUE_BLOCKS: tl.constexpr = (VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK
    program, batch, head = program_head(slots * row_tiles * VALUE_BLOCKS, heads)
    column = program % VALUE_BLOCKS * VALUE_BLOCK
    tile = program // VALUE_BLOCKS % row_tiles
    slot = program // VALUE_BLOCKS // row_tiles
    begin, end, _, _ = load_slot(blocks + batch * stride_blocks, slot)
    start = begin + tile * ROWS
    if start >= end:
        return
    query_features += batch * stride_features_batch + head * stride_features_head
    place = (batch * (heads // group) + head // group) * slots + slot
    scales += place * FEATURES
    weights += place * FEATURES
    sums += place * (FEATURES * VALUE_DIM)

    row = start + tl.arange(0, ROWS)
    there = row < end
    highest = tl.full([ROWS], 2.0 * LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    far = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for feature in range(0, FEATURES, FEATURE_BLOCK):
        # [ROWS, VALUE_BLOCK] += [ROWS, FEATURE_BLOCK] [FEATURE_BLOCK, VALUE_BLOCK]
        log, inverse = load_logs(scales, weights, feature, FEATURE_BLOCK, FEATURES)
        t = load_tile(query_features, start, there, stride_features_row, feature, FEATURE_BLOCK, FEATURES)
        t += log[None, :]
        new_highest = tl.maximum(highest, tl.max(t, 1))
        kept = tl.exp(highest - new_highest)
        p = tl.exp(t - new_highest[:, None])
        total = total * kept + tl.sum(p, 1)
        dtype: tl.constexpr = output.dtype.element_ty
        u = load_averages(sums, inverse, feature, column, dtype, FEATURE_BLOCK, FEATURES, VALUE_BLOCK, VALUE_DIM)
        far = product(p.to(dtype), u, far * kept[:, None], UPCAST)
        highest = new_highest

    place = (batch * queries + row) * heads + head
    exact = tl.load(exact_logsumexp + place, mask=there, other=0.0)
    # Both parts are divided by exp(largest), so that no exponential overflows.
    largest = tl.maximum(exact, highest + tl.log(total))
    merged = largest + tl.log(tl.exp(exact - largest) + total * tl.exp(highest - largest))
    output += (batch * queries * heads + head) * VALUE_DIM
    near = load_tile(output, start, there, heads * VALUE_DIM, column, VALUE_BLOCK, VALUE_DIM).to(tl.float32)
    result = near * tl.exp(exact - merged)[:, None] + far * tl.exp(highest - merged)[:, None]
    # Every warp must have loaded `near` before one of them overwrites it.
    tl.debug_barrier()
    store_tile(output, result, start, there, heads * VALUE_DIM, column, VALUE_BLOCK, VALUE_DIM)
    tl.store(logsumexp + place, merged, mask=row < tl.where(column == 0, end, 0))
