"""The Triton backend as the public function sees it; and the interpreter tests, in a process of their own."""

import math
from pathlib import Path

import pytest
import torch
from delta_cases import FASTEST_DECAY, INPUTS, Case, call
from engine_contract import assert_passes_in_the_interpreter
from torch.autograd.graph import saved_tensors_hooks

from longmix_kernels.delta import cost, delta_rule, launch
from longmix_kernels.delta.inputs import Inputs


def call_of(dim: int = 16, value_dim: int = 16, length: int = 20, chunk_size=None, bound=FASTEST_DECAY) -> launch.Call:
    query, value = torch.zeros(1, length, 2, dim), torch.zeros(1, length, 2, value_dim)
    return launch.Call(Inputs(query, query, value, query, *[None] * 5, 1.0, chunk_size, bound))


@pytest.mark.slow
def test_interpreter_matches_reference():
    assert_passes_in_the_interpreter(Path(__file__).with_name("test_delta_triton_interpreted.py"), at_least=60)


@pytest.mark.parametrize("bound", [0.1, -math.inf, math.nan])
def test_promises_that_mean_nothing_are_refused(bound):
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"min_log_decay is .*; allowed is a finite number, at most 0, or None"):
        delta_rule(x, x, x, log_decay=x, min_log_decay=bound)


def test_a_promise_changes_nothing_without_triton():
    case = Case("promise", length=40)
    inputs = case.inputs(torch.float32)
    for backend in ("reference", "blocked"):
        with_promise = call(delta_rule, case, inputs, backend=backend, min_log_decay=-0.1)
        assert all(map(torch.equal, with_promise, call(delta_rule, case, inputs, backend=backend)))


@pytest.mark.parametrize("low_rank", [True, False], ids=["low-rank", "diagonal"])
@pytest.mark.parametrize("bound", [FASTEST_DECAY, None])
def test_shapes_are_known_without_running(low_rank, bound):
    """The operators on tensors without data, as torch.compile sees them."""
    shape = (2, 70, 4, 80)
    query = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    value = torch.empty(2, 70, 4, 48, device="meta", dtype=torch.bfloat16)
    decay = torch.empty(shape, device="meta")
    reads = (query, query) if low_rank else (None, None)
    state = torch.empty(2, 4, 80, 48, device="meta")
    inputs = (query, query, value, decay, *reads, state, state, None, 1.0, None, bound)
    results = torch.ops.longmix.delta_triton(*inputs)
    assert [x.shape for x in results] == [value.shape, state.shape]
    assert [x.dtype for x in results] == [torch.bfloat16, torch.float32]
    grads = torch.ops.longmix.delta_triton_backward(results[0], None, *inputs)
    assert [x.shape for x in grads] == [torch.Size([0]) if x is None else x.shape for x in inputs[: len(INPUTS)]]


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_only_inputs_are_kept_for_the_backward(backend):
    """Not what chunks do to states, and of the states between them few on a CPU and none on a GPU."""
    tensors = Case("kept", length=2048, with_carried=True, dim=64, value_dim=64).inputs(torch.float32).values()
    inputs = [x.detach().to("meta").requires_grad_() for x in tensors]
    kept = []
    with saved_tensors_hooks(kept.append, lambda _: None):
        getattr(torch.ops.longmix, f"delta_{backend}")(*inputs, None, 1.0, None, None)
    assert [id(x) for x in kept[-len(inputs) :]] == [id(x) for x in inputs]
    states = kept[: -len(inputs)]
    assert [x.shape for x in states] == ([(2, 2, 10, 64, 64)] if backend == "blocked" else [])
    assert sum(x.nbytes for x in states) < sum(x.nbytes for x in inputs) / 16


@pytest.mark.parametrize(
    ("dims", "length", "bound", "wish", "expected"),
    [
        ((64, 64), 4096, FASTEST_DECAY, None, (64, "bounded")),
        ((128, 64), 4096, FASTEST_DECAY, None, (64, "bounded")),
        ((64, 256), 4096, FASTEST_DECAY, None, (32, "bounded")),
        ((128, 128), 4096, FASTEST_DECAY, 64, (64, "bounded")),
        ((64, 64), 4096, FASTEST_DECAY, 256, (64, "bounded")),
        ((64, 64), 4096, FASTEST_DECAY, 16, (16, "bounded")),
        ((64, 64), 33, FASTEST_DECAY, None, (64, "bounded")),
        ((64, 64), 32, FASTEST_DECAY, None, (32, "bounded")),
        ((64, 64), 1, FASTEST_DECAY, None, (16, "bounded")),
        ((64, 64), 4096, 0.0, None, (64, "bounded")),
        ((64, 64), 4096, -2.1, None, (64, "bounded")),
        ((64, 64), 4096, -2.11, None, (32, "bounded")),
        ((64, 64), 4096, -4.07, 64, (32, "bounded")),
        ((64, 64), 4096, -4.08, None, (32, "exact")),
        ((64, 64), 4096, None, 64, (32, "exact")),
        ((64, 64), 4096, None, 16, (16, "exact")),
        ((64, 64), 16, None, None, (16, "exact")),
        # As `model=125m` has them: kda and gla.
        ((128, 128), 16384, None, None, (32, "exact")),
        ((96, 192), 16384, None, None, (32, "exact")),
    ],
)
def test_chunks_follow_from_the_promise(dims, length, bound, wish, expected):
    assert cost.choose_chunk(*dims, length, wish, bound) == expected
    call = call_of(*dims, length=length, chunk_size=wish, bound=bound)
    assert (call.chunk, call.decay) == expected
    if expected[1] == "bounded":
        assert cost.exponent(expected[0], bound) <= cost.SPAN


@pytest.mark.parametrize(
    ("dims", "length", "bound", "wish", "expected"),
    [
        ((64, 64), 4096, None, None, 64),
        ((64, 64), 4096, -30.0, None, 64),
        ((64, 64), 4096, None, 32, 32),
        ((64, 64), 17, None, None, 32),
        # As `model=125m` has them: deltanet and gated_deltanet.
        ((128, 128), 16384, 0.0, None, 64),
        ((96, 192), 16384, None, None, 64),
        ((256, 256), 16384, None, None, 32),
    ],
)
def test_one_decay_a_head_needs_no_promise_for_long_chunks(dims, length, bound, wish, expected):
    assert cost.choose_chunk(*dims, length, wish, bound, per_head=True) == (expected, "head")


@pytest.mark.parametrize(
    ("dim", "block"), [(1, 16), (16, 16), (48, 64), (64, 64), (80, 32), (96, 32), (100, 64), (144, 32), (256, 64)]
)
def test_blocks_waste_no_more_than_they_must(dim, block):
    assert launch.fit(64, dim) == block
