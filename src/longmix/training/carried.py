"""Carried state: each row of the batch begins a window from the state that its last window ended with.

This is truncated back-propagation through time: the state passes from step to step, its gradient does not. It takes
rows that read on from step to step (`data.order=contiguous`). A state belongs to a row of the batch, whatever process
and micro-batch the row is in.

    batch       says of each row whether its first document is the one that the row's last window ended with
    documents   numbered on from window to window, so that a mixer sees which document goes on (`Mixer.forward`)
    layers      whose state does not grow with the length carry it; others, such as full attention, begin each window
                anew
    checkpoint  has the states of all rows, one tensor for each leaf; processes have their rows of it, as of a weight
                that is divided along its first axis
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from longmix.batch import Batch
from longmix.checkpoints import Checkpoint
from longmix.errors import CheckpointError, ConfigError
from longmix.mixers.parts.base import FAR
from longmix.mixers.parts.states import mapped, named_leaves
from longmix.model.backbone import LanguageModel, ModelOutput
from longmix.model.blocks import Block
from longmix.pytrees import pytree
from longmix.training import strategies
from longmix.wording import counted

CARRIED = "carried"
"""Entry of a checkpoint's state."""


@pytree
@dataclass
class Rows:
    """The state of some rows after a window.

    Attributes:
        last_id: int32 [B], the number of the document that each ended with, counted over all its windows.
        layers: as in `ModelOutput`.
    """

    last_id: Tensor
    layers: list[Any]


class CarriedState:
    """The state of the rows of this process between two steps.

    Args:
        model: whole, as before it is divided over processes.
        batch_size: rows of all processes together.

    Attributes:
        mesh: the processes that divide the rows along its first axis, in their order; None for one process.
    """

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        self.batch_size = batch_size
        self.mesh: DeviceMesh | None = None
        self._blank = mapped(Rows(torch.zeros(1, dtype=torch.int32), model.state_between_documents(1)), Tensor.detach)
        self._parts: list[Rows] = []

    def begin(self, batch_size: int) -> None:
        """Begin anew with so many rows of all processes together, as a stage does."""
        self.batch_size, self._parts = batch_size, []

    def before(self, batches: Sequence[Batch]) -> list[Rows]:
        """The state before each of a step's micro-batches, which have equally many rows."""
        rows, device = batches[0]["tokens"].shape[0], batches[0]["tokens"].device
        if not self._parts:
            blank = mapped(self._blank, lambda x: _repeated(x, rows, device))
            self._parts = [blank for _ in batches]
        elif len(self._parts) != len(batches):
            whole = self._whole()
            cuts = [slice(start, start + rows) for start in range(0, rows * len(batches), rows)]
            self._parts = [mapped(whole, lambda x, cut=cut: x[cut].contiguous()) for cut in cuts]  # type: ignore[misc]
        return self._parts

    def keep(self, after: list[Rows]) -> None:
        """Go on from what a step's micro-batches ended with."""
        self._parts = after

    def forget(self) -> None:
        """Begin anew, since the windows of a step that was left out are missing between the state and the next."""
        self._parts = []

    def named(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name, for a checkpoint; this process has its rows of them."""
        if not self._parts:
            rows = self.batch_size if self.mesh is None else self.batch_size // self.mesh.size(0)
            self._parts = [mapped(self._blank, lambda x: _repeated(x, rows, device))]
        found = {name: x for name, x in _leaves(self._whole()).items() if isinstance(x, Tensor) and x.numel()}
        return {name: self._divided(x) for name, x in found.items()}

    def targets(self, saved: Checkpoint, device: torch.device) -> dict[str, Tensor]:
        """Memory for this process's rows of what a checkpoint holds, by the names there; `restore` takes it.

        Empty if the checkpoint is of a run that carried nothing.

        Raises:
            CheckpointError: it holds the state of another model.
        """
        prefix = f"{CARRIED}/"
        shapes = {name: shape for name, shape in saved.shapes.items() if name.startswith(prefix)}
        if not shapes:
            return {}
        known = _leaves(self._blank)
        for name in [f"{prefix}{name}" for name, leaf in known.items() if isinstance(leaf, Tensor) and leaf.numel()]:
            if name not in shapes:
                raise CheckpointError(f"{saved.checkpoint} has no carried state named {name.removeprefix(prefix)}.")
        found = {}
        for name, (rows, *rest) in shapes.items():
            if name.removeprefix(prefix) not in known or rows != self.batch_size:
                raise CheckpointError(f"{saved.checkpoint} has a carried state of another model or batch: {name}.")
            own = rows if self.mesh is None else rows // self.mesh.size(0)
            found[name] = self._divided(torch.empty(own, *rest, dtype=saved.dtypes[name], device=device))
        return found

    def restore(self, targets: dict[str, Tensor]) -> None:
        """Go on from `targets` that have been filled; anew if there are none."""
        if not targets:
            self._parts = []
            return
        read = {name.removeprefix(f"{CARRIED}/"): _own(x) for name, x in targets.items()}
        rows = len(next(iter(read.values())))
        leaves, structure = tree_flatten(self._blank)
        device = next(iter(read.values())).device
        named = zip(_leaves(self._blank), leaves, strict=True)
        filled = [read[name] if name in read else _repeated(leaf, rows, device) for name, leaf in named]
        self._parts = [tree_unflatten(filled, structure)]

    def _divided(self, own: Tensor) -> Tensor:
        """The tensor of all rows, of which this process has its own."""
        if self.mesh is None:
            return own
        return DTensor.from_local(own, self.mesh, [Shard(0), Replicate()][: self.mesh.ndim], run_check=False)

    def _whole(self) -> Rows:
        """All rows of this process in one."""
        first, *others = self._parts
        if not others:
            return first
        return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], first, *others)


def run_on(
    model: LanguageModel, batch: Batch, before: Rows, group: ProcessGroup | None = None
) -> tuple[ModelOutput, Rows]:
    """Run a batch from the state before it; returns the output and the state after it, without gradients.

    Args:
        model, batch: any.
        before: the state, alike in processes that share rows.
        group: these processes; None where none do. The output is then that of `strategies.run_slice`.
    """
    ids = batch["document_ids"]
    if ids is None:
        ids = torch.zeros_like(batch["tokens"], dtype=torch.int32)
    first = before.last_id + (~batch["continues"]).int()
    ids = ids - ids[:, :1] + first[:, None]
    output: ModelOutput
    if group is None:
        output = model(
            batch["tokens"],
            batch["targets"],
            state=before.layers,
            document_ids=ids,
            document_starts=batch.get("document_starts"),
        )
    else:
        output = strategies.run_slice(model, {**batch, "document_ids": ids}, group, before.layers)
    # copies, as what is a view would keep all of its window alive
    after = mapped(
        Rows(ids[:, -1], output.state or []), lambda x: x.detach().clone(memory_format=torch.contiguous_format)
    )
    output.state = None
    return output, after if group is None else strategies.of_last_slice(after, group)


def check_carries(model: LanguageModel, reads_on: bool, source: str, has_order: bool = True) -> None:
    """Refuse `loop.carry_state=true` where it has no meaning.

    Args:
        model: it may be without memory.
        reads_on: whether rows read on from step to step.
        source: the name of the data.
        has_order: whether the data have the word data.order.

    Raises:
        ConfigError: naming the words.
    """
    if not reads_on and not has_order:
        raise ConfigError(
            f"loop.carry_state=true needs rows that read on from step to step, and those of {source} never do: leave "
            "it out, or give data of one corpus, such as data=sotu data.order=contiguous."
        )
    if not reads_on:
        raise ConfigError(
            f"loop.carry_state=true needs rows that read on from step to step, which those of {source} do not: give "
            "data.order=contiguous, which data of one corpus have."
        )
    if not any(_carries(model)):
        names = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in model.mixers()))
        raise ConfigError(
            f"loop.carry_state=true: no layer has a state that stays small ({names} would keep every key); take a "
            "recurrent mixer, mixer=sliding_window, or a pattern with one of them."
        )


def layers_begun_anew(model: LanguageModel) -> str | None:
    """A phrase such as "2 layers (Flash) begin" for the layers that carry nothing; None if there are none."""
    layers = zip(model.mixers(), _carries(model), strict=True)
    names = [type(mixer).__name__ for mixer, carries in layers if not carries]
    if not names:
        return None
    verb = "begins" if len(names) == 1 else "begin"
    return f"{counted(len(names), 'layer')} ({', '.join(dict.fromkeys(names))}) {verb}"


def carried_bytes(model: LanguageModel) -> int:
    """Bytes that are carried for a row, once it has seen enough tokens to fill every window of attention."""
    blocks = [cast(Block, block) for block in model.blocks]
    branches = [branch for block in blocks for branch in (block.mixer, block.mlp) if branch.state_is_bounded()]
    return sum(branch.state_bytes(FAR) for branch in branches)


def _carries(model: LanguageModel) -> Iterator[bool]:
    return (mixer.state_is_bounded() for mixer in model.mixers())


def _leaves(state: Rows) -> dict[str, Any]:
    return {name.replace("/", ":"): leaf for name, leaf in named_leaves(state).items()}


def _repeated(leaf: Any, rows: int, device: torch.device) -> Any:
    return leaf.to(device).expand(rows, *leaf.shape[1:]).contiguous() if isinstance(leaf, Tensor) else leaf


def _own(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
