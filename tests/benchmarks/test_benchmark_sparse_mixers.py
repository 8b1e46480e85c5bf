"""`python -m benchmarks.sparse_mixers`: plain code and ours give the same, and a run leaves its files."""

import json

import pytest
import torch

from benchmarks import sparse_mixers as benchmark
from longmix.mixers.combiner import Combiner
from longmix.mixers.moba import MoBA
from longmix.mixers.nsa import NSA
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.sliding_window import SlidingWindow
from longmix.mixers.sparsek import SparseK
from longmix.mixers.tensor import TensorAttention

SHAPE = ModelShape(16, 1, 2)
SMALL = {
    "sparsek": lambda: SparseK(SHAPE, 0, block=4, keep=5, past_blocks=1),
    "combiner": lambda: Combiner(SHAPE, 0, block=5),
    "combiner_log": lambda: benchmark.CombinerLog(SHAPE, 0),
    "dilated": lambda: SlidingWindow(SHAPE, 0, window=3, dilation=[1, 4]),
    "tensor": lambda: TensorAttention(SHAPE, 0, window_1=3, window_2=6),
    "parallax": lambda: benchmark.Parallax(SHAPE, 0),
    "moba": lambda: MoBA(SHAPE, 0, block=4, top_k=3),
    "nsa": lambda: NSA(SHAPE, 0, block=4, blocks=4, compress_block=4, compress_stride=2, window=7),
}


@pytest.mark.parametrize("name", benchmark.MIXERS)
def test_plain_code_gives_the_same_output_and_gradients(name):
    calls = benchmark.workload(SMALL[name]().double(), benchmark.MIXERS[name][1], 37, torch.float64)
    for ours, plain in zip(calls["ours"](), calls["plain"](), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_nearly_equal_importances_are_equal_in_both():
    """With these weights, two blocks differ by less than what the mixer tells apart."""
    torch.manual_seed(47)
    calls = benchmark.workload(SMALL["nsa"]().double(), benchmark.MIXERS["nsa"][1], 37, torch.float64)
    for ours, plain in zip(calls["ours"](), calls["plain"](), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_a_run_leaves_a_table_and_records(tmp_path, capsys):
    words = ["--mixers", "dilated", "--length", "128", "--seconds", "0.01", "--out", str(tmp_path)]
    assert benchmark.main(words) == 0
    (path,) = tmp_path.glob("sparse_mixers_cpu_*.json")
    (record,) = json.loads(path.read_text())["results"]
    assert record["mixer"] == "dilated" and record["times"] > 0
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 1000
