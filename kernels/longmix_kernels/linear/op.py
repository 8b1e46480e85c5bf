"""The public function of scalar-gated linear attention."""

import torch

from longmix_kernels.launch import with_room
from longmix_kernels.linear.checks import TRITON_MAX_DIM, check_gates, check_inputs, check_state
from longmix_kernels.linear.cost import call_flops
from longmix_kernels.linear.inputs import Inputs
from longmix_kernels.linear.reference import reference_forward
from longmix_kernels.linear.state import LinearState
from longmix_kernels.linear.step import step_forward
from longmix_kernels.operators import computed, deferred, definition, implementation, is_step
from longmix_kernels.runtime import backend_of_call

BACKENDS = ("reference", "blocked", "triton")
"""The implementations `linear_attention` offers."""


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    log_input: torch.Tensor | None = None,
    normalize: bool = False,
    initial_state: LinearState | None = None,
    carried_state: LinearState | None = None,
    document_ids: torch.Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, LinearState]:
    """Compute linear attention with a scalar decay and input gate per head and token.

    Per head, with decay exp(f_t), input gate exp(i_t), scale s and state (C, n):

        C_t = exp(f_t) C_{t-1} + exp(i_t) k_t v_t^T,    n_t = exp(f_t) n_{t-1} + exp(i_t) k_t
        y_t = C_t^T (s q_t)     and with `normalize`     y_t = C_t^T (s q_t) / max(|n_t . s q_t|, 1)

    mLSTM-exp: log_decay = logsigmoid(f), log_input = i, normalize. mLSTM-sig: log_input = logsigmoid(i) instead, and no
    normaliser. Retention and Lightning Attention: a constant log_decay. Sums, gates and states are float32, or float64
    for float64 inputs. Exactly differentiable, once, in all tensors but `document_ids`, also through the returned
    state; its `log_scale` counts as a constant there, since what it means is multiplied into the other two.

    With `normalize`, the gradient of a query that is nearly orthogonal to n_t is a small difference of large terms, and
    float32 loses digits of it in any order. With `log_input` from -15 to 15, the mixers' cap, it stayed within 3e-4 of
    float64 in random draws, relative to the largest; up to 300 it was lost, token by token as in chunks of any size,
    and outputs were right to 2e-3. In float64 the implementations agree.

    Without gradients, up to 8 tokens of one document a row are taken one after the other, as generation needs it.

    Args:
        query: [B, T, H, Dk], float16, bfloat16, float32 or float64.
        key: [B, T, H, Dk], same dtype.
        value: [B, T, H, Dv], same dtype.
        log_decay: [B, T, H] or [H], float32 (float64 with float64 inputs), at most 0.
        log_input: [B, T, H], same dtype as `log_decay`; None for 0. Without `normalize` at most 0 is safe, with it any.
        normalize: divide by the normaliser, and keep the state in a running scale so that nothing overflows.
        initial_state: before each document; None for zeros.
        carried_state: before the first token of each row, whose document goes on from it, and no later one; None for
            the initial state.
        document_ids: int32 or int64 [B, T], non-decreasing along T; each document begins from the initial state.
        scale: factor on the queries, Dk ** -0.5 by default.
        chunk_size: tokens between two states that are computed; None lets the implementation choose.
        backend: "reference" (token by token), "blocked" (chunks, in torch) or "triton" (the same on a CUDA device, no
            float64, Dk and Dv up to 512). None picks "triton" where it covers the call on a CUDA device, and "blocked"
            elsewhere.

    Returns:
        The output [B, T, H, Dv] in the dtype of `query`, and the state after the last token.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    check_inputs(query, key, value, document_ids, chunk_size)
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(*query.shape[:2], -1)
    check_gates(query, log_decay, log_input)
    for name, given in (("initial_state", initial_state), ("carried_state", carried_state)):
        check_state(query, value, given, normalize, name)
    backend = backend_of_call(backend, BACKENDS, TRITON_MAX_DIM, query=query, value=value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    memory, normalizer, log_scale = initial_state or (None, None, None)
    carried_memory, carried_normalizer, carried_log_scale = carried_state or (None, None, None)
    initial, carried = (memory, normalizer, log_scale), (carried_memory, carried_normalizer, carried_log_scale)
    tensors = query, key, value, log_decay, log_input, *initial, *carried, document_ids
    inputs = Inputs(*tensors, normalize, scale, chunk_size)
    implementations = _STEPS if backend in _STEPS and is_step(inputs) else _IMPLEMENTATIONS
    output, memory, normalizer, log_scale, *_ = implementations[backend](inputs)
    return output, LinearState(memory, normalizer, log_scale) if normalize else LinearState(memory)


def _empty(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Return the output, the final state, and per row the log scale and denominator that the backward wants.

    Without `normalize`, all but output and memory are empty.
    """
    query, value_dim = inputs.query, inputs.value.shape[-1]
    batch, length, heads, dim = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    shapes = [(batch, heads, dim), (batch, heads), (batch, length, heads), (batch, length, heads)]
    others = [query.new_empty(shape if inputs.normalize else (0,), dtype=exact) for shape in shapes]
    final = query.new_empty(batch, heads, dim, value_dim, dtype=exact)
    return query.new_empty(*query.shape[:3], value_dim), final, *others


_IMPLEMENTATIONS = {"reference": definition(reference_forward)}
_IMPLEMENTATIONS |= {
    name: implementation(
        "linear",
        name,
        Inputs,
        empty=_empty,
        results=6,
        incoming=3,
        saved=(0, 4, 5),
        outgoing=11,
        flops=call_flops,
    )
    for name in BACKENDS[1:]
}

_STEPS = {
    "blocked": definition(step_forward),
    "triton": computed(
        "longmix::linear_step",
        Inputs,
        forward=with_room(deferred("longmix_kernels.linear.triton_step.triton_step")),
        empty=lambda inputs: _empty(inputs)[:4],
        results=4,
        flops=call_flops,
    ),
}
"""What takes few tokens one after the other, without gradients; results are those of the implementations."""
