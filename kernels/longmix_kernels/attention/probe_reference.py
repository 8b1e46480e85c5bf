"""Define softmax attention with a probe, for any dtype; float64 is exact, and autograd differentiates it.

For query row i of a head, with p_ij = exp(s_ij - L_i) the weights of softmax attention (`reference` has them, and which
keys j a row sees), r_i the row's probe and k_i the key at its own position,

    t_ij = r_i . (k_j - k_i)                    not scaled
    e_i  = sum_j p_ij t_ij
    o_i  = sum_j p_ij (1 + e_i - t_ij) v_j      the output

This is Parallax, the scalable form of Local Linear Attention (arXiv 2605.29157): the value of a regression of v on k at
the query, whose slope the probe gives instead of a solver. The weights of a row sum to 1 and may be negative. A probe
of 0 leaves softmax attention. k_i could be any vector, since subtracting it changes no o_i; it keeps t small where keys
share an offset, so that the two terms of o do not cancel. A row that sees nothing has o_i = 0.

Memory grows with Tq * Tk: this file says what is right, `probe_blocked.py` computes it.
"""

import torch

from longmix_kernels.attention.permutation import put_rows, take_rows
from longmix_kernels.attention.probe_inputs import ProbeInputs, own_products
from longmix_kernels.attention.reference import softmax_weights


def reference_forward(call: ProbeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute attention with a probe from its definition.

    Args:
        call: its pattern must have bounds.

    Returns:
        The output and the output of softmax attention alone, [B, Tq, Hq, Dv] in the dtype of `query`; the logsumexp L
        and sum_j p_ij r_i . k_j, [B, Tq, Hq], float64 for float64 inputs and float32 otherwise.
    """
    pattern = call.inputs.pattern
    weights, logsumexp, value = softmax_weights(call.inputs)
    heads = weights.shape[1:3]
    probe = take_rows(call.probe, pattern.query_rows).to(weights.dtype).unflatten(2, heads)
    key = take_rows(call.inputs.key, pattern.key_rows).to(weights.dtype)
    own = own_products(call)
    anchor = take_rows(own, pattern.query_rows).transpose(1, 2).unflatten(1, heads).unsqueeze(-1)

    products = torch.einsum("bihgd,bjhd->bhgij", probe, key) - anchor
    expected = (weights * products).sum(-1, keepdim=True)
    tilted = weights * (1 + expected - products)
    output, plain = (torch.einsum("bhgij,bjhd->bihgd", x, value).flatten(2, 3) for x in (tilted, weights))
    total = expected.squeeze(-1).flatten(1, 2).transpose(1, 2)
    seen = put_rows(logsumexp, pattern.query_rows)
    total = (put_rows(total.contiguous(), pattern.query_rows) + own).masked_fill(seen.isneginf(), 0.0)
    output, plain = (put_rows(x.to(call.probe.dtype), pattern.query_rows) for x in (output, plain))
    return output, plain, seen, total
