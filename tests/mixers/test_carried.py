"""State from window to window: windows that carry it are one long window, for every mixer whose state stays small."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from mixer_table import MIXERS, SHAPE

from longmix.mixers.parts import recurrent
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.recurrent import RecurrentMixer, select
from longmix.mixers.parts.states import mapped
from longmix_kernels.simulated import simulated_gpu

WINDOW, WINDOWS = 11, 4
LENGTHS = [(44,), (4, 1, 17, 22), (11, 11, 20, 2)]
"""Documents of each row: one; borders inside windows; borders between them."""


BOUNDED = [name for name, make in MIXERS.items() if make().state_is_bounded()]
RECURRENT = [name for name in BOUNDED if name.startswith("configs-") and isinstance(MIXERS[name](), RecurrentMixer)]


@pytest.fixture(params=BOUNDED)
def mixer(request) -> Mixer:
    torch.manual_seed(1)
    return MIXERS[request.param]().double()


def test_which_states_stay_small():
    """Of the mixers that have a file: recurrent ones, windows, and sums or rings of bounded size."""
    found = {name.removeprefix("configs-") for name in BOUNDED if name.startswith("configs-")}
    recurrent = {
        "comba",
        "deltanet",
        "gated_deltanet",
        "gated_deltanet2",
        "gated_deltaproduct",
        "gla",
        "hgrn2",
        "kda",
        "lightning",
        "mamba2",
        "mlstm_tfla",
        "qlstm",
        "retention",
        "rwkv7",
        "simple_gla",
        "wersa",
    }
    assert found == recurrent | {
        "sliding_window",
        "routing",
        "scatterbrain",
        "scatterbrain_content",
        "sparsek",
        "ponet",
        "tensor",
    }


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(3, WINDOWS * WINDOW, SHAPE.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS]
    return x, torch.stack(ids).int()


def test_windows_with_carried_state_equal_one_long_window(mixer):
    x, ids = inputs()
    whole = mixer(x, document_ids=ids).y
    state, found = mixer.state_between_documents(3), []
    for start in range(0, x.shape[1], WINDOW):
        window = slice(start, start + WINDOW)
        output = mixer(x[:, window], state=state, document_ids=ids[:, window])
        state = mapped(output.state, lambda part: part.detach().clone())
        found.append(output.y)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-12)


def test_no_document_goes_on_from_the_state_between_documents(mixer):
    """Whatever number the first document has."""
    x, ids = inputs()
    output = mixer(x, state=mixer.state_between_documents(3), document_ids=ids + 5)
    torch.testing.assert_close(output.y, mixer(x, document_ids=ids).y, rtol=0, atol=1e-12)


def over_documents_twice(run: Callable, fresh: Any, carried: Any, goes_on: Any, ids: Any, *, zero: bool) -> Any:
    """Every document from either state, and then the choice: what one pass over packed rows has to equal."""
    carried = select(goes_on, carried, fresh)
    first = ids == ids[:, :1]
    (output, final), (other_output, other_final) = run(carried, ids, None), run(fresh, ids, None)
    chosen = torch.where(first.view(*first.shape, *[1] * (output.dim() - 2)), output, other_output)
    return chosen, select(first[:, -1], final, other_final)


def carried_and_packed(mixer: Mixer) -> list[torch.Tensor]:
    """The output and all gradients of rows that go on from a state, the documents that follow from a tuned one."""
    x, ids = inputs()
    state = mixer(x[:, :WINDOW], state=mixer.init_state(3), document_ids=ids[:, :WINDOW]).state
    output = mixer(x[:, WINDOW:], state=state, document_ids=ids[:, WINDOW:]).y
    wanted = [weight for weight in mixer.parameters() if weight.requires_grad]
    return [output, *torch.autograd.grad(output.sin().sum(), wanted, materialize_grads=True)]


@pytest.mark.parametrize("mixer", RECURRENT, indirect=True)
def test_packed_rows_that_carry_take_one_pass(mixer, monkeypatch):
    """Half the launches of two passes, and the same outputs and gradients."""
    mixer.tune_states()
    for weight in mixer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    found, launches = [], []
    for over_documents in (recurrent.over_documents, over_documents_twice):
        monkeypatch.setattr(recurrent, "over_documents", over_documents)
        found.append(carried_and_packed(mixer))
        x, ids = inputs()
        single = deepcopy(mixer).float()
        with simulated_gpu(90) as gpu, torch.no_grad():
            single(x.float(), state=single.state_between_documents(3), document_ids=ids)
        launches.append(gpu.num_launches())
    assert 2 * launches[0] == launches[1] > 0
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-12)
