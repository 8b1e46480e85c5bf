"""Delta rule chunk by chunk, memory linear in the length (UT transform, Yang et al. 2024, arXiv 2406.06484, in torch).

A few chunks at a time, so that they stay in cache. Rows of a chunk are queries q and low-rank reads a; columns are keys
k and low-rank writes b. With Q what the rows read the entering state S with, W what the columns write to the leaving
state S', and A the weights of columns in rows (see `blocked_weights`),

    x = Q_a S + A_ak v            u = (1 - A_ab)^-1 x             u_t = what is read for removal, S_{t-1}^T a_t
    y = Q_q S + A_qk v + A_qb u   S' = diag(kept) S + W_k^T v + W_b^T u

Backward: the states entering each run of chunks are computed first; then the runs are taken in reverse, and what they
need is computed again. With dS' the gradient of the leaving state,

    du = A_qb^T dy + W_b dS'                dx = (1 - A_ab)^-T du
    dv = A_qk^T dy + A_ak^T dx + W_k dS'    dS = diag(kept) dS' + Q_q^T dy + Q_a^T dx
    dA = [dy, dx] [v, u]^T                  dQ = [dy, dx] S^T                            dW = [v, u] dS'^T
"""

import torch

from longmix_kernels.delta.blocked_call import BlockedCall, Run, parts
from longmix_kernels.delta.blocked_weights import ChunkWeights
from longmix_kernels.delta.inputs import Inputs


def blocked_forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, T, H, V] and the state after the last token [B, H, K, V].

    Decays are looked at, so that nothing needs to be promised of them: `min_log_decay` changes nothing.
    """
    batch, _, heads, dim = inputs.query.shape
    output = inputs.query.new_empty(inputs.value.shape)
    final = inputs.log_decay.new_empty(batch, heads, dim, inputs.value.shape[-1])
    space: dict[str, torch.Tensor] = {}
    for part in parts(inputs):
        call = BlockedCall(part, inputs, space)
        state = call.carried
        for run in call.runs():
            weights = call.weights(run, outputs=True)
            written, read, states = _forward_run(call, run, weights, state)
            rows = read[:, : run.length]
            if weights.low_rank:
                rows.baddbmm_(weights.within[:, : run.length, run.length :], written[:, run.length :])
            call.put(part.tokens(output), run, rows)
            state = states[-1]
        part.states(final).copy_(state.view(call.batch, call.heads, *state.shape[1:]))
    return output, final


def blocked_backward(
    inputs: Inputs, grad_output: torch.Tensor, grad_state: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the first eight inputs, empty where an input is None.

    Args:
        inputs: as in the forward.
        grad_output: [B, T, H, V].
        grad_state: [B, H, K, V], of the final state, or None for zero.
    """
    grads = [grad_output.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs.flat()[:8]]
    space: dict[str, torch.Tensor] = {}
    for part in parts(inputs):
        call = BlockedCall(part, inputs, space)
        leaving = torch.zeros_like(call.initial)
        if grad_state is not None:
            leaving.copy_(part.states(grad_state).reshape(leaving.shape))
        grad_initial = torch.zeros_like(leaving)
        runs = _entering_states(call)
        while runs:
            run, state = runs.pop()
            found, leaving = _backward_run(call, run, state, part.tokens(grad_output), leaving, grad_initial)
            for grad, rows in zip(grads, found, strict=False):
                if rows is not None:
                    call.put(part.tokens(grad), run, rows)
        if not call.has_carried:
            grad_initial += leaving
        of_states = (call.has_state, grad_initial, grads[6]), (call.has_carried, leaving, grads[7])
        for there, found_grad, grad in of_states:
            if there:
                part.states(grad).copy_(found_grad.view(call.batch, call.heads, *leaving.shape[1:]))
    return tuple(grads)


def _entering_states(call: BlockedCall) -> list[tuple[Run, torch.Tensor]]:
    """Return all runs with the state entering each, [X, K, V]."""
    found, state = [], call.carried
    for run in call.runs():
        found.append((run, state))
        if run.tokens.stop < call.length:
            _, _, states = _forward_run(call, run, call.weights(run, outputs=False), state)
            state = states[-1].clone()
    return found


def _forward_run(
    call: BlockedCall, run: Run, weights: ChunkWeights, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Go through the chunks of a run.

    Args:
        state: [X, K, V], entering the run.

    Returns:
        Values and what is removed, [G * X, P * L, V]; what rows read [G * X, R * L, V], queries without what is written
        where something is removed; and the states between chunks [G + 1, X, K, V].
    """
    length, width = run.length, call.sequences
    values = call.take([call.value], run, "written", room=weights.low_rank)
    written = values.flatten(1, 2)
    states = call.space("states", run.chunks + 1, *state.shape)
    states[0] = state
    kinds = weights.rows.shape[1]
    read = call.space("read", len(written), kinds * length, call.value_dim)
    if kinds:
        torch.bmm(weights.within[:, :, :length], values[:, 0], out=read)
    of_chunks = weights.of_states.of_chunks(width), read.split(width), written.split(width)
    for chunk, (own, rows, columns) in enumerate(zip(*of_chunks, strict=True)):
        if kinds:
            rows.baddbmm_(own.entering, states[chunk])
            if own.initial is not None:
                rows.baddbmm_(own.initial, call.initial)
        if own.inverse is not None:
            columns[:, length:] = torch.bmm(own.inverse, rows[:, -length:])
        leaving = torch.mul(states[chunk], own.kept, out=states[chunk + 1])
        leaving.baddbmm_(own.writes.mT, columns)
        if own.kept_initial is not None:
            leaving.addcmul_(call.initial, own.kept_initial)
    return written, read, states


def _backward_run(
    call: BlockedCall,
    run: Run,
    state: torch.Tensor,
    grad_output: torch.Tensor,
    grad_state: torch.Tensor,
    grad_initial: torch.Tensor,
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
    """Return the gradients of the six inputs per token, [G * X, L, D], and of the state entering the run.

    Args:
        state, grad_state: [X, K, V], entering the run, and the gradient of the one leaving it.
        grad_output: [B, T, H, V].
        grad_initial: [X, K, V], added to.
    """
    length = run.length
    weights = call.weights(run, outputs=True)
    of_states = weights.of_states
    written, _, states = _forward_run(call, run, weights, state)
    grad_rows = call.take([grad_output], run, "grad_rows", room=weights.low_rank).flatten(1, 2)
    grad_states = _backward_states(call, run, weights, grad_rows, grad_state, grad_initial)
    entering, leaving = states[:-1].flatten(0, 1), grad_states[1:].flatten(0, 1)

    grad_value = call.space("grad_value", len(written), length, call.value_dim)
    torch.bmm(weights.within[:, :, :length].mT, grad_rows, out=grad_value)
    grad_value.baddbmm_(of_states.writes[:, :length], leaving)
    grad_within = torch.bmm(grad_rows, written.mT, out=call.space("grad_within", *weights.within.shape))
    weights.hide(grad_within)
    grad_reads = torch.bmm(grad_rows, entering.mT, out=call.space("grad_reads", *of_states.entering.shape))
    grad_writes = torch.bmm(written, leaving.mT, out=call.space("grad_writes", *of_states.writes.shape))
    kept_terms = (entering * leaving).sum(-1) * of_states.kept.squeeze(-1)
    weights.mask_state_grads(grad_reads, grad_writes)
    if of_states.kept_initial is not None:
        initial = call.initial.repeat(run.chunks, 1, 1)
        grad_reads += weights.mask_initial(torch.bmm(grad_rows, initial.mT))
        kept_terms += (initial * leaving).sum(-1) * of_states.kept_initial.squeeze(-1)
    rows, columns, decay = weights.backward(grad_within, grad_reads, grad_writes, kept_terms)
    rows[:, 0].mul_(call.scale)
    removed = (rows[:, 1], columns[:, 1]) if weights.low_rank else (None, None)
    return (rows[:, 0], columns[:, 0], grad_value, decay, *removed), grad_states[0]


def _backward_states(
    call: BlockedCall,
    run: Run,
    weights: ChunkWeights,
    grad_rows: torch.Tensor,
    grad_state: torch.Tensor,
    grad_initial: torch.Tensor,
) -> torch.Tensor:
    """Return the gradients of the states between chunks, [G + 1, X, K, V], and complete those of rows."""
    length, width = run.length, call.sequences
    grads = call.space("grad_states", run.chunks + 1, *grad_state.shape)
    grads[-1] = grad_state
    grad_removed = grad_rows[:, :0]
    if weights.low_rank:
        grad_removed = call.space("grad_removed", len(grad_rows), length, call.value_dim)
        torch.bmm(weights.within[:, :length, length:].mT, grad_rows[:, :length], out=grad_removed)
    of_chunks = weights.of_states.of_chunks(width), grad_rows.split(width), grad_removed.split(width)
    for chunk, (own, rows, removed) in reversed(list(enumerate(zip(*of_chunks, strict=True)))):
        leaving = grads[chunk + 1]
        if own.inverse is not None:
            rows[:, length:] = torch.bmm(own.inverse.mT, removed.baddbmm_(own.writes[:, length:], leaving))
        torch.mul(leaving, own.kept, out=grads[chunk]).baddbmm_(own.entering.mT, rows)
        if own.initial is not None:
            grad_initial.addcmul_(leaving, own.kept_initial).baddbmm_(own.initial.mT, rows)
    return grads
