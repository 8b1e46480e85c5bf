"""Rung 5: the Triton kernels on a CUDA GPU (`pytest -m gpu`)."""

from dataclasses import replace

import pytest
import torch
from attention_cases import (
    Case,
    alibi,
    assert_close,
    built,
    documents,
    permuted,
    ragged,
    random_blocks,
    sorted_buckets,
    together,
)

from longmix_kernels.attention import BlockList, attention, launch
from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.permutation import put_rows, take_rows
from longmix_kernels.attention.reference import reference_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RESULTS = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")
LENGTHS = [300, 1, 160, 239]


def blocks_of(size: int):
    """A random list of blocks of this size; the first row block sees none."""
    return lambda case: {"blocks": random_blocks(case.keys or case.queries, size)}


CASES: list[tuple[Case, dict]] = [
    *((Case(f"causal-d{d}", None, queries=1000, dim=d), {}) for d in (16, 24, 48, 64, 80, 96, 128, 192, 208, 256)),
    *((Case(f"causal-T{n}", None, queries=n, dim=64), {}) for n in (1, 15, 17, 127, 129)),
    (Case("causal-d128-v64-gqa", None, queries=700, dim=128, value_dim=64, heads=8), {}),
    (Case("causal-d64-v128-mqa", None, queries=700, dim=64, value_dim=128, heads=4, key_heads=1), {}),
    (Case("full", None, queries=777, dim=64), {"causal": False}),
    (Case("window", None, queries=1000, dim=128), {"window": 200}),
    (Case("window-1", None, queries=300, dim=64), {"window": 1}),
    (Case("prefill-chunk", None, queries=200, keys=1000, dim=64), {}),
    (Case("decode", None, queries=1, keys=1000, dim=128, heads=8), {}),
    (Case("more-queries-than-keys", None, queries=400, keys=150, dim=64), {}),
    (Case("documents-gqa", None, queries=1000, dim=64, heads=4), {"document_ids": LENGTHS}),
    (Case("documents-window", None, queries=1000, dim=128), {"document_ids": LENGTHS, "window": 90}),
    (Case("documents-full", None, queries=1000, dim=64), {"document_ids": LENGTHS, "causal": False}),
    (Case("buckets-gqa", sorted_buckets(7), queries=1000, dim=64, heads=4), {}),
    (Case("ragged", ragged(), queries=700, keys=900, dim=128), {}),
    (Case("ragged-empty-rows", ragged(sparse=True), queries=700, dim=64), {}),
    (Case("nothing-visible", lambda case: (torch.full((1, 1, 100), 7, dtype=torch.int32),) * 2), {}),
    *((Case(f"alibi-d{d}", None, queries=1000, dim=d, heads=4, extras=alibi), {}) for d in (64, 80, 128)),
    (Case("alibi-window", None, queries=1000, dim=64, extras=alibi), {"window": 200}),
    (Case("alibi-prefill-chunk", None, queries=200, keys=1000, dim=128, extras=alibi), {}),
    (Case("alibi-documents-gqa", None, queries=1000, dim=64, heads=4, extras=alibi), {"document_ids": LENGTHS}),
    *((Case(f"blocks-of-{n}", None, queries=1000, dim=64, extras=blocks_of(n)), {}) for n in (16, 32, 64, 128)),
    (Case("blocks-d128-gqa", None, queries=1000, dim=128, heads=4, extras=blocks_of(128)), {}),
    (Case("blocks-full-chunk", None, queries=500, keys=756, dim=64, extras=blocks_of(64)), {"causal": False}),
    (Case("blocks-window", None, queries=1000, dim=128, extras=blocks_of(64)), {"window": 300}),
    (Case("blocks-documents", None, queries=1000, dim=64, extras=blocks_of(128)), {"document_ids": LENGTHS}),
    (
        Case("blocks-documents-full", None, queries=1000, dim=64, extras=blocks_of(128)),
        {"document_ids": LENGTHS, "causal": False},
    ),
    (Case("blocks-alibi", None, queries=1000, dim=128, extras=together(alibi, blocks_of(128))), {}),
]
# Rows in another order; "hi" of None is where a row's own place ends what it sees.
PERMUTED: list[tuple[Case, dict]] = [
    *(
        (Case(f"permuted-documents-d{d}", sorted_buckets(7), queries=1000, dim=d, extras=permuted), {"hi": None})
        for d in (48, 64, 128)
    ),
    (Case("permuted-buckets-gqa", sorted_buckets(7), queries=1000, dim=64, heads=4, extras=permuted), {}),
    (Case("permuted-ragged", ragged(), queries=700, keys=900, dim=128, extras=permuted), {}),
    (Case("permuted-empty-rows-mqa", ragged(sparse=True), queries=700, dim=64, key_heads=1, extras=permuted), {}),
    (Case("permuted-alibi", sorted_buckets(2), queries=200, dim=128, extras=together(alibi, permuted)), {"hi": None}),
]
CASES += PERMUTED
every_case = pytest.mark.parametrize(("case", "options"), CASES, ids=[case.name for case, _ in CASES])


def on_gpu(extras: dict) -> dict:
    """The same with every tensor on the device."""

    def move(x):
        return BlockList(x.size, *(part.cuda() for part in x[1:])) if isinstance(x, BlockList) else x.cuda()

    return {name: move(x) for name, x in extras.items()}


def prepare(case: Case, options: dict, dtype: torch.dtype):
    """Inputs, what to call with, the pattern that means, the scale, and gradients that arrive."""
    options, extras = dict(options), on_gpu(case.extras(case))
    if case.bounds is not None:
        lo, hi = (x.cuda() for x in case.bounds(case))
        options = {"lo": lo, "hi": hi, **options}
    else:
        if "document_ids" in options:
            options["document_ids"] = documents(case, options["document_ids"]).cuda()
        lo, hi = (x.cuda() for x in row_bounds(case.queries, case.keys or case.queries, **options, device="cuda"))
    tensors, _, scale = replace(case, bounds=lambda case: (lo, hi)).inputs(dtype)
    tensors = [x.detach().cuda().requires_grad_() for x in tensors]
    generator = torch.Generator().manual_seed(3)
    shape = (case.batch, case.queries, case.heads)
    grads = (
        torch.randn(*shape, case.value_dim or case.dim, generator=generator),
        torch.randn(shape, generator=generator),
    )
    pattern = Pattern(lo, hi, **extras)
    return tensors, {**options, **extras}, pattern, scale, [x.to(dtype).float().cuda() for x in grads]


def differentiate(outputs, inputs, grads) -> list[torch.Tensor]:
    """Output and logsumexp, and the gradients of both; the gradient of a logsumexp of -inf is not asked for."""
    output, logsumexp = outputs
    grad_logsumexp = grads[1].to(logsumexp.dtype).masked_fill(logsumexp.isneginf(), 0.0)
    results = torch.autograd.grad((output, logsumexp), inputs, (grads[0].to(output.dtype), grad_logsumexp))
    return [output.detach(), logsumexp.detach(), *results]


def plain(query, key, value, pattern, scale):
    """Attention as one would write it in torch, in the dtype of the inputs; scores with a bias in float32."""
    query, key, value = (
        take_rows(x, rows)
        for x, rows in ((query, pattern.query_rows), (key, pattern.key_rows), (value, pattern.key_rows))
    )
    group, missing = query.shape[2] // key.shape[2], key.shape[1] - query.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (query, key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)))
    position = torch.arange(k.shape[2], device=q.device)
    lo, hi = pattern.bounds()
    visible = (lo[..., None] <= position) & (position < hi[..., None])
    if pattern.blocks is not None:
        block = position // pattern.blocks.size
        visible = visible & pattern.blocks.mask()[block[missing:, None], block]
    empty = ~visible.any(-1, keepdim=True)
    scores = (q @ k.mT) * scale
    if pattern.alibi_slopes is not None:
        row = position[: q.shape[2]] if pattern.query_rows is None else pattern.query_rows
        column = position if pattern.key_rows is None else pattern.key_rows.repeat_interleave(group, 1)
        distance = column[..., None, :] - (row[..., None] + missing)
        scores = scores.float() + pattern.alibi_slopes[:, None, None] * distance
    scores = scores.masked_fill(~visible, -torch.inf)
    logsumexp = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(v.dtype)
    output, logsumexp = (weights @ v).transpose(1, 2), logsumexp.transpose(1, 2)
    return put_rows(output, pattern.query_rows), put_rows(logsumexp, pattern.query_rows)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_plain_torch(case, options, dtype):
    """Error at most twice that of a plain implementation in the same dtype, both against float64."""
    tensors, options, pattern, scale, grads = prepare(case, options, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = differentiate(reference_forward(Inputs(*exact, pattern, scale)), exact, grads)
    theirs = differentiate(plain(*tensors, pattern, scale), tensors, grads)
    ours = differentiate(attention(*tensors, scale=scale, return_logsumexp=True, **options), tensors, grads)
    for name, want, their, our in zip(RESULTS, expected, theirs, ours, strict=True):
        assert torch.equal(our.isneginf(), want.isneginf())
        hidden = want.isneginf()
        for measure in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
            error, allowed = (measure((x.double() - want).masked_fill(hidden, 0.0)) for x in (our, their))
            # Where plain torch is exact (one key, one weight of 1), one rounding is allowed.
            floor = torch.finfo(dtype).eps * measure(want.masked_fill(hidden, 0.0)).clamp(min=1e-3)
            assert error <= 2 * allowed + floor, f"{name}: {error:.2e} > 2 * {allowed:.2e}"


@every_case
def test_float32_matches_reference(case, options):
    tensors, options, pattern, scale, grads = prepare(case, options, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = differentiate(reference_forward(Inputs(*exact, pattern, scale)), exact, grads)
    ours = differentiate(attention(*tensors, scale=scale, return_logsumexp=True, **options), tensors, grads)
    for name, want, our in zip(RESULTS, expected, ours, strict=True):
        assert_close(our, want, 1e-5, name)


@pytest.mark.parametrize("dim", [64, 128])
def test_loads_through_tensor_descriptors_change_nothing(dim):
    """Tiles come the same way into the same products, so that outputs are equal bit for bit."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of sm_90 or newer")
    query, key, value = torch.randn(3, 2, 3000, 4, dim, device="cuda", dtype=torch.bfloat16)
    config = launch.Call(Inputs(query, key, value, Pattern(), 1.0)).config("forward")
    documents = torch.arange(3000, device="cuda").expand(2, -1) // 700
    for options in ({}, {"causal": False}, {"window": 500}, {"document_ids": documents}):
        results = []
        for descriptors in (False, True):
            with launch.TABLE.override("forward", replace(config, descriptors=descriptors)):
                results.append(attention(query, key[:, :, ::2], value[:, :, ::2], **options))
        assert torch.equal(*results)


@pytest.mark.parametrize(("case", "options"), PERMUTED, ids=[case.name for case, _ in PERMUTED])
def test_rows_copied_into_order_beforehand(case, options):
    tensors, options, pattern, scale, grads = prepare(case, options, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = differentiate(reference_forward(Inputs(*exact, pattern, scale)), exact, grads)
    with launch.gathered_before():
        ours = differentiate(attention(*tensors, scale=scale, return_logsumexp=True, **options), tensors, grads)
    for name, want, our in zip(RESULTS, expected, ours, strict=True):
        assert_close(our, want, 1e-5, name)


@every_case
def test_two_runs_are_equal_bit_for_bit(case, options):
    tensors, options, _, scale, grads = prepare(case, options, torch.bfloat16)
    runs = [
        differentiate(attention(*tensors, scale=scale, return_logsumexp=True, **options), tensors, grads)
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_memory_beside_the_inputs_is_not_used():
    case = Case("padded", built(), queries=777, dim=80)
    tensors, _, scale = case.inputs(torch.bfloat16)
    padded = []
    for x in tensors:
        batch, length, heads, dim = x.shape
        buffer = torch.full((batch, length + 130, heads + 1, dim + 16), torch.nan, dtype=x.dtype, device="cuda")
        padded.append(buffer[:, :length, :heads, :dim].copy_(x.detach()).requires_grad_())
    plainly = [x.detach().cuda().requires_grad_() for x in tensors]
    results = []
    for inputs in (padded, plainly):
        output = attention(*inputs, scale=scale)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_causal_at_131072():
    generator = torch.Generator("cuda").manual_seed(0)
    length, tail = 131072, 64
    query, key, value, grad = (
        torch.randn(1, length, 1, 64, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    output, logsumexp = attention(*inputs, return_logsumexp=True)
    # A gradient that enters through the last rows alone is that of a chunk of queries at the end.
    chosen = torch.zeros_like(grad)
    chosen[:, -tail:] = grad[:, -tail:]
    ours = torch.autograd.grad(output, inputs, chosen)
    exact = [x.detach().double().requires_grad_() for x in (query[:, -tail:], key, value)]
    pattern = Pattern(*row_bounds(tail, length, device="cuda"))
    want, want_logsumexp = reference_forward(Inputs(*exact, pattern, 0.125))
    wanted = torch.autograd.grad(want, exact, grad[:, -tail:].double())
    assert_close(output[:, -tail:], want, 1e-2, "output")
    assert_close(logsumexp[:, -tail:], want_logsumexp, 1e-4, "logsumexp")
    for name, a, b in zip(RESULTS[2:], (ours[0][:, -tail:], *ours[1:]), wanted, strict=True):
        assert_close(a, b, 2e-2, name)
    assert not ours[0][:, :-tail].any()


@pytest.mark.large_memory
def test_offsets_beyond_32_bits():
    """Tensors of more than 2 ** 31 numbers: the last rows see a window, and equal the same rows on their own."""
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of free device memory")
    length, tail, window = 131072 + 64, 512, 64
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(1, length, 64, 256, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    assert inputs[0].numel() > 2**31
    output = attention(*inputs, window=window)
    grads = torch.autograd.grad(output, inputs, torch.ones_like(output))
    alone = [x.detach()[:, -tail:].clone().requires_grad_() for x in inputs]
    alone_output = attention(*alone, window=window)
    alone_grads = torch.autograd.grad(alone_output, alone, torch.ones_like(alone_output))
    for name, a, b in zip(("output", *RESULTS[2:]), (output, *grads), (alone_output, *alone_grads), strict=True):
        assert_close(a[:, -tail + window :], b[:, window:], 2e-2, name)


def test_compiles_as_one_graph():
    case = Case("compiled", built(), queries=300, dim=64, heads=4)
    inputs = [x.detach().bfloat16().cuda().requires_grad_() for x in case.inputs(torch.float32)[0]]
    ids = documents(case, [100, 50]).cuda()

    def call(query, key, value):
        return attention(query, key, value, document_ids=ids, window=90)

    got, want = torch.compile(call, fullgraph=True)(*inputs), call(*inputs)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(x.float().square().sum(), inputs) for x in (got, want)), strict=True):
        assert_close(a, b, 1e-2, "gradient")
