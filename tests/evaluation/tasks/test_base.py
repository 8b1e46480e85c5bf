"""What every task has in common."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from longmix.config import locate, settings
from longmix.evaluation.tasks.base import Answer, Task

FILES = sorted((Path(__file__).parents[3] / "configs/task").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_task_is_one_name_and_its_defaults_are_those_of_its_file(file):
    node = yaml.safe_load(file.read_text())
    package, module, name = node.pop("_target_").rsplit(".", 2)
    task = locate(f"{package}.{module}.{name}", "task")
    assert issubclass(task, Task) and not task.__abstractmethods__
    if package == "longmix.training":  # it trains for a moment, and imports do not go upward
        assert module == f"{file.stem}_task" and name.lower().startswith(file.stem.replace("_", ""))
    else:
        assert (package, module, name.lower()) == ("longmix.evaluation.tasks", file.stem, file.stem.replace("_", ""))
    assert file.read_text().startswith(f"# @package task.{file.stem}\n")
    assert set(node) == set(settings(task))


class Counting(Task):
    name = "counting"

    def __init__(self, most: int, least: int = 0) -> None:
        self.most, self.least = most, least

    def ask(self, subject):
        return Answer({"split": subject.split}, shown="seen")

    def tables(self, answer):
        yield f"{answer.report['split']} was {answer.shown}"


class Saved(SimpleNamespace):
    def seq_lens(self):
        return [4, 8]

    def stride_used(self):
        return {"stride": 2}

    def save(self, *result):
        self.result = result


def test_the_stages(capsys):
    subject = Saved(split="test", config=SimpleNamespace(max_tokens=7))
    assert Counting(3).run(subject) == {"split": "test"}
    assert capsys.readouterr().out == "test was seen\n"
    settings = {"most": 3, "least": 0, "seq_len": [4, 8], "max_tokens": 7, "stride": 2}
    assert subject.result == ("counting", {"split": "test"}, None, settings, True)


def test_settings_that_an_answer_names_are_those_of_the_result():
    assert Counting(3).used(Saved(), Answer({}, {"most": 2})) == {"most": 2}
