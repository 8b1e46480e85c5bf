"""HyperAttention made causal (after Han et al. 2023, arXiv 2310.05869): window, buckets and samples in one softmax.

    sum over the window            exactly
    + sum over the own bucket      exactly, of the keys before the window
    + sum over sampled keys / p    an unbiased estimate of all other keys before the window, each sampled with chance p

The three sets are disjoint and merge through their logsumexp, with all gradients. What differs from the paper: a bucket
is the hash itself, not a rank among all queries, which let later queries choose for earlier ones; the causal mask is in
the bounds, so nothing is cut into halves recursively; whether a key is a sample depends on its head and position alone;
and a sampled key of the own bucket is left out, not counted twice.
"""

import math
from dataclasses import replace
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import SEED, ModelShape, at_most
from longmix.mixers.parts.by_label import Part
from longmix.mixers.parts.hashing import pseudo_random
from longmix.mixers.parts.head_options import HeadOptions, Selection
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.sparse_flash import SparseFlash
from longmix_kernels.attention import Ordering, order_by_label

_SAMPLED = 0
_EXCLUDED = -(2.0**14)
"""Added to the score of a masked pair before scaling. At a scale of at least 1 / 16 its weight is exp(-1024) = 0."""


class Hyper(SparseFlash):
    """Exact window, exact buckets, and an unbiased estimate of the rest.

    Args:
        shape, layer_index: see `SparseFlash`, as `options`.
        sample: chance of a key to be a sample, in (0, 1).
        sample_seed: of the choice of samples.

    Raises:
        ConfigError: besides those of the base, a `sample` outside (0, 1), a window below 1.
    """

    changeable: ClassVar = (*SparseFlash.changeable, "sample")
    small: ClassVar = {"buckets": 4, "sample": 0.3}

    salt: Tensor

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        buckets: int = 16,
        window: int = 128,
        sample: float = 0.015625,
        sample_seed: int = 0,
        center_decay: float | None = 0.9,
        hash_seed: int = 0,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(
            shape,
            layer_index,
            buckets=buckets,
            window=window,
            center_decay=center_decay,
            hash_seed=hash_seed,
            **options,
        )
        if window < 1:
            raise ConfigError(f"mixer.window={window} must be at least 1: a token sees itself.")
        if not 0 < sample < 1:
            raise ConfigError(f"mixer.sample={sample} must be a chance between 0 and 1.")
        at_most(SEED, sample_seed=sample_seed)
        self.sample = sample
        generator = torch.Generator().manual_seed(1_000_003 * sample_seed + layer_index)
        self.register_buffer("salt", torch.randint(2**31, (self.num_kv_heads,), generator=generator))

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """The labels of the base, and a second one that marks the sampled keys."""
        buckets = super().select(x, query, key, positions)
        passed_over = pseudo_random(positions, self.salt) >= self.sample
        sampled = passed_over.expand(x.shape[0], -1, -1).unsqueeze(-1).int()  # `_SAMPLED` or 1
        assert buckets.key_labels is not None
        return Selection(buckets.query_labels, torch.cat((buckets.key_labels, sampled), -1))

    def further_parts(self, rows: Rows) -> list[Part]:
        """Attend to samples before the window. One more column per bucket masks those of the query's own bucket."""
        assert rows.query_labels is not None and rows.key_labels is not None
        every = torch.arange(self.num_labels, dtype=torch.int32, device=rows.query.device)
        same = (rows.query_labels[..., :1] == every).to(rows.query.dtype) * _EXCLUDED
        bucket = (rows.key_labels[..., :1] == every).to(rows.key.dtype)
        query, key = torch.cat((rows.query, same), -1), torch.cat((rows.key, bucket), -1)
        order = order_by_label(
            torch.full_like(rows.query_labels[..., 0], _SAMPLED),
            rows.key_labels[..., 1],
            num_labels=2,
            gap=self.gap,
            **rows.documents(),
        )
        wider = replace(rows, query=query, key=key, scale=self.head_dim**-0.5)
        output, logsumexp = wider.attended(**order._asdict())
        return [(output, logsumexp - math.log(self.sample))]

    @torch.no_grad()
    def occupancy(self, rows: Rows, orderings: list[Ordering]) -> dict[str, Metric]:
        """The base's metrics for the buckets; the label of the samples has none."""
        assert rows.key_labels is not None
        buckets = Rows(rows.query, rows.key, rows.value, key_labels=rows.key_labels[..., :1])
        return super().occupancy(buckets, orderings)

    def state_bytes(self, length: int) -> int:
        """The base's bytes, and a second label (int32) per key."""
        return super().state_bytes(length) + 4 * length * self.num_kv_heads

    def visible_pairs(self, length: int) -> int:
        """The base's pairs, and those with samples, whose scores are wider by one column per bucket."""
        wider = 1 + self.num_labels / (2 * self.head_dim)
        return super().visible_pairs(length) + round(wider * self.sample * self.pairs_in_reach(length))
