"""Words and settings that cannot be: every task names the number and the cure, and the other tasks take place."""

import pytest
import torch

from longmix import machine_memory
from longmix.errors import ConfigError, DataError, LongmixError
from longmix.evaluation import memory
from longmix.evaluation.run import _memory_errors, evaluate


@pytest.fixture(scope="module")
def text_run(run_training, tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for split in ("train", "validation"):
        (root / split).mkdir()
        (root / split / "0.txt").write_text(f"to be or not to be, that is the {split}. " * 10)
    words = f"data.corpus.path={root}/train", f"data.corpus.validation={root}/validation"
    return run_training("data=text", *words, f"data.cache_dir={root}/cache", "seq_len=32")


@pytest.fixture(scope="module")
def number_run(run_training):
    return run_training("data=mqar", "data.task.vocabulary=64", "data.task.pairs=2", "seq_len=16")


@pytest.fixture
def evaluated(compose_config, text_run, tmp_path):
    def run(*words: str, checkpoint=text_run) -> dict:
        place = f"checkpoint={checkpoint}", f"output={tmp_path}/out"
        return evaluate(compose_config(*place, *words, entry_point="evaluate"))

    return run


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (
            ["data=mqar", "task=accuracy"],
            ConfigError,
            r"synthetic task, MultiQueryRecall, of 8,\d+ numbers.*257 tokens",
        ),
        (["data=s5", "task=loss"], ConfigError, "synthetic task, GroupWords, of .* trained on text"),
        (
            ["seq_len=99999999"],
            DataError,
            r"seq_len=99999999 is more than the validation split of .* has, 4\d\d tokens",
        ),
        (["seq_len=[16,500000]", "task=accuracy"], DataError, "seq_len=500000 is more than the validation split"),
        (["seq_len=10000000000000000000000"], ConfigError, "seq_len=10000000000000000000000 must be a whole number"),
        (["max_tokens=-5"], ConfigError, "max_tokens=-5 must be at least 1"),
        (["batch_size=-1"], ConfigError, "batch_size=-1 must be at least 1"),
        (["max_tokens=10000000000000000000000"], ConfigError, "is too large; whole numbers go up to"),
        (["task=states", "task.states.length=99999999"], DataError, "task.states.length=99999999 is more than"),
        (["task=states", "task.states.points=-1"], ConfigError, "task.states.points=-1 must be from 1 to"),
        (["task=states", "task.states.windows=9999999999999999999"], ConfigError, "task.states.windows="),
        (["task=attention", "task.attention.length=8000"], DataError, "task.attention.length=8000 is more than"),
        (["task=attention", "task.attention.windows=1000000"], ConfigError, "task.attention.windows=1000000 must be"),
        (
            ["task=decode_cost", "task.decode_cost.measured=[99999999]"],
            DataError,
            "measured and the steps.*is more than",
        ),
        (["task=decode_cost", "task.decode_cost.contexts=[9999999999999999999]"], ConfigError, "contexts="),
        (["task=decode_cost", "task.decode_cost.batch=-2"], ConfigError, "batch=-2 must be from 1 to"),
        (["task=causality", "task.causality.length=100000000"], ConfigError, "length=100000000 must be at most 65536"),
        (["task=causality", "task.causality.entropy_length=100000000"], ConfigError, "entropy_length=100000000 must"),
        (["task=context_lengths", "task.context_lengths.factors=[1e300]"], DataError, "longest document"),
        (["task=context_lengths", "task.context_lengths.scored=0"], ConfigError, "scored=0 must be from 1 to"),
        (["task=needle", "task.needle.needles=1000000000"], ConfigError, "needles=1000000000 must be from 1 to 100000"),
        (["task=needle", "task.needle.factors=[1e300]", "task.needle.needles=1"], DataError, "has .*tokens"),
        (["task=needle", "task.needle.factors=[-1]"], ConfigError, r"factors=\[-1\] must be a list"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_one_line(evaluated, words, kind, message, tmp_path):
    with pytest.raises(LongmixError, match=message) as caught:
        evaluated(*words)
    assert caught.type is kind and caught.value.exit_code == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["loss", "accuracy", "needle", "context_lengths"])
def test_text_for_a_model_of_numbers(evaluated, number_run, task):
    with pytest.raises(ConfigError, match=r"data are text, sotu, and the model of .* synthetic task: its \d+ tokens"):
        evaluated("data=sotu", f"task={task}", checkpoint=number_run)


def test_numbers_for_a_model_of_other_numbers(evaluated, number_run):
    with pytest.raises(ConfigError, match=r"data\.task has .* tokens and the model"):
        evaluated("data=mqar", "task=accuracy", checkpoint=number_run)


def test_a_length_that_memory_does_not_hold(evaluated, number_run, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"seq_len=4000000000000: .* tokens at once take more than .* GiB of memory are free"
    ):
        evaluated("task=accuracy", "seq_len=4000000000000", checkpoint=number_run)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5000)
    with pytest.raises(
        ConfigError, match=r"seq_len=32: .* GiB of memory are free; give shorter windows, or a smaller batch_size"
    ):
        evaluated()


def test_memory_is_read_from_the_system(tmp_path, monkeypatch):
    assert memory.free_bytes(torch.device("cpu")) > 2**20
    monkeypatch.setattr(machine_memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(machine_memory, "GROUPS", tmp_path / "none")
    assert memory.free_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_a_refused_allocation_is_one_line(error, refused):
    kind, words = (ConfigError, "task=loss takes more") if refused else (RuntimeError, "shapes")
    with pytest.raises(kind, match=words), _memory_errors("loss"):
        raise error


def test_numbers_have_no_bytes(evaluated, number_run, capsys):
    reports = evaluated("task=[loss,accuracy]", "max_tokens=64", checkpoint=number_run)
    found = reports["loss"]["lengths"][16]
    assert set(found) == {"loss", "perplexity", "recall", "tokens", "by_position"}
    assert found["recall"] == reports["accuracy"]["lengths"][16]["accuracy"]
    printed = capsys.readouterr().out
    assert "bits/byte" not in printed and "recall" in printed


class TestSeveralTasks:
    def test_an_error_in_one_leaves_the_others(self, evaluated, tmp_path, capsys):
        words = "task=[needle,loss,accuracy]", "seq_len=16"  # a needle has no room in 16 tokens
        with pytest.raises(LongmixError, match="1 of 3 tasks failed; each said why above") as caught:
            evaluated(*words)
        assert caught.value.exit_code == 2
        assert "task=needle: ConfigError" in capsys.readouterr().err
        assert sorted(path.name.split("_")[0] for path in (tmp_path / "out").glob("*.json")) == ["accuracy", "loss"]

    def test_a_setting_that_does_not_exist_stops_before_the_first(self, evaluated, tmp_path):
        with pytest.raises(ConfigError, match=r"unknown key task\.needle\.x"):
            evaluated("task=[loss,needle]", "+task.needle.x=1")
        assert not (tmp_path / "out").exists()
