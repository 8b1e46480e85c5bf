"""Define Scatterbrain's block-local form, for any dtype; float64 is exact, and autograd differentiates it.

For query i of a head, E_i the keys it sees exactly, F_i the earlier keys of its document, and positive features phi,

    s_ij = scale * q_i . k_j                           j in E_i
    t_ij = log sum_a phi_a(q_i) phi_a(k_j)             j in F_i
    L_i  = log(sum_{j in E_i} exp(s_ij) + sum_{j in F_i} exp(t_ij))
    o_i  = sum_{j in E_i} exp(s_ij - L_i) v_j + sum_{j in F_i} exp(t_ij - L_i) v_j

(Chen et al. 2021, arXiv 2110.15343, with a support of blocks: no key is in both sums, so that nothing is subtracted
and every weight is positive.) Where E[phi(q) . phi(k)] = exp(scale * q . k), as for the features of Choromanski et al.
2021 (arXiv 2009.14794), every exp(t_ij) is an unbiased estimate. Summed over F_i first, the far keys act as m more keys

    t_ia = log phi_a(q_i) + log Z_a,    u_a = S_a / Z_a,    Z_a = sum_{j in F_i} phi_a(k_j),    S_a = sum phi_a(k_j) v_j

which is how `blocked.py` computes them. An initial state holds Z and S of keys before those given.

Memory grows with Tq * Tk: this file says what is right.
"""

import torch

from longmix_kernels.scatter.bounds import exact_bounds
from longmix_kernels.scatter.inputs import Inputs
from longmix_kernels.scatter.state import FeatureState, empty_state

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference_forward(inputs: Inputs) -> Tensors:
    """Compute attention from its definition.

    Returns:
        The output [B, Tq, Hq, Dv] in the dtype of `query`, and the logsumexps of all keys and of the exact keys,
        [B, Tq, Hq], float64 for float64 inputs and float32 otherwise.
    """
    query, key, value, scale = inputs.query, inputs.key, inputs.value, inputs.scale
    query_features, key_features = inputs.query_features, inputs.key_features
    queries, keys, dtype = query.shape[1], key.shape[1], query.dtype
    group = query.shape[2] // key.shape[2]
    exact = torch.promote_types(dtype, torch.float32)
    bounds = exact_bounds(inputs.document_ids, queries, keys, inputs.block_size, inputs.past_blocks, query.device)
    first, lo, hi = (x.unsqueeze(-1) for x in bounds)
    column = torch.arange(keys, device=query.device)
    is_exact, is_far = (lo <= column) & (column < hi), (first <= column) & (column < lo)

    q, k, v = query.to(exact), *(x.to(exact).repeat_interleave(group, 2) for x in (key, value))
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.masked_fill(~is_exact, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True)
    exact_total = (scores - highest).exp().sum(-1, keepdim=True)
    exact_logsumexp = highest + exact_total.log()
    if query_features is None or key_features is None:
        weights = (scores - exact_logsumexp).exp()
        output = torch.einsum("bhij,bjhd->bihd", weights, v)
        return output.to(dtype), _rows(exact_logsumexp), _rows(exact_logsumexp)

    log_q = query_features.to(exact).transpose(1, 2)  # [B, H, Tq, m]
    log_k = key_features.to(exact).repeat_interleave(group, 2).transpose(1, 2)
    if inputs.memory is None or inputs.normalizer is None or inputs.log_scale is None:
        state = empty_state(query, query.shape[0], key.shape[2], log_k.shape[3], value.shape[3])
    else:
        state = FeatureState(inputs.memory, inputs.normalizer, inputs.log_scale)
    memory, normalizer, log_scale = (x.repeat_interleave(group, 1) for x in state)
    log_scale = log_scale.unsqueeze(2)
    seen = first <= keys - queries  # only rows of the first query's document see the initial state

    # phi_a of keys is divided by exp(largest_a), and phi_a of queries multiplied by it, so that neither overflows.
    largest = torch.maximum(log_k.detach().amax(2, keepdim=True), log_scale)
    highest = torch.maximum(highest, (log_q.detach() + largest).amax(-1, keepdim=True))
    multiplied = (log_q + largest - highest).exp()
    far = multiplied @ (log_k - largest).exp().mT
    share = multiplied * (log_scale - largest).exp() * seen
    weights = (scores - highest).exp() + far * is_far
    total = weights.sum(-1, keepdim=True) + share @ normalizer.unsqueeze(-1)
    output = (torch.einsum("bhij,bjhd->bhid", weights, v) + share @ memory) / total
    return output.transpose(1, 2).to(dtype).contiguous(), _rows(highest + total.log()), _rows(exact_logsumexp)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, H, T, 1] as [B, T, H]."""
    return x.squeeze(-1).transpose(1, 2).contiguous()
