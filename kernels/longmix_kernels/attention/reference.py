"""The definition of bounded softmax attention, for any dtype; exact in float64 and differentiated by autograd.

For query row i of a head, with S_i = {j : lo_i <= j < hi_i} the keys it sees,

    s_ij = scale * q_i . k_j
    L_i  = log sum_{j in S_i} exp(s_ij)             the logsumexp, natural logarithm
    o_i  = sum_{j in S_i} exp(s_ij - L_i) v_j       the output

(Vaswani et al. 2017, equation 1, restricted to S_i.) A row that sees nothing has o_i = 0 and L_i = -inf, and sends no
gradient anywhere. With fewer key heads than query heads (Ainslie et al. 2023), query head h reads key head
h // (Hq / Hkv).

Memory grows with Tq * Tk: this file says what is right, `blocked.py` computes it.
"""

import torch


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention from its definition.

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D].
        value: [B, Tk, Hkv, Dv].
        lo: int32 [B or 1, Hq or 1, Tq], first key row that a query row sees.
        hi: as `lo`, one past the last key row.
        scale: factor on the scores.

    Returns:
        The output [B, Tq, Hq, Dv] in the dtype of `query` and the logsumexp [B, Tq, Hq], float64 for float64 inputs
        and float32 otherwise. Half-precision inputs are computed in float32.
    """
    batch, queries, query_heads, _ = query.shape
    keys, key_heads = key.shape[1:3]
    group = query_heads // key_heads
    exact = torch.promote_types(query.dtype, torch.float32)
    q = query.to(exact).unflatten(2, (key_heads, group))
    k, v = key.to(exact), value.to(exact)

    position = torch.arange(keys, device=query.device)
    visible = (lo[..., None] <= position) & (position < hi[..., None])
    visible = visible.expand(batch, query_heads, queries, keys).unflatten(1, (key_heads, group))
    empty = ~visible.any(-1, keepdim=True)

    scores = scale * torch.einsum("bihgd,bjhd->bhgij", q, k)
    scores = scores.masked_fill(~visible, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True).masked_fill(empty, 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1.0)
    output = torch.einsum("bhgij,bjhd->bihgd", weights / total, v)
    logsumexp = (highest + total.log()).masked_fill(empty, -torch.inf)

    logsumexp = logsumexp.squeeze(-1).flatten(1, 2).transpose(1, 2).contiguous()
    return output.flatten(2, 3).to(query.dtype), logsumexp
