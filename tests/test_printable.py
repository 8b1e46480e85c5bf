"""What came from outside steers no terminal."""

import pytest

from longmix.printable import printable


@pytest.mark.parametrize(
    ("text", "keep", "expected"),
    [
        pytest.param("runs/ünï 漢字 (1).txt", "", "runs/ünï 漢字 (1).txt", id="letters stay"),
        pytest.param("\x1b[31mred\x1b[0m", "", r"\x1b[31mred\x1b[0m", id="escape"),
        pytest.param("a\x9b2Jb\x7f\x07\x08", "", r"a\x9b2Jb\x7f\x07\x08", id="one-byte controls"),
        pytest.param("a\nb\rc\td", "", r"a\nb\rc\td", id="lines of a name"),
        pytest.param("a\nb\rc\td", "\n\t", "a\nb\\rc\td", id="lines of a text"),
        pytest.param("\u202egpj.exe\u2066", "", r"\u202egpj.exe\u2066", id="reversed lines"),
        pytest.param("a\u2028b\udc80", "", r"a\u2028b\udc80", id="separators and stray bytes"),
        pytest.param("👩\u200d🔬", "", "👩\u200d🔬", id="joined emoji"),
        pytest.param("\U000e0041", "", r"\U000e0041", id="tags"),
    ],
)
def test_printable(text, keep, expected):
    assert printable(text, keep) == expected


def test_takes_what_has_a_text():
    from pathlib import Path

    assert printable(Path("a\x1bb")) == r"a\x1bb"
