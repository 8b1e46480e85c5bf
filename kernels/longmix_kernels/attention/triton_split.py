"""Compute the forward of attention with few queries on a GPU: a softmax over each part of the keys, and one merge.

This is flash decoding (Dao et al. 2023). The rows of a tile are the queries of all heads that share a key head, so that
grouped heads load their keys once. The merge takes the parts in order, so two runs are equal bit for bit.
"""

import torch
import triton
import triton.language as tl

from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.split_launch import Call
from longmix_kernels.attention.triton_forward import triton_forward
from longmix_kernels.attention.triton_tiles import load_slope, load_tile, row_numbers, with_alibi
from longmix_kernels.attention.triton_walk import keys_of_rows
from longmix_kernels.tensors import strides
from longmix_kernels.tiles import product


@triton.jit
def load_rows(places, inside, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Load [rows, COLUMNS] from column `COLUMN` on of rows of `WIDTH` columns that begin at `places`.

    Rows that are not `inside`, and columns past `WIDTH`, are zero.
    """
    column = COLUMN + tl.arange(0, COLUMNS)
    there = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(places[:, None] + column[None, :], mask=there, other=0.0)


@triton.jit
def store_rows(places, rows, inside, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Store [rows, COLUMNS] where `load_rows` would load them from."""
    column = COLUMN + tl.arange(0, COLUMNS)
    there = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(places[:, None] + column[None, :], rows, mask=there)


@triton.jit(do_not_specialize=["batches", "queries", "keys", "key_heads", "group", "window", "splits"])
def split_forward_kernel(
    query,  # [B, Tq, Hq, DIM]
    key,  # [B, Tk, Hkv, DIM]
    value,  # [B, Tk, Hkv, VALUE_DIM]
    lo,  # int32 [B or 1, Hq or 1, Tq], or None
    hi,  # as lo
    query_order,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    alibi_slopes,  # float32 [Hq], or None
    partial,  # float32 [splits, B, Tq, Hq, VALUE_DIM], contiguous
    partial_logsumexp,  # float32 [splits, B, Tq, Hq], contiguous, in base 2
    scale_log2,  # scale * log2(e)
    batches,
    queries,
    keys,
    key_heads,
    group,  # Hq / Hkv
    window,
    splits,
    stride_query_batch,
    stride_query_row,
    stride_query_head,
    stride_key_batch,
    stride_key_row,
    stride_key_head,
    stride_value_batch,
    stride_value_row,
    stride_value_head,
    stride_lo_batch,
    stride_lo_head,
    stride_hi_batch,
    stride_hi_head,
    stride_query_order_batch,
    stride_query_order_head,
    stride_key_order_batch,
    stride_key_order_head,
    MODE: tl.constexpr,
    GATHER_QUERY: tl.constexpr,
    GATHER_KEY: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_MAIN: tl.constexpr,
    DIM_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write output and base-2 logsumexp of `ROWS` rows over one of `splits` parts of the keys that any row sees."""
    tiles = tl.cdiv(queries * group, ROWS)
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits % tiles
    batch = (program // splits // tiles // key_heads).to(tl.int64)
    key_head = (program // splits // tiles % key_heads).to(tl.int64)

    # Row r is query r // group of head r % group of the group. The heads are int64, since offsets are made of them.
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < queries * group
    place = tl.where(inside, row // group, 0)
    head = key_head * group + row % group
    key += batch * stride_key_batch + key_head * stride_key_head
    value += batch * stride_value_batch + key_head * stride_value_head
    if MODE == "bounds" or MODE == "documents":
        lo += batch * stride_lo_batch + head * stride_lo_head
    if MODE == "bounds":
        hi += batch * stride_hi_batch + head * stride_hi_head
    number = place
    if query_order is not None:
        query_order += batch * stride_query_order_batch + head * stride_query_order_head
        number = tl.load(query_order + place, mask=inside, other=0)
    if key_order is not None:
        key_order += batch * stride_key_order_batch + key_head * stride_key_order_head
    own = number if GATHER_QUERY else place

    # Bounds do not ascend from head to head, so this reads those of all rows, and not of the first and last one alone.
    first_key, end_key = keys_of_rows(lo, hi, place, inside, queries, keys, window, MODE)
    sees = first_key < end_key
    begin = tl.min(tl.where(sees, first_key, keys), 0)
    end = tl.max(tl.where(sees, end_key, 0), 0)
    steps = tl.cdiv(tl.maximum(end - begin, 0), KEYS)
    each = tl.cdiv(steps, splits)
    begin += split * each * KEYS
    end = tl.minimum(end, begin + each * KEYS)

    rows = query + batch * stride_query_batch + own.to(tl.int64) * stride_query_row + head * stride_query_head
    q_main = load_rows(rows, inside, 0, DIM_MAIN, DIM)
    if DIM_REST > 0:
        q_rest = load_rows(rows, inside, DIM_MAIN, DIM_REST, DIM)
    if alibi_slopes is not None:
        slope = load_slope(alibi_slopes, head, scale_log2)
        row_position = number + (keys - queries)
    if NEGATIVE_SCALE:
        scale_log2 = -scale_log2
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_main = tl.zeros([ROWS, VALUE_MAIN], tl.float32)
    if VALUE_REST > 0:
        sum_rest = tl.zeros([ROWS, VALUE_REST], tl.float32)

    for start in range(begin, end, KEYS):
        # [ROWS, KEYS] scores from [ROWS, DIM] and [KEYS, DIM].
        columns = row_numbers(key_order, start, end, KEYS, True)
        k = load_tile(key, start, columns, end, stride_key_row, 0, DIM_MAIN, DIM, True, GATHER_KEY)
        scores = product(q_main, tl.trans(k), None, UPCAST)
        if DIM_REST > 0:
            k = load_tile(key, start, columns, end, stride_key_row, DIM_MAIN, DIM_REST, DIM, True, GATHER_KEY)
            scores = product(q_rest, tl.trans(k), scores, UPCAST)
        if alibi_slopes is not None:
            scores = with_alibi(scores, slope[:, None], columns[None, :], row_position[:, None])
        if NEGATIVE_SCALE:
            # The maximum is taken before the scale is multiplied in, so the scale must be positive.
            scores = -scores
        places = (start + tl.arange(0, KEYS))[None, :]
        visible = (first_key[:, None] <= places) & (places < end_key[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        # -inf - -inf is NaN, so a row that has seen nothing yet subtracts 0 and keeps weights of 0.
        subtrahend = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores * scale_log2 - subtrahend[:, None])
        shrink = tl.exp2(highest - subtrahend)
        total = total * shrink + tl.sum(weights, 1)
        highest = new_highest
        v = load_tile(value, start, columns, end, stride_value_row, 0, VALUE_MAIN, VALUE_DIM, True, GATHER_KEY)
        weights = weights.to(v.dtype)
        sum_main = product(weights, v, sum_main * shrink[:, None], UPCAST)
        if VALUE_REST > 0:
            v = load_tile(
                value, start, columns, end, stride_value_row, VALUE_MAIN, VALUE_REST, VALUE_DIM, True, GATHER_KEY
            )
            sum_rest = product(weights, v, sum_rest * shrink[:, None], UPCAST)

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    result = ((split * batches + batch) * queries + own) * (key_heads * group) + head
    store_rows(partial + result * VALUE_DIM, sum_main / divisor[:, None], inside, 0, VALUE_MAIN, VALUE_DIM)
    if VALUE_REST > 0:
        store_rows(partial + result * VALUE_DIM, sum_rest / divisor[:, None], inside, VALUE_MAIN, VALUE_REST, VALUE_DIM)
    logsumexp = tl.where(empty, float("-inf"), highest + tl.log2(divisor))
    tl.store(partial_logsumexp + result, logsumexp, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def split_merge_kernel(
    partial,  # float32 [splits, rows, VALUE_DIM], contiguous
    partial_logsumexp,  # float32 [splits, rows], contiguous, in base 2
    output,  # [rows, VALUE_DIM], contiguous
    logsumexp,  # float32 [rows], contiguous
    rows,  # B Tq Hq
    splits,
    VALUE_DIM: tl.constexpr,
    VALUE_COVER: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Merge the parts of one row, and write its output and its natural logsumexp."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, MOST_SPLITS)
    each = tl.load(partial_logsumexp + part * rows.to(tl.int64) + row, mask=part < splits, other=float("-inf"))
    highest = tl.max(each, 0)
    subtrahend = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(each - subtrahend), 0)
    column = tl.arange(0, VALUE_COVER)
    there = column < VALUE_DIM
    result = tl.zeros([VALUE_COVER], tl.float32)
    for index in range(splits):
        place = index * rows.to(tl.int64) + row
        weight = tl.exp2(tl.load(partial_logsumexp + place) - subtrahend)
        result += weight * tl.load(partial + place * VALUE_DIM + column, mask=there, other=0.0)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    tl.store(output + row * VALUE_DIM + column, (result / divisor).to(output.dtype.element_ty), mask=there)
    # ln 2 turns the base-2 logsumexp into the natural one.
    natural = (highest + tl.log2(divisor)) * 0.6931471805599453
    tl.store(logsumexp + row, tl.where(empty, float("-inf"), natural))


def triton_split(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, Tq, Hq, Dv] and the logsumexp [B, Tq, Hq], float32, of a call with few queries.

    Keys are cut into parts where that gives the GPU more to do at once; elsewhere `triton_forward` runs.

    Args:
        inputs: a call that `split_launch.covers`, with head dimensions up to 256 and no float64.
    """
    call = Call(inputs)
    if call.splits == 1:
        return triton_forward(inputs)
    query, shape = call.query, call.query.shape[:3]
    partial = query.new_empty(call.splits, *shape, call.value_dim, dtype=torch.float32)
    partial_logsumexp = query.new_empty(call.splits, *shape, dtype=torch.float32)
    call.launch(
        "split_forward",
        split_forward_kernel,
        query,
        call.key,
        call.value,
        call.lo,
        call.hi,
        call.query_order,
        call.key_order,
        call.alibi_slopes,
        partial,
        partial_logsumexp,
        call.scale_log2(),
        call.batch,
        call.queries,
        call.keys,
        call.key_heads,
        call.group,
        call.window,
        call.splits,
        *strides(query, call.key, call.value),
        *call.row_strides(call.lo, call.hi, call.query_order, call.key_order),
    )
    output = query.new_empty(*shape, call.value_dim)
    logsumexp = query.new_empty(shape, dtype=torch.float32)
    rows = shape.numel()
    call.launch("split_merge", split_merge_kernel, partial, partial_logsumexp, output, logsumexp, rows, call.splits)
    return call.put_queries(output), call.put_queries(logsumexp)
