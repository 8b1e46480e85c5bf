"""What is particular to RWKV-7: its formulas against a plain restatement, every initial value, the value residual."""

import math

import pytest
import torch
import torch.nn.functional as F

from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.rwkv7 import RWKV7, default_rank
from longmix.model.backbone import LanguageModel
from longmix.model.rwkv_blocks import ChannelMix, RWKVBlocks
from longmix.recipe import recipe_of

SHAPE = ModelShape(d_model=48, num_layers=4, num_heads=3, norm_eps=1e-5)


def shaken(module: torch.nn.Module, size: float = 0.1) -> torch.nn.Module:
    """In float64 and with noise on every weight, since most of this model is zero or constant at first."""
    module.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return module


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def time_mix(p: dict[str, torch.Tensor], x: torch.Tensor, first: torch.Tensor | None, size: int) -> tuple:
    """RWKV-7's time mixing of one sequence [T, D], token by token with the authors' [V, K] state; and its value."""
    mu = dict(zip("rwkvag", p["shifts"], strict=True))
    at = {c: x + (shifted(x) - x) * mu[c] for c in mu}
    r, k, v = at["r"] @ p["query.weight"].T, at["k"] @ p["key.weight"].T, at["v"] @ p["value.weight"].T
    d = p["decay_base"] + (at["w"] @ p["decay.down.weight"].T).tanh() @ p["decay.up.weight"].T
    w = (-(-F.softplus(-d) - 0.5).exp()).exp()
    a = (p["rate_base"] + at["a"] @ p["rate.down.weight"].T @ p["rate.up.weight"].T).sigmoid()
    g = (at["g"] @ p["gate.down.weight"].T).sigmoid() @ p["gate.up.weight"].T
    if first is not None:
        v = (
            v
            + (first - v)
            * (p["value_base"] + at["v"] @ p["value_mix.down.weight"].T @ p["value_mix.up.weight"].T).sigmoid()
        )
    kk, k = k * p["removal_scale"], k * (1 + (a - 1) * p["replacement_scale"])
    outputs = []
    for start in range(0, x.shape[1], size):
        channels = slice(start, start + size)
        state, rows = x.new_zeros(size, size), []
        for t in range(len(x)):
            kappa = kk[t, channels] / kk[t, channels].norm()
            state = (
                state * w[t, channels]
                - torch.outer(state @ kappa, a[t, channels] * kappa)
                + torch.outer(v[t, channels], k[t, channels])
            )
            y = state @ r[t, channels]
            y = (y - y.mean()) / (y.var(unbiased=False) + 64e-5).sqrt()
            y = y * p["head_norm.weight"][channels] + p["head_norm.bias"][channels]
            bonus = (r[t, channels] * k[t, channels] * p["bonus"][channels]).sum()
            rows.append(y + bonus * v[t, channels])
        outputs.append(torch.stack(rows))
    return (torch.cat(outputs, 1) * g) @ p["output.weight"].T, v


@pytest.mark.parametrize("layer", [0, 2])
def test_equals_the_formulas_token_by_token(layer):
    mixer = shaken(RWKV7(SHAPE, layer, head_dim=16))
    x, first = random(2, 23, 48, seed=1), random(2, 23, 48, seed=2) if layer else None
    output = mixer(x, value_residual=first)
    weights = dict(mixer.named_parameters())
    for row in range(2):
        wanted, value = time_mix(weights, x[row], None if first is None else first[row], 16)
        torch.testing.assert_close(output.y[row], wanted, rtol=0, atol=1e-11)
        torch.testing.assert_close(
            output.value_residual[row], value if first is None else first[row], rtol=0, atol=1e-13
        )


def test_channel_mixing_equals_its_formula():
    layer = shaken(ChannelMix(SHAPE, 1, 100))
    x = random(1, 9, 48)
    mixed = x[0] + (shifted(x[0]) - x[0]) * layer.shift
    wanted = (mixed @ layer.key.weight.T).relu().square() @ layer.value.weight.T
    torch.testing.assert_close(layer(x).y[0], wanted, rtol=0, atol=1e-13)


def test_every_initial_value_is_the_published_one():
    torch.manual_seed(0)
    width, layers, layer, size = 128, 6, 2, 64
    mixer = RWKV7(ModelShape(width, layers, 2), layer)
    depth, rest = layer / (layers - 1), 1 - layer / layers
    mu = {"query": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
    for c in (0, 1, 31, 70, 127):
        n = c % size
        s = (n - (size - 1) / 2) / ((size - 1) / 2)
        z, m = s * abs(s), c / (width - 1) - 0.5
        for shift, power in zip(mixer.shifts, mu.values(), strict=True):
            assert shift[c].item() == pytest.approx(1 - (c / width) ** (power * rest), abs=1e-6)
        decay = -6 + 6 * (c / (width - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * z
        assert mixer.decay_base[c].item() == pytest.approx(decay, abs=1e-5)
        assert mixer.rate_base[c].item() == pytest.approx(-0.19 + 0.3 * z + 0.4 * m, abs=1e-6)
        assert mixer.value_base[c].item() == pytest.approx(0.73 - 0.4 * m, abs=1e-6)
        assert mixer.removal_scale[c].item() == pytest.approx(0.71 - 0.1 * m, abs=1e-6)
    assert (mixer.replacement_scale == 1.02).all() and (mixer.bonus == -0.04).all()
    assert mixer.head_norm.weight.allclose(torch.tensor(((1 + layer) / layers) ** 0.7))
    assert not mixer.head_norm.bias.any() and not mixer.output.weight.any()
    for pair in (mixer.decay, mixer.rate, mixer.value_mix, mixer.gate):
        assert not pair.down.weight.any()
        gram = pair.up.weight.T @ pair.up.weight
        torch.testing.assert_close(gram, 0.01 * torch.eye(len(gram)), rtol=0, atol=1e-6)
    for projection, gain in ((mixer.query, 1.0), (mixer.value, 1.0), (mixer.key, 0.1)):
        gram = projection.weight @ projection.weight.T
        torch.testing.assert_close(gram, gain**2 * torch.eye(width), rtol=0, atol=1e-5)

    channels = ChannelMix(ModelShape(width, layers, 2), layer, 512)
    for c in (0, 1, 70, 127):
        assert channels.shift[c].item() == pytest.approx(1 - (c / width) ** (rest**4), abs=1e-6)
    torch.testing.assert_close(channels.key.weight.T @ channels.key.weight, torch.eye(width), rtol=0, atol=1e-5)
    assert not channels.value.weight.any()


def test_thin_matrices_that_are_not_thin_begin_larger():
    up = RWKV7(ModelShape(48, 2, 3), 0, head_dim=16, decay_rank=192).decay.up.weight
    torch.testing.assert_close(up @ up.T, 0.04 * torch.eye(48), rtol=0, atol=1e-6)


def test_a_model_of_one_layer_has_finite_weights():
    for weight in RWKV7(ModelShape(64, 1, 1), 0).parameters():
        assert weight.isfinite().all()
    assert RWKV7(ModelShape(1, 1, 1), 0, head_dim=1).decay_base.isfinite().all()


@pytest.mark.parametrize("vocabulary", [32, 4 * 48])
def test_embedding_and_head_begin_as_published(vocabulary):
    torch.manual_seed(0)
    net = LanguageModel(
        lambda shape, index: RWKV7(shape, index, head_dim=16),
        vocabulary,
        d_model=48,
        num_layers=2,
        num_heads=3,
        mlp_hidden=128,
        block=RWKVBlocks(),
    )
    assert 0.9e-4 < net.embedding.weight.abs().max() <= 1e-4
    assert torch.linalg.svdvals(net.head.weight).allclose(torch.tensor(0.5 * math.sqrt(max(1, vocabulary / 48))))
    assert net.blocks[0].mlp.key.out_features == 4 * 48
    assert all(type(norm) is torch.nn.LayerNorm for norm in (net.norm, net.embedding_norm, net.blocks[1].mlp_norm))


def test_recipes_are_the_authors():
    """Weight decay on matrices that are not thin; twice the learning rate on the base of the decay."""
    mixer, channels = RWKV7(SHAPE, 1, head_dim=16), ChannelMix(SHAPE, 1, 96)
    named = {f"mixer.{name}": w for name, w in mixer.named_parameters()}
    named |= {f"channels.{name}": w for name, w in channels.named_parameters()}
    decayed = {name for name, weight in named.items() if recipe_of(weight).weight_decay}
    assert decayed == {
        *(f"mixer.{name}.weight" for name in ("query", "key", "value", "output")),
        "channels.key.weight",
        "channels.value.weight",
    }
    assert decayed == {name for name, weight in named.items() if recipe_of(weight).role == "matrix"}
    faster = {name for name, weight in named.items() if recipe_of(weight).learning_rate_multiplier != 1}
    assert faster == {"mixer.decay_base"} and recipe_of(mixer.decay_base).learning_rate_multiplier == 2
    net = LanguageModel(Flash, 9, d_model=8, num_layers=1, num_heads=2, mlp_hidden=8, block=RWKVBlocks())
    assert recipe_of(net.embedding.weight).weight_decay and recipe_of(net.head.weight).weight_decay


@pytest.mark.parametrize(
    ("width", "ranks"),
    [(768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160)), (2048, (128, 128, 64, 224)), (2560, (128, 128, 96, 256))],
)
def test_ranks_follow_the_rule(width, ranks):
    assert tuple(default_rank(name, width) for name in ("decay", "rate", "value", "gate")) == ranks


@pytest.mark.parametrize(
    ("width", "layers", "value_rank", "gate_rank", "millions"),
    [(768, 12, 32, 128, 191.1), (1024, 24, 32, 128, 450.83)],
)
def test_the_published_parameter_counts(width, layers, value_rank, gate_rank, millions):
    """The published models also hold, and never use, a value residual in their first layer."""
    with torch.device("meta"):
        net = LanguageModel(
            lambda shape, index: RWKV7(
                shape, index, decay_rank=64, rate_rank=64, value_rank=value_rank, gate_rank=gate_rank
            ),
            65536,
            d_model=width,
            num_layers=layers,
            num_heads=1,
            mlp_hidden=-(-8 * width // 3),
            block=RWKVBlocks(),
        )
    unused = width + 2 * width * value_rank
    assert (net.parameter_counts()["total"] + unused) / 1e6 == pytest.approx(millions, abs=0.05)


def mixed_stack(shape: ModelShape, index: int) -> torch.nn.Module:
    return Flash(shape, index) if index in (0, 2) else RWKV7(shape, index, head_dim=16)


def stack(**changes) -> LanguageModel:
    sizes = {"d_model": 48, "num_layers": 4, "num_heads": 3, "mlp_hidden": 64, **changes}
    torch.manual_seed(0)
    return shaken(LanguageModel(mixed_stack, 30, block=RWKVBlocks(), **sizes), 0.05)


def test_later_layers_read_the_first_value():
    """Layer 1 is the first with one; what it gives is what layer 3 gets, though layer 2 between them has none."""
    net = stack()
    seen = {}
    for index in (1, 3):
        net.blocks[index].mixer.register_forward_hook(
            lambda module, args, kwargs, output, index=index: seen.update({index: (kwargs, output)}), with_kwargs=True
        )
    tokens = torch.arange(24).view(2, 12)
    net(tokens, tokens).token_losses.sum().backward()
    assert seen[1][0]["value_residual"] is None
    assert seen[3][0]["value_residual"] is seen[1][1].value_residual
    assert net.blocks[3].mixer.value_base.grad.abs().max() > 1e-9


def test_a_stack_continues_from_its_state_and_keeps_documents_apart():
    net = stack()
    tokens = torch.randint(30, (2, 31), generator=torch.Generator().manual_seed(1))
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([11, 1, 19])).expand(2, -1).int()
    whole = net(tokens, document_ids=ids).hidden
    for document in range(3):
        place = ids[0] == document
        torch.testing.assert_close(whole[:, place], net(tokens[:, place]).hidden, rtol=0, atol=1e-11)
    state, pieces, start = net.init_state(2), [], 0
    for length in (5, 1, 1, 9, 1, 14):
        piece = slice(start, start + length)
        output = net(tokens[:, piece], state=state, document_ids=ids[:, piece])
        state, start = output.state, start + length
        pieces.append(output.hidden)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-11)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for choice in ("none", "block", "selective"):
        net = stack(activation_checkpointing=choice)
        tokens = torch.arange(24).view(2, 12)
        net(tokens, tokens).token_losses.mean().backward()
        gradients.append({name: weight.grad for name, weight in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert torch.equal(gradient, gradients[2][name]), name


def test_the_size_of_each_heads_state_is_a_metric():
    mixer = shaken(RWKV7(SHAPE, 0, head_dim=16))
    output = mixer(random(2, 20, 48), state=mixer.init_state(2))
    assert len(output.metrics) == 3
    for head in range(3):
        size = output.state.carried[:, head].square().mean().sqrt()
        torch.testing.assert_close(output.metrics[f"state_rms_head_{head}"].figure(), size, check_dtype=False)


def test_decay_stays_within_its_bounds_and_is_never_rounded():
    mixer = RWKV7(SHAPE, 0, head_dim=16)
    with torch.no_grad():
        mixer.decay.down.weight.normal_()
        mixer.decay.up.weight.normal_(std=10.0)
    x = torch.randn(1, 50, 48)
    log_decay = mixer.log_decay(x)
    assert log_decay.min() >= -math.exp(-0.5) and log_decay.max() <= 0 and log_decay.min() < -0.6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mixer.log_decay(x)
    assert inside.dtype == torch.float32


@pytest.mark.slow
def test_compiles_as_one_graph():
    """So that torch.compile may fuse all that is done element by element."""
    mixer = shaken(RWKV7(SHAPE, 1, head_dim=16)).float()
    x, first = random(2, 20, 48).float(), random(2, 20, 48, seed=1).float()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, value_residual=first).y, mixer(x, value_residual=first).y, rtol=1e-5, atol=1e-5
    )


def test_runs_in_mixed_precision():
    mixer = shaken(RWKV7(SHAPE, 1, head_dim=16)).float()
    x, first = random(2, 40, 48).float(), random(2, 40, 48, seed=1).float()
    exact = mixer(x, value_residual=first).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = mixer(x, value_residual=first.bfloat16()).y
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
    rounded.float().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in mixer.parameters())


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"mixer\.head_dim=64 does not divide model\.d_model=48"):
        RWKV7(SHAPE, 0)
    with pytest.raises(ConfigError, match=r"mixer\.gate_rank=0 must be at least 1"):
        RWKV7(SHAPE, 0, head_dim=16, gate_rank=0)
