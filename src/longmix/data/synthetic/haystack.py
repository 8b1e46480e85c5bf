"""Haystacks: real text with made-up facts in it and questions after it, as tokens."""

from dataclasses import dataclass

import numpy as np

from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.wording import counted

KEYS = (
    *("Aberdeen", "Bergen", "Cologne", "Dresden", "Exeter", "Florence", "Ghent", "Hanover", "Inverness", "Jena"),
    *("Krakow", "Lisbon", "Madrid", "Naples", "Oslo", "Prague", "Quebec", "Riga", "Seville", "Turin", "Utrecht"),
    *("Vienna", "Warsaw", "York", "Zurich"),
)
LARGEST_VALUE = 9999
STATEMENT = " The secret number of {key} is {value}."
QUESTION = "\n\nWhat is the secret number of {key}? The secret number of {key} is"

SEARCHED_PART = 16
"""One over the share of the haystack around a depth that is searched for the end of a sentence or word."""


@dataclass(frozen=True)
class Needle:
    """A fact and the question after it, as tokens, int32 each.

    Attributes:
        statement: what is hidden.
        question: what ends the context.
        value: what is to follow.
        begins: where in the text the haystack begins, as a share of all places it could, 0 <= begins < 1.
    """

    statement: np.ndarray
    question: np.ndarray
    value: np.ndarray
    begins: float


@dataclass(frozen=True)
class Forms:
    """The words of needles.

    Attributes:
        statement: holds {key} and {value}, with a blank before the latter.
        question: holds {key}; a blank and the value go on from it.
    """

    statement: str = STATEMENT
    question: str = QUESTION

    def check(self, name: str) -> None:
        """Refuse forms that lack a part.

        Args:
            name: where they stand in the configuration.

        Raises:
            ConfigError: says which part of which.
        """
        for kind, given, parts in (
            ("statement", self.statement, ("{key}", " {value}")),
            ("question", self.question, ("{key}",)),
        ):
            for part in parts:
                if part not in given:
                    raise ConfigError(f"{name}.{kind}={given!r} must hold {part!r}.")

    def needle(self, tokenizer: Tokenizer, key: str, value: int, begins: float = 0.0) -> Needle:
        """A needle of that key and value."""
        filled = self.statement.replace("{key}", key).replace("{value}", str(value))
        texts = [filled, self.question.replace("{key}", key), f" {value}"]
        hidden_tokens, asked, answer = tokenizer.encode_batch(texts)
        return Needle(hidden_tokens, asked, answer, begins)


def draw_needle(tokenizer: Tokenizer, seed: list[int], forms: Forms) -> Needle:
    """A needle with a key out of `KEYS` and a value of four digits, a pure function of its arguments.

    Args:
        tokenizer: of the model.
        seed: of key, value and beginning.
        forms: its words.
    """
    random = np.random.default_rng(seed)
    return forms.needle(tokenizer, str(random.choice(KEYS)), draw_value(random), random.random())


def draw_value(random: np.random.Generator) -> int:
    """Draw a value of four digits."""
    return int(random.integers(1000, LARGEST_VALUE + 1))


def haystack_rows(
    needle: Needle, text: TokenFile, tokenizer: Tokenizer, depths: list[float], length: int
) -> np.ndarray:
    """Rows with the needle at every depth; the row before them has no needle.

    A row is the separator, the text, the question and all but the last token of the value. Without the needle there is
    more of the text in front, so that whatever follows the needle is in its place.

    Args:
        needle: what to hide.
        text: where the haystack is cut from, across documents, separators left out.
        tokenizer: of that text.
        depths: where to hide it, from 0 (first) to 1 (right before the question).
        length: tokens of a row.

    Returns:
        int64 [1 + len(depths), length].

    Raises:
        ConfigError: needle and question leave no room for a haystack.
        DataError: the text is shorter than that.
    """
    end = np.concatenate([needle.question, needle.value[:-1]])
    fixed = 1 + len(needle.statement) + len(end)
    if fixed >= length:
        raise ConfigError(
            f"a context of {counted(length, 'token')} has no room for a haystack: needle and question take "
            f"{fixed}. Give larger "
            "lengths by seq_len or task.needle.factors, or shorter texts."
        )
    without = stretch(text, needle.begins, length - 1 - len(end))
    haystack = without[len(needle.statement) :]
    rows = [without, *(hidden(haystack, [needle.statement], [depth], tokenizer) for depth in depths)]
    return np.stack([np.concatenate([[text.separator_id], row, end]) for row in rows]).astype(np.int64)


def hidden(haystack: np.ndarray, statements: list[np.ndarray], depths: list[float], tokenizer: Tokenizer) -> np.ndarray:
    """The haystack with each statement at its depth, or at the nearest end of a sentence or word."""
    cuts = [_between_sentences(haystack, depth, tokenizer) for depth in depths]
    first, *later = np.split(haystack, np.sort(cuts))
    parts = [first]
    for index, piece in zip(np.argsort(cuts, kind="stable"), later, strict=True):
        parts += [statements[index], piece]
    return np.concatenate(parts)


def stretch(text: TokenFile, begins: float, count: int) -> np.ndarray:
    """A stretch of text tokens. Twice as many are read, because each document may be one token and a separator.

    Args:
        text: where they are cut from, across documents, separators left out.
        begins: where they begin, as a share of all places they could, 0 <= begins < 1.
        count: how many.

    Raises:
        DataError: there are not so many.
    """
    start = int(begins * max(1, text.num_tokens - 2 * count))
    tokens = text.tokens[start : start + 2 * count]
    tokens = tokens[tokens != text.separator_id][:count]
    if len(tokens) < count:
        raise DataError(
            f"the split has {counted(text.num_tokens, 'token')}, too few for a haystack of {count:,}; give "
            "shorter lengths by "
            "seq_len, or another split."
        )
    return tokens


def _between_sentences(haystack: np.ndarray, depth: float, tokenizer: Tokenizer) -> int:
    """The index nearest to `depth` after a sentence; or else after a word, or else just there."""
    target = round(depth * len(haystack))

    def after_word(index: int) -> bool:
        return tokenizer.decode(haystack[index : index + 1])[:1].isspace()

    def after_sentence(index: int) -> bool:
        return after_word(index) and tokenizer.decode(haystack[index - 1 : index]).endswith((".", "!", "?"))

    if 0 < target < len(haystack):
        for is_wanted in (after_sentence, after_word):
            for distance in range(len(haystack) // SEARCHED_PART + 1):
                for index in (target - distance, target + distance):
                    if 0 < index < len(haystack) and is_wanted(index):
                        return index
    return target
