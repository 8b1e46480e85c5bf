"""The results of one training step, gathered over its passes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from longmix.batch import Batch
from longmix.mixers.parts.metrics import Mean, Measure, accumulate
from longmix.model.backbone import ModelOutput
from longmix.training.carried import Rows


@dataclass
class StepRecord:
    """The results of one training step, for the callbacks. Tensors stay on the device until they are logged.

    Attributes:
        loss: mean loss per valid token of the global batch, in nats.
        gradient_norm: norm of the whole gradient before clipping.
        token_losses, batch: of this process, for the loss by position.
        hits: of this process, which targets were met, where the model measures it.
        metrics: what the mixers measured in this process, all micro-batches together.
        losses: auxiliary losses by name, likewise; a step's is the mean over micro-batches and processes.
        carried: the state after each micro-batch, where state is carried.
        spike: why the step was left out as a spike; empty for any other.
        z_loss: of this process, already divided by the valid tokens, where there is one.
        attacked_loss: of this process, likewise: the loss under the attack, where the step had one.
        divergence: of this process, likewise: that from the teacher's distributions, where there is a teacher.
        layer_losses: of this process, one per layer that learns from its teacher's: then these are all that is learned,
            `loss` is their mean, and there are no token losses.
    """

    loss: Tensor
    gradient_norm: Tensor
    token_losses: Tensor
    batch: Batch
    hits: Tensor | None = None
    metrics: dict[str, Measure] = field(default_factory=dict)
    losses: dict[str, Measure] = field(default_factory=dict)
    carried: list[Rows] = field(default_factory=list)
    spike: str = ""
    z_loss: Tensor | None = None
    attacked_loss: Tensor | None = None
    divergence: Tensor | None = None
    layer_losses: dict[int, Tensor] = field(default_factory=dict)

    def measured(self) -> dict[str, Measure]:
        """What the log has of the mixers and the further losses, by its name there; this process's part of it."""
        found = {f"train/{name}": measure for name, measure in self.losses.items()}
        shares = {"z_loss": self.z_loss, "attacked_loss": self.attacked_loss, "divergence": self.divergence}
        shares |= {f"layers_loss/layer_{layer}": loss for layer, loss in self.layer_losses.items()}
        for name, part in shares.items():
            if part is not None:  # each process has its share of one mean
                found[f"train/{name}"] = Mean.of(part)
        return found | {f"mixer/{name}": measure for name, measure in self.metrics.items()}


class Passes:
    """The sums over a step's passes, of which there is one for each micro-batch, and another where it is attacked.

    Args:
        valid: valid targets of the global batch per process.
        micro_batches: how many there are.
        z_loss: weight of the loss on the normalisers.
        hard_share: weight of the loss on the targets, where the rest is that of the divergences from a teacher.
    """

    def __init__(self, valid: Tensor, micro_batches: int, z_loss: float, hard_share: float = 1.0) -> None:
        self.valid, self.micro_batches, self.z_loss, self.hard_share = valid, micro_batches, z_loss, hard_share
        self._token_losses: list[Tensor] = []
        self._hits: list[Tensor] = []
        self._metrics: dict[str, Measure] = {}
        self._losses: dict[str, Measure] = {}
        self._z_losses: list[Tensor] = []
        self._attacked: list[Tensor] = []
        self._divergences: list[Tensor] = []

    def add(self, output: ModelOutput) -> Tensor:
        """Gather a micro-batch's results; returns the loss to go backward from, its share of the step's.

        The output should be dropped with the call: its `hidden` would last until the next micro-batch's pass is over.
        """
        loss, z_loss = self._loss(output)
        if z_loss is not None:
            self._z_losses.append(z_loss.detach())
        if output.divergences is not None:
            self._divergences.append(output.divergences.detach().sum() / self.valid)
        self._token_losses.append(output.token_losses.detach())
        if output.hits is not None:
            self._hits.append(output.hits)
        accumulate(self._metrics, output.metrics)
        accumulate(self._losses, output.losses)
        return loss

    def add_attacked(self, output: ModelOutput) -> Tensor:
        """As `add`, for the pass under attack, of which only the loss of the tokens is kept."""
        self._attacked.append(output.token_losses.detach().sum() / self.valid)
        return self._loss(output)[0]

    def _loss(self, output: ModelOutput) -> tuple[Tensor, Tensor | None]:
        loss, z_loss = output.token_losses.sum() / self.valid, None
        if output.divergences is not None:
            soft = output.divergences.sum() / self.valid
            loss = self.hard_share * loss + (1 - self.hard_share) * soft if self.hard_share else soft
        for auxiliary in output.losses.values():
            loss = loss + auxiliary / self.micro_batches
        if output.log_normalisers is not None:
            z_loss = self.z_loss * output.log_normalisers.square().sum() / self.valid
            loss = loss + z_loss
        return loss, z_loss

    def token_losses(self) -> Tensor:
        """Those of all micro-batches, [B, T]."""
        return torch.cat(self._token_losses)

    def record(self, loss: Tensor, batch: Batch, carried: list[Rows]) -> StepRecord:
        """The step's record, whose gradient norm is still to come."""
        together = self.token_losses()
        return StepRecord(
            loss,
            together.new_zeros(()),
            together,
            batch,
            torch.cat(self._hits) if self._hits else None,
            self._metrics,
            self._losses,
            carried,
            z_loss=torch.stack(self._z_losses).sum() if self._z_losses else None,
            attacked_loss=torch.stack(self._attacked).sum() if self._attacked else None,
            divergence=torch.stack(self._divergences).sum() if self._divergences else None,
        )
