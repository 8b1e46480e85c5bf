"""The weights between the tokens and states of a run of chunks, from their gates.

With b_t the sum of log decays from the chunk's first token to t, and m the log scales, row t

    takes token j of its chunk with      exp(b_t - b_j + i_j - m_t)
    reads the state entering it with     exp(b_t + m_in - m_t)
    writes to the state leaving it with  exp(b_end - b_t + i_t - m_out)

A document that begins within a chunk reads and passes on the initial state instead of the entering one.

Sums of log decays may be large where their differences matter, such as after one decay of -1e4. They are therefore kept
as whole numbers and a rest, [2, ...] in float64: whole numbers add without rounding.
"""

from copy import copy
from typing import NamedTuple

import torch

_LOWEST = -(2.0**14)
"""What lower gates are taken for: exp of it is 0, and sums over `LONGEST_CHUNK` remain whole in float32."""

LONGEST_CHUNK = 1024


class InitialWeights(NamedTuple):
    """Weights of the initial state where documents begin.

    Attributes:
        read: [G, X, L], in each row.
        kept: [G, X], in the state leaving each chunk.
    """

    read: torch.Tensor
    kept: torch.Tensor


class ChunkWeights:
    """Weights of G chunks of L tokens for each of X sequences.

    Attributes:
        row_scale: float64 [G, X, L], m_t; zero without a normaliser.
        scale: float64 [G + 1, X], of the state entering each chunk and of the one leaving the last.
        kept: [G, X], of the entering state in the leaving one.
        read: [G, X, L], of the entering state in each row.
        write: [G, X, L], of each token in the leaving state.
        initial: of the initial state; None where no document begins.
    """

    def __init__(
        self,
        log_decay: torch.Tensor,
        log_input: torch.Tensor | None,
        begins: torch.Tensor | None,
        entering_scale: torch.Tensor,
        initial_scale: torch.Tensor,
        row_scale: torch.Tensor | None,
    ) -> None:
        """Compute all that is no larger than the gates.

        Args:
            log_decay, log_input: [G, X, L].
            begins: bool [G, X, L], where a document begins; None for nowhere.
            entering_scale, initial_scale: float64 [X], of the state entering the run and of the initial one.
            row_scale: float64 [G, X, L]; None to find the largest weight of each row.
        """
        self.dtype = log_decay.dtype
        decay = _whole_and_rest(log_decay)
        self.total = decay.cumsum(-1)
        self.column = -self.total if log_input is None else _whole_and_rest(log_input) - self.total
        self.document: torch.Tensor | None = None
        since = self.total
        if begins is not None:
            self.document = document = begins.cumsum(-1)
            self.carried, self.open = document == 0, document == document[..., -1:]
            first = torch.arange(begins.shape[-1], device=begins.device).where(begins, 0).cummax(-1).values
            since = since - (since - decay).gather(-1, first.expand_as(since))
        since = since.sum(0)
        if row_scale is None:
            row_scale = self._largest(since, entering_scale, initial_scale)
        self.row_scale = row_scale
        self.scale = torch.cat([entering_scale[None], row_scale[..., -1]])

        end = self.total[..., -1:] + self.column
        self.write = end.sum(0).sub_(self.scale[1:, :, None]).exp_().to(self.dtype)
        source = self._source(self.scale[:-1], initial_scale)
        read = since.add_(source).sub_(row_scale).exp_().to(self.dtype)
        # The last row has the scale of the leaving state, hence the same share of what came before.
        self.read, self.kept, self.initial = read, read[..., -1], None
        if begins is not None:
            # Not a product: what earlier documents would write may be infinite.
            self.write.masked_fill_(~self.open, 0.0)
            from_initial = read.masked_fill(self.carried, 0.0)
            self.initial = InitialWeights(from_initial, from_initial[..., -1])
            self.read = read.masked_fill_(~self.carried, 0.0)

    def part(self, chunks: slice) -> "ChunkWeights":
        """Return the weights of some of the chunks."""
        part = copy(self)
        part.total, part.column = self.total[:, chunks], self.column[:, chunks]
        part.row_scale, part.scale = self.row_scale[chunks], self.scale[chunks.start : chunks.stop + 1]
        part.read, part.write, part.kept = self.read[chunks], self.write[chunks], self.kept[chunks]
        if self.document is not None and self.initial is not None:
            part.document, part.carried, part.open = self.document[chunks], self.carried[chunks], self.open[chunks]
            part.initial = InitialWeights(self.initial.read[chunks], self.initial.kept[chunks])
        return part

    def within(self, out: torch.Tensor) -> torch.Tensor:
        """Return the weights of a chunk's tokens in its rows, [G * X, L, L]; zero where a row sees no token."""
        row = _split(torch.stack([self.total[0], self.total[1] - self.row_scale]), self.dtype)
        column = _split(self.column, self.dtype)
        weights = out.view(*row.shape[1:], row.shape[-1])
        torch.add(row[0].unsqueeze(-1), column[0].unsqueeze(-2), out=weights)
        weights.add_(row[1].unsqueeze(-1)).add_(column[1].unsqueeze(-2)).exp_()
        if self.document is not None:
            weights.masked_fill_(self.document.unsqueeze(-1) != self.document.unsqueeze(-2), 0.0)
        weights.tril_()
        return out

    def grad_gates(
        self, terms: torch.Tensor, read_terms: torch.Tensor, write_terms: torch.Tensor, passed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of log_decay and log_input [G, X, L], from weights times their gradients.

        Args:
            terms: [G * X, L, L], of each token in each row of its chunk; overwritten.
            read_terms: [G, X, L], of the entering or initial state in each row.
            write_terms: [G, X, L], of each token in the leaving state.
            passed: [G, X], of the entering or initial state in the leaving one.
        """
        written = terms.sum(-2).view_as(write_terms) + write_terms
        # A token's own row has no decay between; left out, it cannot hide the smaller others.
        terms.diagonal(0, 1, 2).zero_()
        crossing = terms.sum(-1).sub_(terms.sum(-2)).view_as(read_terms).add_(read_terms).double()
        write_terms = write_terms.double()
        sums = crossing.cumsum(-1)
        later = write_terms.cumsum(-1).sub_(write_terms).add_(passed.unsqueeze(-1))
        if self.document is None:
            earlier = sums[..., -1:] - sums
        else:
            place = torch.arange(sums.shape[-1], device=sums.device).expand_as(sums)
            ends = self.document[..., 1:] != self.document[..., :-1]
            last = torch.cat([place[..., :-1].where(ends, place.shape[-1] - 1), place[..., -1:]], -1)
            earlier = sums.gather(-1, last.flip(-1).cummin(-1).values.flip(-1)) - sums
            later = later * self.open
        return earlier.add_(crossing).add_(later).to(self.dtype), written

    def _source(self, entering: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """Return the log scale of the state that each row reads, [..., X, L], given the entering one [..., X]."""
        source = entering.unsqueeze(-1)
        return source if self.document is None else source.where(self.carried, initial[:, None])

    def _largest(self, since: torch.Tensor, entering: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """Return the largest logarithm of a weight in each row, rounded to the dtype of the inputs, as float64."""
        highest = column = self.column.sum(0)
        if self.document is not None:
            # Later documents are lifted above earlier ones by a constant, since what comes later must not matter.
            highest = column + self.document * (-4.0 * _LOWEST * column.shape[-1])
        indices = highest.cummax(-1).indices
        highest = column.gather(-1, indices).add_(self.total.sum(0))
        scales = [entering]
        for chunk in range(len(since) - 1):
            source = scales[-1]
            if self.document is not None:
                source = source.where(self.carried[chunk, :, -1], initial)
            scales.append(torch.maximum(since[chunk, :, -1] + source, highest[chunk, :, -1]))
        source = self._source(torch.stack(scales), initial)
        return torch.maximum(since + source, highest).to(self.dtype).double()


def _whole_and_rest(gate: torch.Tensor) -> torch.Tensor:
    gate = gate.clamp(min=_LOWEST)
    whole = gate.round()
    return torch.stack([whole, gate - whole]).double()


def _split(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a sum of whole numbers and rest to such a pair of a dtype, the rest at most 1/2."""
    more = x[1].round()
    return torch.stack([x[0] + more, x[1] - more]).to(dtype)
