"""A decoding step by the Triton kernels against its definition, in Triton's interpreter on the CPU, in float32.

Runs only where TRITON_INTERPRET=1 is set before triton is imported; `test_decode_triton.py` starts such a process.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import assert_close
from decode_cases import BATCH, GROUP, KEY_HEADS, calls, plain, random
from guarded import guarded_buffers

from longmix_kernels.attention import Codes, Segment, decode_attention, decode_launch, packed_codes, schedule_decoding

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 16 keys for 3 programs, so that rows are cut, and programs go from one row to the next."""
    monkeypatch.setattr(decode_launch, "tile_keys", lambda width: 16)
    monkeypatch.setattr(decode_launch, "programs_of", lambda query: 3)


def compare(call: dict, monkeypatch, weights: bool = False, finite: list[Segment] | None = None, **options) -> None:
    """Output, logsumexp and perhaps weights; buffers of the kernels lie in NaN, and nothing beside them is written.

    The definition reads `finite` where the segments hold NaN in slots that no row reads.
    """
    call = {"new": None, "scale": None, **call}
    arguments = call.pop("query"), call.pop("segments")
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in (arguments[0], *(call["new"] or ()))]
    wanted = decode_attention(
        exact[0],
        [as_double(x) for x in finite or arguments[1]],
        new=tuple(exact[1:]) or None,
        scale=call["scale"],
        return_logsumexp=True,
        return_weights=True,
        backend="reference",
    )
    # Not every part is used: fewer items than there is room for.
    with guarded_buffers(monkeypatch, least=4, complete=False):
        found = decode_attention(
            *arguments, **call, return_logsumexp=True, return_weights=weights, backend="triton", **options
        )
    assert_close(found[0], wanted[0], 1e-5, "output")
    assert_close(found[1], wanted[1], 1e-5, "logsumexp")
    assert not found[0].isnan().any() and not found[1].isnan().any()
    for number, (part, exact_part) in enumerate(zip(found[2] or [], wanted[2], strict=weights)):
        assert not part.isnan().any()
        assert_close(part, exact_part, 1e-5, f"weights {number}")


def as_double(segment: Segment) -> Segment:
    def of(codes: Codes | None) -> Codes | None:
        if codes is None:
            return None
        return Codes(codes.bits, *(None if x is None else x.double() for x in (codes.low, codes.step, codes.scale)))

    key, value = (x if x.dtype == torch.uint8 else x.double() for x in (segment.key, segment.value))
    return replace(segment, key=key, value=value, key_codes=of(segment.key_codes), value_codes=of(segment.value_codes))


EXACT = [name for name in calls() if not name.startswith("codes")]


@pytest.mark.parametrize("name", EXACT)
def test_matches_reference(name, monkeypatch):
    compare(calls(torch.float32)[name], monkeypatch, weights=True)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_any_scale(scale, monkeypatch):
    compare({**calls(torch.float32)["ragged-heads"], "scale": scale}, monkeypatch, weights=True)


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 48), (48, 24), (144, 16)])
def test_any_head_dimension(dim, value_dim, monkeypatch):
    torch.manual_seed(0)
    segment = Segment(random(1, 2, 40, dim, dtype=torch.float32), random(1, 2, 40, value_dim, dtype=torch.float32))
    compare({"query": random(2, 1, 4, dim, dtype=torch.float32), "segments": [segment]}, monkeypatch)


@pytest.mark.parametrize("rows", [BATCH, 1])
def test_many_query_rows_take_wide_tiles(rows, monkeypatch):
    """48 rows of a head's own, or 192 that share keys: one tile of 64 and a part of it, or three."""
    monkeypatch.setattr(decode_launch, "programs_of", lambda query: 2)
    torch.manual_seed(0)
    query = random(BATCH, 16, KEY_HEADS * GROUP, 8, dtype=torch.float32)
    call = {"query": query, "segments": [plain(37, rows, torch.float32)]}
    compare(call, monkeypatch, weights=True)


def coded(bits: int, group: int, channels: int, scaled: bool, slots: int = 64, rows: int = 2, **bounds) -> Segment:
    """Codes of keys by channel over `group` tokens, and of values by token over `channels` channels."""
    dim, value_dim = 32, 64
    stored = [packed_codes(torch.randint(0, 2**bits, (rows, 2, slots, width)), bits) for width in (dim, value_dim)]
    numbers = [random(rows, 2, slots // group, dim, dtype=torch.float32) for _ in range(2)]
    values = [random(rows, 2, slots, value_dim // channels, dtype=torch.float32) for _ in range(2)]
    scales = [random(1, 2, 1, width, dtype=torch.float32) if scaled else None for width in (dim, value_dim)]
    key_codes = Codes(bits, numbers[0], numbers[1] / 2**bits, scales[0])
    return Segment(*stored, key_codes=key_codes, value_codes=Codes(bits, values[0], values[1] / 2**bits, scales[1]))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("group", "channels", "scaled"), [(32, 32, False), (64, 64, True), (16, 16, True)])
def test_codes_match_reference(bits, group, channels, scaled, monkeypatch):
    torch.manual_seed(0)
    segment = coded(bits, group, channels, scaled)
    query = random(2, 2, 4, 32, dtype=torch.float32)
    new = random(2, 2, 2, 32, dtype=torch.float32), random(2, 2, 2, 64, dtype=torch.float32)
    compare({"query": query, "segments": [segment], "new": new}, monkeypatch, weights=bits == 4)


def test_codes_of_rows_with_lengths_of_their_own(monkeypatch):
    torch.manual_seed(0)
    count = torch.tensor([[64], [33], [0]], dtype=torch.int32)
    first = torch.tensor([40, 0, 5], dtype=torch.int32)
    segment = replace(coded(4, 32, 32, True, rows=1), count=count, first=first)
    codes = segment.value_codes
    low, step = codes.low.clone(), codes.step.clone()
    low[:, :, 33:40], step[:, :, 33:40] = torch.nan, torch.nan  # which no row reads
    poisoned = replace(segment, value_codes=replace(codes, low=low, step=step))
    query = random(3, 1, 4, 32, dtype=torch.float32)
    compare({"query": query, "segments": [poisoned]}, monkeypatch, finite=[segment])


def test_what_no_row_reads_is_not_loaded(monkeypatch):
    """Rows that share keys read runs with a gap between them, which holds anything."""
    torch.manual_seed(0)
    count = torch.tensor([[20], [48], [7], [0]], dtype=torch.int32)
    first = torch.tensor([3, 30, 0, 0], dtype=torch.int32)
    segment = replace(plain(48, 1, torch.float32), count=count, first=first)
    key, value = segment.key.clone(), segment.value.clone()
    key[:, :, 20:30], value[:, :, 20:30] = torch.nan, torch.nan
    poisoned = replace(segment, key=key, value=value)
    query = random(BATCH, 1, KEY_HEADS * GROUP, 8, dtype=torch.float32)
    compare({"query": query, "segments": [poisoned]}, monkeypatch, weights=True, finite=[segment])


@pytest.mark.parametrize("programs", [1, 2, 7, 50])
def test_any_number_of_programs_gives_the_same(programs, monkeypatch):
    monkeypatch.setattr(decode_launch, "programs_of", lambda query: programs)
    compare(calls(torch.float32)["shared-by-pairs"], monkeypatch)


def test_merge_of_extreme_parts(monkeypatch):
    """Scores that differ by hundreds, between segments, between tiles and from the new tokens'."""
    torch.manual_seed(0)
    near, far = plain(33, dtype=torch.float32), plain(20, dtype=torch.float32)
    near.key[:, :, 16:32] *= 40
    new = random(BATCH, 1, KEY_HEADS, 8, dtype=torch.float32), random(BATCH, 1, KEY_HEADS, 6, dtype=torch.float32)
    query = random(BATCH, 1, KEY_HEADS * GROUP, 8, dtype=torch.float32)
    for sign in (300, -300):
        far_away = Segment(far.key * sign, far.value)
        compare({"query": query, "segments": [near, far_away], "new": new}, monkeypatch)


def test_two_runs_are_equal_bit_for_bit():
    call = calls(torch.float32)["one-segment"]
    runs = [decode_attention(call["query"], call["segments"], backend="triton")[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_lists_are_rewritten_in_place(monkeypatch):
    """One schedule through steps of a buffer that fills up, each with its own count on the device."""
    torch.manual_seed(0)
    segment = plain(64, 2, torch.float32)
    query = random(2, 1, KEY_HEADS * GROUP, 8, dtype=torch.float32)
    schedule = schedule_decoding(query, [segment], [[(0, 10), (0, 1)]])
    place, rewritten = schedule.lists.data_ptr(), []
    for length in (10, 16, 17, 33, 60):
        count = torch.tensor([[length], [max(length - 9, 1)]], dtype=torch.int32)
        rewritten.append(schedule.update([[(0, int(x)) for x in count]]))
        call = {"query": query, "segments": [replace(segment, count=count)]}
        compare(call, monkeypatch, schedule=schedule.lists)
    assert rewritten == [False, False, True, True, True] and schedule.lists.data_ptr() == place


FIXTURES = Path(__file__).parents[2] / "fixtures" / "inference_side"


@pytest.mark.parametrize("case", [0, 1])
def test_shared_prefix_equals_the_published_one(case):
    """Bifurcated attention (arXiv 2403.08845), whose authors' code wrote these numbers."""
    stored = np.load(FIXTURES / "bifurcated.npz")
    tensors = {name.split(".")[1]: torch.from_numpy(stored[name]) for name in stored.files if name[4] == str(case)}
    parts = [
        Segment(*(tensors[f"{p}_{x}"].float().transpose(1, 2) for x in ("key", "value"))) for p in ("prefix", "own")
    ]
    found = decode_attention(tensors["query"].float(), parts, return_logsumexp=True, backend="triton")
    assert_close(found[0], tensors["output"], 1e-5, "output")
    assert_close(found[1], tensors["logsumexp"], 1e-5, "logsumexp")
