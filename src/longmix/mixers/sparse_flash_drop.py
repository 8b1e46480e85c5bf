"""Sparse FlashAttention among what is kept (Pagliardini et al. 2023, arXiv 2306.01160): the paper's QK-sparse form.

Query i sees key j if neither was dropped; a dropped query mixes nothing. Unlike the paper's: queries and keys are
normalised exactly as in `flash`; a threshold and not a ranking decides, so that a token's fate depends on itself alone.
"""

from statistics import NormalDist
from typing import Unpack

import torch
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import REAL, SEED, ModelShape, at_most
from longmix.mixers.parts.by_label import LabelAttention
from longmix.mixers.parts.hashing import pseudo_random
from longmix.mixers.parts.head_options import HeadOptions, Selection
from longmix.mixers.parts.metrics import Mean, Metric
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.attention import Ordering

KEPT, DROPPED_KEY, DROPPED_QUERY = range(3)
"""Labels of dropped queries and dropped keys. They differ, so that neither matches anything."""


class SparseFlashDrop(LabelAttention):
    """Attention among the queries and keys that are not dropped, chosen for every head.

    Args:
        shape, layer_index: see `SoftmaxAttention`, as `options`.
        keep: share of queries, and of keys, that are to be kept.
        score: "learned" keeps a query or key if a linear score of its token is positive; the sigmoid of the score
            gates the output or value, through which the score learns. "random" keeps by a fixed pseudo-random function
            of head and position, as the paper's language models do.
        balance: weight of the loss that holds each row's kept share at `keep`; only for a learned score.
        window: number of latest keys that every query sees exactly, dropped or not; 0 for none.
        drop_seed: of the random choice.

    Raises:
        ConfigError: besides those of the base, a `keep` outside (0, 1), an unknown score, a negative `balance`.
    """

    recompiles = True

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
        """Decide which queries and keys each head keeps."""
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
            selection.means = (score > 0).to(gate.dtype).mean(1) + gate.mean(1) - gate.mean(1).detach()
        return selection

    def losses_of(self, means: Tensor) -> dict[str, Tensor]:
        """The loss `balance`, which holds the kept share [B, H] of each row and head at `keep`.

        A share of all rows would be another one in each process and micro-batch.
        """
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
        """No metrics; the shares that `select` logs say the same."""
        return {}

    def visible_pairs(self, length: int) -> int:
        """The pairs there are if the share `keep` of queries and of keys is kept."""
        return round(self.keep**2 * self.pairs_in_reach(length)) + self.window_pairs(length)
