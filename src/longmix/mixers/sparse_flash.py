"""Sparse FlashAttention in two forms (Pagliardini et al. 2023, arXiv 2306.01160).

    hash    query i sees key j if an angular hash puts both into one bucket
    drop    query i sees key j if neither was dropped; a dropped query mixes nothing

Unlike the paper's: queries and keys are normalised exactly as in `flash`; hash directions are saved with the model and
never drawn again; in `drop` a threshold and not a ranking decides, so that a token's fate depends on itself alone.
"""

from statistics import NormalDist
from typing import Unpack

import torch
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.base import REAL, SEED, ModelShape, at_most
from longmix.mixers.labelled import AngularHash, LabelledAttention
from longmix.mixers.measures import Mean, Metric
from longmix.mixers.running import RunningMean
from longmix.mixers.softmax import HeadOptions, Rows, Selection
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.attention import Ordering


class HashAttention(LabelledAttention):
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
        """As the base; with `shared_qk` the key is the query."""
        if not self.shared_qk:
            return super().project(x)
        query, value = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.query, self.value))
        query = self.query_norm(query)
        return query, query, value

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """Hash queries and keys; once if they are one."""
        query_labels = self.hash(centered(query, self.query_center))
        return Selection(query_labels, query_labels if self.shared_qk else self.hash(centered(key, self.key_center)))

    def visible_pairs(self, length: int) -> int:
        """Pairs if buckets are equally large."""
        return self.rounds * self.pairs_in_reach(length) // self.num_labels + self.window_pairs(length)

    def flops(self, length: int) -> int:
        """As the base, and the hash."""
        hashed = self.num_heads + (0 if self.shared_qk else self.num_kv_heads)
        return super().flops(length) + self.hash.flops(length, hashed)


def running_center(heads: int, head_dim: int, decay: float | None) -> RunningMean | None:
    """The running mean of vectors that are hashed, or None without a decay.

    Raises:
        ConfigError: a decay outside [0, 1).
    """
    if decay is None:
        return None
    if not 0 <= decay < 1:
        raise ConfigError(f"mixer.center_decay={decay} must be from 0 to below 1, or null.")
    return RunningMean((heads, head_dim), decay)


def centered(x: Tensor, mean: RunningMean | None) -> Tensor:
    """[B, T, H, D] less the running mean, which learns of it."""
    if mean is None:
        return x
    mean.observe(x)
    return x.detach() - mean.value


KEPT, DROPPED_KEY, DROPPED_QUERY = range(3)
"""Labels of `drop`: queries and keys that are dropped share none, so they meet nobody."""


class DropAttention(LabelledAttention):
    """Attention among the queries and keys that are not dropped, chosen for every head.

    Args:
        shape, layer_index: see `SoftmaxAttention`, as `options`.
        keep: share of queries, and of keys, that are to be kept.
        score: "learned" keeps a query or key if a linear score of its token is positive; the sigmoid of the score
            gates the output or value, through which the score learns. "random" keeps by a fixed pseudo-random function
            of head and position, as the paper's language models do.
        balance: weight of the loss that holds the kept share at `keep`; only for a learned score.
        window: number of latest keys that every query sees exactly, dropped or not; 0 for none.
        drop_seed: of the random choice.

    Raises:
        ConfigError: besides those of the base, a `keep` outside (0, 1), an unknown score, a negative `balance`.
    """

    salt: Tensor

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        keep: float = 0.5,
        score: str = "learned",
        balance: float = 1.0,
        window: int = 0,
        drop_seed: int = 0,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(
            shape,
            layer_index,
            num_labels=3,
            window=window,
            **options,
        )
        if not 0 < keep < 1:
            raise ConfigError(f"mixer.keep={keep} must be a share between 0 and 1.")
        if score not in ("learned", "random"):
            raise ConfigError(f"mixer.score={score} is unknown; use learned or random.")
        if balance < 0:
            raise ConfigError(f"mixer.balance={balance} must not be negative.")
        at_most(REAL, balance=balance)
        at_most(SEED, drop_seed=drop_seed)
        self.keep = keep
        self.balance = balance
        both = self.num_heads + self.num_kv_heads
        self.score = nn.Linear(self.d_model, both) if score == "learned" else None
        if self.score is not None:
            # The normalised input has mean square 1, so scores begin with variance 1 and the wanted share above 0.
            nn.init.normal_(self.score.weight, std=self.d_model**-0.5)
            nn.init.constant_(self.score.bias, NormalDist().inv_cdf(keep))
            set_recipe(self.score.weight, Recipe("scalar"))
        else:
            generator = torch.Generator().manual_seed(1_000_003 * drop_seed + layer_index)
            self.register_buffer("salt", torch.randint(2**31, (both,), generator=generator))

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """Decide for every query and key head."""
        if self.score is None:
            kept = pseudo_random(positions, self.salt) < self.keep
            return self._selection(kept.expand(x.shape[0], -1, -1))
        score = self.score(x)
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        gate = score.sigmoid()
        selection = self._selection(score > 0)
        selection.query_gate, selection.key_gate = gate.split([self.num_heads, self.num_kv_heads], -1)
        if self.training and self.balance:
            # The kept share itself has no gradient; the mean gate falls and rises with it and lends its own.
            selection.means = (score > 0).to(gate.dtype).mean((0, 1)) + gate.mean((0, 1)) - gate.mean((0, 1)).detach()
        return selection

    def losses_of(self, means: Tensor) -> dict[str, Tensor]:
        """`balance`, of the kept share of each head."""
        return {"balance": self.balance * (means - self.keep).square().mean()}

    def _selection(self, kept: Tensor) -> Selection:
        query_kept, key_kept = kept.split([self.num_heads, self.num_kv_heads], -1)
        labels = [
            torch.where(some, KEPT, dropped).int().unsqueeze(-1)
            for some, dropped in ((query_kept, DROPPED_QUERY), (key_kept, DROPPED_KEY))
        ]
        selection = Selection(labels[0], labels[1])
        if self.training:
            shares = {"dropped_queries": query_kept, "dropped_keys": key_kept}
            selection.metrics |= {name: Mean.of(~some) for name, some in shares.items()}
        return selection

    def occupancy(self, rows: Rows, orderings: list[Ordering]) -> dict[str, Metric]:
        """Nothing: the dropped shares say it all."""
        return {}

    def visible_pairs(self, length: int) -> int:
        """Pairs if `keep` of the queries and of the keys are kept."""
        return round(self.keep**2 * self.pairs_in_reach(length)) + self.window_pairs(length)


def pseudo_random(positions: Tensor, salt: Tensor) -> Tensor:
    """Numbers in [0, 1) that look random and depend on position and salt alone: [B, T] and [H] to float32 [B, T, H].

    The 32-bit finaliser of MurmurHash3, whose constants make every input bit flip every output bit half the time.
    """
    mixed = positions.long().unsqueeze(-1) * 0x9E3779B1 + salt.long()
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        mixed = mixed & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> shift)) * multiplier
    mixed = mixed & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) >> 8).float() * 2.0**-24
