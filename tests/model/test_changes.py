"""Settings of a trained mixer that may change, and the words that are refused."""

import pytest
import torch

from longmix.config import ModelConfig
from longmix.errors import ConfigError
from longmix.model.build import build_model
from longmix.model.changes import changed_mixer, take_settings

FLASH = {"_target_": "longmix.mixers.flash.Flash", "qk_norm": False}
WINDOW = {"_target_": "longmix.mixers.sliding_window.SlidingWindow", "window": 8}
MIXERS = {
    "flash": FLASH,
    "hybrid": {"pattern": ["window", "window", "flash"], "window": WINDOW, "flash": FLASH},
    "mlstm": {"_target_": "longmix.mixers.mlstm_tfla.MLSTMTFLA"},
    "rwkv7": {"_target_": "longmix.mixers.rwkv7.RWKV7"},
}


def changed(name: str, changes: dict):
    model = {"_target_": "longmix.model.backbone.LanguageModel"}
    return changed_mixer(ModelConfig.of({"model": model, "mixer": MIXERS[name]}).mixer, changes, "checkpoint=runs/a")


def test_new_values_stand_beside_the_others():
    assert changed("flash", {"rotary_base": None}).entries == {**FLASH, "rotary_base": None}
    hybrid = changed("hybrid", {"window": {"window": 16, "rotary_fraction": 0.5}})
    assert hybrid.entries == {**MIXERS["hybrid"], "window": {**WINDOW, "window": 16, "rotary_fraction": 0.5}}
    assert hybrid.members["window"].settings["window"] == 16
    assert MIXERS["hybrid"]["window"] == WINDOW
    assert changed("rwkv7", {}).entries == MIXERS["rwkv7"]


REFUSED = {
    "weights": (
        "flash",
        {"qk_norm": True},
        r"mixer.qk_norm comes from checkpoint=runs/a; leave one .* mixer.rotary_base",
    ),
    "shapes": ("flash", {"num_kv_heads": 1}, r"mixer.num_kv_heads comes from"),
    "of-another": ("flash", {"window": 64}, r"unknown word mixer.window: the mixer of checkpoint=runs/a has none"),
    "no-member": ("flash", {"flash": {"rotary_base": 500}}, r"unknown word mixer.flash.rotary_base: "),
    "member": (
        "hybrid",
        {"rotary_base": 9.0},
        r"unknown word mixer.rotary_base: .*window.rotary_base or mixer.flash.rotary_base\? May .*window.window",
    ),
    "of-member": ("hybrid", {"flash": {"window": 9}}, r"unknown word mixer.flash.window: "),
    "whole-member": ("hybrid", {"flash": "retention"}, r"mixer.flash has no value of its own"),
    "target": ("flash", {"_target_": "longmix.mixers.hyper.Hyper"}, r"unknown word mixer._target_: "),
    "recurrent": ("mlstm", {"gate_cap": 3}, r"mixer.gate_cap comes from .*No setting of its mixer may change"),
}


@pytest.mark.parametrize(("mixer", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_comes_with_the_weights_is_refused_by_name(mixer, changes, message):
    with pytest.raises(ConfigError, match=message):
        changed(mixer, changes)


TAKEN = {
    "flash": {"rotary_base": 500_000.0},
    "flash-yarn": {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_length": 8},
    "flash-nope": {"rotary_base": None},
    "sliding_window": {"window": 5},
    "block_sparse": {"local": 2, "stride": 3},
    "moba": {"block": 6, "top_k": 2},
    "parallax": {"window": 5},
    "nsa": {"blocks": 5, "local": 1, "window": 6},
    "routing": {"window": 4, "local_window": 3},
    "sparse_flash": {"window": 7},
    "hyper": {"sample": 0.9},
    "scatterbrain_content": {"window": 6},
    "sparsek": {"keep": 5, "past_blocks": 1},
    "retention": {"rotary_base": 77.0},
    "sliding_window*1+flash": {"sliding_window": {"window": 3}, "flash": {"rotary_fraction": 0.5}},
}


@pytest.mark.parametrize(("name", "changes"), TAKEN.items(), ids=TAKEN)
def test_a_model_that_takes_settings_is_one_that_was_built_with_them(name, changes, small_model, small_config):
    mixer = name.partition("-")[0]
    model = small_model(mixer)
    before = ModelConfig.of(small_config(f"mixer={mixer}"))
    now = ModelConfig(mixer=changed_mixer(before.mixer, changes, "a run"), model=before.model)
    with torch.random.fork_rng():
        other = build_model(now, model.vocab_size).double().eval()
    other.load_state_dict(model.state_dict())
    weights = {key: id(weight) for key, weight in model.named_parameters()}
    tokens = torch.arange(40).remainder(model.vocab_size)[None]
    at_first = model(tokens).hidden
    take_settings(model, before, now)
    assert torch.equal(model(tokens).hidden, other(tokens).hidden)
    assert not torch.equal(at_first, other(tokens).hidden)
    assert {key: id(weight) for key, weight in model.named_parameters()} == weights
    take_settings(model, now, before)
    assert torch.equal(model(tokens).hidden, at_first)
