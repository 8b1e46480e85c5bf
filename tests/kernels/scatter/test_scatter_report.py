"""Rung 4: what the kernels compile to, for GPUs that this machine need not have; and what the cost model predicts."""

import json
import os

import pytest

from longmix_kernels.compiling import Compiled
from longmix_kernels.scatter import cost, launch, report
from longmix_kernels.scatter.report import Build

CLEAN = Compiled(
    registers=200, spills=0, stack=0, shared=1000, tensor_cores={"mma": 0, "wgmma": 8, "tcgen05": 0}, serialized=False
)
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
HOPPER = report.table_builds((90,), ((64, 64),))
EVERY = report.table_builds(launch.ARCHITECTURES, report.SIZES, report.BLOCKS)
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}


def name(build: Build) -> str:
    return f"{build.kernel}-sm{build.architecture}-m{build.features}-d{build.value_dim}-c{build.block_size}"


@compiles
@pytest.mark.parametrize("build", HOPPER, ids=name)
def test_compiles_for_sm_90_without_spills_and_with_wgmma(build):
    compiled = report.compile_kernel(build)
    assert build.faults(compiled) == []
    assert (compiled.tensor_cores["wgmma"] > 0) == (build.kernel not in launch.SCANS)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("build", EVERY, ids=name)
def test_every_entry_of_the_table_compiles_without_spills(build):
    compiled = report.compile_kernel(build)
    assert build.faults(compiled) == []
    assert build.kernel in launch.SCANS or compiled.tensor_cores[TENSOR_CORES[build.architecture]] > 0


@compiles
def test_a_kernel_too_large_is_found_out():
    """Four warps cannot hold [128, 256] sums in float32."""
    build = Build("sums", 90, "bf16", 128, 256, config=launch.LaunchConfig(64, 128, 256, 4, 1))
    faults = build.faults(report.compile_kernel(build))
    assert any("spills" in fault for fault in faults) and any("stack" in fault for fault in faults)


def test_wgmma_is_wanted_where_tiles_have_the_rows_for_it():
    without = Compiled(**{**vars(CLEAN), "tensor_cores": {"mma": 8, "wgmma": 0, "tcgen05": 0}})
    assert Build("merge", 90, "bf16", 64, 64).faults(without) == ["has no wgmma"]
    assert Build("merge", 90, "bf16", 64, 64, block_size=32).faults(without) == []
    assert Build("sums", 90, "bf16", 20, 64).faults(without) == []
    assert Build("scan", 90, "bf16", 64, 64).faults(without) == []
    assert Build("merge", 80, "bf16", 64, 64).faults(without) == []


def test_blocks_that_make_no_difference_are_compiled_once():
    builds = report.table_builds((90,), ((64, 64),), (128, 256))
    assert [build.kernel for build in builds] == list(launch.KERNELS)


def test_work_is_that_of_the_formulas():
    """Two query heads to a key head, blocks of 16, 32 features."""
    setting = cost.Setting(rows=64, dim=24, value_dim=48, features=32, block_size=16, past_blocks=1, group=2)
    kernels = cost.kernel_work(setting)
    through, seen = 2 * 64 * 32 * 48, 16 + 8.5
    assert kernels["merge"].flops == kernels["grad_query"].flops == kernels["grad_sums"].flops == through
    assert kernels["sums"].flops == through / 2 and kernels["grad_key"].flops == through
    assert kernels["exact"].flops == 2 * 64 * seen * (24 + 48)
    sums = 64 / 16 / 2 * 4 * 32 * (48 + 2)
    assert kernels["scan"].bytes == 2 * sums and kernels["scan"].flops == 0
    assert kernels["sums"].bytes == 64 / 2 * (4 * 32 + 2 * 48) + sums
    # Features, sums; output and logsumexp read and written, and the logsumexp copied.
    assert kernels["merge"].bytes == 64 * (4 * 32 + 4 * 48 + 16) + sums


def test_the_exact_part_of_whole_rows_is_causal_attention():
    """Blocks that cover the sequence: half of all pairs, two products forward and seven backward."""
    setting = cost.Setting(rows=1024, dim=64, value_dim=64, block_size=1024, past_blocks=0)
    kernels = cost.kernel_work(setting)
    assert kernels["exact"].flops == 4 * 64 * 1024 * 1025 / 2
    assert kernels["exact_backward"].flops == 3.5 * kernels["exact"].flops


def test_the_kernels_move_a_fraction_of_what_torch_operations_move():
    rows = {(row["features"], row["kernel"]): row["bytes_per_row"] for row in report.cost_rows()}
    for features in (64, 128, 256):
        for name in ("forward", "backward"):
            assert rows[features, f"{name}, far"] < 0.3 * rows[features, f"{name}, far, blocked"]


def test_command_prints_tables_and_writes_json(tmp_path, capsys, monkeypatch):
    results = dict.fromkeys(launch.KERNELS, CLEAN) | {"scan": Compiled(**{**vars(CLEAN), "spills": 24})}
    monkeypatch.setattr(report, "compile_kernel", lambda build: results[build.kernel])
    path = tmp_path / "report.json"
    arguments = ["--arch", "90", "--sizes", "64/64", "--block", "128", "--json", str(path)]
    assert report.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["kernel", "arch", "dtype", "features", "value_dim"]
    assert [line.split()[0] for line in lines[1:8]] == list(launch.KERNELS)
    assert lines[2].endswith("spills 24 bytes") and lines[1].endswith("-")
    written = json.loads(path.read_text())
    assert written["kernels"][1]["spills"] == 24 and written["costs"] == report.cost_rows()
    results["scan"] = CLEAN
    assert report.main(arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64"], "--sizes got ['64']; allowed are pairs"),
        (["--sizes", "64/300"], "--sizes got ['64/300']; allowed are pairs"),
        (["--sizes", "0/64"], "--sizes got ['0/64']; allowed are pairs"),
        (["--block", "0"], "--block got [0]; allowed are at least 1"),
    ],
    ids=str,
)
def test_sizes_out_of_range_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert message in capsys.readouterr().err
