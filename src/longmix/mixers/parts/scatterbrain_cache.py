"""The state of Scatterbrain: the latest blocks as keys and values, all earlier ones as sums over features."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longmix.mixers.parts.attention_state import Rows, keys_like
from longmix.mixers.parts.kept_keys import Kept
from longmix.mixers.parts.recurrent import select
from longmix.mixers.parts.rings import Rings
from longmix.mixers.parts.scatterbrain_summaries import GONE, Blocks, Pool, Summaries
from longmix.mixers.parts.states import mixer_state
from longmix_kernels.runtime import is_readable
from longmix_kernels.scatter import FeatureState, absorb, empty_state

Far = FeatureState | Summaries | Kept | None


@dataclass(frozen=True)
class Queries:
    """Queries [B, T, H, head_dim].

    Attributes:
        features: log features [B, T, H, m]; None without.
        labels: int32 [B, T, H, 1], where keys are selected by content; else None.
        documents: the most that a row of keys has, where it is known without reading; else None.
    """

    query: Tensor
    features: Tensor | None
    labels: Tensor | None
    documents: int | None = None


@mixer_state(bookkeeping=("document_ids",))
@dataclass(frozen=True)
class Keys:
    """Keys [B, T, Hkv, head_dim] with values and documents.

    Attributes:
        features: what the far side needs of each key, [B, T, Hkv, ...]: log features, or for summaries the query that
            stands there; None if nothing.
        document_ids: int32 [B, T], or None while every row is one document.
        labels: int32 [B, T, Hkv, 1], where keys are selected by content; else None.
    """

    key: Tensor
    value: Tensor
    features: Tensor | None
    document_ids: Tensor | None
    labels: Tensor | None = None


@dataclass
class FeatureRows(Rows):
    """Rows with log features [B, T, H, .] of queries and of keys, see `Queries` and `Keys`; None without."""

    query_features: Tensor | None = None
    key_features: Tensor | None = None


def parted(rows: Rows) -> tuple[Queries, Keys]:
    """The queries and the keys of these rows, apart."""
    assert isinstance(rows, FeatureRows)
    starts = None if rows.layout is None else rows.layout.starts
    documents = None if starts is None else (len(starts) - 1) // len(rows.query)
    queries = Queries(rows.query, rows.query_features, rows.query_labels, documents)
    return queries, Keys(rows.key, rows.value, rows.key_features, rows.document_ids, rows.key_labels)


@mixer_state(bookkeeping=("last_id", "next_position"))
@dataclass(frozen=True)
class ScatterbrainState:
    """The state of `Scatterbrain`.

    Attributes:
        recent: the latest keys, as many in each row; of document 0, or `GONE` if the next token does not see them.
        far: sums over, or summaries of, the others of the document that goes on; None without either.
        last_id: int32 [B], the document of the last token; before the first one, of a row without ids.
        next_position: int64 [B], the position within its document that the next token of each row would take; 0 before
            the first token of a row, and only there.
        rings: the latest of those keys by label, where keys are selected by content; else None.
        carried: as in `AttentionState`.
    """

    recent: Keys
    far: Far
    last_id: Tensor
    next_position: Tensor
    rings: Rings | None = None
    carried: Tensor | None = None

    def kept_of(self, goes_on: Tensor) -> "ScatterbrainState":
        """The state for rows where `goes_on` [B] is set; the others keep only their recent keys."""
        far = self.far
        if isinstance(far, Summaries | Kept):
            far = far.kept_of(goes_on)
        elif far is not None:
            far = select(goes_on, far, _emptied(far))
        return replace(self, far=far, rings=None if self.rings is None else self.rings.kept_of(goes_on))

    def followed_by(self, new: Keys) -> Keys:
        """The recent keys with new ones behind them."""
        assert new.document_ids is not None and self.recent.document_ids is not None
        features, labels = new.features, new.labels
        if features is not None and self.recent.features is not None:
            features = torch.cat((self.recent.features, features), 1)
        if labels is not None and self.recent.labels is not None:
            labels = torch.cat((self.recent.labels, labels), 1)
        # An empty cache is in the dtype of the weights, which under autocast is not that of the keys.
        return Keys(
            torch.cat((keys_like(self.recent.key, new.key), new.key), 1),
            torch.cat((self.recent.value.to(new.value.dtype), new.value), 1),
            features,
            # States saved by longmix 0.1 have the last document's id where 0 stands now.
            torch.cat((self.recent.document_ids.clamp(max=0), new.document_ids), 1),
            labels,
        )


def state_after(
    keys: Keys,
    before: ScatterbrainState,
    block: int,
    past: int,
    scale: float,
    documents: int | None,
    pool: Pool = "mean",
) -> ScatterbrainState:
    """The state after the last of `keys`: blocks that the next token does not see exactly leave for the far side.

    Args:
        keys: recent and new ones, their documents numbered.
        before: the state before the new ones, `kept_of` the rows whose document then is that of the last key, with the
            `last_id` and `next_position` after it.
        block, past: tokens of a block, and how many are seen before the own one.
        scale: of the scores in a summary.
        documents: as in `Queries`, of `keys`.
        pool: of keys and queries in a summary.
    """
    ids, length = keys.document_ids, keys.key.shape[1]
    assert ids is not None
    far, rings, next_position = before.far, before.rings, before.next_position
    live = ids == ids[:, -1:]
    position = next_position[:, None] - torch.arange(length, 0, -1, device=ids.device)
    begin = (next_position // block - past).clamp(min=0) * block
    leaves = live & (position < begin[:, None])
    # A GPU would have to be waited for, and a compiled graph cannot branch: both always take keys in, possibly none.
    # Summaries are the exception on a GPU: how many there are is the state's shape, which has to be known.
    reads = is_readable(leaves) or (isinstance(far, Summaries) and not torch.compiler.is_compiling())
    some_leave = not reads or bool(leaves.any())
    if keys.features is not None and some_leave:
        if isinstance(far, Summaries):
            blocks = Blocks.of(ids, ids.shape[0], length, block, ids.device, documents)
            found = blocks.summaries(keys.features, keys.key, keys.value, scale, pool)
            far = far.followed_by(Summaries(*found, blocks.that_leave(leaves, ids)))
        elif isinstance(far, FeatureState):
            far = absorb(far, keys.features, keys.value, leaves)
    if rings is not None and keys.labels is not None and some_leave:
        rings = rings.written(keys.key, keys.value, keys.labels[..., 0], leaves)
    return replace(before, recent=recent_after(keys, leaves, block, past), far=far, rings=rings)


def recent_after(keys: Keys, leaves: Tensor, block: int, past: int) -> Keys:
    """The latest keys, and which of them the next token sees: those of the last one's document but for `leaves`."""
    ids = keys.document_ids
    assert ids is not None
    seen = (ids == ids[:, -1:]) & ~leaves
    start = max(0, ids.shape[1] - recent_limit(block, past))
    return Keys(
        keys.key[:, start:].clone(),
        keys.value[:, start:].clone(),
        None if keys.features is None else keys.features[:, start:].clone(),
        torch.where(seen, 0, GONE).int()[:, start:],
        None if keys.labels is None else keys.labels[:, start:].clone(),
    )


def recent_limit(block: int, past: int) -> int:
    """The largest number of earlier keys that a token may see exactly."""
    return (past + 1) * block - 1


def _emptied(far: FeatureState) -> FeatureState:
    batch, heads, features, value_dim = far.memory.shape
    return empty_state(far.memory, batch, heads, features, value_dim)
