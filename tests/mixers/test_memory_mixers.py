"""What is particular to the mixers with a decaying memory: the published blocks, token by token in float64."""

import pytest
import torch
import torch.nn.functional as F
from test_deltanet import convolved

from longmix.errors import ConfigError
from longmix.mixers.hgrn2 import HGRN2
from longmix.mixers.mamba2 import Mamba2
from longmix.mixers.parts.base import Mixer, ModelShape
from longmix.recipe import recipe_of

SHAPE = ModelShape(d_model=48, num_layers=4, num_heads=3)


def seeded(make, dtype=torch.float64) -> Mixer:
    """A mixer whose weights are all random, so that none at 0 or 1 hides anything."""
    torch.manual_seed(3)
    mixer = make().to(dtype)
    with torch.no_grad():
        for weight in mixer.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return mixer


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.reshape(*x.shape[:2], heads, -1)


def recurrence(query, key, value, decay):
    """y_t = S_t^T q_t with S_t = decay_t S_{t-1} + k_t v_t^T; decay [B, T, H, 1 or K]."""
    memory, found = 0.0, []
    for t in range(query.shape[1]):
        memory = decay[:, t].unsqueeze(-1) * memory + key[:, t].unsqueeze(-1) * value[:, t].unsqueeze(-2)
        found.append((query[:, t].unsqueeze(-1) * memory).sum(-2))
    return torch.stack(found, 1)


def normed(x: torch.Tensor, weight: torch.Tensor, groups: int, eps: float = 1e-5) -> torch.Tensor:
    grouped = x.unflatten(-1, (groups, -1))
    return (grouped / (grouped.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight


def published_mamba2(mixer: Mamba2, x: torch.Tensor) -> torch.Tensor:
    w = dict(mixer.named_parameters())
    mixed = torch.cat([x @ w[f"{name}.weight"].T for name in ("value", "key", "query")], -1)
    if mixer.convolution is not None:
        kernel = F.pad(mixed.mT, (3, 0))
        kernel = F.conv1d(kernel, w["convolution.weight"].flip(0).T.unsqueeze(1), groups=mixed.shape[-1]).mT
        mixed = F.silu(kernel + w["convolution.bias"])
    inner, narrow = mixer.num_heads * mixer.value_dim, mixer.groups * mixer.key_dim
    value, key, query = mixed.split([inner, narrow, narrow], -1)
    value = split(value, mixer.num_heads)
    repeats = mixer.num_heads // mixer.groups
    key, query = (split(part, mixer.groups).repeat_interleave(repeats, 2) for part in (key, query))
    step = torch.log1p(torch.exp(x @ w["step.weight"].T + w["step_bias"])).unsqueeze(-1)
    read = recurrence(query, key, step * value, torch.exp(-w["log_rate"].exp().unsqueeze(-1) * step))
    read = (read + w["skip"].unsqueeze(-1) * value).flatten(2)
    gate = x @ w["gate.weight"].T
    return normed(read * gate / (1 + torch.exp(-gate)), w["norm.weight"], mixer.groups) @ w["output.weight"].T


def published_hgrn2(mixer: HGRN2, x: torch.Tensor) -> torch.Tensor:
    w = dict(mixer.named_parameters()) | dict(mixer.named_buffers())
    query, value = x @ w["query.weight"].T, x @ w["value.weight"].T
    if mixer.convolution is None:
        query = F.silu(query)
    else:
        query, value = convolved(torch.cat([query, value], -1), w["convolution.weight"]).chunk(2, -1)
    bound = torch.sigmoid(w["bound"]) if "bound" in w else 0.0
    forget = bound + (1 - bound) * torch.sigmoid(x @ w["forget.weight"].T)
    query, value, forget = (split(part, mixer.num_heads) for part in (query, value, forget))
    read = recurrence(query * mixer.key_dim**-0.5, 1 - forget, value, forget)
    return normed(read.flatten(2), w["norm.weight"], 1) @ w["output.weight"].T


CASES = {
    "mamba2": (published_mamba2, lambda: Mamba2(SHAPE, 1, state_size=16)),
    "mamba2-groups": (published_mamba2, lambda: Mamba2(SHAPE, 0, expand=1.5, state_size=8, groups=2, num_heads=6)),
    "mamba2-no-convolution": (published_mamba2, lambda: Mamba2(SHAPE, 0, state_size=3, convolution=0)),
    "hgrn2": (published_hgrn2, lambda: HGRN2(SHAPE, 2)),
    "hgrn2-first-layer": (published_hgrn2, lambda: HGRN2(SHAPE, 0, convolution=3)),
    "hgrn2-fixed": (published_hgrn2, lambda: HGRN2(SHAPE, 3, lower_bound="fixed", num_heads=2)),
}


@pytest.mark.parametrize(("published", "make"), CASES.values(), ids=CASES)
def test_the_published_formulas_with_gradients(published, make):
    mixer = seeded(make)
    x = torch.randn(2, 21, SHAPE.d_model, dtype=torch.float64, requires_grad=True)
    weights = [x, *mixer.parameters()]
    found, wanted = mixer(x).y, published(mixer, x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    direction = torch.randn_like(found)
    grads, expected = (torch.autograd.grad((y * direction).sum(), weights) for y in (found, wanted))
    for grad, wish in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wish, rtol=1e-9, atol=1e-11)


def theirs(mixer: Mamba2):
    """transformers' Mamba2Mixer with this one's weights."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        num_heads=mixer.num_heads,
        head_dim=mixer.value_dim,
        hidden_size=mixer.d_model,
        state_size=mixer.key_dim,
        n_groups=mixer.groups,
        expand=2,
        num_hidden_layers=1,
        chunk_size=8,
    )
    other, w = Mamba2Mixer(config, 0), dict(mixer.named_parameters())
    named = {
        "in_proj.weight": torch.cat([w[f"{name}.weight"] for name in ("gate", "value", "key", "query", "step")]),
        "conv1d.weight": w["convolution.weight"].flip(0).T.unsqueeze(1),
        "conv1d.bias": w["convolution.bias"],
        "dt_bias": w["step_bias"],
        "A_log": w["log_rate"],
        "D": w["skip"],
        "norm.weight": w["norm.weight"],
        "out_proj.weight": w["output.weight"],
    }
    other.load_state_dict({name: weight.detach() for name, weight in named.items()})
    return other, config


def test_mamba2_is_that_of_transformers():
    """Theirs computes in float32: output, every gradient, and steps after a prefill from both caches."""
    from transformers import DynamicCache

    mixer = seeded(lambda: Mamba2(SHAPE, 0, state_size=16, groups=2), torch.float32)
    other, config = theirs(mixer)
    x = torch.randn(2, 21, SHAPE.d_model, requires_grad=True)
    found, wanted = mixer(x).y, other(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(found)
    w = dict(mixer.named_parameters())
    names = ("gate.weight", "value.weight", "key.weight", "query.weight", "step.weight")
    names += ("convolution.weight", "convolution.bias", "step_bias", "log_rate", "skip", "norm.weight", "output.weight")
    grads = torch.autograd.grad((found * direction).sum(), [x, *(w[name] for name in names)])
    ours = [grads[0], torch.cat(grads[1:6]), grads[6].flip(0).T.unsqueeze(1), *grads[7:]]
    order = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight")
    their_w = dict(other.named_parameters())
    expected = torch.autograd.grad((wanted * direction).sum(), [x, *(their_w[n] for n in (*order, "out_proj.weight"))])
    for grad, wish in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad, wish, rtol=1e-3, atol=1e-4 * wish.abs().max().item())
    with torch.no_grad():
        cache, state = DynamicCache(config=config), mixer.init_state(2)
        for piece in (slice(0, 9), *(slice(t, t + 1) for t in range(9, 21))):
            output = mixer(x[:, piece], state=state)
            state = output.state
            torch.testing.assert_close(output.y, other(x[:, piece], cache=cache), rtol=1e-4, atol=1e-5)


def test_initial_weights_and_sizes():
    torch.manual_seed(0)
    with torch.device("meta"):
        sizes = {768: (24, 64), 2048: (64, 64), 64: (4, 32)}
        for width, wanted in sizes.items():
            mixer = Mamba2(ModelShape(width, 24, 8), 0)
            assert (mixer.num_heads, mixer.value_dim, mixer.key_dim) == (*wanted, 128)
        published = sum(weight.numel() for weight in Mamba2(ModelShape(768, 24, 12), 0).parameters())
    inner, columns = 1536, 1536 + 2 * 128
    assert published == 768 * (2 * inner + 256 + 24) + 5 * columns + 3 * 24 + inner + inner * 768
    mixer = Mamba2(ModelShape(64, 9, 1), 0, num_heads=8)
    step = F.softplus(mixer.step_bias)
    assert (step > 0.99e-3).all() and (step < 0.101).all() and (mixer.skip == 1).all()
    assert (mixer.log_rate.exp() >= 1).all() and (mixer.log_rate.exp() <= 16).all()
    assert mixer.output.weight.abs().max() <= 128**-0.5 / 3 + 1e-6
    assert recipe_of(mixer.step.weight).role == "scalar" and recipe_of(mixer.query.weight).role == "matrix"
    assert not any(recipe_of(w).weight_decay for w in (mixer.log_rate, mixer.step_bias, mixer.skip))
    bounds = [HGRN2(SHAPE, layer).bound for layer in range(4)]
    assert bounds[0] is None
    for layer, bound in enumerate(bounds[1:], 1):
        torch.testing.assert_close(bound.sigmoid(), torch.full((48,), layer / 4))
    assert HGRN2(SHAPE, 2, lower_bound="none").bound is None
    assert "bound" in HGRN2(SHAPE, 2, lower_bound="fixed").state_dict()


def test_a_lower_bound_is_kept_and_saturated_gates_are_finite():
    mixer = HGRN2(SHAPE, 3)
    log_decay = mixer.gates(torch.full((1, 2, 48), -1e4) @ torch.diag(torch.ones(48)))
    assert (log_decay.exp() >= 0.75 - 1e-6).all() and (log_decay <= 0).all()
    block = Mamba2(SHAPE, 0, state_size=4)
    with torch.no_grad():
        block.step.weight.fill_(-100.0)
    for scale in (1.0, -1.0):
        x = torch.full((1, 5, 48), scale, requires_grad=True)
        y = block(x).y
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all() and block.log_rate.grad.isfinite().all()


REFUSED = {
    "expand": (
        lambda: Mamba2(SHAPE, 0, expand=0.0),
        r"mixer.expand=0.0 of model.d_model=48 must be at least a channel",
    ),
    "state": (lambda: Mamba2(SHAPE, 0, state_size=0), r"mixer.state_size=0 must be at least 1"),
    "groups": (
        lambda: Mamba2(SHAPE, 0, groups=3),
        r"mixer.groups=3 does not divide mixer.num_heads=4; use one of 1, 2, 4",
    ),
    "heads": (lambda: Mamba2(SHAPE, 0, num_heads=5), r"mixer.num_heads=5 does not divide mixer.expand"),
    "convolution": (lambda: Mamba2(SHAPE, 0, convolution=1), r"mixer.convolution=1 must be 0, which is none, or"),
    "bound": (lambda: HGRN2(SHAPE, 0, lower_bound="x"), r"mixer.lower_bound=x is unknown; use learned, fixed or none"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_impossible_settings_are_refused_by_name(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
