"""Needles lie where they should, a model that finds them is told from one that does not, figures are plain torch's."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import image

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.config import EvaluateConfig
from longmix.data.corpora.files import TextFiles
from longmix.data.synthetic.haystack import Forms, draw_needle, haystack_rows
from longmix.data.text_data import TokenData
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.preparation import prepare
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import ByteTokenizer, Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.evaluation import prefill
from longmix.evaluation.run import evaluate
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.needle import Needle
from longmix.model.backbone import ModelOutput
from longmix.model.build import model_from_checkpoint
from longmix.reporting.results import read_evaluations

STATEMENT = " The secret number of {key} is {value}."
QUESTION = " Secret number of {key} is"
FORMS = Forms(STATEMENT, QUESTION)
DEPTHS = [0.0, 0.5, 1.0]
WORDS = [
    "the",
    "union",
    "of",
    "our",
    "states",
    "must",
    "be",
    "made",
    "stronger",
    "by",
    "honest",
    "work",
    "and",
    "peace",
]


def speech(seed: int, sentences: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(" ".join(random.choice(WORDS, 7)).capitalize() + "." for _ in range(sentences))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two documents for training, and one long and many short ones, 2,500 bytes in all, for validation."""
    folder = tmp_path_factory.mktemp("corpus")
    splits = {
        "train": [speech(0, 20), speech(1, 30)],
        "validation": [speech(2, 40), *(speech(9 + n, 1) for n in range(20))],
    }
    for split, texts in splits.items():
        (folder / split).mkdir()
        for number, text in enumerate(texts):
            (folder / split / f"{number:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def text_and_tokenizer(request, folder, tmp_path_factory) -> tuple[TokenFile, Tokenizer]:
    cache = tmp_path_factory.mktemp("cache")
    corpus = TextFiles(f"{folder}/train", f"{folder}/validation")
    tokenizer = ByteTokenizer() if request.param == "bytes" else BpeTokenizer(300).prepare(corpus, cache)
    return prepare(corpus, tokenizer, "validation", cache), tokenizer


class TestHaystack:
    @pytest.mark.parametrize("number", range(4))
    def test_needle_lies_between_sentences_at_its_depth(self, text_and_tokenizer, number):
        text, tokenizer = text_and_tokenizer
        one = draw_needle(tokenizer, [0, number], FORMS)
        depths, length = [0.0, 0.3, 0.6, 1.0], 600
        rows = haystack_rows(one, text, tokenizer, depths, length)
        assert rows.shape == (5, length) and rows.dtype == np.int64
        hidden, question, value = (tokenizer.decode(part) for part in (one.statement, one.question, one.value))
        end = question + tokenizer.decode(one.value[:-1])
        assert value in hidden and question[len(" Secret") :] in hidden and value.strip().isdecimal()
        assert (rows[:, 0] == text.separator_id).all() and (rows[:, 1:] != text.separator_id).all()
        control = tokenizer.decode(rows[0])
        assert hidden not in control and control.endswith(end)
        haystack = control[: -len(end)][len(hidden) :] if isinstance(tokenizer, ByteTokenizer) else None
        for row, depth in zip(rows[1:], depths, strict=True):
            read = tokenizer.decode(row)
            before, _, after = read.partition(hidden)
            assert after.endswith(end) and read.count(hidden) == 1
            after = after[: -len(end)]
            share = len(before) / len(before + after)
            assert share == pytest.approx(depth, abs=1 / 16 + 0.02)
            if 0 < depth < 1:
                assert before.endswith(".") and after.startswith(" ")
            if haystack is not None:
                assert before + after == haystack  # the same text at all depths, and in its place without the needle

    def test_is_a_pure_function_of_the_seed(self, text_and_tokenizer):
        text, tokenizer = text_and_tokenizer
        first, again, other = (draw_needle(tokenizer, seed, FORMS) for seed in ([0, 1], [0, 1], [1, 1]))
        rows = [haystack_rows(one, text, tokenizer, DEPTHS, 400) for one in (first, again, other)]
        assert (rows[0] == rows[1]).all() and not (rows[0] == rows[2]).all()

    def test_no_room_or_no_text(self, text_and_tokenizer):
        text, tokenizer = text_and_tokenizer
        one = draw_needle(tokenizer, [0], FORMS)
        fixed = 1 + len(one.statement) + len(one.question) + len(one.value) - 1
        assert haystack_rows(one, text, tokenizer, [0.5], fixed + 1).shape == (2, fixed + 1)
        with pytest.raises(ConfigError, match=f"context of {fixed} tokens has no room.*take {fixed}"):
            haystack_rows(one, text, tokenizer, [0.5], fixed)
        with pytest.raises(DataError, match=r"the split has .* too few for a haystack"):
            haystack_rows(one, text, tokenizer, [0.5], text.num_tokens + 200)


class Recaller:
    """Says what followed the last eight tokens when they were last read, not more than `window` tokens ago.

    After the last `silent` tokens of a row it says nothing.
    """

    vocab_size = 257

    def __init__(self, window: int, silent: int = 0) -> None:
        self.window, self.silent = window, silent

    def __call__(self, tokens, state=None):
        hidden = torch.zeros(*tokens.shape, self.vocab_size)
        for row, read in enumerate(tokens.tolist()):
            for end in range(len(read) - 8, len(read) - self.silent):  # earlier places are not asked for
                for start in range(end - 8, max(7, end - self.window), -1):
                    if read[start - 7 : start + 1] == read[end - 7 : end + 1]:
                        hidden[row, end, read[start + 1]] = 20.0
                        break
        return ModelOutput(hidden, torch.empty(0))

    def logits(self, hidden):
        return hidden


def of_recaller(model: Recaller, folder: Path, tmp_path: Path, lengths: list[int]) -> dict:
    corpus = TextFiles(f"{folder}/train", f"{folder}/validation")
    restored = SimpleNamespace(
        model=model,
        step=7,
        config=SimpleNamespace(seq_len=100),
        device=torch.device("cpu"),
        precision="float32",
        autocast=nullcontext,
    )
    data = TokenData(corpus, ByteTokenizer(), seq_len=100, batch_size=3, seed=0, cache_dir=str(tmp_path))
    config = EvaluateConfig(checkpoint="none", task={}, split="validation", seq_len=lengths, batch_size=3)
    subject = Unsaved(restored, data, config, tmp_path / "results")
    return Needle([1], DEPTHS, needles=2, seed=0, statement=STATEMENT, question=QUESTION).run(subject)


class Unsaved(Subject):
    """A model that came from no checkpoint, of which no file could say what it is of."""

    def save(self, *result, **words):
        pass


class TestModels:
    def test_one_that_looks_back_finds_everything(self, folder, tmp_path):
        report = of_recaller(Recaller(10_000), folder, tmp_path, [150, 400])
        assert [(cell["seq_len"], cell["depth"]) for cell in report["cells"]] == [
            (n, d) for n in (150, 400) for d in DEPTHS
        ]
        certain, uniform = 20 - math.log(math.exp(20) + 256), -math.log(257)  # of one of five bytes
        for cell in report["cells"]:
            assert (cell["accuracy"], cell["token_accuracy"]) == (1, 1)
            assert cell["gain"] == pytest.approx(5 * (certain - uniform), rel=1e-6)
        for control in report["without"]:
            assert control["accuracy"] == 0 and control["log_probability"] == pytest.approx(5 * uniform, rel=1e-6)

    def test_a_value_is_found_when_all_of_it_is(self, folder, tmp_path):
        (cell, *_) = of_recaller(Recaller(10_000, silent=1), folder, tmp_path, [150])["cells"]
        assert (cell["accuracy"], cell["token_accuracy"]) == (0, 0.8) and cell["gain"] > 20

    def test_one_with_a_window_finds_what_lies_inside(self, folder, tmp_path):
        report = of_recaller(Recaller(120), folder, tmp_path, [140, 400])
        found = {(cell["seq_len"], cell["depth"]): cell["accuracy"] for cell in report["cells"]}
        assert found == {(140, 0.0): 1, (140, 0.5): 1, (140, 1.0): 1, (400, 0.0): 0, (400, 0.5): 0, (400, 1.0): 1}
        gains = {(cell["seq_len"], cell["depth"]): cell["gain"] for cell in report["cells"]}
        assert gains[400, 0.5] == pytest.approx(0) and gains[400, 1.0] > 20


@pytest.fixture(scope="module")
def run_folder(run_training, folder, tmp_path_factory) -> Path:
    return run_training(
        "data=text",
        f"data.corpus.path={folder}/train",
        f"data.corpus.validation={folder}/validation",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "mixer=mlstm_tfla+flash",
        "model.num_layers=2",
        "seq_len=64",
    )


@pytest.fixture
def evaluated(compose_config, run_folder, tmp_path):
    def run(*overrides: str) -> dict:
        words = (
            f"checkpoint={run_folder}",
            "task=needle",
            f"task.needle.question='{QUESTION}'",
            f"output={tmp_path}/evaluation",
        )
        return evaluate(compose_config(*words, "task.needle.needles=2", *overrides, entry_point="evaluate"))["needle"]

    return run


class TestEvaluate:
    @pytest.mark.slow
    def test_figures_equal_plain_torch_in_any_pieces(
        self, evaluated, run_folder, folder, tmp_path, monkeypatch, capsys
    ):
        report = evaluated("seq_len=[150,220]", "task.needle.depths=[0,0.5,1]")
        model = model_from_checkpoint(load_checkpoint(find_checkpoint(run_folder))).eval()
        corpus, tokenizer = TextFiles(f"{folder}/train", f"{folder}/validation"), ByteTokenizer()
        text = prepare(corpus, tokenizer, "validation", tmp_path)
        drawn = [draw_needle(tokenizer, [0, number], FORMS) for number in range(2)]
        for length in (150, 220):
            likely, hits = [], []
            for one in drawn:
                rows = torch.from_numpy(haystack_rows(one, text, tokenizer, DEPTHS, length))
                value = torch.from_numpy(one.value.astype(np.int64))
                with torch.no_grad():
                    scores = model.logits(model(rows).hidden).double().log_softmax(-1)[:, -len(value) :]
                likely.append(scores[:, range(len(value)), value].sum(1))
                hits.append((scores.argmax(-1) == value).double().mean(1))
            likely, hits = torch.stack(likely).mean(0), torch.stack(hits).mean(0)
            (control,) = (row for row in report["without"] if row["seq_len"] == length)
            assert control["log_probability"] == pytest.approx(likely[0].item(), rel=1e-5)
            cells = [cell for cell in report["cells"] if cell["seq_len"] == length]
            assert [cell["gain"] for cell in cells] == pytest.approx((likely[1:] - likely[0]).tolist(), abs=1e-4)
            assert [cell["token_accuracy"] for cell in cells] == pytest.approx(hits[1:].tolist())
        printed = capsys.readouterr().out
        assert all(f"{cell['accuracy']:.2f} {cell['gain']:+.2f}" in printed for cell in report["cells"])
        (saved,) = (tmp_path / "evaluation").glob("needle_*_validation_step2_*.json")
        assert json.loads(saved.read_text()).items() >= json.loads(json.dumps(report)).items()
        assert image.imread(saved.with_suffix(".png")).std() > 0

        monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 50)
        pieces = evaluated("seq_len=[150,220]", "task.needle.depths=[0,0.5,1]")
        for whole, part in zip(report["cells"], pieces["cells"], strict=True):
            assert part["gain"] == pytest.approx(whole["gain"], abs=1e-4)

    def test_lengths_are_multiples_of_the_trained_one(self, evaluated):
        report = evaluated("task.needle.factors=[2.5,3]", "task.needle.depths=[1]", "task.needle.needles=1")
        assert [cell["seq_len"] for cell in report["cells"]] == [160, 192]

    def test_reports_read_what_it_left(self, evaluated, tmp_path):
        report = evaluated("seq_len=[60,150]", "task.needle.question='{key} is'", "task.needle.depths=[0,1]")
        found = read_evaluations(tmp_path)
        assert (found.needle.lengths, found.needle.depths, found.needle.trained_seq_len) == ([60, 150], [0.0, 1.0], 64)
        gains = {(cell["depth"], cell["seq_len"]): cell["gain"] for cell in report["cells"]}
        assert found.needle.gain == [[gains[0.0, 60], gains[0.0, 150]], [gains[1.0, 60], gains[1.0, 150]]]
        assert found.recall["needle gain"][150] == pytest.approx((gains[0.0, 150] + gains[1.0, 150]) / 2)

    @pytest.mark.parametrize(
        ("overrides", "kind", "words"),
        [
            pytest.param(["task.needle.depths=[]"], ConfigError, "needle.depths", id="no depth"),
            pytest.param(["task.needle.depths=[0,1.5]"], ConfigError, "from 0 to 1", id="beyond the end"),
            pytest.param(["task.needle.needles=0"], ConfigError, "needles=0", id="no needles"),
            pytest.param(["task.needle.seed=-1"], ConfigError, "seed=-1", id="seed"),
            pytest.param(["task.needle.factors=[0]"], ConfigError, "needle.factors=.*above 0", id="no context"),
            pytest.param(["task.needle.factors=[]"], ConfigError, "needle.factors", id="no lengths"),
            pytest.param(["task.needle.statement='{key} is{value}'"], ConfigError, "' {value}'", id="no blank"),
            pytest.param(["task.needle.question=why"], ConfigError, "question='why' must hold '{key}'", id="no key"),
            pytest.param(["seq_len=60"], ConfigError, "context of 60 tokens has no room", id="short"),
            pytest.param(["seq_len=9000"], DataError, "too few for a haystack", id="long"),
            pytest.param(["split=test", "seq_len=200"], DataError, "no split 'test'", id="split"),
        ],
    )
    def test_refused(self, evaluated, overrides, kind, words, tmp_path):
        with pytest.raises(kind, match=words):
            evaluated(*overrides)
        assert not (tmp_path / "evaluation").exists()


def test_a_synthetic_task_is_no_text(run_training, compose_config):
    checkpoint = run_training("data=parity", "seq_len=16")
    for task in ("needle", "context_lengths"):
        with pytest.raises(ConfigError, match=f"task={task} reads text"):
            evaluate(compose_config(f"checkpoint={checkpoint}", f"task={task}", entry_point="evaluate"))
