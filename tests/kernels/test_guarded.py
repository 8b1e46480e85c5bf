"""Tensors laid into NaN are read in place: a copy of them would have no NaN beside it."""

import pytest
import torch
from guarded import beside, surrounded

from longmix_kernels.tensors import contiguous, gate, unit_stride


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 40, 2), (2, 17, 3), (1, 1, 1, 16), (2, 35, 3, 5), (3, 7, 2, 144)])
def test_kernels_take_the_tensor_itself(shape, dtype):
    x = surrounded(torch.zeros(shape, dtype=dtype))
    assert gate(x) is x and unit_stride(x) is x
    state = beside(torch.zeros(shape, dtype=dtype))
    assert contiguous(state)[0] is state


def test_a_step_beside_it_is_nan():
    x = surrounded(torch.zeros(2, 3, 4, 5)).detach()
    outside = x.as_strided((4, 5, 6, 7), x.stride(), x.storage_offset() - sum(x.stride())).clone()
    outside[1:-1, 1:-1, 1:-1, 1:-1] = torch.nan
    assert outside.isnan().all()
