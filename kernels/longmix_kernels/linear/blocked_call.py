"""The inputs of a blocked call: which chunks are computed together, and how tensors are brought into that form."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch

from longmix_kernels.linear.blocked_weights import LONGEST_CHUNK, ChunkWeights

Tensors = tuple[torch.Tensor, ...]

CHUNK = 64
IN_CACHE = 2**18
"""How many elements of queries, keys and values to compute with at a time for each thread."""


class Run(NamedTuple):
    """Consecutive chunks of equal length."""

    start: int
    chunks: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.chunks * self.length)


class BlockedCall:
    """A call, seen as X = B * H sequences of chunks; a run of G chunks of L tokens is copied to [G * X, L, D]."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_decay: torch.Tensor,
        log_input: torch.Tensor | None,
        memory: torch.Tensor | None,
        normalizer: torch.Tensor | None,
        log_scale: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        normalize: bool,
        scale: float,
        chunk_size: int | None,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.log_decay, self.log_input, self.document_ids = log_decay, log_input, document_ids
        self.normalize, self.scale, self.chunk_size = normalize, scale, chunk_size
        self.batch, self.length, self.heads, self.dim = query.shape
        self.value_dim, self.sequences = value.shape[-1], self.batch * self.heads
        self.has_state = memory is not None
        self.initial = self.join_state(memory, normalizer)
        zero = log_decay.new_zeros(self.sequences)
        self.initial_scale = (zero if log_scale is None else log_scale.reshape(-1)).double()
        self._space: dict[str, torch.Tensor] = {}

    def runs(self) -> Iterator[Run]:
        """Runs of chunks that cover all tokens; what is left over makes one shorter chunk."""
        length = min(self.chunk_size or CHUNK, LONGEST_CHUNK, self.length)
        of_a_chunk = length * self.sequences * (2 * self.dim + self.value_dim)
        most = max(1, IN_CACHE * torch.get_num_threads() // of_a_chunk)
        start = 0
        while start < self.length:
            chunks = min(most, (self.length - start) // length)
            run = Run(start, chunks, length) if chunks else Run(start, 1, self.length - start)
            yield run
            start = run.tokens.stop

    def space(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory to compute in, the same for each run: to touch new memory costs more than to compute in it."""
        size, held = prod(shape), self._space.get(name)
        if held is None or held.numel() < size:
            held = self._space[name] = self.log_decay.new_empty(size, dtype=dtype)
        return held[:size].view(shape)

    def weights(self, run: Run, entering_scale: torch.Tensor, row_scale: torch.Tensor | None) -> ChunkWeights:
        """The weights of a run that a state of this scale [X] enters; `row_scale` [B, T, H] if it is known."""
        decay = self.take_gate(self.log_decay, run)
        gate = None if self.log_input is None else self.take_gate(self.log_input, run)
        if not self.normalize:
            rows = decay.new_zeros(decay.shape, dtype=torch.float64)
        else:
            rows = None if row_scale is None else self.take_gate(row_scale, run).double()
        return ChunkWeights(decay, gate, self._begins(run), entering_scale, self.initial_scale, rows)

    def restarts_matter(self, weights: ChunkWeights) -> bool:
        """Whether documents begin here from another state than zero."""
        return self.has_state and weights.read_initial is not None

    def take(self, x: torch.Tensor, run: Run, name: str, ones: bool = False) -> torch.Tensor:
        """Copy a run of [B, T, H, D] to [G * X, L, D], or to D + 1 with a 1 at the end of each row."""
        view = self._view(x, run)
        copy = self.space(name, *view.shape[:-1], x.shape[-1] + ones)
        copy[..., : x.shape[-1]] = view
        if ones:
            copy[..., -1] = 1.0
        return copy.view(-1, run.length, copy.shape[-1])

    def take_gate(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """Copy a run of [B, T, H] to [G, X, L]."""
        return self._view(x, run).reshape(run.chunks, self.sequences, run.length)

    def put(self, whole: torch.Tensor, run: Run, rows: torch.Tensor) -> None:
        """Write a run of [B, T, H, ...] from [G * X, L, ...] or [G, X, L]."""
        view = self._view(whole, run)
        view.copy_(rows.view(view.shape))

    def join_state(self, memory: torch.Tensor | None, normalizer: torch.Tensor | None) -> torch.Tensor:
        """Memory and normaliser, zero where None, as [X, Dk, Dv], or Dv + 1 if normalised."""
        state = self.log_decay.new_zeros(self.sequences, self.dim, self.value_dim + self.normalize)
        if memory is not None:
            state[..., : self.value_dim] = memory.flatten(0, 1)
        if normalizer is not None:
            state[..., -1] = normalizer.flatten(0, 1)
        return state

    def split_state(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Undo `join_state`; without a normaliser the second is empty. Copies."""
        state = state.view(self.batch, self.heads, *state.shape[1:])
        if self.normalize:
            return state[..., :-1].contiguous(), state[..., -1].contiguous()
        return state.clone(), state.new_empty(0)

    def _view(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """View a run of [B, T, H, ...] as [G, B, H, L, ...]."""
        return x[:, run.tokens].unflatten(1, (run.chunks, run.length)).transpose(0, 1).transpose(2, 3)

    def _begins(self, run: Run) -> torch.Tensor | None:
        """Where a document begins other than at the first token, [G, X, L]; None for nowhere."""
        if self.document_ids is None:
            return None
        ids = self.document_ids[:, max(run.start - 1, 0) : run.tokens.stop]
        ids = torch.cat([ids[:, :1], ids], 1) if run.start == 0 else ids
        begins = ids[:, 1:] != ids[:, :-1]
        return self.take_gate(begins.unsqueeze(-1).expand(-1, -1, self.heads), run) if begins.any() else None
