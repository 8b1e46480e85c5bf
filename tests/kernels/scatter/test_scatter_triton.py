"""The Triton backend as the public function sees it; and the interpreter tests, in a process of their own."""

from pathlib import Path

import pytest
import torch
from engine_contract import assert_passes_in_the_interpreter
from scatter_cases import Case

from longmix_kernels.scatter import launch
from longmix_kernels.scatter.inputs import Inputs


def call_of(case: Case, dtype: torch.dtype = torch.float32) -> launch.Call:
    inputs = case.inputs(dtype).values()
    return launch.Call(Inputs(*inputs, case.document_ids(), case.block_size, case.past_blocks, 1.0))


@pytest.mark.slow
def test_interpreter_matches_reference():
    assert_passes_in_the_interpreter(Path(__file__).with_name("test_scatter_triton_interpreted.py"), at_least=50)


@pytest.mark.parametrize("features", [0, 6])
def test_shapes_are_known_without_running(features):
    """The operators on tensors without data, as torch.compile sees them."""
    query, value = (torch.empty(2, 70, 4, dim, device="meta", dtype=torch.bfloat16) for dim in (80, 48))
    logs = torch.empty(2, 70, 4, features, device="meta") if features else None
    inputs = (query, query, value, logs, logs, None, None, None, None, 16, 1, 0.1)
    results = torch.ops.longmix.scatter_triton(*inputs)
    assert [tuple(x.shape) for x in results] == [(2, 70, 4, 48), (2, 70, 4), (2, 70, 4)]
    assert [x.dtype for x in results] == [torch.bfloat16, torch.float32, torch.float32]
    grads = torch.ops.longmix.scatter_triton_backward(results[0], None, *results[:2], *inputs)
    assert [x.shape for x in grads] == [torch.Size([0]) if x is None else x.shape for x in inputs[:8]]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((128, 64, 128), (128, 64, 128, 8)),
        ((64, 64, 128), (64, 64, 128, 4)),
        ((100, 64, 96), (128, 64, 128, 8)),
        ((5, 1, 3), (16, 16, 16, 4)),
        ((256, 80, 144), (128, 32, 32, 8)),
        ((16, 20, 256), (16, 32, 128, 4)),
    ],
    ids=str,
)
def test_tiles_fit_blocks_features_and_columns(sizes, expected):
    config = launch.LaunchConfig(128, 64, 128, 8, 2).within(*sizes)
    assert (config.rows, config.features, config.values, config.warps) == expected


def test_the_scans_take_every_column_at_once():
    config = launch.LaunchConfig(0, 8, 0, 4, 3)
    assert config.within(128, 64, 80) == launch.LaunchConfig(0, 8, 128, 4, 3)
    assert config.within(128, 3, 200) == launch.LaunchConfig(0, 4, 256, 4, 3)
    assert config.tiles() == {"ROWS": 0, "STAGES": 3, "FEATURE_BLOCK": 8, "VALUE_BLOCK": 0}


def test_a_call_knows_its_blocks():
    plain = call_of(Case("plain", length=50, queries=30))
    assert (plain.slots, plain.block_size, plain.stride_blocks, plain.whole) == (7, 8, 0, True)
    packed = call_of(Case("packed", length=50, documents=(20,)))
    assert packed.stride_blocks == 7 * 4 and not packed.whole
    config = launch.LaunchConfig(16, 4, 8, 1, 1)
    assert packed.programs("sums", config) == 7 * 2 * 2 * 2 * 2
    assert packed.programs("scan", config) == 2 * 2 * 2 and packed.row_tiles("merge") == 1


def test_gradients_that_no_kernel_writes_are_zero():
    """Queries that have no far keys yet, and keys that no query sees as such."""
    for case, queries, keys in (
        (Case("plain", length=50), slice(16), slice(40, 50)),
        (Case("fewer", length=50, queries=40), slice(6), slice(40, 50)),
        (Case("none", length=50, queries=5), slice(0), slice(40, 50)),
        (Case("packed", length=50, documents=(20,)), slice(50), slice(50)),
    ):
        call = call_of(case)
        call.value = call.value.detach().fill_(torch.nan)
        grads = call.new_grad_features()
        for grad, zero in zip(grads, (queries, keys), strict=True):
            assert grad[:, zero].count_nonzero() == 0, case.name
