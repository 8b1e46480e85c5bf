"""Losses after contexts of several lengths are of the same targets, inside one document, and equal plain torch's."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib import image

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.errors import ConfigError, DataError
from longmix.evaluation import prefill
from longmix.evaluation.run import evaluate
from longmix.evaluation.tasks import context_lengths as module
from longmix.model.build import model_from_checkpoint

SEPARATOR = 256
TRAINED = 16
TEXTS = ["abcdefghij" * 13, "short", "klmno pqrst " * 6, "x" * 63, "Zwölf Boxkämpfer " * 5]
"""Of validation: 131, 6, 73, 64 and 106 tokens with their separators; longer than 64 are the first, third and last."""


@pytest.fixture(scope="module")
def run_folder(run_training, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split, texts in {"train": ["to be or not to be. " * 20, "abcdefghij" * 30], "validation": TEXTS}.items():
        (folder / split).mkdir()
        for number, text in enumerate(texts):
            (folder / split / f"{number}.txt").write_text(text)
    return run_training(
        "data=text",
        f"data.corpus.path={folder}/train",
        f"data.corpus.validation={folder}/validation",
        f"data.cache_dir={folder}/cache",
        "mixer=gated_deltanet+sliding_window",
        "mixer.sliding_window.window=24",
        "model.num_layers=2",
        f"seq_len={TRAINED}",
    )


@pytest.fixture
def evaluated(compose_config, run_folder, tmp_path):
    def run(*overrides: str) -> dict:
        words = f"checkpoint={run_folder}", "task=context_lengths", f"output={tmp_path}/results"
        return evaluate(compose_config(*words, *overrides, entry_point="evaluate"))["context_lengths"]

    return run


def documents() -> list[list[int]]:
    return [[SEPARATOR, *text.encode()] for text in TEXTS]


def losses(run_folder: Path, tokens: list[int], length: int) -> torch.Tensor:
    """Of the last `length` tokens after the ones before each of them, float64 [length]."""
    model = model_from_checkpoint(load_checkpoint(find_checkpoint(run_folder))).eval()
    with torch.no_grad():
        hidden = model(torch.tensor([tokens[-length - 1 : -1]])).hidden[0]
        return F.cross_entropy(
            F.linear(hidden, model.head.weight).double(), torch.tensor(tokens[-length:]), reduction="none"
        )


class TestLengths:
    @pytest.mark.slow
    def test_same_targets_after_less_and_more_context(self, evaluated, run_folder, tmp_path, capsys):
        report = evaluated("seq_len=[8,32,64]", "task.context_lengths.scored=5")
        # the first document has room for two windows of 64 tokens and one more, the others have room for one
        windows = [
            document[start : start + 65] for document in documents() for start in range(0, len(document) - 64, 64)
        ]
        assert report["windows"] == len(windows) == 4 and report["documents"] == 3
        for length, result in report["lengths"].items():
            expected = torch.cat([losses(run_folder, window, length)[-5:] for window in windows])
            assert (result["tokens"], result["bytes"]) == (20, 20)
            assert result["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
            assert result["bits_per_byte"] == pytest.approx(expected.mean().item() / math.log(2), rel=1e-5)
            assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
        (saved,) = (tmp_path / "results").glob("context_lengths_*_validation_step2_*.json")
        assert json.loads(saved.read_text()).items() >= json.loads(json.dumps(report)).items()
        assert image.imread(saved.with_suffix(".png")).std() > 0
        printed = capsys.readouterr().out
        figures = [*report["lengths"].values(), *report["by_position"]]
        assert all(f"{row['loss']:.4f}" in printed for row in figures) and "left out" not in printed

    @pytest.mark.slow
    def test_without_a_number_half_of_the_shortest_are_scored(self, evaluated):
        assert evaluated("seq_len=[6,20]")["scored"] == 3
        assert evaluated("seq_len=1")["scored"] == 1

    @pytest.mark.slow
    def test_multiples_of_the_trained_length_that_a_document_reaches(self, evaluated, capsys):
        report = evaluated()
        assert list(report["lengths"]) == [4, 8, 16, 32, 64, 128] and report["scored"] == 2
        assert (report["windows"], report["documents"]) == (1, 1)
        assert list(evaluated("task.context_lengths.factors=[0.5,8,8.2]")["lengths"]) == [8, 128]
        assert "left out: 131 tokens; the longest document has 131" in capsys.readouterr().out

    @pytest.mark.slow
    def test_max_tokens_takes_fewer_windows_from_everywhere(self, evaluated, run_folder):
        report = evaluated("seq_len=[8,64]", "max_tokens=150")
        assert (report["windows"], report["documents"]) == (2, 2)
        first, _, third, *_ = documents()  # the second window is also of the first document
        expected = torch.cat([losses(run_folder, document[:65], 8)[-4:] for document in (first, third)])
        assert report["lengths"][8]["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
        assert evaluated("seq_len=[8,64]", "max_tokens=1")["windows"] == 1


class TestInsideDocuments:
    def test_loss_by_position_beyond_the_trained_length(self, evaluated, run_folder):
        report = evaluated("seq_len=[8,64]")
        assert [(row["start"], row["end"], row["beyond_trained"]) for row in report["by_position"]] == [
            (0, 16, False),
            (16, 32, True),
            (32, 64, True),
        ]
        expected = torch.stack(
            [losses(run_folder, document[:65], 64) for document in documents() if len(document) > 64]
        )
        for row in report["by_position"]:
            assert row["tokens"] == 3 * (row["end"] - row["start"])
            assert row["loss"] == pytest.approx(expected[:, row["start"] : row["end"]].mean().item(), rel=1e-5)

    def test_a_bucket_ends_at_the_trained_length(self, evaluated, monkeypatch):
        monkeypatch.setattr(module.Subject, "trained_seq_len", 24)
        rows = evaluated("seq_len=64")["by_position"]
        assert [(row["start"], row["beyond_trained"]) for row in rows] == [
            (0, False),
            (16, False),
            (24, True),
            (32, True),
        ]


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [10, 100])
def test_pieces_change_nothing(evaluated, monkeypatch, at_once):
    whole = evaluated("seq_len=[8,64]")
    monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", at_once)
    pieces = evaluated("seq_len=[8,64]")
    for length, result in whole["lengths"].items():
        assert pieces["lengths"][length]["loss"] == pytest.approx(result["loss"], rel=1e-5)
    for row, other in zip(whole["by_position"], pieces["by_position"], strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "kind", "words"),
    [
        pytest.param(["task.context_lengths.factors=[]"], ConfigError, "context_lengths.factors", id="no lengths"),
        pytest.param(["task.context_lengths.factors=[-1]"], ConfigError, "above 0", id="negative"),
        pytest.param(
            ["seq_len=[8,16]", "task.context_lengths.scored=9"], ConfigError, "scored=9.*length, 8", id="many"
        ),
        pytest.param(["task.context_lengths.scored=0"], ConfigError, "scored=0", id="none"),
        pytest.param(["seq_len=[131,500]"], DataError, "longest document.*has 131 tokens.*shorter lengths", id="long"),
        pytest.param(["split=test"], DataError, "no split 'test'", id="split"),
    ],
)
def test_refused(evaluated, overrides, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        evaluated(*overrides)
    assert not (tmp_path / "results").exists()
