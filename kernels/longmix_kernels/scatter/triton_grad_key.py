"""Compute the gradients of key features and of values; the latter are added to those of the attention engine.

G, h and W are sums over the queries that see a block of keys through features. With the averages g_a = G_a / W_a and
d_a = h_a / W_a, and the weights p_ja = phi_a(k_j) W_a,

    dlog phi_a(k_j) = p_ja (v_j . g_a - d_a)        dV_j += sum_a p_ja g_a
"""

import triton
import triton.language as tl

from longmix_kernels.scatter.launch import Sums
from longmix_kernels.scatter.triton_tiles import (
    LOWEST,
    Sizes,
    load_averages,
    load_averages_transposed,
    load_logs,
    load_slot,
    sums_at,
)
from longmix_kernels.tensors import Strided
from longmix_kernels.tiles import head_rows, load_tile, packed_rows, product, program_head, store_tile


@triton.jit(do_not_specialize=["row_tiles", "block_size", "slots", "heads", "keys", "stride_blocks"])
def grad_key_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    key_features: Strided,  # float32 [B, Tk, H, FEATURES]
    value: Strided,  # [B, Tk, H, VALUE_DIM]
    sums: Sums,  # over queries, [B, H, slots, ..]
    grad_key_features,  # float32 [B, Tk, H, FEATURES], contiguous
    grad_value,  # [B, Tk, H, VALUE_DIM], contiguous; added to
    row_tiles,
    block_size,
    slots,
    heads,
    keys,
    stride_blocks,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the gradients of `ROWS` rows of one block and head."""
    SIZES: tl.constexpr = Sizes(FEATURES, VALUE_DIM, FEATURE_BLOCK, VALUE_BLOCK)
    program, batch, head = program_head(slots * row_tiles, heads)
    tile, slot = program % row_tiles, program // row_tiles
    _, _, begin, _ = load_slot(blocks + batch * stride_blocks, slot)
    if begin < 0:
        return
    start, end = begin + tile * ROWS, begin + block_size
    features_of, values = head_rows(key_features, batch, head), head_rows(value, batch, head)
    grad_features = packed_rows(grad_key_features, batch, keys, head, heads, FEATURES)
    grad_values = packed_rows(grad_value, batch, keys, head, heads, VALUE_DIM)
    sums = sums_at(sums, (batch * heads + head) * slots + slot, FEATURES, VALUE_DIM)

    there = start + tl.arange(0, ROWS) < end
    highest = tl.full([ROWS], 2.0 * LOWEST, tl.float32)
    for feature in range(0, FEATURES, FEATURE_BLOCK):
        # [ROWS, FEATURE_BLOCK] += [ROWS, VALUE_BLOCK] [VALUE_BLOCK, FEATURE_BLOCK]
        log, inverse = load_logs(sums, feature, SIZES)
        features = feature + tl.arange(0, FEATURE_BLOCK)
        d = tl.load(sums.deltas + features, mask=features < FEATURES, other=0.0) * inverse
        along = tl.zeros([ROWS, FEATURE_BLOCK], tl.float32)
        for column in tl.static_range(0, VALUE_DIM, VALUE_BLOCK):
            v = load_tile(values.pointer, start, there, values.stride, column, VALUE_BLOCK, VALUE_DIM)
            g = load_averages_transposed(sums, inverse, feature, column, v.dtype, SIZES)
            along = product(v, g, along, UPCAST)
        t = load_tile(features_of.pointer, start, there, features_of.stride, feature, FEATURE_BLOCK, FEATURES)
        t = tl.where(there[:, None], t + log[None, :], LOWEST)
        highest = tl.maximum(highest, tl.max(t, 1))
        grad = tl.exp(t) * (along - d[None, :])
        store_tile(grad_features.pointer, grad, start, there, grad_features.stride, feature, FEATURE_BLOCK, FEATURES)

    # The weight of a key over all queries may overflow half precision, so weights are divided by the largest one.
    for column in tl.static_range(0, VALUE_DIM, VALUE_BLOCK):
        total = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
        for feature in range(0, FEATURES, FEATURE_BLOCK):
            # [ROWS, VALUE_BLOCK] += [ROWS, FEATURE_BLOCK] [FEATURE_BLOCK, VALUE_BLOCK]
            log, inverse = load_logs(sums, feature, SIZES)
            t = load_tile(features_of.pointer, start, there, features_of.stride, feature, FEATURE_BLOCK, FEATURES)
            p = tl.exp(tl.where(there[:, None], t + log[None, :] - highest[:, None], LOWEST))
            dtype: tl.constexpr = values.pointer.dtype.element_ty
            g = load_averages(sums, inverse, feature, column, dtype, SIZES)
            total = product(p.to(dtype), g, total, UPCAST)
        near = load_tile(grad_values.pointer, start, there, grad_values.stride, column, VALUE_BLOCK, VALUE_DIM).to(
            tl.float32
        )
        result = near + total * tl.exp(highest)[:, None]
        # Every warp must have loaded `near` before one of them overwrites it.
        tl.debug_barrier()
        store_tile(grad_values.pointer, result, start, there, grad_values.stride, column, VALUE_BLOCK, VALUE_DIM)
