"""The gates of linear attention on a GPU: log scales, the weights that follow from them, and the gradients of gates.

With b_t the sum of log decays from the chunk's first token to t, i_t the log input gate and m_t the log scale of row t,
all in base 2, a row t

    takes token j of its chunk with      exp2(b_t - b_j + i_j - m_t)     row (b_t - m_t) plus column (i_j - b_j)
    reads the state entering it with     exp2(b_t + m_in - m_t)          `read`
    writes to the state leaving it with  exp2(b_end - b_t + i_t - m_end) `write`

A document that begins within a chunk reads the initial state, from its first token on, and only the document that is
open at the chunk's end writes to the state leaving it. In every case that state keeps `read` of the chunk's last row.

Any m_t will do that keeps all weights near 1 or below, since it divides out. It is a whole number, so that dividing by
exp2(m_t) is exact, and it needs no scores: max-plus sums of the gates alone give it before any product is computed.
"""

import triton
import triton.language as tl

from longmix_kernels.linear.triton_weights import to_base_2, to_fixed, to_float, whole_and_rest
from longmix_kernels.tensors import Strided
from longmix_kernels.tiles import head_rows, program_head

# Added to the path of a first token, so that nothing from before it can be the largest.
_CUT = tl.constexpr(-1e30)


@triton.jit
def largest_then(path, largest, next_path, next_largest):
    """Join two runs of tokens: how much the first is decayed by the second, and the largest weight of either."""
    return path + next_path, tl.maximum(largest + next_path, next_largest)


@triton.jit
def sum_since(begun, total, next_begun, next_total):
    """Join two runs of tokens: whether a document begins in them, and the sum since then."""
    return begun | next_begun, tl.where(next_begun != 0, next_total, total + next_total)


@triton.jit(do_not_specialize=["length", "heads"])
def scales_kernel(
    log_decay: Strided,  # float32 [B, T, H]
    log_input: Strided | None,  # float32 [B, T, H], or None for 0
    document_ids,  # int32 [B, T], contiguous, or None
    log_scale,  # float32 [B, H], natural, or None for 0
    carried_log_scale,  # float32 [B, H], natural, of the state before the first token, or None for `log_scale`
    row_log_scale,  # float32 [B, T, H], contiguous, in base 2
    final_log_scale,  # float32 [B, H], natural
    length,
    heads,
    ROWS: tl.constexpr,
):
    """Write the log scale of every row of one head, `ROWS` at a time."""
    _, batch, head = program_head(1, heads)
    decays = head_rows(log_decay, batch, head)
    if log_input is not None:
        gates = head_rows(log_input, batch, head)
    if document_ids is not None:
        document_ids += batch * length
    row_log_scale += batch * length * heads + head
    initial = 0.0
    if log_scale is not None:
        initial = to_base_2(tl.load(log_scale + batch * heads + head))
    carried = tl.zeros([], tl.float32) + initial
    if carried_log_scale is not None:
        carried = tl.zeros([], tl.float32) + to_base_2(tl.load(carried_log_scale + batch * heads + head))
    for start in range(0, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        there = rows < length
        offsets = rows.to(tl.int64)
        decay = to_base_2(tl.load(decays.pointer + offsets * decays.stride, mask=there, other=0.0))
        gate = tl.zeros([ROWS], tl.float32)
        if log_input is not None:
            gate = to_base_2(tl.load(gates.pointer + offsets * gates.stride, mask=there, other=0.0))
        if document_ids is not None:
            own = tl.load(document_ids + rows, mask=there, other=0)
            before = tl.load(document_ids + rows - 1, mask=there & (rows > 0), other=0)
            begins = there & (rows > 0) & (own != before)
            gate = tl.where(begins, tl.maximum(gate, decay + initial), gate)
            decay = tl.where(begins, _CUT, decay)
        path, largest = tl.associative_scan((decay, gate), 0, largest_then)
        largest = tl.maximum(carried + path, largest)
        scale = tl.ceil(largest)
        tl.store(row_log_scale + offsets * heads, scale, mask=there)
        # ln 2 turns base 2 into the natural logarithm.
        final = final_log_scale + batch * heads + head + tl.zeros([ROWS], tl.int32)
        tl.store(final, scale * 0.6931471805599453, mask=rows == length - 1)
        carried = tl.sum(tl.where(rows == start + ROWS - 1, largest, 0.0), 0)


@triton.jit(do_not_specialize=["length", "heads"])
def gates_kernel(
    log_decay: Strided,  # float32 [B, T, H]
    log_input: Strided | None,  # float32 [B, T, H], or None for 0
    document_ids,  # int32 [B, T], contiguous, or None
    row_log_scale,  # float32 [B, T, H], contiguous, in base 2
    log_scale,  # float32 [B, H], natural, or None for 0
    carried_log_scale,  # float32 [B, H], natural, of the state before the first token, or None for `log_scale`
    row_whole,  # float32 [B, H, T], all that are written
    row_rest,
    column_whole,
    column_rest,
    read,
    write,
    length,
    heads,
    NORMALIZE: tl.constexpr,
    INITIAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write what rows and columns of one chunk of one head contribute to the logarithms of weights."""
    chunk, batch, head = program_head(tl.cdiv(length, CHUNK), heads)
    start = chunk * CHUNK
    last = tl.minimum(start + CHUNK, length) - 1
    rows = start + tl.arange(0, CHUNK)
    there = rows < length
    offsets = rows.to(tl.int64)
    decays = head_rows(log_decay, batch, head)
    decay = to_fixed(to_base_2(tl.load(decays.pointer + offsets * decays.stride, mask=there, other=0.0)))
    total = tl.cumsum(decay, 0)
    end = tl.sum(decay, 0)
    column = -total
    if log_input is not None:
        gates = head_rows(log_input, batch, head)
        gate = tl.load(gates.pointer + offsets * gates.stride, mask=there, other=0.0)
        column += to_fixed(to_base_2(gate))

    initial = tl.zeros([], tl.int64)
    scale = tl.zeros([CHUNK], tl.int64)
    entering, leaving, begun = initial, initial, initial
    if NORMALIZE:
        row_log_scale += batch * length * heads + head
        scale = to_fixed(tl.load(row_log_scale + offsets * heads, mask=there, other=0.0))
        leaving = to_fixed(tl.load(row_log_scale + last.to(tl.int64) * heads))
        if log_scale is not None:
            initial = to_fixed(to_base_2(tl.load(log_scale + batch * heads + head)))
        begun = initial
        if carried_log_scale is not None:
            begun = to_fixed(to_base_2(tl.load(carried_log_scale + batch * heads + head)))
        # The state entering a chunk is scaled as the row before it is.
        before_chunk = row_log_scale + (start - 1).to(tl.int64) * heads
        entering = to_fixed(tl.load(before_chunk, mask=start > 0, other=0.0))
    entering = tl.where(start > 0, entering, begun)
    source = tl.zeros([CHUNK], tl.int64) + entering
    since = total
    carried = there
    written = there
    if document_ids is not None:
        document_ids += batch * length
        own = tl.load(document_ids + rows, mask=there, other=0)
        first_id, last_id = tl.load(document_ids + start), tl.load(document_ids + last)
        id_before = tl.load(document_ids + start - 1, mask=start > 0, other=0)
        entering = tl.where((start == 0) | (id_before == first_id), entering, initial)
        carried = there & (own == first_id)
        written = there & (own == last_id)
        source = tl.where(carried, entering, initial)
        if INITIAL:
            before = tl.load(document_ids + rows - 1, mask=there & (rows > start), other=0)
            begins = (there & (rows > start) & (own != before)).to(tl.int32)
            _, since = tl.associative_scan((begins, decay), 0, sum_since)
            carried = there

    place = (batch * heads + head) * length + rows
    whole, rest = whole_and_rest(total - scale)
    tl.store(row_whole + place, whole, mask=there)
    tl.store(row_rest + place, rest, mask=there)
    whole, rest = whole_and_rest(column)
    tl.store(column_whole + place, whole, mask=there)
    tl.store(column_rest + place, rest, mask=there)
    # Rows that have no state to read, and tokens that none will hold, have a weight of 0.
    weight = tl.exp2(to_float(since + source - scale))
    tl.store(read + place, tl.where(carried, weight, 0.0), mask=there)
    weight = tl.exp2(to_float(end + column - leaving))
    tl.store(write + place, tl.where(written, weight, 0.0), mask=there)


@triton.jit(do_not_specialize=["length", "heads"])
def grad_gates_kernel(
    query_sum,  # float32 [B, H, T], q . dq
    key_sum,  # float32 [B, H, T], k . dk
    final_sum,  # float32 [B, H], the same of the state after the last token, or None
    document_ids,  # int32 [B, T], contiguous, or None
    grad_log_decay,  # float32 [B, T, H], contiguous
    grad_log_input,  # float32 [B, T, H], contiguous, or None
    length,
    heads,
    ROWS: tl.constexpr,
):
    """Write the gradients of the gates of one head, the last `ROWS` rows first.

    A decay is felt by all pairs of a token before it and a row from it on, which is what rows from it on have in total
    less what tokens from it on have in total, of the same document.
    """
    _, batch, head = program_head(1, heads)
    sequence = (batch * heads + head) * length
    grad_log_decay += batch * length * heads + head
    if grad_log_input is not None:
        grad_log_input += batch * length * heads + head
    if document_ids is not None:
        document_ids += batch * length
    carried = tl.zeros([], tl.float32)
    if final_sum is not None:
        carried += tl.load(final_sum + batch * heads + head)
    for done in range(0, length, ROWS):
        rows = length - 1 - done - tl.arange(0, ROWS)
        there = rows >= 0
        offsets = rows.to(tl.int64)
        of_keys = tl.load(key_sum + sequence + offsets, mask=there, other=0.0)
        difference = tl.load(query_sum + sequence + offsets, mask=there, other=0.0) - of_keys
        if document_ids is not None:
            own = tl.load(document_ids + rows, mask=there, other=0)
            after = tl.load(document_ids + rows + 1, mask=there & (rows + 1 < length), other=0)
            ended, total = tl.associative_scan(
                ((there & (rows + 1 < length) & (own != after)).to(tl.int32), difference), 0, sum_since
            )
            total += tl.where(ended != 0, 0.0, carried)
        else:
            total = tl.cumsum(difference, 0) + carried
        tl.store(grad_log_decay + offsets * heads, total, mask=there)
        if grad_log_input is not None:
            tl.store(grad_log_input + offsets * heads, of_keys, mask=there)
        carried = tl.sum(tl.where(tl.arange(0, ROWS) == ROWS - 1, total, 0.0), 0)
