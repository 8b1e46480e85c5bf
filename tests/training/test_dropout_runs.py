"""Dropout in a run of two processes that share rows: each draws its own masks, and goes on with them bit for bit."""

import pytest
import torch
from launched import train

import longmix
from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.training import random_state

WORDS = ["trainer=context_parallel", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.num_threads=1"]
WORDS += ["logger=csv", "seq_len=32", "batch_size=2", "max_steps=4", "data.validation_tokens=64", "name=run"]
WORDS += ["model.num_layers=2", "model.d_model=32", "model.mlp_hidden=32", "mixer=flash+mlstm_tfla"]
WORDS += ["model.embedding_dropout=0.2", "model.residual_dropout=0.2", "mixer.flash.attention_dropout=0.2"]
WORDS += ["loop.checkpoint_every=2", "loop.keep_checkpoints=9", "model.activation_checkpointing=block"]


@pytest.mark.slow
def test_slices_draw_their_own_masks_and_go_on_bit_for_bit(tmp_path, shared_cache):
    states = []
    for name, words in (("whole", []), ("resumed", [f"resume={tmp_path}/whole/runs/run/checkpoints/step-00000002"])):
        (tmp_path / name).mkdir()
        train(2, [*WORDS, *words, f"data.cache_dir={shared_cache}"], tmp_path / name)
        states.append(load_checkpoint(CheckpointStore(tmp_path / name / "runs/run/checkpoints").latest()))
    whole, resumed = states
    assert whole["step"] == resumed["step"] == 4
    assert all(torch.equal(weight, resumed["model"][name]) for name, weight in whole["model"].items())
    first, second = (state["torch"] for state in whole["random"])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_processes_diverge_for_dropout_that_a_later_stage_begins(share, tiny_overrides, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(random_state, "diverge", lambda *of_process: asked.append(of_process))
    stages = f"stages=[{{max_steps:1}},{{max_steps:1,mixer:{{attention_dropout:{share}}}}}]"
    words = [word for word in tiny_overrides if not word.startswith("max_steps")]
    longmix.train([*words, stages], folder=tmp_path / "run")
    assert len(asked) == bool(share)
