"""RULER's retrieval, tracing and counting tasks (Hsieh et al. 2024, arXiv 2404.06654), as texts of any length.

A `Draft` is one question: fixed words around a context of as many pieces as fit.
"""

import math
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longmix.data.synthetic.ruler_words import ADJECTIVES, NOUNS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = np.linspace(0, 1, 40)
"""Where needles may lie in an essay."""

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
CODED_WORD_LETTERS = 6
CODED_WORDS_PER_TOKEN = 1 / 50
SHORT = 4096
"""Below so many tokens the words to count come less often."""


@dataclass(frozen=True)
class Draft:
    """One question about a context that is still to be filled.

    Attributes:
        before, after: the text around the context; `after` ends with the beginning of the answer.
        context: makes the context of so many pieces.
        answers: what the model's text is searched for.
        tokens: that the model may write, with a tokenizer of words.
        every: all answers count, by their share; or one of them is enough.
        least, most: numbers of pieces; None where there is no end of them.
    """

    before: str
    after: str
    context: Callable[[int], str]
    answers: tuple[str, ...]
    tokens: int
    every: bool = True
    least: int = 1
    most: int | None = None

    def prompt(self, pieces: int) -> str:
        """The whole text before the answer."""
        return f"{self.before}{self.context(pieces)}{self.after}"

    def score(self, text: str) -> float:
        """The share of the answers that a text has, or whether it has one of them, whatever their case."""
        found = [answer.lower() in text.lower() for answer in self.answers]
        return sum(found) / len(found) if self.every else float(any(found))


@dataclass(frozen=True)
class Material:
    """What drafts are made of.

    Attributes:
        random: of this question alone.
        essay: the words of real text, at least as many as fit.
        vocabulary: different words to count, in a fixed order.
        length: tokens of the context.
        fewer_words: words to count come less often.
    """

    random: np.random.Generator
    essay: Sequence[str]
    vocabulary: Sequence[str]
    length: int
    fewer_words: bool = False


@dataclass(frozen=True)
class Needles:
    """Facts in a haystack, and a question for the values of some keys: RULER's eight kinds of them.

    Attributes:
        haystack: "noise", the same sentences again and again; "essay", real text; "needle", other needles.
        keys: how many different keys are hidden; all but `asked` mislead.
        values: of each key.
        asked: how many keys the question has.
        key_kind, value_kind: "words", "numbers" or "uuids".
    """

    haystack: str = "essay"
    keys: int = 1
    values: int = 1
    asked: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"

    def draft(self, material: Material) -> Draft:
        """A question with keys and values of its own."""
        random = material.random
        keys = _drawn(self.key_kind, self.keys, random)
        values = _drawn(self.value_kind, self.keys * self.values, random)
        owners = [key for key in keys for _ in range(self.values)]
        needles = [self._needle(*pair) for pair in zip(owners, values, strict=True)]
        places = random.random(len(needles))
        order = random.permutation(len(needles))
        depths = random.choice(DEPTHS, len(needles), replace=False)
        others = int(random.integers(2**32))
        asked = keys[: self.asked]
        answers = tuple(value for owner, value in zip(owners, values, strict=True) if owner in asked)

        def context(pieces: int) -> str:
            if self.haystack == "essay":
                sentences = SENTENCE_END.split(" ".join(material.essay[:pieces]))
                return " ".join(inserted(sentences, [needles[n] for n in order], depths.tolist()))
            if self.haystack == "noise":
                sentences = [NOISE] * pieces
            else:
                sentences = self._misleading(pieces, set(keys), np.random.default_rng(others))
            return "\n".join(inserted(sentences, [needles[n] for n in order], places.tolist()))

        before, after = self._frame(asked, len(answers))
        most = len(material.essay) if self.haystack == "essay" else None
        return Draft(before, after, context, answers, tokens=128, most=most)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _misleading(self, count: int, keys: set[str], random: np.random.Generator) -> list[str]:
        """Needles of other keys than `keys`."""
        found: list[str] = []
        while len(found) < count:
            key = _drawn(self.key_kind, 1, random)[0]
            if key not in keys:
                found.append(self._needle(key, _drawn(self.value_kind, 1, random)[0]))
        return found

    def _frame(self, asked: list[str], answers: int) -> tuple[str, str]:
        kind, query = self.value_kind, _listed(asked)
        if answers == 1:
            kind, some, what, are = kind[:-1], "A special magic {} is", "What is", "is"
        else:
            some, what, are = "Some special magic {} are", "What are all", "are"
        before = (
            f"{some.format(kind)} hidden within the following text. Make sure to memorize it. I will quiz you about "
            f"the {kind} afterwards.\n"
        )
        mentioned = f"the special magic {kind} for {query} mentioned in the provided text"
        return before, f"\n{what} {mentioned}? The{mentioned[3:]} {are}"


@dataclass(frozen=True)
class Chains:
    """Variable tracking: which variables hold a value, through a chain of assignments among noise.

    Attributes:
        hops: assignments of a variable to a variable in a chain.
        chains: all but the first mislead.
    """

    hops: int = 4
    chains: int = 1

    def draft(self, material: Material) -> Draft:
        """A question behind an answered one of three-letter names."""
        example = self._question(material.random, letters=3)
        shown = f"{example.prompt(5)} {' '.join(example.answers)}\n"
        own = self._question(material.random, letters=5)
        return replace(own, before=f"{shown}{own.before}")

    def _question(self, random: np.random.Generator, letters: int) -> Draft:
        names = _names(self.chains * (self.hops + 1), letters, random)
        values = random.choice(np.arange(10_000, 100_000), self.chains, replace=False).tolist()
        assignments: list[tuple[float, str]] = []
        for chain, value in enumerate(values):
            own = names[chain * (self.hops + 1) : (chain + 1) * (self.hops + 1)]
            sources = [str(value), *(f"VAR {name}" for name in own[:-1])]
            lines = [f"VAR {name} = {source}" for name, source in zip(own, sources, strict=True)]
            assignments += zip(np.sort(random.random(len(lines))).tolist(), lines, strict=True)
        assignments.sort()
        places, ordered = [place for place, _ in assignments], [line for _, line in assignments]
        asked = names[: self.hops + 1]
        return Draft(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
            f"\nQuestion: Find all variables that are assigned the value {values[0]} in the text above. Answer: "
            f"According to the chain(s) of variable assignment in the text above, {len(asked)} variables are assigned "
            f"the value {values[0]}, they are:",
            lambda pieces: "\n".join(inserted([NOISE] * pieces, ordered, places)),
            tuple(asked),
            tokens=30,
        )


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words come more often than all others.

    Attributes:
        common: how many words are asked for.
        often, seldom: how often they, and the others, come; where fewer words are wanted, 6 times and once.
    """

    common: int = 10
    often: int = 30
    seldom: int = 3

    def draft(self, material: Material) -> Draft:
        """A question behind an answered one of few words."""
        short = material.fewer_words
        words = [material.vocabulary[n] for n in material.random.permutation(len(material.vocabulary)).tolist()]
        few, often, seldom = (10, 3, 1) if short else (30, 10, 3)
        seeds = material.random.integers(2**32, size=2).tolist()
        example = self._question(words[: self.common + few], often, seldom, seeds[0])
        marked = " ".join(f"{number}. {word}" for number, word in enumerate(example.answers, 1))
        shown = f"{example.prompt(few)} {marked}\n"
        often, seldom = (6, 1) if short else (self.often, self.seldom)
        own = self._question(words[self.common + few :], often, seldom, seeds[1])
        return replace(own, before=f"{shown}{own.before}")

    def _question(self, words: list[str], often: int, seldom: int, seed: int) -> Draft:
        common, others = words[: self.common], words[self.common :]

        def context(pieces: int) -> str:
            together = common * often + others[:pieces] * seldom
            order = np.random.default_rng(seed).permutation(len(together)).tolist()
            return " ".join(f"{number}. {together[place]}" for number, place in enumerate(order, 1))

        return Draft(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            "that appear most often.\n",
            f"\nQuestion: What are the {self.common} most common words in the above list? Answer: The top "
            f"{self.common} words that appear most often in the list are:",
            context,
            tuple(common),
            tokens=120,
            most=len(others),
        )


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose frequencies follow Zipf's law; the three after the most frequent, which is dots, are asked for.

    Attributes:
        asked: how many words.
    """

    asked: int = 3

    def draft(self, material: Material) -> Draft:
        """A question with code words of its own."""
        count = max(self.asked + 1, int(material.length * CODED_WORDS_PER_TOKEN))
        coded = ["....", *(name.lower() for name in _names(count, CODED_WORD_LETTERS, material.random))]
        seed = int(material.random.integers(2**32))

        def context(pieces: int) -> str:
            shares = [int(pieces / rank**2 * 6 / math.pi**2) for rank in range(1, len(coded) + 1)]
            text = [word for word, share in zip(coded, shares, strict=True) for _ in range(share)]
            return " ".join(text[place] for place in np.random.default_rng(seed).permutation(len(text)).tolist())

        return Draft(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            "appeared coded words. ",
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text? Answer: According to the coded text above, the three "
            "most frequently appeared words are:",
            context,
            tuple(coded[1 : self.asked + 1]),
            tokens=50,
            least=53,  # from here on these three differ in number, and from all others
        )


KINDS: dict[str, Needles | Chains | CommonWords | FrequentWords] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value_kind="uuids"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, asked=4),
    "vt": Chains(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}
"""The kinds that need no questions of others, as RULER's thirteen have them."""


def inserted(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The sentences with each needle at its depth, from 0 (first) to 1 (last)."""
    found = list(sentences)
    places = [round(depth * len(sentences)) for depth in depths]
    for number in sorted(range(len(needles)), key=lambda number: places[number])[::-1]:  # those of one place in order
        found.insert(places[number], needles[number])
    return found


def _drawn(kind: str, count: int, random: np.random.Generator) -> list[str]:
    """So many different keys or values."""
    found: dict[str, None] = {}
    while len(found) < count:
        if kind == "words":
            adjective, noun = (words[random.integers(len(words))] for words in (ADJECTIVES, NOUNS))
            found[f"{adjective}-{noun}"] = None
        elif kind == "numbers":
            found[str(random.integers(1_000_000, 10_000_000))] = None
        else:
            found[str(uuid.UUID(bytes=random.bytes(16), version=4))] = None
    return list(found)


def _names(count: int, letters: int, random: np.random.Generator) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choice(list(string.ascii_uppercase), letters))] = None
    return list(found)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
