"""Colours, line styles, markers and the page's style sheet, without a drawing library.

A mixer looks the same in every picture. Eight colours stay apart for people who see few hues, on white and on black;
mixers of one colour differ in line and marker.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

INK, SOFT, RULE, PAPER = "#1c1c1e", "#6a6a70", "#e3e0da", "#fffffe"
"""Colours of text, secondary text, grid and background. Those of a dark page are in `template.html`."""

PALETTE = (
    ("#3c32b6", "#51a0fe"),
    ("#c85f10", "#fe9219"),
    ("#096a64", "#7dd995"),
    ("#48096c", "#aa85c2"),
    ("#257fd7", "#bcf0fb"),
    ("#622e05", "#e7e93d"),
    ("#af54a1", "#ecabe6"),
    ("#be0344", "#dc706c"),
)
"""Indigo, orange, green, purple, blue, brown (on black yellow), pink and red, each on white and on black.

Found by climbing from the hues of Okabe and Ito (2008) towards the largest smallest distance, as people see them with
all cones and with one kind less.
"""

LINES: tuple[tuple[tuple[float, ...], str], ...] = (
    ((), "o"),
    ((6, 2.5), "s"),
    ((1.5, 1.8), "^"),
    ((7, 2, 1.5, 2), "<"),
    ((3.5, 1.5), "*"),
)
"""Dash patterns (lengths of strokes and gaps; empty for a solid line), each with its marker."""

FURTHER_MARKERS = "DvP"
"""Markers of mixers that are not in `KNOWN`, on the first three of `LINES`."""

OUTLINES = {
    "o": "M9 5a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "s": "M9.5 1.5h7v7h-7z",
    "^": "M13 .8l4.5 8h-9z",
    "<": "M17.2.5v9l-8-4.5z",
    "*": "M13.0 0.1L14.3 3.5L17.9 3.7L15.1 6.0L16.1 9.5L13.0 7.5L9.9 9.5L10.9 6.0L8.1 3.7L11.7 3.5z",
    "D": "M13 .3l4.7 4.7-4.7 4.7-4.7-4.7z",
    "v": "M13 9.2l-4.5-8h9z",
    "P": "M11.5 .8h3v2.7h2.7v3h-2.7v2.7h-3v-2.7h-2.7v-3h2.7z",
}
"""Markers as SVG paths, in the middle of a box of 26 by 10."""


@dataclass(frozen=True)
class Style:
    """How a mixer, or anything else that has a line, is drawn.

    Attributes:
        light, dark: its colour on white and on black, as `#rrggbb`.
        dash: lengths of strokes and gaps; empty for a solid line.
        marker: of its points, as matplotlib calls it.
    """

    light: str
    dark: str
    dash: tuple[float, ...] = ()
    marker: str = "o"


def nth_style(number: int) -> Style:
    """The first eight are solid lines of all colours, then eight for each of the other `LINES`, then from anew."""
    colour, line = number % len(PALETTE), number // len(PALETTE) % len(LINES)
    return Style(*PALETTE[colour], *LINES[line])


_ORDER = (
    *("flash", "rwkv7", "mlstm_tfla", "routing", "sliding_window", "scatterbrain", "sparse_flash", "gated_deltanet"),
    *("simple_gla", "kda", "gla", "lightning", "block_sparse", "retention", "hyper", "deltanet"),
    *("combiner", "ssd", "linear", "moba", "local", "scatterbrain_content", "sparse_flash_drop", "mamba2"),
    *("parallax", "hgrn2", "qlstm", "nsa", "combiner_log", "sparsek", "tensor", "gated_deltanet2"),
    *("fox", "wersa", "ponet", "gated_deltaproduct", "comba"),
)

KNOWN = {mixer: nth_style(number) for number, mixer in enumerate(_ORDER)}
"""Mixers that longmix has or that are often compared; relatives share a colour."""

_KINDS = ("quantised", "h2o", "snapkv", "speckv", "sink_recent", "citrus", "zipcache", "squeezed", "a2ats")

CACHES = {kind: nth_style(number) for number, kind in enumerate(_KINDS)}
"""Kinds of caches, which have curves where mixers have points."""

CACHES["exact"] = Style(SOFT, "#a3a3a9", (5, 3))  # the cache that the others are held against, a line across


def style_of(mixer: str) -> Style:
    """The style of a mixer or cache: fixed for those in `KNOWN` and `CACHES`, else one that follows from the name."""
    if found := KNOWN.get(mixer) or CACHES.get(mixer):
        return found
    number = int.from_bytes(hashlib.sha256(mixer.encode(errors="surrogatepass")).digest()[:6], "big")
    number, colour = divmod(number, len(PALETTE))
    number, line = divmod(number, 3)
    return Style(*PALETTE[colour], LINES[line][0], FURTHER_MARKERS[number % len(FURTHER_MARKERS)])


def colour_numbers(mixers: Iterable[str]) -> dict[str, int]:
    """A class of the page's style sheet for every mixer, by its name."""
    return {mixer: number for number, mixer in enumerate(sorted(set(mixers)))}


def style_sheet(numbers: dict[str, int]) -> str:
    """Classes `c0`, `c1` ..., which set `--colour`; pointing at one, or picking it, dims the marks of all others."""
    styles = {number: style_of(mixer) for mixer, number in numbers.items()}
    light = " ".join(f".c{number}{{--colour:{style.light}}}" for number, style in styles.items())
    dark = " ".join(f".c{number}{{--colour:{style.dark}}}" for number, style in styles.items())
    hover = " ".join(f"body:has(.c{number}:hover) .mark:not(.c{number}){{opacity:.2}}" for number in styles)
    picked = " ".join(f"body:has(#pick{number}:checked) .mark.c{number}{{opacity:1}}" for number in styles)
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n@media (hover: hover) {{ {hover} }}\n{picked}"
