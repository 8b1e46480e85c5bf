"""`cache=h2o`: the newest tokens, and those that got the most attention (Zhang et al. 2023, arXiv 2306.14048).

The score of a key is the sum of its attention weights over all queries since it came, and over the heads of a group.
After each step the `recent` newest tokens stay and the best `budget - recent` of the others: the token that is no
longer among the newest takes the slot of the worst, if it is better. A dropped token's score is gone with it.

Sums favour early tokens, which more queries have seen; `mean` divides by their number.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from longmix.caches.cache import Cache, CacheShape
from longmix.caches.evicting import EvictingKind
from longmix.caches.h2o_slots import H2OCache
from longmix.caches.scores import check_budget, tokens_of
from longmix.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class H2O(EvictingKind):
    """The newest tokens and the heavy hitters.

    Args:
        budget: tokens that stay; below 1 a share of the prompt.
        recent: how many of them are the newest; a share where `budget` is one.
        mean: divide a token's score by the number of queries that saw it.
        when: "prompt" reads all of a prompt before tokens are dropped; "piece" drops them after each `piece` tokens, so
            that a prompt needs no more than budget + piece.
        piece: tokens of a prompt that are read at once with when=piece, counted from its end.

    Raises:
        ConfigError: a setting is out of range.
    """

    name: ClassVar[str] = "h2o"
    step_by_step: ClassVar[bool] = True
    budget: float = 0.2
    recent: float = 0.1
    mean: bool = False
    when: Literal["prompt", "piece"] = "prompt"  # type: ignore[misc]
    piece: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget("budget", self.budget)
        check_budget("recent", self.recent)
        if (self.budget < 1) != (self.recent < 1) or self.recent > self.budget:
            raise ConfigError(
                f"cache.recent={self.recent} must be at most cache.budget={self.budget}, and a share if that is one."
            )
        if self.when not in ("prompt", "piece"):
            raise ConfigError(f"cache.when={self.when} must be prompt or piece.")
        if self.piece < 1:
            raise ConfigError(f"cache.piece={self.piece} must be at least 1.")
        if self.when == "piece" and self.budget < 1:
            raise ConfigError(f"cache.when=piece needs a number of tokens; cache.budget={self.budget} is a share.")
        if self.when == "piece" and self.representatives:
            raise ConfigError("cache.representatives are chosen once, from a whole prompt; leave cache.when=prompt.")

    @property
    def piece_tokens(self) -> int | None:
        """See `CacheKind.piece_tokens`."""
        return self.piece if self.when == "piece" else None

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache."""
        return H2OCache(self, shape)

    def slots(self, length: int) -> tuple[int, int]:
        """How many heavy hitters and newest tokens a prompt of `length` tokens keeps."""
        return tokens_of(self.heavy, length, 0), tokens_of(self.recent, length)

    @property
    def heavy(self) -> float:
        """The budget without the newest tokens; 0 for none."""
        return self.budget - self.recent

    def bytes(self, shape: CacheShape, length: int) -> int:
        """Keys, values and scores within the budget."""
        return self._bytes(shape, length, *self.slots(length))

    def step_bytes(self, shape: CacheShape, length: int) -> int:
        """The same, with one more token within what the prompt was given."""
        return self._bytes(shape, length + 1, *self.slots(length))

    def _bytes(self, shape: CacheShape, length: int, heavy: int, recent: int) -> int:
        exact = torch.promote_types(shape.dtype, torch.float32).itemsize
        if length <= heavy + recent:
            return length * (shape.token_bytes + exact * shape.key_heads * self.score_heads(shape))
        arrived = 4 * shape.key_heads * heavy if self.mean else 0
        return (heavy + recent) * (shape.token_bytes + exact * shape.key_heads) + arrived

    def score_heads(self, shape: CacheShape) -> int:
        """Scores of a token for each key head before any token is dropped."""
        return shape.group if self.representatives else 1
