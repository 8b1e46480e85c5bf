"""The base of softmax attention: projections, query-key norm, rotary positions and the key-value cache.

    q_i = rotate(norm(W_q x_i)),  k_j = rotate(norm(W_k x_j)),  v_j = W_v x_j
    y_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d)) v_j        over the j that the subclass lets i see

What is orthogonal to who sees whom is an option of all: positions (`context_positions`), biases of the scores
(`score_bias`), gates on the heads (`head_gates`), and a logit of each head that takes part in the softmax.

A subclass may choose what sees what by the content of the tokens: then it gives every query and key labels, before the
rotation, and the keys' labels are cached with the keys. What has to do with positions is in `place`; keys are cached
after it, so that a decoding step computes nothing of the past again.

Notable: grouped key-value heads; RMSNorm on each query and key head before the rotation (Henry et al. 2020, arXiv
2010.04245; the form of Qwen3), which bounds the scores by sqrt(d); positions restart at each document.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longmix.caches.cache import Cache, CacheKind, CacheShape
from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import AttentionState, Rows, after_earlier_slices, continued
from longmix.mixers.parts.base import Mixer, MixerOutput, ModelShape, checked_sizes, divided
from longmix.mixers.parts.cached import attend_cached
from longmix.mixers.parts.calls import applied
from longmix.mixers.parts.context_positions import context_positions
from longmix.mixers.parts.documents import continued_ids
from longmix.mixers.parts.exact import rounded_once
from longmix.mixers.parts.head_gates import (
    check_refused,
    check_sinks,
    gated,
    head_router,
    output_gate_of,
    sink_logit_of,
)
from longmix.mixers.parts.head_options import HeadNorm, Selection
from longmix.mixers.parts.key_bias import with_key_bias
from longmix.mixers.parts.layout import Layout, LayoutNeeds, layout_after
from longmix.mixers.parts.looked_into import ValuePath
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.projections import weight_count
from longmix.mixers.parts.rotary import POSITIONS, Rotary, ScalingKind, rotate
from longmix.mixers.parts.score_bias import alibi_slopes, check_bias, gain_columns, score_bias


class SoftmaxAttention(Mixer):
    """Base of the softmax mixers; a subclass says in `attend` which keys a query sees, and in `visible_pairs` how many.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0.
        num_heads: query heads; None takes the model's.
        num_kv_heads: key-value heads, a divisor of `num_heads`; None gives every query head its own.
        rotary_base, rotary_fraction, rotary_scaling, rotary_factor, rotary_original_length, rotary_options: the rotary
            positions; see `longmix.mixers.parts.rotary.Rotary.of`.
        qk_norm: RMSNorm on query and key heads.
        position: "rotary"; "context" for frequencies that the tokens choose, see `ContextPositions`; or "none".
        bias: "none", "alibi", "fourier", "low_rank" or "forget", added to the scores; see
            `longmix.mixers.parts.score_bias`.
        bias_rank: frequencies of "fourier", or the rank of "low_rank".
        gain: "none", or "fourier" for a learned function of the distance on the weights after the softmax; see
            `longmix.mixers.parts.score_bias.gain_columns`.
        output_gate: "none", or a sigmoid gate on the output heads, one for each "head" or "element".
        sink_logits: a learned logit of each query head in its softmax, without a value, so that weights may sum to less
            than 1 (as in gpt-oss, arXiv 2508.10925).
        heads_shared, heads_kept, heads_balance: a mixture of heads, see `HeadRouter`; none with `heads_kept` None.
        heads_router: what chooses among them: "learned", or "query_norm" for the lengths of the queries, see
            `QueryNormRouter`.

    Raises:
        ConfigError: heads that do not divide, an odd head size, positions that make no sense, an unknown word.

    Attributes:
        pairwise: whether a subclass computes scores only in `Rows.attended`, or by kernels where `Rows.plain`, as
            biases and `position=context` need.
        takes_sink_logits: whether it returns what `Rows.merged` or `with_sinks` makes of its parts.
        takes_gain: whether all its parts are of `Rows.attended`, and no columns but those of the base are in them.
        rows_in_place: whether key rows stand in their order where scores are computed, which ALiBi's slopes in the
            engine need; a bias of columns needs no order.
        cache_kinds: the kinds of caches, by name, in which generation keeps the keys and values of `attend`; None for
            all. Without `exact` among them the mixer goes on from a state of its own.
        refused: why `bias`, `position=context`, `sink_logits` or `heads_router` cannot be had, by setting, where that
            has a reason of the mixer's own.
        key_bias: [B, T, Hkv], added to the scores of each key, while `key_biases` gives one; None for none.
    """

    pairwise: ClassVar[bool] = False
    takes_sink_logits: ClassVar[bool] = False
    takes_gain: ClassVar[bool] = False
    rows_in_place: ClassVar[bool] = True
    cache_kinds: ClassVar[frozenset[str] | None] = frozenset()
    refused: ClassVar[dict[str, str]] = {}
    sliced = True
    changeable: ClassVar = POSITIONS
    inherits: ClassVar = ("num_heads", "num_kv_heads", "qk_norm", *POSITIONS)

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = 10_000.0,
        rotary_fraction: float = 1.0,
        rotary_scaling: ScalingKind | None = None,
        rotary_factor: float | None = None,
        rotary_original_length: int | None = None,
        rotary_options: dict[str, float] | None = None,
        qk_norm: bool = True,
        position: str = "rotary",
        bias: str = "none",
        bias_rank: int = 8,
        gain: str = "none",
        output_gate: str = "none",
        sink_logits: bool = False,
        heads_shared: int = 0,
        heads_kept: int | None = None,
        heads_balance: float = 0.01,
        heads_router: str = "learned",
    ) -> None:
        super().__init__()
        heads_key = "model.num_heads" if num_heads is None else "mixer.num_heads"
        self.num_heads = shape.num_heads if num_heads is None else num_heads
        self.head_dim = divided(shape.d_model, self.num_heads, "model.d_model", heads_key)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        divided(self.num_heads, self.num_kv_heads, heads_key, "mixer.num_kv_heads")
        self.rotary = Rotary.of(
            self.head_dim,
            f"{heads_key}={self.num_heads}",
            rotary_base=None if position == "none" else rotary_base,
            rotary_fraction=rotary_fraction,
            rotary_scaling=rotary_scaling,
            rotary_factor=rotary_factor,
            rotary_original_length=rotary_original_length,
            rotary_options=rotary_options,
        )
        self.d_model, self.layer_index = shape.d_model, layer_index

        kv_width = self.num_kv_heads * self.head_dim
        self.query = nn.Linear(self.d_model, self.d_model, bias=False)
        self.key = nn.Linear(self.d_model, kv_width, bias=False)
        self.value = nn.Linear(self.d_model, kv_width, bias=False)
        self.output = nn.Linear(self.d_model, self.d_model, bias=False)
        self.query_norm = HeadNorm(self.head_dim, eps=shape.norm_eps) if qk_norm else nn.Identity()
        self.key_norm = HeadNorm(self.head_dim, eps=shape.norm_eps) if qk_norm else nn.Identity()

        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=self.d_model**-0.5)
        nn.init.normal_(self.output.weight, std=self.d_model**-0.5 / math.sqrt(2 * shape.num_layers))

        width, heads, key_heads = self.d_model, self.num_heads, self.num_kv_heads
        words = {"bias": bias, "position": position, "heads_router": heads_router}
        check_refused(self.refused, type(self).__name__, sink_logits=sink_logits, **words)
        self.context = context_positions(position, self.rotary, width, key_heads, self.pairwise, type(self).__name__)
        if self.context is not None:
            self.rotary = None  # the layout has no angles then
        check_bias(bias, bias_rank, self.pairwise, type(self).__name__)
        if bias == "forget" and self.context is not None:
            raise ConfigError("mixer.bias=forget and mixer.position=context both add up along a row; use one of them.")
        self.alibi = bias == "alibi" and self.rows_in_place
        self.bias = None if self.alibi else score_bias(bias, bias_rank, width, heads, key_heads)
        log_gain = gain_columns(gain, bias_rank, heads, key_heads, bias, self.takes_gain, type(self).__name__)
        self.bias, self.gain = (self.bias if log_gain is None else log_gain), log_gain is not None
        self.output_gate = output_gate_of(output_gate, width, heads)
        check_sinks(sink_logits, self.takes_sink_logits, type(self).__name__)
        self.sink_logit = sink_logit_of(heads) if sink_logits else None
        mixture = heads_shared, heads_kept, heads_balance, shape.num_layers
        self.head_router = head_router(width, heads, *mixture, heads_router, qk_norm)
        self.key_bias: Tensor | None = None

    @property
    def takes_key_bias(self) -> bool:
        """Whether a bias of each key means what it says: scores are computed pair by pair, and columns are scores."""
        return self.pairwise and "bias" not in self.refused and not self.gain

    def value_path(self) -> ValuePath | None:
        """The layers from the projection of the values to that of the output; the gates of both lie between."""
        return ValuePath(self.value, self.output, self.num_kv_heads, self.num_heads)

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Mix the values: the output heads [B, Tq, Hq, head_dim], and metrics."""
        raise NotImplementedError

    def attend_after(self, rows: Rows, slices: Slices) -> tuple[Tensor, dict[str, Metric]]:
        """Attend as in `attend` for a slice of longer rows; `rows` holds only the slice's own keys."""
        return self.attend(after_earlier_slices(rows, slices, self.rows_of_earlier_slices()))

    def attend_from(self, rows: Rows, state: Any, next_position: Tensor) -> tuple[Tensor, dict[str, Metric], Any]:
        """Attend as in `attend`, continuing from a state; also returns the state after the new keys.

        Args:
            rows: the new queries and keys.
            state: before them, of the class that `state_type` names.
            next_position: int64 [B], the position after them.
        """
        rows = continued(rows, state)
        after = self._kept(rows, next_position)
        return *self.attend(rows), after

    def takes_cache(self, kind: CacheKind) -> bool:
        """See `Mixer.takes_cache`. ALiBi's slopes and gains need keys in their order, which no cache promises."""
        if self.alibi or self.gain or (self.bias is not None and not kind.takes_bias):
            return False
        return self.cache_kinds is None or kind.name in self.cache_kinds

    def decoding_state(self, batch: int, kind: CacheKind) -> Any:
        """See `Mixer.decoding_state`."""
        if not self.takes_cache(kind):
            return super().decoding_state(batch, kind)
        cache = kind.build(self.cache_shape(batch))
        cache.carried = self.carried_before(batch)
        return cache

    def cache_shape(self, batch: int) -> CacheShape:
        """The sizes of a cache of the mixer's keys and values, for `batch` rows."""
        weight = self.value.weight
        return CacheShape(
            batch,
            self.num_kv_heads,
            self.num_heads // self.num_kv_heads,
            self.key_dim(weight.dtype),
            self.head_dim,
            weight.dtype,
            weight.device,
            self.layer_index,
            self.rotary,
            self.engine_window(),
        )

    def state_type(self) -> type:
        """The class of states that `forward` goes on from."""
        return AttentionState

    def visible_pairs(self, length: int) -> int:
        """Query-key pairs the mixer computes in one row of `length` tokens, per query head."""
        raise NotImplementedError

    def layout_needs(self) -> LayoutNeeds:
        """The rotation, and the window that the engine is called with if it is called with one."""
        return LayoutNeeds(self.rotary, self.engine_window())

    def engine_window(self) -> int | None:
        """The window in which `attend` calls the engine without labels; None for whole documents."""
        return None

    def cached_keys(self) -> int | None:
        """The number of past keys that a later query can still see; None for all."""
        return None

    def rows_of_earlier_slices(self) -> int | None:
        """The number of rows before a slice that it needs; None for all."""
        return self.cached_keys()

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection | None:
        """Label the tokens x [B, T, D] at positions [B or 1, T], from query and key before the rotation; or None."""
        return None

    def place(
        self, x: Tensor, query: Tensor, key: Tensor, layout: Layout, state: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys that know where their tokens stand; keys are cached like this.

        Args:
            x: the tokens [B, T, D].
            query, key: [B, T, Hq or Hkv, head_dim].
            layout: positions and angles of the tokens.
            state: as in `forward`.

        Returns:
            Query and key, and what the next call needs of these tokens for the same, `AttentionState.carried`.
        """
        if self.context is not None:
            return self.context(x, query, key, state)
        angles = layout.cosine, layout.sine
        if layout.cosine is not None and query.shape[1] == 1 and not torch.is_grad_enabled():  # one rotation, not two
            heads = query.shape[2], key.shape[2]
            turned, keys = torch.split_with_sizes(rotate(torch.cat((query, key), 2), *angles), heads, 2)
            return turned, keys, None
        return rotate(query, *angles), rotate(key, *angles), None

    def losses_of(self, means: Tensor) -> dict[str, Tensor]:
        """Auxiliary losses, each a mean over rows, from the `means` of `select`; here they are of whole rows."""
        return {}

    def rows(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None) -> Rows:
        """The inputs of attention, from rotated queries and keys."""
        if query.dtype != value.dtype or key.dtype != value.dtype:
            query, key = query.to(value.dtype), key.to(value.dtype)
        return Rows(query, key, value, document_ids)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, T, Hq, head_dim], key and value [B, T, Hkv, head_dim], normalised and not yet rotated."""
        heads = *x.shape[:2], -1, self.head_dim
        query, key, value = (applied(layer, x).view(heads) for layer in (self.query, self.key, self.value))
        return applied(self.query_norm, query), applied(self.key_norm, key), value

    def forward(
        self, x: Tensor, *, state: Any = None, document_ids: Tensor | None = None, layout: Layout | None = None
    ) -> MixerOutput:
        """Mix `x` [B, T, D] along T: positions, projections, labels, rotation, attention, output, in this order.

        Args:
            x, state, document_ids: see `Mixer.forward`.
            layout: what `layouts` makes of these rows, or `layout_after` of a cache; None makes it here, as after a
                state of the mixer's own.
        """
        batch, length = checked_sizes(x, self.d_model, document_ids, state, (self.state_type(), Slices, Cache))
        ids = continued_ids(document_ids, state, batch, length)
        if layout is None or not (state is None or isinstance(state, Slices | Cache)):
            layout = layout_after(self.layout_needs(), state, ids, length, x.device)
        query, key, value = self.project(rounded_once(x))
        routing = x if self.head_router is None else self.head_router.reads(x, query)
        # Labels come from unrotated heads: they must depend on content alone, not on where a token stands.
        chosen = self.select(x, query, key, layout.positions)
        if chosen is not None and chosen.key_gate is not None:
            value = value * chosen.key_gate.unsqueeze(-1).to(value.dtype)
        if chosen is not None and chosen.means is not None:
            # Means first, losses after: a loss of each slice's own mean would differ from that of whole rows.
            chosen.losses |= self.losses_of(state.mean(chosen.means) if isinstance(state, Slices) else chosen.means)
        # Keys are cached after they are placed, as positions within a document never change.
        query, key, carried = self.place(x, query, key, layout, state)
        rows = self.rows(query, key, value, ids)
        rows.carried, rows.sinks = carried, self.sink_logit
        rows = self._with_options(rows, x, layout, state)
        if chosen is not None:
            rows.query_labels, rows.key_labels = chosen.query_labels, chosen.key_labels
        mixed, metrics, after = self._attended(rows, state, layout)
        losses: dict[str, Tensor] = {}
        if self.context is not None and self.training:
            metrics = metrics | self.context.metrics(x)
        if chosen is not None:
            losses, metrics = chosen.losses, chosen.metrics | metrics
            if chosen.query_gate is not None:
                mixed = mixed * chosen.query_gate.unsqueeze(-1).to(mixed.dtype)
        if self.output_gate is not None:
            mixed = gated(mixed, self.output_gate, x)
        if self.head_router is not None:
            mixed, balance, measured = self.head_router.applied(mixed, routing, state)
            losses, metrics = losses | balance, metrics | measured
        return MixerOutput(applied(self.output, mixed.flatten(2)), after, losses, metrics)

    def _with_options(self, rows: Rows, x: Tensor, layout: Layout, state: Any) -> Rows:
        """The rows with the mixer's biases of scores, which may widen queries and keys by columns."""
        if self.bias is not None:
            tensors = rows.query, rows.key, x, layout.positions
            rows.query, rows.key, rows.scale, sums = self.bias.widened(*tensors, state)
            rows.carried, rows.gain = (rows.carried if sums is None else sums), self.gain
        if self.key_bias is not None:
            rows = with_key_bias(rows, self.key_bias)
        if self.alibi:
            rows.slopes = alibi_slopes(self.num_heads, x.device)
        return rows

    def _attended(self, rows: Rows, state: Any, layout: Layout) -> tuple[Tensor, dict[str, Metric], Any]:
        """The mixed heads, metrics and the state after these tokens, by what the state is."""
        if state is None:
            rows.layout = layout
            return *self.attend(rows), None
        if isinstance(state, Cache):
            return attend_cached(rows, state, layout.positions), {}, state
        if isinstance(state, Slices) and state.carried is None:
            return *self.attend_after(rows, state), None
        next_position = layout.positions[:, -1].expand(rows.query.shape[0]) + 1
        if isinstance(state, Slices):
            rows = after_earlier_slices(rows, state, self.rows_of_earlier_slices())
            return *self.attend(rows), self._kept(rows, next_position)
        return self.attend_from(rows, state, next_position)

    def _kept(self, rows: Rows, next_position: Tensor) -> AttentionState:
        limit = self.cached_keys()
        start = 0 if limit is None else max(0, rows.key.shape[1] - limit)
        state = AttentionState(
            rows.key, rows.value, rows.key_labels, rows.document_ids, next_position, carried=rows.carried
        )
        return state if start == 0 else state.latest(rows.key.shape[1] - start, copy=True)

    def init_state(self, batch: int) -> AttentionState:
        """An empty cache for `batch` rows, on the mixer's device and in its dtype."""
        weight = self.value.weight
        widths = self.key_dim(weight.dtype), self.head_dim
        key, value = (weight.new_empty(batch, 0, self.num_kv_heads, width) for width in widths)
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return AttentionState(key, value, None, None, position, self.carried_before(batch))

    def carried_before(self, batch: int) -> Tensor | None:
        """What `place` needs before the first token, for `batch` rows; None for nothing."""
        carrier = self.bias if self.context is None else self.context
        return None if carrier is None else carrier.zeros(batch)

    def carried_bytes(self) -> int:
        """Bytes of `carried_before` for one row."""
        carrier = self.bias if self.context is None else self.context
        return 0 if carrier is None else carrier.state_bytes()

    def key_dim(self, dtype: torch.dtype) -> int:
        """Channels of a cached key of this dtype."""
        return self.head_dim + (0 if self.bias is None else self.bias.columns(dtype))

    def row_bytes(self) -> int:
        """Bytes of a cached key and its value, of one head."""
        weight = self.value.weight
        return (self.key_dim(weight.dtype) + self.head_dim) * weight.element_size()

    def state_bytes(self, length: int) -> int:
        """Bytes of keys and values one row holds after `length` tokens."""
        limit = self.cached_keys()
        rows = length if limit is None else min(length, limit)
        return rows * self.num_kv_heads * self.row_bytes() + self.carried_bytes()

    def step_bytes(self, length: int) -> int:
        """Bytes of the keys and values that the next token sees, its own among them."""
        return self.seen_bytes(length, 1)

    def decoding_bytes(self, length: int, steps: int) -> int:
        """The sum of `step_bytes`: at once where that is of the keys and values that are seen, and of no more."""
        plain = type(self).step_bytes is SoftmaxAttention.step_bytes
        return self.seen_bytes(length, steps) if plain else super().decoding_bytes(length, steps)

    def seen_bytes(self, length: int, steps: int) -> int:
        """Bytes of the keys and values that `steps` tokens after `length` others see, each its own among them."""
        seen = self.visible_pairs(length + steps) - self.visible_pairs(length)
        return seen * self.num_kv_heads * self.row_bytes() + steps * self.carried_bytes()

    def pair_flops(self) -> int:
        """Operations of a visible pair in all heads: 2 * head_dim for its score and as many for its value."""
        wide = self.head_dim + (0 if self.bias is None else self.bias.rank)
        scored = wide + self.head_dim + (2 * self.head_dim if self.gain else 0)  # a gain takes a softmax without it
        return 2 * self.num_heads * scored

    def flops(self, length: int) -> int:
        """Projections, and scores and values of every visible pair.

        A bias of columns makes scores wider. No head of a mixture is skipped.
        """
        weights = weight_count(self.children())
        options = sum(part.flops(length) for part in (self.context, self.bias, self.head_router) if part is not None)
        return 2 * length * weights + options + self.pair_flops() * self.visible_pairs(length)
