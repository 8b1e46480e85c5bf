"""`report.html`: one file that needs no other and no network, to be read at a glance.

What won and what it cost stands first, then whether the comparison is fair, then the panels, then every figure.
"""

from collections.abc import Callable
from html import escape
from importlib import resources
from itertools import groupby
from string import Template
from typing import NamedTuple

from longmix.reporting import heat_maps
from longmix.reporting.colours import colour_numbers, style_sheet
from longmix.reporting.evaluations import NEEDLE_GAIN
from longmix.reporting.fairness import Fact, fairness
from longmix.reporting.panels import Panel, by_length, names_of, quality_of
from longmix.reporting.runs import Run, measures_of
from longmix.reporting.svg import draw

CAUSALITY = "python evaluate.py checkpoint=FOLDER task=causality"
RECALL = "python evaluate.py checkpoint=FOLDER task=needle"


def html(runs: list[Run], panels: list[Panel], subtitle: str) -> str:
    """The whole page.

    Args:
        runs: best first.
        panels: of these runs.
        subtitle: what the runs are, or where they lie.
    """
    colours = colour_numbers(run.summary["mixer"] for run in runs)
    verdicts, columns = _verdicts(runs, colours)
    template = Template(resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=f"{len(runs)} runs, {len(colours)} mixer{'s' * (len(colours) > 1)}",
        subtitle=escape(subtitle),
        colours=style_sheet(),
        facts="".join(_fact(fact) for fact in fairness(runs)),
        verdicts=verdicts,
        verdict_columns=columns,
        chips="".join(_chip(mixer, colours) for mixer in sorted(colours)),
        sections="\n".join(_section(name, list(group), colours) for name, group in groupby(panels, _heading)),
        needles=heat_maps.section(runs, colours),
        table=_table(runs, colours),
        missing=_missing(runs),
    )


def _heading(panel: Panel) -> str:
    return panel.section


def _fact(fact: Fact) -> str:
    kinds = {True: ' class="ok"', False: ' class="warn"', None: ' class="soft"'}
    return f"<li{kinds[fact.good]}>{escape(fact.words)}</li>"


def _chip(mixer: str, colours: dict[str, int]) -> str:
    name = escape(mixer)
    return (
        f'<button class="c{colours[mixer]}" data-mixer="{name}" aria-pressed="false">'
        f'<span class="dot"></span>{name}</button>'
    )


def _section(name: str, panels: list[Panel], colours: dict[str, int]) -> str:
    figures = "\n".join(f"<figure><h3>{escape(panel.title)}</h3>{draw(panel, colours)}</figure>" for panel in panels)
    return f'<h2>{escape(name)}</h2>\n<div class="panels">{figures}</div>'


def _verdicts(runs: list[Run], colours: dict[str, int]) -> tuple[str, int]:
    """The best run of each context length by quality, speed, memory and recall; and how many columns these are.

    A model that sees later tokens has no loss that could win.
    """
    quality, names = quality_of(runs), names_of(runs)
    measures: list[tuple[str, Callable[[Run], float | None], str]] = [
        (
            "lowest loss",
            lambda run: None if run.evaluations.causal is False else quality.of(run),
            f"{{:.3f}} {quality.unit}",
        ),
        ("fastest training", lambda run: -run.summary["tokens_per_second"], "{:,.0f} tokens/s"),
        ("least memory", lambda run: run.peak_gib(), "{:.2f} GiB"),
        *(_best_recall(measure) for measure in measures_of(runs) if measure != NEEDLE_GAIN),
    ]
    cells = ['<div class="head">context</div>']
    cells += [f'<div class="head">{name}</div>' for name, _, _ in measures]
    for length, group in by_length(runs).items():
        cells.append(f'<div class="length">{length:,}</div>')
        for _, value, form in measures:
            known = [(figure, run) for run in group if (figure := value(run)) is not None]
            ranked = sorted(known, key=lambda pair: pair[0])
            cells.append(f"<div>{_verdict(ranked, form, names, colours)}</div>")
    return "\n".join(cells), len(measures)


def _best_recall(measure: str) -> tuple[str, Callable[[Run], float | None], str]:
    def of(run: Run) -> float | None:
        share = run.recalled(measure)
        return None if share is None else -share

    return f"best recall, {measure}", of, "{:.1%}"


def _verdict(ranked: list[tuple[float, Run]], form: str, names: dict, colours: dict[str, int]) -> str:
    if not ranked:
        return '<span class="next">not measured</span>'
    figure, run = ranked[0]
    mixer = run.summary["mixer"]
    words = (
        f'<div class="winner c{colours[mixer]}"><span class="dot"></span>{escape(names[run.folder])}</div>'
        f'<div class="figure">{form.format(abs(figure))}</div>'
    )
    if len(ranked) > 1:
        following, other = ranked[1]
        words += f'<div class="next">then {escape(names[other.folder])}, {form.format(abs(following)).split()[0]}</div>'
    return words


class Column(NamedTuple):
    """A column of figures.

    Attributes:
        name: its heading.
        value: the figure of a run; None where there is none.
        form: how it is written.
        sense: 1 if large is good, -1 if small is, 0 if neither.
        missing: the cell of a run without a figure.
    """

    name: str
    value: Callable[[Run], float | None]
    form: str
    sense: int
    missing: str = "-"


def _table(runs: list[Run], colours: dict[str, int]) -> str:
    quality, names = quality_of(runs), names_of(runs)
    columns = [
        Column("context", lambda run: run.summary["seq_len"], "{:,}", 0),
        Column("parameters", lambda run: run.summary["parameters"]["total"], "{:,}", 0),
        Column("MFLOP/token", lambda run: run.summary["training_flops_per_token"] / 1e6, "{:,.1f}", -1),
        Column("tokens", lambda run: run.summary["tokens"], "{:,}", 0),
        Column(quality.unit, quality.of, "{:.3f}", -1),
        Column("tokens/s", lambda run: run.summary["tokens_per_second"], "{:,.0f}", 1),
        Column("peak GiB", lambda run: run.peak_gib(), "{:.2f}", -1),
        *(_recall_column(measure) for measure in measures_of(runs) or ["recall"]),
    ]
    heads = ['<th class="left">mixer</th>', *(f"<th>{escape(name)}</th>" for name, *_ in columns), "<th>causal</th>"]
    rows = []
    groups = by_length(runs)
    for run in runs:
        mixer = run.summary["mixer"]
        cells = [
            f'<td class="left c{colours[mixer]}" data-value="{escape(names[run.folder])}"><span class="dot"></span>'
            f"{escape(names[run.folder])}</td>"
        ]
        cells += [_cell(run, groups[run.summary["seq_len"]], runs, column) for column in columns]
        rows.append(f'<tr data-mixer="{escape(mixer)}">{"".join(cells)}{_badge(run.evaluations.causal)}</tr>')
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _recall_column(measure: str) -> Column:
    missing = '<span class="badge">not evaluated</span>'
    return Column(measure, lambda run: run.recalled(measure), "{:.3f}", 1, missing)


def _cell(run: Run, group: list[Run], runs: list[Run], column: Column) -> str:
    """A figure with a bar of its share of the largest; bold if it is the best of its length."""
    figure = column.value(run)
    if figure is None:
        return f'<td data-value="">{column.missing}</td>'
    words = column.form.format(figure)
    if not column.sense:
        return f'<td data-value="{figure}">{words}</td>'
    rivals = [other for rival in group if (other := column.value(rival)) is not None]
    largest = max(other for rival in runs if (other := column.value(rival)) is not None)
    is_best = len(set(rivals)) > 1 and figure == (max(rivals) if column.sense > 0 else min(rivals))
    share = max(0.0, figure / largest) if largest > 0 else 0.0
    best = " best" * is_best
    return f'<td class="bar{best}" style="--share:{share:.3f}" data-value="{figure}">{words}</td>'


def _badge(causal: bool | None) -> str:
    kind, words = {True: ("yes", "causal"), False: ("no", "LEAKS"), None: ("", "not audited")}[causal]
    return f'<td data-value="{words}"><span class="badge {kind}">{words}</span></td>'


def _missing(runs: list[Run]) -> str:
    """What would fill the gaps."""
    gaps = []
    if any(run.evaluations.causal is None for run in runs):
        gaps.append(("Not every run was audited for causality", CAUSALITY))
    if not all(run.evaluations.recall for run in runs):
        gaps.append(("Not every run was asked what it recalls (task=accuracy for synthetic data)", RECALL))
    if len(by_length(runs)) < 2:
        gaps.append(("What context costs takes runs of several lengths", "python train.py -m ... seq_len=2048,8192"))
    items = "".join(f"<li>{words}: <code>{command}</code></li>" for words, command in gaps)
    return f'<h2>Not here</h2><ul class="missing">{items}</ul>' if gaps else ""
