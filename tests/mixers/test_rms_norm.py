"""RMSNorm with a backward pass of its own: the bits of torch's, the gradients of the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.mixers.parts.rms_norm import RMSNorm, has_own_gradient, rms_norm

SHAPES = {"tokens": (2, 100, 128), "heads": (2, 33, 3, 48), "one": (1, 1, 5), "flat": (7, 16), "empty": (2, 0, 8)}


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The input, the weight and the output's gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return x.requires_grad_(), torch.rand(shape[-1], generator=generator, dtype=dtype).requires_grad_(), dy


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_bits_are_those_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, dy = drawn(shape, dtype)
    ours = rms_norm(x, weight, 1e-6)
    theirs = F.rms_norm(x, shape[-1:], weight, 1e-6)
    assert type(ours.grad_fn).__name__ == "_RMSNormBackward" and torch.equal(ours, theirs)
    for own, other in zip(*(torch.autograd.grad(y, (x, weight), dy) for y in (ours, theirs)), strict=True):
        assert torch.equal(own, other)


def test_gradients_that_meet_at_the_input_are_added_in_torchs_order() -> None:
    """As in a block, whose input goes past the norm too."""
    x, weight, dy = drawn((4, 256, 128))
    found = []
    for norm in (rms_norm, lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps)):
        middle = x * 3
        found.append(torch.autograd.grad(middle + norm(middle, weight, 1e-6).sin(), (x, weight), dy))
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("eps", [0.3, 1e-6, None])
def test_gradients_are_those_of_the_definition(eps: float | None) -> None:
    x, weight, dy = drawn((3, 21, 48), torch.float64)
    added = torch.finfo(torch.float64).eps if eps is None else eps
    defined = x / (x.square().mean(-1, keepdim=True) + added).sqrt() * weight
    found = (torch.autograd.grad(y, (x, weight), dy) for y in (rms_norm(x, weight, eps), defined))
    for own, other in zip(*found, strict=True):
        assert (own - other).norm() <= 1e-13 * other.norm()
    assert torch.autograd.gradcheck(lambda *tensors: rms_norm(*tensors, eps), (x[:1, :2], weight))


def test_frozen_tensors_get_no_gradient() -> None:
    x, weight, dy = drawn((2, 9, 16))
    both = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), dy)
    of_x = torch.autograd.grad(rms_norm(x, weight.detach(), 1e-6), x, dy)[0]
    of_weight = torch.autograd.grad(rms_norm(x.detach(), weight, 1e-6), weight, dy)[0]
    assert torch.equal(of_x, both[0]) and torch.equal(of_weight, both[1])


def test_it_keeps_the_input_and_one_number_for_each_row() -> None:
    x, weight, _ = drawn((4, 64, 128))
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rms_norm(x, weight, 1e-6)
    assert sorted(kept.values()) == [128, 4 * 64, x.numel()]


def test_everything_else_is_torchs() -> None:
    x, weight, _ = drawn((2, 9, 16))
    assert has_own_gradient(x, weight) and has_own_gradient(x.detach(), weight)
    assert not has_own_gradient(x.detach(), weight.detach())
    assert not has_own_gradient(x.bfloat16(), weight.bfloat16())
    assert not has_own_gradient(x.double(), weight)
    with torch.no_grad():
        assert not has_own_gradient(x, weight)
        assert torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6))


def test_it_compiles_as_torchs_own_does() -> None:
    x, weight, _ = drawn((2, 9, 16))
    norm = RMSNorm(16, eps=1e-6)
    norm.weight = torch.nn.Parameter(weight.detach())
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm(x), rtol=1e-6, atol=1e-6)


def test_a_second_derivative_is_refused() -> None:
    x, weight, _ = drawn((2, 9, 16))
    (gradient,) = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
