"""A checkpoint at other positions, windows and lengths: training that begins from it, evaluation and generation."""

from pathlib import Path

import pytest
import torch

import longmix
from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.composing import composed
from longmix.errors import CheckpointError, ConfigError
from longmix.evaluation.run import evaluate
from longmix.generation.run import generate
from longmix.mixers.parts.rotary_scaling import Linear, Yarn

YARN = ("mixer.rotary_scaling=yarn", "mixer.rotary_factor=2", "mixer.rotary_original_length=32")


@pytest.fixture(scope="module")
def words(tiny_overrides) -> list[str]:
    """Of a run that begins from a checkpoint."""
    own = [word for word in tiny_overrides if not word.startswith("model.")]
    return [*own, "seq_len=32", "loop.validate_every=null", "max_steps=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, words):
    """`trained("flash")`: the folder of a run with this mixer."""
    made: dict[str, Path] = {}

    def get(mixer: str, *further: str) -> Path:
        if mixer not in made:
            made[mixer] = tmp_path_factory.mktemp("trained") / "run"
            sizes = ("model.num_layers=2", "model.d_model=32", "model.mlp_hidden=32")
            longmix.train([*words, *sizes, f"mixer={mixer}", *further], folder=made[mixer])
        return made[mixer]

    return get


def saved(folder: Path) -> dict:
    return load_checkpoint(find_checkpoint(folder))


def test_training_goes_on_at_other_positions_and_lengths(trained, words, tmp_path):
    base = trained("flash")
    still = ("optimizer=adamw", "optimizer.learning_rate=1e-12", "seq_len=64", *YARN)
    given = [*words, f"checkpoint={base}", *still]
    longmix.train([*given, "loop.checkpoint_every=1"], folder=tmp_path / "long")
    before, after = saved(base), saved(tmp_path / "long")
    assert after["config"]["seq_len"] == 64
    old = before["config"]["mixer"]
    new = {"rotary_scaling": "yarn", "rotary_factor": 2, "rotary_original_length": 32}
    assert after["config"]["mixer"] == {**old, **new} != old
    for name, weight in before["model"].items():
        torch.testing.assert_close(after["model"][name], weight, rtol=0, atol=1e-10)
    (rotary,) = {mixer.rotary for mixer in longmix.load(tmp_path / "long").model.mixers()}
    assert rotary.scaling == Yarn(2.0, 32)

    longmix.train([*given, "resume=auto", "max_steps=3"], folder=tmp_path / "long")
    assert saved(tmp_path / "long")["config"]["mixer"] == after["config"]["mixer"]
    with pytest.raises(CheckpointError, match=r"of another run: mixer.rotary_factor was 2 and is 4"):
        longmix.train([*given, "resume=auto", "max_steps=4", "mixer.rotary_factor=4"], folder=tmp_path / "long")


def test_settings_of_the_mixer_in_an_experiment_are_words(trained, words, tmp_path):
    """But not those of an experiment that also chooses the mixer: they are that one's."""
    own = [word for word in words if not word.startswith("trainer=")]
    given = [*own, f"checkpoint={trained('flash')}", "trainer=cpu", "trainer.micro_batch_size=null"]
    longmix.train([*given, "experiment=125m_16k"], folder=tmp_path / "run")
    assert [mixer.rotary.base for mixer in longmix.load(tmp_path / "run").model.mixers()] == [500_000.0] * 2
    longmix.train([*given, "experiment=125m_16k", "mixer.rotary_base=2e5"], folder=tmp_path / "word")
    assert saved(tmp_path / "word")["config"]["mixer"]["rotary_base"] == 2e5
    longmix.train([*given, "experiment=routing_wikitext103"], folder=tmp_path / "other")
    assert saved(tmp_path / "other")["config"]["mixer"] == saved(trained("flash"))["config"]["mixer"]


def test_how_a_model_is_trained_may_change(trained, words, tmp_path):
    base, config = trained("flash"), tmp_path / "configs"
    given = [*words, f"checkpoint={base}"]
    changes = ("model.activation_checkpointing=selective", "model.residual_dropout=0.5")
    longmix.train([*given, *changes, "loop.checkpoint_every=1"], folder=tmp_path / "run")
    model = longmix.load(tmp_path / "run").model
    assert model.activation_checkpointing == "selective" and model.draws()
    assert saved(tmp_path / "run")["config"]["model"] == {
        **saved(base)["config"]["model"],
        "activation_checkpointing": "selective",
        "residual_dropout": 0.5,
    }
    freely = "model.activation_checkpointing=block"
    longmix.train([*given, changes[1], freely, "resume=auto", "max_steps=3"], folder=tmp_path / "run")
    assert longmix.load(tmp_path / "run").model.activation_checkpointing == "block"
    with pytest.raises(CheckpointError, match=r"of another run: model.residual_dropout was 0.5 and is 0.25"):
        longmix.train([*given, "model.residual_dropout=0.25", "resume=auto", "max_steps=4"], folder=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model.logit_softcap comes from .* May change: .*model.residual_dropout"):
        longmix.train([*given, "model.logit_softcap=30"], folder=tmp_path / "other")
    (config / "experiment").mkdir(parents=True)
    (config / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nmodel: {d_model: 64, residual_dropout: 0.5}\nmixer: {rotary_base: 2e5}\n"
    )
    longmix.train([*given, f"hydra.searchpath=[{config}]", "experiment=mine"], folder=tmp_path / "mine")
    assert saved(tmp_path / "mine")["config"]["model"]["residual_dropout"] == 0.5


def test_members_of_a_hybrid_change_each_for_itself(trained, words, tmp_path):
    base = trained("sliding_window+flash", "mixer.sliding_window.window=8")
    changes = ("mixer.sliding_window.window=16", "mixer.flash.rotary_base=null")
    longmix.train([*words, f"checkpoint={base}", *changes], folder=tmp_path / "run")
    window, flash = longmix.load(tmp_path / "run").model.mixers()
    assert (window.window, window.rotary.base, flash.rotary) == (16, 10_000.0, None)
    same = longmix.load(base, mixer={"sliding_window": {"window": 16}, "flash": {"rotary_base": None}}).model.mixers()
    assert [mixer.rotary for mixer in same] == [window.rotary, flash.rotary]
    dotted = longmix.load(base, mixer={"sliding_window.window": 16, "flash.rotary_base": None}).model.mixers()
    assert [(mixer.rotary, getattr(mixer, "window", None)) for mixer in dotted] == [(window.rotary, 16), (None, None)]


REFUSED = {
    "weights": (
        "mixer.qk_norm=false",
        r"mixer.qk_norm comes from checkpoint=.*; .*May change after training: mixer.rot",
    ),
    "of-another": ("mixer.window=64", r"unknown word mixer.window: the mixer of checkpoint=.* has none. May change"),
    "misspelt": ("mixer.rotary_bse=9", r"unknown word mixer.rotary_bse: .* Did you mean mixer.rotary_base\?"),
    "of-a-member": ("mixer.flash.rotary_base=9", r"unknown word mixer.flash.rotary_base: .* mean mixer.rotary_base\?"),
    "value": ("mixer.rotary_scaling=yarn", r"mixer.rotary_factor=null must be at least 1"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_comes_with_the_weights_is_refused_by_name(trained, words, tmp_path, given, message):
    base = trained("flash")
    with pytest.raises(ConfigError, match=message):
        longmix.train([*words, f"checkpoint={base}", given], folder=tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        evaluate(composed("evaluate", [f"checkpoint={base}", given]).content)
    assert not (tmp_path / "run").exists()


MISNAMED = {
    "no-member": ("mixer.rotary_base=9", "mean mixer.sliding_window.rotary_base or mixer.flash.rotary_base?"),
    "member-lacks-it": ("mixer.flash.window=9", "unknown word mixer.flash.window: the mixer of"),
    "misspelt": ("mixer.flash.rotary_bse=9", "mean mixer.flash.rotary_base?"),
    "member-misspelt": (
        "mixer.fash.rotary_base=9",
        "mean mixer.sliding_window.rotary_base or mixer.flash.rotary_base?",
    ),
    "no-setting": ("mixer.flash=9", "mixer.flash has no value of its own; its words are mixer.flash.NAME."),
    "weights": ("mixer.flash.qk_norm=false", "mixer.flash.qk_norm comes from checkpoint="),
}


@pytest.mark.parametrize(("given", "message"), MISNAMED.values(), ids=MISNAMED)
def test_misnamed_settings_of_a_hybrid_are_told_by_member(trained, given, message):
    base = trained("sliding_window+flash", "mixer.sliding_window.window=8")
    with pytest.raises(ConfigError) as refused:
        evaluate(composed("evaluate", [f"checkpoint={base}", given]).content)
    assert message in str(refused.value)


@pytest.mark.parametrize("given", ["mixer=rwkv7", "~mixer.rotary_base"])
def test_other_words_still_come_from_the_checkpoint(words, tmp_path, given):
    word = given.strip("~").partition("=")[0]
    with pytest.raises(ConfigError, match=f"{word} comes from checkpoint=.*; leave one of the two out"):
        longmix.train([*words, f"checkpoint={tmp_path}", given], folder=tmp_path / "run")


def test_evaluation_takes_other_positions_and_says_so(trained, tmp_path):
    base = trained("flash")

    def loss(*given: str) -> float:
        common = [f"checkpoint={base}", f"output={tmp_path}", "seq_len=64", "max_tokens=512"]
        return evaluate(composed("evaluate", [*common, *given]).content)["loss"]["lengths"][64]["loss"]

    plain, scaled = loss(), loss("mixer.rotary_scaling=linear", "mixer.rotary_factor=2.0")
    assert plain == loss("mixer.rotary_base=10000") != scaled
    assert len(list(tmp_path.glob("*.json"))) == 3
    loaded = longmix.load(base, mixer={"rotary_scaling": "linear", "rotary_factor": 2.0})
    assert {mixer.rotary.scaling for mixer in loaded.model.mixers()} == {Linear(2.0)}
    report = loaded.evaluate(seq_len=64, max_tokens=512, output=str(tmp_path / "loaded"))
    assert report["lengths"][64]["loss"] == scaled
    assert '"rotary_factor": 2.0' in next((tmp_path / "loaded").glob("*.json")).read_text()
    with pytest.raises(ConfigError, match=r"mixer.rotary_factor belongs to the loaded model; give it to longmix.load"):
        loaded.evaluate(**{"mixer.rotary_factor": 3})


def test_a_saved_generation_goes_on_at_its_own_positions(trained, tmp_path):
    def text(*given: str) -> str:
        common = [f"checkpoint={trained('flash')}", "max_tokens=4", "temperature=0", *given]
        return generate(composed("generate", common).content).texts[0]

    scaled = ("mixer.rotary_scaling=linear", "mixer.rotary_factor=4")
    text("prompt=Fellow", f"save={tmp_path}/s", *scaled)
    with pytest.raises(ConfigError, match=r"saved with other settings of the mixer, \{'rotary_scaling': 'linear'"):
        text(f"load={tmp_path}/s")
    assert len(text(f"load={tmp_path}/s", *scaled)) > 0
