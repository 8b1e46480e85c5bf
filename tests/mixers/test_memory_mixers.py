"""What is particular to the mixers with a decaying memory: the published blocks, token by token in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_deltanet import convolved

from longmix.errors import ConfigError
from longmix.mixers.hgrn2 import HGRN2
from longmix.mixers.lightning import Lightning
from longmix.mixers.mamba2 import Mamba2
from longmix.mixers.parts.base import Mixer, ModelShape
from longmix.mixers.parts.channel_scan import channel_scan
from longmix.mixers.qlstm import QLSTM
from longmix.mixers.wersa import Wersa
from longmix.recipe import recipe_of
from longmix_kernels.linear import LinearState, linear_attention

SHAPE = ModelShape(d_model=48, num_layers=4, num_heads=3)
FIXTURES = Path(__file__).parents[1] / "fixtures/model_side"


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


def published_qlstm(mixer: QLSTM, x: torch.Tensor) -> torch.Tensor:
    w = dict(mixer.named_parameters())
    value, forget, taken, gate = (x @ w[f"{name}.weight"].T for name in ("value", "forget", "input", "gate"))
    forget = torch.sigmoid(forget + w["forget_bias"])
    if "log_rate" in w:
        forget = (1 - forget) ** w["log_rate"].exp()
    hidden, found = 0.0, []
    for t in range(x.shape[1]):
        hidden = forget[:, t] * hidden + torch.sigmoid(taken[:, t]) * value[:, t]
        found.append(torch.sigmoid(gate[:, t]) * hidden)
    return torch.stack(found, 1) @ w["output.weight"].T


CASES = {
    "mamba2": (published_mamba2, lambda: Mamba2(SHAPE, 1, state_size=16)),
    "mamba2-groups": (published_mamba2, lambda: Mamba2(SHAPE, 0, expand=1.5, state_size=8, groups=2, num_heads=6)),
    "mamba2-no-convolution": (published_mamba2, lambda: Mamba2(SHAPE, 0, state_size=3, convolution=0)),
    "hgrn2": (published_hgrn2, lambda: HGRN2(SHAPE, 2)),
    "hgrn2-first-layer": (published_hgrn2, lambda: HGRN2(SHAPE, 0, convolution=3)),
    "qlstm": (published_qlstm, lambda: QLSTM(SHAPE, 0)),
    "qlstm-reversed": (published_qlstm, lambda: QLSTM(SHAPE, 0, decay="reversed")),
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


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_that_of_transformers(groups):
    """Theirs computes in float32: output, every gradient, and steps after a prefill from both caches."""
    from transformers import DynamicCache

    mixer = seeded(lambda: Mamba2(SHAPE, 0, state_size=16, groups=groups), torch.float32)
    other, config = theirs(mixer)
    if groups > 1 and not hasattr(other.norm, "group_size"):
        pytest.skip("this release of transformers normalises over all groups at once")
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
            torch.testing.assert_close(output.y, other(x[:, piece], cache), rtol=1e-4, atol=1e-5)


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
    for decay in ("sigmoid", "reversed"):
        forgets = QLSTM(SHAPE, 0, decay=decay)
        first = forgets.gates(torch.zeros(1, 1, 48)).chunk(2, -1)[0].exp()
        assert (first > 0.89).all() and (first < 0.9991).all()
    bounds = [HGRN2(SHAPE, layer).bound for layer in range(4)]
    assert bounds[0] is None
    for layer, bound in enumerate(bounds[1:], 1):
        torch.testing.assert_close(bound.sigmoid(), torch.full((48,), layer / 4))
    assert HGRN2(SHAPE, 2, lower_bound="none").bound is None
    assert "bound" in HGRN2(SHAPE, 2, lower_bound="fixed").state_dict()


@pytest.mark.parametrize("length", [1, 2, 16, 23])
@pytest.mark.parametrize("states", ["none", "initial", "carried"])
def test_a_scan_of_channels_is_linear_attention(length, states):
    """Outputs, final states and all gradients, with documents and with each state that may be given."""
    torch.manual_seed(0)
    shape = 2, length, 5
    given = [torch.randn(*shape, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    given += [gate.requires_grad_() for gate in F.logsigmoid(torch.randn(2, *shape, dtype=torch.float64)).unbind()]
    memories = [torch.randn(2, 5, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    used = {"none": 0, "initial": 1, "carried": 2}[states]
    ids = torch.arange(length).expand(2, -1) // torch.tensor([[4], [9]])
    found = []
    for engine in (channel_scan, linear_attention):
        query, key, value, log_decay, log_input = given
        initial, carried = (LinearState(memory) if use < used else None for use, memory in enumerate(memories))
        output, state = engine(
            *(query, key, value),
            **{"log_decay": log_decay, "log_input": log_input, "scale": 0.7, "document_ids": ids},
            **{"initial_state": initial, "carried_state": carried},
        )
        total = (output * given[2].detach().cos()).sum() + state.memory.sin().sum()
        found.append([output, state.memory, *torch.autograd.grad(total, [*given, *memories[:used]])])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_the_exponential_normaliser_is_that_of_the_fixture():
    """y_i = exp(-w . x_i) sum_j (q_i . k_j) v_j, in a mixer that only passes on what its input holds."""
    fixture = np.load(FIXTURES / "dsf_attention.npz")
    query, key, value, log_eta = (torch.from_numpy(fixture[name])[0] for name in ("phi_q", "psi_k", "v", "log_eta"))
    parts = [query.flatten(1), key.flatten(1), F.pad(value, (0, 9)).flatten(1), log_eta]  # 8, 8, 24 and 2 channels
    x = F.pad(torch.cat(parts, 1), (0, 6)).unsqueeze(0)
    shape = ModelShape(d_model=48, num_layers=1, num_heads=2)
    mixer = Lightning(shape, 0, key_factor=1 / 6, activation="none", norm="none", normaliser="exponential").double()
    eye = torch.eye(48, dtype=torch.float64)
    with torch.no_grad():
        mixer.log_decay.zero_()
        mixer.query.weight.copy_(2 * eye[:8])  # the scale is 4 ** -0.5
        mixer.key.weight.copy_(eye[8:16])
        mixer.value.weight.zero_()
        for head in range(2):
            mixer.value.weight[24 * head : 24 * head + 12] = eye[16 + 12 * head : 28 + 12 * head]
        mixer.normaliser.weight.copy_(eye[40:42])
        mixer.output_gate.weight.zero_()  # sigmoid(0) is a half
        mixer.output.weight.copy_(2 * eye)
    found = mixer(x).y.unflatten(-1, (2, 24))[..., :3]
    torch.testing.assert_close(found, torch.from_numpy(fixture["y_normalised"]), rtol=0, atol=1e-12)


def test_wersa_is_that_of_the_fixture_with_gradients():
    """Filtered queries, outputs and gradients; gains of 1 return what comes in."""
    fixture = {name: torch.from_numpy(array) for name, array in np.load(FIXTURES / "wersa_causal.npz").items()}
    names = ("q", "k", "v", "gain_q", "gain_k")
    query, key, value, *gains = (fixture[name].requires_grad_() for name in names)
    mixer = Wersa(ModelShape(8, 1, 2), 0, levels=int(fixture["levels"]), num_features=8).double()
    mixer.random = fixture["projections"]
    projected = torch.cat([query.flatten(2), key.flatten(2)], -1)
    before = projected.new_zeros(1, 7, 16)
    details = mixer.convolution(projected, before, None)
    torch.testing.assert_close(details.unflatten(-1, (4, 16)).sum(2), F.gelu(projected), rtol=0, atol=1e-14)
    gates = torch.stack(gains, 2).flatten(2)
    filtered = (details.unflatten(-1, (4, 2, 2, 4))[:, :, :, 0] * gains[0].movedim(-1, 2).unsqueeze(-1)).sum(2)
    torch.testing.assert_close(filtered, fixture["filtered_q"], rtol=0, atol=1e-12)
    terms = mixer.terms(torch.cat([details, value.flatten(2)], -1), gates)
    read, _ = linear_attention(*terms[:3], log_decay=terms.log_decay, scale=mixer.scale)
    found = mixer.leave(read, projected).unflatten(-1, (2, 4))
    torch.testing.assert_close(found, fixture["o"], rtol=0, atol=1e-12)
    grads = torch.autograd.grad((found * fixture["grad_o"]).sum(), [query, key, value, *gains])
    for name, grad in zip(names, grads, strict=True):
        wish = fixture[f"grad_{name}"]
        torch.testing.assert_close(grad, wish, rtol=0, atol=1e-12 * max(1.0, wish.abs().max().item()))


@pytest.mark.parametrize("name", ["moh", "moh_no_shared"])
def test_a_mixture_of_heads_gates_what_a_memory_reads(name):
    """The gates of the fixture on heads as they come out of the norm, and its balance loss, which training adds."""
    given = {key: torch.from_numpy(array) for key, array in np.load(FIXTURES / f"{name}.npz").items()}
    heads, shared, kept = (int(given[key]) for key in ("heads", "shared", "keep"))
    mixture = {"heads_shared": shared, "heads_kept": kept, "heads_balance": float(given["balance_weight"])}
    x = given["x"]
    mixer = Lightning(ModelShape(x.shape[2], 1, heads), 0, key_factor=1.0, **mixture).double()
    router = mixer.head_router
    with torch.no_grad():
        for key, layer in {"wg": router.routed, "wg_0": router.groups, "wg_1": router.shared}.items():
            if layer is not None:
                layer.weight.copy_(given[f"w_{key}_weight"])
    found, losses, _ = mixer.routed(given["causal_heads"], x, None)
    torch.testing.assert_close(found, given["causal_gated"], rtol=0, atol=1e-12)
    wanted = given["balance_weight"] * given["load_balance"]
    one_row = mixer.routed(*(part.flatten(0, 1)[None] for part in (given["causal_heads"], x)), None)[1]
    torch.testing.assert_close(one_row["head_balance"], wanted, rtol=0, atol=1e-7)  # the authors' shares are float32
    output = mixer(x)
    torch.testing.assert_close(output.losses["head_balance"], losses["head_balance"])
    assert {"largest_head", "head_entropy"} <= output.metrics.keys() and not mixer.eval()(x).losses


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
    "normaliser": (
        lambda: Lightning(SHAPE, 0, normaliser="exponential"),
        r"mixer.normaliser=exponential scales what each head reads, which mixer.norm=rms divides out again; use",
    ),
    "unknown-normaliser": (lambda: Lightning(SHAPE, 0, normaliser="x"), r"mixer.normaliser=x is unknown; use null or"),
    "norm": (lambda: Lightning(SHAPE, 0, norm="x"), r"mixer.norm=x is unknown; use rms, layer or none"),
    "levels": (lambda: Wersa(SHAPE, 0, levels=0), r"mixer.levels=0 must be from 1 to 12"),
    "features": (lambda: Wersa(SHAPE, 0, num_features=0), r"mixer.num_features=0 must be at least 1"),
    "qlstm": (lambda: QLSTM(SHAPE, 0, decay="x"), r"mixer.decay=x is unknown; use sigmoid or reversed"),
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
