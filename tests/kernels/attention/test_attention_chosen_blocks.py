"""Attention to blocks that each query chose: where blocks begin, and equality with masked attention."""

import pytest
import torch
from attention_cases import assert_close

from longmix_kernels.attention import attention_to_blocks, key_blocks

LENGTH = 29
IDS = torch.repeat_interleave(torch.arange(5), torch.tensor([4, 1, 17, 7, 0])).int()


def masked(query, key, value, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from its definition, for a mask [B, Hq, Tq, Tk]; a query that sees nothing has 0 and -inf."""
    key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], 2) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    empty = ~mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1) * ~empty
    return torch.einsum("bhij,bjhd->bihd", weights, value), scores.logsumexp(-1).transpose(1, 2)


BLOCKS = {
    "one-document": (4, None, None, [0, 4, 8, 12, 16, 20, 24]),
    "overlapping": (6, 4, None, [0, 4, 8, 12, 16, 20]),
    "longer-than-the-row": (30, None, None, []),
    "documents": (4, None, IDS, [0, 5, 9, 13, 17, 22, 29]),
    "overlapping-documents": (6, 3, IDS, [5, 8, 11, 14, 22, 29, 29, 29, 29]),
}


@pytest.mark.parametrize(("size", "stride", "ids", "starts"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_begin_with_their_document_and_are_complete(size, stride, ids, starts):
    blocks = key_blocks(LENGTH, size, stride=stride, document_ids=None if ids is None else ids[None])
    assert blocks.starts[0].tolist() == starts
    documents = torch.zeros(LENGTH) if ids is None else ids
    for row in range(LENGTH):
        mine = [n for n, start in enumerate(starts) if start < LENGTH and documents[start] == documents[row]]
        assert blocks.ended[0, row] == sum(starts[n] + size <= row + 1 for n in mine)
        assert not mine or blocks.first[0, row] == mine[0]


CASES = {
    "one": (4, None, 2, 1),
    "own-choice-of-each-head": (4, None, 4, 3),
    "shared-by-a-group": (4, None, 2, 3),
    "documents": (3, IDS, 2, 2),
    "single-keys": (1, IDS, 4, 4),
}


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize(("size", "ids", "heads", "each"), CASES.values(), ids=CASES)
def test_results_and_gradients_are_those_of_masked_attention(size, ids, heads, each, backend):
    generator = torch.Generator().manual_seed(0)
    blocks = key_blocks(LENGTH, size, document_ids=None if ids is None else ids[None])
    count = blocks.starts.shape[1]
    there = int((blocks.starts < LENGTH).sum())
    ranks = torch.rand(2, LENGTH, heads, count + 1, generator=generator).argsort(-1)[..., :each]
    chosen = torch.where(ranks < there, ranks, count)
    chosen[:, 5] = count  # sees nothing
    query, key, value = (
        torch.randn(2, LENGTH, n, 8, dtype=torch.float64, generator=generator).requires_grad_() for n in (4, 2, 2)
    )
    lo = torch.cat((blocks.starts[0], torch.tensor([LENGTH])))[chosen].unsqueeze(-1)
    column = torch.arange(LENGTH)
    mask = ((lo <= column) & (column < lo + size)).any(3).transpose(1, 2).repeat_interleave(4 // heads, 1)
    tensors = query, key, value
    found = attention_to_blocks(*tensors, chosen, blocks, backend=backend)
    wanted = masked(*tensors, mask)
    grad = torch.randn(wanted[0].shape, dtype=torch.float64, generator=generator)
    grads = (torch.autograd.grad(x[0], tensors, grad) for x in (found, wanted))
    for name, a, b in zip(("query", "key", "value"), *grads, strict=True):
        assert_close(a, b, 1e-12, name)
    assert_close(found[0], wanted[0], 1e-12, "output")
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-12)


def test_a_wrong_choice_or_stride_is_refused():
    query, key = torch.zeros(1, 8, 4, 8), torch.zeros(1, 8, 2, 8)
    blocks = key_blocks(8, 2)
    with pytest.raises(ValueError, match=r"chosen has shape \[1, 8, 3, 1\]; allowed is \[1, 8, 4 or 2, n\]"):
        attention_to_blocks(query, key, key, torch.zeros(1, 8, 3, 1, dtype=torch.int64), blocks)
    with pytest.raises(ValueError, match="size=2 with stride=3"):
        key_blocks(8, 2, stride=3)
