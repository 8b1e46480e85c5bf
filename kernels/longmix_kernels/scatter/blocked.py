"""Compute block-local attention with far keys through features block by block, in memory linear in the length.

The attention engine computes the exact part, with the bounds of the blocks. What a query reads of the far keys comes
from sums over whole blocks (`far`). The logsumexps merge both parts:

    L = log(exp(L_exact) + exp(L_far))        o = exp(L_exact - L) o_exact + exp(L_far - L) o_far

Backward, both parts take the merged o and L. D_i = o_i . dO_i - dL_i is all that one part needs to know of the other:

    exact keys   as everywhere in attention, P = exp(S - L)
    far keys     dlog phi_a(q_i) = phi_a(q_i) exp(-L_i) (dO_i . S_a - D_i Z_a)
                 dlog phi_a(k_j) = phi_a(k_j) (v_j . G_a - h_a)        dV_j += sum_a phi_a(k_j) G_a
                 G_a = sum_i phi_a(q_i) exp(-L_i) dO_i    h_a = sum_i phi_a(q_i) exp(-L_i) D_i    j far for i

Besides attention's own backward there is one scan forward, which computes S and Z again, and one in reverse, for G and
h.
"""

import torch

from longmix_kernels.attention import blocked as attention
from longmix_kernels.attention.inputs import Inputs as ExactInputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.scatter.bounds import exact_bounds, spans
from longmix_kernels.scatter.far import FarSpan
from longmix_kernels.scatter.inputs import Inputs

Tensors = tuple[torch.Tensor, ...]


def blocked_forward(inputs: Inputs) -> Tensors:
    """Return the output [B, Tq, Hq, Dv], the logsumexp [B, Tq, Hq] and the logsumexp of the exact part, likewise."""
    exact = _exact_inputs(inputs)
    output, exact_logsumexp = attention.blocked_forward(exact)
    logsumexp = exact_logsumexp.clone()
    for span in _far_spans(inputs):
        span.merge_into(output, logsumexp)
    return output.to(inputs.query.dtype), logsumexp, exact_logsumexp


def blocked_backward(
    inputs: Inputs,
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
) -> Tensors:
    """Return the gradients of the first eight inputs, in their shapes and dtypes; empty where an input is None.

    Args:
        inputs: as in the forward.
        grad_output: [B, Tq, Hq, Dv].
        grad_logsumexp: [B, Tq, Hq], or None for zero.
        output, logsumexp: the first two results of the forward.
    """
    far = [grad_output.new_empty(0) if x is None else x.new_zeros(x.shape) for x in inputs.flat()[3:8]]
    exact, grad_output = _exact_inputs(inputs), grad_output.to(logsumexp.dtype)
    *near, grad_value = attention.blocked_backward(exact, grad_output, grad_logsumexp, output, logsumexp)
    delta = (grad_output * output).sum(-1)
    if grad_logsumexp is not None:
        delta -= grad_logsumexp
    grad_rows = torch.cat([grad_output, -delta.unsqueeze(-1)], -1)
    for span in _far_spans(inputs):
        span.backward_into(grad_rows, logsumexp, grad_value, *far)
    return *(grad.to(inputs.query.dtype) for grad in (*near, grad_value)), *far


def _exact_inputs(inputs: Inputs) -> ExactInputs:
    """Return the part for the attention engine, in the dtype of sums, so that nothing is rounded before the merge."""
    query, key = inputs.query, inputs.key
    sizes = query.shape[1], key.shape[1], inputs.block_size, inputs.past_blocks
    _, lo, hi = exact_bounds(inputs.document_ids, *sizes, query.device)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (query, key, inputs.value))
    return ExactInputs(query, key, value, Pattern(lo, hi), inputs.scale)


def _far_spans(inputs: Inputs) -> list[FarSpan]:
    """Return the documents that have far keys."""
    if inputs.query_features is None:
        return []
    sizes = inputs.query.shape[0], inputs.query.shape[1], inputs.key.shape[1], inputs.exact
    return [FarSpan(span, inputs) for span in spans(inputs.document_ids, *sizes, inputs.memory is not None)]
