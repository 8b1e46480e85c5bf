"""Scalar-gated linear attention chunk by chunk, in memory linear in the length (TFLA, Beck et al. 2025, in torch).

A few chunks at a time, so that they stay in cache: within a chunk tokens meet through a matrix of weights, and what
lies before it is read from the state entering it. The normaliser is one more column of the memory, the values of which
are all 1.

Backward: the states entering each run of chunks are computed first; then the runs are taken in reverse, and the same
products are computed again, transposed. With y = read / max(|x|, exp(-m)), x the last column of read,

    dread = dy / max(|x|, exp(-m))      dx = -sign(x) (dy . y) / max(|x|, exp(-m))  where |x| > exp(-m), else 0

which holds exactly with m a constant. A log decay receives the sum, over all tokens and states before it and all rows
and states after it, of weight times gradient of weight; sums are arranged so that no large terms cancel.
"""

import torch

from longmix_kernels.linear.blocked_call import BlockedCall, Run, Tensors, parts
from longmix_kernels.linear.blocked_weights import ChunkWeights
from longmix_kernels.linear.inputs import Inputs


def blocked_forward(inputs: Inputs) -> Tensors:
    """Return output, final memory, normaliser and log scale, and per row the log scale and what divides it, signed."""
    query, value, log_decay = inputs.query, inputs.value, inputs.log_decay
    batch, _, heads, dim = query.shape
    shapes = (batch, heads, dim, value.shape[-1]), (batch, heads, dim), (batch, heads), log_decay.shape, log_decay.shape
    results = [query.new_empty(value.shape)]
    results += [log_decay.new_empty(shape if inputs.normalize or i == 0 else 0) for i, shape in enumerate(shapes)]
    space: dict[str, torch.Tensor] = {}
    for part in parts(inputs):
        views = (part.states if 1 <= i <= 3 else part.tokens for i in range(6))
        call = BlockedCall(part.inputs(inputs), space)
        _forward(call, *(view(x) for view, x in zip(views, results, strict=True)))
    return tuple(results)


def blocked_backward(
    inputs: Inputs,
    grad_output: torch.Tensor,
    grad_memory: torch.Tensor | None,
    grad_normalizer: torch.Tensor | None,
    output: torch.Tensor,
    row_scale: torch.Tensor,
    along: torch.Tensor,
) -> Tensors:
    """Return the gradients of the first eleven inputs, empty where an input is None.

    Args:
        inputs: as in the forward.
        grad_output: [B, T, H, Dv].
        grad_memory, grad_normalizer: of the final state, or None for zero.
        output, row_scale, along: the first and the last two results of the forward.
    """
    tokens = inputs.query, inputs.key, inputs.value, inputs.log_decay, inputs.log_decay
    grads = [x.new_empty(x.shape) for x in tokens]
    states = inputs.flat()[5:11]
    grads += [grad_output.new_empty(0) if x is None else x.new_empty(x.shape) for x in states]
    space: dict[str, torch.Tensor] = {}
    for part in parts(inputs):
        call = BlockedCall(part.inputs(inputs), space)
        final = [None if x is None else part.states(x) for x in (grad_memory, grad_normalizer)]
        results = [part.tokens(x) for x in (grad_output, output, row_scale, along)]
        grad_tokens, grad_states = [part.tokens(x) for x in grads[:5]], [part.states(x) for x in grads[5:]]
        grad_initial, grad_carried = _backward(call, results, call.join_state(*final), grad_tokens)
        if not call.has_carried:
            grad_initial += grad_carried
        of_states = (
            (call.has_state, call.initial, grad_initial, grad_states[:3]),
            (call.has_carried, call.carried, grad_carried, grad_states[3:]),
        )
        for there, given, grad, (memory, normalizer, log_scale) in of_states:
            if there:
                call.split_state(grad, memory, normalizer)
            if there and call.normalize:
                log_scale.copy_((grad * given).sum((1, 2)).view(log_scale.shape))
    if inputs.log_input is None:
        grads[4] = grad_output.new_empty(0)
    return tuple(grads)


def _forward(
    call: BlockedCall,
    output: torch.Tensor,
    memory: torch.Tensor,
    normalizer: torch.Tensor,
    log_scale: torch.Tensor,
    row_scale: torch.Tensor,
    along: torch.Tensor,
) -> None:
    """Fill in the results."""
    state = call.carried
    for run, weights in call.runs():
        query, key, value = _inputs(call, run)
        states, _ = _states(call, weights, key, value, state)
        scores = torch.bmm(query, key.mT, out=call.space("scores", *_square(query)))
        scores.mul_(weights.within(call.space("within", *scores.shape)))
        read = torch.bmm(scores, value, out=call.space("read", *value.shape))
        read.baddbmm_(_times(query, weights.read, call.space("reading", *query.shape)), states[:-1].flatten(0, 1))
        if initial := call.restarts(weights):
            read += _times(query, initial.read) @ _repeated(call.initial, run)
        if call.normalize:
            call.put(row_scale, run, weights.row_scale)
            divisor = read[..., call.value_dim]
            call.put(along, run, divisor)
            read = read[..., : call.value_dim].div_(_denominator(divisor, weights).unsqueeze(-1))
        call.put(output, run, read)
        state = states[-1]
    call.split_state(state, memory, normalizer)
    if call.normalize:
        log_scale.copy_(row_scale[:, -1])


def _backward(
    call: BlockedCall, results: list[torch.Tensor], grad_state: torch.Tensor, grads: list[torch.Tensor]
) -> Tensors:
    """Fill in the gradients of query, key, value and both gates, and return those of the initial and carried state.

    `results` are the gradient of the output, the output, the log scale of each row and what divides it.
    """
    grad_output, output, row_scale, along = results
    grad_initial = torch.zeros_like(grad_state)
    entering = _entering_states(call, row_scale)
    for state, (run, weights) in zip(reversed(list(entering)), call.runs(row_scale, reverse=True), strict=True):
        grad_read = _grad_read(call, run, weights, grad_output, output, along)
        found, grad_state = _run_backward(call, run, weights, state, grad_read, grad_state, grad_initial)
        for grad, rows in zip(grads, found, strict=True):
            call.put(grad, run, rows)
    return grad_initial, grad_state


def _run_backward(
    call: BlockedCall,
    run: Run,
    weights: ChunkWeights,
    state: torch.Tensor,
    grad_read: torch.Tensor,
    grad_state: torch.Tensor,
    grad_initial: torch.Tensor,
) -> tuple[Tensors, torch.Tensor]:
    """Return the gradients of query, key, value and both gates for a run, and of the state entering it.

    Args:
        state, grad_state: of the state entering the run, and the gradient of the one leaving it, [X, Dk, columns].
        grad_read: [G * X, L, columns].
        grad_initial: [X, Dk, columns], added to.
    """
    query, key, value = _inputs(call, run)
    grad_output = grad_read[..., : call.value_dim]

    # Tokens of one chunk.
    within = weights.within(call.space("within", *_square(query)))
    scores = torch.bmm(query, key.mT, out=call.space("scores", *within.shape)).mul_(within)
    grad_scores = torch.bmm(grad_read, value.mT, out=call.space("grad_scores", *within.shape))
    terms = torch.mul(scores, grad_scores, out=call.space("terms", *within.shape))
    grad_scores.mul_(within)
    grad_value = torch.bmm(scores.mT, grad_output, out=call.space("grad_value", *grad_output.shape))

    # Rows read the states entering the chunks.
    states, writing = _states(call, weights, key, value, state)
    entering = states[:-1].flatten(0, 1)
    reading = _times(query, weights.read, call.space("reading", *query.shape))
    grad_query = torch.bmm(grad_read, entering.mT, out=call.space("grad_query", *query.shape))
    _times(grad_query, weights.read, grad_query)
    initial = call.restarts(weights)
    if initial:
        grad_query += _times(grad_read @ _repeated(call.initial.mT, run), initial.read)
        grad_initial += _by_sequence(_times(query, initial.read).mT @ grad_read, run).sum(0)
    read_terms = _dot(query, grad_query, call)
    grad_query.baddbmm_(grad_scores, key).mul_(call.scale)

    # Tokens write to the states leaving the chunks.
    grad_states = _grad_states(call, weights, reading, grad_read, grad_state)
    leaving = grad_states[1:].flatten(0, 1)
    grad_key = torch.bmm(value, leaving.mT, out=call.space("grad_key", *key.shape))
    _times(grad_key, weights.write, grad_key)
    write_terms = _dot(key, grad_key, call)
    grad_key.baddbmm_(grad_scores.mT, query)
    grad_value.baddbmm_(writing, leaving[..., : call.value_dim])

    # The states leaving the chunks hold what entered.
    passed = _dot(entering.flatten(1), leaving.flatten(1), call).view_as(weights.kept) * weights.kept
    if initial:
        from_initial = grad_states[1:] * initial.kept[..., None, None]
        grad_initial += from_initial.sum(0)
        passed += (from_initial * call.initial).sum((-1, -2))
    read_terms, write_terms = read_terms.view_as(weights.read), write_terms.view_as(weights.write)
    grad_gates = weights.grad_gates(terms, read_terms, write_terms, passed)
    return (grad_query, grad_key, grad_value, *grad_gates), grad_states[0]


def _entering_states(call: BlockedCall, row_scale: torch.Tensor) -> torch.Tensor:
    """Return the state entering each of N runs, [N, X, Dk, columns]."""
    states = call.space("entering", sum(len(runs) for _, runs in call.plan), *call.initial.shape)
    states[0] = call.carried
    for before, state, (run, weights) in zip(states, states[1:], call.runs(row_scale), strict=False):
        whole = Run(run.start, 1, run.chunks * run.length)
        later = weights.kept.flip(0).cumprod(0).flip(0)
        after = torch.cat([later[1:], torch.ones_like(later[:1])])
        key, value = call.take(call.key, whole, "key"), call.take(call.value, whole, "value", ones=call.normalize)
        key.mul_((weights.write * after.unsqueeze(-1)).transpose(0, 1).reshape(*key.shape[:-1], 1))
        torch.bmm(key.mT, value, out=state).addcmul_(later[0, :, None, None], before)
        if initial := call.restarts(weights):
            state.addcmul_((initial.kept * after).sum(0)[:, None, None], call.initial)
    return states


def _inputs(call: BlockedCall, run: Run) -> Tensors:
    """Return queries times scale, keys, and values [G * X, L, D]; if normalised, with a 1 in each value."""
    query, key = call.take(call.query, run, "query"), call.take(call.key, run, "key")
    return query.mul_(call.scale), key, call.take(call.value, run, "value", ones=call.normalize)


def _states(
    call: BlockedCall, weights: ChunkWeights, key: torch.Tensor, value: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states between chunks [G + 1, X, Dk, columns], from the first, and the keys times what they write."""
    states = call.space("states", len(weights.kept) + 1, *state.shape)
    states[0] = state
    writing = _times(key, weights.write, call.space("writing", *key.shape))
    torch.bmm(writing.mT, value, out=states[1:].flatten(0, 1))
    if initial := call.restarts(weights):
        states[1:].addcmul_(initial.kept[..., None, None], call.initial)
    between, kept = states.unbind(), weights.kept[..., None, None].unbind()
    for before, after, factor in zip(between, between[1:], kept, strict=False):
        after.addcmul_(before, factor)
    return states, writing


def _grad_states(
    call: BlockedCall, weights: ChunkWeights, reading: torch.Tensor, grad_read: torch.Tensor, grad_state: torch.Tensor
) -> torch.Tensor:
    """Return the gradients of `_states`, from the last."""
    grads = call.space("grad_states", len(weights.kept) + 1, *grad_state.shape)
    grads[-1] = grad_state
    torch.bmm(reading.mT, grad_read, out=grads[:-1].flatten(0, 1))
    between, kept = grads.unbind()[::-1], weights.kept[..., None, None].unbind()[::-1]
    for after, before, factor in zip(between, between[1:], kept, strict=False):
        before.addcmul_(after, factor)
    return grads


def _grad_read(
    call: BlockedCall,
    run: Run,
    weights: ChunkWeights,
    grad_output: torch.Tensor,
    output: torch.Tensor,
    along: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of numerator and denominator, [G * X, L, columns], or of the output [G * X, L, Dv]."""
    grad = call.take(grad_output, run, "grad_read", ones=call.normalize)
    if not call.normalize:
        return grad
    along = call.take_gate(along, run).flatten(0, 1)
    denominator = _denominator(along, weights)
    read = grad[..., : call.value_dim].div_(denominator.unsqueeze(-1))
    gain = _dot(read, call.take(output, run, "read"), call)
    grad[..., call.value_dim] = gain.neg_().mul_(along.sign()).mul_(along.abs() >= denominator)
    return grad


def _denominator(along: torch.Tensor, weights: ChunkWeights) -> torch.Tensor:
    """Return what divides the rows [G * X, L]; never 0, even where exp(-m) is too small for the dtype."""
    least = weights.row_scale.neg().exp_().to(along.dtype).clamp_(min=torch.finfo(along.dtype).tiny)
    return along.abs().maximum(least.view_as(along))


def _times(x: torch.Tensor, factor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[G * X, L, D] times [G, X, L]."""
    return torch.mul(x, factor.reshape(*x.shape[:-1], 1), out=out)


def _dot(first: torch.Tensor, second: torch.Tensor, call: BlockedCall) -> torch.Tensor:
    return torch.mul(first, second, out=call.space("product", *first.shape)).sum(-1)


def _square(x: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[1]


def _repeated(state: torch.Tensor, run: Run) -> torch.Tensor:
    """[X, Dk, Dv] for each chunk, as [G * X, Dk, Dv]."""
    return state.repeat(run.chunks, 1, 1)


def _by_sequence(x: torch.Tensor, run: Run) -> torch.Tensor:
    return x.unflatten(0, (run.chunks, -1))
