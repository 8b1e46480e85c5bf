"""Steps with a second pass under the worst change of attention scores: their gradient, in any division of the work."""

import csv

import pytest
import torch
from launched import train
from test_module import batch, model, trained

import longmix
from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import MixerOutput
from longmix.model.adversarial import Adversary, attacked_mixers
from longmix.model.backbone import LanguageModel
from longmix.model.head import IGNORE_INDEX
from longmix.training.adversarial import AttackedSteps


def attacks(net: LanguageModel, xi: float = 2.0, every: int = 1, weight: float = 1.0) -> AttackedSteps:
    return AttackedSteps(Adversary(attacked_mixers(net, None, "layers"), xi), every, weight)


class Dense(Flash):
    """Flash by its definition, with a number added to the scores of each key."""

    added: torch.Tensor | None = None

    def attend(self, rows):
        scores = torch.einsum("bihd,bjhd->bhij", rows.query, rows.key) * self.head_dim**-0.5
        if self.added is not None:
            scores = scores + self.added.mT.unsqueeze(2)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if rows.document_ids is not None:
            seen = seen & (rows.document_ids[:, None, :, None] == rows.document_ids[:, None, None, :])
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), rows.value), {}


def by_definition(first: dict, xi: float, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss under attack, and norm of the gradient of both losses, of the model of `model()` in dense code."""
    net = model(Dense).double()
    valid = (first["targets"] != IGNORE_INDEX).sum()

    def loss() -> torch.Tensor:
        given = first["tokens"], first["targets"]
        return net(*given, document_ids=first["document_ids"]).token_losses.sum() / valid

    added = [torch.zeros(*first["tokens"].shape, 2, dtype=torch.float64, requires_grad=True) for _ in net.blocks]
    for mixer, each in zip(net.mixers(), added, strict=True):
        mixer.added = each
    plain = loss()
    gradients = torch.autograd.grad(plain, added, retain_graph=True)
    ids = first["document_ids"]
    ids = torch.zeros_like(first["tokens"]) if ids is None else ids
    for mixer, gradient in zip(net.mixers(), gradients, strict=True):
        mixer.added = torch.zeros_like(gradient)
        for row in range(len(ids)):
            for number in ids[row].unique():
                part = gradient[row, ids[row] == number]
                mixer.added[row, ids[row] == number] = xi * part / part.norm(dim=0).clamp_min(1e-300)
    attacked = loss()
    (plain + weight * attacked).backward()
    return attacked.detach(), torch.nn.utils.get_total_norm([parameter.grad for parameter in net.parameters()])


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("seed", [0, 1], ids=["whole-rows", "documents"])
def test_the_gradient_is_that_of_both_losses(seed, rows):
    net = model().double()
    record = trained(net, [batch(seed)], micro_batch_size=rows, attacks=attacks(net, 2.0, weight=0.7)).record
    attacked, norm = by_definition(batch(seed), 2.0, 0.7)
    assert record.attacked_loss is not None
    torch.testing.assert_close(record.attacked_loss, attacked, rtol=1e-11, atol=0)
    torch.testing.assert_close(record.gradient_norm, norm, rtol=1e-11, atol=0)
    plain = trained(model().double(), [batch(seed)]).record
    torch.testing.assert_close(record.loss, plain.loss, rtol=1e-12, atol=0)
    assert record.attacked_loss > 1.001 * record.loss and plain.attacked_loss is None


def test_steps_between_attacks_are_those_of_a_usual_run():
    net, other = model().double(), model().double()
    records = []
    for some, every in ((net, 3), (other, None)):
        given = None if every is None else attacks(some, every=every)
        records.append(trained(some, [batch(0), batch(2)], attacks=given).record)
    torch.testing.assert_close(records[0].gradient_norm, records[1].gradient_norm, rtol=0, atol=0)
    assert [attacks(net, every=3).are_due(step) for step in range(1, 7)] == [False, False, True] * 2


class AddsLoss(Flash):
    def forward(self, x, **options):
        output = super().forward(x, **options)
        return MixerOutput(output.y, output.state, {"size": 3.0 * output.y.square().mean()})


def test_auxiliary_losses_count_in_both_passes_and_are_logged_once():
    norms = []
    for xi in (1e-9, None):
        net = model(AddsLoss).double()
        given = None if xi is None else attacks(net, xi)
        record = trained(net, [batch(0)], attacks=given).record
        norms.append(record.gradient_norm)
        size = record.losses["size"].figure()
    torch.testing.assert_close(norms[0], 2 * norms[1], rtol=1e-6, atol=0)
    assert size > 0


RUN = ["adversarial.xi=2", "adversarial.layers=[0,2]", "adversarial.every=2", "logger=csv", "name=run"]
RUN += ["mixer=flash+rwkv7", "mixer.rwkv7.head_dim=16", "model.num_layers=3", "model.d_model=32", "model.num_heads=2"]
RUN += ["model.mlp_hidden=32", "seq_len=32", "batch_size=4", "max_steps=4", "data.validation_tokens=64"]
RUN += ["loop.log_every=1", "loop.checkpoint_every=2", "loop.keep_checkpoints=9", "trainer.num_threads=1"]


def rows_of(folder) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
    return [{key: row[key] for key in row if not key.startswith(("throughput/", "memory/"))} for row in rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, shared_cache):
    folder = tmp_path_factory.mktemp("alone") / "run"
    longmix.train([*RUN, "trainer=cpu", f"data.cache_dir={shared_cache}"], folder=folder)
    return folder


def test_a_run_logs_its_attacked_steps_and_goes_on_bit_for_bit(alone, tmp_path, shared_cache):
    logged = [row.get("train/attacked_loss") for row in rows_of(alone) if "train/loss" in row]
    assert [loss is not None for loss in logged] == [False, True, False, True]
    again = [f"resume={alone}/checkpoints/step-00000002", "trainer=cpu", f"data.cache_dir={shared_cache}"]
    longmix.train([*RUN, *again], folder=tmp_path / "run")
    whole, resumed = (
        load_checkpoint(CheckpointStore(place / "checkpoints").latest()) for place in (alone, tmp_path / "run")
    )
    assert whole["step"] == resumed["step"] == 4
    assert all(torch.equal(weight, resumed["model"][name]) for name, weight in whole["model"].items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_attack_as_one_does(strategy, alone, tmp_path, shared_cache):
    words = [f"trainer={strategy}", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.micro_batch_size=1"]
    train(2, [*RUN, *words, f"data.cache_dir={shared_cache}"], tmp_path)
    for row, wanted in zip(rows_of(tmp_path / "runs/run"), rows_of(alone), strict=True):
        assert row == pytest.approx(wanted, rel=2e-5, abs=1e-7), wanted["step"]


REFUSED = {
    "compile": (["trainer.compile=true"], r"adversarial\.xi=1 cannot be had with trainer\.compile=true: a compiled"),
    "slices": (
        ["trainer=context_parallel", "trainer.devices=2", "trainer.accelerator=cpu"],
        r"cannot be had with trainer\.context_parallel=2: the length",
    ),
    "carried": (
        ["loop.carry_state=true", "data.order=contiguous", "mixer=sliding_window", "mixer.window=8"],
        r"cannot be had with loop\.carry_state=true: keys that a window leaves",
    ),
    "recurrent": (["mixer=rwkv7", "mixer.head_dim=16"], r"adversarial\.xi=1: no layer has attention scores"),
    "layer": (["adversarial.layers=[7]"], r"adversarial\.layers=\[7\]: there is no layer 7"),
    "alone": (
        ["adversarial.xi=null", "adversarial.every=2"],
        r"adversarial\.every has no effect without adversarial",
    ),
    "zero": (["adversarial.xi=0"], r"adversarial\.xi=0(\.0)? must be above 0, or null to train without attacks"),
    "weight": (["adversarial.weight=0"], r"adversarial\.weight=0(\.0)? must be above 0"),
    "every": (["adversarial.every=0"], r"adversarial\.every=0 must be at least 1"),
    "layers": (["adversarial.layers=first"], r"adversarial\.layers=first is not a list"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_attacks_without_a_meaning_are_refused(words, message, tiny_overrides, tmp_path):
    with pytest.raises(ConfigError, match=message):
        longmix.train([*tiny_overrides, "adversarial.xi=1", *words], folder=tmp_path / "run")
