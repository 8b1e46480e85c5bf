"""A mixer has one colour, whatever else is on the page; colours can be told apart and read."""

import colorsys
from itertools import combinations
from pathlib import Path

import pytest

from longmix.reporting.colours import KNOWN, colour_numbers, style_of, style_sheet

MIXERS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "mixer").glob("*.yaml"))
WHITE, BLACK = "#fcfbf9", "#15171a"

DEUTERANOPIA = ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969))
"""Linear RGB as people see it who lack green cones (Machado et al. 2009)."""


def linear(colour: str) -> list[float]:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (linear(one), linear(other))]
    return (max(light) + 0.05) / (min(light) + 0.05)


def distance(one: str, other: str, seen=None) -> float:
    """In OKLab, where 0.02 is about what can just be told apart."""

    def lab(colour: str) -> list[float]:
        r, g, b = linear(colour)
        if seen is not None:
            r, g, b = (max(0.0, sum(w * p for w, p in zip(row, (r, g, b), strict=True))) for row in seen)
        long, middle, short = (
            (0.4122 * r + 0.5363 * g + 0.0514 * b) ** (1 / 3),
            (0.2119 * r + 0.6807 * g + 0.1074 * b) ** (1 / 3),
            (0.0883 * r + 0.2817 * g + 0.6300 * b) ** (1 / 3),
        )
        return [
            0.2105 * long + 0.7936 * middle - 0.0041 * short,
            1.978 * long - 2.4286 * middle + 0.4506 * short,
            0.0259 * long + 0.7828 * middle - 0.8087 * short,
        ]

    return sum((a - b) ** 2 for a, b in zip(lab(one), lab(other), strict=True)) ** 0.5


def test_every_mixer_of_longmix_has_a_fixed_style():
    assert set(MIXERS) <= set(KNOWN) and len(KNOWN) >= 20


@pytest.mark.parametrize("name", [*KNOWN, "sliding_window*3+flash", "theirs", "漢字", "x\ud800"])
def test_can_be_read_on_its_page(name):
    style = style_of(name)
    assert contrast(style.light, WHITE) >= 3 and contrast(style.dark, BLACK) >= 4.5


def test_can_be_told_apart():
    for one, other in combinations(KNOWN, 2):
        a, b = KNOWN[one], KNOWN[other]
        assert a.light != b.light and a.dark != b.dark
        assert distance(a.light, b.light) > 0.035, (one, other)
        if a.dash == b.dash:  # without green cones lightness and the kind of line must do
            assert distance(a.light, b.light, DEUTERANOPIA) > 0.035, (one, other)


def test_of_an_unknown_mixer_follows_from_its_name():
    names = [f"mine_{number}" for number in range(60)]
    styles = {name: style_of(name) for name in names}
    assert styles == {name: style_of(name) for name in reversed(names)}
    assert len({style.light for style in styles.values()}) > 55
    hues = {round(12 * colorsys.rgb_to_hls(*linear(style.light))[0]) for style in styles.values()}
    assert len(hues) >= 8


def test_the_style_sheet_says_the_same_whoever_else_is_there():
    def colour(sheet: str, number: int) -> str:
        return sheet.partition(f".c{number}{{--colour:")[2][:7]

    alone, many = colour_numbers(["rwkv7"]), colour_numbers(["zzz", "rwkv7", "aaa", "flash"])
    assert colour(style_sheet(alone), alone["rwkv7"]) == colour(style_sheet(many), many["rwkv7"]) == "#d1490c"
