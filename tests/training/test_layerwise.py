"""Layers that learn the outputs of a teacher's: their gradients by definition, in any division of a step."""

import copy
import functools

import pytest
import torch
from test_module import batch, model, trained

from longmix.batch import IGNORE_INDEX, documents_of
from longmix.config import DistilConfig
from longmix.mixers.flash import Flash
from longmix.mixers.gla import GLA
from longmix.mixers.parts.base import MixerOutput
from longmix.mixers.rwkv7 import RWKV7
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.backbone import LanguageModel
from longmix.training.distillation import LAYERS, LOGITS, Distillation
from longmix.training.layerwise import LayerLessons, layers_that_learn, relative_errors

MIXERS = {"flash": Flash, "window": functools.partial(SlidingWindow, window=3), "gla": GLA}


def teacher() -> LanguageModel:
    net = model().double()
    torch.manual_seed(5)
    for weight in net.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return net.eval().requires_grad_(False)


def student(kind: str = "gla") -> LanguageModel:
    return model(MIXERS[kind]).double()


def taught(net: LanguageModel, theirs: LanguageModel, objective: str = LAYERS, **words) -> Distillation:
    """As a run of one stage would have it."""
    found = object.__new__(Distillation)
    found.model, found.objective, found.words = theirs, objective, DistilConfig(**words)
    found.layers = list(range(len(net.blocks)))
    return found


def by_definition(net: LanguageModel, theirs: LanguageModel, given: dict, layers=(0, 1)) -> list[torch.Tensor]:
    """Each layer's loss: the teacher's blocks one after another, in plain code."""
    ids = given["document_ids"]
    x, losses = theirs.embedding(given["tokens"]), []
    for index, (block, own) in enumerate(zip(theirs.blocks, net.blocks, strict=True)):
        normed = block.mixer_norm(x)
        y = block.mixer(normed, document_ids=ids).y
        if index in layers:
            errors = own.mixer(normed, document_ids=ids).y - y
            losses.append(
                torch.stack([e.square().sum() / t.square().sum() for e, t in zip(errors, y, strict=True)]).mean()
            )
        x = x + y
        x = x + block.mlp(block.mlp_norm(x)).y
    return losses


def gradients(net: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("seed", [0, 1], ids=["whole-rows", "documents"])
@pytest.mark.parametrize("kind", ["window", "gla"])
def test_the_gradient_is_that_of_the_written_out_loss_in_any_micro_batches(kind, seed, rows):
    net, theirs, given = student(kind), teacher(), batch(seed)
    losses = by_definition(net, theirs, given)
    torch.stack(losses).mean().backward()
    expected = gradients(net)
    assert expected.keys() == {name for name, _ in net.named_parameters() if ".mixer." in name}
    net.zero_grad()
    parts = [
        {key: part[at : at + rows] if part is not None else None for key, part in given.items()}
        for at in range(0, 4, rows)
    ]
    found = LayerLessons(net, theirs, [0, 1]).learn(parts, torch.Tensor.backward)
    torch.testing.assert_close(
        torch.stack(list(found.layers.values())), torch.stack(losses).detach(), rtol=1e-10, atol=0
    )
    assert_close(gradients(net), expected)


def test_all_layers_at_once_learn_what_each_learns_alone():
    net, theirs = student(), teacher()
    LayerLessons(net, theirs, [0, 1]).learn([batch(1)], torch.Tensor.backward)
    together = gradients(net)
    net.zero_grad()
    for layer in (0, 1):
        LayerLessons(net, theirs, [layer]).learn([batch(1)], lambda loss: (loss / 2).backward())
    assert_close(gradients(net), together)


def test_equal_layers_have_no_loss_and_no_gradient():
    theirs = teacher()
    net = copy.deepcopy(theirs).requires_grad_(True).train()
    assert layers_that_learn(net, theirs) == []
    found = LayerLessons(net, theirs, [0, 1]).learn([batch(1)], torch.Tensor.backward)
    assert not any(loss.any() for loss in found.layers.values())
    assert gradients(net) and not any(gradient.any() for gradient in gradients(net).values())


def test_layers_learn_whose_class_settings_or_sizes_differ():
    def of(second) -> LanguageModel:
        return model(lambda shape, index: second(shape, index) if index else Flash(shape, index))

    plain = of(Flash)
    assert layers_that_learn(of(Flash), plain) == []
    for other in (
        GLA,
        functools.partial(Flash, num_kv_heads=1),
        functools.partial(Flash, rotary_base=5e5),
        functools.partial(Flash, qk_norm=False),
    ):
        assert layers_that_learn(of(other), plain) == [1]
    windows = [functools.partial(SlidingWindow, window=window) for window in (3, 4)]
    assert layers_that_learn(of(windows[0]), of(windows[1])) == [1]


class Own(Flash):
    """A mixer of somebody else, with a setting of its own."""

    def __init__(self, *given, strength: int = 1) -> None:
        super().__init__(*given)
        self.strength = strength


def test_settings_of_mixers_from_elsewhere_count_too():
    one, other = model(Own), model(functools.partial(Own, strength=2))
    assert layers_that_learn(one, model(Own)) == [] and layers_that_learn(one, other) == [0, 1]


def test_the_value_residual_is_the_students_own_without_its_gradient():
    torch.manual_seed(0)
    net = LanguageModel(
        functools.partial(RWKV7, head_dim=8), 20, d_model=16, num_layers=2, num_heads=2, mlp_hidden=24
    ).double()
    for weight in net.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    theirs, given = teacher(), batch(0)
    x = theirs.embedding(given["tokens"])
    normed, wanted = [], []
    for block in theirs.blocks:
        normed.append(block.mixer_norm(x))
        wanted.append(block.mixer(normed[-1]).y)
        x = x + wanted[-1]
        x = x + block.mlp(block.mlp_norm(x)).y
    first = net.mixers()[0](normed[0])
    second = net.mixers()[1](normed[1], value_residual=first.value_residual.detach())
    (sum(relative_errors(out.y, y).mean() for out, y in zip((first, second), wanted, strict=True)) / 2).backward()
    expected = gradients(net)
    for layers in ([0, 1], [1]):
        net.zero_grad()
        LayerLessons(net, theirs, layers).learn([given], torch.Tensor.backward)
        scale = len(layers) / 2
        assert_close(
            {name: scale * gradient for name, gradient in gradients(net).items()},
            {name: g for name, g in expected.items() if int(name.split(".")[1]) in layers},
        )


def test_layers_are_gone_before_the_next_one_runs():
    """A layer's backward pass is over when the next layer's forward pass begins."""
    events = []

    class Noted(Flash):
        def forward(self, x, **given):
            events.append("forward")
            return super().forward(x, **given)

    net = model(Noted).double()
    LayerLessons(net, teacher(), [0, 1]).learn(
        [batch(0), batch(2)], lambda loss: events.append("backward") or loss.backward()
    )
    assert events == ["forward", "backward"] * 4


def test_auxiliary_losses_of_mixers_count_as_in_any_training():
    class Pulled(Flash):
        def forward(self, x, **given):
            output = super().forward(x, **given)
            return MixerOutput(output.y, output.state, losses={"pull": 0.3 * output.y.square().mean()})

    net, theirs = model(Pulled).double(), teacher()
    given = batch(0)
    x, expected = theirs.embedding(given["tokens"]), 0.0
    for block, own in zip(theirs.blocks, net.blocks, strict=True):
        normed = block.mixer_norm(x)
        y, output = block.mixer(normed).y, own.mixer(normed)
        expected = expected + relative_errors(output.y, y).mean() / 2 + output.losses["pull"]
        x = x + y
        x = x + block.mlp(block.mlp_norm(x)).y
    expected.backward()
    wanted = gradients(net)
    net.zero_grad()
    found = LayerLessons(net, theirs, [0, 1]).learn([given], torch.Tensor.backward)
    assert_close(gradients(net), wanted)
    assert found.losses["pull"].figure() > 0


@pytest.mark.parametrize("micro", [None, 1])
def test_a_step_trains_mixers_alone_and_keeps_no_state_for_the_rest(micro):
    net, theirs = student(), teacher()
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    module = trained(net, [batch(0), batch(1)], micro_batch_size=micro, distillation=taught(net, theirs))
    (optimizer,) = module.trainer.optimizers
    for name, weight in net.named_parameters():
        learns = ".mixer." in name
        assert (weight in optimizer.state) == learns, name
        assert torch.equal(weight, before[name]) != learns, name
    assert module.record.layer_losses.keys() == {0, 1}
    fresh = student()
    torch.testing.assert_close(
        trained(fresh, [batch(1)], micro_batch_size=micro, distillation=taught(fresh, theirs)).record.loss,
        torch.stack(by_definition(student(), theirs, batch(1))).mean().detach(),
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_step_on_logits_has_the_gradient_of_both_losses(micro, share):
    net, theirs, given = student(), teacher(), batch(1)
    valid = given["targets"] >= 0
    own = net.logits(net(given["tokens"], **documents_of(given)).hidden)
    wanted = theirs.logits(theirs(given["tokens"], **documents_of(given)).hidden)
    log_p, log_q = (wanted / 2).log_softmax(-1), (own / 2).log_softmax(-1)
    soft = 4 * (log_p.exp() * (log_p - log_q)).sum(-1)[valid].mean()
    hard = -own.log_softmax(-1).gather(-1, given["targets"].clamp_min(0)[..., None])[..., 0][valid].mean()
    (share * hard + (1 - share) * soft).backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in net.parameters()])
    net.zero_grad()
    words = {"temperature": 2.0, "hard_share": share}
    record = trained(net, [given], micro_batch_size=micro, distillation=taught(net, theirs, LOGITS, **words)).record
    torch.testing.assert_close(record.gradient_norm, norm, rtol=1e-10, atol=0)
    torch.testing.assert_close(record.divergence, soft.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(record.loss, hard.detach(), rtol=1e-10, atol=0)


def ours(net: LanguageModel, theirs: LanguageModel, given: dict, objective: str) -> torch.Tensor:
    """The loss of an objective as training has it, after its backward pass."""
    if objective == LAYERS:
        learned = LayerLessons(net, theirs, [0, 1]).learn([given], lambda loss: loss.backward())
        return torch.stack(list(learned.layers.values())).mean()
    soft = taught(net, theirs, objective).soft_targets(given, None)
    output = net(given["tokens"], given["targets"], **documents_of(given), soft=soft)
    loss = output.divergences.mean()
    loss.backward()
    return loss


def plain(net: LanguageModel, theirs: LanguageModel, given: dict, objective: str) -> torch.Tensor:
    """The same in plain code."""
    if objective == LAYERS:
        loss = torch.stack(by_definition(net, theirs, given)).mean()
    else:
        scores = [model.logits(model(given["tokens"], **documents_of(given)).hidden) for model in (net, theirs)]
        own, target = (torch.log_softmax(each.float(), -1) for each in scores)
        found = (target.exp() * (target - own)).sum(-1)
        loss = torch.where(given["targets"] == IGNORE_INDEX, 0.0, found).mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("objective", [LAYERS, LOGITS])
def test_bf16_rounds_no_more_than_plain_code_does(objective):
    """Losses and gradients under autocast, both against float32: at most twice the error of plain code."""
    theirs, given, found = teacher().float(), batch(3), {}
    for run, rounds in ((plain, False), (plain, True), (ours, False), (ours, True)):
        torch.manual_seed(2)
        net = student().float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounds):
            loss = run(net, theirs, given, objective).detach()
        gradients = [w.grad.flatten() for name, w in net.named_parameters() if w.grad is not None]
        found[run, rounds] = loss, torch.cat(gradients)
        assert run is plain or loss.dtype == torch.float32
    exact, gradient = found[plain, False]
    torch.testing.assert_close(found[ours, False][0], exact, rtol=1e-5, atol=1e-7)
    for run in (plain, ours):
        assert 0 < (found[run, True][1] - gradient).norm() < 0.1 * gradient.norm()
    errors = [(found[run, True][1] - gradient).norm() for run in (ours, plain)]
    assert errors[0] <= 2 * errors[1]
    assert (found[ours, True][0] - exact).abs() <= 0.02 * exact
