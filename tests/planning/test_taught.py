"""Plans of steps that learn from a teacher: what they count, and what they refuse."""

import pytest
import torch

from longmix.errors import ConfigError
from longmix.planning.arguments import read
from longmix.planning.plan import Planner

SIZES = (
    "model.d_model=64",
    "model.num_layers=4",
    "model.num_heads=2",
    "model.mlp_hidden=96",
    "seq_len=256",
    "gpu=h100",
)


def planned(*words):
    planner = Planner(read([*SIZES, "optimizer=adamw", *words]))
    return planner, planner.plan()


def numbers(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.slow
def test_layers_alone_have_gradients_and_moments():
    planner, plan = planned("mixer=gla+flash", "objective=layers", "batch_size=2", "trainer.micro_batch_size=1")
    teacher, learn = planner.teacher, [planner.model.mixers()[index] for index in (0, 2)]
    mixers = sum(map(numbers, learn))
    assert plan.memory.parts["teacher"] == 4 * numbers(teacher)
    assert plan.memory.parts["gradients"] == 4 * mixers
    assert plan.memory.parts["optimizer"] == pytest.approx(2 * 4 * mixers, rel=0.01)
    flops = 2 * (teacher.flops(256) + 3 * sum(mixer.flops(256) for mixer in learn))
    assert plan.flops == (flops, flops)
    _, whole = planned("mixer=gla+flash", "objective=logits", "batch_size=2", "trainer.micro_batch_size=1")
    assert whole.memory.parts["optimizer"] == pytest.approx(2 * 4 * numbers(planner.model), rel=0.01)
    _, alone = planned("mixer=gla+flash", "batch_size=2", "trainer.micro_batch_size=1")
    assert "teacher" not in alone.memory.parts
    assert plan.memory.total < whole.memory.total > alone.memory.total + whole.memory.parts["teacher"]


@pytest.mark.slow
def test_a_teacher_is_divided_with_fsdp():
    words = "mixer=gla", "objective=layers", "gpus=8", "teacher=sliding_window"
    planner, plan = planned(*words, "trainer=fsdp")
    ends = planner.teacher.embedding.weight.numel() + planner.teacher.head.weight.numel() + 64
    assert type(planner.teacher.mixers()[0]).__name__ == "SlidingWindow"
    assert plan.memory.parts["teacher"] == numbers(planner.teacher) * 4 // 8 + 4 * ends
    _, copied = planned(*words, "trainer=ddp")
    assert copied.memory.parts["teacher"] == 4 * numbers(planner.teacher)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mixer=flash", "objective=layers"), "every layer's mixer is that of teacher=flash"),
        (
            ("mixer=gla", "objective=logits", "gpus=2", "trainer=context_parallel"),
            "context_parallel is not planned for",
        ),
        (("mixer=gla", "teacher=kda"), "teacher=kda has no effect with objective=tokens"),
        (("mixer=gla", "objective=logits", "teacher="), "teacher is empty"),
        (("mixer=gla", "keep=1"), "add convert=true"),
        (("mixer=gla", "convert=true", "keep=[4]"), "layers are 0 to 3, and 4 is none"),
        (("mixer=gla", "measure_tokens=5"), "measure_tokens has no effect"),
        (("mixer=gla", "distil.temperature=2"), "distil.temperature has no effect"),
        (("mixer=gla", "objective=layers", "loop.z_loss=1e-3"), "loop.z_loss=0.001 has no effect"),
        (("mixer=gla", "objective=logits", "adversarial.xi=1"), "cannot be had with adversarial.xi"),
        (("mixer=gla", "objective=logits", "stages=[{objective:tokens}]"), "objective has no effect: every stage"),
    ],
)
def test_what_is_not_planned_for_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        read([*SIZES, *words])


@pytest.mark.parametrize(
    ("keep", "order"),
    [("keep=1", ["window", "gla", "gla", "gla"]), ("keep=[1,3]", ["gla", "window", "gla", "window"])],
)
def test_kept_layers_have_the_mixer_of_the_teacher(keep, order):
    request = read([*SIZES, "mixer=gla", "convert=true", keep, "teacher=sliding_window"])
    names = {"SlidingWindow": "window", "GLA": "gla"}
    assert [names[type(mixer).__name__] for mixer in request.model().mixers()] == order
