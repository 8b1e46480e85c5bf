"""Softmax attention of new tokens to a cache of the mixer's keys and values, in generation."""

from torch import Tensor

from longmix.caches.cache import Cache
from longmix.mixers.parts.attention_state import Rows, with_sinks


def attend_cached(rows: Rows, cache: Cache, positions: Tensor) -> Tensor:
    """The output heads of new tokens, which the cache then holds.

    Args:
        rows: of the new tokens, T of each row.
        cache: is changed in place.
        positions: integer [B or 1, T], of the tokens in their documents.

    Returns:
        [B, T, Hq, head_dim].
    """
    output, logsumexp = cache.attend(
        rows.query,
        rows.key,
        rows.value,
        positions,
        rows.document_ids,
        scale=rows.scale,
        return_logsumexp=rows.sinks is not None,
    )
    cache.carried = rows.carried
    return output if logsumexp is None else with_sinks(output, logsumexp, rows.sinks)
