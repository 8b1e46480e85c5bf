"""What benchmarks count, against counting one by one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention_providers, attention_work
from benchmarks.attention_providers import Shape
from longmix_kernels.attention import block_list, order_by_label, row_bounds

LENGTH = 96


@pytest.fixture
def attends(monkeypatch):
    """Builds every provider that runs anywhere, with small patterns; its workload, and weights [B, H, T, T]."""
    functions = []
    both_passes = attention_providers.both_passes

    def spy(function, *rest):
        functions.append(function)
        return both_passes(function, *rest)

    monkeypatch.setattr(attention_providers, "both_passes", spy)
    for name, value in {"WINDOW": 20, "BUCKETS": 4, "BLOCK_SIZE": 16, "LOCAL_BLOCKS": 2}.items():
        monkeypatch.setattr(attention_providers, name, value)

    def build(name):
        shape = Shape(2, LENGTH, 3, LENGTH, torch.float32, torch.device("cpu"))
        workload = attention_providers.providers(flex=False)[name].build(shape)
        nothing = torch.zeros(2, LENGTH, 3, LENGTH)
        identity = torch.eye(LENGTH)[None, :, None].expand(2, -1, 3, -1)
        return workload, functions[-1](nothing, nothing, identity).transpose(1, 2)

    return build


CAUSAL = ("dense", "sdpa-flash", "sdpa-math")


@pytest.mark.parametrize("name", [*CAUSAL, "window", "hash-shared", "hash-separate", "routing", "drop", "sink-local"])
def test_a_provider_sees_the_pairs_that_are_counted_for_it(attends, name):
    workload, weights = attends(name)
    assert workload.columns["pairs"] == weights.count_nonzero()
    causal = torch.ones(LENGTH, LENGTH).tril() > 0
    assert not weights[..., ~causal].any()
    if name in CAUSAL:
        assert (weights[..., causal] > 0).all()
    else:
        assert workload.columns["pairs"] < 6 * attention_work.causal_pairs(LENGTH)
    assert workload.flops == {
        "fwd": 4 * LENGTH * workload.columns["pairs"],
        "fwd+bwd": 14 * LENGTH * workload.columns["pairs"],
    }


def test_dropping_keeps_half_of_the_queries_and_keys_of_each_head(attends):
    _, weights = attends("drop")
    assert (weights.any(2).sum(-1) <= LENGTH // 2).all()
    assert (weights.any(3).sum(-1) <= LENGTH // 2).all()
    assert weights.any(3).sum() > 0.45 * weights[..., 0].numel()


def test_hash_separate_draws_its_buckets_independently(attends):
    _, weights = attends("hash-separate")
    own = weights.diagonal(dim1=2, dim2=3) > 0
    assert own.float().mean() == pytest.approx(1 / 4, abs=0.1)


def test_forward_flops_are_those_of_two_products():
    x = torch.ones(LENGTH, 24)
    with FlopCounterMode(display=False) as counter:
        (x @ x.T) @ x
    assert attention_work.attention_flops(LENGTH * LENGTH, 24, backward=False) == counter.get_total_flops()


@pytest.mark.parametrize("shared", [True, False])
def test_pairs_of_labels(shared):
    query_labels, key_labels = (
        torch.randint(5, (2, 70, 3), generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    if shared:
        key_labels = query_labels
    alike = (query_labels[:, :, None] == key_labels[:, None]) & (torch.ones(70, 70).tril() > 0)[..., None]
    ordering = order_by_label(query_labels, None if shared else key_labels, num_labels=5)
    assert attention_work.visible_pairs(*attention_work.ordering_bounds(ordering)) == alike.sum()


@pytest.mark.parametrize("length", [64, 70])
def test_pairs_of_blocks(length):
    blocks = torch.rand(5, 5, generator=torch.Generator().manual_seed(length)) < 0.6
    blocks = blocks[: -(-length // 16), : -(-length // 16)]
    mask = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[:length, :length].tril()
    assert attention_work.block_pairs(block_list(blocks, 16), length) == mask.sum()


def walked(lo, hi, tile):
    """Scores of tiles that are walked one by one."""
    scores = 0
    for row in range(0, len(lo), tile):
        key = lo[row]
        while key < hi[min(row + tile, len(hi)) - 1]:
            key += tile
            scores += tile * tile
    return scores


@pytest.mark.parametrize(("length", "tile"), [(64, 16), (70, 16), (9, 16), (70, 7)])
def test_tile_scores_of_any_bounds(length, tile):
    generator = torch.Generator().manual_seed(length)
    lo, hi = torch.randint(length + 1, (2, 2, 3, length), generator=generator).sort(-1)[0]
    rows = [*zip(lo.flatten(0, 1).tolist(), hi.flatten(0, 1).tolist(), strict=True)]
    expected = sum(walked(*bounds, tile) for bounds in rows)
    assert attention_work.tile_scores(lo, hi, tile) == expected
    pairs = sum(len(range(a, b)) for a, b in zip(lo.flatten().tolist(), hi.flatten().tolist(), strict=True))
    assert attention_work.visible_pairs(lo, hi) == pairs
    assert attention_work.tile_waste(lo, hi, tile) == expected / pairs


def test_tiles_of_causal_attention_are_a_triangle_of_squares():
    lo, hi = row_bounds(80, 80)
    assert attention_work.tile_scores(lo, hi, 16) == 16 * 16 * (1 + 2 + 3 + 4 + 5)


def test_no_waste_without_a_pair():
    nothing = torch.zeros(1, 1, 40, dtype=torch.int32)
    assert attention_work.tile_waste(nothing, nothing, 16) is None


def test_waste_is_what_was_simulated():
    row = attention_work.waste_row(8192, 16)
    assert row["waste_128"] == pytest.approx(1.74, rel=0.03)
    assert row["waste_64"] == pytest.approx(1.36, rel=0.03)
    assert row["ideal"] == pytest.approx(16, rel=0.03)
    assert row["visited_128"] == pytest.approx(9.3, rel=0.03)
