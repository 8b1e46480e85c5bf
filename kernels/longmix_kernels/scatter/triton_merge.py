"""Merge what queries read of far keys with what they read exactly. The far keys act as one more key for each feature.

t_ia = log phi_a(q_i) + log Z_a      u_a = S_a / Z_a      L = log(exp(L_exact) + sum_a exp(t_ia))
o = exp(L_exact - L) o_exact + sum_a exp(t_ia - L) u_a
"""

import triton
import triton.language as tl

from longmix_kernels.scatter.launch import Sums
from longmix_kernels.scatter.triton_tiles import LOWEST, Sizes, load_averages, load_logs, load_slot, sums_at
from longmix_kernels.tensors import Strided
from longmix_kernels.tiles import head_rows, load_tile, packed_rows, product, program_head, store_tile


@triton.jit(do_not_specialize=["row_tiles", "slots", "heads", "group", "queries", "stride_blocks"])
def merge_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    query_features: Strided,  # float32 [B, Tq, Hq, FEATURES]
    sums: Sums,  # over keys, [B, Hkv, slots, ..]
    exact_logsumexp,  # float32 [B, Tq, Hq], contiguous
    logsumexp,  # as exact_logsumexp
    output,  # [B, Tq, Hq, VALUE_DIM], contiguous; the output over exact keys before, and over all keys after
    row_tiles,
    slots,
    heads,  # Hq
    group,  # Hq / Hkv
    queries,
    stride_blocks,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Merge `VALUE_BLOCK` columns of `ROWS` rows of one block and head."""
    SIZES: tl.constexpr = Sizes(FEATURES, VALUE_DIM, FEATURE_BLOCK, VALUE_BLOCK)
    VALUE_BLOCKS: tl.constexpr = (VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK
    program, batch, head = program_head(slots * row_tiles * VALUE_BLOCKS, heads)
    column = program % VALUE_BLOCKS * VALUE_BLOCK
    tile = program // VALUE_BLOCKS % row_tiles
    slot = program // VALUE_BLOCKS // row_tiles
    begin, end, _, _ = load_slot(blocks + batch * stride_blocks, slot)
    start = begin + tile * ROWS
    if start >= end:
        return
    features = head_rows(query_features, batch, head)
    sums = sums_at(sums, (batch * (heads // group) + head // group) * slots + slot, FEATURES, VALUE_DIM)

    row = start + tl.arange(0, ROWS)
    there = row < end
    highest = tl.full([ROWS], 2.0 * LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    far = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for feature in range(0, FEATURES, FEATURE_BLOCK):
        # [ROWS, VALUE_BLOCK] += [ROWS, FEATURE_BLOCK] [FEATURE_BLOCK, VALUE_BLOCK]
        log, inverse = load_logs(sums, feature, SIZES)
        t = load_tile(features.pointer, start, there, features.stride, feature, FEATURE_BLOCK, FEATURES)
        t += log[None, :]
        new_highest = tl.maximum(highest, tl.max(t, 1))
        kept = tl.exp(highest - new_highest)
        p = tl.exp(t - new_highest[:, None])
        total = total * kept + tl.sum(p, 1)
        dtype: tl.constexpr = output.dtype.element_ty
        u = load_averages(sums, inverse, feature, column, dtype, SIZES)
        far = product(p.to(dtype), u, far * kept[:, None], UPCAST)
        highest = new_highest

    place = (batch * queries + row) * heads + head
    exact = tl.load(exact_logsumexp + place, mask=there, other=0.0)
    # Both parts are divided by exp(largest), so that no exponential overflows.
    largest = tl.maximum(exact, highest + tl.log(total))
    merged = largest + tl.log(tl.exp(exact - largest) + total * tl.exp(highest - largest))
    merging = packed_rows(output, batch, queries, head, heads, VALUE_DIM)
    near = load_tile(merging.pointer, start, there, merging.stride, column, VALUE_BLOCK, VALUE_DIM).to(tl.float32)
    result = near * tl.exp(exact - merged)[:, None] + far * tl.exp(highest - merged)[:, None]
    # Every warp must have loaded `near` before one of them overwrites it.
    tl.debug_barrier()
    store_tile(merging.pointer, result, start, there, merging.stride, column, VALUE_BLOCK, VALUE_DIM)
    tl.store(logsumexp + place, merged, mask=row < tl.where(column == 0, end, 0))
