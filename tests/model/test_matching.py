"""Models of equal size: the width that is chosen, what is refused, and that a run and its checkpoint stand by it."""

import dataclasses
import json
import re

import pytest
import torch
from omegaconf import OmegaConf

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.config import TrainConfig, read
from longmix.errors import ConfigError
from longmix.model.build import build_model, model_from_checkpoint
from longmix.model.matching import count_parameters, match_parameters, with_width
from longmix.training.run import train

VOCABULARY = 257
SMALL = ("model.d_model=32", "model.num_layers=2")


@pytest.fixture
def matched(compose_config):
    """`matched("mixer=flash", ...)` is the configuration before and after its width was chosen."""

    def run(*overrides: str):
        config = read(TrainConfig, compose_config(*SMALL, *overrides))
        return config, match_parameters(config, VOCABULARY)

    return run


def width_of(config: TrainConfig) -> int:
    return config.model.number("mlp_hidden")


def asked(config: TrainConfig, parameters: int) -> TrainConfig:
    return dataclasses.replace(config, match=dataclasses.replace(config.match, parameters=parameters))


class TestMatchParameters:
    @pytest.mark.parametrize("mixer", ["flash", "routing", "mlstm_tfla", "rwkv7", "sliding_window*2+mlstm_tfla"])
    def test_nearest_width_of_the_real_model(self, matched, mixer):
        extra = ["mixer.head_dim=16"] if mixer == "rwkv7" else []
        target = 80_000
        before, after = matched(f"mixer={mixer}", f"match.parameters={target}", *extra)
        width = width_of(after)
        assert width % 8 == 0
        real = sum(weight.numel() for weight in build_model(after, VOCABULARY).parameters())
        off = abs(real - target)
        assert off <= 0.02 * target
        for other in (width - 8, width + 8):
            assert abs(count_parameters(with_width(before, other), VOCABULARY) - target) >= off

    def test_nothing_else_changes(self, matched):
        before, after = matched("match.parameters=80_000")
        assert width_of(after) != width_of(before)
        assert with_width(after, width_of(before)) == before

    def test_left_alone_unless_asked_for(self, matched):
        before, after = matched()
        assert after is before

    @pytest.mark.parametrize("off", [-300, 0, 300])
    def test_either_side_of_the_number(self, compose_config, off):
        config = read(TrainConfig, compose_config(*SMALL, "model.mlp_hidden=152"))
        config = asked(config, count_parameters(config, VOCABULARY) + off)
        assert match_parameters(with_width(config, 8), VOCABULARY).model.number("mlp_hidden") == 152

    def test_halfway_between_two_widths(self, compose_config):
        config = read(TrainConfig, compose_config(*SMALL, "model.mlp_hidden=152"))
        counts = [count_parameters(with_width(config, width), VOCABULARY) for width in (152, 160)]
        config = asked(config, sum(counts) // 2)
        assert match_parameters(config, VOCABULARY).model.number("mlp_hidden") in (152, 160)

    def test_narrowest_feed_forward_within_the_tolerance(self, compose_config):
        config = read(TrainConfig, compose_config(*SMALL, "model.mlp_hidden=8"))
        config = asked(config, count_parameters(config, VOCABULARY) - 10)
        assert match_parameters(config, VOCABULARY).model.number("mlp_hidden") == 8

    def test_multiple(self, matched):
        _, after = matched("match.parameters=80_000", "match.multiple=3")
        assert width_of(after) % 3 == 0

    def test_the_vocabulary_counts(self, compose_config):
        config = read(TrainConfig, compose_config(*SMALL, "match.parameters=80_000"))
        narrow, wide = (match_parameters(config, vocabulary).model.number("mlp_hidden") for vocabulary in (257, 600))
        assert narrow > wide

    def test_nothing_is_allocated(self, compose_config):
        config = read(TrainConfig, compose_config("model=7b", "match.parameters=6_700_000_000"))
        config = dataclasses.replace(config, model=config.model.having(num_layers=1))
        config = asked(config, 500_000_000)
        assert count_parameters(match_parameters(config, VOCABULARY), VOCABULARY) > 490_000_000
        assert torch.get_default_device().type == "cpu"


class TestRefusals:
    def test_mixer_too_large(self, matched):
        with pytest.raises(ConfigError) as caught:
            matched("match.parameters=20_000")
        message = str(caught.value)
        assert message.startswith(
            "match.parameters=20,000 cannot be met within match.tolerance=0.02: the nearest model"
        )
        count = int(re.search(r"Give match.parameters=([\d,]+) or more", message)[1].replace(",", ""))
        assert matched(f"match.parameters={count}")[1].model.number("mlp_hidden") == 8  # the cure works

    def test_multiple_too_coarse(self, matched):
        with pytest.raises(ConfigError, match=r"Give a smaller match.multiple \(it is 512\) or a larger match.toler"):
            matched("match.parameters=200_000", "match.multiple=512")

    def test_a_checkpoint_has_its_own_size(self, matched):
        with pytest.raises(ConfigError, match=r"asks for a model of that size, and the model comes from checkpoint=x"):
            matched("match.parameters=80_000", "checkpoint=x")

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("match.parameters=0", "match.parameters=0 must be at least 1"),
            ("match.multiple=0", "match.multiple=0 must be at least 1"),
            ("match.tolerance=1.0", "match.tolerance=1.0 must be at least 0 and below 1"),
            ("match.tolerance=-0.1", "match.tolerance=-0.1 must be"),
            ("+match.tolerence=0.1", "unknown key match.tolerence. Did you mean tolerance"),
        ],
    )
    def test_impossible_words(self, compose_config, override, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            read(TrainConfig, compose_config(override))


class TestRun:
    WORDS = ("seq_len=32", "match.parameters=25_000")

    def test_says_so_and_is_rebuilt_from_its_checkpoint(self, run_training, tiny_overrides):
        folder = run_training(*tiny_overrides, *self.WORDS)
        summary = json.loads((folder / "summary.json").read_text())
        match = summary["match"]
        assert match["target"] == 25_000
        assert match["parameters"] == summary["parameters"]["total"]
        assert match["difference"] == pytest.approx(match["parameters"] / 25_000 - 1)
        assert abs(match["difference"]) <= 0.02
        saved = OmegaConf.load(folder / "config.yaml")
        assert saved.model.mlp_hidden == match["mlp_hidden"] == 48
        model = model_from_checkpoint(load_checkpoint(find_checkpoint(folder)))
        assert model.parameter_counts()["total"] == match["parameters"]

    @pytest.mark.slow
    def test_is_resumed_with_the_same_words(self, composed, tiny_overrides, tmp_path, capsys):
        words = [*tiny_overrides, *self.WORDS]
        train(composed([*words, "max_steps=1"], "train", tmp_path))
        header = " ".join(capsys.readouterr().err.split())
        assert "matched 25,280 parameters for 25,000 (+1.12%) with model.mlp_hidden=48; 64 tokens" in header
        summary = train(composed([*words, "max_steps=2", "resume=auto"], "train", tmp_path))
        assert summary["tokens"] == 128 and summary["match"]["mlp_hidden"] == 48

    def test_no_word_of_it_otherwise(self, run_training, tiny_overrides):
        folder = run_training(*tiny_overrides, "seq_len=32")
        assert json.loads((folder / "summary.json").read_text())["match"] is None
