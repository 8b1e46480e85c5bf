"""longmix from Python: functions of their arguments, which leave nothing behind and end no process."""

import json
import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import longmix
from longmix.composing import as_words, composed
from longmix.errors import CheckpointError, ConfigError, LongmixError

TINY = {
    "logger": "csv",
    "batch_size": 2,
    "max_steps": 2,
    "seq_len": 32,
    "data.validation_tokens": 256,
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.mlp_hidden": 32,
    "trainer": "cpu",
}


@pytest.fixture(scope="module")
def words(shared_cache) -> dict:
    return {**TINY, "data.cache_dir": str(shared_cache)}


@pytest.fixture(scope="module")
def run(words, tmp_path_factory) -> longmix.Run:
    return longmix.train(words, folder=tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def loaded(run) -> longmix.Loaded:
    return longmix.load(run.folder, device="cpu")


def test_import_is_light_and_names_what_there_is():
    code = "import sys, longmix; print({'torch', 'hydra', 'numpy'} & set(sys.modules), *dir(longmix))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("set()") and set(longmix.__all__) <= set(out.split())
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        longmix.trian  # noqa: B018


def test_mixers_exports_the_class_of_every_choice():
    found = set()
    for path in (Path(__file__).parents[1] / "configs" / "mixer").glob("*.yaml"):
        module, name = yaml.safe_load(path.read_text())["_target_"].rsplit(".", 1)
        assert getattr(longmix.mixers, name).__module__ == module
        found.add(name)
    assert found <= set(longmix.mixers.__all__) <= set(dir(longmix.mixers))
    with pytest.raises(AttributeError, match="no attribute 'Flsh'"):
        longmix.mixers.Flsh  # noqa: B018


class TestTrain:
    def test_says_where_it_lies_and_what_it_came_to(self, run):
        assert run.summary["steps"] == 2 and run.summary["validation"]["loss"] > 0
        assert (run.folder.name, run.summary["name"], run.summary["mixer"]) == ("first", "first", "flash")
        assert run.checkpoint == run.folder / "checkpoints" / "step-00000002"
        assert run.load(device="cpu").checkpoint == run.checkpoint

    def test_again_with_another_configuration_and_nothing_is_left(self, run, words, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        root, before = logging.getLogger(), signal.getsignal(signal.SIGTERM)
        handlers, level = root.handlers[:], root.level
        given = [*as_words(words), "mixer=sliding_window"]
        second = longmix.train(given)
        assert second.folder.parent == tmp_path / "runs" and "_sliding_window_tiny_32" in second.folder.name
        assert second.summary["mixer"] == "sliding_window"
        third = longmix.train(given)
        assert third.folder != second.folder
        assert third.summary["validation"]["loss"] == second.summary["validation"]["loss"]
        assert GlobalHydra.instance().hydra is None and HydraConfig.instance().cfg is None
        assert (root.handlers, root.level, signal.getsignal(signal.SIGTERM)) == (handlers, level, before)

    @pytest.mark.parametrize("kind", [dict, as_words])
    def test_a_name_is_that_folder_and_no_other(self, words, tmp_path, monkeypatch, kind):
        monkeypatch.chdir(tmp_path)
        given = kind({**words, "max_steps": 1, "name": "study/x"})
        assert longmix.train(given).folder == tmp_path / "runs" / "study" / "x"
        with pytest.raises(ConfigError, match="already holds a run"):
            longmix.train(given)
        with pytest.raises(ConfigError, match="leads out of runs/"):
            longmix.train({**words, "name": "../x"})
        assert [path.name for path in tmp_path.rglob("x")] == ["x"]

    def test_a_whole_configuration(self, run, tmp_path):
        config = OmegaConf.load(run.folder / "config.yaml")
        for form in (config, OmegaConf.to_container(config)):
            again = longmix.train(form, folder=tmp_path / type(form).__name__)
            assert again.summary["validation"]["loss"] == run.summary["validation"]["loss"]

    @pytest.mark.slow
    def test_goes_on_with_resume(self, words, run, tmp_path):
        first = longmix.train({**words, "max_steps": 1}, folder=tmp_path / "run")
        second = longmix.train({**words, "resume": "auto"}, folder=tmp_path / "run")
        assert (first.summary["steps"], second.summary["steps"]) == (1, 2)
        with pytest.raises(ConfigError, match="already holds a run"):
            longmix.train(words, folder=tmp_path / "run")

    def test_a_node_in_the_place_of_a_choice(self, words, tmp_path):
        node = {"_target_": "longmix.mixers.retention.Retention"}
        with pytest.raises(ConfigError, match=r"mixer\.|no value was given"):
            longmix.train({**words, "mixer": {**node, "windw": 3}}, folder=tmp_path / "run")
        own = yaml.safe_load((Path(__file__).parents[1] / "configs/mixer/retention.yaml").read_text())
        run = longmix.train({**words, "mixer": own, "loop": {"log_every": 1}}, folder=tmp_path / "run")
        assert run.summary["mixer"] == "retention"

    def test_in_a_thread(self, words, tmp_path):
        done = []
        thread = threading.Thread(target=lambda: done.append(longmix.train(words, folder=tmp_path / "run")))
        thread.start()
        thread.join()
        assert done[0].summary["steps"] == 2

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            (["seqlen=3"], "unknown word seqlen. Did you mean seq_len?"),
            ({"mixer": "flsh"}, "mixer=flsh does not exist. Did you mean flash?"),
            ({"model.num_heads": 3}, "model.num_heads=3"),
            (["seq_len"], "seq_len has no value"),
            ("seq_len=3", "give a list of words"),
            (None, "words=None must be a list of words, such as ['seq_len=64'], a mapping"),
            ([3], "words=[3] must be a list of words"),
            ({"mixer": "flash,kda"}, "mixer=flash,kda gives several values; mixer takes one."),
            (["-m", "seed=1,2"], "-m is an option, and only words are taken here."),
            ({"trainer": "ddp", "trainer.devices": 2, "trainer.accelerator": "cpu"}, "a call from Python cannot start"),
        ],
    )
    def test_refusals_leave_no_folder(self, words, tmp_path, wrong, said):
        if isinstance(wrong, dict) and "trainer" in wrong:
            wrong = {**words, **wrong}
        with pytest.raises(LongmixError) as error:
            longmix.train(wrong, folder=tmp_path / "run")
        assert said in str(error.value)
        assert not (tmp_path / "run").exists()
        assert GlobalHydra.instance().hydra is None and HydraConfig.instance().cfg is None

    def test_what_the_data_refuse_is_raised_as_such(self, words, tmp_path):
        """The run is refused after its folder was claimed, and the folder is gone before the call ends."""
        wrong = {**words, "data.order": "contiguous", "batch_size": 64, "seq_len": 200_000}
        wrong["trainer.micro_batch_size"] = 1  # little memory is needed, so that nothing else refuses it
        with pytest.raises(LongmixError, match="contiguous gives each of batch_size=64 rows"):
            longmix.train(wrong, folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestLoad:
    def test_the_model_takes_token_ids(self, loaded):
        ids = torch.tensor([[*loaded.tokenizer.encode("Fellow")]])
        assert loaded.model(ids).hidden.shape == (*ids.shape, 32)
        assert not loaded.model.training
        assert repr(loaded).endswith("parameters, cpu)")

    def test_generate_returns_texts_and_prints_nothing(self, loaded, capsys):
        one = loaded.generate("Fellow", max_tokens=5, temperature=0)
        four = loaded.generate(["Fellow", "We"], max_tokens=5, samples=2, seed=3)
        assert capsys.readouterr() == ("", "")
        assert len(one) == 1 and len(four) == 4 and all(isinstance(text, str) for text in four)
        assert loaded.generate("Fellow", max_tokens=5, temperature=0) == one
        with pytest.raises(ConfigError, match="max_tokens=0 must be at least 1"):
            loaded.generate(max_tokens=0)
        for wrong in ({"prompt": None}, {"prompt": 3}, {"stop": None}, {"stop": [3]}):
            with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* must be a text or a list of texts"):
                loaded.generate(**wrong)

    def test_generate_takes_the_words_of_the_command_and_no_others(self, loaded):
        words = {"max_tokens": 6, "temperature": 0}
        forced = loaded.generate("Fellow", **words, logit_bias={ord("a"): 1e6, "b": -3}, frequency_penalty=-1.0)
        assert forced == ["aaaaaa"]
        (row,) = loaded.generate("Fellow", **words, logprobs=2)
        assert row.text == loaded.generate("Fellow", **words)[0] and row.finish_reason == "length"
        assert [score.token for score in row.logprobs] == row.tokens == [score.top[0][0] for score in row.logprobs]
        with pytest.raises(ConfigError, match=r"unknown key max_token\. Did you mean max_tokens"):
            loaded.generate("Fellow", max_token=3)
        with pytest.raises(ConfigError, match="unknown key save"):
            loaded.generate("Fellow", save="x")

    def test_answer_writes_what_generate_returns(self, loaded, tmp_path, capsys):
        (tmp_path / "in.jsonl").write_text('{"prompt": "Fellow"}\n{"prompt": "We", "seed": 4}\n')
        written = loaded.answer(tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_tokens=5, seed=2)
        lines = [json.loads(line) for line in written.read_text().splitlines()]
        assert [line["text"] for line in lines] == [
            loaded.generate("Fellow", max_tokens=5, seed=2)[0],
            loaded.generate("We", max_tokens=5, seed=4)[0],
        ]
        assert capsys.readouterr() == ("", "")

    def test_one_text_is_one_stop(self, loaded):
        whole = loaded.generate("Fellow", max_tokens=20, temperature=0)[0]
        assert loaded.generate("Fellow", max_tokens=20, temperature=0, stop=f"{whole[:2]}#~") == [whole]

    def test_evaluate_returns_the_report(self, loaded, run):
        report = loaded.evaluate(max_tokens=64)
        assert loaded.evaluate(["loss"], max_tokens=64) == {"loss": report}
        assert (run.folder / "evaluation").is_dir()
        with pytest.raises(ConfigError, match="Did you mean split"):
            loaded.evaluate(splt="test")
        with pytest.raises(ConfigError, match="task=lss does not exist"):
            loaded.evaluate("lss")
        with pytest.raises(ConfigError, match="task=None must be"):
            loaded.evaluate(None)

    @pytest.mark.parametrize("word", ["checkpoint", "device", "precision", "states", "trust"])
    def test_what_was_loaded_is_what_is_evaluated(self, loaded, word):
        with pytest.raises(ConfigError, match=f"{word} belongs to the loaded model; give it to longmix.load"):
            loaded.evaluate(max_tokens=64, **{word: "other"})

    def test_refusals(self, run, tmp_path):
        with pytest.raises(CheckpointError):
            longmix.load(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match="device='tpu'"):
            longmix.load(run.folder, device="tpu")


def test_nested_values_become_dotted_words():
    assert as_words({"loop": {"log_every": 1}, "seed": 2}) == ["loop.log_every=1", "seed=2"]


@pytest.mark.parametrize(
    ("value", "word"),
    [(None, "a=null"), (True, "a=true"), (3, "a=3"), (1e-3, "a=0.001"), ("x y", "a=x y"), ([1, 2], "a=[1,2]")],
)
def test_values_become_words(value, word):
    assert as_words({"a": value}) == [word]


def test_texts_arrive_as_they_are(tmp_path):
    for text in ("a, b", "${x}", "it's"):
        assert composed("generate", as_words({"checkpoint": "c", "prompt": text})).content["prompt"] == text


@pytest.mark.parametrize(
    "stages",
    [
        [{"seq_len": 64, "max_steps": 1}],
        [
            {"max_tokens": 100, "data": {"weights": {"code": 2.5, "a": None}}, "schedule": {}},
            {"learning_rate_scale": 0.1},
        ],
        [{"mixer": {"kind": "a, b: {c}'\"", "empty": "", "list": ["x", True, 3]}}],
    ],
)
def test_stages_are_lists_of_mappings_in_python_too(stages):
    (word,) = as_words({"stages": stages})
    made = composed("train", [word]).content["stages"]
    assert [{name: made[number][name] for name in stage} for number, stage in enumerate(stages)] == stages
