"""What Scatterbrain remembers: the latest blocks as keys and values, everything before as sums over features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longmix.mixers.recurrent import select
from longmix.mixers.scatterbrain_summaries import GONE, Blocks, Summaries
from longmix_kernels.scatter import FeatureState, absorb, empty_state

Far = FeatureState | Summaries | None


@dataclass(frozen=True)
class Keys:
    """Keys [B, T, Hkv, head_dim] with values and documents.

    Attributes:
        features: what the far side needs of each key, [B, T, Hkv, ...]: log features, or for summaries the query that
            stands there; None if nothing.
        document_ids: int32 [B, T], or None while every row is one document.
    """

    key: Tensor
    value: Tensor
    features: Tensor | None
    document_ids: Tensor | None


@dataclass(frozen=True)
class ScatterbrainState:
    """What `Scatterbrain` remembers.

    Attributes:
        recent: the latest keys, as many in each row; those that the next token does not see have the id `GONE`.
        far: sums over, or summaries of, the others of the document that goes on; None without either.
        last_id: int32 [B], the document of the last token, -1 before the first.
        next_position: int64 [B], the position within its document that the next token of each row would take.
    """

    recent: Keys
    far: Far
    last_id: Tensor
    next_position: Tensor

    def far_of(self, goes_on: Tensor) -> Far:
        """Sums or summaries, empty where `goes_on` [B] is not set."""
        if isinstance(self.far, Summaries):
            return self.far.kept_of(goes_on)
        return None if self.far is None else select(goes_on, self.far, _emptied(self.far))

    def followed_by(self, new: Keys) -> Keys:
        """Recent keys and new ones."""
        assert new.document_ids is not None and self.recent.document_ids is not None
        features = new.features
        if features is not None and self.recent.features is not None:
            features = torch.cat((self.recent.features, features), 1)
        # An empty cache is in the dtype of the weights, which under autocast is not that of the keys.
        return Keys(
            torch.cat((self.recent.key.to(new.key.dtype), new.key), 1),
            torch.cat((self.recent.value.to(new.value.dtype), new.value), 1),
            features,
            torch.cat((self.recent.document_ids, new.document_ids), 1),
        )


def state_after(keys: Keys, far: Far, next_position: Tensor, block: int, past: int, scale: float) -> ScatterbrainState:
    """The state after the last of `keys`: blocks that the next token does not see exactly leave for the far side.

    Args:
        keys: recent and new ones.
        far: sums over or summaries of keys before them, of the document of the last key.
        next_position: int64 [B], of the next token in that document.
        block, past: tokens of a block, and how many are seen before the own one.
        scale: of the scores in a summary.
    """
    ids, length = keys.document_ids, keys.key.shape[1]
    assert ids is not None
    live = ids == ids[:, -1:]
    position = next_position[:, None] - torch.arange(length, 0, -1, device=ids.device)
    begin = (next_position // block - past).clamp(min=0) * block
    leaves = live & (position < begin[:, None])
    if keys.features is not None and leaves.any():
        if isinstance(far, Summaries):
            blocks = Blocks.of(ids, ids.shape[0], length, block, ids.device)
            found = blocks.summaries(keys.features, keys.key, keys.value, scale)
            far = far.followed_by(Summaries(*found, blocks.that_leave(leaves, ids)))
        elif far is not None:
            far = absorb(far, keys.features, keys.value, leaves)
    start = max(0, length - recent_limit(block, past))
    recent = Keys(
        keys.key[:, start:].clone(),
        keys.value[:, start:].clone(),
        None if keys.features is None else keys.features[:, start:].clone(),
        torch.where(live & ~leaves, ids, GONE)[:, start:],
    )
    return ScatterbrainState(recent, far, ids[:, -1], next_position)


def recent_limit(block: int, past: int) -> int:
    """Most keys that a later token may see exactly besides its own."""
    return (past + 1) * block - 1


def _emptied(far: FeatureState) -> FeatureState:
    batch, heads, features, value_dim = far.memory.shape
    return empty_state(far.memory, batch, heads, features, value_dim)
