"""Passages of a split with a class for each, which the data themselves say: what probes are asked about."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longmix.data.corpora.sotu import Sotu
from longmix.data.text_data import TextData
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.evaluation.subject import Subject

HELD_OUT = 4
"""One passage in so many is held out."""

KINDS_OF_TOKEN = ("letter", "digit", "space", "other", "part of a letter")
"""Classes of the next token, by the first letter that it stands for; the last where it begins within one."""


@dataclass(frozen=True)
class Passages:
    """Passages of equal length, and their classes.

    Attributes:
        tokens: int64 [N, T].
        labels: int64 [N], numbers of `classes`.
        held_out: bool [N], those that judge.
        classes: their names.
    """

    tokens: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    classes: Sequence[str]

    @property
    def floor(self) -> float:
        """The share of held-out passages in the class that is commonest among the others."""
        commonest = np.bincount(self.labels[~self.held_out], minlength=len(self.classes)).argmax()
        return float((self.labels[self.held_out] == commonest).mean())


@dataclass(frozen=True)
class _Place:
    """A passage: its file, its first token and its document."""

    file: int
    start: int
    document: int


def passages_of(subject: Subject, label: str, length: int, count: int, classes: int) -> Passages:
    """Passages of a split with the class that `label` says, evenly spread and always the same.

    A passage lies in one document and shares no token with another. Held out is every fourth passage; of `year` every
    fourth document, with all its passages.

    Args:
        subject: says data and split.
        label: one of `LABELS`.
        length: tokens of a passage.
        count: the most passages.
        classes: the most classes, where documents or years are put into classes.

    Raises:
        ConfigError: these data do not say it.
        DataError: the split has too few passages, or fewer than two classes.
    """
    if not isinstance(subject.data, TextData):
        raise ConfigError("task=probe reads text, and the data are a synthetic task.")
    files = subject.data.token_files(subject.split)
    tokens, labels, held_out, names = LABELS[label](subject, files, length, count, classes)
    there = {int(found) for found in np.unique(labels[~held_out])}
    if len(there) < 2 or not held_out.any():
        raise DataError(
            f"the {subject.split} split of {subject.data.label} has {len(tokens)} passages of {length} tokens in "
            f"{len(there)} classes of {label}, too few to fit a probe; give a smaller task.probe.length, or another "
            "split."
        )
    return Passages(tokens, labels, held_out, names)


_Found = tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[str]]


def _next(subject: Subject, files: list[TokenFile], length: int, count: int, classes: int) -> _Found:
    """The class of the token that follows the passage."""
    places = _spread([place for i, file in enumerate(files) for place in _places(i, file, length + 1)], count)
    read = _read(files, places, length + 1)
    kinds = [_kind_of(subject.data.tokenizer, int(token)) for token in read[:, -1]]
    labels = np.array([KINDS_OF_TOKEN.index(kind) for kind in kinds], dtype=np.int64)
    return read[:, :-1], labels, _every_fourth(len(places)), KINDS_OF_TOKEN


def _document(subject: Subject, files: list[TokenFile], length: int, count: int, classes: int) -> _Found:
    """The document that the passage is of, among those with the most passages."""
    by_document: dict[tuple[int, int], list[_Place]] = {}
    for index, file in enumerate(files):
        for place in _places(index, file, length):
            by_document.setdefault((index, place.document), []).append(place)
    chosen = sorted(sorted(by_document, key=lambda key: (-len(by_document[key]), key))[:classes])
    each = max(HELD_OUT, count // max(1, len(chosen)))
    kept = [(number, place) for number, key in enumerate(chosen) for place in _spread(by_document[key], each)]
    places = [place for _, place in kept]
    return (
        _read(files, places, length),
        np.array([number for number, _ in kept], dtype=np.int64),
        _every_fourth(len(places)),
        [f"document {document}" for _, document in chosen],
    )


def _source(subject: Subject, files: list[TokenFile], length: int, count: int, classes: int) -> _Found:
    """The corpus of a mixture that the passage is of."""
    assert isinstance(subject.data, TextData)
    names = subject.data.part_names
    if len(names) < 2:
        raise ConfigError(
            f"task.label=source tells the corpora of data=mixture apart, and {subject.data.label} is one alone; use "
            "document, year or next."
        )
    each = max(1, count // len(files))
    places = [place for i, file in enumerate(files) for place in _spread(_places(i, file, length), each)]
    labels = np.array([place.file for place in places], dtype=np.int64)
    return _read(files, places, length), labels, _every_fourth(len(places)), names


def _year(subject: Subject, files: list[TokenFile], length: int, count: int, classes: int) -> _Found:
    """The years of the speech, in classes of about as many speeches each."""
    data = subject.data
    assert isinstance(data, TextData)
    if not isinstance(data.corpus, Sotu):
        raise ConfigError(f"task.label=year needs data=sotu, and the data are {data.label}; use document or next.")
    years = data.corpus.years(subject.split)
    if len(years) != len(files[0].offsets) - 1:
        raise DataError(f"the {subject.split} split of {data.label} has other documents than the speeches.")
    borders = np.array_split(np.array(years), min(classes, len(years)))
    starts = sorted({int(part[0]) for part in borders})
    names = [f"from {start}" for start in starts]
    by_document: dict[int, list[_Place]] = {}
    for place in _places(0, files[0], length):
        by_document.setdefault(place.document, []).append(place)
    each = max(1, count // max(1, len(by_document)))
    places = [place for found in by_document.values() for place in _spread(found, each)]
    of_class = np.searchsorted(starts, years, side="right") - 1
    labels = np.array([of_class[place.document] for place in places], dtype=np.int64)
    held_out = np.array([place.document % HELD_OUT == HELD_OUT - 1 for place in places])
    return _read(files, places, length), labels, held_out, names


Labeller = Callable[[Subject, list[TokenFile], int, int, int], _Found]
LABELS: dict[str, Labeller] = {"next": _next, "document": _document, "source": _source, "year": _year}
"""What can be asked about a passage."""


def _places(index: int, file: TokenFile, length: int) -> list[_Place]:
    """All passages of a file, one after the other in each document; a document's separator is in none."""
    found = []
    for document, (start, end) in enumerate(zip(file.offsets[:-1].tolist(), file.offsets[1:].tolist(), strict=True)):
        count = (end - start - 1) // length
        found += [_Place(index, start + 1 + number * length, document) for number in range(count)]
    return found


def _spread(places: list[_Place], count: int) -> list[_Place]:
    """At most `count` of them, evenly spread."""
    if len(places) <= count:
        return places
    return [places[number * len(places) // count] for number in range(count)]


def _read(files: list[TokenFile], places: list[_Place], length: int) -> np.ndarray:
    rows = [files[place.file].tokens[place.start : place.start + length] for place in places]
    return np.stack(rows).astype(np.int64) if rows else np.zeros((0, length), dtype=np.int64)


def _every_fourth(count: int) -> np.ndarray:
    return np.arange(count) % HELD_OUT == HELD_OUT - 1


def _kind_of(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.decode([token])
    first = text[:1]
    if not first or first == "\ufffd":
        return "part of a letter"
    if first.isspace():
        return "space"
    return "letter" if first.isalpha() else "digit" if first.isdigit() else "other"
