"""RWKV's "World" vocabularies: a list of byte strings, of which the longest that fits is taken."""

import ast
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from longmix.data.tokens.byte_level import MOST_IDS
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.paths import user_path
from longmix.reading import read_bytes, shortened

END_OF_TEXT = 0
"""The id that stands between documents; no line of the file has it."""

PREFIX = 3
SHORT = (2, 1)
"""Lengths to try where no token begins with the next `PREFIX` bytes."""

LINE = re.compile(r"(\d+) (b?(['\"]).*\3) (\d+)")
"""Id, byte string or text as Python writes it, and its length in bytes."""


class WorldTokenizer(Tokenizer):
    """A vocabulary of RWKV's kind, given as the text of its file. Every text has one encoding, and comes back exactly.

    Args:
        vocabulary: lines of id, token and length.
        vocab_size: ids are below this; None for those of the file. RWKV's models have 65,536 for 65,530.
        source: for messages.

    Raises:
        ConfigError: `vocab_size` is too small or too large.
        DataError: a line is damaged, an id or token comes twice, or a byte has no token.
    """

    separator_id = END_OF_TEXT

    def __init__(self, vocabulary: str, vocab_size: int | None = None, source: str = "the vocabulary") -> None:
        self._vocabulary = vocabulary
        self._ids = _parsed(vocabulary, source)
        own = 1 + max(self._ids.values())
        self.vocab_size = own if vocab_size is None else vocab_size
        if not own <= self.vocab_size <= MOST_IDS:
            raise ConfigError(
                f"tokenizer.vocab_size={vocab_size} must be from {own:,}, the ids there are, to {MOST_IDS:,}."
            )
        self._contents = [b""] * self.vocab_size
        for content, index in self._ids.items():
            self._contents[index] = content
        lengths: dict[bytes, set[int]] = {}
        for content in self._ids:
            lengths.setdefault(content[:PREFIX], {1, 2} if content[:2] in self._ids else {1}).add(len(content))
        # The lengths that tokens with the same first bytes have, and those that are a part of these, the longest first.
        self._lengths = {begin: sorted(found, reverse=True) for begin, found in lengths.items() if len(begin) == PREFIX}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [number of tokens]."""
        return [np.array(self._encoded(text.encode()), np.int32) for text in texts]

    def _encoded(self, raw: bytes) -> list[int]:
        ids, lengths = self._ids, self._lengths
        found: list[int] = []
        at, end = 0, len(raw)
        while at < end:
            for length in lengths.get(raw[at : at + PREFIX], SHORT):
                if (index := ids.get(raw[at : at + length])) is not None:
                    found.append(index)
                    break
            at += length
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._contents[int(i)] for i in ids).decode(errors="replace")

    def token_content(self, token: int) -> bytes:
        """The bytes that an id stands for; none for the separator and ids without a token."""
        return self._contents[token]

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes each id stands for, int32 [vocab_size]."""
        return np.array([len(content) for content in self._contents], np.int32)

    def state(self) -> dict[str, Any]:
        """Everything `tokenizer_from_state` needs, JSON-able."""
        return {"kind": "world", "vocabulary": self._vocabulary, "vocab_size": self.vocab_size}


def _parsed(vocabulary: str, source: str) -> dict[bytes, int]:
    ids: dict[bytes, int] = {}
    for number, line in enumerate(vocabulary.split("\n"), 1):
        if not line.strip():
            continue
        content = _content(line.rstrip("\r"))
        if content is None:
            raise DataError(
                f"{source}: line {number:,} is not of RWKV's form, id, token and length, or its length is wrong: "
                f"{shortened(line)}"
            )
        index = int(line.partition(" ")[0])
        if content in ids or not 0 < index < MOST_IDS:
            raise DataError(f"{source}: line {number:,} has a token that came before, or an id that none can have.")
        ids[content] = index
    if len(set(ids.values())) < len(ids):
        raise DataError(f"{source} gives several tokens one id.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise DataError(
            f"{source} is no vocabulary of RWKV's kind: {len(missing)} bytes have no token, such as 0x{missing[0]:02x}."
        )
    return ids


def _content(line: str) -> bytes | None:
    """The byte string of a line; None if it is damaged."""
    match = LINE.fullmatch(line)
    if match is None:
        return None
    try:
        value = ast.literal_eval(match[2])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    content = value.encode(errors="surrogatepass") if isinstance(value, str) else value
    return content if isinstance(content, bytes) and len(content) == int(match[4]) > 0 else None


class WorldFile(WorldTokenizer):
    """A vocabulary of RWKV's kind in a file, such as `rwkv_vocab_v20230424.txt`.

    Args:
        path: the file.
        vocab_size: see `WorldTokenizer`.

    Raises:
        ConfigError, DataError: see `WorldTokenizer`; or the file cannot be read.
    """

    def __init__(self, path: str, vocab_size: int | None = None) -> None:
        file = user_path("tokenizer.path", path)
        try:
            vocabulary = read_bytes(file).decode()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"tokenizer.path: cannot read {path} ({reason})") from error
        super().__init__(vocabulary, vocab_size, f"tokenizer.path {path}")
