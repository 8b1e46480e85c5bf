"""`shorten=specpc`: of a long prompt the model reads only the tokens that a draft attends to.

SpecPC (Galim et al. 2025, arXiv 2506.08373). With queries i of the draft's newest w prompt tokens and of the tokens
that it writes behind them,

    score_j = max over layers, heads and i of  r_i a_ij,    r from 0 to 1 over the window, and 1 behind the prompt
    pooled  = the largest score of `pool` neighbours

The window is kept, then the token with the best pooled score and its neighbours, nearest first, then the next best,
until the budget is full. The model reads these in their order, from position 0 on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.caches.scores import attention_weights
from longmix.caches.watched import Watched, WatchedCache
from longmix.errors import ConfigError
from longmix.generation.prompts import continuation
from longmix.generation.session import Session
from longmix.mixers.parts.states import caches
from longmix.model.backbone import LanguageModel


@dataclass(frozen=True, kw_only=True)
class SpecPC:
    """The settings.

    Args:
        budget: tokens of a prompt that are kept; a shorter one stays whole.
        window: newest tokens, whose queries choose and which are kept.
        pool: width of the pooling over positions; 1 for none.
        neighbours: tokens around a chosen one that are kept with it, itself among them, nearest first; None for `pool`.
        first_layer: index of the draft's first layer that chooses.
        lookahead: tokens that the draft writes; the queries of all but the last choose too.

    Raises:
        ConfigError: naming the setting.
    """

    budget: int = 1024
    window: int = 64
    pool: int = 64
    neighbours: int | None = None
    first_layer: int = 0
    lookahead: int = 1

    def __post_init__(self) -> None:
        least = {"window": 1, "pool": 1, "neighbours": 1, "first_layer": 0, "lookahead": 1, "budget": self.window}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                reason = ", the window, which is kept" if name == "budget" else ""
                raise ConfigError(f"shorten.{name}={value} must be at least {smallest}{reason}.")

    @torch.no_grad()
    def shortened(self, draft: LanguageModel, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Return the tokens that are kept of each prompt, int64, in their order.

        Args:
            draft: the model that chooses, in evaluation mode.
            prompts: int64 [T] each, on the draft's device.

        Raises:
            ConfigError: no layer of the draft can choose.
        """
        found = list(prompts)
        long = [row for row, prompt in enumerate(prompts) if len(prompt) > self.budget]
        if not long:
            return found
        given = [prompts[row] for row in long]
        for row, prompt, score in zip(long, given, self.scores(draft, given), strict=True):
            found[row] = prompt[self.chosen(score)]
        return found

    def scores(self, draft: LanguageModel, prompts: Sequence[Tensor]) -> list[Tensor]:
        """The score of each token of prompts that are longer than the window.

        Raises:
            ConfigError: see `shortened`.
        """
        kind = Watched(queries=self.window + self.lookahead - 1)
        if not any(mixer.takes_cache(kind) for mixer in draft.mixers()):
            raise _no_layer(self)
        session = Session(draft, len(prompts), kind)
        session.reserve(max(map(len, prompts)) + self.lookahead)
        session.prefill(prompts)
        continuation(session, self.lookahead)
        watched = [cache for cache in caches(session.state) if isinstance(cache, WatchedCache)]
        watched = [cache for cache in watched if cache.shape.layer >= self.first_layer]
        if not watched:
            raise _no_layer(self)
        end = session.length - self.lookahead + 1
        best = torch.stack([self._of_layer(cache) for cache in watched]).amax(0)
        return [row[end - len(prompt) : end] for row, prompt in zip(best, prompts, strict=True)]

    def _of_layer(self, cache: WatchedCache) -> Tensor:
        assert cache.newest_query is not None
        begins = cache.length - cache.next_position if cache.ragged else None
        return self.of_attention(cache.newest_query, cache.whole()[0], begins, cache.scale)

    def of_attention(
        self, query: Tensor, key: Tensor, first: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """What the keys got in one layer.

        Args:
            query: [B, window + lookahead - 1, Hq, K], the newest queries.
            key: [B, Hkv, S, K], the keys of all tokens, those of the queries at their end.
            first: int64 [B], the first key of each row; None for 0.
            scale: the factor on the scores, K ** -0.5 by default.

        Returns:
            [B, S], float64 for float64 inputs and float32 otherwise.
        """
        rising = torch.linspace(0, 1, self.window, device=query.device, dtype=torch.float64)
        share = rising.new_ones(query.shape[1])
        if self.window > 1:
            share[: self.window] = rising
        parts = []
        for some, weights in attention_weights(query, key, first=first, scale=scale):
            parts.append((weights * share[some, None].to(weights.dtype)).amax((1, 2, 3)))
        return torch.stack(parts).amax(0)

    def chosen(self, score: Tensor) -> Tensor:
        """The places of the tokens that are kept, int64 [budget] in ascending order; of two equal ones the earlier.

        Args:
            score: [L], longer than the budget.
        """
        return self.filled(self.pooled(score).sort(descending=True, stable=True).indices, len(score))

    def pooled(self, score: Tensor) -> Tensor:
        """The largest score of the neighbours of each token, [L]; with an even `pool` one more of the later ones."""
        left = (self.pool - 1) // 2
        padded = F.pad(score[None], (left, self.pool - 1 - left))
        return F.max_pool1d(padded, self.pool, 1)[0]

    def filled(self, order: Tensor, length: int) -> Tensor:
        """The window and as many tokens with their neighbours as the budget holds, int64 [budget], ascending.

        Args:
            order: int64 [n], places of tokens, the best first; at least `budget` of them.
            length: tokens of the prompt.
        """
        best, device = order[: self.budget], order.device
        around = self.pool if self.neighbours is None else self.neighbours
        near = torch.arange(around, device=device) - (around - 1) // 2
        near = near[near.abs().argsort(stable=True)]
        with_near = (best[:, None] + near).clamp(0, length - 1).flatten()
        listed = torch.cat((torch.arange(length - self.window, length, device=device), with_near))
        rank = torch.full((length,), len(listed), device=device)
        rank.scatter_reduce_(0, listed, torch.arange(len(listed), device=device), "amin")
        return rank.sort(stable=True).indices[: self.budget].sort().values


def _no_layer(settings: SpecPC) -> ConfigError:
    return ConfigError(
        "shorten=specpc needs a draft with layers of softmax attention that see all tokens, such as flash, and draft= "
        f"has none from layer {settings.first_layer} on; give another draft, or a smaller shorten.first_layer."
    )
