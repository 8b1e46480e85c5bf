"""Context parallelism for a mixer without support for slices: every process mixes the whole rows.

The slices of all processes are put together, the mixer runs over the rows from their beginning, and each process takes
its own slice of what comes out. So outputs, gradients and auxiliary losses are exact for any mixer; but neither its
work nor its memory is divided. A mixer that sets `sliced` takes `Slices` itself and does better.
"""

from typing import Any

from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.mixers.parts.base import Mixer, MixerOutput
from longmix.notices import notice


def takes_slices(mixer: Mixer, carries: bool) -> bool:
    """Whether a mixer takes `Slices` as its state.

    Args:
        mixer: any.
        carries: whether the rows go on from a state.
    """
    return mixer.sliced and (mixer.carries_in_slices or not carries)


def warn_of_whole_rows(model: nn.Module, carries: bool = False) -> None:
    """Warn of the mixers of a model that run over whole rows under context parallelism.

    Args:
        model: any.
        carries: whether rows go on from states.
    """
    mixers = [part for part in model.modules() if isinstance(part, Mixer)]
    carrying = [mixer for mixer in mixers if carries and mixer.sliced and mixer.state_is_bounded()]
    for name in sorted({type(mixer).__name__ for mixer in carrying if not takes_slices(mixer, True)}):
        notice(
            f"loop.carry_state=true with trainer.context_parallel: every process mixes whole rows in {name}, which "
            "is exact, but divides neither its work nor its memory."
        )
    for name in sorted({type(part).__name__ for part in mixers if not part.sliced}):
        notice(
            f"trainer.context_parallel divides neither the work nor the memory of {name}, as it does not set `sliced`: "
            "every process mixes whole rows, which is exact. docs/add_a_mixer.md says how a mixer takes slices."
        )


def over_whole_rows(mixer: Mixer, x: Tensor, slices: Slices, **shared: Tensor | None) -> MixerOutput:
    """The output of `mixer` for this process's slice x [B, T, D] of longer rows.

    Args:
        mixer: any.
        x: the slice.
        slices: where it lies.
        shared: tensors [B, T, ...] of the slice that the mixer takes besides, or None.
    """
    others: dict[str, Any] = {name: None if part is None else slices.whole(part) for name, part in shared.items()}
    output = mixer(slices.whole(x), state=slices.carried, document_ids=slices.whole_ids, **others)
    value_residual = None if output.value_residual is None else slices.own(output.value_residual)
    return MixerOutput(slices.own(output.y), output.state, output.losses, output.metrics, value_residual)
