"""The README's pictures, drawn again from the results beside this file: `python -m benchmarks.pictures`.

The results name the commands that they are of.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.command import RESULTS
from benchmarks.results import ROOT, Record
from longmix.reporting.panels import Panel, Series
from longmix.reporting.pictures import needles_picture, overview, panel_picture
from longmix.reporting.plots import save_figure
from longmix.reporting.results import NeedleMap

NEEDLES = 24
"""Of each cell, as the command in the results says."""


def series(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[Series]:
    """A line of each mixer's rows, in the order of `x`."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["mixer"], []).append((row[x], row[y]))
    points = {mixer: zip(*sorted(found), strict=True) for mixer, found in lines.items()}
    return [Series(mixer, mixer, list(xs), list(ys)) for mixer, (xs, ys) in points.items()]


def shootout(runs: list[Record]) -> Figure:
    """Quality against speed at each length, and what context costs."""
    words: Any = {"section": "What quality costs", "x_label": "training speed, tokens per second", "kind": "points"}
    words |= {"y_label": "validation, bits/byte", "best": "low"}
    panels = [
        Panel(
            key=f"trade_off_{length}",
            title=f"at {length:,} tokens; best is low and far right",
            series=series([run for run in runs if run["seq_len"] == length], "tokens_per_second", "bits_per_byte"),
            **words,
        )
        for length in sorted({run["seq_len"] for run in runs})
    ]
    for key, title, label in (
        ("tokens_per_second", "training speed", "tokens per second"),
        ("peak_gib", "peak memory in training", "GiB"),
    ):
        common: Any = {
            "section": "What context costs",
            "x_label": "context length, tokens",
            "log_x": True,
            "from_zero": True,
        }
        panels.append(Panel(key=key, title=title, y_label=label, series=series(runs, "seq_len", key), **common))
    return overview(panels, columns=2)


def mqar(content: Record) -> Figure:
    """Recall against what a row remembers."""
    lines = series([run for run in content["runs"] if run["state_bytes"]], "state_bytes", "accuracy")
    words = "Recall", "MQAR, 64 tokens", "bytes of a row's state", "share of values recalled"
    panel = Panel("mqar", *words, lines, log_x=True, from_zero=True)
    return panel_picture(panel, width=560)


def needle(content: Record) -> Figure:
    """Needles found by depth and length, a map for each mixer."""
    return needles_picture([(run["mixer"], needle_map(run)) for run in content["runs"]])


def needle_map(run: Record) -> NeedleMap:
    """What one run found."""
    cells = {(cell["depth"], cell["seq_len"]): cell for cell in run["cells"]}
    depths, lengths = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    accuracy, gain = (
        [[cells[depth, length][measure] for length in lengths] for depth in depths] for measure in ("accuracy", "gain")
    )
    return NeedleMap(lengths, depths, accuracy, gain, run["seq_len"], NEEDLES)


def curves(runs: list[Record]) -> Figure:
    """Validation against tokens, and by position."""
    learning = [{"mixer": run["mixer"], **point} for run in runs for point in run["validation"]]
    positions = [{"mixer": run["mixer"], **point} for run in runs for point in run["by_position"]]
    length = f"at {runs[0]['seq_len']:,} tokens"
    return overview(
        [
            Panel(
                "learning",
                "Learning, by tokens seen",
                length,
                "tokens trained on",
                "validation, bits/byte",
                series(learning, "tokens", "bits_per_byte"),
            ),
            Panel(
                "positions",
                "What more context is worth",
                length,
                "tokens of context, up to",
                "validation, nats/token",
                series(positions, "end", "loss"),
                log_x=True,
            ),
        ]
    )


def pictures(folder: Path) -> dict[str, Callable[[], Figure]]:
    """By name: how to draw it from the results in a folder."""

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    def of_length(length: int) -> list[Record]:
        return [run for run in read("curves_cpu_2026-11-29.json")["runs"] if run["seq_len"] == length]

    return {
        "first_runs": lambda: curves(of_length(512)),
        "long_runs": lambda: curves(of_length(16384)),
        "mqar": lambda: mqar(read("mqar_cpu_2026-11-21.json")),
        "needle": lambda: needle(read("needle_cpu_2026-11-21.json")),
        "shootout": lambda: shootout(read("shootout_cpu_2026-11-21.json")),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw all, or those that are asked for."""
    every = pictures(RESULTS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description="Draw the README's pictures.")
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(every)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the pictures")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(every):
        parser.error(f"there is no picture {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or every:
        print(f"written: {save_figure(every[name](), options.out / f'{name}.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
