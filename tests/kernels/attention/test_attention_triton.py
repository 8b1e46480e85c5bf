"""The Triton backend as the public function sees it; and the interpreter tests, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longmix_kernels.attention import attention, launch, sink_and_local_blocks
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.launching import split_dim

HERE = Path(__file__).parent


def inputs(dtype: torch.dtype = torch.float32, dim: int = 16) -> list[torch.Tensor]:
    return [torch.zeros(1, 20, 2, dim, dtype=dtype) for _ in range(3)]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_interpreter_matches_reference():
    """Rung 3: a whole test file in a process that has TRITON_INTERPRET=1 from the start."""
    file = "test_attention_triton_interpreted.py"
    done = run_python("-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    print(f"interpreter: {summary}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None and int(passed[1]) >= 40
    assert "skipped" not in summary


def test_importing_the_engine_does_not_import_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from longmix_kernels.attention import attention\n"
        "x = torch.ones(1, 4, 1, 8)\n"
        "attention(x, x, x)\n"
        "try: attention(x, x, x, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "backend='triton' got tensors on cpu" in done.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_cpu_tensors_need_the_interpreter():
    with pytest.raises(ValueError, match=r"got tensors on cpu; allowed are a CUDA device, or .* TRITON_INTERPRET=1"):
        attention(*inputs(), backend="triton")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            inputs(torch.float64),
            r"backend='triton' got query of dtype torch.float64; allowed are torch.float16, torch.b",
        ),
        (inputs(dim=257), r"backend='triton' got query with head dimension 257; allowed are 1 to 256"),
        ([*inputs()[:2], inputs(dim=300)[0]], r"got value with head dimension 300; allowed are 1 to 256"),
    ],
    ids=["float64", "query-257", "value-300"],
)
def test_what_is_not_covered_is_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        attention(*tensors, backend="triton")


def test_shapes_are_known_without_running():
    """The operators on tensors without data, as torch.compile sees them."""
    query = torch.empty(2, 70, 4, 80, device="meta", dtype=torch.bfloat16)
    key, value = (torch.empty(2, 70, 2, dim, device="meta", dtype=torch.bfloat16) for dim in (80, 48))
    lo = torch.empty(2, 1, 70, device="meta", dtype=torch.int32)
    rows, slopes = torch.empty(1, 1, 70, device="meta", dtype=torch.int32), torch.empty(4, device="meta")
    patterns = [Pattern(*bounds, window=9) for bounds in ((None, None), (lo, None), (lo, lo))]
    for pattern in (*patterns, Pattern(lo, None, rows, rows, slopes)):
        flat = pattern.flat()
        output, logsumexp = torch.ops.longmix.attention_triton(query, key, value, *flat, 0.1)
        assert output.shape == (2, 70, 4, 48) and output.dtype == torch.bfloat16
        assert logsumexp.shape == (2, 70, 4) and logsumexp.dtype == torch.float32
        grads = torch.ops.longmix.attention_triton_backward(
            output, None, output, logsumexp, query, key, value, *flat, 0.1
        )
        assert [x.shape for x in grads] == [x.shape for x in (query, key, value)]


def test_a_head_dimension_is_covered_without_much_waste():
    for dim in range(1, 257):
        main, rest = split_dim(dim)
        assert main & (main - 1) == 0 and rest & (rest - 1) == 0 and main >= 16 and rest not in (1, 2, 4, 8)
        assert dim <= main + rest <= max(16, dim + 63)
    for dim in (16, 32, 48, 64, 80, 96, 128, 144, 160, 192, 256):
        assert sum(split_dim(dim)) == dim


def test_every_architecture_has_every_entry():
    for architecture in launch.ARCHITECTURES:
        for kernel in launch.KERNELS:
            for size in (2, 4):
                for width in launch.WIDTHS:
                    config = launch.TABLE[kernel, architecture, size, width]
                    assert launch.table_entry(kernel, architecture, size, width) is config
                    assert launch.table_entry(kernel, architecture + 6, size, width - 1) is config


def test_an_override_ends_with_its_context():
    config = launch.LaunchConfig(16, 16, 1, 1)
    call = launch.Call(*inputs(), Pattern(), 1.0)
    default = launch.launch_config("forward", call)
    with launch.overridden("forward", config), launch.overridden("forward", default):
        assert launch.launch_config("forward", call) is default
    assert launch.launch_config("forward", call) == default
    with launch.overridden("forward", config):
        assert launch.launch_config("forward", call) is config
        assert launch.launch_config("grad_query", call) != config


def test_rows_are_copied_beforehand_within_a_context_only():
    rows = torch.arange(19, -1, -1, dtype=torch.int32)[None, None]
    pattern, slopes = Pattern(query_rows=rows), torch.ones(2)
    query, key, value = inputs()
    query[:, 3] = 1.0
    call = launch.Call(query, key, value, pattern, 1.0)
    assert call.query is query and call.query_order is not None and call.constants()["GATHER_QUERY"]
    with launch.gathered_before():
        call = launch.Call(query, key, value, pattern, 1.0)
        assert call.query[0, 16, 0, 0] == 1.0 and torch.equal(call.put_queries(call.query), query)
        assert call.query_order is None and not call.constants()["GATHER_QUERY"] and call.features() == []
        call = launch.Call(query, key, value, Pattern(query_rows=rows, alibi_slopes=slopes), 1.0)
        assert call.query_order is not None and not call.constants()["GATHER_QUERY"]
    assert launch.Call(query, key, value, pattern, 1.0).query is query


def test_a_feature_may_have_a_narrower_entry():
    plain = launch.table_entry("forward", 90, 2, 128)
    narrower = launch.table_entry("forward", 90, 2, 128, ["alibi", "permuted"])
    assert narrower.rows * narrower.keys < plain.rows * plain.keys
    assert launch.table_entry("forward", 90, 2, 64, ["alibi"]) is launch.table_entry("forward", 90, 2, 64)
    assert launch.table_entry("forward", 90, 4, 128, ["alibi"]) is launch.table_entry("forward", 90, 4, 128)
    known = {(kernel, architecture, width) for kernel, architecture, _, width in launch.TABLE}
    assert all(key in known for entries in launch.NARROWER.values() for key in entries)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_tiles_divide_a_block(size):
    lists = sink_and_local_blocks(300, size, sink=1, local=1)
    call = launch.Call(*(torch.zeros(1, 300, 1, 16) for _ in range(3)), Pattern(blocks=lists), 1.0)
    assert call.features() == ["blocks"] and call.constants()["BLOCK"] == size
    with launch.overridden("forward", launch.LaunchConfig(128, 64, 8, 3)):
        config = launch.launch_config("forward", call)
    assert size % config.rows == 0 and size % config.keys == 0
    assert config == (launch.LaunchConfig(128, 64, 8, 3) if size >= 128 else config)
    assert all(n & (n - 1) == 0 for entry in launch.TABLE.values() for n in (entry.rows, entry.keys))
