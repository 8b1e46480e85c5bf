"""A few steps in bf16-mixed under each strategy; functions that the processes of a pool run."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sliced import rows
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from longmix.batch import Batch
from longmix.mixers.parts.between_steps import finish_step
from longmix.model.backbone import LanguageModel, ModelOutput
from longmix.training import strategies

VOCABULARY = 47
STEPS = 3


@dataclass(frozen=True)
class Trained:
    """What came of it, equal in all processes.

    Attributes:
        losses: mean loss over all tokens, for each step.
        gradients: of the first step, whole.
    """

    losses: list[float]
    gradients: dict[str, torch.Tensor]


class Run(nn.Module):
    """A model as DDP wraps it: forward is the loss of this process's share, over what there is on average of it."""

    def __init__(self, model: LanguageModel, world_size: int, slices: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.model, self.world_size, self.slices = model, world_size, slices

    def forward(self, batch: Batch, valid: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss to differentiate, and the share of the mean loss."""
        output: ModelOutput
        if self.slices is not None:
            output = strategies.run_slice(self.model, batch, self.slices)
        else:
            output = self.model(batch["tokens"], batch["targets"], document_ids=batch["document_ids"])
        loss = output.token_losses.sum() * self.world_size / valid
        return loss + sum(output.losses.values()), output.token_losses.detach().sum() / valid


def trained(group: dist.ProcessGroup | None, model: LanguageModel, strategy: str) -> Trained:
    """Train `model` for a few steps in float32 with products in bfloat16.

    Args:
        group: all processes; None for "single".
        model: as it begins.
        strategy: "single", "ddp", "fsdp" or "slices".
    """
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    tokens, targets, ids = rows(packed=True)
    batch = Batch(tokens=tokens, targets=targets, document_ids=ids)
    if strategy in ("ddp", "fsdp"):
        batch = Batch(**{name: part.chunk(size)[rank] for name, part in batch.items()})
    run: nn.Module = Run(model, size, group if strategy == "slices" else None)
    if strategy == "fsdp":
        strategies.shard(model, DeviceMesh.from_group(group, "cpu"), torch.bfloat16)
    elif strategy != "single":
        run = DistributedDataParallel(run, process_group=group)

    def summed(value: torch.Tensor) -> torch.Tensor:
        if group is not None:
            dist.all_reduce(value, group=group)
        return value

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, gradients = [], {}
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss, share = run(batch, tokens.numel())
        loss.backward()
        losses.append(float(summed(share)))
        gradients = gradients or {
            name: strategies.whole(weight.grad).clone()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }
        optimizer.step()
        finish_step(model, True, summed)
        optimizer.zero_grad(set_to_none=True)
    return Trained(losses, gradients)


def dtypes(group: dist.ProcessGroup | None, model: LanguageModel) -> dict[str, Any]:
    """In which dtype the forward pass in bf16-mixed sees every parameter, and what every block and norm returns.

    Args:
        group: processes that the model is divided over; None for none.
        model: whose.
    """
    if group is not None:
        strategies.shard(model, DeviceMesh.from_group(group, "cpu"), torch.bfloat16)
    seen: dict[str, Any] = {}

    def note(name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, _inputs: Any) -> None:
            for weight, value in module.named_parameters(recurse=False):
                seen[f"{name}.{weight}"] = value.dtype

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, torch.Tensor) else getattr(output, "y", None)
            if isinstance(parts, torch.Tensor):
                seen[f"{name}()"] = parts.dtype

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    for name, module in model.named_modules():
        note(name, module)
    tokens, targets, ids = rows(packed=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        output = model(tokens, targets, document_ids=ids)
    return {**seen, "hidden": output.hidden.dtype, "losses": output.token_losses.dtype}
