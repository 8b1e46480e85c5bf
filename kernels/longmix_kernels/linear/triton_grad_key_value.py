"""Linear attention on a GPU, backward in keys and values: one program per tile of keys; see `triton_backward`."""

import triton
import triton.language as tl

from longmix_kernels.linear.triton_weights import pair_weights
from longmix_kernels.tensors import Strided
from longmix_kernels.tiles import (
    head_rows,
    load_block,
    load_block_transposed,
    load_tile,
    product,
    program_head,
    store_tile,
)


@triton.jit(do_not_specialize=["length", "heads"])
def grad_key_value_kernel(
    query: Strided,  # [B, T, H, DIM]
    key: Strided,  # [B, T, H, DIM]
    value: Strided,  # [B, T, H, VALUE_DIM]
    grad_output: Strided,  # [B, T, H, VALUE_DIM]
    document_ids,  # int32 [B, T], contiguous, or None
    grad_states,  # [B, H, chunks, DIM, VALUE_DIM], of what leaves each chunk
    grad_normalizers,  # float32 [B, H, chunks, DIM], or None
    row_whole,  # float32 [B, H, T], from `gates_kernel`
    grad_rest,  # float32 [B, H, T], `row_rest` less the logarithm of the denominator
    column_whole,
    column_rest,
    write,
    delta,  # float32 [B, H, T], or None
    grad_key,  # [B, T, H, DIM], contiguous, or None
    grad_value,  # [B, T, H, VALUE_DIM], contiguous, or None
    key_sum,  # float32 [B, H, T], or None
    scale,
    length,
    heads,
    NORMALIZE: tl.constexpr,
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
    """Write the gradients of `KEYS` keys, values or both of one head, and each key's product with its gradient.

    Gradients of keys need V dY^T alone and those of values K Q^T alone, so that leaving out one of them leaves out its
    products.
    """
    tile, batch, head = program_head(tl.cdiv(length, KEYS), heads)
    start = tile * KEYS
    chunk = start // CHUNK
    end = tl.minimum(chunk * CHUNK + CHUNK, length)
    columns = start + tl.arange(0, KEYS)
    there = columns < length
    sequence = batch * heads + head
    queries = head_rows(query, batch, head)
    keys = head_rows(key, batch, head)
    values = head_rows(value, batch, head)
    grad_outputs = head_rows(grad_output, batch, head)
    own = sequence * length + columns
    own_whole = tl.load(column_whole + own, mask=there, other=0.0)
    own_rest = tl.load(column_rest + own, mask=there, other=0.0)
    own_write = tl.load(write + own, mask=there, other=0.0)
    row_whole += sequence * length
    grad_rest += sequence * length
    if NORMALIZE:
        delta += sequence * length
    if document_ids is not None:
        document_ids += batch * length
        own_id = tl.load(document_ids + columns, mask=there, other=0)
    grad_state = grad_states + (sequence * tl.cdiv(length, CHUNK) + chunk) * (DIM * VALUE_DIM)

    if grad_key is not None:
        # From the state: [KEYS, BLOCK] times [BLOCK, DIM_MAIN].
        dk_main = tl.zeros([KEYS, DIM_MAIN], tl.float32)
        if DIM_REST > 0:
            dk_rest = tl.zeros([KEYS, DIM_REST], tl.float32)
        for column in range(0, VALUE_DIM, BLOCK):
            v = load_tile(values.pointer, start, there, values.stride, column, BLOCK, VALUE_DIM)
            dc = load_block_transposed(grad_state, 0, DIM_MAIN, DIM, column, BLOCK, VALUE_DIM)
            dk_main = product(v, dc.to(v.dtype), dk_main, UPCAST)
            if DIM_REST > 0:
                dc = load_block_transposed(grad_state, DIM_MAIN, DIM_REST, DIM, column, BLOCK, VALUE_DIM)
                dk_rest = product(v, dc.to(v.dtype), dk_rest, UPCAST)
        if NORMALIZE:
            grad_normalizers += (sequence * tl.cdiv(length, CHUNK) + chunk) * DIM
            dims = tl.arange(0, DIM_MAIN)
            dk_main += tl.load(grad_normalizers + dims, mask=dims < DIM, other=0.0)[None, :]
            if DIM_REST > 0:
                rest_dims = DIM_MAIN + tl.arange(0, DIM_REST)
                dk_rest += tl.load(grad_normalizers + rest_dims, mask=rest_dims < DIM, other=0.0)[None, :]
        dk_main *= own_write[:, None]
        if DIM_REST > 0:
            dk_rest *= own_write[:, None]
    if grad_value is not None:
        # From the state: [KEYS, BLOCK] times [BLOCK, VALUE_MAIN].
        dv_main = tl.zeros([KEYS, VALUE_MAIN], tl.float32)
        if VALUE_REST > 0:
            dv_rest = tl.zeros([KEYS, VALUE_REST], tl.float32)
        for column in range(0, DIM, BLOCK):
            k = load_tile(keys.pointer, start, there, keys.stride, column, BLOCK, DIM)
            dc = load_block(grad_state, column, BLOCK, DIM, 0, VALUE_MAIN, VALUE_DIM)
            dv_main = product(k, dc.to(k.dtype), dv_main, UPCAST)
            if VALUE_REST > 0:
                dc = load_block(grad_state, column, BLOCK, DIM, VALUE_MAIN, VALUE_REST, VALUE_DIM)
                dv_rest = product(k, dc.to(k.dtype), dv_rest, UPCAST)
        dv_main *= own_write[:, None]
        if VALUE_REST > 0:
            dv_rest *= own_write[:, None]

    if grad_value is not None:
        k_main = load_tile(keys.pointer, start, there, keys.stride, 0, DIM_MAIN, DIM)
        if DIM_REST > 0:
            k_rest = load_tile(keys.pointer, start, there, keys.stride, DIM_MAIN, DIM_REST, DIM)
    if grad_key is not None:
        v_main = load_tile(values.pointer, start, there, values.stride, 0, VALUE_MAIN, VALUE_DIM)
        if VALUE_REST > 0:
            v_rest = load_tile(values.pointer, start, there, values.stride, VALUE_MAIN, VALUE_REST, VALUE_DIM)
    for begin in range(start // ROWS * ROWS, end, ROWS):
        # [KEYS, ROWS] transposed scores and their gradients.
        rows = begin + tl.arange(0, ROWS)
        inside = rows < length
        # Rows past the end have weights of 0.
        whole = tl.load(row_whole + rows, mask=inside, other=float("-inf"))
        rest = tl.load(grad_rest + rows, mask=inside, other=0.0)
        visible = rows[None, :] >= columns[:, None]
        if document_ids is not None:
            ids = tl.load(document_ids + rows, mask=inside, other=0)
            visible = visible & (own_id[:, None] == ids[None, :])
        weights = pair_weights(own_whole[:, None], own_rest[:, None], whole[None, :], rest[None, :], visible) * scale
        q_main = load_tile(queries.pointer, begin, inside, queries.stride, 0, DIM_MAIN, DIM)
        do_main = load_tile(grad_outputs.pointer, begin, inside, grad_outputs.stride, 0, VALUE_MAIN, VALUE_DIM)
        if DIM_REST > 0:
            q_rest = load_tile(queries.pointer, begin, inside, queries.stride, DIM_MAIN, DIM_REST, DIM)
        if VALUE_REST > 0:
            do_rest = load_tile(
                grad_outputs.pointer, begin, inside, grad_outputs.stride, VALUE_MAIN, VALUE_REST, VALUE_DIM
            )
        if grad_value is not None:
            scores = product(k_main, tl.trans(q_main), None, UPCAST)
            if DIM_REST > 0:
                scores = product(k_rest, tl.trans(q_rest), scores, UPCAST)
            low_scores = (scores * weights).to(do_main.dtype)
            dv_main = product(low_scores, do_main, dv_main, UPCAST)
            if VALUE_REST > 0:
                dv_rest = product(low_scores, do_rest, dv_rest, UPCAST)
        if grad_key is not None:
            grads = product(v_main, tl.trans(do_main), None, UPCAST)
            if VALUE_REST > 0:
                grads = product(v_rest, tl.trans(do_rest), grads, UPCAST)
            if NORMALIZE:
                grads += tl.load(delta + rows, mask=inside, other=0.0)[None, :]
            low_grads = (grads * weights).to(q_main.dtype)
            dk_main = product(low_grads, q_main, dk_main, UPCAST)
            if DIM_REST > 0:
                dk_rest = product(low_grads, q_rest, dk_rest, UPCAST)

    place = batch * length * heads + head
    if grad_key is not None:
        # Keys are loaded once more, since they would be kept in registers for this.
        grad_key += place * DIM
        k = load_tile(keys.pointer, start, there, keys.stride, 0, DIM_MAIN, DIM)
        total = tl.sum(k.to(tl.float32) * dk_main, 1)
        store_tile(grad_key, dk_main, start, there, heads * DIM, 0, DIM_MAIN, DIM)
        if DIM_REST > 0:
            k = load_tile(keys.pointer, start, there, keys.stride, DIM_MAIN, DIM_REST, DIM)
            total += tl.sum(k.to(tl.float32) * dk_rest, 1)
            store_tile(grad_key, dk_rest, start, there, heads * DIM, DIM_MAIN, DIM_REST, DIM)
        tl.store(key_sum + own, total, mask=there)
    if grad_value is not None:
        grad_value += place * VALUE_DIM
        store_tile(grad_value, dv_main, start, there, heads * VALUE_DIM, 0, VALUE_MAIN, VALUE_DIM)
        if VALUE_REST > 0:
            store_tile(grad_value, dv_rest, start, there, heads * VALUE_DIM, VALUE_MAIN, VALUE_REST, VALUE_DIM)
