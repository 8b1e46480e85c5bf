"""The Triton backend as the public function sees it; and the interpreter tests, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longmix_kernels.linear import launch, linear_attention
from longmix_kernels.linear.cost import LONGEST_CHUNK, default_chunk

HERE = Path(__file__).parent


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def call_of(
    dim: int = 16,
    value_dim: int = 16,
    length: int = 20,
    chunk_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> launch.Call:
    query, key = (torch.zeros(1, length, 2, dim, dtype=dtype, device=device) for _ in range(2))
    value = torch.zeros(1, length, 2, value_dim, dtype=dtype, device=device)
    decay = torch.zeros(1, length, 2, device=device)
    return launch.Call(query, key, value, decay, None, None, None, None, None, False, 1.0, chunk_size)


def test_interpreter_matches_reference():
    """Rung 3: a whole test file in a process that has TRITON_INTERPRET=1 from the start."""
    file = "test_linear_triton_interpreted.py"
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
        "from longmix_kernels.linear import launch, linear_attention\n"
        "x = torch.ones(1, 4, 1, 8)\n"
        "linear_attention(x, x, x, log_decay=torch.zeros(1))\n"
        "try: linear_attention(x, x, x, log_decay=torch.zeros(1), backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "backend='triton' got tensors on cpu" in done.stdout


@pytest.mark.parametrize(
    ("dtype", "dims", "message"),
    [
        (torch.float64, (16, 16), r"got query of dtype torch.float64; allowed are torch.float16, torch.b"),
        (torch.float32, (513, 16), r"got query with head dimension 513; allowed are 1 to 512"),
        (torch.float32, (16, 600), r"got value with head dimension 600; allowed are 1 to 512"),
    ],
    ids=["float64", "query-513", "value-600"],
)
def test_what_is_not_covered_is_refused(dtype, dims, message):
    query, value = (torch.zeros(1, 20, 2, dim, dtype=dtype) for dim in dims)
    decay = torch.zeros(2, dtype=torch.promote_types(dtype, torch.float32))
    with pytest.raises(ValueError, match=message):
        linear_attention(query, query, value, log_decay=decay, backend="triton")


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_shapes_are_known_without_running(normalize):
    """The operators on tensors without data, as torch.compile sees them."""
    query = torch.empty(2, 70, 4, 80, device="meta", dtype=torch.bfloat16)
    value = torch.empty(2, 70, 4, 48, device="meta", dtype=torch.bfloat16)
    gate = torch.empty(2, 70, 4, device="meta")
    memory = torch.empty(2, 4, 80, 48, device="meta")
    others = (memory[..., 0], memory[..., 0, 0]) if normalize else (None, None)
    inputs = (query, query, value, gate, gate, memory, *others, None, normalize, 0.1, None)
    results = torch.ops.longmix.linear_triton(*inputs)
    assert [x.dtype for x in results] == [torch.bfloat16] + [torch.float32] * 5
    shapes = [value.shape, memory.shape, (2, 4, 80), (2, 4), (2, 70, 4), (2, 70, 4)]
    assert [tuple(x.shape) for x in results] == [
        tuple(shape) if normalize or index < 2 else (0,) for index, shape in enumerate(shapes)
    ]
    saved = results[0], results[4], results[5]
    grads = torch.ops.longmix.linear_triton_backward(results[0], None, None, *saved, *inputs)
    assert [x.shape for x in grads] == [torch.Size([0]) if x is None else x.shape for x in inputs[:8]]


def test_every_architecture_has_every_entry():
    for kernel in launch.TILED:
        for architecture in launch.ARCHITECTURES:
            for size in (2, 4):
                for dims in ((64, 64), (64, 128), (128, 256), (256, 512), (512, 512)):
                    config = launch.TABLE[kernel, architecture, size, sum(dims)]
                    assert launch.table_entry(kernel, architecture, size, *dims) is config
                    assert launch.table_entry(kernel, architecture + 6, size, dims[0] - 1, dims[1]) is config


@pytest.mark.parametrize("chunk", [16, 64, 1024])
@pytest.mark.parametrize("dims", [(1, 3), (48, 96), (512, 512)], ids=str)
def test_tiles_divide_chunks_and_fit_head_dimensions(dims, chunk):
    for (kernel, *_), config in launch.TABLE.items():
        fitted = config.within(kernel, chunk, *dims)
        carries = kernel in ("states", "grad_states")
        assert chunk % fitted.rows == 0 and (carries or chunk % fitted.keys == 0)
        assert 16 <= fitted.block <= max(16, 2 * max(dims) - 1)


def test_an_override_ends_with_its_context():
    config = launch.LaunchConfig(16, 16, 16, 1, 1)
    call = call_of()
    default = launch.launch_config("output", call)
    with launch.overridden("output", config), launch.overridden("output", default):
        assert launch.launch_config("output", call) == default
    assert launch.launch_config("output", call) == default
    with launch.overridden("output", config):
        assert launch.launch_config("output", call) == config
        assert launch.launch_config("grad_query", call) != config


def test_states_are_stored_in_float32_unless_said_otherwise():
    call = call_of(length=40, chunk_size=16)
    with launch.stored_states(torch.bfloat16):
        assert call.new_states()[0].dtype == torch.bfloat16
    states, normalizers = call.new_states()
    assert states.dtype == torch.float32 and states.shape == (1, 2, 3, 16, 16) and normalizers is None


@pytest.mark.parametrize(
    ("dims", "length", "chunk"),
    [
        ((64, 64), 8192, 128),
        ((128, 256), 8192, 256),
        ((256, 512), 8192, 256),
        ((16, 16), 8192, 64),
        ((128, 256), 100, 128),
        ((128, 256), 20, 32),
        ((128, 256), 1, 16),
    ],
)
def test_chunks_follow_from_the_cost_model(dims, length, chunk):
    assert default_chunk(*dims, length) == chunk
    assert call_of(*dims, length=length).chunk == chunk
    assert call_of(*dims, length=length, chunk_size=4096).chunk <= LONGEST_CHUNK
