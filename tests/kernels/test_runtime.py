"""The choice of an implementation, shared by the engines."""

import pytest
import torch

from longmix_kernels.runtime import choose_backend

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
