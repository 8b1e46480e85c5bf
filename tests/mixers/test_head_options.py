"""Options of all softmax mixers give what their oracles give, gradients included; what cannot be is refused."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mixer_table import SHAPE, scatterbrain, stirred
from torch import nn

from longmix.errors import ConfigError
from longmix.mixers.combiner_log import CombinerLog
from longmix.mixers.flash import Flash
from longmix.mixers.hyper import Hyper
from longmix.mixers.moba import MoBA
from longmix.mixers.nsa import NSA
from longmix.mixers.parallax import Parallax
from longmix.mixers.parts.attention_state import keys_like, with_sinks
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.context_positions import ContextPositions
from longmix.mixers.parts.head_gates import HeadRouter, QueryNormRouter
from longmix.mixers.parts.score_bias import FourierBias, LowRankBias
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.sliding_window import SlidingWindow
from longmix.mixers.sparsek import SparseK
from longmix.mixers.tensor import TensorAttention
from longmix_kernels.attention import attention, bias_columns

FOLDER = Path(__file__).parents[1] / "fixtures/model_side"


def oracle(name: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * float(wanted.detach().abs().max()))


def fed(kind: type[SoftmaxAttention], given: dict[str, torch.Tensor], **options) -> SoftmaxAttention:
    """A mixer whose projections give the heads of an oracle, and whose output are the heads."""
    heads, head_dim = given["q"].shape[2:]
    options = {"qk_norm": False, "num_kv_heads": given["k"].shape[2], **options}
    mixer = kind(ModelShape(heads * head_dim, 1, heads), 0, **options).double()
    for name in ("q", "k", "v"):
        given[name].requires_grad_()
    mixer.project = lambda x: (given["q"], given["k"], given["v"])  # type: ignore[method-assign]
    mixer.output = nn.Identity()
    return mixer


ALIBI = {
    "flash": (Flash, {}),
    "window": (SlidingWindow, {"window": 500}),
    "hyper": (Hyper, {"window": 64, "buckets": 2}),
}


@pytest.mark.parametrize(("kind", "options"), ALIBI.values(), ids=ALIBI)
def test_alibi(kind, options):
    given = oracle("alibi")
    mixer = fed(kind, given, rotary_base=None, bias="alibi", **options)
    mixed = mixer(torch.zeros(*given["q"].shape[:2], mixer.d_model, dtype=torch.float64)).y.view_as(given["o"])
    near(mixed, given["o"])
    mixed.backward(given["grad_o"])
    for name in ("q", "k", "v"):
        near(given[name].grad, given[f"grad_{name}"])


def test_a_learned_bias_of_low_rank():
    given = oracle("flashbias_low_rank")
    names = ("q", "k", "v", "bias_q", "bias_k")
    q, k, v, bias_q, bias_k = (given[name].requires_grad_() for name in names)
    query, key, scale = bias_columns(q, k, bias_q, bias_k, balanced=False)
    mixed = attention(query, key, v, scale=scale)
    near(mixed, given["o"])
    mixed.backward(given["grad_o"])
    for name in names:
        near(given[name].grad, given[f"grad_{name}"])


def test_low_rank_factors_are_projections_of_the_tokens():
    bias, x = LowRankBias(6, 2).double(), torch.randn(1, 5, 6, dtype=torch.float64)
    assert not bias.factors(x, torch.arange(5)[None])[0].any()
    nn.init.normal_(bias.query.weight)
    query, key = (factor[0, :, 0] for factor in bias.factors(x, torch.arange(5)[None]))
    near(query @ key.mT, x[0] @ bias.query.weight.mT @ bias.key.weight @ x[0].mT)


def test_a_bias_of_frequencies():
    given = oracle("flashbias_fourier")
    mixer = fed(Flash, given, rotary_base=None, bias="fourier", bias_rank=3)
    bias = mixer.bias
    assert isinstance(bias, FourierBias)
    with torch.no_grad():
        for parameter, name in ((bias.cosine, "a"), (bias.sine, "b"), (bias.frequency, "w")):
            parameter.copy_(given[name])
    x = torch.zeros(*given["q"].shape[:2], mixer.d_model, dtype=torch.float64)
    far = 1000 + torch.arange(x.shape[1])[None]  # only differences of positions matter
    factors = bias.factors(x, far)
    near(torch.einsum("bihr,bjhr->hij", *factors), given["bias"])
    near(mixer(x).y.view_as(given["o"]), given["o"])


def test_a_gain_on_the_weights():
    """Ten frequencies give any gain of 19 distances, so that the oracle's, of each distance, can be set."""
    given = oracle("urpe")
    heads, length = given["gain"].shape
    mixer = fed(Flash, given, rotary_base=None, gain="fourier", bias_rank=(length + 1) // 2)
    bias = mixer.bias
    assert isinstance(bias, FourierBias)
    frequency = torch.arange((length + 1) // 2, dtype=torch.float64) * (2 * math.pi / length)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    basis = torch.cat((angles.cos(), angles.sin()), 1)  # [distance, amplitude]
    amplitudes = torch.linalg.pinv(basis) @ given["gain"].log().mT
    with torch.no_grad():
        bias.frequency.copy_(frequency.expand(heads, -1))
        bias.cosine.copy_(amplitudes[: len(frequency)].mT)
        bias.sine.copy_(amplitudes[len(frequency) :].mT)
    x = torch.zeros(*given["q"].shape[:2], mixer.d_model, dtype=torch.float64)
    mixed = mixer(x).y.view_as(given["o"])
    near(mixed, given["o"], 1e-11)
    mixed.backward(given["grad_o"])
    for name in ("q", "k", "v"):
        near(given[name].grad, given[f"grad_{name}"], 1e-11)
    wanted = (given["grad_gain"] * given["gain"]) @ basis
    near(torch.cat((bias.cosine.grad, bias.sine.grad), 1), wanted, 1e-10)


def test_a_gain_tells_positions_of_equal_tokens_apart_and_a_bias_does_not():
    spread = {}
    for name in ("bias", "gain"):
        torch.manual_seed(0)
        mixer = Flash(SHAPE, 0, **{name: "fourier"}).double()
        assert mixer.bias is not None
        nn.init.normal_(mixer.bias.cosine, std=0.3)
        y = mixer(torch.randn(1, 1, SHAPE.d_model, dtype=torch.float64).expand(1, 20, -1)).y
        spread[name] = float((y - y[:, :1]).detach().abs().max() / y.detach().abs().max())
    assert spread["bias"] < 1e-12 and spread["gain"] > 0.05


@pytest.mark.parametrize("name", ["carope", "carope_grouped_documents"])
def test_positions_of_the_context(name):
    given = oracle(name)
    mixer = fed(Flash, given, position="context")
    heads, pairs = given["phase"].shape[2:]
    own = ContextPositions(given["x"].shape[2], heads, 2 * pairs, 10_000.0).double()
    with torch.no_grad():
        own.frequency.weight.copy_(given["weight"].mT)
        own.frequency.bias.copy_(given["bias"])
    x = given["x"].requires_grad_()
    near(own.steps(x)[..., 1], given["f"])
    mixer.context, mixer.d_model = own, x.shape[2]
    query, key, after = own(x, given["q"], given["k"], None)
    near(query, given["q_rotated"])
    near(key, given["k_rotated"])
    near((after - given["phase"][:, -1]).cos(), torch.ones_like(after))
    mixed = mixer(x, document_ids=given["document_ids"].int()).y.view_as(given["o"])
    near(mixed, given["o"])
    mixed.backward(given["grad_o"])
    found = {"weight": own.frequency.weight.grad.mT, "bias": own.frequency.bias.grad, "x": x.grad}
    found |= {each: given[each].grad for each in ("q", "k", "v")}
    for each, gradient in found.items():
        near(gradient, given[f"grad_{each}"])


@pytest.mark.parametrize("head_dim", [2, 16, 64, 128])
def test_positions_of_the_context_begin_as_rotary_ones(head_dim):
    shape = ModelShape(2 * head_dim, 1, 2)
    mixers = []
    for position in ("rotary", "context"):
        torch.manual_seed(0)
        mixers.append(Flash(shape, 0, position=position).double())
    x = torch.randn(1, 40, shape.d_model, dtype=torch.float64)
    torch.testing.assert_close(mixers[1](x).y, mixers[0](x).y, rtol=0, atol=1e-5)  # whose angles are float32


def test_frequencies_are_measured():
    torch.manual_seed(0)
    mixer = Flash(SHAPE, 0, position="context")
    assert mixer.context is not None
    nn.init.normal_(mixer.context.frequency.weight)
    x = torch.randn(2, 500, SHAPE.d_model)
    f = mixer.context.steps(x).detach()[..., 1].flatten(0, 1)
    first, second = (mixer(part).metrics for part in x.split(1))
    assert not mixer.eval()(x).metrics
    for head in range(3):
        wanted = {"mean": f[:, head].mean(), "low": f[:, head].quantile(0.05), "high": f[:, head].quantile(0.95)}
        for name, number in wanted.items():
            key = f"frequency_{name}_head_{head}"
            assert first[key].plus(second[key]).figure() == pytest.approx(float(number), abs=1 / 256)


def test_phases_stay_exact_over_many_tokens():
    """In float32, over blocks of tokens and from call to call."""
    own = ContextPositions(4, 1, 8, 10_000.0)
    nn.init.normal_(own.frequency.weight)
    x = torch.randn(1, 5000, 4, generator=torch.Generator().manual_seed(0))
    heads = torch.ones(1, 5000, 1, 8)
    wanted = own.steps(x).double().cumsum(1)
    turned, _, after = own(x, heads, heads, None)
    exact = wanted.cos() - wanted.sin()
    assert (turned[..., :4] - exact).abs().max() < 5e-4
    assert ((after - wanted[:, -1]).sin()).abs().max() < 1e-9
    assert (after >= 0).all() and (after < 2 * math.pi).all()


@pytest.mark.parametrize("name", ["moh", "moh_no_shared"])
def test_a_mixture_of_heads(name):
    given = oracle(name)
    heads, shared, kept = (int(given[key]) for key in ("heads", "shared", "keep"))
    x = given["x"].requires_grad_()
    router = HeadRouter(x.shape[2], heads, shared, kept, float(given["balance_weight"])).double()
    layers = {"wg": router.routed, "wg_0": router.groups, "wg_1": router.shared}
    with torch.no_grad():
        for key, layer in layers.items():
            if layer is not None:
                layer.weight.copy_(given[f"w_{key}_weight"])
    gates, means, _ = router(x)
    means = means.mean(0, keepdim=True)  # the authors' are of all rows at once
    near(gates, given["gates"])
    near(gates.unsqueeze(-1) * given["causal_heads"], given["causal_gated"])
    loss = router.losses_of(means)["head_balance"]
    near(loss, given["balance_weight"] * given["load_balance"], 1e-7)  # the authors' shares are float32
    # the oracle's own attention, which is not causal, around our gates
    qkv = nn.functional.linear(x, given["w_qkv_weight"])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    mixed = attention(q, k, v, causal=False) * gates.unsqueeze(-1)
    y = nn.functional.linear(mixed.flatten(2), given["w_proj_weight"], given["w_proj_bias"])
    near(y, given["y_full_attention"])
    ((y * given["grad_y"]).sum() + loss).backward()
    near(x.grad, given["grad_x"], 1e-9)
    for key, layer in layers.items():
        if layer is not None:
            near(layer.weight.grad, given[f"grad_{key}_weight"], 1e-9 if key == "wg" else 1e-12)


def test_the_lengths_of_queries_choose_heads():
    given = oracle("moh_query_norm_router")
    query, shared, kept = given["q"], int(given["shared"]), int(given["keep"])
    heads = query.shape[2]
    router = QueryNormRouter(1, heads, shared, kept, 0.5).double()
    assert not list(router.parameters())
    gates, means, metrics = router(query.requires_grad_())
    means = means.mean(0, keepdim=True)  # of all rows at once
    assert torch.equal(gates.detach(), given["mask"]) and {"largest_head", "head_entropy"} == metrics.keys()
    near(means[0, 0].detach(), given["gate"].mean((0, 1)))
    near(means[0, 1], given["mask"][..., shared:].mean((0, 1)))
    # the gradient: that of the chances where a head is kept, and of the balance loss, both written out densely
    weights = torch.randn(query.shape[:3], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = (gates * weights).sum() + router.losses_of(means)["head_balance"]
    (found,) = torch.autograd.grad(loss, query)
    length = query[:, :, shared:].square().sum(-1).sqrt()
    spread = ((length - length.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / (heads - shared - 1)).sqrt()
    near((length / spread).detach(), given["score"])
    chances = torch.exp(length / spread) / torch.exp(length / spread).sum(-1, keepdim=True)
    mask = given["mask"][..., shared:]
    balance = 0.5 * (heads - shared) ** 2 * (chances.mean((0, 1)) * mask.mean((0, 1))).mean()
    near(found, torch.autograd.grad((chances * mask * weights[..., shared:]).sum() + balance, query)[0], 1e-11)


@pytest.mark.parametrize("kind", [Flash, SlidingWindow])
def test_a_mixer_whose_queries_choose_gates_its_heads(kind):
    torch.manual_seed(0)
    options = {"qk_norm": False, "heads_shared": 1, "heads_kept": 1}
    mixer = kind(SHAPE, 0, heads_router="query_norm", **options).double()
    plain = kind(SHAPE, 0, qk_norm=False).double()
    plain.load_state_dict(mixer.state_dict())  # there is no weight of a router
    x = torch.randn(2, 15, SHAPE.d_model, dtype=torch.float64)
    length = mixer.query(x).unflatten(-1, (3, -1)).norm(dim=-1)
    gates = nn.functional.one_hot(length[..., 1:].argmax(-1) + 1, 3) + torch.tensor([1, 0, 0])
    plain.output = mixer.output = nn.Identity()
    output = mixer(x)
    near(output.y, (plain(x).y.unflatten(-1, (3, -1)) * gates.unsqueeze(-1)).flatten(2).detach())
    assert output.losses["head_balance"] > 0


def test_queries_of_equal_length_have_finite_gradients():
    query = torch.ones(1, 2, 4, 8, requires_grad=True)
    gates, means, _ = QueryNormRouter(1, 4, 1, 2, 1.0)(query)
    (gates.sum() + means.sum()).backward()
    assert gates.sum(-1).eq(3).all() and query.grad is not None and query.grad.isfinite().all()


def test_a_single_shared_head_has_a_constant_share():
    router = HeadRouter(6, 4, 1, 3, 0.0)
    gates, _, _ = router(torch.randn(2, 5, 6))
    assert router.shared is None
    torch.testing.assert_close(gates[..., 0] + gates[..., 1:].sum(-1) / 3, torch.full((2, 5), 2.0))


def test_a_sink_logit_is_a_key_without_a_value():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 9, 3, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    sinks = torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()
    found = with_sinks(*attention(query, key, value, return_logsumexp=True), sinks)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * 8**-0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf)
    weights = torch.cat((scores, sinks[:, None, None].expand(2, 3, 9, 1)), -1).softmax(-1)[..., :-1]
    wanted = torch.einsum("bhij,bjhd->bihd", weights, value)
    near(found, wanted)
    gradients = [torch.autograd.grad(x.square().sum(), sinks)[0] for x in (found, wanted)]
    near(*gradients)


@pytest.mark.parametrize("options", [{"bias": "alibi"}, {"bias": "fourier"}], ids=["alibi", "fourier"])
@pytest.mark.parametrize("mixer", [Flash, SlidingWindow])
def test_biases_under_attention_dropout(mixer, options):
    """With next to no dropout, torch's attention gives what the engine gives."""
    torch.manual_seed(0)
    made = mixer(SHAPE, 0, rotary_base=None, attention_dropout=1e-12, **options).double()
    if made.bias is not None:
        nn.init.normal_(made.bias.cosine)
    x = torch.randn(2, 12, SHAPE.d_model, dtype=torch.float64)
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12], dtype=torch.int32)
    torch.testing.assert_close(made.train()(x, document_ids=ids).y, made.eval()(x, document_ids=ids).y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cached_keys_change_their_dtype_with_the_columns_of_a_bias(dtype):
    key, bias = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 3)
    exact, half = (bias_columns(x, x, bias, bias, scale=1.0, balanced=False)[1] for x in (key, key.to(dtype)))
    assert torch.equal(keys_like(exact, half), half)
    torch.testing.assert_close(keys_like(half, exact)[..., 8:], exact[..., 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"bias": "fourier", "bias_rank": 2}, {"position": "context"}], ids=["bias", "context"]
)
@pytest.mark.parametrize("kind", [Flash, SlidingWindow])
def test_decoding_under_autocast(kind, options):
    torch.manual_seed(0)
    mixer = kind(SHAPE, 0, **options)
    if mixer.bias is not None:
        nn.init.normal_(mixer.bias.cosine)
    x, ids = torch.randn(1, 12, SHAPE.d_model), torch.zeros(1, 12, dtype=torch.int32)
    state = mixer.init_state(1) if kind is Flash else mixer.state_between_documents(1)
    with torch.autocast("cpu", torch.bfloat16):
        whole, pieces = mixer(x).y, []
        for piece in x.split(5, 1):
            output = mixer(piece, state=state, document_ids=ids[:, : piece.shape[1]])
            state = output.state
            pieces.append(output.y)
    torch.testing.assert_close(torch.cat(pieces, 1).float(), whole.float(), rtol=0.02, atol=0.02)


EVERYTHING = {
    "moba": (MoBA, {"block": 4, "top_k": 9}),
    "sparsek": (SparseK, {"block": 3, "past_blocks": 1, "keep": 40}),
}
OPTIONS = {
    "alibi": {"bias": "alibi"},
    "fourier-context": {"bias": "fourier", "position": "context"},
    "low-rank-sinks": {"bias": "low_rank", "sink_logits": True},
    "forget": {"bias": "forget", "rotary_base": None, "sink_logits": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("kind", "sizes"), EVERYTHING.values(), ids=EVERYTHING)
def test_options_of_a_sparse_mixer_that_sees_everything_are_those_of_flash(kind, sizes, options):
    made = partial(kind, **sizes), Flash
    sparse, full = (stirred(each(SHAPE, 0, num_kv_heads=1, **options)).double() for each in made)
    sparse.load_state_dict(full.state_dict(), strict=False)
    ids = torch.tensor([[0] * 9 + [1] * 14, [0] * 23], dtype=torch.int32)
    x = torch.randn(2, 23, SHAPE.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, wanted = (mixer(x, document_ids=ids).y for mixer in (sparse, full))
    near(found, wanted)
    weights = dict(full.named_parameters())
    gradients = torch.autograd.grad(wanted.square().sum(), weights.values())
    same = torch.autograd.grad(found.square().sum(), [sparse.get_parameter(name) for name in weights])
    for one, other in zip(same, gradients, strict=True):
        near(one, other, 1e-10)


REFUSED = {
    "position": (lambda: Flash(SHAPE, 0, position="sine"), "mixer.position=sine is unknown; use rotary, context, none"),
    "context-base": (lambda: Flash(SHAPE, 0, position="context", rotary_base=None), "mixer.rotary_base, which is null"),
    "context-scaling": (
        lambda: Flash(SHAPE, 0, position="context", rotary_scaling="linear", rotary_factor=2.0),
        "mixer.rotary_scaling=linear scales nothing",
    ),
    "context-features": (
        lambda: scatterbrain(position="context"),
        "mixer.position=context needs scores .* Scatterbrain",
    ),
    "bias": (lambda: Flash(SHAPE, 0, bias="t5"), "mixer.bias=t5 is unknown; use none, alibi, fourier, low_rank"),
    "bias-rank": (lambda: Flash(SHAPE, 0, bias="fourier", bias_rank=0), "mixer.bias_rank=0 must be at least 1"),
    "gain": (lambda: Flash(SHAPE, 0, gain="t5"), "mixer.gain=t5 is unknown; use none, fourier"),
    "gain-elsewhere": (lambda: NSA(SHAPE, 0, gain="fourier"), "mixer.gain=fourier cannot be had in NSA, but in flash"),
    "gain-bias": (lambda: Flash(SHAPE, 0, gain="fourier", bias="low_rank"), "gain=fourier and mixer.bias=low_rank are"),
    "gain-dropout": (lambda: Flash(SHAPE, 0, gain="fourier", attention_dropout=0.1), "which has no mixer.gain; leave"),
    "context-spans": (
        lambda: CombinerLog(SHAPE, 0, position="context"),
        "context .* CombinerLog: the lar",
    ),
    "context-products": (
        lambda: TensorAttention(SHAPE, 0, position="context"),
        "=context .* TensorAttention: a p",
    ),
    "bias-compressed": (
        lambda: NSA(SHAPE, 0, bias="alibi"),
        "mixer.bias=alibi cannot be had in NSA: a com",
    ),
    "bias-spans": (
        lambda: CombinerLog(SHAPE, 0, bias="forget"),
        "=forget cannot be had in CombinerLog: the",
    ),
    "sinks-probe": (
        lambda: Parallax(SHAPE, 0, sink_logits=True),
        "sink_logits=true cannot be had in Parallax: the",
    ),
    "bias-features": (lambda: scatterbrain(bias="alibi"), "mixer.bias=alibi needs scores .* Scatterbrain has others"),
    "gate": (lambda: Flash(SHAPE, 0, output_gate="silu"), "mixer.output_gate=silu is unknown; use none, head, element"),
    "kept": (lambda: Flash(SHAPE, 0, heads_kept=4), "mixer.heads_kept=4 must be from 1 to 3"),
    "shared": (lambda: Flash(SHAPE, 0, heads_shared=3, heads_kept=1), "mixer.heads_shared=3 must be from 0 to below"),
    "shared-alone": (lambda: Flash(SHAPE, 0, heads_shared=1), "mixer.heads_shared=1 needs mixer.heads_kept"),
    "router": (
        lambda: Flash(SHAPE, 0, heads_kept=1, heads_router="x"),
        "mixer.heads_router=x is unknown; use learned, q",
    ),
    "router-alone": (lambda: Flash(SHAPE, 0, heads_router="query_norm"), "mixer.heads_router=query_norm needs mixer.h"),
    "router-normed": (
        lambda: Flash(SHAPE, 0, heads_kept=1, heads_router="query_norm"),
        "mixer.heads_router=query_norm compares the lengths of queries, which mixer.qk_norm=true makes alike",
    ),
    "router-of-one": (
        lambda: Flash(SHAPE, 0, heads_shared=2, heads_kept=1, heads_router="query_norm", qk_norm=False),
        "mixer.heads_shared=2 of 3 leaves one; share fewer",
    ),
    "router-of-probes": (
        lambda: Parallax(SHAPE, 0, heads_kept=1, heads_router="query_norm", qk_norm=False),
        "mixer.heads_router=query_norm cannot be had in Parallax: its probes stand beside its queries",
    ),
    "balance": (lambda: Flash(SHAPE, 0, heads_kept=1, heads_balance=-1.0), "mixer.heads_balance=-1.0 must not be neg"),
    "dropout": (
        lambda: Flash(SHAPE, 0, sink_logits=True, attention_dropout=0.1),
        "mixer.attention_dropout=0.1 takes torch's attention, which has no mixer.sink_logits=true",
    ),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
