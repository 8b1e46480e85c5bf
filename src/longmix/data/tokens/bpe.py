"""Training a byte-level BPE on a corpus."""

import logging
import sys
import time
from typing import TYPE_CHECKING

from longmix.data.corpora.corpus import Corpus, read_documents
from longmix.errors import DataError

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)


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
