"""Define decode attention: a few new queries, keys in segments of a cache, and the causal block of the new tokens.

For query i of T new tokens in row b, with A_b all slots that the segments let row b read and N_i the new tokens j <= i,

    s_ij = scale * q_i . k_j                             over the j of A_b and N_i
    L_i  = log sum_j exp(s_ij)
    w_ij = exp(s_ij - L_i),   o_i = sum_j w_ij v_j

A query that sees nothing has o_i = 0 and L_i = -inf.
"""

from collections.abc import Sequence

import torch

from longmix_kernels.attention.segments import Segment


def reference_decode(
    query: torch.Tensor, segments: Sequence[Segment], new: tuple[torch.Tensor, torch.Tensor] | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Compute decode attention from its definition, for any dtype; float64 is exact.

    Args:
        query, segments, new, scale: as in `decode_attention`.

    Returns:
        The output [B, T, Hq, V] in the dtype of `query`, the logsumexp [B, T, Hq], and the weights of each segment
        [B, Hkv, G, T, S] and of the new tokens, which are all float64 for float64 inputs and float32 otherwise.
    """
    batch, length, heads, _ = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    for segment in segments:
        key, value, visible = _of_every_row(segment, batch, exact)
        keys, values = [*keys, key], [*values, value]
        seen.append(visible[:, :, None, None].expand(-1, -1, 1, length, -1))
    if new is not None:
        key, value = (x.to(exact).transpose(1, 2) for x in new)
        keys, values = [*keys, key], [*values, value]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        seen.append(causal.expand(*key.shape[:2], 1, length, length))
    key, value, visible = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(seen, -1)
    grouped = query.to(exact).unflatten(2, (key.shape[1], -1))
    scores = scale * torch.einsum("bthgd,bhsd->bhgts", grouped, key)
    scores = scores.masked_fill(~visible, -torch.inf)
    logsumexp = scores.logsumexp(-1)
    weights = (scores - logsumexp.masked_fill(logsumexp.isneginf(), 0.0).unsqueeze(-1)).exp()
    output = torch.einsum("bhgts,bhsd->bthgd", weights, value)
    parts = list(weights.split([x.shape[2] for x in keys], -1))
    return output.flatten(2, 3).to(query.dtype), logsumexp.permute(0, 3, 1, 2).reshape(batch, length, heads), parts


def _of_every_row(segment: Segment, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys and values [B, Hkv, S, .] of every row, and which of them it reads, bool [B, Hkv, S]."""
    repeats = batch // segment.rows
    key, value = (x.repeat_interleave(repeats, 0) for x in segment.numbers(dtype))
    visible = segment.visible()
    if visible is None:
        visible = torch.ones(key.shape[:3], dtype=torch.bool, device=key.device)
    else:
        visible = visible.expand(key.shape[:3])
    if segment.index is not None:
        visible = segment.named()
    return key, value, visible
