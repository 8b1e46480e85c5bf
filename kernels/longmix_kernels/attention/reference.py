"""Define bounded softmax attention, for any dtype; float64 is exact, and autograd differentiates it.

For query row i of a head, with S_i = {j : lo_i <= j < hi_i} the keys it sees,

    s_ij = scale * q_i . k_j
    L_i  = log sum_{j in S_i} exp(s_ij)             the logsumexp, natural logarithm
    o_i  = sum_{j in S_i} exp(s_ij - L_i) v_j       the output

(Vaswani et al. 2017, equation 1, restricted to S_i.) A row that sees nothing has o_i = 0 and L_i = -inf, and sends no
gradient anywhere. With fewer key heads than query heads (Ainslie et al. 2023), query head h reads key head
h // (Hq / Hkv).

Options restrict S_i further or change s_ij:

    rows    row i of the bounds is row query_rows[i] of q, o and L, and key j is row key_rows[j] of k and v
    blocks  j is in S_i only if the list of i's block has j's block
    ALiBi   s_ij += slope * (p_j - p_i), p being positions before permutation (Press et al. 2022, arXiv 2108.12409)

Memory grows with Tq * Tk: this file says what is right, `blocked.py` computes it.
"""

import torch

from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import BlockList, Pattern
from longmix_kernels.attention.permutation import put_rows, take_rows


def reference_forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention from its definition.

    Args:
        inputs: the call; its pattern must have bounds.

    Returns:
        The output [B, Tq, Hq, Dv] in the dtype of `query` and the logsumexp [B, Tq, Hq], float64 for float64 inputs
        and float32 otherwise. Half-precision inputs are computed in float32.
    """
    weights, logsumexp, value = softmax_weights(inputs)
    output = torch.einsum("bhgij,bjhd->bihgd", weights, value).flatten(2, 3).to(inputs.query.dtype)
    order = inputs.pattern.query_rows
    return put_rows(output, order), put_rows(logsumexp, order)


def softmax_weights(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return exp(s_ij - L_i) [B, Hkv, Hq / Hkv, Tq, Tk], 0 for hidden keys, L [B, Tq, Hq] and the values.

    Rows are in the order of the bounds. The dtype is that in which the definition is computed.
    """
    query, key, value, pattern, scale = inputs.query, inputs.key, inputs.value, inputs.pattern, inputs.scale
    lo, hi = pattern.bounds()
    query = take_rows(query, pattern.query_rows)
    key, value = (take_rows(x, pattern.key_rows) for x in (key, value))
    batch, queries, query_heads, _ = query.shape
    keys, key_heads = key.shape[1:3]
    group = query_heads // key_heads
    exact = torch.promote_types(query.dtype, torch.float32)
    q = query.to(exact).unflatten(2, (key_heads, group))
    k, v = key.to(exact), value.to(exact)

    position = torch.arange(keys, device=query.device)
    visible = (lo[..., None] <= position) & (position < hi[..., None])
    if pattern.blocks is not None:
        visible = visible & _listed(pattern.blocks, queries, keys)
    visible = visible.expand(batch, query_heads, queries, keys).unflatten(1, (key_heads, group))
    empty = ~visible.any(-1, keepdim=True)

    scores = scale * torch.einsum("bihgd,bjhd->bhgij", q, k)
    if pattern.alibi_slopes is not None:
        scores = scores + _alibi(pattern, batch, query_heads, group, queries, keys).to(exact)
    scores = scores.masked_fill(~visible, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True).masked_fill(empty, 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1.0)
    logsumexp = (highest + total.log()).masked_fill(empty, -torch.inf)
    return weights / total, logsumexp.squeeze(-1).flatten(1, 2).transpose(1, 2).contiguous(), v


def _listed(blocks: BlockList, queries: int, keys: int) -> torch.Tensor:
    """Return whether the list of a row's block has a key's block, bool [Tq, Tk]."""
    block = torch.arange(keys, device=blocks.row_blocks.device) // blocks.size
    return blocks.mask()[block[keys - queries :, None], block]


def _alibi(pattern: Pattern, batch: int, heads: int, group: int, queries: int, keys: int) -> torch.Tensor:
    """Return ALiBi's bias, which is added to the scores, [B, Hkv, group, Tq, Tk]."""
    slopes = pattern.alibi_slopes
    assert slopes is not None
    row, column = torch.arange(queries, device=slopes.device), torch.arange(keys, device=slopes.device)
    row = row if pattern.query_rows is None else pattern.query_rows
    column = column if pattern.key_rows is None else pattern.key_rows
    position = (row + (keys - queries)).expand(batch, heads, queries).unflatten(1, (-1, group))
    column = column.expand(batch, heads // group, keys)
    distance = column[:, :, None, None, :] - position[..., None]
    return slopes.view(-1, group, 1, 1) * distance
