"""`keep=N` in several processes: they divide the layers among them, and choose what one process does."""

import pytest
from launched import train as launched

from longmix.reading import read_json, read_yaml

SIZES = ("model.num_layers=3", "model.d_model=32", "model.mlp_hidden=32")
KEEP = ("convert=true", "mixer=gla", "keep=1", "measure_tokens=128")


@pytest.fixture(scope="module")
def words(shared_cache):
    return [
        "logger=csv",
        "name=run",
        "batch_size=2",
        "seq_len=32",
        "data.validation_tokens=256",
        f"data.cache_dir={shared_cache}",
        "trainer.accelerator=cpu",
        "trainer.num_threads=1",
    ]


@pytest.fixture(scope="module")
def teacher(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    launched(1, [*words, *SIZES, "mixer=flash", "optimizer.learning_rate=3e-2", "max_steps=12", "trainer=cpu"], folder)
    return folder / "runs/run"


@pytest.fixture(scope="module")
def alone(words, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    launched(1, [*words, *KEEP, f"checkpoint={teacher}", "max_steps=1", "trainer=cpu"], folder)
    return folder / "runs/run"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "context_parallel"])
def test_processes_choose_as_one_does(strategy, words, teacher, alone, tmp_path):
    launched(2, [*words, *KEEP, f"checkpoint={teacher}", "max_steps=1", f"trainer={strategy}"], tmp_path)
    run = tmp_path / "runs/run"
    ours, expected = (read_json(each / "transfer.json")["damage"] for each in (run, alone))
    assert ours["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert ours["learned"] == expected["learned"] == 128
    assert read_yaml(run / "config.yaml")["mixer"] == read_yaml(alone / "config.yaml")["mixer"]
