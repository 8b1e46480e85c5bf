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

from longmix.mixers.parts.attention_state import AttentionState, Rows, with_sinks
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.scatterbrain_summaries import Blocks, Part, pooled
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.step_sums import summed
from longmix_kernels.runtime import device_kind


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
        if device_kind(rows.key.device) == "cpu":
            return self._attend_to_one_of_each(rows), {}
        length, keys = rows.query.shape[1], rows.key.shape[1]
        own = torch.arange(keys - length, keys, dtype=torch.int32, device=rows.key.device)[None, None]
        parts, size = [rows.attended(lo=own, hi=own + 1)], 1
        while size < keys:
            parts.append(self._level(rows, size))
            size *= 2
        return rows.merged(parts), {}

    def _attend_to_one_of_each(self, rows: Rows) -> Tensor:
        """`attend` without the engine, which takes many small steps on a CPU where a row sees one key of a level."""
        exact = torch.promote_types(rows.key.dtype, torch.float32)
        queries, keys = rows.query.shape[1], rows.key.shape[1]
        query = rows.query.to(exact).unflatten(2, (self.num_kv_heads, -1))
        key, value = (x[:, keys - queries :].to(exact).unsqueeze(3) for x in (rows.key, rows.value))
        scores, size = [(query * key).sum(-1)], 1
        values: list[tuple[Blocks, Tensor]] = []
        while size < keys:
            blocks, *summaries = self._spans(rows, size)
            before = [torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1).to(exact).unsqueeze(3) for x in summaries]
            sees = (blocks.number - blocks.first)[:, keys - queries :, None, None] % 2 == 1
            scores.append(blocks.times(query, before[0]).sum(-1).masked_fill(~sees, -torch.inf))
            values.append((blocks, before[1]))
            size *= 2
        stacked = self._scale(rows) * torch.stack(scores)
        logsumexp = stacked.logsumexp(0)
        own, *shares = (stacked - logsumexp).exp().unsqueeze(-1)
        output = own * value
        for share, (blocks, summaries_before) in zip(shares, values, strict=True):
            output = output + blocks.times(share, summaries_before)
        return with_sinks(output.flatten(2, 3).to(rows.query.dtype), logsumexp.flatten(2), rows.sinks)

    def _spans(self, rows: Rows, size: int) -> tuple[Blocks, Tensor, Tensor]:
        """The spans of `size` tokens, their keys and their values."""
        assert rows.key_labels is not None
        batch, keys = rows.key.shape[:2]
        starts = None if rows.layout is None else rows.layout.starts  # without them a GPU is waited for
        documents = None if starts is None else (len(starts) - 1) // batch
        blocks = Blocks.of(rows.document_ids, batch, keys, size, rows.key.device, documents)
        labels = rows.key_labels.to(rows.key.dtype)
        return blocks, *blocks.summaries(labels, rows.key, rows.value, self._scale(rows), "max")

    def _scale(self, rows: Rows) -> float:
        return rows.key.shape[-1] ** -0.5 if rows.scale is None else rows.scale

    def _level(self, rows: Rows, size: int) -> Part:
        """Attention to the spans of `size` tokens."""
        blocks, key, value = self._spans(rows, size)
        keys = rows.key.shape[1]
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
