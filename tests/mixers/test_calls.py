"""How a mixer may be called: sizes that fit, ids that begin anywhere, half precision around it, compiled steps."""

import pytest
import torch
from mixer_table import CONFIGURED, MIXERS, SHAPE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.head_decay import HeadDecay
from longmix.mixers.parts.kept_keys import Kept
from longmix.mixers.parts.recurrent import RecurrentMixer
from longmix.mixers.parts.scatterbrain_summaries import Summaries
from longmix.model.rwkv_blocks import ChannelMix

CALLED = {**MIXERS, "channel-mix": lambda: ChannelMix(SHAPE, 0, 24)}


@pytest.fixture(params=CALLED)
def mixer(request) -> Mixer:
    torch.manual_seed(1)
    return CALLED[request.param]().double()


def tokens(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def ids_of(*values: int) -> torch.Tensor:
    """Two rows of 29 tokens in documents with these ids."""
    lengths = torch.tensor([4, 1, 17, 7]), torch.tensor([20, 6, 2, 1])
    return torch.stack([torch.tensor(values, dtype=torch.int32).repeat_interleave(row) for row in lengths])


WIDTH = SHAPE.d_model
UNFIT = [
    ((29, WIDTH), r"x has shape \[29, 48\]; allowed is \[B, T, 48\]"),
    ((2, 29, 1, WIDTH), r"x has shape \[2, 29, 1, 48\]; allowed is \[B, T, 48\]"),
    ((2, 29, WIDTH + 1), r"x has shape \[2, 29, 49\]; allowed is \[B, T, 48\]"),
    ((2, 0, WIDTH), r"x has shape \[2, 0, 48\]; .* every size at least 1"),
    ((0, 29, WIDTH), r"x has shape \[0, 29, 48\]; .* every size at least 1"),
]


def test_tokens_of_another_shape_are_refused(mixer):
    for sizes, words in UNFIT:
        for state in (None, mixer.init_state(2)):
            with pytest.raises(ValueError, match=words):
                mixer(tokens(*sizes), state=state)


def test_ids_and_states_that_do_not_fit_the_tokens_are_refused(mixer):
    x = tokens(2, 29, WIDTH)
    for ids in (torch.zeros(2, 28, dtype=torch.int32), torch.zeros(29, dtype=torch.int32), torch.zeros(2, 29)):
        with pytest.raises(ValueError, match=r"document_ids is torch.*; allowed is torch.int32 \[2, 29\], as x"):
            mixer(x, document_ids=ids)
    with pytest.raises(ValueError, match="state has 3 rows and x has 2"):
        mixer(x, state=mixer.init_state(3))


def test_a_state_of_another_mixer_is_refused():
    attention, decayed = Flash(SHAPE, 0), HeadDecay(SHAPE, 0, decay="alibi")
    x = torch.zeros(2, 3, WIDTH)
    with pytest.raises(ValueError, match="state is a RecurrentState; allowed is AttentionState, from init_state"):
        attention(x, state=decayed.init_state(2))
    with pytest.raises(ValueError, match="state is a AttentionState; allowed is RecurrentState"):
        decayed(x, state=attention.init_state(2))


NUMBERED = {
    "negative": (-5, -3, -1, 4),
    "extreme": (-(2**31), -(2**31) + 1, 2**31 - 2, 2**31 - 1),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("values", NUMBERED.values(), ids=NUMBERED)
@pytest.mark.parametrize("split", [(4, 1, 17, 7), (3, 1, 1, 15, 9)], ids=str)
def test_ids_may_begin_anywhere(mixer, values, split):
    """Documents are told apart by their ids, in one pass and from state to state, whatever these are."""
    x = tokens(2, 29, WIDTH)
    wanted = mixer(x, document_ids=ids_of(0, 1, 2, 3)).y
    torch.testing.assert_close(mixer(x, document_ids=ids_of(*values)).y, wanted, rtol=0, atol=1e-12)
    state, pieces = mixer.init_state(2), []
    for part, ids in zip(x.split(split, 1), ids_of(*values).split(split, 1), strict=True):
        output = mixer(part, state=state, document_ids=ids)
        state = output.state
        pieces.append(output.y)
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=0, atol=1e-12)


@pytest.mark.sampled(3)
def test_rows_without_ids_are_document_0(mixer):
    """So ids that follow go on with it, or begin another document."""
    x = tokens(2, 29, WIDTH)
    for value in (0, 7):
        first = mixer(x[:, :11], state=mixer.init_state(2))
        ids = torch.full((2, 18), value, dtype=torch.int32)
        found = torch.cat((first.y, mixer(x[:, 11:], state=first.state, document_ids=ids).y), 1)
        parts = [x] if value == 0 else [x[:, :11], x[:, 11:]]
        torch.testing.assert_close(found, torch.cat([mixer(part).y for part in parts], 1), rtol=0, atol=1e-12)


def test_autocast_leaves_states_and_gates_exact(mixer):
    """What a GPU runs in half precision: everything but gates and memories, which an engine would refuse."""
    mixer = mixer.float()
    x = tokens(2, 29, WIDTH).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = mixer(x, document_ids=ids_of(0, 1, 2, 3))
        loss = output.y.float().square().mean() + sum(output.losses.values())
    loss.backward()
    for found in (output.y, x.grad, *(weight.grad for weight in mixer.parameters())):
        assert found is None or found.isfinite().all()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        begun = mixer(x[:, :20], state=mixer.init_state(2)).state
        state = mixer(x[:, 20:21], state=begun).state
    far = getattr(state, "far", None)
    if isinstance(far, Summaries):  # keys and values, in whose dtype an engine takes them
        far = None
    elif isinstance(far, Kept):
        far = far.score, far.gate
    for part in tree_leaves([getattr(state, "carried", None), far]):
        if isinstance(part, torch.Tensor) and part.is_floating_point():
            assert part.dtype in (torch.float32, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURED)
def test_a_step_compiles_into_one_graph(name):
    torch.manual_seed(1)
    mixer = CONFIGURED[name]().eval()
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(token, state):
        output = mixer(token, state=state)
        return output.y, output.state

    x = tokens(2, 30, WIDTH).float()
    with torch.no_grad():
        for ids in (None, ids_of(0, 1, 2, 3)):
            # A ring is written in place, so each way has a state of its own.
            states = [mixer(x[:, :29], state=mixer.init_state(2), document_ids=ids).state for _ in range(2)]
            found, _ = step(x[:, 29:], states[0])
            torch.testing.assert_close(found, mixer(x[:, 29:], state=states[1]).y)


RECURRENT = [name for name, make in CALLED.items() if isinstance(make(), RecurrentMixer)]


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrence_goes_on_with_documents_and_waits_for_nothing(name):
    """Fake tensors have no values: whatever waits for one raises."""
    mixer = CALLED[name]()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x, ids = torch.empty(2, 29, WIDTH), torch.empty(2, 29, dtype=torch.int32)
        output = mixer(x, state=mixer.init_state(2), document_ids=ids)
        assert output.y.shape == x.shape and output.state is not None
