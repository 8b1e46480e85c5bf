"""`NeedleData`: every value can be found in the row, nothing is drawn twice, and a model trained on it recalls."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from list_corpus import ListCorpus

from longmix.batch import IGNORE_INDEX
from longmix.config import TrainConfig, build, read, resolved
from longmix.data.synthetic.haystack import KEYS, QUESTION, STATEMENT
from longmix.data.synthetic.needle import NeedleData
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError
from longmix.evaluation.run import evaluate
from longmix.training.run import check_config

ASKED = "\n\nThe secret number of {key} is"
FACT = re.compile(r" The secret number of (\w+) is (\d{4})\.")
ANSWER = re.compile(r"\n\nThe secret number of (\w+) is( \d{1,4})")


def speech(seed: int, sentences: int) -> str:
    words = ["the", "union", "of", "our", "states", "must", "be", "made", "stronger", "by", "honest", "work", "and"]
    random = np.random.default_rng(seed)
    return " ".join(" ".join(random.choice(words, 7)).capitalize() + "." for _ in range(sentences))


CORPUS = ListCorpus("speeches", train=[speech(0, 60), speech(1, 9)], validation=[speech(2, 40)])


@pytest.fixture
def make(tmp_path):
    def make(tokenizer=None, **settings) -> NeedleData:
        words = {"seq_len": 300, "batch_size": 4, "seed": 0, "cache_dir": str(tmp_path), "question": ASKED, **settings}
        return NeedleData(CORPUS, tokenizer or ByteTokenizer(), **words)

    return make


@pytest.fixture(params=["bytes", "bpe"])
def data(request, make) -> NeedleData:
    return make(None if request.param == "bytes" else BpeTokenizer(300), needles=[1, 3])


def whole(window) -> np.ndarray:
    """The row with the token after it, which is the last one of the last value."""
    assert window.targets[-1] != IGNORE_INDEX
    return np.append(window.tokens, window.targets[-1])


class TestRows:
    def test_every_question_has_its_fact_before_it(self, data):
        counts, places, first_asked = Counter(), [], Counter()
        for index in range(60):
            row = whole(data.train_windows.sample(index))
            assert len(row) == 301 and row[0] == data.tokenizer.separator_id
            text = data.tokenizer.decode(row)
            facts, answers = FACT.findall(text), ANSWER.findall(text)
            assert {(key, f" {value}") for key, value in facts} == set(answers)
            assert {key for key, _ in facts} <= set(KEYS) and len(dict(facts)) == len(answers)
            assert text.endswith(answers[-1][1]) and max(m.end() for m in FACT.finditer(text)) <= text.index("\n\n")
            counts[len(answers)] += 1
            places += [match.start() / text.index("\n\n") for match in FACT.finditer(text)]
            first_asked[[key for key, _ in facts].index(answers[0][0])] += len(answers) == 3
        assert set(counts) == {1, 3} and counts[1] > 15 and counts[3] > 15
        assert np.histogram(places, 4, (0, 1))[0].min() > 10  # at all depths
        assert min(first_asked[place] for place in range(3)) >= 3  # in any order

    def test_around_the_facts_is_the_text(self, make):
        joined, data, starts = "".join(CORPUS.documents("train")), make(), set()
        for index in range(20):
            text = data.tokenizer.decode(whole(data.train_windows.sample(index)))
            starts.add(joined.index(FACT.sub("", text[: text.index("\n\n")])))
        assert len(starts) > 15 and min(starts) < len(joined) / 4 and max(starts) > len(joined) / 2

    def test_answers_are_predicted_and_as_many_other_tokens_as_are_asked_for(self, make):
        for share, others in ((1.0, 0), (0.5, 5), (0.1, 45), (0.001, 295), (None, 295)):
            places = []
            for index in range(8):
                window = make(answer_share=share).train_windows.sample(index)
                predicted = np.flatnonzero(window.targets != IGNORE_INDEX)
                assert (window.targets[predicted] == whole(window)[predicted + 1]).all()
                assert predicted[-5:].tolist() == list(range(295, 300)) and len(predicted) == 5 + others
                assert make().tokenizer.decode(window.targets[-5:])[0] == " "
                places += predicted[:-5].tolist()
            assert len(set(places)) >= 0.9 * others  # drawn anew in every row

    def test_other_splits_have_text_and_draws_of_their_own_and_predict_answers(self, make):
        data = make(answer_share=None, validation_tokens=600)
        held_out = next(CORPUS.documents("validation"))
        rows = data.evaluation_windows("validation", 300, None)
        assert len(rows) == 1000 and len(data.val_dataloader()) == 2
        for index in range(10):
            text = data.tokenizer.decode(whole(rows[index]))
            assert FACT.sub("", text[: text.index("\n\n")]) in held_out
            assert (rows[index].targets != IGNORE_INDEX).sum() == 5
        drawn = [ANSWER.findall(data.tokenizer.decode(whole(w.sample(0)))) for w in (rows, data.train_windows)]
        assert drawn[0] != drawn[1]
        assert len(data.evaluation_windows("validation", 600, 1800)[2].tokens) == 600

    def test_are_pure_functions_of_seed_split_and_number(self, make):
        batches = [next(iter(make(num_workers=workers).train_loader(5, 6))) for workers in (0, 1)]
        assert torch.equal(batches[0]["tokens"], batches[1]["tokens"]) and batches[0]["document_ids"] is None
        assert torch.equal(batches[0]["targets"], batches[1]["targets"])
        shares = [next(iter(make().train_loader(5, 6, rank, 2)))["tokens"] for rank in range(2)]
        assert torch.equal(torch.cat(shares), batches[0]["tokens"])
        assert not torch.equal(next(iter(make(seed=1).train_loader(5, 6)))["tokens"], batches[0]["tokens"])
        of_seeds = [make(seed=seed).evaluation_windows("validation", 300, 300)[0].tokens for seed in (0, 1)]
        np.testing.assert_array_equal(*of_seeds)

    def test_an_epoch_is_as_long_as_the_text(self, make):
        data = make()
        assert data.train_windows.windows_per_epoch == -(-data.token_file("train").num_tokens // 300)
        assert data.label == "needles_speeches"


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            pytest.param({"needles": 0}, r"data.needles=0 must be from 1 to 25", id="none"),
            pytest.param({"needles": [2, 26]}, r"data.needles=\[2, 26\]", id="more than keys"),
            pytest.param({"needles": []}, r"data.needles=\[\]", id="empty"),
            pytest.param({"answer_share": 0.0}, "answer_share=0.0 must be above 0", id="no answers"),
            pytest.param({"answer_share": 1.5}, "answer_share=1.5", id="more than all"),
            pytest.param({"statement": "{key}: {value}!", "question": "?"}, "data.question='\\?' must hold", id="key"),
            pytest.param({"statement": "{key}:{value}"}, "data.statement=.* must hold ' {value}'", id="value"),
        ],
    )
    def test_refused(self, make, settings, words):
        with pytest.raises(ConfigError, match=words):
            make(**settings)

    def test_no_room_for_the_longest_keys(self, make):
        longest = len(STATEMENT.format(key="Inverness", value=1000)) + len(ASKED.format(key="Inverness")) + 5
        make(seq_len=longest + 1).prepare_data()
        with pytest.raises(ConfigError, match=f"seq_len={longest} has no room.* 1 of each, take {longest} tokens"):
            make(seq_len=longest).prepare_data()
        with pytest.raises(ConfigError, match="4 of each"):
            make(needles=[1, 4]).prepare_data()
        with pytest.raises(ConfigError, match="seq_len=60 has no room"):
            make().evaluation_windows("validation", 60, None)[0]

    def test_a_text_shorter_than_a_row(self, make):
        with pytest.raises(DataError, match="too few for a haystack"):
            make(seq_len=9000).train_windows.sample(0)

    def test_resume_is_refused_for_other_rows(self, make):
        first = make().fingerprint()
        assert first == make().fingerprint()
        for settings in ({"needles": 2}, {"answer_share": 1.0}, {"question": QUESTION}, {"seed": 1}):
            assert make(**settings).fingerprint() != first
        assert make().summary().items() >= first.items()

    def test_words(self, compose_config):
        node = resolved(compose_config("data=needle"))
        assert (node["data"]["statement"], node["data"]["question"]) == (STATEMENT, QUESTION)
        data = build(node["data"], "data", tokenizer=ByteTokenizer(), seq_len=64, batch_size=1, seed=0)
        assert isinstance(data, NeedleData) and data.counts == [1]
        check_config(read(TrainConfig, compose_config("experiment=needle")))


@pytest.fixture(scope="module")
def run_folder(run_training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speeches")
    for split, seed in (("train", 0), ("validation", 9)):
        (folder / split).mkdir()
        (folder / split / "speech.txt").write_text(speech(seed, 150))
    corpus = (
        f"{{_target_: longmix.data.corpora.files.TextFiles, path: {folder}/train, validation: {folder}/validation}}"
    )
    return run_training(
        "data=needle",
        "~data.corpus",
        f"+data.corpus={corpus}",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "data.statement=' {key}: {value}.'",
        "data.question='? {key}:'",
        "data.answer_share=1",
        "seq_len=40",
        "batch_size=64",
        "max_steps=150",
        "model.num_layers=2",
        "model.d_model=64",
        "model.mlp_hidden=32",
        "loop.validate_every=null",
        "loop.checkpoint_every=null",
    )


@pytest.mark.slow
def test_a_trained_model_finds_needles_asked_for_as_in_training(run_folder, compose_config, tmp_path):
    words = [f"checkpoint={run_folder}", f"output={tmp_path}/out", "seq_len=[40]", "max_tokens=4000"]
    found = evaluate(compose_config(*words, "task=[accuracy,needle]", entry_point="evaluate"))
    assert found["accuracy"]["data"] == "needles_text" and found["accuracy"]["lengths"][40]["targets"] == 500
    assert found["accuracy"]["lengths"][40]["accuracy"] > 0.6  # by chance (1 + 1/9 + 3/10) / 5 = 0.28
    for cell in found["needle"]["cells"]:
        assert cell["token_accuracy"] > 0.5 and cell["gain"] > 5
    question = f"task.needle.question='{QUESTION[2:]}'"
    with pytest.raises(ConfigError, match="no room for a haystack"):  # the words of the task come before the data's
        evaluate(compose_config(*words, "task=needle", question, entry_point="evaluate"))
