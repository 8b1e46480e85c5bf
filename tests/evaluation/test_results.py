"""What a result says of itself, and that no result takes another's place."""

import json
import re
import shutil
from pathlib import Path

import pytest

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.config import Choice, ModelConfig, build, resolved
from longmix.data.tokens.tokenizers import NumberTokenizer
from longmix.errors import DataError
from longmix.evaluation.provenance import file_name, is_own
from longmix.evaluation.run import evaluate
from longmix.model.build import model_from_checkpoint
from longmix.model.tuned_states_file import save_states, tune_states

TEXTS = {"mine": "to be or not to be, that is the question. ", "other": "the cat sat on the mat and looked at it. "}

FACTS = {
    *("task", "checkpoint", "weights", "step", "trained_seq_len", "states", "precision", "device", "settings"),
    *("versions", "date"),
}
OF_DATA = {"corpus", "data_fingerprint", "own_data", "tokenizer", "split", "split_tokens"}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, list[str]]:
    """The words of two corpora, by name."""
    root = tmp_path_factory.mktemp("corpora")
    for name, line in TEXTS.items():
        for split in ("train", "validation", "test"):
            (root / name / split).mkdir(parents=True)
            (root / name / split / "0.txt").write_text(f"{line} {split}. " * 12)
    return {
        name: [
            "data=text",
            f"data.corpus.path={root}/{name}/train",
            *(f"data.corpus.{split}={root}/{name}/{split}" for split in ("validation", "test")),
            f"data.cache_dir={root}/cache",
        ]
        for name in TEXTS
    }


@pytest.fixture(scope="module")
def run_folder(run_training, corpora) -> Path:
    return run_training(*corpora["mine"], "seq_len=32", "mixer=rwkv7+flash", "mixer.rwkv7.head_dim=16")


@pytest.fixture
def results(compose_config, run_folder, tmp_path):
    """Evaluates a copy of the run; gives the JSON files that are new, by name."""
    copy = shutil.copytree(run_folder, tmp_path / "run")

    def run(*words: str) -> dict[str, dict]:
        before = set(copy.rglob("evaluation/*.json"))
        evaluate(compose_config(f"checkpoint={copy}", *words, entry_point="evaluate"))
        made = set(copy.rglob("evaluation/*.json")) - before
        return {path.name: json.loads(path.read_text()) for path in made}

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "words", "reads"),
    [
        pytest.param("loss", [], True, id="loss"),
        pytest.param("accuracy", [], True, id="accuracy"),
        pytest.param("context_lengths", ["task.context_lengths.factors=[1,2]"], True, id="context_lengths"),
        pytest.param("needle", ["seq_len=120", "task.needle.needles=1", "task.needle.depths=[0]"], True, id="needle"),
        pytest.param("states", ["task.states.points=2"], True, id="states"),
        pytest.param("attention", ["task.attention.windows=1"], True, id="attention"),
        pytest.param("layers", ["task.layers.windows=1"], True, id="layers"),
        pytest.param("dsf", ["task.dsf.windows=1"], True, id="dsf"),
        pytest.param(
            "cache_quality",
            ["seq_len=128", *(f"task.cache_quality.{word}=1" for word in ("windows", "needles", "steps"))],
            True,
            id="cache_quality",
        ),
        pytest.param("decode_cost", ["task.decode_cost.steps=1"], True, id="decode_cost"),
        pytest.param(
            "causality", ["task.causality.entropy_steps=0", "task.causality.length=16"], False, id="causality"
        ),
    ],
)
def test_every_task_says_what_its_result_is_of(results, corpora, task, words, reads):
    ((name, own),) = results(f"task={task}", *words).items()
    assert set(own) >= FACTS | (OF_DATA if reads else set()), name
    assert own["task"] == task and own["states"] is None and own["precision"] == "float32" and own["device"] == "CPU"
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", own["date"]) and own["versions"]["torch"]
    place = "_text_validation" if reads else ""
    assert re.fullmatch(rf"{task}{place}_step2_[0-9a-f]{{8}}\.json", name)
    assert results(f"task={task}", *words) == {}, "the very same result replaces itself"
    if not reads:
        return
    assert own["own_data"] and own["split_tokens"] > 0
    others = {
        "data": [*corpora["other"]],
        "split": ["split=test"],
    }
    for what, more in others.items():
        ((_, other),) = results(f"task={task}", *words, *more).items()
        assert other["data_fingerprint"] != own["data_fingerprint"] and other["own_data"] is (what != "data")


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "more",
    [["seq_len=16"], ["seq_len=[16,32]"], ["max_tokens=64"], ["precision=bf16"], ["task.loss.prefixes=2"]],
    ids=" ".join,
)
def test_other_settings_have_other_files(results, more):
    results("task=loss")
    assert len(results("task=loss", *more)) == 1
    assert results("task=loss", "batch_size=1") == {}, "it changes no figure"


@pytest.mark.slow
def test_other_weights_in_one_folder_of_results(results, run_training, corpora, compose_config, tmp_path):
    out = f"output={tmp_path}/out"
    for seed in (1, 2):
        folder = run_training(*corpora["mine"], "seq_len=32", f"seed={seed}")
        evaluate(compose_config(f"checkpoint={folder}", out, entry_point="evaluate"))
    assert len(list((tmp_path / "out").glob("loss_*.json"))) == 2


def test_states_are_named_by_content(run_folder, compose_config, tmp_path):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    checkpoint = load_checkpoint(find_checkpoint(run_folder))
    model = model_from_checkpoint(checkpoint)
    tune_states(model)
    save_states(tuned / "states.pt", ModelConfig.of(checkpoint["config"]), model.state_dict())
    words = f"checkpoint={run_folder}", f"states={tuned}", "task=loss"
    evaluate(compose_config(*words, entry_point="evaluate"))
    (path,) = (tuned / "evaluation").glob("loss_*.json")
    saved = json.loads(path.read_text())
    assert saved["states"]["file"] == f"{tuned}/states.pt" and len(saved["states"]["sha256"]) == 64
    evaluate(compose_config(words[0], f"output={tuned}/evaluation", entry_point="evaluate"))
    assert len(list((tuned / "evaluation").glob("loss_*.json"))) == 2


def test_own_data_are_told_by_what_is_read():
    settings = {"_target_": "x.Data", "corpus": {"path": "a"}, "cache_dir": "c", "validation_tokens": 4}
    trained = Choice.of("data", settings)
    assert is_own(None, trained) and is_own(trained.having(cache_dir="d", validation_tokens=None), trained)
    assert not is_own(trained.having(corpus={"path": "b"}), trained) and not is_own(trained, None)


def test_awkward_names_of_data_make_usable_file_names():
    facts = {"corpus": "../a b/\x1b[31m漢", "split": "test", "step": 3, "states": None, "settings": {}}
    name = file_name("loss", facts)
    assert re.fullmatch(r"loss_a-b-31m_test_step3_[0-9a-f]{8}", name)
    assert len(file_name("loss", facts | {"corpus": "x" * 500})) < 120


@pytest.mark.slow
def test_content_of_synthetic_data_is_their_settings(compose_config):
    def content(*words: str, split: str = "test") -> dict:
        node = resolved(compose_config("data=mqar", "seq_len=64", *words))
        place = {"tokenizer": NumberTokenizer(8192), "seq_len": 64, "batch_size": 1, "seed": node["seed"]}
        return build(node["data"], "data", **place).content(split)

    assert content() == content("data.validation_tokens=7") == content("seed=3")
    assert content() != content("data.task.pairs=4") and content() != content("data.task.power=0.5")
    assert content(split="train") != content("seed=3", split="train"), "training examples follow from the seed"
    with pytest.raises(DataError, match="no split 'dev'"):
        content(split="dev")
