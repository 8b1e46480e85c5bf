"""Synthetic tasks are what they say, the same for everyone, and can be trained on and evaluated like any data."""

from itertools import permutations

import numpy as np
import pytest
import torch

from longmix.config import resolved
from longmix.data.synthetic import SyntheticData, SyntheticWindows
from longmix.data.synthetic_tasks import Copying, GroupWords, Induction, MultiQueryRecall
from longmix.data.tokenizers import ByteTokenizer, NumberTokenizer, tokenizer_from_state
from longmix.data.windows import IGNORE_INDEX
from longmix.errors import ConfigError, DataError
from longmix.evaluation.run import evaluate
from longmix.generation.run import generate


def examples(task, length: int, count: int = 50):
    windows = SyntheticWindows(task, length, "train", 3, count)
    return [windows.sample(index) for index in range(count)]


def predicted(window):
    return np.flatnonzero(window.targets != IGNORE_INDEX)


def test_recall_asks_every_key_once_for_the_value_it_came_with():
    seen, gaps = set(), []
    for window in examples(MultiQueryRecall(vocabulary=64, pairs=[2, 5]), 40):
        places = predicted(window)
        pairs = len(places)
        seen.add(pairs)
        keys, values = window.tokens[: 2 * pairs : 2], window.tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and ((keys > 0) & (keys < 32)).all() and ((values >= 32) & (values < 64)).all()
        held = dict(zip(keys, values, strict=True))
        assert sorted(window.tokens[places]) == sorted(keys)
        assert all(held[window.tokens[place]] == window.targets[place] for place in places)
        assert places.min() >= 2 * pairs and (places % 2 == 0).all()
        gaps += list((places - 2 * pairs) // 2)
    assert seen == {2, 5}
    assert np.mean(np.array(gaps) == 0) > 2 * np.mean(np.array(gaps) == 8)  # near ones are commoner


@pytest.mark.parametrize("scattered", [False, True])
def test_copying_repeats_the_symbols_in_order(scattered):
    for window in examples(Copying(symbols=5, count=6, scattered=scattered), 30):
        content = window.tokens[:24][window.tokens[:24] < 5]
        assert (window.targets[24:] == content).all() and len(predicted(window)) == 6
        assert window.tokens[24] == 6 and (window.tokens[25:] == content[:-1]).all()
        assert scattered or (window.tokens[6:24] == 5).all()


def test_induction_asks_for_what_followed_the_mark():
    for window in examples(Induction(symbols=9), 20):
        first, last = np.flatnonzero(window.tokens == 9)
        assert last == 19 and predicted(window).tolist() == [19] and window.targets[19] == window.tokens[first + 1]


@pytest.mark.parametrize("things", [2, 3])
def test_group_words_multiply_permutations(things):
    elements = list(permutations(range(things)))
    for window in examples(GroupWords(things), 12, 10):
        for end in range(12):
            # Applying one permutation after the other to a list of things, the last one first.
            found = list(range(things))
            for token in window.tokens[: end + 1][::-1]:
                found = [elements[token][thing] for thing in found]
            assert elements[window.targets[end]] == tuple(found)
    if things == 2:
        (window,) = examples(GroupWords(2), 50, 1)
        assert (window.targets == window.tokens.cumsum() % 2).all()


def data(seed: int = 0, **options) -> SyntheticData:
    return SyntheticData(
        MultiQueryRecall(64, 4), ByteTokenizer(), seq_len=24, batch_size=4, seed=seed, validation_tokens=240, **options
    )


def test_examples_are_pure_functions_of_seed_split_and_number():
    first, second = next(iter(data().train_loader(5, 6))), next(iter(data(num_workers=1).train_loader(5, 6)))
    assert torch.equal(first["tokens"], second["tokens"]) and first["document_ids"] is None
    assert not torch.equal(first["tokens"], next(iter(data(seed=1).train_loader(5, 6)))["tokens"])
    shares = [next(iter(data().train_loader(5, 6, rank, 2)))["tokens"] for rank in range(2)]
    assert torch.equal(torch.cat(shares), first["tokens"])
    validation = [torch.cat([b["tokens"] for b in data(seed).evaluation_loader("validation")]) for seed in (0, 1)]
    assert torch.equal(*validation) and len(validation[0]) == 1000
    assert not torch.equal(next(iter(data().evaluation_loader("test")))["tokens"], validation[0][:1])
    assert len(data().evaluation_loader("validation", 48, 1, 480)) == 10


def test_numbers_are_their_own_text():
    numbers = NumberTokenizer(12)
    assert numbers.decode([3, 11]) == "3 11 " and numbers.encode("3 11").tolist() == [3, 11]
    assert tokenizer_from_state(numbers.state()).vocab_size == 12
    for wrong in ("12", "x", "-1"):
        with pytest.raises(DataError, match="is not a token"):
            numbers.encode(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiQueryRecall(pairs=0), "data.task.pairs=0"),
        (lambda: MultiQueryRecall(pairs=[]), "data.task.pairs is empty"),
        (lambda: MultiQueryRecall(vocabulary=16, pairs=8), "more than a vocabulary of 16"),
        (lambda: MultiQueryRecall(power=0.0), "data.task.power"),
        (lambda: Copying(count=0), "data.task.count=0"),
        (lambda: Induction(symbols=1), "data.task.symbols=1"),
        (lambda: GroupWords(6), "data.task.things=6"),
        (lambda: examples(MultiQueryRecall(pairs=[1, 8]), 31), "seq_len=31 is too short for 8 pairs"),
        (lambda: examples(Copying(count=10), 19), "seq_len=19"),
        (lambda: examples(Induction(), 2), "seq_len=2"),
    ],
)
def test_impossible_settings_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        make()


@pytest.fixture(scope="module")
def run_folder(run_training):
    words = ("data=mqar", "data.task.vocabulary=32", "data.task.pairs=2", "seq_len=24", "model.num_layers=2")
    return run_training(*words, "max_steps=300", "batch_size=32", "model.d_model=64", "data.validation_tokens=480")


def test_a_trained_model_recalls(run_folder, compose_config, tmp_path):
    words = [f"checkpoint={run_folder}", f"output={tmp_path}/out", "task=accuracy", "max_tokens=2400"]
    report = evaluate(compose_config(*words, "seq_len=[16,24]", entry_point="evaluate"))["accuracy"]
    assert report["lengths"][24]["targets"] == 200 and report["lengths"][24]["accuracy"] > 0.4  # by chance 0.06
    assert sum(row["targets"] for row in report["lengths"][24]["by_position"]) == 200
    assert len(list((tmp_path / "out").glob("accuracy_MultiQueryRecall*"))) == 2
    other = ("data=mqar", "data.task.vocabulary=64", "data.task.pairs=2")
    with pytest.raises(ConfigError, match="has 64 tokens and the model 32"):
        evaluate(compose_config(*words, *other, entry_point="evaluate"))
    made = generate(compose_config(f"checkpoint={run_folder}", "prompt=3 17 4", "max_tokens=3", entry_point="generate"))
    assert made.ids[0][:3] == [3, 17, 4] and len(made.texts[0].split()) == 3
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate(compose_config(f"checkpoint={run_folder}", entry_point="generate"))


def test_the_vocabulary_of_the_model_is_the_tasks(compose_config):
    node = resolved(compose_config("data=group_words"))
    assert node["data"]["task"]["things"] == 5
