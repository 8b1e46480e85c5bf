"""`task=loss` with `stride`, `buckets` and `words`: against loops written out."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longmix.batch import IGNORE_INDEX
from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.data.tokens.preparation import prepare
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.data.windows import EvaluationWindows
from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate
from longmix.model.build import model_from_checkpoint

SEPARATOR = 256
ONE = (
    "It was the best of times, it was the worst of times,\nit was the age of wisdom,  \n\nit was the age of foolishness"
)
OTHERS = ["Call me Ishmael.\n", "x", "Zwölf Boxkämpfer jagen\tViktor quer.\nUnd?\n"]


class Texts:
    """A corpus of given documents."""

    name = "texts"
    splits = ("validation",)

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def documents(self, split: str):
        return iter(self.texts)

    def fingerprint(self):
        return {"texts": self.texts}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split, texts in {"train": ["to be or not to be. " * 30], "validation": [ONE], "test": [ONE, *OTHERS]}.items():
        (folder / split).mkdir()
        for number, text in enumerate(texts):
            (folder / split / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run_folder(run_training, corpus, tmp_path_factory) -> Path:
    return run_training(
        "data=text",
        f"data.corpus.path={corpus}/train",
        f"data.corpus.validation={corpus}/validation",
        f"data.corpus.test={corpus}/test",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "seq_len=32",
    )


@pytest.fixture
def evaluated(compose_config, run_folder, tmp_path):
    def run(*overrides: str):
        words = f"checkpoint='{run_folder}'", f"output='{tmp_path}/results'", *overrides
        return evaluate(compose_config(*words, entry_point="evaluate"))

    return run


def published_recipe(run_folder: Path, text: str, max_length: int, stride: int) -> list[float]:
    """Nats of each token by the loop of Hugging Face's page "Perplexity of fixed-length models".

    The page averages the windows' means, which counts each window's first label though the shift leaves it out; here
    the sums are kept.
    """
    model = model_from_checkpoint(load_checkpoint(find_checkpoint(run_folder))).eval()
    ids = torch.tensor([[SEPARATOR, *text.encode()]])
    seq_len, prev_end_loc, nats = ids.shape[1], 0, []
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = ids[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            logits = F.linear(model(input_ids).hidden, model.head.weight).double()
        costs = F.cross_entropy(logits[0, :-1], target_ids[0, 1:], reduction="none", ignore_index=-100)
        nats += costs[target_ids[0, 1:] != -100].tolist()
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return nats


class TestStride:
    @pytest.mark.parametrize(
        ("seq_len", "stride"), [(32, 1), (32, 8), (32, 31), (32, 32), (7, 3), (100, 60), (112, 20), (1, 1)]
    )
    def test_equals_the_published_recipe(self, evaluated, run_folder, seq_len, stride):
        report = evaluated(f"seq_len={seq_len}", f"stride={stride}", "batch_size=3")["loss"]
        nats = published_recipe(run_folder, ONE, seq_len + 1, stride)
        result = report["lengths"][seq_len]
        assert report["stride"] == stride and result["tokens"] == len(nats) == len(ONE.encode())
        assert result["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)

    def test_of_the_window_is_what_it_is_without(self, evaluated):
        words = "split=test", "seq_len=32", "task=[loss,accuracy]"
        plain, strided = evaluated(*words), evaluated(*words, "stride=32")
        assert strided["loss"].pop("stride") == 32
        assert strided == plain
        assert (
            evaluated(*words, "stride=8")["accuracy"]["lengths"][32]["targets"]
            == plain["loss"]["lengths"][32]["tokens"]
        )

    @pytest.mark.parametrize(("seq_len", "stride"), [(16, 5), (16, 16), (9, 1), (1000, 3)])
    def test_scores_each_token_once_after_enough_of_its_document(self, tmp_path, seq_len, stride):
        token_file = prepare(Texts([ONE, *OTHERS]), ByteTokenizer(), "validation", tmp_path)
        document = np.repeat(np.arange(4), np.diff(token_file.offsets))
        windows = EvaluationWindows(token_file, seq_len, stride=stride)
        scored = []
        for number in range(len(windows)):
            begin, window = number * stride, windows[number]
            for place in np.flatnonzero(window.targets != IGNORE_INDEX).tolist():
                position = begin + place
                scored.append(position + 1)
                assert window.targets[place] == token_file.tokens[position + 1]
                assert number == 0 or place >= seq_len - stride
                inside = window.document_ids[: place + 1] == window.document_ids[place]
                assert (inside == (document[begin : position + 1] == document[position])).all()
        assert sorted(scored) == list(range(1, token_file.num_tokens))
        assert windows.covered_tokens == token_file.num_tokens
        few = EvaluationWindows(token_file, seq_len, 50, stride)
        assert len(few) == min(len(windows), max(1, 50 // stride))

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["stride=33"], "stride=33 must be from 1 to seq_len=32"),
            (["stride=0"], "stride=0"),
            (["stride=8", "task=needle"], "stride=8 has no effect on task=needle: task=loss"),
            (["stride=8", "task.loss.prefixes=4"], "stride=8 has no effect on task=loss:"),
        ],
    )
    def test_refused(self, evaluated, overrides, words):
        with pytest.raises(ConfigError, match=re.escape(words)):
            evaluated(*overrides)

    def test_refused_where_rows_are_no_text(self, run_training, compose_config, tmp_path):
        folder = run_training("data=copying", "seq_len=64")
        words = f"checkpoint='{folder}'", f"output='{tmp_path}'", "stride=8"
        with pytest.raises(ConfigError, match="stride=8 moves a window over running text"):
            evaluate(compose_config(*words, entry_point="evaluate"))


class TestWords:
    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ("whitespace", len(" ".join([ONE, *OTHERS]).split())),
            ("lines", len(" ".join([ONE, *OTHERS]).split()) + 4 + 1 + 1 + 2),
            ("35", 35),
        ],
    )
    def test_perplexity_is_of_all_text_over_its_words(self, evaluated, tmp_path, capsys, given, words):
        result = evaluated("split=test", f"task.loss.words={given}", "stride=16")["loss"]["lengths"][32]
        nats = result["bits_per_byte"] * math.log(2) * result["bytes"]
        assert result["words"] == words
        assert math.log(result["word_perplexity"]) == pytest.approx(min(nats / words, 700), rel=1e-9)
        printed = capsys.readouterr().out
        assert "perplexity by words" in " ".join(printed.split())
        saved = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
        assert saved["lengths"]["32"]["words"] == words and saved["settings"]["words"] == (
            given if given != "35" else 35
        )

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["task.loss.words=pg19"], "another text. task.words=whitespace|says 6,966,499 words"),
            (["task.loss.words=1000"], "says 1,000 words, and the test split has"),
            (["task.loss.words=tokens"], "task.loss.words=tokens is unknown; use whitespace, lines"),
            (["task.loss.words=0"], "task.loss.words=0 must be at least 1"),
            (["task.loss.words=lines", "max_tokens=64"], "max_tokens=64 reads a part"),
            (["task.loss.words=lines", "task.loss.prefixes=4"], "task.loss.prefixes=4 of few"),
            (["task.loss.buckets=0"], "task.loss.buckets=0 must be at least 1"),
        ],
    )
    def test_refused(self, evaluated, overrides, words):
        with pytest.raises(ConfigError, match=words):
            evaluated("split=test", *overrides)


def test_buckets_are_equally_wide_beside_the_doubling_ones(evaluated, capsys, tmp_path):
    result = evaluated("seq_len=50", "task.loss.buckets=20", "stride=25")["loss"]["lengths"][50]
    assert [(row["start"], row["end"]) for row in result["by_bucket"]] == [(0, 20), (20, 40), (40, 50)]
    for rows in (result["by_bucket"], result["by_position"]):
        assert sum(row["tokens"] for row in rows) == result["tokens"]
        assert sum(row["tokens"] * row["loss"] for row in rows) == pytest.approx(result["loss"] * result["tokens"])
    printed = capsys.readouterr().out
    assert all(f"{row['loss']:.4f}" in printed for row in result["by_bucket"])
    assert len(list((tmp_path / "results").glob("*.png"))) == 1
