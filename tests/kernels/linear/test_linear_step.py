"""Few tokens without gradients: one after the other, exactly as the definition and the chunks have them."""

from dataclasses import replace

import pytest
import torch
from linear_cases import REGIMES, STATE, Case, assert_close, call, meaning

from longmix_kernels.linear import LinearState, linear_attention, op
from longmix_kernels.operators import LONGEST_STEP

LENGTHS = (1, 2, LONGEST_STEP)
CASES = [
    Case(f"{'exp' if normalize else 'sig'}{name}-T{length}", length=length, normalize=normalize, **changed)
    for length in LENGTHS
    for normalize in (True, False)
    for name, changed in {
        "": {},
        **{f"-{regime}": {"regime": regime} for regime in REGIMES},
        "-no-state": {"with_state": False},
        "-no-input-gate": {"gated": False},
        "-carried": {"with_carried": True},
        "-carried-no-state": {"with_carried": True, "with_state": False},
        "-96-192": {"dim": 96, "value_dim": 192},
    }.items()
]


def found(case: Case, **options) -> list[torch.Tensor]:
    inputs = {name: None if x is None else x.detach() for name, x in case.inputs(torch.float64).items()}
    output, *state = call(linear_attention, case, inputs, **options)
    return [output, *meaning(state)]


@pytest.fixture
def stepped(monkeypatch) -> list[int]:
    """The lengths of the calls that went token by token."""
    lengths: list[int] = []
    step = op._STEPS["blocked"]
    monkeypatch.setitem(op._STEPS, "blocked", lambda inputs: lengths.append(inputs.query.shape[1]) or step(inputs))
    return lengths


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steps_are_the_definition(case, stepped):
    for x, want in zip(found(case), found(case, backend="reference"), strict=True):
        assert_close(x, want, 1e-12, case.name)
    assert stepped == [case.length]


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_many_steps_are_the_chunks(normalize, stepped):
    case = Case("long", length=200, normalize=normalize)
    inputs = {name: None if x is None else x.detach() for name, x in case.inputs(torch.float64).items()}
    whole = call(linear_attention, case, inputs)
    assert not stepped
    outputs, state = [], {name: inputs[name] for name in STATE}
    for t in range(case.length):
        token = {name: x if name in STATE or x is None else x[:, t : t + 1] for name, x in inputs.items()}
        output, *state_after = call(linear_attention, replace(case, length=1), token | state)
        outputs.append(output)
        state = dict(zip(STATE, state_after, strict=False))
    assert stepped == [1] * case.length
    assert_close(torch.cat(outputs, 1), whole[0], 1e-12, "outputs")
    for x, want in zip(meaning(state_after), meaning(whole[1:]), strict=True):
        assert_close(x, want, 1e-12, "state")


def test_what_is_differentiated_or_packed_goes_in_chunks(stepped):
    case = Case("few", length=3)
    call(linear_attention, case, case.inputs(torch.float64))
    found(replace(case, documents=(1,)))
    found(replace(case, length=LONGEST_STEP + 1))
    assert not stepped
    found(replace(case, length=1, documents=(1,)))  # a token is of one document
    assert stepped == [1]


def test_a_state_is_not_changed_in_place():
    case = Case("kept", length=1)
    inputs = {name: None if x is None else x.detach() for name, x in case.inputs(torch.float64).items()}
    before = {name: inputs[name].clone() for name in STATE}
    call(linear_attention, case, inputs)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


def test_half_precision_is_rounded_once_at_the_end():
    torch.manual_seed(0)
    query, value, decay = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 8), -torch.rand(1, 1, 2)
    state = LinearState(torch.randn(1, 2, 16, 8))
    low = [x.bfloat16() for x in (query, query, value)]
    with torch.autocast("cpu", torch.bfloat16):
        output, after = linear_attention(*low, log_decay=decay, initial_state=state)
    wanted, _ = linear_attention(*(x.float() for x in low), log_decay=decay, initial_state=state)
    assert output.dtype == torch.bfloat16 and after.memory.dtype == torch.float32
    assert torch.equal(output, wanted.bfloat16())
