"""The word `cache=` of generate, on the command line and in Python."""

import json

import pytest

import longmix
from longmix.errors import ConfigError
from longmix.generation.run import generate


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    words = ("mixer=flash", "model.num_layers=2", "seq_len=64", "max_steps=2")
    return run_training(*words, f"data.cache_dir={shared_cache}")


@pytest.fixture
def generated(compose_config, run_folder):
    def call(*words: str):
        given = (f"checkpoint={run_folder}", "prompt=abc", "max_tokens=6", *words)
        return generate(compose_config(*given, entry_point="generate"))

    return call


def test_the_default_is_exact_and_may_be_said(generated, tmp_path, capsys):
    usual, said = generated(f"save={tmp_path}/saved"), generated("cache=exact")
    assert usual.texts == said.texts and usual.ids == said.ids
    told = " ".join(capsys.readouterr().err.split())
    assert "of which a token reads" in told and "spare" in told
    words = ("prompt=''", f"load={tmp_path}/saved")
    assert generated(*words).texts == generated(*words, "cache=exact").texts
    with pytest.raises(ConfigError, match="was saved with another cache; leave cache= out, or give cache=exact"):
        generated(*words, "cache=exact", "cache.exact_layers=[0]")


def test_samples_share_the_prompt(generated):
    one, four = generated("temperature=0"), generated("temperature=0", "samples=4")
    assert four.texts == one.texts * 4
    assert four.state_bytes < 4 * one.state_bytes


def test_python_takes_a_name_or_settings(run_folder, tmp_path):
    model = longmix.load(run_folder)
    words = {"max_tokens": 6, "temperature": 0}
    usual = model.generate("abc", **words)
    assert usual == model.generate("abc", cache="exact", **words)
    assert usual == model.generate("abc", cache={"name": "exact", "exact_layers": [0]}, **words)
    for given, message in (
        ("exacd", "Did you mean exact"),
        (3, "must be a name"),
        ({"name": "exact", "x": 1}, "cache.x"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.generate("abc", cache=given, **words)
    (tmp_path / "in").write_text(json.dumps({"prompt": "abc"}) + "\n" + json.dumps({"prompt": "de"}))
    answers = [
        model.answer(tmp_path / "in", tmp_path / name, **given, **words).read_text()
        for name, given in (("usual", {}), ("exact", {"cache": "exact"}))
    ]
    assert answers[0] == answers[1] and usual[0] in json.loads(answers[0].splitlines()[0])["text"]


def test_room_is_made_once_for_prompt_and_tokens(run_folder, monkeypatch):
    from longmix.caches.store import Store

    sizes = []
    grow = Store._grow
    monkeypatch.setattr(Store, "_grow", lambda self, *given: (grow(self, *given), sizes.append(self.capacity)))
    longmix.load(run_folder).generate("abc", max_tokens=300, temperature=0, stop=["\0\0"])
    assert sizes and len(set(sizes)) == 1 and sizes[0] in range(300, 310)


def test_prefill_is_a_word_of_its_own(generated, run_folder, tmp_path):
    text = "of the people, by the people, for the people " * 2
    words = (f"prompt='{text}'", "temperature=0")
    near = ("prefill=star", "prefill.block=8", "prefill.anchor=2")
    wanted = generated(*words, *near)
    assert wanted.ids != generated(*words).ids
    assert generated(*words, "prefill=star").ids == generated(*words).ids  # a prompt within a block
    model = longmix.load(run_folder)
    settings = {"name": "star", "block": 8, "anchor": 2}
    assert model.generate(text, max_tokens=6, temperature=0, prefill=settings) == wanted.texts
    (tmp_path / "in").write_text(json.dumps({"prompt": text}))
    answers, given = tmp_path / "out", {"max_tokens": 6, "temperature": 0}
    model.answer(tmp_path / "in", answers, prefill=settings, **given)
    assert json.loads(answers.read_text())["text"] == wanted.texts[0]
    with pytest.raises(ConfigError, match="holds an answer, in line 1, to another prompt or of other words"):
        model.answer(tmp_path / "in", answers, **given)
    with pytest.raises(ConfigError, match="prefill is how a prompt is read"):
        generated(*near, f"save={tmp_path}/saved")
    with pytest.raises(ConfigError, match=r"there is no prefill stars\. Did you mean star"):
        model.generate("abc", prefill="stars")
