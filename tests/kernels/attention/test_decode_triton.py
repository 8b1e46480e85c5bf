"""A decoding step on a GPU: work lists, what its kernels compile to and cover, and the interpreter's tests."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_contract import (
    ARCHITECTURES,
    assert_clean,
    assert_every_entry,
    assert_passes_in_the_interpreter,
    compiles,
    sampled,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from longmix_kernels.attention import (
    Codes,
    Segment,
    decode_attention,
    decode_launch,
    decode_report,
    launch,
    schedule_decoding,
)
from longmix_kernels.attention.decode_inputs import DecodeInputs
from longmix_kernels.attention.decode_launch import TABLE, SegmentCall, programs_of, tile_keys, uncovered
from longmix_kernels.attention.decode_report import Build
from longmix_kernels.attention.decode_schedule import HEAD, ITEM, Layout, Schedule, SegmentShape, work_list
from longmix_kernels.runtime import assumed_device
from longmix_kernels.simulated import FakeCalls, simulated_gpu

SHARED_OF_CONSUMER_GPUS = 99 * 1024
STORED = json.loads((Path(__file__).parents[2] / "fixtures" / "inference_side" / "lean.json").read_text())["ours"]


@pytest.mark.slow
def test_interpreter_matches_reference():
    assert_passes_in_the_interpreter(Path(__file__).with_name("test_decode_triton_interpreted.py"), at_least=40)


def segments_of(case: dict) -> Layout:
    rows = SegmentShape(len(case["lengths"]), case["kv_heads"], 1, 1, 16, case["tile"])
    return Layout((rows,), case["programs"])


def parts(layout: Layout, lists: list[int]) -> tuple[list[list[list[int]]], list[int]]:
    """The items of each program as they lie in the lists, and where the slots of each group begin."""
    (place,), (segment,) = layout.places, layout.segments
    offsets = lists[place.programs : place.programs + layout.programs + 1]
    items = [lists[place.items + ITEM * number : place.items + ITEM * (number + 1)] for number in range(offsets[-1])]
    programs = [items[begin:end] for begin, end in itertools.pairwise(offsets)]
    return programs, lists[place.groups : place.groups + segment.groups + 1]


@pytest.mark.parametrize("case", STORED, ids=lambda case: f"{len(case['lengths'])}-rows")
def test_lists_equal_those_of_the_fixture(case):
    layout = segments_of(case)
    programs, _ = parts(layout, layout.lists([[(0, length) for length in case["lengths"]]]))
    assert programs == case["work"]


def test_every_tile_is_taken_once_and_evenly():
    draw = random.Random(0)
    for _ in range(200):
        tiles = [(first := draw.randrange(5), first + draw.randrange(20)) for _ in range(draw.randrange(1, 30))]
        programs = draw.randrange(1, 40)
        work, total = work_list(tiles, programs), sum(end - first for first, end in tiles)
        taken = [(group, tile) for group, first, end in work.items for tile in range(first, end)]
        assert taken == [(group, tile) for group, (first, end) in enumerate(tiles) for tile in range(first, end)]
        shares = [
            sum(end - first for _, first, end in work.items[begin:stop])
            for begin, stop in itertools.pairwise(work.program_offsets)
        ]
        assert len(shares) == programs and max(shares) == -(-total // programs) and max(shares) - min(shares) <= 1
        assert len(work.items) < len(tiles) + programs and work.program_offsets[-1] == len(work.items)
        for group in range(len(tiles)):
            own = work.items[work.group_offsets[group] : work.group_offsets[group + 1]]
            assert [item[0] for item in own] == [group] * len(own)
        assert work.group_offsets[-1] == len(work.items)


def test_lists_have_the_same_size_whatever_the_lengths():
    shapes = SegmentShape(3, 2, 1, 4, 16, 64), SegmentShape(1, 2, 3, 70, 64, 64)
    layout = Layout(shapes, 7)
    for spans in ([[(0, 1)], [(0, 0)]], [[(5, 900), (0, 70), (64, 64)], [(0, 3), (0, 500)]]):
        lists = layout.lists(spans)
        assert len(lists) == layout.size
        assert lists[:HEAD][:4] == [1, 1, 16, 4] and lists[HEAD : HEAD + 4] == [3, 2, 64, 64]
    with pytest.raises(ValueError, match="got 2 lengths; allowed are 1, 3 or 6"):
        layout.lists([[(0, 1), (0, 2)], [(0, 1)]])


def test_lists_change_where_a_row_passes_a_tile():
    schedule = Schedule(segments_of(STORED[0]), [[(0, 64)] * 4], torch.device("cpu"))
    before, lists = schedule.lists.clone(), schedule.lists
    assert not schedule.update([[(0, 1), (0, 30), (63, 64), (5, 10)]]) and torch.equal(schedule.lists, before)
    assert schedule.update([[(0, 65), (0, 64), (0, 64), (0, 64)]]) and not torch.equal(schedule.lists, before)
    assert schedule.lists is lists


def segment(slots: int, rows: int = 2, dim: int = 64, **options) -> Segment:
    key = torch.zeros(rows, 2, slots, dim, dtype=torch.bfloat16)
    return Segment(key, key, **options)


def coded(slots: int = 256, bits: int = 4, dim: int = 64, **changed) -> Segment:
    key = torch.zeros(2, 2, slots, dim * bits // 8, dtype=torch.uint8)
    sizes = {"group": 32, "channels": 32, "tokens": slots, "width": dim, **changed}
    numbers = torch.zeros(2, 2, slots // sizes["group"], sizes["width"], dtype=torch.float16)
    values = torch.zeros(2, 2, sizes["tokens"], dim // sizes["channels"], dtype=torch.float16)
    return Segment(key, key, key_codes=Codes(bits, numbers, numbers), value_codes=Codes(bits, values, values))


def query(length: int = 1, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(2, length, 8, dim, dtype=dtype)


REFUSED = [
    (segment(300), query(dtype=torch.float64), "query of dtype torch.float64"),
    (segment(300), query(dtype=torch.float16), "keys of torch.bfloat16"),
    (segment(300, dim=264), query(dim=264), "head dimension 264"),
    (replace(coded(), key=segment(256).key, key_codes=None), query(), "codes of keys or of values alone"),
    (replace(coded(), index=torch.zeros(2, 2, 16, dtype=torch.int32)), query(), "codes and an index"),
    (coded(dim=24, channels=24), query(dim=24), "multiples of 16"),
    (coded(channels=8), query(), "multiples of 16"),
    (coded(group=8), query(), "keys that share a step by 8"),
    (coded(slots=288, group=96), query(), "keys that share a step by 96"),
    (coded(width=32), query(), "channels that share a step"),
    (coded(tokens=64), query(), "values whose tokens share a step"),
]


@pytest.mark.parametrize(("read", "asked", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_what_is_not_covered_is_refused_by_name_or_left_to_torch(read, asked, said):
    assert said in uncovered(DecodeInputs(asked, None, None, (read,), None, 1.0))
    with assumed_device("cuda"):
        with pytest.raises(ValueError, match=f"backend='triton' got .*{said}"):
            decode_attention(asked, [read], backend="triton")
        if read.key_codes is None or read.value_codes is None or asked.dtype != torch.bfloat16:
            return
        assert decode_attention(asked, [read])[0].shape == asked.shape  # by torch


def test_schedule_of_another_call_is_refused():
    schedule = schedule_decoding(query(), [segment(300)], [[(0, 300)]])
    with simulated_gpu(90, processors=132), pytest.raises(ValueError, match=r"schedule is torch\.int32"):
        decode_attention(query(), [segment(300), segment(200)], schedule=schedule.lists)
    with pytest.raises(ValueError, match="1 lists of spans for 2 segments"):
        schedule_decoding(query(), [segment(300), segment(200)], [[(0, 300)]])


def launched(*segments: Segment, length: int = 1, **options) -> dict[str, int]:
    """How many programs each kernel is launched with, on a GPU of 132 multiprocessors."""
    with simulated_gpu(90, processors=132) as gpu:
        decode_attention(query(length), segments, **options)
    return {name: sum(call["grid"] for call in calls) for name, calls in gpu.launches.items()}


def test_each_segment_is_one_launch_of_two_programs_for_each_multiprocessor():
    assert launched(segment(300)) == {"decode_kernel": 264, "decode_merge_kernel": 16}
    assert launched(segment(300, 1), segment(9)) == {"decode_kernel": 2 * 264, "decode_merge_kernel": 16}
    index = torch.zeros(2, 2, 48, dtype=torch.int32)
    found = launched(coded(), segment(300, 1, index=index), length=3)
    assert found == {"decode_codes_kernel": 264, "decode_kernel": 264, "decode_merge_kernel": 48}
    found = launched(segment(300), segment(100, 1), return_weights=True)
    assert found["decode_weights_kernel"] == 2 * 2 * 5 + 2 * 2


def test_kernel_and_tiles_of_a_segment():
    def kernel(length: int, read: Segment) -> tuple[str, int]:
        call = SegmentCall(DecodeInputs(query(length), None, None, (read,), None, 1.0), read)
        return call.kernel, call.shape.row_tiles

    assert kernel(4, segment(300)) == ("decode", 1)
    assert kernel(5, segment(300)) == ("decode_wide", 1)
    assert kernel(16, segment(300, 1)) == ("decode_wide", 2)
    assert kernel(16, coded()) == ("decode_codes", 4)
    assert tile_keys(128) == 128 and tile_keys(129) == 64
    assert programs_of(query()) == 264


def test_lengths_and_batches_start_no_compile():
    with simulated_gpu(90, processors=132) as gpu:
        for slots in (1, 100, 1000, 1016, 4096):
            for rows in (1, 2):
                decode_attention(query(), [segment(slots, rows)])
        for slots in (256, 288, 320):
            decode_attention(query(), [coded(slots)])
    assert {name: len(found) for name, found in gpu.variants.items()} == {
        "decode_kernel": 1,
        "decode_codes_kernel": 1,
        "decode_merge_kernel": 1,
    }


def test_lists_are_built_once_for_all_layers_and_steps_within_a_tile():
    decode_launch._lists.cache_clear()
    with simulated_gpu(90, processors=132):
        for slots in (129, 130, 256, 129):
            decode_attention(query(), [segment(slots)])
    assert decode_launch._lists.cache_info().misses == 1


def test_shapes_and_launches_of_fake_tensors():
    with simulated_gpu(90, processors=132) as gpu, FakeTensorMode() as mode, FakeCalls():
        asked, *tensors = (mode.from_tensor(x) for x in (query(3), segment(300).key, query(3)[:, :, :2]))
        found = decode_attention(
            asked,
            [Segment(tensors[0], tensors[0])],
            new=(tensors[1], tensors[1]),
            return_logsumexp=True,
            return_weights=True,
        )
    assert found[0].shape == asked.shape and found[0].dtype == torch.bfloat16
    assert found[1].shape == (2, 3, 8) and found[1].dtype == torch.float32
    assert [x.shape for x in found[2]] == [(2, 2, 4, 3, 300), (2, 2, 4, 3, 3)]
    assert gpu.launches.keys() == {"decode_kernel", "decode_merge_kernel", "decode_weights_kernel"}


def test_operations_are_those_of_what_is_read():
    count, first = torch.tensor([[100], [7]], dtype=torch.int32), torch.tensor([20, 9], dtype=torch.int32)
    index = torch.full((2, 2, 16), -1, dtype=torch.int32)
    index[..., :5] = 1
    new = torch.zeros(2, 3, 2, 64, dtype=torch.bfloat16)
    cases = (
        (segment(300), 2 * 300),
        (segment(300, 1, count=count, first=first), 80),
        (segment(300, index=index), 10),
    )
    for read, seen in cases:
        with simulated_gpu(90), FlopCounterMode(display=False) as counted:
            decode_attention(query(3), [read], new=(new, new))
        assert counted.get_total_flops() == 2 * 128 * 8 * (3 * seen + 2 * 6)


def test_one_graph_has_the_operator():
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "longmix" in str(node.target))
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def step(asked: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return decode_attention(asked, [Segment(key, key)])[0]

    with simulated_gpu(90):
        for slots in (40, 41, 300):
            assert step(query(), segment(slots).key).shape == query().shape
    assert seen == ["longmix.attention_decode.default"]


def test_every_kernel_has_entries():
    assert_every_entry(decode_launch)


def test_steps_divide_tiles():
    for (_, _, _, width), config in TABLE.entries.items():
        assert tile_keys(width) % config.keys == 0


def name(build: Build) -> str:
    return f"{build.kernel}-sm{build.architecture}-d{build.dim}-{build.feature}-{build.bits}"


def assert_small_and_clean(build: Build) -> None:
    assert_clean(build, False)
    compiled = build.compile()
    assert compiled.shared <= SHARED_OF_CONSUMER_GPUS
    assert sum(compiled.tensor_cores.values()) > 0 or build.kernel == "decode_merge"


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("build", sampled(decode_report.builds((90,), (128,))), ids=name)
def test_compiles_without_spills_and_with_tensor_cores(build):
    assert_small_and_clean(build)


@compiles
@pytest.mark.every_row
@pytest.mark.parametrize("build", decode_report.builds(ARCHITECTURES, (*launch.WIDTHS, 80)), ids=name)
def test_every_entry_of_the_table_compiles_without_spills(build):
    assert_small_and_clean(build)
