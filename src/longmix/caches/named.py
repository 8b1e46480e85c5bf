"""Kinds of caches as single words, such as `h2o:budget=0.25:mean=true`, for lists of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import yaml

from longmix.caches.cache import CacheKind
from longmix.caches.kinds import kind_of
from longmix.errors import ConfigError


def kinds_of(words: Sequence[str], key: str) -> dict[str, CacheKind]:
    """The kind that each word means, as `cache=NAME cache.SETTING=VALUE` does on the command line.

    Args:
        words: NAME, or NAME:SETTING=VALUE:..., each once.
        key: the setting that lists them, for messages.

    Raises:
        ConfigError: no text, one that comes twice, or a kind or setting that there is not.
    """
    found: dict[str, CacheKind] = {}
    for word in words:
        with names_the_cache(word, key):
            if word in found:
                raise ConfigError("it is there twice.")
            name, *settings = str(word).split(":")
            pairs = [setting.partition("=") for setting in settings]
            wrong = next((setting for setting, (_, sign, _) in zip(settings, pairs, strict=True) if not sign), None)
            if wrong is not None:
                raise ConfigError(f"{wrong!r} is no SETTING=VALUE; write it like h2o:budget=0.25:mean=true.")
            found[word] = kind_of(name, {setting: _value(text) for setting, _, text in pairs})
    return found


def _value(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is no value.") from error


@contextmanager
def names_the_cache(word: str, key: str) -> Iterator[None]:
    """Errors say which word of a list of caches they are of.

    Raises:
        ConfigError: as it was raised inside, with the word before it.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key} names {word}: {error}") from error
