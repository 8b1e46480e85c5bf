"""What a whole training step costs, beside a plain loop and the Trainer of transformers: `python -m benchmarks.step`.

All train the same model: longmix by its command, with its data, log and checks; a loop of plain PyTorch that is as
short as it can be; and Hugging Face's Trainer on the exported model. Each takes its steps in a process of its own, and
processes take turns. A lap is some steps with one reading of the loss; the first lap of a process does not count. The
others read rows of random bytes, since what rows hold changes no time.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.command import RESULTS, Parser, positive, progress
from benchmarks.results import ROOT, Record
from benchmarks.step_loops import PLAIN, TRAINER, Settings
from longmix.errors import LongmixError
from longmix.metrics import read_cells
from longmix.reporting.plots import draw_curves, drawing, new_figure

OURS = "longmix"
LOOPS = {PLAIN: "plain", TRAINER: "trainer"}
OPTIMIZERS = ("adamw", "muon")
TOKENS = 100_000
COLUMNS = ("optimizer", "seq_len", "loop", "ms a step", "tokens/s", "longmix is faster by", "rounds, each")
BAR = 1.0
RATE = "throughput/tokens_per_second"


class FailedError(LongmixError):
    """A process ended without its laps."""

    exit_code = 1


def run(command: Sequence[str], folder: Path, threads: int) -> None:
    """Run a command of this environment.

    Raises:
        FailedError: with the end of what it wrote.
    """
    known = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(known), "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True)
    if done.returncode:
        raise FailedError(f"{' '.join(command)} ended with {done.returncode}: {(done.stderr or done.stdout)[-800:]}")


def our_laps(settings: Settings, folder: Path, threads: int, words: Sequence[str]) -> list[float]:
    """Seconds of each lap of `longmix train`, from its log."""
    place = folder / "run"
    given = {
        "seq_len": settings.seq_len,
        "batch_size": settings.batch_size,
        "max_steps": settings.steps,
        "loop.log_every": settings.lap,
        "loop.validate_every": "null",
        "loop.checkpoint_every": "null",
        "data.validation_tokens": settings.seq_len,
        "logger": "csv",
        "name": "step",
        "hydra.run.dir": place,
    }
    command = [sys.executable, "-m", "longmix", "train", *settings.words, *words]
    run([*command, *(f"{name}={value}" for name, value in given.items())], folder, threads)
    rates = [row[RATE] for row in read_cells(place) if row.get(RATE)]
    return [settings.lap * settings.seq_len * settings.batch_size / float(rate) for rate in rates]


def their_laps(loop: str, settings: Settings, folder: Path, threads: int) -> list[float]:
    """Seconds of each lap of another loop."""
    file = folder / "settings.json"
    tokens = folder / "tokens.pt"
    torch.save(torch.randint(256, (TOKENS,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8), tokens)
    file.write_text(json.dumps(dataclasses.asdict(settings) | {"tokens": str(tokens)}))
    run([sys.executable, "-m", "benchmarks.step_loops", loop, "--settings", str(file)], folder, threads)
    laps: list[float] = json.loads((folder / f"{loop}.json").read_text())
    return laps


def settings_of(optimizer: str, seq_len: int, options: argparse.Namespace) -> Settings:
    """The settings of one comparison."""
    words = ("model=tiny", "mixer=flash", f"optimizer={optimizer}", *options.word)
    batch = max(1, options.step_tokens // seq_len)
    return Settings(words, seq_len, batch, options.lap * (options.laps + 1), options.lap)


def loops_here() -> list[str]:
    """The loops whose packages are installed; a line on standard error says which are left out."""
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        needed = "pip install -e '.[pretrained]'"
        print(f"{TRAINER} is left out: {' and '.join(missing)} is not installed ({needed}).", file=sys.stderr)
    return [OURS, *(name for name in LOOPS if name != TRAINER or not missing)]


def measure(options: argparse.Namespace) -> list[Record]:
    """Records of all optimizers and lengths.

    Raises:
        FailedError: a process ended without its laps.
    """
    loops = loops_here()
    cells = [(optimizer, seq_len) for optimizer in options.optimizers for seq_len in options.lengths]
    laps: dict[tuple[str, int, str], list[list[float]]] = {(*cell, loop): [] for cell in cells for loop in loops}
    with progress(options.rounds * len(laps)) as (announce, finish):
        for number in range(options.rounds):
            for optimizer, seq_len in cells:
                settings = settings_of(optimizer, seq_len, options)
                for loop in loops[number % len(loops) :] + loops[: number % len(loops)]:
                    what = f"{loop}, {optimizer}, {seq_len:,} tokens, round {number + 1} of {options.rounds}"
                    laps[optimizer, seq_len, loop].append(_laps(loop, settings, options, announce, what))
                    finish(what)
    return [_record(*key, found, options) for key, found in laps.items()]


def _laps(
    loop: str, settings: Settings, options: argparse.Namespace, announce: Callable[[str], None], what: str
) -> list[float]:
    announce(what)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if loop == OURS:
            found = our_laps(settings, folder, options.threads, options.of_run)
        else:
            found = their_laps(LOOPS[loop], settings, folder, options.threads)
    if len(found) != options.laps + 1:
        raise FailedError(f"{what}: {len(found)} laps instead of {options.laps + 1}")
    return found[1:]


def _record(optimizer: str, seq_len: int, loop: str, rounds: list[list[float]], options: argparse.Namespace) -> Record:
    settings = settings_of(optimizer, seq_len, options)
    each = [1e3 * statistics.median(laps) / options.lap for laps in rounds]
    median = statistics.median(1e3 * lap / options.lap for laps in rounds for lap in laps)
    tokens = settings.batch_size * seq_len
    return {
        "optimizer": optimizer,
        "length": seq_len,
        "batch_size": settings.batch_size,
        "provider": loop,
        "median_ms": median,
        "round_ms": each,
        "tokens_per_second": 1e3 * tokens / median,
    }


def faster(records: Sequence[Record], record: Record) -> float | None:
    """How many times faster longmix is than what a record is about; None for itself."""
    if record["provider"] == OURS:
        return None
    same = ("optimizer", "length")
    (own,) = [r for r in records if r["provider"] == OURS and all(r[key] == record[key] for key in same)]
    ratio: float = record["median_ms"] / own["median_ms"]
    return ratio


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each loop, optimizer and length, and whether longmix is as fast."""
    lines = [list(COLUMNS), ["---", "---:", "---", *["---:"] * 3, "---"]]
    for record in records:
        ratio = faster(records, record)
        each = " ".join(f"{ms:.1f}" for ms in record["round_ms"])
        cells = [record["optimizer"], f"{record['length']:,}", record["provider"], f"{record['median_ms']:.1f}"]
        cells += [f"{record['tokens_per_second']:,.0f}", "" if ratio is None else f"{ratio:.3f}x", each]
        lines.append(cells)
    ratios = [ratio for record in records if (ratio := faster(records, record)) is not None]
    met = sum(ratio >= BAR for ratio in ratios)
    verdict = f"longmix is at least as fast in {met} of {len(ratios)} comparisons."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{verdict}"


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """Tokens a second over the length, a panel for each optimizer."""
    optimizers = list(dict.fromkeys(record["optimizer"] for record in records))
    figure, panels = new_figure(len(optimizers))
    for axes, optimizer in zip(panels, optimizers, strict=True):
        here = [record for record in records if record["optimizer"] == optimizer]
        curves = {
            loop: (
                [r["length"] for r in here if r["provider"] == loop],
                [r["tokens_per_second"] for r in here if r["provider"] == loop],
            )
            for loop in dict.fromkeys(record["provider"] for record in here)
        }
        draw_curves(axes, curves, title=optimizer, x_label="tokens of a row", y_label="tokens a second", log_x=True)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.step", description=(__doc__ or "").partition(":")[0] + ".")
    add, count = parser.add_argument, positive(int)
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    add("--lengths", type=count, nargs="+", default=(512, 8192), metavar="T", help="tokens of a row")
    add("--step-tokens", type=count, default=8192, help="tokens of a step, of at least one row")
    add("--rounds", type=count, default=3, help="processes of each loop, in turns")
    add("--laps", type=count, default=6, help="that count, of a process")
    add("--lap", type=count, default=4, help="steps of a lap")
    add("--threads", type=count, default=os.cpu_count() or 1)
    add("--word", action="append", default=[], help="a further word of the model, such as model.num_layers=2")
    add("--of-run", action="append", default=[], help="a further word of longmix's runs, such as data.cache_dir=DIR")
    add("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; 1 if a process failed."""
    options = parse(arguments)
    return results.carry_out("step", options, lambda: measure(options), table, drawn)


if __name__ == "__main__":
    sys.exit(main())
