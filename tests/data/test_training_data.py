"""`TrainingData`: what every kind of data answers, and what is refused in its place."""

from pathlib import Path

import pytest
import yaml
from list_corpus import ListCorpus

from longmix.config import Choice, TrainConfig, locate, read
from longmix.data.mixture import MixtureData
from longmix.data.prepared import PreparedData
from longmix.data.synthetic.base import SyntheticData
from longmix.data.synthetic.needle import NeedleData
from longmix.data.synthetic.tasks import Copying
from longmix.data.text_data import TextData, TokenData
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.data.training_data import TrainingData, build_data
from longmix.errors import ConfigError, DataError
from longmix.training.run import check_config

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"seq_len": 300, "batch_size": 2, "seed": 0}
TEXTS = ["one text of several words. " * 40, "another one. " * 40]


class NotData:
    """Takes what data take, and answers nothing."""

    def __init__(self, tokenizer, seq_len: int, batch_size: int, seed: int) -> None:
        pass


class HalfData(TrainingData):
    """A kind of data that forgets its windows."""

    def __init__(self, tokenizer, **sizes) -> None:
        super().__init__(**sizes)


def no_data(tokenizer, seq_len: int, batch_size: int, seed: int) -> None:
    """A function may make data; this one does not."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[type, TrainingData]:
    cache = tmp_path_factory.mktemp("cache")
    corpus = ListCorpus(train=TEXTS, validation=TEXTS[:1])
    options = {**SIZES, "cache_dir": str(cache)}
    made: list[TrainingData] = [
        TokenData(corpus, ByteTokenizer(), **options),
        MixtureData({"a": corpus, "b": corpus}, {"a": 1, "b": 3}, ByteTokenizer(), **options),
        NeedleData(corpus, ByteTokenizer(), **options),
        SyntheticData(Copying(), ByteTokenizer(), **SIZES),
    ]
    made[0].prepare_data()
    made.append(PreparedData(str(cache), ByteTokenizer(), **options))
    return {type(data): data for data in made}


NODES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONFIGS / "data").glob("*.yaml"))}
TARGETS = {name: node["_target_"] for name, node in NODES.items() if "_target_" in node}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_choice_is_training_data(target):
    assert issubclass(locate(target, "data"), TrainingData)


@pytest.mark.parametrize("kind", [TokenData, MixtureData, NeedleData, SyntheticData, PreparedData])
def test_a_kind_of_data_answers_all(kinds, kind):
    data = kinds[kind]
    data.setup("fit")
    window = data.train_windows.sample(3)
    assert window.tokens.shape == window.targets.shape == (300,)
    assert window.document_ids is None or window.document_ids.shape == (300,)
    assert data.train_windows.windows_per_epoch > 0 and data.train_tokens_per_epoch > 0
    windows = data.evaluation_windows("validation", 300, 600)
    assert len(windows) == len(list(data.evaluation_loader("validation", max_tokens=600))) > 0
    assert data.splits[0] == "train" and data.source and data.label
    assert data.expected_vocab_size == data.vocab_size == len(data.token_bytes)
    assert {"seq_len", "batch_size", "seed"} <= set(data.fingerprint())
    assert "tokens" in data.content("train")
    assert {"corpus", "tokenizer", "vocab_size", "splits"} <= set(data.summary())
    with pytest.raises(DataError, match="no split 'dev'"):
        data.content("dev")


def test_only_one_text_has_one_token_file(kinds):
    for kind, data in kinds.items():
        if kind is MixtureData:
            with pytest.raises(DataError, match="a mixture of a, b is not one text"):
                data.token_file("train")
        elif isinstance(data, TextData):
            assert data.token_file("train") is data.token_files("train")[0]
        else:
            assert not hasattr(data, "token_file")


@pytest.mark.parametrize(("target", "found"), [(NotData, "NotData"), (no_data, "NoneType")])
def test_what_is_not_training_data_is_refused(target, found):
    node = {"_target_": f"{__name__}.{target.__name__}"}
    message = rf"data\._target_=\S+ is a {found}; it must be a subclass of \S+\.TrainingData\.$"
    with pytest.raises(ConfigError, match=message):
        build_data(Choice.of("data", node), ByteTokenizer(), **SIZES)


def test_a_kind_of_data_without_windows_is_refused():
    with pytest.raises(ConfigError, match=r"data\._target_=\S+HalfData lacks .*evaluation_windows.*train_windows"):
        build_data(Choice.of("data", {"_target_": f"{__name__}.HalfData"}), ByteTokenizer(), **SIZES)


def test_training_refuses_it_before_any_work(compose_config):
    from longmix import config as configuration

    config = configuration.resolved(compose_config("seq_len=32"))
    config["data"] = {"_target_": f"{__name__}.NotData"}
    with pytest.raises(ConfigError, match="it must be a subclass of"):
        check_config(read(TrainConfig, config))
