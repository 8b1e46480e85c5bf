"""One colour for each mixer, the same in every panel of a report."""

from collections.abc import Iterable

LIGHT = ("#2457c5", "#d1490c", "#23863a", "#9031aa", "#0c7c92", "#c02357", "#8a6a00", "#5a3fc0", "#5b6470", "#a0522d")
DARK = ("#7ea6ff", "#ff9a5c", "#69d184", "#dd8cf5", "#5ccfe2", "#ff8db2", "#e2c04a", "#b5a0ff", "#b7bfc8", "#dfa27c")
"""On white and on black; neighbours differ in lightness too, for those who see few hues."""


def colour_numbers(mixers: Iterable[str]) -> dict[str, int]:
    """A place in the palettes for every mixer, in alphabetical order; an eleventh mixer shares the first one's."""
    return {mixer: number % len(LIGHT) for number, mixer in enumerate(sorted(set(mixers)))}


def style_sheet() -> str:
    """The classes `c0`, `c1` ..., which set `--colour` for light and dark pages."""

    def rules(palette: tuple[str, ...]) -> str:
        return " ".join(f".c{number}{{--colour:{colour}}}" for number, colour in enumerate(palette))

    return f"{rules(LIGHT)}\n@media (prefers-color-scheme: dark) {{ {rules(DARK)} }}"
