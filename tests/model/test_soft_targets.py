"""The loss on a teacher's distributions, against torch's own divergence on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from longmix.model import head
from longmix.model.head import IGNORE_INDEX, SoftTargets, divergences, scored

VOCABULARY = 23


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def parts() -> dict:
    torch.manual_seed(0)
    targets = torch.randint(VOCABULARY, (3, 7))
    targets[0, 2:5] = targets[2] = IGNORE_INDEX
    return {
        "hidden": drawn(3, 7, 6).requires_grad_(),
        "weight": drawn(VOCABULARY, 6).requires_grad_(),
        "targets": targets,
        "teacher": (drawn(3, 7, 4), drawn(VOCABULARY, 4)),
    }


def by_definition(parts: dict, temperature: float, softcap: float | None, theirs: float | None) -> torch.Tensor:
    """On whole logits, by `torch.nn.functional.kl_div`; 0 where ignored."""
    own = parts["hidden"] @ parts["weight"].T
    teacher = parts["teacher"][0] @ parts["teacher"][1].T
    own = own if softcap is None else softcap * torch.tanh(own / softcap)
    teacher = teacher if theirs is None else theirs * torch.tanh(teacher / theirs)
    given = F.log_softmax(own / temperature, -1), F.log_softmax(teacher / temperature, -1)
    kl = temperature**2 * F.kl_div(*given, log_target=True, reduction="none").sum(-1)
    return kl * (parts["targets"] != IGNORE_INDEX)


@pytest.mark.parametrize("elements", [4 * VOCABULARY, 1 << 24], ids=["slices", "whole"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("caps", [(None, None), (5.0, None), (2.0, 4.0)])
def test_divergences_and_gradients_are_those_of_whole_logits(elements, temperature, caps, parts, monkeypatch):
    monkeypatch.setattr(head, "SLICE_ELEMENTS", elements)
    soft = SoftTargets(*parts["teacher"], caps[1], temperature)
    given = parts["hidden"], parts["weight"], parts["targets"], caps[0]
    found = scored(*given, soft=soft)
    expected = by_definition(parts, temperature, *caps)
    torch.testing.assert_close(found.divergences, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.losses, scored(*given).losses, rtol=1e-13, atol=1e-14)  # of other slices
    weights = drawn(3, 7)
    leaves = parts["hidden"], parts["weight"]
    own = torch.autograd.grad((found.divergences * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for gradient, wanted in zip(own, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-12)


def test_all_that_can_be_asked_for_comes_from_one_pass(parts):
    soft = SoftTargets(*parts["teacher"], None, 2.0)
    given = parts["hidden"], parts["weight"], parts["targets"]
    both = scored(*given, with_peaks=True, with_normalisers=True, soft=soft)
    alone = scored(*given, with_peaks=True, with_normalisers=True)
    assert alone.divergences is None
    torch.testing.assert_close((both.losses, both.peaks), (alone.losses, alone.peaks), rtol=0, atol=0)
    torch.testing.assert_close(both.log_normalisers, alone.log_normalisers, rtol=0, atol=0)
    torch.testing.assert_close(both.divergences, scored(*given, soft=soft).divergences, rtol=0, atol=0)


def test_the_gradient_is_right():
    torch.manual_seed(1)
    student, teacher = drawn(4, 5).requires_grad_(), drawn(4, 5)
    assert torch.autograd.gradcheck(lambda x: divergences(x, teacher, 1.7), student)


def test_equal_distributions_have_no_divergence_and_no_gradient():
    torch.manual_seed(2)
    student = drawn(4, 5).requires_grad_()
    found = divergences(student, student.detach() + 3.0, 2.0)  # the softmax knows no offset
    assert found.abs().max() < 1e-14
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.abs().max() < 1e-14


def test_logits_are_formed_for_as_many_tokens_as_two_models_have_room_for(parts, monkeypatch):
    sizes = []
    whole = head._slice_logits

    def counted(rows, *rest):
        sizes.append(rows.shape[0])
        return whole(rows, *rest)

    monkeypatch.setattr(head, "SLICE_ELEMENTS", 8 * VOCABULARY)
    monkeypatch.setattr(head, "_slice_logits", counted)
    scored(parts["hidden"], parts["weight"], parts["targets"], soft=SoftTargets(*parts["teacher"], None, 1.0))
    assert max(sizes) == 4 and sum(sizes) == 2 * 21
