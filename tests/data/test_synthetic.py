"""Synthetic tasks are what they say, the same for everyone, and can be trained on and evaluated like any data."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.batch import IGNORE_INDEX
from longmix.config import build, resolved
from longmix.data.synthetic.base import SyntheticData, SyntheticWindows
from longmix.data.synthetic.tasks import Copying, GroupWords, Induction, MatchThree, MultiQueryRecall
from longmix.data.synthetic.variable_tracking import VariableTracking
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import ByteTokenizer, NumberTokenizer
from longmix.errors import ConfigError, DataError
from longmix.evaluation.run import evaluate
from longmix.generation.run import generate
from longmix.training.run import train


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


def test_recall_without_noise_has_a_blank_between_the_queries():
    (window,) = examples(MultiQueryRecall(vocabulary=64, pairs=5, random_non_queries=False), 40, 1)
    queries = predicted(window)
    assert (window.tokens[10:] == 0).sum() == 30 - 5 and (window.tokens[queries] > 0).all()


def test_three_tokens_match_where_two_so_far_and_the_own_one_add_up_to_the_modulus():
    answers = []
    for window in examples(MatchThree(modulus=16, values=4), 32):
        tokens = window.tokens.tolist()
        assert len(set(tokens)) <= 4
        for place, token in enumerate(tokens):
            pairs = [(a + b + token) % 16 for a in tokens[: place + 1] for b in tokens[: place + 1]]
            assert window.targets[place] == (0 in pairs)
        answers += window.targets.tolist()
    assert 0.3 < np.mean(answers) < 0.7
    with pytest.raises(ConfigError, match=r"data\.task\.modulus=3 must be from data\.task\.values=4 to 4096"):
        MatchThree(modulus=3)


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


def assignments(window, task: VariableTracking) -> dict[int, list[int]]:
    """What an interpreter that reads the statements in order holds: names by value, in the order they got it."""
    mark, values, held = task.vocab_size - 2, {}, {}
    places = np.flatnonzero(window.tokens == mark)
    assert (np.diff(places) >= 3).all() and len(places) == task.chains * (task.hops + 1)
    noise = np.ones(len(window.tokens), bool)
    for place in places:
        name, source = window.tokens[place + 1 : place + 3].tolist()
        assert name < task.variables and name not in values
        values[name] = source if source >= task.variables else values[source]
        assert source >= task.variables or held[values[source]][-1] == source  # each hop is from the last one
        held.setdefault(values[name], []).append(name)
        noise[place : place + 3] = False
    (asked,) = np.flatnonzero(window.tokens == task.vocab_size - 1)
    between = window.tokens[:asked][noise[:asked]]
    first = task.variables + task.values
    assert ((between >= first) & (between < first + task.noise)).all()
    return held


@pytest.mark.parametrize(("hops", "chains"), [(0, 3), (1, 1), (3, 2)])
class TestVariables:
    def test_values_are_what_an_interpreter_finds(self, hops, chains):
        task, seen = VariableTracking(hops, chains, variables=20, values=9, noise=4), set()
        for window in examples(task, 60):
            held = assignments(window, task)
            assert [len(names) for names in held.values()] == [hops + 1] * chains
            places = predicted(window)
            assert places.tolist() == list(range(60 - chains * (hops + 1), 60))
            found = {name: value for value, names in held.items() for name in names}
            assert sorted(window.tokens[places]) == sorted(found)
            assert all(found[window.tokens[place]] == window.targets[place] for place in places)
            assert all(20 <= value < 29 for value in held)
            seen.add(int(np.flatnonzero(window.tokens == task.vocab_size - 2)[0]))
        assert len(seen) > 3  # they are scattered

    def test_variables_that_hold_a_value_are_named_in_order(self, hops, chains):
        task, asked = VariableTracking(hops, chains, variables=20, values=9, noise=4, question="variables"), []
        for window in examples(task, 60):
            held, places = assignments(window, task), predicted(window)
            assert places.tolist() == list(range(60 - hops - 1, 60))
            value = window.tokens[places[0]]
            assert window.targets[places].tolist() == held[value]
            assert window.tokens[places[1:]].tolist() == held[value][:-1]
            asked.append(list(held).index(value))
        assert set(asked) == set(range(chains))  # the chain that is asked for is not always the first to begin

    def test_the_shortest_example_has_no_noise(self, hops, chains):
        task, count = VariableTracking(hops, chains), chains * (hops + 1)
        (window,) = examples(task, 4 * count + 1, 1)
        assert len(assignments(window, task)) == chains
        assert (window.tokens[: 3 * count : 3] == task.vocab_size - 2).all() and len(predicted(window)) == count


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


@pytest.mark.slow
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
        (lambda: VariableTracking(hops=-1), "data.task.hops=-1"),
        (lambda: VariableTracking(chains=0), "data.task.chains=0"),
        (lambda: VariableTracking(values=1), "data.task.values=1 must be at least 2"),
        (lambda: VariableTracking(noise=0), "data.task.noise=0"),
        (lambda: VariableTracking(variables=5), "data.task.variables=5 must be at least 6"),
        (lambda: examples(VariableTracking(), 24), "seq_len=24 is too short for 6 assignments and the question"),
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("group_words", "things", 5),
        ("parity", "things", 2),
        ("s3", "things", 3),
        ("s5", "things", 5),
        ("copying", "scattered", False),
        ("match3", "modulus", 16),
        ("palindrome", "reverse", True),
        ("forgetting_mqar", "updates", 4),
        ("stacked_mqar", "passes", 1),
        ("stacks", "stacks", 64),
        ("selective_copying", "scattered", True),
        ("variables", "question", "value"),
    ],
)
def test_every_task_has_its_word(compose_config, name, setting, value):
    node = resolved(compose_config(f"data={name}"))["data"]
    assert node["task"][setting] == value
    build(node, "data", tokenizer=ByteTokenizer(), seq_len=64, batch_size=1, seed=0)


TASKS = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "configs" / "data").glob("*.yaml")
    if "SyntheticData" in path.read_text() or path.stem in ("parity", "s3", "s5", "selective_copying", "palindrome")
)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("word", ["tokenizer=bpe", "tokenizer=bytes", "tokenizer.vocab_size=300"])
def test_a_tokenizer_has_no_use(compose_config, name, word):
    words = [word] if word.startswith("tokenizer=") else ["tokenizer=bpe", word]
    with pytest.raises(ConfigError, match=r"has no use: .*[Ll]eave (it|tokenizer=) out"):
        train(compose_config(f"data={name}", *words, "logger=csv", "trainer=cpu"))


def test_a_split_that_there_is_not():
    with pytest.raises(DataError, match="no split 'dev'; it has train, validation, test"):
        data().evaluation_windows("dev", 24, None)
