"""Buffers of FSDP2 at each moment, of layers whose sizes are made up here."""

import dataclasses

import pytest

from longmix.planning.communication import Buffers, ShardedBuffers
from longmix.planning.dry_run import Part, Rehearsal


def part(parameters: int, rounded: int = 0) -> Part:
    return Part(10, 0, 0, 0, 4 * parameters, parameters, moved=0, rounded=rounded)


ENDS, LAYERS = part(1000), [part(10), part(30), part(20)]
WHOLE = ShardedBuffers(Rehearsal(ENDS, LAYERS), processes=2, size=4, reduced=4)

AT = {
    ("gather", 0): 1000 + 10 + 1000,  # the ends' own buffer is still there
    ("gather", 1): 1000 + 2 * 30,
    ("gather", 2): 1000 + 20 + 30,
    ("forward", 1): 1000 + 2 * 30,
    ("gather_again", 2): 1000 + 20 + 30,
    ("gather_again", 1): 1000 + 20 + 2 * 30,
    ("backward", 2): 1000 + 20 + 30,
    ("backward", 1): 1000 + 20 + 30 + 10,
    ("backward", 0): 1000 + 30 + 10,
    ("exchange", 2): 1000 + 30 + 2 * 20 + 10,
    ("exchange", 0): 1000 + 2 * 10 + 5,
}


@pytest.mark.parametrize(("moment", "index"), AT)
def test_what_is_gathered_and_sent_lasts_until_the_next_layer(moment, index):
    assert getattr(WHOLE, moment)(index) == 4 * AT[moment, index]


def test_before_and_after_the_layers():
    assert (WHOLE.loss, WHOLE.embedding, WHOLE.always) == (4 * 1020, 4 * 1500, 0)
    halves = ShardedBuffers(Rehearsal(ENDS, LAYERS), processes=2, size=2, reduced=2)
    assert halves.exchange(2) * 2 == WHOLE.exchange(2)


def test_weights_that_travel_rounded_have_memory_of_their_own_on_their_way():
    layers = [dataclasses.replace(LAYERS[0], rounded=6), *LAYERS[1:]]
    rounded = ShardedBuffers(Rehearsal(ENDS, layers), processes=2, size=4, reduced=4)
    travelling = (4 * 4 + 2 * 6) * 3 // 2  # what arrives, and half as much that is sent
    assert rounded.gather(0) == WHOLE.gather(0) + travelling
    assert rounded.gather_again(1) == 4 * (1000 + 20 + 30) + max(4 * 30, 4 * 10 + travelling)
    assert rounded.backward(1) == WHOLE.backward(1)


def test_others_are_as_large_at_every_moment():
    same = Buffers(7)
    assert {same.loss, same.embedding, same.always} == {7}
    assert {getattr(same, moment)(index) for moment, index in AT} == {7}
