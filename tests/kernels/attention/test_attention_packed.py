"""Packed documents through torch's FlashAttention: what it is given, what is refused, and what comes out."""

import pytest
import torch
from attention_cases import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import attention as torch_attention
from torch.nn.attention import varlen
from varlen_stand_in import VarlenStandIn

from longmix_kernels.attention import attention, packed, packed_supports
from longmix_kernels.attention.packed import _FLASH_4_LEARNS, _GROUPED
from longmix_kernels.attention.sdpa import activate_flash
from longmix_kernels.runtime import assumed_device

LENGTH = 256
STARTS = torch.tensor([0, 100, 256, 400, 512], dtype=torch.int32)
"""Two documents in each of two rows."""


def inputs(
    heads: int = 4, key_heads: int = 4, dim: int = 16, dtype: torch.dtype = torch.bfloat16, length: int = LENGTH
):
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, key_heads, key_heads)
    return [torch.randn(2, length, n, dim, generator=generator).to(dtype).requires_grad_() for n in sizes]


def ids_of(starts: torch.Tensor, length: int = LENGTH) -> torch.Tensor:
    """The document of every token of two rows."""
    return torch.searchsorted(starts, torch.arange(2 * length), right=True).int().view(2, length)


@pytest.fixture
def stand_in(monkeypatch) -> VarlenStandIn:
    made = VarlenStandIn()
    monkeypatch.setattr(varlen, "varlen_attn", made)
    return made


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_outputs_and_gradients_are_those_of_the_engine(stand_in, key_heads, scale):
    with assumed_device("cuda"):
        output = packed(*(ours := inputs(key_heads=key_heads)), STARTS, scale=scale)
    wanted = attention(
        *(theirs := [x.detach().double().requires_grad_() for x in ours]), document_ids=ids_of(STARTS), scale=scale
    )
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    output.backward(upstream)
    wanted.backward(upstream.double())
    for one, other in zip([output, *(x.grad for x in ours)], [wanted, *(x.grad for x in theirs)], strict=True):
        assert_close(one, other, 2e-2, "bfloat16")
    grouped = bool(_GROUPED) and key_heads < 4
    (call,) = stand_in.calls
    assert torch.equal(call.pop("starts"), STARTS)
    assert call == {
        "shapes": [(512, 4, 16), (512, key_heads, 16), (512, key_heads, 16)],
        "same_starts": True,
        "longest": (LENGTH, LENGTH),
        "window_size": (-1, 0),
        "grouped": grouped,
    }


def test_documents_without_tokens_change_nothing(stand_in):
    some = inputs(length=512)
    starts = torch.tensor([0, 300, 512, 512, 512, 900, 1024, 1024, 1024], dtype=torch.int32)
    with assumed_device("cuda"):
        assert torch.equal(packed(*some, starts), packed(*some, starts.unique()))


REFUSED = {
    "float32": (inputs(dtype=torch.float32), STARTS),
    "float64": (inputs(dtype=torch.float64), STARTS),
    "dim-20": (inputs(dim=20), STARTS),
    "dim-264": (inputs(dim=264), STARTS),
    "heads-that-do-not-divide": (inputs(key_heads=3), STARTS),
    "fewer-queries": ([x[:, -n:] for x, n in zip(inputs(), (1, 256, 256), strict=True)], STARTS),
    "wider-values": ([*inputs()[:2], inputs(dim=32)[2]], STARTS),
    "starts-int64": (inputs(), STARTS.long()),
    "starts-of-rows": (inputs(), STARTS[None]),
    "more-documents-than-pay": (inputs(), torch.linspace(0, 512, 6).int()),
}


@pytest.mark.parametrize(("tensors", "starts"), REFUSED.values(), ids=REFUSED)
def test_other_calls_are_refused(tensors, starts):
    with assumed_device("cuda"):
        assert not packed_supports(*tensors, starts)
        with pytest.raises(ValueError, match=r"packed got query torch.* on cpu; allowed are query \[B, T, Hq, D\]"):
            packed(*tensors, starts)


def test_a_cpu_has_no_such_kernel():
    assert not packed_supports(*inputs(), STARTS)


DEVICES = {  # compute capability, the package behind torch's flash kernel, head size: whether it is covered
    "turing": ((7, 5), None, 64, False),
    "ampere": ((8, 0), None, 256, True),
    "ada": ((8, 9), None, 192, True),
    "ada-224": ((8, 9), None, 224, False),
    "ada-256": ((8, 9), None, 256, True),
    "hopper": ((9, 0), None, 128, True),
    "hopper-fa3": ((9, 0), "FA3", 256, True),
    "blackwell-fa4": ((10, 0), "FA4", 128, _FLASH_4_LEARNS),
    "blackwell-fa4-256": ((10, 0), "FA4", 256, False),
    "consumer-blackwell-200": ((12, 0), None, 200, False),
}


@pytest.mark.parametrize(("capability", "package", "dim", "covered"), DEVICES.values(), ids=DEVICES)
def test_gpus_and_packages(monkeypatch, capability, package, dim, covered):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: package)
    activate_flash.cache_clear()
    with FakeTensorMode():
        tensors = [torch.empty(2, 256, 4, dim, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        assert packed_supports(*tensors, torch.empty(3, dtype=torch.int32, device="cuda")) == covered
    activate_flash.cache_clear()


def test_a_gpu_waits_for_nothing(monkeypatch):
    """Fake tensors have no values: whatever waits for one raises. Without a GPU, gradients are those of a CPU's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    activate_flash.cache_clear()
    for device in ("cuda", "cpu"):
        with FakeTensorMode(), assumed_device("cuda"), torch.set_grad_enabled(device == "cpu"):
            tensors = [
                torch.empty(2, 256, heads, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
                for heads in (4, 2, 2)
            ]
            output = packed(*tensors, torch.empty(3, dtype=torch.int32, device=device))
            assert output.shape == (2, 256, 4, 64) and output.device.type == device
            if device == "cpu":
                output.sum().backward()
                assert all(x.grad.shape == x.shape and x.grad.dtype == torch.bfloat16 for x in tensors)
    activate_flash.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_on_a_gpu_outputs_and_gradients_are_those_of_float64(dim, key_heads):
    """With documents that have no tokens, in between and at the end."""
    starts = torch.tensor([0, 300, 1024, 1024, 1024, 1100, 2048, 2048, 2048], dtype=torch.int32)
    ours = [x.detach().cuda().requires_grad_() for x in inputs(key_heads=key_heads, dim=dim, length=1024)]
    theirs = [x.detach().double().cpu().requires_grad_() for x in ours]
    upstream = torch.randn(2, 1024, 4, dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    output = packed(*ours, starts.cuda())
    output.backward(upstream.cuda())
    wanted = attention(*theirs, document_ids=ids_of(starts, 1024))
    wanted.backward(upstream.double())
    for one, other in zip([output, *(x.grad for x in ours)], [wanted, *(x.grad for x in theirs)], strict=True):
        assert_close(one.cpu(), other, 2e-2, "bfloat16")
