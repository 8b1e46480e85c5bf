"""`python -m benchmarks.hyper_recursion`: the published recursion is what it is said to be, and leaks."""

import pytest
import torch

from benchmarks import hyper_recursion as benchmark
from longmix.analysis.causality import audit, mixer_function
from longmix.mixers.parts.base import ModelShape
from longmix_kernels.attention import attention


def tensors(length: int, key_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, n, 8, generator=generator, dtype=torch.float64) for n in (2, key_heads, key_heads)]


def test_one_block_is_exact_and_samples_stand_for_the_rest():
    for length, key_heads in ((64, 2), (51, 1)):
        rows = tensors(length, key_heads)
        exact, logsumexp = attention(*rows, return_logsumexp=True)
        found = benchmark.recursive_attention(*rows, block=64, samples=1, exact=4)
        torch.testing.assert_close(found, (exact, logsumexp), rtol=0, atol=1e-12)

    def error(samples: int) -> float:
        found, _ = benchmark.recursive_attention(*rows, block=4, samples=samples, exact=4)
        return (found - exact).square().mean().sqrt().item()

    assert error(64) / error(4096) == pytest.approx(8, rel=0.3)  # as means of draws


def test_neighbours_in_the_order_of_the_hash_differ_in_one_sign():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    order = [benchmark.blocks_of(signs[None, :, None], torch.eye(3), 8).flatten().tolist().index(n) for n in range(8)]
    assert all((one != other).sum() == 1 for one, other in zip(signs[order], signs[order[1:]], strict=False))


def test_pairs_are_those_of_exact_halves_blocks_and_samples():
    assert benchmark.recursive_pairs(8, 2, 1, 4) == 2 * 10 + 4 * (2 + 1)
    assert benchmark.recursive_pairs(16, 2, 1, 4) == 2 * 32 + 8 * (2 + 1)


def test_ranks_among_the_queries_of_a_half_let_later_ones_choose():
    torch.manual_seed(0)
    shape = ModelShape(d_model=64, num_layers=1, num_heads=4)
    mixer = benchmark.PublishedHyper(shape, 0, block=4, samples=3, exact=4).double()
    x = torch.randn(2, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {finding.probe: finding.kind for finding in audit(mixer_function(mixer), x)}
    assert mixer.leaky and found["last token"] == found["later tokens"] == "selection"
    assert not torch.autograd.functional.jacobian(lambda x: mixer(x).y[:, 20].sum(), x)[:, 21:].any()


def test_a_run_leaves_records_a_table_and_a_picture(tmp_path, capsys):
    words = ["--length", "128", "--sizes", "4", "16", "--seeds", "1", "--out", str(tmp_path)]
    assert benchmark.main(words) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    printed = capsys.readouterr().out
    assert "| independent | mixer=hyper |" in printed and "| neighbours alike | window | 22: " in printed
    with pytest.raises(SystemExit):
        benchmark.main([*words, "--sizes", "17"])
    assert "--sizes 17: must be at most an eighth of --length 128" in capsys.readouterr().err
