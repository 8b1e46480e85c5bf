"""Checkpoints that will not fit on the disk are spoken of at the start."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from longmix.checkpoints import CheckpointStore
from longmix.training.space import checkpoint_bytes, warn_of_space


def test_the_size_is_that_of_weights_and_optimizer_values_each_once():
    weight = torch.zeros(10, 3)
    state = {"exp_avg": torch.zeros(10, 3), "step": torch.tensor(1.0)}
    saved = {
        "model": {"a": weight, "tied": weight, "ids": torch.zeros(4).long()},
        "optimizers": [{"state": {"a": state}}],
    }
    assert checkpoint_bytes({**saved, "random": torch.zeros(99)}) == 120 + 32 + 120 + 4


@pytest.mark.parametrize(
    ("present", "to_write", "free", "needed"),
    [(0, 9, 399, 4), (0, 9, 400, None), (0, 1, 99, 1), (0, 1, 100, None), (3, 9, 99, 1), (4, 9, 0, None)],
)
def test_what_is_held_at_once_must_fit(present, to_write, free, needed, tmp_path, monkeypatch, caplog):
    store = CheckpointStore(tmp_path / "runs/run/checkpoints")
    for step in range(present):
        store.path(step).mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free * 2**30))
    warn_of_space(store, 100 * 2**30, 2, to_write)
    if needed is None:
        assert caplog.text == ""
    else:
        assert f"need {needed * 100:.1f} GiB more for {needed} checkpoints of 100.0 GiB" in caplog.text
        assert "loop.keep_checkpoints" in caplog.text


def test_a_run_looks_at_its_start(run_training, tiny_overrides, monkeypatch, caplog):
    monkeypatch.setattr("longmix.training.space.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    run_training(*tiny_overrides, "mixer=flash", "seq_len=32", "max_steps=3")
    assert caplog.text.count("free space") == 1
