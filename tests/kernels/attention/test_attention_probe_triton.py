"""The kernels of attention with a probe: in the interpreter, compiled ahead of time, and by their formulas."""

from pathlib import Path

import pytest
import torch
from engine_contract import (
    OWN_TILES,
    assert_clean,
    assert_every_entry,
    assert_override_ends,
    assert_passes_in_the_interpreter,
    compiles,
    sampled,
)
from probe_cases import called

from longmix_kernels.accelerators import TUNED
from longmix_kernels.attention import checks, cost, probe_attention, probe_cost, probe_launch, probe_report
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.probe_report import Build

FEATURES = [("documents", "permuted"), ("causal", "alibi")]
QUERY = torch.zeros(1, 40, 2, 16)


def name(build: Build) -> str:
    return f"{build.kernel}-sm{build.architecture}-d{build.dim}-{build.mode}-{build.feature}"


SPILLING = {("probe_grad_key_value", 90, 128): "clean under Triton 3.6 only"}


def assert_compiles(build: Build) -> None:
    faults = build.faults(build.compile())
    known = SPILLING.get((build.kernel, build.architecture, build.dim))
    if faults and known:
        pytest.xfail(f"{known}: {faults}")
    assert_clean(build, build.kernel != "probe_split")


def featured(architectures, dims) -> list[Build]:
    return [
        b
        for mode, feature in FEATURES
        for b in probe_report.builds(architectures, dims, ("bf16",), (mode,), (feature,))
    ]


@pytest.mark.slow
def test_interpreter_matches_reference():
    assert_passes_in_the_interpreter(Path(__file__).with_name("test_attention_probe_interpreted.py"), at_least=36)


@compiles
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(build, marks=() if build.kernel == "probe_split" else pytest.mark.slow)
        for build in probe_report.builds((90,), (128,))
    ],
    ids=name,
)
def test_compiles_without_spills_and_with_tensor_cores(build):
    assert_compiles(build)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    sampled([*probe_report.builds(TUNED, probe_launch.WIDTHS), *featured(OWN_TILES, (64, 128))], every=6),
    ids=name,
)
def test_every_entry_of_the_table_compiles_without_spills(build):
    assert_compiles(build)


def test_launch_tables():
    assert_every_entry(probe_launch)
    call = probe_launch.Call(called([QUERY] * 4, Pattern(), 1.0))
    config = probe_launch.LaunchConfig(16, 16, 1, 1)
    assert_override_ends(call, "probe_forward", "probe_grad_query", config)
    known = {(kernel, architecture, width) for kernel, architecture, _, width in probe_launch.TABLE.entries}
    assert all(key in known for entries in probe_launch.NARROWER.values() for key in entries)


def test_few_queries_divide_the_keys():
    def launched(queries: int, keys: int) -> tuple[str, int, int]:
        tensors = [torch.zeros(1, n, 2, 16, device="meta") for n in (queries, queries, keys, keys)]
        call = probe_launch.Call(called(tensors, Pattern(), 1.0))
        return call.forward_kernel(), call.splits, call.programs(call.forward_kernel(), call.config("probe_split"))

    assert launched(1, 65536) == ("probe_split", 64, 128)
    assert launched(1, 400) == ("probe_split", 1, 2)
    assert launched(16, 65536) == ("probe_forward", 1, 2)


def test_shapes_are_known_without_running_and_other_head_dimensions_are_left_to_tiles():
    for dtype, dim in ((torch.bfloat16, 80), (torch.float32, 300)):
        query = torch.empty(2, 70, 4, dim, device="meta", dtype=dtype).requires_grad_()
        key = torch.empty(2, 70, 2, dim, device="meta", dtype=dtype)
        assert probe_attention(query, query, key, key).shape == query.shape
    wide = torch.zeros(1, 20, 2, checks.PROBE_MAX_DIM + 1)
    with pytest.raises(ValueError, match="head dimension 129; allowed are 1 to 128"):
        probe_attention(wide, wide, wide, wide, backend="triton")


def test_work_is_that_of_the_formulas():
    setting = cost.Setting(rows=16 * 16384, length=16384, dim=128, value_dim=128)
    kernels = probe_cost.kernel_work(setting)
    without = cost.kernel_work(setting)
    assert kernels["probe_forward"].flops == 2 * without["forward"].flops
    # Eleven products per score where attention takes seven.
    ours, theirs = (
        sum(work[k].flops for k in of) for work, of in ((kernels, probe_cost.BACKWARD), (without, cost.BACKWARD))
    )
    assert ours * 7 == theirs * 11
    # 8 D operations for each pair that is seen.
    assert probe_cost.call_flops(called([QUERY] * 4, Pattern(), 1.0)) == 8 * 16 * 2 * 40 * 41 // 2
    tile = probe_cost.tile_work("probe_forward", probe_launch.LaunchConfig(64, 32, 4, 2), setting)
    assert (tile.flops, tile.bytes) == (2 * 64 * 32 * 512, 32 * 256 * 2)
