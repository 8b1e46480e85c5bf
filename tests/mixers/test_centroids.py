"""Running centroids and thresholds: what moves them, what must not, and that all processes agree."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.between_steps import finish_step
from longmix.mixers.parts.centroids import ScoreThreshold, SphericalKMeans, unit, usage
from longmix.mixers.routing import Routing

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=4)


def alone(x: Tensor) -> Tensor:
    return x


def kmeans(heads: int = 2, clusters: int = 4, decay: float = 0.5, **options) -> SphericalKMeans:
    return SphericalKMeans(heads, 8, clusters, decay, 3, **options).double()


def vectors(seed: int, length: int = 50, heads: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.randn(3, length, heads, 8, generator=generator, dtype=torch.float64))


def shares(x: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Of all vectors [B, T, H, D] with labels [B, T, H]: their mean where a cluster is theirs, and the share of it."""
    total = x.shape[0] * x.shape[1]
    sums = [torch.stack([x[:, :, h][labels[:, :, h] == c].sum(0) for c in range(clusters)]) for h in range(x.shape[2])]
    counts = [torch.stack([(labels[:, :, h] == c).sum() for c in range(clusters)]) for h in range(x.shape[2])]
    return torch.stack(sums) / total, torch.stack(counts).double() / total


def test_scores_are_cosines_and_centroids_have_length_1():
    means, x = kmeans(), torch.randn(3, 5, 4, 8, dtype=torch.float64)
    scores = means.scores(unit(x))
    for head in range(4):
        expected = F.cosine_similarity(x[:, :, head, None], means.centroids[head // 2], dim=-1)
        torch.testing.assert_close(scores[:, :, head], expected)
    torch.testing.assert_close(means.centroids.norm(dim=-1), torch.ones(2, 4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_centroids_follow_the_running_sums_of_their_vectors():
    means = kmeans(decay=0.75)
    sums, counts = torch.zeros(2, 4, 8, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    for step in range(6):
        x = vectors(step)
        labels = means.scores(x).argmax(-1)
        before = means.centroids.clone()
        means.observe(x[:1], labels[:1])
        means.observe(x[1:], labels[1:])
        assert torch.equal(means.centroids, before), "nothing moves before the step is finished"
        finish_step(means, True, alone)
        new_sums, new_counts = shares(x, labels, 4)
        sums, counts = 0.75 * sums + 0.25 * new_sums, 0.75 * counts + 0.25 * new_counts
        torch.testing.assert_close(means.sums, sums)
        torch.testing.assert_close(means.counts, counts)
        torch.testing.assert_close(means.centroids, sums / sums.norm(dim=-1, keepdim=True))


def test_query_heads_of_a_key_head_weigh_as_much_as_it():
    """Two query heads and their key head: half of the centroid is the queries', whatever the group's size."""
    means, queries, keys = kmeans(heads=1, clusters=2), vectors(0, heads=2), vectors(1, heads=1)
    for x in (queries, keys):
        means.observe(x, (torch.arange(x.shape[1]) % 2)[:, None].expand(x.shape[:3]))
    finish_step(means, True, alone)
    expected = queries.mean((0, 1, 2)) + keys.mean((0, 1, 2))
    torch.testing.assert_close(means.sums[0, 0] + means.sums[0, 1], expected / 4)


def test_a_cluster_that_lost_its_vectors_gets_half_of_the_largest():
    means, x = kmeans(decay=0.0, clusters=4), vectors(0, length=400)
    labels = torch.tensor([0, 0, 0, 1, 1, 2] * 400)[:400].expand(3, -1).unsqueeze(-1).expand(-1, -1, 2)
    assert means.dead() == 0, "before the first update nothing is known"
    means.observe(x, labels)
    finish_step(means, True, alone)
    sums, counts = shares(x, labels, 4)
    torch.testing.assert_close(means.counts[:, [0, 3]], counts[:, [0]].expand(-1, 2) / 2)
    torch.testing.assert_close(means.counts[:, 1:3], counts[:, 1:3])
    half = sums[:, 0].norm(dim=-1) / 2
    for cluster in (0, 3):
        torch.testing.assert_close(means.sums[:, cluster], half[:, None] * means.centroids[:, cluster])
    torch.testing.assert_close(means.centroids.norm(dim=-1), torch.ones(2, 4, dtype=torch.float64))
    assert means.dead() == 0
    sides = means.scores(x)[..., [0, 3]].argmax(-1).double().mean((0, 1))
    assert ((sides - 0.5).abs() < 0.1).all(), "the cut goes through the middle"
    assert (means.centroids[:, 0] - means.centroids[:, 3]).norm(dim=-1).max() < 0.25


def test_one_cluster_a_step_is_revived_until_none_is_dead():
    means, x = kmeans(decay=0.9, clusters=6), vectors(0, length=300)
    x = unit(x + 4 * vectors(9, length=1)[:1])
    dead = []
    for _ in range(12):
        means.observe(x, means.scores(x).argmax(-1))
        finish_step(means, True, alone)
        dead.append(means.dead().item())
    assert dead[0] > 1 and dead[-1] == 0
    assert usage(means.scores(x).argmax(-1), 6)["entropy"].figure() > 0.8


def test_a_step_left_out_evaluation_and_frozen_centroids_leave_no_trace():
    for means, taken in ((kmeans(), False), (kmeans().eval(), True), (kmeans(frozen=True), True)):
        before = {name: x.clone() for name, x in means.state_dict().items()}
        means.observe(torch.full((1, 3, 2, 8), torch.nan).double(), torch.zeros(1, 3, 2).long())
        finish_step(means, taken, alone)
        finish_step(means.train(), True, alone)
        for name, x in means.state_dict().items():
            assert torch.equal(x, before[name]), name


def test_a_threshold_lets_its_share_of_the_keys_through():
    threshold = ScoreThreshold(2, 3, 8, share=0.2, decay=0.5)
    start = unit(torch.randn(50_000, 8)) @ unit(torch.randn(8))
    assert (start > threshold.value[0, 0]).float().mean() == pytest.approx(0.2, abs=0.03), "keys on the sphere"
    scores = torch.rand(4, 500, 2, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores[..., 1] = scores[..., 1] * 0.1 + 0.5
    for part in scores.split(1):
        threshold.observe(part)
    finish_step(threshold, True, alone)
    assert (((scores > threshold.value).float().mean((0, 1)) - 0.2).abs()[..., [0, 2]] < 0.01).all()
    assert (((scores > threshold.value).float().mean((0, 1)) - 0.2).abs()[..., 1] < 0.04).all()
    held = threshold.value.clone()
    threshold.eval().observe(-scores)
    finish_step(threshold, True, alone)
    assert torch.equal(threshold.value, held)
    threshold.train().observe(-scores)
    finish_step(threshold, False, alone)
    finish_step(threshold, True, alone)
    assert torch.equal(threshold.value, held)


def trained(mixer: Routing, steps: int, *, first: int = 0, part: slice = slice(None), reduce=alone) -> Routing:
    """The mixer's statistics after some steps on batches of 4 rows, of which it sees a part."""
    for step in range(first, first + steps):
        x = torch.randn(4, 30, 48, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        mixer(x[part])
        finish_step(mixer, True, reduce)
    return mixer


def routing(mode: str) -> Routing:
    torch.manual_seed(0)
    return Routing(SHAPE, 0, mode=mode, clusters=6, window=4, centroid_decay=0.8, shared_qk=False).double()


@pytest.mark.parametrize("mode", ["argmax_window", "threshold"])
def test_saved_and_restored_training_goes_on_exactly(mode):
    through, first = trained(routing(mode), 6), trained(routing(mode), 3)
    second = routing(mode)
    second.load_state_dict(first.state_dict())
    trained(second, 3, first=3)
    assert through.state_dict().keys() == second.state_dict().keys()
    for name, x in through.state_dict().items():
        assert torch.equal(x, second.state_dict()[name]), name


@pytest.mark.parametrize("mode", ["argmax_window", "threshold"])
def test_recomputing_a_pass_changes_neither_gradients_nor_centroids(mode):
    results = []
    for recompute in (False, True):
        mixer = routing(mode)
        x = torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        for _ in range(3):
            output = checkpoint(mixer, x, use_reentrant=False) if recompute else mixer(x)
            (grad,) = torch.autograd.grad(output.y.square().sum() + output.losses["commitment"], x)
            finish_step(mixer, True, alone)
        results.append([grad, *mixer.buffers()])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-12)


def in_a_process(rank: int, folder: str, mode: str) -> None:
    torch.set_num_threads(1)
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def reduce(x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    mixer = trained(routing(mode), 5, part=slice(rank, None, 2), reduce=reduce)
    torch.save(mixer.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["argmax_window", "threshold"])
def test_two_processes_have_the_centroids_of_one(mode, tmp_path: Path):
    torch.multiprocessing.spawn(in_a_process, (str(tmp_path), mode), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, x in trained(routing(mode), 5).state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], x, rtol=0, atol=1e-12)
