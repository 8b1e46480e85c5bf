"""Rung 5: a decoding step on a CUDA GPU (`pytest -m gpu`)."""

from dataclasses import replace

import pytest
import torch

from longmix_kernels.attention import Codes, Segment, decode_attention, packed_codes, schedule_decoding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def plain(rows: int, heads: int, slots: int, dim: int, dtype: torch.dtype, **bounds: list) -> Segment:
    key, value = (random(rows, heads, slots, dim, dtype=dtype) for _ in range(2))
    given = {name: torch.tensor(numbers, dtype=torch.int32, device="cuda") for name, numbers in bounds.items()}
    return Segment(key, value, **given)


def coded(bits: int, slots: int, dim: int) -> Segment:
    stored = [packed_codes(torch.randint(0, 2**bits, (2, 2, slots, dim), device="cuda"), bits) for _ in range(2)]
    keys = [random(2, 2, slots // 32, dim, dtype=torch.float16) for _ in range(2)]
    values = [random(2, 2, slots, dim // 32, dtype=torch.float16) for _ in range(2)]
    key_codes = Codes(bits, keys[0], keys[1] / 2**bits)
    return Segment(*stored, key_codes=key_codes, value_codes=Codes(bits, values[0], values[1] / 2**bits))


def indexed(slots: int, chosen: int, dtype: torch.dtype) -> Segment:
    index = torch.stack([torch.randperm(slots, device="cuda")[:chosen].sort().values for _ in range(4)])
    return replace(plain(2, 2, slots, 128, dtype), index=index.view(2, 2, chosen).int())


CALLS = {
    "one-row": lambda dtype: (1, 1, 8, 128, [plain(1, 2, 16384, 128, dtype)]),
    "rows-of-any-length": lambda dtype: (
        4,
        1,
        8,
        64,
        [plain(4, 2, 9001, 64, dtype, count=[[9001], [1], [0], [700]], first=[50, 0, 0, 699])],
    ),
    "shared-prefix": lambda dtype: (16, 1, 8, 128, [plain(1, 2, 5000, 128, dtype), plain(16, 2, 40, 128, dtype)]),
    "sixteen-queries": lambda dtype: (2, 16, 8, 80, [plain(2, 2, 3000, 80, dtype)]),
    "d256": lambda dtype: (2, 4, 8, 256, [plain(2, 2, 3000, 256, dtype)]),
    "index": lambda dtype: (2, 1, 8, 128, [indexed(4096, 500, dtype)]),
    **{f"codes-{bits}": lambda dtype, bits=bits: (2, 2, 8, 128, [coded(bits, 4096, 128)]) for bits in (8, 4, 2)},
}


def call(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[Segment], tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    batch, length, heads, dim, segments = CALLS[name](dtype)
    new = random(batch, length, 2, dim, dtype=dtype), random(batch, length, 2, dim, dtype=dtype)
    return random(batch, length, heads, dim, dtype=dtype), segments, new


def exact(query: torch.Tensor, segments: list[Segment], new: tuple[torch.Tensor, torch.Tensor]) -> tuple:
    def of(segment: Segment) -> Segment:
        key, value = segment.numbers(torch.float64)
        return replace(segment, key=key, value=value, key_codes=None, value_codes=None)

    given = query.double(), [of(segment) for segment in segments]
    return decode_attention(
        *given,
        new=(new[0].double(), new[1].double()),
        return_logsumexp=True,
        return_weights=True,
        backend="reference",
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_products_in_float32(name, dtype):
    """Weights are rounded before they meet the values, which torch's products in float32 do not: four epsilons."""
    query, segments, new = call(name, dtype)
    wanted = exact(query, segments, new)
    found = decode_attention(query, segments, new=new, return_logsumexp=True, return_weights=True, backend="triton")
    for measure in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
        bound = 4 * torch.finfo(dtype).eps * measure(wanted[0])
        assert measure(found[0].double() - wanted[0]) <= bound
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-4, atol=1e-4)
    for part, other in zip(found[2], wanted[2], strict=True):
        torch.testing.assert_close(part.double(), other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_float32_matches_the_reference(name):
    query, segments, new = call(name, torch.float32)
    wanted = exact(query, segments, new)
    found = decode_attention(query, segments, new=new, return_logsumexp=True, backend="triton")
    for part, other in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(part.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_two_steps_are_equal_bit_for_bit(name):
    query, segments, new = call(name, torch.bfloat16)
    assert torch.equal(*(decode_attention(query, segments, new=new, backend="triton")[0] for _ in range(2)))


def test_one_graph_goes_on_as_the_buffer_fills():
    """The grid is fixed, and lists are rewritten in place between replays."""
    torch.manual_seed(0)
    segment = plain(2, 2, 1024, 64, torch.bfloat16, count=[[100], [7]])
    query = random(2, 1, 8, 64, dtype=torch.bfloat16)
    schedule = schedule_decoding(query, [segment], [[(0, 100), (0, 7)]])
    decode_attention(query, [segment], schedule=schedule.lists)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode_attention(query, [segment], schedule=schedule.lists)[0]
    for lengths in ([100, 7], [128, 129], [1024, 500], [1, 0]):
        schedule.update([[(0, length) for length in lengths]])
        segment.count.copy_(torch.tensor(lengths, dtype=torch.int32)[:, None])
        graph.replay()
        wanted = decode_attention(query, [segment], backend="triton")[0]
        torch.testing.assert_close(output, wanted, rtol=2e-2, atol=1e-2)
