"""Causal attention to the last `window` tokens (Beltagy et al. 2020, arXiv 2004.05150; the window of Mistral 7B)."""

from typing import ClassVar, Unpack

import torch
from torch import Tensor

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_dropout import check_dropout, dropped_attention
from longmix.mixers.parts.attention_state import AttentionState, Rows
from longmix.mixers.parts.base import TOKENS, ModelShape, at_most
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.softmax import HeadOptions, SoftmaxAttention
from longmix_kernels.attention import attention


class SlidingWindow(SoftmaxAttention):
    """Every token sees itself and the `window - 1` tokens before it, within its document.

    Args:
        window: visible keys including the token itself (so flash-attention's `window_size` is `(window - 1, 0)`).
        attention_dropout: share of the attention weights that training zeroes; see `dropped_attention`.

    The other arguments are those of `SoftmaxAttention`.
    """

    carries_in_slices = True
    sizes: ClassVar = {"window": 1}
    changeable: ClassVar = (*SoftmaxAttention.changeable, "window", "attention_dropout")

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        window: int = 256,
        attention_dropout: float = 0.0,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, window=window)
        if window < 1:
            raise ConfigError(f"mixer.window={window} must be at least 1: a token sees itself.")
        self.window = window
        self.attention_dropout = check_dropout("mixer.attention_dropout", attention_dropout)

    def state_between_documents(self, batch: int) -> AttentionState:
        """A full cache of keys that no document sees, for `batch` rows: later states have its shape."""
        weight, sizes = self.value.weight, (batch, self.cached_keys())
        key, value = (weight.new_zeros(*sizes, self.num_kv_heads, self.head_dim) for _ in range(2))
        ids = torch.full(sizes, -1, dtype=torch.int32, device=weight.device)
        return AttentionState(key, value, None, ids, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Call the engine, which skips every tile outside the window."""
        tensors = rows.query, rows.key, rows.value
        if self.training and self.attention_dropout:
            ids = rows.document_ids
            return dropped_attention(*tensors, self.attention_dropout, document_ids=ids, window=self.window), {}
        bounds = rows.bounds(self.window)
        if rows.plain:
            return attention(*tensors, **bounds), {}
        return rows.merged([rows.attended(**bounds)]), {}

    def engine_window(self) -> int:
        """The window."""
        return self.window

    def visible_pairs(self, length: int) -> int:
        """A triangle until the window is full, then `window` keys for every token."""
        full = min(self.window, length)
        return full * (full + 1) // 2 + (length - full) * self.window

    def cached_keys(self) -> int:
        """`window - 1`, because the next token sees itself too; at least one key, which tells its document."""
        return max(1, self.window - 1)
