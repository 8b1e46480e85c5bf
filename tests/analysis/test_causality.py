"""The audit finds what leaks, says how, and passes what does not."""

import pytest
import torch
from torch import nn

from longmix.analysis.causality import audit, entropy_test, mixer_function, model_function, scale_model
from longmix.config import ModelConfig, resolved
from longmix.mixers.flash import Flash
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.parts.base import Mixer, MixerOutput, ModelShape
from longmix.mixers.routing import Routing
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model

SHAPE = ModelShape(d_model=16, num_layers=2, num_heads=2)


def inputs(length: int = 40) -> torch.Tensor:
    return torch.randn(2, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def running_sum(x, ids):
    return x.cumsum(1)


def same_document(x, ids):
    ids = torch.zeros(x.shape[:2]) if ids is None else ids
    seen = (ids[:, :, None] == ids[:, None]) & torch.ones(x.shape[1], x.shape[1]).tril().bool()
    return seen.to(x.dtype) @ x


def whole_mean(x, ids):
    return x + 1e-3 * x.mean(1, keepdim=True)


def largest_half(x, ids):
    """Only the half of the tokens with the largest first numbers is let through."""
    chosen = x[..., 0] >= x[..., 0].median(1, keepdim=True).values
    return x * chosen.unsqueeze(-1)


def next_token(x, ids):
    return torch.cat([x[:, 1:], x[:, :1]], 1)


def by_length(x, ids):
    return x * (1 + 1e-6 * x.shape[1])


def by_place(x, ids):
    return x + torch.arange(x.shape[1], dtype=x.dtype)[:, None]


def broken(x, ids):
    return torch.where(torch.arange(x.shape[1])[:, None] == 3, torch.nan, x)


FUNCTIONS = {
    "causal": (same_document, set()),
    "mean": (whole_mean, {("last token", "content"), ("later tokens", "content"), ("prefix", "content")}),
    "rank": (largest_half, {("last token", "selection"), ("later tokens", "selection"), ("prefix", "selection")}),
    "next": (next_token, {("last token", "content"), ("huge keys", "content")}),
    "length": (by_length, {("prefix", "selection")}),
    "documents": (running_sum, {("other documents", "content"), ("document alone", "placement")}),
    "place": (by_place, {("document alone", "placement")}),
    "not-a-number": (broken, {("last token", "selection"), ("prefix", "selection")}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_leak_is_found_and_named(name):
    function, wanted = FUNCTIONS[name]
    found = {finding.probe: finding for finding in audit(function, inputs())}
    assert list(found) == ["last token", "later tokens", "huge keys", "prefix", "other documents", "document alone"]
    assert {(probe, found[probe].kind) for probe, _ in wanted} == wanted
    if name in ("causal", "documents", "place"):
        leaking = {(probe, finding.kind) for probe, finding in found.items() if finding.kind != "none"}
        assert leaking == wanted
    assert any(finding.leaks for finding in found.values()) == (name not in ("causal", "place"))


def test_where_names_the_output_that_changed():
    def only_token_5(x, ids):
        return torch.where(torch.arange(x.shape[1])[:, None] == 5, x[:, -1:], x)

    found = {finding.probe: finding for finding in audit(only_token_5, inputs())}
    assert found["last token"].where.endswith("token 5") and found["later tokens"].where.endswith("token 5")


def test_a_model_is_audited_from_its_embeddings():
    torch.manual_seed(0)
    model = LanguageModel(Flash, 20, d_model=16, num_layers=2, num_heads=2, mlp_hidden=8).double().eval()
    tokens = torch.randint(20, (2, 32))
    embedded = model.embedding(tokens).detach()
    assert torch.equal(model_function(model)(embedded, None), model(tokens).hidden)
    assert not any(finding.leaks for finding in audit(model_function(model), embedded))
    assert not any(finding.leaks for finding in audit(mixer_function(model.mixers()[0]), inputs()))


class Peeking(Mixer):
    """Lets a share of the next token through; as a mixer, it shows what a leak does to training."""

    leaky = True

    def __init__(self, shape: ModelShape, layer_index: int) -> None:
        super().__init__()
        self.output = nn.Linear(shape.d_model, shape.d_model)

    def forward(self, x, *, state=None, document_ids=None):
        return MixerOutput(self.output(next_token(x, None)))


@pytest.mark.parametrize(("mixer", "passes"), [(Flash, True), (MLSTMTFLA, True), (Peeking, False)])
def test_only_a_leak_beats_the_entropy(mixer, passes):
    torch.manual_seed(0)

    def made(shape, index):
        return MLSTMTFLA(shape, index, num_heads=2) if mixer is MLSTMTFLA else mixer(shape, index)

    model = LanguageModel(made, 8, d_model=16, num_layers=1, num_heads=2, mlp_hidden=16)
    finding = entropy_test(model, seq_len=32, steps=150, batch_size=4)
    assert finding.passed is passes
    assert finding.loss < 1.5 or passes
    assert finding.entropy == pytest.approx(2.0794, abs=1e-4) and 0 < finding.error < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequence_topk", "argmax_window", "threshold"])
@pytest.mark.filterwarnings("ignore:mixer.mode")
def test_training_notices_who_else_was_selected(mode):
    """No gradient flows through the published form's selection, and yet what it betrays of later tokens is learnt."""
    torch.manual_seed(0)
    settings = {"mode": mode, "clusters": 2, "window": 1, "local_heads": 0, "block": 2}
    model = LanguageModel(
        lambda shape, index: Routing(shape, index, **settings), 8, d_model=32, num_layers=1, num_heads=2, mlp_hidden=32
    )
    finding = entropy_test(model, seq_len=4, steps=150, batch_size=32)
    assert finding.passed is (mode != "sequence_topk")
    if not finding.passed:
        assert finding.loss < finding.entropy - 10 * finding.error


SIZES = {
    "routing": (["mixer=routing"], {"window": 2, "local_window": 2, "block": 2}),
    "engine-blocks": (["mixer=block_sparse"], {"block": 16}),
    "no-window": (["mixer=sparse_flash"], {"window": 0}),
    "pattern": (["mixer=sliding_window*3+hyper", "mixer.hyper.window=1"], {"window": 2}),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_scale_model_is_small_and_the_same(compose_config, name):
    overrides, wanted = SIZES[name]
    config = resolved(compose_config(*overrides))
    small = scale_model(ModelConfig.of(config), 8, 5)
    mixers, sizes = small.mixers(), {key: getattr(small.mixers()[0], key) for key in wanted}
    assert sizes == wanted and small.vocab_size == 5
    whole = build_model(ModelConfig.of(config), 5).mixers()
    assert [type(mixer) for mixer in mixers] == [type(mixer) for mixer in whole][: len(mixers)]
    assert len(mixers) == (4 if name == "pattern" else 2) and config["model"]["num_layers"] == 6
    if name == "pattern":
        assert mixers[3].window == 1
