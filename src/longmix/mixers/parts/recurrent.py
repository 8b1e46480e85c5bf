"""The base of mixers with a constant-size state: it continues, restarts at each document, and can be tuned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from longmix.distributed.slices import Slices
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.documents import goes_on
from longmix.mixers.parts.head_gates import HeadRouter
from longmix.mixers.parts.metrics import Metric, RootMeanSquare
from longmix.mixers.parts.rotary import token_positions
from longmix.mixers.parts.state_tuning import TunedState
from longmix.mixers.parts.states import mixer_state
from longmix_kernels.runtime import is_readable

Run = Callable[[Any, Tensor | None, Any], tuple[Tensor, Any]]
"""An engine: output [B, T, ...] and final state.

It is given the state before each document, None for zeros; the document ids; and the state that the first document of
each row goes on from, None for that before each document.
"""


class Recurrence(Protocol):
    """How an engine's state passes through a slice of the sequence that follows other slices."""

    def over_slice(self, run: Run, fresh: Any, slices: Slices, ids: Tensor | None) -> tuple[Tensor, Any]:
        """Run this process's slice; returns its output, and the state after it and all earlier slices.

        Args:
            run: the engine.
            fresh: its state before a document, tensors [B, ...].
            slices: what comes before.
            ids: int32 [B, T], the slice's documents.
        """
        ...


@mixer_state(bookkeeping=("recent_ids", "last_id", "next_position"))
@dataclass
class RecurrentState:
    """The state of a recurrent mixer.

    Attributes:
        carried: the engine's state after the last token, tensors [B, ...].
        recent: [B, K, C], the last inputs of a short convolution or token shift; K may be 0.
        recent_ids: int32 [B, K], their documents; any before the first token, where inputs are zero.
        last_id: int32 [B], the document of the last token; before the first one, of a row without ids.
        next_position: int64 [B], the position within its document that the next token of each row would take; 0 before
            the first token of a row, and only there.
    """

    carried: Any
    recent: Tensor
    recent_ids: Tensor
    last_id: Tensor
    next_position: Tensor


class Recent(NamedTuple):
    """The inputs just before some tokens, for a short convolution or token shift.

    Attributes:
        before: [B, K, C], zero before the first token.
        ids: int32 [B, K + T], the documents of both, any before the first token; None if all are one.
    """

    before: Tensor
    ids: Tensor | None

    def followed_by(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last K of these and the new inputs `x` [B, T, C], and their documents [B, K]."""
        assert self.ids is not None
        start = x.shape[1]
        if not self.before.shape[1]:
            return self.before.to(x.dtype), self.ids[:, :0]
        return torch.cat([self.before.to(x.dtype), x], 1)[:, start:], self.ids[:, start:]


class RecurrentMixer(Mixer):
    """Base of the mixers whose state does not grow with the length.

    A subclass says how large its state is, with `zeros`, `past` and `recent_channels`, and its `forward` hands its
    engine to `run_engine` and returns `next_state`.

    Attributes:
        past: earlier tokens that a convolution or token shift sees.
        recent_channels: how wide what it sees is.
        tuned: what state tuning trains; None without it.
        head_router: of a mixture of heads; None without one.
    """

    sliced = True
    carries_in_slices = True
    tunes_states = True
    past: int = 0
    recent_channels: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.tuned: TunedState | None = None
        self.head_router: HeadRouter | None = None

    def zeros(self, batch: int) -> Any:
        """The engine's state before a document for `batch` rows: a tensor or a named tuple of them, [B, H, ...]."""
        raise NotImplementedError

    def tune_states(self, features: int = 0, decorrelation: float = 0.0) -> None:
        """Make the state before each document a parameter, zero at first: one for all rows, in float32 or better.

        It can then be trained alone ("state tuning", after RWKV-LM). A log scale is left as it is: it divides out.

        Args:
            features, decorrelation: of a memory besides; see `TunedState`.
        """
        parts = _named_parts(self.zeros(1))
        initial = {name: part[0] for name, part in parts.items() if name != "log_scale"}
        self.tuned = TunedState(initial, features, decorrelation)

    def fresh(self, batch: int) -> Any:
        """The state before each document: as tuned, else zeros."""
        zeros = self.zeros(batch)
        if self.tuned is None:
            return zeros
        parts = _named_parts(zeros)
        for name, parameter in self.tuned.initial.items():
            parts[name] = parameter.unsqueeze(0).expand_as(parts[name])
        return parts["memory"] if isinstance(zeros, Tensor) else type(zeros)(**parts)

    def shows_terms(self, state: Any) -> bool:
        """Whether somebody besides the engine needs what the engine gets, so that it cannot be recomputed unseen."""
        return isinstance(state, Slices) or self.tuned is not None or self.watch is not None

    def recall(self, read: Tensor, query: Tensor) -> Tensor:
        """The read [B, T, H, V] of the engine for `query` [B, T, H, K], plus that of the tuned memory, if any."""
        if self.tuned is None or self.tuned.memory is None:
            return read
        return read + self.tuned.memory(query).to(read.dtype)

    def routed(
        self, mixed: Tensor, x: Tensor, state: RecurrentState | Slices | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Metric]]:
        """Heads times the gates of a mixture of heads, if there is one; auxiliary losses and metrics of it.

        Args:
            mixed: [B, T, H, V], the heads as they are read and normed.
            x: [B, T, D], the tokens.
            state: see `Mixer.forward`.
        """
        return (mixed, {}, {}) if self.head_router is None else self.head_router.applied(mixed, x, state)

    def run_engine(
        self,
        run: Run,
        recurrence: Recurrence | None,
        state: RecurrentState | Slices | None,
        ids: Tensor | None,
        batch: int,
    ) -> tuple[Tensor, Any]:
        """Output [B, T, ...] and final state of the engine, from a state or from the beginning.

        Args:
            run, recurrence: the engine, and what it does to its state; the latter may be None without slices.
            state: see `Mixer.forward`.
            ids: int32 [B, T]; None where the last document of each row goes on.
            batch: B.
        """
        if isinstance(state, RecurrentState) and ids is None:
            return run(state.carried, None, None)
        fresh = None if state is None and self.tuned is None else self.fresh(batch)
        if state is None:
            return run(fresh, ids, None)
        if isinstance(state, Slices):
            assert recurrence is not None
            with torch.autocast(next(self.parameters()).device.type, enabled=False):  # states stay exact
                return recurrence.over_slice(run, fresh, state, ids)
        assert ids is not None
        return over_documents(run, fresh, state.carried, goes_on(state, ids), ids, zero=self.tuned is None)

    def recent(self, x: Tensor, state: RecurrentState | Slices | None, ids: Tensor | None) -> Recent:
        """The inputs just before `x` [B, T, ...], from a state, earlier slices, or zeros."""
        batch = x.shape[0]
        if isinstance(state, Slices):
            before = state.just_before(x, self.past)
            earlier = x.new_empty(0) if ids is None else state.ids_before(self.past)
            if state.carried is not None and state.start < self.past:  # they reach before the rows
                reach = slice(state.start, self.past)
                before = torch.cat(
                    [state.carried.recent[:, reach].to(x.dtype), before[:, self.past - state.start :]], 1
                )
                earlier = torch.cat([state.carried.recent_ids[:, reach], earlier[:, self.past - state.start :]], 1)
        elif state is None:
            before = x.new_zeros(batch, self.past, self.recent_channels)
            earlier = torch.zeros(batch, self.past, dtype=torch.int32, device=x.device)
        else:
            before, earlier = state.recent, state.recent_ids
        return Recent(before, None if ids is None else torch.cat([earlier, ids.int()], 1))

    def next_state(
        self,
        carried: Any,
        recent: Recent,
        x: Tensor,
        state: RecurrentState | Slices | None,
        document_ids: Tensor | None,
    ) -> RecurrentState | None:
        """The state after `x`; None without a state, and after a slice of rows that begin anew.

        Args:
            carried: the engine's final state.
            recent: what came before x.
            x: [B, T, C].
            state: the state before.
            document_ids: int32 [B, T], documents of the new tokens; None where the last document of each row goes on.
        """
        if state is None or (isinstance(state, Slices) and state.carried is None):
            return None
        length, before = x.shape[1], recent.followed_by(x)
        if document_ids is None:
            assert isinstance(state, RecurrentState)
            return RecurrentState(carried, *before, state.last_id, state.next_position + length)
        positions = token_positions(document_ids, state.last_id, state.next_position, length, x.device)
        return RecurrentState(carried, *before, document_ids[:, -1], positions[:, -1] + 1)

    def state_metrics(self, carried: Any, state: Any, length: int) -> dict[str, Metric]:
        """Root mean square of each head's state at the end of the rows: it may grow if transitions do not contract.

        A step has none: to sum the state up would cost as much as to update it.

        Args:
            carried: the engine's final state.
            state: what the call went on from.
            length: T.
        """
        if is_step(state, length):
            return {}
        sizes = RootMeanSquare.of_each(_named_parts(carried)["memory"].detach(), 1)
        return {f"state_rms_head_{head}": size.in_last_slice(state) for head, size in enumerate(sizes)}

    def init_state(self, batch: int) -> RecurrentState:
        """The state before the first token, for `batch` rows."""
        weight = next(self.parameters())
        recent = weight.new_zeros(batch, self.past, self.recent_channels)
        ids = torch.zeros(batch, self.past + 1, dtype=torch.int32, device=weight.device)
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return RecurrentState(self.fresh(batch), recent, ids[:, 1:], ids[:, 0], position)

    def state_between_documents(self, batch: int) -> RecurrentState:
        """A state for `batch` rows that no token goes on from; each document begins with `fresh`, gradient included."""
        weight = next(self.parameters())
        recent = weight.new_zeros(batch, self.past, self.recent_channels)
        ids = torch.full((batch, self.past + 1), -1, dtype=torch.int32, device=weight.device)
        position = torch.ones(batch, dtype=torch.int64, device=weight.device)
        return RecurrentState(self.zeros(batch), recent, ids[:, 1:], ids[:, 0], position)

    def state_bytes(self, length: int) -> int:
        """Bytes of state one row holds, whatever its length."""
        held = sum(part.nbytes for part in tree_leaves(self.zeros(1)) if part is not None)
        return held + self.past * self.recent_channels * next(self.parameters()).element_size()

    def step_bytes(self, length: int) -> int:
        """Bytes of the whole state, which each token reads and writes."""
        return 2 * self.state_bytes(length)

    def decoding_bytes(self, length: int, steps: int) -> int:
        """Bytes of the whole state, for each step."""
        return steps * self.step_bytes(length)


def is_step(state: Any, length: int) -> bool:
    """Whether a call of `length` tokens is a step of generation: one token after a state."""
    return length == 1 and isinstance(state, RecurrentState)


def _named_parts(state: Any) -> dict[str, Tensor]:
    """The tensors of an engine's state by name; a single tensor is named `memory`."""
    parts = {"memory": state} if isinstance(state, Tensor) else state._asdict()
    return {name: part for name, part in parts.items() if part is not None}


def over_documents(
    run: Run, fresh: Any, carried: Any, goes_on: Tensor | None, ids: Tensor | None, *, zero: bool
) -> tuple[Tensor, Any]:
    """Continue an engine from a state. Only the document that goes on sees it; others begin from the fresh state.

    Args:
        run: the engine.
        fresh: its state before a document, tensors [B, ...].
        carried: its state before these tokens, in the same form.
        goes_on: bool [B], whether the first new token is of its document.
        ids: int32 [B, T], the new tokens' documents; None if all are of that.
        zero: the fresh state is zero, so that no document needs to read it.
    """
    if ids is None or goes_on is None:
        return run(carried, None, None)
    carried = select(goes_on, carried, fresh)
    # A GPU would have to be waited for, and a compiled graph cannot branch on values: there ids are given in any case.
    if ids.shape[1] == 1 or (is_readable(ids) and bool((ids == ids[:, :1]).all())):
        return run(carried, None, None)
    return run(None if zero else fresh, ids, carried)


def select(rows: Tensor, chosen: Any, others: Any) -> Any:
    """Choose row by row: tensors [B, ...] of the first state where `rows` [B] is set, else of the second."""

    def either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)

    return tree_map(either, chosen, others)
