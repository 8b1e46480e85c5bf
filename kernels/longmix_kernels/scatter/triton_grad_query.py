"""Compute the gradient of query features, and D for the kernels that follow.

D_i = o_i . dO_i - dL_i        dlog phi_a(q_i) = exp(t_ia - L_i) (dO_i . u_a - D_i)
"""

import triton
import triton.language as tl

from longmix_kernels.scatter.launch import Sums
from longmix_kernels.scatter.triton_tiles import Sizes, load_averages_transposed, load_logs, load_slot, sums_at
from longmix_kernels.tensors import Strided
from longmix_kernels.tiles import head_rows, load_tile, packed_rows, product, program_head, store_tile


@triton.jit(do_not_specialize=["row_tiles", "slots", "heads", "group", "queries", "stride_blocks"])
def grad_query_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    query_features: Strided,  # float32 [B, Tq, Hq, FEATURES]
    output: Strided,  # [B, Tq, Hq, VALUE_DIM]
    grad_output: Strided,  # [B, Tq, Hq, VALUE_DIM]
    sums: Sums,  # over keys, [B, Hkv, slots, ..]
    logsumexp,  # float32 [B, Tq, Hq], contiguous
    grad_logsumexp,  # as logsumexp, or None
    grad_query_features,  # float32 [B, Tq, Hq, FEATURES], contiguous
    delta,  # written, as logsumexp: D
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
    """Write the gradients of the features, and D, of `ROWS` rows of one block and head."""
    SIZES: tl.constexpr = Sizes(FEATURES, VALUE_DIM, FEATURE_BLOCK, VALUE_BLOCK)
    program, batch, head = program_head(slots * row_tiles, heads)
    tile, slot = program % row_tiles, program // row_tiles
    begin, end, _, _ = load_slot(blocks + batch * stride_blocks, slot)
    start = begin + tile * ROWS
    if start >= end:
        return
    features, out = head_rows(query_features, batch, head), head_rows(output, batch, head)
    grad_out = head_rows(grad_output, batch, head)
    grad_features = packed_rows(grad_query_features, batch, queries, head, heads, FEATURES)
    sums = sums_at(sums, (batch * (heads // group) + head // group) * slots + slot, FEATURES, VALUE_DIM)

    row = start + tl.arange(0, ROWS)
    there = row < end
    place = (batch * queries + row) * heads + head
    d = tl.zeros([ROWS], tl.float32)
    for column in tl.static_range(0, VALUE_DIM, VALUE_BLOCK):
        o = load_tile(out.pointer, start, there, out.stride, column, VALUE_BLOCK, VALUE_DIM)
        do = load_tile(grad_out.pointer, start, there, grad_out.stride, column, VALUE_BLOCK, VALUE_DIM)
        d += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_logsumexp is not None:
        d -= tl.load(grad_logsumexp + place, mask=there, other=0.0)
    tl.store(delta + place, d, mask=there)

    shift = tl.load(logsumexp + place, mask=there, other=float("inf"))
    for feature in range(0, FEATURES, FEATURE_BLOCK):
        # [ROWS, FEATURE_BLOCK] += [ROWS, VALUE_BLOCK] [VALUE_BLOCK, FEATURE_BLOCK]
        log, inverse = load_logs(sums, feature, SIZES)
        along = tl.zeros([ROWS, FEATURE_BLOCK], tl.float32)
        for column in tl.static_range(0, VALUE_DIM, VALUE_BLOCK):
            do = load_tile(grad_out.pointer, start, there, grad_out.stride, column, VALUE_BLOCK, VALUE_DIM)
            u = load_averages_transposed(sums, inverse, feature, column, do.dtype, SIZES)
            along = product(do, u, along, UPCAST)
        t = load_tile(features.pointer, start, there, features.stride, feature, FEATURE_BLOCK, FEATURES)
        grad = tl.exp(t + log[None, :] - shift[:, None]) * (along - d[:, None])
        store_tile(grad_features.pointer, grad, start, there, grad_features.stride, feature, FEATURE_BLOCK, FEATURES)
