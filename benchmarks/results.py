"""What a benchmark leaves behind: records as JSON, an aligned table and a picture, all with where they come from.

A record is one measurement as a flat dictionary. `provider`, `pass`, `dim`, `length` and `median_ms` mean the same in
every benchmark; `median_ms` is None where nothing was measured, and `note` then says why.
"""

import argparse
import importlib.metadata
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from longmix.errors import LongmixError
from longmix.files import replace_json, replace_text
from longmix.reporting.plots import HEIGHT, WIDTH, Curve, draw_curves, drawing, new_figure, save_figure
from longmix.reporting.style import INK, PALETTE, Style, nth_style
from longmix_kernels.accelerators import H200

Record = dict[str, Any]

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Bar:
    """A ratio of times that has to be reached.

    Attributes:
        text: what is claimed.
        provider: whose time it is about.
        against: names of the others; the fastest of them counts.
        rivals: those of the others that must have been measured.
        where: values that tell the records it is about.
        least: the ratio of their time to ours.
        needs: values that the run's environment must have for the ratio to count.
    """

    text: str
    provider: str
    against: tuple[str, ...]
    rivals: tuple[str, ...]
    where: Mapping[str, Any]
    least: float
    needs: Mapping[str, Any]

    def verdict(self, records: Sequence[Record], environment: Mapping[str, Any]) -> Record:
        """Return the ratio, and "met", "not met" or "unmeasured"."""
        here = _matching(records, self.where)
        own, others = _fastest(here, (self.provider,)), _fastest(here, self.against)
        ratio = others["median_ms"] / own["median_ms"] if own and others else None
        lacking = _lacking(self.needs, environment)
        lacking += [f"a time of {name}" for name in (self.provider, *self.rivals) if not _fastest(here, (name,))]
        return {
            "bar": self.text,
            "least": self.least,
            "ratio": ratio,
            "against": others["provider"] if others else None,
            "lacks": lacking,
            "verdict": _verdict(ratio is not None and ratio >= self.least, lacking),
        }


@dataclass(frozen=True)
class FlatBar:
    """A time per token that must not depend on the length.

    Attributes:
        text: what is claimed.
        provider: whose time it is about.
        where: values that tell the records it is about.
        lengths: all of them must have been measured.
        most: how far times may be from the middle between the shortest and the longest, as a share of it.
        needs: values that the run's environment must have for it to count.
    """

    text: str
    provider: str
    where: Mapping[str, Any]
    lengths: tuple[int, ...]
    most: float
    needs: Mapping[str, Any]

    def verdict(self, records: Sequence[Record], environment: Mapping[str, Any]) -> Record:
        """Return the spread, and "met", "not met" or "unmeasured"."""
        found = {length: _matching(records, {**self.where, "length": length}) for length in self.lengths}
        fastest = {length: _fastest(here, (self.provider,)) for length, here in found.items()}
        times = [record["median_ms"] / record["tokens"] for record in fastest.values() if record]
        spread = (max(times) - min(times)) / (max(times) + min(times)) if len(times) > 1 else None
        missing = [f"T = {length}" for length, record in fastest.items() if not record]
        lacking = _lacking(self.needs, environment) + ([f"times at {', '.join(missing)}"] if missing else [])
        return {
            "bar": self.text,
            "most": self.most,
            "spread": spread,
            "lacks": lacking,
            "verdict": _verdict(spread is not None and spread <= self.most, lacking),
        }


def _matching(records: Sequence[Record], where: Mapping[str, Any]) -> list[Record]:
    return [r for r in records if all(r[key] == value for key, value in where.items())]


def _lacking(needs: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    return [f"{key} {value}" for key, value in needs.items() if environment.get(key) != value]


def _verdict(reached: bool, lacking: Sequence[str]) -> str:
    if lacking:
        return "unmeasured"
    return "met" if reached else "not met"


def verdict_lines(verdicts: Sequence[Record]) -> list[str]:
    """One line for each bar."""
    lines = []
    for bar in verdicts:
        if "spread" in bar:
            wanted, got = f"within +-{bar['most']:.0%}", bar["spread"] and f"+-{bar['spread']:.1%}"
        else:
            wanted, got = f">= {bar['least']:.3g}x", bar["ratio"] and f"{bar['ratio']:.2f}x, against {bar['against']}"
        lacks = f" (needs {', '.join(bar['lacks'])})" if bar["lacks"] else ""
        lines.append(f"{bar['verdict']:<10}  {bar['bar']} {wanted}{f': {got}' if got else ''}{lacks}")
    return lines


def environment(device: torch.device, dtype: str) -> Record:
    """Everything about the machine and the code that the numbers depend on."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def peak_flops(environment: Mapping[str, Any]) -> float | None:
    """Peak rate of the tensor cores where it is known: on an H200, for 16-bit inputs."""
    return H200.flops(2) if _is_known(environment) else None


def peak_bytes(environment: Mapping[str, Any]) -> float | None:
    """Peak rate of the memory where that of the tensor cores is known."""
    return H200.bandwidth if _is_known(environment) else None


def _is_known(environment: Mapping[str, Any]) -> bool:
    return "H200" in environment["device_name"] and environment["dtype"] in ("bf16", "fp16")


def headline(environment: Mapping[str, Any]) -> str:
    """Where and with what a run was made, in a line."""
    threads = f", threads {environment['threads']}" if environment["device"] == "cpu" else ""
    commit = f", commit {environment['commit'][:9]}" if environment["commit"] else ""
    changed = " with changes" if environment["uncommitted_changes"] else ""
    libraries = f"torch {environment['torch']}, triton {environment['triton']}"
    name, dtype, date = environment["device_name"], environment["dtype"], environment["date"]
    return f"{name}{threads}, {dtype}, {libraries}{commit}{changed}, {date}"


def add_speedup(records: Sequence[Record], column: str, against: Collection[str]) -> None:
    """Write into `column` how many times faster each record is than the fastest of `against` on the same work.

    Works in place; the same work is the same pass, dim and length. None where either was not measured.
    """
    for record in records:
        same = [r for r in records if all(r[key] == record[key] for key in ("pass", "dim", "length"))]
        rival, own = _fastest(same, against), record["median_ms"]
        record[column] = rival["median_ms"] / own if rival and own else None


def _fastest(records: Sequence[Record], names: Collection[str]) -> Record | None:
    measured = [r for r in records if r["provider"] in names and r["median_ms"] is not None]
    return min(measured, key=lambda record: record["median_ms"], default=None)


def text_table(records: Sequence[Record], columns: Mapping[str, str]) -> str:
    """Lay out records as text; `columns` maps their keys to titles. Numbers are right-justified, "-" where none is."""
    cells = [list(columns.values())] + [[_cell(record.get(key)) for key in columns] for record in records]
    right = [all(not isinstance(record.get(key), str) for record in records) for key in columns]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3}f}"


def file_stem(benchmark: str, environment: Mapping[str, Any]) -> str:
    """Name for a run's files: benchmark, device and time; no run replaces the files of another."""
    device = environment["device_name"] if environment["device"] == "cuda" else "cpu"
    date = datetime.fromisoformat(environment["date"])
    return f"{benchmark}_{re.sub(r'[^a-z0-9]+', '-', device.lower())}_{date:%Y-%m-%d_%H-%M-%S}"


def leave(
    benchmark: str,
    environment: Record,
    options: argparse.Namespace,
    records: Sequence[Record],
    table: Callable[[Sequence[Record]], str],
    drawn: Callable[[Sequence[Record]], Figure],
) -> None:
    """Write records as JSON, then as a Markdown table and a picture, into `options.out`; print the table."""
    path = options.out / f"{file_stem(benchmark, environment)}.json"
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    content = {"benchmark": benchmark, "environment": environment, "settings": settings, "results": records}
    write_json(path, content)
    replace_text(path.with_suffix(".md"), f"{table(records)}\n")
    save_figure(drawn(records), path.with_suffix(".png"))
    print(f"{table(records)}\n\n{headline(environment)}\nwritten: {path}, .md, .png")


def carry_out(
    benchmark: str,
    options: argparse.Namespace,
    measure: Callable[[], Iterable[Record]],
    table: Callable[[Sequence[Record]], str],
    drawn: Callable[[Sequence[Record]], Figure],
    dtype: str = "fp32",
) -> int:
    """Measure on the CPU and leave the records; returns the exit code, that of an error after one line about it."""
    known = environment(torch.device("cpu"), dtype)
    try:
        records = list(measure())
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    leave(benchmark, known, options, records, table, drawn)
    return 0


def write_json(path: Path, content: Record) -> None:
    """Write a run's records; a run that is killed while it writes leaves the file as it was."""
    replace_json(path, content)


def draw(
    path: Path,
    records: Sequence[Record],
    *,
    title: str,
    ours: Collection[str],
    speedup: str,
    speedup_label: str,
    time: str = "median_ms",
    time_label: str = "ms",
    x: str = "length",
    x_label: str = "tokens",
) -> None:
    """Draw the columns `time` and below it `speedup` against the column `x`; panels side by side for each pass and dim.

    Lines of providers that are not `ours` are dashed.
    """
    groups = sorted({(record["dim"], record["pass"]) for record in records})
    providers = list(dict.fromkeys(record["provider"] for record in records))
    rows = ((time, time_label), (speedup, speedup_label))
    with drawing():
        heading = textwrap.fill(title, 62 * len(groups))
        figure, panels = new_figure(2 * len(groups), len(groups), width=WIDTH + 60, height=HEIGHT + 20, title=heading)
        free = iter(panels)
        for key, label in rows:
            for dim, direction in groups:
                here = [record for record in records if (record["dim"], record["pass"]) == (dim, direction)]
                # A provider without a point keeps its place, so that all panels agree on colours.
                curves = {provider: _curve(here, provider, x, key) for provider in providers}
                words: dict[str, Any] = {
                    "title": f"{direction}, head dimension {dim}",
                    "x_label": x_label,
                    "y_label": label,
                }
                axes = next(free)
                words |= {"x_label": x_label, "styles": _styles(providers, ours)}
                draw_curves(axes, curves, log_x=True, log_y=True, **words)
                if key == speedup:
                    axes.axhline(1.0, color=INK, linewidth=1, zorder=1)
    save_figure(figure, path)


def _styles(providers: Sequence[str], ours: Collection[str]) -> list[Style]:
    """Solid lines of ours, and dashed ones of the others, each in their order."""
    found, used = [], {True: 0, False: 0}
    for provider in providers:
        own = provider in ours
        found.append(nth_style(used[own] % len(PALETTE) + (0 if own else len(PALETTE))))
        used[own] += 1
    return found


def _curve(records: Sequence[Record], provider: str, x: str, y: str) -> Curve:
    points = sorted((r[x], r[y]) for r in records if r["provider"] == provider and r[y] is not None)
    return [x for x, _ in points], [value for _, value in points]


def version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else platform.machine() or sys.platform


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
