"""Routing Transformer (Roy et al. 2021, arXiv 2003.05997) made causal: attention within clusters of alike tokens.

    c_i = argmax_c q_i . mu_c,   c_j = argmax_c k_j . mu_c        before the rotation, at length 1
    y_i = softmax over the last `window` j <= i with c_j = c_i,   in half of the heads; the others see a local window

As published, each cluster takes its best tokens of the whole sequence, so that a later token can push an earlier one
out of its cluster. That is no language model: `mode=sequence_topk` does so, says it, and is evaluated only by prefixes
that are run alone. The other modes (`routing_modes`) ask of a token nothing but itself and what came before it. What
else differs from the paper: rotary positions in place of relative ones; queries and keys normalised as in `flash`; a
token that shares its query and key does not see itself, whose score would outweigh all others, unless it is the first
of its cluster.
"""

from dataclasses import replace
from typing import Any, ClassVar, NoReturn, Unpack

import torch
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts import routing_modes as modes
from longmix.mixers.parts.attention_state import AttentionState, Rows, continued, keys_like
from longmix.mixers.parts.base import COUNT, REAL, SEED, TOKENS, ModelShape, at_most
from longmix.mixers.parts.by_label import empty_rows
from longmix.mixers.parts.centroids import ScoreThreshold, SphericalKMeans, unit, usage
from longmix.mixers.parts.head_options import HeadOptions, Selection
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.rings import Rings, RoutingState, with_rings
from longmix.mixers.parts.scatterbrain_summaries import numbered
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.notices import notice
from longmix_kernels.attention import Ordering, attention


class Routing(SoftmaxAttention):
    """Local heads first, then routed ones.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`.
        mode: `argmax_window`, `argmax_full`, `prefix_topk`, `threshold`, or the leaky `sequence_topk`.
        clusters: centroids of each routed key head.
        window: keys of a cluster that a query sees at most; `argmax_full` has no such limit.
        local_heads: query heads that see a local window instead; None for half of them, rounded down.
        local_window: latest tokens, its own included, that a local head sees.
        shared_qk: one projection is query and key of the routed heads; needs as many key-value heads as query heads.
        clusters_per_query: nearest clusters that a query sees, merged; keys are in one. For the argmax modes.
        clusters_per_key: most clusters that a key is in, for `threshold`.
        share: of all keys that exceed a cluster's threshold; None for 1 / clusters.
        block: tokens after which `prefix_topk` chooses anew.
        centroids: "learned", or "random" for directions that never move: the baseline learned ones have to beat.
        centroid_decay: of the running k-means, per optimizer step.
        commitment: weight of the mean squared distance of unit queries and keys from their centroids.
        centroid_seed: of the centroids' first directions.

    Raises:
        ConfigError: naming the setting.
    """

    pairwise = True
    takes_sink_logits = True
    rows_in_place = False
    sizes: ClassVar = {"window": 1, "local_window": 1, "block": 1}
    changeable: ClassVar = (*SoftmaxAttention.changeable, "window", "local_window")
    small: ClassVar = {"clusters": 3}
    inherits: ClassVar = tuple(name for name in SoftmaxAttention.inherits if name != "num_kv_heads")  # see shared_qk

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        mode: str = "argmax_window",
        clusters: int = 16,
        window: int = 512,
        local_heads: int | None = None,
        local_window: int = 256,
        shared_qk: bool = True,
        clusters_per_query: int = 1,
        clusters_per_key: int = 2,
        share: float | None = None,
        block: int = 256,
        centroids: str = "learned",
        centroid_decay: float = 0.99,
        commitment: float = 1e-4,
        centroid_seed: int = 0,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, window=window, local_window=local_window, block=block)
        at_most(COUNT, clusters=clusters, clusters_per_key=clusters_per_key)
        at_most(REAL, commitment=commitment)
        at_most(SEED, centroid_seed=centroid_seed)
        group = self.num_heads // self.num_kv_heads
        self.mode = mode
        self.clusters = clusters
        self.window = window
        self.local_heads = self.num_kv_heads // 2 * group if local_heads is None else local_heads
        self.local_window = local_window
        self.shared_qk = shared_qk
        self.clusters_per_query = clusters_per_query
        self.clusters_per_key = clusters_per_key
        self.share = 1 / max(clusters, 2) if share is None else share
        self.block = block
        self.commitment = commitment
        self._check(group, centroids)
        self.local_kv_heads = self.local_heads // group
        if shared_qk:
            self._share_keys()
        heads, seed = self.num_kv_heads - self.local_kv_heads, 1_000_003 * centroid_seed + layer_index
        frozen = centroids == "random"
        self.kmeans = SphericalKMeans(heads, self.head_dim, clusters, centroid_decay, seed, frozen)
        self.threshold = None
        if mode == "threshold":
            self.threshold = ScoreThreshold(heads, clusters, self.head_dim, self.share, centroid_decay)
        self.leaky = mode == modes.LEAKY
        if self.leaky:
            self.leaky_setting = f"mixer.mode={mode}"
            notice(
                f"mixer.mode={mode} lets later tokens decide what earlier ones see, so its losses are not those of a "
                "language model, and evaluate.py takes it with task.loss.prefixes only; mixer.mode=argmax_window is "
                "causal."
            )

    def _check(self, group: int, centroids: str) -> None:
        known = (*modes.CAUSAL, modes.LEAKY)
        if self.mode not in known:
            raise ConfigError(f"mixer.mode={self.mode} is unknown; use one of {', '.join(known)}.")
        if self.mode == modes.LEAKY and self.sink_logit is not None:
            raise ConfigError(
                f"mixer.mode={self.mode} has a softmax for each cluster, so leave out mixer.sink_logits=true."
            )
        if centroids not in ("learned", "random"):
            raise ConfigError(f"mixer.centroids={centroids} is unknown; use learned or random.")
        if self.clusters < 2:
            raise ConfigError(f"mixer.clusters={self.clusters} must be at least 2; mixer=sliding_window has none.")
        if not 0 < self.share < 1:
            raise ConfigError(f"mixer.share={self.share} must be between 0 and 1, or null for 1 / mixer.clusters.")
        for key in ("window", "local_window", "block", "clusters_per_query", "clusters_per_key"):
            if getattr(self, key) < 1:
                raise ConfigError(f"mixer.{key}={getattr(self, key)} must be at least 1.")
        for key in ("clusters_per_query", *(("clusters_per_key",) if self.mode == "threshold" else ())):
            if getattr(self, key) > self.clusters:
                raise ConfigError(f"mixer.{key}={getattr(self, key)} exceeds mixer.clusters={self.clusters}.")
        if self.clusters_per_query > 1 and not self.mode.startswith("argmax"):
            raise ConfigError(
                f"mixer.clusters_per_query={self.clusters_per_query} is for argmax_window and argmax_full; "
                f"use 1 with mixer.mode={self.mode}."
            )
        if not 0 <= self.local_heads < self.num_heads or self.local_heads % group:
            raise ConfigError(
                f"mixer.local_heads={self.local_heads} must be from 0 to below the {self.num_heads} heads and a "
                f"multiple of {group}, the query heads of a key head; with local heads alone use mixer=sliding_window."
            )
        if self.shared_qk and group > 1:
            raise ConfigError(
                f"mixer.shared_qk=true makes every query a key, so mixer.num_kv_heads={self.num_kv_heads} must be the "
                f"number of query heads, {self.num_heads}; or set mixer.shared_qk=false."
            )
        if self.commitment < 0:
            raise ConfigError(f"mixer.commitment={self.commitment} must not be negative.")

    def _share_keys(self) -> None:
        """Shrink the key projection to the local heads; routed heads use their queries as keys."""
        if self.local_heads == 0:
            del self.key, self.key_norm
            return
        self.key = nn.Linear(self.d_model, self.local_heads * self.head_dim, bias=False)
        nn.init.normal_(self.key.weight, std=self.d_model**-0.5)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project as the base does; with `shared_qk` the routed heads' queries are their keys too."""
        if not self.shared_qk:
            return super().project(x)
        query, value = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.query, self.value))
        query = self.query_norm(query)
        if self.local_heads == 0:
            return query, query, value
        key = self.key_norm(self.key(x).unflatten(-1, (-1, self.head_dim)))
        return query, torch.cat((key, query[:, :, self.local_heads :].to(key.dtype)), 2), value

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """Label the routed heads: with clusters, or with scores for every cluster, as the mode needs."""
        queries = unit(query[:, :, self.local_heads :])
        keys = queries if self.shared_qk else unit(key[:, :, self.local_kv_heads :])
        query_scores = self.kmeans.scores(queries.detach())
        key_scores = query_scores if self.shared_qk else self.kmeans.scores(keys.detach())
        several = self.clusters_per_query > 1
        best = query_scores.topk(self.clusters_per_query).indices if several else query_scores.argmax(-1, keepdim=True)
        nearest = best[..., 0]
        key_nearest = nearest if self.shared_qk else key_scores.argmax(-1)
        labels = best.int()
        selection = Selection(labels, labels[..., :1] if self.shared_qk else key_nearest.int().unsqueeze(-1))
        if self.mode == modes.LEAKY:
            selection.query_labels, selection.key_labels = query_scores, key_scores
        elif self.mode == "prefix_topk":
            selection.key_labels = key_scores
        elif self.threshold is not None:
            best = key_scores.topk(self.clusters_per_key).indices
            exceeds = (key_scores > self.threshold.value).gather(-1, best)
            selection.key_labels = torch.where(exceeds, best, self.clusters).int()
            self.threshold.observe(key_scores)
        if self.training:
            sides = [(queries, nearest), (keys, key_nearest)]
            self._learn(selection, sides[:1] if self.shared_qk else sides)
        return selection

    def _learn(self, selection: Selection, sides: list[tuple[Tensor, Tensor]]) -> None:
        error = torch.stack([self.kmeans.error(vectors, labels) for vectors, labels in sides]).mean()
        for vectors, labels in sides:
            self.kmeans.observe(vectors, labels)
        if self.commitment:
            selection.losses["commitment"] = self.commitment * error
        selection.metrics |= usage(sides[-1][1], self.clusters)
        selection.metrics |= {"quantisation_error": error.detach(), "dead_clusters": self.kmeans.dead()}

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Local heads attend to their window, routed heads to what the mode lets them see."""
        local, routed = self._divided(rows)
        mixed, orderings = self._route(routed)
        metrics: dict[str, Metric] = {}
        if self.training and orderings:
            metrics["empty_rows"] = empty_rows(orderings)
        return torch.cat((*self._windowed(local), mixed), 2), metrics

    def _divided(self, rows: Rows) -> tuple[Rows, Rows]:
        """The local heads, and the routed heads with their labels."""
        heads, kv_heads = self.local_heads, self.local_kv_heads
        local = rows.heads(slice(heads), slice(kv_heads))
        routed = rows.heads(slice(heads, None), slice(kv_heads, None))
        return replace(local, query_labels=None, key_labels=None), routed

    def _windowed(self, rows: Rows) -> list[Tensor]:
        """The output of the local heads; empty without local heads."""
        if self.local_heads == 0:
            return []
        bounds = rows.bounds(self.local_window)
        if rows.plain:
            return [attention(rows.query, rows.key, rows.value, **bounds)]
        return [rows.merged([rows.attended(**bounds)])]

    def engine_window(self) -> int:
        """The window of the local heads."""
        return self.local_window

    def _route(self, rows: Rows) -> tuple[Tensor, list[Ordering]]:
        if self.mode == modes.LEAKY:
            return modes.sequence_topk(rows, self.window, self.shared_qk)
        if self.mode == "prefix_topk":
            return modes.prefix_topk(rows, self.clusters, self.window, self.block, self.shared_qk)
        return self._latest(modes.copied(rows) if self._copies() > 1 else rows)

    def _latest(self, rows: Rows) -> tuple[Tensor, list[Ordering]]:
        window = None if self.mode == "argmax_full" else self.window
        alone = self.mode != "threshold"
        return modes.latest(rows, self.clusters, window, self.shared_qk, alone=alone, copies=self._copies())

    def _copies(self) -> int:
        return self.clusters_per_key if self.mode == "threshold" else 1

    def attend_after(self, rows: Rows, slices: Slices) -> tuple[Tensor, dict[str, Metric]]:
        """As the base.

        Raises:
            ConfigError: `sequence_topk`, which needs the whole sequence at once.
        """
        if self.leaky:
            self._refuse_parts()
        return super().attend_after(rows, slices)

    def attend_from(self, rows: Rows, state: Any, next_position: Tensor) -> tuple[Tensor, dict[str, Metric], Any]:
        """Continue from a state. Without gradients, rings are changed in place, so the state passed in is used up."""
        if not isinstance(state, RoutingState):
            return super().attend_from(rows, state, next_position)
        ids = rows.document_ids
        assert ids is not None
        local, routed = self._divided(rows)
        # Before the first token the rings are empty and belong to no document.
        begun = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        if state.recent.document_ids is not None:
            begun = ids[:, 0] == state.last_id
        routed.document_ids = numbered(ids, begun)
        local = continued(local, state.recent)
        recent = self._kept(local, next_position)
        mixed, rings = self._on_rings(routed, state.rings)
        return torch.cat((*self._windowed(local), mixed), 2), {}, RoutingState(recent, rings)

    def state_type(self) -> type:
        """The class of the state."""
        return RoutingState if self._bounded() else AttentionState

    def _on_rings(self, rows: Rows, rings: Rings) -> tuple[Tensor, Rings]:
        """The output of the routed heads, and the rings with the new keys; document 0 is the one that rings hold."""
        rows = modes.copied(rows)
        assert rows.key_labels is not None and rows.document_ids is not None
        new_keys = rows.key, rows.value, rows.key_labels[..., 0]
        new_ids = rows.document_ids
        goes_on, ring_ids = new_ids[:, -1] == 0, torch.zeros_like(new_ids[:, 0])
        if rows.query.shape[1] == 1:
            rings = rings.kept_of(goes_on)
            if self.shared_qk:
                return self._one(rows, rings), rings.written(*new_keys)
            rings = rings.written(*new_keys)
            return self._one(rows, rings), rings
        mixed, _ = self._latest(with_rings(rows, rings, new_ids, ring_ids))
        return mixed, rings.kept_of(goes_on).written(*new_keys, new_ids == new_ids[:, -1:])

    def _one(self, rows: Rows, rings: Rings) -> Tensor:
        """The output [B, 1, H, head_dim] of one query per row; it reads only the rings of its clusters."""
        assert rows.query_labels is not None
        parts = []
        for turn in range(rows.query_labels.shape[-1]):
            key, value, there = rings.read(rows.query_labels[:, 0, :, turn])
            key, value = keys_like(key, rows.key), value.to(rows.value.dtype)
            lo, hi = torch.zeros_like(there), there
            if self.shared_qk and self.mode != "threshold" and turn == 0:
                # The query's own key comes first; it is seen only where the ring is empty.
                key, value = torch.cat((rows.key, key), 1), torch.cat((rows.value, value), 1)
                lo, hi = there.clamp(max=1), there + 1
            ring = replace(rows, key=key, value=value)
            parts.append(ring.attended(lo=lo.int().unsqueeze(-1), hi=hi.int().unsqueeze(-1)))
        return rows.merged(parts)

    def init_state(self, batch: int) -> Any:
        """Empty rings and a local cache, or an empty cache of all keys for modes that may see any of them.

        Raises:
            ConfigError: `sequence_topk`, which needs the whole sequence at once.
        """
        if self.leaky:
            self._refuse_parts()
        if self._bounded():
            recent = super().init_state(batch)
            recent.key, recent.value = (x[:, :, : self.local_kv_heads] for x in (recent.key, recent.value))
            heads, like = self.num_kv_heads - self.local_kv_heads, self.value.weight
            sizes = heads, self.clusters, self.window, self.head_dim, self.key_dim(like.dtype)
            return RoutingState(recent, Rings.empty(like, batch, *sizes))
        return super().init_state(batch)

    def _refuse_parts(self) -> NoReturn:
        raise ConfigError(
            f"mixer.mode={self.mode} chooses among all tokens at once and cannot go on token by token, or slice by "
            "slice; use mixer.mode=argmax_window."
        )

    def rows_of_earlier_slices(self) -> None:
        """All rows, since the latest keys of a cluster may be anywhere."""

    def _bounded(self) -> bool:
        return self.mode in ("argmax_window", "threshold")

    def cached_keys(self) -> int | None:
        """The keys that local heads still see, and at least one, which tells its document."""
        return max(1, self.local_window - 1) if self._bounded() else None

    def state_bytes(self, length: int) -> int:
        """Bytes of keys, values and the labels that the mode keeps of each key, after `length` tokens."""
        size = self.value.weight.element_size()
        heads = self.num_kv_heads - self.local_kv_heads
        row = self.row_bytes()
        if self._bounded():
            recent = min(length, max(1, self.local_window - 1))
            rows = recent * self.local_kv_heads + heads * (self.clusters * self.window + 1)
            return row * rows + self.carried_bytes()
        label = max(4, size) * self.clusters if self.mode == "prefix_topk" else 4
        return length * (row * self.num_kv_heads + label * heads) + self.carried_bytes()

    def visible_pairs(self, length: int) -> int:
        """Pairs if clusters are equally large, on average over local and routed heads."""
        full = min(self.local_window, length)
        local = full * (full + 1) // 2 + (length - full) * full
        routed = self.num_heads - self.local_heads
        return round((self.local_heads * local + routed * self._routed_pairs(length)) / self.num_heads)

    def _routed_pairs(self, length: int) -> float:
        window, share = self.window, self.share if self.mode == "threshold" else 1 / self.clusters
        if self.mode == modes.LEAKY:
            return self.clusters * min(window, length) * (min(window, length) + 1) / 2
        if self.mode == "argmax_full":
            return self.clusters_per_query * share * length * (length + 1) / 2
        if self.mode == "prefix_topk":
            block = min(self.block, length)
            best = sum(min(window, end) * min(block, length - end) for end in range(block, length, block))
            return best + length * share * block / 2
        growing = min(length, round(window / share))
        return self.clusters_per_query * (share * growing * (growing + 1) / 2 + (length - growing) * window)

    def flops(self, length: int) -> int:
        """The base's operations, and the scores of all centroids."""
        routed = self.num_heads - self.local_heads
        sides = routed if self.shared_qk else routed + self.num_kv_heads - self.local_kv_heads
        return super().flops(length) + 2 * length * sides * self.head_dim * self.clusters
