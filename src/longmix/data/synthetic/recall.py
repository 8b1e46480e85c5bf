"""Associative recall with a difference: keys whose values change, and pairs that are one token."""

from dataclasses import dataclass

import numpy as np

from longmix.batch import IGNORE_INDEX
from longmix.data.synthetic.tasks import (
    Example,
    MultiQueryRecall,
    query_places,
    require_at_least,
    require_room,
)
from longmix.errors import ConfigError
from longmix.wording import counted

LARGEST_PAIR_VOCABULARY = 1 << 24


@dataclass(frozen=True)
class ForgettingRecall:
    """Multi-query associative recall where some keys come a second time before the queries, with another value.

    The value that came last is asked for, so that a memory has to replace the first one. Layout and law are those of
    Zoology's generator (`forgetting_mqar`, arXiv 2312.04927), where a second value may equal the first; here it never
    does.

    Attributes:
        vocabulary, power, random_non_queries: see `MultiQueryRecall`.
        pairs: keys.
        updates: how many of them come twice.
    """

    vocabulary: int = 8192
    pairs: int = 8
    updates: int = 4
    power: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        MultiQueryRecall(self.vocabulary, self.pairs, self.power, self.random_non_queries)
        require_at_least(updates=(self.updates, 0))
        if self.updates > self.pairs:
            raise ConfigError(f"data.task.updates={self.updates} must be at most data.task.pairs={self.pairs}.")

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        return self.vocabulary

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens."""
        before = 2 * (self.pairs + self.updates)
        require_room(before + 2 * self.pairs, length, f"{counted(self.pairs, 'pair')}, their updates and queries")
        half = self.vocabulary // 2
        keys = random.choice(np.arange(1, half), self.pairs, replace=False)
        first = random.choice(np.arange(half, self.vocabulary), self.pairs, replace=False)
        updated = random.choice(self.pairs, self.updates, replace=False)
        last = first.copy()
        shifts = random.integers(1, self.vocabulary - half, size=self.updates)  # never all around: another value
        last[updated] = half + (first[updated] - half + shifts) % (self.vocabulary - half)
        tokens = random.integers(self.vocabulary if self.random_non_queries else 1, size=length)
        targets = np.full(length, IGNORE_INDEX)
        tokens[:before:2] = np.concatenate([keys, keys[updated]])
        tokens[1:before:2] = np.concatenate([first, last[updated]])
        at = query_places(random, before, length, self.pairs, self.power)
        tokens[at], targets[at] = keys, last
        return Example(tokens, targets)


@dataclass(frozen=True)
class StackedRecall:
    """Associative recall where a token is a whole pair of key and value, and then one for each key asks for its value.

    One layer of attention can solve it: no token has to look at the one before. After Zoology's `stacked_mqar`, whose
    tokens are the embeddings of key and value side by side; here each pair is a token with an embedding of its own, so
    that a model learns which pairs have a key in common.

    Attributes:
        keys: how many there are.
        values: how many there are.
        pairs: of an example.
        passes: how often each pair comes, in an order of its own each time (JRT, arXiv 2407.05483).
    """

    keys: int = 32
    values: int = 32
    pairs: int = 8
    passes: int = 1

    def __post_init__(self) -> None:
        require_at_least(keys=(self.keys, 1), values=(self.values, 1), pairs=(self.pairs, 1), passes=(self.passes, 1))
        if self.pairs > min(self.keys, self.values):
            least = "keys" if self.keys <= self.values else "values"
            raise ConfigError(f"data.task.pairs={self.pairs} must be at most data.task.{least}={getattr(self, least)}.")
        if self.vocab_size > LARGEST_PAIR_VOCABULARY:
            raise ConfigError(
                f"data.task.keys={self.keys} and data.task.values={self.values} make {self.vocab_size:,} tokens; the "
                f"most are {LARGEST_PAIR_VOCABULARY:,}."
            )

    @property
    def vocab_size(self) -> int:
        """Tokens are below this: pairs by key, then questions by key, then values, then the blank."""
        return self.keys * self.values + self.keys + self.values + 1

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens, which begins with blanks where it has room for more."""
        needed = (self.passes + 1) * self.pairs
        require_room(needed, length, f"{counted(self.pairs, 'pair')} and their questions")
        keys = random.choice(self.keys, self.pairs, replace=False)
        values = random.choice(self.values, self.pairs, replace=False)
        orders = [random.permutation(self.pairs) for _ in range(self.passes + 1)]
        told, asked = np.concatenate(orders[:-1]), orders[-1]
        questions = self.keys * self.values
        tokens = np.full(length, self.vocab_size - 1)
        targets = np.full(length, IGNORE_INDEX)
        tokens[length - needed : length - self.pairs] = keys[told] * self.values + values[told]
        tokens[length - self.pairs :] = questions + keys[asked]
        targets[length - self.pairs :] = questions + self.keys + values[asked]
        return Example(tokens, targets)
