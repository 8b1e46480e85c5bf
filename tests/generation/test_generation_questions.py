"""The words of generate that tell caches what to keep: cache=, question= and draft=."""

import pytest

import longmix
from longmix.errors import ConfigError
from longmix.generation.run import generate

PROMPT = "the quick brown fox jumps over the lazy dog and goes on "


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    words = ("mixer=flash", "model.num_layers=2", "seq_len=64", "max_steps=2")
    return run_training(*words, f"data.cache_dir={shared_cache}")


@pytest.fixture(scope="module")
def recurrent(run_training, shared_cache):
    words = ("mixer=gla", "model.num_layers=1", "seq_len=64", "max_steps=2")
    return run_training(*words, f"data.cache_dir={shared_cache}")


@pytest.fixture
def generated(compose_config, run_folder):
    def call(*words: str):
        given = (f"checkpoint={run_folder}", f"prompt='{PROMPT}'", "max_tokens=6", "temperature=0", *words)
        return generate(compose_config(*given, entry_point="generate"))

    return call


KINDS = {
    "sink_recent": ("cache.start=2", "cache.recent=9"),
    "h2o": (),
    "snapkv": ("cache.budget=9", "cache.window=4", "cache.representatives=0.25"),
    "citrus": ("cache.budget=12", "cache.piece=5", "question=who?"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_generates_forks_saves_and_goes_on(generated, name, tmp_path):
    words = (f"cache={name}", *KINDS[name])
    exact, found = generated(), generated(*words, f"save={tmp_path}/saved")
    assert found.state_bytes < 0.8 * exact.state_bytes and len(found.ids[0]) >= len(exact.ids[0])
    longer = generated(*words, "max_tokens=12")
    on = generated("prompt=''", f"load={tmp_path}/saved")
    assert found.ids[0] == longer.ids[0][: len(found.ids[0])] and on.ids == longer.ids
    assert generated(*words, "samples=3").ids == found.ids * 3
    two = generated(*words, f"prompt=['{PROMPT}',abc]")
    assert two.ids[0] == found.ids[0]


@pytest.mark.slow
def test_a_draft_of_any_mixer_writes_ahead(generated, recurrent, run_folder):
    words = ("cache=speckv", "cache.budget=9", "cache.window=4")
    found = generated(*words, f"draft={recurrent}", "cache.lookahead=3")
    assert found.state_bytes < 0.8 * generated().state_bytes
    assert generated("cache=speckv", f"draft={run_folder}").ids == generated().ids  # within the budget
    python = longmix.load(run_folder).generate(
        PROMPT,
        max_tokens=6,
        temperature=0,
        draft=recurrent,
        cache={"name": "speckv", "budget": 9, "window": 4, "lookahead": 3},
    )
    assert python == found.texts


def test_a_question_stands_behind_the_prompt(generated):
    alone, asked = generated(f"prompt='{PROMPT}who?'"), generated("question=who?")
    assert alone.ids == asked.ids and alone.texts == asked.texts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cache=speckv",), r"cache=speckv needs a model that writes ahead; give draft=RUN, or use cache=snapkv\."),
        (
            ("draft=runs/x",),
            "draft=runs/x writes ahead for cache=speckv, or chooses for shorten=specpc",
        ),
        (("shorten=specpc",), "shorten needs a model that chooses"),
        (("shorten=specpc", "draft=x", "save=y"), "shorten is how a prompt is read"),
        (("draft=runs/x", "cache=h2o"), "draft=runs/x writes ahead for cache=speckv"),
        (("question=''",), "question is empty"),
        (("prompt=''", "load=x", "question=y"), "load goes on with the text that was saved; leave question and draft"),
        (("cache=citrus", "cache.budget=9"), "cache.kind=single reads a prompt for a question; give question=TEXT"),
        (("cache=h2o", "cache.budget=0"), "cache.budget=0 must be a whole number"),
    ],
)
def test_words_that_do_not_go_together(generated, words, message):
    with pytest.raises(ConfigError, match=message):
        generated(*words)


def test_answers_to_files_take_no_question(run_folder, tmp_path):
    (tmp_path / "in").write_text('{"prompt": "abc"}')
    model = longmix.load(run_folder)
    with pytest.raises(ConfigError, match="question, draft and shorten are for prompts"):
        model.answer(tmp_path / "in", tmp_path / "out", question="who?")
    with pytest.raises(ConfigError, match="cache=speckv needs a model"):
        model.answer(tmp_path / "in", tmp_path / "out", cache="speckv")


@pytest.mark.slow
def test_a_draft_shortens_what_is_read(generated, run_folder, recurrent, capsys):
    words = ("shorten=specpc", "shorten.budget=20", "shorten.window=8", "shorten.pool=3", f"draft={run_folder}")
    exact, found = generated(), generated(*words)
    assert found.state_bytes < 0.6 * exact.state_bytes and found.ids[0][:-6] == exact.ids[0][:-6]
    assert "read 20 tokens" in " ".join(capsys.readouterr().err.split())
    assert generated("shorten=specpc", f"draft={run_folder}").ids == exact.ids  # within the budget
    assert generated(*words, "cache=speckv", "cache.budget=9", "cache.window=4").state_bytes < found.state_bytes
    model = longmix.load(run_folder)
    settings = {"name": "specpc", "budget": 20, "window": 8, "pool": 3}
    assert model.generate(PROMPT, max_tokens=6, temperature=0, shorten=settings, draft=run_folder) == found.texts
    with pytest.raises(ConfigError, match="needs a draft with layers of softmax attention"):
        generated(*words[:-1], f"draft={recurrent}")
