"""The public function of the delta rule."""

import torch

from longmix_kernels.delta.blocked import empty_results
from longmix_kernels.delta.checks import TRITON_MAX_DIM, check_decay, check_inputs, check_promise, check_state
from longmix_kernels.delta.cost import call_flops
from longmix_kernels.delta.inputs import Inputs
from longmix_kernels.delta.reference import reference_forward
from longmix_kernels.delta.step import step_forward
from longmix_kernels.launch import with_room
from longmix_kernels.operators import computed, deferred, definition, implementation, is_step
from longmix_kernels.runtime import backend_of_call

BACKENDS = ("reference", "blocked", "triton")
"""The implementations `delta_rule` offers."""


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    low_rank_read: torch.Tensor | None = None,
    low_rank_write: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    carried_state: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    min_log_decay: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the delta rule: linear attention whose transitions are a diagonal plus a matrix of rank one.

    Per head, with decay exp(g_t), state S, and a (read), b (write), k, r on its key side,

        S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    y_t = S_t^T (s r_t)

    States and decays are float32, or float64 for float64 inputs. Exactly differentiable, once, in all tensors but
    `document_ids`, also through the returned state. See `reference` for RWKV-7, DeltaNet and others as special cases.
    Without gradients, up to 8 tokens of one document a row are taken one after the other, as generation needs it.

    Args:
        query: [B, T, H, K], float16, bfloat16, float32 or float64.
        key: [B, T, H, K], same dtype.
        value: [B, T, H, V], same dtype.
        log_decay: [B, T, H, K], or [B, T, H] for all channels of a head, which costs less; float32 (float64 with
            float64 inputs), at most 0.
        low_rank_read: [B, T, H, K], dtype of `query`; comes with `low_rank_write`, None for zeros.
        low_rank_write: [B, T, H, K], dtype of `query`.
        initial_state: [B, H, K, V], before each document, dtype of `log_decay`; None for zeros.
        carried_state: before the first token of each row, whose document goes on from it, and no later one; None for
            the initial state.
        document_ids: int32 or int64 [B, T], non-decreasing along T; each document begins from the initial state.
        scale: factor on the queries, K ** -0.5 by default; RWKV-7 has 1.
        chunk_size: tokens between two states that are computed; "triton" takes fewer where its registers or the decay
            ask for it. None lets the implementation choose.
        min_log_decay: a promise that no `log_decay` is smaller. With decays of channels, "triton" takes longer chunks
            by it: up to 64 tokens from -2.1 on, up to 32 from -4.07 on; RWKV-7 keeps -exp(-1/2). Smaller decays then
            count as what was promised, and get the gradient they would have there. Without a promise, or with a smaller
            one, chunks have up to 32 tokens, and any decay is exact. One decay a head needs no promise: any is exact,
            in chunks of up to 64. The other implementations do not look at it.
        backend: "reference" (token by token), "blocked" (chunks, in torch) or "triton" (the same on a CUDA device, no
            float64, K and V up to 256). None picks "triton" where it covers the call on a CUDA device, and "blocked"
            elsewhere.

    Returns:
        The output [B, T, H, V] in the dtype of `query`, and the state after the last token.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    check_inputs(query, key, value, low_rank_read, low_rank_write, document_ids, chunk_size)
    check_promise(min_log_decay)
    check_decay(query, log_decay)
    for name, given in (("initial_state", initial_state), ("carried_state", carried_state)):
        check_state(query, value, given, name)
    backend = backend_of_call(backend, BACKENDS, TRITON_MAX_DIM, query=query, value=value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = query, key, value, log_decay, low_rank_read, low_rank_write, initial_state, carried_state, document_ids
    inputs = Inputs(*tensors, scale, chunk_size, min_log_decay)
    implementations = _STEPS if backend in _STEPS and is_step(inputs) else _IMPLEMENTATIONS
    output, state, *_ = implementations[backend](inputs)
    return output, state


def _empty(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    batch, _, heads, dim = inputs.query.shape
    value_dim = inputs.value.shape[-1]
    state = inputs.query.new_empty(batch, heads, dim, value_dim, dtype=inputs.log_decay.dtype)
    return inputs.query.new_empty(*inputs.query.shape[:3], value_dim), state


_IMPLEMENTATIONS = {"reference": definition(reference_forward)}
# Output and final state, and of "blocked" a few states before it; gradients of the first eight inputs. Nothing else is
# kept: the backward computes it again.
_IMPLEMENTATIONS |= {
    name: implementation(
        "delta",
        name,
        Inputs,
        empty=empty,
        results=2 + len(saved),
        incoming=2,
        saved=saved,
        outgoing=8,
        flops=call_flops,
    )
    for name, empty, saved in (("blocked", empty_results, (2,)), ("triton", _empty, ()))
}

_STEPS = {
    "blocked": definition(step_forward),
    "triton": computed(
        "longmix::delta_step",
        Inputs,
        forward=with_room(deferred("longmix_kernels.delta.triton_step.triton_step")),
        empty=_empty,
        results=2,
        flops=call_flops,
    ),
}
"""What takes few tokens one after the other, without gradients; results are those of the implementations."""
