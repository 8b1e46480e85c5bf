"""The word `logit_bias`: which tokens the user means, and by how much their scores change."""

from collections.abc import Mapping

from longmix.command_line.values import split, without_quotes
from longmix.config.commands import BIASES
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.reading import shortened

DIGITS = 20
"""No id has so many; Python refuses to read thousands of them."""


def biases(given: str | Mapping[str | int, float], tokenizer: Tokenizer, vocab_size: int) -> dict[int, float]:
    """What is added to the scores of tokens, by id.

    Args:
        given: a mapping, or the text of one as on the command line. A key of digits is an id, any other a text that is
            one token; what two keys say of one token is added.
        tokenizer: of the model.
        vocab_size: ids are below it.

    Raises:
        ConfigError: it has another form, a key is no token, or a value is no number.
    """
    found: dict[int, float] = {}
    for key, value in (_entries(given) if isinstance(given, str) else given).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"logit_bias of {shortened(repr(key))} is {shortened(repr(value))}, which is no number.")
        token = _token(key, tokenizer, vocab_size)
        found[token] = found.get(token, 0.0) + value
    return found


def _entries(text: str) -> dict[str, float]:
    """The entries of a mapping as it is typed: keys with or without quotes, the number behind the last colon."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):
        raise ConfigError(f"logit_bias={shortened(text)} is no mapping; {BIASES}")
    entries: dict[str, float] = {}
    for item in split(text[1:-1]) if text[1:-1].strip() else []:
        key, colon, value = item.rpartition(":")
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is None or not colon:
            raise ConfigError(f"logit_bias={shortened(text)}: {shortened(item.strip())!r} lacks a number; {BIASES}")
        name = without_quotes(key.strip())
        entries[name] = entries.get(name, 0.0) + number
    return entries


def _token(key: str | int, tokenizer: Tokenizer, vocab_size: int) -> int:
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise ConfigError(f"logit_bias: {shortened(repr(key))} is no token; {BIASES}")
    if isinstance(key, int) or (key.isascii() and key.isdigit()):
        number = int(key) if len(str(key)) < DIGITS else vocab_size
        if not 0 <= number < vocab_size:
            raise ConfigError(f"logit_bias: {shortened(key)} is not among the ids, 0 to {vocab_size - 1:,}.")
        return number
    try:
        ids = [int(token) for token in tokenizer.encode(key)]
    except (DataError, UnicodeEncodeError) as error:
        raise ConfigError(f"logit_bias: {shortened(key)!r} is no text of this model's tokenizer: {error}.") from error
    if len(ids) != 1:
        parts = f"{len(ids)} tokens, {shortened(ids, 60)}" if ids else "no token"
        raise ConfigError(f"logit_bias: the text {shortened(key)!r} is {parts}; give a text of one token, or ids.")
    return ids[0]
