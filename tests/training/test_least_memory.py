"""Sizes that cannot fit are refused before any memory is taken; less is counted than a run takes."""

import dataclasses

import pytest
import torch

from longmix.config import TrainConfig, read, resolved
from longmix.data.tokens.bpe import LARGEST_VOCABULARY, BpeTokenizer
from longmix.data.tokens.preparation import Preparation
from longmix.distributed.ranks import MOST_ON_A_MACHINE
from longmix.errors import ConfigError
from longmix.planning import arguments
from longmix.planning.__main__ import main as plan
from longmix.training import least_memory
from longmix.training.hardware import TrainerSettings
from longmix.training.run import check_config, train

SMALL = ["model.num_layers=2", "model.d_model=32", "model.num_heads=2", "model.mlp_hidden=32", "trainer=cpu"]


@pytest.fixture
def config(compose_config):
    return lambda *words: read(TrainConfig, resolved(compose_config(*SMALL, "logger=none", *words)))


@pytest.fixture(autouse=True)
def free(monkeypatch):
    """There are 64 GiB free, whatever machine this is."""
    monkeypatch.setattr(least_memory, "free_bytes", lambda device: 64 * 2**30)


@pytest.mark.parametrize(
    ("words", "largest"),
    [
        (
            ["batch_size=1000000000000"],
            "what 1,000,000,000,000 windows of seq_len=512 leave for the backward pass take",
        ),
        (["batch_size=1000000000000", "trainer.micro_batch_size=1"], "the tokens of batch_size=1000000000000 take"),
        (["seq_len=1000000000000", "batch_size=1"], "what 1 window of seq_len=1000000000000 leave"),
        (["model.d_model=4194304"], "weights and gradients take"),
        (["model.mlp_hidden=1000000000000"], "weights and gradients take"),
        (["tokenizer=bpe", "tokenizer.vocab_size=10000000", "model.d_model=2048"], "weights and gradients take"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_with_its_largest_part(compose_config, monkeypatch, words, largest):
    monkeypatch.setattr("longmix.training.run.RunPlace.of", lambda *_: pytest.fail("nothing else should be asked"))
    with pytest.raises(ConfigError, match=largest) as error:
        train(compose_config(*SMALL, "logger=none", *words))
    assert "64.0 GiB are free" in str(error.value) and "smaller" in str(error.value)


def test_the_parts(config):
    own, settings = config("seq_len=100", "batch_size=8"), TrainerSettings(accelerator="cpu", micro_batch_size=2)
    least = least_memory.least_memory(own, settings, 50)
    assert (least.batch, least.activations) == (8 * 100 * 16, 2 * 100 * 2 * 32 * 4)
    states = least_memory.least_memory(dataclasses.replace(own, trainable="states"), settings, 50)
    assert 2 * states.weights == least.weights
    assert least.total == least.weights + least.batch + least.activations


def test_processes_share_the_machine(config):
    settings = {"accelerator": "cpu", "devices": 4}
    own = config("seq_len=100", "batch_size=8")
    one = least_memory.least_memory(own, TrainerSettings(accelerator="cpu"), 50)
    copied = least_memory.least_memory(own, TrainerSettings(strategy="ddp", **settings), 50)
    divided = least_memory.least_memory(own, TrainerSettings(strategy="fsdp", **settings), 50)
    sliced = least_memory.least_memory(own, TrainerSettings(strategy="fsdp", context_parallel=4, **settings), 50)
    assert (copied.weights, divided.weights) == (4 * one.weights, one.weights)
    assert copied.batch == divided.batch == sliced.batch == one.batch
    assert copied.activations == sliced.activations == one.activations


def test_less_is_counted_than_a_plan_does(config):
    own = config("seq_len=256", "batch_size=4")
    request = arguments.read([*SMALL, "seq_len=256", "batch_size=4", "gpu=cpu"])
    from longmix.planning.plan import Planner

    planned = Planner(request).plan().memory.total
    least = least_memory.least_memory(own, TrainerSettings(accelerator="cpu"), request.vocab_size)
    assert planned / 20 < least.total < planned


@pytest.mark.parametrize(
    "words",
    [
        ["mixer=flash"],
        ["mixer=kda+routing"],
        # of many layers: what one that is computed again keeps for a moment is in the plan alone
        ["mixer=flash", "model.activation_checkpointing=block", "model.num_layers=8"],
    ],
    ids=" ".join,
)
def test_what_layers_keep_is_nearly_what_a_plan_says(config, words):
    words = [*words, "seq_len=1024", "batch_size=8", "model.d_model=64"]
    request = arguments.read([*SMALL, *words, "gpu=cpu"])
    from longmix.planning.plan import Planner

    planned = Planner(request).plan().memory
    settings = TrainerSettings(accelerator="cpu")
    first = least_memory.least_memory(config(*words), settings, request.vocab_size)
    closer = least_memory._closer(config(*words), settings, request.vocab_size, first)
    assert planned.parts["activations"] / 2 < closer.activations and closer.total < planned.total
    if len(words) == 4:
        assert closer.activations > 10 * first.activations


def test_a_stage_whose_layers_would_fill_the_memory_is_refused(compose_config, monkeypatch):
    monkeypatch.setattr("longmix.training.run.RunPlace.of", lambda *_: pytest.fail("nothing else should be asked"))
    stages = "stages=[{seq_len:64,max_steps:1},{seq_len:20000000,max_steps:1,batch_size:4}]"
    with pytest.raises(
        ConfigError, match=r"stages\[1\]: training needs at least .* 4 windows of seq_len=20000000 leave"
    ):
        train(compose_config(*SMALL, "logger=none", "batch_size=4", stages))


def test_a_model_that_needs_real_numbers_counts_what_enters_its_blocks(config, monkeypatch):
    def needs_numbers(*_: object) -> None:
        raise TypeError("no data")

    monkeypatch.setattr("longmix.training.kept_activations._kept", needs_numbers)
    own, settings = config("seq_len=1024"), TrainerSettings(accelerator="cpu")
    first = least_memory.least_memory(own, settings, 50)
    assert least_memory._closer(own, settings, 50, first) == first


def test_where_the_system_does_not_say_what_is_free_nothing_is_refused(config, monkeypatch):
    monkeypatch.setattr(least_memory, "free_bytes", lambda device: None)
    own = config("batch_size=1000000")
    least_memory.check_memory(own, TrainerSettings(accelerator="cpu"), 50)


def test_one_gpu_has_to_hold_all_of_it(config, monkeypatch):
    monkeypatch.setattr(TrainerSettings, "on_gpu", True)
    monkeypatch.setattr(TrainerSettings, "precision_in_use", "bf16-mixed")
    small = type("Properties", (), {"total_memory": 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    with pytest.raises(ConfigError, match=r"needs at least .* and 0\.0 GiB are free: what 2 windows"):
        least_memory.check_memory(config("seq_len=16384"), TrainerSettings(accelerator="cpu"), 50)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BpeTokenizer(10**12), f"tokenizer.vocab_size=1000000000000 must be at most {LARGEST_VOCABULARY:,}"),
        (lambda: Preparation(workers=10**6), f"workers=1000000 must be at most {MOST_ON_A_MACHINE:,}"),
        (lambda: TrainerSettings(num_threads=10**9), "trainer.num_threads=1000000000 must be at most 4,096"),
        (lambda: TrainerSettings(strategy="ddp", devices=10**6, accelerator="cpu"), "trainer.devices=1000000 must be"),
    ],
)
def test_numbers_that_bring_a_machine_to_a_halt(make, said):
    with pytest.raises(ConfigError) as error:
        make()
    assert said in str(error.value)


def test_too_many_loading_processes(config):
    with pytest.raises(ConfigError, match=r"data\.num_workers=1000000 must be at most 4,096"):
        check_config(config("data.num_workers=1000000"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch_size=1e12"], "tokens at once, and a plan takes at most 134,217,728"),
        (["seq_len=1e12"], "1,000,000,000,000 tokens at once"),
        (["model.d_model=1e12"], "this model takes more memory than there is"),
    ],
)
def test_a_plan_of_such_sizes_ends_at_once(capsys, words, said):
    assert plan([*SMALL, *words]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("ConfigError: ") and said in message
