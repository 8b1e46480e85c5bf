"""Rung 4: what the kernels compile to, for GPUs that this machine need not have."""

import json
import os

import pytest

from longmix_kernels import report
from longmix_kernels.attention import launch
from longmix_kernels.compiling import Compiled
from longmix_kernels.report import Build

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

CLEAN = Compiled(
    registers=200, spills=0, stack=0, shared=1000, tensor_cores={"mma": 0, "wgmma": 8, "tcgen05": 0}, serialized=False
)


TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
# Rows are permuted where bounds are sorted labels' documents; the others have bounds in closed form.
FEATURES = [("documents", "permuted"), ("causal", "alibi"), ("causal", "blocks")]


def name(build: Build) -> str:
    return f"{build.kernel}-sm{build.architecture}-d{build.dim}-{build.mode}-{build.feature}"


def featured(architectures, dims) -> list[Build]:
    return [
        build
        for mode, feature in FEATURES
        for build in report.table_builds(architectures, dims, ("bf16",), (mode,), (feature,))
    ]


def assert_clean(build: Build) -> None:
    compiled = report.compile_kernel(build)
    assert compiled.faults(build) == []
    assert compiled.tensor_cores[TENSOR_CORES[build.architecture]] > 0


@pytest.mark.parametrize(
    "build",
    [*report.table_builds(launch.ARCHITECTURES, (128,), ("bf16",), ("causal",)), *featured((90,), (64, 128))],
    ids=name,
)
def test_compiles_without_spills_and_with_tensor_cores(build):
    assert_clean(build)


@pytest.mark.slow
@pytest.mark.parametrize("build", featured((80, 100), (64, 128)), ids=name)
def test_every_feature_compiles_without_spills(build):
    assert_clean(build)


@pytest.mark.slow
@pytest.mark.parametrize(
    "build", report.table_builds(launch.ARCHITECTURES, launch.WIDTHS, ("bf16",), ("causal",)), ids=name
)
def test_every_entry_of_the_table_compiles_without_spills(build):
    faults = report.compile_kernel(build).faults(build)
    if faults and (build.kernel, build.architecture, build.dim) == ("grad_key_value", 90, 256):
        pytest.xfail(f"clean under Triton 3.6 only: {faults}")
    assert faults == []


def test_a_kernel_too_large_is_found_out():
    """Four warps cannot hold two [128, 128] sums in float32."""
    build = Build("grad_key_value", 80, "bf16", 128, 128, config=launch.LaunchConfig(64, 128, 4, 2))
    faults = report.compile_kernel(build).faults(build)
    assert any("spills" in fault for fault in faults) and any("stack" in fault for fault in faults)


@pytest.mark.parametrize(
    ("changed", "dtype", "fault"),
    [
        ({}, "bf16", None),
        ({"spills": 8}, "bf16", "spills 8 bytes"),
        ({"stack": 16}, "bf16", "uses 16 bytes of stack"),
        ({"shared": 10**6}, "bf16", "wants 1000000 bytes of shared memory"),
        ({"serialized": True}, "bf16", "serializes wgmma"),
        ({"tensor_cores": {"mma": 8, "wgmma": 0, "tcgen05": 0}}, "fp16", "has no wgmma"),
        ({"tensor_cores": {"mma": 0, "wgmma": 0, "tcgen05": 0}}, "fp32", None),
    ],
)
def test_what_counts_as_a_fault(changed, dtype, fault):
    compiled = Compiled(**{**vars(CLEAN), **changed})
    assert compiled.faults(Build("forward", 90, dtype, 64, 64)) == ([] if fault is None else [fault])


def test_roofline_counts_the_work():
    config = launch.LaunchConfig(128, 64, 8, 2)
    forward = report.roofline(Build("forward", 90, "bf16", 128, 64, config=config))
    assert forward.tile_flops == 2 * 128 * 64 * (128 + 64)
    assert forward.tile_bytes == 64 * (128 + 64) * 2
    assert forward.tile_exponentials == 128 * 64
    # The whole backward is seven products per score where the forward is two.
    builds = [Build(kernel, 90, "bf16", 128, 128) for kernel in launch.KERNELS]
    first, *backward = (report.roofline(build) for build in builds)
    assert sum(x.flop_seconds for x in backward) == pytest.approx(3.5 * first.flop_seconds)
    # 2 * B * H * N^2 * D operations of a causal forward at 989 TFLOP/s.
    assert first.flop_seconds == pytest.approx(2 * 16 * 16384**2 * 128 / 989e12, rel=1e-3)
    assert first.limit == "products" and first.floor_seconds == first.flop_seconds
    # At 64 columns an exponential takes as long as its products.
    narrow = report.roofline(Build("forward", 90, "bf16", 64, 64))
    assert narrow.exponential_seconds == pytest.approx(narrow.flop_seconds, rel=0.02)


def test_roofline_compares_both_ways_to_permute_rows():
    rows = 16 * 16384
    for dim in (64, 128):
        plain, *permuted = (
            report.roofline(Build(kernel, 90, "bf16", dim, dim, feature=feature))
            for kernel, feature in (("forward", "plain"), *((kernel, "permuted") for kernel in launch.KERNELS))
        )
        # Query, key, value and output once, and a logsumexp; in the kernel, two row numbers besides.
        assert plain.call_bytes == rows * (4 * dim * 2 + 4) and plain.before_bytes is None
        assert permuted[0].call_bytes == plain.call_bytes + rows * 8
        # Beforehand, all of it is read and written once more.
        assert permuted[0].before_bytes == 3 * plain.call_bytes
        assert all(x.before_bytes > x.call_bytes for x in permuted)
    config = launch.LaunchConfig(128, 64, 8, 2)
    steps = [
        report.roofline(Build("forward", 90, "bf16", 64, 64, feature=feature, config=config)).tile_bytes
        for feature in ("plain", "permuted")
    ]
    assert steps[1] - steps[0] == 64 * 4


def test_command_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    results = {"forward": CLEAN, "grad_query": Compiled(**{**vars(CLEAN), "spills": 24}), "grad_key_value": CLEAN}
    monkeypatch.setattr(report, "compile_kernel", lambda build: results[build.kernel])
    path = tmp_path / "report.json"
    assert report.main(["--arch", "90", "--dim", "64", "--dtype", "bf16", "--json", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["kernel", "arch", "dtype", "dim", "mode"]
    assert [line.split()[0] for line in lines[1:4]] == list(launch.KERNELS)
    assert lines[2].endswith("spills 24 bytes") and lines[1].endswith("-")
    rows = json.loads(path.read_text())
    assert [row["kernel"] for row in rows] == list(launch.KERNELS)
    assert rows[0]["registers"] == 200 and rows[1]["spills"] == 24 and rows[0]["wgmma"] == 8
    results["grad_query"] = CLEAN
    capsys.readouterr()
    assert report.main(["--arch", "90", "--dim", "64", "--dtype", "bf16", "--feature", "plain", "permuted"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[5] for line in lines[:3]] == ["feature", "plain", "permuted"]


def test_a_head_dimension_out_of_range_is_refused(capsys):
    with pytest.raises(SystemExit):
        report.main(["--dim", "300"])
    assert "--dim got [300]; allowed are 1 to 256" in capsys.readouterr().err
