"""Rung 2: block by block against the definition, and the properties that blocks must not break."""

import functools

import pytest
import torch
from scatter_cases import CASES, INPUTS, STATE, TOLERANCE, Case, assert_close, call, everything
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longmix_kernels.scatter import FeatureState, absorb, empty_state, far
from longmix_kernels.scatter.state import lowest

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=("float64", "float32"))


def exact(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    """The definition in float64, on the inputs as their dtype holds them."""
    double = {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}
    return everything(case, double, backend="reference")


@functools.lru_cache(maxsize=2)
def expected_results(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return exact(case, case.inputs(dtype))


def assert_all_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == expected.keys()
    for name, result in got.items():
        assert_close(result, expected[name], TOLERANCE[dtype], name)


@pytest.mark.sampled(2)
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case, dtype, monkeypatch):
    """With a few blocks at a time, and with one."""
    expected = expected_results(case, dtype)
    assert_all_close(everything(case, case.inputs(dtype), backend="blocked"), expected, dtype)
    monkeypatch.setattr(far, "IN_CACHE", 1)
    assert_all_close(everything(case, case.inputs(dtype), backend="blocked"), expected, dtype)


@every_dtype
@pytest.mark.parametrize("size", [-80.0, 80.0, 300.0])
@pytest.mark.parametrize("side", ["query_features", "key_features", "both"])
def test_features_of_any_size(side, size, dtype):
    case = Case("large", length=60, with_state=True)
    inputs = case.inputs(dtype)
    for name in ("query_features", "key_features"):
        if side in (name, "both"):
            inputs[name] = (inputs[name].detach() + size).requires_grad_()
    if side == "both":
        # As large as those of the far keys, so that nothing vanishes in what is expected.
        inputs["log_scale"] = (inputs["log_scale"].detach() + size).requires_grad_()
    expected = exact(case, inputs)
    got = everything(case, inputs, backend="blocked")
    for name in ("output", "logsumexp", "grad_value", "grad_query_features", "grad_key_features"):
        # A logarithm of this size is itself known to so many digits only.
        tolerance = TOLERANCE[dtype] * max(1.0, 2 * abs(size) * (dtype == torch.float32))
        assert_close(got[name], expected[name], tolerance, name)


@every_dtype
def test_features_that_grow_and_shrink_along_the_sequence(dtype):
    """Each running scale moves by hundreds, up and down, where one scale for all would leave nothing in float32."""
    case = Case("waves", length=200, batch=1)
    inputs = case.inputs(dtype)
    wave = 150 * torch.sin(torch.arange(200) / 9.0)[None, :, None, None].to(dtype)
    signs = torch.tensor([1, -1, 1, -1, 0, 0.5], dtype=dtype)
    inputs["key_features"] = (inputs["key_features"].detach() + wave * signs).requires_grad_()
    expected, got = exact(case, inputs), everything(case, inputs, backend="blocked")
    for name in ("output", "logsumexp"):
        assert_close(got[name], expected[name], TOLERANCE[dtype] * (1 if dtype == torch.float64 else 30), name)
    assert all(x.isfinite().all() for x in got.values())


def test_a_huge_later_key_does_not_move_earlier_rows():
    """With one scale for the whole sequence, a key 50 times larger leaves no row before it finite."""
    case = Case("huge", length=64)
    inputs = case.inputs(torch.float32)
    before = call(case, inputs)
    inputs["key_features"], inputs["key"] = inputs["key_features"].detach().clone(), inputs["key"].detach().clone()
    inputs["key_features"][:, 40] = 2000.0
    inputs["key"][:, 40] *= 50.0
    after = call(case, inputs)
    assert torch.equal(after.output[:, :40], before.output[:, :40])
    assert torch.equal(after.logsumexp[:, :40], before.logsumexp[:, :40])
    assert after.output.isfinite().all()


def test_an_empty_state_changes_nothing():
    for documents in ((), (30, 20)):
        case = Case("empty", documents=documents)
        inputs = case.inputs(torch.float64)
        expected = everything(case, inputs)
        state = empty_state(inputs["value"], 2, 2, case.features, case.value_dim)
        given = everything(case, {**inputs, **{n: x.requires_grad_() for n, x in state._asdict().items()}})
        for name in expected:
            assert_close(given[name], expected[name], 1e-13, name)
        assert all(given[f"grad_{name}"].count_nonzero() == 0 for name in STATE)


@pytest.mark.parametrize("cut", [8, 16, 40, 96])
def test_keys_absorbed_into_the_state_are_as_good_as_keys(cut):
    """At every beginning of a block, with the keys that some query still sees exactly given once more."""
    case = Case("cut", heads=4)
    inputs = case.inputs(torch.float64)
    whole = everything(case, inputs)
    kept = max(0, cut - case.past_blocks * case.block_size)
    tensors = {name: x for name, x in inputs.items() if x is not None}
    wanted = torch.ones(2, kept, dtype=torch.bool)
    state = empty_state(inputs["value"], 2, 2, case.features, case.value_dim)
    state = absorb(state, inputs["key_features"][:, :kept], inputs["value"][:, :kept], wanted)
    later = {name: x[:, cut if name.startswith("query") else kept :] for name, x in tensors.items()}
    result = call(case, {**later, **state._asdict()})
    assert_close(result.output, whole["output"][:, cut:], 1e-12, "output")
    assert_close(result.logsumexp, whole["logsumexp"][:, cut:], 1e-12, "logsumexp")

    first = call(Case("first", length=cut, heads=4), {**{n: x[:, :cut] for n, x in tensors.items()}, "memory": None})
    joined = [torch.cat(pair, 1) for pair in zip(first[:2], result[:2], strict=True)]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in joined]
    found = torch.autograd.grad(joined, list(tensors.values()), grads)
    for name, grad in zip(tensors, found, strict=True):
        assert_close(grad, whole[f"grad_{name}"], 1e-12, name)


def test_absorbing_in_pieces_is_absorbing_at_once():
    generator = torch.Generator().manual_seed(0)
    features = 100 * torch.randn(2, 30, 3, 5, generator=generator)
    value, wanted = torch.randn(2, 30, 3, 4, generator=generator), torch.rand(2, 30, generator=generator) < 0.5
    once = pieces = empty_state(value, 2, 3, 5, 4)
    once = absorb(once, features, value, wanted)
    for t in range(30):
        some = slice(t, t + 1)
        pieces = absorb(pieces, features[:, some], value[:, some], wanted[:, some])
    for name, a, b in zip(STATE, pieces, once, strict=True):
        assert_close(a, b, 1e-6, name)
    nothing = absorb(once, features, value, torch.zeros(2, 30, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(nothing, once, strict=True))
    empty = absorb(empty_state(value, 2, 3, 5, 4), features, value, torch.zeros(2, 30, dtype=torch.bool))
    assert isinstance(empty, FeatureState) and empty.normalizer.count_nonzero() == 0
    assert (empty.log_scale == lowest(torch.float32)).all()


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.most = max([self.most, *sizes])
        return result


def test_memory_is_linear_in_the_length():
    found = []
    for length in (2048, 8192):
        case = Case("memory", length=length, batch=1, block_size=64, dim=16, value_dim=16, features=16)
        with Largest() as largest:
            everything(case, case.inputs(torch.float32))
        found.append(largest.most / length)
    assert found[1] <= 1.1 * found[0]


def test_rows_of_a_batch_do_not_mix():
    case = Case("rows", batch=3, documents=(40, 30))
    inputs = case.inputs(torch.float64)
    together = call(case, inputs)
    ids = case.document_ids()
    for row in range(3):
        some = {name: None if x is None else x[row : row + 1] for name, x in inputs.items()}
        alone = call(case, some, document_ids=ids[row : row + 1])
        assert_close(alone.output, together.output[row : row + 1], 1e-13, "output")
    assert set(INPUTS) == set(inputs)
