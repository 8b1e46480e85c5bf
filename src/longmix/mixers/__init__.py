"""One file per sequence mixer: projections, gates, ordering, state; an engine does the work.

The classes are exported here, as `longmix.mixers.SlidingWindow`, and imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longmix.mixers.block_sparse import BlockSparse as BlockSparse
    from longmix.mixers.comba import Comba as Comba
    from longmix.mixers.combiner import Combiner as Combiner
    from longmix.mixers.combiner_log import CombinerLog as CombinerLog
    from longmix.mixers.deltanet import DeltaNet as DeltaNet
    from longmix.mixers.flash import Flash as Flash
    from longmix.mixers.fox import Fox as Fox
    from longmix.mixers.gated_deltanet import GatedDeltaNet as GatedDeltaNet
    from longmix.mixers.gated_deltanet2 import GatedDeltaNet2 as GatedDeltaNet2
    from longmix.mixers.gated_deltaproduct import GatedDeltaProduct as GatedDeltaProduct
    from longmix.mixers.gla import GLA as GLA
    from longmix.mixers.hgrn2 import HGRN2 as HGRN2
    from longmix.mixers.hyper import Hyper as Hyper
    from longmix.mixers.kda import KDA as KDA
    from longmix.mixers.lightning import Lightning as Lightning
    from longmix.mixers.lla import LLA as LLA
    from longmix.mixers.mamba2 import Mamba2 as Mamba2
    from longmix.mixers.mlstm_tfla import MLSTMTFLA as MLSTMTFLA
    from longmix.mixers.moba import MoBA as MoBA
    from longmix.mixers.nsa import NSA as NSA
    from longmix.mixers.parallax import Parallax as Parallax
    from longmix.mixers.parts.base import Mixer as Mixer
    from longmix.mixers.parts.base import MixerOutput as MixerOutput
    from longmix.mixers.parts.base import ModelShape as ModelShape
    from longmix.mixers.parts.linear import LinearMixer as LinearMixer
    from longmix.mixers.parts.recurrent import RecurrentMixer as RecurrentMixer
    from longmix.mixers.parts.softmax import SoftmaxAttention as SoftmaxAttention
    from longmix.mixers.ponet import PoNet as PoNet
    from longmix.mixers.qlstm import QLSTM as QLSTM
    from longmix.mixers.retention import Retention as Retention
    from longmix.mixers.routing import Routing as Routing
    from longmix.mixers.rwkv7 import RWKV7 as RWKV7
    from longmix.mixers.scatterbrain import Scatterbrain as Scatterbrain
    from longmix.mixers.scatterbrain_content import ScatterbrainContent as ScatterbrainContent
    from longmix.mixers.simple_gla import SimpleGLA as SimpleGLA
    from longmix.mixers.sliding_window import SlidingWindow as SlidingWindow
    from longmix.mixers.sparse_flash import SparseFlash as SparseFlash
    from longmix.mixers.sparse_flash_drop import SparseFlashDrop as SparseFlashDrop
    from longmix.mixers.sparsek import SparseK as SparseK
    from longmix.mixers.tensor import TensorAttention as TensorAttention
    from longmix.mixers.wersa import Wersa as Wersa

_PLACES = {
    "BlockSparse": "longmix.mixers.block_sparse",
    "Comba": "longmix.mixers.comba",
    "Combiner": "longmix.mixers.combiner",
    "CombinerLog": "longmix.mixers.combiner_log",
    "DeltaNet": "longmix.mixers.deltanet",
    "Flash": "longmix.mixers.flash",
    "Fox": "longmix.mixers.fox",
    "GLA": "longmix.mixers.gla",
    "GatedDeltaNet": "longmix.mixers.gated_deltanet",
    "GatedDeltaNet2": "longmix.mixers.gated_deltanet2",
    "GatedDeltaProduct": "longmix.mixers.gated_deltaproduct",
    "HGRN2": "longmix.mixers.hgrn2",
    "Hyper": "longmix.mixers.hyper",
    "KDA": "longmix.mixers.kda",
    "LLA": "longmix.mixers.lla",
    "Lightning": "longmix.mixers.lightning",
    "LinearMixer": "longmix.mixers.parts.linear",
    "MLSTMTFLA": "longmix.mixers.mlstm_tfla",
    "Mamba2": "longmix.mixers.mamba2",
    "Mixer": "longmix.mixers.parts.base",
    "MixerOutput": "longmix.mixers.parts.base",
    "MoBA": "longmix.mixers.moba",
    "ModelShape": "longmix.mixers.parts.base",
    "Parallax": "longmix.mixers.parallax",
    "NSA": "longmix.mixers.nsa",
    "PoNet": "longmix.mixers.ponet",
    "QLSTM": "longmix.mixers.qlstm",
    "RWKV7": "longmix.mixers.rwkv7",
    "RecurrentMixer": "longmix.mixers.parts.recurrent",
    "Retention": "longmix.mixers.retention",
    "Routing": "longmix.mixers.routing",
    "Scatterbrain": "longmix.mixers.scatterbrain",
    "ScatterbrainContent": "longmix.mixers.scatterbrain_content",
    "SimpleGLA": "longmix.mixers.simple_gla",
    "SlidingWindow": "longmix.mixers.sliding_window",
    "SoftmaxAttention": "longmix.mixers.parts.softmax",
    "SparseFlash": "longmix.mixers.sparse_flash",
    "SparseFlashDrop": "longmix.mixers.sparse_flash_drop",
    "SparseK": "longmix.mixers.sparsek",
    "TensorAttention": "longmix.mixers.tensor",
    "Wersa": "longmix.mixers.wersa",
}
"""The module of each class."""

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
