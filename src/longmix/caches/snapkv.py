"""`cache=snapkv`: of a prompt, the tokens that its newest queries attend to (Li et al. 2024, arXiv 2404.14469).

    I_j = max over the newest w queries i and the heads of a group of softmax_j(q_i . k_j)      for j before them
    P_j = max of I over the `pool` positions around j

The budget goes to the w newest tokens and the best P of each key head. `cache=speckv` (Galim et al. 2025, arXiv
2506.08373) also asks queries that do not exist yet: a draft model writes the next tokens, the model reads them after
the prompt, and their queries count with the newest ones. They are then forgotten, but for what they chose.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape
from longmix.caches.evicting import AskedCache, EvictingKind
from longmix.caches.scores import attention_weights, budgets_of, check_budget, tokens_of
from longmix.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SnapKV(EvictingKind):
    """The best of a prompt, chosen once at its end; a prompt within the budget stays as it is.

    Args:
        budget: tokens of a prompt that stay, the newest ones among them; below 1 a share of it.
        window: newest tokens, whose queries choose and which all stay; w.
        pool: odd width of the pooling over positions; 1 for none.
        pooling: "max" or "mean" of the importance of neighbours.
        reduction: "max" or "mean" of a key's weights over queries and the heads of a group.

    Raises:
        ConfigError: a setting is out of range.
    """

    name: ClassVar[str] = "snapkv"
    takes_star: ClassVar[bool] = True
    budget: float = 512
    window: int = 32
    pool: int = 7
    pooling: Literal["max", "mean"] = "max"
    reduction: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget("budget", self.budget, self.window + 1)
        if self.window < 1:
            raise ConfigError(f"cache.window={self.window} must be at least 1.")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ConfigError(f"cache.pool={self.pool} must be odd and at least 1.")
        for name, word in (("pooling", self.pooling), ("reduction", self.reduction)):
            if word not in ("max", "mean"):
                raise ConfigError(f"cache.{name}={word} must be max or mean.")

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache."""
        return SnapKVCache(self, shape)

    def bytes(self, shape: CacheShape, length: int) -> int:
        """Keys and values within the budget."""
        return shape.token_bytes * min(length, tokens_of(self.budget, length))

    def step_bytes(self, shape: CacheShape, length: int) -> int:
        """What stays of the prompt, and the token itself."""
        return self.bytes(shape, length) + shape.token_bytes

    def of_group(self, scores: Tensor) -> Tensor:
        """See `EvictingKind.of_group`: by `reduction`."""
        return scores.amax(2) if self.reduction == "max" else scores.mean(2)


@dataclass(frozen=True, kw_only=True)
class SpecKV(SnapKV):
    """`SnapKV` with the queries of a draft's continuation.

    Args:
        lookahead: tokens that the draft writes; None for as many as will be generated.

    Raises:
        ConfigError: a setting is out of range.
    """

    name: ClassVar[str] = "speckv"
    lookahead: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lookahead is not None and self.lookahead < 1:
            raise ConfigError(f"cache.lookahead={self.lookahead} must be at least 1, or null for max_tokens.")

    def bytes(self, shape: CacheShape, length: int) -> int:
        """Keys and values within the budget, and of the prompt's last token, which is read after the choice."""
        return super().bytes(shape, max(length - 1, 0)) + shape.token_bytes * min(length, 1)

    def lookahead_tokens(self, max_tokens: int) -> int | None:
        """See `CacheKind.lookahead_tokens`."""
        return max_tokens if self.lookahead is None else self.lookahead


class SnapKVCache(AskedCache):
    """See `SnapKV`.

    Attributes:
        more_queries: how many queries it remembers beyond the window.
    """

    kind: SnapKV

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.more_queries = 0

    @property
    def asking(self) -> int:
        """See `AskedCache.asking`."""
        return self.kind.window + self.more_queries

    def prompt_ended(self) -> None:
        """Keep what the newest queries attend to."""
        if not self.ended and self.newest_query is not None:
            self._choose(self.newest_query, self.whole()[0], self.begins)

    def looking_ahead(self, count: int) -> Self:
        """See `Cache.looking_ahead`; all its queries choose."""
        other = self.fork(1)
        other.more_queries = count
        return other

    def prompt_ended_before(self, ahead: Cache) -> None:
        """Keep what the newest queries and those of tokens to come attend to.

        Args:
            ahead: what `looking_ahead` returned, after it read them.
        """
        assert isinstance(ahead, SnapKVCache)
        if not self.ended and self.newest_query is not None:
            assert ahead.newest_query is not None
            begins = ahead.begins.clamp(max=self.length)  # a document that begins behind the prompt chooses nothing
            self._choose(ahead.newest_query, ahead.whole()[0], begins)

    def _choose(self, query: Tensor, key: Tensor, begins: Tensor) -> None:
        """Drop all but the budget of the tokens so far.

        Args:
            query: [B, n, Hq, K], of the newest tokens and those ahead.
            key: [B, Hkv, S, K], of all tokens and those ahead.
            begins: int64 [B], the first token of each row's document.
        """
        kind, slots = self.kind, self.length
        self.ended, self.newest_query = True, None
        lengths = slots - begins
        budgets = torch.minimum(budgets_of(kind.budget, lengths.clamp(min=1)), lengths)
        most = min(slots, tokens_of(kind.budget, slots))
        if most == slots:
            return
        newest = slots - min(kind.window, slots)  # the first token of the window
        slot = torch.arange(slots, device=key.device)
        importance = self._importance(query, key, begins)[..., :newest]
        importance = importance.masked_fill((slot[:newest] < begins[:, None])[:, None, None], 0.0)
        scores = F.pad(self._pooled(importance), (0, slots - newest))
        # of the window all stays, the newest first where the budget is smaller
        scores = torch.where(slot >= newest, slot + 2.0, scores)
        allowed = slot >= begins[:, None]
        if kind.representatives:
            index = self._with_representatives(scores, allowed, budgets, most, newest)
        else:
            index, _ = kind.chosen(scores, allowed[:, None], budgets, most)
        self.evict(index, budgets)

    def _with_representatives(self, scores: Tensor, allowed: Tensor, budgets: Tensor, most: int, newest: int) -> Tensor:
        """The window, which is nobody's representative, and a choice among the tokens before it."""
        batch, heads, _, slots = scores.shape
        window = torch.minimum(budgets, torch.full_like(budgets, slots - newest))
        before, _ = self.kind.chosen(scores[..., :newest], allowed[:, None, :newest], budgets - window, most)
        slot = torch.arange(newest, slots, device=scores.device)
        inside = torch.where(slot >= slots - window[:, None], slot, slots)[:, None].expand(batch, heads, -1)
        before = before.masked_fill(before >= newest, slots)
        return torch.cat((before, inside), -1).sort(-1).values[..., :most]

    def _importance(self, query: Tensor, key: Tensor, begins: Tensor) -> Tensor:
        """[B, Hkv, G, S]: each key's weight, the largest or the mean one over the queries."""
        largest, parts = self.kind.reduction == "max", []
        for _, weights in attention_weights(query, key, first=begins, scale=self.scale):
            part = weights.amax(3) if largest else weights.sum(3)
            parts.append(F.pad(part, (0, key.shape[2] - part.shape[3])))
        if largest:
            return torch.stack(parts).amax(0)
        asking = (key.shape[2] - begins).clamp(1, query.shape[1])
        return torch.stack(parts).sum(0) / asking[:, None, None, None]

    def _pooled(self, importance: Tensor) -> Tensor:
        """Importance [B, Hkv, G, S] over neighbouring positions; of a group before the heads are pooled."""
        kind, width = self.kind, self.kind.pool
        if not kind.representatives:
            importance = kind.of_group(importance).unsqueeze(2)
        if width == 1 or importance.shape[-1] == 0:
            return importance
        rows = importance.flatten(0, 2).unsqueeze(1)
        pool = F.max_pool1d if kind.pooling == "max" else F.avg_pool1d
        return pool(rows, width, stride=1, padding=width // 2).reshape(importance.shape)
