"""Define local linear attention (arXiv 2510.01450), of which attention with a probe is the scalable form.

For a query q and the keys j that it sees, with w_j = exp(scale q . k_j) and z_j = k_j - q,

    om = sum_j w_j    mu = sum_j w_j z_j    S = sum_j w_j z_j z_j^T + ridge I    rho = S^-1 mu
    o = sum_j w_j (1 - z_j . rho) v_j / (om - mu . rho)

This is the value at q of a ridge regression of the values on [1, z] with weights w; the constant is not penalised.
Attention with the probe om rho / (om - mu . rho) returns the same. The ridge is added to sums that are not normalised,
so that it weighs less in long or sharp rows. Below about as many keys as dimensions a small ridge extrapolates far.

Everything is float64, as the matrices are ill conditioned, and needs T^2 + T D^2 numbers for each head.
"""

import torch

from longmix_kernels.attention.bounds import positions_from_document_ids, row_bounds
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.reference import softmax_weights


def local_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    ridge: float = 1.0,
    document_ids: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute causal local linear attention from its definition.

    Args:
        query: [B, Tq, Hq, D]; with fewer queries than keys they are the last rows.
        key, value: [B, Tk, Hkv, D or Dv]; Hkv divides Hq.
        ridge: the penalty of the slopes, above 0.
        document_ids: int32 or int64 [B, Tk], non-decreasing along Tk; rows see the keys of their own document only.
        scale: the factor on the scores, D ** -0.5 by default.

    Returns:
        The output [B, Tq, Hq, Dv], and the probe [B, Tq, Hq, D] with which `probe_attention` returns the same; both in
        the dtype of `query`.

    Raises:
        ValueError: the ridge is not above 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge={ridge}; allowed is a number above 0")
    dtype, scale = query.dtype, query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.double() for x in (query, key, value))
    bounds = row_bounds(query.shape[1], key.shape[1], document_ids=document_ids, device=query.device)
    weights, logsumexp, value = softmax_weights(Inputs(query, key, value, Pattern(*bounds), scale))
    # Only k - q counts: small keys keep moments accurate. All rows of a document see its first key.
    middle = _first_keys(key, document_ids)
    last = middle[:, -query.shape[1] :] if document_ids is not None else middle
    query = query.unflatten(2, weights.shape[1:3]) - last.unsqueeze(3)
    key, query = key - middle, query.permute(0, 2, 3, 1, 4)
    mean = torch.einsum("bhgij,bjhd->bhgid", weights, key)
    squares = torch.einsum("bhgij,bjhdc->bhgidc", weights, key.unsqueeze(-1) * key.unsqueeze(-2))
    shift = mean - query
    moments = squares - mean.unsqueeze(-1) * mean.unsqueeze(-2) + shift.unsqueeze(-1) * shift.unsqueeze(-2)
    # Divided by om, as the weights are.
    share = ridge * torch.exp(-logsumexp).transpose(1, 2).unflatten(1, weights.shape[1:3])
    identity = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
    slope = torch.linalg.solve(moments + share[..., None, None] * identity, shift)
    probe = slope / (1 - (shift * slope).sum(-1, keepdim=True))
    tilts = torch.einsum("bhgid,bjhd->bhgij", probe, key) - (probe * mean).sum(-1, keepdim=True)
    output = torch.einsum("bhgij,bjhd->bihgd", weights * (1 - tilts), value)
    return output.flatten(2, 3).to(dtype), probe.permute(0, 3, 1, 2, 4).flatten(2, 3).to(dtype)


def _first_keys(key: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """The first key of each key's document, [B, Tk, Hkv, D]; [B, 1, Hkv, D] without documents."""
    if document_ids is None:
        return key[:, :1]
    rows = torch.arange(key.shape[1], device=key.device)
    first = rows - positions_from_document_ids(document_ids)
    return key[torch.arange(key.shape[0], device=key.device)[:, None], first]
