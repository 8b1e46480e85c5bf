"""Sparse FlashAttention by hashes (Pagliardini et al. 2023, arXiv 2306.01160): query i sees key j in the same bucket.

Unlike the paper's: queries and keys are normalised exactly as in `flash`; hash directions are saved with the model and
never drawn again.
"""

from typing import ClassVar, Unpack

from torch import Tensor

from longmix.errors import ConfigError
from longmix.mixers.parts.base import SEED, ModelShape, at_most
from longmix.mixers.parts.by_label import LabelAttention
from longmix.mixers.parts.hashing import AngularHash, centered, running_center
from longmix.mixers.parts.head_options import HeadOptions, Selection


class SparseFlash(LabelAttention):
    """Attention within the buckets of an angular hash of the unrotated heads: content decides, not distance.

    Args:
        shape, layer_index: see `SoftmaxAttention`, as `options`.
        buckets: number of buckets, even.
        rounds: independent hashes; a key that shares several buckets with a query counts as often.
        shared_qk: one projection is query and key, and so has one bucket per token, as in the paper; needs as many
            key-value heads as query heads.
        see_self: whether a query sees its own key. With `shared_qk` that key is the closest of all, and Reformer
            (Kitaev et al. 2020, arXiv 2001.04451) leaves it out.
        window: number of latest keys that a query sees exactly, whatever their bucket; 0 for none.
        center_decay: hash vectors less their running mean over training, which moves by 1 - `center_decay` a step; None
            hashes them as they are. What all keys have in common changes no softmax, but would fill one bucket.
        hash_seed: of the directions.

    Raises:
        ConfigError: besides those of the base, `shared_qk` with grouped heads, `see_self=false` with a window.
    """

    small: ClassVar = {"buckets": 4}
    recompiles = True

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        buckets: int = 16,
        rounds: int = 1,
        shared_qk: bool = False,
        see_self: bool = True,
        window: int = 0,
        center_decay: float | None = 0.9,
        hash_seed: int = 0,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(
            shape,
            layer_index,
            num_labels=buckets,
            rounds=rounds,
            window=window,
            see_self=see_self,
            **options,
        )
        if shared_qk and self.num_kv_heads != self.num_heads:
            raise ConfigError(
                f"mixer.shared_qk=true makes every query a key, so mixer.num_kv_heads={self.num_kv_heads} "
                f"must be the number of query heads, {self.num_heads}."
            )
        if window and not see_self:
            raise ConfigError(f"mixer.see_self=false contradicts mixer.window={window}, which holds the token itself.")
        self.shared_qk = shared_qk
        if shared_qk:
            del self.key, self.key_norm
        at_most(SEED, hash_seed=hash_seed)
        seed = 1_000_003 * hash_seed + layer_index
        self.hash = AngularHash(self.num_kv_heads, self.head_dim, buckets, rounds, seed)
        self.query_center = running_center(self.num_heads, self.head_dim, center_decay)
        self.key_center = None if shared_qk else running_center(self.num_kv_heads, self.head_dim, center_decay)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project as the base does; with `shared_qk` the query is the key too."""
        if not self.shared_qk:
            return super().project(x)
        query, value = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.query, self.value))
        query = self.query_norm(query)
        return query, query, value

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """Label queries and keys with their buckets; hash once where query and key are the same."""
        query_labels = self.hash(centered(query, self.query_center))
        return Selection(query_labels, query_labels if self.shared_qk else self.hash(centered(key, self.key_center)))

    def visible_pairs(self, length: int) -> int:
        """The pairs there would be if all buckets were equally large."""
        return self.rounds * self.pairs_in_reach(length) // self.num_labels + self.window_pairs(length)

    def flops(self, length: int) -> int:
        """The base's operations, and those of the hash."""
        hashed = self.num_heads + (0 if self.shared_qk else self.num_kv_heads)
        return super().flops(length) + self.hash.flops(length, hashed)
