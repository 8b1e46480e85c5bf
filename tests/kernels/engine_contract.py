"""What tests of all engines share: other processes, launch tables, and what a report has to find."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longmix_kernels.accelerators import ARCHITECTURES, TUNED
from longmix_kernels.aot import Build, Compiled

CLEAN = Compiled(
    registers=200, spills=0, stack=0, shared=1000, tensor_cores={"mma": 0, "wgmma": 8, "tcgen05": 0}, serialized=False
)
WITHOUT_WGMMA = Compiled(**{**vars(CLEAN), "tensor_cores": {"mma": 8, "wgmma": 0, "tcgen05": 0}})
SPILLING = Compiled(**{**vars(CLEAN), "spills": 24})

TENSOR_CORES = dict.fromkeys(ARCHITECTURES, "mma") | {90: "wgmma", 100: "tcgen05"}
"""The instruction of each architecture."""

OWN_TILES = (80, 90, 100)
"""The architectures with tables of their own; sm_86 has a few rows besides those of sm_80."""

NEWER = {80: 87, 86: 89, 90: 99, 100: 110}
"""By architecture of a table's entries a newer one that takes them."""

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def sampled(builds: list[Build], every: int = 6) -> list[Any]:
    """Each kernel's first build for an architecture and each ``every``-th after it; for sm_90 each second.

    ``-m every_row`` has the rest as well.
    """
    seen: Counter[tuple[str, int]] = Counter()
    chosen: list[Any] = []
    for build in builds:
        place = seen[build.kernel, build.architecture]
        seen[build.kernel, build.architecture] += 1
        left_out = place % (2 if build.architecture == 90 else every)
        chosen.append(pytest.param(build, marks=pytest.mark.every_row) if left_out else build)
    return chosen


def run_python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=550,
    )


def assert_passes_in_the_interpreter(file: Path, at_least: int) -> None:
    """Rung 3: a whole test file in a process that has TRITON_INTERPRET=1 from the start."""
    command = ("-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", file.name)
    done = run_python(file.parent, *command, TRITON_INTERPRET="1")
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    print(f"interpreter: {summary}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None and int(passed[1]) >= at_least
    assert "skipped" not in summary


def assert_clean(build: Build, uses_tensor_cores: bool) -> None:
    """Rung 4: no spills, and the tensor cores of its architecture where it multiplies matrices."""
    compiled = build.compile()
    assert build.faults(compiled) == []
    assert compiled.tensor_cores[TENSOR_CORES[build.architecture]] > 0 or not uses_tensor_cores


def assert_too_large(build: Build) -> None:
    faults = build.faults(build.compile())
    assert any("spills" in fault for fault in faults) and any("stack" in fault for fault in faults)


def assert_every_entry(launch: Any) -> None:
    """Each kernel has one for each tuned architecture, size and width, and newer architectures take them."""
    table = launch.TABLE
    for kernel in launch.KERNELS:
        assert kernel in table.interpreted
        for architecture in TUNED:
            for size in (2, 4):
                for width in table.widths:
                    config = table.entries[kernel, architecture, size, width]
                    assert table.entry(kernel, architecture, size, width) is config
                    assert table.entry(kernel, NEWER[architecture], size, width - 1) is config


def assert_override_ends(call: Any, kernel: str, other: str, config: Any) -> None:
    """A configuration replaces a kernel's own, and no other's, while its context lasts, within another's too."""
    table, default, others = call.TABLE, call.config(kernel), call.config(other)
    with table.override(kernel, config), table.override(kernel, default):
        assert call.config(kernel) == default
    assert call.config(kernel) == default
    with table.override(kernel, config):
        assert call.config(kernel) == call.fitted(kernel, config) != default
        assert call.config(other) == others
    assert call.config(kernel) == default
