"""The choice of an implementation, shared by the engines."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longmix_kernels.runtime import assumed_device, check_triton_device, choose_backend, is_readable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("backend", "device", "implemented", "chosen"),
    [
        (None, CPU, ("reference", "blocked"), "blocked"),
        (None, CPU, ("reference", "blocked", "triton"), "blocked"),
        (None, CUDA, ("reference", "blocked", "triton"), "triton"),
        (None, CUDA, ("reference", "blocked"), "blocked"),
        ("reference", CUDA, ("reference", "blocked", "triton"), "reference"),
        ("triton", CPU, ("reference", "blocked", "triton"), "triton"),
    ],
)
def test_choice(backend, device, implemented, chosen):
    assert choose_backend(backend, device, implemented) == chosen


def test_unknown_name_says_what_is_allowed():
    with pytest.raises(ValueError, match=r"backend='cuda' is not available here; allowed are None, 'reference', 'b"):
        choose_backend("cuda", CPU, ("reference", "blocked"))


def test_fake_tensors_may_stand_for_those_of_a_device_that_is_not_there():
    cpu, names = torch.device("cpu"), ("blocked", "triton")
    with assumed_device("cuda"):
        assert choose_backend(None, cpu, names) == "triton"
        check_triton_device(cpu)
        with assumed_device("cpu"):
            assert choose_backend(None, cpu, names) == "blocked"
        assert choose_backend("blocked", cpu, names) == "blocked"
    assert choose_backend(None, cpu, names) == "blocked"


def test_only_real_values_on_a_cpu_are_read():
    ids = torch.zeros(1, 4, dtype=torch.int32)
    assert is_readable(ids)
    assert not is_readable(ids.to("meta"))
    with FakeTensorMode():
        assert not is_readable(torch.empty(1, 4))
