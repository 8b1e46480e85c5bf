"""Rung 4: no row of a launch table takes more shared memory than its GPU has, with whatever a call has besides."""

from collections.abc import Iterator

import pytest
from engine_contract import compiles

from longmix_kernels.accelerators import ARCHITECTURES, SHARED_MEMORY
from longmix_kernels.aot import Build
from longmix_kernels.attention import report as attention
from longmix_kernels.delta import report as delta
from longmix_kernels.linear import report as linear
from longmix_kernels.scatter import report as scatter

# Each took too much with the tiles of sm_80, or comes close to 99 KiB.
TIGHT = [
    linear.Build("grad_query", 86, "bf16", 96, 192, "exp", "documents-state"),
    linear.Build("grad_query", 89, "bf16", 128, 256, "sig", "documents-state"),
    linear.Build("grad_query", 120, "bf16", 256, 512, "sig"),
    linear.Build("output", 86, "bf16", 64, 128),
    attention.Build("grad_query", 89, "bf16", 256, 256, "documents", "permuted"),
    attention.Build("grad_query", 120, "bf16", 192, 192),
    scatter.Build("grad_query", 120, "bf16", 256, 256),
    scatter.Build("grad_key", 86, "bf16", 256, 256),
]


def every_row(architecture: int, dtype: str, features: bool = False) -> Iterator[Build]:
    """Every kernel at the largest head dimensions of each row of its table, also with less common features."""
    common, others = [("documents", "plain")], [("bounds", "permuted"), ("causal", "alibi"), ("causal", "blocks")]
    for mode, feature in [*common, *(others if features else ())]:
        yield from attention.table_builds(
            (architecture,), attention.launch.WIDTHS, (dtype,), modes=(mode,), features=(feature,)
        )
    dims = ((64, 64), (64, 128), (128, 256), (256, 512), (512, 512))
    for build in linear.table_builds(
        (architecture,), dims, ("exp",), ("documents-state", "plain")[: 1 + features], dtype
    ):
        if build.kernel in linear.launch.TILED:
            yield build
    decays = delta.cost.DECAYS[: None if features else 1]
    yield from delta.table_builds((architecture,), delta.DIMS, decays, ("documents-state",), dtype=dtype)
    yield from scatter.table_builds((architecture,), ((256, 128), (256, 256)), (256,), dtype=dtype)


def name(build: Build) -> str:
    columns = [str(x) for key, x in build.columns().items() if not key.startswith("tile_")]
    return "-".join((build.kernel, f"sm{build.architecture}", build.dtype, *columns))


@pytest.mark.sampled(8)
@compiles
@pytest.mark.parametrize("build", TIGHT, ids=name)
def test_a_tile_fits_where_it_is_tight(build):
    assert build.shared() <= SHARED_MEMORY[build.architecture]


@compiles
@pytest.mark.every_row
@pytest.mark.parametrize("build", [*every_row(86, "bf16", True), *every_row(120, "bf16")], ids=name)
def test_every_row_fits_where_there_is_the_least(build):
    """sm_89 has the code of sm_86; the other architectures stand in the tests of their engines' reports."""
    assert build.shared() <= SHARED_MEMORY[build.architecture]


@compiles
@pytest.mark.every_row
@pytest.mark.parametrize("build", [*every_row(86, "fp32")], ids=name)
def test_every_row_for_float32_fits(build):
    """Tiles for float32 are the same everywhere, and those of the others have more room."""
    assert build.shared() <= SHARED_MEMORY[build.architecture]


def test_the_limit_of_every_architecture_is_known():
    assert set(ARCHITECTURES) <= set(SHARED_MEMORY)
