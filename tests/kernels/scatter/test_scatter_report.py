"""Rung 4: what the kernels compile to, for GPUs that this machine need not have; and what the cost model predicts."""

import pytest
from engine_contract import OWN_TILES, assert_clean, assert_too_large, compiles, sampled

from longmix_kernels.scatter import cost, launch, report
from longmix_kernels.scatter.report import Build

HOPPER = report.table_builds((90,), ((64, 64),))
EVERY = [
    *report.table_builds(OWN_TILES, report.SIZES, report.BLOCKS),
    *report.table_builds((86,), ((128, 256), (256, 256)), report.BLOCKS),
]


def name(build: Build) -> str:
    return f"{build.kernel}-sm{build.architecture}-m{build.features}-d{build.value_dim}-c{build.block_size}"


@compiles
@pytest.mark.parametrize("build", HOPPER, ids=name)
def test_compiles_for_sm_90_without_spills_and_with_wgmma(build):
    assert_clean(build, build.kernel not in launch.SCANS)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("build", sampled(EVERY), ids=name)
def test_every_entry_of_the_table_compiles_without_spills(build):
    assert_clean(build, build.kernel not in launch.SCANS)


@pytest.mark.slow
@compiles
def test_a_kernel_too_large_is_found_out():
    """Four warps cannot hold [128, 256] sums in float32."""
    assert_too_large(Build("sums", 90, "bf16", 128, 256, config=launch.LaunchConfig(64, 128, 256, 4, 1)))


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
    rows = {(row["features"], row["kernel"]): row["bytes_per_row"] for row in report.costs()}
    for features in (64, 128, 256):
        for name in ("forward", "backward"):
            assert rows[features, f"{name}, far"] < 0.3 * rows[features, f"{name}, far, blocked"]
