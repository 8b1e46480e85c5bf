"""Tuned memories: their formula, that they leave the model as it was at first, and how features are decorrelated."""

import math

import pytest
import torch
import torch.nn.functional as F

from longmix.config import ModelConfig, TrainConfig, read, resolved
from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.parts.base import Mixer, MixerOutput, ModelShape
from longmix.mixers.parts.state_tuning import FeatureMemory
from longmix.mixers.rwkv7 import RWKV7
from longmix.model.backbone import LanguageModel
from longmix.model.tuned_states_file import load_states, load_weights, save_states, tune_states, tuned_states
from longmix.training.run import check_config

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)
MIXERS = {
    "rwkv7": lambda: RWKV7(SHAPE, 1, head_dim=16),
    "mlstm-sig": lambda: MLSTMTFLA(SHAPE, 0, num_heads=3, input_bias=0.0),
    "mlstm-exp": lambda: MLSTMTFLA(SHAPE, 0, num_heads=3, gate="exp", input_bias=0.0),
}


def memory(features: int = 12, decorrelation: float = 0.0) -> FeatureMemory:
    torch.manual_seed(0)
    made = FeatureMemory(torch.zeros(2, 8, 5, dtype=torch.float64), features, decorrelation)
    torch.nn.init.normal_(made.content)
    return made


def test_it_reads_through_the_features():
    tuned, query = memory(), torch.randn(3, 7, 2, 8, dtype=torch.float64)
    tuned.whitening.normal_()
    read = tuned(query)
    for head in range(2):
        x = query[1, 4, head]
        phi = torch.stack([(math.sqrt(8) * (u @ x / x.norm() - 1)).exp() for u in tuned.supports[head]])
        wanted = tuned.content[head].T @ (tuned.whitening[head] @ phi)
        torch.testing.assert_close(read[1, 4, head], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_at_first_the_model_is_what_it_was(name):
    torch.manual_seed(0)
    mixer = MIXERS[name]().double()
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    x = torch.randn(2, 20, 48, dtype=torch.float64)
    before = mixer(x).y
    mixer.tune_states(features=10)
    torch.testing.assert_close(mixer(x).y, before, rtol=0, atol=1e-13)
    assert {weight.dtype for weight in mixer.tuned.parameters()} == {torch.float64}
    mixer(x).y.square().sum().backward()
    assert mixer.tuned.initial["memory"].grad.abs().max() > 1e-9
    assert mixer.tuned.memory.content.grad.abs().max() > 1e-9
    with torch.no_grad():
        mixer.tuned.memory.content.normal_()
    changed = mixer(x).y
    assert (changed - before).abs().max() > 1e-3
    state, pieces = mixer.init_state(2), []
    for piece in (slice(0, 9), slice(9, 10), slice(10, 20)):
        output = mixer(x[:, piece], state=state)
        state = output.state
        pieces.append(output.y)
    torch.testing.assert_close(torch.cat(pieces, 1), changed, rtol=0, atol=1e-12)


def test_features_are_decorrelated_by_what_training_shows():
    tuned = memory(features=6, decorrelation=0.3).train()
    directions = torch.randn(2, 8, dtype=torch.float64)

    def correlation() -> float:
        found = features[:, :, 0].flatten(0, 1)
        mean = found.T @ found / len(found)
        size = mean.diagonal().sqrt()
        return (mean / size / size[:, None] - torch.eye(6)).abs().max().item()

    for step in range(300):
        query = torch.randn(4, 50, 2, 8, dtype=torch.float64) + directions
        first = tuned.whitening.clone()
        tuned(query[:2]), tuned(query[2:])  # two micro-batches
        assert torch.equal(tuned.whitening, first)
        near = torch.einsum("bthk,hmk->bthm", F.normalize(query, dim=-1), tuned.supports)
        features = torch.einsum("bthm,hnm->bthn", (math.sqrt(8) * (near - 1)).exp(), first)
        tuned.apply_observed(lambda total: total)
        if step == 0:
            mean = torch.einsum("bthm,bthn->hmn", features, features) / 200
            crossed = mean * (1 - torch.eye(6))
            wanted = first - 0.3 * crossed @ first
            torch.testing.assert_close(tuned.whitening, wanted, rtol=0, atol=1e-13)
            before = correlation()
    assert before > 0.8 and correlation() < 0.6 * before


def test_nothing_is_observed_in_evaluation_or_kept_from_a_step_left_out():
    tuned, query = memory(decorrelation=0.5), torch.randn(1, 9, 2, 8, dtype=torch.float64)
    first = tuned.whitening.clone()
    tuned.eval()(query)
    tuned.apply_observed(lambda total: total)
    tuned.train()(query)
    tuned.forget()
    tuned.apply_observed(lambda total: total)
    assert torch.equal(tuned.whitening, first)


def test_a_memory_is_loaded_with_the_weights():
    def model() -> LanguageModel:
        return LanguageModel(
            lambda shape, index: MLSTMTFLA(shape, index, num_heads=3) if index else Flash(shape, index),
            30,
            d_model=48,
            num_layers=2,
            num_heads=3,
            mlp_hidden=16,
        )

    saved, loaded = model(), model()
    names = tune_states(saved, features=7, decorrelation=0.1)
    assert names == ["blocks.1.mixer.tuned.initial.memory", "blocks.1.mixer.tuned.memory.content"]
    torch.nn.init.normal_(saved.blocks[1].mixer.tuned.memory.content)
    load_weights(loaded, saved.state_dict())
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).hidden, saved(tokens).hidden)


class Mean(Mixer):
    """The mean of all tokens so far, and of one before them: a state, but on none of the engines."""

    tunes_states = True

    def __init__(self, shape: ModelShape, index: int) -> None:
        super().__init__()
        self.width, self.tuned = shape.d_model, None

    def tune_states(self, features: int = 0, decorrelation: float = 0.0) -> None:
        self.tuned = torch.nn.ParameterDict({"first": torch.zeros(self.width)})

    def forward(self, x, *, state=None, document_ids=None):
        before = torch.zeros_like(x[0, 0]) if self.tuned is None else self.tuned["first"]
        count = torch.arange(2, x.shape[1] + 2, dtype=x.dtype)[:, None]
        return MixerOutput((x.cumsum(1) + before) / count)


def model_of(*mixers: type[Mixer]) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"d_model": 48, "num_layers": len(mixers), "num_heads": 3, "mlp_hidden": 16}
    return LanguageModel(lambda shape, index: mixers[index](shape, index), 30, **sizes)


def test_a_mixer_of_another_kind_is_tuned_saved_and_loaded(tmp_path):
    model = model_of(Mean, Flash)
    assert tune_states(model) == ["blocks.0.mixer.tuned.first"]
    tokens = torch.arange(20)[None]
    model(tokens).hidden.sum().backward()
    assert model.blocks[0].mixer.tuned["first"].grad.abs().max() > 0
    torch.nn.init.normal_(model.blocks[0].mixer.tuned["first"])
    config = {"mixer": {"_target_": "somebody.Mean"}, "model": {"_target_": "somebody.Model", "d_model": 48}}
    save_states(tmp_path / "states.pt", ModelConfig.of(config), model.state_dict())
    assert list(tuned_states(model.state_dict())) == ["blocks.0.mixer.tuned.first"]
    other = model_of(Mean, Flash)
    assert not torch.equal(other(tokens).hidden, model(tokens).hidden)
    load_states(other, tmp_path / "states.pt", ModelConfig.of(config))
    assert torch.equal(other(tokens).hidden, model(tokens).hidden)


def test_a_model_without_such_a_mixer_is_refused():
    with pytest.raises(ConfigError, match=r"trainable=states needs a mixer with a recurrent state.* is Flash"):
        tune_states(model_of(Flash, Flash))


def test_a_run_of_such_a_model_is_refused_before_the_data_are_looked_at(compose_config, monkeypatch):
    monkeypatch.setattr("longmix.training.run.data_of", lambda *_: pytest.fail("the data were built"))
    config = read(TrainConfig, resolved(compose_config("mixer=flash", "trainable=states", "trainer=cpu")))
    with pytest.raises(ConfigError, match="needs a mixer with a recurrent state, and the model's is Flash"):
        check_config(config)
