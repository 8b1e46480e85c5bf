"""Delta rule chunk by chunk, memory linear in the length (UT transform, Yang et al. 2024, arXiv 2406.06484, in torch).

A few chunks at a time, so that they stay in cache. Rows of a chunk are queries q and low-rank reads a; columns are keys
k and low-rank writes b. With Q what the rows read the entering state S with, W what the columns write to the leaving
state S', A the weights of columns in rows (see `blocked_weights`), and R = (1 - A_ab)^-1,

    u = R A_ak v + R Q_a S                  what is read for removal, u_t = S_{t-1}^T a_t
    S' = diag(kept) S + W_k^T v + W_b^T u   y = Q_q S + A_qk v + A_qb u

Only R Q_a S and what follows from it goes from chunk to chunk; all else is one product for a run of chunks.

Backward: runs are taken in reverse, and what they need is computed again, from the states that the forward kept. With
dS' the gradient of the leaving state,

    du = A_qb^T dy + W_b dS'                dx = R^T du
    dS = diag(kept) dS' + Q_q^T dy + (R Q_a)^T du
    dv = A_qk^T dy + A_ak^T dx + W_k dS'
    dA = [dy, dx] [v, u]^T                  dQ = [dy, dx] S^T                            dW = [v, u] dS'^T
"""

import torch

from longmix_kernels.delta.blocked_call import BlockedCall, Run, parts, tokens_apart
from longmix_kernels.delta.blocked_weights import ChunkWeights
from longmix_kernels.delta.inputs import Inputs


def blocked_forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output [B, T, H, V], the state after the last token [B, H, K, V], and those kept for the backward.

    Decays are looked at, so that nothing needs to be promised of them: `min_log_decay` changes nothing.
    """
    output, final, kept = empty_results(inputs)
    space: dict[str, torch.Tensor] = {}
    for part in parts(inputs):
        call = BlockedCall(part, inputs, space)
        state = call.carried
        for run in call.runs():
            weights = call.weights(run, outputs=True)
            written, states = _states(call, run, weights, state)
            call.put(part.tokens(output), run, _outputs(call, run, weights, written, states))
            call.keep(part.states(kept), run, states)
            state = states[-1]
        part.states(final).copy_(state.view(call.batch, call.heads, *state.shape[1:]))
    return output, final, kept


def empty_results(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Make what `blocked_forward` returns, without computing it; the kept states are [B, H, states, K, V]."""
    batch, length, heads, dim = inputs.query.shape
    state = dim, inputs.value.shape[-1]
    kept = (length - 1) // tokens_apart(inputs)
    output = inputs.query.new_empty(batch, length, heads, state[1])
    states = (inputs.log_decay.new_empty(batch, heads, *more, *state) for more in ((), (kept,)))
    return output, *states


def blocked_backward(
    inputs: Inputs, grad_output: torch.Tensor, grad_state: torch.Tensor | None, kept: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the first eight inputs, empty where an input is None.

    Args:
        inputs: as in the forward.
        grad_output: [B, T, H, V].
        grad_state: [B, H, K, V], of the final state, or None for zero.
        kept: the states that the forward kept.
    """
    grads = [grad_output.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs.flat()[:8]]
    space: dict[str, torch.Tensor] = {}
    for part in parts(inputs):
        call = BlockedCall(part, inputs, space)
        leaving = torch.zeros_like(call.initial)
        if grad_state is not None:
            leaving.copy_(part.states(grad_state).reshape(leaving.shape))
        grad_initial = torch.zeros_like(leaving)
        runs = _entering_states(call, part.states(kept))
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


def _entering_states(call: BlockedCall, kept: torch.Tensor) -> list[tuple[Run, torch.Tensor]]:
    """Return all runs with the state entering each, [X, K, V], computed again where it was not kept."""
    found: list[tuple[Run, torch.Tensor]] = []
    for run in call.runs():
        if run.start % call.apart == 0:
            state = call.kept(kept, run)
        else:
            before, state = found[-1]
            _, states = _states(call, before, call.weights(before, outputs=False), state)
            state = states[-1].clone()
        found.append((run, state))
    return found


def _states(
    call: BlockedCall, run: Run, weights: ChunkWeights, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go through the chunks of a run.

    Args:
        state: [X, K, V], entering the run.

    Returns:
        Values and what is removed, [G * X, P * L, V], and the states between chunks [G + 1, X, K, V].
    """
    length, width, own = run.length, call.sequences, weights.of_states
    values = call.take([call.value], run, "written", room=weights.low_rank)
    written, value = values.flatten(1, 2), values[:, 0]
    states = call.space("states", run.chunks + 1, *state.shape)
    states[0] = state
    torch.bmm(own.writes[:, :length].mT, value, out=states[1:].flatten(0, 1))
    if own.kept_initial is not None:
        states[1:].addcmul_(call.initial, own.kept_initial.unflatten(0, (-1, width)))
    between, kept = states.unbind(), own.kept.split(width)
    if own.inverse is None or own.removing is None:
        for before, after, factor in zip(between, between[1:], kept, strict=False):
            after.addcmul_(before, factor)
        return written, states
    read = torch.bmm(weights.within[:, -length:, :length], value, out=call.space("read", *value.shape))
    if own.initial is not None:
        read.baddbmm_(own.initial[:, -length:], call.initial.repeat(run.chunks, 1, 1))
    removed = torch.bmm(own.inverse, read, out=call.space("removed", *value.shape))
    of_chunks = removed.split(width), own.removing.split(width), own.writes[:, length:].mT.split(width)
    for before, after, factor, rows, reads, writes in zip(between, between[1:], kept, *of_chunks, strict=False):
        rows.baddbmm_(reads, before)
        after.addcmul_(before, factor).baddbmm_(writes, rows)
    values[:, 1] = removed
    return written, states


def _outputs(
    call: BlockedCall, run: Run, weights: ChunkWeights, written: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """Return the outputs [G * X, L, V] of a run, from what `_states` returns."""
    length, own = run.length, weights.of_states
    read = torch.bmm(weights.within[:, :length], written, out=call.space("read", len(written), length, call.value_dim))
    read.baddbmm_(own.entering[:, :length], states[:-1].flatten(0, 1))
    if own.initial is not None:
        read.baddbmm_(own.initial[:, :length], call.initial.repeat(run.chunks, 1, 1))
    return read


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
    written, states = _states(call, run, weights, state)
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
    length, width, own = run.length, call.sequences, weights.of_states
    grads = call.space("grad_states", run.chunks + 1, *grad_state.shape)
    grads[-1] = grad_state
    grad_output = grad_rows[:, :length]
    torch.bmm(own.entering[:, :length].mT, grad_output, out=grads[:-1].flatten(0, 1))
    between, kept = grads.unbind(), own.kept.split(width)
    back = between[:-1][::-1], between[::-1], kept[::-1]
    if own.inverse is None or own.removing is None:
        for before, after, factor in zip(*back, strict=False):
            before.addcmul_(after, factor)
    else:
        removed = call.space("removed", len(grad_rows), length, call.value_dim)  # what is removed was copied
        torch.bmm(weights.within[:, :length, length:].mT, grad_output, out=removed)
        of_chunks = removed.split(width), own.removing.mT.split(width), own.writes[:, length:].split(width)
        for before, after, factor, rows, reads, writes in zip(*back, *(x[::-1] for x in of_chunks), strict=False):
            rows.baddbmm_(writes, after)
            before.addcmul_(after, factor).baddbmm_(reads, rows)
        grad_rows[:, length:] = torch.bmm(own.inverse.mT, removed, out=call.space("read", *removed.shape))
    if own.initial is not None and own.kept_initial is not None:
        grad_initial += (grads[1:] * own.kept_initial.unflatten(0, (-1, width))).sum(0)
        grad_initial += (own.initial.mT @ grad_rows).unflatten(0, (-1, width)).sum(0)
    return grads
