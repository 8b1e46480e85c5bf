"""A byte-level BPE that is trained on the corpus, once for all runs that use it."""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmix.data.corpora.corpus import Corpus, check_unchanged, read_documents
from longmix.data.tokens.sealed_folder import build_once, open_sealed
from longmix.data.tokens.tokenizers import SEPARATOR, LibraryTokenizer, Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.files import sha256_of_json

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

BPE_FORMAT_VERSION = 1
LARGEST_VOCABULARY = 10_000_000
"""The most ids that are trained; the library takes memory for all of them before it begins."""
TOKENIZER_JSON = "tokenizer.json"


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
        if vocab_size > LARGEST_VOCABULARY:
            raise ConfigError(f"tokenizer.vocab_size={vocab_size} must be at most {LARGEST_VOCABULARY:,}.")
        if min_frequency < 1:
            raise ConfigError(f"tokenizer.min_frequency must be at least 1, got {min_frequency}")
        self.vocab_size = vocab_size
        self._settings = {"vocab_size": vocab_size, "min_frequency": min_frequency}

    def prepare(self, corpus: Corpus, cache_dir: Path) -> Tokenizer:
        """Train on the corpus's train split, or load what an earlier run trained on the same content.

        Raises:
            DataError: the cached tokenizer is damaged, or the corpus has no train split.
        """
        key = sha256_of_json(["bpe", BPE_FORMAT_VERSION, self._settings, corpus.fingerprint()])
        expected = {"format_version": BPE_FORMAT_VERSION, "key": key}
        folder = cache_dir / f"bpe{self._settings['vocab_size']}-{key[:16]}"

        def write(temporary: Path) -> dict[str, Any]:
            library = train_bpe(corpus, SEPARATOR, **self._settings)
            check_unchanged(corpus)
            (temporary / TOKENIZER_JSON).write_text(library.to_str(pretty=True), encoding="utf-8")
            return expected

        build_once(folder, write)
        open_sealed(folder, expected)
        super().__init__((folder / TOKENIZER_JSON).read_text(encoding="utf-8"), SEPARATOR, source=str(folder))
        return self


def train_bpe(corpus: Corpus, separator: str, vocab_size: int, min_frequency: int) -> "tokenizers.Tokenizer":
    """A tokenizer of up to `vocab_size` ids: 256 bytes, merges seen at least `min_frequency` times, the separator.

    Raises:
        DataError: a document is not Unicode text, or the corpus has no train split.
    """
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
    library.add_special_tokens([separator])
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
