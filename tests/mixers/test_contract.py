"""What every mixer must keep, checked for each entry of one table; a new mixer adds one entry."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longmix.errors import ConfigError
from longmix.mixers.base import Mixer, ModelShape
from longmix.mixers.flash import Flash
from longmix.mixers.sliding_window import SlidingWindow

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)

MIXERS = {
    "flash": lambda: Flash(SHAPE, 0),
    "flash-grouped": lambda: Flash(SHAPE, 0, num_kv_heads=1),
    "flash-no-norm": lambda: Flash(SHAPE, 0, qk_norm=False),
    "window-1": lambda: SlidingWindow(SHAPE, 0, window=1),
    "window-7": lambda: SlidingWindow(SHAPE, 0, window=7),
    "window-longer-than-row": lambda: SlidingWindow(SHAPE, 0, window=500, num_kv_heads=1),
}
SPLITS = {"whole": (29,), "steps": (1,) * 29, "mixed": (5, 1, 1, 13, 1, 8)}


@pytest.fixture(params=MIXERS)
def mixer(request) -> Mixer:
    torch.manual_seed(1)
    return MIXERS[request.param]().double()


def inputs(length: int = 29) -> torch.Tensor:
    return torch.randn(2, length, SHAPE.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def packed_ids() -> torch.Tensor:
    lengths = [(4, 1, 17, 7), (20, 6, 2, 1)]
    return torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(row)) for row in lengths]).int()


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_prefill_and_steps_equal_one_pass(mixer, split, packed):
    x, ids = inputs(), packed_ids() if packed else None
    whole = mixer(x, document_ids=ids).y
    state, pieces, start = mixer.init_state(2), [], 0
    for length in split:
        piece = slice(start, start + length)
        output = mixer(x[:, piece], state=state, document_ids=None if ids is None else ids[:, piece])
        state, start = output.state, start + length
        pieces.append(output.y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)


def test_ids_left_out_continue_the_last_document(mixer):
    x, ids = inputs(), packed_ids()
    ids[:, 20:] = ids[:, 20:21]
    first = mixer(x[:, :21], state=mixer.init_state(2), document_ids=ids[:, :21])
    second = mixer(x[:, 21:], state=first.state)
    whole = mixer(x, document_ids=ids).y
    torch.testing.assert_close(torch.cat((first.y, second.y), dim=1), whole, rtol=0, atol=1e-12)


def test_later_tokens_never_change_earlier_outputs(mixer):
    x = inputs()
    before = mixer(x).y
    for cut in (0, 11, 27):
        changed = x.clone()
        changed[:, cut + 1 :] = 1e4 * torch.randn_like(changed[:, cut + 1 :])
        assert torch.equal(mixer(changed).y[:, : cut + 1], before[:, : cut + 1])


def test_a_packed_document_equals_the_document_alone(mixer):
    x, ids = inputs(), packed_ids()
    packed = mixer(x, document_ids=ids).y
    for row in range(2):
        for document in range(4):
            place = (ids[row] == document).nonzero()[:, 0]
            alone = mixer(x[row : row + 1, place]).y
            torch.testing.assert_close(packed[row : row + 1, place], alone, rtol=0, atol=1e-12)


def test_every_parameter_gets_a_gradient(mixer):
    mixer(inputs(), document_ids=packed_ids()).y.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        # one visible key has weight 1 whatever its score: but for rounding, nothing reaches query and key
        unreached = isinstance(mixer, SlidingWindow) and mixer.window == 1 and name.startswith(("query", "key"))
        assert bool(parameter.grad.abs().max() > 1e-9) != unreached, name


def test_without_a_state_none_is_returned(mixer):
    assert mixer(inputs()).state is None


def test_state_bytes_are_what_the_state_holds(mixer):
    output = mixer(inputs(), state=mixer.init_state(2))
    held = (output.state.key.nbytes + output.state.value.nbytes) // 2
    assert held == mixer.state_bytes(29)


def test_flops_equal_the_counted_matrix_products():
    mixer = Flash(SHAPE, 0).double()
    with FlopCounterMode(display=False) as counter:
        mixer(inputs())
    counts = counter.get_flop_counts()["Global"]
    projections = sum(count for operator, count in counts.items() if "scaled_dot_product" not in str(operator)) // 2
    pairs = 29 * 30 // 2
    assert mixer.flops(29) == projections + 4 * SHAPE.d_model * pairs


@pytest.mark.parametrize(("window", "length", "pairs"), [(1, 5, 5), (3, 5, 12), (5, 5, 15), (9, 5, 15)])
def test_visible_pairs_of_a_window(window, length, pairs):
    assert SlidingWindow(SHAPE, 0, window=window).visible_pairs(length) == pairs


REFUSED = {
    "heads": (lambda: Flash(SHAPE, 0, num_heads=5), "mixer.num_heads=5 does not divide model.d_model=48"),
    "model-heads": (lambda: Flash(ModelShape(48, 2, 5), 0), "model.num_heads=5 does not divide"),
    "kv-heads": (lambda: Flash(SHAPE, 0, num_kv_heads=2), "mixer.num_kv_heads=2 does not divide model.num_heads=3"),
    "zero-heads": (lambda: Flash(SHAPE, 0, num_heads=0), "mixer.num_heads=0"),
    "odd-head": (lambda: Flash(SHAPE, 0, num_heads=16), "even"),
    "base": (lambda: Flash(SHAPE, 0, rotary_base=1.0), "mixer.rotary_base"),
    "window": (lambda: SlidingWindow(SHAPE, 0, window=0), "mixer.window=0"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_impossible_settings_are_refused_by_name(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
