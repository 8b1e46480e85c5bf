"""Rung 3: the Triton kernels against the definition, in Triton's interpreter on the CPU, in float32.

Runs only where TRITON_INTERPRET=1 is set before triton is imported; `test_delta_triton.py` starts such a process.
Inputs lie in larger buffers of NaN, so that a load without mask or without `other` shows, and every buffer that the
kernels are given to write is NaN before and lies between guard bands.
"""

import os
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from delta_cases import FASTEST_DECAY, INPUTS, Case, assert_close, call, gradients
from guarded import beside, guarded_buffers, surrounded

from longmix_kernels.delta import delta_rule, launch
from longmix_kernels.delta.inputs import Inputs
from longmix_kernels.delta.triton_backward import triton_backward
from longmix_kernels.delta.triton_forward import run_chunks

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own")

TOLERANCE = 1e-5


def small(name: str, **changed) -> Case:
    """One batch row and head, unless said otherwise."""
    return Case(name, **{"batch": 1, "heads": 1, "value_dim": 16, **changed})


BOUNDED = [
    *(small(f"T{n}", length=n) for n in (1, 16, 17, 65, 130)),
    *(small(kind, length=70, kind=kind) for kind in ("correlated", "fastest", "identical", "overwriting")),
    Case("two-batch-rows-and-heads", length=20, documents=(9,)),
    *(small(f"{a}-{b}", dim=a, value_dim=b, length=40) for a, b in ((48, 80), (96, 16), (1, 3))),
    small("144-16-carried-documents", dim=144, length=35, documents=(7, 16), with_carried=True),
    small("256-16", dim=256, length=17, kind="correlated"),
    small("diagonal", low_rank=False, length=70),
    small("diagonal-documents", low_rank=False, length=70, documents=(13, 40)),
    small("no-state", with_state=False, length=70),
    small("documents", documents=(13, 40, 30)),
    small("carried-144-no-state", dim=144, documents=(13, 3), length=20, with_state=False, with_carried=True),
    small("documents-no-state", documents=(1, 1, 1, 30, 2), with_state=False, length=70),
    small("documents-of-one-token", documents=(1,) * 60, length=70),
    small("documents-at-chunk-ends", documents=(64, 64, 1), length=140),
    *(small(f"chunk-{n}", chunk_size=n, length=n + 20, documents=(n // 2,)) for n in (16, 32)),
]
EXACT = [
    *(small(f"T{n}", length=n) for n in (1, 17, 40)),
    small("documents-at-sub-chunk-ends", documents=(16, 16, 3), length=44),
    small("chunk-16", chunk_size=16, length=20, documents=(10,)),
    Case("two-batch-rows-and-heads", length=12, documents=(9,)),
    small("80-48", dim=80, value_dim=48, length=17),
    small("diagonal-documents", low_rank=False, length=36, documents=(13, 10)),
    small("carried-documents-of-one-token", documents=(1,) * 15, length=18, with_state=False, with_carried=True),
]
HEAD = [
    *(small(f"T{n}", length=n) for n in (1, 17, 130)),
    small("correlated", kind="correlated", length=70),
    small("documents", documents=(13, 40, 30)),
    small("documents-no-state", documents=(1, 1, 1, 30, 2), with_state=False, length=70),
    small("carried-chunk-16", chunk_size=16, length=36, documents=(20,), with_carried=True),
    Case("two-batch-rows-and-heads", length=12, documents=(9,)),
    small("80-48", dim=80, value_dim=48, length=20),
    small("diagonal-documents", low_rank=False, length=70, documents=(13, 40)),
    small("no-state", with_state=False, length=70),
]
HEAD = [replace(case, scalar_decay=True) for case in HEAD]


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    # Output and final state.
    with guarded_buffers(monkeypatch, least=2):
        yield


def results(case: Case, inputs: dict, **options) -> dict[str, torch.Tensor]:
    """Output, final state and gradients by name."""
    pair = call(delta_rule, case, inputs, scale=0.5, **options)
    return {"output": pair[0], "state": pair[1], **gradients(pair, inputs)}


def prepared(case: Case, change=None) -> tuple[dict, dict]:
    """Inputs for the kernels, with decays changed, and the same numbers in float64 for the definition."""
    made = case.inputs(torch.float32)
    if change is not None:
        torch.manual_seed(0)
        made["log_decay"] = change(made["log_decay"].detach())
    ours = {name: None if x is None else (beside if name in INPUTS[6:] else surrounded)(x) for name, x in made.items()}
    return ours, {name: None if x is None else x.detach().double().requires_grad_() for name, x in ours.items()}


def both(case: Case, bound: float | None, change=None) -> tuple[dict, dict]:
    """What the kernels and the definition return, by name."""
    ours, exact = prepared(case, change)
    return results(case, ours, backend="triton", min_log_decay=bound), results(case, exact, backend="reference")


def compare(case: Case, bound: float | None, change=None, tolerance: float = TOLERANCE) -> None:
    found, expected = both(case, bound, change)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert_close(found[name], want, tolerance, name)


@pytest.mark.parametrize("case", BOUNDED, ids=lambda case: case.name)
def test_matches_reference_with_bounded_decays(case):
    compare(case, FASTEST_DECAY)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_matches_reference_with_any_decays(case):
    compare(case, None)


@pytest.mark.parametrize("case", HEAD, ids=lambda case: case.name)
def test_matches_reference_with_one_decay_a_head(case):
    compare(case, None)


STEPS = [
    *(small(f"T{n}", length=n) for n in (1, 3, 8)),
    Case("head-two-batch-rows-and-heads", length=4, scalar_decay=True),
    Case("80-48-carried", length=2, dim=80, value_dim=48, with_carried=True),
    Case("documents-carried", length=1, documents=(1,), with_carried=True),
    Case("diagonal-1-3", length=2, dim=1, value_dim=3, low_rank=False),
    small("no-state", length=2, with_state=False),
    small("head-diagonal-no-state", length=1, scalar_decay=True, low_rank=False, with_state=False),
]


@pytest.mark.parametrize("values", [16, 64])
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_steps_match_reference(case, values, monkeypatch):
    launched: list[str] = []
    launching = launch.Call.launch

    def launch_and_note(made: launch.Call, kernel: str, *given) -> None:
        launched.append(kernel)
        launching(made, kernel, *given)

    monkeypatch.setattr(launch.Call, "launch", launch_and_note)
    ours, exact = prepared(case)
    with torch.no_grad(), launch.TABLE.override("step", launch.LaunchConfig(0, values, warps=1, stages=1)):
        found = call(delta_rule, case, ours, backend="triton", min_log_decay=FASTEST_DECAY)
        expected = call(delta_rule, case, exact, backend="reference")
    assert launched == ["step"]
    for name, result, want in zip(("output", "state"), found, expected, strict=True):
        assert_close(result, want, TOLERANCE, name)


@pytest.mark.parametrize(("bound", "scalar_decay"), [(0.0, False), (None, False), (None, True)])
def test_reflections_lose_a_digit(bound, scalar_decay):
    """Eigenvalues of -1 at one key, with no decay: no rounding ever fades."""
    compare(small("reflecting", kind="reflecting", length=70, scalar_decay=scalar_decay), bound, tolerance=1e-4)


DECAYS = {
    "constant": lambda x: torch.full_like(x, -1e4),
    "mostly-open": lambda x: torch.where(torch.rand_like(x) < 0.1, -1e4, 0.1 * x),
    "shut-channels-or-heads": lambda x: torch.where(torch.arange(x.shape[-1]) % 3 == 0, -1e4, x),
    "of-all-sizes": lambda x: -(10.0 ** (8 * torch.rand_like(x) - 4)),
    "infinite": lambda x: torch.where(torch.rand_like(x) < 0.1, -torch.inf, x),
}


@pytest.mark.parametrize("change", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize(("length", "scalar_decay"), [(20, False), (70, True)], ids=["of-channels", "of-heads"])
def test_any_decay(length, scalar_decay, change):
    compare(small("decay", length=length, documents=(5,), scalar_decay=scalar_decay), None, change)


@pytest.mark.parametrize(("bound", "chunk"), [(0.0, 64), (-2.09, 64), (-4.06, 32)])
def test_the_longest_chunks_at_their_bound(bound, chunk):
    """Every decay is as fast as promised: the largest exponents that there can be."""
    case = small("bound", length=70, documents=(40,))
    ours, _ = prepared(case, lambda x: torch.full_like(x, bound))
    assert launch.Call(Inputs(*ours.values(), None, 1.0, None, bound)).chunk == chunk
    compare(case, bound, lambda x: torch.full_like(x, bound))


def test_a_broken_promise_is_held_to():
    """Faster decays count as the fastest promised, up to the rounding of what is promised."""
    case = small("broken", length=70)
    promised = -0.5
    change = lambda x: torch.where(torch.rand_like(x) < 0.2, -1e4, x)  # noqa: E731
    ours, exact = prepared(case, change)
    exact["log_decay"] = exact["log_decay"].detach().clamp(min=1.0001 * promised).requires_grad_()
    found = results(case, ours, backend="triton", min_log_decay=promised)
    for name, want in results(case, exact, backend="reference").items():
        assert_close(found[name], want, TOLERANCE, name)


def test_without_a_gradient_of_the_state():
    case = small("no-final", documents=(13, 20), length=70)
    found = []
    for backend, inputs in zip(("triton", "reference"), prepared(case), strict=True):
        output, _ = call(delta_rule, case, inputs, backend=backend, min_log_decay=FASTEST_DECAY)
        found.append(gradients([output], inputs))
    for name, want in found[1].items():
        assert_close(found[0][name], want, TOLERANCE, name)


@pytest.mark.parametrize("tiles", [(16, 64), (32, 16)], ids=str)
def test_any_tile_sizes(tiles):
    """Of every way to weight pairs, in every kernel."""
    config = launch.LaunchConfig(*tiles, warps=1, stages=1)
    with ExitStack() as stack:
        for kernel in launch.KERNELS:
            stack.enter_context(launch.TABLE.override(kernel, config))
        compare(small("bounded", length=40, dim=40, value_dim=40, documents=(9, 20)), FASTEST_DECAY)
        compare(small("exact", length=20, dim=20, value_dim=40, documents=(7,)), None)
        compare(small("head", length=20, dim=40, value_dim=20, documents=(7,), scalar_decay=True), None)


@pytest.mark.parametrize(
    ("bound", "scalar_decay"), [(FASTEST_DECAY, False), (None, False), (None, True)], ids=["bounded", "exact", "head"]
)
def test_what_chunks_do_is_found_again_bit_for_bit(bound, scalar_decay):
    """The backward's states and maps are those that the outputs came from."""
    case = small("again", documents=(13, 40), length=70, scalar_decay=scalar_decay)
    ours, _ = prepared(case)
    made = launch.Call(Inputs(*ours.values(), case.document_ids(), 1.0, None, bound))
    output, final = made.query.new_empty(ours["value"].shape), ours["initial_state"].new_empty(1, 1, 16, 16)
    first, again = run_chunks(made, output, final), run_chunks(made, None, None)
    for name in ("transitions", "reads", "kept"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    left = again.kept[:, :, -1, :, None] * again.states[:, :, -1]
    left = first.states[:, :, -1] + left + again.transitions[:, :, -1] @ again.states[:, :, -1]
    restarted = case.document_ids()[0, made.chunk * (made.chunks - 1)] != case.document_ids()[0, -1]
    assert not restarted
    assert_close(final, left, 1e-6, "state")


def test_later_tokens_change_nothing_before_them():
    case = small("causality", length=70, documents=(20,), with_carried=True)
    inputs = {name: x.detach() for name, x in case.inputs(torch.float32).items()}
    before, _ = call(delta_rule, case, inputs, backend="triton", min_log_decay=-1.0)
    for token in (16, 45, 64):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in INPUTS[:6]:
            changed[name][:, token:] = changed[name][:, token:].flip(-1)
        after, _ = call(delta_rule, case, changed, backend="triton", min_log_decay=-1.0)
        assert_close(before[:, :token], after[:, :token], 1e-6, "output")
        assert not torch.equal(before[:, token], after[:, token])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_stored_in_their_own_dtype(dtype):
    """Products are upcast in the interpreter, so this is about loads, casts, stores, and rounding between products."""
    case = small("half", length=70, dim=32)
    inputs = case.inputs(dtype)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items() if x is not None}
    found = results(case, inputs, backend="triton", min_log_decay=FASTEST_DECAY)
    for name, want in results(case, exact, backend="reference").items():
        assert found[name].dtype == inputs.get(name, inputs["initial_state" if name == "state" else "query"]).dtype
        assert_close(found[name], want, 0.03, name)


def test_one_decay_a_head_is_read_without_a_copy_and_its_gradient_is_as_small():
    case = small("head", length=40, heads=2, scalar_decay=True)
    ours, _ = prepared(case)
    inputs = Inputs(*ours.values(), None, 1.0, None, None)
    made = launch.Call(inputs)
    assert made.log_decay.data_ptr() == ours["log_decay"].data_ptr()
    assert (made.decay, made.chunk) == ("head", 64)
    grads = triton_backward(inputs, ours["value"], None)
    assert grads[3].shape == ours["log_decay"].shape == (1, 40, 2)


def test_one_decay_a_head_is_the_same_decay_for_all_channels():
    """Both ways through the kernels, whose weights are found by different sums."""
    case = small("both", length=20, documents=(13,), scalar_decay=True)
    ours, _ = prepared(case)
    wide = ours["log_decay"].detach().unsqueeze(-1).expand(-1, -1, -1, case.dim).requires_grad_()
    found, of_channels = (results(case, x, backend="triton") for x in (ours, {**ours, "log_decay": wide}))
    of_channels["log_decay"] = of_channels["log_decay"].sum(-1)
    for name, want in of_channels.items():
        assert_close(found[name], want, TOLERANCE, name)


def test_ids_may_be_large():
    case = small("ids", length=40)
    ours, exact = prepared(case)
    ids = ((torch.arange(case.length) >= 25) * 2**40).view(1, -1)
    options = {"document_ids": ids, "min_log_decay": FASTEST_DECAY}
    found, expected = (
        results(case, x, backend=backend, **options) for x, backend in ((ours, "triton"), (exact, "reference"))
    )
    for name, want in expected.items():
        assert_close(found[name], want, TOLERANCE, name)
