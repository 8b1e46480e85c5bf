"""What is proposed is asked of the planner again, as a user would."""

import dataclasses

import pytest

from longmix.planning.arguments import read
from longmix.planning.plan import Planner, single_changes, smallest_change

WORDS = (
    "model.d_model=64",
    "model.num_layers=3",
    "model.num_heads=2",
    "model.mlp_hidden=96",
    "seq_len=1024",
    "batch_size=8",
    "mixer=sliding_window",
    "gpu=h100",
)


def planner_with(share: float, *words: str) -> Planner:
    """With so much memory that `share` of what is needed is there."""
    request = read([*WORDS, *words])
    planner = Planner(request)
    needed = planner.plan().memory.total
    contexts = 2**30 * (1 if request.gpus == 1 else 2)
    limited = dataclasses.replace(request, memory_bytes=round(share * needed / 0.95) + contexts + 2)
    return Planner(limited)


def fits_again(planner: Planner, words: tuple[str, ...], total: int, *others: str) -> bool:
    """Whether the words do what was said when they stand on the command line."""
    again = dataclasses.replace(read([*WORDS, *others, *words]), memory_bytes=planner.request.memory_bytes)
    memory = Planner(again).plan().memory
    return memory.fits and memory.total == total


CASES = {
    "micro-batches": (0.7, (), ("trainer.micro_batch_size=4",)),
    "recomputing": (0.55, ("trainer.micro_batch_size=1",), ("model.activation_checkpointing=block",)),
    "both": (0.1, (), ("trainer.micro_batch_size=1", "model.activation_checkpointing=block")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("share", "others", "expected"), CASES.values(), ids=CASES)
def test_the_smallest_change_fits(share, others, expected):
    planner = planner_with(share, *others)
    assert not planner.plan().memory.fits
    found = smallest_change(planner)
    assert found is not None
    assert found.words == expected
    assert fits_again(planner, found.words, found.plan.memory.total, *others)


@pytest.mark.slow
def test_fsdp_is_proposed_where_weights_are_what_is_large():
    words = ("gpus=8", "seq_len=256", "model.d_model=512", "model.mlp_hidden=2048", "optimizer=adamw")
    planner = planner_with(0.6, *words)
    found = smallest_change(planner)
    assert found is not None
    assert found.words == ("trainer=fsdp",)
    assert fits_again(planner, found.words, found.plan.memory.total, *words)


@pytest.mark.slow
def test_more_processes_share_a_window_where_one_is_too_large():
    words = ("gpus=8", "trainer=fsdp", "model.activation_checkpointing=block", "seq_len=8192")
    planner = planner_with(0.4, *words)
    found = smallest_change(planner)
    assert found is not None
    # Each process has a window of its own as the request stands, and four where four share them.
    assert found.words == ("trainer.context_parallel=4", "trainer.micro_batch_size=1")
    assert fits_again(planner, found.words, found.plan.memory.total, *words)


@pytest.mark.slow
def test_a_shorter_window_is_the_last_resort():
    words = ("trainer.micro_batch_size=1", "model.activation_checkpointing=block", "seq_len=4096")
    planner = planner_with(0.45, *words)
    found = smallest_change(planner)
    assert found is not None
    assert found.words == ("seq_len=1024",)
    assert fits_again(planner, found.words, found.plan.memory.total, *words)


@pytest.mark.slow
def test_nothing_is_proposed_where_nothing_fits():
    planner = planner_with(0.0001, "seq_len=512", "batch_size=2")
    assert smallest_change(planner) is None
    singles = {advice.words[0].split("=")[0]: advice.plan.memory.fits for advice in single_changes(planner)}
    memory = ("model.activation_checkpointing", "model.activation_offload")
    assert singles == dict.fromkeys(("trainer.micro_batch_size", *memory, "seq_len"), False)


@pytest.mark.slow
def test_single_changes_say_which_of_them_fit_alone():
    planner = planner_with(0.5, "gpus=2", "batch_size=16")
    found = {advice.words: advice.plan.memory.fits for advice in single_changes(planner)}
    assert found[("model.activation_checkpointing=block",)]
    assert not found[("trainer=fsdp",)]
    assert set(found) > {("trainer=fsdp",), ("model.activation_checkpointing=block",)}
