"""Rung 2: the chunkwise form against the definition, and what chunks, documents and states must not change."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from linear_cases import (
    CASES,
    INPUTS,
    STATE,
    TOLERANCE,
    Case,
    assert_close,
    assert_second_document_forgets,
    call,
    gradients,
    meaning,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longmix_kernels.linear import LinearState, blocked, blocked_call, linear_attention
from longmix_kernels.linear.inputs import Inputs

MORE = [
    *(
        Case(
            f"{'exp' if normalize else 'sig'}-forgetful-chunk-512", 512, normalize, "forgetful", chunk_size=512, batch=1
        )
        for normalize in (True, False)
    ),
]


def same(inputs: dict, **changed) -> dict:
    """Copies of inputs that are leaves again, in float64."""
    return {
        name: None if x is None else x.detach().double().requires_grad_() for name, x in {**inputs, **changed}.items()
    }


def everything(case: Case, inputs: dict, **options) -> dict[str, torch.Tensor]:
    """Output, meaning of the final state, and all gradients."""
    results = call(linear_attention, case, inputs, **options)
    state = zip(("final memory", "final normalizer"), meaning(results[1:]), strict=False)
    grads = {f"gradient of {name}": x for name, x in gradients(results, inputs).items()}
    return {"output": results[0], **dict(state), **grads}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        assert_close(got[name], x, tolerance, name)


@lru_cache(maxsize=1)
def definition(case: Case) -> dict[str, torch.Tensor]:
    """What is right for inputs rounded to float32."""
    inputs = same(case.inputs(torch.float32))
    return {name: x.detach() for name, x in everything(case, inputs, backend="reference").items()}


def nearly_cancels(case: Case) -> bool:
    """Whether rows divide by a sum of large terms that nearly cancel, so that float32 has fewer digits to give."""
    return case.normalize and case.regime == "strong-input"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_equals_the_definition(case, dtype):
    if dtype == torch.float32 and nearly_cancels(case):
        pytest.skip("held to the definition in float32 below")
    inputs = case.inputs(torch.float32)
    inputs = same(inputs) if dtype == torch.float64 else inputs
    assert_same(everything(case, inputs, backend="blocked"), definition(case), TOLERANCE[dtype])


@pytest.mark.parametrize("case", list(filter(nearly_cancels, CASES)), ids=lambda case: case.name)
def test_where_denominators_nearly_cancel_it_is_no_worse_than_the_definition(case):
    inputs = case.inputs(torch.float32)
    in_float32 = everything(case, inputs, backend="reference")
    got, exact = everything(case, inputs, backend="blocked"), definition(case)

    def worst(results: dict[str, torch.Tensor]) -> float:
        return max(((results[name] - x).abs().max() / x.abs().max()).item() for name, x in exact.items())

    assert worst(got) <= worst(in_float32)


@pytest.mark.parametrize("name", ["exp-T257", "sig-T257", "exp-documents", "sig-chunk-16", "exp-chunk-64"])
def test_how_many_chunks_are_computed_together_changes_nothing(name, monkeypatch):
    case = next(case for case in CASES if case.name == name)
    for in_cache, runs in ((1, 1), (1, 3), (2**13, 2)):
        monkeypatch.setattr(blocked_call, "IN_CACHE", in_cache)
        monkeypatch.setattr(blocked_call, "RUNS_AT_A_TIME", runs)
        assert_same(everything(case, same(case.inputs(torch.float32)), backend="blocked"), definition(case), 1e-12)


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_the_chunk_size_changes_nothing(normalize):
    case = Case("chunks", length=200, normalize=normalize, documents=(30, 1, 66))
    inputs = case.inputs(torch.float64)
    wanted = everything(case, inputs, chunk_size=16)
    for size in (None, 32, 64, 128, 256, 4096):
        assert_same(everything(case, inputs, chunk_size=size), wanted, 1e-12)


def assert_documents_equal_each_alone(case: Case, dtype: torch.dtype) -> None:
    """Outputs, final state and gradients; the gradient of the initial state is the sum over documents."""
    inputs = case.inputs(dtype)
    results = call(linear_attention, case, inputs)
    count, tolerance = 2 + case.normalize, TOLERANCE[dtype]
    grad_output, *grad_state = (torch.randn_like(x) for x in results[:count])
    wanted = {name: x for name, x in inputs.items() if x is not None}
    grads = torch.autograd.grad(results[:count], list(wanted.values()), [grad_output, *grad_state])
    total = dict(zip(wanted, grads, strict=True))
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("output", *wanted)}
    start = 0
    for length in case.documents:
        rows = slice(start, start + length)
        start += length
        alone = {
            name: x if x is None else (x if name in INPUTS[5:] else x[:, rows]).detach().requires_grad_()
            for name, x in inputs.items()
        }
        got = call(linear_attention, replace(case, length=length, documents=()), alone)
        last = [x * (start == case.length) for x in grad_state]
        parts = torch.autograd.grad(got[:count], [alone[name] for name in wanted], [grad_output[:, rows], *last])
        for name, part in zip(found, (got[0], *parts), strict=True):
            found[name].append(part)
    for a, b in zip(meaning(got[1:]), meaning(results[1:]), strict=True):
        assert_close(a, b, tolerance, "final state")
    for name, x in {"output": results[0], **total}.items():
        joined = torch.stack(found[name]).sum(0) if name in INPUTS[5:] else torch.cat(found[name], 1)
        assert_close(joined, x, tolerance, name)


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "zero"])
@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_packed_documents_equal_each_alone(normalize, with_state, chunk_size):
    """Three of the documents lie within one chunk."""
    lengths = (5, 7, 3, 64, 17, 1, 53)
    case = Case("packed", sum(lengths), normalize, batch=1, with_state=with_state, documents=lengths)
    assert_documents_equal_each_alone(replace(case, chunk_size=chunk_size), torch.float64)


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_long_packed_documents_equal_each_alone(normalize):
    lengths = (5000, 1, 7000, 64, 4319)
    case = Case("long", 16384, normalize, "init", batch=1, heads=1, dim=64, value_dim=128, documents=lengths)
    assert sum(lengths) == case.length
    assert_documents_equal_each_alone(case, torch.float32)


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("start", [20, 32])
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "zero"])
@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_a_document_leaves_no_trace_in_the_next(normalize, with_state, start, chunk_size):
    """A closed gate would leak here: what came before is e ** 100 times as strong."""
    case = Case("forgets", length=70, normalize=normalize, with_state=with_state, chunk_size=chunk_size)
    assert_second_document_forgets(linear_attention, case, start, backend="blocked")


@pytest.mark.parametrize("documents", [(), (13, 40, 3)], ids=["one", "documents"])
@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_later_tokens_change_nothing_before_them(normalize, documents):
    case = Case("causal", normalize=normalize, documents=documents)
    inputs = case.inputs(torch.float32)
    other = case.inputs(torch.float32, seed=7)
    before = call(linear_attention, case, inputs)[0]
    for position in (1, 31, 32, 50, 99):
        mixed = {
            name: x
            if x is None or name in INPUTS[5:]
            else torch.cat([x[:, :position], 3 * other[name][:, position:]], 1)
            for name, x in inputs.items()
        }
        after = call(linear_attention, case, mixed)[0]
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


@pytest.mark.parametrize("split", [1, 37, 64, 99])
@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_two_calls_through_the_state_equal_one(normalize, split):
    case = Case("whole", normalize=normalize)
    inputs = case.inputs(torch.float64)
    whole = call(linear_attention, case, inputs)
    first = {name: x if name in INPUTS[5:] else x[:, :split] for name, x in inputs.items()}
    head, *state = call(linear_attention, case, first)
    second = {name: x if name in INPUTS[5:] else x[:, split:] for name, x in inputs.items()}
    second |= dict(zip(STATE, state, strict=False))
    tail, *state = call(linear_attention, case, second)
    chained = [torch.cat([head, tail], 1), *state]
    for name, a, b in zip(("output", "memory", "normalizer"), chained, [whole[0], *whole[1:]], strict=False):
        assert_close(a, b, 1e-12, name)
    wanted = gradients(whole, inputs)
    for name, x in gradients(chained, inputs).items():
        assert_close(x, wanted[name], 1e-12, name)


EXTREME = {
    "resets": (torch.tensor([0.0, -0.3, -1e4]), torch.tensor([0.0, -1.0])),
    "always-resets": (torch.tensor([-1e4]), torch.tensor([0.0, -1.0])),
    "hardly-remembers": (torch.tensor([-9.0, -7.0]), torch.tensor([0.0, -1.0])),
    "never-forgets": (torch.tensor([0.0]), torch.tensor([0.0])),
    "never-lets-in": (torch.tensor([-0.1]), torch.tensor([-torch.inf, -0.5])),
    "forgets-at-once": (torch.tensor([-torch.inf, -0.1]), torch.tensor([0.0])),
}
SWINGS = {
    "inputs": (torch.tensor([-0.1]), torch.tensor([100.0, 0.0, -100.0])),
    "inputs-and-resets": (torch.tensor([-1e4, -1e-3]), torch.tensor([100.0, -100.0])),
    "closed": (torch.tensor([-1e4]), torch.tensor([-100.0])),
}


def with_gates(case: Case, gates: tuple[torch.Tensor, torch.Tensor]) -> dict:
    inputs = case.inputs(torch.float32)
    generator = torch.Generator().manual_seed(3)
    for name, values in zip(INPUTS[3:5], gates, strict=True):
        chosen = torch.randint(len(values), inputs[name].shape, generator=generator)
        inputs[name] = values[chosen].requires_grad_()
    return inputs


@pytest.mark.sampled(2)
@pytest.mark.parametrize("chunk_size", [64, 512])
@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
@pytest.mark.parametrize("gates", EXTREME)
def test_extreme_gates_lose_no_precision(gates, normalize, chunk_size):
    case = Case(gates, length=300, normalize=normalize, batch=1, chunk_size=chunk_size, with_state=False)
    inputs = with_gates(case, EXTREME[gates])
    wanted = everything(case, same(inputs), backend="reference")
    assert_same(everything(case, same(inputs)), wanted, 1e-12)
    assert_same(everything(case, inputs), wanted, 1e-5)


@pytest.mark.parametrize("chunk_size", [16, 512])
@pytest.mark.parametrize("gates", SWINGS)
def test_inputs_of_a_hundred_remain_finite(gates, chunk_size):
    """The output may then be a quotient of two numbers that cancel; in float64 it is right."""
    case = Case(gates, length=100, chunk_size=chunk_size, documents=(13, 40, 3))
    inputs = with_gates(case, SWINGS[gates])
    wanted = everything(case, same(inputs), backend="reference")
    assert_same(everything(case, same(inputs)), wanted, 1e-10)
    for name, x in everything(case, inputs).items():
        assert x.isfinite().all(), name


def test_the_first_token_outweighs_all_later_chunks():
    """What it wrote sets the scale of rows that are chunks away."""
    case = Case("first", length=100, chunk_size=16, with_state=False)
    inputs = case.inputs(torch.float32)
    gate = inputs["log_input"].detach()
    gate[:, 1:] -= 200.0
    wanted = everything(case, same(inputs), backend="reference")
    assert_same(everything(case, inputs), wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 3000.0])
def test_sums_of_decays_and_large_scales_round_away_nothing(shift):
    """A thousand decays whose rests add up, and log scales that float32 holds with few digits after the point."""
    case = Case("sums", length=1024, batch=1, heads=1, chunk_size=1024, with_state=False)
    inputs = {name: x if x is None else x.detach() for name, x in case.inputs(torch.float32).items()}
    inputs |= {name: inputs[name].abs() for name in INPUTS[:2]}
    inputs["log_decay"].fill_(-0.499)
    inputs["log_input"] += shift
    found = []
    for backend, dtype in (("blocked", torch.float32), ("reference", torch.float64)):
        given = {name: x if x is None else x.to(dtype).requires_grad_() for name, x in inputs.items()}
        output = call(linear_attention, case, given, backend=backend)[0]
        grad = inputs["value"].roll(1, 1).to(dtype)
        found.append([output, *torch.autograd.grad(output, [given[name] for name in INPUTS[:5]], grad)])
    for name, got, wanted in zip(("output", *INPUTS), *found, strict=False):
        assert_close(got, wanted, 1e-5, name)


def test_a_query_of_zero_reads_zero_however_strong_the_inputs():
    """exp(-m) is then 0 in float32, and nothing else is left to divide by."""
    case = Case("zero", length=40, with_state=False)
    inputs = {name: None if x is None else x.detach() for name, x in case.inputs(torch.float32).items()}
    inputs["query"][:, ::3] = 0.0
    inputs["log_input"].fill_(110.0)
    output = call(linear_attention, case, inputs)[0]
    assert output.isfinite().all() and not output[:, ::3].any() and output[:, 1::3].all()


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return result


@pytest.mark.parametrize("chunk_size", [None, 2**16])
@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_what_is_computed_in_does_not_grow_with_the_length(normalize, chunk_size, monkeypatch):
    monkeypatch.setattr(blocked_call, "IN_CACHE", 2**15)
    for length in (4096, 16384):
        query, key, value = (torch.randn(1, length, 1, 4) for _ in range(3))
        gate = torch.full((1, length, 1), -0.1)
        inputs = Inputs(query, key, value, gate, gate, *[None] * 7, normalize, 0.5, chunk_size)
        with LargestTensor() as largest:
            output, _, _, _, *rows = blocked.blocked_forward(inputs)
            blocked.blocked_backward(inputs, output, None, None, output, *rows)
        of_a_run = 2**17 if chunk_size is None else 2**21
        assert 4 * length <= largest.elements <= max(4 * length, of_a_run) < length * length // 4


def test_a_state_may_be_used_after_the_call():
    """What is returned is no view of memory that is computed in."""
    case = Case("state", normalize=False)
    inputs = case.inputs(torch.float32)
    _, state = linear_attention(*(inputs[name] for name in INPUTS[:3]), log_decay=inputs["log_decay"])
    assert isinstance(state, LinearState) and state.memory.untyped_storage().nbytes() == state.memory.nbytes
