"""Ids alone, for token files whose tokenizer is not at hand."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longmix.data.corpora.corpus import Corpus
from longmix.data.tokens.byte_level import MOST_IDS
from longmix.data.tokens.tokenizers import NumberTokenizer, Tokenizer
from longmix.errors import ConfigError


class IdTokenizer(Tokenizer):
    """Ids whose texts nobody knows, of token files without their tokenizer: losses are in nats per token alone.

    Args:
        vocab_size: ids are below this.
        separator: the id that starts each document; None where there is none, or it is not known.

    Raises:
        ConfigError: there are no ids, too many, or the separator is none of them.
    """

    def __init__(self, vocab_size: int, separator: int | None = None) -> None:
        if not 1 <= vocab_size <= MOST_IDS:
            raise ConfigError(f"tokenizer.vocab_size={vocab_size} must be from 1 to {MOST_IDS:,}.")
        if separator is not None and not 0 <= separator < vocab_size:
            raise ConfigError(f"tokenizer.separator={separator} must be an id from 0 to {vocab_size - 1:,}, or null.")
        self.vocab_size, self.separator_id = vocab_size, -1 if separator is None else separator
        self._numbers = NumberTokenizer(vocab_size)

    def prepare(self, corpus: Corpus, cache_dir: Path) -> Tokenizer:
        """Itself, for a corpus of tokens.

        Raises:
            ConfigError: the corpus, or one of a mixture, is text.
        """
        parts: dict[str, Corpus] = getattr(corpus, "corpora", {corpus.name: corpus})
        texts = [name for name, part in parts.items() if not hasattr(part, "token_file")]
        if texts:
            raise ConfigError(
                f"tokenizer=ids stands for no text, and the corpus {texts[0]} is text; it goes with data=tokens alone."
            )
        return self

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, which has them as numbers, int32 [number of tokens].

        Raises:
            DataError: a word of the text is not an id.
        """
        return self._numbers.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as numbers, with a blank after each."""
        return self._numbers.decode(ids)

    def token_bytes(self) -> np.ndarray:
        """Zeros, int32 [vocab_size]: no id is known to stand for any text."""
        return np.zeros(self.vocab_size, np.int32)

    def state(self) -> dict[str, Any]:
        """Everything `tokenizer_from_state` needs, JSON-able."""
        separator = None if self.separator_id < 0 else self.separator_id
        return {"kind": "ids", "vocab_size": self.vocab_size, "separator": separator}
