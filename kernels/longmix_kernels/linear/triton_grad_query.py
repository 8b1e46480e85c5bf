"""Linear attention on a GPU, backward in queries: one program per tile of rows; see `triton_backward`."""

import triton
import triton.language as tl

from longmix_kernels.linear.triton_weights import pair_weights
from longmix_kernels.tensors import Strided
from longmix_kernels.tiles import head_rows, load_block_transposed, load_tile, product, program_head, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def grad_query_kernel(
    query: Strided,  # [B, T, H, DIM]
    key: Strided,  # [B, T, H, DIM]
    value: Strided,  # [B, T, H, VALUE_DIM]
    grad_output: Strided,  # [B, T, H, VALUE_DIM]
    document_ids,  # int32 [B, T], contiguous, or None
    memory,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    normalizer,  # float32 [B, H, DIM], contiguous, or None
    states,  # [B, H, chunks, DIM, VALUE_DIM], what enters each chunk
    normalizers,  # float32 [B, H, chunks, DIM], or None
    row_whole,  # float32 [B, H, T], from `gates_kernel`
    grad_rest,  # float32 [B, H, T], `row_rest` less the logarithm of the denominator
    column_whole,
    column_rest,
    grad_read,  # float32 [B, H, T], `read` divided by the denominator
    delta,  # float32 [B, H, T], or None
    grad_query,  # [B, T, H, DIM], contiguous
    query_sum,  # float32 [B, H, T]
    scale,
    length,
    heads,
    NORMALIZE: tl.constexpr,
    INITIAL: tl.constexpr,
    CARRIED: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_MAIN: tl.constexpr,
    DIM_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the gradient of `ROWS` queries of one head, and each one's product with its query."""
    tile, batch, head = program_head(tl.cdiv(length, ROWS), heads)
    start = tile * ROWS
    chunk = start // CHUNK
    first = chunk * CHUNK
    rows = start + tl.arange(0, ROWS)
    there = rows < length
    sequence = batch * heads + head
    queries = head_rows(query, batch, head)
    keys = head_rows(key, batch, head)
    values = head_rows(value, batch, head)
    grad_outputs = head_rows(grad_output, batch, head)
    own = sequence * length + rows
    # Rows past the end have weights of 0.
    own_whole = tl.load(row_whole + own, mask=there, other=float("-inf"))
    own_rest = tl.load(grad_rest + own, mask=there, other=0.0)
    own_read = tl.load(grad_read + own, mask=there, other=0.0)
    column_whole += sequence * length
    column_rest += sequence * length
    if NORMALIZE:
        own_delta = tl.load(delta + own, mask=there, other=0.0)
    if document_ids is not None:
        document_ids += batch * length
        own_id = tl.load(document_ids + rows, mask=there, other=0)
        first_id = tl.load(document_ids + first)

    dq_main = tl.zeros([ROWS, DIM_MAIN], tl.float32)
    if DIM_REST > 0:
        dq_rest = tl.zeros([ROWS, DIM_REST], tl.float32)
    for SOURCE in tl.static_range(2 if INITIAL and document_ids is not None else 1):
        of_source = there
        width = VALUE_DIM
        if SOURCE == 0:
            place = sequence * tl.cdiv(length, CHUNK) + chunk
            state = states + place * (DIM * VALUE_DIM)
            if NORMALIZE:
                row_state = normalizers + place * DIM
            if INITIAL and document_ids is not None:
                of_source = there & (own_id == first_id)
            if not (INITIAL or CARRIED):
                width = tl.where(first > 0, VALUE_DIM, 0)
        else:
            state = memory + sequence * (DIM * VALUE_DIM)
            if NORMALIZE:
                row_state = normalizer + sequence * DIM
            of_source = there & (own_id != first_id)
            width = tl.where(tl.max(of_source.to(tl.int32), 0) > 0, VALUE_DIM, 0)
        for column in range(0, width, BLOCK):
            # [ROWS, BLOCK] times [BLOCK, DIM_MAIN].
            do = load_tile(grad_outputs.pointer, start, of_source, grad_outputs.stride, column, BLOCK, VALUE_DIM)
            c = load_block_transposed(state, 0, DIM_MAIN, DIM, column, BLOCK, VALUE_DIM)
            dq_main = product(do, c.to(do.dtype), dq_main, UPCAST)
            if DIM_REST > 0:
                c = load_block_transposed(state, DIM_MAIN, DIM_REST, DIM, column, BLOCK, VALUE_DIM)
                dq_rest = product(do, c.to(do.dtype), dq_rest, UPCAST)
        if NORMALIZE:
            weight = tl.where(of_source, own_delta, 0.0)
            dims = tl.arange(0, DIM_MAIN)
            dq_main += weight[:, None] * tl.load(row_state + dims, mask=dims < DIM, other=0.0)[None, :]
            if DIM_REST > 0:
                rest_dims = DIM_MAIN + tl.arange(0, DIM_REST)
                dq_rest += weight[:, None] * tl.load(row_state + rest_dims, mask=rest_dims < DIM, other=0.0)[None, :]
    own_read *= scale
    dq_main *= own_read[:, None]
    if DIM_REST > 0:
        dq_rest *= own_read[:, None]

    do_main = load_tile(grad_outputs.pointer, start, there, grad_outputs.stride, 0, VALUE_MAIN, VALUE_DIM)
    if VALUE_REST > 0:
        do_rest = load_tile(grad_outputs.pointer, start, there, grad_outputs.stride, VALUE_MAIN, VALUE_REST, VALUE_DIM)
    for begin in range(first, tl.minimum(start + ROWS, length), KEYS):
        # [ROWS, KEYS] gradients of scores from [ROWS, VALUE_DIM] and [KEYS, VALUE_DIM].
        columns = begin + tl.arange(0, KEYS)
        inside = columns < length
        v = load_tile(values.pointer, begin, inside, values.stride, 0, VALUE_MAIN, VALUE_DIM)
        grads = product(do_main, tl.trans(v), None, UPCAST)
        if VALUE_REST > 0:
            v = load_tile(values.pointer, begin, inside, values.stride, VALUE_MAIN, VALUE_REST, VALUE_DIM)
            grads = product(do_rest, tl.trans(v), grads, UPCAST)
        if NORMALIZE:
            grads += own_delta[:, None]
        whole = tl.load(column_whole + columns, mask=inside, other=0.0)
        rest = tl.load(column_rest + columns, mask=inside, other=0.0)
        visible = rows[:, None] >= columns[None, :]
        if document_ids is not None:
            ids = tl.load(document_ids + columns, mask=inside, other=0)
            visible = visible & (own_id[:, None] == ids[None, :])
        # Rounded as in the gradients of keys, so that what a token has as row and as column cancels in the decays'.
        grads *= pair_weights(own_whole[:, None], own_rest[:, None], whole[None, :], rest[None, :], visible) * scale
        k = load_tile(keys.pointer, begin, inside, keys.stride, 0, DIM_MAIN, DIM)
        low_grads = grads.to(k.dtype)
        dq_main = product(low_grads, k, dq_main, UPCAST)
        if DIM_REST > 0:
            k = load_tile(keys.pointer, begin, inside, keys.stride, DIM_MAIN, DIM_REST, DIM)
            dq_rest = product(low_grads, k, dq_rest, UPCAST)

    grad_query += (batch * length * heads + head) * DIM
    q = load_tile(queries.pointer, start, there, queries.stride, 0, DIM_MAIN, DIM)
    total = tl.sum(q.to(tl.float32) * dq_main, 1)
    store_tile(grad_query, dq_main, start, there, heads * DIM, 0, DIM_MAIN, DIM)
    if DIM_REST > 0:
        q = load_tile(queries.pointer, start, there, queries.stride, DIM_MAIN, DIM_REST, DIM)
        total += tl.sum(q.to(tl.float32) * dq_rest, 1)
        store_tile(grad_query, dq_rest, start, there, heads * DIM, DIM_MAIN, DIM_REST, DIM)
    tl.store(query_sum + own, total, mask=there)
