"""Merging sets of keys through their logsumexp, low-rank biases as columns, and the builders of block lists."""

import itertools
import math

import pytest
import torch
from attention_cases import assert_close

from longmix_kernels.attention import (
    attention,
    bias_columns,
    block_list,
    butterfly_blocks,
    merge,
    row_bounds,
    sink_and_local_blocks,
    stripe_blocks,
)


def inputs(length: int = 50, heads: int = 2, dtype: torch.dtype = torch.float64, dim: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = 2, length, heads, dim
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def split_bounds(cuts: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Causal bounds cut into runs of keys."""
    _, hi = row_bounds(50, 50)
    edges = zip([0, *cuts], [*cuts, 50], strict=True)
    return [(torch.full_like(hi, start), hi.clamp(start, stop)) for start, stop in edges]


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("cuts", [[], [20], [7, 7, 49]], ids=str)
def test_parts_merge_into_the_whole_with_all_gradients(cuts, backend):
    tensors = inputs()
    parts = [attention(*tensors, lo=lo, hi=hi, return_logsumexp=True, backend=backend) for lo, hi in split_bounds(cuts)]
    merged, whole = merge(parts), attention(*tensors, return_logsumexp=True, backend=backend)
    grads = [torch.randn_like(x) for x in whole]
    names = "output", "logsumexp", "query", "key", "value"
    merged = [*merged, *torch.autograd.grad(merged, tensors, grads)]
    whole = [*whole, *torch.autograd.grad(whole, tensors, grads)]
    for name, a, b in zip(names, merged, whole, strict=True):
        assert_close(a, b, 1e-12, name)


def test_a_row_that_sees_nothing_anywhere_stays_empty_and_sends_nothing():
    tensors = inputs()
    _, hi = row_bounds(50, 50)
    nothing = (hi - 5).clamp(min=0)
    parts = [attention(*tensors, lo=lo, hi=nothing.clamp(min=lo), return_logsumexp=True) for lo in (hi * 0, hi * 0 + 9)]
    output, logsumexp = merge(parts)
    assert not output[:, :4].any() and logsumexp[:, :4].isneginf().all() and logsumexp[:, 5:].isfinite().all()
    grads = torch.autograd.grad((output, logsumexp), tensors, (torch.ones_like(output), torch.ones_like(logsumexp)))
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][:, :4].any()


def test_merging_keeps_the_dtype_and_survives_extreme_scores():
    output, logsumexp = torch.ones(1, 3, 1, 4, dtype=torch.bfloat16), torch.tensor([-1e4, 0.0, 1e4]).view(1, 3, 1)
    merged, total = merge([(output, logsumexp), (2 * output, -logsumexp)])
    assert merged.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert torch.equal(merged[0, :, 0, 0], torch.tensor([2.0, 1.5, 1.0]).bfloat16())
    assert torch.equal(total.flatten(), torch.tensor([1e4, math.log(2.0), 1e4]))


def biased(query, key, value, bias_query, bias_key, scale=None):
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * (scale or query.shape[-1] ** -0.5)
    scores = scores + torch.einsum("bihr,bjhr->bhij", *(x.expand(2, -1, 2, -1) for x in (bias_query, bias_key)))
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("batch_and_heads", [(2, 2), (1, 1), (1, 2)], ids=str)
def test_bias_columns_add_their_product_and_carry_its_gradients(batch_and_heads):
    tensors = inputs()
    batch, heads = batch_and_heads
    factors = [torch.randn(batch, 50, heads, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]
    wide_query, wide_key, scale = bias_columns(*tensors[:2], *factors, scale=0.3)
    output = attention(wide_query, wide_key, tensors[2], scale=scale)
    oracle = biased(*tensors, *factors, scale=0.3)
    grad = torch.randn_like(output)
    assert_close(output, oracle, 1e-12, "output")
    every = [*tensors, *factors]
    for a, b in zip(*(torch.autograd.grad(x, every, grad) for x in (output, oracle)), strict=True):
        assert_close(a, b, 1e-12, "gradient")


def slope_factors(length: int, slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ALiBi up to what is equal for all keys of a row: slope times key position."""
    position = torch.arange(length, dtype=torch.float32).view(1, -1, 1, 1)
    return slopes.view(1, 1, -1, 1).expand(1, length, -1, 1), position


def test_alibi_is_a_bias_of_rank_one():
    tensors, slopes = inputs(), torch.tensor([0.5, 0.0625])
    wide_query, wide_key, scale = bias_columns(*tensors[:2], *(x.double() for x in slope_factors(50, slopes)))
    columns = attention(wide_query, wide_key, tensors[2], scale=scale)
    assert_close(attention(*tensors, alibi_slopes=slopes), columns, 1e-12, "output")
    later = attention(*tensors, alibi_slopes=1e3 * slopes[:1].expand(2))
    assert_close(
        later, tensors[2], 1e-12, "a steep slope leaves the row's own value: distance is punished, not rewarded"
    )


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 4), (torch.float16, 4), (torch.float32, 1)], ids=str)
@pytest.mark.parametrize("length", [1024, 65536])
def test_positions_stay_exact_in_every_dtype(dtype, digits, length):
    """The bias of the last row, summed in float64 from the columns as they are stored."""
    query, key = (torch.zeros(1, length, 1, 64, dtype=dtype) for _ in range(2))
    wide_query, wide_key, scale = bias_columns(query, key, *slope_factors(length, torch.tensor([0.5])))
    assert wide_query.shape[-1] == 64 + digits and wide_query.dtype == dtype
    bias = (wide_query[0, -1, 0].double() * wide_key[0, :, 0].double()).sum(-1) * scale
    assert torch.equal(bias, 0.5 * torch.arange(length, dtype=torch.float64))


def test_two_digits_carry_the_gradient_of_one_number():
    query, key, value = (x.detach().bfloat16() for x in inputs())
    factors = [torch.randn(1, 50, 1, 2).requires_grad_() for _ in range(2)]
    wide_query, wide_key, scale = bias_columns(query, key, *factors)
    output = attention(wide_query.float(), wide_key.float(), value.float(), scale=scale)
    exact = biased(query.double(), key.double(), value.double(), *(x.double() for x in factors))
    assert_close(output, exact, 1e-4, "output")
    grad = torch.randn_like(exact)
    ours, wanted = torch.autograd.grad(output, factors, grad.float()), torch.autograd.grad(exact, factors, grad)
    for a, b in zip(ours, wanted, strict=True):
        assert_close(a, b, 1e-2, "gradient")  # the digits that a gradient is multiplied with are rounded to 8 bits


def test_factors_that_do_not_fit_are_refused():
    query, key, _ = inputs()
    good = torch.zeros(1, 50, 2, 3)
    for bad in (good[:, :9], good[..., :2], good.expand(3, -1, -1, -1), good[0]):
        with pytest.raises(ValueError, match="bias_key has shape"):
            bias_columns(query, key, good, bad)


BLOCKS = {
    "sink-local": (sink_and_local_blocks, {"sink": 1, "local": 2}, lambda r, c: c == 0 or r - c < 2),
    "no-sink": (sink_and_local_blocks, {"sink": 0, "local": 3}, lambda r, c: r - c < 3),
    "stripe": (stripe_blocks, {"local": 2, "stride": 3}, lambda r, c: c % 3 == 2 or r - c < 2),
    "butterfly": (butterfly_blocks, {}, lambda r, c: r - c in (0, 1, 2, 4, 8, 16)),
}


@pytest.mark.parametrize(("make", "options", "rule"), BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("length", [1, 16, 300])
def test_block_patterns(make, options, rule, length):
    blocks = make(length, 16, **options)
    count = -(-length // 16)
    expected = torch.tensor([[c <= r and rule(r, c) for c in range(count)] for r in range(count)])
    assert torch.equal(blocks.mask(), expected)
    turned = blocks._replace(row_offsets=blocks.key_offsets, row_blocks=blocks.key_blocks)
    assert torch.equal(turned.mask(), expected.T)
    for offsets, listed in ((blocks.row_offsets, blocks.row_blocks), (blocks.key_offsets, blocks.key_blocks)):
        assert offsets.dtype == listed.dtype == torch.int32
        pieces = [listed[a:b] for a, b in itertools.pairwise(offsets)]
        assert all((piece[1:] > piece[:-1]).all() for piece in pieces)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: block_list(torch.ones(2, 3, dtype=torch.bool), 16), "mask is torch.bool"),
        (lambda: block_list(torch.ones(2, 2), 16), "mask is torch.float32"),
        (lambda: butterfly_blocks(100, 24), "size=24"),
        (lambda: butterfly_blocks(0, 16), "length=0"),
        (lambda: stripe_blocks(100, 16, local=0, stride=2), "local=0"),
        (lambda: sink_and_local_blocks(100, 16, sink=-1, local=1), "sink=-1"),
    ],
)
def test_impossible_lists_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
