"""Attention to the keys that carry the query's label, and exactly to the last few keys whatever theirs.

Labels come from a token and its position alone, so later tokens cannot change what an earlier one sees. Rows are sorted
by (document, label, position), so that every query's keys are one contiguous run; parts are merged through their
logsumexp, exactly and with all gradients.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.base import COUNT, TOKENS, ModelShape, at_most
from longmix.mixers.measures import Mean, Measure, Metric
from longmix.mixers.softmax import HeadOptions, Rows, SoftmaxAttention
from longmix.parallel.slices import Slices
from longmix_kernels.attention import Ordering, attention, merge, order_by_label

Part = tuple[Tensor, Tensor]
"""Output [B, Tq, Hq, head_dim] and logsumexp [B, Tq, Hq] of attention to some of the keys."""


class LabelledAttention(SoftmaxAttention):
    """Base of the mixers that label their tokens in `select`.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`.
        num_labels: how many different labels there are.
        rounds: labels per token; a query sees the keys that share any. A key that shares several counts as often.
        window: number of latest keys, its own included, that a query sees exactly and in any case; 0 for none.
        see_self: without a window, whether a query sees its own key if labels agree.

    Raises:
        ConfigError: a window below 0.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        num_labels: int,
        rounds: int = 1,
        window: int = 0,
        see_self: bool = True,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, window=window)
        if window < 0:
            raise ConfigError(f"mixer.window={window} must be at least 0, which is none.")
        self.num_labels = num_labels
        self.rounds = rounds
        self.window = window
        self.gap = window or (0 if see_self else 1)

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Merge the rounds, the window, and what a subclass adds."""
        tensors = rows.query, rows.key, rows.value
        orderings = [self.ordering(rows, turn) for turn in range(self.rounds)]
        parts = [attention(*tensors, **order._asdict(), return_logsumexp=True) for order in orderings]
        if self.window:
            parts.append(attention(*tensors, window=self.window, document_ids=rows.document_ids, return_logsumexp=True))
        parts += self.further_parts(rows)
        output = parts[0][0] if len(parts) == 1 else merge(parts)[0]
        return output, self.occupancy(rows, orderings) if self.training else {}

    def attend_after(self, rows: Rows, slices: Slices) -> tuple[Tensor, dict[str, Metric]]:
        """As the base; the last slice sees the labels of whole rows."""
        mixed, metrics = super().attend_after(rows, slices)
        largest = metrics.get("largest_label")
        if isinstance(largest, Measure):
            metrics["largest_label"] = largest.in_last_slice(slices)
        return mixed, metrics

    def further_parts(self, rows: Rows) -> list[Part]:
        """Attention to more keys, none of which the labels and the window let a query see already."""
        return []

    def ordering(self, rows: Rows, turn: int) -> Ordering:
        """Sort the rows by their labels of one round."""
        assert rows.query_labels is not None and rows.key_labels is not None
        query_labels, key_labels = rows.query_labels[..., turn], rows.key_labels[..., turn]
        shared = rows.query_labels is rows.key_labels
        return order_by_label(
            query_labels,
            None if shared else key_labels,
            num_labels=self.num_labels,
            document_ids=rows.document_ids,
            gap=self.gap,
        )

    @torch.no_grad()
    def occupancy(self, rows: Rows, orderings: list[Ordering]) -> dict[str, Metric]:
        """`largest_label`: the largest share of a row's keys with one label, times the number of labels, so 1 is even.

        `empty_rows`: the share of queries whose label no key in reach carries, in any round.
        """
        assert rows.key_labels is not None
        shares = torch.nn.functional.one_hot(rows.key_labels.long(), self.num_labels).float().mean(1)
        return {"largest_label": Mean.of(shares.amax(-1) * self.num_labels), "empty_rows": empty_rows(orderings)}

    def state_bytes(self, length: int) -> int:
        """Bytes of keys, values and labels (int32) that one row holds after `length` tokens."""
        return super().state_bytes(length) + 4 * length * self.num_kv_heads * self.rounds

    def step_bytes(self, length: int) -> int:
        """As the base, and the labels of all keys."""
        return super().step_bytes(length) + self.state_bytes(length) - SoftmaxAttention.state_bytes(self, length)

    def window_pairs(self, length: int) -> int:
        """Query-key pairs in the window of `length` tokens."""
        full = min(self.window, length)
        return full * (full + 1) // 2 + (length - full) * full

    def pairs_in_reach(self, length: int) -> int:
        """Query-key pairs that labels decide about, in one row of `length` tokens."""
        reach = max(0, length - self.gap)
        return reach * (reach + 1) // 2


def empty_rows(orderings: list[Ordering]) -> Measure:
    """The share of queries that see no key of their label; where `hi` is a query's own place, it sees itself."""
    empty = [order.lo < 0 if order.hi is None else order.lo >= order.hi for order in orderings]
    return Mean.of(torch.stack(empty))


class AngularHash(nn.Module):
    """Bucket of a vector: the nearest of random directions and their opposites (Andoni et al. 2015, arXiv 1509.02897).

        bucket(x) = argmax [x R, -x R]

    R is drawn once from a generator of its own, saved with the model, and never drawn again.

    Args:
        heads: key heads, each with its own directions.
        head_dim: size of a vector.
        buckets: number of buckets, even.
        rounds: independent hashes.
        seed: of the generator.

    Raises:
        ConfigError: buckets that are odd or fewer than 2, rounds below 1.
    """

    directions: Tensor

    def __init__(self, heads: int, head_dim: int, buckets: int, rounds: int, seed: int) -> None:
        super().__init__()
        at_most(COUNT, buckets=buckets, rounds=rounds)
        if buckets < 2 or buckets % 2:
            raise ConfigError(f"mixer.buckets={buckets} must be even and at least 2: directions and their opposites.")
        if rounds < 1:
            raise ConfigError(f"mixer.rounds={rounds} must be at least 1.")
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(heads, head_dim, rounds * buckets // 2, generator=generator)
        self.register_buffer("directions", directions)
        self.rounds = rounds

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, head_dim], H a multiple of `heads`, to int32 [B, T, H, rounds]; in float32 or better."""
        exact = torch.promote_types(x.dtype, torch.float32)
        directions = self.directions.to(exact)
        with torch.autocast(x.device.type, enabled=False):
            grouped = x.to(exact).unflatten(2, (directions.shape[0], -1)).transpose(1, 2)  # [B, heads, T, group, D]
            along = (grouped.flatten(2, 3) @ directions).unflatten(-1, (self.rounds, -1))
        nearest = along.abs().argmax(-1)
        opposite = along.gather(-1, nearest.unsqueeze(-1)).squeeze(-1) < 0
        bucket = (nearest + along.shape[-1] * opposite).int()
        return bucket.unflatten(2, grouped.shape[2:4]).transpose(1, 2).flatten(2, 3)

    def flops(self, length: int, heads: int) -> int:
        """Floating-point operations to hash `length` tokens of so many heads."""
        return 2 * length * heads * self.directions[0].numel()
