"""The Triton backend as the public function sees it; and the interpreter tests, in a process of their own."""

from pathlib import Path

import pytest
import torch
from engine_contract import assert_passes_in_the_interpreter

from longmix_kernels.linear import launch
from longmix_kernels.linear.cost import LONGEST_CHUNK, default_chunk
from longmix_kernels.linear.inputs import Inputs


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
    return launch.Call(Inputs(query, key, value, decay, *[None] * 8, False, 1.0, chunk_size))


@pytest.mark.slow
def test_interpreter_matches_reference():
    assert_passes_in_the_interpreter(Path(__file__).with_name("test_linear_triton_interpreted.py"), at_least=50)


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_shapes_are_known_without_running(normalize):
    """The operators on tensors without data, as torch.compile sees them."""
    query = torch.empty(2, 70, 4, 80, device="meta", dtype=torch.bfloat16)
    value = torch.empty(2, 70, 4, 48, device="meta", dtype=torch.bfloat16)
    gate = torch.empty(2, 70, 4, device="meta")
    memory = torch.empty(2, 4, 80, 48, device="meta")
    others = (memory[..., 0], memory[..., 0, 0]) if normalize else (None, None)
    inputs = (query, query, value, gate, gate, memory, *others, memory, *others, None, normalize, 0.1, None)
    results = torch.ops.longmix.linear_triton(*inputs)
    assert [x.dtype for x in results] == [torch.bfloat16] + [torch.float32] * 5
    shapes = [value.shape, memory.shape, (2, 4, 80), (2, 4), (2, 70, 4), (2, 70, 4)]
    assert [tuple(x.shape) for x in results] == [
        tuple(shape) if normalize or index < 2 else (0,) for index, shape in enumerate(shapes)
    ]
    saved = results[0], results[4], results[5]
    grads = torch.ops.longmix.linear_triton_backward(results[0], None, None, *saved, *inputs)
    assert [x.shape for x in grads] == [torch.Size([0]) if x is None else x.shape for x in inputs[:11]]


@pytest.mark.parametrize("chunk", [16, 64, 1024])
@pytest.mark.parametrize("dims", [(1, 3), (48, 96), (512, 512)], ids=str)
def test_tiles_divide_chunks_and_fit_head_dimensions(dims, chunk):
    for (kernel, *_), config in launch.TABLE.entries.items():
        if kernel in launch.GATED:
            continue
        if kernel in launch.STEPS:
            assert 16 <= config.within(kernel, chunk, *dims).keys <= max(16, 2 * dims[1] - 1)
            continue
        fitted = config.within(kernel, chunk, *dims)
        carries = kernel in launch.CARRYING
        assert chunk % fitted.rows == 0 and (carries or chunk % fitted.keys == 0)
        assert 16 <= fitted.block <= max(16, 2 * max(dims) - 1)


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
