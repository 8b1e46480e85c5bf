"""How `SparseK` sees earlier slices of the sequence, when each process has one.

The near keys, and the block that left them last, come from the processes that have them. Of all others each process
sends the best `keep`: the best of its first and of its last rows apart, as the border moves with whole blocks.
"""

import torch
from torch import Tensor

from longmix.distributed.slices import Slices
from longmix.mixers.parts.kept_keys import Kept
from longmix.mixers.parts.scatterbrain_cache import Keys, recent_limit
from longmix.mixers.parts.scatterbrain_slices import after_near


def kept_before(new: Keys, slices: Slices, block: int, past: int, keep: int) -> tuple[Keys, Kept, Tensor]:
    """What a slice's queries may see, as far as their own rows do not tell.

    Args:
        new: the slice's own keys, with their scores as `features`.
        slices: what comes before.
        block, past: tokens of a block, and how many are near before the own one.
        keep: keys that are kept.

    Returns:
        The keys of the slice after the near ones and one more block; what is kept of the keys before those, without
        gates, which nothing needs; and the document int [B] that these are of.
    """
    with torch.autocast(new.key.device.type, enabled=False):  # scores stay exact
        keys, left, goes_on = after_near(new, slices, block, past + 1)
        assert keys.features is not None and keys.document_ids is not None
        first = left.shape[1]
        some = keys.key[:, :first], keys.value[:, :first], keys.features[:, :first]
        near = _packed(*some, left)
        earlier = _best_of_earlier(new, slices, recent_limit(block, past + 1), keep)
        found = _best(torch.cat((near.flip(1), earlier.to(near.dtype)), 1), keep)
    dim = new.key.shape[-1]
    key, value, score = found[..., :dim].to(new.key), found[..., dim:-1].to(new.value), found[..., -1]
    missing = keep - found.shape[1]
    if missing > 0:
        none = Kept.none(key, len(key), missing, key.shape[2], key.shape[3], value.shape[3])
        pairs = (key, none.key), (value, none.value), (score, none.score.to(score.dtype))
        key, value, score = (torch.cat(pair, 1) for pair in pairs)
    before = Kept(key, value, score, torch.ones_like(score)).kept_of(goes_on)
    number = keys.document_ids[:, first] if not first else keys.document_ids[:, first - 1]
    return keys, before, number


def _best_of_earlier(new: Keys, slices: Slices, limit: int, keep: int) -> Tensor:
    """The best keys that lie more than `limit` rows before this slice, in the document of the row before it."""
    length = new.key.shape[1]
    nearest = -(-limit // length)  # the slice that holds the first of those rows, counted back from this one
    cut = nearest * length - limit
    row = torch.arange(length, device=new.key.device)
    last = torch.ones_like(row, dtype=torch.bool)[None] if slices.ids is None else slices.ids == slices.ids[:, -1:]
    assert new.features is not None
    parts = [_packed(new.key, new.value, new.features, last & some) for some in (row < cut, row >= cut)]
    found = slices.each_before(torch.stack([_best(part.flip(1), keep) for part in parts], 1))
    distance = slices.rank - torch.arange(slices.rank, device=found.device)
    there = torch.stack((distance >= nearest, distance > nearest), 1)[None]
    if slices.filled is not None:
        # Of a slice counts only what no later one cuts off by a document of its own.
        filled = slices.filled[:, 1 : slices.rank].to(found.device)
        going = torch.cat((filled, torch.ones_like(slices.filled[:, :1]).to(filled)), 1)[:, : slices.rank]
        there = there & going.flip(1).cumprod(1).flip(1).bool().unsqueeze(-1)
    score = found[..., -1:].masked_fill(~there[..., None, None, None], -torch.inf)
    # The latest first, so that they win where scores are equal.
    return torch.cat((found[..., :-1], score), -1).flip(1, 2).flatten(1, 3)


def _packed(key: Tensor, value: Tensor, score: Tensor, wanted: Tensor) -> Tensor:
    """Keys, values and scores in one tensor [B, T, Hkv, K + V + 1]; scores are -inf where they are not wanted."""
    score = score.masked_fill(~wanted.unsqueeze(-1), -torch.inf).unsqueeze(-1)
    return torch.cat((key.to(score.dtype), value.to(score.dtype), score), -1)


def _best(packed: Tensor, keep: int) -> Tensor:
    """The `keep` rows of the largest scores, those first; of equal ones the first."""
    order = packed[..., -1].detach().sort(dim=1, descending=True, stable=True)[1][:, :keep]
    return packed.gather(1, order.unsqueeze(-1).expand(-1, -1, -1, packed.shape[-1]))
