"""Runs' folders as a sweep leaves them, with figures from formulas, so that tests know every answer."""

import json
from pathlib import Path
from typing import Any

from longmix.training.loggers import CsvLog

STEPS = (10, 20, 30)


def write_run(
    folder: Path, mixer: str, seq_len: int, bits: float, speed: float, config: str = "seed: 0\n", **changes: Any
) -> Path:
    """A finished run with its configuration; `changes` replace entries of its summary."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    log = CsvLog()
    log.open(folder, {}, "name", 0)
    for step in STEPS:
        log.write(step, {"train/loss": 3.0, "train/bits_per_byte": 4.0, "throughput/tokens_per_second": speed})
        log.write(step, {"validation/bits_per_byte": bits + 1 / step, "validation/loss": bits})
    summary = {
        "mixer": mixer,
        "seq_len": seq_len,
        "parameters": {"total": 100_000},
        "training_flops_per_token": 6e5,
        "tokens": 30_000,
        "tokens_per_step": 1000,
        "tokens_per_second": speed,
        "training_seconds": 30_000 / speed,
        "peak_memory_bytes": 2**30,
        "device": "CPU",
        "validation": {"bits_per_byte": bits, "loss": 0.7 * bits},
        "validation_by_position": [{"start": 0, "end": 16, "loss": 3.0}, {"start": 16, "end": 32, "loss": bits}],
        "versions": {"torch": "2.13.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return folder


def write_evaluation(run: Path, name: str, **report: Any) -> None:
    """One result of `evaluate.py`."""
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(report))


def write_needles(run: Path, lengths: list[int], depths: list[float], found: list[list[float]]) -> None:
    """A result of `task=needle`: shares by depth and length, nine times as many nats, the first length trained."""
    cells = [
        {"seq_len": length, "depth": depth, "accuracy": found[row][column], "gain": 9 * found[row][column]}
        for column, length in enumerate(lengths)
        for row, depth in enumerate(depths)
    ]
    write_evaluation(run, "needle_validation_step9", cells=cells, step=9, needles=8, trained_seq_len=lengths[0])


def write_sweep(folder: Path) -> Path:
    """Two mixers at two lengths: `slow` learns better, `fast` trains faster and takes less memory."""
    number = 0
    for seq_len in (32, 64):
        for mixer, bits, speed, memory in (("slow", 2.0, 500.0, 3), ("fast", 3.0, 1000.0, 1)):
            name = f"{number},mixer={mixer},seq_len={seq_len}"
            number += 1
            write_run(folder / name, mixer, seq_len, bits + seq_len / 100, speed, peak_memory_bytes=memory * 2**30)
    return folder
