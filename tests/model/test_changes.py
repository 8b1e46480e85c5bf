"""Settings of a trained mixer that may change, and the words that are refused."""

import pytest

from longmix.config import ModelConfig
from longmix.errors import ConfigError
from longmix.model.changes import changed_mixer

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
    "of-another": ("flash", {"window": 64}, r"mixer.window comes from"),
    "no-member": ("flash", {"flash": {"rotary_base": 500}}, r"mixer.flash comes from"),
    "member": (
        "hybrid",
        {"rotary_base": 9.0},
        r"mixer.rotary_base comes .* mixer.window.window, mixer.flash.rotary_base",
    ),
    "of-member": ("hybrid", {"flash": {"window": 9}}, r"mixer.flash.window comes from"),
    "whole-member": ("hybrid", {"flash": "retention"}, r"mixer.flash comes from"),
    "target": ("flash", {"_target_": "longmix.mixers.hyper.Hyper"}, r"mixer._target_ comes from"),
    "recurrent": ("mlstm", {"gate_cap": 3}, r"mixer.gate_cap comes from .*No setting of its mixer may change"),
}


@pytest.mark.parametrize(("mixer", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_comes_with_the_weights_is_refused_by_name(mixer, changes, message):
    with pytest.raises(ConfigError, match=message):
        changed(mixer, changes)
