"""Batches moved, cut and shortened with what they say of documents, and without."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longmix.analysis.effective_attention import layer_inputs
from longmix.batch import Batch, each, first_tokens
from longmix.data.documents import Window
from longmix.data.loaders import collate, document_starts
from longmix.evaluation.loss import run_whole, to_device
from longmix.evaluation.tasks.accuracy import _at_length as accuracy_at
from longmix.model.backbone import ModelOutput
from longmix.training.module import split_batch

LENGTHS = [(12,), (3, 9), (1, 4, 7), (11, 1)]


def packed() -> Batch:
    """Four rows of 12 tokens."""
    tokens = torch.arange(48).view(4, 12)
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)).int() for row in LENGTHS]
    rows = zip(tokens.numpy(), (tokens + 1).numpy(), (row.numpy() for row in ids), strict=True)
    return collate(Window(*row) for row in rows)


def plain() -> Batch:
    """The same rows, never packed; a batch from elsewhere need not have starts."""
    batch = packed()
    return Batch(tokens=batch["tokens"], targets=batch["targets"], document_ids=None)


@pytest.mark.parametrize("make", [packed, plain])
def test_what_is_moved_keeps_its_fields(make):
    moved = to_device(make(), "meta")
    assert list(moved) == list(make())
    assert all(x is None or x.device.type == "meta" for x in moved.values())


@pytest.mark.parametrize("rows", [None, 1, 2, 4])
def test_micro_batches_have_the_documents_of_their_rows(rows):
    batch = packed()
    parts = split_batch(batch, rows)
    for name in batch:
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    assert [list(part) for part in split_batch(plain(), 2)] == [["tokens", "targets", "document_ids"]] * 2


@pytest.mark.parametrize("length", [1, 3, 4, 11, 12])
def test_a_prefix_has_the_documents_that_begin_in_it(length):
    short = first_tokens(packed(), length)
    again = torch.from_numpy(document_starts(short["document_ids"].numpy()))
    width = max(again.shape[1], short["document_starts"].shape[1])
    filled = [
        torch.nn.functional.pad(x, (0, width - x.shape[1]), value=length) for x in (again, short["document_starts"])
    ]
    assert torch.equal(*filled)
    assert first_tokens(plain(), length)["document_starts"] is None


def test_every_tensor_is_replaced_and_nothing_else():
    doubled = each(plain(), lambda x: 2 * x)
    assert doubled["document_ids"] is None and torch.equal(doubled["tokens"], 2 * packed()["tokens"])


class Noting(torch.nn.Module):
    """A model that notes what it is told of documents."""

    vocab_size = 3

    def mixers(self) -> list:
        return []

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def state_bytes(self, length: int) -> int:
        return 0

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None, **documents: torch.Tensor):
        self.told = documents
        return ModelOutput(torch.zeros(*tokens.shape, 3), torch.zeros(tokens.shape))


def read_for_accuracy(model: Noting, batch: Batch) -> None:
    restored = SimpleNamespace(device="cpu", autocast=contextlib.nullcontext)
    accuracy_at(SimpleNamespace(restored=restored, model=model, batches=lambda length: [batch]), 12)


@pytest.mark.parametrize("read", [run_whole, layer_inputs, read_for_accuracy])
@pytest.mark.parametrize("make", [packed, plain])
def test_whoever_reads_a_batch_tells_the_model_of_all_its_documents(read, make):
    model, batch = Noting(), make()
    read(model, batch)
    assert model.told == {name: batch[name] for name in ("document_ids", "document_starts") if name in batch}


def test_nobody_unpacks_the_documents_of_a_batch_by_hand():
    calls = re.compile(r"""document_ids=\w*(batch|rows|moved)\w*\[.document_ids.\]""")
    root = Path(__file__).parent.parent
    files = [*root.glob("src/**/*.py"), *root.glob("benchmarks/**/*.py"), *root.glob("examples/**/*.py")]
    assert len(files) > 200
    assert not [str(path) for path in files if calls.search(path.read_text())]
