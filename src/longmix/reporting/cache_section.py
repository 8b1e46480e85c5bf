"""The page's section on caches: what was asked, pictures of quality over bytes, and a table with the best marked."""

from longmix.reporting.cache_cells import CacheCell, front
from longmix.reporting.cache_panels import Measured, cache_panels, different_models, places, words_of
from longmix.reporting.markup import Markup, joined, tag
from longmix.reporting.panels import Panel, names_of
from longmix.reporting.runs import Run

WORDS = (
    "What a model predicts after a prompt that the cache compressed, over the bytes of a row. A kind of cache is a "
    "line through its budgets, the exact one a dashed line; a model that takes no other cache is a point. In the "
    "table, * marks what no other cache of the same model beats with as few bytes held."
)


def measured_of(runs: list[Run]) -> list[list[Measured]]:
    """The results of all runs on the same rows together, the runs' own data first."""
    names = names_of(runs)
    rows = sorted({rows for run in runs for rows in run.evaluations.caches})
    return [
        [
            Measured(names[run.folder], run.summary["mixer"], run.evaluations.caches[of], of)
            for run in runs
            if of in run.evaluations.caches
        ]
        for of in rows
    ]


def panels_of_caches(runs: list[Run]) -> list[Panel]:
    """The panels of all runs that were evaluated by `task=cache_quality`."""
    return [panel for measured in measured_of(runs) for panel in cache_panels(measured)]


def section(runs: list[Run], figures: Markup) -> Markup:
    """The section with the panels, drawn already; nothing where no run has results."""
    parts = []
    for measured in measured_of(runs):
        parts += [tag("li", sentence, class_="warn") for sentence in different_models(measured)]
    warnings = tag("ul", joined(parts), class_="facts") if parts else Markup("")
    tables = [_table(one) for measured in measured_of(runs) for one in measured]
    if not tables:
        return Markup("")
    shown = tag("div", joined(tables), class_="scroll")
    return joined([tag("h2", "What caches lose"), tag("p", WORDS, class_="soft"), warnings, figures, shown])


def _table(one: Measured) -> Markup:
    headings = ("cache", "", "bytes held", "share", "bytes read", "share", "found", "loss", "kl", "ms/token")
    title = f"{one.name}{f', {one.rows}' if one.rows else ''}"
    parts = [tag("caption", title), tag("thead", tag("tr", *(tag("th", heading) for heading in headings)))]
    for place in places([one]):
        cells = [cell for cell in one.cells if cell.place == place]
        exact = one.exact(place)
        rows = [tag("tr", tag("th", words_of(place), colspan=len(headings), class_="left"))]
        rows += [_row(cell, best, exact) for cell, best in zip(cells, front(cells), strict=True)]
        parts.append(tag("tbody", joined(rows)))
    return tag("table", joined(parts), class_="caches")


def _row(cell: CacheCell, best: bool, exact: CacheCell | None) -> Markup:
    of_exact = [
        "-" if whole is None else f"{own / max(1, whole):.3f}"
        for own, whole in (
            (cell.held_bytes, None if exact is None else exact.held_bytes),
            (cell.read_bytes, None if exact is None else exact.read_bytes),
        )
    ]
    known = "" if cell.told is None else f" (knew: {cell.told})"
    found = "-" if cell.found is None else f"{cell.found:.3f}"
    words = f"{cell.held_bytes:,}", of_exact[0], f"{cell.read_bytes:,}", of_exact[1], found
    losses = f"{cell.loss:.4f}", f"{cell.kl:.2g}", f"{cell.milliseconds:.2f}"
    row = tag("td", f"{cell.cache}{known}", class_="left"), tag("td", "*" if best else "")
    return tag("tr", *row, *(tag("td", word) for word in (*words, *losses)), class_="best" if best else None)
