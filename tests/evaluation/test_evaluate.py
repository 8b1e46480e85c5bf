"""`evaluate.py`: the reported figures against plain torch, and checkpoints that stand alone or are refused."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib import image

from longmix.checkpoints import CheckpointStore, find_checkpoint, load_checkpoint
from longmix.errors import CheckpointError, ConfigError, DataError, LongmixError, StorageError
from longmix.evaluation.run import evaluate
from longmix.model.build import model_from_checkpoint

SEPARATOR = 256
TRAINED_SEQ_LEN = 32
VALIDATION = ["The first document, longer than any one window of it.", "to be", "Zwölf Boxkämpfer jagen", "x" * 40]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    splits = {"train": ["to be or not to be. " * 20, "that is the question. " * 20], "validation": VALIDATION}
    for split, texts in {**splits, "test": ["Something else."]}.items():
        (folder / split).mkdir()
        for number, text in enumerate(texts):
            (folder / split / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run_folder(run_training, corpus, tmp_path_factory) -> Path:
    """A trained run; tests that change it work on a copy."""
    return run_training(
        "data=text",
        f"data.corpus.path={corpus}/train",
        f"data.corpus.validation={corpus}/validation",
        f"data.corpus.test={corpus}/test",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        f"seq_len={TRAINED_SEQ_LEN}",
    )


@pytest.fixture
def copy_of_run(run_folder, tmp_path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "copy"))


@pytest.fixture
def evaluated(compose_config, run_folder, tmp_path):
    """Evaluates the run with some overrides and returns the report."""

    def run(*overrides: str, checkpoint: Path = run_folder, output: Path | None = tmp_path / "results"):
        place = [] if output is None else [f"output='{output}'"]
        words = f"checkpoint='{checkpoint}'", *place, *overrides
        return evaluate(compose_config(*words, entry_point="evaluate"))["loss"]

    return run


def expected_losses(run_folder: Path, texts: list[str], seq_len: int) -> list[tuple[int, int, float]]:
    """(position in the document, target, loss) of every target.

    Windows are cut from the documents laid end to end, and each document's part of a window is run on its own.
    """
    state = load_checkpoint(find_checkpoint(run_folder))
    model = model_from_checkpoint(state).eval()
    stream = [(number, token) for number, text in enumerate(texts) for token in (SEPARATOR, *text.encode())]
    losses = []
    for start in range(0, len(stream), seq_len):
        window = stream[start : start + seq_len]
        targets = [token for _, token in stream[start + 1 : start + seq_len + 1]]
        for document in sorted({number for number, _ in window}):
            places = [place for place, (number, _) in enumerate(window) if number == document and place < len(targets)]
            if not places:
                continue
            tokens = torch.tensor([[window[place][1] for place in places]])
            with torch.no_grad():
                logits = F.linear(model(tokens).hidden, model.head.weight).double()[0]
            wanted = torch.tensor([targets[place] for place in places])
            costs = F.cross_entropy(logits, wanted, reduction="none").tolist()
            losses += zip(range(len(places)), wanted.tolist(), costs, strict=True)
    return losses


class TestFigures:
    @pytest.mark.parametrize(
        ("seq_len", "batch_size"), [(1, 5), (7, 3), (TRAINED_SEQ_LEN, 1), (50, "null"), (64, 3), (100, "null")]
    )
    def test_equal_plain_torch(self, evaluated, run_folder, seq_len, batch_size):
        report = evaluated(f"seq_len={seq_len}", f"batch_size={batch_size}")
        result = report["lengths"][seq_len]
        losses = expected_losses(run_folder, VALIDATION, seq_len)
        text = [loss for _, target, loss in losses if target != SEPARATOR]
        assert result["tokens"] == len(losses) == sum(1 + len(text.encode()) for text in VALIDATION) - 1
        assert result["bytes"] == len(text) == sum(len(text.encode()) for text in VALIDATION)
        assert result["loss"] == pytest.approx(sum(loss for *_, loss in losses) / len(losses), rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(sum(text) / math.log(2) / len(text), rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]), rel=1e-9)
        for row in result["by_position"]:
            inside = [loss for position, _, loss in losses if row["start"] <= position < row["end"]]
            assert row["tokens"] == len(inside)
            assert row["loss"] == pytest.approx(sum(inside) / len(inside), rel=1e-5)

    def test_positions_add_up(self, evaluated):
        for result in evaluated("seq_len=[16,32,64]")["lengths"].values():
            assert sum(row["tokens"] for row in result["by_position"]) == result["tokens"]
            mean = sum(row["tokens"] * row["loss"] for row in result["by_position"]) / result["tokens"]
            assert mean == pytest.approx(result["loss"], rel=1e-12)

    def test_equal_the_validation_of_training(self, evaluated, run_folder):
        trained = json.loads((run_folder / "summary.json").read_text())["validation"]
        result = evaluated()["lengths"][TRAINED_SEQ_LEN]
        for name in ("loss", "bits_per_byte", "tokens", "bytes"):
            assert result[name] == pytest.approx(trained[name], rel=1e-5), name

    def test_bf16_is_close_and_says_so(self, evaluated):
        exact, rounded = evaluated("precision=float32"), evaluated("precision=bf16")
        assert (exact["precision"], rounded["precision"]) == ("float32", "bf16")
        assert exact["lengths"][TRAINED_SEQ_LEN]["loss"] != rounded["lengths"][TRAINED_SEQ_LEN]["loss"]
        assert rounded["lengths"][TRAINED_SEQ_LEN]["loss"] == pytest.approx(
            exact["lengths"][TRAINED_SEQ_LEN]["loss"], rel=0.02
        )

    def test_repeats_exactly(self, evaluated):
        assert evaluated() == evaluated()


class TestWords:
    def test_lengths_are_sorted_and_counted_once(self, evaluated):
        assert list(evaluated("seq_len=[64,8,64]")["lengths"]) == [8, 64]

    def test_another_split(self, evaluated, run_folder):
        report = evaluated("split=test")
        losses = expected_losses(run_folder, ["Something else."], TRAINED_SEQ_LEN)
        assert report["split"] == "test"
        mean = sum(loss for *_, loss in losses) / len(losses)
        assert report["lengths"][TRAINED_SEQ_LEN]["loss"] == pytest.approx(mean, rel=1e-5)

    def test_other_data(self, evaluated, run_folder, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.txt").write_text("Other words.")
        overrides = [
            "data=text",
            f"data.corpus.path={tmp_path}/other",
            f"data.corpus.validation={tmp_path}/other/*.txt",
        ]
        with pytest.raises(DataError, match="both the train and the validation split"):
            evaluated(*overrides, f"data.cache_dir={tmp_path}/cache")
        report = evaluated(
            "split=train", *overrides[:2], "data.corpus.validation_fraction=0", f"data.cache_dir={tmp_path}"
        )
        losses = expected_losses(run_folder, ["Other words."], TRAINED_SEQ_LEN)
        mean = sum(loss for *_, loss in losses) / len(losses)
        assert report["lengths"][TRAINED_SEQ_LEN]["loss"] == pytest.approx(mean, rel=1e-5)

    def test_max_tokens_takes_fewer_windows(self, evaluated):
        assert evaluated("max_tokens=64", "seq_len=32")["lengths"][32]["tokens"] == 64

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize(
        ("overrides", "kind", "words"),
        [
            pytest.param(["seq_len=0"], ConfigError, "seq_len=0", id="no context"),
            pytest.param(["seq_len=1.5"], ConfigError, "seq_len=1.5", id="a fraction"),
            pytest.param(["seq_len=true"], ConfigError, "seq_len=true", id="a switch"),
            pytest.param(["seq_len=[]"], ConfigError, r"seq_len=\[\]", id="no lengths"),
            pytest.param(["seq_len=[32,x]"], ConfigError, r"seq_len=\[32, 'x'\]", id="text among lengths"),
            pytest.param(["max_tokens=0"], ConfigError, "max_tokens=0", id="no tokens"),
            pytest.param(["batch_size=0"], ConfigError, "batch_size=0", id="no windows"),
            pytest.param(["device=tpu"], ConfigError, "device='tpu'.*auto, cpu, cuda", id="device"),
            pytest.param(["precision=fp8"], ConfigError, "precision='fp8'.*auto, float32, bf16", id="precision"),
            pytest.param(["+splt=test"], ConfigError, "unknown key splt. Did you mean split", id="unknown word"),
            pytest.param(["~split"], ConfigError, "no value was given for: split", id="word taken away"),
            pytest.param(["+task.loss.x=1"], ConfigError, "unknown key task.loss.x", id="unknown setting of the task"),
            pytest.param(["task.loss.prefixes=0"], ConfigError, "prefixes=0 must be at least 1", id="no prefixes"),
            pytest.param(["task=[]"], ConfigError, "no value was given for: task", id="no task"),
            pytest.param(["task=[loss,accuracy]", "+task.accuracy.x=1"], ConfigError, "task.accuracy.x", id="second"),
            pytest.param(["split=dev"], DataError, "no split 'dev'; it has train, validation, test", id="split"),
            pytest.param(["checkpoint=nowhere"], CheckpointError, "there is no nowhere", id="no checkpoint"),
            pytest.param(["checkpoint=???"], ConfigError, "no value was given for: checkpoint", id="none given"),
        ],
    )
    def test_refused(self, evaluated, overrides, kind, words, tmp_path):
        with pytest.raises(LongmixError, match=words) as caught:
            evaluated(*overrides)
        assert caught.type is kind
        assert not (tmp_path / "results").exists()

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:mixer.mode")
    def test_a_mixer_that_looks_ahead(self, evaluated, run_training, corpus, tmp_path, capsys):
        words = "mixer=routing", "mixer.mode=sequence_topk", "mixer.clusters=4", "mixer.window=8"
        place = f"data.corpus.path={corpus}/train", f"data.cache_dir={tmp_path}/cache"
        folder = run_training("data=text", *place, *words, f"data.corpus.validation={corpus}/validation", "seq_len=32")
        with pytest.raises(ConfigError, match=r"mixer\.mode=sequence_topk.*later tokens.*Train with a causal mode"):
            evaluated(checkpoint=folder)
        assert not (tmp_path / "results").exists()
        report = evaluated("task.loss.prefixes=8", checkpoint=folder)
        alone, whole = report["lengths"][32], report["lengths"][32]["whole_rows"]
        assert alone["tokens"] == whole["tokens"] and abs(alone["loss"] - whole["loss"]) > 1e-6
        with pytest.raises(LongmixError, match="1 of 2 tasks failed"):
            evaluated("task=[accuracy,loss]", "task.loss.prefixes=8", checkpoint=folder)
        assert "task.loss.prefixes=64 runs the tokens before" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_that_is_not_there(self, evaluated):
        with pytest.raises(ConfigError, match=r"device=cuda.*device=cpu"):
            evaluated("device=cuda")


class TestFiles:
    def test_table_json_and_picture(self, evaluated, tmp_path, capsys):
        report = evaluated("seq_len=[16,64]")
        picture, written = sorted((tmp_path / "results").iterdir(), key=lambda path: path.suffix != ".png")
        assert re.fullmatch(r"loss_text_validation_step2_[0-9a-f]{8}\.json", written.name)
        assert picture.name == f"{written.stem}.png"
        saved = json.loads(written.read_text())
        assert saved.items() >= json.loads(json.dumps(report)).items()
        assert set(report) == {"split", "step", "trained_seq_len", "precision", "lengths"}
        assert (saved["split"], saved["step"], saved["trained_seq_len"]) == ("validation", 2, TRAINED_SEQ_LEN)
        for result in saved["lengths"].values():
            assert set(result) == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes", "by_position"}
        pixels = image.imread(picture)
        assert pixels.shape[0] > 200 and pixels.shape[1] > 300 and pixels.std() > 0
        printed = capsys.readouterr().out
        for result in report["lengths"].values():
            figures = [result["loss"], result["perplexity"], result["bits_per_byte"]]
            figures += [row["loss"] for row in result["by_position"]]
            assert all(f"{figure:.4f}" in printed for figure in figures)
        assert f"wrote {written} and {picture.name}\n" in printed

    @pytest.mark.slow
    def test_of_several_tasks(self, compose_config, run_folder, tmp_path):
        words = f"checkpoint={run_folder}", f"output={tmp_path}/out", "task=[causality,loss,accuracy]"
        reports = evaluate(compose_config(*words, "task.causality.entropy_steps=0", entry_point="evaluate"))
        assert set(reports) == {"causality", "loss", "accuracy"} and len(list((tmp_path / "out").iterdir())) == 6
        alone = evaluate(compose_config(*words[:2], entry_point="evaluate"))
        assert alone["loss"] == reports["loss"]  # the audit in float64 has not changed the model

    @pytest.mark.parametrize(
        ("given", "place"),
        [
            pytest.param(".", "evaluation", id="run"),
            pytest.param("checkpoints/step-00000002", "evaluation", id="checkpoint of a run"),
        ],
    )
    def test_go_into_the_run(self, evaluated, copy_of_run, given, place):
        evaluated(checkpoint=copy_of_run / given, output=None)
        assert len(list((copy_of_run / place).glob("loss_text_validation_step2_*.json"))) == 1

    def test_output_that_cannot_be_written(self, evaluated, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="could not write"):
            evaluated(output=tmp_path / "file" / "below")


class TestCheckpointAlone:
    @pytest.mark.slow
    def test_is_enough(self, evaluated, copy_of_run, tmp_path):
        expected = evaluated()
        for path in copy_of_run.iterdir():
            if path.is_file():
                path.unlink()
        moved = tmp_path / "else where" / "0,seed=1"
        moved.parent.mkdir()
        shutil.move(copy_of_run, moved)
        assert evaluated(checkpoint=moved) == expected
        lone = shutil.move(moved / "checkpoints" / "step-00000002", tmp_path / "lone")
        assert evaluated(checkpoint=lone) == expected
        evaluated(checkpoint=lone, output=None)
        assert len(list((lone / "evaluation").glob("loss_text_validation_step2_*.json"))) == 1

    def test_of_another_vocabulary_and_a_pattern(self, run_training, evaluated, corpus, tmp_path):
        folder = run_training(
            "data=text",
            f"data.corpus.path={corpus}/train",
            f"data.corpus.validation={corpus}/validation",
            f"data.cache_dir={tmp_path}/cache",
            "tokenizer=bpe",
            "tokenizer.vocab_size=270",
            "mixer=sliding_window+flash",
            "mixer.sliding_window.window=8",
            "model.num_layers=2",
            "seq_len=16",
        )
        trained = json.loads((folder / "summary.json").read_text())["validation"]
        other_train = [f"data.corpus.path={corpus}/test", f"data.corpus.validation={corpus}/validation"]
        # a tokenizer trained on these documents would be another; the checkpoint brings its own
        report = evaluated("data=text", *other_train, f"data.cache_dir={tmp_path}/other", checkpoint=folder)
        result = report["lengths"][16]
        assert result["bytes"] == sum(len(text.encode()) for text in VALIDATION)
        assert result["tokens"] < result["bytes"]
        assert result["bits_per_byte"] == pytest.approx(trained["bits_per_byte"], rel=1e-5)

    @pytest.mark.parametrize("damage", ["one byte", "cut short", "gone"])
    def test_damaged_is_refused_by_name(self, evaluated, copy_of_run, damage):
        path = copy_of_run / "checkpoints" / "step-00000002" / "state.pt"
        content = bytearray(path.read_bytes())
        if damage == "gone":
            path.unlink()
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content if damage == "one byte" else content[:1000])
        with pytest.raises(CheckpointError, match=str(path)):
            evaluated(checkpoint=copy_of_run)

    def test_folder_without_checkpoint(self, evaluated, tmp_path):
        with pytest.raises(CheckpointError, match=f"{tmp_path} holds no checkpoint"):
            evaluated(checkpoint=tmp_path)


class TestTrust:
    @pytest.fixture
    def foreign(self, run_folder, tmp_path, monkeypatch) -> Path:
        """A checkpoint whose mixer is a class of somebody else's module."""
        (tmp_path / "somebody.py").write_text(
            "from longmix.mixers.flash import Flash\n\nclass Theirs(Flash):\n    pass\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        state = load_checkpoint(find_checkpoint(run_folder))
        state["config"]["mixer"]["_target_"] = "somebody.Theirs"
        yield CheckpointStore(tmp_path / "foreign").save(state, {})
        sys.modules.pop("somebody", None)

    def test_refused_and_not_even_imported(self, evaluated, foreign):
        with pytest.raises(
            ConfigError, match=r"mixer=somebody\.Theirs is not part of longmix.*trust=\[somebody\.Theirs\]"
        ):
            evaluated(checkpoint=foreign)
        assert "somebody" not in sys.modules

    def test_let_through_when_named(self, evaluated, foreign):
        assert evaluated("trust=[somebody.Theirs]", checkpoint=foreign) == evaluated()
        assert "somebody" in sys.modules

    @pytest.mark.parametrize("key", ["model", "data", "data.corpus"])
    def test_every_part_is_looked_at(self, evaluated, run_folder, tmp_path, key):
        state = load_checkpoint(find_checkpoint(run_folder))
        node = state["config"]
        for part in key.split("."):
            node = node[part]
        node["_target_"] = "somebody.else.Theirs"
        with pytest.raises(ConfigError, match=rf"{key}=somebody\.else\.Theirs"):
            evaluated(checkpoint=CheckpointStore(tmp_path / "foreign").save(state, {}))
