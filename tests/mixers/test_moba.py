"""Blocks that queries choose: equal to a naive form, causal also in what is chosen, and sparse in a step."""

import pytest
import torch

from longmix.analysis.causality import audit, mixer_function
from longmix.mixers.flash import Flash
from longmix.mixers.moba import MoBA
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.block_choice import chosen_blocks

SHAPE = ModelShape(d_model=32, num_layers=2, num_heads=4)
LENGTH = 43
IDS = torch.repeat_interleave(torch.arange(3), torch.tensor([18, 3, 22])).int().expand(2, -1)


def heads(kv_heads: int = 4, length: int = LENGTH, dim: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, length, n, dim, dtype=torch.float64, generator=generator).requires_grad_()
        for n in (4, kv_heads, kv_heads)
    ]


def naive(query, key, value, block: int, top_k: int, ids=None) -> torch.Tensor:
    """Equations 2 to 6 of the paper, one query at a time."""
    outputs = []
    for batch in range(query.shape[0]):
        documents = torch.zeros(query.shape[1]) if ids is None else ids[batch]
        for i in range(query.shape[1]):
            start = int((documents == documents[i]).nonzero()[0])
            own = (i - start) // block
            for head in range(query.shape[2]):
                shared = head // (query.shape[2] // key.shape[2])
                k, v = key[batch, start : i + 1, shared], value[batch, start : i + 1, shared]
                gates = torch.tensor(
                    [
                        float((query[batch, i, head] @ k[b * block : (b + 1) * block].mean(0)).detach())
                        for b in range(own)
                    ]
                )
                chosen = [own, *gates.topk(min(top_k - 1, own)).indices.tolist()]
                seen = torch.cat([torch.arange(b * block, min((b + 1) * block, len(k))) for b in chosen])
                weights = torch.softmax(k[seen] @ query[batch, i, head] * query.shape[-1] ** -0.5, 0)
                outputs.append(weights @ v[seen])
    return torch.stack(outputs).view(*query.shape)


CASES = {
    "one-block": (5, 1, 4, None),
    "two": (5, 2, 4, None),
    "grouped": (4, 3, 2, None),
    "packed": (5, 3, 4, IDS),
    "packed-grouped": (4, 2, 1, IDS),
    "single-tokens": (1, 4, 4, IDS),
}


@pytest.mark.parametrize(("block", "top_k", "kv_heads", "ids"), CASES.values(), ids=CASES)
def test_output_and_gradients_are_those_of_the_naive_form(block, top_k, kv_heads, ids):
    tensors = heads(kv_heads)
    mixer = MoBA(SHAPE, 0, block=block, top_k=top_k, num_kv_heads=kv_heads)
    found, wanted = mixer.attend(Rows(*tensors, ids))[0], naive(*tensors, block, top_k, ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    grad = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, tensors, grad) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_one_block_is_not_dense_and_enough_blocks_are():
    """`top_k=1` is the own block alone; an implementation elsewhere fell back to dense attention there."""
    tensors = heads()
    dense = Flash(SHAPE, 0).attend(Rows(*tensors))[0]
    for top_k, blocks_seen in ((1, 1), (9, 9)):
        found = MoBA(SHAPE, 0, block=5, top_k=top_k).attend(Rows(*tensors))[0]
        same = (found - dense).abs().amax((0, 2, 3)) < 1e-12
        assert same.tolist() == [i < 5 * blocks_seen for i in range(LENGTH)]


def test_of_equal_scores_the_earlier_blocks_win_in_any_number_of_chunks(monkeypatch):
    scores = torch.tensor([[[[1.0, 3.0, 3.0, 2.0, 3.0, 9.0]]]]).expand(1, 4, 1, -1)
    first, end = torch.tensor([[0, 0, 2, 4]]), torch.tensor([[5, 1, 5, 4]])
    wanted = [[1, 2], [0, 6], [2, 4], [6, 6]]
    for at_once in (1, 100):
        monkeypatch.setattr("longmix.mixers.parts.block_choice.SCORES_AT_ONCE", at_once)
        assert chosen_blocks(lambda some: scores[:, some], 4, first, end, 2, 6)[0, :, 0].tolist() == wanted


def test_a_step_reads_the_chosen_blocks_alone():
    """Keys of all other blocks are NaN in the state, and the step does not notice."""
    torch.manual_seed(1)
    mixer = MoBA(SHAPE, 0, block=5, top_k=2, num_kv_heads=1).double()
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    before = mixer(x[:, :-1], state=mixer.init_state(2)).state
    wanted = mixer(x[:, -1:], state=before).y
    unread = 0
    for block in range(8):
        keys = before.seen.key.clone()
        keys[:, block * 5 : block * 5 + 5] = torch.nan
        state = type(before)(type(before.seen)(**{**vars(before.seen), "key": keys}), before.means)
        unread += (mixer(x[:, -1:], state=state).y - wanted).abs().amax((1, 2)) == 0
    assert all(4 <= n <= 7 for n in unread.tolist())  # four heads choose at most four of eight blocks
    assert mixer.step_bytes(10_000) < mixer.state_bytes(10_000) / 5


class Early(MoBA):
    """A control that leaks: a block may be chosen before it is complete, by the mean of all its keys."""

    def _chosen(self, query, means, first, end):
        return super()._chosen(query, means, first, (end + 1).clamp(max=means.shape[1]))


class Wider(MoBA):
    """A control that leaks by its selection alone: means also reach over the block behind."""

    def _chosen(self, query, means, first, end):
        return super()._chosen(query, means + means.roll(-1, 1), first, end)


@pytest.mark.parametrize(("kind", "leaks"), [(MoBA, False), (Early, True), (Wider, True)])
def test_the_audit_sees_who_chooses_by_later_tokens(kind, leaks):
    torch.manual_seed(0)
    mixer = kind(SHAPE, 0, block=4, top_k=2).double().eval()
    found = audit(mixer_function(mixer), torch.randn(2, 40, 32, dtype=torch.float64))
    assert any(finding.leaks for finding in found) is leaks
