"""Scatterbrain with keys that are selected by content: exact blocks, exact buckets, and everything far, in one softmax.

    exact      s_ij = q_i . k_j / sqrt(d)                  keys of the own block and of `past_blocks` before it
    selected   s_ij                                        the last `window` earlier keys in the query's hash bucket
    far        t_ij = log sum_a phi_a(q_i) phi_a(k_j)      all earlier keys of the document, the selected ones included

No key is in both the exact and the selected part, but every selected key is in the far part too: its weight is
exp(s_ij) + exp(t_ij). Chen et al. 2021 (arXiv 2110.15343) subtract what the features estimate of a selected key, which
here would cancel badly and make weights negative. Counting twice is stable, and biased: even with `one_softmax` this
estimates no softmax, it leans towards what is selected. Hence the name of its own.

A key's bucket follows from the key alone (`AngularHash`), and keys join those to select from when their block leaves
the exact part, so that nothing later has a say, and a token costs the same at any length: what is remembered of them is
a ring of `window` keys for each bucket.
"""

from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import SEED, TOKENS, ModelShape, at_most
from longmix.mixers.parts.hashing import AngularHash, centered, running_center
from longmix.mixers.parts.head_options import Selection
from longmix.mixers.parts.rings import Rings, with_rings
from longmix.mixers.parts.scatterbrain_cache import Keys, Queries, ScatterbrainState, recent_limit
from longmix.mixers.parts.scatterbrain_slices import after_earlier_slices
from longmix.mixers.parts.scatterbrain_summaries import GONE, Part
from longmix.mixers.scatterbrain import Scatterbrain, ScatterbrainOptions
from longmix_kernels.attention import attention, order_by_label
from longmix_kernels.scatter import FeatureState, exact_bounds


class ScatterbrainContent(Scatterbrain):
    """Scatterbrain that also sees its hash bucket exactly. The head of this file has the equations.

    Args:
        shape, layer_index, settings: see `Scatterbrain`.
        buckets: of the hash that selects keys, even.
        window: keys of its bucket that a query sees at most, the latest ones.
        center_decay, hash_seed: see `SparseFlash`.

    Raises:
        ConfigError: naming the setting.
    """

    sizes: ClassVar = {"block": 1, "window": 1}
    changeable: ClassVar = (*Scatterbrain.changeable, "window")
    small: ClassVar = {"num_features": 8, "buckets": 4}

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        buckets: int = 16,
        window: int = 128,
        center_decay: float | None = 0.9,
        hash_seed: int = 0,
        **settings: Unpack[ScatterbrainOptions],
    ) -> None:
        super().__init__(shape, layer_index, **settings)
        if window < 1:
            raise ConfigError(f"mixer.window={window} must be at least 1; mixer=scatterbrain selects no keys.")
        at_most(TOKENS, window=window)
        at_most(SEED, hash_seed=hash_seed)
        self.buckets, self.window = buckets, window
        self.hash = AngularHash(self.num_kv_heads, self.head_dim, buckets, 1, 1_000_003 * hash_seed + layer_index)
        self.query_center = running_center(self.num_heads, self.head_dim, center_decay)
        self.key_center = running_center(self.num_kv_heads, self.head_dim, center_decay)

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """Hash queries and keys before the rotation."""
        return Selection(self.hash(centered(query, self.query_center)), self.hash(centered(key, self.key_center)))

    def _further_parts(self, queries: Queries, keys: Keys, before: Any, goes_on: Tensor | None) -> list[Part]:
        """The base's further parts, and attention to the selected keys."""
        parts = super()._further_parts(queries, keys, before, goes_on)
        rows = Rows(queries.query, keys.key, keys.value, keys.document_ids, queries.labels, keys.labels)
        length = queries.query.shape[1]
        if before is None:
            parts.append(self._selected(rows, self._first_exact(rows)))
        elif length == 1:
            parts.append(self._selected_by_one(rows, before.rings))
        else:
            parts.append(self._selected_after(rows, before))
        return parts

    def _after_earlier_slices(self, new: Keys, slices: Slices) -> tuple[Keys, FeatureState | None]:
        """All keys of earlier slices, since any of them may be selected."""
        return after_earlier_slices(new, slices), None

    def _first_exact(self, rows: Rows) -> Tensor:
        """The first key row that each query sees exactly, int32 [B or 1, Tq]."""
        queries, keys = rows.query.shape[1], rows.key.shape[1]
        sizes = queries, keys, self.block, self.past_blocks
        return exact_bounds(rows.document_ids, *sizes, rows.query.device)[1][:, 0]

    def _selected(self, rows: Rows, before: Tensor) -> Part:
        """Attention to the latest keys of each query's bucket before the row `before` [B or 1, Tq]."""
        assert rows.query_labels is not None and rows.key_labels is not None
        order = order_by_label(
            rows.query_labels[..., 0],
            rows.key_labels[..., 0],
            num_labels=self.buckets + 1,
            document_ids=rows.document_ids,
            members=self.window,
            before=before,
        )
        tensors = rows.query, rows.key, rows.value
        return attention(*tensors, **order._asdict(), scale=self._scale(), return_logsumexp=True)

    def _selected_after(self, rows: Rows, before: ScatterbrainState) -> Part:
        """Attend as in `_selected`, with the keys that rings hold too; rows that are already in rings are `GONE`."""
        assert before.rings is not None and rows.document_ids is not None and rows.key_labels is not None
        gone, held = rows.document_ids == GONE, before.rings.key.shape[2] - 1
        limits = held + self._first_exact(rows)
        # Ids must not decrease, so a key that is gone keeps its document and joins a bucket that no query has.
        ids, number = torch.where(gone, 0, rows.document_ids), torch.zeros_like(before.last_id)
        labels = torch.where(gone[..., None, None], self.buckets, rows.key_labels)
        return self._selected(with_rings(replace(rows, key_labels=labels), before.rings, ids, number), limits)

    def _selected_by_one(self, rows: Rows, rings: Rings) -> Part:
        """Attend as in `_selected_after`, for one query per row: it sees all keys outside the rings exactly."""
        assert rows.query_labels is not None
        key, value, there = rings.read(rows.query_labels[:, 0, :, 0])
        key, value = key.to(rows.key.dtype), value.to(rows.value.dtype)
        hi = there.int().unsqueeze(-1)
        tensors = rows.query, key, value
        return attention(*tensors, lo=torch.zeros_like(hi), hi=hi, scale=self._scale(), return_logsumexp=True)

    def init_state(self, batch: int) -> Any:
        """The base's state with empty rings."""
        state, like = super().init_state(batch), self.value.weight
        labels = torch.empty(batch, 0, self.num_kv_heads, 1, dtype=torch.int32, device=like.device)
        rings = Rings.empty(like, batch, self.num_kv_heads, self.buckets, self.window, self.head_dim)
        return replace(state, recent=replace(state.recent, labels=labels), rings=rings)

    def state_bytes(self, length: int) -> int:
        """The base's bytes, those of recent keys' labels (int32), and those of the rings."""
        recent = min(length, recent_limit(self.block, self.past_blocks))
        ring = 2 * self.head_dim * self.value.weight.element_size() * (self.buckets * self.window + 1)
        return super().state_bytes(length) + self.num_kv_heads * (4 * recent + ring)

    def visible_pairs(self, length: int) -> int:
        """The base's pairs, and those with selected keys if all buckets are equally large."""
        pairs = super().visible_pairs(length)
        for start in range((self.past_blocks + 1) * self.block, length, self.block):
            far = start - self.past_blocks * self.block
            if far // self.buckets >= self.window:
                return pairs + (length - start) * self.window
            pairs += min(self.block, length - start) * min(self.window, far // self.buckets)
        return pairs

    def flops(self, length: int) -> int:
        """The base's operations, and those of the hash."""
        return super().flops(length) + self.hash.flops(length, self.num_heads + self.num_kv_heads)
