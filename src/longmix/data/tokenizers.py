"""Tokenizers: bytes, a byte-level BPE trained on the corpus, or a `tokenizer.json`.

All of them are exact: the tokens of a text stand for precisely its UTF-8 bytes, whatever the text, so that bits per
byte can be compared between tokenizers. The separator that starts each document is never produced from text; a
document that spells out `<|endoftext|>` is encoded as those characters.
"""

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from longmix.data.corpus import Corpus, read_documents
from longmix.data.sealed import build_once, open_sealed, sha256_of_json
from longmix.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"
BPE_FORMAT_VERSION = 1
TOKENIZER_JSON = "tokenizer.json"
PROBE = "Naïve  cafe\u0301\r\n\tx=0; ﬁ Ω 漢字 🙂\u200d \u00a0<|endoftext|> <s> [MASK]\x00▁ "


class Tokenizer(ABC):
    """What every tokenizer answers.

    Attributes:
        vocab_size: number of ids; all ids are below it.
        separator_id: the special id that starts every document.
    """

    vocab_size: int
    separator_id: int

    def prepare(self, corpus: Corpus, cache_dir: Path) -> "Tokenizer":
        """Return the tokenizer ready for use; only one that is trained needs the corpus."""
        return self

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [number of tokens], without separators.

        Raises:
            UnicodeEncodeError: a text holds a lone surrogate, which has no UTF-8 form.
        """

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text, int32 [number of tokens], without separators."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; separators give nothing, bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes each id stands for, int32 [vocab_size]; 0 for the separator and other specials."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything `tokenizer_from_state` needs, JSON-able; a checkpoint carries it."""

    def fingerprint(self) -> str:
        """Hex SHA-256 of the state: equal for tokenizers that give every text the same ids."""
        return sha256_of_json(self.state())


def tokenizer_from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer whose `state()` this is.

    Raises:
        DataError: the state is not one that longmix wrote.
    """
    if state.get("kind") == "bytes":
        return ByteTokenizer()
    if state.get("kind") == "numbers":
        return NumberTokenizer(state["vocab_size"])
    if state.get("kind") == "library":
        return LibraryTokenizer(state["json"], state["separator"], source="the saved tokenizer")
    raise DataError(f"unknown tokenizer kind {state.get('kind')!r}; expected 'bytes', 'library' or 'numbers'")


class NumberTokenizer(Tokenizer):
    """Ids written as numbers, for synthetic tasks; each counts as one byte, and there is no separator among them.

    Args:
        vocab_size: ids are below this.
    """

    separator_id = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer.encode_batch`.

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
        """See `Tokenizer.decode`; a blank follows each number."""
        return "".join(f"{int(i)} " for i in ids)

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`."""
        return np.ones(self.vocab_size, np.int32)

    def state(self) -> dict[str, Any]:
        """See `Tokenizer.state`."""
        return {"kind": "numbers", "vocab_size": self.vocab_size}


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are bytes and 256 is the separator: nothing to train, nothing to ship."""

    vocab_size = 257
    separator_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer.encode_batch`."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return bytes(int(i) for i in ids if i != self.separator_id).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`."""
        return np.array([1] * 256 + [0], np.int32)

    def state(self) -> dict[str, Any]:
        """See `Tokenizer.state`."""
        return {"kind": "bytes"}


class LibraryTokenizer(Tokenizer):
    """A byte-level tokenizer of the `tokenizers` library, given as the text of its `tokenizer.json`.

    Two things differ from what the library does by default, both for exactness. Special tokens are never matched in
    text. Unicode normalisation (NFC and its kin) is taken out, because it changes text that a byte-level vocabulary
    can express as it stands.

    Raises:
        DataError: it is not byte-level, does not give back exactly the text it was given, or lacks the separator.
    """

    def __init__(self, json: str, separator: str, source: str) -> None:
        self._load(json, separator, source)

    def _load(self, json: str, separator: str, source: str) -> None:
        self._json = json
        self._separator = separator
        self._library = _load_library(json, separator, source)
        self._token_bytes = _bytes_by_token(self._library, source)
        self.vocab_size = len(self._token_bytes)
        self.separator_id = cast(int, self._library.token_to_id(separator))
        self._check_exact(source)

    def _check_exact(self, source: str) -> None:
        if self.separator_id in self.encode(self._separator):
            raise DataError(
                f"tokenizer.separator: {self._separator!r} is an ordinary token of {source}, so documents could "
                "contain it; name one of its special tokens"
            )
        probe = PROBE + self._separator
        ids = self.encode(probe)
        if self._token_bytes[ids].sum() != len(probe.encode()) or self.decode(ids) != probe:
            raise DataError(
                f"{source} does not reproduce every text byte for byte ({probe!r} came back as "
                f"{self.decode(ids)!r}), so bits per byte would be wrong. Use a byte-level tokenizer that adds no "
                "prefix space, or tokenizer=bytes or tokenizer=bpe."
            )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer.encode_batch`; the library spreads the texts over all cores."""
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._library.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer.token_bytes`."""
        return self._token_bytes.copy()

    def state(self) -> dict[str, Any]:
        """See `Tokenizer.state`."""
        return {"kind": "library", "json": self._json, "separator": self._separator}

    def library_json(self) -> str:
        """The text of the `tokenizer.json` as it is used: without normalisation, the separator among the specials."""
        return self._library.to_str()


class TokenizerFile(LibraryTokenizer):
    """A byte-level `tokenizer.json`, as `tokenizers` and `transformers` save it.

    Args:
        path: the file.
        separator: the token of that file that starts each document.

    Raises:
        DataError: see `LibraryTokenizer`; or the file is missing or no tokenizer.
    """

    def __init__(self, path: str, separator: str = SEPARATOR) -> None:
        try:
            json = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"tokenizer.path: cannot read {path} ({error})") from error
        super().__init__(json, separator, source=f"tokenizer.path {path}")


class BpeTokenizer(LibraryTokenizer):
    """A byte-level BPE that `prepare` trains on the train split, or takes from the cache if it was trained before.

    Training is deterministic. A small corpus may hold fewer merges than asked for; `vocab_size` is then what was
    reached, and the log says so. Before `prepare` there are no tokens to encode with.

    Args:
        vocab_size: all ids: 256 bytes, the merges and the separator.
        min_frequency: pairs that occur less often are not merged.
    """

    def __init__(self, vocab_size: int = 4096, min_frequency: int = 2) -> None:
        if vocab_size < 257:
            raise ConfigError(
                f"tokenizer.vocab_size must be at least 257 (256 bytes and a separator), got {vocab_size}"
            )
        if min_frequency < 1:
            raise ConfigError(f"tokenizer.min_frequency must be at least 1, got {min_frequency}")
        self.vocab_size = vocab_size
        self._settings = {"vocab_size": vocab_size, "min_frequency": min_frequency}

    def prepare(self, corpus: Corpus, cache_dir: Path) -> "Tokenizer":
        """Train on the corpus's train split, or load what an earlier run trained on the same content.

        Raises:
            DataError: the cached tokenizer is damaged, or the corpus has no train split.
        """
        key = sha256_of_json(["bpe", BPE_FORMAT_VERSION, self._settings, corpus.fingerprint()])
        expected = {"format_version": BPE_FORMAT_VERSION, "key": key}
        folder = cache_dir / f"bpe{self._settings['vocab_size']}-{key[:16]}"

        def write(temporary: Path) -> dict[str, Any]:
            library = _train_bpe(corpus, **self._settings)
            (temporary / TOKENIZER_JSON).write_text(library.to_str(pretty=True), encoding="utf-8")
            return expected

        build_once(folder, write)
        open_sealed(folder, expected)
        self._load((folder / TOKENIZER_JSON).read_text(encoding="utf-8"), SEPARATOR, source=str(folder))
        return self


def _load_library(json: str, separator: str, source: str) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(json)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{source} is not a tokenizer.json that `tokenizers` can read ({error})") from error
    if library.token_to_id(separator) is None:
        specials = [token.content for token in library.get_added_tokens_decoder().values() if token.special]
        raise DataError(
            f"tokenizer.separator: {source} has no token {separator!r}; its special tokens are {', '.join(specials)}"
        )
    # some files hold it in the vocabulary only, where the library would not treat it as special
    library.add_special_tokens([separator])
    library.no_truncation()
    library.no_padding()
    library.normalizer = None
    library.encode_special_tokens = True
    return library


def _bytes_by_token(library: "tokenizers.Tokenizer", source: str) -> np.ndarray:
    from tokenizers import pre_tokenizers

    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = library.get_vocab(with_added_tokens=False)
    missing = alphabet.difference(vocabulary)
    if missing:
        raise DataError(
            f"{source} is not byte-level: {len(missing)} of the 256 bytes have no token, so some text would be lost. "
            "Use a byte-level tokenizer, or tokenizer=bytes or tokenizer=bpe."
        )
    added = library.get_added_tokens_decoder()
    counts = np.zeros(1 + max([*vocabulary.values(), *added]), np.int32)
    for token, index in vocabulary.items():
        counts[index] = len(token)
    for index, special_or_not in added.items():
        counts[index] = 0 if special_or_not.special else len(special_or_not.content.encode())
    return counts


def _train_bpe(corpus: Corpus, vocab_size: int, min_frequency: int) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    started_at = time.monotonic()
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    try:
        library.train_from_iterator(read_documents(corpus, "train"), trainer)
    except UnicodeEncodeError as error:
        raise DataError(
            f"a document of the train split of {corpus.name} holds a lone surrogate at character {error.start}, which "
            "is not Unicode text; repair or remove that document"
        ) from error
    library.add_special_tokens([SEPARATOR])
    reached = library.get_vocab_size()
    shortfall = "" if reached == vocab_size else f" (asked for {vocab_size:,}; the corpus has no more pairs to merge)"
    logger.info(
        "trained a BPE tokenizer of %s tokens on the train split of %s in %.1f s%s",
        f"{reached:,}",
        corpus.name,
        time.monotonic() - started_at,
        shortfall,
    )
    return library
