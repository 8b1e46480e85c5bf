"""Attention to the keys that carry the query's label, and exactly to the last few keys whatever theirs.

Labels come from a token and its position alone, so later tokens cannot change what an earlier one sees. Rows are sorted
by (document, label, position), so that every query's keys are one contiguous run; parts are merged through their
logsumexp, exactly and with all gradients.
"""

from typing import ClassVar, Unpack

import torch
from torch import Tensor

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import TOKENS, ModelShape, at_most
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Mean, Measure, Metric
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.step_sums import summed
from longmix_kernels.attention import Ordering, order_by_label

Part = tuple[Tensor, Tensor]
"""Output [B, Tq, Hq, head_dim] and logsumexp [B, Tq, Hq] of attention to some of the keys."""


class LabelAttention(SoftmaxAttention):
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

    pairwise = True
    takes_sink_logits = True
    sizes: ClassVar = {"window": 1}
    changeable: ClassVar = (*SoftmaxAttention.changeable, "window")

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
        orderings = [self.ordering(rows, turn) for turn in range(self.rounds)]
        parts = [rows.attended(**order._asdict()) for order in orderings]
        if self.window:
            parts.append(rows.attended(**rows.bounds(self.window)))
        parts += self.further_parts(rows)
        return rows.merged(parts), self.occupancy(rows, orderings) if self.training else {}

    def attend_after(self, rows: Rows, slices: Slices) -> tuple[Tensor, dict[str, Metric]]:
        """Attend as the base does. Only the last slice sees whole rows, so it alone logs `largest_label`."""
        mixed, metrics = super().attend_after(rows, slices)
        largest = metrics.get("largest_label")
        if isinstance(largest, Measure):
            metrics["largest_label"] = largest.in_last_slice(slices)
        return mixed, metrics

    def engine_window(self) -> int | None:
        """The window, if there is one."""
        return self.window or None

    def further_parts(self, rows: Rows) -> list[Part]:
        """Attention to further keys, which must be none that labels or window already let the query see."""
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
            gap=self.gap,
            **rows.documents(),
        )

    @torch.no_grad()
    def occupancy(self, rows: Rows, orderings: list[Ordering]) -> dict[str, Metric]:
        """`largest_label`: the largest share of a row's keys with one label, times the number of labels, so 1 is even.

        `empty_rows`: the share of queries whose label no key in reach carries, in any round.
        """
        assert rows.key_labels is not None
        every = torch.arange(self.num_labels, dtype=torch.int32, device=rows.key_labels.device)
        shares = (rows.key_labels.unsqueeze(-1) == every).float().mean(1)
        return {"largest_label": Mean.of(shares.amax(-1) * self.num_labels), "empty_rows": empty_rows(orderings)}

    def state_bytes(self, length: int) -> int:
        """Bytes of keys, values and labels (int32) that one row holds after `length` tokens."""
        return super().state_bytes(length) + 4 * length * self.num_kv_heads * self.rounds

    def step_bytes(self, length: int) -> int:
        """The base's bytes, and those of all keys' labels."""
        return super().step_bytes(length) + self._label_bytes(length)

    def decoding_bytes(self, length: int, steps: int) -> int:
        """The sum of `step_bytes`."""
        return self.seen_bytes(length, steps) + self._label_bytes(summed(length, steps))

    def _label_bytes(self, tokens: int) -> int:
        """Bytes of the labels of so many tokens, which grow with each token by as much."""
        return self.state_bytes(tokens) - SoftmaxAttention.state_bytes(self, tokens)

    def window_pairs(self, length: int) -> int:
        """Query-key pairs in the window of `length` tokens."""
        full = min(self.window, length)
        return full * (full + 1) // 2 + (length - full) * full

    def pairs_in_reach(self, length: int) -> int:
        """Query-key pairs outside the window in one row of `length` tokens; labels decide about these."""
        reach = max(0, length - self.gap)
        return reach * (reach + 1) // 2


def empty_rows(orderings: list[Ordering]) -> Measure:
    """The share of queries that see no key of their label; where `hi` is a query's own place, it sees itself."""
    empty = [order.lo < 0 if order.hi is None else order.lo >= order.hi for order in orderings]
    return Mean.of(torch.stack(empty))
