"""Runs that carry state: a checkpoint has it, any number of processes go on with it, and a run resumes bit for bit."""

from pathlib import Path

import pytest
import torch
from launched import train

from longmix.checkpoints import load_checkpoint
from longmix.errors import ConfigError

STEPS = 4
WORDS = [
    "mixer=mlstm_tfla+sliding_window+flash",
    "mixer.sliding_window.window=100",  # longer than the windows
    "model.num_layers=3",
    "model.d_model=32",
    "model.num_heads=2",
    "model.mlp_hidden=32",
    "seq_len=32",
    "batch_size=4",
    f"max_steps={STEPS}",
    "data.order=contiguous",
    "data.validation_tokens=64",
    "loop.carry_state=true",
    "loop.checkpoint_every=2",
    "loop.keep_checkpoints=9",
    "logger=csv",
]


def state_of(folder: Path, step: int = STEPS) -> dict:
    return load_checkpoint(folder / f"checkpoints/step-{step:08d}")


@pytest.fixture(scope="module")
def straight(run_training, shared_cache) -> Path:
    return run_training(*WORDS, f"data.cache_dir={shared_cache}")


def test_a_checkpoint_has_the_state_of_all_rows(straight):
    carried = state_of(straight)["carried"]
    assert {leaf.shape[0] for leaf in carried.values()} == {4}
    assert carried[".layers[0].mixer.carried.memory"].abs().max() > 0
    assert carried[".layers[1].mixer.key"].shape[1] == 99
    assert not any(name.startswith(".layers[2]") for name in carried)
    assert (carried[".layers[0].mixer.next_position"] == STEPS * 32).all()  # positions go on with the document
    assert "carried" not in load_checkpoint(straight / "checkpoints/step-00000004", optimizers=False)


@pytest.mark.parametrize("words", [[], ["trainer.micro_batch_size=1"]], ids=["same", "other-micro-batches"])
def test_a_run_resumes_with_the_state(straight, run_training, shared_cache, words):
    start = straight / "checkpoints/step-00000002"
    again = state_of(run_training(*WORDS, f"data.cache_dir={shared_cache}", f"resume={start}", *words))
    wanted = state_of(straight)
    for part in ("model", "carried"):
        assert again[part].keys() == wanted[part].keys()
        for name, tensor in wanted[part].items():
            if words:
                torch.testing.assert_close(again[part][name], tensor, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(again[part][name], tensor), name


def test_the_state_matters(straight, run_training, shared_cache):
    start = straight / "checkpoints/step-00000002"
    words = [f"data.cache_dir={shared_cache}", f"resume={start}", "loop.carry_state=false"]
    anew = state_of(run_training(*WORDS, *words))
    assert "carried" not in anew
    assert not torch.equal(anew["model"]["head.weight"], state_of(straight)["model"]["head.weight"])


def test_a_stage_begins_anew_and_resumes_inside_and_at_its_border(run_training, shared_cache):
    stages = "stages=[{seq_len:32,batch_size:4,max_steps:2},{seq_len:48}]"
    own = ("seq_len", "batch_size", "max_steps", "loop.checkpoint_every")
    words = [word for word in WORDS if word.partition("=")[0] not in own]
    words += [stages, f"data.cache_dir={shared_cache}", "loop.checkpoint_every=1"]
    whole = run_training(*words)
    assert {leaf.shape[0] for leaf in state_of(whole, 2)["carried"].values()} == {4}
    wanted = state_of(whole)
    assert (wanted["carried"][".layers[0].mixer.next_position"] == 2 * 48).all()
    for step in (2, 3):
        again = state_of(run_training(*words, f"resume={whole / f'checkpoints/step-{step:08d}'}"))
        for part in ("model", "carried"):
            assert all(torch.equal(again[part][name], leaf) for name, leaf in wanted[part].items())


def test_carrying_takes_rows_that_read_on(run_training, shared_cache):
    with pytest.raises(ConfigError, match=r"loop\.carry_state=true needs rows that read on .*data\.order=contiguous"):
        run_training(*WORDS, f"data.cache_dir={shared_cache}", "data.order=shuffled")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "context_parallel"])
def test_processes_carry_the_state_of_their_rows(strategy, straight, tmp_path, shared_cache):
    """Two processes are one; and each number of them continues the run of the other."""
    words = [*WORDS, f"data.cache_dir={shared_cache}", "trainer.accelerator=cpu", "trainer.num_threads=1"]
    two = [f"trainer={strategy}", "trainer.devices=2"]
    wanted = state_of(straight)
    train(2, [*words, *two, "name=two"], tmp_path)
    begun = tmp_path / "runs/two/checkpoints/step-00000002"
    train(1, [*words, "name=one", f"resume={begun}"], tmp_path)
    train(2, [*words, *two, "name=again", f"resume={straight / 'checkpoints/step-00000002'}"], tmp_path)
    for name in ("two", "one", "again"):
        found = state_of(tmp_path / "runs" / name)
        for part in ("model", "carried"):
            assert found[part].keys() == wanted[part].keys()
            for leaf, tensor in wanted[part].items():
                torch.testing.assert_close(found[part][leaf], tensor, rtol=1e-3, atol=2e-5)
