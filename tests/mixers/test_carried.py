"""State from window to window: windows that carry it are one long window, for every mixer whose state stays small."""

import pytest
import torch
from mixer_table import MIXERS, SHAPE

from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.states import mapped

WINDOW, WINDOWS = 11, 4
LENGTHS = [(44,), (4, 1, 17, 22), (11, 11, 20, 2)]
"""Documents of each row: one; borders inside windows; borders between them."""


BOUNDED = [name for name, make in MIXERS.items() if make().state_is_bounded()]


@pytest.fixture(params=BOUNDED)
def mixer(request) -> Mixer:
    torch.manual_seed(1)
    return MIXERS[request.param]().double()


def test_which_states_stay_small():
    """Of the mixers that have a file: recurrent ones, windows, and sums or rings of bounded size."""
    found = {name.removeprefix("configs-") for name in BOUNDED if name.startswith("configs-")}
    recurrent = {
        "deltanet",
        "gated_deltanet",
        "gla",
        "kda",
        "lightning",
        "mlstm_tfla",
        "retention",
        "rwkv7",
        "simple_gla",
    }
    assert found == recurrent | {"sliding_window", "routing", "scatterbrain", "scatterbrain_content"}


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
