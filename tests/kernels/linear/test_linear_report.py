"""Rung 4: what the kernels compile to, for GPUs that this machine need not have; and what the cost model predicts."""

from importlib.metadata import version

import pytest
from engine_contract import OWN_TILES, assert_clean, assert_too_large, compiles, sampled

from longmix_kernels.linear import cost, launch, report
from longmix_kernels.linear.report import Build

OLDER_TRITON = tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
HOPPER = report.table_builds((90,), ((128, 256),), report.GATES)
# The feature that takes the most registers stands for all, and the smallest and largest heads for those between.
EVERY = [
    *report.table_builds(OWN_TILES, (report.DIMS[0], report.DIMS[-1]), report.GATES, ("documents-state",)),
    *report.table_builds((90,), ((64, 128),), report.GATES),
    *(
        Build("grad_query", 86, "bf16", *dims, gate, "documents-state")
        for dims in ((96, 192), (128, 256), (256, 512))
        for gate in report.GATES
    ),
]


def name(build: Build) -> str:
    return (
        f"{build.kernel}{build.part}-sm{build.architecture}-{build.dim}-{build.value_dim}-{build.gate}-{build.feature}"
    )


SPILLS_BEFORE_3_9 = {("grad_key_value", "exp"): {"spills 8 bytes", "uses 8 bytes of stack"}}
"""Two registers' worth, where Triton 3.6 leaves none free; the row that avoids it spills under 3.9."""


@compiles
@pytest.mark.parametrize("build", HOPPER, ids=name)
def test_compiles_for_sm_90_without_spills_and_with_wgmma(build):
    known = SPILLS_BEFORE_3_9.get((build.kernel, build.gate))
    if OLDER_TRITON and known:
        assert set(build.faults(build.compile())) <= known
    else:
        assert_clean(build, build.kernel in launch.TILED)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("build", sampled(EVERY), ids=name)
def test_every_entry_of_the_table_compiles_without_spills(build):
    assert build.faults(build.compile()) == []


@pytest.mark.slow
@compiles
def test_a_kernel_too_large_is_found_out():
    """Four warps cannot hold [128, 64] and [128, 128] sums in float32."""
    assert_too_large(Build("grad_key_value", 90, "bf16", 64, 128, config=launch.LaunchConfig(64, 128, 32, 4, 2)))


def test_work_is_that_of_the_formulas():
    """One chunk of one tile: all pairs of 64 tokens, and a state once."""
    setting = cost.Setting(rows=64, dim=32, value_dim=48, chunk=64, normalize=False)
    kernels = cost.kernel_work(setting)
    state, pairs = 2 * 64 * 32 * 48, 2 * 64 * 64
    assert kernels["states"].flops == state
    assert kernels["output"].flops == state + pairs * (32 + 48)
    backward = sum(kernels[kernel].flops for kernel in cost.BACKWARD if kernel in kernels)
    assert backward == 5 * state + 3 * pairs * (32 + 48)
    # The states go out in float32, once.
    assert kernels["states"].bytes == 64 * (2 * (32 + 48) + 8) + 4 * 32 * 48
    assert "grad_rows" not in kernels and kernels["output"].seconds == kernels["output"].bytes / 4.8e12


def test_half_precision_states_save_what_they_should():
    full, half = (
        cost.kernel_work(cost.Setting(1024, 128, 256, 128, normalize=True, state_size=size))["grad_query"].bytes
        for size in (4, 2)
    )
    assert full - half == 1024 / 128 * 128 * 256 * 2


def test_predictions_lie_below_the_published_times():
    """In the published setting; an estimate at peak rates that exceeded them would be wrong."""
    rows = [row for row in report.costs() if row["published_h100_ms"] != ""]
    assert len(rows) == 2 * len(report.PUBLISHED)
    assert all(0 < row["h200_floor_ms"] < 0.6 * row["published_h100_ms"] for row in rows)


def test_kernels_that_are_launched_apart_are_reported_apart():
    parts = [(build.dim, build.part) for build in report.table_builds((90,), report.DIMS, ("exp",)) if build.part]
    assert parts == [(256, "key"), (256, "value")]
