"""Decode attention against its definition, the definition against `attention`, and attention mass against weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longmix_kernels.attention import (
    Codes,
    Segment,
    attention,
    column_mass,
    decode_attention,
    decode_torch,
    merge,
    packed_codes,
)
from longmix_kernels.attention.segments import unpacked
from tests.kernels.attention.decode_cases import BATCH, GROUP, KEY_HEADS, WIDTH, calls, plain, random

FIXTURES = Path(__file__).parents[2] / "fixtures" / "inference_side"
NAMES = list(calls())


def run(call, **options):
    return decode_attention(call["query"], call["segments"], new=call["new"], **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run_slots", [4096, 16], ids=["whole", "in-runs"])
def test_equals_the_definition(name, run_slots, monkeypatch):
    monkeypatch.setattr(decode_torch, "RUN", run_slots)
    call = calls()[name]
    options = {"return_logsumexp": True, "return_weights": True}
    output, logsumexp, weights = run(call, backend="torch", **options)
    wanted, wanted_logsumexp, wanted_weights = run(call, backend="reference", **options)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logsumexp, wanted_logsumexp, rtol=1e-12, atol=1e-12)
    assert len(weights) == len(wanted_weights) == len(call["segments"]) + (call["new"] is not None)
    for part, other in zip(weights, wanted_weights, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(call)[0], wanted, rtol=1e-12, atol=1e-12)  # nobody asks for more than the output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [1, 2])
def test_one_kernel_of_torch_is_as_exact(shared, dtype):
    torch.manual_seed(0)
    query = random(BATCH, 1, KEY_HEADS * GROUP, WIDTH, dtype=dtype)
    key, value = (random(BATCH // shared, KEY_HEADS, 70, WIDTH, dtype=dtype)[:, :, :61] for _ in range(2))
    first = torch.arange(BATCH, dtype=torch.int32)
    for segment in (Segment(key, value), Segment(key, value, first=first)):
        found, wanted = (decode_attention(query, [segment], backend=name)[0] for name in ("torch", "reference"))
        bound = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [[1, BATCH], [1, 2, BATCH], [1, 0, 2], [2]], ids=str)
def test_parts_that_rows_share_are_one_softmax(rows, dtype, bound, monkeypatch):
    """Each number is that of the rows which a part has of its own; 0 stands for a part of one row without slots."""
    torch.manual_seed(0)
    query = random(BATCH, 1, KEY_HEADS * GROUP, WIDTH, dtype=dtype)
    segments = [
        Segment(*(random(count or 1, KEY_HEADS, 9 * count, width, dtype=dtype) for width in (WIDTH, WIDTH - 2)))
        for count in rows
    ]
    wanted = decode_attention(query, segments, scale=0.7, backend="reference")[0]
    apart, logsumexp, _ = decode_attention(query, segments, scale=0.7, backend="torch", return_logsumexp=True)
    monkeypatch.setattr(decode_torch, "_attended", None)  # nor is any part computed alone
    found = decode_attention(query, segments, scale=0.7, backend="torch")[0]
    for each in (found, apart):
        torch.testing.assert_close(each, wanted, rtol=bound, atol=bound)
    assert logsumexp.isfinite().all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("group", [1, 4, 11])
@pytest.mark.parametrize("segments", [1, 2])
def test_large_segments_are_read_by_plain_products(group, segments, dtype, bound, monkeypatch):
    monkeypatch.setattr(decode_torch, "STREAMED", 1)
    query = random(BATCH, 1, KEY_HEADS * group, WIDTH, dtype=torch.float64)
    parts = [[random(BATCH, KEY_HEADS, 40, WIDTH, dtype=torch.float64)[:, :, :33] for _ in range(2)]] * segments
    wanted = decode_attention(query, [Segment(*part) for part in parts], backend="reference")[0]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    given = [Segment(*(x.to(dtype) for x in part)) for part in parts]
    found = decode_attention(query.to(dtype), given, backend="torch")[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("first", [[4], [0, 30, 29, 7]], ids=["one", "rows"])
@pytest.mark.parametrize("kept", [False, True])
def test_rows_of_a_large_segment_are_read_from_their_first_slot_on(dtype, bound, first, kept, monkeypatch):
    monkeypatch.setattr(decode_torch, "LARGE", 1)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 1, 6, 16), (4, 2, 30, 16), (4, 2, 30, 16))
    )
    first = torch.tensor(first, dtype=torch.int32)
    seen = torch.arange(30) >= first[:, None, None] if kept else None
    wanted, _, _ = decode_attention(query, [Segment(key, value, first=first)], backend="reference")
    query, key, value = (x.to(dtype) for x in (query, key, value))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    found, _, _ = decode_attention(query, [Segment(key, value, first=first, seen=seen)], backend="torch")
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_rounded_once(name, dtype):
    call = calls(dtype)[name]
    output, logsumexp, _ = run(call, backend="torch", return_logsumexp=True)
    wanted, wanted_logsumexp, _ = run(call, backend="reference", return_logsumexp=True)
    assert output.dtype == dtype and logsumexp.dtype == torch.float32
    bound = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(output, wanted, rtol=bound, atol=bound)
    torch.testing.assert_close(logsumexp, wanted_logsumexp, rtol=1e-5, atol=1e-5)


def test_definition_equals_attention_over_all_keys():
    torch.manual_seed(0)
    segments, length = [plain(20), plain(9)], 4
    new = random(BATCH, length, KEY_HEADS, WIDTH), random(BATCH, length, KEY_HEADS, 6)
    query = random(BATCH, length, KEY_HEADS * GROUP, WIDTH)
    key, value = (
        torch.cat([*(getattr(each, name).transpose(1, 2) for each in segments), own], 1)
        for name, own in zip(("key", "value"), new, strict=True)
    )
    wanted = attention(query, key, value, return_logsumexp=True, backend="reference")
    found = decode_attention(query, segments, new=new, return_logsumexp=True, backend="reference")
    torch.testing.assert_close(found[:2], wanted, rtol=1e-13, atol=1e-13)


def test_row_that_sees_nothing_is_zero():
    call = calls()["ragged"]
    for backend in ("reference", "torch"):
        output, logsumexp, weights = run(call, backend=backend, return_logsumexp=True, return_weights=True)
        assert (output[-1] == 0).all() and logsumexp[-1].isneginf().all() and (weights[0][-1] == 0).all()
        one = call["segments"][0]
        square = Segment(one.key, one.key, one.count, one.first)  # one kernel of torch's reads it
        output, wanted = (run(call | {"segments": [square]}, backend=name)[0] for name in (backend, "reference"))
        assert (output[-1] == 0).all()
        torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_stand_for_their_numbers(bits):
    torch.manual_seed(0)
    codes = torch.randint(0, 2**bits, (1, 1, 8, 16))
    assert torch.equal(unpacked(packed_codes(codes, bits), bits), codes.byte())
    low, step = random(1, 1, 2, 16), random(1, 1, 2, 16)  # of four tokens each
    scale = random(1, 1, 1, 16)
    stored = packed_codes(codes, bits)
    segment = Segment(stored, stored, key_codes=Codes(bits, low, step), value_codes=Codes(bits, low, step, scale))
    key, value = segment.numbers(torch.float64)
    for token in range(8):
        wanted = codes[0, 0, token] * step[0, 0, token // 4] + low[0, 0, token // 4]
        torch.testing.assert_close(key[0, 0, token], wanted, rtol=0, atol=0)
        torch.testing.assert_close(value[0, 0, token], wanted * scale[0, 0, 0], rtol=0, atol=0)


def test_codes_that_fill_no_byte_are_refused():
    with pytest.raises(ValueError, match="fill whole bytes only by 4"):
        packed_codes(torch.zeros(1, 1, 4, 6), 2)


@pytest.mark.parametrize("size", [1024, 7])
def test_column_mass_is_the_sum_of_weights(size):
    torch.manual_seed(0)
    batch, length, slots = 3, 9, 25
    query, key = random(batch, length, KEY_HEADS * GROUP, WIDTH), random(batch, KEY_HEADS, slots, WIDTH)
    value = torch.eye(slots).double().expand(batch, KEY_HEADS, -1, -1)  # outputs are the weights
    weights, logsumexp = attention(
        query, key.transpose(1, 2), value.transpose(1, 2), return_logsumexp=True, backend="reference"
    )
    wanted = weights.unflatten(2, (KEY_HEADS, GROUP)).sum((1, 3))
    torch.testing.assert_close(column_mass(query, key, logsumexp, size=size), wanted, rtol=0, atol=1e-13)
    # probe rows anywhere, and rows whose text begins later
    rows, first = torch.tensor([[3, 11, 24]]), torch.tensor([0, 2, 3])
    lo, hi = first[:, None, None].int().expand(-1, 1, 3), (rows[:, None].int() + 1)
    probes = query[:, :3]
    weights, logsumexp = attention(
        probes, key.transpose(1, 2), value.transpose(1, 2), lo=lo, hi=hi, return_logsumexp=True, backend="reference"
    )
    wanted = weights.unflatten(2, (KEY_HEADS, GROUP)).sum((1, 3))
    found = column_mass(probes, key, logsumexp, rows=rows, first=first, size=size)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"query": torch.zeros(4, 17, 6, 8)}, "T from 1 to 16"),
        ({"query": torch.zeros(4, 1, 5, 8)}, "divisors of the 5 heads"),
        ({"query": torch.zeros(4, 1, 6, 9)}, "keys of 8 channels"),
        ({"query": torch.zeros(3, 1, 6, 8)}, "divisors of the 3 rows"),
        ({"segments": []}, "segments is empty"),
        ({"new": (torch.zeros(4, 2, 2, 8), torch.zeros(4, 2, 2, 6))}, "new has key"),
        ({"backend": "blocked"}, "backend='blocked'"),
    ],
)
def test_bad_arguments_are_named(change, text):
    call = {"query": torch.zeros(4, 1, 6, 8), "segments": [plain(5, dtype=torch.float32)], **change}
    with pytest.raises(ValueError, match=text):
        decode_attention(call.pop("query"), call.pop("segments"), **call)


def test_merge_of_extreme_parts_stays_exact():
    torch.manual_seed(0)
    query, near, far = random(BATCH, 1, KEY_HEADS * GROUP, WIDTH), plain(6), plain(7)
    far = Segment(far.key * 300, far.value)
    found = decode_attention(query, [near, far], return_logsumexp=True)[:2]
    parts = [decode_attention(query, [each], return_logsumexp=True)[:2] for each in (near, far)]
    torch.testing.assert_close(found, merge(parts), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_published_attention_to_a_shared_prefix(backend, case):
    found = fixture("bifurcated", case)

    def segment(name):
        return Segment(*(found[f"{name}_{part}"].transpose(1, 2) for part in ("key", "value")))

    segments = [segment("prefix"), segment("own")]
    assert segments[0].rows == 1 < segments[1].rows
    options = {"return_logsumexp": True, "backend": backend}
    output, logsumexp, _ = decode_attention(found["query"], segments, **options)
    torch.testing.assert_close(output, found["output"], rtol=0, atol=1e-12)
    torch.testing.assert_close(output, found["plain_output"], rtol=0, atol=1e-12)
    torch.testing.assert_close(logsumexp, found["logsumexp"], rtol=0, atol=1e-12)
    for name, one in zip(("prefix", "own"), segments, strict=True):
        part = decode_attention(found["query"], [one], **options)
        torch.testing.assert_close(part[0], found[f"{name}_output"], rtol=0, atol=1e-12)
        torch.testing.assert_close(part[1], found[f"{name}_logsumexp"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parts_far_apart_merge_where_a_running_form_overflows(case, dtype, bound):
    found = {name: x.to(dtype) for name, x in fixture("merge", case).items()}
    parts = list(zip(found["outputs"], found["logsumexps"], strict=True))
    mine = decode_torch._merged([decode_torch.Part(o, lse.unsqueeze(-1), None) for o, lse in parts])
    for output, logsumexp in (merge(parts), (mine[0], mine[1].squeeze(-1))):
        torch.testing.assert_close(output, found["output"], rtol=0, atol=bound)
        torch.testing.assert_close(logsumexp, found["logsumexp"], rtol=0, atol=bound)
    if case == "case1":
        assert found["authors_logsumexp"].isinf().any()


def fixture(name, case):
    stored = np.load(FIXTURES / f"{name}.npz")
    return {key.partition(".")[2]: torch.from_numpy(stored[key]).double() for key in stored if key.startswith(case)}


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_order_of_slots_does_not_matter(backend):
    call = calls()["new-after"]
    one, order = call["segments"][0], torch.randperm(37)
    moved = Segment(one.key[:, :, order], one.value[:, :, order])
    found, other = (run(call | {"segments": [each]}, backend=backend)[0] for each in (one, moved))
    torch.testing.assert_close(found, other, rtol=0, atol=1e-13)
