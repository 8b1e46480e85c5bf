"""The words of a split: the unit of perplexity in the tables of WikiText and PG-19, whatever the tokenizer."""

from longmix.data.text_data import TextData
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError
from longmix.evaluation.subject import Subject

PUBLISHED = {
    "wikitext2": {"train": 2_088_628, "validation": 217_646, "test": 245_569},
    "wikitext103": {"train": 103_227_021, "validation": 217_646, "test": 245_569},
    "pg19": {"train": 1_973_136_207, "validation": 3_007_061, "test": 6_966_499},
}
"""Words of each split in the papers: arXiv 1609.07843, where line ends count, and arXiv 1911.05507."""

WAYS = ("whitespace", "lines", *PUBLISHED)
"""Ways to count: what stands between whitespace; that and each line's end, as WikiText has it; a published number."""

NEAR = 1.25
"""A given number may differ by this factor from what is counted: tokenised and raw forms of a text do."""


def check_words(given: str | int) -> None:
    """Refuse a setting that is neither a way to count nor a number.

    Raises:
        ConfigError: names the ways.
    """
    if isinstance(given, str) and given not in WAYS:
        raise ConfigError(f"task.words={given} is unknown; use {', '.join(WAYS)}, or the number of words of the split.")
    if isinstance(given, int) and given < 1:
        raise ConfigError(f"task.words={given} must be at least 1, or null for no perplexity by words.")


def words_of(subject: Subject, given: str | int) -> int:
    """The number of words of the subject's split, all of it.

    Args:
        subject: has the data.
        given: one of `WAYS`, or a number.

    Raises:
        ConfigError: the data are no text, a part of the split is evaluated, or the given number is not that of this
            text.
        DataError: there is no such split.
    """
    data, split, most = subject.data, subject.split, subject.config.max_tokens
    if not isinstance(data, TextData) or not data.windows_are_text:
        raise ConfigError(f"task.words={given} counts words of text, and {data.label} is a synthetic task.")
    if not data.token_bytes.any():
        raise ConfigError(f"task.words={given} counts words of text, and nobody knows the text of these tokens.")
    files = data.token_files(split)
    tokens = sum(file.num_tokens for file in files)
    if most is not None and most < tokens:
        raise ConfigError(
            f"task.words={given} counts the words of the whole {split} split, and max_tokens={most} reads a part of "
            f"its {tokens:,} tokens. Leave max_tokens out, or task.words."
        )
    words, lines = (sum(counts) for counts in zip(*(_counted(file, data.tokenizer) for file in files), strict=True))
    if given == "whitespace":
        return max(1, words)
    if given == "lines":
        return words + lines
    return _near(given, split, words, lines)


def _near(given: str | int, split: str, words: int, lines: int) -> int:
    """A given number of words, if that of the text is near.

    Raises:
        ConfigError: it is not; or no number of this split was published.
    """
    number = given if isinstance(given, int) else PUBLISHED[given].get(split)
    if number is None:
        raise ConfigError(f"task.words={given} says nothing of the split {split}; give a number of words.")
    if not words / NEAR <= number <= (words + lines) * NEAR:
        raise ConfigError(
            f"task.words={given} says {number:,} words, and the {split} split has {words:,} between whitespace in "
            f"{lines:,} lines: it is another text. task.words=whitespace counts them."
        )
    return number


def _counted(file: TokenFile, tokenizer: Tokenizer) -> tuple[int, int]:
    """Words between whitespace, and lines; a document's last line counts if it has no end."""
    words = lines = 0
    for start, end in zip(file.offsets[:-1].tolist(), file.offsets[1:].tolist(), strict=True):
        text = tokenizer.decode(file.tokens[start + 1 : end].tolist())
        words += len(text.split())
        lines += text.count("\n") + (not text.endswith("\n") if text else 0)
    return words, lines
