"""The Triton backend as the public function sees it; and the interpreter tests, in a process of their own."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from delta_cases import FASTEST_DECAY, INPUTS, Case, call

from longmix_kernels.delta import cost, delta_rule, launch

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


def call_of(dim: int = 16, value_dim: int = 16, length: int = 20, chunk_size=None, bound=FASTEST_DECAY) -> launch.Call:
    query, value = torch.zeros(1, length, 2, dim), torch.zeros(1, length, 2, value_dim)
    return launch.Call(query, query, value, query, None, None, None, None, 1.0, chunk_size, bound)


def test_interpreter_matches_reference():
    """Rung 3: a whole test file in a process that has TRITON_INTERPRET=1 from the start."""
    file = "test_delta_triton_interpreted.py"
    done = run_python("-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    print(f"interpreter: {summary}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None and int(passed[1]) >= 50
    assert "skipped" not in summary


def test_importing_the_engine_does_not_import_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from longmix_kernels.delta import launch, delta_rule\n"
        "x = torch.ones(1, 4, 1, 8)\n"
        "delta_rule(x, x, x, log_decay=torch.zeros(1, 4, 1))\n"
        "try: delta_rule(x, x, x, log_decay=torch.zeros(1, 4, 1), backend='triton')\n"
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
    query, value = (torch.zeros(1, 20, 2, dim, dtype=dtype) for dim in dims)
    decay = torch.zeros(1, 20, 2, dtype=torch.promote_types(dtype, torch.float32))
    with pytest.raises(ValueError, match=message):
        delta_rule(query, query, value, log_decay=decay, backend="triton")


@pytest.mark.parametrize("bound", [0.1, -math.inf, math.nan])
def test_promises_that_mean_nothing_are_refused(bound):
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"min_log_decay is .*; allowed is a finite number, at most 0, or None"):
        delta_rule(x, x, x, log_decay=x, min_log_decay=bound)


def test_a_promise_changes_nothing_without_triton():
    case = Case("promise", length=40)
    inputs = case.inputs(torch.float32)
    for backend in ("reference", "blocked"):
        with_promise = call(delta_rule, case, inputs, backend=backend, min_log_decay=-0.1)
        assert all(map(torch.equal, with_promise, call(delta_rule, case, inputs, backend=backend)))


@pytest.mark.parametrize("low_rank", [True, False], ids=["low-rank", "diagonal"])
@pytest.mark.parametrize(("bound", "chunk"), [(FASTEST_DECAY, 32), (None, 16)])
def test_shapes_are_known_without_running(low_rank, bound, chunk):
    """The operators on tensors without data, as torch.compile sees them."""
    shape = (2, 70, 4, 80)
    query = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    value = torch.empty(2, 70, 4, 48, device="meta", dtype=torch.bfloat16)
    decay = torch.empty(shape, device="meta")
    reads = (query, query) if low_rank else (None, None)
    state = torch.empty(2, 4, 80, 48, device="meta")
    inputs = (query, query, value, decay, *reads, state, None, 1.0, None, bound)
    results = torch.ops.longmix.delta_triton(*inputs)
    chunks = -(-70 // chunk)
    low_rank_shapes = [(2, 4, chunks, 80, 80), (2, 4, 70, chunk)] if low_rank else [(0,), (0,)]
    assert [tuple(x.shape) for x in results] == [
        tuple(value.shape),
        tuple(state.shape),
        (2, 4, chunks, 80, 48),
        low_rank_shapes[0],
        (2, 4, 70, 80),
        low_rank_shapes[1],
        (2, 4, chunks, 80),
    ]
    half, single = torch.bfloat16, torch.float32
    assert [x.dtype for x in results] == [half, single, single, half, half, half, single]
    grads = torch.ops.longmix.delta_triton_backward(results[0], None, *results[2:], *inputs)
    assert [x.shape for x in grads] == [torch.Size([0]) if x is None else x.shape for x in inputs[: len(INPUTS)]]


@pytest.mark.parametrize(
    ("dims", "length", "bound", "wish", "expected"),
    [
        ((64, 64), 4096, FASTEST_DECAY, None, (64, True)),
        ((128, 64), 4096, FASTEST_DECAY, None, (32, True)),
        ((64, 256), 4096, FASTEST_DECAY, None, (16, True)),
        ((128, 128), 4096, FASTEST_DECAY, 64, (64, True)),
        ((64, 64), 4096, FASTEST_DECAY, 256, (64, True)),
        ((64, 64), 4096, FASTEST_DECAY, 16, (16, True)),
        ((64, 64), 33, FASTEST_DECAY, None, (64, True)),
        ((64, 64), 32, FASTEST_DECAY, None, (32, True)),
        ((64, 64), 1, FASTEST_DECAY, None, (16, True)),
        ((64, 64), 4096, 0.0, None, (64, True)),
        ((64, 64), 4096, -2.1, None, (64, True)),
        ((64, 64), 4096, -2.11, None, (32, True)),
        ((64, 64), 4096, -4.07, 64, (32, True)),
        ((64, 64), 4096, -4.08, None, (16, False)),
        ((64, 64), 4096, None, 64, (16, False)),
    ],
)
def test_chunks_follow_from_the_promise(dims, length, bound, wish, expected):
    assert cost.choose_chunk(*dims, length, wish, bound) == expected
    call = call_of(*dims, length=length, chunk_size=wish, bound=bound)
    assert (call.chunk, call.bounded) == expected
    if expected[1]:
        assert cost.exponent(expected[0], bound) <= cost.SPAN


def test_every_architecture_has_every_entry():
    for kernel in launch.KERNELS:
        for architecture in launch.ARCHITECTURES:
            for size in (2, 4):
                for width in launch.WIDTHS:
                    config = launch.TABLE[kernel, architecture, size, width]
                    assert launch.table_entry(kernel, architecture, size, width, 16) is config
                    assert launch.table_entry(kernel, architecture + 6, size, 16, width - 1) is config


@pytest.mark.parametrize(
    ("dim", "block"), [(1, 16), (16, 16), (48, 64), (64, 64), (80, 32), (96, 32), (100, 64), (144, 32), (256, 64)]
)
def test_blocks_waste_no_more_than_they_must(dim, block):
    assert launch.fit(64, dim) == block


def test_an_override_ends_with_its_context():
    config = launch.LaunchConfig(16, 16, 1, 1)
    call = call_of()
    default = launch.launch_config("prepare", call)
    with launch.overridden("prepare", config), launch.overridden("prepare", default):
        assert launch.launch_config("prepare", call) == default
    assert launch.launch_config("prepare", call) == default
    with launch.overridden("prepare", config):
        assert launch.launch_config("prepare", call) == config
        assert launch.launch_config("scan", call) != config or default == config
