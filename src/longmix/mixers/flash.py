"""Exact causal attention, computed by the fastest exact provider there is (Dao 2023, arXiv 2307.08691)."""

from dataclasses import replace
from typing import ClassVar, Unpack

from torch import Tensor

from longmix.distributed.balance import balanced, rows_needed
from longmix.distributed.slices import Slices
from longmix.mixers.parts.attention_dropout import check_dropout, dropped_attention
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix_kernels.attention import attention, packed, packed_supports, sdpa


class Flash(SoftmaxAttention):
    """Every token sees itself and all earlier tokens of its document.

    Args:
        attention_dropout: share of the attention weights that training zeroes; see `dropped_attention`.

    The other arguments are those of `SoftmaxAttention`.
    """

    pairwise = True
    takes_sink_logits = True
    takes_gain = True
    cache_kinds = None
    changeable: ClassVar = (*SoftmaxAttention.changeable, "attention_dropout")

    def __init__(
        self, shape: ModelShape, layer_index: int, *, attention_dropout: float = 0.0, **options: Unpack[HeadOptions]
    ) -> None:
        super().__init__(shape, layer_index, **options)
        self.attention_dropout = check_dropout("mixer.attention_dropout", attention_dropout, self.sink_logit, self.gain)

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Use torch's kernels where rows are plainly causal, or packed on a GPU; else our engine, which skips tiles."""
        tensors = rows.query, rows.key, rows.value
        if self.training and self.attention_dropout:
            return dropped_attention(rows, self.attention_dropout), {}
        if not rows.plain:
            return rows.merged([rows.attended(**rows.bounds())]), {}
        if rows.document_ids is None and rows.query.shape[1] in (1, rows.key.shape[1]):
            return sdpa(*tensors), {}
        starts = None if rows.layout is None else rows.layout.starts
        if starts is not None and packed_supports(*tensors, starts):
            return packed(*tensors, starts), {}
        return attention(*tensors, **rows.bounds()), {}

    def attend_after(self, rows: Rows, slices: Slices) -> tuple[Tensor, dict[str, Metric]]:
        """Attend to earlier slices too. Where slices are balanced, all processes get equal work."""
        if not slices.balanced:
            return super().attend_after(rows, slices)
        key, value = rows_needed(rows.key, slices), rows_needed(rows.value, slices)

        def attend(query: Tensor, end: int) -> Tensor:
            ids = None if slices.whole_ids is None else slices.whole_ids[:, :end]
            return self.attend(replace(rows, query=query, key=key[:, :end], value=value[:, :end], document_ids=ids))[0]

        return balanced(attend, rows.query, slices), {}

    def visible_pairs(self, length: int) -> int:
        """The causal triangle with its diagonal."""
        return length * (length + 1) // 2

    def shared_bytes(self, prompt: int, steps: int) -> int:
        """All of the prompt's keys and values, in every step."""
        return prompt * steps * self.num_kv_heads * self.row_bytes()
