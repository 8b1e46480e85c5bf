"""The worst change of attention scores: the authors' gradient and direction, and that of every mixer that takes one."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from longmix.errors import ConfigError
from longmix.mixers.block_sparse import BlockSparse
from longmix.mixers.flash import Flash
from longmix.mixers.hyper import Hyper
from longmix.mixers.lightning import Lightning
from longmix.mixers.nsa import NSA
from longmix.mixers.parallax import Parallax
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.key_bias import key_biases, with_key_bias
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.routing import Routing
from longmix.mixers.sliding_window import SlidingWindow
from longmix.mixers.tensor import TensorAttention
from longmix.model.adversarial import Adversary, attacked_mixers, unit
from longmix.model.backbone import LanguageModel

FIXTURE = Path(__file__).parents[1] / "fixtures/model_side/attention_at.npz"
SHAPE = ModelShape(d_model=24, num_layers=2, num_heads=4)


def attention_weights(values: np.ndarray, gradient: np.ndarray, target: float, rows: int) -> np.ndarray:
    """The weights a of one sentence, of which the fixture has none.

    dL/dr_t = c a_t (v_t - y) for the loss mean((y - target)^2), with y = sum a v and c = 2 (y - target) / rows; so
    that sum a = 1 is an equation for y, which is solved by halving an interval that holds no pole.
    """

    def weights(y: float) -> np.ndarray:
        found: np.ndarray = gradient * rows / (2 * (y - target) * (values - y))
        return found

    poles = sorted([*values, target])
    for low, high in pairwise(poles):
        middle = (low + high) / 2
        if (weights(middle) <= 0).any():
            continue
        grid = np.linspace(low, high, 4003)[1:-1]
        excess = np.array([weights(y).sum() - 1 for y in grid])
        for place in np.flatnonzero(excess[:-1] * excess[1:] < 0):
            low, high = grid[place], grid[place + 1]
            rising = excess[place + 1] > 0
            for _ in range(100):
                middle = (low + high) / 2
                low, high = (low, middle) if (weights(middle).sum() > 1) == rising else (middle, high)
            return weights(low)
    raise AssertionError("no weights have this gradient")


def test_gradient_and_direction_are_those_of_the_authors():
    given = np.load(FIXTURE)
    states, head, target = (torch.from_numpy(given[name]) for name in ("states", "head", "target"))
    rows = len(states)
    values = (states @ head).numpy()
    found = [attention_weights(values[b], given["at_grad"][b], float(target[b]), rows) for b in range(rows)]
    scores = torch.from_numpy(np.stack(found)).log()[:, :, None, None]
    one, bias = torch.ones(rows, 1, 1, 1, dtype=torch.float64), torch.zeros(*scores.shape[:3], dtype=torch.float64)

    def loss(bias: torch.Tensor) -> torch.Tensor:
        attended = with_key_bias(Rows(one, scores, states.unsqueeze(2), scale=1.0), bias)
        return (attended.attended()[0].flatten(1) @ head - target).square().mean()

    (gradient,) = torch.autograd.grad(loss(bias.requires_grad_()), bias)
    torch.testing.assert_close(gradient.squeeze(-1), torch.from_numpy(given["at_grad"]), rtol=0, atol=1e-12)
    attack = float(given["xi"]) * unit(gradient, None)
    torch.testing.assert_close(attack.squeeze(-1), torch.from_numpy(given["at_perturbation"]), rtol=0, atol=1e-12)
    opposite = torch.from_numpy(given["iat_perturbation"]).unsqueeze(-1)
    torch.testing.assert_close(attack, -opposite, rtol=0, atol=1e-12)
    before = float(loss(torch.zeros_like(bias)))
    assert float(loss(attack)) > before > float(loss(0.1 * opposite)), "their iAT goes down, which is why it is out"


def test_a_unit_change_is_one_of_each_document_and_head():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 3, dtype=torch.float64, generator=generator)
    x[1, 4:7] = 0.0
    x[0, :2, 1] *= 1e-150
    ids = torch.tensor([[0, 0, 0, 5, 5, 5, 5, 6, 6], [2, 2, 2, 2, 3, 3, 3, 9, 9]], dtype=torch.int32)
    found = unit(x, ids)
    for row in range(2):
        for number in ids[row].unique():
            inside = ids[row] == number
            part = x[row, inside]
            wanted = part / part.norm(dim=0).clamp_min(1e-200)
            torch.testing.assert_close(found[row, inside], wanted, rtol=1e-14, atol=0)
    assert not found[1, 4:7].any()
    torch.testing.assert_close(unit(x[:1], None), unit(x[:1], torch.zeros(1, 9, dtype=torch.int32)), rtol=1e-14, atol=0)


MIXERS = {
    "flash-grouped": lambda: Flash(SHAPE, 0, num_kv_heads=2),
    "flash-alibi": lambda: Flash(SHAPE, 0, rotary_base=None, bias="alibi"),
    "flash-low-rank-sinks": lambda: Flash(SHAPE, 0, bias="low_rank", sink_logits=True),
    "flash-forget": lambda: Flash(SHAPE, 0, rotary_base=None, bias="forget"),
    "flash-dropout": lambda: Flash(SHAPE, 0, attention_dropout=1e-12),
    "window": lambda: SlidingWindow(SHAPE, 0, window=5),
    "window-gaps": lambda: SlidingWindow(SHAPE, 0, window=3, dilation=[1, 2, 1, 3]),
    "blocks": lambda: BlockSparse(SHAPE, 0, block=16, local=1),
    "hyper": lambda: Hyper(SHAPE, 0, buckets=2, window=4, sample=0.4),
    "routing": lambda: Routing(SHAPE, 0, clusters=2, window=4, local_window=5),
    "parallax": lambda: Parallax(SHAPE, 0, window=9),
    "tensor": lambda: TensorAttention(SHAPE, 0, window_1=3, window_2=5),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MIXERS)
def test_the_gradient_of_a_mixers_key_bias_is_that_of_small_changes(name):
    torch.manual_seed(0)
    mixer = MIXERS[name]().double()
    assert isinstance(mixer, SoftmaxAttention) and mixer.takes_key_bias
    x, ids = torch.randn(2, 23, 24, dtype=torch.float64), torch.tensor([[0] * 9 + [1] * 14, [0] * 23]).int()
    weights = torch.randn(2, 23, 24, dtype=torch.float64)
    bias = 0.1 * torch.randn(2, 23, mixer.num_kv_heads, dtype=torch.float64)

    def loss(bias: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        with key_biases([mixer], [bias]):
            return (mixer(x, document_ids=ids).y * weights).sum()

    (gradient,) = torch.autograd.grad(loss(bias.requires_grad_()), bias)
    bias, gradient = bias.detach(), gradient.detach()
    step, places = 1e-5, [(0, 3, 0), (0, 12, 1), (1, 22, 0), (1, 8, mixer.num_kv_heads - 1)]
    for place in places:
        change = torch.zeros_like(bias)
        change[place] = step
        slope = float((loss(bias + change) - loss(bias - change)).detach()) / (2 * step)
        assert slope == pytest.approx(float(gradient[place]), rel=1e-6, abs=1e-8), place
    assert gradient.abs().max() > 1e-3
    if mixer.sink_logit is None:  # else the same number for all keys is a change, too
        torch.testing.assert_close(loss(bias + 3.0), loss(bias), rtol=1e-9, atol=0)


def test_a_key_that_is_pushed_away_is_as_good_as_not_there():
    torch.manual_seed(0)
    mixer = Flash(SHAPE, 0, rotary_base=None).double()
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    bias = torch.zeros(1, 12, 4, dtype=torch.float64)
    bias[:, 7] = -1e3
    with key_biases([mixer], [bias]):
        found = mixer(x).y
    without = mixer(torch.cat((x[:, :7], x[:, 8:]), 1)).y
    torch.testing.assert_close(found[:, :7], without[:, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[:, 8:], without[:, 7:], rtol=0, atol=1e-12)
    assert mixer.key_bias is None


def model(mixers: list, **settings) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "num_layers": len(mixers), "num_heads": 4, "mlp_hidden": 24}
    return LanguageModel(lambda shape, index: mixers[index](shape, index), 17, **sizes, **settings).double()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("checkpointing", ["block", "none", "selective"])
def test_an_attack_raises_the_loss_more_than_any_other_change_of_its_length(checkpointing):
    net = model([Flash, SlidingWindow], activation_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(17, (2, 20), generator=generator) for _ in range(2))
    ids = torch.tensor([[0] * 6 + [1] * 14, [0] * 20]).int()
    adversary = Adversary(attacked_mixers(net, None, "layers"), 1e-3)
    with adversary.watching(tokens) as zeros:
        before = net(tokens, targets, document_ids=ids).token_losses.sum()
        before.backward()
    gradients, before = [zero.grad for zero in zeros], before.detach()

    def raised(directions: list) -> float:
        with torch.no_grad(), adversary.attacking(directions, ids):
            return float(net(tokens, targets, document_ids=ids).token_losses.sum() - before)

    norms = sum(gradient[row, where].norm(dim=0).sum() for gradient in gradients for row, where in documents(ids))
    assert raised(gradients) == pytest.approx(1e-3 * float(norms), rel=0.02), "to first order, xi times the norms"
    for _ in range(5):
        assert raised([torch.randn(g.shape, dtype=g.dtype, generator=generator) for g in gradients]) < raised(gradients)
    assert raised([-gradient for gradient in gradients]) < 0


def documents(ids: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    return [(row, ids[row] == number) for row in range(len(ids)) for number in ids[row].unique()]


def test_no_later_token_feels_an_attack_on_an_earlier_ones_future():
    """A key's bias changes its own row and later ones of its document, and nothing else."""
    net = model([Flash, Flash])
    tokens, ids = torch.arange(14)[None], torch.tensor([[0] * 8 + [1] * 6]).int()
    bias = torch.zeros(1, 14, 4, dtype=torch.float64)
    bias[:, 5] = 1.0
    with key_biases([net.mixers()[0]], [bias]):
        found = net(tokens, document_ids=ids).hidden
    change = (found - net(tokens, document_ids=ids).hidden).abs().amax(-1)[0]
    assert (change[:5] == 0).all() and (change[8:] < 1e-14).all() and (change[5:8] > 1e-6).all()


def test_a_model_copied_or_saved_knows_of_no_attack():
    net = model([Flash])
    with Adversary(attacked_mixers(net, [0], "layers"), 1.0).watching(torch.zeros(1, 3, dtype=torch.int64)):
        assert not any("key_bias" in name for name in net.state_dict())
    assert copy.deepcopy(net).mixers()[0].key_bias is None


def gained(shape: ModelShape, index: int) -> nn.Module:
    return Flash(shape, index, gain="fourier")


REFUSED = {
    "no-softmax": (
        [Lightning],
        None,
        r"^w: no layer has attention scores of pairs .* could change \(Light",
    ),
    "gain": ([gained], None, r"^w: no layer has attention scores"),
    "compressed": ([Flash, NSA], [1], r"^w=\[1\]: layer 1, NSA, has no attention scores"),
    "recurrent": ([Flash, Lightning], [0, 1], r"^w=\[0, 1\]: layer 1, Lightning, has no attention scores"),
    "beyond": ([Flash], [1], r"^w=\[1\]: there is no layer 1; layers are 0 to 0"),
    "negative": ([Flash], [-1], r"^w=\[-1\]: there is no layer -1"),
    "twice": ([Flash], [0, 0], r"^w=\[0, 0\] must name at least one layer, and none twice"),
    "none": ([Flash], [], r"^w=\[\] must name at least one layer"),
}


@pytest.mark.parametrize(("mixers", "layers", "message"), REFUSED.values(), ids=REFUSED)
def test_layers_without_such_scores_are_refused(mixers, layers, message):
    with pytest.raises(ConfigError, match=message):
        attacked_mixers(model(mixers), layers, "w")


def test_all_layers_that_can_are_attacked_unless_some_are_named():
    net = model([Lightning, Flash, NSA, SlidingWindow])
    assert attacked_mixers(net, None, "w") == [net.mixers()[1], net.mixers()[3]]
    assert attacked_mixers(net, [3], "w") == [net.mixers()[3]]
