"""`report.html`: one file that needs no other and no network, to be read at a glance.

What won and what it cost stands first, then whether the comparison is fair, then the panels, then every number. All of
it is built of elements that escape by themselves (`longmix.reporting.markup`).
"""

import shlex
from importlib import resources
from pathlib import Path

from longmix.reporting import cache_section, compared
from longmix.reporting.compared import Fact, fairness
from longmix.reporting.markup import Markup, filled, joined, tag
from longmix.reporting.panels import Panel, by_length
from longmix.reporting.pictures import COLUMNS, found_needles, needles_svg, panel_svg
from longmix.reporting.plots import balanced
from longmix.reporting.runs import Found, Run
from longmix.reporting.standings import figures_table, verdicts
from longmix.reporting.style import OUTLINES, colour_numbers, style_of, style_sheet


def html(found: Found, panels: list[Panel], folder: Path) -> str:
    """The whole page.

    Args:
        found: the runs, at least one of them finished.
        panels: of the finished ones.
        folder: where they lie; its name is the subtitle, and commands name it.
    """
    runs = found.runs
    mixers = {run.summary["mixer"] for run in runs}
    of_caches = cache_section.panels_of_caches(runs)
    kinds = {series.mixer for panel in of_caches for series in panel.series}
    colours = colour_numbers(mixers | kinds)
    cells, columns = verdicts(runs, colours)
    template = resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    return filled(
        template,
        title=f"{_count(len(runs), 'run')}, {_count(len(mixers), 'mixer')}",
        subtitle=folder.resolve().name,
        colours=Markup(style_sheet(colours)),
        facts=[_fact(fact) for fact in fairness(runs)],
        verdicts=cells,
        verdict_columns=columns,
        chips=[_chip(mixer, colours) for mixer in sorted(mixers)],
        panels=_panels(panels, colours, "p"),
        needles=_needles(runs, colours),
        caches=cache_section.section(runs, _panels(of_caches, colours, "q")),
        table=figures_table(runs, colours),
        compared=compared.section(runs),
        left_out=_left_out(found),
        missing=_missing(runs, folder),
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _fact(fact: Fact) -> Markup:
    return tag("li", fact.words, class_={True: "ok", False: "warn", None: "soft"}[fact.good])


def _chip(mixer: str, colours: dict[str, int]) -> Markup:
    """A mixer of the legend with a box that picks it out, without a script."""
    style, number = style_of(mixer), colours[mixer]
    line = tag("path", class_="stroke", d="M0 5H26", stroke_dasharray=" ".join(f"{part:g}" for part in style.dash))
    sample = tag("svg", line, tag("path", d=OUTLINES[style.marker]), viewBox="0 0 26 10", aria_hidden="true")
    return tag("label", tag("input", type="checkbox", id=f"pick{number}"), sample, mixer, class_=f"c{number}")


def _in_rows(figures: list[Markup]) -> Markup:
    """Figures in rows without empty cells: each is as wide as those beside it."""
    rows = balanced(len(figures), COLUMNS)
    widths = [f"of{size}" for size in rows for _ in range(size)]
    cells = [tag("div", figure, class_=width) for figure, width in zip(figures, widths, strict=True)]
    return tag("div", joined(cells), class_="panels")


def _panels(panels: list[Panel], colours: dict[str, int], key: str) -> Markup:
    figures = [
        tag(
            "figure",
            tag("h3", panel.section),
            tag("p", panel.title, class_="soft"),
            panel_svg(panel, f"{key}{number}", colours),
        )
        for number, panel in enumerate(panels)
    ]
    return _in_rows(figures)


def _needles(runs: list[Run], colours: dict[str, int]) -> Markup:
    """The maps of needles of all runs that have one; nothing where none has."""
    figures = [
        tag(
            "figure",
            tag("h3", tag("span", class_="dot"), found.title),
            needles_svg(found, f"n{n}"),
            class_=f"mark c{colours[found.run.summary['mixer']]}",
        )
        for n, found in enumerate(found_needles(runs))
    ]
    if not figures:
        return Markup("")
    words = (
        "Share of hidden facts that are found, by their depth, from the first token (0) to the question (1), and by "
        "the length of the context. The line ends the lengths that were trained."
    )
    return joined([tag("h2", "Needles found"), tag("p", words, class_="soft"), _in_rows(figures)])


def _left_out(found: Found) -> Markup:
    """Runs that are not finished, with their last results, and files that cannot be read, with the reason."""
    parts = []
    if found.unfinished:
        items = [tag("li", tag("code", str(run.folder)), f": {run.progress}") for run in found.unfinished]
        parts += [tag("h2", f"Not finished: {_count(len(items), 'run')}"), tag("ul", joined(items), class_="missing")]
    if found.damaged:
        items = [tag("li", tag("code", str(path)), f": {reason}") for path, reason in found.damaged]
        parts += [tag("h2", "Damaged and left out"), tag("ul", joined(items), class_="missing")]
    return joined(parts)


def _missing(runs: list[Run], folder: Path) -> Markup:
    """The evaluations that runs lack, each with the command that makes it."""
    gaps = []
    unaudited = [run for run in runs if run.evaluations.causal is None]
    if unaudited:
        words = "Not every run was audited for causality"
        gaps.append((words, f"python evaluate.py checkpoint={_checkpoint(unaudited, runs, folder)} task=causality"))
    unasked = [run for run in runs if not run.evaluations.recall]
    if unasked:
        words = "Not every run was asked what it recalls (task=accuracy for synthetic data)"
        gaps.append((words, f"python evaluate.py checkpoint={_checkpoint(unasked, runs, folder)} task=needle"))
    if len(by_length(runs)) < 2:
        gaps.append(("What context costs takes runs of several lengths", "python train.py -m ... seq_len=2048,8192"))
    if not gaps:
        return Markup("")
    items = [tag("li", f"{words}: ", tag("code", command)) for words, command in gaps]
    return joined([tag("h2", "Not here"), tag("ul", joined(items), class_="missing")])


def _checkpoint(lacking: list[Run], runs: list[Run], folder: Path) -> str:
    """The path of the one run that lacks something, or of the folder of all, quoted for a shell."""
    return shlex.quote(str(lacking[0].folder if len(lacking) == 1 else _common(runs, folder)))


def _common(runs: list[Run], folder: Path) -> Path:
    """The folder that was asked for if all runs lie below it, else the deepest one that holds them."""
    resolved = [run.folder.resolve() for run in runs]
    if all(path.is_relative_to(folder.resolve()) for path in resolved):
        return folder
    shared = resolved[0].parents
    return next(parent for parent in shared if all(path.is_relative_to(parent) for path in resolved))
