"""How a model is divided over processes, and how its state is gathered again; the model itself knows nothing of it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from longmix.data.loaders import Batch
from longmix.model.backbone import LanguageModel, ModelOutput
from longmix.model.head import IGNORE_INDEX
from longmix.parallel.slices import Slices

FULL_ON_CPU = distributed_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
FULL_FROM_FIRST = distributed_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shard(model: LanguageModel, mesh: DeviceMesh, precision: str) -> None:
    """Divide weights, gradients and optimizer state over `mesh` in place (FSDP2), block by block.

    Args:
        model: the model; its parameters are replaced, so what was attached to them is gone.
        mesh: one-dimensional.
        precision: "bf16-mixed" computes in bf16 from float32 shards and reduces gradients in float32.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(model, FSDPModule)


def whole(value: Any) -> Any:
    """A tensor divided over processes as one tensor on each; anything else as it is. All processes must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def row_group(size: int) -> dist.ProcessGroup:
    """The group of `size` neighbouring processes that this one shares its rows with; all processes must call it.

    It is a group of its own also where it has all processes, so that its exchanges and those of gradients never mix.
    """
    own, _ = dist.new_subgroups(size)
    return own


def run_slice(model: LanguageModel, batch: Batch, group: dist.ProcessGroup) -> ModelOutput:
    """Run this process's slice of a batch's rows; token losses come back in whole rows, 0 outside the slice."""
    slices = _slices(batch, group)
    tokens, targets = slices.own(batch["tokens"]), slices.own(batch["targets"])
    output = model(tokens, targets, state=model.slice_state(slices), document_ids=slices.ids)
    output.token_losses = slices.placed(output.token_losses, 0.0)
    return output


def own_targets(batch: Batch, group: dist.ProcessGroup) -> Batch:
    """The batch with targets in this process's slice alone, so that none counts twice."""
    slices = _slices(batch, group)
    return {**batch, "targets": slices.placed(slices.own(batch["targets"]), IGNORE_INDEX)}


def _slices(batch: Batch, group: dist.ProcessGroup) -> Slices:
    return Slices(batch["tokens"].shape[1], batch["document_ids"], group)


def gathered_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Whole weights and optimizer states on the CPU of the first process; all processes must call it."""
    if not is_sharded(model):
        return {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    return {
        "model": distributed_state.get_model_state_dict(model, options=FULL_ON_CPU),
        "optimizers": [
            distributed_state.get_optimizer_state_dict(model, optimizer, options=FULL_ON_CPU)
            for optimizer in optimizers
        ],
    }


def restore_state(model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Put back what `gathered_state` gave, divided over the processes there are now."""
    if not is_sharded(model):
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return
    distributed_state.set_model_state_dict(model, state["model"], options=FULL_FROM_FIRST)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        distributed_state.set_optimizer_state_dict(model, optimizer, saved, options=FULL_FROM_FIRST)
