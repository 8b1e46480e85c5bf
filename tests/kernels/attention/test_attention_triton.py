"""The Triton backend as the public function sees it; and the interpreter tests, in a process of their own."""

from pathlib import Path

import pytest
import torch
from engine_contract import assert_passes_in_the_interpreter

from longmix_kernels.attention import launch, sink_and_local_blocks
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.columns import split_dim


def inputs(dtype: torch.dtype = torch.float32, dim: int = 16) -> list[torch.Tensor]:
    return [torch.zeros(1, 20, 2, dim, dtype=dtype) for _ in range(3)]


@pytest.mark.slow
def test_interpreter_matches_reference():
    assert_passes_in_the_interpreter(Path(__file__).with_name("test_attention_triton_interpreted.py"), at_least=40)


def test_shapes_are_known_without_running():
    """The operators on tensors without data, as torch.compile sees them."""
    query = torch.empty(2, 70, 4, 80, device="meta", dtype=torch.bfloat16)
    key, value = (torch.empty(2, 70, 2, dim, device="meta", dtype=torch.bfloat16) for dim in (80, 48))
    lo = torch.empty(2, 1, 70, device="meta", dtype=torch.int32)
    rows, slopes = torch.empty(1, 1, 70, device="meta", dtype=torch.int32), torch.empty(4, device="meta")
    patterns = [Pattern(*bounds, window=9) for bounds in ((None, None), (lo, None), (lo, lo))]
    for pattern in (*patterns, Pattern(lo, None, rows, rows, slopes)):
        flat = Inputs(query, key, value, pattern, 0.1).flat()
        output, logsumexp = torch.ops.longmix.attention_triton(*flat)
        assert output.shape == (2, 70, 4, 48) and output.dtype == torch.bfloat16
        assert logsumexp.shape == (2, 70, 4) and logsumexp.dtype == torch.float32
        grads = torch.ops.longmix.attention_triton_backward(output, None, output, logsumexp, *flat)
        assert [x.shape for x in grads] == [x.shape for x in (query, key, value)]


def test_a_head_dimension_is_covered_without_much_waste():
    for dim in range(1, 257):
        main, rest = split_dim(dim)
        assert main & (main - 1) == 0 and rest & (rest - 1) == 0 and main >= 16 and rest not in (1, 2, 4, 8)
        assert dim <= main + rest <= max(16, dim + 63)
    for dim in (16, 32, 48, 64, 80, 96, 128, 144, 160, 192, 256):
        assert sum(split_dim(dim)) == dim


def test_rows_are_copied_beforehand_within_a_context_only():
    rows = torch.arange(19, -1, -1, dtype=torch.int32)[None, None]
    pattern, slopes = Pattern(query_rows=rows), torch.ones(2)
    query, key, value = inputs()
    query[:, 3] = 1.0
    call = launch.Call(Inputs(query, key, value, pattern, 1.0))
    assert call.query is query and call.query_order is not None and call.constants()["GATHER_QUERY"]
    with launch.gathered_before():
        call = launch.Call(Inputs(query, key, value, pattern, 1.0))
        assert call.query[0, 16, 0, 0] == 1.0 and torch.equal(call.put_queries(call.query), query)
        assert call.query_order is None and not call.constants()["GATHER_QUERY"] and call.features() == []
        call = launch.Call(Inputs(query, key, value, Pattern(query_rows=rows, alibi_slopes=slopes), 1.0))
        assert call.query_order is not None and not call.constants()["GATHER_QUERY"]
    assert launch.Call(Inputs(query, key, value, pattern, 1.0)).query is query


def test_a_feature_may_have_a_narrower_entry():
    plain = launch.table_entry("forward", 90, 2, 128)
    narrower = launch.table_entry("forward", 90, 2, 128, ["alibi", "permuted"])
    assert narrower.rows * narrower.keys < plain.rows * plain.keys
    assert launch.table_entry("forward", 90, 2, 64, ["alibi"]) is launch.table_entry("forward", 90, 2, 64)
    assert launch.table_entry("forward", 90, 4, 128, ["alibi"]) is launch.table_entry("forward", 90, 4, 128)
    known = {(kernel, architecture, width) for kernel, architecture, _, width in launch.TABLE.entries}
    assert all(key in known for entries in launch.NARROWER.values() for key in entries)


CANNOT_BE_DESCRIBED = {
    "columns": lambda rows: rows(24),
    "address": lambda rows: rows(72)[..., 2:66],
    "stride": lambda rows: rows(66)[..., :64],
    "expanded": lambda rows: rows(64)[:, :, :1].expand(-1, -1, 2, -1),
    "empty": lambda rows: rows(64)[:0],
}


def test_which_rows_a_descriptor_takes():
    rows = {name: make(lambda dim: torch.zeros(1, 40, 2, dim)) for name, make in CANNOT_BE_DESCRIBED.items()}
    assert not any(launch.describable(x) for x in rows.values())
    described = torch.zeros(1, 40, 2, 64)
    assert launch.describable(described) and launch.describable(torch.zeros(1, 40, 4, 128)[:, :, 1:3, 64:])
    with launch.TABLE.override("forward", launch.LaunchConfig(16, 16, 1, 1, descriptors=True)):
        call = launch.Call(Inputs(described, described, described, Pattern(), 1.0))
        assert [x.block_shape for x in call.steps("forward")] == [[1, 16, 1, 64]] * 2
        del rows["address"]  # a call copies rows that begin anywhere
        for x in rows.values():
            x = x if len(x) else torch.zeros(1, 0, 2, 64)
            assert launch.Call(Inputs(x, x, x, Pattern(), 1.0)).steps("forward") == (None, None)
        order = torch.arange(40, dtype=torch.int32).expand(1, 2, 40)
        permuted = launch.Call(Inputs(described, described, described, Pattern(key_rows=order), 1.0))
        assert permuted.steps("forward") == (None, None)
    assert launch.Call(Inputs(described, described, described, Pattern(), 1.0)).steps("forward") == (None, None)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_tiles_divide_a_block(size):
    lists = sink_and_local_blocks(300, size, sink=1, local=1)
    call = launch.Call(Inputs(*(torch.zeros(1, 300, 1, 16) for _ in range(3)), Pattern(blocks=lists), 1.0))
    assert call.features() == ["blocks"] and call.constants()["BLOCK"] == size
    with launch.TABLE.override("forward", launch.LaunchConfig(128, 64, 8, 3)):
        config = call.config("forward")
    assert size % config.rows == 0 and size % config.keys == 0
    assert config == (launch.LaunchConfig(128, 64, 8, 3) if size >= 128 else config)
    assert all(n & (n - 1) == 0 for entry in launch.TABLE.entries.values() for n in (entry.rows, entry.keys))
