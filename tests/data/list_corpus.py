"""Small corpora and a tokenizer whose tokens can be told apart."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from longmix.data.corpora.corpus import check_split
from longmix.data.tokens.tokenizers import Tokenizer


class ListCorpus:
    """Documents given as lists; `name` may be any text."""

    def __init__(self, name: str = "list", **documents: list[str]) -> None:
        self.name = name
        self.splits = tuple(documents)
        self._documents = documents

    def documents(self, split: str) -> Iterator[str]:
        check_split(self, split)
        return iter(self._documents[split])

    def fingerprint(self) -> dict[str, Any]:
        return {"documents": self._documents}


class PartedList(ListCorpus):
    """Documents in parts of so many, each of which can be read alone."""

    def __init__(self, size: int, **documents: list[str]) -> None:
        super().__init__(**documents)
        self.size = size

    def parts(self, split: str) -> int:
        return -(-len(self._documents[split]) // self.size)

    def read(self, split: str, part: int, position: int | None = None) -> "PartedReading":
        return PartedReading(self._documents[split][part * self.size : (part + 1) * self.size], position or 0)


class PartedReading:
    def __init__(self, texts: list[str], position: int) -> None:
        self.texts, self.position = texts, position

    def __iter__(self) -> Iterator[str]:
        for text in self.texts[self.position :]:
            self.position += 1
            yield text


class CodePointTokenizer(Tokenizer):
    """One token a character, so that a text of distinct characters has distinct tokens; needs uint32."""

    vocab_size = 0x110000 + 1
    separator_id = 0x110000

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([ord(character) for character in text], np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(i) for i in ids if i != self.separator_id)

    def token_bytes(self) -> np.ndarray:
        points = np.arange(self.vocab_size)
        return (1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)).astype(np.int32)

    def state(self) -> dict[str, Any]:
        return {"kind": "code points"}


def distinct_documents(lengths: Sequence[int]) -> list[str]:
    """Documents of these lengths in which no character occurs twice, in one or across them."""
    characters = iter(range(0x4E00, 0x10FFFF))
    return ["".join(chr(next(characters)) for _ in range(length)) for length in lengths]


def random_text(seed: int, length: int = 200) -> str:
    """Text of all planes, with runs of blanks, controls, combining marks and half of some special tokens."""
    draw = random.Random(seed)
    pieces = ["<|endoftext|>", "<|", "  ", "\r\n", "\x00", "e\u0301", "\u00e9", "ﬁ", "▁", "Ġ", "\ufeff", "the ", " the"]
    planes = [(0x20, 0x7E), (0xA0, 0x2FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0xE000, 0xF8FF), (0x20000, 0x2A6DF)]
    return "".join(
        draw.choice(pieces) if draw.random() < 0.3 else chr(draw.randint(*draw.choice(planes))) for _ in range(length)
    )
