"""Register an engine's forward and backward as torch operators, so that autograd and torch.compile see two nodes.

torch's `FlopCounterMode` counts these nodes by their mathematics, not by how a backend tiles them. A forward counts two
operations for each multiply-add of a score, a value, an update or a reading of a state. A backward counts twice its
forward, and nothing for what it computes again. So a count depends on neither backend nor chunk size. Where positions
decide what a token sees, it equals what the mixers' own `flops` say; where content decides, it counts the pairs of the
call at hand. The count reads bounds, which waits for the device. Fake tensors count as plain causal rows. Steps of a
recurrence on a CPU are plain torch code, of which the counter sees the readings of the state alone.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, Self, TypeVar, get_type_hints

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import register_flop_formula

from longmix_kernels.launch import with_room

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., Tensors]


class Inputs:
    """The arguments of one call: a frozen dataclass of tensors and numbers, in the order that the operator has them."""

    @classmethod
    def schema(cls) -> str:
        """Return the argument list of the torch operator, as torch's schemas write it."""
        hints = get_type_hints(cls)
        return ", ".join(
            f"{_SCHEMA_TYPES[hints[field.name]]} {field.name}{'=None' if field.default is None else ''}"
            for field in fields(cls)  # type: ignore[arg-type]
        )

    def flat(self) -> tuple[Any, ...]:
        """Return the values of the arguments that `schema` names, in its order."""
        return tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def first(self) -> torch.Tensor:
        """Return the tensor whose device decides."""
        query: torch.Tensor = self.query  # type: ignore[attr-defined]
        return query

    @classmethod
    def of(cls, flat: Iterable[Any]) -> Self:
        """Return the inputs of which `flat` returned these values."""
        return cls(*flat)


AnyInputs = TypeVar("AnyInputs", bound=Inputs)

LONGEST_STEP = 8
"""The most tokens that a recurrent engine takes one after the other instead of in chunks, where none is differentiated:
a token of generation, with all its writes, is one call of the recurrence."""

_SCHEMA_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    float | None: "float?",
    int: "int",
    int | None: "int?",
}


def deferred(path: str) -> Function:
    """Return a function that calls another one, which is given by its dotted path.

    A call imports the module, not before, since importing Triton takes long.
    """
    module, _, name = path.rpartition(".")

    def call(*arguments: Any) -> Tensors:
        return getattr(importlib.import_module(module), name)(*arguments)

    return call


def is_step(inputs: Inputs) -> bool:
    """Say whether a recurrent engine takes the tokens of a call one after the other.

    They are few, no gradient is asked for, and each row is one document; a single token always is.
    """
    length = inputs.first().shape[1]
    if length > LONGEST_STEP or (length > 1 and inputs.document_ids is not None):  # type: ignore[attr-defined]
        return False
    return not (
        torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in vars(inputs).values())
    )


def definition(forward: Callable[[AnyInputs], Tensors]) -> Callable[[AnyInputs], Tensors]:
    """Return an engine's `reference_forward` with autocast off; it is no operator, so that autograd sees into it."""

    def call(inputs: AnyInputs) -> Tensors:
        kind = inputs.first().device.type
        if not torch.is_autocast_enabled(kind):
            return forward(inputs)
        with torch.autocast(kind, enabled=False):
            return forward(inputs)

    return call


def implementation(engine: str, name: str, inputs: type[AnyInputs], **options: Any) -> Callable[[AnyInputs], Tensors]:
    """Register an engine's "blocked" or "triton" forward and backward, and return a function that calls the forward.

    Both functions have fixed names: `blocked_forward` and `blocked_backward` are in the engine's module `blocked`, and
    `triton_forward` and `triton_backward` each in the module of its name.

    Args:
        engine: the engine's package.
        name: "blocked" or "triton".
        inputs: the class of the inputs.
        options: the other arguments of `differentiable`.
    """
    forward, backward = (f"{name}{direction if name == 'triton' else ''}" for direction in ("_forward", "_backward"))
    return differentiable(
        f"longmix::{engine}_{name}",
        inputs,
        forward=with_room(deferred(f"longmix_kernels.{engine}.{forward}.{name}_forward")),
        backward=with_room(deferred(f"longmix_kernels.{engine}.{backward}.{name}_backward")),
        **options,
    )


def differentiable(
    operator: str,
    inputs: type[AnyInputs],
    *,
    forward: Callable[[AnyInputs], Tensors],
    backward: Function,
    empty: Callable[[AnyInputs], Tensors],
    results: int,
    incoming: int,
    saved: Sequence[int],
    outgoing: int,
    flops: Callable[[AnyInputs], int],
    check: Callable[[AnyInputs], None] = lambda _: None,
) -> Callable[[AnyInputs], Tensors]:
    """Register `operator` and `operator`_backward, both with autocast off, and return a function that calls the first.

    Args:
        operator: the operator's name with its namespace, such as "longmix::delta_blocked".
        inputs: the class of the inputs; its first field is the tensor whose device decides.
        forward: computes the results from the inputs.
        backward: computes the gradients of the first `outgoing` inputs, in their shapes and dtypes; it returns an empty
            tensor for an input that is None. It gets the inputs, the gradients of the first `incoming` results, and the
            saved results. None stands for a gradient of zero, except for the first result.
        empty: makes the results without computing them.
        results: how many tensors the forward returns.
        incoming: how many results have a gradient; they come first.
        saved: which results the backward gets.
        outgoing: how many inputs have a gradient; they come first and are tensors.
        flops: what `FlopCounterMode` counts for a forward.
        check: called before the forward, when tensors have values.
    """
    before = incoming + len(saved)
    node = _node(operator, inputs, forward=forward, empty=empty, results=results, flops=flops, check=check)

    def run_backward(grad: torch.Tensor, *rest: Any) -> Tensors:
        with torch.autocast(grad.device.type, enabled=False):
            return backward(inputs.of(rest[before - 1 :]), grad, *rest[: before - 1])

    grads = ", ".join(f"Tensor{'?' if index else ''} grad_{index}" for index in range(incoming))
    kept = "".join(f", Tensor saved_{index}" for index in saved)
    schema = f"({grads}{kept}, {inputs.schema()}) -> ({', '.join(['Tensor'] * outgoing)})"
    backward_node = torch.library.custom_op(f"{operator}_backward", run_backward, mutates_args=(), schema=schema)

    @backward_node.register_fake
    def _(grad: torch.Tensor, *rest: Any) -> Tensors:
        given = rest[before - 1 :][:outgoing]
        return tuple(grad.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)

    def save(ctx: Any, inputs: tuple, output: Tensors) -> None:
        ctx.places = [index for index, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.save_for_backward(*(output[index] for index in saved), *(inputs[index] for index in ctx.places))
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        kept = ctx.saved_tensors  # read once, since activation checkpointing hands them out only once
        results, tensors = kept[: len(saved)], kept[len(saved) :]
        flat = list(ctx.others)
        for index, x in zip(ctx.places, tensors, strict=True):
            flat[index] = x
        first = torch.zeros_like(empty(inputs.of(flat))[0]) if grads[0] is None else grads[0]
        found = backward_node(first, *grads[1:incoming], *results, *flat)
        given = [None if x is None else grad for grad, x in zip(found, flat[:outgoing], strict=True)]
        return *given, *(None for _ in flat[outgoing:])

    node.register_autograd(differentiate, setup_context=save)
    _count(f"{operator}_backward", lambda *flat: 2 * flops(inputs.of(flat[before:])))
    return lambda call_inputs: node(*call_inputs.flat())


def computed(operator: str, inputs: type[AnyInputs], **options: Any) -> Callable[[AnyInputs], Tensors]:
    """Register an operator without a backward, with autocast off, and return a function that calls it.

    Args:
        operator, inputs: as those of `differentiable`.
        options: `forward`, `empty`, `results`, `flops` and perhaps `check`, likewise; `results` is None for a list of
            tensors, whose number the inputs decide.
    """
    node = _node(operator, inputs, **options)
    return lambda call_inputs: node(*call_inputs.flat())


def _node(
    operator: str,
    inputs: type[AnyInputs],
    *,
    forward: Callable[[AnyInputs], Tensors],
    empty: Callable[[AnyInputs], Tensors],
    results: int | None,
    flops: Callable[[AnyInputs], int],
    check: Callable[[AnyInputs], None] = lambda _: None,
) -> Any:
    """Register an operator without a backward, with autocast off, and return it; it takes the inputs one by one."""

    def run(first: torch.Tensor, *rest: Any) -> Tensors:
        with torch.autocast(first.device.type, enabled=False):
            call = inputs.of((first, *rest))
            check(call)
            found = forward(call)
            return found if results is not None else list(found)  # type: ignore[return-value]

    returned = "Tensor[]" if results is None else f"({', '.join(['Tensor'] * results)})"
    schema = f"({inputs.schema()}) -> {returned}"
    node = torch.library.custom_op(operator, run, mutates_args=(), schema=schema)
    node.register_fake(lambda *flat: empty(inputs.of(flat)) if results is not None else list(empty(inputs.of(flat))))
    _count(operator, lambda *flat: flops(inputs.of(flat)))
    return node


def _count(operator: str, formula: Callable[..., int]) -> None:
    """Let torch count the operations of an operator, by a formula of its arguments."""
    namespace, name = operator.split("::")

    def count(*flat: Any, out_val: Any = None) -> int:
        with unset_fake_temporarily():
            return formula(*flat)

    register_flop_formula(getattr(getattr(torch.ops, namespace), name), get_raw=True)(count)
