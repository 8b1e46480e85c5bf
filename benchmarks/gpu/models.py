"""Models of `configs/`, and training steps of them without anything around: no data, no log, no Trainer."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longmix.composing import composed
from longmix.config import TrainConfig, read
from longmix.data.loaders import document_starts
from longmix.mixers.parts.between_steps import finish_step
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.training.optimizers import PEAK


@dataclass
class Trained:
    """A model with what it takes to train it on rows that are drawn.

    Attributes:
        model: on its device.
        optimizers: of its weights.
        rows: tokens int64 [batch, length + 1].
        document_ids: int32 [batch, length].
        document_starts: as in a batch of the loader, see `longmix.batch.Batch`.
        dtype: "fp32", or "bf16" for products under autocast.
    """

    model: LanguageModel
    optimizers: list[torch.optim.Optimizer]
    rows: torch.Tensor
    document_ids: torch.Tensor | None
    document_starts: torch.Tensor | None
    dtype: str

    def step(self) -> torch.Tensor:
        """One optimizer step; returns the mean loss before it, on the device."""
        loss = self.loss()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finish_step(self.model, True, lambda x: x)
        return loss.detach()

    def loss(self) -> torch.Tensor:
        """The mean loss, with auxiliary losses."""
        with self.precision():
            documents = {"document_ids": self.document_ids, "document_starts": self.document_starts}
            output = self.model(self.rows[:, :-1], self.rows[:, 1:], **documents)
        return output.token_losses.mean() + sum(output.losses.values())

    def precision(self) -> contextlib.AbstractContextManager:
        """The context that the model runs in."""
        device = self.rows.device.type
        return torch.autocast(device, torch.bfloat16) if self.dtype == "bf16" else contextlib.nullcontext()

    def compile(self) -> None:
        """Compile each block, as `trainer.compile` does."""
        for block in self.model.blocks:
            block.compile()


def trained(
    words: Sequence[str], *, batch: int, length: int, vocab_size: int, device: str, dtype: str, documents: int = 1
) -> Trained:
    """What the words of a command line describe, with random weights and rows that can be learned by heart.

    Args:
        words: such as "mixer=flash" and "model=125m".
        batch, length: of the rows.
        vocab_size: of the model.
        device: "cuda" or "cpu".
        dtype: "bf16" or "fp32".
        documents: in each row, of equal length.
    """
    config = read(TrainConfig, composed("train", [*words, "logger=none"]).content)
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(config, vocab_size)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizers = config.optimizer.build(parameters=weights)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[PEAK]
    rows = torch.randint(vocab_size, (batch, length + 1), device=device)
    ids = starts = None
    if documents > 1:
        made = (torch.arange(length) * documents // length).int().expand(batch, length).contiguous()
        ids, starts = made.to(device), torch.from_numpy(document_starts(made.numpy())).to(device)
    return Trained(model.train(), optimizers, rows, ids, starts, dtype)
