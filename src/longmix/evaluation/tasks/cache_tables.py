"""The tables and the picture of `task=cache_quality`."""

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from longmix.printable import printable
from longmix.reporting.cache_cells import EXACT, CacheCell, checked_cells, front
from longmix.reporting.cache_panels import Measured, cache_panels, places, words_of
from longmix.reporting.pictures import overview

CACHE_WIDTH = 20
"""Letters of a line in which a cache is named."""


def quality_tables(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """A table for each context and place of the question."""
    cells = checked_cells(report)
    for place in places([Measured("", "", cells)]):
        own = [cell for cell in cells if cell.place == place]
        yield _table(f"{report['data']}, {words_of(place)}", own)
    yield "bytes held of a row, their share and that of bytes read of those of exact, nats a target, and ms a step"
    yield "*: no other cache is better with as few bytes held, or as good with fewer"
    told = {cell.cache: cell.told for cell in cells if cell.told is not None}
    if told:
        words = ", ".join(f"{cache} {what}" for cache, what in told.items())
        yield printable(f"known when the cache chose, besides the prompt: {words}")


def _table(title: str, cells: list[CacheCell]) -> Table:
    exact = next(cell for cell in cells if cell.kind == EXACT)
    table = Table(title=escape(printable(title)), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("cache", overflow="fold", min_width=CACHE_WIDTH)
    tokens = any(cell.found not in (None, cell.token_accuracy) for cell in cells)
    quality = ([] if exact.found is None else ["found"]) + (["tokens"] if tokens else [])
    for heading in ("", "held", "share", "read", *quality, "loss", "kl", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell, best in zip(cells, front(cells), strict=True):
        held, read = (
            f"{number / max(1, whole):.3f}"
            for number, whole in ((cell.held_bytes, exact.held_bytes), (cell.read_bytes, exact.read_bytes))
        )
        found = [] if cell.found is None else [f"{cell.found:.3f}"]
        found += [f"{cell.token_accuracy:.3f}"] if tokens else []
        losses = f"{cell.loss:.3f}", f"{cell.kl:.2g}", f"{cell.milliseconds:.2f}"
        word = escape(printable(cell.cache)).replace(":", " ")
        table.add_row(word, "*" if best else "", f"{cell.held_bytes:,}", held, read, *found, *losses)
    return table


def draw_quality(report: Mapping[str, Any]) -> Figure:
    """Share found and loss over bytes held and read."""
    return overview(cache_panels([Measured("", "", checked_cells(report))]), columns=4)
