"""Recurrent states across slices of the sequence: how a slice changes them, and continues from earlier slices.

An engine is affine in the state S_0 that a document begins from. With E what a state has more than that,

    y = y_0 + Q E,    E' = M E + R        over a slice that one document fills; else E' = R

where y_0 and R = S' - S_0 come from a call that begins with S_0. Each process makes that call for its slice at once;
(R, M) of all earlier slices are exchanged and folded, and y is corrected where the document goes on from before.

    decays            M = exp(sum of log decays), Q_t = q_t exp(log decays up to t); K V more products per token
    delta rule        M is a K x K matrix; Q and M come from the same call, which gets K more columns of values
    with normaliser   y is not affine: sums over the slice are exchanged first, and one call goes on from them
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.distributed.slices import Slices
from longmix.mixers.parts.documents import goes_on
from longmix.mixers.parts.recurrent import Run, over_documents, select
from longmix_kernels.linear import LinearState


@dataclass
class DecayRecurrence:
    """Linear attention whose state decays.

    Attributes:
        query: [B, T, H, K].
        log_decay: [H], [B, T, H] or [B, T, H, K], in float32 or better.
        scale: factor on the queries.
    """

    query: Tensor
    log_decay: Tensor
    scale: float

    def over_slice(self, run: Run, fresh: Any, slices: Slices, ids: Tensor | None) -> tuple[Tensor, Any]:
        """Run this process's slice; returns the output and the final state, a tensor or a tuple with a `memory`."""
        output, final = run(fresh, ids, None)
        log_decay = self.log_decay.expand(*self.query.shape[: max(3, self.log_decay.dim())])
        decayed = log_decay.cumsum(1)
        if decayed.dim() == 3:
            decayed = decayed.unsqueeze(-1)
        added = _memory(final) - _memory(fresh)
        kept = decayed[:, -1].exp().expand(*added.shape[:3]).unsqueeze(-1)
        entering = _entering(slices, added, kept, fresh)
        reads = self.scale * self.query * decayed.exp()
        memory = _memory(final) + _passed(slices, slices.rank, entering, kept)
        final = memory if isinstance(final, Tensor) else final._replace(memory=memory)
        return _corrected(output, reads, entering, slices, ids), final


@dataclass
class DeltaRecurrence:
    """The delta rule, whose engine is called with the columns of `widened` values."""

    def over_slice(self, run: Run, fresh: Tensor, slices: Slices, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run this process's slice; returns the output and the final state."""
        key_dim, value_dim = fresh.shape[-2:]
        identity = torch.eye(key_dim, dtype=fresh.dtype, device=fresh.device).expand(*fresh.shape[:2], -1, -1)
        outputs, finals = run(torch.cat([fresh, identity], -1), ids, None)
        output, reads = outputs.split([value_dim, key_dim], -1)
        final, kept = finals.split([value_dim, key_dim], -1)
        entering = _entering(slices, final - fresh, kept, fresh)
        final = final + _passed(slices, slices.rank, entering, kept)
        return _corrected(output, reads, entering, slices, ids), final


def widened(value: Tensor, initial: Tensor | None) -> Tensor:
    """`value` [B, T, H, V] with zeros for the further columns of the state before it [B, H, K, V + .]."""
    more = 0 if initial is None else initial.shape[-1] - value.shape[-1]
    return F.pad(value, (0, more)) if more else value


@dataclass
class NormalizedRecurrence:
    """Linear attention with one decay per head, an exponential input gate and a normaliser.

    Attributes:
        key: [B, T, H, K]; value: [B, T, H, V].
        log_decay, log_input: [B, T, H], in float32 or better.
    """

    key: Tensor
    value: Tensor
    log_decay: Tensor
    log_input: Tensor

    def over_slice(
        self, run: Run, fresh: LinearState, slices: Slices, ids: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        """Run this process's slice; returns the output and the final state."""
        continues = None if ids is None else goes_on(slices, ids)
        return over_documents(run, fresh, self._entering(fresh, slices, ids), continues, ids, zero=False)

    def _entering(self, fresh: LinearState, slices: Slices, ids: Tensor | None) -> LinearState:
        """The state that enters this slice, in a scale at which nothing overflows."""
        memory, normalizer, log_scale = fresh
        assert normalizer is not None and log_scale is not None
        if slices.carried is not None:
            carried = select(slices.goes_on(), slices.carried.carried, fresh)
            memory, normalizer, log_scale = carried
        sums = slices.each_before(self._sums(ids))
        none = sums[:, :0].sum(1)  # zeros, but every process needs the result of an exchange in its graph
        memory = memory + none[..., :-3]
        for index in range(slices.rank):
            added, along, *scales = sums[:, index].split([memory.shape[-1], 1, 1, 1], -1)
            added_scale, log_kept = scales[0][..., 0, 0].detach(), scales[1][..., 0, 0]
            if slices.filled is not None:
                state = LinearState(memory, normalizer, log_scale)
                memory, normalizer, log_scale = select(slices.filled[:, index], state, fresh)
            scale = torch.maximum(log_scale + log_kept, added_scale).detach()
            kept, new = (log_scale + log_kept - scale).exp(), (added_scale - scale).exp()
            memory = kept[..., None, None] * memory + new[..., None, None] * added
            normalizer = kept[..., None] * normalizer + new[..., None] * along[..., 0]
            log_scale = scale
        return LinearState(memory, normalizer, log_scale)

    def _sums(self, ids: Tensor | None) -> Tensor:
        """Sums over the slice's last document, as columns [B, H, K, V + 3]: memory, normaliser, scale, log decay."""
        log_decay, log_input = self.log_decay, self.log_input
        if ids is not None:
            other = (ids != ids[:, -1:]).unsqueeze(-1)
            log_decay, log_input = log_decay.masked_fill(other, 0.0), log_input.masked_fill(other, -torch.inf)
        later = F.pad(log_decay[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
        log_weight = later + log_input
        scale = log_weight.amax(1).detach()
        exact = self.log_decay.dtype
        key = self.key.to(exact) * (log_weight - scale[:, None]).exp().unsqueeze(-1)
        ones = F.pad(self.value.to(exact), (0, 1), value=1.0)
        summed = torch.einsum("bthk,bthv->bhkv", key, ones)
        gates = torch.stack([scale, log_decay.sum(1)], -1).unsqueeze(2)
        return torch.cat([summed, gates.expand(*summed.shape[:3], 2)], -1)


def _memory(state: Any) -> Tensor:
    memory: Tensor = state if isinstance(state, Tensor) else state.memory
    return memory


def _entering(slices: Slices, added: Tensor, kept: Tensor, fresh: Any) -> Tensor:
    """E [B, H, K, V]: the state that enters this slice, less a fresh one.

    Args:
        slices: what comes before.
        added: R of this slice, [B, H, K, V].
        kept: M of this slice, [B, H, K, K], or its diagonal [B, H, K, 1].
        fresh: the state before a document.
    """
    columns = [added.shape[-1], kept.shape[-1]]
    before = slices.each_before(torch.cat([added, kept.to(added.dtype)], -1))
    entering = before[:, :0, ..., : columns[0]].sum(1)  # zeros; every process has an exchange's result in its graph
    if slices.carried is not None:
        more = _memory(slices.carried.carried) - _memory(fresh)
        entering = entering + torch.where(slices.goes_on()[:, None, None, None], more, 0.0)
    for index in range(slices.rank):
        added, kept = before[:, index].split(columns, -1)
        entering = added + _passed(slices, index, entering, kept)
    return entering


def _passed(slices: Slices, index: int, entering: Tensor, kept: Tensor) -> Tensor:
    """The part of E [B, H, K, V] that a slice passes on: M E, or 0 if another document begins in it."""
    passed = kept @ entering if kept.shape[-1] > 1 else kept * entering
    if slices.filled is None:
        return passed
    return torch.where(slices.filled[:, index, None, None, None], passed, 0.0)


def _corrected(output: Tensor, reads: Tensor, entering: Tensor, slices: Slices, ids: Tensor | None) -> Tensor:
    """Add to the output [B, T, H, V] what tokens of a continued document read from E by `reads` [B, T, H, K]."""
    found = torch.einsum("bthk,bhkv->bthv", reads.to(entering.dtype), entering)
    if ids is not None and slices.last_id is not None:
        continues = ids == slices.last_id[:, None]
        found = torch.where(continues[..., None, None], found, 0.0)
    return output + found.to(output.dtype)
