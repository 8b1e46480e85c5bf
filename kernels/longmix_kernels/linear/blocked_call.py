"""The inputs of a blocked call: which chunks are computed together, and how tensors are brought into that form."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import NamedTuple, TypeVar

import torch

from longmix_kernels.linear.blocked_weights import LONGEST_CHUNK, ChunkWeights, InitialWeights
from longmix_kernels.linear.inputs import Inputs

Tensors = tuple[torch.Tensor, ...]
Item = TypeVar("Item")

IN_CACHE = 2**19
"""How many elements of queries, keys and values to compute with at a time for each thread."""
CHUNKS_IN_CACHE = 8
"""How many chunks a run has at least, where a sequence is that long: the backward holds one state for each run."""
COLUMNS = 8
"""Columns of values and normaliser are filled up with zeros to a multiple of this: products of odd rows are slow."""
RUNS_AT_A_TIME = 8
"""Of how many runs to compute the gates together: they are small, and an operation has its price."""


class Part(NamedTuple):
    """Batch rows and heads that are computed together."""

    batch: slice
    heads: slice

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """View their part of [B, T, H, ...], or of an empty tensor all."""
        return x[self.batch, :, self.heads] if x.numel() else x

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """View their part of [B, H, ...], or of an empty tensor all."""
        return x[self.batch, self.heads] if x.numel() else x

    def inputs(self, inputs: Inputs) -> Inputs:
        """Return the inputs of a call with views of their part of its tensors."""

        def tokens(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else self.tokens(x)

        def states(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else self.states(x)

        return replace(
            inputs,
            query=self.tokens(inputs.query),
            key=self.tokens(inputs.key),
            value=self.tokens(inputs.value),
            log_decay=self.tokens(inputs.log_decay),
            log_input=tokens(inputs.log_input),
            memory=states(inputs.memory),
            normalizer=states(inputs.normalizer),
            log_scale=states(inputs.log_scale),
            carried_memory=states(inputs.carried_memory),
            carried_normalizer=states(inputs.carried_normalizer),
            carried_log_scale=states(inputs.carried_log_scale),
            document_ids=None if inputs.document_ids is None else inputs.document_ids[self.batch],
        )


def parts(inputs: Inputs) -> Iterator[Part]:
    """Split batch rows and heads into parts, each small enough for a few of its chunks to stay in cache."""
    batch, length, heads, dim = inputs.query.shape
    of_a_token = 2 * dim + inputs.value.shape[-1]
    of_a_sequence = CHUNKS_IN_CACHE * chunk_length(of_a_token - dim, length, inputs.chunk_size) * of_a_token
    most = max(1, IN_CACHE * torch.get_num_threads() // of_a_sequence)
    rows, some = max(1, most // heads), min(most, heads)
    for row in range(0, batch, rows):
        for head in range(0, heads, some):
            yield Part(slice(row, row + rows), slice(head, head + some))


def chunk_length(dims: int, length: int, chunk_size: int | None) -> int:
    """Return how many tokens a chunk has, for dimensions of key and value that sum to `dims`."""
    # Found by measurement: what a longer chunk saves in states it costs within, which is dear for small heads.
    usual = 32 if dims < 256 else 64
    return min(chunk_size or usual, LONGEST_CHUNK, length)


class Run(NamedTuple):
    """Consecutive chunks of equal length."""

    start: int
    chunks: int
    length: int

    @property
    def tokens(self) -> slice:
        """Return which tokens they hold."""
        return slice(self.start, self.start + self.chunks * self.length)


class BlockedCall:
    """A part of a call, as X = B * H sequences of chunks; a run of G chunks of L tokens is copied to [G * X, L, D].

    `space` is memory to compute in, which parts share: to touch new memory costs more than to compute in it. `columns`
    is how many columns memories and values have, Dv or what the normaliser makes of it; those behind it are zero.
    """

    def __init__(self, inputs: Inputs, space: dict[str, torch.Tensor]) -> None:
        self.query, self.key, self.value = inputs.query, inputs.key, inputs.value
        self.log_decay, self.log_input, self.document_ids = inputs.log_decay, inputs.log_input, inputs.document_ids
        self.normalize, self.scale, self.chunk_size = inputs.normalize, inputs.scale, inputs.chunk_size
        self.batch, self.length, self.heads, self.dim = self.query.shape
        self.value_dim, self.sequences = self.value.shape[-1], self.batch * self.heads
        self.columns = -(-(self.value_dim + 1) // COLUMNS) * COLUMNS if self.normalize else self.value_dim
        self.has_state = inputs.memory is not None
        self.initial = self.join_state(inputs.memory, inputs.normalizer)
        self.initial_scale = self._scale(inputs.log_scale)
        # What the first document goes on from.
        self.has_carried = inputs.carried_memory is not None
        self.carried, self.carried_scale = self.initial, self.initial_scale
        if self.has_carried:
            self.carried = self.join_state(inputs.carried_memory, inputs.carried_normalizer)
            self.carried_scale = self._scale(inputs.carried_log_scale)
        self.plan = self._plan()
        self._space = space

    def runs(self, row_scale: torch.Tensor | None = None, reverse: bool = False) -> Iterator[tuple[Run, ChunkWeights]]:
        """Yield the runs of chunks that cover all tokens, with their weights; the last chunk may be shorter.

        Args:
            row_scale: [B, T, H] if it is known.
            reverse: the last run first, for which `row_scale` must be known.
        """
        scale = self.carried_scale
        for several, runs in _order(self.plan, reverse):
            weights = self._weights(several, scale, row_scale)
            scale = weights.scale[-1]
            for run in _order(runs, reverse):
                first = (run.start - several.start) // run.length
                yield run, weights.part(slice(first, first + run.chunks))

    def space(self, name: str, *shape: int) -> torch.Tensor:
        """Return memory to compute in, the same for each run."""
        size, held = prod(shape), self._space.get(name)
        if held is None or held.numel() < size:
            held = self._space[name] = self.log_decay.new_empty(size)
        return held[:size].view(shape)

    def restarts(self, weights: ChunkWeights) -> InitialWeights | None:
        """Return the weights of the initial state, None where no document begins or the state is zero."""
        return weights.initial if self.has_state else None

    def take(self, x: torch.Tensor, run: Run, name: str, ones: bool = False) -> torch.Tensor:
        """Copy a run of [B, T, H, D] to [G * X, L, D], or of [B, T, H, Dv] to `columns` with a 1 behind each row."""
        view, dim = self._chunks(x[:, run.tokens], run), x.shape[-1]
        copy = self.space(name, *view.shape[:-1], self.columns if ones else dim)
        copy[..., :dim] = view
        if ones:
            copy[..., dim] = 1.0
            copy[..., dim + 1 :] = 0.0
        return copy.view(-1, run.length, copy.shape[-1])

    def take_gate(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """Return a run of [B, T, H] as [G, X, L]."""
        return self._chunks(x[:, run.tokens], run).reshape(run.chunks, self.sequences, run.length).contiguous()

    def put(self, whole: torch.Tensor, run: Run, rows: torch.Tensor) -> None:
        """Write a run of [B, T, H, ...] from [G * X, L, ...] or [G, X, L]."""
        view = self._chunks(whole[:, run.tokens], run)
        view.copy_(rows.reshape(view.shape))

    def join_state(self, memory: torch.Tensor | None, normalizer: torch.Tensor | None) -> torch.Tensor:
        """Return memory and normaliser as [X, Dk, columns]; zero where None."""
        state = self.log_decay.new_zeros(self.sequences, self.dim, self.columns)
        if memory is not None:
            state[..., : self.value_dim] = memory.flatten(0, 1)
        if normalizer is not None and self.normalize:
            state[..., self.value_dim] = normalizer.flatten(0, 1)
        return state

    def split_state(self, state: torch.Tensor, memory: torch.Tensor, normalizer: torch.Tensor) -> None:
        """Undo `join_state`."""
        state = state.view(self.batch, self.heads, *state.shape[1:])
        memory.copy_(state[..., : self.value_dim])
        if self.normalize:
            normalizer.copy_(state[..., self.value_dim])

    def _scale(self, log_scale: torch.Tensor | None) -> torch.Tensor:
        """Return the log scale of a state as float64 [X]; zero where None."""
        return (self.log_decay.new_zeros(self.sequences) if log_scale is None else log_scale.reshape(-1)).double()

    def _plan(self) -> list[tuple[Run, list[Run]]]:
        """Return all runs, grouped into those of which the gates are computed together."""
        length = chunk_length(self.dim + self.value_dim, self.length, self.chunk_size)
        of_a_chunk = length * self.sequences * (2 * self.dim + self.value_dim)
        chunks = max(1, IN_CACHE * torch.get_num_threads() // of_a_chunk)
        complete = Run(0, self.length // length, length)
        together = _split(complete, RUNS_AT_A_TIME * chunks, self.length)
        return [(several, _split(several, chunks)) for several in together]

    def _chunks(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """View the tokens of a run, [B, G * L, H, ...], as [G, B, H, L, ...]."""
        return x.unflatten(1, (run.chunks, run.length)).transpose(0, 1).transpose(2, 3)

    def _weights(self, run: Run, scale: torch.Tensor, row_scale: torch.Tensor | None) -> ChunkWeights:
        """Return the weights of a run; `scale` [X] is that of the entering state, unless `row_scale` is known."""
        decay = self.take_gate(self.log_decay, run)
        gate = None if self.log_input is None else self.take_gate(self.log_input, run)
        if not self.normalize:
            rows = decay.new_zeros(decay.shape, dtype=torch.float64)
        elif row_scale is None:
            rows = None
        else:
            rows = self.take_gate(row_scale, run).double()
            scale = row_scale[:, run.start - 1].reshape(-1).double() if run.start else self.carried_scale
        return ChunkWeights(decay, gate, self._begins(run), scale, self.initial_scale, rows)

    def _begins(self, run: Run) -> torch.Tensor | None:
        """Return where a document begins other than at the first token, [G, X, L]; None for nowhere."""
        if self.document_ids is None:
            return None
        ids = self.document_ids[:, max(run.start - 1, 0) : run.tokens.stop]
        ids = torch.cat([ids[:, :1], ids], 1) if run.start == 0 else ids
        begins = ids[:, 1:] != ids[:, :-1]
        if not begins.any():
            return None
        begins = begins.unsqueeze(-1).expand(-1, -1, self.heads)
        return self._chunks(begins, run).reshape(run.chunks, self.sequences, run.length)


def _split(run: Run, chunks: int, end: int = 0) -> list[Run]:
    """Split into runs of at most so many chunks, and one chunk more of what is left before `end`."""
    starts = range(0, run.chunks, chunks)
    parts = [Run(run.start + i * run.length, min(chunks, run.chunks - i), run.length) for i in starts]
    left = end - run.tokens.stop
    return [*parts, Run(run.tokens.stop, 1, left)] if left > 0 else parts


def _order(items: list[Item], reverse: bool) -> Iterator[Item]:
    return reversed(items) if reverse else iter(items)
