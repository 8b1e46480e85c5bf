"""Neighbours of the launch tables' rows, timed; what is faster is written as a patch of the tables.

A neighbour differs in one number: a tile twice or half as large, twice or half as many warps, a stage more or less,
loads through tensor descriptors or without. It
is timed in turns with the row of the table, in a whole pass of a call that uses it, and counts as better where it saves
a share of the pass in two measurements. Results must be those of the table's row, within rounding.
"""

import ast
import dataclasses
import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu.case import Case, NotPossible
from benchmarks.gpu.correctness import ALLOWED, relative_error
from benchmarks.gpu.engine_calls import EngineCall, make
from longmix_kernels.launch import LaunchConfig, LaunchTable, architecture_of, known_architecture

LEAST_SAVED = 0.02
"""Share of the pass that a better row saves at least."""

SMALLEST, LARGEST, MOST_WARPS, MOST_STAGES = 16, 256, 8, 5
LIMIT = 2.0
"""Most seconds of one pass."""

_LONG = {"batch": 2, "length": 16384, "heads": 12, "dtype": "bf16"}
CALLS: Sequence[tuple[str, dict[str, Any]]] = (
    ("attention", {"dim": 64, "value_dim": 64}),
    ("attention", {"dim": 128, "value_dim": 128, "heads": 6}),
    ("linear", {"dim": 96, "value_dim": 192, "heads": 4, "kind": "sig"}),
    ("delta", {"dim": 64, "value_dim": 64, "kind": "rwkv7"}),
    ("delta", {"dim": 128, "value_dim": 128, "heads": 6, "kind": "kda"}),
    ("scatter", {"dim": 64, "value_dim": 64}),
    ("linear", {"dim": 128, "value_dim": 256, "heads": 4, "kind": "exp"}),
    ("attention", {"dim": 96, "value_dim": 96, "heads": 8}),
    ("attention", {"dim": 256, "value_dim": 256, "heads": 3}),
)
"""The shapes that matter, the most common ones first."""


def tuning_cases() -> list[Case]:
    """One case for each kernel at each shape."""
    cases = []
    for engine, sizes in CALLS:
        settings = {"engine": engine, "device": "cuda", **_LONG, **sizes}
        shape = f"{engine}-{sizes['dim']}-{sizes['value_dim']}"
        for kernel in _launch(engine).KERNELS:
            own = settings | {"kernel": kernel}
            cases.append(
                Case("tune", f"tune/{shape}/{kernel}", f"{__name__}.tune", own, seconds=25, most=120, alone=True)
            )
    return cases


def tune(*, engine: str, kernel: str, seconds: float = 0.1, **settings: Any) -> dict[str, Any]:
    """Time the neighbours of the row with which a kernel is launched for a call.

    Returns:
        The row, the best one, and the median seconds of each, by its fields.
    """
    call, table = make(engine, **settings), _launch(engine).TABLE
    wanted, entries = _results_and_entries(call, table, kernel)
    if not entries:
        raise NotPossible(f"this call launches no {kernel}")
    width, used = entries[0]
    passes = {used: _pass(call, table, kernel, used)}
    notes: dict[str, str] = {}
    for row in neighbours(used, kernel):
        try:
            with table.override(kernel, row):
                found = call.results("triton")
        except Exception as error:  # too much shared memory, or what the compiler does not take
            notes[str(row)] = timing.reason(error)
            continue
        if all(relative_error(x, wanted[name]) <= ALLOWED[settings["dtype"]] for name, x in found.items()):
            passes[row] = _pass(call, table, kernel, row)
        else:
            notes[str(row)] = "gives other results"
    times = _medians(passes, seconds)
    best = min(times, key=times.__getitem__)
    if times[best] > (1 - LEAST_SAVED) * times[used]:
        best = used
    else:
        again = _medians({row: passes[row] for row in (used, best)}, 3 * seconds)
        best = best if again[best] <= (1 - LEAST_SAVED) * again[used] else used
    return {
        "engine": engine,
        "kernel": kernel,
        "architecture": known_architecture(architecture_of(torch.device("cuda"))),
        "width": width,
        "row": vars(used),
        "best": vars(best),
        "row_text": str(used),
        "best_text": str(best),
        "times": {str(row): took for row, took in times.items()},
        "notes": notes,
    }


def neighbours(row: LaunchConfig, kernel: str) -> Iterator[LaunchConfig]:
    """Rows that differ from this one in a single number that makes a difference to the kernel."""
    used = row.used_by(kernel)
    for entry in dataclasses.fields(row):  # type: ignore[arg-type]
        if entry.name in used:
            for other in _near(entry.name, getattr(row, entry.name)):
                yield dataclasses.replace(row, **{entry.name: other})  # type: ignore[type-var]


def _near(name: str, value: int) -> list[int]:
    if isinstance(value, bool):
        return [not value]
    if name == "stages":
        return [n for n in (value - 1, value + 1) if 1 <= n <= MOST_STAGES]
    if name == "warps":
        return [n for n in (value // 2, 2 * value) if 1 <= n <= MOST_WARPS]
    return [n for n in (value // 2, 2 * value) if SMALLEST <= n <= LARGEST]


def _launch(engine: str) -> Any:
    return importlib.import_module(f"longmix_kernels.{engine}.launch")


def _results_and_entries(
    call: EngineCall, table: LaunchTable, kernel: str
) -> tuple[Mapping[str, torch.Tensor], list[tuple[int, Any]]]:
    """What the call gives; the table's width and row for each of its launches of the kernel."""
    taken: list[tuple[int, Any]] = []

    def note(name: str, width: int, row: Any) -> None:
        if name == kernel:
            taken.append((width, row))

    with table.watched(note):
        return call.results("triton"), taken


def _pass(call: EngineCall, table: LaunchTable, kernel: str, row: LaunchConfig) -> timing.Call:
    leaves = {name: x.detach().requires_grad_() for name, x in call.tensors.items()}
    with torch.no_grad():
        grads = [torch.ones_like(x) for x in call.run(leaves, "triton")]

    def run() -> None:
        with table.override(kernel, row):
            torch.autograd.grad(call.run(leaves, "triton"), list(leaves.values()), grads)

    return run


def _medians(passes: Mapping[LaunchConfig, timing.Call], seconds: float) -> dict[LaunchConfig, float]:
    named = {str(row): run for row, run in passes.items()}
    outcomes = timing.measure(named, timing.clock_for(torch.device("cuda")), seconds=seconds, limit=LIMIT)
    medians = {row: outcomes[str(row)].median for row in passes}
    return {row: median for row, median in medians.items() if median is not None}


def patch(found: Sequence[Mapping[str, Any]], root: Path) -> str:
    """A unified diff that puts the better rows among the measured ones of the engines' tables; empty without any.

    Args:
        found: what `tune` returned.
        root: of the repository.
    """
    text = ""
    for engine in dict.fromkeys(record["engine"] for record in found):
        path = Path(_launch(engine).__file__).resolve()
        before = path.read_text(encoding="utf-8")
        better = {_key(r): tuple(r["best"].values()) for r in found if r["engine"] == engine and r["best"] != r["row"]}
        old, new = (part.splitlines(keepends=True) for part in (before, _with_rows(before, better)))
        name = path.relative_to(root).as_posix()
        text += "".join(difflib.unified_diff(old, new, f"a/{name}", f"b/{name}"))
    return text


def _key(record: Mapping[str, Any]) -> tuple[str, int, int]:
    return record["kernel"], record["architecture"], record["width"]


def _with_rows(source: str, rows: Mapping[tuple[str, int, int], tuple[int, ...]]) -> str:
    """The source of a launch module with these among the `measured` rows of its table."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    table = next(call for call in calls if getattr(call.func, "id", "") == "LaunchTable")
    node = next(keyword.value for keyword in table.keywords if keyword.arg == "measured")
    merged = ast.literal_eval(node) | dict(rows)
    body = "".join(
        f'        ("{kernel}", {arch}, {width}): {merged[kernel, arch, width]},\n' for kernel, arch, width in merged
    )
    assert node.end_lineno is not None and node.end_col_offset is not None
    lines = source.splitlines(keepends=True)
    start, end = (
        sum(map(len, lines[: line - 1])) + column
        for line, column in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
    )
    return source[:start] + (f"{{\n{body}    }}" if body else "{}") + source[end:]
