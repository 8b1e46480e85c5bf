"""Bytes between devices and seconds of a step, against sums made by hand."""

import dataclasses

import pytest

from longmix.accelerators import ACCELERATORS
from longmix.planning.arguments import read
from longmix.planning.dry_run import OptimizerNeeds, Part, Rehearsal, Setting
from longmix.planning.memory import Division
from longmix.planning.traffic import (
    BANDWIDTH_SHARE,
    LINK_SHARE,
    UTILISATION,
    Traffic,
    step_time,
    traffic_of,
    training_flops,
)

SETTING = Setting(1, 64, "bf16-mixed", sharded=False, accumulates=False, checkpointing="none", device="cuda")
ENDS = Part(0, 0, 0, 0, 4_000, 1_000, moved=10**9)
LAYER = Part(0, 0, 0, 0, 40_000, 10_000, moved=2 * 10**9)
REHEARSAL = Rehearsal(ENDS, [LAYER, LAYER])
H200 = ACCELERATORS["H200"]


@pytest.fixture(scope="module")
def model():
    sizes = ("model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.mlp_hidden=48", "seq_len=256")
    return read(["mixer=flash", *sizes]).model()


def test_one_device_sends_nothing():
    assert traffic_of(REHEARSAL, SETTING, Division(1, 1, "single", 1)) == Traffic(0, 0, 0)


def test_ddp_all_reduces_gradients_once_a_step():
    for micro_batches in (1, 3):
        sent = traffic_of(REHEARSAL, SETTING, Division(8, 1, "ddp", micro_batches))
        assert sent == Traffic(gradients=2 * 4 * 21_000 * 7 // 8, weights=0, context=0)


def test_fsdp_gathers_weights_for_each_pass_and_scatters_gradients():
    setting = dataclasses.replace(SETTING, sharded=True)
    sent = traffic_of(REHEARSAL, setting, Division(8, 1, "fsdp", 3))
    assert sent.gradients == 3 * (4 * 21_000 * 7 // 8)
    assert sent.weights == 3 * 4 * (1_000 + 2 * 20_000) * 7 // 8
    assert sent.total == sent.gradients + sent.weights


def test_fsdp_gathers_rounded_weights_in_two_bytes():
    setting = dataclasses.replace(SETTING, sharded=True, precision="bf16-mixed")
    rehearsal = Rehearsal(dataclasses.replace(ENDS, rounded=400), [dataclasses.replace(LAYER, rounded=9_000)] * 2)
    sent = traffic_of(rehearsal, setting, Division(8, 1, "fsdp", 1))
    assert sent.weights == (600 * 4 + 400 * 2 + 2 * 2 * (1_000 * 4 + 9_000 * 2)) * 7 // 8


def test_slices_exchange_keys_and_values_in_every_pass():
    rehearsal = Rehearsal(ENDS, [dataclasses.replace(LAYER, received=size) for size in (100, 20)])
    sent = traffic_of(rehearsal, SETTING, Division(4, 4, "ddp", 5))
    assert sent.context == 5 * 2 * 120
    again = traffic_of(rehearsal, dataclasses.replace(SETTING, checkpointing="block"), Division(4, 4, "ddp", 1))
    assert again.context == 3 * 120


def test_recomputing_adds_a_forward_pass_of_the_layers(model):
    forward = model.flops(256)
    head = 2 * 256 * 32 * model.vocab_size
    layers = forward - head
    parts = Rehearsal(ENDS, [dataclasses.replace(LAYER, again=0.25)] * len(model.blocks))
    plain, whole, some = (
        (Rehearsal(ENDS, [LAYER] * len(model.blocks)), "none"),
        (parts, "block"),
        (parts, "selective"),
    )
    for (rehearsal, kind), again in ((plain, 0), (whole, 3 * layers), (some, 3 * layers // 4)):
        setting = dataclasses.replace(SETTING, checkpointing=kind, device="cpu")
        assert training_flops(model, 3, 256, rehearsal, setting) == (9 * forward, 9 * forward + again), kind


def test_a_head_in_slices_goes_forward_again(model):
    rows = 2**24 // (256 * model.vocab_size) + 1
    head = 2 * 256 * 32 * model.vocab_size
    asked, computed = training_flops(
        model, rows, 256, Rehearsal(ENDS, [LAYER] * len(model.blocks)), dataclasses.replace(SETTING, device="cpu")
    )
    assert computed - asked == rows * head


def seconds(traffic: Traffic, gpus: int, precision: str = "bf16-mixed", sharded: bool = False):
    setting = dataclasses.replace(SETTING, precision=precision, sharded=sharded)
    needs = OptimizerNeeds(state=168_000, working=0)
    return step_time(H200, (6e14, 8e14), REHEARSAL, needs, traffic, setting, Division(gpus, 1, "ddp", 2))


def test_the_time_of_a_step_is_arithmetic_and_memory_one_after_the_other():
    time = seconds(Traffic(0, 0, 0), 1)
    assert time.products == pytest.approx(8e14 / (989e12 * UTILISATION))
    moved = 2 * 5e9 + 3 * 4 * 21_000 + 2 * 168_000
    assert time.others == pytest.approx(moved / (4.8e12 * BANDWIDTH_SHARE))
    assert time.total == time.products + time.others
    assert time.utilisation == pytest.approx(6e14 / 989e12 / time.total)
    assert seconds(Traffic(0, 0, 0), 1, "32-true").products == pytest.approx(8e14 / (67e12 * UTILISATION))


def test_an_exchange_hides_as_far_as_it_is_shorter_and_slices_do_not():
    alone = seconds(Traffic(0, 0, 0), 8).total
    hidden = seconds(Traffic(10**9, 0, 0), 8)
    assert hidden.exchange == pytest.approx(1e9 / (450e9 * LINK_SHARE))
    assert hidden.total == alone
    long = seconds(Traffic(10**12, 10**12, 0), 8)
    assert long.total == long.exchange == pytest.approx(2e12 / (450e9 * LINK_SHARE))
    assert seconds(Traffic(0, 0, 10**12), 8).total == pytest.approx(alone + 1e12 / (450e9 * LINK_SHARE))


def test_between_nodes_network_cards_are_the_slowest_link():
    assert seconds(Traffic(10**9, 0, 0), 16).exchange == pytest.approx(1e9 / (400e9 * LINK_SHARE))


def test_copies_to_the_host_wait_as_far_as_they_are_longer_than_their_pass(model):
    parts = [dataclasses.replace(LAYER, offloaded=size) for size in (700, 0)]
    assert traffic_of(Rehearsal(ENDS, parts), SETTING, Division(1, 1, "single", 3)).host == 3 * 700
    assert seconds(Traffic(0, 0, 0, host=10**9), 1).host == 0
    alone = seconds(Traffic(0, 0, 0), 1).total
    forward = alone * (6 / 3) / 8  # a third of what the model asks for, of all that is computed
    between = 64e9 * LINK_SHARE * (alone / 2)  # longer than the forward pass, shorter than the backward pass
    assert seconds(Traffic(0, 0, 0, host=round(between)), 1).host == pytest.approx(alone / 2 - forward)
    long = seconds(Traffic(0, 0, 0, host=10**12), 1)
    assert long.total == pytest.approx(2 * 1e12 / (64e9 * LINK_SHARE))
