"""The tables and the picture of `task=cache_quality`."""

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from longmix.printable import printable
from longmix.reporting.cache_results import CacheCell, Measured, cache_panels, checked_cells, front, places, words_of
from longmix.reporting.pictures import overview


def quality_tables(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """A table for each context and place of the question."""
    cells = checked_cells(report)
    for place in places([Measured("", "", cells)]):
        own = [cell for cell in cells if cell.place == place]
        yield _table(f"{report['data']}, {words_of(place)}", own)
    yield "*: no other cache has as few bytes held and is better, or as good with fewer"
    told = {cell.cache: cell.told for cell in cells if cell.told is not None}
    if told:
        words = ", ".join(f"{cache} {what}" for cache, what in told.items())
        yield printable(f"known when the cache chose, besides the prompt: {words}")


def _table(title: str, cells: list[CacheCell]) -> Table:
    exact = next(cell for cell in cells if cell.kind == "exact")
    of_text = exact.found is None
    table = Table(title=escape(printable(title)))
    table.add_column("cache", overflow="fold")
    quality = () if of_text else ("found", "tokens")
    for heading in ("", "bytes held", "share", "read", "share", *quality, "loss", "kl", "ms/token"):
        table.add_column(heading, justify="right")
    for cell, best in zip(cells, front(cells), strict=True):
        shares = [
            (f"{number:,}", f"{number / max(1, whole):.3f}")
            for number, whole in ((cell.held_bytes, exact.held_bytes), (cell.read_bytes, exact.read_bytes))
        ]
        found = [] if cell.found is None else [f"{cell.found:.3f}", f"{cell.token_accuracy:.3f}"]
        losses = f"{cell.loss:.4f}", f"{cell.kl:.2g}", f"{cell.milliseconds:.2f}"
        table.add_row(escape(printable(cell.cache)), "*" if best else "", *shares[0], *shares[1], *found, *losses)
    return table


def draw_quality(report: Mapping[str, Any]) -> Figure:
    """Share found and loss over bytes held and read."""
    return overview(cache_panels([Measured("", "", checked_cells(report))]), columns=4)
