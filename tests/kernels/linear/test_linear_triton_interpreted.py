"""Rung 3: the Triton kernels against the definition, in Triton's interpreter on the CPU, in float32.

Runs only where TRITON_INTERPRET=1 is set before triton is imported; `test_linear_triton.py` starts such a process.
Inputs lie in larger buffers of NaN, so that a load without mask or without `other` shows, and every buffer that the
kernels are given to write is NaN before and lies between guard bands.
"""

import os
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from guarded import beside, guarded_buffers, surrounded
from linear_cases import INPUTS, REGIMES, Case, assert_close, assert_second_document_forgets, call

from longmix_kernels.linear import launch, linear_attention

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own")

TOLERANCE = 1e-5


class Positive(Case):
    """A case in which normalisers do not cancel: with signs of both kinds, rounding shows hundredfold in some rows."""

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor | None]:
        made = super().inputs(dtype, seed)
        return made | {name: made[name].detach().abs().requires_grad_() for name in ("query", "key")}


def small(name: str, kind: type[Case] = Case, **changed) -> Case:
    """One batch row and head, unless said otherwise."""
    return kind(name, **{"batch": 1, "heads": 1, **changed})


SIG = {"normalize": False}
CARRIED = {"with_carried": True}
CHUNKS = {64: 150, 128: 300, 256: 520, 512: 530}
"""Chunk sizes and a length that ends within a later chunk; published kernels have wrong gradients from 256 on."""


def chunked(size: int, length: int, documents: bool) -> list[Case]:
    """Both forms; documents begin within the first chunk, with the second one, and soon after that.

    Decays add up to the largest sums in the longest chunk where gates are forgetful, and must lose no digits there.
    """
    options = {"length": length, "chunk_size": size, "documents": (size - 20, 20, 5) if documents else ()}
    name = f"T{length}-chunk-{size}{'-documents' * documents}"
    regime = "forgetful" if size == max(CHUNKS) and not documents else "usual"
    return [small(f"exp-{name}", Positive, regime=regime, **options), small(f"sig-{name}", **options, **SIG)]


CASES = [
    *(small(f"exp-T{n}", length=n) for n in (1, 15, 17, 63, 130)),
    *(small(f"sig-T{n}", length=n, **SIG) for n in (1, 17, 130)),
    Case("exp-two-batch-rows-and-heads"),
    Case("sig-two-batch-rows-and-heads", **SIG),
    *(small(f"exp-{regime}", Positive, regime=regime) for regime in REGIMES),
    *(small(f"sig-{regime}", regime=regime, **SIG) for regime in REGIMES),
    small("exp-strong-input-T300-chunk-256", Positive, regime="strong-input", length=300, chunk_size=256),
    # Several chunks and heads, whose states lie side by side: published kernels write past those of such dimensions.
    *(
        Case(f"exp-{a}-{b}", dim=a, value_dim=b, length=40, chunk_size=16, batch=1)
        for a, b in ((48, 80), (80, 48), (96, 16), (1, 3))
    ),
    small("sig-96-192", dim=96, value_dim=192, length=40, chunk_size=16, **SIG),
    small("exp-260-300", dim=260, value_dim=300, length=17),
    small("decay-only", gated=False, **SIG),
    small("exp-no-state", with_state=False),
    small("sig-no-state", with_state=False, **SIG),
    small("exp-no-input-gate", gated=False, with_state=False),
    Case("exp-documents", documents=(13, 40, 3)),
    Case("sig-documents", documents=(13, 40, 3), **SIG),
    Case("exp-carried-documents-chunk-32", documents=(13, 40, 3), chunk_size=32, heads=1, **CARRIED),
    small("exp-carried-no-state", Positive, documents=(20, 4), length=35, chunk_size=16, with_state=False, **CARRIED),
    small("exp-documents-no-state", Positive, documents=(1, 1, 1, 30, 2), with_state=False, regime="strong-input"),
    small("sig-carried-no-state-chunk-32", documents=(32, 1, 40), with_state=False, chunk_size=32, **CARRIED, **SIG),
    small("exp-documents-of-one-token", documents=(1,) * 60),
    small("exp-documents-at-chunk-ends", documents=(16, 16, 15), length=60, chunk_size=16),
    small("sig-T130-chunk-16", chunk_size=16, length=130, **SIG),
    *(
        case
        for size, length in CHUNKS.items()
        for documents in (False, True)
        for case in chunked(size, length, documents)
    ),
]


@pytest.fixture(autouse=True)
def guards(monkeypatch, request):
    # Forward: output, gates, states and final memory. Backward: gates, two states, four gradients and their sums.
    # Steps: output and final memory.
    with guarded_buffers(monkeypatch, least=2 if "steps" in request.node.name else 4):
        yield


def prepared(case: Case, change=None) -> tuple[dict, dict]:
    """Inputs for the kernels and the same numbers in float64 for the definition."""
    made = case.inputs(torch.float32)
    made = {name: made[name].detach() if made.get(name) is not None else None for name in INPUTS}
    if change is not None:
        change(made)
    ours = {
        name: x if x is None else (surrounded if index < 5 else beside)(x)
        for index, (name, x) in enumerate(made.items())
    }
    exact = {name: x if x is None else x.detach().double().requires_grad_() for name, x in ours.items()}
    return ours, exact


def differentiate(results: list, inputs: dict, wanted_scale: torch.Tensor | None, with_final: bool) -> dict:
    """Output, state and gradients by name; the state is brought to the log scale of another implementation."""
    output, memory, *others = (x if index < 3 else x.detach() for index, x in enumerate(results))
    generator = torch.Generator().manual_seed(3)

    def random(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    factor = torch.ones(memory.shape[:2], dtype=memory.dtype)
    if others:
        factor = (others[1].double() - wanted_scale.double()).exp().to(memory.dtype)
    grads = [surrounded(random(output)).detach(), beside(random(memory) * factor[..., None, None]).detach()]
    found = {"output": output, "final memory": memory * factor[..., None, None]}
    if others:
        grads.append(beside(random(others[0]) * factor[..., None]).detach())
        found["final normalizer"] = others[0] * factor[..., None]
    given = {name: x for name, x in inputs.items() if x is not None}
    outputs = [output, memory, *others[:1]]
    count = len(outputs) if with_final else 1
    # The state itself has no gradient where none arrives, and the log scale none through the output alone.
    gradients = torch.autograd.grad(outputs[:count], list(given.values()), grads[:count])
    return found | {f"grad {name}": x for name, x in zip(given, gradients, strict=True)}


def both(case: Case, with_final: bool = True, change=None) -> tuple[dict, dict]:
    """What the kernels and the definition return, by name, perhaps after a change to the tensors of the inputs."""
    ours, exact = prepared(case, change=change)
    expected = call(linear_attention, case, exact, backend="reference")
    results = call(linear_attention, case, ours, backend="triton")
    scale = expected[3].detach() if case.normalize else None
    return differentiate(results, ours, scale, with_final), differentiate(expected, exact, scale, with_final)


def compare(case: Case, with_final: bool = True, change=None) -> None:
    results, expected = both(case, with_final, change)
    for name, want in expected.items():
        assert_close(results[name], want, TOLERANCE, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case):
    compare(case)


@pytest.mark.parametrize(
    ("normalize", "with_state", "start"),
    [(True, True, 20), (True, False, 32), (False, True, 32), (False, False, 20)],
    ids=["exp-state-20", "exp-zero-32", "sig-state-32", "sig-zero-20"],
)
def test_a_document_leaves_no_trace_in_the_next(normalize, with_state, start):
    """A closed gate would leak here: what came before is e ** 100 times as strong."""
    case = small("forgets", Positive, length=50, normalize=normalize, with_state=with_state, chunk_size=16)
    assert_second_document_forgets(linear_attention, case, start, backend="triton")


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_gates_that_close_for_good(normalize):
    def close(made: dict) -> None:
        made["log_decay"][:, 16::9] = -torch.inf
        made["log_decay"][:, 5::9] = -1e4
        made["log_input"][:, 3::4] = -torch.inf
        # What came before a reset must not set the scale after it.
        made["log_input"][:, ::9] += 100.0 * normalize

    compare(small("closed", Positive, length=40, chunk_size=16, normalize=normalize), change=close)


def test_documents_that_begin_from_a_strong_state():
    """It outweighs all tokens, in each document anew."""

    def strengthen(made: dict) -> None:
        made["log_scale"] += 110.0
        made["normalizer"].abs_()

    compare(small("strong", Positive, length=40, documents=(20,), chunk_size=16), change=strengthen)


def test_the_first_token_outweighs_all_later_ones():
    """What it wrote sets the scale of all rows, several steps of the scan away."""

    def strengthen(made: dict) -> None:
        made["log_input"][:, 0] += 110.0

    with launch.TABLE.override("scales", replace(launch.TABLE.interpreted["scales"], rows=16)):
        results, expected = both(
            small("first", Positive, length=40, chunk_size=16, with_state=False), change=strengthen
        )
    # Its value is what all rows read, so that the other gradients are nothing but rounding.
    for name in ("output", "final memory", "final normalizer", "grad value"):
        assert_close(results[name], expected[name], TOLERANCE, name)


def test_a_query_of_zero_reads_zero_however_strong_the_inputs():
    """exp(-m) is then 0 in float32, and nothing else is left to divide by; nor is there a gradient of such a query."""

    def strengthen(made: dict) -> None:
        made["query"][:, ::3] = 0.0
        made["log_input"] += 110.0

    results, expected = both(small("zero", Positive, length=20, with_state=False), change=strengthen)
    results["grad query"][:, ::3] = expected["grad query"][:, ::3] = 0.0
    for name, want in expected.items():
        assert_close(results[name], want, TOLERANCE, name)


STEPS = [
    *(small(f"exp-T{n}", length=n) for n in (1, 3, 8)),
    *(small(f"sig-T{n}", length=n, **SIG) for n in (1, 8)),
    *(small(f"exp-{regime}", Positive, regime=regime, length=4) for regime in REGIMES),
    Case("exp-80-48", length=2, dim=80, value_dim=48, documents=()),
    Case("sig-1-3", length=1, dim=1, value_dim=3, **SIG),
    Case("exp-documents-carried", length=1, documents=(1,), **CARRIED),
    Case("sig-no-state-carried", length=2, with_state=False, **SIG, **CARRIED),
    small("exp-no-state", length=2, with_state=False),
    small("exp-no-input-gate", length=2, gated=False),
    small("sig-no-state", length=1, with_state=False, **SIG),
]


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_steps_match_reference(case, monkeypatch):
    launched: list[str] = []
    launching = launch.Call.launch

    def launch_and_note(made: launch.Call, kernel: str, *given) -> None:
        launched.append(kernel)
        launching(made, kernel, *given)

    monkeypatch.setattr(launch.Call, "launch", launch_and_note)
    ours, exact = prepared(case)
    with torch.no_grad():
        found = call(linear_attention, case, ours, backend="triton")
        expected = call(linear_attention, case, exact, backend="reference")
    assert launched == ["step"]
    for name, result, want in zip(("output", *INPUTS[5:8]), found, expected, strict=False):
        assert_close(result, want, TOLERANCE, name)


def test_steps_in_blocks_of_columns():
    config = launch.LaunchConfig(rows=0, keys=16, block=0, warps=1, stages=1)
    case = Case("exp-40-40", length=3, dim=40, value_dim=40)
    ours, exact = prepared(case)
    with torch.no_grad(), launch.TABLE.override("step", config):
        found = call(linear_attention, case, ours, backend="triton")
    for result, want in zip(found, call(linear_attention, case, exact, backend="reference"), strict=True):
        assert_close(result, want, TOLERANCE, case.name)


@pytest.mark.parametrize("index", [1, 2], ids=["memory", "normalizer"])
def test_a_gradient_of_one_part_of_the_state_alone(index):
    case = small("part", length=20, documents=(7,))
    ours, exact = prepared(case)
    found = []
    for inputs, backend in ((ours, "triton"), (exact, "reference")):
        results = call(linear_attention, case, inputs, backend=backend)
        factor = results[3].detach().exp().view(1, 1, *[1] * (3 - index))
        total = (results[index] * factor).sum() + 0 * results[0].sum()
        given = {name: x for name, x in inputs.items() if x is not None}
        found.append(dict(zip(given, torch.autograd.grad(total, list(given.values())), strict=True)))
    assert found[0].keys() == found[1].keys() >= {*INPUTS[:5]}
    for name, gradient in found[0].items():
        assert_close(gradient, found[1][name], TOLERANCE, name)


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_without_a_gradient_of_the_state(normalize):
    compare(Case("no-final", normalize=normalize, heads=1, documents=(13, 40)), with_final=False)


def test_a_normalizer_that_cancels_is_as_accurate_as_the_definition_in_float32():
    case = small("cancelling", regime="strong-input", batch=2, heads=2)
    results, expected = both(case)
    inputs = {name: x if x is None else x.detach().float().requires_grad_() for name, x in prepared(case)[1].items()}
    plain = call(linear_attention, case, inputs, backend="reference")
    plain = differentiate(plain, inputs, plain[3].detach(), True)
    for name in ("output", *(f"grad {name}" for name in INPUTS[:5])):
        error, allowed = ((x[name].double() - expected[name]).abs().max() for x in (results, plain))
        assert error <= 2 * allowed, f"{name}: {error:.2e} > 2 * {allowed:.2e}"


@pytest.mark.parametrize(
    ("tiles", "fused"),
    [((16, 64, 32), True), ((64, 16, 16), False), ((32, 32, 16), True)],
    ids=str,
)
def test_any_tile_sizes(tiles, fused):
    config = launch.LaunchConfig(*tiles, warps=1, stages=1, fused=fused)
    with ExitStack() as stack:
        for kernel in launch.TILED:
            stack.enter_context(launch.TABLE.override(kernel, config))
        for kernel in ("scales", "grad_rows", "grad_gates"):
            stack.enter_context(launch.TABLE.override(kernel, replace(config, rows=32)))
        compare(small("exp", length=100, dim=24, value_dim=40, documents=(50, 40), chunk_size=64))
        compare(small("sig", length=100, dim=40, value_dim=24, chunk_size=64, **SIG))


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_states_stored_in_half_precision(normalize):
    """Only what is read is rounded, not what is carried: the final state is the same to the last bit."""
    case = small("bf16-states", Positive, length=50, chunk_size=16, documents=(20,), normalize=normalize)
    exact, wanted = both(case)
    with launch.stored_states(torch.bfloat16):
        rounded, _ = both(case)
    assert torch.equal(exact["final memory"], rounded["final memory"])
    assert not torch.equal(exact["output"], rounded["output"])
    for name, want in wanted.items():
        assert_close(rounded[name], want, 2**-7, name)


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_with_bfloat16_inputs_states_in_bfloat16_change_nothing(normalize):
    """Every product rounds a state to the dtype of the inputs anyway."""
    case = small("bf16-all", Positive, length=50, chunk_size=16, documents=(20,), normalize=normalize)
    inputs = {name: case.inputs(torch.bfloat16).get(name) for name in INPUTS}
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        with launch.stored_states(dtype):
            results = call(linear_attention, case, inputs, backend="triton")
            scale = results[3].detach() if normalize else None
            runs.append(differentiate(results, inputs, scale, True))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_two_runs_are_equal_bit_for_bit():
    case = small("twice", length=40, heads=2, documents=(13, 20), chunk_size=16)
    inputs = prepared(case)[0]
    runs = []
    for _ in range(2):
        results = call(linear_attention, case, inputs, backend="triton")
        runs.append(differentiate(results, inputs, results[3].detach(), True))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_half_precision_inputs_are_stored_in_their_own_dtype():
    """Products are upcast in the interpreter, so this is about loads, casts and stores only."""
    case = small("half", Positive, length=40)
    inputs = case.inputs(torch.bfloat16)
    output, memory, *_ = call(linear_attention, case, inputs, backend="triton")
    wanted = call(linear_attention, case, inputs, backend="reference")[0]
    assert output.dtype == torch.bfloat16 and memory.dtype == torch.float32
    assert_close(output, wanted, 0.02, "output")
    given = {name: x for name, x in inputs.items() if x is not None}
    for name, grad in zip(given, torch.autograd.grad(output.float().sum(), list(given.values())), strict=True):
        assert grad.dtype == given[name].dtype, name


def test_one_decay_a_head_and_large_document_ids():
    """A decay that is one number seen everywhere, ids beyond 32 bits, and a gradient that is one too."""
    case = small("retention", gated=False, with_state=False, heads=2, length=70, **SIG)
    made = case.inputs(torch.float32)
    ids = case.length // 2 <= torch.arange(case.length)
    ids = (ids * 2**40).view(1, -1)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [made[name].detach().to(dtype).requires_grad_() for name in INPUTS[:3]]
        decay = torch.tensor([0.9, 0.5]).log().to(dtype).requires_grad_()
        output, _ = linear_attention(*inputs, log_decay=decay, document_ids=ids, backend=backend)
        results.append([output, *torch.autograd.grad(output.sum(), [*inputs, decay])])
    for name, a, b in zip(("output", *INPUTS[:4]), *results, strict=True):
        assert_close(a, b, TOLERANCE, name)
