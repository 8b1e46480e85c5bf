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
from longmix_kernels.attention.triton_tiles import (
    Parts,
    add_products,
    inner,
    load_rows,
    load_slope,
    row_numbers,
    scaled,
    softmax_step,
    with_alibi,
    zeros,
)
from longmix_kernels.attention.triton_walk import is_visible, keys_of_rows
from longmix_kernels.tensors import PerRow, Strided, per_row, strided
from longmix_kernels.tiles import head_rows, head_vector


@triton.jit
def part_places(places, inside, COLUMN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Return pointers [rows, WIDTH] from column `COLUMN` on of rows that begin at `places`, and which ones exist.

    Rows that are not `inside`, and columns past `SIZE`, do not.
    """
    column = COLUMN + tl.arange(0, WIDTH)
    return places[:, None] + column[None, :], inside[:, None] & (column < SIZE)[None, :]


@triton.jit
def load_placed(places, inside, COLUMNS: tl.constexpr):
    """Load rows that begin at `places` as `Parts`, zero where they are not `inside`."""
    rest = 0
    place, there = part_places(places, inside, 0, COLUMNS.MAIN, COLUMNS.SIZE)
    main = tl.load(place, mask=there, other=0.0)
    if COLUMNS.REST > 0:
        place, there = part_places(places, inside, COLUMNS.MAIN, COLUMNS.REST, COLUMNS.SIZE)
        rest = tl.load(place, mask=there, other=0.0)
    return Parts(main, rest)


@triton.jit
def store_placed(places, rows, inside, COLUMNS: tl.constexpr):
    """Store rows where `load_placed` would load them from."""
    place, there = part_places(places, inside, 0, COLUMNS.MAIN, COLUMNS.SIZE)
    tl.store(place, rows.main, mask=there)
    if COLUMNS.REST > 0:
        place, there = part_places(places, inside, COLUMNS.MAIN, COLUMNS.REST, COLUMNS.SIZE)
        tl.store(place, rows.rest, mask=there)


@triton.jit(do_not_specialize=["batches", "queries", "keys", "key_heads", "group", "window", "splits"])
def split_forward_kernel(
    query: Strided,  # [B, Tq, Hq, DIM.SIZE]
    key: Strided,  # [B, Tk, Hkv, DIM.SIZE]
    value: Strided,  # [B, Tk, Hkv, VALUE_DIM.SIZE]
    lo: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None
    hi: PerRow,  # as lo
    query_order: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order: PerRow,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    alibi_slopes,  # float32 [Hq], or None
    partial,  # float32 [splits, B, Tq, Hq, VALUE_DIM.SIZE], contiguous
    partial_logsumexp,  # float32 [splits, B, Tq, Hq], contiguous, in base 2
    scale_log2,  # scale * log2(e)
    batches,
    queries,
    keys,
    key_heads,
    group,  # Hq / Hkv
    window,
    splits,
    MODE: tl.constexpr,
    GATHER_QUERY: tl.constexpr,
    GATHER_KEY: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
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
    key_rows, value_rows = head_rows(key, batch, key_head), head_rows(value, batch, key_head)
    lo = lo if lo is None else head_vector(lo, batch, head, queries)
    hi = hi if hi is None else head_vector(hi, batch, head, queries)
    number = place
    if query_order is not None:
        number = tl.load(head_vector(query_order, batch, head, queries) + place, mask=inside, other=0)
    key_order = key_order if key_order is None else head_vector(key_order, batch, key_head, keys)
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

    query_rows = head_rows(query, batch, head)
    q = load_placed(query_rows.pointer + own.to(tl.int64) * query_rows.stride, inside, DIM)
    if alibi_slopes is not None:
        slope = load_slope(alibi_slopes, head, scale_log2)
        row_position = number + (keys - queries)
    if NEGATIVE_SCALE:
        scale_log2 = -scale_log2
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = zeros(ROWS, VALUE_DIM)

    for start in range(begin, end, KEYS):
        # [ROWS, KEYS] scores from [ROWS, DIM] and [KEYS, DIM].
        columns = row_numbers(key_order, start, end, KEYS, True)
        k = load_rows(key_rows, start, columns, end, DIM, True, GATHER_KEY)
        scores = inner(q, k, None, DIM, UPCAST)
        if alibi_slopes is not None:
            scores = with_alibi(scores, slope[:, None], columns[None, :], row_position[:, None])
        if NEGATIVE_SCALE:
            # The maximum is taken before the scale is multiplied in, so the scale must be positive.
            scores = -scores
        scores = tl.where(is_visible(first_key, end_key, start + tl.arange(0, KEYS)), scores, float("-inf"))
        weights, shrink, highest, total = softmax_step(scores, highest, total, scale_log2, True)
        v = load_rows(value_rows, start, columns, end, VALUE_DIM, True, GATHER_KEY)
        sums = scaled(sums, shrink[:, None], VALUE_DIM)
        sums = add_products(weights.to(v.main.dtype), v, sums, VALUE_DIM, UPCAST)

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)[:, None]
    result = ((split * batches + batch) * queries + own) * (key_heads * group) + head
    rest = sums.rest
    if VALUE_DIM.REST > 0:
        rest = rest / divisor
    store_placed(partial + result * VALUE_DIM.SIZE, Parts(sums.main / divisor, rest), inside, VALUE_DIM)
    logsumexp = tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(partial_logsumexp + result, logsumexp, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def split_merge_kernel(
    partial,  # float32 [splits, rows, VALUE_DIM.SIZE], contiguous
    partial_logsumexp,  # float32 [splits, rows], contiguous, in base 2
    output,  # [rows, VALUE_DIM.SIZE], contiguous
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
    there = column < VALUE_DIM.SIZE
    result = tl.zeros([VALUE_COVER], tl.float32)
    for index in range(splits):
        place = index * rows.to(tl.int64) + row
        weight = tl.exp2(tl.load(partial_logsumexp + place) - subtrahend)
        result += weight * tl.load(partial + place * VALUE_DIM.SIZE + column, mask=there, other=0.0)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    tl.store(output + row * VALUE_DIM.SIZE + column, (result / divisor).to(output.dtype.element_ty), mask=there)
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
        *strided(query, call.key, call.value),
        *per_row(call.lo, call.hi, call.query_order, call.key_order),
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
    )
    output = query.new_empty(*shape, call.value_dim)
    logsumexp = query.new_empty(shape, dtype=torch.float32)
    rows = shape.numel()
    call.launch("split_merge", split_merge_kernel, partial, partial_logsumexp, output, logsumexp, rows, call.splits)
    return call.put_queries(output), call.put_queries(logsumexp)
