"""Rung 3: the Triton kernels against the definition, in Triton's interpreter on the CPU, in float32.

Runs only where TRITON_INTERPRET=1 is set before triton is imported; `test_scatter_triton.py` starts such a process.
Inputs lie in larger buffers of NaN, so that a load without mask or without `other` shows, and so do all buffers that
the kernels are given; sums of blocks that nothing reads stay NaN, and must not be seen in any result.
"""

import os
from contextlib import ExitStack

import pytest
import torch
from guarded import beside, guarded_buffers, surrounded
from scatter_cases import INPUTS, STATE, Case, Inputs, assert_close, call, everything, gradients, plain

from longmix_kernels.scatter import launch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own")

TOLERANCE = 1e-5


def small(name: str, **changed) -> Case:
    """One batch row and head, unless said otherwise."""
    return Case(name, **{"batch": 1, "heads": 1, "key_heads": 1, "length": 40, **changed})


CASES = [
    *(small(f"T{n}", length=n) for n in (1, 5, 16, 17)),
    *(
        small(f"block-{size}-past-{past}", length=length, block_size=size, past_blocks=past)
        for size, past, length in ((1, 0, 5), (1, 2, 6), (5, 0, 23), (5, 2, 23), (16, 1, 50), (100, 0, 205))
    ),
    small("block-128-past-1", length=270, block_size=128, past_blocks=1),
    *(small(f"m{m}-d{d}", features=m, value_dim=d, length=20) for m, d in ((1, 3), (20, 80), (64, 1), (100, 130))),
    small("no-features", features=0, block_size=5),
    small("nothing-far", length=16),
    small("grouped", length=20, heads=4, key_heads=2),
    Case("grouped-documents", length=30, heads=2, key_heads=1, documents=(20,)),
    small("document-ends-with-a-block", length=50, documents=(24, 16)),
    small("document-ends-within-a-block", length=50, documents=(21, 3)),
    small("document-ends-after-a-block", length=50, documents=(25, 17)),
    small("documents-of-one-token", length=45, documents=(1,) * 20),
    small("documents-of-one-token-block-1", length=12, documents=(1, 1, 4, 1, 3), block_size=1, past_blocks=0),
    small("state", with_state=True),
    small("state-within-block", with_state=True, length=5),
    small("state-documents", with_state=True, documents=(17, 20), batch=2),
    small("last-query", length=30, queries=1),
    small("last-query-state", length=13, queries=1, with_state=True),
    small("some-queries", queries=13, past_blocks=0),
    small("some-queries-documents", queries=25, documents=(7, 20)),
    small("some-queries-state-documents", queries=20, documents=(10, 20), with_state=True, past_blocks=2),
]


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    # Output and two logsumexps, of the exact part or of all.
    with guarded_buffers(monkeypatch, least=2, complete=False):
        yield


def prepared(case: Case, change=None) -> tuple[Inputs, Inputs]:
    """Inputs for the kernels, and the same numbers in float64 for the definition."""
    made = case.inputs(torch.float32)
    if change is not None:
        made = change({name: None if x is None else x.detach() for name, x in made.items()})
    ours = {name: None if x is None else (beside if name in STATE else surrounded)(x) for name, x in made.items()}
    return ours, {name: None if x is None else x.detach().double().requires_grad_() for name, x in ours.items()}


def compare(case: Case, change=None, tolerance: float = TOLERANCE) -> None:
    ours, exact = prepared(case, change)
    found, expected = everything(case, ours, backend="triton"), everything(case, exact, backend="reference")
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert_close(found[name], want, tolerance, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case):
    compare(case)


def moved(*names: str, by: float):
    """A change that adds to logarithms."""

    def change(inputs: Inputs) -> Inputs:
        return {name: x + by if name in names else x for name, x in inputs.items()}

    return change


@pytest.mark.parametrize("size", [-200.0, 200.0])
@pytest.mark.parametrize(
    "names", [("query_features", "key_features", "log_scale"), ("key_features", "log_scale")], ids=["both", "keys"]
)
def test_features_of_any_size(names, size):
    """A logarithm of this size is known to 2 ** -24 of it, and so is each of four sums of two."""
    tolerance = TOLERANCE + 4 * 2 * abs(size) * 2**-24
    compare(small("large", length=25, with_state=True), moved(*names, by=size), tolerance)


def test_features_that_grow_and_shrink_along_the_sequence():
    """Each running scale moves by hundreds, up and down, where one scale for all would leave nothing in float32."""
    wave = 150 * torch.sin(torch.arange(50) / 9.0)[None, :, None, None]
    signs = torch.tensor([1, -1, 1, -1, 0, 0.5])

    def change(inputs: Inputs) -> Inputs:
        return {name: x + wave * signs if name == "key_features" else x for name, x in inputs.items()}

    compare(small("waves", length=50), change, TOLERANCE + 4 * 2 * 150 * 2**-24)


def test_a_huge_later_key_does_not_move_earlier_rows():
    case = small("huge")
    inputs = {name: None if x is None else x.detach() for name, x in case.inputs(torch.float32).items()}
    before = call(case, inputs, backend="triton")
    inputs["key_features"] = inputs["key_features"].clone()
    inputs["key_features"][:, 10] = 2000.0
    after = call(case, inputs, backend="triton")
    assert torch.equal(after.output[:, :24], before.output[:, :24])
    assert torch.equal(after.logsumexp[:, :24], before.logsumexp[:, :24])
    assert after.output.isfinite().all() and not torch.equal(after.output[:, 24], before.output[:, 24])


@pytest.mark.parametrize("token", [9, 16, 33])
def test_later_tokens_change_nothing_before_them(token):
    """Bit for bit: scales, sums and merging know of earlier keys alone."""
    case = small("causality", documents=(30,), with_state=True)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32).items()}
    before = call(case, inputs, backend="triton")
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in INPUTS[:5]:
        changed[name][:, token:] = 3 * changed[name][:, token:].flip(-1)
    after = call(case, changed, backend="triton")
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :token], b[:, :token]) and not torch.equal(a[:, token], b[:, token])


def test_documents_do_not_see_each_other():
    """Bit for bit, forward and backward, in both directions."""
    case = small("isolation", length=44, documents=(21,), with_state=True)
    inputs = case.inputs(torch.float32)
    before = everything(case, inputs, backend="triton")
    for own, other in ((slice(21, None), slice(None, 21)), (slice(None, 21), slice(21, None))):
        changed = {name: x.detach().clone() for name, x in inputs.items()}
        for name in INPUTS[:5]:
            changed[name][:, other] = 5 * changed[name][:, other].flip(-1)
        after = everything(case, {name: x.requires_grad_() for name, x in changed.items()}, backend="triton")
        for name, x in before.items():
            if name.removeprefix("grad_") not in STATE:
                assert torch.equal(x[:, own], after[name][:, own]), name
        if own.start is None:
            # The initial state is the first document's.
            assert all(torch.equal(before[f"grad_{name}"], after[f"grad_{name}"]) for name in STATE)


def test_what_is_not_finite_stays_in_its_document():
    """Values of the first document, or gradients of the second; the tiles of the exact part begin where this does."""
    case = small("finite", length=82, documents=(64,))
    inputs = case.inputs(torch.float32)
    result = call(case, inputs, backend="triton")
    broken = {**inputs, "value": inputs["value"].detach().clone()}
    broken["value"][:, :64] = torch.inf
    after = call(case, broken, backend="triton")
    assert after.output[:, :64].isnan().any() and torch.equal(after.output[:, 64:], result.output[:, 64:])

    wanted = [inputs[name] for name in INPUTS[2:5]]
    weights = torch.ones_like(result.output)
    before = torch.autograd.grad(result.output, wanted, weights, retain_graph=True)
    weights[:, 64:] = torch.inf
    for a, b in zip(torch.autograd.grad(result.output, wanted, weights), before, strict=True):
        assert not a[:, 64:].isfinite().all() and torch.equal(a[:, :64], b[:, :64])


def test_an_empty_state_is_as_none():
    case = small("empty", length=30, documents=(17,))
    inputs = case.inputs(torch.float32)
    sums = torch.zeros(1, 1, case.features)
    state = dict(zip(STATE, (torch.zeros(1, 1, case.features, 12), sums, torch.full_like(sums, -4e37)), strict=True))
    given = everything(case, {**inputs, **{n: x.requires_grad_() for n, x in state.items()}}, backend="triton")
    for name, x in everything(case, inputs, backend="triton").items():
        assert_close(given[name], x, 1e-6, name)
    assert all(given[f"grad_{name}"].count_nonzero() == 0 for name in STATE)


@pytest.mark.parametrize("tiles", [(16, 16, 16), (32, 64, 16), (16, 32, 128)], ids=str)
def test_any_tile_sizes(tiles):
    config, scan = launch.LaunchConfig(*tiles, warps=1, stages=1), launch.LaunchConfig(0, 4, 0, 1, 2)
    with ExitStack() as stack:
        for kernel in launch.KERNELS:
            stack.enter_context(launch.TABLE.override(kernel, scan if kernel in launch.SCANS else config))
        sizes = {"features": 20, "value_dim": 20, "block_size": 20, "past_blocks": 0}
        compare(small("tiles", length=45, with_state=True, documents=(41,), **sizes))


def test_two_runs_are_equal_bit_for_bit():
    case = small("twice", documents=(11,), length=32)
    inputs = case.inputs(torch.float32)
    first, second = (everything(case, inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_without_a_gradient_of_the_logsumexp():
    case = small("output-alone", documents=(23,), with_state=True)
    ours, exact = prepared(case)
    found = []
    for inputs, backend in ((ours, "triton"), (exact, "reference")):
        output = call(case, inputs, backend=backend).output
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        found.append(torch.autograd.grad(output, list(inputs.values()), weights))
    for name, a, b in zip(INPUTS, *found, strict=True):
        assert_close(a, b, TOLERANCE, name)


def test_ids_may_be_large_and_not_contiguous():
    case = small("ids", length=40)
    ours, exact = prepared(case)
    ids = ((torch.arange(80) >= 50) * 2**40).view(1, -1)[:, ::2]
    found, expected = (
        everything(case, x, backend=backend, document_ids=ids)
        for x, backend in ((ours, "triton"), (exact, "reference"))
    )
    for name, want in expected.items():
        assert_close(found[name], want, TOLERANCE, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_plain_torch(dtype):
    """Error at most twice that of a plain implementation, both against float64.

    Products are upcast in the interpreter, so this is about loads, casts, stores, and rounding between products.
    """
    case = small("half", heads=2, length=27, documents=(20,), with_state=True, value_dim=32)
    inputs = case.inputs(dtype)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    found, rounded = everything(case, inputs, backend="triton"), plain(case, inputs, dtype)
    theirs = {**rounded._asdict(), **{f"grad_{name}": x for name, x in gradients(rounded, inputs).items()}}
    for name, want in everything(case, exact, backend="reference").items():
        single = "logsumexp" in name or name.removeprefix("grad_") in INPUTS[3:]
        assert found[name].dtype == (torch.float32 if single else dtype)
        error, allowed = ((x[name].double() - want).square().mean().sqrt() for x in (found, theirs))
        # Where plain torch is exact, one rounding is allowed.
        floor = torch.finfo(dtype).eps * want.square().mean().sqrt().clamp(min=1e-3)
        assert error <= 2 * allowed + floor, f"{name}: {error:.2e} > 2 * {allowed:.2e}"


@pytest.mark.parametrize(("values", "grads"), [(4000.0, 1e-3), (1.0, 3000.0)], ids=["values", "gradients"])
def test_sums_larger_than_float16_holds(values, grads):
    """Values, or gradients of the output, of which 45 far rows add up to more than 65504."""
    case = small("sums", length=60, block_size=15, past_blocks=0, spread=0.1)
    made = {name: None if x is None else x.detach() for name, x in case.inputs(torch.float16).items()}
    made["value"] = values * (1 + made["value"])
    found = []
    for dtype, backend in ((torch.float16, "triton"), (torch.float64, "reference")):
        inputs = {n: None if x is None else x.to(dtype if n in INPUTS[:3] else x.dtype) for n, x in made.items()}
        if dtype == torch.float64:
            inputs = {n: None if x is None else x.double() for n, x in inputs.items()}
        inputs = {n: None if x is None else x.requires_grad_() for n, x in inputs.items()}
        output = call(case, inputs, backend=backend).output
        wanted = [inputs[name] for name in INPUTS[:5]]
        weights = grads * (1 + 0.1 * torch.linspace(-1, 1, output.numel()).view(output.shape))
        found.append([output, *torch.autograd.grad(output, wanted, weights.to(dtype))])
    for name, a, b in zip(("output", *INPUTS), *found, strict=False):
        assert_close(a, b, 0.02, name)
