"""Compute the gradient of query features, and D for the kernels that follow.

D_i = o_i . dO_i - dL_i        dlog phi_a(q_i) = exp(t_ia - L_i) (dO_i . u_a - D_i)
"""

import triton
import triton.language as tl

from longmix_kernels.scatter.triton_tiles import load_averages_transposed, load_logs, load_slot
from longmix_kernels.tiles import load_tile, product, program_head, store_tile


@triton.jit(do_not_specialize=["row_tiles", "slots", "heads", "group", "queries", "stride_blocks"])
def grad_query_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    query_features,  # float32 [B, Tq, Hq, FEATURES]
    scales,  # float32 [B, Hkv, slots, FEATURES]
    weights,  # as scales
    sums,  # float32 [B, Hkv, slots, FEATURES, VALUE_DIM]
    output,  # [B, Tq, Hq, VALUE_DIM]
    logsumexp,  # float32 [B, Tq, Hq], contiguous
    grad_output,  # [B, Tq, Hq, VALUE_DIM]
    grad_logsumexp,  # as logsumexp, or None
    grad_query_features,  # float32 [B, Tq, Hq, FEATURES], contiguous
    delta,  # written, as logsumexp: D
    row_tiles,
    slots,
    heads,  # Hq
    group,  # Hq / Hkv
    queries,
    stride_blocks,
    stride_features_batch,
    stride_features_row,
    stride_features_head,
    stride_output_batch,
    stride_output_row,
    stride_output_head,
    stride_grad_batch,
    stride_grad_row,
    stride_grad_head,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the gradients of the features, and D, of `ROWS` rows of one block and head."""
    program, batch, head = program_head(slots * row_tiles, heads)
    tile, slot = program % row_tiles, program // row_tiles
    begin, end, _, _ = load_slot(blocks + batch * stride_blocks, slot)
    start = begin + tile * ROWS
    if start >= end:
        return
    query_features += batch * stride_features_batch + head * stride_features_head
    output += batch * stride_output_batch + head * stride_output_head
    grad_output += batch * stride_grad_batch + head * stride_grad_head
    grad_query_features += (batch * queries * heads + head) * FEATURES
    place = (batch * (heads // group) + head // group) * slots + slot
    scales += place * FEATURES
    weights += place * FEATURES
    sums += place * (FEATURES * VALUE_DIM)

    row = start + tl.arange(0, ROWS)
    there = row < end
    place = (batch * queries + row) * heads + head
    d = tl.zeros([ROWS], tl.float32)
    for column in tl.static_range(0, VALUE_DIM, VALUE_BLOCK):
        o = load_tile(output, start, there, stride_output_row, column, VALUE_BLOCK, VALUE_DIM)
        do = load_tile(grad_output, start, there, stride_grad_row, column, VALUE_BLOCK, VALUE_DIM)
        d += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_logsumexp is not None:
        d -= tl.load(grad_logsumexp + place, mask=there, other=0.0)
    tl.store(delta + place, d, mask=there)

    shift = tl.load(logsumexp + place, mask=there, other=float("inf"))
    for feature in range(0, FEATURES, FEATURE_BLOCK):
        # [ROWS, FEATURE_BLOCK] += [ROWS, VALUE_BLOCK] [VALUE_BLOCK, FEATURE_BLOCK]
        log, inverse = load_logs(scales, weights, feature, FEATURE_BLOCK, FEATURES)
        along = tl.zeros([ROWS, FEATURE_BLOCK], tl.float32)
        for column in tl.static_range(0, VALUE_DIM, VALUE_BLOCK):
            do = load_tile(grad_output, start, there, stride_grad_row, column, VALUE_BLOCK, VALUE_DIM)
            u = load_averages_transposed(
                sums, inverse, feature, column, do.dtype, FEATURE_BLOCK, FEATURES, VALUE_BLOCK, VALUE_DIM
            )
            along = product(do, u, along, UPCAST)
        t = load_tile(query_features, start, there, stride_features_row, feature, FEATURE_BLOCK, FEATURES)
        grad = tl.exp(t + log[None, :] - shift[:, None]) * (along - d[:, None])
        store_tile(grad_query_features, grad, start, there, heads * FEATURES, feature, FEATURE_BLOCK, FEATURES)
