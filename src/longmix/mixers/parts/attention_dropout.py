"""Softmax attention with dropout of its weights (Vaswani et al. 2017, as published recipes have it), by torch's SDPA.

Our engine and the packed kernels have none. Where documents or a window limit what is seen, torch takes a mask of
Tq * Tk bytes for each row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows


def check_dropout(word: str, share: float, sinks: object = None, gain: bool = False) -> float:
    """A share that dropout zeroes, of the setting `word`.

    Raises:
        ConfigError: it is not from 0 to below 1, or is above 0 where there are `sinks` or a `gain`.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"{word}={share} must be at least 0 and below 1.")
    if share and (sinks is not None or gain):
        other = "mixer.gain" if gain else "mixer.sink_logits=true"
        raise ConfigError(f"{word}={share} takes torch's attention, which has no {other}; leave one out.")
    return share


def dropped_attention(rows: Rows, share: float, window: int | None = None) -> Tensor:
    """Causal attention whose weights are zeroed with probability `share` and scaled by 1 / (1 - share).

    Args:
        rows: of which the queries are the last.
        share: from 0 to below 1; drawn by torch's generator of the device.
        window: visible keys including the token itself; None for all.

    Returns:
        [B, Tq, Hq, D] in the dtype of the queries.
    """
    queries, keys = rows.query.shape[1], rows.key.shape[1]
    groups = rows.query.shape[2] // rows.key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (rows.query, rows.key, rows.value))
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    plain = rows.document_ids is None and window is None and queries == keys and rows.slopes is None
    mask = None if plain else _visible(queries, keys, rows.document_ids, window, q.device)
    if mask is not None and rows.slopes is not None:
        behind = torch.arange(keys, device=q.device) - torch.arange(keys - queries, keys, device=q.device)[:, None]
        mask = torch.where(mask, (rows.slopes[:, None, None] * behind).to(q.dtype), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=share, is_causal=plain, scale=rows.scale).transpose(
        1, 2
    )


def _visible(queries: int, keys: int, ids: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Whether a query sees a key: bool [B or 1, 1, Tq, Tk]."""
    at, seen = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
    mask = (seen <= at)[None] if window is None else ((seen <= at) & (seen > at - window))[None]
    if ids is not None:
        mask = mask & (ids[:, keys - queries :, None] == ids[:, None, :])
    return mask[:, None]
