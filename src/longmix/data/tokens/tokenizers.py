"""Tokenizers: bytes, a byte-level BPE trained on the corpus, a `tokenizer.json`, or ids that stand for no known text.

All of them are exact: the tokens of a text stand for precisely its UTF-8 bytes, so that bits per byte can be compared
between tokenizers. A text that a vocabulary cannot write is refused, or altered if so chosen. The separator that starts
each document is never produced from text; a document that spells out `<|endoftext|>` is encoded as those characters.
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from longmix.data.corpora.corpus import Corpus
from longmix.data.tokens.byte_level import (
    PROBE,
    PROBES,
    UTF8_BYTES,
    ByteRepertoire,
    bytes_by_token,
    bytes_of_letters,
    first_inexact,
    is_byte_level,
    library_errors,
    open_library,
    without_letter,
)
from longmix.data.tokens.pieces import Pieces
from longmix.errors import ConfigError, DataError
from longmix.files import sha256_of_json
from longmix.paths import user_path
from longmix.reading import read_bytes

logger = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"


class Tokenizer(ABC):
    """The interface of every tokenizer.

    Attributes:
        vocab_size: number of ids; all ids are below it.
        separator_id: the special id that starts every document.
    """

    vocab_size: int
    separator_id: int

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text that a model writes: the separator, unless the tokenizer came with others."""
        return (self.separator_id,) if self.separator_id >= 0 else ()

    def prepare(self, corpus: Corpus, cache_dir: Path) -> "Tokenizer":
        """Return the tokenizer ready for use; only one that is trained needs the corpus."""
        return self

    def admit(self, text: str) -> str:
        """The text as it is encoded: unchanged, or with characters replaced that have no tokens, if so configured.

        Raises:
            DataError: a character has no tokens and none is replaced.
            UnicodeEncodeError: it holds a lone surrogate.
        """
        return text

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [number of tokens], without separators.

        Raises:
            DataError: see `admit`.
            UnicodeEncodeError: a text holds a lone surrogate, which has no UTF-8 form.
        """

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text, int32 [number of tokens], without separators."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; separators give nothing, bytes that are not UTF-8 become U+FFFD."""

    def token_content(self, token: int) -> bytes:
        """The bytes that an id stands for; none for special ids and ids without a token.

        The bytes of some ids one after the other, decoded as UTF-8, are what `decode` gives. As it stands, this is for
        tokenizers whose ids stand for whole characters.
        """
        return self.decode([token]).encode()

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes each id stands for, int32 [vocab_size]; 0 for the separator and other specials."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything `tokenizer_from_state` needs, JSON-able; a checkpoint carries it."""

    def fingerprint(self) -> str:
        """Hex SHA-256 of the state but for `end_ids`: equal for tokenizers that give every text the same ids."""
        return sha256_of_json({key: value for key, value in self.state().items() if key != "end_ids"})


class NumberTokenizer(Tokenizer):
    """Ids written as numbers, for synthetic tasks; each counts as one byte, and there is no separator among them.

    Args:
        vocab_size: ids are below this.
    """

    separator_id = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [number of tokens].

        Raises:
            DataError: a word of the text is not a number below `vocab_size`.
        """
        words = [text.split() for text in texts]
        wrong = [word for row in words for word in row if not word.isdecimal() or int(word) >= self.vocab_size]
        if wrong:
            raise DataError(
                f"{wrong[0]!r} is not a token; the model knows the numbers from 0 to {self.vocab_size - 1}."
            )
        return [np.array([int(word) for word in row], np.int32) for row in words]

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as numbers, with a blank after each."""
        return "".join(f"{int(i)} " for i in ids)

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes each id stands for, int32 [vocab_size]."""
        return np.ones(self.vocab_size, np.int32)

    def state(self) -> dict[str, Any]:
        """Everything `tokenizer_from_state` needs, JSON-able."""
        return {"kind": "numbers", "vocab_size": self.vocab_size}


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are bytes and 256 is the separator: nothing to train, nothing to ship."""

    vocab_size = 257
    separator_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [number of tokens]."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids if i != self.separator_id).decode(errors="replace")

    def token_content(self, token: int) -> bytes:
        """The bytes that an id stands for; none for special ids."""
        return bytes([token]) if token != self.separator_id else b""

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes each id stands for, int32 [vocab_size]."""
        return np.array([1] * 256 + [0], np.int32)

    def state(self) -> dict[str, Any]:
        """Everything `tokenizer_from_state` needs, JSON-able."""
        return {"kind": "bytes"}


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, given as the text of its `tokenizer.json`: byte-level, or of pieces.

    Some things differ from what the library does by default, all for exactness. Special tokens are never matched in
    text. Unicode normalisation (NFC and its kin) is taken out, because it changes text that the vocabulary can express
    as it stands. BPE dropout is taken out, because it makes the tokens of a text a matter of chance. Of vocabularies of
    pieces (see `longmix.data.tokens.pieces`), so is the blank in front of a text.

    Args:
        json: the text of the file.
        separator: the token that starts each document.
        source: where it comes from, for messages.
        missing_bytes: what happens to a character one of whose bytes has no token: "refuse" refuses the text by name,
            "replace" puts U+FFFD in its place ("?" where that has no tokens either).
        end_ids: see `Tokenizer.end_ids`; None for the separator.

    Attributes:
        missing_bytes: as given.

    Raises:
        ConfigError: a setting is impossible.
        DataError: it has no tokens for bytes, does not give back exactly the text it was given, or lacks the separator.
    """

    def __init__(
        self,
        json: str,
        separator: str,
        source: str,
        missing_bytes: str = "refuse",
        end_ids: Sequence[int] | None = None,
    ) -> None:
        self._json, self._separator, self._source = json, separator, source
        self._library = open_library(json, separator, source)
        self._token_bytes = bytes_by_token(self._library, source)
        self._pieces = None if is_byte_level(self._library) else Pieces(self._library, len(self._token_bytes))
        if self._pieces is None:
            missing = without_letter(self._library)
        else:
            self._token_bytes = self._pieces.sizes()
            missing = bytes(sorted(UTF8_BYTES - self._pieces.bytes))
        self._repertoire = ByteRepertoire(missing, missing_bytes, source)
        self.missing_bytes = missing_bytes
        self.vocab_size = len(self._token_bytes)
        self.separator_id = cast(int, self._library.token_to_id(separator))
        self._end_ids = None if end_ids is None else _checked_ends(end_ids, self.vocab_size, source)
        self._check_exact(source)

    def _check_exact(self, source: str) -> None:
        if self.separator_id in self._encoded([self._separator])[0]:
            raise DataError(
                f"tokenizer.separator: {self._separator!r} is an ordinary token of {source}, so documents could "
                "contain it; name one of its special tokens"
            )
        probes = [*PROBES, "".join(PROBES), PROBE + self._separator]
        texts = [self._repertoire.without_missing(text) for text in probes]
        with library_errors(source, "cannot encode a text"):
            if self._pieces is None:
                inexact = first_inexact(self._library, texts, self._token_bytes)
            else:
                inexact = self._pieces.first_inexact(texts)
        if inexact is not None:
            raise DataError(
                f"{source} does not reproduce every text byte for byte ({inexact[0]!r} came back as {inexact[1]}), so "
                "bits per byte would be wrong. Use a byte-level tokenizer that adds no prefix space, or another, or "
                "tokenizer=bytes or tokenizer=bpe."
            )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text."""
        return super().end_ids if self._end_ids is None else self._end_ids

    def admit(self, text: str) -> str:
        """The text as it is encoded: missing bytes are refused or replaced."""
        return self._repertoire.admit(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text; the library spreads the texts over all cores."""
        return self._encoded([self.admit(text) for text in texts])

    def _encoded(self, texts: list[str]) -> list[np.ndarray]:
        with library_errors(self._source, "cannot encode a text"):
            if self._pieces is not None:
                return [np.array(ids, np.int32) for ids in self._pieces.encode(texts)]
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        if self._pieces is not None:
            return self._pieces.decode(ids)
        with library_errors(self._source, "cannot decode these ids"):
            return self._library.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_content(self, token: int) -> bytes:
        """The bytes that an id stands for; none for special ids."""
        if self._pieces is not None:
            return self._pieces.contents[token]
        content = self._library.id_to_token(token)
        return b"" if content is None or self._token_bytes[token] == 0 else bytes_of_letters(content)

    def token_name(self, token: int) -> str:
        """The name of an id in the vocabulary."""
        return str(self._library.id_to_token(token))

    def ending_at(self, end_ids: Sequence[int]) -> "LibraryTokenizer":
        """The same tokenizer with other `end_ids`.

        Raises:
            ConfigError: one is not an id.
        """
        other = copy.copy(self)
        other._end_ids = _checked_ends(end_ids, self.vocab_size, self._source)
        return other

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes each id stands for, int32 [vocab_size]."""
        return self._token_bytes.copy()

    def state(self) -> dict[str, Any]:
        """Everything `tokenizer_from_state` needs, JSON-able."""
        state: dict[str, Any] = {"kind": "library", "json": self._json, "separator": self._separator}
        if self.missing_bytes != "refuse":
            state["missing_bytes"] = self.missing_bytes
        if self._end_ids is not None:
            state["end_ids"] = list(self._end_ids)
        return state

    def library_json(self) -> str:
        """The text of the `tokenizer.json` as it is used: without normalisation, the separator among the specials."""
        return self._library.to_str()


def _checked_ends(end_ids: Sequence[int], vocab_size: int, source: str) -> tuple[int, ...]:
    wrong = [i for i in end_ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size]
    if wrong or not end_ids:
        given = wrong[0] if wrong else list(end_ids)
        raise ConfigError(f"tokenizer.end_ids: {given!r} is not among the ids of {source}, 0 to {vocab_size - 1:,}.")
    return tuple(dict.fromkeys(end_ids))


class TokenizerFile(LibraryTokenizer):
    """A `tokenizer.json`, as `tokenizers` and `transformers` save it.

    Args:
        path: the file.
        separator: the token of that file that starts each document.
        missing_bytes: see `LibraryTokenizer`.
        end_ids: see `LibraryTokenizer`.

    Raises:
        ConfigError: a setting is impossible.
        DataError: see `LibraryTokenizer`; or the file is missing or no tokenizer.
    """

    def __init__(
        self,
        path: str,
        separator: str = SEPARATOR,
        missing_bytes: str = "refuse",
        end_ids: Sequence[int] | None = None,
    ) -> None:
        file = user_path("tokenizer.path", path)
        try:
            json = read_bytes(file).decode()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"tokenizer.path: cannot read {path} ({reason})") from error
        super().__init__(json, separator, f"tokenizer.path {path}", missing_bytes, end_ids)
        self._say_what_lacks(path)

    def _say_what_lacks(self, path: str) -> None:
        if missing := self._repertoire.missing:
            done = "refused by name" if self.missing_bytes == "refuse" else "replaced"
            logger.info(
                "%s has no token for %d of the %d bytes of UTF-8 (%s); characters that hold one are %s",
                *(path, len(missing), len(UTF8_BYTES), ", ".join(f"0x{byte:02x}" for byte in missing), done),
            )
