"""Numbers with their nouns."""

import pytest

from longmix.wording import counted


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((1, "window"), "1 window"),
        ((0, "window"), "0 windows"),
        ((2000, "window"), "2,000 windows"),
        ((1, "process", "processes"), "1 process"),
        ((2, "process", "processes"), "2 processes"),
    ],
)
def test_one_is_singular(given, text):
    assert counted(*given) == text
