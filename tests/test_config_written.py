"""What is written of a configuration is what Hydra composed, byte for byte, and a choice is a value."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from longmix.config import Choice, OriginRecord, Pattern, StoredConfig, TrainConfig, plain, read, resolved
from longmix.errors import ConfigError

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))

WORDS = [
    [],
    ["mixer=sliding_window*3+flash"],
    ["mixer=rwkv7", "optimizer=adamw", "schedule=wsd"],
    ["block=rwkv7", "model=125m", "trainer=context_parallel"],
    ["data=mqar", "logger=none"],
    ["data=text", "data.corpus.path=a.txt", "tokenizer=bpe"],
    ["mixer.qk_norm=false", "++loop.log_every=3", "data.corpus={_target_: longmix.data.corpora.sotu.Sotu}"],
    ["checkpoint=x", "trust=[a.B]", "resume=auto", "trainable=states", "tuning.features=2", "name=a"],
    *([f"experiment={name}"] for name in EXPERIMENTS),
]


def written(content: dict) -> str:
    """As `config.yaml` has it."""
    return OmegaConf.to_yaml(OmegaConf.create(content))


@pytest.mark.parametrize("words", WORDS, ids=lambda words: ",".join(words) or "defaults")
def test_written_as_composed(compose_config, words):
    content = resolved(compose_config(*words))
    assert written(plain(read(TrainConfig, content))) == written(content)


def test_an_origin_is_written_last_and_only_where_there_is_one(compose_config):
    content = resolved(compose_config("checkpoint=x"))
    config = read(TrainConfig, content)
    assert "origin" not in plain(config)
    with_origin = read(TrainConfig, {**content, "origin": {"checkpoint": "/x", "weights": "d"}})
    assert with_origin == config  # what a file says of it is found anew
    record = OriginRecord.of({"checkpoint": "/x", "weights": "d", "more": 1})
    assert record == OriginRecord("/x", "d")
    assert [OriginRecord.of(other) for other in (None, {}, {"checkpoint": "/x"}, "x")] == [None] * 4


class TestChoice:
    SETTINGS = {"window": 4, "_target_": "a.B", "inner": {"sizes": [1, 2]}}  # noqa: RUF012

    def test_nobody_changes_one(self):
        given = {"window": 4, "_target_": "a.B", "inner": {"sizes": [1, 2]}}
        choice = Choice.of("mixer", given)
        given["inner"]["sizes"].append(3)
        assert choice.having(window=5, more=1).entries == {**self.SETTINGS, "window": 5, "more": 1}
        assert choice.entries == self.SETTINGS and list(choice.entries) == list(self.SETTINGS)
        assert (choice.target, list(choice.settings)) == ("a.B", ["window", "inner"])

    def test_equal_wherever_it_stands(self):
        assert Choice.of("mixer", self.SETTINGS) == Choice.of("mixer.b", dict(reversed(self.SETTINGS.items())))
        assert Choice.of("mixer", self.SETTINGS) != Choice.of("mixer", {**self.SETTINGS, "window": 5})

    @pytest.mark.parametrize("value", [None, 3, "flash", {}, {"window": 3}, [{"_target_": "a.B"}]])
    def test_what_is_none(self, value):
        with pytest.raises(ConfigError, match=r"^data=.* is not a choice; it needs `_target_`, as the files in "):
            Choice.of("data", value)

    @pytest.mark.parametrize("value", [None, True, 2.0, "4"])
    def test_a_number_that_is_none(self, value):
        with pytest.raises(ConfigError, match=r"^model\.d_model=.* is not a whole number\.$"):
            Choice.of("model", {"_target_": "a.B", "d_model": value}).number("d_model")


class TestPattern:
    def test_members_stand_below_it(self):
        pattern = Pattern.of("mixer", {"pattern": ["a", "b", "a"], "b": {"_target_": "B"}, "a": {"_target_": "A"}})
        assert pattern.order == ("a", "b", "a")
        assert [(choice.key, choice.target) for choice in pattern.choices] == [("mixer.b", "B"), ("mixer.a", "A")]

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ({"pattern": []}, "mixer.pattern=[] is not a list of at least one member's name."),
            ({"pattern": "a"}, "mixer.pattern='a' is not a list of at least one member's name."),
            ({"pattern": ["a"], "b": {}}, "mixer.pattern names a, which is not among its members b."),
            (
                {"pattern": ["flash"], "flash": {"_target_": "A"}, "flush": {"_target_": "A"}},
                "unknown key mixer.flush. Did you mean flash? Keys there are: pattern, flash.",
            ),
            ({"pattern": ["a"], "a": {}}, "mixer.a={} is not a choice; it needs `_target_`"),
        ],
    )
    def test_what_does_not_go_together(self, value, said):
        with pytest.raises(ConfigError) as error:
            Pattern.of("mixer", value)
        assert str(error.value).startswith(said)


def test_the_configuration_of_an_earlier_version_is_read():
    content = OmegaConf.to_container(OmegaConf.load(ROOT / "tests" / "fixtures" / "earlier" / "run" / "config.yaml"))
    stored = StoredConfig.of(content)
    assert plain(stored) == {name: content[name] for name in plain(stored)}
