"""Rung 1: the definition against numerical gradients and against two oracles that are not ours."""

import pytest
import torch
from attention_cases import CASES, Case, assert_close, built, ragged, sorted_buckets
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from longmix_kernels.attention.reference import attention_reference

SMALL = [case for case in CASES if case.queries <= 257]


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
    tensors, (lo, hi), scale = case.inputs(torch.float64)

    def seen(query, key, value):
        output, logsumexp = attention_reference(query, key, value, lo, hi, scale)
        return output, logsumexp[logsumexp.isfinite()]

    assert torch.autograd.gradcheck(seen, tensors)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_against_scaled_dot_product_attention(case):
    tensors, (lo, hi), scale = case.inputs(torch.float64)
    output, _ = attention_reference(*tensors, lo, hi, scale)
    key = torch.arange(tensors[1].shape[1])
    mask = (lo.unsqueeze(-1) <= key) & (key < hi.unsqueeze(-1))
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
    tensors, (lo, hi), scale = case.inputs(torch.float64)
    query, key, value = (x.detach() for x in tensors)
    lo, hi = (x.expand(case.batch, case.heads, -1) for x in (lo, hi))

    def visible(b, h, i, j):
        return (lo[b, h, i] <= j) & (j < hi[b, h, i])

    mask = create_block_mask(visible, case.batch, case.heads, query.shape[1], key.shape[1], device="cpu")
    oracle, found = flex_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    output, logsumexp = attention_reference(query, key, value, lo, hi, scale)
    assert_close(output, oracle.transpose(1, 2), 1e-12, "output")
    assert_close(logsumexp, found.lse.transpose(1, 2), 1e-12, "logsumexp")


def test_rows_that_see_nothing_receive_no_gradient():
    case = Case("empty", ragged(sparse=True))
    tensors, (lo, hi), scale = case.inputs(torch.float64)
    output, logsumexp = attention_reference(*tensors, lo, hi, scale)
    empty = (lo >= hi).transpose(1, 2)
    assert empty.any() and torch.equal(logsumexp.isneginf(), empty) and not output[empty].any()
    grads = torch.autograd.grad((output, logsumexp), tensors, (torch.ones_like(output), torch.ones_like(logsumexp)))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][empty].any()
