"""`LossStatistics` against sums written out, and `evaluate_loss` against the model itself."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics, position_buckets
from longmix.model.head import IGNORE_INDEX

TOKEN_BYTES = torch.tensor([1, 3, 0, 2, 0, 5], dtype=torch.int32)
"""Two separators among six tokens."""


def random_batch(seed: int, rows: int, length: int, documents: bool = True, ignored: float = 0.2) -> dict:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, len(TOKEN_BYTES), (rows, length), generator=draw)
    targets[torch.rand(rows, length, generator=draw) < ignored] = IGNORE_INDEX
    starts = torch.rand(rows, length, generator=draw) < 0.2
    losses = torch.rand(rows, length, generator=draw) * 5
    ids = starts.cumsum(1).to(torch.int32) if documents else None
    return {"token_losses": losses, "targets": targets, "document_ids": ids}


def written_out(batches: list[dict], seq_len: int) -> dict:
    """The same sums, one token at a time."""
    loss_at, count_at, text_loss, byte_count = [0.0] * seq_len, [0] * seq_len, 0.0, 0
    for batch in batches:
        for row, targets in enumerate(batch["targets"].tolist()):
            position = -1
            for column, target in enumerate(targets):
                ids = batch["document_ids"]
                first = column == 0 or (ids is not None and ids[row, column] != ids[row, column - 1])
                position = 0 if first else position + 1
                if target == IGNORE_INDEX:
                    continue
                loss = batch["token_losses"][row, column].item()
                loss_at[position] += loss
                count_at[position] += 1
                if TOKEN_BYTES[target] > 0:
                    text_loss += loss
                    byte_count += int(TOKEN_BYTES[target])
    return {"loss_at": loss_at, "count_at": count_at, "text_loss": text_loss, "bytes": byte_count}


CASES = [
    pytest.param([{"rows": 1, "length": 1}], 1, id="one token"),
    pytest.param([{"rows": 3, "length": 40}], 40, id="one batch"),
    pytest.param([{"rows": 2, "length": 17, "documents": False}], 17, id="no documents"),
    pytest.param([{"rows": 2, "length": 33}, {"rows": 1, "length": 33, "documents": False}], 33, id="with and without"),
    pytest.param([{"rows": 2, "length": 9}], 64, id="windows shorter than allowed"),
    pytest.param([{"rows": 2, "length": 9, "ignored": 0.9}, {"rows": 1, "length": 9}], 9, id="most ignored"),
]


class TestLossStatistics:
    @pytest.mark.parametrize(("shapes", "seq_len"), CASES)
    def test_equals_sums_written_out(self, shapes, seq_len):
        batches = [random_batch(seed, **shape) for seed, shape in enumerate(shapes)]
        statistics = LossStatistics(TOKEN_BYTES, seq_len)
        for batch in batches:
            statistics.update(**batch)
        expected = written_out(batches, seq_len)
        tokens = sum(expected["count_at"])
        assert tokens > 0
        assert statistics.count_by_position.tolist() == expected["count_at"]
        assert statistics.loss_by_position.tolist() == pytest.approx(expected["loss_at"], rel=1e-12)
        summary = statistics.summary()
        assert (summary["tokens"], summary["bytes"]) == (tokens, expected["bytes"])
        assert summary["loss"] == pytest.approx(sum(expected["loss_at"]) / tokens, rel=1e-12)
        assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]), rel=1e-12)
        if expected["bytes"]:
            bits = expected["text_loss"] / math.log(2) / expected["bytes"]
            assert summary["bits_per_byte"] == pytest.approx(bits, rel=1e-12)

    def test_separators_count_in_the_loss_and_not_in_bits_per_byte(self):
        statistics = LossStatistics(TOKEN_BYTES, 4)
        losses = torch.tensor([[1.0, 100.0, 2.0, 50.0]])
        statistics.update(losses, torch.tensor([[1, 2, 5, IGNORE_INDEX]]), None)
        summary = statistics.summary()
        assert summary["loss"] == pytest.approx(103 / 3)
        assert summary["bits_per_byte"] == pytest.approx(3 / math.log(2) / (3 + 5))
        assert (summary["tokens"], summary["bytes"]) == (3, 8)

    def test_a_loss_where_nothing_is_predicted_does_not_matter(self):
        statistics = LossStatistics(TOKEN_BYTES, 2)
        statistics.update(torch.tensor([[1.0, math.nan]]), torch.tensor([[1, IGNORE_INDEX]]), None)
        assert statistics.summary()["loss"] == 1.0
        assert math.isfinite(statistics.summary()["bits_per_byte"])

    def test_sums_are_exact_over_many_tokens(self):
        statistics = LossStatistics(TOKEN_BYTES, 1)
        losses = torch.full((10_000, 1), 1e-3)
        losses[0] = 1e5  # float32 sums would lose the small ones behind it
        for _ in range(10):
            statistics.update(losses, torch.ones(10_000, 1, dtype=torch.int64), None)
        expected = 10 * (1e5 + 9_999 * losses[1].item()) / 100_000
        assert statistics.summary()["loss"] == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("loss", [1e4, math.inf])
    def test_perplexity_does_not_overflow(self, loss):
        statistics = LossStatistics(TOKEN_BYTES, 1)
        statistics.update(torch.tensor([[loss]]), torch.tensor([[1]]), None)
        assert statistics.summary()["perplexity"] == pytest.approx(math.exp(700))

    def test_without_tokens(self):
        summary = LossStatistics(TOKEN_BYTES, 4).summary()
        assert (summary["tokens"], summary["bytes"], summary["loss"]) == (0, 0, 0)
        assert math.isnan(summary["bits_per_byte"])
        assert LossStatistics(TOKEN_BYTES, 4).by_position() == []

    def test_by_position(self):
        batches = [random_batch(seed, rows=2, length=100) for seed in range(3)]
        statistics = LossStatistics(TOKEN_BYTES, 100)
        for batch in batches:
            statistics.update(**batch)
        expected = written_out(batches, 100)
        rows = statistics.by_position()
        assert rows == [
            {
                "start": start,
                "end": end,
                "tokens": sum(expected["count_at"][start:end]),
                "loss": pytest.approx(sum(expected["loss_at"][start:end]) / sum(expected["count_at"][start:end])),
            }
            for start, end in position_buckets(100)
            if sum(expected["count_at"][start:end])
        ]
        assert len(rows) < len(position_buckets(100))  # documents are short, so the last buckets stay empty
        total = statistics.summary()
        assert sum(row["tokens"] for row in rows) == total["tokens"]
        assert sum(row["tokens"] * row["loss"] for row in rows) / total["tokens"] == pytest.approx(total["loss"])

    def test_own_buckets(self):
        statistics = LossStatistics(TOKEN_BYTES, 4)
        statistics.update(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.ones(1, 4, dtype=torch.int64), None)
        rows = statistics.by_position([(1, 3), (3, 4)])
        assert [(row["start"], row["loss"]) for row in rows] == [(1, 3.0), (3, 8.0)]


@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 31, 32, 33, 100, 1000, 1024, 65_536])
def test_position_buckets_cover_exactly(seq_len):
    buckets = position_buckets(seq_len)
    assert [position for start, end in buckets for position in range(start, end)] == list(range(seq_len))
    assert all(end == 16 * 2**index for index, (_, end) in enumerate(buckets[:-1]))


class Fixed(nn.Module):
    """Says of each target that it costs as many nats as its id; has dropout, so that its mode shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, tokens, targets, *, document_ids):
        self.calls += 1
        return SimpleNamespace(token_losses=self.dropout(targets.float() * self.weight), hits=None)


def batches(count: int = 3):
    for _ in range(count):
        yield {"tokens": torch.zeros(2, 4).long(), "targets": torch.tensor([[1, 2, 3, 5]] * 2), "document_ids": None}


class TestEvaluateLoss:
    @pytest.mark.parametrize("training", [True, False])
    def test_leaves_mode_and_random_state_alone(self, training):
        model = Fixed().train(training)
        state = torch.random.get_rng_state()
        statistics = evaluate_loss(model, batches(), LossStatistics(TOKEN_BYTES, 4))
        assert statistics.summary()["loss"] == (1 + 2 + 3 + 5) / 4  # dropout would have changed it
        assert model.training is training and model.dropout.training is training
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.weight.grad is None

    def test_mode_comes_back_after_an_error(self):
        model = Fixed().train()
        with pytest.raises(KeyError):
            evaluate_loss(model, [{"tokens": torch.zeros(1, 1)}], LossStatistics(TOKEN_BYTES, 4))
        assert model.training

    def test_ends_early_when_told(self):
        model = Fixed()
        answers = iter([True, False])
        statistics = evaluate_loss(model, batches(5), LossStatistics(TOKEN_BYTES, 4), after_batch=lambda: next(answers))
        assert model.calls == 2 and statistics.summary()["tokens"] == 16

    def test_each_forward_pass_has_a_precision_of_its_own(self):
        entered = []

        @contextmanager
        def precision():
            entered.append(torch.is_grad_enabled())
            yield

        evaluate_loss(Fixed(), batches(3), LossStatistics(TOKEN_BYTES, 4), precision=precision)
        assert entered == [False] * 3
