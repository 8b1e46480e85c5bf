"""What the linear-attention benchmark counts, against counting one by one; and whether its providers do the same."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import linear_providers, linear_work
from benchmarks.linear_providers import LinearShape
from longmix_kernels.linear import linear_attention

SHAPE = LinearShape(2, 256, 3, 16, 24, torch.float32, torch.device("cpu"))


def test_flops_are_those_of_the_recurrence():
    steps, dim, value_dim = 5, 12, 20
    query, key = (torch.randn(steps, dim, requires_grad=True) for _ in range(2))
    value = torch.randn(steps, value_dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        state, outputs = torch.zeros(dim, value_dim, requires_grad=True), []
        for t in range(steps):
            state = 0.9 * state + key[t, :, None] @ value[t, None]
            outputs.append(query[t, None] @ state)
        forward = counter.get_total_flops()
        torch.cat(outputs).sum().backward()
    flops = linear_work.recurrence_flops(steps, dim, value_dim)
    assert flops == {"fwd": forward, "fwd+bwd": counter.get_total_flops()}


def moved(normalize, gates, length, chunk, dtype):
    """Bytes by pass, from tensors of every kind and the list of what each step touches."""
    sequences, dim, value_dim = 6, 16, 24

    def bytes_of(*shape, dtype=torch.float32):
        return torch.empty(sequences, *shape, dtype=dtype, device="meta").nbytes

    chunks = len(range(0, length, chunk))
    q = k = dq = dk = bytes_of(length, dim, dtype=dtype)
    v = y = dv = dy = bytes_of(length, value_dim, dtype=dtype)
    gate = dgate = gates * bytes_of(length)
    states = dstates = bytes_of(chunks, dim, value_dim + normalize)
    scale = denominator = ddenominator = normalize * bytes_of(length)
    state_step = k + v + gate + states
    output_step = q + k + v + gate + states + y + scale + denominator
    grad_states_step = q + dy + gate + scale + denominator + normalize * y + dstates + ddenominator
    gradients_step = q + k + v + dy + gate + states + dstates + scale + denominator + ddenominator
    gradients_step += dq + dk + dv + dgate
    forward = state_step + output_step
    return {"fwd": forward, "fwd+bwd": forward + state_step + grad_states_step + gradients_step}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("length", "chunk"), [(64, 16), (100, 32), (20, 128)])
@pytest.mark.parametrize(("normalize", "gates"), [(True, 2), (False, 2), (False, 1), (False, 0)])
def test_bytes_are_those_of_every_tensor_of_every_step(normalize, gates, length, chunk, dtype):
    options = {"normalize": normalize, "gates": gates}
    expected = moved(**options, length=length, chunk=chunk, dtype=dtype)
    assert linear_work.moved_bytes(6, length, 16, 24, chunk, **options, size=dtype.itemsize) == expected


def test_bytes_of_a_published_forward_pass():
    """65536 tokens, 16 heads of 128/256, chunks of 128 tokens, sigmoid gates: some 4.6 GB."""
    found = linear_work.moved_bytes(16, 65536, 128, 256, 128, gates=2, normalize=False, size=2)
    assert found["fwd"] == pytest.approx(4.6e9, rel=0.01)


@pytest.fixture
def results(monkeypatch):
    """`results(name)`: what a provider computes on the benchmark's inputs, and its gradients, all [B, T, H, ...]."""
    made = []
    both_passes = linear_providers.both_passes

    def spy(function, inputs, grad):
        made.append((function, inputs, grad))
        return both_passes(function, inputs, grad)

    monkeypatch.setattr(linear_providers, "both_passes", spy)
    every = {provider.name: provider for family in linear_providers.providers(()).values() for provider in family}

    def compute(name):
        every[name].build(SHAPE)
        function, inputs, grad = made[-1]
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        tensors = [output, *torch.autograd.grad(output, leaves, grad)]
        return [x.transpose(1, 2) for x in tensors] if name.startswith("mlstm") else tensors

    return compute


def assert_alike(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and (x - y).norm() <= 1e-4 * y.norm()


@pytest.mark.parametrize("chunk", linear_providers.NATIVE_CHUNKS)
def test_exp_and_the_peer_on_the_cpu_compute_the_same(results, chunk):
    pytest.importorskip("mlstm_kernels.torch", reason="an optional peer")
    assert_alike(results("exp"), results(f"mlstm-native-{chunk}"))


def test_sig_and_its_peer_on_cuda_compute_the_same(results, monkeypatch):
    """The same call, with the peer's quadratic form in the place of its kernels for CUDA."""
    real = pytest.importorskip("mlstm_kernels.torch", reason="an optional peer").get_mlstm_kernel
    asked = []

    def quadratic(*inputs, chunk_size, autocast_kernel_dtype, normalize):
        return real("parallel--native_siging_autograd")(*inputs, normalize=normalize)

    kernels = SimpleNamespace(get_mlstm_kernel=lambda name: asked.append(name) or quadratic)
    monkeypatch.setitem(sys.modules, "mlstm_kernels.torch", kernels)
    assert_alike(results("sig"), results("mlstm-xl-sig-128"))
    assert asked == ["chunkwise--triton_xl_chunk_siging"]


def test_simple_gla_is_sig_without_input_gates(results, monkeypatch):
    """The same call, with fla's definition in the place of its kernel."""
    pytest.importorskip("einops", reason="an optional peer")
    package = importlib.util.find_spec("fla") or pytest.skip("an optional peer")
    path = f"{package.submodule_search_locations[0]}/ops/simple_gla/naive.py"
    spec = importlib.util.spec_from_file_location("naive_simple_gla", path)
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    stub = SimpleNamespace(chunk_simple_gla=naive.naive_recurrent_simple_gla)
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", stub)

    query, key, value, _, forget, grad = SHAPE.tensors
    leaves = [x.clone().requires_grad_() for x in (query, key, value, forget)]
    log_decay = torch.nn.functional.logsigmoid(leaves[3])
    output = linear_attention(*leaves[:3], log_decay=log_decay)[0]
    assert_alike([output, *torch.autograd.grad(output, leaves, grad)], results("simple-gla"))


def test_a_decay_is_constant(results):
    query, key, value, *_ = SHAPE.tensors
    decay = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6, 1 - 2.0**-7]).log()
    assert_alike(results("decay")[:1], linear_attention(query, key, value, log_decay=decay)[:1])


def test_softmax_attention_has_the_same_width():
    assert (SHAPE.attention.heads, SHAPE.attention.dim) == (9, 8)
    wide = LinearShape(8, 8192, 16, 128, 256, torch.bfloat16, torch.device("cuda"))
    assert (wide.attention.heads, wide.attention.dim) == (32, 128)


def test_why_a_peer_cannot_run(monkeypatch):
    triton = pytest.importorskip("triton")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    every = {family: chunks[0].missing for family, chunks in linear_providers.providers(()).items()}
    monkeypatch.setitem(sys.modules, "mlstm_kernels.torch", SimpleNamespace())
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert every["mlstm-xl-sig"](cuda) == "needs Triton below 3.9, which still had make_block_ptr; here is 3.9.0"
    monkeypatch.setattr(triton, "__version__", "3.8.1")
    assert every["mlstm-xl-exp"](cuda) == "" and every["mlstm-xl-exp"](cpu) == "needs CUDA"
    assert every["mlstm-native"](cpu) == "" and every["mlstm-native"](cuda) == "is for the CPU"
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", None)
    assert every["simple-gla"](cuda).startswith("is not installed") and every["simple-gla"](cpu) == "needs CUDA"
