"""Tensors as arguments of kernels: one compiled kernel for all, and no copy of what is the same for all rows."""

import pytest
import torch

from longmix_kernels.tensors import per_row, strided

LENGTHS = (1, 37, 64, 1001)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_bounds_have_strides_that_triton_takes_for_one_kernel(shape, length):
    x = torch.arange(shape[0] * shape[1] * length, dtype=torch.int32).view(*shape, length)
    (found,) = per_row(x)
    assert found.stride_batch % 16 == found.stride_head % 16 == 0
    for batch in range(shape[0]):
        for head in range(shape[1]):
            begin = (batch * found.stride_batch + head * found.stride_head) // 16 * length
            assert torch.equal(found.pointer.flatten()[begin : begin + length], x[batch, head])


def test_one_row_for_all_is_not_copied():
    x = torch.zeros(1, 1, 64, dtype=torch.int32)
    for expanded in (x, x.expand(2, 1, 64), x.expand(2, 3, 64)):
        (found,) = per_row(expanded)
        assert found.pointer.data_ptr() == x.data_ptr() and found[1:] == (0, 0)
    per_head = torch.zeros(1, 3, 64, dtype=torch.int32)
    (found,) = per_row(per_head.expand(2, 3, 64))
    assert found.pointer.data_ptr() == per_head.data_ptr() and found[1:] == (0, 16)
    assert per_row(None) == [None]


def test_a_tensor_comes_with_its_strides():
    x = torch.zeros(2, 5, 3, 16)
    assert [matrix[1:] for matrix in strided(x, x[:1], x[..., :8])] == [(240, 48, 16), (0, 48, 16), (240, 48, 16)]
