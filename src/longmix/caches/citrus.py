"""`cache=citrus`: a prompt is read in pieces, and a question chooses what is kept (Bai et al. 2024, arXiv 2406.12018).

The first two pieces are read at once, each later one against what is kept of those before. Then the old tokens compete:
the score of one is the mean of its attention weights over all heads and over the queries of

    standard    the piece
    single      the question, read against the old tokens before the piece
    dual        the question, for a second cache, which chooses for itself from what the first one read

The best `budget` of them stay, the same for all heads of a layer, and the piece behind them. At the end the question
chooses among all. It is read again, and the text goes on. Positions are places in the cache. Without a question the
last piece stays and what it chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from longmix.caches.cache import Advance, Cache, CacheKind, CacheShape, NewTokens, PromptReader
from longmix.caches.evicting import EvictingCache, EvictingKind
from longmix.caches.places import moved
from longmix.caches.scores import attention_mass, check_budget, tokens_of
from longmix.caches.store import Store, of_every_row, taken
from longmix.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Citrus(EvictingKind):
    """Pieces of a prompt, of which the question keeps the best.

    Args:
        budget: tokens of a prompt that stay; below 1 a share of it.
        piece: tokens of a piece; the budget where that is less.
        kind: "standard", "single" or "dual".

    Raises:
        ConfigError: a setting is out of range.
    """

    name: ClassVar[str] = "citrus"
    when: ClassVar[Literal["prompt", "piece"]] = "piece"
    takes_bias: ClassVar[bool] = False
    budget: float = 768
    piece: int = 256
    kind: Literal["standard", "single", "dual"] = "single"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget("budget", self.budget)
        if self.kind not in ("standard", "single", "dual"):
            raise ConfigError(f"cache.kind={self.kind} must be standard, single or dual.")
        if self.piece < 1:
            raise ConfigError(f"cache.piece={self.piece} must be at least 1.")

    def reader(self) -> PromptReader | None:
        """See `CacheKind.reader`."""
        return Reader(self)

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache."""
        return CitrusCache(self, shape)

    def bytes(self, shape: CacheShape, length: int) -> int:
        """Keys and values within the budget."""
        return shape.token_bytes * min(length, tokens_of(self.budget, length))

    def step_bytes(self, shape: CacheShape, length: int) -> int:
        """What stays of the prompt, and the token itself."""
        return self.bytes(shape, length) + shape.token_bytes


class CitrusCache(EvictingCache):
    """See `Citrus`. While a prompt is read, every row has seen as many tokens.

    Attributes:
        kept_position: int64 [R, n], where the kept tokens stand in the text, whose rotation is in their keys; None once
            the keys were moved to their places.
        scoring: whether new queries give scores to the tokens before them.
        old_scores: [B, Hkv, G, S], sums of the weights of the queries that came last, on the S tokens before them.
    """

    kind: Citrus

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.kept_position: Tensor | None = None
        self.scoring = False
        self.old_scores: Tensor | None = None

    @property
    def old_slots(self) -> int:
        """How many tokens are held."""
        return (0 if self.kept_key is None else self.kept_key.shape[2]) + self.shared_length + self.store.length

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """As `exact` until tokens are dropped; also score the tokens that there are."""
        old = self.old_slots
        kept = None if self.kept_key is None else self._kept_keys()
        found = super().read(new, with_logsumexp)
        if self.scoring:
            key = self.whole()[0]
            if kept is not None:
                key = torch.cat((of_every_row(kept, len(key)).to(key.dtype), key), 2)
            self.old_scores = attention_mass(new.query, key, scale=new.scale, by_head=True)[..., :old]
        return found

    def _kept_keys(self) -> Tensor:
        """The kept keys at their places, right before the tokens since."""
        key = super()._kept_keys()
        if self.kept_position is None:
            return key
        slots = key.shape[2]
        place = torch.arange(self.dropped - slots, self.dropped, device=key.device)[None]
        return moved(key.transpose(1, 2), self.kept_position, place, self.shape.rotary).transpose(1, 2)

    def cut(self, scores: Tensor, budget: int) -> None:
        """Keep the best of the old tokens, and all since.

        Args:
            scores: [B, Hkv, G, S], of the S oldest tokens that are held.
            budget: how many of them stay.
        """
        old = scores.shape[-1]
        if old <= budget:
            return
        key, value, position = self._everything()
        batch, _, slots = key.shape[:3]
        alone = torch.ones(batch, 1, old, dtype=torch.bool, device=key.device)
        count = torch.full((batch,), budget, device=key.device)
        index, _ = self.kind.chosen(scores.flatten(1, 2).unsqueeze(1), alone, count, budget)
        since = torch.arange(old, slots, device=key.device).expand(batch, 1, -1)
        index = torch.cat((index.sort(-1).values, since), -1)
        self.kept_position = position.gather(1, index[:, 0])
        self.kept_key, self.kept_value = taken(key, index), taken(value, index)
        self.kept_count = torch.full_like(self.kept_count, index.shape[-1])
        self.dropped = self.length
        self.shared, self.store = [], Store()

    def _everything(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is held, oldest first: keys as they came, values, and positions int64 [B, S]."""
        batch = self.shape.batch
        if self.kept_key is None or self.kept_value is None or self.kept_position is None:
            position = torch.arange(self.length, device=self.kept_count.device).expand(batch, -1)
            return *self.whole(), position
        kept = [of_every_row(x, batch) for x in (self.kept_key, self.kept_value, self.kept_position)]
        if not self._parts():
            return kept[0], kept[1], kept[2]
        key, value = self.whole()
        since = torch.arange(self.dropped, self.length, device=key.device).expand(batch, -1)
        return torch.cat((kept[0], key), 2), torch.cat((kept[1], value), 2), torch.cat((kept[2], since), 1)

    def settled(self) -> None:
        """Move the kept keys to their places, once nothing will be dropped any more."""
        if self.kept_position is not None:
            self.kept_key, self.kept_position = self._kept_keys().contiguous(), None
        self.scoring, self.old_scores = False, None

    def copy_newest(self, other: "CitrusCache", count: int) -> None:
        """Append the newest `count` tokens of another cache of the same text."""
        key, value = (x[:, :, -count:].transpose(1, 2) for x in other.whole())
        self.store.append(key, value)
        self.length, self.next_position = other.length, other.next_position

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """See `Cache.joined`; all have read as many tokens since the prompt, if they dropped any of it."""
        since = min(part.length - part.dropped for part in parts)
        most = max(part.old_slots - since for part in parts)
        kept, newest = [], []
        for part in parts:
            both = part._held(part.kept_key, 0), part._held(part.kept_value, 1)
            old = [x[:, :, : x.shape[2] - since] for x in both]
            kept.append([torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[2])) for x in old])
            newest.append([x[:, :, x.shape[2] - since :] for x in both])
        other = cls._joined(parts)
        counts = [torch.full_like(part.kept_count, part.old_slots - since) for part in parts]
        other.kept_count = torch.cat(counts)
        other.kept_key, other.kept_value = (torch.cat(each) for each in zip(*kept, strict=True))
        other.shared, other.store = [], Store()
        if since:
            key, value = (torch.cat(each).transpose(1, 2) for each in zip(*newest, strict=True))
            other.store.append(key, value)
        other.dropped = other.length - since
        return other

    def _held(self, kept: Tensor | None, which: int) -> Tensor:
        """All keys or values that are held, [B, Hkv, S, .]."""
        parts = [] if kept is None else [kept]
        return torch.cat([*parts, *([self.whole()[which]] if self._parts() else [])], 2)


class Reader:
    """Reads prompts of one length, as `PromptReader` says.

    Args:
        kind: the settings.
    """

    def __init__(self, kind: Citrus) -> None:
        self.kind = kind

    def __call__(self, advance: Advance, state: Any, tokens: Tensor, question: Tensor | None) -> Any:
        """Read the prompts and the question.

        Raises:
            ConfigError: there is no question, and the kind needs one.
        """
        kind = self.kind.kind
        budget = tokens_of(self.kind.budget, tokens.shape[1])
        if question is None and tokens.shape[1] <= budget:
            return advance(tokens, state)
        if question is None and kind != "standard":
            raise ConfigError(f"cache=citrus with cache.kind={kind} reads a prompt for a question; give question=TEXT.")
        piece = min(self.kind.piece, budget)
        # without a question the last piece chooses, so that it is one of its own
        whole = 2 * piece if question is not None or tokens.shape[1] > 2 * piece else piece
        first, rest = tokens[:, :whole], tokens[:, whole:].split(piece, 1) if tokens.shape[1] > whole else ()
        state = advance(first, state)
        # what the question chooses from, where that is another cache
        second = [cache.fork(1) for cache in _caches(state)] if kind == "dual" else None
        for number, part in enumerate(rest):
            last = question is None and number == len(rest) - 1
            asks = question is not None and kind != "standard"
            asked = self._asked(advance, state, second, question) if asks else None
            _score(state, kind != "single")
            state = advance(part, state)
            _score(state, False)
            own = asked if kind == "single" and asked is not None else _scores(state)
            for index, cache in enumerate(_caches(state)):
                if second is not None and asked is not None:
                    second[index].copy_newest(cache, part.shape[1])
                    second[index].cut(asked[index], budget)
                cache.cut(own[index], budget - part.shape[1] if last else budget)
        if question is not None:
            scores = self._asked(advance, state, second, question)
            state = state if second is None else _with_caches(state, second)
            for cache, score in zip(_caches(state), scores, strict=True):
                cache.cut(score, budget)
        for cache in _caches(state):
            cache.settled()
        return state if question is None else advance(question, state)

    def _asked(self, advance: Advance, state: Any, second: list[CitrusCache] | None, question: Any) -> list[Tensor]:
        """The scores of what is held, from the question, which is then forgotten."""
        look = _with_caches(state, _caches(state) if second is None else second, fork=True)
        _score(look, True)
        return _scores(advance(question, look))


def _caches(state: Any) -> list[CitrusCache]:
    return [leaf for leaf in tree_flatten(state)[0] if isinstance(leaf, CitrusCache)]


def _scores(state: Any) -> list[Tensor]:
    """What the queries that came last gave to the tokens before them, of each cache."""
    found = [cache.old_scores for cache in _caches(state)]
    return [scores for scores in found if scores is not None]


def _score(state: Any, scoring: bool) -> None:
    for cache in _caches(state):
        cache.scoring = scoring


def _with_caches(state: Any, caches: Sequence[CitrusCache], fork: bool = False) -> Any:
    """The state with other caches in the place of its own, or with forks of everything."""
    leaves, structure = tree_flatten(state)
    others = iter(caches)
    changed = [next(others) if isinstance(leaf, CitrusCache) else leaf for leaf in leaves]
    if fork:
        changed = [
            leaf.fork(1) if isinstance(leaf, Cache) else leaf.clone() if isinstance(leaf, Tensor) else leaf
            for leaf in changed
        ]
    return tree_unflatten(changed, structure)
