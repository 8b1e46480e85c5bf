"""Forgetting attention: the softmax of its equation with all gradients, exact over long rows, in any split."""

import pytest
import torch
import torch.nn.functional as F

from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.score_bias import ForgetBias
from longmix.mixers.sliding_window import SlidingWindow
from longmix_kernels.attention import attention

SHAPE = ModelShape(d_model=32, num_layers=2, num_heads=4)
LENGTH = 30
IDS = torch.repeat_interleave(torch.arange(3), torch.tensor([13, 2, 15])).int().expand(2, -1)


def naive(mixer: Flash, x: torch.Tensor, ids: torch.Tensor | None, window: int = LENGTH) -> torch.Tensor:
    """o_i = softmax_j(q_i . k_j / sqrt(d) + log of the product of the gates from j + 1 to i) v_j."""
    query, key, value = mixer.project(x)
    group = query.shape[2] // key.shape[2]
    key, value = (heads.repeat_interleave(group, 2) for heads in (key, value))
    gates = torch.sigmoid(mixer.bias.gate(x)).repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    products = torch.ones_like(scores)
    for i in range(1, x.shape[1]):
        products[:, :, i, :i] = products[:, :, i - 1, :i].clone() * gates[:, i, :, None]
    seen = torch.ones(LENGTH, LENGTH).tril().triu(1 - window).bool()[None]
    if ids is not None:
        seen = seen & (ids[:, :, None] == ids[:, None])
    weights = torch.softmax((scores + products.log()).masked_fill(~seen[:, None], -torch.inf), -1)
    return mixer.output(torch.einsum("bhij,bjhd->bihd", weights, value).flatten(2))


CASES = {"plain": (4, None, None), "grouped-packed": (2, IDS, None), "window": (1, IDS, 5)}


@pytest.mark.parametrize(("kv_heads", "ids", "window"), CASES.values(), ids=CASES)
def test_output_and_gradients_are_those_of_the_equation(kv_heads, ids, window):
    torch.manual_seed(1)
    options = {"bias": "forget", "rotary_base": None, "num_kv_heads": kv_heads}
    mixer = Flash(SHAPE, 0, **options) if window is None else SlidingWindow(SHAPE, 0, window=window, **options)
    mixer = mixer.double()
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64).requires_grad_()
    found, wanted = mixer(x, document_ids=ids).y, naive(mixer, x, ids, window or LENGTH)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    inputs, grad = [x, *mixer.parameters()], torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, inputs, grad) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


GATES = {"forgetful": (0.0, 3e-3, 3e-3), "keeping": (9.0, 1e-5, 3e-3)}
"""A gate's logit; and the largest errors in float32 and in bfloat16, of outputs of about 1, after 65,536 tokens."""


@pytest.mark.parametrize(("logit", "single", "half"), GATES.values(), ids=GATES)
def test_gates_of_long_rows_keep_their_differences(logit, single, half):
    """The last queries of 65,536 tokens, against differences that are formed in float64."""
    length, last = 65_536, 16
    generator = torch.Generator().manual_seed(0)
    bias = ForgetBias(2, 1, 1)
    x = logit + 0.5 * torch.randn(1, length, 2, generator=generator)
    with torch.no_grad():
        bias.gate.weight.copy_(torch.tensor([[1.0, 0.0]]))
    query, key, value = (torch.randn(1, length, 1, 16, generator=generator).bfloat16() for _ in range(3))
    sums = F.logsigmoid(x[..., 0].double()).cumsum(1)[0]
    scores = query[0, -last:, 0].double() @ key[0, :, 0].double().mT / 4 + sums[-last:, None] - sums
    hidden = torch.arange(length) > torch.arange(length - last, length)[:, None]
    wanted = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value[0, :, 0].double()
    for dtype, most in ((torch.float32, single), (torch.bfloat16, half)):
        wide_query, wide_key, scale, _ = bias.widened(
            query.to(dtype), key.to(dtype), x, torch.arange(length)[None], None
        )
        # What is rounded to bfloat16 afterwards does not count: the engine's sums are of float32.
        tensors = (tensor.float() for tensor in (wide_query[:, -last:], wide_key, value))
        with torch.no_grad():
            found = attention(*tensors, scale=scale)[0, :, 0]
        assert (found - wanted).abs().max() <= most


def test_sums_of_two_kinds_are_refused():
    with pytest.raises(ConfigError, match=r"mixer.bias=forget and mixer.position=context both add up along a row"):
        Flash(SHAPE, 0, bias="forget", position="context")
