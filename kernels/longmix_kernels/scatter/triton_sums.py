"""Sum over the rows of each block with one weight per feature, all blocks at once.

    keys       Z_a = sum_j phi_a(k_j)               S_a = sum_j phi_a(k_j) v_j
    queries    W_a = sum_i phi_a(q_i) exp(-L_i)     G_a = sum_i phi_a(q_i) exp(-L_i) dO_i     h_a with D_i for dO_i

Both go into the slot of the block of queries that is the first to see the keys. Its key sums add to those that earlier
blocks see; its query sums add to those of the queries that see later keys. Weights are rounded to the dtype of the rows
before the product, as in attention.
"""

import triton
import triton.language as tl

from longmix_kernels.scatter.launch import Sums
from longmix_kernels.scatter.triton_tiles import LOWEST, load_slot, sums_at
from longmix_kernels.tensors import Strided
from longmix_kernels.tiles import head_rows, load_tile, load_tile_transposed, product, program_head, store_block


@triton.jit(do_not_specialize=["block_size", "slots", "heads", "group", "length", "stride_blocks"])
def sums_kernel(
    blocks,  # int32 [B or 1, slots, 4]
    logs: Strided,  # float32 [B, T, group * H, FEATURES]
    rows: Strided,  # [B, T, group * H, VALUE_DIM]
    logsumexp,  # float32 [B, T, group * H], contiguous: taken from the logarithms of queries; None for keys
    delta,  # D, as logsumexp; None for keys
    sums: Sums,  # written, [B, H, slots, ..]
    block_size,
    slots,
    heads,  # H
    group,  # how many heads of `rows` enter the sums of one head
    length,  # T
    stride_blocks,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write a block [FEATURE_BLOCK, VALUE_BLOCK] of the sums of one slot, and once per feature its other results."""
    QUERIES: tl.constexpr = logsumexp is not None
    VALUE_BLOCKS: tl.constexpr = (VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK
    TILES: tl.constexpr = (FEATURES + FEATURE_BLOCK - 1) // FEATURE_BLOCK * VALUE_BLOCKS
    program, batch, head = program_head(slots * TILES, heads)
    slot, feature = program // TILES, program % TILES // VALUE_BLOCKS * FEATURE_BLOCK
    column = program % VALUE_BLOCKS * VALUE_BLOCK
    begin, end, key_row, _ = load_slot(blocks + batch * stride_blocks, slot)
    if not QUERIES:
        begin, end = key_row, tl.where(key_row < 0, key_row, key_row + block_size)
    if end <= begin:
        return
    first_logs, first_rows = head_rows(logs, batch, head * group), head_rows(rows, batch, head * group)

    scale = tl.full([FEATURE_BLOCK], LOWEST, tl.float32)
    weight = tl.zeros([FEATURE_BLOCK], tl.float32)
    total_delta = tl.zeros([FEATURE_BLOCK], tl.float32)
    total = tl.zeros([FEATURE_BLOCK, VALUE_BLOCK], tl.float32)
    steps = tl.cdiv(end - begin, ROWS)
    for step in range(group * steps):
        # [FEATURE_BLOCK, VALUE_BLOCK] += [FEATURE_BLOCK, ROWS] [ROWS, VALUE_BLOCK]
        member = step // steps
        start = begin + step % steps * ROWS
        row = start + tl.arange(0, ROWS)
        there = row < end
        log = load_tile_transposed(
            first_logs.pointer + member * logs.stride_head,
            start,
            there,
            logs.stride_row,
            feature,
            FEATURE_BLOCK,
            FEATURES,
        )
        own_rows = first_rows.pointer + member * rows.stride_head
        r = load_tile(own_rows, start, there, rows.stride_row, column, VALUE_BLOCK, VALUE_DIM)
        if QUERIES:
            place = ((batch * length + row) * heads + head) * group + member
            log -= tl.load(logsumexp + place, mask=there, other=0.0)[None, :]
        log = tl.where(there[None, :], log, float("-inf"))
        new_scale = tl.maximum(scale, tl.max(log, 1))
        kept = tl.exp(scale - new_scale)
        w = tl.exp(log - new_scale[:, None])
        weight = weight * kept + tl.sum(w, 1)
        if QUERIES:
            d = tl.load(delta + place, mask=there, other=0.0)
            total_delta = total_delta * kept + tl.sum(w * d[None, :], 1)
        total = product(w.to(r.dtype), r, total * kept[:, None], UPCAST)
        scale = new_scale

    found = sums_at(sums, (batch * heads + head) * slots + slot, FEATURES, VALUE_DIM)
    store_block(found.sums, total, feature, FEATURES, column, VALUE_DIM)
    features = feature + tl.arange(0, FEATURE_BLOCK)
    own = features < tl.where(column == 0, FEATURES, 0)
    tl.store(found.scales + features, scale, mask=own)
    tl.store(found.weights + features, weight, mask=own)
    if QUERIES:
        tl.store(found.deltas + features, total_delta, mask=own)
