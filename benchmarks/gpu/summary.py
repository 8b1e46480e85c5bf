"""What a folder of results amounts to: counts, failures, bars, ratios to peers, and a table of training steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.gpu.case import CRASHED, FAILED, LATE, PASSED, SKIPPED, Case, Result
from benchmarks.gpu.catalogue import STAGES
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.speed import BENCHMARKS
from benchmarks.gpu.tuning import patch
from longmix.files import replace_text

PATCH = "tables.patch"
NOT_RUN = "not run"
STATUSES = (PASSED, FAILED, CRASHED, LATE, SKIPPED, NOT_RUN)

TRAINING_COLUMNS = {
    "mixer": "mixer",
    "compiled": "compiled",
    "tokens_per_second": "tokens/s",
    "of_peak": "MFU",
    "peak_gb": "peak GB",
    "step_seconds": "s/step",
    "compile_seconds": "first step s",
    "over_flash": "x flash",
}
SPEED_COLUMNS = {
    "benchmark": "engine",
    "length": "T",
    "dim": "dim",
    "pass": "pass",
    "provider": "provider",
    "median_ms": "ms",
    "tflops": "TFLOP/s",
    "of_peak": "of peak",
    "peak_mib": "peak MiB",
    "note": "note",
}


def write_summary(folder: Path, cases: Sequence[Case], journal: Journal) -> None:
    """Write `summary.json` and `summary.txt` of what there is by now."""
    content = summarised(cases, journal)
    results.write_json(folder / "summary.json", content)
    if content["tuned"]:
        replace_text(folder / PATCH, patch(content["tuned"], results.ROOT))
    replace_text(folder / "summary.txt", summary_text(cases, journal))


def summarised(cases: Sequence[Case], journal: Journal) -> dict[str, Any]:
    """All of it as JSON."""
    found = journal.results
    return {
        "environments": journal.environments,
        "stages": {stage: _counts(stage, cases, found) for stage in STAGES},
        "wrong": [r.record() for r in found.values() if r.status in (FAILED, CRASHED, LATE)],
        "skipped": {r.case: r.note for r in found.values() if r.status == SKIPPED},
        "not_run": [case.name for case in cases if case.name not in found],
        "machine": dict(found["machine/ceilings"].values) if "machine/ceilings" in found else {},
        "speed": speed_records(found),
        "bars": bars(journal),
        "training": training_records(found),
        "tuned": [dict(r.values) for r in found.values() if r.stage == "tune" and r.status == PASSED],
    }


def _counts(stage: str, cases: Sequence[Case], found: Mapping[str, Result]) -> dict[str, int]:
    here = [case.name for case in cases if case.stage == stage]
    statuses = [found[name].status if name in found else NOT_RUN for name in here]
    return {status: statuses.count(status) for status in STATUSES if status in statuses}


def speed_records(found: Mapping[str, Result]) -> list[results.Record]:
    """Every time that was taken, with its benchmark."""
    taken = []
    for result in found.values():
        if result.stage == "speed" and result.status == PASSED:
            benchmark = result.case.removeprefix("speed/").partition("-")[0]
            families = result.values["families"]
            taken += [r | {"benchmark": benchmark, "family": families[r["provider"]]} for r in result.values["records"]]
    return taken


def bars(journal: Journal) -> list[results.Record]:
    """The project's bars, each met, not met or unmeasured."""
    records, verdicts = speed_records(journal.results), []
    environment = journal.environments[-1] if journal.environments else {}
    for name, benchmark in BENCHMARKS.items():
        here = [record for record in records if record["benchmark"] == name]
        families = {record["provider"]: record["family"] for record in here}
        complete = benchmark.complete(here, families)
        verdicts += [bar.verdict(complete, environment) for bar in benchmark.bars()]
    return verdicts


def training_records(found: Mapping[str, Result]) -> list[results.Record]:
    """Every model that was trained, with its speed against flash, compiled or not as it."""
    taken = [dict(r.values) for r in found.values() if r.case.startswith("training/") and "mixer" in r.values]
    flash = {record["compiled"]: record["tokens_per_second"] for record in taken if record["mixer"] == "flash"}
    for record in taken:
        peak, own = record["peak_bytes"], flash.get(record["compiled"])
        record["peak_gb"] = None if peak is None else peak / 1e9
        record["over_flash"] = None if own is None else record["tokens_per_second"] / own
    return taken


def summary_text(cases: Sequence[Case], journal: Journal) -> str:
    """All of it to be read."""
    content = summarised(cases, journal)
    head = results.headline(journal.environments[-1]) if journal.environments else "nothing was run"
    stages = {
        stage: ", ".join(f"{n} {status}" for status, n in own.items()) for stage, own in content["stages"].items()
    }
    counts = [f"{stage}: {text}" for stage, text in stages.items() if text]
    wrong = [f"{record['status']}: {record['case']}: {record['note']}" for record in content["wrong"]]
    skipped = [f"skipped: {name}: {why}" for name, why in content["skipped"].items()]
    sections = [head, "\n".join(counts), "\n".join(wrong), "\n".join(skipped)]
    if content["machine"]:
        sections.append("machine: " + ", ".join(f"{key} {_number(value)}" for key, value in content["machine"].items()))
    if content["speed"]:
        sections += [results.text_table(content["speed"], SPEED_COLUMNS)]
        sections += ["\n".join(["bars", *results.verdict_lines(content["bars"])])]
    if content["tuned"]:
        sections.append("\n".join(map(_tuned_line, content["tuned"])))
    if content["training"]:
        sections.append(results.text_table(content["training"], TRAINING_COLUMNS))
    return "\n\n".join(section for section in sections if section) + "\n"


def _tuned_line(record: Mapping[str, Any]) -> str:
    name, row, best = f"{record['engine']} {record['kernel']}", record["row"], record["best"]
    changes = [f"{key} {row[key]} -> {best[key]}" for key in row if row[key] != best[key]]
    times = [record["times"][text] for text in (record["row_text"], record["best_text"])]
    what = f"{', '.join(changes)}: {times[0] / times[1]:.3f}x of a pass" if changes else "its row is the best"
    return f"{name} at {record['width']}: {what}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
