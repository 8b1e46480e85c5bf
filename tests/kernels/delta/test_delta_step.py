"""Few tokens without gradients: one after the other, exactly as the definition and the chunks have them."""

from dataclasses import replace

import pytest
import torch
from delta_cases import INPUTS, Case, assert_close, call

from longmix_kernels.delta import delta_rule, op
from longmix_kernels.operators import LONGEST_STEP

CASES = [
    Case(f"{name}-T{length}", length=length, **changed)
    for length in (1, 2, LONGEST_STEP)
    for name, changed in {
        "channels": {},
        "heads": {"scalar_decay": True},
        "diagonal": {"low_rank": False},
        "heads-diagonal": {"low_rank": False, "scalar_decay": True},
        "no-state": {"with_state": False},
        "diagonal-no-state": {"with_state": False, "low_rank": False},
        "carried": {"with_carried": True},
        "carried-no-state": {"with_carried": True, "with_state": False},
        "reflecting": {"kind": "reflecting"},
        "96-192": {"dim": 96, "value_dim": 192},
    }.items()
]


def plain(case: Case) -> dict[str, torch.Tensor | None]:
    return {name: None if x is None else x.detach() for name, x in case.inputs(torch.float64).items()}


@pytest.fixture
def stepped(monkeypatch) -> list[int]:
    """The lengths of the calls that went token by token."""
    lengths: list[int] = []
    step = op._STEPS["blocked"]
    monkeypatch.setitem(op._STEPS, "blocked", lambda inputs: lengths.append(inputs.query.shape[1]) or step(inputs))
    return lengths


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steps_are_the_definition(case, stepped):
    results = (call(delta_rule, case, plain(case), **options) for options in ({}, {"backend": "reference"}))
    for x, want in zip(*results, strict=True):
        assert_close(x, want, 1e-12, case.name)
    assert stepped == [case.length]


@pytest.mark.parametrize("scalar_decay", [True, False], ids=["heads", "channels"])
def test_many_steps_are_the_chunks(scalar_decay, stepped):
    case = Case("long", length=200, scalar_decay=scalar_decay)
    inputs = plain(case)
    output, final = call(delta_rule, case, inputs)
    assert not stepped
    outputs, state = [], inputs["initial_state"]
    for t in range(case.length):
        token = {name: x[:, t : t + 1] if name in INPUTS[:6] else x for name, x in inputs.items()}
        found, state = call(delta_rule, replace(case, length=1), token | {"initial_state": state})
        outputs.append(found)
    assert stepped == [1] * case.length
    assert_close(torch.cat(outputs, 1), output, 1e-12, "outputs")
    assert_close(state, final, 1e-12, "state")


def test_what_is_differentiated_or_packed_goes_in_chunks(stepped):
    case = Case("few", length=3)
    call(delta_rule, case, case.inputs(torch.float64))
    packed = replace(case, documents=(1,))
    call(delta_rule, packed, plain(packed))
    longer = replace(case, length=LONGEST_STEP + 1)
    call(delta_rule, longer, plain(longer))
    assert not stepped


def test_a_state_is_not_changed_in_place():
    case = Case("kept", length=2)
    inputs = plain(case)
    before = inputs["initial_state"].clone()
    call(delta_rule, case, inputs)
    assert torch.equal(inputs["initial_state"], before)
