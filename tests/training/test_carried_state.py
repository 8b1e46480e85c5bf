"""Carried state in training: truncated back-propagation through time, written out and compared."""

import copy
import functools
import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from longmix.errors import CheckpointError, ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.parts.gated_memory import GatedMemory
from longmix.mixers.parts.states import held_bytes, mapped
from longmix.mixers.rwkv7 import RWKV7
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.backbone import LanguageModel
from longmix.model.rwkv_blocks import RWKVBlocks
from longmix.training.carried import CarriedState, carried_bytes, check_carries, layers_begun_anew, run_on
from longmix.training.module import TrainingModule
from longmix.training.optimizers import PEAK

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning.*")

ROWS, WINDOW, STEPS = 4, 12, 4
DOCUMENTS = [(48,), (12, 12, 24), (5, 1, 14, 28), (30, 18)]
"""Documents of each row: one; borders where windows begin; borders inside windows."""

MIXERS: dict[str, list[Any]] = {
    "mlstm-convolution": [functools.partial(MLSTMTFLA, convolution=3), functools.partial(MLSTMTFLA, gate="exp")],
    "rwkv7": [functools.partial(RWKV7, head_dim=8)],
    "delta-window": [GatedMemory, functools.partial(SlidingWindow, window=7)],
}
HYBRID = [functools.partial(SlidingWindow, window=20), Flash]


def model(mixers: list[Any], **settings: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "mlp_hidden": 24, **settings}
    if mixers is MIXERS["rwkv7"]:
        sizes["block"] = RWKVBlocks()

    def factory(shape, index):
        return mixers[index % len(mixers)](shape, index)

    net = LanguageModel(factory, 20, **sizes).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.abs().max() > 0:
                parameter.normal_(std=0.2)
    return net


def long_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(20, (ROWS, STEPS * WINDOW + 1), generator=torch.Generator().manual_seed(1))
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in DOCUMENTS]).int()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ids


def windows() -> list[dict]:
    """The rows in windows, whose ids begin with 0 each, as the loader gives them."""
    tokens, targets, ids = long_rows()
    found = []
    for start in range(0, STEPS * WINDOW, WINDOW):
        cut = slice(start, start + WINDOW)
        own = ids[:, cut] - ids[:, start : start + 1]
        goes_on = torch.zeros(ROWS, dtype=torch.bool) if start == 0 else ids[:, start] == ids[:, start - 1]
        found.append({"tokens": tokens[:, cut], "targets": targets[:, cut], "document_ids": own, "continues": goes_on})
    return found


class Breaks(TrainingModule):
    """Its second step has no finite loss."""

    def _accumulate(self, batch):
        record = super()._accumulate(batch)
        if self.step == 1:
            record.loss = record.loss * float("nan")
        return record


def trained(
    net: LanguageModel,
    rate: float = 0.1,
    carries: bool = True,
    kind: type[TrainingModule] = TrainingModule,
    on_step: Callable[[], None] = lambda: None,
    **changes: Any,
) -> TrainingModule:
    settings = {"micro_batch_size": None, "gradient_clip": None, "skip_nonfinite": False, **changes}
    module = kind(
        net,
        lambda parameters: [torch.optim.SGD([{"params": list(parameters.values()), PEAK: rate}], lr=rate)],
        lambda step, total: 1.0,
        total_steps=STEPS,
        carried=CarriedState(net, ROWS) if carries else None,
        **settings,
    )
    module.on_train_batch_end = lambda *_: on_step()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(windows(), batch_size=None))
    return module


def weights(net: LanguageModel) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


@pytest.mark.parametrize("mixers", MIXERS.values(), ids=MIXERS)
def test_windows_that_carry_are_one_long_window_in_the_forward_pass(mixers):
    net = model(mixers)
    tokens, targets, ids = long_rows()
    whole = net(tokens, targets, document_ids=ids).token_losses
    carried, losses = CarriedState(net, ROWS), []
    for batch in windows():
        (before,) = carried.before([batch])
        output, after = run_on(net, batch, before)
        carried.keep([after])
        losses.append(output.token_losses)
    torch.testing.assert_close(torch.cat(losses, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("mixers", [*MIXERS.values(), HYBRID], ids=[*MIXERS, "hybrid"])
def test_training_is_truncated_back_propagation_through_time(mixers, rows):
    """Written out for the whole batch: the state goes on without its gradient; full attention begins anew."""
    net = model(mixers)
    written_out = copy.deepcopy(net)
    net = trained(net, micro_batch_size=rows).model
    state = written_out.init_state(ROWS)
    tokens, targets, ids = long_rows()
    for step in range(STEPS):
        cut = slice(step * WINDOW, (step + 1) * WINDOW)
        for layer, mixer in zip(state, written_out.mixers(), strict=True):
            layer.mixer = None if isinstance(mixer, Flash) else layer.mixer
        output = written_out(tokens[:, cut], targets[:, cut], state=state, document_ids=ids[:, cut])
        gradients = torch.autograd.grad(output.token_losses.mean(), list(written_out.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(written_out.parameters(), gradients, strict=True):
                weight -= 0.1 * gradient
        state = mapped(output.state, torch.Tensor.detach)
    torch.testing.assert_close(weights(net), weights(written_out), rtol=0, atol=1e-12)
    anew = trained(model(mixers), carries=False).model
    assert (weights(anew) - weights(net)).abs().max() > 1e-6


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mixers", [*MIXERS.values(), HYBRID], ids=[*MIXERS, "hybrid"])
def test_compiled_blocks_make_no_graph_after_the_second_step(mixers):
    """Not even where a window of attention is longer than these windows."""
    torch._dynamo.reset()
    net = model(mixers)
    plain = copy.deepcopy(net)
    for block in net.blocks:
        block.compile(backend="eager")
    graphs = []
    found = trained(net, on_step=lambda: graphs.append(counters["stats"]["unique_graphs"]))
    torch._dynamo.reset()
    torch.testing.assert_close(weights(found.model), weights(trained(plain).model), rtol=0, atol=1e-12)
    assert not counters["graph_break"]
    assert graphs[1:] == [graphs[1]] * (STEPS - 1)


def test_checkpointed_blocks_carry_the_same_state():
    plain = trained(model(MIXERS["delta-window"]))
    for kind in ("block", "selective"):
        again = trained(model(MIXERS["delta-window"], activation_checkpointing=kind))
        torch.testing.assert_close(weights(again.model), weights(plain.model), rtol=0, atol=0)


def test_tuned_states_get_their_gradient_from_documents_that_begin():
    net = model(MIXERS["delta-window"][:1])
    for mixer in net.mixers():
        mixer.tune_states()
        torch.nn.init.normal_(mixer.tuned.initial["memory"], std=0.3)
    net = net.double()
    whole = copy.deepcopy(net)
    tokens, targets, ids = long_rows()
    first = windows()[0]
    carried = CarriedState(net, ROWS)
    output, after = run_on(net, first, *carried.before([first]))
    output.token_losses.sum().backward()
    whole(tokens[:, :WINDOW], targets[:, :WINDOW], document_ids=ids[:, :WINDOW]).token_losses.sum().backward()
    for mixer, other in zip(net.mixers(), whole.mixers(), strict=True):
        got, wanted = mixer.tuned.initial["memory"].grad, other.tuned.initial["memory"].grad
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        assert got.abs().max() > 0
    assert not any(leaf.requires_grad for leaf in tree_leaves(after) if isinstance(leaf, torch.Tensor))


def test_after_a_skipped_step_rows_begin_anew():
    """The state before the step is not that of the window before the next one."""
    net = model(MIXERS["mlstm-convolution"])
    module = trained(net, rate=0.0, kind=Breaks, skip_nonfinite=True)
    assert module.steps_skipped == 1
    carried = CarriedState(net, ROWS)
    for batch in windows()[2:]:
        output, after = run_on(net, batch, *carried.before([batch]))
        carried.keep([after])
    torch.testing.assert_close(module.record.token_losses, output.token_losses.detach(), rtol=0, atol=1e-12)


def test_the_planner_counts_what_a_row_carries():
    net = model(MIXERS["rwkv7"])
    carried = CarriedState(net, ROWS)
    for batch in windows():
        _, after = run_on(net, batch, *carried.before([batch]))
        carried.keep([after])
    assert held_bytes(after.layers)[0] == ROWS * carried_bytes(net)


def test_a_run_that_carried_nothing_is_gone_on_with_from_the_beginning():
    net = model(MIXERS["delta-window"])
    carried = CarriedState(net, ROWS)
    saved = SimpleNamespace(shapes={"model/head.weight": (20, 16)}, dtypes={}, checkpoint="run")
    assert carried.targets(saved, torch.device("cpu")) == {}
    carried.restore({})
    assert carried.before(windows()[:1])[0].last_id.tolist() == [0] * ROWS


@pytest.mark.parametrize("change", [lambda name: {}, lambda name: {f"{name}x": (ROWS, 3)}, lambda name: {name: (9, 3)}])
def test_the_state_of_another_model_or_batch_is_refused(change):
    carried = CarriedState(model(MIXERS["delta-window"]), ROWS)
    shapes = {f"carried/{name}": leaf.shape for name, leaf in carried.named(torch.device("cpu")).items()}
    name = "carried/.layers[0].mixer.carried"
    del shapes[name]
    saved = SimpleNamespace(shapes=shapes | change(name), dtypes=dict.fromkeys(shapes, torch.float32), checkpoint="run")
    with pytest.raises(CheckpointError, match="run has "):
        carried.targets(saved, torch.device("cpu"))


def test_what_cannot_carry_is_refused_by_name():
    net = model(MIXERS["delta-window"])
    with pytest.raises(ConfigError, match=r"loop\.carry_state=true needs rows that read on .*data\.order=contiguous"):
        check_carries(net, False, "sotu")
    with pytest.raises(
        ConfigError, match="those of MultiQueryRecall never do: leave it out, or give data of one corpus"
    ):
        check_carries(net, False, "MultiQueryRecall", has_order=False)
    with pytest.raises(ConfigError, match=r"no layer has a state that stays small \(Flash would keep every key\)"):
        check_carries(model([Flash]), True, "sotu")
    check_carries(model(HYBRID), True, "sotu")
    assert layers_begun_anew(model(HYBRID)) == "1 layer (Flash) begins"
    assert layers_begun_anew(net) is None
