"""Runs with stages whose processes are really killed, before, at and behind the border of two stages."""

from pathlib import Path

import faulty
import pytest
from launched import together, torchrun_places
from test_reliability import assert_same

from longmix.checkpoints import CheckpointStore, load_checkpoint

STRATEGIES = {
    "single": (1, ["trainer=cpu"]),
    "ddp": (2, ["trainer=ddp"]),
    "fsdp": (2, ["trainer=fsdp"]),
    "slices": (2, ["trainer=context_parallel"]),
}
WORDS = [
    "mixer=flash",
    "model.num_layers=1",
    "model.d_model=32",
    "model.mlp_hidden=32",
    "trainer.accelerator=cpu",
    "trainer.num_threads=1",
    "loop.log_every=1",
    "loop.checkpoint_every=3",
    "loop.keep_checkpoints=9",
    "data.validation_tokens=256",
    "logger=csv",
    "name=run",
]
CASES = [
    ("single", faulty.STEP - 1, 0),
    ("single", faulty.STEP, 0),
    ("single", faulty.STEP + 1, 2),
    ("ddp", faulty.STEP - 1, 0),
    ("ddp", faulty.STEP, 2),
    ("fsdp", faulty.STEP, 0),
    ("slices", faulty.STEP, 0),
]


def run(fault: str, strategy: str, folder: Path, *more: str) -> list[int | None]:
    size, words = STRATEGIES[strategy]
    places = [{**place, **({"FAULT": fault} if fault else {})} for place in torchrun_places(size)]
    folder.mkdir(exist_ok=True)
    ends = together([*WORDS, *words, *more], folder, places)
    return [None if end is None else end.code for end in ends]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "border", "workers"), CASES)
def test_a_killed_run_ends_with_the_same_bits(strategy, border, workers, tmp_path, shared_cache):
    words = [
        f"stages=[{{seq_len:32,batch_size:4,max_steps:{border}}},{{seq_len:64,batch_size:2,max_steps:{9 - border},"
        "mixer:{rotary_base:5e5}}]",
        f"data.cache_dir={shared_cache}",
        f"data.num_workers={workers}",
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert set(run("", strategy, straight, *words)) == {0}
    assert -9 in run("kill:0", strategy, killed, *words)
    store = CheckpointStore(killed / "runs/run/checkpoints")
    assert store.latest().name == f"step-{max(3, border if border <= faulty.STEP else 3):08d}"
    assert set(run("", strategy, killed, *words, "resume=auto")) == {0}
    ours, theirs = (load_checkpoint(folder / "runs/run/checkpoints/step-00000009") for folder in (killed, straight))
    for part in ("model", "optimizers", "random", "data_fingerprint"):
        assert_same(ours[part], theirs[part], part)
