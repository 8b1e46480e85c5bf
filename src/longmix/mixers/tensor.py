"""Tensor attention (Alman and Song 2023, arXiv 2310.04064): a query looks at pairs of tokens.

    s_ijl = sum_c q_ic k1_jc k2_lc / sqrt(d)                   j of the last `window_1` tokens, l of the last `window_2`
    y_i   = W_o sum_jl softmax_(j, l)(s_ijl) (v1_j * v2_l)     both up to i, of its document

For each distance i - j it is attention to the k2 with the query q_i * k1_j: so these are as many query heads to each
key head of one call of the engine, and their outputs are merged by their logsumexp. One layer can tell whether two
earlier tokens fit a third (`data=match3`).

What differs from the paper, which is about a whole sequence: both are causal and have windows, and scores have the
factor 1 / sqrt(d). A bias is that of i and l. Nothing rotates by default: a product of three has no rotation that
depends on distances alone.
"""

from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import AttentionState, Rows, with_sinks
from longmix.mixers.parts.base import COUNT, TOKENS, ModelShape, at_most
from longmix.mixers.parts.exact import rounded_once
from longmix.mixers.parts.head_options import HeadNorm, HeadOptions
from longmix.mixers.parts.layout import Layout
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.step_sums import summed
from longmix_kernels.attention import positions_from_document_ids


class TensorAttention(SoftmaxAttention):
    """Attention to pairs of tokens. The head of this file has the equations.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`; its keys and values are k2 and v2.
        window_1: tokens of which j is one, the token itself included. Work is proportional to it.
        window_2: tokens of which l is one.
        rotary_base: see `SoftmaxAttention`; it would rotate q and k2.

    Raises:
        ConfigError: naming the setting.
    """

    pairwise = True
    takes_sink_logits = True
    refused: ClassVar = {"position": "a product of three vectors turned by phases tells where a row began"}
    sizes: ClassVar = {"window_1": 1, "window_2": 1}

    def __init__(  # type: ignore[misc]  # the base's `rotary_base` has another default here
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        window_1: int = 16,
        window_2: int = 256,
        rotary_base: float | None = None,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, rotary_base=rotary_base, **options)
        at_most(COUNT, window_1=window_1)
        at_most(TOKENS, window_2=window_2)
        for name, number in (("window_1", window_1), ("window_2", window_2)):
            if number < 1:
                raise ConfigError(f"mixer.{name}={number} must be at least 1: a token sees itself.")
        self.window_1, self.window_2 = window_1, window_2
        width = self.num_kv_heads * self.head_dim
        self.first_key = nn.Linear(self.d_model, width, bias=False)
        self.first_value = nn.Linear(self.d_model, width, bias=False)
        normed = isinstance(self.key_norm, HeadNorm)
        self.first_key_norm = HeadNorm(self.head_dim, eps=shape.norm_eps) if normed else nn.Identity()
        for projection in (self.first_key, self.first_value):
            nn.init.normal_(projection.weight, std=self.d_model**-0.5)

    def value_path(self) -> None:
        """There is none: a channel's weights have v1 in them, so that no matrix of a head mixes its values."""

    def place(
        self, x: Tensor, query: Tensor, key: Tensor, layout: Layout, state: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Those of the base; behind each key come k1 and v1 of its token."""
        query, key, carried = super().place(x, query, key, layout, state)
        x = rounded_once(x)
        first, value = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.first_key, self.first_value))
        parts = key, self.first_key_norm(first), value
        return query, torch.cat([part.to(value.dtype) for part in parts], -1), carried

    def rows(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None) -> Rows:
        """The rows of the base, with k1 and v1 as labels."""
        key, first = key.tensor_split((key.shape[-1] - 2 * self.head_dim,), -1)
        rows = super().rows(query, key, value, document_ids)
        rows.key_labels = first
        return rows

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Attend to pairs; the backward pass computes the outputs of each distance again."""
        if torch.is_grad_enabled() and rows.query.requires_grad:
            mixed: Tensor = checkpoint(self._attend, rows, use_reentrant=False, preserve_rng_state=False)
            return mixed, {}
        return self._attend(rows), {}

    def _attend(self, rows: Rows) -> Tensor:
        assert rows.key_labels is not None
        queries, keys, dtype = rows.query.shape[1], rows.key.shape[1], rows.query.dtype
        # [B, Tq, Hkv, 1, window_1, .], the rows before each query from the farthest to itself: a view without a copy
        first = F.pad(rows.key_labels.to(dtype), (0, 0, 0, 0, self.window_1 - 1, 0))
        first = first[:, keys - queries :].unfold(1, self.window_1, 1).mT.unsqueeze(3)
        first_key, first_value = first.split(self.head_dim, -1)
        columns = rows.query.shape[-1] - self.head_dim  # of a bias, which is of q and k2 alone
        if columns:
            first_key = F.pad(first_key, (0, columns), value=1.0)
        query = rows.query.unflatten(2, (self.num_kv_heads, -1)).unsqueeze(4) * first_key
        slopes = None if rows.slopes is None else rows.slopes.repeat_interleave(self.window_1)
        wide = replace(rows, query=query.flatten(2, 4), slopes=slopes, sinks=None)
        mixed, logsumexp = wide.attended(**rows.bounds(self.window_2))
        logsumexp = logsumexp.unflatten(2, (-1, self.window_1))
        logsumexp = logsumexp.masked_fill(~self._inside(rows), -torch.inf)
        mixed = mixed.unflatten(2, (self.num_kv_heads, -1, self.window_1)) * first_value
        share = logsumexp.softmax(-1).unsqueeze(-1).to(dtype)
        mixed = (share * mixed.flatten(2, 3)).sum(3)
        return with_sinks(mixed, logsumexp.logsumexp(-1), rows.sinks)

    def _inside(self, rows: Rows) -> Tensor:
        """Which distances, from the largest to 0, stay in the document: bool [B or 1, Tq, 1, window_1]."""
        queries, keys = rows.query.shape[1], rows.key.shape[1]
        row = torch.arange(keys, device=rows.key.device)[None]
        position = row if rows.document_ids is None else positions_from_document_ids(rows.document_ids)
        distance = torch.arange(self.window_1 - 1, -1, -1, device=rows.key.device)
        return (position[:, keys - queries :, None] >= distance).unsqueeze(2)

    def engine_window(self) -> int:
        """That of k2."""
        return self.window_2

    def cached_keys(self) -> int:
        """As many as the longer window has before the token itself; at least one, which tells its document."""
        return max(1, self.window_1 - 1, self.window_2 - 1)

    def init_state(self, batch: int) -> AttentionState:
        """The state of the base, with k1 and v1 of each token."""
        state = super().init_state(batch)
        return replace(state, key_labels=torch.cat((state.value, state.value), -1))

    def state_bytes(self, length: int) -> int:
        """The bytes of the base, and k1 and v1: all of a token is kept as long as any of it."""
        return super().state_bytes(length) + self._first_bytes(min(length, self.cached_keys()))

    def _first_bytes(self, rows: int) -> int:
        """Bytes of k1 and v1 of so many tokens."""
        return 2 * rows * self.num_kv_heads * self.head_dim * self.value.weight.element_size()

    def step_bytes(self, length: int) -> int:
        """k2 and v2 of one window, k1 and v1 of the other."""
        seen = min(length + 1, self.window_2) * self.num_kv_heads * self.row_bytes()
        return seen + self._first_bytes(min(length + 1, self.window_1)) + self.carried_bytes()

    def decoding_bytes(self, length: int, steps: int) -> int:
        """The sum of `step_bytes`."""
        seen, first = (summed(length + 1, steps, most=window) for window in (self.window_2, self.window_1))
        own = seen * self.num_kv_heads * self.row_bytes()
        return own + self._first_bytes(first) + steps * self.carried_bytes()

    def recomputed_flops(self, length: int) -> int:
        """What of `flops` the backward pass computes again."""
        return 4 * self.num_heads * self.head_dim * self.visible_pairs(length)

    def visible_pairs(self, length: int) -> int:
        """Those of a window of `window_2`, for each distance to j."""
        full = min(self.window_2, length)
        return self.window_1 * (full * (full + 1) // 2 + (length - full) * self.window_2)
