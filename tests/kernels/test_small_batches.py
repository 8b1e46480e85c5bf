"""Small batches: kernels that go from chunk to chunk take narrower tiles where a GPU would have idle processors."""

import pytest
import torch
from engine_contract import compiles

from longmix_kernels.delta import launch as delta
from longmix_kernels.delta.inputs import Inputs as DeltaInputs
from longmix_kernels.linear import launch as linear
from longmix_kernels.linear.inputs import Inputs as LinearInputs
from longmix_kernels.linear.triton_forward import triton_forward
from longmix_kernels.simulated import simulated_gpu

H200 = 132


def linear_inputs(batch: int, dtype: torch.dtype = torch.bfloat16, length: int = 256) -> LinearInputs:
    """Heads as `model=125m mixer=mlstm_tfla` has them."""
    query = torch.zeros(batch, length, 4, 96, dtype=dtype)
    gates = torch.zeros(batch, length, 4)
    value = torch.zeros(batch, length, 4, 192, dtype=dtype)
    return LinearInputs(query, query, value, gates, *[None] * 8, False, 1.0, None)


def delta_inputs(batch: int) -> DeltaInputs:
    """Heads as `model=125m mixer=rwkv7` has them."""
    x = torch.zeros(batch, 64, 12, 64, dtype=torch.bfloat16)
    return DeltaInputs(x, x, x, x.float(), x, x, None, None, None, 1.0, None, -0.6)


@pytest.mark.parametrize(
    ("batch", "processors", "values", "programs"),
    [
        (1, H200, 32, 48),
        (2, H200, 32, 96),
        (3, H200, 32, 144),
        (6, H200, 64, 144),
        (16, H200, 128, 256),
        (2, 40, 64, 48),
        (2, 16, 128, 32),
    ],
)
def test_linear_states_have_as_many_programs_as_there_are_processors(batch, processors, values, programs):
    with simulated_gpu(90, processors=processors):
        call = linear.Call(linear_inputs(batch))
        for kernel in linear.CARRYING:
            config = call.config(kernel)
            assert (config.keys, call.programs(kernel, config)) == (values, programs)
            assert config.block == 64


@pytest.mark.parametrize(("batch", "values", "programs"), [(1, 16, 48), (4, 16, 192), (8, 32, 192)])
def test_delta_scans_have_as_many_programs_as_there_are_processors(batch, values, programs):
    with simulated_gpu(90, processors=H200):
        call = delta.Call(delta_inputs(batch))
        for kernel in delta.SCANS:
            config = call.config(kernel)
            assert (config.values, call.programs(kernel, config)) == (values, programs)


def test_batch_sizes_take_few_configurations_and_other_kernels_one():
    with simulated_gpu(90, processors=H200):
        calls = [linear.Call(linear_inputs(batch, length=64)) for batch in range(1, 80)]
        found = {kernel: {call.config(kernel) for call in calls} for kernel in linear.TILED}
    assert {kernel: len(configs) for kernel, configs in found.items()} == {
        kernel: 3 if kernel in linear.CARRYING else 1 for kernel in linear.TILED
    }


@compiles
def test_kernels_are_launched_with_it():
    with simulated_gpu(90, processors=H200) as gpu:
        triton_forward(linear_inputs(2))
    (launched,) = gpu.launches["states_kernel"]
    assert (launched["VALUE_BLOCK"], launched["grid"]) == (32, 96)


def test_an_override_is_launched_as_it_is():
    config = linear.LaunchConfig(64, 128, 64, 4, 3)
    with simulated_gpu(90, processors=H200), linear.TABLE.override("states", config):
        assert linear.Call(linear_inputs(1)).config("states") == config
