"""Parts of messages: nouns with numbers, and the name that was probably meant."""

import difflib
from collections.abc import Iterable


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 window", "2,000 windows".

    Args:
        count: how many.
        noun: of one.
        plural: of several; `noun` and "s" if not given.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The one of `names` that is most like `name`; empty if none is like it."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return found[0] if found else ""


def did_you_mean(meant: str) -> str:
    """The sentence " Did you mean ...?" for a message; empty if `meant` is."""
    return f" Did you mean {meant}?" if meant else ""
