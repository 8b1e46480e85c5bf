"""The worst moment of a step, added up from parts whose sizes are made up here."""

import dataclasses

import pytest
import torch

from longmix.model.build import build_model
from longmix.planning.arguments import read
from longmix.planning.communication import Buffers
from longmix.planning.dry_run import (
    OptimizerNeeds,
    Part,
    Rehearsal,
    Setting,
    optimizer_needs,
    rehearse,
    rehearse_ends,
)
from longmix.planning.memory import CONTEXT_BYTES, USABLE, Division, Memory, _moments, memory_needed

SETTING = Setting(1, 64, "32-true", sharded=False, accumulates=False, checkpointing="none", device="cpu")
ONE = Division(processes=1, context_parallel=1, strategy="single", micro_batches=1)
OPTIMIZER = OptimizerNeeds(state=5_000, working=7)
LIMIT = 10**9


def small(*words: str):
    sizes = ("model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.mlp_hidden=48", "seq_len=64")
    return read(["gpu=cpu", *sizes, *words])


@pytest.fixture(scope="module")
def model():
    return small().model()


def part(parameters: int, kept: int = 0, forward: int = 0, backward: int = 0, output: int = 10) -> Part:
    return Part(output, kept, forward, backward, 4 * parameters, parameters, moved=0)


def needed(model, rehearsal, setting=SETTING, division=ONE) -> Memory:
    return memory_needed(model, rehearsal, OPTIMIZER, setting, division, LIMIT)


def ends_of(model, **sizes) -> Part:
    return part(sum(weight.numel() for weight in (model.embedding.weight, model.head.weight)), **sizes)


def test_the_loss_is_the_worst_where_activations_are_large(model):
    ends = ends_of(model, kept=500, forward=3, backward=50_000, output=1)
    rehearsal = Rehearsal(ends, [part(100, kept=90_000), part(100, kept=100_000)])
    memory = needed(model, rehearsal)
    assert memory.moment == "loss"
    parameters = ends.parameters + 200
    assert memory.parts == {
        "weights": 4 * parameters,
        "optimizer": 5_000,
        "data": 64 * 20,
        "activations": 90_000 + 100_000 + 2 * 10 + 500,
        "working": 50_000,
    }
    assert memory.total == sum(memory.parts.values())
    assert memory.limit == LIMIT


def test_a_backward_pass_of_the_last_layers_is_the_worst_where_it_needs_most(model):
    ends = ends_of(model)
    rehearsal = Rehearsal(ends, [part(100, kept=900), part(200, kept=1000, backward=10**6)])
    memory = needed(model, rehearsal)
    assert memory.moment == "backward of layer 1"
    assert memory.parts["activations"] == 10 + 900 + 10 + 1000  # its output is gone with what follows
    assert memory.parts["gradients"] == 4 * model.head.weight.numel()
    assert memory.parts["working"] == 10**6 + 10


def test_gradients_of_later_layers_are_there_in_the_backward_pass_of_earlier_ones(model):
    rehearsal = Rehearsal(ends_of(model), [part(100, backward=10**6), part(50_000), part(60_000)])
    memory = needed(model, rehearsal)
    assert memory.moment == "backward of layer 0"
    assert memory.parts["gradients"] == 4 * (110_000 + model.head.weight.numel())
    assert memory.parts["activations"] == 10


def test_layers_share_their_layouts_until_the_end_of_the_backward_pass(model):
    layers = [part(100, backward=10**6), part(100)]
    alone = needed(model, Rehearsal(ends_of(model), layers))
    shared = needed(model, Rehearsal(ends_of(model), layers, layouts=300))
    assert shared.moment == "backward of layer 0"
    assert shared.parts["activations"] - alone.parts["activations"] == 300


def test_a_forward_pass_may_be_the_worst(model):
    rehearsal = Rehearsal(ends_of(model), [part(10, kept=5, forward=10**7), part(10, kept=7)])
    memory = needed(model, rehearsal)
    assert memory.moment == "forward of layer 0"
    assert (memory.parts["activations"], memory.parts["working"]) == (25, 10**7)


def test_the_optimizer_is_the_worst_where_activations_are_small(model):
    rehearsal = Rehearsal(ends_of(model), [part(10**6), part(10**6)])
    memory = memory_needed(model, rehearsal, OptimizerNeeds(5_000, 10**7), SETTING, ONE, LIMIT)
    carrying = memory_needed(model, rehearsal, OptimizerNeeds(5_000, 10**7), SETTING, ONE, LIMIT, carried=700)
    assert carrying.parts == {**memory.parts, "carried state": 700}
    assert memory.moment == "optimizer"
    assert memory.parts["gradients"] == 4 * sum(each.parameters for each in (rehearsal.ends, *rehearsal.layers))
    assert memory.parts["working"] == 10**7
    halved = Division(2, 1, "fsdp", 1)
    divided = dataclasses.replace(SETTING, sharded=True)
    memory = memory_needed(model, rehearsal, OptimizerNeeds(5_000, 10**7, 4 * 10**6), divided, halved, LIMIT)
    assert memory.parts["working"] == 12 * 10**6


def test_gradients_of_earlier_micro_batches_are_there_from_the_beginning(model):
    rehearsal = Rehearsal(ends_of(model), [part(10**5), part(10**5, kept=10**6, forward=10**6)])
    memory = needed(model, rehearsal, division=dataclasses.replace(ONE, micro_batches=2))
    assert memory.moment == "forward of layer 1"
    assert memory.parts["gradients"] == 4 * (2 * 10**5 + rehearsal.ends.parameters)
    assert memory.parts["data"] == 2 * 64 * 20


def test_ddp_holds_a_second_copy_of_the_gradients_and_divides_nothing(model):
    rehearsal = Rehearsal(ends_of(model), [part(10**5), part(10**5)])
    memory = needed(model, rehearsal, division=Division(4, 1, "ddp", 1))
    parameters = 2 * 10**5 + rehearsal.ends.parameters
    assert memory.parts["communication"] == 4 * parameters == memory.parts["weights"]
    assert memory.parts["optimizer"] == 5_000


def test_fsdp_divides_weights_gradients_and_optimizer(model):
    rehearsal = Rehearsal(ends_of(model), [part(4 * 10**5), part(10**5)])
    setting = dataclasses.replace(SETTING, sharded=True, precision="bf16-mixed")
    memory = needed(model, rehearsal, setting, Division(4, 1, "fsdp", 1))
    parameters = 5 * 10**5 + rehearsal.ends.parameters
    assert memory.parts["weights"] == parameters
    assert memory.parts["optimizer"] == 1_250
    assert memory.moment == "gather of layer 0 again"
    assert memory.parts["communication"] == 4 * (rehearsal.ends.parameters + 2 * 4 * 10**5 + 10**5)
    rounded = Rehearsal(rehearsal.ends, [dataclasses.replace(rehearsal.layers[0], rounded=10**5), part(10**5)])
    more = needed(model, rounded, setting, Division(4, 1, "fsdp", 1))
    assert more.moment == "gather of layer 1 again"
    travelling = (4 * 3 + 2) * 10**5
    assert more.parts["communication"] == 4 * (rehearsal.ends.parameters + 5 * 10**5) + travelling * 5 // 4
    whole = needed(model, rehearsal, setting, Division(4, 1, "fsdp", 2))
    assert whole.parts["gradients"] == parameters  # 4 bytes each over 4 processes
    assert memory.parts["gradients"] <= parameters


def test_a_gpu_gives_less_than_its_sheet_says(model):
    rehearsal = Rehearsal(ends_of(model), [part(100)])
    on_gpu = dataclasses.replace(SETTING, device="cuda")
    one = memory_needed(model, rehearsal, OPTIMIZER, on_gpu, ONE, 10**11)
    two = memory_needed(model, rehearsal, OPTIMIZER, on_gpu, Division(2, 1, "ddp", 1), 10**11)
    assert one.limit == int((10**11 - CONTEXT_BYTES) * USABLE)
    assert two.limit == int((10**11 - 2 * CONTEXT_BYTES) * USABLE)


OPTIMIZERS = {"adamw": 8, "muon": 4}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_hold_what_their_classes_make(optimizer, device):
    request = small(f"optimizer={optimizer}", "mixer=flash")
    needs = optimizer_needs(dict(request.model().named_parameters()), request.config.optimizer, torch.float32, device)
    real = build_model(request.config, request.vocab_size)
    matrices = sum(weight.numel() for block in real.blocks for weight in block.parameters() if weight.dim() == 2)
    others = real.parameter_counts()["total"] - matrices
    counters = 4 * sum(1 for weight in real.parameters() if optimizer == "adamw" or weight.dim() != 2)
    counters += 0 if optimizer == "adamw" else 8  # Muon leaves embedding and head to AdamW
    assert needs.state == OPTIMIZERS[optimizer] * matrices + 8 * others + counters
    largest = 48 * 32
    if optimizer == "adamw":
        assert needs.working < 4 * largest
    else:
        # Those of one shape together, here 8 of 32 x 32: updates in float32, then some stacks in bf16 or float32.
        size = 2 if device == "cuda" else 4
        assert 8 * 32 * 32 * (4 + size) <= needs.working <= 8 * 32 * 32 * (4 + 4 * size)
        assert needs.exchanged == 3 * size * matrices


@pytest.mark.parametrize(("precision", "rounds"), [("bf16-mixed", True), ("32-true", False), ("bf16-true", False)])
def test_fsdp_rounds_the_matrices_of_products_on_their_way(precision, rounds):
    model = small("mixer=gla").model()
    setting = dataclasses.replace(SETTING, length=64, sharded=True, precision=precision)
    ends = rehearse_ends(model, setting)
    rehearsal = rehearse(model, setting, ends)
    layer = 4 * 32 * 32 + 3 * 48 * 32
    assert rehearsal.ends.rounded == (model.head.weight.numel() if rounds else 0)
    for part in rehearsal.layers:
        assert part.rounded >= layer if rounds else part.rounded == 0
        assert part.rounded < part.parameters


@pytest.mark.parametrize(("mixer", "numbers"), {"flash": 2 * 16 + 2, "gla": 0}.items())
def test_layouts_are_made_once_for_all_layers(mixer, numbers):
    model = small(f"mixer={mixer}").model()
    ends = rehearse_ends(model, SETTING)
    assert rehearse(model, SETTING, ends).layouts == 4 * 64 * numbers
    assert rehearse(model, dataclasses.replace(SETTING, rows=3), ends).layouts == 3 * 4 * 64 * numbers


def test_what_is_offloaded_is_there_for_two_layers_alone(model):
    """Inputs of 10 bytes: a layer's leave while the next one computes, and come back while the next one goes back."""
    ends = ends_of(model, output=1)
    sent = dataclasses.replace(part(100, forward=1_000, backward=1_000), offloaded=310, input_offloaded=10)
    last = part(100, kept=300, forward=1_000, backward=1_000)
    layers = [sent, sent, sent, last]
    setting = dataclasses.replace(SETTING, offloads=True)
    moments = {each.name: each for each in _moments(model, Rehearsal(ends, layers), setting, ONE, Buffers(0))}
    held = {name: moment.activations for name, moment in moments.items() if name.startswith("forward")}
    # The input of each, and what the one before sends; the last one keeps its own.
    assert list(held.values()) == [20, 20 + 310, 20 + 310, 20 + 310 + 300]
    assert moments["loss"].activations == 300 + 10 + 10 - 10
    back = {name: moment.activations + moment.working for name, moment in moments.items() if "backward" in name}
    assert back["backward of layer 3"] == 10 + 300 + 10 + 1_000 + 310
    assert back["backward of layer 2"] == back["backward of layer 1"] == 10 + 1_000 + 310
    assert back["backward of layer 0"] == 10 + 1_000
    assert needed(model, Rehearsal(ends, layers), setting).host == 3 * 512
