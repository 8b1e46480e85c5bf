"""Scatterbrain (Chen et al. 2021, arXiv 2110.15343) on blocks: near keys exactly, far keys through features.

    exact   s_ij = q_i . k_j / sqrt(d)                        keys of the own block and of `past_blocks` before it
    far     t_ij = log sum_a phi_a(q_i) phi_a(k_j)            all earlier keys of the document, m features
    y_i     = W_o (softmax over both together) v              at a cost per token that does not depend on the length

Public causal forms are not: the official one looks half a window ahead, and in another the weights sum to two. With
whole blocks for a support no key is in both parts, so that nothing is subtracted from what the features estimate, and
every weight is positive.

Positive random features are noise for long queries and keys: their relative error is about sqrt(exp(2 R) / m) at
R = |q|^2, and R is sqrt(d) for the queries of `flash`. So the far side has queries and keys of length sqrt(radius).
With `one_softmax` the exact side has too, and with `features=favor` every weight is, before it is normalised, an
unbiased estimate of that of one softmax over scores up to `radius`. Without it exact scores are those of `flash`, far
keys are told apart less, and a learned bias per head weighs one side against the other: sharp where it matters, but an
estimate of no one softmax. It trains far better, 2.95 against 3.60 bits per byte after the first 300,000 tokens of
speeches in rows of 2,048, and is the default.
"""

import math
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows, with_sinks
from longmix.mixers.parts.base import COUNT, REAL, SEED, TOKENS, ModelShape, at_most
from longmix.mixers.parts.documents import goes_on
from longmix.mixers.parts.features import FeatureMap, check_kind, enough_features, predicted_error
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Mean, MeanProduct, Metric
from longmix.mixers.parts.scatterbrain_cache import (
    FeatureRows,
    Keys,
    Queries,
    ScatterbrainState,
    parted,
    recent_limit,
    state_after,
)
from longmix.mixers.parts.scatterbrain_slices import after_earlier_slices, after_sums
from longmix.mixers.parts.scatterbrain_summaries import Blocks, Part, Pool, no_summaries, numbered, pooled
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.step_sums import summed
from longmix.notices import notice
from longmix_kernels.attention import attention, merge
from longmix_kernels.scatter import FeatureState, ScatterResult, empty_state, scatter_attention

LARGEST_RADIUS = 300.0  # cosh(2 radius) stays a float64


class ScatterbrainOptions(HeadOptions, total=False):
    """The settings that forms of Scatterbrain share; see `Scatterbrain`."""

    block: int
    past_blocks: int
    features: str
    num_features: int
    radius: float
    one_softmax: bool
    summaries: bool
    pool: Pool
    sinks: int
    feature_seed: int


class Scatterbrain(SoftmaxAttention):
    """Scatterbrain made causal. The head of this file has the equations.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`.
        block: tokens of a block, counted from the beginning of the document.
        past_blocks: blocks before the own one that are seen exactly; a superset of a window of `past_blocks * block`.
        features: "favor", "learned_exponential", "taylor" or "elu", see `FeatureMap`.
        num_features: how many; 0 is attention to the blocks alone.
        radius: squared length of queries and keys on the far side, in units in which scores are inner products.
        one_softmax: have the exact side at the same length, so that both sides are of one softmax.
        summaries: have one key stand for each earlier block instead of features (`scatterbrain_summaries`); with
            `num_features` 0. The state grows by a key per block then.
        pool: what a summary's key and query are of those of its block: "mean", or "max" channel by channel.
        sinks: learned keys, with values, that every token sees besides (Xiao et al. 2024, arXiv 2309.17453).
        feature_seed: of the draw of the features.

    Raises:
        ConfigError: naming the setting.
    """

    takes_sink_logits = True
    sizes: ClassVar = {"block": 1}
    small: ClassVar = {"num_features": 8}

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        block: int = 128,
        past_blocks: int = 1,
        features: str = "favor",
        num_features: int = 64,
        radius: float = 1.0,
        one_softmax: bool = False,
        summaries: bool = False,
        pool: Pool = "mean",
        sinks: int = 0,
        feature_seed: int = 0,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, block=block)
        at_most(COUNT, past_blocks=past_blocks, num_features=num_features, sinks=sinks)
        at_most(REAL, radius=radius)
        at_most(SEED, feature_seed=feature_seed)
        self.block, self.past_blocks, self.summaries, self.pool = block, past_blocks, summaries, pool
        self.num_features, self.radius, self.one_softmax = num_features, radius, one_softmax
        self._check(sinks)
        check_kind(features)
        seed = 1_000_003 * feature_seed + layer_index
        kind = features
        self.features = FeatureMap(kind, self.num_kv_heads, self.head_dim, num_features, seed) if num_features else None
        self.far_bias = nn.Parameter(torch.zeros(self.num_heads)) if num_features and not one_softmax else None
        self.sink_key = self.sink_value = None
        if sinks:
            self.sink_key, self.sink_value = (
                nn.Parameter(torch.zeros(sinks, self.num_kv_heads, self.head_dim)) for _ in range(2)
            )
        if kind == "favor" and 0 < num_features < enough_features(radius):
            notice(
                f"mixer.num_features={num_features} is below exp(2 * mixer.radius) = {enough_features(radius)}: the "
                f"weight of a far key is off by {predicted_error(radius, num_features):.0%} of itself on average. "
                f"Set mixer.num_features={enough_features(radius)}, or a smaller mixer.radius."
            )

    def _check(self, sinks: int) -> None:
        if self.block < 1:
            raise ConfigError(f"mixer.block={self.block} must be at least 1.")
        if self.past_blocks < 0:
            raise ConfigError(f"mixer.past_blocks={self.past_blocks} must be at least 0, which is the own block alone.")
        if self.radius <= 0:
            raise ConfigError(f"mixer.radius={self.radius} must be above 0.")
        if self.radius > LARGEST_RADIUS:
            raise ConfigError(f"mixer.radius={self.radius} must be at most {LARGEST_RADIUS}: exp(2 radius) overflows.")
        if self.summaries and self.num_features:
            raise ConfigError(
                f"mixer.summaries=true and mixer.num_features={self.num_features} would count far keys twice; "
                "set mixer.num_features=0."
            )
        if self.pool not in ("mean", "max"):
            raise ConfigError(f"mixer.pool={self.pool} is unknown; use mean or max.")
        if sinks < 0:
            raise ConfigError(f"mixer.sinks={sinks} must be at least 0, which is none.")

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Attend to near keys, sums and sinks in one softmax."""
        queries, keys = parted(rows)
        return self._merged(queries, keys, None, None, self._attend(queries, keys))

    def attend_after(self, rows: Rows, slices: Slices) -> tuple[Tensor, dict[str, Metric]]:
        """Attend as in `attend`, with near keys of earlier slices and sums over the keys before those."""
        queries, new = parted(rows)
        keys, far = self._after_earlier_slices(new, slices)
        return self._merged(queries, keys, None, None, self._attend(queries, keys, far))

    def attend_from(self, rows: Rows, state: Any, next_position: Tensor) -> tuple[Tensor, dict[str, Metric], Any]:
        """Attend as in `attend`, continuing from a state; returns the state after the new keys too."""
        assert rows.document_ids is not None
        ids = rows.document_ids.int()
        continues = goes_on(state, ids)
        number = numbered(ids, continues)
        queries, new = parted(replace(rows, document_ids=number))
        queries = replace(queries, documents=ids.shape[1] + 2)  # each new token's at most, the one before, and `GONE`
        keys, before = state.followed_by(new), state.kept_of(continues)
        result = self._attend(queries, keys, None if self.summaries else before.far)
        mixed, metrics = self._merged(queries, keys, before, number == 0, result)
        # Only a document that fills the call from its first token on has sums from before.
        before = before.kept_of(number[:, 0] == number[:, -1])
        before = replace(before, last_id=ids[:, -1], next_position=next_position, carried=rows.carried)
        sizes = self.block, self.past_blocks, self._scale(), queries.documents
        return mixed, metrics, state_after(keys, before, *sizes, self.pool)

    def state_type(self) -> type:
        """The class of the state."""
        return ScatterbrainState

    def _after_earlier_slices(self, new: Keys, slices: Slices) -> tuple[Keys, FeatureState | None]:
        """The keys of this slice behind the near keys of earlier slices, and sums over the keys before those."""
        if self.summaries:
            return after_earlier_slices(new, slices), None
        with torch.autocast(new.key.device.type, enabled=False):  # sums stay exact
            return after_sums(new, slices, self.block, self.past_blocks)

    def rows(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None) -> FeatureRows:
        """The rows of the base, with the features of queries and keys."""
        query_features = key_features = None
        exact = torch.promote_types(value.dtype, torch.float32)
        short = [F.normalize(heads.to(exact), dim=-1) for heads in (query, key)]
        if self.features is not None:
            query_features, key_features = (self.features(math.sqrt(self.radius) * heads) for heads in short)
        if self.far_bias is not None and query_features is not None:
            query_features = query_features + self.far_bias.to(exact).unsqueeze(-1)
        if self.one_softmax:
            query, key = short
        query, key = query.to(value.dtype), key.to(value.dtype)
        if self.summaries:
            key_features = pooled(query, self.num_kv_heads, self.pool)
        return FeatureRows(query, key, value, document_ids, query_features=query_features, key_features=key_features)

    def _attend(self, queries: Queries, keys: Keys, far: Any = None) -> ScatterResult:
        return scatter_attention(
            queries.query,
            keys.key,
            keys.value,
            queries.features,
            None if self.summaries else keys.features,
            block_size=self.block,
            past_blocks=self.past_blocks,
            initial_state=far,
            document_ids=keys.document_ids,
            scale=self._scale(),
        )

    def _merged(
        self, queries: Queries, keys: Keys, before: Any, goes_on: Tensor | None, result: ScatterResult
    ) -> tuple[Tensor, dict[str, Metric]]:
        """All parts in one softmax, and metrics. Queries where `goes_on` [B, T] is set also see `before`."""
        parts = [(result.output, result.logsumexp), *self._further_parts(queries, keys, before, goes_on)]
        mixed, logsumexp = parts[0] if len(parts) == 1 else merge(parts)
        metrics = self._metrics(queries.query, keys, result.exact_logsumexp - logsumexp) if self.training else {}
        return with_sinks(mixed, logsumexp, self.sink_logit), metrics

    def _further_parts(self, queries: Queries, keys: Keys, before: Any, goes_on: Tensor | None) -> list[Part]:
        """Attention to summaries and sinks."""
        parts, query = [], queries.query
        if self.summaries and keys.features is not None:
            batch, length = keys.key.shape[:2]
            blocks = Blocks.of(keys.document_ids, batch, length, self.block, query.device, queries.documents)
            found = blocks.summaries(keys.features, keys.key, keys.value, self._scale(), self.pool)
            parts.append(blocks.attend(query, *found, self.past_blocks, self._scale()))
            if goes_on is not None and before.far.key.shape[1]:
                parts.append(before.far.attend(query, goes_on, self._scale()))
        if self.sink_key is not None and self.sink_value is not None:
            sinks = (x.to(query.dtype).expand(len(query), -1, -1, -1) for x in (self.sink_key, self.sink_value))
            parts.append(self._sink_part(query, *sinks))
        return parts

    def _sink_part(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        lo = torch.zeros(1, 1, query.shape[1], dtype=torch.int32, device=query.device)
        hi = torch.full_like(lo, key.shape[1])
        return attention(query, key, value, lo=lo, hi=hi, scale=self._scale(), return_logsumexp=True)

    def _scale(self) -> float:
        return self.radius if self.one_softmax else self.head_dim**-0.5

    @torch.no_grad()
    def _metrics(self, query: Tensor, keys: Keys, exact_share: Tensor) -> dict[str, Metric]:
        """The weight of the exact part, its largest possible score, and the predicted error of the far side."""
        own_key = keys.key[:, -query.shape[1] :]
        lengths = [heads.float().norm(dim=-1) for heads in (query, own_key)]
        radius = MeanProduct.of(lengths[0] * self._scale(), lengths[1])
        metrics: dict[str, Metric] = {"exact_mass": Mean.of(exact_share.exp()), "exact_radius": radius}
        if self.features is not None and self.features.kind == "favor":
            error = predicted_error(self.radius, self.num_features)
            metrics["predicted_error"] = torch.tensor(error, device=query.device)
        return metrics

    def init_state(self, batch: int) -> Any:
        """The state before the first token, for `batch` rows."""
        weight = self.value.weight
        none = weight.new_empty(batch, 0, self.num_kv_heads, self.head_dim)
        last_id = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        features: Tensor | None = None
        far: Any = None
        if self.num_features:
            far = empty_state(weight, batch, self.num_kv_heads, self.num_features, self.head_dim)
            features = far.normalizer.new_empty(batch, 0, self.num_kv_heads, self.num_features)
        elif self.summaries:
            far, features = no_summaries(weight, batch, self.num_kv_heads, self.head_dim), none
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        recent = Keys(none, none, features, last_id[:, None][:, :0])
        return ScatterbrainState(recent, far, last_id, position, carried=self.carried_before(batch))

    def state_bytes(self, length: int) -> int:
        """Bytes of recent keys, values and features, and of the sums, of one row after `length` tokens."""
        weight = self.value.weight
        exact = torch.promote_types(weight.dtype, torch.float32).itemsize
        recent = min(length, recent_limit(self.block, self.past_blocks))
        row = self.head_dim * weight.element_size()
        if self.summaries:
            left = max(0, length // self.block - self.past_blocks)
            return self.num_kv_heads * row * (3 * recent + 2 * left) + self.carried_bytes()
        rows = 2 * row + self.num_features * exact
        sums = self.num_features * (self.head_dim + 2) * exact
        return self.num_kv_heads * (recent * rows + sums) + self.carried_bytes()

    def step_bytes(self, length: int) -> int:
        """The base's bytes, and those of the sums."""
        return super().step_bytes(length) + self._sum_bytes()

    def decoding_bytes(self, length: int, steps: int) -> int:
        """The sum of `step_bytes`."""
        return self.seen_bytes(length, steps) + steps * self._sum_bytes()

    def _sum_bytes(self) -> int:
        exact = torch.promote_types(self.value.weight.dtype, torch.float32).itemsize
        return self.num_kv_heads * self.num_features * (self.head_dim + 2) * exact

    def visible_pairs(self, length: int) -> int:
        """A triangle in the own block, all of the `past_blocks` before it, and one summary for each earlier block."""
        blocks, rest = divmod(length, self.block)
        triangles = blocks * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        pairs = triangles + self.block * summed(0, length, self.block, self.past_blocks)
        if self.summaries:
            pairs += summed(0, max(0, length - self.past_blocks * self.block), self.block)
        return pairs

    def flops(self, length: int) -> int:
        """The base's operations, and those of sinks, features, sums over keys, and the reads of the sums."""
        sinks = 0 if self.sink_key is None else 4 * length * self.sink_key.shape[0] * self.num_heads * self.head_dim
        if self.features is None:
            return super().flops(length) + sinks
        heads = self.num_heads + self.num_kv_heads
        far = max(0, length - (self.past_blocks + 1) * self.block)
        sums = 2 * far * heads * self.num_features * (self.head_dim + 1)
        return super().flops(length) + sinks + self.features.flops(length, heads) + sums
