"""A token of generation after a state: what a pass over all tokens has there, at a cost that no context raises."""

from collections.abc import Iterator

import pytest
import torch
from mixer_table import CONFIGURED, SHAPE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.budget import VIEWS, WAITING
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.recurrent import RecurrentMixer

OPERATORS = {
    "comba": 51,
    "deltanet": 40,
    "gated_deltanet": 48,
    "gated_deltanet2": 54,
    "gated_deltaproduct": 59,
    "gla": 26,
    "hgrn2": 22,
    "kda": 50,
    "lightning": 22,
    "mamba2": 41,
    "mlstm_tfla": 32,
    "qlstm": 24,
    "retention": 41,
    "rwkv7": 66,
    "simple_gla": 23,
    "wersa": 48,
}
"""The most operators besides views in a step of each mixer with a state of constant size."""


class Cost(TorchDispatchMode):
    """Counts operators besides views, the bytes of their tensors, and those that read values on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        self.waits += name in WAITING
        if name.rstrip("_") not in VIEWS:
            self.operators += 1
            tensors = (x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def recurrent() -> Iterator[str]:
    for name, make in CONFIGURED.items():
        if isinstance(make(), RecurrentMixer):
            yield name.removeprefix("configs-")


RECURRENT = sorted(recurrent())


def mixer_of(name: str) -> Mixer:
    torch.manual_seed(0)
    return CONFIGURED[f"configs-{name}"]().eval()


@torch.no_grad()
def cost_after(mixer: Mixer, length: int) -> Cost:
    """The cost of one token after `length` others, which are read in pieces."""
    state, x = mixer.init_state(1), torch.randn(1, 4096, SHAPE.d_model)
    for start in range(0, length, 4096):
        state = mixer(x[:, : length - start], state=state).state
    with Cost() as cost:
        mixer(x[:, :1], state=state)
    return cost


def test_every_mixer_with_a_constant_state_has_a_bound():
    assert sorted(OPERATORS) == RECURRENT


@pytest.mark.parametrize("name", RECURRENT)
def test_a_step_has_few_operators_and_reads_nothing_on_the_host(name):
    few, more = (cost_after(mixer_of(name), length) for length in (50, 500))
    assert few.operators == more.operators <= OPERATORS[name]
    assert few.bytes == more.bytes
    assert few.waits == more.waits == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RECURRENT)
def test_a_step_costs_the_same_after_1024_and_65536_tokens(name):
    few, more = (cost_after(mixer_of(name), length) for length in (1024, 65536))
    assert (few.operators, few.bytes, few.waits) == (more.operators, more.bytes, more.waits)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_steps_after_a_long_context_equal_one_pass(name):
    mixer = mixer_of(name).double()
    x = torch.randn(2, 2060, SHAPE.d_model, dtype=torch.float64)
    whole = mixer(x).y
    state = mixer(x[:, :2048], state=mixer.init_state(2)).state
    for t in range(2048, x.shape[1]):
        output = mixer(x[:, t : t + 1], state=state)
        state = output.state
        torch.testing.assert_close(output.y, whole[:, t : t + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_a_step_changes_no_state_that_is_kept(name):
    mixer = mixer_of(name)
    x = torch.randn(2, 40, SHAPE.d_model)
    state = mixer(x[:, :-1], state=mixer.init_state(2)).state
    leaves = [leaf for leaf in tree_leaves(state) if leaf is not None]
    kept = [leaf.clone() for leaf in leaves]
    first, again = (mixer(x[:, -1:], state=state).y for _ in range(2))
    assert torch.equal(first, again)
    assert all(torch.equal(leaf, before) for leaf, before in zip(leaves, kept, strict=True))


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2", "qlstm", "rwkv7", "wersa"])
@torch.no_grad()
def test_a_step_may_begin_a_document(name):
    """Some rows go on and others begin anew: each as alone."""
    mixer = mixer_of(name).double()
    x = torch.randn(2, 21, SHAPE.d_model, dtype=torch.float64)
    state = mixer(x[:, :-1], state=mixer.init_state(2)).state
    found = mixer(x[:, -1:], state=state, document_ids=torch.tensor([[0], [1]], dtype=torch.int32)).y
    torch.testing.assert_close(found[0], mixer(x[:1]).y[0, -1:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], mixer(x[1:, -1:]).y[0], rtol=1e-10, atol=1e-10)
