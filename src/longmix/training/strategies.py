"""Division of a model over processes, and their exchanges; the model itself knows nothing of them."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from longmix.batch import Batch, documents_of
from longmix.distributed.rounded_gather import RoundedGather
from longmix.distributed.slices import Slices
from longmix.mixers.parts.documents import told_apart
from longmix.model.backbone import LanguageModel, ModelOutput
from longmix.model.head import IGNORE_INDEX, SoftTargets
from longmix.model.saved import Int8Linear
from longmix.recipe import recipe_of


def shard(model: LanguageModel, mesh: DeviceMesh, products: torch.dtype | None = None) -> None:
    """Divide weights, gradients and optimizer state over `mesh` in place (FSDP2), block by block.

    Weights and inputs keep their dtype on the way: in bf16-mixed autocast rounds what it rounds in one process, which
    are the matrices of products. FSDP's own rounding would also take norms, gates, decays and the residual stream.

    Args:
        model: the model; its parameters are replaced, so what was attached to them is gone.
        mesh: one-dimensional.
        products: the dtype to which autocast rounds the factors of products in every pass. The weights that enter
            products alone are then gathered in it, which halves the traffic and changes nothing. None: there is none.
    """
    rounded = set() if products is None else names_of_product_weights(model)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(block, "mix")
    fully_shard(model, mesh=mesh, mp_policy=policy)
    weights = [weight for name, weight in model.named_parameters() if name in rounded]
    if products is None or mesh.size() == 1 or any(weight.dtype != torch.float32 for weight in model.parameters()):
        return
    for module in (*model.blocks, model):
        gather = RoundedGather(module, weights, products)
        if gather.rounded:
            module.set_custom_all_gather(gather)


def names_of_product_weights(model: LanguageModel) -> set[str]:
    """Weights that nothing reads but products that autocast rounds: hidden matrices, and a head that is not tied.

    Of modules that are not longmix's nobody knows how they use theirs.
    """
    names = set(_names_of_matrices(model, ""))
    return names if model.head.weight is model.embedding.weight else names | {"head.weight"}


def _names_of_matrices(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and type(child) in (nn.Linear, Int8Linear):
            if recipe_of(child.weight).role == "matrix":
                yield f"{prefix}{name}.weight"
        elif type(child).__module__.startswith(("longmix.", "torch.nn.")):
            yield from (f"{prefix}{name}.{weight}" for weight in getattr(child, "products", ()))
            yield from _names_of_matrices(child, f"{prefix}{name}.")


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(model, FSDPModule)


def whole(value: Any) -> Any:
    """A tensor divided over processes as one tensor on each; anything else as it is. All processes must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def row_group(size: int, timeout: float = 600.0) -> dist.ProcessGroup:
    """The group of `size` neighbouring processes that this one shares its rows with; all processes must call it.

    They wait `timeout` seconds for each other. It is a group of its own also where it has all processes, so that its
    exchanges and those of gradients never mix.
    """
    own, _ = dist.new_subgroups(size, timeout=timedelta(seconds=timeout))
    return own


def mesh_of_rows(device: torch.device, slices: int) -> DeviceMesh:
    """All processes in the order of their ranks: rows are divided along the first axis, and shared along a second.

    All must call it. Without slices there is no second axis.
    """
    size = dist.get_world_size()
    return init_device_mesh(device.type, (size,) if slices == 1 else (size // slices, slices))


def ready_for_parts(model: LanguageModel) -> None:
    """Make a divided model known as the whole of its blocks, so that these can run before it does."""
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()


def average_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes, which must all call it and have the same ones."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    for gradient in gradients:
        gradient /= dist.get_world_size()


def hidden(model: LanguageModel, batch: Batch, group: dist.ProcessGroup | None) -> Tensor:
    """What a model's head is given on a batch [B, T, D]; of this process's slice alone if rows are shared.

    Args:
        model, batch: any.
        group: the processes that share the rows; None if none do.
    """
    if group is None:
        output: ModelOutput = model(batch["tokens"], **documents_of(batch))
    else:
        slices, given = inputs_of_slice(batch, group)
        output = model(**given, state=model.slice_state(slices))
    return output.hidden


def inputs_of_slice(
    batch: Batch, group: dist.ProcessGroup, carrying: bool = False
) -> tuple[Slices, dict[str, Tensor | None]]:
    """The slice of this process, and the arguments of a pass over it besides targets and state.

    Args:
        batch: any.
        group: the processes that share the rows.
        carrying: rows go on from a state, so that documents are told apart even where each row is one.
    """
    slices = Slices(batch["tokens"].shape[1], batch["document_ids"], group) if carrying else _slices(batch, group)
    given: dict[str, Tensor | None] = {"tokens": slices.own(batch["tokens"]), "document_ids": slices.ids}
    further = batch.get("positions_before")
    return slices, given if further is None else {**given, "positions_before": slices.own(further)}


def run_slice(
    model: LanguageModel,
    batch: Batch,
    group: dist.ProcessGroup,
    before: Sequence[Any] | None = None,
    soft: SoftTargets | None = None,
) -> ModelOutput:
    """Run this process's slice of a batch's rows; token losses come back in whole rows, 0 outside the slice.

    Args:
        model, batch: any.
        group: the processes that share the rows.
        before: each layer's state before the rows; the output then has the states after the slice.
        soft: a teacher's distributions in the slice, which stay there in the output too.
    """
    slices, given = inputs_of_slice(batch, group, carrying=before is not None)
    targets = slices.own(batch["targets"])
    output = model(**given, targets=targets, state=model.slice_state(slices, before), soft=soft)
    output.token_losses = slices.placed(output.token_losses, 0.0)
    if output.hits is not None:
        output.hits = slices.placed(output.hits, False)
    return output


def own_targets(batch: Batch, group: dist.ProcessGroup) -> Batch:
    """The batch with targets in this process's slice alone, so that none counts twice."""
    slices = _slices(batch, group)
    return {**batch, "targets": slices.placed(slices.own(batch["targets"]), IGNORE_INDEX)}


def of_last_slice(state: Any, group: dist.ProcessGroup) -> Any:
    """The state that the last process of the group has, in all of them, which must all call it.

    Args:
        state: a pytree, whose tensors may have other shapes in other processes.
        group: the processes that share rows.
    """
    leaves, structure = tree_flatten(state)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if not places:
        return state
    last = dist.get_global_rank(group, dist.get_world_size(group) - 1)
    sizes = torch.tensor([size for place in places for size in leaves[place].shape], device=leaves[places[0]].device)
    dist.broadcast(sizes, last, group)
    known = iter(sizes.tolist())
    for place in places:
        shape = [next(known) for _ in leaves[place].shape]
        is_last = dist.get_rank() == last
        leaves[place] = leaves[place].contiguous() if is_last else leaves[place].new_empty(shape)
        if leaves[place].numel():
            dist.broadcast(leaves[place], last, group)
    return tree_unflatten(leaves, structure)


def largest(value: int, device: torch.device) -> int:
    """The largest value of all processes, which must all call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def _slices(batch: Batch, group: dist.ProcessGroup) -> Slices:
    return Slices(batch["tokens"].shape[1], told_apart(batch["document_ids"]), group)


def own_group(timeout: float = 600.0) -> dist.ProcessGroup | None:
    """A group of all processes on the CPU that nothing else uses; None if there is one process.

    They wait `timeout` seconds for each other.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
