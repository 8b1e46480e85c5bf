"""Which tests `pytest -m gpu` takes, and in which order, without a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent


def collected(expression: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", expression, "-p", "no:cacheprovider"]
    files = sorted(KERNELS.glob("*/test_*_triton_gpu.py"))
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=True)
    return re.findall(r"::(test_\S+)", done.stdout)


@pytest.mark.slow
def test_what_tells_most_comes_first_and_large_tensors_only_where_asked_for():
    names = collected("gpu")
    half = [name for name in names if "half_precision" in name]
    assert names[: len(half)] == half and len(half) > 100
    wide = ["bfloat16" in name for name in half]
    assert wide == sorted(wide, reverse=True)
    assert not any("beyond_32_bits" in name for name in names)
    assert collected("large_memory") == ["test_offsets_beyond_32_bits"] * 4
