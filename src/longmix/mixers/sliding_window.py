"""Causal attention to the last `window` tokens (Beltagy et al. 2020, arXiv 2004.05150; the window of Mistral 7B).

With gaps it is causal neighborhood attention in one dimension (Hassani et al. 2022, arXiv 2209.15001): see `dilated`.
"""

from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from longmix.caches.cache import CacheKind
from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.attention_dropout import check_dropout, dropped_attention
from longmix.mixers.parts.attention_state import AttentionState, Rows, after_earlier_slices, continued
from longmix.mixers.parts.base import TOKENS, ModelShape, at_most
from longmix.mixers.parts.dilated import begun_positions, dilated_bounds, positions, seen_pairs
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.step_sums import summed
from longmix_kernels.attention import attention


class SlidingWindow(SoftmaxAttention):
    """Every token sees itself and the `window - 1` tokens before it, within its document.

    Args:
        window: visible keys including the token itself (so flash-attention's `window_size` is `(window - 1, 0)`).
        dilation: positions from one visible key to the next, so that a token reaches `(window - 1) * dilation` back; a
            list is of the key heads, from the first one on and again from its beginning.
        stride: tokens, `dilation` apart, that share a window. The first of them sees `stride - 1` keys fewer.
        attention_dropout: share of the attention weights that training zeroes; see `dropped_attention`.

    The other arguments are those of `SoftmaxAttention`.
    """

    pairwise = True
    takes_sink_logits = True
    takes_gain = True
    cache_kinds: ClassVar = frozenset({"exact"})
    sizes: ClassVar = {"window": 1}
    changeable: ClassVar = (*SoftmaxAttention.changeable, "window", "dilation", "stride", "attention_dropout")

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        window: int = 256,
        dilation: int | list[int] = 1,
        stride: int = 1,
        attention_dropout: float = 0.0,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, window=window)
        if window < 1:
            raise ConfigError(f"mixer.window={window} must be at least 1: a token sees itself.")
        self.window, self.stride = window, stride
        self.dilation = self._dilations(dilation)
        # Strides have to know where a token stands in its document, which carried slices do not say.
        self.carries_in_slices = stride == 1
        if not 1 <= stride <= window:
            raise ConfigError(f"mixer.stride={stride} must be from 1 to mixer.window={window}: a token sees itself.")
        self.attention_dropout = check_dropout("mixer.attention_dropout", attention_dropout, self.sink_logit, self.gain)
        if self.attention_dropout and self.has_gaps:
            raise ConfigError(
                f"mixer.attention_dropout={attention_dropout} has a window without gaps; set "
                "mixer.attention_dropout=0, or mixer.dilation=1 and mixer.stride=1."
            )

    def _dilations(self, dilation: int | list[int]) -> tuple[int, ...]:
        """That of each key head."""
        given = [dilation] if isinstance(dilation, int) else list(dilation)
        if not given or any(not isinstance(each, int) or not 1 <= each <= TOKENS for each in given):
            raise ConfigError(
                f"mixer.dilation={dilation} must be a whole number from 1 to {TOKENS:,}, or a list of such."
            )
        if len(given) > self.num_kv_heads:
            raise ConfigError(f"mixer.dilation={given} is of {len(given)} heads, and there are {self.num_kv_heads}.")
        return tuple(given[head % len(given)] for head in range(self.num_kv_heads))

    @property
    def has_gaps(self) -> bool:
        """Whether a window is not simply the last keys."""
        return self.stride > 1 or max(self.dilation) > 1

    def takes_cache(self, kind: CacheKind) -> bool:
        """A ring holds a window without gaps."""
        return not self.has_gaps and super().takes_cache(kind)

    def state_between_documents(self, batch: int) -> AttentionState:
        """A full cache of keys that no document sees, for `batch` rows: later states have its shape."""
        state, keys = self.init_state(batch), self.cached_keys()
        key, value = (x.new_zeros(batch, keys, *x.shape[2:]) for x in (state.key, state.value))
        ids = torch.full((batch, keys), -1, dtype=torch.int32, device=key.device)
        return replace(state, key=key, value=value, document_ids=ids)

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Call the engine, which skips every tile outside the window."""
        if self.has_gaps:
            position = positions(rows.document_ids, rows.key.shape[1], rows.key.device)
            return self._with_gaps(rows, position), {}
        if self.training and self.attention_dropout:
            return dropped_attention(rows, self.attention_dropout, self.window), {}
        bounds = rows.bounds(self.window)
        if rows.plain:
            return attention(rows.query, rows.key, rows.value, **bounds), {}
        return rows.merged([rows.attended(**bounds)]), {}

    def attend_from(self, rows: Rows, state: Any, next_position: Tensor) -> tuple[Tensor, dict[str, Metric], Any]:
        """See `SoftmaxAttention.attend_from`."""
        if self.stride == 1:
            return super().attend_from(rows, state, next_position)
        rows = continued(rows, state)
        place = self._places(rows, state.key.shape[1], state.next_position)
        return self._with_gaps(rows, place), {}, self._kept(rows, next_position)

    def attend_after(self, rows: Rows, slices: Slices) -> tuple[Tensor, dict[str, Metric]]:
        """See `SoftmaxAttention.attend_after`."""
        if self.stride == 1:
            return super().attend_after(rows, slices)
        rows = after_earlier_slices(rows, slices, self.rows_of_earlier_slices())
        return self._with_gaps(rows, self._places(rows, rows.key.shape[1] - slices.length, slices.next_position)), {}

    def _places(self, rows: Rows, earlier: int, next_position: Tensor) -> Tensor:
        return begun_positions(rows.document_ids, rows.key.shape[1], earlier, next_position, rows.key.device)

    def _with_gaps(self, rows: Rows, place: Tensor) -> Tensor:
        """Attend from rows whose keys are at these places [B or 1, Tk] in their documents."""
        position = positions(rows.document_ids, rows.key.shape[1], rows.key.device)
        position, place = torch.broadcast_tensors(position, place)
        sizes = rows.query.shape[1], self.window, self.stride, self.dilation, self.num_heads // self.num_kv_heads
        bounds = dilated_bounds(position, place, *sizes)
        return rows.merged([rows.attended(**bounds)])

    def engine_window(self) -> int | None:
        """The window, if it has no gaps."""
        return None if self.has_gaps else self.window

    def visible_pairs(self, length: int) -> int:
        """A triangle until the window is full, then `window` keys for every token; the mean over heads."""
        pairs = sum(seen_pairs(length, self.window, self.stride, dilation) for dilation in self.dilation)
        return pairs // self.num_kv_heads

    def shared_bytes(self, prompt: int, steps: int) -> int:
        """The prompt's keys and values in the windows of the steps; 0 for windows with gaps, which are not counted."""
        within = 0 if self.has_gaps else min(steps, self.window)
        seen = summed(self.window - within, within, most=prompt)
        return seen * self.num_kv_heads * self.row_bytes()

    def cached_keys(self) -> int:
        """As far as the next token reaches, which sees itself too; at least one key, which tells its document."""
        return max(1, (self.window - 1) * max(self.dilation))
