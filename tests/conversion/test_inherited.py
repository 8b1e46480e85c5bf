"""Settings that a converted model has of its teacher."""

from pathlib import Path

import pytest

from longmix.composing import composed
from longmix.config import Choice, TrainConfig, read
from longmix.config.choices import Pattern
from longmix.conversion.inherited import with_teachers_settings
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.model.build import build_model

CONFIGS = Path(__file__).parents[2] / "configs" / "mixer"
SMALL = ("model.d_model=64", "model.num_layers=2", "model.num_heads=4", "model.mlp_hidden=32")
TAUGHT = ("mixer=flash", "mixer.num_kv_heads=2", "mixer.rotary_base=1e5", "mixer.qk_norm=false")
HELD = {"num_kv_heads": 2, "rotary_base": 1e5, "qk_norm": False}


def config_of(*words):
    return read(TrainConfig, composed("train", [*SMALL, *words]).content)


def softmax_mixers():
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    return [name for name in names if issubclass(config_of(f"mixer={name}").mixer.located(), SoftmaxAttention)]


def test_a_layer_of_the_same_class_keeps_all_settings_that_are_not_given():
    teacher = config_of(*TAUGHT, "mixer.output_gate=head").mixer
    new = config_of("mixer=gla+flash", "mixer.flash.qk_norm=true").mixer
    found = with_teachers_settings(new, {"flash": {"qk_norm": True}}, teacher)
    assert isinstance(found, Pattern)
    assert found.members["gla"] == new.members["gla"] and found.order == new.order
    assert found.members["flash"] == teacher.having(qk_norm=True)
    assert Pattern.of("mixer", found.entries) == found
    assert with_teachers_settings(new, {"flash": {"qk_norm": True}}, found) == found  # as for a run that goes on


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", softmax_mixers())
def test_softmax_mixers_have_heads_and_positions_of_the_teacher(name):
    config = config_of(f"mixer={name}")
    found = with_teachers_settings(config.mixer, {}, config_of(*TAUGHT).mixer)
    inherited = config.mixer.located().inherits
    wanted = {setting: value for setting, value in HELD.items() if setting in inherited}
    assert {setting: found.entries[setting] for setting in wanted} == wanted and "rotary_base" in wanted
    others = set(found.entries) - set(inherited)
    assert all(found.entries[setting] == config.mixer.entries[setting] for setting in others)
    build_model(
        read(TrainConfig, {**composed("train", [*SMALL, f"mixer={name}"]).content, "mixer": found.entries}), 260
    )


@pytest.mark.parametrize("name", ["gla", "mlstm_tfla", "rwkv7", "mamba2"])
def test_recurrences_take_none(name):
    mixer = config_of(f"mixer={name}").mixer
    assert with_teachers_settings(mixer, {}, config_of(*TAUGHT).mixer) == mixer


def test_a_hybrid_teaches_by_the_member_that_fits():
    teacher = config_of("mixer=gla+sliding_window", "mixer.sliding_window.window=7", "mixer.gla.num_heads=1").mixer
    found = with_teachers_settings(config_of("mixer=flash+gla", "mixer.flash.rotary_base=7").mixer, {}, teacher)
    assert found.members["gla"] == teacher.members["gla"]
    assert found.members["flash"].entries["rotary_base"] == 10000.0
    assert isinstance(with_teachers_settings(config_of("mixer=flash").mixer, {}, teacher), Choice)
