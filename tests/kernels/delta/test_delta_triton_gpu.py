"""Rung 5: the Triton kernels on a CUDA GPU (`pytest -m gpu`)."""

import pytest
import torch
from delta_cases import FASTEST_DECAY, INPUTS, Case, assert_close, call, gradients

from longmix_kernels.delta import delta_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DOCUMENTS = (300, 1, 160, 239)
CASES = [
    *(Case(f"{a}-{b}", length=300, dim=a, value_dim=b) for a, b in ((16, 24), (48, 80), (64, 64), (80, 96))),
    *(Case(f"{a}-{b}", length=300, dim=a, value_dim=b) for a, b in ((64, 128), (128, 128), (256, 256), (256, 16))),
    *(Case(f"T{n}", length=n, dim=64, value_dim=64) for n in (1, 15, 17, 63, 65, 129)),
    *(Case(f"chunk-{n}", length=300, dim=64, value_dim=64, chunk_size=n) for n in (16, 32, 64)),
    *(Case(kind, length=300, dim=64, value_dim=64, kind=kind) for kind in ("correlated", "fastest", "identical")),
    Case("documents", length=1000, dim=64, value_dim=64, documents=DOCUMENTS),
    Case("carried", length=700, dim=128, value_dim=64, documents=DOCUMENTS, with_carried=True),
    Case(
        "carried-no-state", length=700, dim=64, value_dim=128, documents=DOCUMENTS, with_state=False, with_carried=True
    ),
    Case("diagonal", length=300, dim=64, value_dim=128, low_rank=False),
    Case("scalar-decay", length=300, dim=64, value_dim=64, scalar_decay=True),
    Case("scalar-decay-documents", length=700, dim=96, value_dim=192, documents=DOCUMENTS, scalar_decay=True),
    Case("scalar-decay-diagonal", length=300, dim=128, value_dim=128, low_rank=False, scalar_decay=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
every_bound = pytest.mark.parametrize("bound", [FASTEST_DECAY, None], ids=["bounded", "exact"])


def on_gpu(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    made = case.inputs(dtype)
    return {name: None if x is None else x.detach().cuda().requires_grad_() for name, x in made.items()}


def exactly(inputs: dict, dtype: torch.dtype = torch.float64) -> dict:
    return {name: None if x is None else x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}


def results(case: Case, inputs: dict, **options) -> dict[str, torch.Tensor]:
    ids = case.document_ids()
    pair = call(delta_rule, case, inputs, document_ids=None if ids is None else ids.cuda(), **options)
    generator = torch.Generator().manual_seed(1)
    # Rounded to bfloat16, so that all that is compared gets the same.
    grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in pair]
    wanted = {name: x for name, x in inputs.items() if x is not None}
    found = torch.autograd.grad(pair, list(wanted.values()), grads)
    return {"output": pair[0].detach(), "state": pair[1].detach(), **dict(zip(wanted, found, strict=True))}


def plain(case: Case, inputs: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The definition, every tensor and operation but decays in one dtype, differentiated by autograd."""
    made = {name: x if name == "log_decay" or x is None else x.to(dtype) for name, x in inputs.items()}
    query, key, value, decay, read, write, first, carried = (made[name] for name in INPUTS)
    if decay.dim() == 3:
        decay = decay.unsqueeze(-1).expand(*decay.shape, query.shape[-1])
    if first is None:
        first = query.new_zeros(query.shape[0], *query.shape[2:], value.shape[-1])
    ids, state, outputs = case.document_ids(), first if carried is None else carried, []
    for t in range(query.shape[1]):
        if ids is not None and t:
            begins = (ids[:, t] != ids[:, t - 1]).cuda()
            state = torch.where(begins[:, None, None, None], first, state)
        moved = decay[:, t].exp().to(dtype).unsqueeze(-1) * state
        if read is not None:
            removed = torch.einsum("bhk,bhkv->bhv", read[:, t], state)
            moved = moved + write[:, t].unsqueeze(-1) * removed.unsqueeze(-2)
        state = moved + key[:, t].unsqueeze(-1) * value[:, t].unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    pair = [torch.stack(outputs, 1), state]
    wanted = {name: x for name, x in inputs.items() if x is not None}
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in pair]
    found = torch.autograd.grad(pair, list(wanted.values()), grads)
    return {"output": pair[0].detach(), "state": pair[1].detach(), **dict(zip(wanted, found, strict=True))}


@every_case
@every_bound
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_plain_torch(case, bound, dtype):
    """Error at most twice that of a plain implementation, both against float64."""
    inputs = on_gpu(case, dtype)
    ours = results(case, inputs, backend="triton", min_log_decay=bound)
    wanted = results(case, exactly(inputs), backend="reference")
    theirs = plain(case, inputs, dtype)
    for name, want in wanted.items():
        for measure in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
            error, allowed = (measure(x[name].double() - want) for x in (ours, theirs))
            floor = torch.finfo(dtype).eps * measure(want).clamp(min=1e-3)
            assert error <= 2 * allowed + floor, f"{name}: {error:.2e} > 2 * {allowed:.2e}"


@every_case
@every_bound
def test_float32_matches_reference(case, bound):
    inputs = on_gpu(case, torch.float32)
    ours = results(case, inputs, backend="triton", min_log_decay=bound)
    for name, want in results(case, exactly(inputs), backend="reference").items():
        assert_close(ours[name], want, 1e-5, name)


@every_case
@every_bound
def test_runs_are_equal_bit_for_bit(case, bound):
    inputs = on_gpu(case, torch.bfloat16)
    runs = [results(case, inputs, backend="triton", min_log_decay=bound) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], x) for name, x in runs[0].items())


@pytest.mark.parametrize("decay", [-5.0, -20.0, -1e4])
def test_decays_without_a_bound(decay):
    case = Case("decay", length=200, dim=64, value_dim=64, documents=(70,))
    inputs = on_gpu(case, torch.float32)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], decay).requires_grad_()
    ours = results(case, inputs, backend="triton")
    for name, want in results(case, exactly(inputs), backend="reference").items():
        assert_close(ours[name], want, 1e-5, name)


def test_memory_beside_the_inputs_is_not_used():
    case = Case("padded", length=333, dim=80, value_dim=96)
    plainly = on_gpu(case, torch.bfloat16)
    padded = dict(plainly)
    for name in INPUTS[:6]:
        x = plainly[name].detach()
        buffer = torch.full([size + 16 for size in x.shape], torch.nan, dtype=x.dtype, device="cuda")
        padded[name] = buffer[tuple(slice(size) for size in x.shape)].copy_(x).requires_grad_()
    a, b = (results(case, x, backend="triton", min_log_decay=FASTEST_DECAY) for x in (padded, plainly))
    assert all(torch.equal(a[name], b[name]) for name in a)


@every_bound
def test_a_long_sequence_ends_as_its_end_does(bound):
    """T = 131072: the last rows from the state before them, and in float64 from that state."""
    length, tail = 131072, 300
    case = Case("long", length=length, batch=1, dim=64, value_dim=64, with_state=False)
    inputs = on_gpu(case, torch.bfloat16)
    before, after = ({n: x if x is None else x.detach()[:, s] for n, x in inputs.items()} for s in (
        slice(length - tail), slice(length - tail, None)
    ))  # fmt: skip
    output, final = call(delta_rule, case, inputs, backend="triton", min_log_decay=bound)
    _, state = call(delta_rule, case, before, backend="triton", min_log_decay=bound)
    exact = {**{name: x if x is None else x.double() for name, x in after.items()}, "initial_state": state.double()}
    wanted, wanted_final = call(delta_rule, case, exact, backend="reference")
    assert_close(output[:, -tail:], wanted, 2e-2, "output")
    assert_close(final, wanted_final, 2e-2, "state")
    grads = gradients([output, final], inputs)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.large_memory
def test_offsets_beyond_32_bits():
    """Tensors of more than 2 ** 31 numbers: the last document equals the same tokens on their own."""
    if torch.cuda.mem_get_info()[0] < 120e9:
        pytest.skip("needs 120 GB of free device memory")
    length, tail, heads, dim = 131072 + 64, 512, 128, 128
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, length, heads, dim, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    assert value.numel() > 2**31
    decay = torch.full((1, 1, heads), -0.1, device="cuda").expand(1, length, heads)
    ids = (torch.arange(length, device="cuda") >= length - tail).int().view(1, -1)
    with torch.no_grad():
        output, _ = delta_rule(query, key, value, log_decay=decay, document_ids=ids, min_log_decay=-0.1)
        own = [x[:, -tail:].clone() for x in (query, key, value)]
        alone, _ = delta_rule(*own, log_decay=decay[:, -tail:], min_log_decay=-0.1)
    assert_close(output[:, -tail:], alone, 2e-2, "output")


def test_compiles_as_one_graph():
    case = Case("compiled", length=300, dim=64, value_dim=64, documents=(100, 50), with_carried=True)
    inputs = on_gpu(case, torch.bfloat16)
    ids = case.document_ids().cuda()
    tensors = list(inputs.values())

    def run(*given):
        return call(
            delta_rule, case, dict(zip(INPUTS, given, strict=True)), document_ids=ids, min_log_decay=FASTEST_DECAY
        )[0]

    got, want = torch.compile(run, fullgraph=True)(*tensors), run(*tensors)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(x.float().square().sum(), tensors) for x in (got, want)), strict=True):
        assert_close(a, b, 1e-2, "gradient")
