"""Few queries: when keys are cut into parts and into how many, what that compiles to, and the interpreter's tests."""

from pathlib import Path

import pytest
import torch
from engine_contract import ARCHITECTURES, assert_clean, assert_every_entry, assert_passes_in_the_interpreter, compiles
from torch.utils.flop_counter import FlopCounterMode

from longmix_kernels.attention import attention, launch, report, sink_and_local_blocks, split_launch, split_report
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.split_launch import TABLE, Call, covers, splits_of
from longmix_kernels.attention.split_report import Build
from longmix_kernels.simulated import simulated_gpu

SHARED_OF_CONSUMER_GPUS = 99 * 1024


@pytest.mark.slow
def test_interpreter_matches_reference():
    assert_passes_in_the_interpreter(Path(__file__).with_name("test_attention_split_interpreted.py"), at_least=80)


# On 132 multiprocessors: programs without cutting, keys, parts.
SPLITS = [
    (1, 65536, 64),
    (8, 65536, 64),
    (8, 8192, 32),  # parts of 256 keys
    (16, 65536, 32),
    (64, 65536, 8),
    (132, 65536, 2),
    (263, 65536, 2),
    (264, 65536, 1),
    (10_000, 65536, 1),
    (8, 511, 1),
    (8, 512, 2),
    (8, 1, 1),
]


@pytest.mark.parametrize(("programs", "keys", "parts"), SPLITS)
def test_keys_are_cut_until_all_multiprocessors_have_work(programs, keys, parts):
    assert splits_of(programs, keys, 132) == parts
    assert parts in split_launch.SPLITS


def inputs(queries=1, keys=4096, batch=1, heads=8, key_heads=2, dim=64, **pattern) -> Inputs:
    query = torch.empty(batch, queries, heads, dim, device="meta")
    key = torch.empty(batch, keys, key_heads, dim, device="meta")
    return Inputs(query, key, key, Pattern(**pattern), 1.0)


def test_heads_that_share_keys_are_one_tile():
    for given, programs in (
        (inputs(), 2),
        (inputs(heads=2), 2),
        (inputs(queries=4), 2),
        (inputs(queries=5), 4),
        (inputs(queries=15, heads=32, key_heads=1, batch=3), 3 * 30),
    ):
        call = Call(given)
        assert call.programs("split_forward", TABLE.interpreted["split_forward"]) == programs * call.splits
        assert call.programs("split_merge", TABLE.interpreted["split_merge"]) == given.query.shape[:3].numel()


def test_a_window_limits_the_parts():
    assert Call(inputs(keys=65536)).splits == 64
    assert Call(inputs(keys=65536, window=1024)).splits == 4
    assert Call(inputs(keys=65536, window=100)).splits == 1


def test_what_has_few_queries_and_no_gradient():
    few, many = inputs(queries=15), inputs(queries=16)
    assert covers(few) and not covers(many)
    assert not covers(inputs(blocks=sink_and_local_blocks(4096, 64, sink=1, local=1)))
    few.key.requires_grad_()
    assert not covers(few)
    with torch.no_grad():
        assert covers(few)


def test_shapes_and_operations_are_known_without_running():
    given = inputs(queries=3, keys=700, batch=2)
    output, logsumexp = torch.ops.longmix.attention_split(*given.flat())
    assert output.shape == (2, 3, 8, 64) and output.dtype == torch.float32
    assert logsumexp.shape == (2, 3, 8) and logsumexp.dtype == torch.float32
    with FlopCounterMode(display=False) as counted:
        torch.ops.longmix.attention_split(*given.flat())
    assert counted.get_total_flops() == 2 * 2 * 8 * (698 + 699 + 700) * 2 * 64


def test_one_graph_has_the_operator_for_few_queries(monkeypatch):
    from longmix_kernels.attention import op

    monkeypatch.setattr(op, "backend_of_call", lambda *_, **__: "triton")
    given, seen = inputs(), []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "longmix" in str(node.target))
        return graph.forward

    compiled = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True, backend=backend)
    assert compiled(given.query, given.key, given.value).shape == given.query.shape
    assert seen == ["longmix.attention_split.default"]
    seen.clear()
    torch._dynamo.reset()
    compiled(given.query.requires_grad_(), given.key, given.value)
    assert seen == ["longmix.attention_triton.default"]


def test_lengths_and_batches_start_no_compile():
    """Under no gradient on a GPU of 132 multiprocessors: two kernels for each call, compiled once."""
    with simulated_gpu(90, processors=132) as gpu:
        for batch, keys in ((1, 8192), (1, 9001), (2, 8192), (3, 16385)):
            query, key = torch.zeros(batch, 1, 8, 64), torch.zeros(batch, keys, 2, 64)
            attention(query, key, key)
        attention(query.requires_grad_(), key, key)
    assert [call["grid"] for call in gpu.launches["split_forward_kernel"]] == [2 * 32, 2 * 32, 4 * 32, 6 * 64]
    assert [call["grid"] for call in gpu.launches["split_merge_kernel"]] == [8, 8, 16, 24]
    assert {name: len(found) for name, found in gpu.variants.items()} == {
        "split_forward_kernel": 1,
        "split_merge_kernel": 1,
        "forward_kernel": 1,
    }


def test_every_kernel_has_entries():
    assert_every_entry(split_launch)


def name(build: Build) -> str:
    return f"{build.kernel}-sm{build.architecture}-d{build.dim}-{build.mode}-{build.feature}"


def assert_small_and_clean(build: Build) -> None:
    assert_clean(build, False)
    compiled = build.compile()
    assert compiled.shared <= SHARED_OF_CONSUMER_GPUS
    assert compiled.tensor_cores["mma"] > 0 or build.kernel == "split_merge"


@compiles
@pytest.mark.parametrize("build", split_report.builds(ARCHITECTURES, (128,), modes=("documents",)), ids=name)
def test_compiles_without_spills_and_with_tensor_cores(build):
    assert_small_and_clean(build)


@compiles
@pytest.mark.every_row
@pytest.mark.parametrize("build", split_report.builds(ARCHITECTURES, (*launch.WIDTHS, 80), modes=("causal",)), ids=name)
def test_every_entry_of_the_table_compiles_without_spills(build):
    assert_small_and_clean(build)


@compiles
@pytest.mark.every_row
@pytest.mark.parametrize(
    "build", split_report.builds(ARCHITECTURES, (128, 256), modes=("bounds",), features=split_report.FEATURES), ids=name
)
def test_every_feature_compiles_without_spills(build):
    assert_small_and_clean(build)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("build", split_report.builds((90,), (64, 128), modes=report.MODES), ids=name)
def test_every_mode_compiles_without_spills(build):
    assert_small_and_clean(build)
