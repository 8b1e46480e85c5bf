"""`MixtureData`: every corpus has its share of the windows, in an order that needs no memory."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from list_corpus import CodePointTokenizer, ListCorpus, distinct_documents
from omegaconf import OmegaConf

from longmix.config import TrainConfig, build, read, resolved
from longmix.data.mixture import BLOCK, MixtureData, shared_out
from longmix.data.prepare_run import prepare_splits
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError
from longmix.training.run import check_config

DOCUMENTS = distinct_documents([40, 33, 27, 50, 61, 22])


@pytest.fixture
def make(tmp_path):
    def make(weights=None, **settings) -> MixtureData:
        corpora = {
            "first": ListCorpus("first", train=DOCUMENTS[:2], validation=DOCUMENTS[2:3]),
            "second": ListCorpus("second", train=DOCUMENTS[3:5], validation=DOCUMENTS[5:], test=DOCUMENTS[5:]),
        }
        weights = {"first": 3, "second": 1} if weights is None else weights
        words = {"seq_len": 8, "batch_size": 4, "seed": 0, "cache_dir": str(tmp_path), **settings}
        return MixtureData(words.pop("corpora", corpora), weights, CodePointTokenizer(), **words)

    return make


def owner(tokens: np.ndarray) -> str:
    """Which corpus a window is of: no character is in both."""
    characters = {chr(token) for token in tokens.tolist() if token < 0x110000}
    found = [
        name for name, part in (("first", DOCUMENTS[:3]), ("second", DOCUMENTS[3:])) if characters & {*"".join(part)}
    ]
    assert len(found) == 1
    return found[0]


class TestShares:
    def test_every_block_has_exactly_its_share(self, make):
        windows = make().train_windows
        for block in range(2):
            owners = Counter(owner(windows.sample(block * BLOCK + place).tokens) for place in range(BLOCK))
            assert owners == {"first": 750, "second": 250}

    def test_each_corpus_goes_through_its_own_windows_in_its_own_order(self, make):
        data = make()
        alone = data.train_windows._sources
        places: dict[int, set[int]] = {0: set(), 1: set()}
        for index in range(2 * BLOCK):
            number, own = data.train_windows.part_and_index(index)
            places[number].add(own)
        assert places == {0: set(range(1500)), 1: set(range(500))}
        number, own = data.train_windows.part_and_index(1234)
        np.testing.assert_array_equal(data.train_windows.sample(1234).tokens, alone[number].sample(own).tokens)

    def test_the_order_is_random_and_fixed_by_the_seed(self, make):
        first, again, other = (make(seed=seed).train_windows for seed in (0, 0, 1))
        orders = [[windows.part_and_index(index)[0] for index in range(BLOCK)] for windows in (first, again, other)]
        assert orders[0] == orders[1] != orders[2]
        runs = sum(a != b for a, b in zip(orders[0], orders[0][1:], strict=False))
        assert 300 < runs < 450  # 375 are expected of a random order with one in four

    @pytest.mark.parametrize(
        ("weights", "counts"),
        [
            ({"a": 1, "b": 1, "c": 1}, {"a": 334, "b": 333, "c": 333}),
            ({"a": 0.7, "b": 0.3}, {"a": 700, "b": 300}),
            ({"a": 999.4, "b": 0.6}, {"a": 999, "b": 1}),
            ({"a": 5}, {"a": 1000}),
        ],
    )
    def test_rounding_keeps_the_sum(self, weights, counts):
        assert shared_out(weights) == counts


class TestData:
    def test_ranks_and_resumption_change_nothing(self, make):
        whole = [batch["tokens"] for batch in make().train_loader(0, 6)]
        halves = [[batch["tokens"] for batch in make().train_loader(0, 6, rank, 2)] for rank in range(2)]
        resumed = [batch["tokens"] for batch in make().train_loader(3, 6)]
        for step in range(6):
            assert (whole[step] == np.concatenate([half[step] for half in halves])).all()
        for step in range(3, 6):
            assert (whole[step] == resumed[step - 3]).all()

    def test_evaluation_covers_all_of_all_or_the_shares(self, make):
        data = make()
        windows = data.evaluation_windows("validation", 8, None)
        owners = Counter(owner(windows[place].tokens) for place in range(len(windows)))
        assert owners == {"first": 4, "second": 3} and windows.covered_tokens == windows.total_tokens == 28 + 23
        fewer = data.evaluation_windows("validation", 8, 32)
        assert Counter(owner(fewer[place].tokens) for place in range(len(fewer))) == {"first": 3, "second": 1}
        assert data.splits == ("train", "validation")  # the first has no test split
        with pytest.raises(DataError, match="no split 'test'"):
            data.evaluation_windows("test", 8, None)

    def test_fingerprint_tells_shares_and_contents_apart(self, make):
        assert make().fingerprint() == make().fingerprint()
        assert make().fingerprint() != make({"first": 1, "second": 1}).fingerprint()
        other = {
            "first": ListCorpus("first", train=DOCUMENTS[:1]),
            "second": ListCorpus("second", train=DOCUMENTS[3:5]),
        }
        assert make().fingerprint() != make(corpora=other).fingerprint()

    def test_token_files_are_those_of_each_corpus_alone(self, make, tmp_path):
        make().prepare_data()
        folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
        make({"first": 1, "second": 9}).prepare_data()
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == folders and len(folders) == 4


class TestRefusals:
    @pytest.mark.parametrize(
        ("weights", "words"),
        [
            ({"first": 1}, "second differ"),
            ({"first": 1, "second": 1, "third": 1}, "third differ"),
            ({"first": 0, "second": 1}, r"data\.weights\.first=0 must be above 0"),
            ({"first": 1e-5, "second": 1}, "less than a thousandth"),
        ],
    )
    def test_weights(self, make, weights, words):
        with pytest.raises(ConfigError, match=words):
            make(weights)

    def test_no_corpus(self, make):
        with pytest.raises(ConfigError, match=r"data\.corpora is empty"):
            make({}, corpora={})

    def test_one_text_is_asked_of_many(self, make):
        with pytest.raises(DataError, match="a mixture of first, second"):
            make().token_file("train")


@pytest.fixture
def words(tmp_path) -> list[str]:
    for name in ("letters", "digits"):
        (tmp_path / name).mkdir()
    (tmp_path / "letters" / "a.txt").write_text("to be or not to be " * 30)
    (tmp_path / "digits" / "a.txt").write_text("3141592653589793 " * 30)
    (tmp_path / "held_out.txt").write_text("to be 31415 ")
    corpora = ",".join(
        f"{name}:{{_target_:longmix.data.corpora.files.TextFiles,path:'{tmp_path}/{name}',validation:'{tmp_path}/held_out.txt'}}"
        for name in ("letters", "digits")
    )
    return ["data=mixture", f"data.corpora={{{corpora}}}", "data.weights={letters:2,digits:1}"]


def test_a_run_trains_on_a_mixture(words, run_training, tmp_path):
    folder = run_training(*words, f"data.cache_dir={tmp_path}/cache", "seq_len=16")
    assert (folder / "summary.json").is_file()


def test_a_wrong_setting_of_a_corpus_is_named(words, compose_config):
    config = resolved(compose_config(*words, "+data.corpora.digits.pth=x", "trainer.accelerator=cpu"))
    with pytest.raises(ConfigError, match=r"unknown key data\.corpora\.digits\.pth\. Did you mean path"):
        check_config(read(TrainConfig, config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("path=nowhere", r"^data\.corpora\.digits\.path: there is no file nowhere"),
        ("validation=null", r"Change data\.corpora\.digits\.validation_fraction .* such as data\.corpora\.digits\."),
    ],
)
def test_errors_name_the_settings_of_the_corpus(words, compose_config, tmp_path, change, message):
    (document,) = (tmp_path / "digits").iterdir()
    (tmp_path / "digits" / "again.txt").write_text(document.read_text())  # of two equal documents none is held out
    config = compose_config(
        *words,
        f"data.corpora.digits.{change}",
        f"data.cache_dir={tmp_path}/cache",
        "tokenizer=bytes",
        entry_point="prepare",
    )
    with pytest.raises(DataError, match=message):
        prepare_splits(config)


def test_tokenizer_reads_all_corpora(make):
    assert list(make().corpus.documents("train")) == [*DOCUMENTS[:2], *DOCUMENTS[3:5]]


class TestPrepare:
    """prepare.py calls the parts of a mixture what the user calls them."""

    def words(self, tmp_path) -> list[str]:
        for name in ("books", "web"):
            (tmp_path / name).mkdir()
            for number in range(30):
                (tmp_path / name / f"{number}.txt").write_text(f"document {number} of {name}")
        corpora = ",".join(
            f"{name}:{{_target_:longmix.data.corpora.files.TextFiles,path:'{tmp_path / name}',validation_fraction:0.2}}"
            for name in ("books", "web")
        )
        weights = "data.weights={books:2,web:1}"
        return ["data=mixture", f"data.corpora={{{corpora}}}", weights, f"data.cache_dir={tmp_path}/cache"]

    def test_rows_and_log_lines(self, tmp_path, compose_config, capsys, caplog):
        made = prepare_splits(compose_config(*self.words(tmp_path), "tokenizer=bytes", entry_point="prepare"))
        assert [(file["corpus"], file["split"]) for file in made] == [
            *(("books", "train"), ("web", "train"), ("books", "validation"), ("web", "validation"))
        ]
        lines = [line.split()[1:4:2] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        assert lines == [["books", "train"], ["web", "train"], ["books", "validation"], ["web", "validation"]]
        for name in ("books train", "web train", "books validation", "web validation"):
            assert f"{name}: " in caplog.text

    @pytest.mark.slow
    def test_the_line_that_uses_the_result(self, tmp_path, run_process):
        finished = run_process("prepare.py", *self.words(tmp_path), "tokenizer=bytes", "workers=0")
        (line,) = [line for line in finished.out.splitlines() if line.startswith("to train on them:")]
        assert line.startswith("to train on them:  python train.py data=mixture 'data.corpora={books:")
        assert line.endswith(" tokenizer=bytes") and "workers" not in line
        assert "data=prepared" not in finished.out  # two corpora share the folder


def test_the_line_for_prepared_data(tmp_path, compose_config, capsys):
    words = ["data=sotu", "tokenizer=bytes", f"data.cache_dir={tmp_path}", "splits=[train]"]
    prepare_splits(compose_config(*words, entry_point="prepare"))
    expected = f"without the texts: longmix train data=prepared data.path={tmp_path} tokenizer=prepared"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("source", ["docs/data.md", "configs/data/mixture.yaml"])
def test_the_example_file_is_a_mixture(source, tmp_path, monkeypatch, compose_config):
    root = Path(__file__).parents[2]
    text = (root / source).read_text()
    if source.endswith(".md"):
        example = text.partition("```yaml\n")[2].partition("```")[0]
    else:
        lines = [
            line.removeprefix("#").removeprefix("     ") for line in text.splitlines() if line.startswith("#     ")
        ]
        example = "\n".join(lines)
    given = yaml.safe_load(example)
    assert given.pop("defaults") == ["mixture", "_self_"]
    monkeypatch.chdir(tmp_path)
    for folder, name, content in (("books", "a.txt", "a book"), ("web", "a.jsonl", '{"body": "a page"}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    node = {**OmegaConf.to_container(OmegaConf.load(root / "configs" / "data" / "mixture.yaml")), **given}
    data = build(node, "data", tokenizer=ByteTokenizer(), seq_len=4, batch_size=1, seed=0)
    assert data.part_names == list(given["weights"])
    assert next(data.corpora["web"].documents("train")) == "a page"
