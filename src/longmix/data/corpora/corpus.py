"""Corpora, and the division of one source of documents into splits."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from longmix.errors import ConfigError, DataError
from longmix.wording import counted

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

NEAR_CHARACTERS = 1000
"""A split of a single document may begin up to so many characters early, so that it begins with a line."""

FEW_DOCUMENTS = 10_000
"""Up to so many documents, chance may leave a split empty; in larger corpora its fraction does."""

EXAMPLE_OF_SPLIT = {
    "train": "data.corpus.validation_fraction=0.1",
    "validation": "data.corpus.validation=my/validation.txt, or data.corpus.validation_fraction=0.5 for few documents",
    "test": "data.corpus.test=my/test.txt, or data.corpus.test_fraction=0 for none",
}
"""Settings that give documents to an empty split."""


class Corpus(Protocol):
    """A source of documents. Any class with these members can be named as `_target_`.

    Attributes:
        name: short, used in folder names and the log.
        splits: the splits it has, among "train", "validation" and "test".
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def splits(self) -> tuple[str, ...]: ...  # noqa: D102

    def documents(self, split: str) -> Iterator[str]:
        """The documents of a split, in an order that never changes.

        Raises:
            DataError: the split does not exist, or a document cannot be read.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """A JSON-able value that is equal for two corpora only if their documents are."""
        ...


class Reading(Protocol):
    """The documents of a split, or of a part of it, one after the other."""

    @property
    def position(self) -> Any:
        """The position after the last document that was read, to continue from; JSON-able."""
        ...

    def __iter__(self) -> Iterator[str]: ...


@runtime_checkable
class PartedCorpus(Corpus, Protocol):
    """A corpus that need not be read from its beginning; pickled, it can be read by several processes."""

    def parts(self, split: str) -> int:
        """The number of parts in which a split can be read; one after the other they give `documents`."""
        ...

    def read(self, split: str, part: int, position: Any = None) -> Reading:
        """The documents of a part.

        Args:
            split: one of `splits`.
            part: its number.
            position: of an earlier reading of the part, to go on from; None for its beginning.
        """
        ...


class CountedReading:
    """A reading of any corpus's split. Its position is a number of documents, which a later reading skips."""

    def __init__(self, corpus: Corpus, split: str, position: int | None = None) -> None:
        self.position = position or 0
        self._corpus, self._split = corpus, split

    def __iter__(self) -> Iterator[str]:
        for text in islice(read_documents(self._corpus, self._split), self.position, None):
            self.position += 1
            yield text


def num_parts(corpus: Corpus, split: str) -> int:
    """The number of parts in which a split can be read; most corpora have one."""
    return corpus.parts(split) if isinstance(corpus, PartedCorpus) else 1


def read_part(corpus: Corpus, split: str, part: int, position: Any) -> Reading:
    """The documents of a part of any corpus; a corpus without parts is read whole."""
    if isinstance(corpus, PartedCorpus):
        return corpus.read(split, part, position)
    return CountedReading(corpus, split, position)


def check_split(corpus: Corpus, split: str) -> None:
    """Refuse a split that `corpus` does not have.

    Raises:
        DataError: names the split and lists those there are.
    """
    require_split(split, corpus.name, corpus.splits)


def require_split(split: str, name: str, splits: Sequence[str]) -> None:
    """Refuse a split that is not among those of the corpus or task `name`.

    Raises:
        DataError: names the split and lists those there are.
    """
    if split not in splits:
        raise DataError(f"the corpus {name} has no split {split!r}; it has {', '.join(splits)}")


def check_unchanged(corpus: Corpus) -> None:
    """Refuse a corpus that changed after `fingerprint` identified it, if the corpus can tell.

    Raises:
        DataError: names the file that changed.
    """
    check = getattr(corpus, "check_unchanged", None)
    if check is not None:
        check()


def read_documents(corpus: Corpus, split: str) -> Iterator[str]:
    """The documents of a split; a failure to read them becomes an error of its own, not one of writing.

    Raises:
        DataError: the split does not exist, or a document cannot be read.
    """
    check_split(corpus, split)
    try:
        yield from corpus.documents(split)
    except OSError as error:
        raise DataError(f"cannot read the {split} split of the corpus {corpus.name}: {error}") from error


class SplitByContent(ABC):
    """A corpus with one source for training, out of which splits without a source of their own are cut.

    Which documents are cut out depends on nothing but their text and the fractions: each text has a number between 0
    and 1, and the lowest ones are for test, the next ones for validation. Where chance gives a split none, it is given
    the text of the lowest number among those for training, if another is left to train on. A source of one document
    alone is divided by position instead where `_divides_one` says so: its last part is for test, the one before for
    validation.
    """

    name: str
    splits: tuple[str, ...]
    usual_place = "data.corpus"
    _divides_one = False

    def __init__(self, sources: dict[str, Any], validation_fraction: float, test_fraction: float) -> None:
        for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
            if not 0 <= fraction <= 1:
                raise ConfigError(f"data.corpus.{name} must be between 0 and 1, got {fraction}")
        fractions = {"validation": validation_fraction, "test": test_fraction}
        self._sources = {split: source for split, source in sources.items() if source is not None}
        self._fractions = {
            split: fraction for split, fraction in fractions.items() if fraction > 0 and split not in self._sources
        }
        if sum(self._fractions.values()) > 1:
            raise ConfigError(
                f"data.corpus.validation_fraction ({validation_fraction}) and data.corpus.test_fraction "
                f"({test_fraction}) must not exceed 1 together"
            )
        self._fingerprint: dict[str, Any] | None = None
        self._lent: dict[str, str] | None = None
        self.splits = tuple(split for split in SPLITS if split in self._sources or split in self._fractions)

    @abstractmethod
    def _read(self, source: Any) -> Iterator[str]:
        """All documents of one source, in a fixed order."""

    @abstractmethod
    def _identify(self, source: Any) -> dict[str, Any]:
        """A value that identifies the content of one source."""

    def documents(self, split: str) -> Iterator[str]:
        """The documents of a split, in an order that never changes."""
        check_split(self, split)
        if split != "train" and split in self._sources:
            return self._read(self._sources[split])
        return self._cut(split)

    def fingerprint(self) -> dict[str, Any]:
        """A value that identifies the documents. It is computed once, because that reads all the content."""
        if self._fingerprint is None:
            self._fingerprint = self._compute_fingerprint()
        return self._fingerprint

    def _compute_fingerprint(self) -> dict[str, Any]:
        sources = {split: self._identify(source) for split, source in self._sources.items()}
        how: dict[str, Any] = {}
        if self._only_document() is not None:
            how = {"divided": "by position"}
            parts = ", then ".join(f"{fraction:g} for {split}" for split, fraction in self._fractions.items())
            logger.info("the corpus %s is one document; of its end this share is held out: %s", self.name, parts)
        elif lent := self._lent_texts():
            how = {"lent": lent}
            logger.info(
                "the corpus %s has so few documents that chance gave its %s split none; one is held out all the same",
                *(self.name, " and its ".join(lent.values())),
            )
        return {"kind": type(self).__name__, "sources": sources, "fractions": self._fractions, **how}

    def _only_document(self) -> str | None:
        """The document that is divided by position; None where they are divided by content."""
        if not (self._divides_one and self._fractions):
            return None
        first = list(islice((text for text in self._read(self._sources["train"]) if text), 2))
        return first[0] if len(first) == 1 else None

    def _lent_texts(self) -> dict[str, str]:
        """Texts given to splits that chance left empty: the digest of each, and its split.

        Reads no further than to the first document of every split, or to the end of a few.
        """
        if self._lent is None:
            lacking = [split for split in ("validation", "test") if split in self._fractions]
            numbers: dict[str, float] = {}  # of texts for training
            texts = (text for text in self._read(self._sources["train"]) if text) if lacking else iter(())
            for text in islice(texts, FEW_DOCUMENTS):
                split = self._split_by_chance(text)
                if split == "train":
                    numbers[_digest(text).hex()] = _number(text)
                elif split in lacking:
                    lacking.remove(split)
                    if not lacking:
                        break
            if lacking and next(texts, None) is not None:
                lacking = []
            lendable = sorted(numbers, key=lambda digest: numbers[digest])[:-1]
            self._lent = dict(zip(lendable, lacking, strict=False))
        return self._lent

    def _cut(self, split: str) -> Iterator[str]:
        if (only := self._only_document()) is not None:
            yield self._piece_of(only, split)
            return
        seen = kept = 0
        for text in self._read(self._sources["train"]):
            seen += 1
            if self._split_of(text) == split:
                kept += 1
                yield text
        if seen and not kept:
            raise DataError(
                f"none of the {counted(seen, 'document')} of the corpus {self.name} fell into its {split} split "
                "(they are "
                f"divided by their content; fractions: {self._fractions}). Change data.corpus.validation_fraction or "
                "data.corpus.test_fraction, or give data.corpus.validation or data.corpus.test a source of its own, "
                f"such as {EXAMPLE_OF_SPLIT[split]}."
            )

    def _piece_of(self, text: str, split: str) -> str:
        """The part of a single document that a split gets: train first, then validation, then test, cut at lines."""
        bounds, share = [len(text)], 0.0
        near = min(NEAR_CHARACTERS, round(len(text) * min(self._fractions.values()) / 4))
        for name in ("test", "validation"):
            fraction = self._fractions.get(name, 0.0)
            share += fraction
            cut = round(len(text) * (1 - share))
            line_end = text.rfind("\n", max(0, cut - near), cut)
            bounds.append((cut if line_end < 0 else line_end + 1) if fraction else bounds[-1])
        test, validation = bounds[1], bounds[2]
        start, stop = {"train": (0, validation), "validation": (validation, test), "test": (test, len(text))}[split]
        return text[start:stop]

    def _split_of(self, text: str) -> str:
        lent = self._lent_texts()
        return (lent and lent.get(_digest(text).hex())) or self._split_by_chance(text)

    def _split_by_chance(self, text: str) -> str:
        number, upper = _number(text), 0.0
        for split in ("test", "validation"):
            upper += self._fractions.get(split, 0.0)
            if number < upper:
                return split
        return "train"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def _number(text: str) -> float:
    return int.from_bytes(_digest(text), "big") / 2**64
