"""Compute what far keys of one document give its queries, through sums over its blocks.

With rows r_j = [v_j, 1], a scan over blocks gives S and Z, side by side, that enter each block of queries. With rows
[dO_i, -D_i], the same scan in reverse gives G and -h. Sums are stored divided by exp(scale), feature by feature. The
scale is the largest logarithm that entered, so at least one key counts with weight 1, and none with more.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from longmix_kernels.scatter.bounds import Span
from longmix_kernels.scatter.inputs import Inputs
from longmix_kernels.scatter.state import lowest

Sums = tuple[torch.Tensor, torch.Tensor]
"""A scale [..., m], and the sums [..., m, W] divided by its exponential."""

IN_CACHE = 2**18
"""How many numbers each thread computes with at a time, so that they stay in its cache."""


@dataclass(frozen=True)
class _Blocks:
    """Blocks of a document in tensors [B, T, H, W], which become [G * X, R, W] for G blocks and X = B * Hkv.

    R counts the tokens of a block for each query head of a key head in turn. Rows that a block lacks are filled.

    Attributes:
        batch: the batch rows.
        origin: the row at which block 0 begins; below 0 if the tensor begins later.
        stop: one past the document's last row.
        size: tokens of a block.
        key_heads: how many key heads there are.
    """

    batch: slice
    origin: int
    stop: int
    size: int
    key_heads: int

    def take(self, x: torch.Tensor, blocks: range, dtype: torch.dtype, fill: float = 0.0) -> torch.Tensor:
        """Return a copy of the blocks, [G * X, R, W], which may be written to.

        Args:
            x: [B, T, H, W].
            blocks: the numbers of the blocks.
            dtype: the dtype of the copy.
            fill: the number in rows that a block lacks.
        """
        rows, before, after = self._rows(blocks)
        taken = x[self.batch, rows].to(dtype)
        if before or after:
            taken = F.pad(taken, (0, 0, 0, 0, before, after), value=fill)
        split = taken.unflatten(1, (len(blocks), self.size)).unflatten(3, (self.key_heads, -1))
        ordered = split.permute(1, 0, 3, 4, 2, 5).clone(memory_format=torch.contiguous_format)
        return ordered.flatten(3, 4).flatten(0, 2)

    def view(self, x: torch.Tensor, blocks: range) -> torch.Tensor:
        """Return a view of the rows of the blocks, [B, rows, H, W]."""
        return x[self.batch, self._rows(blocks)[0]]

    def rows(self, taken: torch.Tensor, blocks: range) -> torch.Tensor:
        """Return what `take` took in the order of rows, [B, rows, H, W]."""
        rows, before, _ = self._rows(blocks)
        split = taken.unflatten(1, (-1, self.size)).unflatten(0, (len(blocks), -1, self.key_heads))
        every = split.permute(1, 0, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
        return every[:, before : before + rows.stop - rows.start]

    def _rows(self, blocks: range) -> tuple[slice, int, int]:
        """Return the rows of the blocks that exist, and how many are missing before and after these."""
        start, stop = (self.origin + number * self.size for number in (blocks.start, blocks.stop))
        there = slice(max(start, 0), min(stop, self.stop))
        return there, there.start - start, stop - there.stop


class FarSpan:
    """What the queries of one document read of its far keys, forward and backward.

    Args:
        span: the document.
        inputs: the inputs of the call, with features.
    """

    def __init__(self, span: Span, inputs: Inputs) -> None:
        value, query_features, key_features = inputs.value, inputs.query_features, inputs.key_features
        block_size, past_blocks = inputs.block_size, inputs.past_blocks
        assert query_features is not None and key_features is not None
        self.value, self.query_features, self.key_features = value, query_features, key_features
        self.exact = query_features.dtype
        self.batch, self.past_blocks = span.batch, past_blocks
        keys, heads, features = key_features.shape[1:]
        offset = keys - query_features.shape[1]
        blocks = -(-(span.stop - span.start) // block_size)
        first = max((offset - span.start) // block_size, 0 if span.with_state else past_blocks + 1)
        self.query_blocks = range(first, blocks)
        self.key_blocks = range(max(blocks - 1 - past_blocks, 0))
        self.queries = _Blocks(span.batch, span.start - offset, span.stop - offset, block_size, heads)
        self.keys = _Blocks(span.batch, span.start, span.stop, block_size, heads)
        shape = (span.batch.stop - span.batch.start) * heads, features, value.shape[3] + 1
        nothing = key_features.new_full(shape[:2], lowest(self.exact))
        self.empty = nothing, key_features.new_zeros(shape)
        self.initial: Sums | None = None
        if span.with_state:
            state = inputs.memory, inputs.normalizer, inputs.log_scale
            memory, normalizer, log_scale = (x[span.batch].flatten(0, 1) for x in state if x is not None)
            self.initial = log_scale, torch.cat([memory, normalizer.unsqueeze(-1)], -1)
        in_cache = IN_CACHE * torch.get_num_threads() // (shape[0] * block_size * sum(shape[1:]))
        self.at_a_time = max(1, in_cache if value.device.type == "cpu" else blocks)

    def merge_into(self, output: torch.Tensor, logsumexp: torch.Tensor) -> None:
        """Merge what the far keys give into output and logsumexp of the exact part, in place.

        Args:
            output: [B, Tq, Hq, Dv].
            logsumexp: [B, Tq, Hq].
        """
        scales, sums = self._entering()
        logsumexp = logsumexp.unsqueeze(-1)
        for run in self._runs(self.query_blocks):
            entering = _part(run, self.query_blocks, scales, sums)
            logs = self._logs(run).add_(entering[0].unsqueeze(1))
            highest = logs.amax(-1, keepdim=True)
            read = torch.bmm(logs.sub_(highest).exp_(), entering[1])
            own, mixed = (self.queries.take(x, run, self.exact) for x in (logsumexp, output))
            total = torch.logaddexp(own, highest + read[..., -1:].log())
            mixed.mul_((own - total).exp_()).add_(read[..., :-1].mul_(highest.sub_(total).exp_()))
            for whole, rows in ((output, mixed), (logsumexp, total)):
                self.queries.view(whole, run).copy_(self.queries.rows(rows, run))

    def backward_into(
        self,
        grad_rows: torch.Tensor,
        logsumexp: torch.Tensor,
        grad_value: torch.Tensor,
        grad_query_features: torch.Tensor,
        grad_key_features: torch.Tensor,
        *grad_initial: torch.Tensor,
    ) -> None:
        """Write the gradients of features and initial state, and add to that of the values.

        Args:
            grad_rows: [B, Tq, Hq, Dv + 1], the gradient of the output and -D.
            logsumexp: [B, Tq, Hq], the merged one.
            grad_value: [B, Tk, Hkv, Dv], which is added to.
            grad_query_features, grad_key_features: in the shapes of the features, zero before.
            grad_initial: the gradients of memory, normalizer and log scale, to be written if there is a state.
        """
        scales, sums = self._entering()
        leaving = [x.new_empty(len(self.key_blocks), *x.shape) for x in self.empty]
        total = self.empty
        for run in self._runs(self.query_blocks, reverse=True):
            entering = _part(run, self.query_blocks, scales, sums)
            grads = self.queries.take(grad_rows, run, self.exact)
            logs = self._logs(run).sub_(self.queries.take(logsumexp.unsqueeze(-1), run, self.exact))
            found = torch.bmm(grads, entering[1].mT).mul_((logs + entering[0].unsqueeze(1)).exp_())
            self.queries.view(grad_query_features, run).copy_(self.queries.rows(found, run))
            parts = _by_block(_block_sums(logs, grads), run)
            for block, part in zip(reversed(run), reversed(parts), strict=True):
                total = _add(total, part)
                self._leave(total, leaving, block - self.past_blocks - 1)
        for block in range(min(self.query_blocks.start - self.past_blocks - 1, len(self.key_blocks))):
            self._leave(total, leaving, block)
        self._backward_keys(leaving, grad_value, grad_key_features)
        if self.initial is not None:
            self._backward_initial(total, *grad_initial)

    def _backward_keys(
        self, leaving: list[torch.Tensor], grad_value: torch.Tensor, grad_key_features: torch.Tensor
    ) -> None:
        for run in self._runs(self.key_blocks):
            scale, sums = _part(run, self.key_blocks, *leaving)
            weights = self.keys.take(self.key_features, run, self.exact).add_(scale.unsqueeze(1)).exp_()
            found = torch.bmm(self._values(run), sums.mT).mul_(weights)
            self.keys.view(grad_key_features, run).copy_(self.keys.rows(found, run))
            found = torch.bmm(weights, sums[..., :-1])
            self.keys.view(grad_value, run).add_(self.keys.rows(found, run))

    def _backward_initial(
        self, total: Sums, grad_memory: torch.Tensor, grad_normalizer: torch.Tensor, grad_log_scale: torch.Tensor
    ) -> None:
        assert self.initial is not None
        scale, sums = self.initial
        grad = total[1] * (total[0] + scale).exp().unsqueeze(-1)
        grad_memory, grad_normalizer, grad_log_scale = (
            x[self.batch].flatten(0, 1) for x in (grad_memory, grad_normalizer, grad_log_scale)
        )
        grad_memory.copy_(grad[..., :-1])
        grad_normalizer.copy_(grad[..., -1])
        grad_log_scale.copy_((grad * sums).sum(-1))

    def _entering(self) -> Sums:
        """Return the sums that each of N blocks of queries reads, [N, X, m] and [N, X, m, Dv + 1]."""
        total = self.empty if self.initial is None else self.initial
        found = [x.new_empty(len(self.query_blocks), *x.shape) for x in total]
        parts = self._key_sums()
        for block in range(self.query_blocks.stop):
            if block in self.query_blocks:
                for every, x in zip(found, total, strict=True):
                    every[block - self.query_blocks.start] = x
            if block - self.past_blocks in self.key_blocks:
                total = _add(total, next(parts))
        return found[0], found[1]

    def _key_sums(self) -> Iterator[Sums]:
        """Yield the sums of each block of keys, [X, m] and [X, m, Dv + 1]."""
        for run in self._runs(self.key_blocks):
            logs = self.keys.take(self.key_features, run, self.exact)
            yield from _by_block(_block_sums(logs, self._values(run)), run)

    def _values(self, run: range) -> torch.Tensor:
        return F.pad(self.keys.take(self.value, run, self.exact), (0, 1), value=1.0)

    def _logs(self, run: range) -> torch.Tensor:
        """Return the logarithms of the query features of some blocks."""
        return self.queries.take(self.query_features, run, self.exact, fill=lowest(self.exact))

    def _leave(self, total: Sums, leaving: list[torch.Tensor], block: int) -> None:
        if block in self.key_blocks:
            for every, x in zip(leaving, total, strict=True):
                every[block] = x

    def _runs(self, blocks: range, reverse: bool = False) -> Iterator[range]:
        """Yield runs of blocks that stay in cache."""
        starts = blocks[:: self.at_a_time]
        for start in reversed(starts) if reverse else starts:
            yield range(start, min(start + self.at_a_time, blocks.stop))


def _block_sums(logs: torch.Tensor, rows: torch.Tensor) -> Sums:
    """Return the sums over the rows [N, R, W] with weights exp(logs), logs [N, R, m]."""
    scale = logs.amax(1)
    return scale, torch.bmm((logs - scale.unsqueeze(1)).exp_().mT, rows)


def _add(first: Sums, second: Sums) -> Sums:
    """Return the total of two sums of different scales."""
    scale = torch.maximum(first[0], second[0])
    kept, added = ((x[0] - scale).exp_().unsqueeze(-1) for x in (first, second))
    return scale, torch.addcmul(first[1] * kept, second[1], added)


def _by_block(sums: Sums, run: range) -> list[Sums]:
    """Return the sums of each block of a run, one pair for a block."""
    return list(zip(*(x.unflatten(0, (len(run), -1)) for x in sums), strict=True))


def _part(run: range, blocks: range, scales: torch.Tensor, sums: torch.Tensor) -> Sums:
    """Return the part of the sums of `blocks` that a run of them reads, [G * X, m] and [G * X, m, W]."""
    some = slice(run.start - blocks.start, run.stop - blocks.start)
    return scales[some].flatten(0, 1), sums[some].flatten(0, 1)
