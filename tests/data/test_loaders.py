"""Batches of windows: where their documents start, and rows that are never packed."""

import numpy as np
import pytest
import torch

from longmix.data.documents import Window
from longmix.data.loaders import collate, document_starts


def random_ids(random: np.random.Generator, rows: int, length: int, share: float) -> np.ndarray:
    """Rows in which each token begins a document with probability `share`; ids begin anywhere and skip numbers."""
    steps = (random.random((rows, length)) < share) * random.integers(1, 4, (rows, length))
    return steps.cumsum(1).astype(np.int32)


def expected(ids: np.ndarray) -> list[list[int]]:
    """Starts of each row, token by token."""
    return [[0, *(place for place in range(1, len(row)) if row[place] != row[place - 1])] for row in ids.tolist()]


@pytest.mark.parametrize("share", [0.0, 0.002, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 2, 17, 1000, 2048])
def test_starts_are_those_of_a_loop_over_tokens_and_then_the_length(length, share):
    random = np.random.default_rng([length, int(1000 * share)])
    for rows in (1, 2, 5):
        ids = random_ids(random, rows, length, share)
        starts, wanted = document_starts(ids), expected(ids)
        assert starts.dtype == np.int32 and starts.shape[0] == rows
        for row, row_wanted in zip(starts.tolist(), wanted, strict=True):
            assert row == row_wanted + [length] * (starts.shape[1] - len(row_wanted))
        most, least = max(map(len, wanted)), min(16, max(1, length // 128))
        assert max(most, least) <= starts.shape[1] < 2 * max(most, least)
        assert starts.shape[1].bit_count() == 1


def test_most_batches_of_long_rows_have_one_shape():
    random = np.random.default_rng(0)
    shapes = {document_starts(random_ids(random, 2, 16384, 5 / 16384)).shape for _ in range(50)}
    assert shapes == {(2, 16)}


def window(*documents: int) -> Window:
    """A window of documents of these lengths; none for one that is never packed."""
    ids = np.repeat(np.arange(len(documents), dtype=np.int32), documents) if documents else None
    tokens = np.arange(6)
    return Window(tokens, tokens + 1, ids)


def test_rows_that_are_never_packed_have_no_documents():
    batch = collate([window(), window()])
    assert batch["document_ids"] is None and batch["document_starts"] is None
    assert torch.equal(batch["targets"], torch.arange(1, 7).expand(2, -1))


def test_rows_that_may_be_packed_have_documents_beside_one_that_is_not():
    batch = collate([window(6), window(1, 3, 2), window()])
    assert batch["document_ids"].tolist() == [[0] * 6, [0, 1, 1, 1, 2, 2], [0] * 6]
    assert batch["document_starts"].tolist() == [[0, 6, 6, 6], [0, 1, 4, 6], [0, 6, 6, 6]]
    assert batch["document_ids"].dtype == batch["document_starts"].dtype == torch.int32
