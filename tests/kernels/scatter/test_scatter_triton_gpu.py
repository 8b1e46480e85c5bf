"""Rung 5: the Triton kernels on a CUDA GPU (`pytest -m gpu`)."""

import pytest
import torch
from scatter_cases import INPUTS, STATE, Case, Inputs, assert_close, call, plain

from longmix_kernels.scatter import ScatterResult, scatter_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def usual(name: str, **changed) -> Case:
    """Blocks of 64, head dimensions and features of 64, unless said otherwise."""
    sizes = {"length": 400, "block_size": 64, "dim": 64, "value_dim": 64, "features": 64}
    return Case(name, **{**sizes, **changed})


CASES = [
    *(usual(f"T{n}", length=n) for n in (1, 64, 129, 1000)),
    *(usual(f"m{m}-d{d}", features=m, value_dim=d) for m, d in ((1, 16), (20, 80), (100, 96), (128, 128), (256, 256))),
    *(
        usual(f"block-{size}-past-{past}", block_size=size, past_blocks=past)
        for size, past in ((1, 0), (5, 2), (16, 1), (100, 0), (128, 1), (256, 0))
    ),
    usual("no-features", features=0),
    usual("grouped", heads=8, key_heads=2),
    usual("documents", length=1000, documents=(300, 1, 128, 129)),
    usual("documents-of-one-token", documents=(1,) * 200),
    usual("state", with_state=True),
    usual("state-documents", length=700, documents=(200, 192), with_state=True, heads=4),
    usual("some-queries-state-documents", queries=300, documents=(150, 130), with_state=True),
    usual("last-query-state", length=65, queries=1, with_state=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def on_gpu(case: Case, dtype: torch.dtype) -> Inputs:
    made = case.inputs(dtype)
    return {name: None if x is None else x.detach().cuda().requires_grad_() for name, x in made.items()}


def exactly(inputs: Inputs) -> Inputs:
    return {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}


def results(case: Case, inputs: Inputs, **options) -> dict[str, torch.Tensor]:
    """Results and gradients by name."""
    ids = case.document_ids()
    ids = None if ids is None else ids.to(inputs["query"].device)
    return gradients_of(call(case, inputs, document_ids=ids, **options), inputs)


def gradients_of(result: ScatterResult, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Results, and gradients for the same random gradients of output and logsumexp, by name."""
    generator = torch.Generator().manual_seed(1)
    # Rounded to bfloat16, so that all that is compared gets the same.
    grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in result[:2]]
    wanted = {name: x for name, x in inputs.items() if x is not None}
    found = torch.autograd.grad(result[:2], list(wanted.values()), grads)
    return {**{n: x.detach() for n, x in result._asdict().items()}, **dict(zip(wanted, found, strict=True))}


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_plain_torch(case, dtype):
    """Error at most twice that of a plain implementation, both against float64."""
    inputs = on_gpu(case, dtype)
    ours, wanted = results(case, inputs, backend="triton"), results(case, exactly(inputs), backend="reference")
    theirs = gradients_of(plain(case, inputs, dtype), inputs)
    for name, want in wanted.items():
        for measure in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
            error, allowed = (measure(x[name].double() - want) for x in (ours, theirs))
            # Where plain torch is exact, one rounding is allowed.
            floor = torch.finfo(dtype).eps * measure(want).clamp(min=1e-3)
            assert error <= 2 * allowed + floor, f"{name}: {error:.2e} > 2 * {allowed:.2e}"


@every_case
def test_float32_matches_reference(case):
    inputs = on_gpu(case, torch.float32)
    ours = results(case, inputs, backend="triton")
    for name, want in results(case, exactly(inputs), backend="reference").items():
        assert_close(ours[name], want, 1e-5, name)


@every_case
def test_runs_are_equal_bit_for_bit(case):
    inputs = on_gpu(case, torch.bfloat16)
    runs = [results(case, inputs, backend="triton") for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], x) for name, x in runs[0].items())


@pytest.mark.parametrize("size", [-200.0, 200.0])
def test_features_of_any_size(size):
    case = usual("large", with_state=True)
    inputs = on_gpu(case, torch.float32)
    for name in ("query_features", "key_features", "log_scale"):
        inputs[name] = (inputs[name].detach() + size).requires_grad_()
    ours = results(case, inputs, backend="triton")
    for name, want in results(case, exactly(inputs), backend="reference").items():
        assert_close(ours[name], want, 1e-5 + 4 * 2 * abs(size) * 2**-24, name)


def test_later_tokens_and_other_documents_change_nothing():
    """Bit for bit, at a token within a document, and at its first."""
    case = usual("causality", length=700, documents=(400,), with_state=True)
    inputs = {name: x.detach() for name, x in on_gpu(case, torch.bfloat16).items()}
    ids = case.document_ids().cuda()
    before = call(case, inputs, document_ids=ids, backend="triton")
    for token in (130, 383, 600):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in INPUTS[:5]:
            changed[name][:, token:] = 3 * changed[name][:, token:].flip(-1)
        after = call(case, changed, document_ids=ids, backend="triton")
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, :token], b[:, :token]) and not torch.equal(a[:, token], b[:, token])
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in INPUTS[:5]:
        changed[name][:, :390] = 3 * changed[name][:, :390].flip(-1)
    after = call(case, changed, document_ids=ids, backend="triton")
    assert all(torch.equal(a[:, 400:], b[:, 400:]) for a, b in zip(before, after, strict=True))


def test_memory_beside_the_inputs_is_not_used():
    case = usual("padded", length=333, value_dim=80, features=20)
    plainly = on_gpu(case, torch.bfloat16)
    padded = dict(plainly)
    for name in INPUTS[:5]:
        x = plainly[name].detach()
        buffer = torch.full([size + 16 for size in x.shape], torch.nan, dtype=x.dtype, device="cuda")
        padded[name] = buffer[tuple(slice(size) for size in x.shape)].copy_(x).requires_grad_()
    a, b = (results(case, x, backend="triton") for x in (padded, plainly))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_long_sequence_that_one_key_rules(dtype):
    """T = 131072: nearly all queries read one key, more than float16 can count, and the last rows are as in float64."""
    length, tail = 131072, 200
    case = usual("long", length=length, batch=1, heads=1, key_heads=1, block_size=128)
    inputs = on_gpu(case, dtype)
    with torch.no_grad():
        inputs["key_features"][:, 7] += 30.0
    result = call(case, inputs, backend="triton")
    quarter = torch.full_like(result.output, 0.25)
    grads = torch.autograd.grad(result.output, [x for x in inputs.values() if x is not None], quarter)
    assert all(grad.isfinite().all() for grad in grads)
    # Each column: a quarter of the key's weight, nearly 1, in all rows that see it through features.
    assert_close(grads[2][0, 7, 0], torch.full((64,), length / 4).cuda(), 0.01, "grad_value")
    exact = {name: None if x is None else x.detach().double() for name, x in inputs.items()}
    rows = [exact[name][:, -tail:] if name.startswith("query") else exact[name] for name in INPUTS[:5]]
    wanted = scatter_attention(*rows, block_size=128, past_blocks=1, backend="reference")
    assert_close(result.output[:, -tail:], wanted.output, 2e-2, "output")
    assert_close(result.logsumexp[:, -tail:], wanted.logsumexp, 1e-3, "logsumexp")


@pytest.mark.large_memory
def test_offsets_beyond_32_bits():
    """Sums of more than 2 ** 31 numbers: the last document equals the same tokens on their own."""
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of free device memory")
    length, tail, heads = 131072 + 64, 512, 8
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(1, length, heads, size, generator=generator, device="cuda", dtype=dtype)
        for size, dtype in ((64, torch.bfloat16),) * 3 + ((128, torch.float32),) * 2
    ]
    sizes = {"block_size": 2, "past_blocks": 0, "backend": "triton"}
    assert length // 2 * heads * 128 * 64 > 2**31
    ids = (torch.arange(length, device="cuda") >= length - tail).int().view(1, -1)
    with torch.no_grad():
        packed = scatter_attention(*tensors, document_ids=ids, **sizes)
        alone = scatter_attention(*(x[:, -tail:].clone() for x in tensors), **sizes)
    assert_close(packed.output[:, -tail:], alone.output, 2e-2, "output")


def test_nothing_waits_for_the_device():
    case = usual("queued", documents=(100, 120), with_state=True)
    inputs, ids = on_gpu(case, torch.bfloat16), case.document_ids().cuda()
    call(case, inputs, document_ids=ids, backend="triton")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = call(case, inputs, document_ids=ids, backend="triton").output
        torch.autograd.grad(output.sum(), list(inputs.values()))
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_compiles_as_one_graph():
    case = usual("compiled", documents=(100, 50), with_state=True)
    inputs, ids = on_gpu(case, torch.bfloat16), case.document_ids().cuda()
    tensors = list(inputs.values())
    assert len(tensors) == 5 + len(STATE)

    def run(*given):
        return call(case, dict(zip(INPUTS, given, strict=True)), document_ids=ids).output

    got, want = torch.compile(run, fullgraph=True)(*tensors), run(*tensors)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(x.float().square().sum(), tensors) for x in (got, want)), strict=True):
        assert_close(a, b, 1e-2, "gradient")
