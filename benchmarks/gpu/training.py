"""Training steps of whole models at 16k tokens, and one run through `train.py`."""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.case import CheckFailed
from benchmarks.gpu.models import trained
from benchmarks.results import ROOT
from longmix_kernels.accelerators import by_driver_name

WARM_STEPS = 3


def steps(
    *, mixer: str, compiled: bool, count: int, words: list[str], batch: int, length: int, device: str
) -> dict[str, Any]:
    """Steps of a model: tokens per second, share of the peak rate, peak memory; the loss must fall.

    Returns:
        Also `compile_seconds`, what the first step took, and the losses.
    """
    sizes = {"batch": batch, "length": length, "vocab_size": 50304 if device == "cuda" else 64, "documents": 4}
    run = trained([f"mixer={mixer}", *words], **sizes, device=device, dtype="bf16" if device == "cuda" else "fp32")
    if compiled:
        torch._dynamo.reset()
        run.compile()
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, laps = [], []
    for _ in range(WARM_STEPS + count):
        began = time.perf_counter()
        losses.append(run.step())
        wait()
        laps.append(time.perf_counter() - began)
    values = [float(loss) for loss in losses]
    if not all(map(math.isfinite, values)) or not values[-1] < values[0]:
        raise CheckFailed(f"losses do not fall: {', '.join(f'{value:.4f}' for value in values)}")
    seconds = statistics.median(laps[WARM_STEPS:])
    flops = 3 * run.model.flops(length) * batch
    accelerator = by_driver_name(torch.cuda.get_device_name()) if device == "cuda" else None
    return {
        "mixer": mixer,
        "compiled": compiled,
        "tokens_per_second": batch * length / seconds,
        "step_seconds": seconds,
        "compile_seconds": laps[0],
        "flops_per_second": flops / seconds,
        "of_peak": flops / seconds / accelerator.flops(2) if accelerator else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "parameters": run.model.parameter_counts()["total"],
        "losses": values,
    }


def command(*, words: list[str], seconds: float) -> dict[str, Any]:
    """`train.py` with these words in a folder of its own: exit code 0, and the summary of the run."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        call = [sys.executable, str(ROOT / "train.py"), *words, f"hydra.run.dir={place}", "name=gpu", "logger=csv"]
        try:
            done = subprocess.run(call, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise CheckFailed(f"train.py was not done in {seconds:.0f} s") from error
        print(done.stdout, done.stderr)
        if done.returncode:
            raise CheckFailed(f"train.py: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
        return {"summary": json.loads((place / "summary.json").read_text(encoding="utf-8"))}


def _nothing() -> None:
    """A CPU has nothing to wait for."""
