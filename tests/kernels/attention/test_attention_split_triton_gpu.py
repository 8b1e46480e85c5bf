"""Rung 5: few queries over keys in parts on a CUDA GPU (`pytest -m gpu`)."""

import pytest
import torch

from longmix_kernels.attention import attention, split_launch
from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.reference import reference_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CALLS = {
    "decode": ((1, 1, 8, 8, 128, 16384), {}),
    "decode-gqa": ((2, 1, 32, 8, 128, 9001), {}),
    "fifteen-queries-mqa": ((1, 15, 8, 1, 64, 5000), {}),
    "window": ((1, 3, 8, 8, 64, 20000), {"window": 4096}),
    "documents": ((1, 4, 8, 2, 80, 7000), {"document_ids": 3000}),
    "full-d256": ((1, 2, 4, 4, 256, 4096), {"causal": False}),
}


def call(name: str, dtype: torch.dtype):
    """Query, key and value, what to call with, and the bounds that this means."""
    (batch, queries, heads, key_heads, dim, keys), options = CALLS[name]
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (queries, heads), (keys, key_heads), (keys, key_heads)
    tensors = [torch.randn(batch, rows, own, dim, device="cuda", generator=generator).to(dtype) for rows, own in sizes]
    if "document_ids" in options:
        border = torch.arange(keys, device="cuda").expand(batch, -1) >= options["document_ids"]
        options = {"document_ids": border.int()}
    assert split_launch.Call(Inputs(*tensors, Pattern(window=options.get("window")), 1.0)).splits > 1
    return tensors, options, row_bounds(queries, keys, device="cuda", **options)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parts_are_as_accurate_as_the_whole(name, dtype):
    """Error at most twice that of the forward kernel over all keys, which a wish for gradients chooses."""
    tensors, options, bounds = call(name, dtype)
    exact, _ = reference_forward(Inputs(*(x.double() for x in tensors), Pattern(*bounds), tensors[0].shape[-1] ** -0.5))
    whole = attention(tensors[0].clone().requires_grad_(), *tensors[1:], **options).detach()
    parts = attention(*tensors, **options)
    for measure in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
        floor = torch.finfo(dtype).eps * measure(exact)
        assert measure(parts.double() - exact) <= 2 * measure(whole.double() - exact) + floor


@pytest.mark.parametrize("name", CALLS)
def test_float32_parts_match_the_reference(name):
    tensors, options, bounds = call(name, torch.float32)
    wanted = reference_forward(Inputs(*(x.double() for x in tensors), Pattern(*bounds), tensors[0].shape[-1] ** -0.5))
    for found, exact in zip(attention(*tensors, return_logsumexp=True, **options), wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_two_runs_of_parts_are_equal_bit_for_bit(name):
    tensors, options, _ = call(name, torch.bfloat16)
    assert torch.equal(attention(*tensors, **options), attention(*tensors, **options))
