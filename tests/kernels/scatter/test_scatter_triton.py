"""The Triton backend as the public function sees it; and the interpreter tests, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scatter_cases import Case

from longmix_kernels.scatter import launch, scatter_attention

HERE = Path(__file__).parent


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=550,
    )


def call_of(case: Case, dtype: torch.dtype = torch.float32) -> launch.Call:
    inputs = case.inputs(dtype).values()
    return launch.Call(*inputs, case.document_ids(), case.block_size, case.past_blocks, 1.0)


def test_interpreter_matches_reference():
    """Rung 3: a whole test file in a process that has TRITON_INTERPRET=1 from the start."""
    file = "test_scatter_triton_interpreted.py"
    done = run_python("-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 50 and "skipped" not in done.stdout


def test_importing_the_engine_does_not_import_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from longmix_kernels.scatter import launch, scatter_attention\n"
        "x = torch.ones(1, 4, 1, 8)\n"
        "scatter_attention(x, x, x, x, x, block_size=1, past_blocks=0)\n"
        "try: scatter_attention(x, x, x, block_size=1, past_blocks=0, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "backend='triton' got tensors on cpu" in done.stdout


@pytest.mark.parametrize(
    ("dtype", "dims", "message"),
    [
        (torch.float64, (16, 16), r"got query of dtype torch.float64; allowed are torch.float16, torch.b"),
        (torch.float32, (257, 16), r"got query with head dimension 257; allowed are 1 to 256"),
        (torch.float32, (16, 300), r"got value with head dimension 300; allowed are 1 to 256"),
    ],
    ids=["float64", "query-257", "value-300"],
)
def test_what_is_not_covered_is_refused(dtype, dims, message):
    query, value = (torch.zeros(1, 4, 1, dim, dtype=dtype) for dim in dims)
    with pytest.raises(ValueError, match=r"backend='triton' " + message):
        scatter_attention(query, query, value, block_size=2, past_blocks=0, backend="triton")


@pytest.mark.parametrize("features", [0, 6])
def test_shapes_are_known_without_running(features):
    """The operators on tensors without data, as torch.compile sees them."""
    query, value = (torch.empty(2, 70, 4, dim, device="meta", dtype=torch.bfloat16) for dim in (80, 48))
    logs = torch.empty(2, 70, 4, features, device="meta") if features else None
    inputs = (query, query, value, logs, logs, None, None, None, None, 16, 1, 0.1)
    results = torch.ops.longmix.scatter_triton(*inputs)
    assert [tuple(x.shape) for x in results] == [(2, 70, 4, 48), (2, 70, 4), (2, 70, 4)]
    assert [x.dtype for x in results] == [torch.bfloat16, torch.float32, torch.float32]
    grads = torch.ops.longmix.scatter_triton_backward(results[0], None, *results[:2], *inputs)
    assert [x.shape for x in grads] == [torch.Size([0]) if x is None else x.shape for x in inputs[:8]]


def test_every_architecture_has_every_entry():
    for kernel in launch.KERNELS:
        for architecture in launch.ARCHITECTURES:
            for size in (2, 4):
                config = launch.TABLE[kernel, architecture, size]
                assert launch.table_entry(kernel, architecture + 6, size) is config
                assert (config.rows == 0) == (kernel in launch.SCANS)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((128, 64, 128), (128, 64, 128, 8)),
        ((64, 64, 128), (64, 64, 128, 4)),
        ((100, 64, 96), (128, 64, 128, 8)),
        ((5, 1, 3), (16, 16, 16, 4)),
        ((256, 80, 144), (128, 32, 32, 8)),
        ((16, 20, 256), (16, 32, 128, 4)),
    ],
    ids=str,
)
def test_tiles_fit_blocks_features_and_columns(sizes, expected):
    config = launch.LaunchConfig(128, 64, 128, 8, 2).within(*sizes)
    assert (config.rows, config.features, config.values, config.warps) == expected


def test_the_scans_take_every_column_at_once():
    config = launch.LaunchConfig(0, 8, 0, 4, 3)
    assert config.within(128, 64, 80) == launch.LaunchConfig(0, 8, 128, 4, 3)
    assert config.within(128, 3, 200) == launch.LaunchConfig(0, 4, 256, 4, 3)
    assert config.tiles() == {"STAGES": 3, "FEATURE_BLOCK": 8, "VALUE_BLOCK": 0}


def test_a_call_knows_its_blocks():
    plain = call_of(Case("plain", length=50, queries=30))
    assert (plain.slots, plain.block_size, plain.stride_blocks, plain.whole) == (7, 8, 0, True)
    packed = call_of(Case("packed", length=50, documents=(20,)))
    assert packed.stride_blocks == 7 * 4 and not packed.whole
    config = launch.LaunchConfig(16, 4, 8, 1, 1)
    assert packed.sums_programs(config) == (7 * 2 * 2 * 2 * 2,)
    assert packed.scan_programs(config) == (2 * 2 * 2,) and packed.row_tiles(config) == 1


def test_gradients_that_no_kernel_writes_are_zero():
    """Queries that have no far keys yet, and keys that no query sees as such."""
    for case, queries, keys in (
        (Case("plain", length=50), slice(16), slice(40, 50)),
        (Case("fewer", length=50, queries=40), slice(6), slice(40, 50)),
        (Case("none", length=50, queries=5), slice(0), slice(40, 50)),
        (Case("packed", length=50, documents=(20,)), slice(50), slice(50)),
    ):
        call = call_of(case)
        call.value = call.value.detach().fill_(torch.nan)
        grads = call.new_grad_features()
        for grad, zero in zip(grads, (queries, keys), strict=True):
            assert grad[:, zero].count_nonzero() == 0, case.name


def test_an_override_ends_with_its_context():
    call = call_of(Case("override"))
    config = launch.LaunchConfig(16, 16, 16, 1, 1)
    default = launch.launch_config("merge", call)
    with launch.overridden("merge", config):
        assert launch.launch_config("merge", call).rows == 16
        assert launch.launch_config("grad_query", call) == default
    assert launch.launch_config("merge", call) == default
