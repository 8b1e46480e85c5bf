"""The memory that a step needs, found by runs on fake tensors: of each part of a model, and of the optimizers.

The code that will train runs on fake tensors of the real sizes. So no formula has to follow the code, and a new mixer
is planned like the others. Of equal layers one is run. Autocast is that of the CPU, which differs
from a GPU's in operators that our code does in float32 by itself.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from longmix.config import Choice
from longmix.mixers.parts.layout import Layout, LayoutNeeds, layouts, needs_of
from longmix.model.backbone import Checkpointing, LanguageModel, run_block
from longmix.model.blocks import Block
from longmix.model.head import SoftTargets
from longmix.model.sharing import dictionaries_of
from longmix.planning.fakes import HostMemory, LastSlice, gpu_functions
from longmix.planning.memory_tracker import Ledger, bytes_of, empty_like
from longmix.recipe import recipe_of, set_recipe
from longmix.training.batched_muon import BatchedMuon
from longmix.training.strategies import names_of_product_weights
from longmix_kernels.runtime import assumed_device

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]


@dataclass(frozen=True)
class Setting:
    """The conditions of a dry run.

    Attributes:
        rows, length: windows of one forward and backward pass, and their tokens.
        precision: as in `TrainerSettings`.
        sharded: weights are gathered for each pass, as FSDP does.
        accumulates: gradients of an earlier micro-batch are there already.
        checkpointing: what blocks keep, as in `LanguageModel`.
        device: "cuda" or "cpu", which decides between implementations of the engines.
        slices: processes that share each window; this one has the last slice.
        offloads: what layers keep is in the host's memory meanwhile, except that of the last one.
        hard_share: weight of the loss on the text where a teacher's distributions are learned; None without a teacher.
    """

    rows: int
    length: int
    precision: Precision
    sharded: bool
    accumulates: bool
    checkpointing: Checkpointing
    device: Literal["cuda", "cpu"]
    slices: int = 1
    offloads: bool = False
    hard_share: float | None = None

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights in the forward pass, gathered ones too, although some travel in fewer bytes."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32


@dataclass(frozen=True)
class Part:
    """The bytes that a part of the model needs besides its weights.

    Attributes:
        output: its output.
        kept: tensors kept from the forward to the backward pass, besides input and output; under autocast also the
            matrices in lower precision.
        forward: the most that it holds besides these during the forward pass.
        backward: the most that the backward pass adds, gradients included unless they accumulate.
        gradients: its weights' gradients as the backward pass leaves them.
        parameters: number of its weights.
        moved: bytes that operators other than products of matrices read and write, in both passes.
        received: bytes that a forward pass gets from other slices of the same windows.
        rounded: number of its weights that FSDP gathers in two bytes.
        again: what its backward pass computes again, as a share of the arithmetic of its forward pass.
        offloaded: bytes that are in the host's memory between both passes, its input included.
        input_offloaded: bytes of its input in them.
        input_let_go: bytes of its input that nothing keeps after its forward pass.
    """

    output: int
    kept: int
    forward: int
    backward: int
    gradients: int
    parameters: int
    moved: int
    received: int = 0
    rounded: int = 0
    again: float = 0.0
    offloaded: int = 0
    input_offloaded: int = 0
    input_let_go: int = 0

    @property
    def gathered(self) -> int:
        """Bytes of its weights on their way to all processes, if FSDP divides them and they are float32."""
        return 4 * self.parameters - 2 * self.rounded


@dataclass(frozen=True)
class Rehearsal:
    """The needs of a model's parts: its ends (before and after the layers, as one), and its layers.

    Attributes:
        ends, layers: as above.
        layouts: bytes of the positions, angles and bounds that layers share.
        shared: bytes of the whole gradients of matrices that layers share, which the backward pass holds until it ends.
        first_of_shared: the layer whose backward pass is the first that makes some.
    """

    ends: Part
    layers: list[Part]
    layouts: int = 0
    shared: int = 0
    first_of_shared: int = 0


@dataclass(frozen=True)
class Ends:
    """The needs of a model's ends, and the dtype of the input of its layers."""

    part: Part
    dtype: torch.dtype


def rehearse_ends(model: LanguageModel, setting: Setting) -> Ends:
    """Run a model without its layers: embedding, last norm and loss.

    Args:
        model: on the meta device; it is not changed.
        setting: how it is run; what blocks keep makes no difference.
    """
    outside = copy.copy(model)
    outside._modules = {**model._modules, "blocks": nn.ModuleList()}
    outside = copy.deepcopy(outside)
    rounded = _rounded(model, setting, lambda name: not name.startswith("blocks."))
    with assumed_device(setting.device), FakeTensorMode(allow_non_fake_inputs=True):
        ends = _ends(outside, setting)
    gradients = ends.part.gradients + _shared_numbers(model) * setting.weight_dtype.itemsize
    return dataclasses.replace(ends, part=dataclasses.replace(ends.part, rounded=rounded, gradients=gradients))


def rehearse(model: LanguageModel, setting: Setting, ends: Ends) -> Rehearsal:
    """Run a layer of each kind.

    Args:
        model: on the meta device; it is not changed.
        setting: how it is run.
        ends: of the same model and setting.
    """
    for mixer in model.mixers():
        mixer.prepare(setting.slices * setting.length)
    blocks = [cast(Block, block) for block in model.blocks]
    kinds = [(kind_of(block), setting.offloads and index < len(blocks) - 1) for index, block in enumerate(blocks)]
    copies = {kind: copy.deepcopy(blocks[kinds.index(kind)]) for kind in dict.fromkeys(kinds)}
    with assumed_device(setting.device), FakeTensorMode(allow_non_fake_inputs=True):
        stage = _Stage(setting, model.shape.d_model, ends.dtype)
        made = stage.make_layouts(model)
        layers = {kind: stage.block(block, offloads=kind[1]) for kind, block in copies.items()}
    for kind in layers:
        prefix = f"blocks.{kinds.index(kind)}."
        rounded = _rounded(model, setting, lambda name, prefix=prefix: name.startswith(prefix))  # type: ignore[misc]
        layers[kind] = dataclasses.replace(layers[kind], rounded=rounded)
    shared = _shared_numbers(model) * setting.weight_dtype.itemsize
    first = max((index for index, block in enumerate(blocks) if dictionaries_of(block)), default=0)
    return Rehearsal(ends.part, [layers[kind] for kind in kinds], made, shared, first)


def _shared_numbers(model: LanguageModel) -> int:
    """The number of weights that belong to the model and have gradients from several layers."""
    return 0 if model.shared is None else sum(weight.numel() for weight in model.shared.parameters())


def _rounded(model: LanguageModel, setting: Setting, where: Callable[[str], bool]) -> int:
    """The number of weights that FSDP gathers in two bytes, of those with names for which `where` holds."""
    if setting.precision != "bf16-mixed":
        return 0
    return sum(model.get_parameter(name).numel() for name in names_of_product_weights(model) if where(name))


def kind_of(block: Block) -> Any:
    """The key of equal layers: built from the same settings, with weights of the same shapes; see `Mixer.kind`.

    A layer that gives a value residual lacks the weights that take one, so its key differs.
    """
    weights = itertools.chain(block.named_parameters(), block.named_buffers())
    return type(block.mixer), block.mixer.kind, tuple((name, tuple(weight.shape)) for name, weight in weights)


class _Stage:
    """Runs blocks one after another, each on an input of its own, and keeps the value residual of the first."""

    def __init__(self, setting: Setting, width: int, dtype: torch.dtype) -> None:
        self.setting = setting
        self.shape, self.dtype = (setting.rows, setting.length, width), dtype
        self.ids = torch.empty(self.shape[:2], dtype=torch.int32)
        self.value_residual: Tensor | None = None
        self.first_sizes: tuple[torch.Size, torch.dtype] | None = None
        self.received = 0
        self.slices = LastSlice(setting.slices, setting.length) if setting.slices > 1 else None
        self.layouts: dict[LayoutNeeds, Layout] = {}

    def make_layouts(self, model: LanguageModel) -> int:
        """Make the layouts that the model's forward pass makes; returns their bytes."""
        self.layouts, size = shared_layouts(model, self.ids, self.slices)
        return size

    def block(self, block: Block, offloads: bool) -> Part:
        """Run one block."""
        for module in (block, *(dictionaries := dictionaries_of(block))):
            materialise(module, self.setting)
        x = torch.empty(self.shape, dtype=self.dtype, requires_grad=True)
        given = self.value_residual
        needs = needs_of(block.mixer)
        layout = None if needs is None else self.layouts[needs]
        state, ids = (None, self.ids) if self.slices is None else (block.slice_state(self.slices), None)
        others = (state, ids, given, layout)
        host = HostMemory(x)
        keeps_input = False

        def note(kept: Tensor) -> Tensor:
            nonlocal keeps_input
            keeps_input |= kept.untyped_storage()._cdata == x.untyped_storage()._cdata
            return kept

        def call() -> tuple[Tensor, list[Tensor], Any]:
            host.clear()
            with host.offloading(block, others) if offloads else saved_tensors_hooks(note, lambda kept: kept):
                result = run_block(block, self.setting.checkpointing, x, *others)
            if result.value_residual is not None:
                self.first_sizes = result.value_residual.shape, result.value_residual.dtype
            self.received = 0 if self.slices is None else self.slices.taken()
            return result.y, list(result.losses.values()), result.value_residual

        shared = [leaf for leaf in tree_leaves([given, layout]) if isinstance(leaf, Tensor)]
        matrices = [weight for dictionary in dictionaries for weight in dictionary.parameters()]
        part = measured_part(call, block, [x, self.ids, *shared, *matrices], self.setting)
        if given is None and self.first_sizes is not None:
            shape, dtype = self.first_sizes
            self.value_residual = torch.empty(shape, dtype=dtype, requires_grad=True)
        return dataclasses.replace(
            part,
            received=self.received,
            offloaded=host.held,
            input_offloaded=host.held_of_input,
            input_let_go=0 if keeps_input or host.held_of_input else bytes_of(x),
        )


def shared_layouts(
    model: LanguageModel, ids: Tensor, slices: LastSlice | None = None
) -> tuple[dict[LayoutNeeds, Layout], int]:
    """The layouts that a model's forward pass makes, and their bytes.

    Args:
        model: any.
        ids: documents [B, T] of a pass.
        slices: if these rows are slices.
    """
    made = layouts(set(filter(None, map(needs_of, model.mixers()))), ids, ids if slices is None else None, None, slices)
    leaves = {id(x): x for x in tree_leaves(list(made.values())) if isinstance(x, Tensor)}
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in leaves.values()}
    return made, sum(storages.values())


def _ends(model: LanguageModel, setting: Setting) -> Ends:
    tied = model.head.weight is model.embedding.weight
    materialise(model, setting)
    if tied:
        model.head.weight = model.embedding.weight
    tokens = torch.empty(setting.rows, setting.length, dtype=torch.int64)
    with autocast(setting):
        dtype = model.embedding_norm(model.embedding(tokens)).dtype
        soft = None if setting.hard_share is None else _soft_targets(model, tokens)
    of_teacher = [] if soft is None else [soft.hidden, soft.weight]

    def call() -> tuple[Tensor, list[Tensor], Any]:
        output = model(tokens, tokens, soft=soft)
        further = [*output.losses.values(), *([] if output.log_normalisers is None else [output.log_normalisers])]
        if output.divergences is None:
            return output.token_losses, further, None
        return output.divergences, [*further, *([output.token_losses] if setting.hard_share else [])], None

    return Ends(measured_part(call, model, [tokens, *of_teacher], setting), dtype)


def _soft_targets(model: LanguageModel, tokens: Tensor) -> SoftTargets:
    """A teacher's distributions, of the sizes of the model's own."""
    with torch.no_grad():
        hidden = model(tokens).hidden
    return SoftTargets(hidden, torch.empty_like(model.head.weight, requires_grad=False), model.logit_softcap, 1.0)


def materialise(module: nn.Module, setting: Setting) -> None:
    """Replace tensors on the meta device by fake ones, weights in the dtype of the forward pass."""
    module.train()
    kept = {id(buffer) for buffer in module.buffers()} if setting.precision != "bf16-true" else set()
    module._apply(lambda x: empty_like(x, None if id(x) in kept else setting.weight_dtype))


def measured_part(
    call: Callable[[], tuple[Tensor, list[Tensor], Any]], module: nn.Module, inputs: list[Tensor], setting: Setting
) -> Part:
    """Run forward and backward, and measure the memory that is held.

    Args:
        call: gives the output, further losses, and other tensors for later layers.
        module: its weights and buffers exist already.
        inputs: further tensors that exist already.
        setting: how it is run.
    """
    weights = list(module.parameters())
    functions = gpu_functions() if setting.device == "cuda" else contextlib.nullcontext()
    with Ledger([*weights, *module.buffers(), *inputs]) as ledger, autocast(setting), functions:
        call()
        before = ledger.mark()  # allocated by a first call for all later ones
        output, losses, others = call()
        kept = ledger.live - before - bytes_of(output)
        forward, moved, asked = ledger.peak - ledger.live, ledger.moved, ledger.flops
        if setting.accumulates:
            for weight in weights:
                weight.grad = empty_like(weight)
        roots = [output, *losses]
        gradients = [empty_like(root) for root in roots]
        del losses, others
        start = ledger.mark()
        torch.autograd.backward(roots, gradients)
        backward = ledger.peak - start
        moved += ledger.moved
        again = max(0.0, ledger.flops / asked - 2) if asked else 0.0
    return Part(
        output=bytes_of(output),
        kept=kept,
        forward=forward,
        backward=backward,
        gradients=bytes_of(*(weight.grad for weight in weights if weight.grad is not None)),
        parameters=sum(weight.numel() for weight in weights),
        moved=moved,
        again=again,
    )


@contextlib.contextmanager
def autocast(setting: Setting) -> Iterator[None]:
    """Autocast as Lightning enters it, but without the cache of rounded weights."""
    mixed = setting.precision == "bf16-mixed"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
        yield


@dataclass(frozen=True)
class OptimizerNeeds:
    """Bytes that optimizers need for undivided weights.

    Attributes:
        state: from one step to the next.
        working: the most that a step takes besides.
        exchanged: what a step takes besides that if weights are divided, over all processes together.
    """

    state: int
    working: int
    exchanged: int = 0


def optimizer_needs(
    weights: Mapping[str, nn.Parameter], chosen: Choice, dtype: torch.dtype, device: Literal["cuda", "cpu"]
) -> OptimizerNeeds:
    """Measure a second step, because the first one makes the optimizer's state.

    Args:
        weights: those that learn, on the meta device, by name.
        chosen: the configuration's optimizer.
        dtype: of weights and gradients.
        device: Muon iterates in bfloat16 on "cuda".
    """
    with FakeTensorMode():
        weights = {name: _fake(weight, dtype) for name, weight in weights.items()}
        optimizers = chosen.build(parameters=weights)
        for optimizer in optimizers:
            if device == "cuda" and isinstance(optimizer, BatchedMuon):  # fake tensors are on a CPU
                optimizer.iterated_in = torch.bfloat16
            optimizer.step()
        leaves = [x for optimizer in optimizers for x in tree_leaves(list(optimizer.state.values()))]
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
        with Ledger([*weights.values(), *gradients, *tensors]) as ledger:
            for optimizer in optimizers:
                optimizer.step()
        # Of each matrix the rows that are sent, those that are received, and the whole one made of them.
        matrices = [weight for kind in optimizers if isinstance(kind, BatchedMuon) for weight in kind.state]
        size = 2 if device == "cuda" else dtype.itemsize
    return OptimizerNeeds(bytes_of(*tensors), ledger.peak, 3 * size * sum(weight.numel() for weight in matrices))


def _fake(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    fake = nn.Parameter(empty_like(weight, dtype))
    fake.grad = empty_like(weight, dtype)
    set_recipe(fake, recipe_of(weight))
    return fake
