"""Rung 4: what the kernels compile to, for GPUs that this machine need not have; and what the cost model predicts."""

from dataclasses import replace

import pytest
from engine_contract import OWN_TILES, assert_clean, assert_too_large, compiles, sampled

from longmix_kernels.accelerators import TUNED
from longmix_kernels.attention import cost, launch, report
from longmix_kernels.attention.report import Build

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


@compiles
@pytest.mark.parametrize(
    "build",
    [*report.table_builds(OWN_TILES, (128,), ("bf16",), ("causal",)), *featured((90,), (128,))],
    ids=name,
)
def test_compiles_without_spills_and_with_tensor_cores(build):
    assert_clean(build, True)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("build", sampled([*featured((90,), (64,)), *featured((80, 100), (64, 128))]), ids=name)
def test_every_feature_compiles_without_spills(build):
    assert_clean(build, True)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("build", sampled(report.table_builds(TUNED, launch.WIDTHS, ("bf16",), ("causal",))), ids=name)
def test_every_entry_of_the_table_compiles_without_spills(build):
    faults = build.faults(build.compile())
    if faults and (build.kernel, build.architecture, build.dim) == ("grad_key_value", 90, 256):
        pytest.xfail(f"clean under Triton 3.6 only: {faults}")
    assert faults == []


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("architecture", [90, 100])
def test_loads_through_descriptors_compile_without_spills(architecture, dim):
    build = Build("forward", architecture, "bf16", dim, dim)
    assert_clean(replace(build, config=replace(build.launch_config(), descriptors=True)), True)


@pytest.mark.slow
@compiles
def test_a_kernel_too_large_is_found_out():
    """Four warps cannot hold two [128, 128] sums in float32."""
    assert_too_large(Build("grad_key_value", 80, "bf16", 128, 128, config=launch.LaunchConfig(64, 128, 4, 2)))


def test_work_is_that_of_the_formulas():
    setting = cost.Setting(rows=16 * 16384, length=16384, dim=128, value_dim=128)
    kernels = cost.kernel_work(setting)
    # The whole backward is seven products per score where the forward is two.
    backward = sum(kernels[kernel].flops for kernel in cost.BACKWARD)
    assert backward == 3.5 * kernels["forward"].flops
    # 2 * B * H * N^2 * D operations of a causal forward at 989 TFLOP/s.
    first = kernels["forward"]
    assert first.limits["products"] == pytest.approx(2 * 16 * 16384**2 * 128 / 989e12, rel=1e-3)
    assert first.limit == "products" and first.seconds == first.limits["products"]
    # At 64 columns an exponential takes as long as its products.
    narrow = cost.kernel_work(cost.Setting(16 * 16384, 16384, 64, 64))["forward"].limits
    assert narrow["exp"] == pytest.approx(narrow["products"], rel=0.02)


def test_a_tile_is_one_step_of_the_inner_loop():
    config = launch.LaunchConfig(128, 64, 8, 2)
    setting = cost.Setting(1024, 1024, 128, 64)
    forward = cost.tile_work("forward", config, setting)
    assert forward.flops == 2 * 128 * 64 * (128 + 64)
    assert forward.bytes == 64 * (128 + 64) * 2
    assert forward.exponentials == 128 * 64
    # Rows in an order of their own cost an int32 for each key that is loaded.
    permuted = cost.tile_work("forward", config, cost.Setting(1024, 1024, 128, 64, permuted=True))
    assert permuted.bytes - forward.bytes == 64 * 4
    assert cost.tile_work("grad_key_value", config, setting).bytes == 128 * ((128 + 64) * 2 + 8)


def test_both_ways_to_permute_rows_are_compared():
    rows = 16 * 16384
    for dim in (64, 128):
        plain, permuted = (cost.Setting(rows, 16384, dim, dim, permuted=permuted) for permuted in (False, True))
        # Query, key, value and output once, and a logsumexp; in the kernel, two row numbers besides.
        before = cost.kernel_work(plain)["forward"].bytes
        assert before == rows * (4 * dim * 2 + 4)
        after = cost.kernel_work(permuted)
        assert after["forward"].bytes == before + rows * 8
        # Beforehand, all of it is read and written once more.
        assert cost.copying_bytes("forward", permuted) == 3 * before
        assert all(cost.copying_bytes(kernel, permuted) > after[kernel].bytes for kernel in launch.KERNELS)
