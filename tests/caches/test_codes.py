"""Codes against an implementation of their formulas."""

import pytest
import torch

from longmix.caches.codes import by_channel, by_token
from longmix_kernels.attention import Codes
from longmix_kernels.attention.segments import read, unpacked
from tests.caches.direct import case


def head_major(x):
    return x.unsqueeze(0).transpose(1, 2)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_codes_and_what_they_stand_for(number):
    given = case("inference_side/groupwise_own", number)
    bits, group = int(given["bits"]), int(given["group"])
    for name, code in (("key", by_channel), ("value", by_token)):
        size = group if name == "key" else min(group, given["value"].shape[-1])
        found = code(head_major(given[name]), bits, size, torch.float32)
        assert torch.equal(found.codes, head_major(given[f"{name}_packed"]).to(torch.uint8))
        assert torch.equal(unpacked(found.codes, bits), head_major(given[f"{name}_codes"]).to(torch.uint8))
        for part in ("low", "step"):
            assert torch.equal(getattr(found, part).double(), head_major(given[f"{name}_{part}"]))
        numbers = read(found.codes, Codes(bits, found.low, found.step), torch.float64)
        torch.testing.assert_close(numbers, head_major(given[f"{name}_read"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_number_is_within_half_a_step(bits, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    for found in (by_channel(x, bits, 8, dtype), by_token(x, bits, 4, dtype)):
        numbers = read(found.codes, Codes(bits, found.low, found.step), torch.float64)
        step = found.step.double()
        for axis in (2, 3):
            step = step.repeat_interleave(x.shape[axis] // step.shape[axis], axis)
        rounded = 2**bits * torch.finfo(dtype).eps * 8  # of low, and of the step times the largest code
        assert ((numbers - x).abs() <= step / 2 + rounded).all()


def test_numbers_that_are_alike_or_too_large_stay_finite():
    alike = torch.full((1, 1, 4, 4), 3.0, dtype=torch.float64)
    large = torch.tensor([-1e9, 0.0, 1.0, 1e9], dtype=torch.float64).expand(1, 1, 4, 4)
    for code in (by_channel, by_token):
        found = code(alike, 2, 4, torch.float16)
        assert (found.codes == 0).all() and (found.step == 0).all()
        assert (read(found.codes, Codes(2, found.low, found.step), torch.float64) == 3).all()
        found = code(large, 2, 4, torch.float16)
        assert read(found.codes, Codes(2, found.low, found.step), torch.float64).isfinite().all()


def test_rows_have_parameters_of_their_own():
    x = torch.randn(2, 1, 8, 4)
    for code in (by_channel, by_token):
        together, alone = (
            code(x * torch.tensor([1.0, 50.0])[:, None, None, None], 4, 4, torch.float16),
            code(x[:1], 4, 4, torch.float16),
        )
        assert all(torch.equal(a[:1], b) for a, b in zip(together, alone, strict=True))
