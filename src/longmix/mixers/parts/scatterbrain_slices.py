"""How Scatterbrain sees earlier slices of the sequence, when each process has one.

Keys that are seen exactly come from the processes that have them. Of all others each process sums up its own, and the
sums are exchanged: as the border between both moves with whole blocks, each sums up its first and its last rows apart.
"""

from dataclasses import replace

import torch
from torch import Tensor

from longmix.distributed.slices import Slices
from longmix.mixers.parts.recurrent import select
from longmix.mixers.parts.scatterbrain_cache import Keys, recent_limit
from longmix.mixers.parts.scatterbrain_summaries import GONE, numbered
from longmix_kernels.scatter import FeatureState, absorb, empty_state


def after_earlier_slices(new: Keys, slices: Slices, limit: int | None = None) -> Keys:
    """The keys of a slice after the last `limit` keys of earlier ones, or all of them."""

    def after(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat((slices.before(x, limit), x), 1)

    key, value = after(new.key), after(new.value)
    assert key is not None and value is not None
    return Keys(key, value, after(new.features), slices.ids_from(limit), after(new.labels))


def after_sums(new: Keys, slices: Slices, block: int, past: int) -> tuple[Keys, FeatureState | None]:
    """The keys that a slice's queries may see exactly, others marked `GONE`, and sums over the others.

    Args:
        new: the slice's own keys.
        slices: what comes before.
        block, past: tokens of a block, and how many are seen before the own one.
    """
    keys, left, goes_on = after_near(new, slices, block, past)
    if new.features is None or keys.features is None:
        return keys, None
    first = left.shape[1]
    far = _sums_before(new, slices, recent_limit(block, past))
    far = absorb(far, keys.features[:, :first], keys.value[:, :first], left)
    return keys, select(goes_on, far, _empty(new))


def after_near(new: Keys, slices: Slices, block: int, past: int) -> tuple[Keys, Tensor, Tensor]:
    """The keys of a slice after those that it may see exactly, their documents numbered.

    Args:
        new, slices, block, past: see `after_sums`.

    Returns:
        The keys, others marked `GONE`; which of the earlier ones are not seen exactly but of the document before the
        slice, bool [B, N]; and whether that document goes on in the slice, bool [B].
    """
    batch, length = new.key.shape[:2]
    keys = after_earlier_slices(new, slices, recent_limit(block, past))
    first, device = keys.key.shape[1] - length, new.key.device
    ids = keys.document_ids
    if ids is None:
        ids = torch.zeros(batch, first + length, dtype=torch.int32, device=device)
    last_id = ids[:, :1] if slices.last_id is None else slices.last_id[:, None]
    next_position = slices.next_position.to(device)[:, None]
    position = next_position - torch.arange(first, 0, -1, device=device)
    begin = (next_position // block - past).clamp(min=0) * block
    of_last = ids[:, :first] == last_id
    live = of_last & (position >= begin)
    number = numbered(ids)
    keys = replace(keys, document_ids=torch.cat((torch.where(live, number[:, :first], GONE), number[:, first:]), 1))
    return keys, of_last & ~live, ids[:, first] == last_id[:, 0]


def _sums_before(new: Keys, slices: Slices, limit: int) -> FeatureState:
    """Sums over the keys that lie more than `limit` rows before this slice, in the document that goes on."""
    nearest = -(-limit // new.key.shape[1])  # the slice that holds the first of those rows, counted back from this one
    found = slices.each_before(_sums(new, slices.ids, nearest * new.key.shape[1] - limit))
    empty = _empty(new)
    # Zeros, since every process must have the result of an exchange in its graph.
    far = empty._replace(memory=empty.memory + found[:, :0, 0, ..., :-2].sum(1))
    for index in range(slices.rank):
        if slices.filled is not None:
            far = select(slices.filled[:, index], far, empty)
        distance = slices.rank - index
        parts = range(0 if distance < nearest else 1 if distance == nearest else 2)
        far = _added([far, *(_unpacked(found[:, index, part]) for part in parts)])
    return far


def _sums(new: Keys, ids: Tensor | None, cut: int) -> Tensor:
    """Sums over the first `cut` keys of a slice and over the others, of its last document: [B, 2, Hkv, m, Dv + 2]."""
    assert new.features is not None
    row = torch.arange(new.key.shape[1], device=new.key.device)
    last = torch.ones_like(row, dtype=torch.bool) if ids is None else ids == ids[:, -1:]
    sums = [absorb(_empty(new), new.features, new.value, last & part) for part in (row < cut, row >= cut)]
    return torch.stack([torch.cat([part[0], part[1].unsqueeze(-1), part[2].unsqueeze(-1)], -1) for part in sums], 1)


def _unpacked(columns: Tensor) -> FeatureState:
    return FeatureState(columns[..., :-2], columns[..., -2], columns[..., -1].detach())


def _added(states: list[FeatureState]) -> FeatureState:
    """The sums over the keys of all states."""
    scale = torch.stack([state.log_scale for state in states]).amax(0)
    shares = [(state.log_scale - scale).exp() for state in states]
    pairs = list(zip(shares, states, strict=True))
    memory = torch.stack([share.unsqueeze(-1) * state.memory for share, state in pairs]).sum(0)
    return FeatureState(memory, torch.stack([share * state.normalizer for share, state in pairs]).sum(0), scale)


def _empty(keys: Keys) -> FeatureState:
    assert keys.features is not None
    batch, _, heads, value_dim = keys.value.shape
    return empty_state(keys.features, batch, heads, keys.features.shape[-1], value_dim)
