"""A mixer looks the same, whatever else is on the page; mixers can be told apart and read, whoever looks."""

from itertools import combinations
from pathlib import Path

import pytest

from longmix.reporting.style import CACHES, KNOWN, OUTLINES, PALETTE, colour_numbers, nth_style, style_of, style_sheet

MIXERS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "mixer").glob("*.yaml"))
WHITE, BLACK = "#fcfbf9", "#15171a"

SEEN = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no green": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "no red": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "no blue": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}
"""Linear RGB as people see it who lack a kind of cones (Machado et al. 2009)."""


def linear(colour: str) -> list[float]:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (linear(one), linear(other))]
    return (max(light) + 0.05) / (min(light) + 0.05)


def distance(one: str, other: str, seen) -> float:
    """In OKLab, where 0.02 is about what can just be told apart."""

    def lab(colour: str) -> list[float]:
        given = linear(colour)
        r, g, b = (max(0.0, sum(w * p for w, p in zip(row, given, strict=True))) for row in seen)
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
    assert contrast(style.light, WHITE) >= 3.9 and contrast(style.dark, BLACK) >= 4.5 and style.marker in OUTLINES


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_colours_can_be_told_apart(seen):
    for one, other in combinations(PALETTE, 2):
        for a, b in zip(one, other, strict=True):
            assert distance(a, b, seen) > 0.07, (a, b)


def test_no_two_known_mixers_look_alike():
    assert len(set(KNOWN.values())) == len(KNOWN)
    for one, other in combinations(KNOWN.values(), 2):  # those of one colour differ in line and in marker
        assert one.light != other.light or (one.dash != other.dash and one.marker != other.marker)


def test_no_two_caches_look_alike_and_none_is_a_mixer():
    assert len(set(CACHES.values())) == len(CACHES) and not set(CACHES) & set(KNOWN)
    assert all(style_of(kind) == style for kind, style in CACHES.items())


def test_of_an_unknown_mixer_follows_from_its_name():
    names = [f"mine_{number}" for number in range(60)]
    styles = {name: style_of(name) for name in names}
    assert styles == {name: style_of(name) for name in reversed(names)}
    assert len(set(styles.values())) > 35 and not set(styles.values()) & set(KNOWN.values())
    assert {style.light for style in styles.values()} == {light for light, _ in PALETTE}


def test_in_order_colours_come_before_lines():
    styles = [nth_style(number) for number in range(40)]
    assert len(set(styles)) == 40 and all(style.dash == () for style in styles[:8]) and styles[8].dash


def test_the_style_sheet_says_the_same_whoever_else_is_there():
    def colour(sheet: str, number: int) -> str:
        return sheet.partition(f".c{number}{{--colour:")[2][:7]

    alone, many = colour_numbers(["rwkv7"]), colour_numbers(["zzz", "rwkv7", "aaa", "flash"])
    assert colour(style_sheet(alone), alone["rwkv7"]) == colour(style_sheet(many), many["rwkv7"]) == "#c85f10"
