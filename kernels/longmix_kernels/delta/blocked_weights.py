"""The weights between the tokens and states of a run of chunks, and their gradients.

The gradient of a log decay is the sum, over all rows and states after it and all columns and states before it, of
weight times gradient of weight. With halves these sums hold just such pairs. In a block that is not halved it is the
difference of what later rows and what later columns have, of which pairs of later tokens cancel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from longmix_kernels.delta.blocked_products import BLOCK_RANGE, Documents, Meeting, decay_products

SUBSTITUTED = 16
"""Rows whose weights among each other are inverted by substitution; larger inverses are merged from these."""


class StateWeights(NamedTuple):
    """What is needed to go from chunk to chunk, for N chunks of L tokens.

    Attributes:
        kept: [N, K, 1], or [N, 1, 1] for all channels: how much of the entering state is in the leaving one.
        entering: [N, R * L, K], what rows read the entering state with.
        writes: [N, P * L, K], what is written to the leaving state.
        inverse: [N, L, L], of 1 minus the weights of low-rank writes in low-rank reads; None without those.
        removing: [N, L, K], the inverse times the low-rank reads in `entering`; None likewise.
        kept_initial: like `kept`, of the initial state in the leaving one; None where none begins from it.
        initial: [N, R * L, K], what rows read the initial state with; None likewise.
    """

    kept: torch.Tensor
    entering: torch.Tensor
    writes: torch.Tensor
    inverse: torch.Tensor | None
    removing: torch.Tensor | None
    kept_initial: torch.Tensor | None
    initial: torch.Tensor | None


class ChunkWeights:
    """Weights of N chunks of L tokens, between R kinds of rows and P kinds of columns.

    Attributes:
        within: [N, R * L, P * L], of the columns of a chunk in its rows.
        of_states: those of states.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        columns: torch.Tensor,
        log_decay: torch.Tensor,
        outputs: bool,
        documents: Documents | None,
        has_state: bool,
        space: Callable[..., torch.Tensor],
        constant: Callable[[str, Callable[[], torch.Tensor]], torch.Tensor],
    ) -> None:
        """Compute the weights.

        Args:
            rows: [N, R, L, K], queries if `outputs`, then low-rank reads if there are any.
            columns: [N, P, L, K], keys, then low-rank writes if there are any.
            log_decay: [N, L, K], or [N, L, 1] for all channels; changed.
            outputs: whether there are queries.
            documents: where documents begin; None for nowhere.
            has_state: whether they begin from another state than zero.
            space: gives memory to compute in.
            constant: makes a tensor that all runs share, or gives it again, by a name.
        """
        self.rows, self.columns, self.outputs, self.documents = rows, columns, outputs, documents
        self.space, self.constant = space, constant
        self.count, self.length, decays = log_decay.shape
        self.per_head = decays == 1
        self.low_rank = columns.shape[1] == 2
        halve = not max(abs(bound.item()) for bound in log_decay.aminmax()) * self.length <= BLOCK_RANGE
        self.meetings, self.prefix, self.suffix = decay_products(log_decay.exp_(), halve, documents, space)
        self.within = space("within", self.count, rows.shape[1] * self.length, columns.shape[1] * self.length)
        if rows.shape[1]:
            self._meet()
        self.of_states = self._of_states(has_state)
        if self.low_rank:
            inverse = space("inverse", self.count, self.length, self.length)
            _invert(self.within[:, -self.length :, self.length :], inverse)
            reads = self.of_states.entering[:, -self.length :]
            removing = torch.bmm(inverse, reads, out=space("removing", *reads.shape))
            self.of_states = self.of_states._replace(inverse=inverse, removing=removing)

    def _meet(self) -> None:
        """Compute the weights of columns in rows."""
        if len(self.meetings) > 1:
            self.within.zero_()
        for index, meeting in enumerate(self.meetings):
            rows, columns = meeting.rows(self.rows), meeting.columns(self.columns)
            reads = self._read(rows, meeting.row_factor, self.space(f"rows_{index}", *rows.shape))
            writes = self.space(f"columns_{index}", *columns.shape)
            torch.mul(columns, meeting.column_factor.unsqueeze(2), out=writes)
            meeting.reads, meeting.writes = reads.flatten(2, 3).flatten(0, 1), writes.flatten(2, 3).flatten(0, 1)
            if meeting.size == self.length:
                torch.bmm(meeting.reads, meeting.writes.mT, out=self.within)
            else:
                pairs = meeting.pairs(self.within, self.length)
                pairs.copy_(torch.bmm(meeting.reads, meeting.writes.mT).view(pairs.shape))
        self.hide(self.within)

    def hide(self, within: torch.Tensor) -> None:
        """Set to zero what rows do not see of [N, R * L, P * L]."""
        within *= self.constant(f"seen {self.outputs} {self.length}", self._seen)
        if self.documents is not None:
            kinds = within.unflatten(1, (-1, self.length)).unflatten(3, (-1, self.length))
            kinds *= self._same(self.documents)[:, None, :, None]

    def _seen(self) -> torch.Tensor:
        """Return which columns rows see in their chunk, [R * L, P * L]."""
        return torch.cat([kind.T for kind in self._row_kinds(self.length)]).repeat(1, self.columns.shape[1])

    def _of_states(self, has_state: bool) -> StateWeights:
        """Compute the weights of states in rows, and of columns and states in states, but no inverse."""
        reads = self._read(self.rows, self.prefix, self.space("reads", *self.rows.shape))
        writes = torch.mul(self.columns, self.suffix.unsqueeze(1), out=self.space("writes", *self.columns.shape))
        self.reads, kept = reads.flatten(1, 2), self.prefix[:, -1].unsqueeze(-1)
        if self.documents is None:
            return StateWeights(kept, self.reads, writes.flatten(1, 2), None, None, None, None)
        self._restart(reads, self.rows, self.documents)
        writes *= self._open(self.documents)
        carried = self._carried(self.documents)
        ending = carried[:, 0, -1:]
        entering, kept_initial, initial = (reads * carried).flatten(1, 2), None, None
        if has_state:
            kept_initial, initial = kept * (1.0 - ending), self.reads - entering
        return StateWeights(kept * ending, entering, writes.flatten(1, 2), None, None, kept_initial, initial)

    def mask_state_grads(self, grad_reads: torch.Tensor, grad_writes: torch.Tensor) -> None:
        """Set to zero where rows do not read the entering state, or columns do not write to the leaving one."""
        if self.documents is not None:
            grad_reads.unflatten(1, (-1, self.length)).mul_(self._carried(self.documents))
            grad_writes.unflatten(1, (-1, self.length)).mul_(self._open(self.documents))

    def mask_initial(self, grad_reads: torch.Tensor) -> torch.Tensor:
        """Set to zero where rows [N, R * L, K] do not read the initial state."""
        if self.documents is not None:
            grad_reads.unflatten(1, (-1, self.length)).mul_(1.0 - self._carried(self.documents))
        return grad_reads

    def backward(
        self, grad_within: torch.Tensor, grad_reads: torch.Tensor, grad_writes: torch.Tensor, kept_terms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of rows, columns and log decays.

        Args:
            grad_within: of `within`, zero where rows do not see columns; changed.
            grad_reads: [N, R * L, K], of the weight with which rows read the state that they read.
            grad_writes: of what is written to the leaving state.
            kept_terms: [N, K], of how much is kept of states, times that.
        """
        length = self.length
        same = None if self.documents is None else self._same(self.documents)
        grad_decay = self._decay_terms(self.reads, grad_reads, self._sums(self._row_kinds, length, same))
        grad_decay += self._decay_terms(self.of_states.writes, grad_writes, self._sums(self._column_kinds, length))
        passed = kept_terms.unsqueeze(1)
        if self.per_head:
            passed = passed.sum(-1, keepdim=True)
        grad_decay += passed if self.documents is None else passed * self._open(self.documents)[:, 0]

        kinds = grad_reads.unflatten(1, (-1, length))
        grad_rows = self._read(kinds, self.prefix, self.space("grad_rows_found", *self.rows.shape))
        if self.documents is not None:
            self._restart(grad_rows, kinds, self.documents)
        grad_columns = self.space("grad_columns", *self.columns.shape)
        torch.mul(grad_writes.unflatten(1, (-1, length)), self.suffix.unsqueeze(1), out=grad_columns)
        self._own_pairs(grad_within, grad_rows, grad_columns)
        for meeting in self.meetings:
            if meeting.size > 1 or meeting.halves:
                self._separate(meeting, grad_within, grad_rows, grad_columns, grad_decay)
        return grad_rows, grad_columns, grad_decay

    def _own_pairs(self, grad_within: torch.Tensor, grad_rows: torch.Tensor, grad_columns: torch.Tensor) -> None:
        """Take queries with columns of their own token out of `grad_within`, and add what they give both.

        No decay lies between; left in, they would hide the smaller others in the gradient of a decay.
        """
        for index in range(self.columns.shape[1]):
            start = index * self.length
            own = grad_within[:, : self.length, start : start + self.length].diagonal(0, 1, 2)
            factor = own.unsqueeze(-1).clone()
            grad_rows[:, 0].addcmul_(self.columns[:, index], factor)
            grad_columns[:, index].addcmul_(self.rows[:, 0], factor)
            own.zero_()

    def _separate(
        self,
        meeting: Meeting,
        grad_within: torch.Tensor,
        grad_rows: torch.Tensor,
        grad_columns: torch.Tensor,
        grad_decay: torch.Tensor,
    ) -> None:
        """Add what the pairs of a meeting give rows, columns and log decays."""
        pairs = meeting.pairs(grad_within, self.length).flatten(2, 3).flatten(3, 4).flatten(0, 1)
        grad_reads, grad_writes = torch.bmm(pairs, meeting.writes), torch.bmm(pairs.mT, meeting.reads)
        if meeting.halves:
            row_sums = self._sums(self._row_kinds, meeting.size)
            column_sums = self._sums(self._column_kinds, meeting.size)
        else:
            same = None if self.documents is None else self._same(self.documents)
            row_sums = self._sums(self._row_kinds, meeting.size, same)
            column_sums = self._sums(self._later_columns, meeting.size, same)
        rows, columns = meeting.rows(grad_decay.unsqueeze(1)), meeting.columns(grad_decay.unsqueeze(1))
        rows += self._decay_terms(meeting.reads, grad_reads, row_sums).view(rows.shape)
        columns += self._decay_terms(meeting.writes, grad_writes, column_sums).view(columns.shape)
        rows, columns = meeting.rows(grad_rows), meeting.columns(grad_columns)
        grad_reads = grad_reads.view(rows.shape)
        rows += self._read(grad_reads, meeting.row_factor, grad_reads)
        columns.addcmul_(grad_writes.view(columns.shape), meeting.column_factor.unsqueeze(2))

    def _decay_terms(self, weights: torch.Tensor, grads: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Return `sums` [1 or N, L, kinds * L] of weights times gradients [N, kinds * L, K]; over K for one decay."""
        # What was written to states is no longer needed.
        terms = torch.mul(weights, grads, out=self.space("written", *weights.shape))
        if self.per_head:
            terms = terms.sum(-1, keepdim=True)
        return torch.bmm(sums.expand(len(terms), -1, -1), terms)

    def _row_kinds(self, size: int) -> list[torch.Tensor]:
        """Return for each kind of row which rows a token's decay, or its column, is in, [size, size]."""
        ones = self.rows.new_ones(size, size)
        return ([ones.triu()] if self.outputs else []) + ([ones.triu(1)] if self.low_rank else [])

    def _column_kinds(self, size: int) -> list[torch.Tensor]:
        """Return for each kind of column which columns a token's decay is in, [size, size]."""
        return [self.rows.new_ones(size, size).tril(-1)] * self.columns.shape[1]

    def _later_columns(self, size: int) -> list[torch.Tensor]:
        """Return -1 for each kind of column which are the token's own and later ones, [size, size]."""
        return [-self._row_kinds(size)[0]] * self.columns.shape[1]

    def _sums(
        self, kinds: Callable[[int], list[torch.Tensor]], size: int, same: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Join what to sum, [1, size, kinds * size], or only within documents, [N, size, kinds * size]."""
        sums = self.constant(f"{kinds.__name__} {self.outputs} {size}", lambda: torch.cat(kinds(size), 1)[None])
        return sums if same is None else sums * same.repeat(1, 1, sums.shape[-1] // size)

    def _read(self, rows: torch.Tensor, prefix: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Multiply rows [..., R, L, K] by products [..., L, K] up to them; low-rank reads by those up to one before."""
        if self.outputs:
            torch.mul(rows[..., 0, :, :], prefix, out=out[..., 0, :, :])
        if self.low_rank:
            torch.mul(rows[..., -1, 1:, :], prefix[..., :-1, :], out=out[..., -1, 1:, :])
            out[..., -1, 0, :] = rows[..., -1, 0, :]
        return out

    def _restart(self, reads: torch.Tensor, rows: torch.Tensor, documents: Documents) -> None:
        """Let low-rank reads [N, R, L, K] at the beginning of a document see the initial state as it is."""
        if self.low_rank:
            reads[:, -1] = torch.where(documents.begins.unsqueeze(-1), rows[:, -1], reads[:, -1])

    def _same(self, documents: Documents) -> torch.Tensor:
        """Return which tokens are of the same document, [N, L, L]."""
        return (documents.ids.unsqueeze(-1) == documents.ids.unsqueeze(-2)).to(self.rows.dtype)

    def _carried(self, documents: Documents) -> torch.Tensor:
        """Return which rows read the entering state, [N, 1, L, 1]."""
        return documents.carried[:, None, :, None].to(self.rows.dtype)

    def _open(self, documents: Documents) -> torch.Tensor:
        """Return which tokens are of the document that the leaving state is from, [N, 1, L, 1]."""
        return (documents.ids == documents.ids[:, -1:])[:, None, :, None].to(self.rows.dtype)


def _invert(weights: torch.Tensor, out: torch.Tensor) -> None:
    """Invert 1 minus weights [N, L, L] that are zero but below the diagonal."""
    size = min(SUBSTITUTED, weights.shape[-1])
    blocks = _diagonal_blocks(weights, size)
    unit = torch.eye(size, dtype=weights.dtype, device=weights.device).expand(blocks.shape)
    out.zero_()
    _diagonal_blocks(out, size).copy_(torch.linalg.solve_triangular(-blocks, unit, upper=False, unitriangular=True))
    while size < weights.shape[-1]:
        blocks, crossing = _diagonal_blocks(out, 2 * size), _diagonal_blocks(weights, 2 * size)[..., size:, :size]
        blocks[..., size:, :size] = blocks[..., size:, size:] @ (crossing @ blocks[..., :size, :size])
        size *= 2


def _diagonal_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """View those of [N, L, L] as [N, blocks, size, size]."""
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(0, 1, 3).permute(0, 3, 1, 2)
