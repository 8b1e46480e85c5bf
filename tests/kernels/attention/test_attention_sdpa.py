"""Plain attention by torch's kernels: alignment, head counts, errors, and which kernel is asked for."""

import importlib

import pytest
import torch
from attention_cases import Case, assert_close, built
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend

from longmix_kernels.attention import attention, sdpa, sdpa_supports
from longmix_kernels.attention.sdpa import _kernel_order, activate_flash


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "case",
    [
        Case("square", built()),
        Case("gqa-v48", built(), heads=6, value_dim=48),
        Case("decode", built(), queries=1, keys=100),
        Case("prefill-chunk", built(), queries=30, keys=100),
        Case("one-token", built(), queries=1),
    ],
    ids=lambda case: case.name,
)
def test_equals_attention(case, causal):
    inputs = case.inputs(torch.float64)[0]
    got, want = sdpa(*inputs, causal=causal, scale=0.3), attention(*inputs, causal=causal, scale=0.3)
    assert_close(got, want, 1e-12, "output")
    grads = [torch.autograd.grad(x.square().sum(), inputs) for x in (got, want)]
    for name, a, b in zip(("query", "key", "value"), *grads, strict=True):
        assert_close(a, b, 1e-12, name)


@pytest.mark.parametrize("queries", [1, 30, 100])
def test_compiles_as_one_graph(queries):
    inputs = Case("compiled", built(), queries=queries, keys=100, heads=4).inputs(torch.float64)[0]
    compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), sdpa(*inputs), 1e-12, "output")


@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.zeros(8, 4, 16)},
        {"query": torch.zeros(2, 9, 4, 16)},
        {"query": torch.zeros(2, 8, 3, 16)},
        {"key": torch.zeros(2, 8, 2, 8)},
        {"value": torch.zeros(2, 7, 2, 16)},
        {"value": torch.zeros(2, 8, 2, 16).half()},
    ],
    ids=["dimensions", "more-queries", "heads", "head-dim", "lengths", "dtype"],
)
def test_calls_it_does_not_cover_are_refused(change):
    inputs = {"query": torch.zeros(2, 8, 4, 16), "key": torch.zeros(2, 8, 2, 16), "value": torch.zeros(2, 8, 2, 16)}
    assert sdpa_supports(**inputs)
    inputs |= change
    assert not sdpa_supports(**inputs)
    with pytest.raises(ValueError, match=r"sdpa got query \[.*\], key \[.*\], value .*; allowed are query \[B, Tq"):
        sdpa(**inputs)


def test_rows_without_a_key_need_causal():
    query, key = torch.zeros(1, 9, 2, 16), torch.zeros(1, 8, 2, 16)
    assert sdpa_supports(query, key, key, causal=False)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have a GPU of a compute capability and some FlashAttention packages; note what is activated."""
    activated = []

    def pretend(major, packages):
        def import_module(name):
            if name not in packages:
                raise ModuleNotFoundError(name)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(importlib, "import_module", import_module)
        monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", activated.append)
        return activated

    activate_flash.cache_clear()
    yield pretend
    activate_flash.cache_clear()


@pytest.mark.parametrize(
    ("major", "packages", "activated", "first"),
    [
        (8, ["flash_attn_interface", "flash_attn.cute.interface"], [], SDPBackend.FLASH_ATTENTION),
        (9, [], [], SDPBackend.CUDNN_ATTENTION),
        (9, ["flash_attn_interface", "flash_attn.cute.interface"], ["FA3"], SDPBackend.FLASH_ATTENTION),
        (9, ["flash_attn.cute.interface"], ["FA4"], SDPBackend.FLASH_ATTENTION),
        (10, ["flash_attn_interface"], [], SDPBackend.CUDNN_ATTENTION),
        (10, ["flash_attn.cute.interface"], ["FA4"], SDPBackend.FLASH_ATTENTION),
    ],
    ids=["ampere", "hopper", "hopper-fa3", "hopper-fa4", "blackwell", "blackwell-fa4"],
)
def test_kernel_order_by_architecture(gpu, major, packages, activated, first):
    noted = gpu(major, packages)
    order = _kernel_order(torch.device("cuda", 0))
    assert order[0] == first and order[-1] == SDPBackend.MATH and len(set(order)) == 4
    assert _kernel_order(torch.device("cuda", 0)) == order
    assert noted == activated, "activated once per process"
