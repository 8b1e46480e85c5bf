"""The words of a plan, and what is refused."""

import pytest

from longmix.errors import ConfigError
from longmix.planning.arguments import read

SMALL = ("model.d_model=64", "model.num_layers=1", "model.num_heads=2", "model.mlp_hidden=64", "seq_len=256")


def test_without_words_it_is_the_default_run_on_one_gpu():
    request = read([])
    assert request.labels == ("flash", "tiny")
    assert request.accelerator is not None
    assert request.accelerator.name == "H200"
    assert (request.gpus, request.precision, request.vocab_size) == (1, "bf16-mixed", 257)
    assert request.variant.strategy == "single"
    assert request.batch_size(request.variant) == 1
    assert any("no batch_size" in note for note in request.notes)


@pytest.mark.slow
def test_several_gpus_mean_ddp_unless_something_else_is_said():
    request = read([*SMALL, "gpus=4"])
    assert request.variant.strategy == "ddp"
    assert request.batch_size(request.variant) == 4
    assert any(note.startswith("trainer=ddp") for note in request.notes)
    assert read([*SMALL, "gpus=4", "trainer=fsdp"]).variant.strategy == "fsdp"
    assert read([*SMALL, "trainer=ddp", "trainer.devices=2", "trainer.num_nodes=3"]).gpus == 6


def test_processes_may_share_windows():
    request = read([*SMALL, "gpus=8", "trainer.context_parallel=4", "batch_size=6", "trainer.micro_batch_size=3"])
    assert request.variant.context_parallel == 4
    assert request.rows(request.variant) == 3
    every = read([*SMALL, "gpus=8", "trainer=context_parallel"])
    assert (every.variant.context_parallel, every.batch_size(every.variant)) == (8, 1)


def test_a_cpu_is_this_machine_in_float32():
    request = read([*SMALL, "gpu=cpu"])
    assert request.accelerator is None
    assert request.precision == "32-true"
    assert request.memory_bytes > 2**30


def test_words_of_train_mean_the_same():
    request = read([*SMALL, "mixer=sliding_window*3+flash", "tokenizer=bpe", "batch_size=4", "gpu=rtx4090"])
    assert request.labels[0] == "sliding_window*3+flash"
    assert request.vocab_size == 4096
    assert request.rows(request.variant) == request.variant.micro_batch_size == 4
    assert request.model().shape.d_model == 64
    matched = read([*SMALL, "match.parameters=200000"])
    assert matched.model().parameter_counts()["total"] == pytest.approx(200_000, rel=0.02)


REFUSED = {
    "gpu": (["gpu=h300"], "gpu=h300 is not in the table; use one of GB200, B200, H200.*or cpu"),
    "gpus": (["gpus=0"], "gpus=0 must be a whole number"),
    "gpus-text": (["gpus=many"], "gpus=many must be"),
    "unknown": (["seq_length=5"], "seq_length"),
    "mixer": (["mixer=flush"], "mixer=flush does not exist. Did you mean flash"),
    "setting": (["mixer=flash", "+mixer.widow=3"], "mixer.widow"),
    "heads": (["model.num_heads=3"], "model.num_heads=3"),
    "devices": (["trainer.devices=0"], "trainer.devices=0"),
    "micro": (["trainer.micro_batch_size=0"], "trainer.micro_batch_size=0"),
    "batch": (["gpus=4", "batch_size=6"], "batch_size=6 does not divide over 4 replicas.*give a multiple of 4"),
    "few": (["gpus=4", "batch_size=2"], "batch_size=2 does not divide over 4 replicas"),
    "micro-batch": (["batch_size=6", "trainer.micro_batch_size=4"], "micro_batch_size=4 does not divide the 6 windows"),
    "slices": (["gpus=4", "trainer.context_parallel=3"], "context_parallel=3 does not divide gpus=4"),
    "length": (["gpus=4", "trainer.context_parallel=4", "seq_len=510"], "does not divide seq_len=510"),
    "checkpoint": (["checkpoint=runs/x"], "checkpoint=runs/x cannot be planned"),
    "states": (["trainable=states"], "trainable=states is not planned"),
    "steps": (["max_tokens=null"], "max_steps or max_tokens"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(words, message):
    with pytest.raises(ConfigError, match=message):
        read(words)
