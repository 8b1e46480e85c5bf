"""The inputs of a blocked call: which chunks are computed together, and how tensors are brought into that form."""

from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import torch

from longmix_kernels.delta.blocked_products import Documents
from longmix_kernels.delta.blocked_weights import ChunkWeights
from longmix_kernels.delta.inputs import Inputs

CHUNK = 32
IN_CACHE = 3 * 2**17
"""How many elements of queries, keys and values to compute with at a time."""

APART = 192
"""How many tokens lie at least between two states that the forward keeps: 1/18 of the inputs of RWKV-7."""

TOGETHER = 16
"""How many sequences go through time together at most. More would leave fewer chunks to a run: more states to keep."""


class Part(NamedTuple):
    """Some sequences of a call, which go through time together; the sequences of different parts never meet."""

    batch: slice
    heads: slice

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """View [B, T, H, ...]."""
        return x[self.batch, :, self.heads]

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """View [B, H, ...]."""
        return x[self.batch, self.heads]


class Run(NamedTuple):
    """Consecutive chunks of equal length, a power of two; the last chunk of a call may have fewer tokens than that."""

    start: int
    chunks: int
    length: int
    tokens: slice


class BlockedCall:
    """A part of a call, X = B * H sequences of chunks; a run of G chunks of L tokens is copied to [G * X, n, L, D]."""

    def __init__(self, part: Part, inputs: Inputs, space: dict[str, torch.Tensor]) -> None:
        tensors = inputs.query, inputs.key, inputs.value, inputs.log_decay
        self.query, self.key, self.value, self.log_decay = map(part.tokens, tensors)
        if self.log_decay.dim() == 3:
            self.log_decay = self.log_decay.unsqueeze(-1)
        self.low_rank_read, self.low_rank_write = (
            None if x is None else part.tokens(x) for x in (inputs.low_rank_read, inputs.low_rank_write)
        )
        self.document_ids = None if inputs.document_ids is None else inputs.document_ids[part.batch]
        self.scale, self.chunk_size, self._space = inputs.scale, inputs.chunk_size, space
        self.batch, self.length, self.heads, self.dim = self.query.shape
        self.value_dim, self.sequences = inputs.value.shape[-1], self.batch * self.heads
        self.apart = tokens_apart(inputs)
        self.has_state = inputs.initial_state is not None
        self.initial = self._state(part, inputs.initial_state)
        # What the first document goes on from.
        self.has_carried = inputs.carried_state is not None
        self.carried = self._state(part, inputs.carried_state) if self.has_carried else self.initial

    def runs(self) -> Iterator[Run]:
        """Yield the runs of chunks that cover all tokens; the last chunk may be shorter.

        A run has all chunks between two of the kept states, or between several, or an equal share of them.
        """
        length = self.chunk_size or CHUNK
        most = max(1, IN_CACHE // (length * self.sequences * (2 * self.dim + self.value_dim)))
        between = self.apart // length
        usual = most // between * between or -(-between // -(-between // most))
        start = 0
        while start < self.length:
            left = self.length - start
            chunks = min(usual, left // length, max(usual, between) - start // length % max(usual, between))
            stop = start + chunks * length if chunks else self.length
            yield Run(start, chunks or 1, length if chunks else 1 << (left - 1).bit_length(), slice(start, stop))
            start = stop

    def keep(self, kept: torch.Tensor, run: Run, states: torch.Tensor) -> None:
        """Write those to keep of the states [G + 1, X, K, V] between the chunks of a run to [B, H, states, K, V]."""
        first = run.start // self.apart
        to_next = ((first + 1) * self.apart - run.start) // run.length
        found = states[to_next :: self.apart // run.length].unflatten(1, (self.batch, self.heads))
        there = kept[:, :, first : first + len(found)]
        there.copy_(found[: there.shape[2]].permute(1, 2, 0, 3, 4))

    def kept(self, kept: torch.Tensor, run: Run) -> torch.Tensor:
        """Return the state [X, K, V] that enters a run which begins at a kept one."""
        return kept[:, :, run.start // self.apart - 1].flatten(0, 1) if run.start else self.carried

    def space(self, name: str, *shape: int) -> torch.Tensor:
        """Return memory to compute in, the same for each run: to touch new memory costs more than to compute in it."""
        size, held = prod(shape), self._space.get(name)
        if held is None or held.numel() < size:
            held = self._space[name] = self.log_decay.new_empty(size)
        return held[:size].view(shape)

    def constant(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the tensor of a name that all runs share, made once."""
        if name not in self._space:
            self._space[name] = make()
        return self._space[name]

    def weights(self, run: Run, outputs: bool) -> ChunkWeights:
        """Return the weights of a run; those in its outputs only if `outputs`."""
        readers = [x for x in (self.query if outputs else None, self.low_rank_read) if x is not None]
        writers = [x for x in (self.key, self.low_rank_write) if x is not None]
        decay = self.take([self.log_decay], run, "log_decay").squeeze(1)
        rows, columns = self.take(readers, run, "rows"), self.take(writers, run, "columns")
        if outputs:
            rows[:, 0].mul_(self.scale)
        documents = self._documents(run)
        return ChunkWeights(rows, columns, decay, outputs, documents, self.has_state, self.space, self.constant)

    def take(self, tensors: list[torch.Tensor], run: Run, name: str, room: int = 0) -> torch.Tensor:
        """Copy a run of n tensors [B, T, H, D] to [G * X, n + room, L, D], zero for tokens beyond the last."""
        kinds, dim = len(tensors) + room, tensors[0].shape[-1] if tensors else self.dim
        copy = self.space(name, run.chunks, self.batch, self.heads, kinds, run.length, dim)
        for index, x in enumerate(tensors):
            self._tokens(copy[:, :, :, index], run).copy_(self._view(x, run))
            if self._count(run) < run.length:
                copy[:, :, :, index, self._count(run) :] = 0.0
        return copy.flatten(0, 2)

    def put(self, whole: torch.Tensor, run: Run, rows: torch.Tensor) -> None:
        """Write a run of [B, T, H, D], or of [B, T, H] for D = 1, from [G * X, L, D]."""
        whole = whole.unsqueeze(-1) if whole.dim() == 3 else whole
        rows = rows.unflatten(0, (run.chunks, self.batch, self.heads))
        self._view(whole, run).copy_(self._tokens(rows, run))

    def _state(self, part: Part, state: torch.Tensor | None) -> torch.Tensor:
        """Copy the part of a state [B, H, K, V] to [X, K, V]; zeros for None."""
        copy = self.log_decay.new_zeros(self.sequences, self.dim, self.value_dim)
        return copy if state is None else copy.copy_(part.states(state).reshape(copy.shape))

    def _count(self, run: Run) -> int:
        """Return how many tokens each chunk of a run has."""
        return (run.tokens.stop - run.start) // run.chunks

    def _tokens(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """View the tokens there are in [G, B, H, L, D]."""
        return x[:, :, :, : self._count(run)]

    def _view(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """View a run of [B, T, H, D] as [G, B, H, L, D]."""
        return x[:, run.tokens].unflatten(1, (run.chunks, -1)).permute(1, 0, 3, 2, 4)

    def _documents(self, run: Run) -> Documents | None:
        """Return where documents lie in a run; None if none begins there."""
        if self.document_ids is None:
            return None
        ids, last = self.document_ids[:, run.tokens], max(run.start - 1, 0)
        before = self.document_ids[:, last : last + 1]
        if torch.equal(before, ids[:, -1:]):
            return None
        padding = ids[:, -1:].expand(-1, run.chunks * run.length - ids.shape[1])
        ids = torch.cat([before, ids, padding], 1)
        begins = ids[:, 1:] != ids[:, :-1]
        chunks = run.chunks, run.length
        ids, begins = (
            x.unflatten(1, chunks).transpose(0, 1).unsqueeze(2).expand(-1, -1, self.heads, -1).flatten(0, 2)
            for x in (ids[:, 1:], begins)
        )
        return Documents(ids, begins, begins.cumsum(-1) == 0)


def tokens_apart(inputs: Inputs) -> int:
    """Return how many tokens lie between two kept states: whole chunks, and more for larger states."""
    length = inputs.chunk_size or CHUNK
    return -(-max(APART, 2 * inputs.value.shape[-1]) // length) * length


def parts(inputs: Inputs) -> Iterator[Part]:
    """Split sequences so that a chunk of each of a part stays in cache."""
    batch, length, heads, dim = inputs.query.shape
    of_a_chunk = min(inputs.chunk_size or CHUNK, length) * (2 * dim + inputs.value.shape[-1])
    most = min(TOGETHER, max(1, torch.get_num_threads(), IN_CACHE // of_a_chunk))
    rows = max(1, most // heads)
    for first in range(0, batch, rows):
        for head in range(0, heads, most):
            yield Part(slice(first, first + rows), slice(head, head + most))
