"""`loop.tasks`: figures of tasks beside the validation's, in runs that are the same bit for bit without them."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

import longmix
from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.command_line.schema import configs_folder
from longmix.config import TrainConfig, read
from longmix.errors import ConfigError
from longmix.training.run import check_config, train
from longmix.training.tasks_during import choices

WORDS = (
    *("mixer=routing+flash", "mixer.routing.clusters=2", "mixer.routing.window=8", "model.num_layers=2"),
    *("seq_len=32", "max_steps=6", "loop.log_every=1", "loop.validate_every=1", "loop.checkpoint_every=2"),
)
TASKS = (
    "loop.tasks=[accuracy,{task:needle,seq_len:[160,192],depths:[0,1],needles:2},"
    "{task:loss,name:strided,seq_len:[8,16],stride:8,max_tokens:128,buckets:8}]"
)


@pytest.fixture(scope="module")
def runs(run_training) -> dict[str, Path]:
    return {
        "without": run_training(*WORDS),
        "with": run_training(*WORDS, TASKS, "loop.tasks_every=2", "loop.keep_checkpoints=9"),
    }


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(stream)]


def steps_with(folder: Path, column: str) -> list[str]:
    return [row["step"] for row in rows_of(folder) if column in row]


def test_every_weight_moment_and_generator_is_the_same(runs):
    ours, theirs = (
        load_checkpoint(CheckpointStore(runs[name] / "checkpoints").latest()) for name in ("with", "without")
    )
    for part in ("step", "model", "optimizers", "random"):
        leaves = zip(tree_flatten(ours[part])[0], tree_flatten(theirs[part])[0], strict=True)
        for leaf, other in leaves:
            assert torch.equal(leaf, other) if isinstance(leaf, torch.Tensor) else leaf == other, part


def test_every_second_validation_and_the_last_have_them(runs):
    names = {key for row in rows_of(runs["with"]) for key in row if key.startswith("task/")}
    assert {"task/accuracy/accuracy/32", "task/needle/gain/160", "task/needle/accuracy/192"} < names
    assert {"task/strided/loss/8", "task/strided/bits_per_byte/16"} < names
    for name in names:
        assert steps_with(runs["with"], name) == ["2", "4", "6"]
    assert steps_with(runs["with"], "validation/loss") == list("123456")
    assert not any(key.startswith("task/") for row in rows_of(runs["without"]) for key in row)


def test_they_are_what_evaluate_gives(runs, compose_config, tmp_path):
    from longmix.evaluation.run import evaluate

    (last,) = (row for row in rows_of(runs["with"]) if row["step"] == "6" and "task/strided/loss/8" in row)
    words = f"checkpoint={runs['with']}", "seq_len=[8,16]", "stride=8", "max_tokens=128", f"output={tmp_path}"
    report = evaluate(compose_config(*words, entry_point="evaluate"))["loss"]
    for length in (8, 16):
        assert float(last[f"task/strided/loss/{length}"]) == pytest.approx(report["lengths"][length]["loss"], rel=1e-6)


def test_a_run_that_goes_on_has_each_once(runs, tiny_overrides, compose_config, tmp_path):
    folder = Path(shutil.copytree(runs["with"], tmp_path / "run"))
    for step in ("step-00000005", "step-00000006"):  # as if killed before them; their rows are there
        shutil.rmtree(folder / "checkpoints" / step, ignore_errors=True)
    train(compose_config(*tiny_overrides, *WORDS, TASKS, "loop.tasks_every=2", f"resume={folder}", output=folder))
    assert steps_with(folder, "task/needle/gain/160") == ["2", "4", "6"]
    for ours, theirs in zip(rows_of(folder), rows_of(runs["with"]), strict=True):
        assert {key: value for key, value in ours.items() if key.startswith("task/")} == {
            key: value for key, value in theirs.items() if key.startswith("task/")
        }


def test_one_that_cannot_be_done_is_reported_and_training_goes_on(run_training, capsys):
    folder = run_training("seq_len=16", "loop.tasks=[needle,accuracy]")
    assert "loop.tasks[0] was left out: a context of 8 tokens has no room" in " ".join(capsys.readouterr().err.split())
    assert steps_with(folder, "task/accuracy/accuracy/16") == ["2"]
    assert json.loads((folder / "summary.json").read_text())["validation"]["step"] == 2


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("[neddle]", "loop.tasks[0]: there is no task neddle. Did you mean needle? Tasks are: accuracy, attention"),
        ("[loss,{task:needle,depth:[1]}]", "unknown key loop.tasks[1].depth. Did you mean depths?"),
        ("[{task:needle,lengths:[1]}]", "unknown key loop.tasks[0].lengths."),
        ("[{task:needle,needles:0}]", "loop.tasks[0].needles=0 must be from 1"),
        ("[{task:needle,needles:many}]", "loop.tasks[0].needles='many' is not a whole number"),
        ("[{task:loss,seq_len:0}]", "loop.tasks[0].seq_len=0 must be a whole number from 1"),
        ("[{task:needle,stride:8}]", "loop.tasks[0].stride=8 has no effect on task=needle"),
        ("[{task:loss,seq_len:[64,32],stride:48}]", "loop.tasks[0].stride=48 must be from 1 to seq_len=32"),
        ("[decode_cost]", "loop.tasks[0]: task=decode_cost gives the same before and after training"),
        ("[{task:lm_eval}]", "no value was given for: loop.tasks[0].tasks"),
        ("[loss,{task:loss,seq_len:8}]", "another task has the name loss; give one of them {name:x}"),
        ("[{needle:1}]", "is no list of tasks; write it like '[needle,{task:loss,seq_len:4096}]'"),
        ("[3]", "is no list of tasks"),
    ],
)
def test_refused_before_any_work(compose_config, tiny_overrides, tasks, words):
    config = compose_config(*tiny_overrides, f"loop.tasks={tasks}")
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_config(read(TrainConfig, config))


def test_a_model_that_looks_ahead_is_refused_but_for_tasks_that_take_it(compose_config, tiny_overrides):
    words = (*tiny_overrides, "mixer=routing", "mixer.mode=sequence_topk", "mixer.clusters=2", "mixer.window=8")
    with pytest.warns(UserWarning, match="mode"), pytest.raises(ConfigError, match="later tokens change what layer 0"):
        check_config(read(TrainConfig, compose_config(*words, "loop.tasks=[accuracy]")))
    with pytest.warns(UserWarning, match="mode"):
        check_config(read(TrainConfig, compose_config(*words, "loop.tasks=[{task:loss,prefixes:2}]")))


def test_every_task_has_numbers_to_log(run_training):
    tasks = "{task:causality,length:16,entropy_steps:0},{task:states,length:32,windows:1,points:4}"
    lengths = "{task:attention,windows:1},{task:context_lengths,seq_len:[8,16],max_tokens:64}"
    folder = run_training(
        "mixer=mlstm_tfla+flash", "model.num_layers=2", "seq_len=16", f"loop.tasks=[{tasks},{lengths}]"
    )
    (row,) = (row for row in rows_of(folder) if "task/causality/causal" in row)
    assert row["task/causality/causal"] == "1.0" and float(row["task/causality/largest_change"]) < 1e-4
    expected = {
        "states/rms/layer_0",
        "attention/entropy/layer_0",
        "attention/mean_distance/layer_1",
        "context_lengths/loss/16",
    }
    assert {f"task/{name}" for name in expected} < set(row)


@pytest.mark.slow
def test_tasks_of_ones_own_folder_from_python(tiny_overrides, tmp_path):
    """As on the command line: while Hydra composed, the folder was known, and later nothing but the call knows it."""
    own = tmp_path / "configs"
    (own / "task").mkdir(parents=True)
    shutil.copy(configs_folder() / "task" / "loss.yaml", own / "task" / "mine.yaml")
    words = [*tiny_overrides, "logger=csv", "loop.tasks=[{task:mine,seq_len:8,max_tokens:64}]"]
    longmix.train([*words, f"hydra.searchpath=[{own}]"], folder=tmp_path / "run")
    assert steps_with(tmp_path / "run", "task/mine/loss/8")
    with pytest.raises(ConfigError, match=r"loop.tasks\[0\]: there is no task mine"):
        longmix.train(words, folder=tmp_path / "without")


def test_the_first_folder_that_has_a_task_counts(tmp_path):
    for name, task in (("first", "mine"), ("second", "mine"), ("second", "other"), ("second", "needle")):
        (tmp_path / name / "task").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "task" / f"{task}.yaml").touch()
    found = choices([tmp_path / "first", tmp_path / "second"])
    assert found["mine"].parent.parent.name == "first" and found["other"].parent.parent.name == "second"
    assert found["needle"] == configs_folder() / "task" / "needle.yaml"
