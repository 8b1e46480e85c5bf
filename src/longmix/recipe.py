"""How a parameter wants to be trained, carried on the parameter itself.

A mixer knows best which of its weights take weight decay, a larger learning rate, or no matrix optimizer. It says so
where it creates the weight; the optimizer builders read it back and know nothing about mixers.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

_ATTRIBUTE = "_longmix_recipe"

Role = Literal["matrix", "embedding", "scalar"]


@dataclass(frozen=True)
class Recipe:
    """Training recipe of one parameter.

    Attributes:
        role: "matrix" for hidden weight matrices (Muon may take them), "embedding" for token embedding and head,
            "scalar" for norms, biases and gates.
        learning_rate_multiplier: factor on the optimizer's learning rate for this parameter.
        weight_decay: whether decoupled weight decay applies.
    """

    role: Role
    learning_rate_multiplier: float = 1.0
    weight_decay: bool = True


def set_recipe(parameter: Tensor, recipe: Recipe) -> None:
    """Attach `recipe` to `parameter`."""
    setattr(parameter, _ATTRIBUTE, recipe)


def recipe_of(parameter: Tensor) -> Recipe:
    """The attached recipe, else the usual one: matrices decay, vectors and scalars do not."""
    recipe = getattr(parameter, _ATTRIBUTE, None)
    if recipe is not None:
        return recipe
    is_matrix = parameter.ndim == 2
    return Recipe(role="matrix" if is_matrix else "scalar", weight_decay=is_matrix)
