import itertools

import pytest
import torch
from torch import nn

from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.model.backbone import LanguageModel
from longmix.recipe import Recipe, set_recipe
from longmix.training import optimizers
from longmix.training.batched_muon import BatchedMuon, orthogonalised
from longmix.training.schedules import WarmupCosine, WarmupStableDecay


def parameters() -> dict[str, nn.Parameter]:
    model = LanguageModel(Flash, 20, d_model=16, num_layers=1, num_heads=2, mlp_hidden=24)
    return dict(model.named_parameters())


def settings(built, weight) -> dict:
    for optimizer in built:
        for group in optimizer.param_groups:
            if any(member is weight for member in group["params"]):
                return group
    raise AssertionError("the parameter is in no group")


@pytest.mark.parametrize("build", [optimizers.adamw, optimizers.muon])
def test_every_parameter_is_in_one_group_with_its_recipe(build):
    named = parameters()
    set_recipe(named["blocks.0.mixer.query.weight"], Recipe("scalar", learning_rate_multiplier=2.0, weight_decay=False))
    built = build(named, learning_rate=0.1, weight_decay=0.3)
    members = [id(weight) for optimizer in built for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(members) == sorted(map(id, named.values()))
    special = settings(built, named["blocks.0.mixer.query.weight"])
    assert special["lr"] == special[optimizers.PEAK] == 0.2
    assert special["weight_decay"] == 0.0
    assert settings(built, named["blocks.0.mlp.up.weight"])["weight_decay"] == 0.3
    for name in ("embedding.weight", "head.weight", "norm.weight"):
        assert settings(built, named[name])["weight_decay"] == 0.0


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    named = parameters()
    matrices, rest = optimizers.muon(named, learning_rate=0.1, adamw_learning_rate=0.01)
    assert isinstance(matrices, torch.optim.Muon)
    assert isinstance(rest, torch.optim.AdamW)
    taken = {id(weight) for group in matrices.param_groups for weight in group["params"]}
    assert taken == {id(named[name]) for name in named if "mlp" in name or ".mixer." in name if named[name].ndim == 2}
    assert settings([rest], named["head.weight"])["lr"] == 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_batched_muon_follows_torchs_muon_to_bf16_accuracy(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = torch.randn(5, *shape, generator=generator)
    ends = []
    for kind in (torch.optim.Muon, BatchedMuon):
        weight = nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        optimizer.iterated_in = dtype
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach() - start)
    error = (ends[0] - ends[1]).square().mean().sqrt() / ends[1].square().mean().sqrt()
    assert error < 0.02  # five steps of bfloat16, whose unit roundoff is 0.004


def test_matrices_that_step_together_end_as_each_would_alone_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16), (24, 16)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(3, *shape, generator=generator) for shape in shapes]
    together = [nn.Parameter(start.clone()) for start in starts]
    slow = [{"params": together[:2], "lr": 0.01, "weight_decay": 0.0}, {"params": together[2:]}]
    optimizer = BatchedMuon(slow, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for weight, drawn in zip(together, gradients, strict=True):
            weight.grad = drawn[step].clone()
        optimizer.step()
    for index, (weight, drawn) in enumerate(zip(starts, gradients, strict=True)):
        rate, decay = (0.01, 0.0) if index < 2 else (0.02, 0.1)
        average = torch.zeros_like(weight)
        for gradient in drawn:
            average.lerp_(gradient, 1 - 0.95)
            update = gradient.lerp(average, 0.95)
            direction = orthogonalised(update[None], (3.4445, -4.7750, 2.0315), 5, 1e-7)[0]
            weight.mul_(1 - rate * decay).sub_(direction, alpha=rate * 0.2 * max(weight.shape) ** 0.5)
        assert torch.equal(together[index], weight)
        assert torch.equal(optimizer.state[together[index]]["momentum_buffer"], average)


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    directions = orthogonalised(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(directions)
    assert values.min() > 0.6
    assert values.max() < 1.3
    expected = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.cosine_similarity(directions.flatten(1), (expected.U @ expected.Vh).flatten(1))
    assert cosine.min() > 0.98


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.0}, "optimizer.learning_rate"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay"),
        ({"betas": [0.9]}, "optimizer.betas"),
        ({"betas": [0.9, 1.0]}, "optimizer.betas"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, words):
    with pytest.raises(ConfigError, match=words):
        optimizers.adamw(parameters(), **{"learning_rate": 0.1, **change})


SCHEDULES = {
    "cosine": WarmupCosine(warmup=0.1, final=0.2),
    "cosine-steps": WarmupCosine(warmup=10, final=0.2),
    "wsd": WarmupStableDecay(warmup=0.1, decay=0.3, final=0.2),
    "wsd-sqrt": WarmupStableDecay(warmup=10, decay=30, final=0.2, shape="sqrt"),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_warms_up_to_one_and_ends_at_its_final_factor(schedule):
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == pytest.approx(1.0)
    assert schedule(100, 100) == pytest.approx(0.2)
    assert 0.2 <= factors[-1] < 0.4
    assert all(a <= b for a, b in itertools.pairwise(factors[:11]))
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_the_plateau_is_flat_and_cosine_is_a_cosine():
    wsd = SCHEDULES["wsd"]
    assert {wsd(step, 100) for step in range(10, 70)} == {1.0}
    assert WarmupCosine(0, 0.0)(50, 101) == pytest.approx(0.5)


def test_a_run_of_one_step_is_possible():
    for schedule in SCHEDULES.values():
        assert 0 < schedule(0, 1) <= 1
