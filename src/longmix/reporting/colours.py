"""One colour and one kind of line for each mixer, the same in every panel of every report."""

import colorsys
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How a mixer is drawn.

    Attributes:
        light, dark: its colour on white and on black, as `#rrggbb`.
        dash: lengths of strokes and gaps of its lines; empty for a solid one. For those who see few hues.
    """

    light: str
    dark: str
    dash: tuple[int, ...] = ()


KNOWN = {
    "flash": Style("#2457c5", "#7ea6ff"),
    "rwkv7": Style("#d1490c", "#ff9a5c"),
    "mlstm_tfla": Style("#23863a", "#69d184"),
    "routing": Style("#9031aa", "#dd8cf5"),
    "sliding_window": Style("#0c7c92", "#5ccfe2"),
    "sparse_flash": Style("#e0387a", "#ff8db2"),
    "scatterbrain": Style("#8a6a00", "#e2c04a"),
    "lightning": Style("#8a70ea", "#c9b8ff"),
    "hyper": Style("#5b6470", "#b7bfc8"),
    "gated_deltanet": Style("#6a3413", "#c98a5f"),
    "deltanet": Style("#b8860b", "#f0d27a", (7, 3)),
    "kda": Style("#00857a", "#4fd1bd", (7, 3)),
    "gla": Style("#98104b", "#ff79b8", (7, 3)),
    "simple_gla": Style("#1b6fa8", "#6cbcf2", (7, 3)),
    "retention": Style("#6d7f00", "#c3d64a", (7, 3)),
    "block_sparse": Style("#7b1e1e", "#e98a8a", (7, 3)),
    "scatterbrain_content": Style("#5d4a00", "#c9b458", (2, 2)),
    "sparse_flash_drop": Style("#7a1038", "#ffb3cc", (2, 2)),
    "combiner": Style("#3a2d80", "#cbbdff", (2, 2)),
    "ssd": Style("#0a4a57", "#8fe3ef", (2, 2)),
}
"""Mixers that longmix has or that are often compared; those of one colour family differ in lightness and line."""

DASHES = ((), (7, 3), (2, 2), (9, 3, 2, 3))


def style_of(mixer: str) -> Style:
    """The style of a mixer: fixed for those in `KNOWN`, and of any other name a hue that follows from the name."""
    if mixer in KNOWN:
        return KNOWN[mixer]
    number = int.from_bytes(hashlib.sha256(mixer.encode(errors="surrogatepass")).digest()[:6], "big")
    hue = number % 3600 / 3600
    depth = number // 3600 % 5 / 4
    light, dark = _hex(hue, 0.26 + 0.1 * depth, 0.75), _hex(hue, 0.66 + 0.12 * depth, 0.8)
    return Style(light, dark, DASHES[number // 18000 % len(DASHES)])


def _hex(hue: float, lightness: float, saturation: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, saturation))


def colour_numbers(mixers: Iterable[str]) -> dict[str, int]:
    """A class of the page's style sheet for every mixer, by its name."""
    return {mixer: number for number, mixer in enumerate(sorted(set(mixers)))}


def style_sheet(numbers: dict[str, int]) -> str:
    """The classes `c0`, `c1` ..., which set `--colour` for light and dark pages, and `--dash`."""
    styles = {number: style_of(mixer) for mixer, number in numbers.items()}
    light = " ".join(
        f".c{number}{{--colour:{style.light};--dash:{' '.join(map(str, style.dash)) or 'none'}}}"
        for number, style in styles.items()
    )
    dark = " ".join(f".c{number}{{--colour:{style.dark}}}" for number, style in styles.items())
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"
