"""Mixers that leak, one for each mechanism of selection: what the causality benchmark must find.

A control leaks as a published or an obvious form of a mechanism does. To add one, write a class that leaks and an entry
in `CONTROLS`; to say that a mixer selects by a mechanism, an entry in `MECHANISMS`. A test audits every control, and
refuses a mixer of `configs/mixer` that selects by content and names no control.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longmix.mixers.flash import Flash
from longmix.mixers.moba import MoBA
from longmix.mixers.parts.base import Mixer, MixerOutput, ModelShape
from longmix.mixers.parts.head_options import Selection
from longmix.mixers.parts.routing_modes import LEAKY
from longmix.mixers.scatterbrain_content import ScatterbrainContent
from longmix.mixers.sparse_flash import SparseFlash
from longmix.mixers.sparsek import SparseK

HERE = "benchmarks.causality_controls"


@dataclass(frozen=True)
class LeakyControl:
    """One control.

    Attributes:
        mixer: the file of `configs/mixer` whose settings it begins from; None for a class without settings.
        settings: its own, `_target_` among them where the class is another.
        kinds: the kinds of leak that an audit finds, see `longmix.analysis.causality.Finding`.
    """

    mixer: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("placement", "selection")


CONTROLS: dict[str, LeakyControl] = {
    "routing, as published": LeakyControl("routing", {"mode": LEAKY}),
    "buckets of equal size": LeakyControl("sparse_flash", {"_target_": f"{HERE}.EqualBuckets"}),
    "hash centred on the row": LeakyControl("scatterbrain_content", {"_target_": f"{HERE}.RowCentred"}),
    "blocks by means that reach further": LeakyControl("moba", {"_target_": f"{HERE}.WiderMeans", "top_k": 2}),
    "outliers of the row": LeakyControl("sparsek", {"_target_": f"{HERE}.RowOutliers"}, kinds=("selection",)),
    "heads that choose tokens": LeakyControl("flash", {"_target_": f"{HERE}.HeadsChoose"}),
    "upper half of the row": LeakyControl(settings={"_target_": f"{HERE}.UpperHalf"}),
    "mean of the row": LeakyControl(settings={"_target_": f"{HERE}.RowMean"}, kinds=("content", "placement")),
}
"""By name: what leaks."""

MECHANISMS: dict[str, str] = {
    "routing": "routing, as published",
    "sparse_flash": "buckets of equal size",
    "sparse_flash_drop": "upper half of the row",
    "hyper": "buckets of equal size",
    "moba": "blocks by means that reach further",
    "sparsek": "outliers of the row",
    "nsa": "blocks by means that reach further",
    "scatterbrain_content": "hash centred on the row",
}
"""The control of each mixer that selects by content, by the mixer's file in `configs/mixer`."""


class Control(Mixer):
    """A mixer that leaks and remembers nothing: it is looked at in full passes alone."""

    leaky = True

    def init_state(self, batch: int) -> None:
        """There is none."""

    def state_bytes(self, length: int) -> int:
        """See `Mixer.state_bytes`."""
        return 0

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return 2 * length * sum(weight.numel() for weight in self.parameters())


class UpperHalf(Control):
    """Lets a token through if its score is in the upper half of its row, as in Mixture-of-Depths (Raposo et al. 2024,
    arXiv 2404.02258).
    """

    def __init__(self, shape: ModelShape, layer_index: int) -> None:
        super().__init__()
        self.score = nn.Linear(shape.d_model, 1, bias=False)
        self.output = nn.Linear(shape.d_model, shape.d_model, bias=False)

    def forward(self, x: Tensor, *, state: Any = None, document_ids: Tensor | None = None) -> MixerOutput:
        """See `Mixer.forward`; there is no state."""
        score = self.score(x)
        chosen = score >= score.median(1, keepdim=True).values
        return MixerOutput(self.output(x * chosen * score.sigmoid()))


class RowMean(Control):
    """The mean of the whole row, as a block that is summarised before it is complete."""

    def __init__(self, shape: ModelShape, layer_index: int) -> None:
        super().__init__()
        self.output = nn.Linear(shape.d_model, shape.d_model, bias=False)

    def forward(self, x: Tensor, *, state: Any = None, document_ids: Tensor | None = None) -> MixerOutput:
        """See `Mixer.forward`; there is no state."""
        return MixerOutput(self.output(x.mean(1, keepdim=True).expand_as(x)))


class EqualBuckets(SparseFlash):
    """Buckets that the tokens of a row fill evenly, by the rank of a projection in the whole row, as HyperAttention
    (Han et al. 2023, arXiv 2310.05869) cuts its sorted keys into blocks.
    """

    leaky = True

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """Label queries and keys by the quarter of their row that they rank in."""
        return Selection(self._quarters(query), self._quarters(key))

    @torch.no_grad()
    def _quarters(self, heads: Tensor) -> Tensor:
        rank = heads[..., 0].argsort(1).argsort(1)
        return (4 * rank // heads.shape[1]).int().unsqueeze(-1)


class RowCentred(ScatterbrainContent):
    """Hashes less the mean of their row, where ours has a running mean of training."""

    leaky = True

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """Hash queries and keys less the mean over the whole row."""
        return Selection(*(self.hash((heads - heads.mean(1, keepdim=True)).detach()) for heads in (query, key)))


class WiderMeans(MoBA):
    """Blocks are chosen by the mean over themselves and the block behind, as poolings that overlap."""

    leaky = True

    def _chosen(self, query: Tensor, means: Tensor, first: Tensor, end: Tensor) -> Tensor:
        return super()._chosen(query, means + means.roll(-1, 1), first, end)


class RowOutliers(SparseK):
    """Keeps the keys whose scores stand out of the whole row, as statistics of a prompt choose the keys of a cache that
    is compressed.
    """

    leaky = True

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """Score the keys by the distance of their scores from the median of the row."""
        score = super().select(x, query, key, positions).key_labels
        assert score is not None
        score = score + x[..., :1]  # learned scores begin alike
        return Selection(key_labels=(score - score.detach().median(1, keepdim=True).values).abs())


class HeadsChoose(Flash):
    """A mixture of heads in which each head takes the half of its row's tokens that scores highest, as experts choose
    tokens (Zhou et al. 2022, arXiv 2202.09368); MoH (Jin et al. 2024, arXiv 2410.11842) lets a token choose its heads.
    """

    leaky = True

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """A gate of 0 on the heads that did not choose a token, from the query's first channel as its score."""
        score = query[..., 0]
        chosen = score.detach().argsort(1).argsort(1) >= score.shape[1] // 2
        return Selection(query_gate=chosen * score.sigmoid())
