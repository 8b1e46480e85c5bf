"""A GPU that is not there: fake tensors launch and specialise what real ones do, and no values are looked at."""

import pytest
import torch
from engine_contract import compiles
from test_variants import CALLS, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from longmix_kernels import attention, launch
from longmix_kernels.attention.launch import describable
from longmix_kernels.runtime import is_readable
from longmix_kernels.simulated import FakeCalls, SimulatedGPU, simulated_gpu


def launched(name: str, fake: bool) -> SimulatedGPU:
    call, _ = CALLS[name]
    with simulated_gpu(90, processors=132) as gpu:
        if fake:
            with FakeTensorMode(), FakeCalls():
                call(**tensors(2, 300, 4)).sum().backward()
        else:
            call(**tensors(2, 300, 4)).sum().backward()
    return gpu


@compiles
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_launch_what_real_ones_do(name):
    fake, real = (launched(name, fake) for fake in (True, False))
    assert fake.num_launches() >= 2
    assert fake.launches == real.launches
    assert fake.variants == real.variants


@compiles
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_fake_tensors_begin_where_they_say(offset):
    """A tensor that begins elsewhere than at 16 bytes is copied, so that its strides are others."""
    found = []
    for mode in (FakeTensorMode(), torch.device("cpu")):
        with simulated_gpu(90) as gpu, mode, FakeCalls():
            memory = torch.zeros(4 * 100 * 2 * 64 + offset, dtype=torch.bfloat16)[offset:]
            query = memory.view(1, 100, 4, 2, 64)[:, :, 0]
            attention(query, query, query)
        found.append((gpu.launches, gpu.variants))
    assert found[0] == found[1]


def test_values_of_a_simulated_gpu_are_not_looked_at():
    x = torch.zeros(4)
    assert is_readable(x)
    with simulated_gpu(90):
        assert not is_readable(x)


@pytest.mark.parametrize(("architecture", "found"), [(80, False), (90, True)])
def test_descriptors_are_made_where_the_simulated_gpu_has_them(architecture, found):
    with simulated_gpu(architecture):
        assert describable(torch.zeros(1, 16, 2, 64)) == found


def test_all_is_as_before_once_the_context_ends():
    from triton.runtime.jit import JITFunction

    own = vars(JITFunction)["run"], launch.architecture_of, launch.processors_of, launch._too_large
    with pytest.raises(ZeroDivisionError), simulated_gpu(90):
        assert launch.architecture_of(None) == 90
        raise ZeroDivisionError
    assert (vars(JITFunction)["run"], launch.architecture_of, launch.processors_of, launch._too_large) == own
