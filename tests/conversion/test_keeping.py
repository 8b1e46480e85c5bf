"""`keep=`: layers of a converted model that keep the teacher's mixer, by hand or by measured damage."""

import math
import re

import pytest
import torch

import longmix
from longmix.checkpoints import load_checkpoint
from longmix.config import Choice, Pattern
from longmix.conversion.keeping import check_layers, with_kept
from longmix.errors import CheckpointError, ConfigError
from longmix.reading import read_json, read_yaml
from longmix.training import kept_layers
from longmix.training.damage import Damage

LOOP = ("logger=csv", "batch_size=2", "seq_len=32", "data.validation_tokens=256", "trainer=cpu", "max_steps=2")
SIZES = ("model.num_layers=3", "model.d_model=32", "model.mlp_hidden=32")
GLA = ("convert=true", "mixer=gla", "loop.checkpoint_every=1", "loop.keep_checkpoints=9")

NEW = Choice("mixer", {"_target_": "longmix.mixers.gla.GLA", "num_heads": 2})
FLASH = {"_target_": "longmix.mixers.flash.Flash"}
WINDOW = {"_target_": "longmix.mixers.sliding_window.SlidingWindow", "window": 4}
HYBRID = Pattern.of("mixer", {"pattern": ["near", "far"], "near": WINDOW, "far": FLASH})


@pytest.fixture(scope="module")
def train(shared_cache):
    return lambda folder, *words: longmix.train([*LOOP, f"data.cache_dir={shared_cache}", *words], folder=folder).folder


@pytest.fixture(scope="module")
def teacher(train, tmp_path_factory):
    words = "optimizer.learning_rate=3e-2", "max_steps=12"
    return train(tmp_path_factory.mktemp("teacher") / "run", *SIZES, "mixer=flash", *words)


@pytest.fixture(scope="module")
def measured(train, teacher, tmp_path_factory):
    words = f"checkpoint={teacher}", *GLA, "keep=1", "measure_tokens=128"
    return train(tmp_path_factory.mktemp("measured") / "run", *words)


def weights(run, step):
    return load_checkpoint(run / f"checkpoints/step-{step:08d}")["model"]


@pytest.mark.parametrize(
    ("old", "layers", "order"),
    [
        (Choice("mixer", FLASH), [1, 3], ["gla", "flash", "gla", "flash"]),
        (HYBRID, [3, 0], ["near", "gla", "gla", "far"]),
    ],
)
def test_each_layer_has_a_mixer_of_its_own_in_the_pattern(old, layers, order):
    found = with_kept(NEW, old, layers, 4)
    assert list(found.order) == order and found.members["gla"].entries == NEW.entries
    kept = {name: choice for name, choice in found.members.items() if name != "gla"}
    theirs = old.members if isinstance(old, Pattern) else {"flash": old}
    assert {name: choice.entries for name, choice in kept.items()} == {name: theirs[name].entries for name in kept}


def test_a_mixer_of_the_same_name_with_other_settings_is_refused():
    near = Choice("mixer", {**WINDOW, "window": 8})
    with pytest.raises(ConfigError, match="have that mixer too"):
        with_kept(near, Choice("mixer", WINDOW), [0], 2)
    with pytest.raises(ConfigError, match="mixer=near\\+far too; give one mixer"):
        with_kept(HYBRID, Choice("mixer", FLASH), [0], 2)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (4, "keep=4 keeps all of the model's 4 layers"),
        ([0, 1, 2, 3], r"keep=\[0,1,2,3\] keeps all"),
        ([1, 4], "layers are 0 to 3, and 4 is none"),
        ([-1], "-1 is none"),
        ([2, 2], "names a layer twice"),
    ],
)
def test_layers_that_cannot_be_kept_are_refused(keep, said):
    with pytest.raises(ConfigError, match=said):
        check_layers(keep, 4)


def test_the_largest_damage_decides_and_a_tie_is_refused():
    assert Damage(1.0, (1.5, 3.0, 0.5, 2.0), 0).largest(2) == [1, 3]
    assert Damage(1.0, (1.5, 2.0, 2.0, 1.0), 0).largest(2) == [1, 2]
    assert Damage(1.0, (1.5, math.nan, 2.0, 1.0), 0).largest(1) == [1]
    said = "keep=1: layers 1 and 2 have the same damage, 1 nats; name the layers, such as keep=[1]."
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        Damage(1.0, (1.5, 2.0, 2.0, 1.0), 0).largest(1)
    with pytest.raises(ConfigError, match="same damage"):
        Damage(1.0, (math.inf, math.nan, 2.0), 0).largest(1)


@pytest.mark.slow
def test_a_measured_choice_is_written_down_and_is_that_of_the_task(train, teacher, measured, tmp_path):
    report, config = read_json(measured / "transfer.json"), read_yaml(measured / "config.yaml")
    damage = report["damage"]["damage"]
    worst = max(range(3), key=lambda layer: damage[layer])
    assert report["damage"]["learned"] == 128 and len(set(damage)) == 3
    assert config["mixer"]["pattern"] == ["flash" if layer == worst else "gla" for layer in range(3)]
    loaded = longmix.load(measured, device="cpu")
    assert [type(mixer).__name__ for mixer in loaded.model.mixers()][worst] == "Flash"
    words = {"max_tokens": 256, "output": str(tmp_path), "task.damage": {"mixer": "gla", "measure_tokens": 128}}
    task = longmix.load(teacher, device="cpu").evaluate("damage", **words)
    assert [row["damage"] for row in task["layers"]] == pytest.approx(damage, abs=1e-6)
    assert task["order"][0] == worst and task["loss"] == pytest.approx(report["damage"]["before"], abs=1e-6)
    (picture,) = tmp_path.glob("damage_*.png")
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_tokens_to_measure_from_are_counted_in_windows_of_the_first_stage(train, teacher, tmp_path):
    words = f"checkpoint={teacher}", "convert=true", "mixer=gla", "keep=1", "measure_tokens=128", "max_steps=null"
    run = train(tmp_path / "run", *words, "max_tokens=null", "stages=[{seq_len:16,max_steps:1},{max_steps:1}]")
    assert read_json(run / "transfer.json")["damage"]["learned"] == 128


@pytest.mark.slow
def test_layers_named_by_hand_give_the_weights_of_the_same_layers_measured(train, teacher, measured, tmp_path):
    worst = read_yaml(measured / "config.yaml")["mixer"]["pattern"].index("flash")
    run = train(tmp_path / "named", f"checkpoint={teacher}", *GLA, f"keep=[{worst}]")
    one, other = weights(measured, 2), weights(run, 2)
    assert one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.slow
def test_a_run_that_continues_measures_nothing(train, teacher, measured, tmp_path, monkeypatch):
    asked = f"checkpoint={teacher}", *GLA, "keep=1", "measure_tokens=128"
    monkeypatch.setattr(kept_layers, "measure", lambda *_, **__: pytest.fail("it measured again"))
    again = train(tmp_path / "again", *asked, f"resume={measured}/checkpoints/step-00000001")
    one, other = weights(measured, 2), weights(again, 2)
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    with pytest.raises(CheckpointError, match="keep was 1 and is 2"):
        train(tmp_path / "other", f"checkpoint={teacher}", *GLA, "keep=2", f"resume={measured}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("keep=1", "mixer=gla"), "add convert=true"),
        (("convert=true", "checkpoint=RUN", "mixer=gla", "keep=3"), "keeps all of the model's 3 layers"),
        (("convert=true", "checkpoint=RUN", "mixer=gla+flash", "keep=1"), "give one mixer"),
        (("convert=true", "checkpoint=RUN", "mixer=gla", "keep=0"), "must be a number of layers from 1"),
        (("convert=true", "checkpoint=RUN", "mixer=gla", "keep=[1]", "measure_tokens=9"), "no effect without keep=N"),
        (("convert=true", "checkpoint=RUN", "mixer=gla", "keep=[]"), "must be a number of layers from 1"),
    ],
)
def test_what_keep_cannot_mean_is_refused(train, teacher, tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        train(tmp_path / "no", *(word.replace("RUN", str(teacher)) for word in words))
