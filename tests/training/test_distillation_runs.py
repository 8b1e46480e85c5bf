"""Runs that learn from a teacher: they resume bit for bit, and refuse what has no meaning."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import train as launched
from run_files import checkpoint, rows
from test_reliability import assert_same

from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.errors import CheckpointError, ConfigError
from longmix.reading import read_json

STAGES = (
    "stages=[{objective:layers,max_steps:3},"
    "{objective:logits,seq_len:24,max_steps:2},"
    "{seq_len:48,batch_size:1,max_steps:2,schedule:{warmup:1}}]"
)
"""Borders after steps 3 and 5; 7 steps in all."""

WORDS = (
    "max_steps=null",
    "max_tokens=null",
    "loop.log_every=1",
    "loop.checkpoint_every=1",
    "loop.keep_checkpoints=9",
    "loop.validate_every=2",
    "distil.temperature=2",
    "distil.hard_share=0.25",
    "mixer.rotary_base=5e5",
)
TEACHER = (
    "mixer=flash",
    "model.num_layers=2",
    "model.d_model=32",
    "model.mlp_hidden=32",
    "max_steps=3",
    "optimizer.learning_rate=1e-2",
)
LOOP = ("logger=csv", "batch_size=2", "seq_len=32", "data.validation_tokens=256", "trainer=cpu")


@pytest.fixture(scope="module")
def run(run_training, shared_cache) -> Callable[..., Path]:
    """`run("seq_len=32", ...)` trains in a new folder and returns it."""
    return lambda *words: run_training(*words, base=(*LOOP, f"data.cache_dir={shared_cache}"))


@pytest.fixture(scope="module")
def teacher(run) -> Path:
    return run(*TEACHER)


@pytest.fixture(scope="module")
def train(run, teacher) -> Callable[..., Path]:
    return lambda *words: run(*WORDS, f"checkpoint={teacher}", *words)


@pytest.fixture(scope="module")
def straight(train) -> Path:
    return train(STAGES)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("step", [1, 3, 4, 5, 6])
def test_a_run_goes_on_from_any_step_bit_for_bit(step, straight, train):
    ours = train(STAGES, f"resume={checkpoint(straight, step)}")
    one, other = (load_checkpoint(checkpoint(run, 7)) for run in (ours, straight))
    for part in ("step", "model", "optimizers", "random", "data_fingerprint"):
        assert_same(one[part], other[part], part)
    for column in ("train/loss", "train/layers_loss", "train/divergence", "train/gradient_norm", "validation/loss"):
        theirs = {at: value for at, value in rows(straight, column).items() if at > step}
        if theirs:
            assert {at: value for at, value in rows(ours, column).items() if at > step} == theirs


def test_the_log_has_what_each_stage_learned(straight):
    assert rows(straight, "train/layers_loss").keys() == {1, 2, 3}
    each = [rows(straight, f"train/layers_loss/layer_{layer}") for layer in (0, 1)]
    for step, loss in rows(straight, "train/layers_loss").items():
        assert float(loss) == pytest.approx(sum(float(layer[step]) for layer in each) / 2, rel=1e-6)
    assert rows(straight, "train/loss").keys() == {4, 5, 6, 7}
    assert rows(straight, "train/divergence").keys() == {4, 5}
    assert rows(straight, "validation/loss").keys() == {2, 3, 4, 5, 6, 7}
    assert [stage["validation"]["step"] for stage in read_json(straight / "summary.json")["stages"]] == [3, 5, 7]


def test_weights_that_do_not_learn_stay_and_have_no_state(straight, teacher):
    began = load_checkpoint(CheckpointStore(teacher / "checkpoints").latest())["model"]
    after = load_checkpoint(checkpoint(straight, 3))
    moments = set().union(*(optimizer["state"] for optimizer in after["optimizers"]))
    for name, weight in after["model"].items():
        learns = ".mixer." in name
        assert torch.equal(weight, began[name]) != learns, name
        assert (name in moments) == learns, name
    later = load_checkpoint(checkpoint(straight, 4))["optimizers"]
    assert set().union(*(optimizer["state"] for optimizer in later)) == began.keys()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["layers", "logits"])
def test_a_run_without_stages_has_an_objective(objective, train):
    words = (f"objective={objective}", "max_steps=2")
    words += ("distil.temperature=1", "distil.hard_share=0") if objective == "layers" else ()
    run = train(*words)
    column = "train/layers_loss" if objective == "layers" else "train/divergence"
    values = [float(value) for value in rows(run, column).values()]
    assert len(values) == 2 and all(value > 0 for value in values)


REFUSED = {
    "no teacher": (["objective=logits", "checkpoint=null", "mixer=flash"], "learns from a teacher"),
    "carried states": (["objective=logits", "loop.carry_state=true", "data.order=contiguous"], "loop.carry_state=true"),
    "attacks": (["objective=logits", "adversarial.xi=1"], "adversarial.xi"),
    "tuned states": (
        ["objective=layers", "trainable=states", "distil.temperature=1", "distil.hard_share=0"],
        "trainable",
    ),
    "beyond float32": (["objective=logits", "distil.temperature=1e30"], r"distil.temperature=1e\+30 must lie between"),
    "no logits": (
        ["objective=layers", "loop.z_loss=1e-3", "distil.temperature=1", "distil.hard_share=0"],
        "loop.z_loss=0.001 has no effect with objective=layers",
    ),
    "words of another objective": (["objective=layers"], "distil.temperature has no effect without objective=logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused(case, train):
    words, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        train("max_steps=2", *words)


def test_nothing_new_has_nothing_to_learn(train):
    with pytest.raises(ConfigError, match="none has anything to learn"):
        train("objective=layers", "max_steps=2", "mixer.rotary_base=1e4", "distil.temperature=1", "distil.hard_share=0")


def test_a_teacher_that_is_gone_ends_a_run_that_needs_it_and_no_other(teacher, run, tmp_path):
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    words = (*WORDS, f"checkpoint={moved}", STAGES)
    begun = run(*words)
    shutil.rmtree(moved)
    with pytest.raises(CheckpointError, match="teacher"):
        run(*words, f"resume={checkpoint(begun, 4)}")
    ours = run(*words, f"resume={checkpoint(begun, 5)}")
    assert_same(load_checkpoint(checkpoint(ours, 7))["model"], load_checkpoint(checkpoint(begun, 7))["model"], "model")


@pytest.mark.slow
def test_the_settings_of_a_stage_say_which_layers_learn(train):
    learning = "{objective:layers,max_steps:1,mixer:{rotary_base:5e5}}"
    stages = f"stages=[{{objective:logits,max_steps:1}},{learning},{{max_steps:1}}]"
    run = train(stages, "mixer.rotary_base=1e4")
    again = train(stages, "mixer.rotary_base=1e4", f"resume={checkpoint(run, 1)}")
    for each in (run, again):
        (loss,) = rows(each, "train/layers_loss/layer_1").values()
        assert float(loss) > 0
    assert_same(load_checkpoint(checkpoint(again, 3))["model"], load_checkpoint(checkpoint(run, 3))["model"], "model")


STRATEGIES = {"ddp": ["trainer=ddp"], "fsdp": ["trainer=fsdp"], "slices": ["trainer=context_parallel"]}


@pytest.fixture(scope="module")
def divided(teacher, shared_cache) -> list[str]:
    return [
        *(word for word in WORDS if not word.startswith("loop.checkpoint_every")),
        "loop.checkpoint_every=2",
        "stages=[{objective:layers,max_steps:3},{objective:logits,max_steps:3}]",
        "seq_len=32",
        "batch_size=4",
        "data.validation_tokens=256",
        "logger=csv",
        "name=run",
        f"data.cache_dir={shared_cache}",
        f"checkpoint={teacher}",
        "trainer.num_threads=1",
        "trainer.accelerator=cpu",
    ]


@pytest.fixture(scope="module")
def alone(divided, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    launched(1, [*divided, "trainer=cpu", "trainer.micro_batch_size=1"], folder)
    return folder / "runs/run"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_give_the_curve_of_one_and_go_on_bit_for_bit(strategy, divided, alone, tmp_path):
    launched(2, [*divided, *STRATEGIES[strategy]], tmp_path)
    run = tmp_path / "runs/run"
    for column in ("train/layers_loss", "train/loss", "train/divergence", "train/gradient_norm", "validation/loss"):
        for (step, value), (at, expected) in zip(rows(run, column).items(), rows(alone, column).items(), strict=True):
            assert step == at
            assert float(value) == pytest.approx(float(expected), rel=5e-5), (column, step)
    for step in (2, 4):
        again = tmp_path / f"again-{step}"
        again.mkdir()
        launched(2, [*divided, *STRATEGIES[strategy], f"resume={checkpoint(run, step)}"], again)
        one, other = (load_checkpoint(checkpoint(each, 6)) for each in (again / "runs/run", run))
        for part in ("model", "optimizers"):
            assert_same(one[part], other[part], part)
