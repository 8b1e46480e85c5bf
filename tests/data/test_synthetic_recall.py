"""Recall with updated values, with whole pairs as tokens, palindromes and stacks; and training on examples again."""

import numpy as np
import pytest
import torch

from longmix.batch import IGNORE_INDEX
from longmix.data.synthetic.base import SyntheticData, SyntheticWindows
from longmix.data.synthetic.recall import ForgettingRecall, StackedRecall
from longmix.data.synthetic.stacks import Stacks
from longmix.data.synthetic.tasks import Copying, MultiQueryRecall
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError


def examples(task, length: int, count: int = 50):
    windows = SyntheticWindows(task, length, "train", 3, count)
    return [windows.sample(index) for index in range(count)]


def predicted(window):
    return np.flatnonzero(window.targets != IGNORE_INDEX)


@pytest.mark.parametrize("updates", [0, 3, 5])
def test_forgetting_asks_for_the_value_that_came_last(updates):
    for window in examples(ForgettingRecall(vocabulary=24, pairs=5, updates=updates), 2 * (5 + updates) + 14):
        told = window.tokens[: 2 * (5 + updates)].reshape(-1, 2).tolist()
        assert len({key for key, _ in told}) == 5 and all(0 < key < 12 <= value < 24 for key, value in told)
        first, last = dict(reversed(told)), dict(told)
        assert sum(first[key] != last[key] for key in last) == updates
        places = predicted(window)
        assert sorted(window.tokens[places]) == sorted(last) and places.min() >= 2 * (5 + updates)
        assert all(last[window.tokens[place]] == window.targets[place] for place in places)


def test_forgetting_without_updates_has_the_layout_of_mqar():
    (window,) = examples(ForgettingRecall(64, 5, 0, random_non_queries=False), 40, 1)
    assert (window.tokens[10:] == 0).sum() == 30 - 5 and (predicted(window) % 2 == 0).all()


@pytest.mark.parametrize("passes", [1, 3])
def test_stacked_pairs_are_told_so_often_and_asked_once(passes):
    task, orders = StackedRecall(keys=9, values=7, pairs=4, passes=passes), set()
    for window in examples(task, 4 * (passes + 1) + 2):
        assert (window.tokens[:2] == task.vocab_size - 1).all()
        told, asked = window.tokens[2:-4], window.tokens[-4:] - 63
        held = {pair // 7: pair % 7 for pair in told.tolist()}
        assert len(held) == len(set(held.values())) == 4
        assert sorted(told) == sorted([key * 7 + value for key, value in held.items()] * passes)
        assert predicted(window).tolist() == list(range(len(window.tokens) - 4, len(window.tokens)))
        assert [held[key] for key in asked.tolist()] == (window.targets[-4:] - 63 - 9).tolist()
        orders.add(tuple(told[:4] == told[-4:]))
    assert passes == 1 or len(orders) > 1


def test_palindromes_repeat_the_symbols_from_the_last_to_the_first():
    for window in examples(Copying(symbols=5, count=6, reverse=True), 13, 10):
        assert (window.targets[7:] == window.tokens[:6][::-1]).all() and window.tokens[7] == 6
        assert (window.tokens[8:] == window.targets[7:-1]).all() and len(predicted(window)) == 6


@pytest.mark.parametrize(("stacks", "length"), [(1, 31), (4, 96), (64, 300)])
def test_a_pop_gives_what_was_pushed_last_on_its_stack(stacks, length):
    task, deepest = Stacks(stacks=stacks, elements=5), 0
    for window in examples(task, length, 20):
        lead = length % 3
        assert (window.tokens[:lead] == task.vocab_size - 1).all()
        held: dict[int, list[int]] = {}
        pops = []
        for place in range(lead, length, 3):
            kind, stack, element = window.tokens[place : place + 3].tolist()
            assert 5 <= stack < 5 + stacks and element < 5
            if kind == task.vocab_size - 3:
                held.setdefault(stack, []).append(element)
            else:
                assert kind == task.vocab_size - 2 and held[stack].pop() == element == window.targets[place + 1]
                pops.append(place + 1)
            deepest = max(deepest, *map(len, held.values()))
        assert predicted(window).tolist() == pops and pops
    assert deepest > 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForgettingRecall(pairs=4, updates=5), "data.task.updates=5 must be at most data.task.pairs=4"),
        (lambda: ForgettingRecall(updates=-1), "data.task.updates=-1"),
        (lambda: ForgettingRecall(pairs=0, updates=0), "data.task.pairs=0"),
        (lambda: ForgettingRecall(vocabulary=16, pairs=8), "more than a vocabulary of 16"),
        (lambda: examples(ForgettingRecall(64, 4, 4), 23), "seq_len=23 is too short for 4 pairs, their updates"),
        (lambda: StackedRecall(keys=4, pairs=5), "data.task.pairs=5 must be at most data.task.keys=4"),
        (lambda: StackedRecall(values=4, pairs=5), "data.task.pairs=5 must be at most data.task.values=4"),
        (lambda: StackedRecall(passes=0), "data.task.passes=0"),
        (lambda: StackedRecall(keys=8192, values=8192), "the most are 16,777,216"),
        (lambda: examples(StackedRecall(pairs=4), 7), "seq_len=7 is too short for 4 pairs"),
        (lambda: Stacks(stacks=0), "data.task.stacks=0"),
        (lambda: Stacks(elements=1), "data.task.elements=1"),
        (lambda: examples(Stacks(), 5), "seq_len=5 is too short for a push and a pop"),
        (lambda: data(train_examples=0), "data.train_examples=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        make()


def data(**options) -> SyntheticData:
    return SyntheticData(
        MultiQueryRecall(64, 4), ByteTokenizer(), seq_len=24, batch_size=4, seed=0, validation_tokens=240, **options
    )


def test_examples_come_again_in_their_order():
    batches = list(data(train_examples=6).train_loader(0, 6))
    tokens = torch.cat([batch["tokens"] for batch in batches])
    assert torch.equal(tokens[:6], tokens[6:12]) and torch.equal(tokens[:12], tokens[12:])
    endless = torch.cat([batch["tokens"] for batch in data().train_loader(0, 6)])
    assert torch.equal(tokens[:6], endless[:6]) and not torch.equal(tokens[6:12], endless[6:12])
    assert data(train_examples=6).train_tokens_per_epoch == 6 * 24
    assert len(data(train_examples=6).evaluation_windows("validation", 24, 240)) == 10
    assert data().fingerprint().keys() == data(train_examples=6).fingerprint().keys() - {"train_examples"}
