"""The delta rule's relatives and options against their equations, token by token in float64, gradients included."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from longmix.errors import ConfigError
from longmix.mixers.comba import Comba
from longmix.mixers.deltanet import DeltaNet
from longmix.mixers.gated_deltanet import GatedDeltaNet
from longmix.mixers.gated_deltanet2 import GatedDeltaNet2
from longmix.mixers.gated_deltaproduct import GatedDeltaProduct
from longmix.mixers.gla import GLA
from longmix.mixers.kda import KDA
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory

SHAPE = ModelShape(d_model=24, num_layers=2, num_heads=2)
LENGTH = 19
GROUPED = {"num_heads": 2, "num_value_heads": 4}
WIDE = {"key_factor": 1.0, "value_factor": 1.0}

MIXERS = {
    "deltanet-negative": lambda: DeltaNet(SHAPE, 0, num_heads=2, negative_eigenvalues=True),
    "gated-deltanet-grouped": lambda: GatedDeltaNet(SHAPE, 0, **GROUPED, negative_eigenvalues=True),
    "kda-grouped": lambda: KDA(SHAPE, 0, **GROUPED, negative_eigenvalues=True),
    "gla-grouped": lambda: GLA(SHAPE, 0, **GROUPED),
    "gated-deltanet2": lambda: GatedDeltaNet2(SHAPE, 0, num_heads=2),
    "gated-deltanet2-grouped": lambda: GatedDeltaNet2(SHAPE, 0, **GROUPED, **WIDE, negative_eigenvalues=True),
    "gated-deltaproduct": lambda: GatedDeltaProduct(SHAPE, 0, num_heads=2),
    "comba": lambda: Comba(SHAPE, 0, num_heads=2, correction=0.7),
    "comba-grouped": lambda: Comba(SHAPE, 0, **GROUPED, decay="channel", correction=-0.3),
    "deltaproduct-grouped": lambda: GatedDeltaProduct(SHAPE, 0, **GROUPED, **WIDE, householders=3, decay="none"),
}


@pytest.fixture(params=MIXERS)
def mixer(request) -> GatedMemory:
    torch.manual_seed(0)
    mixer = MIXERS[request.param]().double()
    with torch.no_grad():
        mixer.head_norm.weight.normal_()
        if isinstance(mixer, Comba):
            mixer.feedback.normal_()
            mixer.correction.add_(torch.randn_like(mixer.correction))
    return mixer


def made(mixer: GatedMemory, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What one row of `x` [T, D] asks of the memory: q [T, Hv, K], and k, v, b, w of each write [T, n, Hv, .].

    Comba has besides with what it asks the state before the decay, "asked" [T, n, Hv, K].
    """
    w = dict(mixer.named_parameters())
    n, heads, value_heads = mixer.householders, mixer.num_heads, mixer.num_value_heads
    parts = [x @ w[f"{name}.weight"].T for name in ("query", "key", "value")]
    if mixer.convolution is not None:
        kernels = w["convolution.weight"].split([part.shape[1] for part in parts], 1)
        padded = [F.pad(part, (0, 0, len(kernel) - 1, 0)) for part, kernel in zip(parts, kernels, strict=True)]
        lags = range(len(kernels[0]))
        parts = [
            F.silu(sum(kernel[lag] * part[len(lags) - 1 - lag :][: len(x)] for lag in lags))
            for part, kernel in zip(padded, kernels, strict=True)
        ]

    def shared(part: torch.Tensor) -> torch.Tensor:
        return part.repeat_interleave(value_heads // heads, -2)

    query = parts[0].view(len(x), heads, -1)
    key, value = parts[1].view(len(x), n, heads, -1), parts[2].view(len(x), n, value_heads, -1)
    found = {"query": query, "key": key, "value": value}
    if not mixer.delta:
        return found | {"query": shared(query), "key": shared(key)}
    found |= {name: shared(part / (part.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()) for name, part in found.items()}
    found["value"] = value
    most = 2.0 if mixer.negative_eigenvalues else 1.0
    if isinstance(mixer, GatedDeltaNet2):
        erase = most * torch.sigmoid(x @ w["erase.weight"].T).view(len(x), n, heads, -1)
        write = torch.sigmoid(x @ w["write.weight"].T).view(len(x), n, value_heads, -1)
        return found | {"erase": shared(erase), "write": write}
    strength = most * torch.sigmoid(x @ w["strength.weight"].T).view(len(x), n, value_heads, 1)
    if isinstance(mixer, Comba):
        d, b = (shared(w[name].unsqueeze(-1)) for name in ("correction", "feedback"))
        asked = found["key"] / (1 + torch.exp(-b))
        found |= {"query": found["query"] - d * found["key"].squeeze(1), "asked": asked}
    return found | {"erase": strength, "write": strength}


def expected(mixer: GatedMemory, x: torch.Tensor) -> torch.Tensor:
    """The mixer by the equations in the heads of its modules, one row at a time."""
    rows = []
    for row in x:
        terms = made(mixer, row)
        decay = mixer.log_decay(row[None])[0].exp()
        decay = decay if decay.dim() == 3 else decay.unsqueeze(-1)
        if mixer.decays_of_keys:
            decay = decay.repeat_interleave(mixer.num_value_heads // mixer.num_heads, 1)
        state, reads = torch.zeros(mixer.num_value_heads, mixer.key_dim, mixer.value_dim).double(), []
        for t in range(len(row)):
            before, state = state, decay[t].unsqueeze(-1) * state
            for write in range(mixer.householders):
                key, value = terms["key"][t, write].unsqueeze(-1), terms["value"][t, write].unsqueeze(-2)
                if not mixer.delta:
                    state = state + key * value
                    continue
                asked, asking = (terms["asked"][t, write].unsqueeze(-1), before) if "asked" in terms else (key, state)
                erased = (terms["erase"][t, write].unsqueeze(-1) * asked).mT @ asking
                state = state + key * (terms["write"][t, write].unsqueeze(-2) * value - erased)
            reads.append(mixer.key_dim**-0.5 * (terms["query"][t].unsqueeze(-2) @ state).squeeze(-2))
        rows.append(torch.stack(reads))
    found = torch.stack(rows)
    normed = found / torch.sqrt(found.pow(2).mean(-1, keepdim=True) + 1e-5)
    mixed = normed.flatten(2) * mixer.head_norm.weight
    if mixer.output_gate != "none":
        gate = mixer.gate(x)
        mixed = mixed * (gate * torch.sigmoid(gate) if mixer.output_gate == "silu" else torch.sigmoid(gate))
    return mixed @ mixer.output.weight.T


def test_the_equations_with_gradients(mixer):
    x = torch.randn(2, LENGTH, SHAPE.d_model, dtype=torch.float64, requires_grad=True)
    parameters = {"x": x, **dict(mixer.named_parameters())}
    ours, theirs = mixer(x).y, expected(mixer, x)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad(y, list(parameters.values()), grad) for y in (ours, theirs))
    for name, one, other in zip(parameters, found, wanted, strict=True):
        assert (one - other).norm() <= 1e-11 * (1 + other.norm()), name


def test_slices_of_writes_and_of_several_heads_continue(mixer):
    """Documents, any split, and one token at a time: the contract's matrix has no heads of values of their own."""
    x, ids = torch.randn(1, LENGTH, SHAPE.d_model).double(), torch.tensor([[0] * 7 + [1] * 12]).int()
    parameters = {"x": x.requires_grad_(), **dict(mixer.named_parameters())}
    whole = torch.cat([expected(mixer, x[:, :7]), expected(mixer, x[:, 7:])], 1)
    torch.testing.assert_close(mixer(x, document_ids=ids).y, whole, rtol=0, atol=1e-12)
    state, pieces = mixer.init_state(1), []
    assert state.carried.shape[1] == mixer.num_value_heads
    for start, stop in ((0, 3), (3, 4), (4, 9), (9, LENGTH)):
        output = mixer(x[:, start:stop], state=state, document_ids=ids[:, start:stop])
        state, pieces = output.state, [*pieces, output.y]
    continued = torch.cat(pieces, 1)
    torch.testing.assert_close(continued, whole, rtol=0, atol=1e-12)
    grad = torch.randn_like(whole)
    found, wanted = (torch.autograd.grad(y, list(parameters.values()), grad) for y in (continued, whole))
    for name, one, other in zip(parameters, found, wanted, strict=True):
        assert (one - other).norm() <= 1e-11 * (1 + other.norm()), name


@pytest.mark.parametrize("negative", [False, True])
def test_eigenvalues_of_transitions(negative):
    torch.manual_seed(0)
    mixer = GatedDeltaNet(SHAPE, 0, negative_eigenvalues=negative).double()
    given = []
    mixer.watch = given.append
    mixer(4 * torch.randn(1, 40, SHAPE.d_model).double())
    decay, read, write = (given[0].options[name] for name in ("log_decay", "low_rank_read", "low_rank_write"))
    diagonal = torch.diag_embed(decay.exp().unsqueeze(-1).expand_as(read))
    least = torch.linalg.eigvals(diagonal + write.unsqueeze(-1) * read.unsqueeze(-2)).real.min()
    assert -1 <= least < -0.5 if negative else least > -1e-6


def test_eigenvalues_of_comba_reach_below_zero_and_never_beyond_one():
    torch.manual_seed(0)
    mixer = Comba(SHAPE, 0, num_heads=2).double()
    with torch.no_grad():
        mixer.feedback.fill_(30.0)
        mixer.decay.log_rate.fill_(3.0)
    given = []
    mixer.watch = given.append
    mixer(40 * torch.randn(1, 40, SHAPE.d_model).double())
    decay, read, write = (given[0].options[name] for name in ("log_decay", "low_rank_read", "low_rank_write"))
    diagonal = torch.diag_embed(decay.exp().unsqueeze(-1).expand_as(read))
    found = torch.linalg.eigvals(diagonal + write.unsqueeze(-1) * read.unsqueeze(-2)).real
    assert -1 - 1e-12 < found.min() < -0.9 and 0.9 < found.max() < 1 + 1e-12


@torch.no_grad()
def test_comba_without_corrections_is_deltanet():
    torch.manual_seed(0)
    ours = Comba(SHAPE, 0, num_heads=2, decay="none", output_gate="none", correction=0.0)
    theirs = DeltaNet(SHAPE, 0, num_heads=2, key_factor=0.5)
    theirs.load_state_dict({name: x for name, x in ours.state_dict().items() if name in theirs.state_dict()})
    ours.feedback.fill_(60.0)
    x = torch.randn(2, LENGTH, SHAPE.d_model)
    assert torch.equal(ours(x).y, theirs(x).y)


def test_without_new_options_nothing_changes():
    """One value head a key head, one householder: the same numbers, bit for bit, as if nothing was said."""
    for kind in (DeltaNet, GatedDeltaNet, KDA, GLA):
        found = []
        for options in ({}, {"num_heads": 4, "num_value_heads": 4}):
            torch.manual_seed(0)
            found.append(kind(SHAPE, 0, **options)(torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(1))).y)
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (GLA, {"negative_eigenvalues": True}, "negative_eigenvalues=true needs mixer.delta=true"),
        (
            GatedDeltaProduct,
            {"delta": False, "negative_eigenvalues": False},
            "mixer.householders=2 needs mixer.delta=tr",
        ),
        (GatedDeltaProduct, {"householders": 0}, "mixer.householders=0 must be from 1 to 64"),
        (
            KDA,
            {"num_heads": 4, "num_value_heads": 2},
            "mixer.num_value_heads=2 must be a multiple of mixer.num_he",
        ),
        (
            KDA,
            {"num_heads": 4, "num_value_heads": 6},
            "mixer.num_value_heads=6 must be a multiple of mixer.num_he",
        ),
        (Comba, {"correction": 1e7}, "mixer.correction=10000000.0 is out of range"),
        (Comba, {"output_gate": "tanh"}, "mixer.output_gate=tanh is unknown; use none, silu, sigmoid or low_rank"),
        (KDA, {"num_heads": 1, "num_value_heads": 5}, "mixer.num_value_heads=5 does not divide mixer.value_factor"),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, words):
    with pytest.raises(ConfigError, match=words):
        kind(SHAPE, 0, **options)


def test_fla_has_the_same_recurrences():
    """Its naive ones, in float32, on what our mixers hand to the engine before they make its terms."""
    naive = pytest.importorskip("fla.ops.gdn2.naive", reason="an optional oracle").naive_recurrent_gdn2
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product

    for name in ("gated-deltanet2", "gated-deltaproduct"):
        torch.manual_seed(0)
        mixer, x = MIXERS[name]().double(), torch.randn(1, LENGTH, SHAPE.d_model).double()
        given = []
        mixer.watch = given.append
        mixer(x)
        terms = {name: part[None].flatten(1, 2) for name, part in made(mixer, x[0]).items()}
        query = made(mixer, x[0])["query"][None]
        names, decay = ("key", "value", "erase", "write"), mixer.log_decay(x)
        if name == "gated-deltanet2":
            key, value, erase, write = (terms[name] for name in names)
            found, _ = naive(query, key, value, decay, erase, write)
        else:
            key, value, strength = terms["key"], terms["value"], terms["write"].squeeze(-1)
            scale = mixer.key_dim**-0.5
            found, _ = naive_recurrent_gated_delta_product(
                query, key, value, decay, strength, scale, num_householder=mixer.householders
            )
        torch.testing.assert_close(found.double(), given[0].output, rtol=0, atol=1e-6)


def test_grouped_values_are_those_of_qwen3_next():
    """transformers' layer with our weights: more heads of values than of keys, one norm for all heads."""
    pytest.importorskip("transformers", reason="an optional oracle")
    if importlib.util.find_spec("fla"):
        pytest.skip("transformers runs the kernels of fla where it is installed, and these need a GPU")
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    torch.manual_seed(0)
    ours = GatedDeltaNet(SHAPE, 0, key_factor=0.5, value_factor=2.0, norm_eps=1e-6, shared_norm=True, **GROUPED)
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
    heads = {"linear_key_head_dim": ours.key_dim, "linear_value_head_dim": ours.value_dim}
    config = Qwen3NextConfig(
        hidden_size=24, num_hidden_layers=1, rms_norm_eps=1e-6, hidden_act="silu", **sizes, **heads
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    with torch.no_grad():
        ours.head_norm.weight.normal_()
        by_key = [
            weight.view(2, -1, 24)
            for weight in (ours.query.weight, ours.key.weight, ours.value.weight, ours.gate.weight)
        ]
        theirs.in_proj_qkvz.weight.copy_(torch.cat(by_key, 1).flatten(0, 1))
        strength, decay = (weight.view(2, -1, 24) for weight in (ours.strength.weight, ours.decay.up.weight))
        theirs.in_proj_ba.weight.copy_(torch.cat([strength, decay], 1).flatten(0, 1))
        theirs.conv1d.weight.copy_(ours.convolution.weight.flip(0).T.unsqueeze(1))
        theirs.A_log.copy_(ours.decay.log_rate)
        theirs.dt_bias.copy_(ours.decay.bias)
        theirs.norm.weight.copy_(ours.head_norm.weight)
        theirs.out_proj.weight.copy_(ours.output.weight)
        x = torch.randn(2, 70, 24)
        torch.testing.assert_close(ours(x).y, theirs(x), rtol=0, atol=1e-5)
