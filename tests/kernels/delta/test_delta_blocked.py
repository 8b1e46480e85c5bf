"""Rung 2: the chunked implementation against the definition, and the properties chunking must not break."""

import functools

import pytest
import torch
from delta_cases import CASES, FASTEST_DECAY, INPUTS, TOLERANCE, Case, assert_close, call, gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longmix_kernels.delta import blocked, blocked_call, blocked_weights, delta_rule
from longmix_kernels.delta.blocked import blocked_backward, blocked_forward
from longmix_kernels.delta.inputs import Inputs

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=("float64", "float32"))


def results(case: Case, inputs: dict, backend: str = "blocked", **options) -> dict[str, torch.Tensor]:
    """Output, final state and all gradients, by name."""
    output, state = call(delta_rule, case, inputs, backend=backend, **options)
    return {"output": output, "state": state, **gradients([output, state], inputs)}


def exact(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    """The definition in float64, on the inputs as their dtype holds them."""
    double = {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}
    return results(case, double, "reference")


@functools.lru_cache(maxsize=2)
def expected_results(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return exact(case, case.inputs(dtype))


def assert_all_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == expected.keys()
    for name, result in got.items():
        assert_close(result, expected[name], TOLERANCE[dtype], name)


@pytest.fixture
def halved(monkeypatch):
    """Halve chunks down to single tokens, as for decays without a bound."""
    monkeypatch.setattr(blocked_weights, "BLOCK_RANGE", -1.0)


@pytest.mark.sampled(4)
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case, dtype, monkeypatch):
    """With chunks taken whole, and halved down to single tokens."""
    expected = expected_results(case, dtype)
    assert_all_close(results(case, case.inputs(dtype)), expected, dtype)
    monkeypatch.setattr(blocked_weights, "BLOCK_RANGE", -1.0)
    assert_all_close(results(case, case.inputs(dtype)), expected, dtype)


def shut(decay):
    return torch.full_like(decay, -1e4)


def mostly_open(decay):
    return torch.where(torch.rand_like(decay) < 0.1, -1e4, 0.1 * decay)


def shut_channels(decay):
    return torch.where(torch.arange(decay.shape[-1]) % 3 == 0, -1e4, decay)


def of_all_sizes(decay):
    return -(10.0 ** (8 * torch.rand_like(decay) - 4))


def infinite(decay):
    return torch.where(torch.rand_like(decay) < 0.1, -torch.inf, decay)


DECAYS = {
    "open": torch.zeros_like,
    "shut": shut,
    "mostly-open": mostly_open,
    "shut-channels": shut_channels,
    "of-all-sizes": of_all_sizes,
    "infinite": infinite,
    **{f"constant-{-size}": functools.partial(torch.full_like, fill_value=size) for size in (-1.25, -1.3, -3.0, -10.0)},
}


@pytest.mark.sampled(3)
@every_dtype
@pytest.mark.parametrize("documents", [(), (13, 40, 3)], ids=["one", "documents"])
@pytest.mark.parametrize("change", DECAYS.values(), ids=DECAYS)
def test_any_decay(change, documents, dtype):
    case = Case("decay", length=90, documents=documents)
    inputs = case.inputs(dtype)
    torch.manual_seed(0)
    inputs["log_decay"] = change(inputs["log_decay"].detach()).requires_grad_()
    assert_all_close(results(case, inputs), exact(case, inputs), dtype)


@pytest.mark.parametrize("kind", ["correlated", "identical"])
def test_long_chunks_of_removal_keys_that_are_alike(kind):
    case = Case("alike", length=300, kind=kind, chunk_size=256)
    inputs = case.inputs(torch.float32)
    assert_all_close(results(case, inputs), exact(case, inputs), torch.float32)


@pytest.mark.parametrize(("kind", "most"), [("overwriting", 1e-5), ("reflecting", 5e-5)])
@pytest.mark.parametrize("chunk", [16, 64])
def test_eigenvalues_down_to_minus_one_in_every_dtype(kind, most, chunk):
    """Even where no rounding ever fades, it stays far below that of half-precision inputs and outputs."""
    case = Case(kind, kind=kind, length=128, batch=1, chunk_size=chunk)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, most), (torch.bfloat16, 5e-3)):
        inputs = case.inputs(dtype)
        found, expected = results(case, inputs), exact(case, inputs)
        for name, want in expected.items():
            assert (found[name].double() - want).norm() <= bound * want.norm(), (name, dtype)


def test_chunk_sizes_agree():
    case = Case("chunks", length=150, documents=(70, 21))
    expected = results(case, case.inputs(torch.float64))
    for size in (16, 32, 64, 256):
        assert_all_close(results(case, case.inputs(torch.float64), chunk_size=size), expected, torch.float64)


@pytest.mark.parametrize(("most", "count"), [(1, 9), (2, 6), (3, 3), (6, 2), (9, 1)])
def test_parts_of_a_call_agree(most, count, monkeypatch):
    case = Case("parts", length=100, batch=3, heads=3, documents=(30,))
    expected = results(case, case.inputs(torch.float64))
    inputs = case.inputs(torch.float64)
    of_a_chunk = blocked_call.CHUNK * (2 * case.dim + case.value_dim)
    monkeypatch.setattr(blocked_call, "IN_CACHE", most * of_a_chunk)
    assert len(list(blocked_call.parts(Inputs(*inputs.values(), None, 1.0, None)))) == count
    assert_all_close(results(case, inputs), expected, torch.float64)


@pytest.mark.parametrize("apart", [32, 64, 256])
@pytest.mark.parametrize("most", [1, 3, 4, 10, 100])
def test_backward_goes_on_from_kept_states(apart, most, monkeypatch):
    """Runs have a part of the chunks between two kept states, all of them, or those between several."""
    case = Case("kept", length=260, batch=1, heads=2, value_dim=8, documents=(100,), with_carried=True, chunk_size=16)
    inputs, calls, states = case.inputs(torch.float64), [], blocked._states
    monkeypatch.setattr(blocked_call, "APART", apart)
    monkeypatch.setattr(blocked_call, "IN_CACHE", most * case.chunk_size * case.heads * (2 * case.dim + 8))
    monkeypatch.setattr(blocked, "_states", lambda call, run, *rest: calls.append(run) or states(call, run, *rest))
    assert_all_close(results(case, inputs), exact(case, inputs), torch.float64)
    runs = {run.start: run for run in calls}.values()
    again = sum(run.tokens.stop % apart > 0 and run.tokens.stop < case.length for run in runs)
    assert len(calls) == 2 * len(runs) + again


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no-state"])
def test_packed_documents_equal_each_document_alone(with_state):
    lengths = (13, 5, 40, 1, 30)
    case = Case("packed", length=sum(lengths), batch=1, documents=lengths[:-1], with_state=with_state)
    inputs = case.inputs(torch.float64)
    output, state = call(delta_rule, case, inputs)
    grad = torch.cos(torch.arange(output.numel()).double()).view_as(output)
    wanted = {name: x for name, x in inputs.items() if x is not None}
    packed = dict(zip(wanted, torch.autograd.grad([output, state], list(wanted.values()), [grad, state]), strict=True))
    grad_initial, start = 0.0, 0
    for length in lengths:
        own = slice(start, start + length)
        tokens = {name: x if x is None or name == "initial_state" else x[:, own] for name, x in inputs.items()}
        tokens = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in tokens.items()}
        alone = call(delta_rule, Case("alone", length=length, batch=1), tokens)
        assert_close(output[:, own], alone[0], 1e-12, f"output of the document at {start}")
        last = start + length == case.length
        given = {name: x for name, x in tokens.items() if x is not None}
        grads = torch.autograd.grad(alone, list(given.values()), [grad[:, own], alone[1] * last])
        for name, result in zip(given, grads, strict=True):
            if name == "initial_state":
                grad_initial = grad_initial + result
            else:
                assert_close(packed[name][:, own], result, 1e-12, f"{name} of the document at {start}")
        start += length
    assert_close(state, alone[1], 1e-12, "state")
    if with_state:
        assert_close(packed["initial_state"], grad_initial, 1e-12, "initial state")


@pytest.mark.parametrize("change", [None, "mostly-open"], ids=["bounded", "mostly-open"])
@pytest.mark.parametrize("documents", [(), (20, 60)], ids=["one", "documents"])
def test_later_tokens_change_nothing_before_them(documents, change):
    case = Case("causality", length=130, documents=documents, with_carried=True)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32).items()}
    torch.manual_seed(0)
    if change:
        inputs["log_decay"] = DECAYS[change](inputs["log_decay"])
    before, _ = call(delta_rule, case, inputs)
    for token in (1, 15, 16, 45, 64, 129):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in INPUTS[:6]:
            later = changed[name][:, token:]
            bounded = name in ("log_decay", "low_rank_read", "low_rank_write")
            later.copy_(later.flip(-1) if bounded else 30.0 * torch.randn_like(later))
        after, _ = call(delta_rule, case, changed)
        assert torch.equal(before[:, :token], after[:, :token])
        assert not torch.equal(before[:, token], after[:, token])


@every_dtype
def test_two_calls_chained_through_the_state_equal_one(dtype):
    case = Case("chained", length=130)
    inputs, split = case.inputs(dtype), 77
    tokens = [
        {n: x if n in INPUTS[6:] else x[:, s] for n, x in inputs.items()} for s in (slice(split), slice(split, None))
    ]
    first, state = call(delta_rule, case, tokens[0])
    second, state = call(delta_rule, case, {**tokens[1], "initial_state": state})
    chained = [torch.cat([first, second], 1), state]
    got = {"output": chained[0], "state": state, **gradients(chained, inputs)}
    assert_all_close(got, exact(case, inputs), dtype)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return result


@pytest.mark.slow
@pytest.mark.parametrize("decay", [FASTEST_DECAY, -5.0])
def test_no_tensor_is_larger_than_an_input_or_a_run(decay):
    for length in (4096, 16384):
        tensors = [torch.randn(1, length, 2, 16) for _ in range(3)]
        low_rank = [0.1 * torch.randn(1, length, 2, 16) for _ in range(2)]
        inputs = Inputs(*tensors, torch.full((1, length, 2, 16), decay), *low_rank, None, None, None, 1.0, None)
        with LargestTensor() as largest:
            output, state, kept = blocked_forward(inputs)
            blocked_backward(inputs, output, state, kept)
        assert largest.elements <= max(32 * length, 4 * blocked_call.IN_CACHE)


def test_many_chunks_in_float32():
    """Errors do not grow with the number of chunks."""
    case = Case("long", length=6000, batch=1, heads=1, dim=16, value_dim=16, kind="correlated")
    inputs = case.inputs(torch.float32)
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items() if x is not None}
    assert_all_close(results(case, inputs), results(case, double), torch.float32)
