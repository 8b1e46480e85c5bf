"""What the delta-rule benchmark counts, against counting one by one; and whether its providers do the same."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import delta_providers, delta_work
from benchmarks.delta_providers import DeltaShape

SHAPE = DeltaShape(2, 128, 3, 16, 24, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("low_rank", [True, False])
def test_flops_are_those_of_the_recurrence(low_rank):
    steps, dim, value_dim = 5, 12, 20
    query, key, read, write = (torch.randn(steps, dim, requires_grad=True) for _ in range(4))
    value = torch.randn(steps, value_dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        state, outputs = torch.zeros(dim, value_dim, requires_grad=True), []
        for t in range(steps):
            removed = write[t, :, None] @ (read[t, None] @ state) if low_rank else 0.0
            state = 0.9 * state + removed + key[t, :, None] @ value[t, None]
            outputs.append(query[t, None] @ state)
        forward = counter.get_total_flops()
        torch.cat(outputs).sum().backward()
    flops = delta_work.recurrence_flops(steps, dim, value_dim, low_rank=low_rank)
    assert flops == {"fwd": forward, "fwd+bwd": counter.get_total_flops()}


def moved(low_rank, decays, length, chunk, dtype):
    """Bytes by pass, from tensors of every kind and the list of what each step touches."""
    sequences, dim, value_dim = 6, 16, 24

    def bytes_of(*shape, dtype=torch.float32):
        return torch.empty(sequences, *shape, dtype=dtype, device="meta").nbytes

    chunks = len(range(0, length, chunk))
    q = k = big_q = dq = dk = bytes_of(length, dim, dtype=dtype)
    a = b = da = db = q if low_rank else 0
    v = big_o = y = dv = dy = bytes_of(length, value_dim, dtype=dtype)
    decay = ddecay = bytes_of(length, decays)
    states = dstates = big_r = bytes_of(chunks, dim, value_dim)
    big_e = bytes_of(chunks, dim, dim, dtype=dtype) if low_rank else 0
    kept = bytes_of(chunks, dim)
    prepare = q + k + v + a + b + decay + big_e + big_r + big_q + big_o + kept
    scan = big_e + big_r + big_q + big_o + kept + states + y
    scan_back = big_e + big_q + kept + dy + dstates
    gradients = q + k + v + a + b + decay + dy + states + dstates + dq + dk + dv + da + db + ddecay
    return {"fwd": prepare + scan, "fwd+bwd": prepare + scan + scan_back + gradients}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("length", "chunk"), [(64, 16), (100, 32), (20, 128)])
@pytest.mark.parametrize("decays", [1, 16])
@pytest.mark.parametrize("low_rank", [True, False])
def test_bytes_are_those_of_every_tensor_of_every_step(low_rank, decays, length, chunk, dtype):
    expected = moved(low_rank, decays, length, chunk, dtype)
    found = delta_work.moved_bytes(6, length, 16, 24, chunk, decays=decays, low_rank=low_rank, size=dtype.itemsize)
    assert found == expected


def test_bytes_of_a_token_and_head():
    """Heads of 64/64 in bfloat16: 2.6k forward, 3.1k backward, of which decays in float32 are 768."""
    found = delta_work.moved_bytes(1, 64, 64, 64, delta_work.design_chunk(64), decays=64, low_rank=True, size=2)
    assert found["fwd"] / 64 == pytest.approx(2568, abs=1) and found["fwd+bwd"] / 64 == pytest.approx(5644, abs=2)


@pytest.fixture
def results(monkeypatch):
    """`results(name)`: what a provider computes on the benchmark's inputs, and its gradients, all [B, T, H, ...]."""
    made = []
    both_passes = delta_providers.both_passes

    def spy(function, inputs, grad):
        made.append((function, inputs, grad))
        return both_passes(function, inputs, grad)

    monkeypatch.setattr(delta_providers, "both_passes", spy)
    every = {provider.name: provider for family in delta_providers.providers().values() for provider in family}

    def compute(name):
        workload = every[name].build(SHAPE)
        workload.calls["fwd"]()
        function, inputs, grad = made[-1]
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        tensors = [output, *torch.autograd.grad(output, leaves, grad)]
        return [x.transpose(1, 2) for x in tensors] if name.startswith("dplr") else tensors

    return compute


def assert_alike(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and (x - y).norm() <= 1e-4 * y.norm()


@pytest.mark.parametrize("chunk", delta_providers.NAIVE_CHUNKS)
def test_rwkv7_and_the_peer_on_the_cpu_compute_the_same(results, chunk):
    pytest.importorskip(delta_providers.NAIVE_MODULE, reason="an optional peer")
    assert_alike(results("rwkv7"), results(f"dplr-naive-{chunk}"))


@pytest.fixture
def kernels(monkeypatch):
    """fla's functions for CUDA, replaced by its definitions; what they were called with besides tensors."""
    dplr = pytest.importorskip(delta_providers.NAIVE_MODULE, reason="an optional peer")
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.kda.naive import naive_recurrent_kda

    asked = {}

    def rwkv7(r, w, k, v, a, b, **options):
        asked.update(options)
        assert (w <= 0).all() and (w >= options["lower_bound"]).all()
        head_first = (x.transpose(1, 2) for x in (r * r.shape[-1] ** 0.5, k, v, a, b, w))
        output, state = dplr.dplr_recurrence(*head_first)
        return output.transpose(1, 2), state

    stubs = {
        "fla.ops.rwkv7": {"chunk_rwkv7": rwkv7},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": naive_recurrent_gated_delta_rule},
        "fla.ops.kda": {"chunk_kda": naive_recurrent_kda},
        "fla.ops.gla": {"chunk_gla": lambda q, k, v, g: naive_recurrent_gla(q, k, v, g)},
    }
    for module, functions in stubs.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))
    return asked


@pytest.mark.parametrize("name", delta_providers.OURS)
def test_each_kind_and_its_peer_on_cuda_compute_the_same(results, kernels, name):
    """The same call, with fla's definition in the place of its kernel."""
    assert_alike(results(name), results(f"fla-{name}"))
    if name == "rwkv7":
        assert kernels["chunk_size"] == 64 and kernels["scale"] == 1.0


@pytest.mark.parametrize("name", delta_providers.OURS)
def test_what_each_kind_is_counted_as(name):
    """Heads of 16/24 take chunks of 64 tokens in the design."""
    (provider,) = delta_providers.providers()[name]
    low_rank, decays = name != "gla", 1 if name == "gated-delta" else 16
    workload = provider.build(SHAPE)
    assert workload.bytes == moved(low_rank, decays, 128, 64, torch.float32)
    assert workload.flops["fwd"] == 6 * 128 * 16 * 24 * (8 if low_rank else 4)


@pytest.mark.parametrize("kind", delta_providers.KINDS.values(), ids=delta_providers.KINDS)
def test_the_functions_for_cuda_take_these_arguments(kind):
    """By their signatures, since they cannot run here."""
    import importlib
    import inspect

    pytest.importorskip("fla", reason="an optional peer")
    function = getattr(importlib.import_module(kind.module), kind.name)
    signature = inspect.signature(inspect.unwrap(function))

    def check(*arguments, **options):
        signature.bind(*arguments, **options)
        return (None,)

    kind.theirs(check, *kind.inputs)


def test_decays_and_strengths_are_such_as_mixers_have():
    shape = DeltaShape(1, 2000, 4, 64, 64, torch.bfloat16, torch.device("cpu"))
    found = shape.tensors
    for name in ("rwkv7_decay", "head_decay", "channel_decay", "gla_decay", "strength"):
        assert found[name].dtype == torch.float32
    for name in ("head_decay", "channel_decay", "gla_decay", "rwkv7_decay"):
        assert (found[name] < 0).all()
    assert found["rwkv7_decay"].min() > -0.6066 and 0.94 < found["gla_decay"].exp().mean() < 0.97
    for name in ("head_decay", "channel_decay"):
        medians = found[name].flatten(0, 1).median(0).values
        assert medians.min() > -16 * 0.15 and medians.max() > -0.5
    assert found["removal"].dtype == torch.bfloat16
    torch.testing.assert_close(found["removal"].float().norm(dim=-1), torch.ones(1, 2000, 4), rtol=0.01, atol=0)


def test_why_a_peer_cannot_run(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    every = {family: own[0].missing for family, own in delta_providers.providers().items()}
    monkeypatch.setitem(sys.modules, delta_providers.NAIVE_MODULE, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.ops.kda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    assert every["dplr-naive"](cpu) == "" and every["dplr-naive"](cuda) == "is for the CPU"
    assert every["fla-kda"](cpu) == "needs CUDA" and every["fla-kda"](cuda) == ""
    assert every["fla-gla"](cuda).startswith("is not installed") and every["gla"](cpu) == ""
