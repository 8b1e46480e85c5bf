"""Makes text from outside (names, generated text, foreign files) safe for a terminal: nothing in it is a command."""

import unicodedata

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that are escaped: controls, formats such as the reversal of a line, surrogates."""

JOINERS = "\u200c\u200d"
"""Formats that scripts and emoji need between their letters; they move nothing else."""

LINES = "\n\t"
"""Characters that a text of several lines keeps."""


def printable(text: object, keep: str = "") -> str:
    r"""`text` with every character that could steer a terminal written as an escape such as `\x1b`.

    Args:
        text: is turned into a string first.
        keep: characters that stay, such as `LINES`.
    """
    return "".join(
        letter if letter in keep or letter in JOINERS or unicodedata.category(letter) not in HIDDEN else _escape(letter)
        for letter in str(text)
    )


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
