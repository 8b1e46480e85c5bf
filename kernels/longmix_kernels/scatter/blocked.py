"""Block-local attention with far keys through features, block by block, in memory linear in the length.

The exact part is the attention engine's, with the bounds of the blocks; what a query reads of the far keys comes from
sums over whole blocks (`far`), and the parts are merged through their logsumexp:

    L = log(exp(L_exact) + exp(L_far))        o = exp(L_exact - L) o_exact + exp(L_far - L) o_far

Backward, with the merged o and L in both parts, D_i = o_i . dO_i - dL_i is all that either needs to know of the other:

    exact keys   as everywhere in attention, P = exp(S - L)
    far keys     dlog phi_a(q_i) = phi_a(q_i) exp(-L_i) (dO_i . S_a - D_i Z_a)
                 dlog phi_a(k_j) = phi_a(k_j) (v_j . G_a - h_a)        dV_j += sum_a phi_a(k_j) G_a
                 G_a = sum_i phi_a(q_i) exp(-L_i) dO_i    h_a = sum_i phi_a(q_i) exp(-L_i) D_i    j far for i

so that besides attention's own backward there is one scan forward, again for S and Z, and one in reverse, for G and h.
"""

from collections.abc import Sequence

import torch

from longmix_kernels.attention import blocked as attention
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.scatter.bounds import exact_bounds, spans
from longmix_kernels.scatter.far import FarSpan

Tensors = tuple[torch.Tensor, ...]


def blocked_forward(*inputs) -> Tensors:
    """Return output, logsumexp and the logsumexp of the exact part.

    Args:
        inputs: query, key, value, query_features, key_features, memory, normalizer, log_scale, document_ids,
            block_size, past_blocks and scale, as `scatter_attention` has them, None where there is none.
    """
    dtype, exact = inputs[0].dtype, torch.promote_types(inputs[0].dtype, torch.float32)
    query, key, value = (x.to(exact) for x in inputs[:3])  # so that nothing is rounded before it is merged
    output, exact_logsumexp = attention.blocked_forward(query, key, value, _pattern(inputs), inputs[-1])
    logsumexp = exact_logsumexp.clone()
    for span in _far_spans(inputs):
        span.merge_into(output, logsumexp)
    return output.to(dtype), logsumexp, exact_logsumexp


def blocked_backward(
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    *inputs,
) -> Tensors:
    """Return the gradients of the first eight inputs, empty where an input is None.

    Args:
        grad_output: [B, Tq, Hq, Dv].
        grad_logsumexp: [B, Tq, Hq], or None for zero.
        output, logsumexp: the first two results of the forward.
        inputs: as there.
    """
    exact = logsumexp.dtype
    far = [grad_output.new_empty(0) if x is None else x.new_zeros(x.shape) for x in inputs[3:8]]
    grad_output, query, key, value = (x.to(exact) for x in (grad_output, *inputs[:3]))
    *near, grad_value = attention.blocked_backward(
        grad_output, grad_logsumexp, query, key, value, _pattern(inputs), output, logsumexp, inputs[-1]
    )
    delta = (grad_output * output).sum(-1)
    if grad_logsumexp is not None:
        delta -= grad_logsumexp
    grad_rows = torch.cat([grad_output, -delta.unsqueeze(-1)], -1)
    for span in _far_spans(inputs):
        span.backward_into(grad_rows, logsumexp, grad_value, *far)
    return *(grad.to(inputs[0].dtype) for grad in (*near, grad_value)), *far


def _pattern(inputs: Sequence) -> Pattern:
    query, key, *_, document_ids, block_size, past_blocks, _ = inputs
    _, lo, hi = exact_bounds(document_ids, query.shape[1], key.shape[1], block_size, past_blocks, query.device)
    return Pattern(lo, hi)


def _far_spans(inputs: Sequence) -> list[FarSpan]:
    """The documents that have far keys."""
    query, key, _, features, _, memory, *_, document_ids, block_size, past_blocks, _ = inputs
    if features is None:
        return []
    sizes = query.shape[0], query.shape[1], key.shape[1], (past_blocks + 1) * block_size
    return [FarSpan(span, inputs) for span in spans(document_ids, *sizes, memory is not None)]
