"""What is particular to DeltaNet and its relatives: the published formulas, sizes, weights and decays."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from longmix.config import locate
from longmix.mixers.parts import gated_memory
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory
from longmix.mixers.parts.log_decay import LogDecay
from longmix.recipe import recipe_of

CONFIGS = Path(__file__).parents[2] / "configs" / "mixer"
DELTA = ("deltanet", "gated_deltanet", "kda")
NAMES = (*DELTA, "gla", "comba")
HEAD_DECAY = ("gated_deltanet", "comba")
SHAPE = ModelShape(d_model=48, num_layers=3, num_heads=2)


def configured(name: str, shape: ModelShape = SHAPE, **changes) -> GatedMemory:
    settings = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    kind = locate(settings.pop("_target_"), "mixer")
    assert issubclass(kind, GatedMemory)
    torch.manual_seed(0)
    return kind(shape, 0, **{**settings, **changes})


def heads(x: torch.Tensor, mixer: GatedMemory) -> torch.Tensor:
    return x.reshape(*x.shape[:2], mixer.num_heads, -1)


def convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu of a causal depthwise convolution, by torch's; ours has the current token first."""
    padded = F.pad(x.mT, (len(weight) - 1, 0))
    return F.silu(F.conv1d(padded, weight.flip(0).T.unsqueeze(1), groups=x.shape[-1])).mT


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def softplus_decay(step: torch.Tensor, log_rate: torch.Tensor) -> torch.Tensor:
    return -torch.exp(log_rate) * torch.log1p(torch.exp(step))


def published(name: str, mixer: GatedMemory, x: torch.Tensor) -> torch.Tensor:
    """The whole mixer as its paper has it, with the recurrence of flash-linear-attention."""
    w = dict(mixer.named_parameters())
    query, key, value = (x @ w[f"{part}.weight"].T for part in ("query", "key", "value"))
    if name == "gla":
        from fla.ops.gla.naive import naive_recurrent_gla

        query, key, value = (heads(part, mixer) for part in (query, key, value))
        step = x @ w["decay.down.weight"].T @ w["decay.up.weight"].T + w["decay.bias"]
        found, _ = naive_recurrent_gla(query, key, value, heads(-torch.log1p(torch.exp(-step)) / 16, mixer))
        gate = x @ w["gate.weight"].T
        gate = gate / (1 + torch.exp(-gate))
    else:
        widths = query.shape[-1], key.shape[-1], value.shape[-1]
        kernels = w["convolution.weight"].split(widths, -1)
        query, key, value = (
            heads(convolved(part, kernel), mixer) for part, kernel in zip((query, key, value), kernels, strict=True)
        )
        query, key = unit(query), unit(key)
        strength = torch.sigmoid(x @ w["strength.weight"].T)
        gate = torch.ones(1).double()
        if name == "deltanet":
            from fla.ops.delta_rule.naive import delta_rule_recurrence

            head_first = (part.transpose(1, 2) for part in (query, key, value, strength))
            found = delta_rule_recurrence(*head_first)[0].transpose(1, 2)
        elif name == "gated_deltanet":
            from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

            step = x @ w["decay.up.weight"].T + w["decay.bias"]
            decay = softplus_decay(step, w["decay.log_rate"])
            found, _ = naive_recurrent_gated_delta_rule(query, key, value, strength, decay)
            gate = x @ w["gate.weight"].T
            gate = gate * torch.sigmoid(gate)
        elif name == "comba":
            from fla.ops.comba.naive import naive_chunk_comba  # its naive_recurrent_comba asks after the decay

            decay = softplus_decay(x @ w["decay.up.weight"].T + w["decay.bias"], w["decay.log_rate"])
            query = query - w["correction"].unsqueeze(-1) * key
            asked = torch.sigmoid(w["feedback"]).unsqueeze(-1) * key
            found, _ = naive_chunk_comba(query, key, value, asked, decay, strength, chunk_size=16)
            gate = torch.sigmoid(x @ w["gate.weight"].T)
        else:
            from fla.ops.kda.naive import naive_recurrent_kda

            step = heads(x @ w["decay.down.weight"].T @ w["decay.up.weight"].T + w["decay.bias"], mixer)
            decay = softplus_decay(step, w["decay.log_rate"][:, None])
            found, _ = naive_recurrent_kda(query, key, value, decay, strength)
            gate = torch.sigmoid(x @ w["gate.0.weight"].T @ w["gate.1.weight"].T)
    found = found.double()
    normed = found / torch.sqrt(found.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (gate * (normed.flatten(2) * w["head_norm.weight"])) @ w["output.weight"].T


@pytest.mark.parametrize("name", NAMES)
def test_the_published_formulas_with_gradients(name):
    """In float64 but for the recurrence of the oracle, which is in float32."""
    pytest.importorskip("fla", reason="an optional oracle")
    mixer = configured(name).double()
    with torch.no_grad():
        mixer.head_norm.weight.normal_()
        if name == "comba":
            mixer.feedback.normal_()
            mixer.correction.normal_()
    x = torch.randn(2, 37, 48, dtype=torch.float64, requires_grad=True)
    parameters = [x, *mixer.parameters()]
    ours, theirs = mixer(x).y, published(name, mixer, x)
    grad = torch.randn_like(ours)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, parameters, grad)),
        (theirs, *torch.autograd.grad(theirs, parameters, grad)),
        ("output", "input", *(key for key, _ in mixer.named_parameters())),
        strict=True,
    )
    for found, expected, part in pairs:
        assert (found - expected).norm() <= 1e-5 * expected.norm(), part


@pytest.mark.parametrize("name", NAMES)
def test_the_initial_weights(name):
    """Every parameter has its row: normal of a deviation, or ones, or a range."""
    width, layers = 1024, 24
    mixer = configured(name, ModelShape(width, layers, 16))
    channels = mixer.num_heads * mixer.value_dim
    rank = 16 if name == "gla" else mixer.value_dim
    normal = {
        "query.weight": width**-0.5,
        "key.weight": width**-0.5,
        "value.weight": width**-0.5,
        "strength.weight": width**-0.5,
        "decay.down.weight": width**-0.5,
        "decay.up.weight": width**-0.5 if name in HEAD_DECAY else rank**-0.5,
        "gate.weight": width**-0.5,
        "gate.0.weight": width**-0.5,
        "gate.1.weight": mixer.value_dim**-0.5,
        "output.weight": channels**-0.5 / math.sqrt(2 * layers),
    }
    for key, x in mixer.named_parameters():
        if key in normal:
            assert abs(x.std() / normal[key] - 1) < 0.03 and abs(x.mean()) < 0.05 * normal[key], key
        elif key == "convolution.weight":
            assert x.shape == (4, 2 * mixer.num_heads * mixer.key_dim + channels)
            assert 0.499 < x.abs().max() <= 0.5 and abs(x.std() / (0.5 / math.sqrt(3)) - 1) < 0.03
        elif key in ("feedback", "correction"):
            assert torch.equal(x, torch.full((mixer.num_heads,), {"feedback": 1.0, "correction": 0.02}[key]))
        elif key == "head_norm.weight":
            assert torch.equal(x, torch.ones(channels))
        elif key == "decay.log_rate":
            assert x.shape == (mixer.num_heads,) and (x.exp() >= 1).all() and (x.exp() <= 16).all()
        else:
            assert key == "decay.bias"
            if name == "gla":
                assert torch.equal(x, torch.zeros(512))
            else:
                assert len(x) == mixer.num_heads * (1 if name in HEAD_DECAY else 128)
                steps = F.softplus(x.double())
                assert (steps >= 1e-3 * 0.999).all() and (steps <= 0.1 * 1.001).all()


def test_rates_and_steps_begin_as_in_mamba():
    torch.manual_seed(0)
    decay = LogDecay(8, 4000, 1, "channel", 4)
    rates, steps = decay.log_rate.exp(), F.softplus(decay.bias.double()).log()
    assert 0.0995 < steps.exp().max() < 0.1001
    for values, low, high in ((rates, 1.0, 16.0), (steps, math.log(1e-3), math.log(0.1))):
        quartiles = torch.quantile(values.detach().double(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double())
        expected = low + (high - low) * torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double()
        assert (quartiles - expected).abs().max() < 0.03 * (high - low)


@pytest.mark.parametrize("name", NAMES)
def test_what_weights_are_trained_like(name):
    plain = {"decay.log_rate", "decay.bias", "head_norm.weight", "convolution.weight", "feedback", "correction"}
    gates = {"strength.weight", "decay.up.weight", "decay.down.weight"}
    for key, parameter in configured(name).named_parameters():
        recipe = recipe_of(parameter)
        assert recipe.weight_decay == (key not in plain) and recipe.learning_rate_multiplier == 1.0, key
        assert recipe.role == ("scalar" if key in plain | gates else "matrix"), key


@pytest.mark.parametrize(
    ("name", "width", "sizes"),
    [
        ("deltanet", 1024, (8, 128, 128)),
        ("deltanet", 128, (4, 32, 32)),
        ("gated_deltanet", 2048, (8, 128, 256)),
        ("gated_deltanet", 768, (4, 96, 192)),
        ("comba", 2048, (8, 128, 256)),
        ("kda", 2048, (16, 128, 128)),
        ("gla", 1024, (4, 128, 256)),
        ("gla", 128, (4, 16, 32)),
    ],
)
def test_head_sizes_and_as_many_weights_as_attention(name, width, sizes):
    with torch.device("meta"):
        mixer = configured(name, ModelShape(width, 24, 16))
    assert (mixer.num_heads, mixer.key_dim, mixer.value_dim) == sizes
    thin = ("decay", "strength", "convolution", "head_norm", "gate.0", "gate.1", "feedback", "correction")
    wide = sum(x.numel() for key, x in mixer.named_parameters() if not key.startswith(thin))
    assert wide == 4 * width**2


def test_the_published_factors_of_gated_deltanet():
    """Six heads of 256/512 at a width of 2048, and 6 d_model^2 weights."""
    with torch.device("meta"):
        shape = ModelShape(2048, 24, 16)
        mixer = configured("gated_deltanet", shape, num_heads=6, key_factor=0.75, value_factor=1.5)
    assert (mixer.key_dim, mixer.value_dim) == (256, 512)
    assert abs(sum(x.numel() for x in mixer.parameters()) / (6 * 2048**2) - 1) < 0.01


def test_ranks_can_be_chosen():
    mixer = configured("kda", decay_rank=5, gate_rank=3)
    assert mixer.decay.down.out_features == 5 and mixer.gate[0].out_features == 3
    mixer = configured("gla", decay_rank=7)
    assert mixer.decay.down.out_features == 7


@pytest.fixture
def engine(monkeypatch):
    """What the engine was last given, by name."""
    given = {}
    run = gated_memory.delta_rule

    def spy(query, key, value, **options):
        given.update(options, query=query, key=key, value=value)
        return run(query, key, value, **options)

    monkeypatch.setattr(gated_memory, "delta_rule", spy)
    return given


@pytest.mark.parametrize("name", DELTA)
def test_transitions_shrink(name, engine):
    """Unit keys and queries; the eigenvalues of every transition lie in [0, 1]."""
    mixer = configured(name).double()
    mixer(3 * torch.randn(1, 30, 48).double())
    write, read = engine["low_rank_write"], engine["low_rank_read"]
    for x in (engine["query"], write):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(1, 30, 4).double(), rtol=0, atol=1e-3)
    decay = engine["log_decay"] if name == "kda" else engine["log_decay"].unsqueeze(-1).expand_as(write)
    assert (decay <= 0).all() and (decay < 0).all() == (name != "deltanet")
    transitions = torch.diag_embed(decay.exp()) + write.unsqueeze(-1) * read.unsqueeze(-2)
    eigenvalues = torch.linalg.eigvals(transitions)
    assert eigenvalues.imag.abs().max() < 1e-9
    assert eigenvalues.real.min() > -1e-9 and eigenvalues.real.max() < 1 + 1e-9
    assert engine["scale"] == mixer.key_dim**-0.5


def test_gla_only_adds(engine):
    mixer, x = configured("gla"), torch.randn(1, 9, 48)
    mixer(x)
    assert engine["low_rank_read"] is None and engine["low_rank_write"] is None
    torch.testing.assert_close(engine["key"].flatten(2), mixer.key(x))
    assert 0.94 < engine["log_decay"].exp().mean() < 0.97 and engine["scale"] == 6**-0.5


@pytest.mark.parametrize("name", NAMES)
def test_gates_are_never_rounded(name, engine):
    """Two inputs cancel in the write strength and the decay that bfloat16 cannot tell from each other."""
    mixer = configured(name)
    layers = [mixer.strength] if mixer.strength is not None else []
    if mixer.decay is not None:
        layers.append(mixer.decay.down or mixer.decay.up)
    with torch.no_grad():
        for layer in layers:
            layer.weight.zero_()
            layer.weight[:, 0], layer.weight[:, 1] = 1.0, -1.0
    x = torch.randn(2, 20, 48)
    x[..., 0], x[..., 1] = 1000.5, 1000.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = mixer(x).y
    assert output.dtype == engine["query"].dtype == engine["value"].dtype == torch.bfloat16
    inside = engine["log_decay"].clone()
    if mixer.strength is not None:
        strength = engine["key"].float().norm(dim=-1) / engine["low_rank_write"].float().norm(dim=-1)
        torch.testing.assert_close(strength, torch.full_like(strength, 1 / (1 + math.exp(-0.5))), rtol=0.01, atol=0)
    mixer(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, engine["log_decay"])
    if mixer.decay is not None:
        assert not torch.equal(inside, mixer.log_decay(x.bfloat16().float()))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_input_has_finite_gradients(name):
    mixer, x = configured(name), torch.zeros(1, 5, 48, requires_grad=True)
    mixer(x).y.sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *mixer.parameters()) if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_flops_count_weights_convolution_and_state(name):
    mixer = configured(name)
    linear = sum(x.numel() for key, x in mixer.named_parameters() if x.dim() == 2 and key != "convolution.weight")
    convolved = 0 if mixer.convolution is None else 4 * mixer.recent_channels
    products = 2 if name == "gla" else 4
    state = products * mixer.num_heads * mixer.key_dim * mixer.value_dim
    assert mixer.flops(10) == 10 * 2 * (linear + convolved + state)


def test_a_state_can_be_tuned():
    mixer, x = configured("gated_deltanet"), torch.randn(2, 8, 48)
    mixer.tune_states(features=6)
    mixer(x).y.square().sum().backward()
    for parameter in mixer.tuned.parameters():
        assert parameter.grad.abs().max() > 0
