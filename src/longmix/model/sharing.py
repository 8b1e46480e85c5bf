"""Projections of all layers made of a few matrices ("MASA", arXiv 2508.04581).

    W_l = sum_s c_ls D_s        l: layer, s = 1 .. S, for each name of a projection a dictionary D of its own

With S = N / 3 atoms for N layers, queries, keys and values have a third of their weights. The layers' coefficients are
parameters, or what an MLP makes of a trained vector for each layer, as in the paper.

Notable: atoms begin as the weights of the first S layers, and the coefficients of neighbouring layers near one atom, as
unit vectors, so that a weight has the variance that its mixer gave it; random unit vectors, which an MLP makes, learn
more slowly (docs/shared_projections.md). An atom is a matrix of its own, so that Muon takes each alone, and belongs to
the model, so that FSDP gathers and checkpoints hold it once. Coefficients take no weight decay. No layer keeps a weight
that it formed: see `longmix.model.products`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import Mixer
from longmix.model.packing import packed_once
from longmix.model.products import combined, product
from longmix.recipe import Recipe, recipe_of, set_recipe

WIDTH = 64
"""Width of a layer's vector, and of the MLP that makes coefficients of it."""

LEARNED = Recipe("scalar", weight_decay=False)
"""The recipe of coefficients, and of what makes them."""

ELSEWHERE = 0.1
"""What a plain coefficient begins with, next to 1 for the atom that its layer is near; the vector then gets norm 1."""


@dataclass(frozen=True)
class Sharing:
    """Which projections share matrices; the words `model.share.*`.

    Attributes:
        names: of linear layers as the mixers call them, such as query, key, value, output; null shares none.
        atoms: matrices of each name, fewer than there are layers.
        coefficients: "plain" parameters, or an "mlp" of a vector for each layer.
    """

    names: list[str] | None = None
    atoms: int | None = None
    coefficients: Literal["plain", "mlp"] = "plain"


NOTHING_SHARED = Sharing()


class Dictionary(nn.Module):
    """The matrices of one name, and what makes coefficients unless layers have their own.

    Args:
        atoms: [out, in] each; they become trainable parameters of this module.
        layers: how many layers share them.
        coefficients: see `Sharing`.
    """

    def __init__(self, atoms: Iterable[nn.Parameter], layers: int, coefficients: Literal["plain", "mlp"]) -> None:
        super().__init__()
        self.atoms, self.num_layers = nn.ParameterList(atoms), layers
        self.layers: nn.Parameter | None = None
        self.mlp: nn.Sequential | None = None
        if coefficients == "mlp":
            self.layers = nn.Parameter(torch.randn(layers, WIDTH))
            sizes = (nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
            self.mlp = nn.Sequential(*sizes, nn.Linear(WIDTH, len(self.atoms)))
            last = cast(nn.Linear, self.mlp[-1])
            with torch.no_grad():  # unit vectors on the mean, as plain coefficients begin
                factor = self.mlp(self.layers).square().sum(-1).mean().rsqrt()
                last.weight.mul_(factor)
                last.bias.mul_(factor)
            for weight in (self.layers, *self.mlp.parameters()):
                set_recipe(weight, LEARNED)

    def made_for(self, place: int) -> Tensor:
        """[S], the coefficients that the MLP makes for the layer at this place."""
        assert self.mlp is not None and self.layers is not None
        coefficients: Tensor = self.mlp(self.layers[place])
        return coefficients


class SharedLinear(nn.Linear):
    """A linear layer whose weight is a combination of the matrices of a dictionary.

    Args:
        layer: in whose place it comes; its bias stays.
        dictionary: no submodule of this one, since it belongs to the model.
        place: number of the layer among those that share the dictionary.

    Attributes:
        packs: keep the input in 8 bits.
    """

    def __init__(self, layer: nn.Linear, dictionary: Dictionary, place: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("bias", cast(nn.Parameter | None, layer.bias))
        self.place, self.packs = place, False
        self._dictionary = (dictionary,)
        self.coefficients: nn.Parameter | None = None
        if dictionary.mlp is None:
            self.coefficients = nn.Parameter(torch.full((len(dictionary.atoms),), ELSEWHERE))
            with torch.no_grad():
                self.coefficients[place * len(dictionary.atoms) // dictionary.num_layers] = 1.0
                self.coefficients.div_(self.coefficients.norm())
            set_recipe(self.coefficients, LEARNED)

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary."""
        return self._dictionary[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in], formed anew each time, with gradients for atoms and coefficients."""
        return combined(self._coefficients(), list(self.dictionary.atoms))

    def _coefficients(self) -> Tensor:
        return self.dictionary.made_for(self.place) if self.coefficients is None else self.coefficients

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not (self.training and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)
        return product(
            x, self.bias, self._coefficients(), list(self.dictionary.atoms), packed_once(x) if self.packs else None
        )


def share_projections(mixers: list[Mixer], sharing: Sharing) -> nn.ModuleDict:
    """Put shared layers in the place of the named ones of all mixers; returns the dictionaries by name.

    Layers of a pattern whose mixers lack a name have no part in it.

    Raises:
        ConfigError: a name that no mixer has, or with several shapes; or a number of atoms that makes no sense.
    """
    assert sharing.names is not None
    return nn.ModuleDict(
        {dictionary_name(name): _shared(mixers, name, sharing) for name in dict.fromkeys(sharing.names)}
    )


def _shared(mixers: list[Mixer], name: str, sharing: Sharing) -> Dictionary:
    found = [(mixer, layer) for mixer in mixers if (layer := _linear(mixer, name)) is not None]
    if not found:
        known = dict.fromkeys(
            own for mixer in mixers for own, layer in mixer.named_modules() if isinstance(layer, nn.Linear)
        )
        raise ConfigError(
            f"model.share.names has {name!r}, and the linear layers of the mixer are {', '.join(known) or 'none'}."
        )
    shapes = {tuple(layer.weight.shape) for _, layer in found}
    if len(shapes) > 1:
        raise ConfigError(
            f"model.share.names has {name!r}, whose weights have different shapes, {sorted(shapes)}, so no layers can "
            "share them; leave it out, or give the mixers of the pattern equal sizes."
        )
    if sharing.atoms is None or not 1 <= sharing.atoms <= len(found):
        raise ConfigError(
            f"model.share.atoms={'null' if sharing.atoms is None else sharing.atoms} must be from 1 to {len(found)}, "
            f"the layers that share {name!r}."
        )
    weights = [cast(nn.Parameter, layer.weight) for _, layer in found]
    atoms = weights[: sharing.atoms]
    for atom in atoms:
        set_recipe(atom, recipe_of(atom))
    dictionary = Dictionary(atoms, len(found), sharing.coefficients)
    for place, (mixer, layer) in enumerate(found):
        above, _, last = name.rpartition(".")
        setattr(mixer.get_submodule(above), last, SharedLinear(layer, dictionary, place))
    return dictionary


def _linear(mixer: Mixer, name: str) -> nn.Linear | None:
    """The linear layer of this name; None if there is none."""
    return next((part for own, part in mixer.named_modules() if own == name and type(part) is nn.Linear), None)


def dictionary_name(name: str) -> str:
    """The name of a dictionary among the model's modules, which may have no dots."""
    return name.replace(".", "_")


def check_sharing(sharing: Sharing) -> bool:
    """Whether layers share anything.

    Raises:
        ConfigError: atoms without names.
    """
    if not sharing.names and sharing.atoms is not None:
        raise ConfigError(
            f"model.share.atoms={sharing.atoms} needs model.share.names=[query,key,value] or other names of "
            "projections; or leave it null."
        )
    return bool(sharing.names)


def dictionaries_of(module: nn.Module) -> list[Dictionary]:
    """The dictionaries that layers of a module use, each once."""
    found = {id(part.dictionary): part.dictionary for part in module.modules() if isinstance(part, SharedLinear)}
    return list(found.values())
