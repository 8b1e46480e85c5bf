"""One, two or four processes, however they divide the work, log the same run: curve, validation, what mixers say."""

import csv
from pathlib import Path

import pytest
from launched import train

STEPS = 6
WORDS = [
    "mixer=flash+routing+sparse_flash+mlstm_tfla+rwkv7+scatterbrain+sparse_flash_drop",
    "mixer.flash.heads_kept=1",
    "mixer.flash.heads_balance=1",
    "mixer.routing.clusters=4",
    "mixer.routing.window=8",
    "mixer.routing.local_window=8",
    "mixer.sparse_flash.buckets=4",
    "mixer.scatterbrain.block=8",
    "mixer.rwkv7.head_dim=16",
    "model.num_layers=7",
    "model.d_model=32",
    "model.num_heads=2",
    "model.mlp_hidden=32",
    "model.logit_penalty=1e-3",
    "model.logit_softcap=6",
    "loop.z_loss=1e-2",
    "loop.ema_decay=0.9",
    "loop.spike_sigma=1e6",
    "loop.spike_window=4",
    "seq_len=64",
    "batch_size=4",
    f"max_steps={STEPS}",
    "loop.log_every=1",
    "loop.validate_every=3",
    "loop.tasks=[{task:loss,seq_len:[32,64],stride:32,max_tokens:256}]",
    f"data.validation_tokens={7 * 64}",  # seven rows, which divide over neither two nor four
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.num_threads=1",
    "name=run",
]
DIVISIONS = {
    "ddp": ["trainer=ddp"],
    "fsdp": ["trainer=fsdp"],
    "slices": ["trainer=context_parallel"],
    "ddp-of-slices": ["trainer=ddp", "trainer.context_parallel=2"],
    "fsdp-of-slices": ["trainer=fsdp", "trainer.context_parallel=2"],
    "micro-batches": ["trainer.micro_batch_size=1"],
    "ddp-of-micro-batches": ["trainer=ddp", "trainer.micro_batch_size=1"],
}
CASES = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("slices", 2), ("slices", 4)]
CASES += [("ddp-of-slices", 4), ("fsdp-of-slices", 2), ("fsdp-of-slices", 4)]
CASES += [("micro-batches", 1), ("ddp-of-micro-batches", 2)]
MIXED = ["trainer.precision=bf16-mixed"]
OWN = ("throughput/", "memory/")
"""What differs from run to run."""


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "runs/run/metrics.csv").open(newline="") as stream:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
    return [{key: value for key, value in row.items() if not key.startswith(OWN)} for row in rows]


def run(folder: Path, shared_cache: Path, size: int, words: list[str]) -> list[dict[str, float]]:
    train(size, [*words, *WORDS, f"trainer.devices={size}", f"data.cache_dir={shared_cache}"], folder)
    return rows_of(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, shared_cache) -> list[dict[str, float]]:
    return run(tmp_path_factory.mktemp("alone"), shared_cache, 1, [])


@pytest.mark.slow
@pytest.mark.parametrize(("division", "size"), CASES, ids=[f"{size}-{name}" for name, size in CASES])
def test_every_row_of_the_log_is_that_of_one_process(division, size, alone, tmp_path, shared_cache):
    found = run(tmp_path, shared_cache, size, DIVISIONS[division])
    assert len(found) == STEPS + 2
    for row, wanted in zip(found, alone, strict=True):
        assert row == pytest.approx(wanted, rel=2e-5, abs=1e-7), wanted["step"]


def test_the_log_says_what_there_is_to_compare(alone):
    names = {name for row in alone for name in row}
    assert {"train/loss", "train/gradient_norm", "train/learning_rate", "train/loss_by_position/32-64"} < names
    assert {"task/loss/loss/32", "task/loss/bits_per_byte/64"} < names
    assert {"train/head_balance", "train/balance"} < names
    assert {"train/commitment", "train/logit_penalty", "validation/loss", "validation/bits_per_byte"} < names
    assert {"train/z_loss", "train/spikes", "validation_ema/loss", "validation_ema/bits_per_byte"} < names
    measured = {name.split("/")[1] for name in names if name.startswith("mixer/")}
    assert measured == {f"layer_{index}" for index in range(7)}


@pytest.fixture(scope="module")
def mixed_alone(tmp_path_factory, shared_cache) -> list[dict[str, float]]:
    return run(tmp_path_factory.mktemp("mixed"), shared_cache, 1, MIXED)


# A slice's partial results are rounded to bf16 before they are added, as gradients are; see test_mixed_precision.
MIXED_ERROR = {"ddp": 1e-3, "fsdp": 1e-3, "slices": 4e-3}


@pytest.mark.slow
@pytest.mark.parametrize("division", MIXED_ERROR)
def test_the_curve_in_mixed_precision_is_that_of_one_process(division, mixed_alone, tmp_path, shared_cache):
    found = run(tmp_path, shared_cache, 2, [*DIVISIONS[division], *MIXED])
    assert len(found) == STEPS + 2
    for row, wanted in zip(found, mixed_alone, strict=True):
        for name in row.keys() & {"train/loss", "validation/loss"}:
            assert row[name] == pytest.approx(wanted[name], rel=MIXED_ERROR[division]), (name, wanted["step"])
