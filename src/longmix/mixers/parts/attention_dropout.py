"""Softmax attention with dropout of its weights (Vaswani et al. 2017, as published recipes have it), by torch's SDPA.

Our engine and the packed kernels have none. Where documents or a window limit what is seen, torch takes a mask of
Tq * Tk bytes for each row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.errors import ConfigError


def check_dropout(word: str, share: float) -> float:
    """A share that dropout zeroes, of the setting `word`.

    Raises:
        ConfigError: it is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"{word}={share} must be at least 0 and below 1.")
    return share


def dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    share: float,
    *,
    document_ids: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention whose weights are zeroed with probability `share` and scaled by 1 / (1 - share).

    Args:
        query: [B, Tq, Hq, D], the last Tq of Tk positions.
        key, value: [B, Tk, Hkv, D]; Hkv divides Hq.
        share: from 0 to below 1; drawn by torch's generator of the device.
        document_ids: int32 [B, Tk]; None for one document a row.
        window: visible keys including the token itself; None for all.

    Returns:
        [B, Tq, Hq, D] in the dtype of `query`.
    """
    queries, keys = query.shape[1], key.shape[1]
    groups = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    plain = document_ids is None and window is None and queries == keys
    mask = None if plain else _visible(queries, keys, document_ids, window, query.device)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=share, is_causal=plain).transpose(1, 2)


def _visible(queries: int, keys: int, ids: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Whether a query sees a key: bool [B or 1, 1, Tq, Tk]."""
    at, seen = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
    mask = (seen <= at)[None] if window is None else ((seen <= at) & (seen > at - window))[None]
    if ids is not None:
        mask = mask & (ids[:, keys - queries :, None] == ids[:, None, :])
    return mask[:, None]
