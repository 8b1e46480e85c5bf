"""Attention with a probe: the definition against oracles, the tiles against the definition, and the public function."""

from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import PANEL_MATHS, TOLERANCE, Case, assert_close, built, ragged
from probe_cases import PROBE_CASES, RESULTS, called, expected_results, incoming, probe_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longmix_kernels.attention import attention, probe_attention
from longmix_kernels.attention.panels import MATMUL
from longmix_kernels.attention.probe_blocked import blocked_backward, blocked_forward

ORACLES = Path(__file__).parents[2] / "fixtures" / "model_side"
every_backend = pytest.mark.parametrize("backend", ["reference", "blocked"])


def drawn(*shape: int, seed: int = 0, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=("float64", "float32"))
@pytest.mark.parametrize("name", ["full_gqa", "window", "documents", "decode"])
def test_equals_the_authors_code(name, dtype, backend):
    oracle = np.load(ORACLES / f"parallax_{name}.npz")
    tensors = [torch.tensor(oracle[x]).to(dtype).requires_grad_() for x in "qrkv"]
    ids = torch.tensor(oracle["document_ids"]) if "document_ids" in oracle else None
    window = int(oracle["window"]) or None if "window" in oracle else None
    options = {"window": window, "document_ids": ids, "scale": float(oracle["scale"]), "backend": backend}
    found = [probe_attention(*tensors, **options)]
    wanted = ["o"]
    if "grad_o" in oracle:
        found += torch.autograd.grad(found[0], tensors, torch.tensor(oracle["grad_o"]).to(dtype))
        wanted += [f"grad_{x}" for x in "qrkv"]
    for result, key in zip(found, wanted, strict=True):
        assert_close(result, torch.tensor(oracle[key]), TOLERANCE[dtype], key)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("math", ["matmul", "matmul-tiny-cut"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=("float64", "float32"))
@pytest.mark.parametrize("case", PROBE_CASES, ids=lambda case: case.name)
def test_tiles_match_the_definition(case, dtype, math):
    tensors, pattern, scale = probe_inputs(case, dtype)
    call = called([x.detach() for x in tensors], pattern, scale)
    forward = blocked_forward(call, PANEL_MATHS[math])
    grads = blocked_backward(call, incoming(forward[0]).to(dtype), *forward, PANEL_MATHS[math])
    for name, result, wanted in zip(RESULTS, (forward[0], *grads), expected_results(case, dtype), strict=True):
        assert_close(result, wanted, TOLERANCE[dtype], name)


@every_backend
def test_without_a_probe_it_is_attention(backend):
    """Equal bit for bit, since nothing is added to the sums of softmax attention."""
    query, _, key, value = drawn(2, 50, 4, 16)
    options = {"window": 20, "backend": backend}
    found = probe_attention(query, torch.zeros_like(query), key, value, **options)
    assert_close(found, attention(query, key, value, **options), 1e-14, "output")


def test_it_is_attention_minus_its_derivative_in_the_query():
    query, probe, key, value = drawn(2, 40, 4, 8)
    scale, step = 0.4, 1e-4
    shifted = [attention(query + sign * step * probe / scale, key, value, scale=scale) for sign in (1, -1)]
    derivative = (shifted[0] - shifted[1]) / (2 * step)
    found = probe_attention(query, probe, key, value, scale=scale)
    assert (found - attention(query, key, value, scale=scale)).abs().max() > 0.5
    assert_close(found, attention(query, key, value, scale=scale) - derivative, 1e-7, "output")


@every_backend
def test_weights_of_a_row_sum_to_one_and_do_not_feel_a_shift_of_all_keys(backend):
    query, probe, key, value = drawn(2, 90, 2, 8)
    ones = probe_attention(query, probe, key, torch.ones_like(value), backend=backend)
    assert_close(ones, torch.ones_like(ones), 1e-13, "sum")
    same, moved = (probe_attention(query, probe, key + by, value, backend=backend) for by in (0.0, 30.0))
    assert_close(moved, same, 1e-12, "output")
    # In float32 too: t is taken from the row's own key, before two large terms could cancel.
    single = [x.float() for x in (query, probe, key + 30.0, value)]
    exact = probe_attention(*(x.double() for x in single), backend="reference")
    plain = attention(*(single[i] for i in (0, 2, 3)), backend=backend)
    floor = (plain - attention(*(single[i].double() for i in (0, 2, 3)))).norm() / plain.norm()
    assert (probe_attention(*single, backend=backend) - exact).norm() / exact.norm() < 4 * floor + 1e-6


def test_rows_that_see_nothing_return_zero_and_ignore_gradients():
    case = Case("empty", ragged(sparse=True), batch=1)
    tensors, pattern, scale = probe_inputs(case, torch.float64)
    call = called([x.detach() for x in tensors], pattern, scale)
    forward = blocked_forward(call)
    empty = forward[2].isneginf()
    assert empty.any() and not empty.all() and not forward[0][empty].any()
    grad = incoming(forward[0])
    wanted = blocked_backward(call, grad, *forward)
    found = blocked_backward(call, grad.masked_fill(empty.unsqueeze(-1), 1e30), *forward)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not wanted[0][empty].any() and not wanted[1][empty].any()


@pytest.mark.parametrize("bounds", [built(), built([100, 50, 61])], ids=["causal", "documents"])
def test_later_tokens_change_nothing_before_them(bounds):
    tensors, pattern, scale = probe_inputs(Case("causality", bounds, queries=200, batch=1), torch.float32)
    before = blocked_forward(called([x.detach() for x in tensors], pattern, scale))
    for token in (1, 120):
        changed = [x.detach().clone() for x in tensors]
        for x in changed:
            x[:, token:] = 1e6 * torch.randn_like(x[:, token:])
        for old, new in zip(before, blocked_forward(called(changed, pattern, scale)), strict=True):
            assert torch.equal(old[:, :token], new[:, :token])


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return result


def test_no_tensor_grows_with_the_square_of_the_length():
    for length in (3072, 6144):
        tensors = [torch.randn(1, length, 1, 8).requires_grad_() for _ in range(4)]
        with LargestTensor() as largest:
            probe_attention(*tensors, backend="blocked").sum().backward()
        assert 8 * length <= largest.elements <= 3 * MATMUL.sizes.rows * MATMUL.sizes.full_keys + 8 * length


@pytest.mark.parametrize("name", [pytest.param("documents-gqa-v48", marks=pytest.mark.slow), "permuted-buckets-gqa"])
def test_operators_are_registered_correctly(name):
    case = next(case for case in PROBE_CASES if case.name == name)
    tensors, pattern, scale = probe_inputs(case, torch.bfloat16)
    torch.library.opcheck(torch.ops.longmix.probe_attention_blocked.default, called(tensors, pattern, scale).flat())
    flat = called([x.detach() for x in tensors], pattern, scale).flat()
    results = torch.ops.longmix.probe_attention_blocked(*flat)
    backward = torch.ops.longmix.probe_attention_blocked_backward.default
    torch.library.opcheck(backward, (torch.ones_like(results[0]), *results, *flat))


def test_results_are_as_accurate_in_half_precision_as_torch_is_in_attention():
    """On a CPU everything between inputs and outputs is float32."""
    query, probe, key, value = (x.bfloat16() for x in drawn(1, 150, 2, 32))
    found = probe_attention(query, probe, key + 4, value)
    exact = probe_attention(*(x.double() for x in (query, probe, key + 4, value)), backend="reference")
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 2.0**-8 * exact.norm()


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"probe": torch.zeros(2, 100, 2, 16)}, {}, r"probe is .* \[2, 100, 2, 16\]; allowed is .* \[2, 100, 4, 16\]"),
        ({"probe": torch.zeros(2, 100, 4, 16).half()}, {}, r"probe is torch.float16 .*; allowed is torch.float32"),
        ({"key": torch.zeros(2, 100, 2, 8)}, {}, r"key has shape \[2, 100, 2, 8\]; allowed is \[2, Tk, Hkv, 16\]"),
        ({}, {"query_rows": torch.zeros(1, 1, 100).int()}, r"got query_rows; .* come with lo"),
        ({}, {"window": 0}, r"window=0 with causal=True; window must be at least 1"),
        ({}, {"alibi_slopes": torch.ones(3)}, r"alibi_slopes is torch.float32 \[3\]"),
        ({}, {"backend": "flash"}, r"backend='flash' is not available here"),
    ],
)
def test_errors_name_the_argument(changed, options, message):
    tensors = {
        name: torch.zeros(2, 100, heads, 16)
        for name, heads in zip(("query", "probe", "key", "value"), (4, 4, 2, 2), strict=True)
    }
    with pytest.raises(ValueError, match=message):
        probe_attention(**{**tensors, **changed}, **options)
