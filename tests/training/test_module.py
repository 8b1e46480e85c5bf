import functools
import logging
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from longmix.errors import NonFiniteError
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import MixerOutput
from longmix.mixers.sparse_flash import SparseFlash
from longmix.model.backbone import LanguageModel
from longmix.model.head import IGNORE_INDEX
from longmix.training.diagnosis import first_nonfinite
from longmix.training.module import TrainingModule, split_batch
from longmix.training.optimizers import adamw

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning.*")


def batch(seed: int, rows: int = 4) -> dict:
    tokens = torch.randint(20, (rows, 13), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[0, 2:] = IGNORE_INDEX  # rows with unequal numbers of targets
    ids = torch.repeat_interleave(torch.arange(2), torch.tensor([5, 7])).expand(rows, -1).int()
    return {"tokens": tokens[:, :-1].contiguous(), "targets": targets, "document_ids": ids if seed % 2 else None}


def model(mixer=Flash) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(mixer, 20, d_model=16, num_layers=2, num_heads=2, mlp_hidden=24)


def trained(net: LanguageModel, batches: list, **changes) -> TrainingModule:
    settings = {"micro_batch_size": None, "gradient_clip": None, "skip_nonfinite": False, **changes}
    module = TrainingModule(
        net,
        lambda parameters: adamw(parameters, learning_rate=1e-2),
        lambda step, total: 1.0,
        total_steps=len(batches),
        **settings,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module


def weights(module: TrainingModule) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.model.parameters()])


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_give_the_gradient_of_the_whole_batch(rows):
    net = model().double()
    record = trained(net, [batch(1)]).record
    small = trained(model().double(), [batch(1)], micro_batch_size=rows).record
    torch.testing.assert_close(small.loss, record.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(small.gradient_norm, record.gradient_norm, rtol=1e-12, atol=0)


def test_running_means_move_once_a_step_whatever_the_micro_batches():
    centers = []
    for rows in (None, 1):
        mixer = functools.partial(SparseFlash, buckets=4)
        net = trained(model(mixer), [batch(0), batch(2)], micro_batch_size=rows).model
        centers.append(net.blocks[1].mixer.key_center)
    assert all(center.updates == 2 for center in centers) and centers[0].value.any()
    torch.testing.assert_close(centers[0].value, centers[1].value)


def test_a_step_left_out_moves_no_running_mean():
    class ExplodingHash(SparseFlash):
        def forward(self, x, *, state=None, document_ids=None):
            output = super().forward(x, state=state, document_ids=document_ids)
            return MixerOutput(output.y * float("nan"))

    mixer = functools.partial(ExplodingHash, buckets=4)
    net = trained(model(mixer), [batch(0)], skip_nonfinite=True).model
    assert all(block.mixer.key_center.updates == 0 for block in net.blocks)


def test_the_loss_is_the_mean_over_valid_targets():
    net, first = model(), batch(1)
    expected = net(first["tokens"], first["targets"], document_ids=first["document_ids"]).token_losses
    expected = expected.sum() / (first["targets"] != IGNORE_INDEX).sum()
    torch.testing.assert_close(trained(net, [first]).record.loss, expected.detach())


def test_clipping_bounds_the_update_but_reports_the_true_norm():
    free = trained(model(), [batch(1)])
    clipped = trained(model(), [batch(1)], gradient_clip=1e-9)
    torch.testing.assert_close(clipped.record.gradient_norm, free.record.gradient_norm)
    # AdamW's first step is g / (|g| + eps): below eps = 1e-8 it shrinks with the gradient
    start = torch.cat([weight.detach().flatten() for weight in model().parameters()])
    decay = 1e-2 * 0.1 * start.abs()
    assert ((weights(clipped) - start).abs() <= decay + 1e-3 + 1e-6).all()
    assert ((weights(free) - start).abs() > decay + 5e-3).any()


@pytest.mark.parametrize("rows", [None, 1])
def test_z_loss_is_of_the_mean_over_valid_targets_and_no_reported_loss_has_it(rows):
    net = model().double()
    net.measures_normalisers, net.logit_softcap = True, 1.5
    module, first = trained(net, [batch(1)], micro_batch_size=rows, z_loss=0.1, gradient_clip=None), batch(1)
    fresh = model().double()
    hidden = fresh(first["tokens"], document_ids=first["document_ids"]).hidden
    logits = 1.5 * torch.tanh(hidden @ fresh.head.weight.T / 1.5)
    torch.testing.assert_close(logits, trained_as(fresh, 1.5).logits(hidden), rtol=1e-13, atol=1e-13)
    valid = first["targets"] != IGNORE_INDEX
    loss = torch.nn.functional.cross_entropy(logits[valid], first["targets"][valid])
    z_loss = 0.1 * logits.logsumexp(-1)[valid].square().mean()
    (loss + z_loss).backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in fresh.parameters()])
    for found, expected in ((module.record.loss, loss), (module.record.z_loss, z_loss)):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(module.record.gradient_norm, norm, rtol=1e-12, atol=0)
    assert net.eval()(first["tokens"], first["targets"]).log_normalisers is None


def trained_as(net: LanguageModel, softcap: float) -> LanguageModel:
    net.logit_softcap = softcap
    return net


class AddsLoss(Flash):
    def forward(self, x, *, state=None, document_ids=None):
        output = super().forward(x, state=state, document_ids=document_ids)
        size = output.y.square().mean()
        return MixerOutput(output.y, output.state, {"size": 3.0 * size}, {"scale": size.detach()})


def test_auxiliary_losses_and_metrics_come_along():
    plain, extra = trained(model(), [batch(0)]), trained(model(AddsLoss), [batch(0)])
    assert set(extra.record.metrics) == {"layer_0/scale", "layer_1/scale"}
    assert extra.record.losses["size"].figure() > 0
    torch.testing.assert_close(plain.record.loss, extra.record.loss)
    assert not torch.equal(plain.record.gradient_norm, extra.record.gradient_norm)


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_measure_what_the_whole_batch_does(rows):
    whole, small = (trained(model(AddsLoss), [batch(0)], micro_batch_size=size).record for size in (None, rows))
    for kind in ("losses", "metrics"):
        ours, theirs = (
            {name: x.figure().item() for name, x in getattr(record, kind).items()} for record in (small, whole)
        )
        assert ours == pytest.approx(theirs, rel=1e-6)


class Explodes(Flash):
    """Layer 1 multiplies its output by `factor`, which a test sets."""

    factor = float("inf")

    def forward(self, x, *, state=None, document_ids=None):
        output = super().forward(x, state=state, document_ids=document_ids)
        if self.is_second and not torch.equal(x.new_tensor(self.factor), x.new_ones(())):
            output.y = output.y * self.factor
        return output

    def __init__(self, shape, layer_index):
        super().__init__(shape, layer_index)
        self.is_second = layer_index == 1


def test_a_nonfinite_loss_stops_and_names_the_place():
    net = model(Explodes)
    before = [weight.clone() for weight in net.parameters()]
    with pytest.raises(NonFiniteError) as caught:
        trained(net, [batch(0)])
    assert "First non-finite: the output of blocks.1.mlp_norm in the forward pass" in str(caught.value)
    assert "step 1 " in str(caught.value)
    for old, new in zip(before, net.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_nonfinite_step_is_skipped_and_counted_if_asked(monkeypatch):
    net = model(Explodes)
    monkeypatch.setattr(Explodes, "factor", 1.0)
    steps = []
    original = TrainingModule.training_step

    def training_step(self, *arguments):
        monkeypatch.setattr(Explodes, "factor", float("inf") if self.step == 1 else 1.0)
        before = weights(self)
        original(self, *arguments)
        steps.append(bool((weights(self) != before).any()))

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    module = trained(net, [batch(seed) for seed in range(3)], skip_nonfinite=True)
    assert steps == [True, False, True]
    assert (module.steps_taken, module.steps_skipped, module.step) == (2, 1, 3)
    assert torch.isfinite(weights(module)).all()


def nonfinite(net, first):
    return first_nonfinite(net, [first], lambda rows: net(rows["tokens"], rows["targets"]))


def test_the_first_nonfinite_place_is_named_in_every_kind_of_case():
    net, first = model(), batch(0)
    assert nonfinite(net, first) is None
    assert all(weight.grad is None for weight in net.parameters())
    with torch.no_grad():
        net.blocks[1].mlp.up.weight[3, 4] = float("nan")
    assert nonfinite(net, first) == "the weight blocks.1.mlp.up.weight itself"


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class BackwardExplodes(Explodes):
    def forward(self, x, *, state=None, document_ids=None):
        output = Flash.forward(self, x, state=state, document_ids=document_ids)
        if self.is_second:
            output.y = BadBackward.apply(output.y)
        return output


def test_a_nonfinite_gradient_is_traced_to_the_layer_where_it_arose():
    place = nonfinite(model(BackwardExplodes), batch(0))
    assert place is not None
    assert "blocks.1.mixer.output" in place
    assert "backward pass" in place


def test_split_batch_keeps_every_row_once():
    for seed in (0, 1):
        whole = batch(seed)
        pieces = split_batch(whole, 2)
        assert len(pieces) == 2
        assert torch.equal(torch.cat([piece["tokens"] for piece in pieces]), whole["tokens"])
        assert (pieces[0]["document_ids"] is None) == (seed == 0)
    assert split_batch(whole, None) == [whole]
