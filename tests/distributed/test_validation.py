"""Validation by several processes, rows whole or in slices, finds what one finds, and counts every token once."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sliced import LENGTH, VOCABULARY, Case, rows

from longmix.data.documents import Window
from longmix.data.loaders import EvaluationBatches
from longmix.model.head import IGNORE_INDEX
from longmix.training import strategies
from longmix.training.module import TrainingModule
from longmix.training.supervisor import Supervisor

MIXERS = {
    "flash": "flash num_kv_heads=1",
    "window": "sliding_window window=27",
    "routing": "routing clusters=3 window=4 local_window=5",
    "hash": "sparse_flash buckets=4",
    "mlstm-exp": "mlstm_tfla gate=exp num_heads=2",
    "rwkv7": "rwkv7 head_dim=12",
    "scatterbrain": "scatterbrain block=3 num_features=16",
}

DIVISIONS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
"""Processes, and how many of them share a row."""


def windows(count: int) -> list[Window]:
    """Rows of which some are packed; the first lacks targets, as the last window of a corpus does."""
    (plain, targets, _), (packed, _, ids) = rows(False), rows(True)
    made = []
    for index in range(count):
        row, is_packed = index % len(plain), index % 3 != 0
        wanted = targets[row].clone()
        wanted[LENGTH - 9 if index == 0 else LENGTH :] = IGNORE_INDEX
        documents = ids[row] if is_packed else torch.zeros(LENGTH, dtype=torch.int32)
        tokens = (packed if is_packed else plain)[row].roll(index)
        made.append(Window(*(x.numpy() for x in (tokens, wanted, documents))))
    return made


class Data:
    """What validation asks of its data."""

    token_bytes = np.arange(VOCABULARY) % 4
    validation_tokens = None

    def __init__(self, count: int) -> None:
        self.windows = windows(count)

    def evaluation_loader(self, split, seq_len, batch_size, max_tokens, rank, world_size):
        assert (split, seq_len, max_tokens) == ("validation", LENGTH, None)
        batches = EvaluationBatches(self.windows, batch_size, rank, world_size)
        return [batches[index] for index in range(len(batches))]


@contextmanager
def alone(group: dist.ProcessGroup) -> Iterator[None]:
    """As if there were no processes but those of the group."""
    with patch.object(dist, "all_reduce", functools.partial(dist.all_reduce, group=group)):
        yield


CONFIG = SimpleNamespace(
    loop=SimpleNamespace(stop_at_recall=None),
    seq_len=LENGTH,
    batch_size=4,
    max_steps=1,
    max_tokens=None,
    stages=None,
    trainer=SimpleNamespace(settings={}),
)


class Nothing:
    """A log and a terminal for nobody."""

    def write(self, step: int, metrics: dict) -> None:
        """Forget them."""

    def message(self, text: str) -> None:
        """Forget it."""


def validation(case: Case, count: int, module: TrainingModule, rank: int, world_size: int) -> dict[str, Any]:
    supervisor = Supervisor(CONFIG, Data(count), None, Nothing(), Nothing(), None, None)
    trainer = SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        is_global_zero=rank == 0,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )
    supervisor.validate(trainer, module)
    return {**supervisor.state.validation, "by_position": supervisor.state.validation_by_position}


def memory(group: dist.ProcessGroup, case: Case) -> tuple[float, int]:
    """What is logged of it, and what the summary gets, by processes that hold 1, 2, ... GiB."""
    supervisor = Supervisor(CONFIG, None, None, None, None, None, None)
    trainer = SimpleNamespace(precision="32-true", world_size=dist.get_world_size(group))
    held = (dist.get_rank(group) + 1) * 2**30
    with alone(group), patch("longmix.training.supervisor.peak_memory_bytes", lambda _: held):
        logged = supervisor._throughput(trainer, module_of(case, 1))["memory/peak_gib"]
    return logged, supervisor.state.peak_memory_bytes


def module_of(case: Case, slices: int) -> TrainingModule:
    options = {"micro_batch_size": None, "gradient_clip": None, "skip_nonfinite": False}
    model = case.model()
    model.measures_hits = True
    return TrainingModule(model, None, None, total_steps=1, **options, slices=slices)


def in_processes(group: dist.ProcessGroup, case: Case, count: int, slices: int) -> tuple[dict[str, Any], set[int]]:
    """What it finds, and the lengths that the model was given."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    module, lengths = module_of(case, slices), set()
    if slices > 1:
        module.row_group = group if slices == size else strategies.row_group(slices)
    module.model.embedding.register_forward_pre_hook(lambda _, inputs: lengths.add(inputs[0].shape[1]))
    with alone(group):
        return validation(case, count, module, rank, size), lengths


@pytest.mark.slow
@pytest.mark.parametrize("words", MIXERS.values(), ids=MIXERS)
def test_processes_validate_as_one(pool, node_of, words):
    """Seven rows divide over neither two nor four; one row leaves groups without any."""
    case = Case(node_of(words))
    for count in (7, 1):
        wanted = validation(case, count, module_of(case, 1), 0, 1)
        assert wanted["tokens"] == count * LENGTH - 9
        positions = wanted.pop("by_position")
        for size, slices in DIVISIONS:
            for found, lengths in pool.run(size, in_processes, case, count, slices):
                assert lengths == {LENGTH // slices}
                for row, expected in zip(found.pop("by_position"), positions, strict=True):
                    assert row == pytest.approx(expected, rel=1e-12), (count, size, slices)
                assert found == pytest.approx(wanted, rel=1e-12), (count, size, slices)


def test_memory_is_the_largest_of_any_process(pool, node_of):
    for size in (2, 4):
        assert pool.run(size, memory, Case(node_of("flash"))) == [(size, size * 2**30)] * size
