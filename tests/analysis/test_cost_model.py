"""What a token costs: counts against closed forms and against states that are there."""

from pathlib import Path

import pytest
import torch

from longmix.accelerators import ACCELERATORS
from longmix.analysis.cost_model import StepCost, first_context, intensity, step_cost
from longmix.mixers.parts.recurrent import RecurrentMixer
from longmix.mixers.parts.states import held_bytes

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))


WIDTH, LAYERS, HEADS = 64, 2, 4


def tokens(length: int) -> torch.Tensor:
    return torch.randint(20, (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_counted_bytes_are_those_of_the_state_that_is_there(small_model, name):
    model = small_model(name, dtype=torch.float32)
    state, length = model.init_state(2), 0
    for piece in (1, 12, 2, 1, 17, 1, 26):
        state = model(tokens(2 * piece).view(2, piece), state=state).state
        length += piece
        assert held_bytes(state)[0] == 2 * model.state_bytes(length) > 0


@pytest.mark.parametrize("name", NAMES)
def test_no_step_moves_more_than_twice_what_is_held_and_costs_are_positive(small_model, name):
    model = small_model(name, dtype=torch.bfloat16)
    for context in (1, 100, 1000):
        cost = step_cost(model, context)
        assert cost.parameter_flops > 0
        assert cost.mixing_flops > 0 or name == "qlstm"  # whose memory goes channel by channel, without products
        own = LAYERS * 2 * WIDTH * 2  # keys and values of the token itself, which are not held yet
        assert 0 < cost.state_bytes <= 2 * cost.held_bytes + own
        if all(isinstance(mixer, RecurrentMixer) for mixer in model.mixers()):
            assert cost.state_bytes == 2 * cost.held_bytes == 2 * model.state_bytes(1)


def test_flash_costs_what_the_closed_form_says(small_model):
    model = small_model("flash", dtype=torch.bfloat16)
    cost = step_cost(model, context=99)
    matrices = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * 32) + 20 * WIDTH
    assert cost.parameter_flops == 2 * matrices
    assert cost.mixing_flops == LAYERS * 4 * WIDTH * 100
    assert cost.state_bytes == LAYERS * 2 * WIDTH * 2 * 100 and cost.held_bytes == LAYERS * 2 * WIDTH * 2 * 99
    counts = model.parameter_counts()
    assert cost.weight_bytes == 2 * counts["non_embedding"]
    assert step_cost(model, 99, batch=4).weight_bytes == cost.weight_bytes / 4
    assert step_cost(model, 99, batch=4).state_bytes == cost.state_bytes


def test_many_steps_cost_what_the_paper_sums_them_to(small_model):
    """2 P T + 2 (2 c + T) T a FLOP, and (2 c + T) T m elements of keys and values, in Kinetics' notation for n = 1."""
    model, prompt, generated = small_model("flash", "mixer.num_kv_heads=2", dtype=torch.bfloat16), 200, 100
    costs = [step_cost(model, context) for context in range(prompt, prompt + generated)]
    width, kv_width = LAYERS * WIDTH, LAYERS * WIDTH // 2
    pairs = (2 * prompt + generated) * generated + generated  # discrete steps see their own key too
    assert sum(cost.mixing_flops for cost in costs) == 2 * pairs * width
    assert sum(cost.state_bytes for cost in costs) == 2 * pairs * kv_width


def test_a_window_a_state_and_sums_stop_growing(small_model):
    for name in ("sliding_window", "mlstm_tfla", "scatterbrain", "routing"):
        model = small_model(name)
        at = [step_cost(model, context) for context in (320, 3200)]
        assert at[0].state_bytes == at[1].state_bytes and at[0].held_bytes == at[1].held_bytes, name
    flash = [step_cost(small_model("flash"), context).state_bytes for context in (320, 3200)]
    assert flash[1] > 9 * flash[0]


def test_a_step_reads_what_the_mixer_sees(small_model):
    number = 2 * WIDTH * 8  # a key and a value, in float64
    assert step_cost(small_model("sliding_window"), 500).state_bytes == LAYERS * 8 * number
    # 500 earlier keys and its own in 4 buckets, and a label of 4 bytes for each head of those that are held
    visible = 501 * 502 // 2 // 4 - 500 * 501 // 2 // 4
    assert step_cost(small_model("sparse_flash"), 500).state_bytes == LAYERS * (visible * number + 4 * HEADS * 500)
    # the last rows of a block of 8 see that and the one before it, and 8 features have sums of 16 channels and 2 more
    sums = HEADS * 8 * 18 * 8
    assert step_cost(small_model("scatterbrain"), 8 * 40 - 1).state_bytes == LAYERS * (16 * number + sums)


def test_a_tied_head_is_read_whole(small_model):
    model = small_model("flash", "model.tie_head=true")
    assert step_cost(model, 8).weight_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_costs_add_up_in_efflop():
    cost = StepCost(1, parameter_flops=10, mixing_flops=3, weight_bytes=7, state_bytes=2, held_bytes=0)
    assert (cost.parameters(100), cost.mixing(100), cost.total(100)) == (710, 203, 913)
    for name, dtype, wanted in (("H200", "bfloat16", 206), ("B200", "bfloat16", 281), ("H200", "float32", 14)):
        assert intensity(ACCELERATORS[name], getattr(torch, dtype)) == pytest.approx(wanted, abs=0.5)


@pytest.mark.parametrize(
    ("holds", "context"), [([0, 1, 1], 2), ([1, 0, 1], 3), ([1, 1, 1], 1), ([1, 1, 0], None), ([0, 0, 0], None)]
)
def test_a_break_even_holds_up_to_the_last_context(holds, context):
    assert first_context([1, 2, 3], [bool(hold) for hold in holds]) == context
