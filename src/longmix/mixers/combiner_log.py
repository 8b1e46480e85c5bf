"""Combiner (Ren et al. 2021, arXiv 2107.05768), its log form: itself, and one key for each of log2(T) spans before.

    level l has spans of 2^l tokens, counted from the first of the document; a token whose span has an odd index sees
    the span before it, and so each earlier token is in exactly one span that it sees
    k_S = max_j k_j,   q_S = max_j q_j,   v_S = sum_j softmax_j(q_S . k_j / sqrt(d)) v_j       over the j of span S
    y_i = W_o (one softmax over k_i and those k_S) v

What a span's key and value are follows from its tokens alone, but not from those of its halves: v_S is a softmax under
a query of its own. So a state has all keys and values, and the queries that stand for them. As in `combiner`, keys are
pooled after the rotation.
"""

from dataclasses import replace
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from longmix.mixers.parts.attention_state import AttentionState, Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.scatterbrain_summaries import Blocks, Part, pooled
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.step_sums import summed


class CombinerLog(SoftmaxAttention):
    """Combiner's log form. The head of this file has the equations.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`.
    """

    takes_sink_logits = True
    refused: ClassVar = {
        "bias": "the largest key of a span has no place, so that no bias of two tokens is its own",
        "position": "the largest key of a span depends on where phases began, and they do not begin with a document",
    }

    def __init__(self, shape: ModelShape, layer_index: int, **options: Unpack[HeadOptions]) -> None:
        super().__init__(shape, layer_index, **options)

    def rows(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None) -> Rows:
        """The rows of the base, with the query that stands for each key as its label."""
        rows = super().rows(query, key, value, document_ids)
        rows.key_labels = pooled(rows.query, self.num_kv_heads, "max")
        return rows

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Attend to the own key, and level by level to the span before."""
        length, keys = rows.query.shape[1], rows.key.shape[1]
        own = torch.arange(keys - length, keys, dtype=torch.int32, device=rows.key.device)[None, None]
        parts, size = [rows.attended(lo=own, hi=own + 1)], 1
        while size < keys:
            parts.append(self._level(rows, size))
            size *= 2
        return rows.merged(parts), {}

    def _level(self, rows: Rows, size: int) -> Part:
        """Attention to the spans of `size` tokens."""
        assert rows.key_labels is not None
        batch, keys = rows.key.shape[:2]
        starts = None if rows.layout is None else rows.layout.starts  # without them a GPU is waited for
        documents = None if starts is None else (len(starts) - 1) // batch
        blocks = Blocks.of(rows.document_ids, batch, keys, size, rows.key.device, documents)
        scale = rows.key.shape[-1] ** -0.5 if rows.scale is None else rows.scale
        key, value = blocks.summaries(rows.key_labels.to(rows.key.dtype), rows.key, rows.value, scale, "max")
        number, first = (x[:, keys - rows.query.shape[1] :] for x in (blocks.number, blocks.first))
        lo = number - (number - first) % 2  # an even span sees nothing at this level
        lo, hi = (x[:, None].int().contiguous() for x in (lo, number))
        spans = replace(rows, key=key, value=value, document_ids=None, key_labels=None, layout=None)
        return spans.attended(lo=lo, hi=hi)

    def init_state(self, batch: int) -> AttentionState:
        """The state of the base, with a query for each key."""
        state = super().init_state(batch)
        return replace(state, key_labels=state.key)

    def state_bytes(self, length: int) -> int:
        """Bytes of keys, values and queries."""
        return 3 * length * self.num_kv_heads * self.head_dim * self.value.weight.element_size()

    def step_bytes(self, length: int) -> int:
        """All of them: the spans before a token are summed up anew."""
        return self.state_bytes(length)

    def decoding_bytes(self, length: int, steps: int) -> int:
        """The sum of `step_bytes`."""
        return self.state_bytes(summed(length, steps))

    def visible_pairs(self, length: int) -> int:
        """Itself, and a span for each binary digit 1 of its position, counted digit by digit over all positions."""
        pairs = length
        for bit in range(length.bit_length()):
            periods, rest = divmod(length, 2 << bit)
            pairs += (periods << bit) + max(0, rest - (1 << bit))
        return pairs
