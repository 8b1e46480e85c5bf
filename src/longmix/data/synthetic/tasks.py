"""Synthetic tasks: sequences whose right continuations are known, to train and compare what mixers can remember.

Each task makes one example of a given length from a random generator: tokens and, at each position, what is to be
predicted there, or `IGNORE_INDEX`.
"""

import functools
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from longmix.batch import IGNORE_INDEX
from longmix.errors import ConfigError
from longmix.wording import counted

LARGEST_VOCABULARY = 1 << 24  # of which half are made into an array for each example
LARGEST_POWER = 16.0


class Example(NamedTuple):
    """One sequence.

    Attributes:
        tokens: int64 [T].
        targets: int64 [T], with `IGNORE_INDEX` where nothing is to be predicted.
    """

    tokens: np.ndarray
    targets: np.ndarray


class SyntheticTask(Protocol):
    """Makes examples. Any dataclass with these members can be named as `_target_`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        ...

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens.

        Raises:
            ConfigError: the task does not fit into so few tokens.
        """
        ...


def require_room(needed: int, length: int, what: str) -> None:
    """Refuse a `seq_len` below the tokens that an example needs.

    Raises:
        ConfigError: says what needs them.
    """
    if needed > length:
        raise ConfigError(f"seq_len={length} is too short for {what}, which take {counted(needed, 'token')}.")


def require_at_least(**settings: tuple[int, int]) -> None:
    """Refuse a setting of the task, given as its value and the least it may be, that is too small.

    Raises:
        ConfigError: names the setting.
    """
    for name, (value, least) in settings.items():
        if value < least:
            raise ConfigError(f"data.task.{name}={value} must be at least {least}.")


def query_places(random: np.random.Generator, begin: int, length: int, count: int, power: float) -> np.ndarray:
    """Where keys come again behind pairs that end before `begin`: every other token, near ones likelier.

    Args:
        random: draws them.
        begin: the first place that there is.
        length: tokens of the example.
        count: keys.
        power: of the law of distances, see `MultiQueryRecall`.

    Returns:
        int64 [count], no two alike, in no order.
    """
    gaps = np.arange(1, (length - begin) // 2 + 1)
    law = gaps ** (power - 1)
    return begin + 2 * random.choice(len(gaps), count, replace=False, p=law / law.sum())


@dataclass(frozen=True)
class MultiQueryRecall:
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): pairs of key and value, then keys again.

    The first 2 * pairs tokens are the pairs. Then each key comes once more, and its value is to be predicted there; how
    far behind follows a power law. All other tokens are noise. Layout, law and defaults are those of the authors'
    generator (zoology, `multiquery_ar`), whose `power_a` is `power` here.

    Attributes:
        vocabulary: keys are in its lower half, but not 0, and values in its upper half.
        pairs: how many, or several numbers that examples take evenly.
        power: exponent of the law; the smaller, the nearer most keys come.
        random_non_queries: draw the noise from the whole vocabulary, keys and values included; else it is token 0.
    """

    vocabulary: int = 8192
    pairs: int | list[int] = 8
    power: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        if self.pairs == []:
            raise ConfigError("data.task.pairs is empty; give at least one number.")
        require_at_least(pairs=(min(self._choices()), 1), vocabulary=(self.vocabulary, 4))
        if max(self._choices()) > self.vocabulary // 2 - 1:
            raise ConfigError(f"data.task.pairs={self.pairs} are more than a vocabulary of {self.vocabulary} has keys.")
        if not 0 < self.power <= LARGEST_POWER:
            raise ConfigError(f"data.task.power={self.power} must be above 0 and at most {LARGEST_POWER}.")
        if self.vocabulary > LARGEST_VOCABULARY:
            raise ConfigError(f"data.task.vocabulary={self.vocabulary} must be at most {LARGEST_VOCABULARY}.")

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        return self.vocabulary

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens."""
        require_room(4 * max(self._choices()), length, f"{counted(max(self._choices()), 'pair')} and their queries")
        pairs = int(random.choice(self._choices()))
        half = self.vocabulary // 2
        keys = random.choice(np.arange(1, half), pairs, replace=False)
        values = random.choice(np.arange(half, self.vocabulary), pairs, replace=False)
        tokens = random.integers(self.vocabulary if self.random_non_queries else 1, size=length)
        targets = np.full(length, IGNORE_INDEX)
        tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        at = query_places(random, 2 * pairs, length, pairs, self.power)
        tokens[at], targets[at] = keys, values
        return Example(tokens, targets)

    def _choices(self) -> list[int]:
        return self.pairs if isinstance(self.pairs, list) else [self.pairs]


@dataclass(frozen=True)
class Copying:
    """Symbols among noise, then a mark, then the symbols again, each to be predicted (after Gu and Dao 2023).

    Attributes:
        symbols: how many kinds there are.
        count: how many are to be copied.
        scattered: let noise lie between them, at random ("selective copying"); else they come first.
        reverse: they are to be repeated last to first, as the second half of a palindrome (Kimi Team 2025, arXiv
            2510.26692, section 5.1).
    """

    symbols: int = 16
    count: int = 16
    scattered: bool = False
    reverse: bool = False

    def __post_init__(self) -> None:
        require_at_least(symbols=(self.symbols, 2), count=(self.count, 1))

    @property
    def vocab_size(self) -> int:
        """Tokens are below this; the last two are noise and mark."""
        return self.symbols + 2

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens."""
        require_room(2 * self.count, length, f"{self.count} symbols twice")
        noise, mark = self.symbols, self.symbols + 1
        content = random.integers(self.symbols, size=self.count)
        before = length - self.count
        tokens = np.full(length, noise)
        drawn = random.choice(before, self.count, replace=False) if self.scattered else np.arange(self.count)
        positions = np.sort(drawn)
        tokens[positions] = content
        repeated = content[::-1] if self.reverse else content
        tokens[before:] = np.concatenate([[mark], repeated[:-1]])
        targets = np.full(length, IGNORE_INDEX)
        targets[before:] = repeated
        return Example(tokens, targets)


@dataclass(frozen=True)
class Induction:
    """A mark and the token after it somewhere in noise, and the mark again at the end (Olsson et al. 2022, 2209.11895).

    Attributes:
        symbols: how many kinds of noise there are.
    """

    symbols: int = 64

    def __post_init__(self) -> None:
        require_at_least(symbols=(self.symbols, 2))

    @property
    def vocab_size(self) -> int:
        """Tokens are below this; the last one is the mark."""
        return self.symbols + 1

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens."""
        require_room(3, length, "a mark, what follows it, and the mark again,")
        tokens = random.integers(self.symbols, size=length)
        targets = np.full(length, IGNORE_INDEX)
        position = int(random.integers(length - 2))
        tokens[[position, length - 1]] = self.symbols
        targets[length - 1] = tokens[position + 1]
        return Example(tokens, targets)


@dataclass(frozen=True)
class GroupWords:
    """The product of all permutations so far, to be predicted at every one: state tracking (Merrill et al. 2024).

    Of two things it is parity; the products of five are beyond what constant-depth circuits compute (arXiv 2404.08819).

    Attributes:
        things: how many are permuted; the vocabulary is their factorial.
    """

    things: int = 5

    def __post_init__(self) -> None:
        require_at_least(things=(self.things, 2))
        if self.things > 5:
            raise ConfigError(f"data.task.things={self.things} must be at most 5, which have 120 permutations.")

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        return len(_products(self.things))

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens."""
        products = _products(self.things)
        tokens = random.integers(len(products), size=length)
        product, targets = 0, []
        for token in tokens.tolist():
            product = products[product][token]
            targets.append(product)
        return Example(tokens, np.array(targets))


@dataclass(frozen=True)
class MatchThree:
    """Whether two tokens so far and the own one add up to a multiple of the modulus: 1 or 0 at every token.

    Attention to pairs of tokens can tell in one layer; attention to one token at a time needs a width that grows with
    the length (Sanford et al. 2023, arXiv 2306.02896), so that short examples do not rule it out. An example has few of
    the numbers, drawn anew, so that about half of the answers are 1.

    Attributes:
        modulus: tokens are the numbers below it.
        values: how many of them an example has.
    """

    modulus: int = 16
    values: int = 4

    def __post_init__(self) -> None:
        require_at_least(modulus=(self.modulus, 2), values=(self.values, 1))
        if not self.values <= self.modulus <= 4096:
            raise ConfigError(
                f"data.task.modulus={self.modulus} must be from data.task.values={self.values} to 4096: an example has "
                "so many of the numbers below it."
            )

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        return self.modulus

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens."""
        numbers = random.permutation(self.modulus)[: self.values]
        tokens = numbers[random.integers(self.values, size=length)]
        seen = np.logical_or.accumulate(tokens[:, None] == np.arange(self.modulus))
        # sums[i, s]: whether two numbers that were seen by i add up to s
        rolled = np.stack([np.roll(seen, number, axis=1) & seen[:, number, None] for number in range(self.modulus)])
        sums: np.ndarray = np.logical_or.reduce(rolled)
        targets = sums[np.arange(length), -tokens % self.modulus]
        return Example(tokens, targets.astype(np.int64))


@functools.cache
def _products(things: int) -> list[list[int]]:
    """The number of the product of any two permutations: first the product so far, then the one applied to it."""
    elements = list(permutations(range(things)))
    numbers = {element: number for number, element in enumerate(elements)}
    return [[numbers[tuple(first[thing] for thing in second)] for second in elements] for first in elements]
