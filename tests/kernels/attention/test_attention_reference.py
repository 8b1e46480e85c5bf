"""Rung 1: the definition against numerical gradients and against two oracles that are not ours."""

import itertools

import pytest
import torch
from attention_cases import CASES, Case, assert_close, built, ragged, sorted_buckets
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.reference import reference_forward

SMALL = [case for case in CASES if case.queries <= 257]


def dense_mask(case: Case, pattern: Pattern) -> torch.Tensor:
    """What is added to the scores [B, Hq, Tq, Tk], one score after the other."""
    lo, hi = (x.expand(case.batch, case.heads, -1).tolist() for x in pattern.bounds())
    queries, keys = case.queries, case.keys or case.queries
    mask = torch.full((case.batch, case.heads, queries, keys), -torch.inf, dtype=torch.float64)
    listed = None if pattern.blocks is None else pattern.blocks.mask()

    def row(rows, b, h, i):
        return i if rows is None else int(rows.expand(case.batch, -1, -1)[b, h % rows.shape[1], i])

    for b, h, i in itertools.product(*map(range, (case.batch, case.heads, queries))):
        for j in range(lo[b][h][i], hi[b][h][i]):
            query_row = row(pattern.query_rows, b, h, i)
            key_row = row(pattern.key_rows, b, h * case.key_heads // case.heads, j)
            position = query_row + keys - queries
            if listed is None or listed[position // pattern.blocks.size, key_row // pattern.blocks.size]:
                slope = 0.0 if pattern.alibi_slopes is None else float(pattern.alibi_slopes[h])
                mask[b, h, query_row, key_row] = slope * (key_row - position)
    return mask


@pytest.mark.parametrize(
    "case",
    [
        Case("documents", built([3, 2]), queries=7, dim=3, value_dim=2),
        Case("window-gqa", built(window=3), queries=6, heads=4, dim=2),
        Case("decode", built(), queries=2, keys=5, dim=3),
        Case("empty-rows", ragged(sparse=True), queries=8, dim=2),
    ],
    ids=lambda case: case.name,
)
def test_gradients_against_finite_differences(case):
    tensors, pattern, scale = case.inputs(torch.float64)

    def seen(query, key, value):
        output, logsumexp = reference_forward(Inputs(query, key, value, pattern, scale))
        return output, logsumexp[logsumexp.isfinite()]

    assert torch.autograd.gradcheck(seen, tensors)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_against_scaled_dot_product_attention(case):
    tensors, pattern, scale = case.inputs(torch.float64)
    output, _ = reference_forward(Inputs(*tensors, pattern, scale))
    mask = dense_mask(case, pattern)
    oracle = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)
    assert_close(output, oracle, 1e-12, "output")
    grad_output = torch.randn_like(output)
    grads = torch.autograd.grad(output, tensors, grad_output)
    for name, grad, want in zip("qkv", grads, torch.autograd.grad(oracle, tensors, grad_output), strict=True):
        assert_close(grad, want, 1e-12, f"gradient of {name}")


@pytest.mark.parametrize(
    "case",
    [
        Case("causal", built()),
        Case("documents-window", built([13, 40, 3], window=9)),
        Case("prefill-chunk", built(), queries=63, keys=100),
        Case("buckets-gqa", sorted_buckets(4), heads=4),
        Case("empty-rows", ragged(sparse=True)),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
def test_output_and_logsumexp_against_flex_attention(case):
    tensors, pattern, scale = case.inputs(torch.float64)
    query, key, value = (x.detach() for x in tensors)
    lo, hi = (x.expand(case.batch, case.heads, -1) for x in pattern.bounds())

    def visible(b, h, i, j):
        return (lo[b, h, i] <= j) & (j < hi[b, h, i])

    mask = create_block_mask(visible, case.batch, case.heads, query.shape[1], key.shape[1], device="cpu")
    oracle, found = flex_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    output, logsumexp = reference_forward(Inputs(query, key, value, pattern, scale))
    assert_close(output, oracle.transpose(1, 2), 1e-12, "output")
    assert_close(logsumexp, found.lse.transpose(1, 2), 1e-12, "logsumexp")


def test_rows_that_see_nothing_receive_no_gradient():
    case = Case("empty", ragged(sparse=True))
    tensors, pattern, scale = case.inputs(torch.float64)
    output, logsumexp = reference_forward(Inputs(*tensors, pattern, scale))
    lo, hi = pattern.bounds()
    empty = (lo >= hi).transpose(1, 2)
    assert empty.any() and torch.equal(logsumexp.isneginf(), empty) and not output[empty].any()
    grads = torch.autograd.grad((output, logsumexp), tensors, (torch.ones_like(output), torch.ones_like(logsumexp)))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][empty].any()
