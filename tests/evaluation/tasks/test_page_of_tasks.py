"""The task of docs/evaluation.md works as it is printed there: one class, one file of settings."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from longmix.config import check
from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate
from longmix.evaluation.tasks.base import Task

PAGE = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(SETTINGS,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
TARGET = "longmix.evaluation.tasks.calibration.Calibration"


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    return run_training(f"data.cache_dir={shared_cache}")


@pytest.fixture
def evaluated(compose_config, run_folder, tmp_path, monkeypatch):
    """Evaluate with the page's class in a module of somebody's, and its file in a folder of theirs."""
    module = ModuleType("somebody")
    monkeypatch.setitem(sys.modules, "somebody", module)
    exec(CODE, vars(module))  # the page's own code
    (tmp_path / "own/task").mkdir(parents=True)
    assert TARGET in SETTINGS
    (tmp_path / "own/task/calibration.yaml").write_text(SETTINGS.replace(TARGET, "somebody.Calibration"))

    def run(*words: str) -> dict:
        place = f"checkpoint={run_folder}", f"output={tmp_path}/out", f"hydra.searchpath=[{tmp_path}/own]"
        return evaluate(compose_config(*place, *words, entry_point="evaluate"))

    return run


def test_it_runs_beside_another_task(evaluated, tmp_path, capsys):
    reports = evaluated("task=[accuracy,calibration]", "max_tokens=512", "task.calibration.bins=5")
    report = reports["calibration"]
    (length,) = reports["accuracy"]["lengths"].values()
    assert sum(row["targets"] for row in report["bins"]) == length["targets"]
    met = sum(row["met"] * row["targets"] for row in report["bins"]) / length["targets"]
    assert met == pytest.approx(length["accuracy"])
    for row in report["bins"]:
        assert 0 <= row["probability"] <= 1 and len(report["bins"]) <= 5
    (file,) = (tmp_path / "out").glob("calibration_sotu_validation_step2_*.json")
    written = json.loads(file.read_text())
    assert written["bins"] == report["bins"] and written["task"] == "calibration"
    assert written["settings"] == {"bins": 5, "seq_len": [report["trained_seq_len"]], "max_tokens": 512}
    printed = capsys.readouterr().out
    assert "validation split: first choices" in printed and f"{report['error']:.4f}" in printed


def test_other_settings_are_another_result(evaluated, tmp_path):
    for words in ((), (), ("task.calibration.bins=5",), ("seq_len=16",), ("max_tokens=64",)):
        evaluated("task=calibration", "max_tokens=256", *words)
    assert len(list((tmp_path / "out").glob("calibration_*.json"))) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.calibration.bins=0"], r"^task\.calibration\.bins=0 must be from 1 to 1000\.$"),
        (["+task.calibration.bin=1"], r"unknown key task\.calibration\.bin\. Did you mean bins\?"),
        (["task.calibration.bins=many"], r"^task\.calibration\.bins='many' is not a whole number"),
    ],
)
def test_its_settings_are_checked_before_any_task_begins(evaluated, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        evaluated("task=[loss,calibration]", *words)
    assert not (tmp_path / "out").exists()


def test_its_file_names_every_setting():
    module = ModuleType("somebody")
    exec(CODE, vars(module))
    assert issubclass(module.Calibration, Task)
    node = yaml.safe_load(SETTINGS)
    assert node.pop("_target_") == TARGET and node == {"bins": 10}
    assert SETTINGS.startswith("# @package task.calibration\n")


def test_a_function_is_no_task():
    node = {"_target_": "longmix.evaluation.loss.evaluate_loss"}
    with pytest.raises(ConfigError, match=r"task\.mine\._target_=.*evaluate_loss is no class of Task"):
        check(node, "task.mine", set(), Task)
