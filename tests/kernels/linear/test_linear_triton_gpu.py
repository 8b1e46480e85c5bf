"""Rung 5: the Triton kernels on a CUDA GPU (`pytest -m gpu`)."""

import pytest
import torch
from linear_cases import INPUTS, REGIMES, STATE, Case, assert_close, call

from longmix_kernels.linear import LinearState, launch, linear_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIG = {"normalize": False}
DOCUMENTS = (300, 1, 160, 239)
CASES = [
    *(Case(f"exp-{a}-{b}", length=700, dim=a, value_dim=b) for a, b in ((16, 24), (48, 80), (64, 64), (80, 96))),
    *(Case(f"exp-{a}-{b}", length=700, dim=a, value_dim=b) for a, b in ((64, 128), (128, 256), (256, 512), (512, 16))),
    *(Case(f"sig-{a}-{b}", length=700, dim=a, value_dim=b, **SIG) for a, b in ((96, 192), (128, 256), (256, 512))),
    *(Case(f"exp-T{n}", length=n, dim=64, value_dim=128) for n in (1, 15, 17, 127, 129)),
    *(Case(f"exp-chunk-{n}", length=1500, dim=64, value_dim=64, chunk_size=n) for n in (16, 64, 128, 256, 512, 1024)),
    *(Case(f"sig-chunk-{n}", length=1500, dim=64, value_dim=64, chunk_size=n, **SIG) for n in (64, 256, 1024)),
    *(Case(f"exp-{regime}", length=700, dim=64, value_dim=64, regime=regime) for regime in REGIMES),
    Case("exp-carried", length=1000, dim=128, value_dim=256, documents=DOCUMENTS, with_carried=True),
    Case("exp-documents-no-state", length=1000, dim=64, value_dim=128, documents=DOCUMENTS, with_state=False),
    Case("sig-carried", length=1000, dim=128, value_dim=256, documents=DOCUMENTS, with_carried=True, **SIG),
    Case("decay-only", length=700, dim=128, value_dim=128, gated=False, with_state=False, **SIG),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def on_gpu(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    """Inputs on the GPU, with keys and queries that have a mean, so that normalisers rarely cancel."""
    made = case.inputs(dtype)
    for name in ("query", "key"):
        made[name] = made[name].detach() + 0.5
    return {name: x if x is None else x.detach().cuda().requires_grad_() for name, x in made.items()} | {
        name: None for name in INPUTS if made.get(name) is None
    }


def options(case: Case) -> dict[str, object]:
    ids = case.document_ids()
    return {"document_ids": None if ids is None else ids.cuda()}


def exactly(inputs: dict) -> dict:
    return {name: x if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}


def differentiate(results: list, inputs: dict, wanted_scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Output, state and gradients by name; the state is brought to the log scale of another implementation."""
    output, memory, *others = results
    generator = torch.Generator().manual_seed(3)

    def random(x: torch.Tensor) -> torch.Tensor:
        # Rounded to bfloat16, so that all that is compared gets the same.
        return torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype)

    outputs, grads = [output, memory], [random(output), random(memory)]
    found = {"output": output, "final memory": memory}
    if others:
        factor = (others[1].detach().double() - wanted_scale.double()).exp().to(memory.dtype)
        outputs.append(others[0])
        grads = [grads[0], grads[1] * factor[..., None, None], random(others[0]) * factor[..., None]]
        found = {"output": output, "final memory": memory * factor[..., None, None]}
        found["final normalizer"] = others[0] * factor[..., None]
    given = {name: x for name, x in inputs.items() if x is not None}
    gradients = torch.autograd.grad(outputs, list(given.values()), grads)
    return {name: x.detach() for name, x in (found | dict(zip(given, gradients, strict=True))).items()}


def definition(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    results = call(linear_attention, case, inputs, backend="reference", **options(case))
    return differentiate(results, inputs, results[3].detach() if case.normalize else None)


def kernels(case: Case, inputs: dict, wanted_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    results = call(linear_attention, case, inputs, backend="triton", **options(case))
    if case.normalize and wanted_scale is None:
        wanted_scale = results[3].detach()
    return differentiate(results, inputs, wanted_scale)


def scale_of(case: Case, inputs: dict) -> torch.Tensor | None:
    results = call(linear_attention, case, inputs, backend="reference", **options(case))
    return results[3].detach() if case.normalize else None


def plain(case: Case, inputs: dict) -> torch.Tensor:
    """The output as one would write it in torch, products in the dtype of the inputs, gates in float32."""
    query, key, value, decay, gate = (inputs[name] for name in INPUTS[:5])
    dtype = query.dtype
    batch, length, heads, dim = query.shape
    gate = torch.zeros_like(decay) if gate is None else gate
    ids = options(case)["document_ids"]
    ids = torch.zeros(batch, length, device=query.device) if ids is None else ids
    # The weights and shares, from the definition in float64 applied to keys that count what is taken.
    decay, gate = (x.transpose(1, 2).double() for x in (decay, gate))
    total = decay.cumsum(-1)
    row = torch.arange(length, device=query.device)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    first = same.int().argmax(-1).expand(batch, heads, length)
    since = total - (total - decay).gather(-1, first)
    weight = (total[..., :, None] - total[..., None, :] + gate[..., None, :]).masked_fill(
        ~(same & (row[:, None] >= row)), -torch.inf
    )
    carried = {name: inputs[name] if inputs[f"carried_{name}"] is None else inputs[f"carried_{name}"] for name in STATE}
    own = first == 0
    if inputs["log_scale"] is not None:
        scales = (x.double()[..., None] for x in (carried["log_scale"], inputs["log_scale"]))
        since = since + torch.where(own, *scales)
    highest = torch.maximum(weight.amax(-1), since).detach() if case.normalize else torch.zeros_like(total)
    weight, share = (weight - highest[..., None]).exp().float(), (since - highest).exp().float()
    query, key, value = ((x * s).transpose(1, 2) for x, s in ((query, dim**-0.5), (key, 1), (value, 1)))
    scores = ((query @ key.mT) * weight).to(dtype)
    read, along = (scores @ value).float(), scores.float().sum(-1)
    if inputs["memory"] is not None:
        reads = ((query @ x.to(dtype)).float() for x in (carried["memory"], inputs["memory"]))
        read = read + share[..., None] * torch.where(own[..., None], *reads)
        if case.normalize:
            sums = (x.to(dtype)[..., None] for x in (carried["normalizer"], inputs["normalizer"]))
            along = along + share * torch.where(own, *((query @ x).squeeze(-1).float() for x in sums))
    if case.normalize:
        read = read / torch.maximum(along.abs(), (-highest).exp().float())[..., None]
    return read.transpose(1, 2).to(dtype)


@every_case
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16], ids=["states-fp32", "states-bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_plain_torch(case, dtype, states):
    """Error of the output and its gradients at most twice that of a plain implementation, both against float64."""
    inputs = on_gpu(case, dtype)
    exact = exactly(inputs)
    results = call(linear_attention, case, exact, backend="reference", **options(case))
    with launch.stored_states(states):
        ours = call(linear_attention, case, inputs, backend="triton", **options(case))
        grad = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(3)).cuda().to(dtype)
        given = [name for name, x in inputs.items() if x is not None]
        found = {}
        for name, output, tensors in (("ours", ours[0], inputs), ("want", results[0], exact)):
            gradients = torch.autograd.grad(output, [tensors[x] for x in given], grad.to(output.dtype))
            found[name] = [output, *gradients]
    output = plain(case, inputs)
    found["plain"] = [output, *torch.autograd.grad(output, [inputs[x] for x in given], grad)]
    for name, want, theirs, mine in zip(
        ("output", *given), *(found[x] for x in ("want", "plain", "ours")), strict=True
    ):
        for measure in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
            error, allowed = (measure(x.double() - want) for x in (mine, theirs))
            floor = torch.finfo(dtype).eps * measure(want).clamp(min=1e-3)
            assert error <= 2 * allowed + floor, f"{name}: {error:.2e} > 2 * {allowed:.2e}"


@every_case
def test_float32_matches_reference(case):
    inputs = on_gpu(case, torch.float32)
    exact = exactly(inputs)
    scale = scale_of(case, exact)
    ours, expected = kernels(case, inputs, scale), definition(case, exact)
    rounded = {name: x if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    simply = definition(case, rounded)
    for name, want in expected.items():
        # The definition in float32 itself, where normalisers cancel.
        for measure in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
            allowed = max(1e-5 * measure(want), 2 * measure(simply[name].double() - want))
            assert measure(ours[name].double() - want) <= allowed, name


@every_case
def test_runs_are_equal_bit_for_bit(case):
    inputs = on_gpu(case, torch.bfloat16)
    runs = [kernels(case, inputs) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], x) for name, x in runs[0].items())


def test_memory_beside_the_inputs_is_not_used():
    case = Case("padded", length=777, dim=80, value_dim=96)
    plainly = on_gpu(case, torch.bfloat16)
    padded = dict(plainly)
    for name in INPUTS[:5]:
        x = plainly[name].detach()
        buffer = torch.full([size + 16 for size in x.shape], torch.nan, dtype=x.dtype, device="cuda")
        padded[name] = buffer[tuple(slice(size) for size in x.shape)].copy_(x).requires_grad_()
    a, b = kernels(case, padded), kernels(case, plainly)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("normalize", [True, False], ids=["exp", "sig"])
def test_a_long_sequence_ends_as_its_end_does(normalize):
    """T = 131072: the last rows from the state before them, and in float64 from that state."""
    length, tail = 131072, 300
    case = Case("long", length=length, batch=1, dim=64, value_dim=128, normalize=normalize, with_state=False)
    inputs = on_gpu(case, torch.bfloat16)
    names = [name for name in INPUTS[:5] if inputs[name] is not None]
    before = {name: inputs[name].detach()[:, :-tail] for name in names}
    after = {name: inputs[name].detach()[:, -tail:] for name in names}

    def run(tensors, state=None, backend="triton"):
        query, key, value, decay, gate = (tensors.get(name) for name in INPUTS[:5])
        return linear_attention(
            query,
            key,
            value,
            log_decay=decay,
            log_input=gate,
            normalize=normalize,
            initial_state=state,
            backend=backend,
        )

    output, final = run(inputs)
    state = run(before)[1]
    exact = {name: x.double() for name, x in after.items()}
    wanted, _ = run(exact, LinearState(*(None if x is None else x.double() for x in state)), "reference")
    assert_close(output[:, -tail:], wanted, 2e-2, "output")
    grads = torch.autograd.grad(output[:, -tail:].float().square().sum() + final.memory.sum(), inputs["value"])
    assert grads[0].isfinite().all()


@pytest.mark.large_memory
def test_offsets_beyond_32_bits():
    """Tensors of more than 2 ** 31 numbers: the last document equals the same tokens on their own."""
    if torch.cuda.mem_get_info()[0] < 100e9:
        pytest.skip("needs 100 GB of free device memory")
    length, tail, heads = 131072 + 64, 512, 64
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, length, heads, 256, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    assert value.numel() > 2**31
    decay = torch.full((heads,), -0.01, device="cuda")
    ids = (torch.arange(length, device="cuda") >= length - tail).int().view(1, -1)
    output, _ = linear_attention(query, key, value, log_decay=decay, document_ids=ids, chunk_size=256)
    grads = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    alone = [x.detach()[:, -tail:].clone().requires_grad_() for x in (query, key, value)]
    alone_output, _ = linear_attention(*alone, log_decay=decay, chunk_size=256)
    alone_grads = torch.autograd.grad(alone_output, alone, torch.ones_like(alone_output))
    for name, a, b in zip(("output", *INPUTS), (output, *grads), (alone_output, *alone_grads), strict=False):
        assert_close(a[:, -tail:], b, 2e-2, name)


def test_compiles_as_one_graph():
    case = Case("compiled", length=300, dim=64, value_dim=128, documents=(100, 50))
    inputs = on_gpu(case, torch.bfloat16)
    ids = options(case)["document_ids"]

    def run(query, key, value, decay, gate):
        return linear_attention(
            query, key, value, log_decay=decay, log_input=gate, normalize=True, document_ids=ids, backend="triton"
        )

    tensors = [inputs[name] for name in INPUTS[:5]]
    got, want = torch.compile(run, fullgraph=True)(*tensors)[0], run(*tensors)[0]
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(x.float().square().sum(), tensors) for x in (got, want)), strict=True):
        assert_close(a, b, 1e-2, "gradient")
