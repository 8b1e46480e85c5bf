"""Recall of tracked states past the trained length, with and without negative eigenvalues.

    python -m benchmarks.state_tracking --task parity=150 'deltanet' 'deltanet negative_eigenvalues=true'
    python -m benchmarks.state_tracking --task s3=450 --through 6 12 --word optimizer.learning_rate=2e-2 \\
        'gated_deltaproduct householders=2 convolution=0 decay=none'

Each model is a mixer and its settings. It is trained on each task with `experiment=state_tracking` for so many steps,
and evaluated by `task=accuracy` on rows of several lengths. With `--through` it begins with shorter rows: an equal
share of the steps for each length, and for the trained one at last. Leaves JSON, a Markdown table and a picture.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

import longmix
from benchmarks import results
from benchmarks.arms import words_of
from benchmarks.command import RESULTS, Parser, positive, progress
from benchmarks.results import Record
from longmix.reporting.plots import draw_curves, draw_trained, drawing, new_figure

DESCRIPTION = "Recall of tracked states past the trained length."
TASKS = ("parity", "s3", "s5")
MODELS = ("deltanet", "deltanet negative_eigenvalues=true")


def course(steps: int, through: Sequence[int]) -> list[str]:
    """The words for so many steps, which begin with rows of the lengths `through`; the last share has the longest."""
    if not through:
        return [f"max_steps={steps}"]
    share = steps // (len(through) + 1)
    stages = [f"{{seq_len:{length},max_steps:{share}}}" for length in through]
    stages.append(f"{{max_steps:{steps - share * len(through)}}}")
    return [f"stages=[{','.join(stages)}]", "max_steps=null"]


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """A record for each task, model and length."""
    with progress(len(options.task) * len(options.models)) as (announce, finish):
        for task, steps in options.task:
            for model in options.models:
                announce(f"{task}: {model}")
                began = time.monotonic()
                words = ["experiment=state_tracking", f"data={task}", "logger=csv", "trainer=cpu"]
                words += [f"loop.checkpoint_every={steps}", *course(steps, options.through)]
                words += [*options.word, *words_of(model)]
                place = folder / f"{task}, {model}"
                with contextlib.redirect_stdout(sys.stderr):
                    run = longmix.train(words, folder=place)
                    loaded = longmix.load(run.folder, device="cpu")
                    report = loaded.evaluate(
                        "accuracy", seq_len=options.lengths, max_tokens=options.tokens, output=str(place / "evaluated")
                    )
                facts = {"task": task, "model": model, "steps": steps, "trained_length": loaded.config["seq_len"]}
                for length, found in report["lengths"].items():
                    measured = {"length": int(length), "accuracy": found["accuracy"]}
                    yield facts | measured | {"through": options.through, "words": options.word}
                finish(f"{task}, {model}: {time.monotonic() - began:.0f} s")


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each task and model, recall at each length."""
    lengths = sorted({record["length"] for record in records})
    lines = [["task", "mixer", "steps", *(f"recall at {length:,}" for length in lengths)]]
    lines.append(["---", "---", *["---:"] * (len(lengths) + 1)])
    for task, model, steps in dict.fromkeys((record["task"], record["model"], record["steps"]) for record in records):
        own = {r["length"]: r["accuracy"] for r in records if (r["task"], r["model"]) == (task, model)}
        lines.append([task, f"`{model}`", str(steps), *(f"{own[length]:.3f}" for length in lengths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """Recall over the length of the row, a panel for each task."""
    tasks, models = (list(dict.fromkeys(record[key] for record in records)) for key in ("task", "model"))
    figure, panels = new_figure(len(tasks), footer=18 * len(models))
    for axes, task in zip(panels, tasks, strict=True):
        curves: dict[str, tuple[list[float], list[float]]] = {model: ([], []) for model in models}
        for record in (record for record in records if record["task"] == task):
            curves[record["model"]][0].append(record["length"])
            curves[record["model"]][1].append(record["accuracy"])
        words = {"title": task, "x_label": "tokens of a row", "y_label": "share of states met"}
        draw_curves(axes, curves, log_x=True, names=False, **words)
        axes.set_ylim(-0.02, 1.05)
        draw_trained(axes, records[0]["trained_length"])
    lines = panels[0].lines[: len(models)]
    figure.subfigs[-1].legend(lines, models, ncols=1, loc="center left", borderpad=0)
    return figure


def task(text: str) -> tuple[str, int]:
    """`NAME=STEPS`, for argparse."""
    name, _, steps = text.partition("=")
    if name not in TASKS or not steps.isdecimal() or not int(steps):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=STEPS, with NAME one of {', '.join(TASKS)}")
    return name, int(steps)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.state_tracking", description=DESCRIPTION)
    parser.add_argument("models", nargs="*", default=MODELS, help="a mixer and its settings each")
    parser.add_argument("--task", type=task, action="append", help="NAME=STEPS; default: parity=150")
    parser.add_argument("--through", type=positive(int), nargs="+", default=[], help="lengths to begin with")
    parser.add_argument("--lengths", type=positive(int), nargs="+", default=[32, 64, 128, 256], help="tokens of rows")
    parser.add_argument("--tokens", type=positive(int), default=32_768, help="about so many of each length")
    parser.add_argument("--word", action="append", default=[], help="a further word of training, such as seed=1")
    parser.add_argument("--name", default="state_tracking", help="of the files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    options.task = options.task or [("parity", 150)]
    parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write and print."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return results.carry_out(options.name, options, lambda: measure(options, Path(folder)), table, drawn)


if __name__ == "__main__":
    sys.exit(main())
