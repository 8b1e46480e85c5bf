"""The table of mixers that the contract is checked for: one entry per variant, and every file in configs/mixer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from small_mixers import small_mixer

from longmix.config import Plain, build
from longmix.mixers.block_sparse import BlockSparse
from longmix.mixers.combiner import Combiner
from longmix.mixers.combiner_log import CombinerLog
from longmix.mixers.flash import Flash
from longmix.mixers.hgrn2 import HGRN2
from longmix.mixers.hyper import Hyper
from longmix.mixers.lla import LLA
from longmix.mixers.mamba2 import Mamba2
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.moba import MoBA
from longmix.mixers.nsa import NSA
from longmix.mixers.parallax import Parallax
from longmix.mixers.parts.base import Mixer, ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory
from longmix.mixers.parts.head_decay import HeadDecay
from longmix.mixers.routing import Routing
from longmix.mixers.rwkv7 import RWKV7, LowRank
from longmix.mixers.scatterbrain import Scatterbrain
from longmix.mixers.scatterbrain_content import ScatterbrainContent
from longmix.mixers.sliding_window import SlidingWindow
from longmix.mixers.sparse_flash import SparseFlash
from longmix.mixers.sparse_flash_drop import SparseFlashDrop
from longmix.mixers.sparsek import SparseK
from longmix.mixers.tensor import TensorAttention

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)

YARN: Any = {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_length": 16}

ALIBI: Any = {"rotary_base": None, "bias": "alibi"}

MIXERS: dict[str, Callable[[], Mixer]] = {
    "flash": lambda: Flash(SHAPE, 0),
    "flash-grouped": lambda: Flash(SHAPE, 0, num_kv_heads=1),
    "flash-no-norm": lambda: Flash(SHAPE, 0, qk_norm=False),
    "flash-no-positions": lambda: Flash(SHAPE, 0, rotary_base=None),
    "window-yarn-fraction": lambda: SlidingWindow(SHAPE, 0, window=7, rotary_fraction=0.5, **YARN),
    "window-1": lambda: SlidingWindow(SHAPE, 0, window=1),
    "window-7": lambda: SlidingWindow(SHAPE, 0, window=7),
    "window-longer-than-row": lambda: SlidingWindow(SHAPE, 0, window=500, num_kv_heads=1),
    "window-dilated": lambda: SlidingWindow(SHAPE, 0, window=3, dilation=[1, 2, 5]),
    "window-strided": lambda: SlidingWindow(SHAPE, 0, window=5, stride=3, dilation=2, num_kv_heads=1),
    "hash": lambda: SparseFlash(SHAPE, 0, buckets=4),
    "hash-grouped": lambda: SparseFlash(SHAPE, 0, buckets=4, num_kv_heads=1),
    "hash-shared": lambda: SparseFlash(SHAPE, 0, buckets=4, shared_qk=True),
    "hash-shared-strict": lambda: SparseFlash(SHAPE, 0, buckets=4, shared_qk=True, see_self=False),
    "hash-rounds-window": lambda: SparseFlash(SHAPE, 0, buckets=6, rounds=3, window=5),
    "drop-learned": lambda: SparseFlashDrop(SHAPE, 0, keep=0.5, num_kv_heads=1),
    "drop-learned-window": lambda: SparseFlashDrop(SHAPE, 0, keep=0.3, window=3),
    "drop-random": lambda: SparseFlashDrop(SHAPE, 0, keep=0.6, score="random"),
    "hyper": lambda: Hyper(SHAPE, 0, buckets=4, window=4, sample=0.4),
    "hyper-grouped": lambda: Hyper(SHAPE, 0, buckets=2, window=2, sample=0.7, num_kv_heads=1),
    "blocks-sink-local": lambda: BlockSparse(SHAPE, 0, layout="sink_local", block=16, sink=1, local=1),
    "blocks-stripe": lambda: BlockSparse(SHAPE, 0, layout="stripe", block=16, local=1, stride=2, num_kv_heads=1),
    "blocks-butterfly": lambda: BlockSparse(SHAPE, 0, layout="butterfly", block=16),
    "moba": lambda: MoBA(SHAPE, 0, block=4, top_k=3),
    "moba-grouped": lambda: MoBA(SHAPE, 0, block=3, top_k=2, num_kv_heads=1),
    "parallax": lambda: Parallax(SHAPE, 0, probe_std=0.2),
    "parallax-window-grouped-norm": lambda: Parallax(SHAPE, 0, window=7, probe_norm=True, num_kv_heads=1),
    "nsa": lambda: nsa(block=4, blocks=3, local=1, compress_block=4, compress_stride=2, window=5),
    "nsa-grouped": lambda: nsa(block=3, blocks=5, compress_block=3, compress_stride=1, window=3, num_kv_heads=1),
    "parallax-fourier-context": lambda: stirred(
        Parallax(SHAPE, 0, probe_std=0.2, bias="fourier", bias_rank=2, position="context", num_kv_heads=1)
    ),
    "moba-fourier-context-sinks": lambda: stirred(
        MoBA(SHAPE, 0, block=3, top_k=2, bias="fourier", bias_rank=2, position="context", sink_logits=True)
    ),
    "moba-forget-grouped": lambda: MoBA(SHAPE, 0, block=4, top_k=2, bias="forget", rotary_base=None, num_kv_heads=1),
    "nsa-context-sinks": lambda: stirred(
        nsa(block=3, blocks=3, compress_block=3, compress_stride=1, window=3, position="context", sink_logits=True)
    ),
    "sparsek-alibi-context-sinks": lambda: stirred(sparsek(bias="alibi", position="context", sink_logits=True)),
    "sparsek-forget-grouped": lambda: sparsek(bias="forget", rotary_base=None, num_kv_heads=1, gate="value"),
    "tensor-low-rank-sinks": lambda: stirred(
        TensorAttention(SHAPE, 0, window_1=3, window_2=5, bias="low_rank", bias_rank=2, sink_logits=True)
    ),
    "tensor-alibi-grouped": lambda: TensorAttention(SHAPE, 0, window_1=5, window_2=3, bias="alibi", num_kv_heads=1),
    "combiner-log-sinks": lambda: stirred(CombinerLog(SHAPE, 0, sink_logits=True)),
    "parallax-alibi-gated-heads": lambda: Parallax(SHAPE, 0, **ALIBI, output_gate="head", heads_shared=1, heads_kept=2),
    "lla-grouped": lambda: LLA(SHAPE, 0, num_kv_heads=1),
    "routing": lambda: routing(window=4, local_window=5),
    "routing-separate": lambda: routing(window=3, shared_qk=False, local_window=1),
    "routing-grouped": lambda: routing(window=5, shared_qk=False, num_kv_heads=1),
    "routing-two-clusters": lambda: routing(clusters=4, window=3, clusters_per_query=2, local_heads=0),
    "routing-full": lambda: routing(mode="argmax_full", clusters_per_query=2, window=1),
    "routing-prefix": lambda: routing(mode="prefix_topk", window=3, block=4),
    "routing-prefix-grouped": lambda: routing(
        mode="prefix_topk", window=2, block=3, shared_qk=False, num_kv_heads=1, local_heads=0
    ),
    "routing-threshold": lambda: routing(mode="threshold", clusters=4, window=3, share=0.4),
    "routing-threshold-separate": lambda: routing(mode="threshold", window=4, clusters_per_key=3, shared_qk=False),
    "scatterbrain": lambda: scatterbrain(),
    "scatterbrain-own-block": lambda: scatterbrain(past_blocks=0, num_kv_heads=1, one_softmax=True),
    "scatterbrain-single-tokens": lambda: scatterbrain(block=1, past_blocks=0, num_features=6, radius=0.5),
    "scatterbrain-sinks": lambda: scatterbrain(block=3, past_blocks=2, sinks=2),
    "scatterbrain-learned": lambda: scatterbrain(features="learned_exponential", radius=2.0),
    "scatterbrain-taylor": lambda: scatterbrain(features="taylor", num_features=7),
    "scatterbrain-elu": lambda: scatterbrain(features="elu", num_features=5, num_kv_heads=1),
    "scatterbrain-no-features": lambda: scatterbrain(num_features=0),
    "scatterbrain-summaries": lambda: scatterbrain(num_features=0, summaries=True),
    "scatterbrain-summaries-grouped": lambda: scatterbrain(
        num_features=0, summaries=True, past_blocks=0, block=3, sinks=1, num_kv_heads=1
    ),
    "combiner-grouped": lambda: Combiner(SHAPE, 0, block=3, num_kv_heads=1),
    "combiner-log-grouped": lambda: CombinerLog(SHAPE, 0, num_kv_heads=1),
    "scatterbrain-content": lambda: content(),
    "scatterbrain-content-grouped": lambda: content(block=2, past_blocks=0, window=2, num_kv_heads=1, sinks=1),
    "scatterbrain-content-no-features": lambda: content(num_features=0, one_softmax=True, buckets=2, window=30),
    "scatterbrain-content-summaries": lambda: content(num_features=0, summaries=True),
    "sparsek": lambda: sparsek(),
    "sparsek-own-block": lambda: sparsek(past_blocks=0, keep=7, gate="both", num_kv_heads=1),
    "sparsek-single-tokens": lambda: sparsek(block=1, keep=2, slope=0.0, gate="value"),
    "tensor-grouped": lambda: TensorAttention(SHAPE, 0, window_1=5, window_2=3, num_kv_heads=1),
    "window-forget-grouped": lambda: SlidingWindow(SHAPE, 0, window=7, bias="forget", num_kv_heads=1),
    "routing-forget": lambda: routing(window=4, local_window=5, bias="forget"),
    "flash-fourier-grouped": lambda: stirred(Flash(SHAPE, 0, bias="fourier", bias_rank=3, num_kv_heads=1)),
    "window-low-rank": lambda: stirred(SlidingWindow(SHAPE, 0, window=7, bias="low_rank", bias_rank=2)),
    "window-alibi-sinks": lambda: stirred(SlidingWindow(SHAPE, 0, window=9, **ALIBI, sink_logits=True)),
    "hyper-alibi-sinks": lambda: stirred(Hyper(SHAPE, 0, buckets=4, window=4, sample=0.4, **ALIBI, sink_logits=True)),
    "blocks-alibi-context": lambda: stirred(BlockSparse(SHAPE, 0, block=16, local=1, bias="alibi", position="context")),
    "routing-alibi-context": lambda: stirred(routing(window=4, local_window=5, bias="alibi", position="context")),
    "routing-prefix-fourier-sinks": lambda: stirred(
        routing(mode="prefix_topk", window=3, block=4, bias="fourier", bias_rank=2, sink_logits=True)
    ),
    "scatterbrain-sink-logits": lambda: stirred(scatterbrain(sink_logits=True)),
    "flash-gain-alibi-grouped": lambda: stirred(
        Flash(SHAPE, 0, **ALIBI, gain="fourier", bias_rank=2, sink_logits=True, num_kv_heads=1)
    ),
    "window-gain-gaps": lambda: stirred(SlidingWindow(SHAPE, 0, window=3, dilation=[1, 2, 5], gain="fourier")),
    "blocks-gain-context": lambda: stirred(
        BlockSparse(SHAPE, 0, block=16, local=1, gain="fourier", position="context")
    ),
    "flash-gated-heads": lambda: Flash(SHAPE, 0, output_gate="element", heads_shared=1, heads_kept=2),
    "window-heads-by-query": lambda: SlidingWindow(
        SHAPE, 0, window=7, qk_norm=False, heads_shared=1, heads_kept=1, heads_router="query_norm"
    ),
    "drop-gated-heads": lambda: SparseFlashDrop(SHAPE, 0, window=3, output_gate="head", heads_kept=2),
    "mlstm-sig": lambda: awake(MLSTMTFLA(SHAPE, 0)),
    "mlstm-exp": lambda: awake(MLSTMTFLA(SHAPE, 0, gate="exp", num_heads=3, norm="layer")),
    "mlstm-convolution": lambda: awake(MLSTMTFLA(SHAPE, 0, num_heads=2, convolution=4)),
    "lightning": lambda: HeadDecay(SHAPE, 0, decay="alibi", activation="silu", output_gate="sigmoid"),
    "retention": lambda: HeadDecay(SHAPE, 1, decay="retention", rotary_base=10_000.0, convolution=2),
    "retention-yarn": lambda: HeadDecay(SHAPE, 0, decay="retention", rotary_base=100.0, key_factor=1.0, **YARN),
    "simple-gla": lambda: HeadDecay(SHAPE, 0, decay="learned", key_factor=1.0),
    "simple-gla-normaliser": lambda: HeadDecay(SHAPE, 0, decay="learned", norm="none", normaliser="exponential"),
    "simple-gla-mixture": lambda: HeadDecay(SHAPE, 0, decay="learned", num_heads=6, heads_shared=1, heads_kept=2),
    "simple-gla-gaussian": lambda: HeadDecay(SHAPE, 0, decay="none", features="gaussian", landmarks=5, radius=2.0),
    "rwkv7": lambda: awake(RWKV7(SHAPE, 0, head_dim=16)),
    "rwkv7-later": lambda: awake(Later(SHAPE, 1, head_dim=16)),
    "deltanet": lambda: GatedMemory(SHAPE, 0, decay="none", output_gate="none", num_heads=3),
    "gated-deltanet": lambda: GatedMemory(SHAPE, 0, decay="head", output_gate="silu", key_factor=0.5),
    "kda": lambda: GatedMemory(SHAPE, 0, decay="channel", output_gate="low_rank", num_heads=2),
    "gla": lambda: GatedMemory(
        SHAPE, 1, decay="sigmoid", output_gate="silu", delta=False, key_factor=0.5, convolution=0
    ),
    "gated-deltanet-mixture": lambda: GatedMemory(
        SHAPE, 0, num_heads=2, num_value_heads=4, heads_shared=1, heads_kept=2
    ),
    "mamba2-mixture": lambda: Mamba2(SHAPE, 0, state_size=8, num_heads=4, heads_kept=2),
    "hgrn2-mixture": lambda: HGRN2(SHAPE, 1, num_heads=4, heads_shared=1, heads_kept=2),
    "delta-no-convolution": lambda: GatedMemory(SHAPE, 0, decay="sigmoid", output_gate="low_rank", convolution=0),
}


def nsa(**settings) -> NSA:
    mixer = NSA(SHAPE, 0, **settings)
    with torch.no_grad():
        mixer.gate.weight.normal_(std=0.3)
    return mixer


def routing(**settings) -> Routing:
    return Routing(SHAPE, 0, **{"clusters": 3, **settings})


def scatterbrain(**settings) -> Scatterbrain:
    return Scatterbrain(SHAPE, 0, **{"block": 4, "num_features": 8, **settings})


def content(**settings) -> ScatterbrainContent:
    return ScatterbrainContent(SHAPE, 0, **{"block": 4, "num_features": 8, "buckets": 4, "window": 3, **settings})


def sparsek(**settings) -> SparseK:
    mixer = SparseK(SHAPE, 0, **{"block": 3, "keep": 4, "past_blocks": 1, **settings})
    torch.nn.init.normal_(mixer.score.weight, std=SHAPE.d_model**-0.5)
    return mixer


class Later(RWKV7):
    """With a value of the first layer, which the model around a mixer would give it."""

    def forward(self, x, **options):
        return super().forward(x, value_residual=x.flip(-1), **options)


def stirred(mixer: Mixer) -> Mixer:
    """With no weight at zero, which would hide what is before it."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            if not parameter.abs().max() > 0:
                parameter.normal_(std=0.3)
    return mixer


def awake(mixer: Mixer) -> Mixer:
    """With weights that do something: what begins at zero, or at a bias of -10, hides what comes before it."""
    with torch.no_grad():
        if isinstance(mixer, MLSTMTFLA):
            mixer.input_gate.bias.fill_(1.0)
            asleep = [mixer.output_gate, mixer.input_gate, mixer.forget_gate]
        else:
            asleep = [mixer.output, *(thin.down for thin in mixer.modules() if isinstance(thin, LowRank))]
        for projection in asleep:
            projection.weight.normal_(std=SHAPE.d_model**-0.5)
    return mixer


def settings_of(path: Path) -> Plain:
    """What a file in configs/mixer sets."""
    node = OmegaConf.to_container(OmegaConf.load(path))
    return {str(name): value for name, value in node.items() if name != "defaults"}  # type: ignore[union-attr]


def configured(path: Path) -> Mixer:
    """The mixer of a file in configs/mixer, made small, with no weight at zero, which would hide what is before it."""
    mixer: Mixer = build(small_mixer(settings_of(path), 4), "mixer", shape=SHAPE, layer_index=0)
    if isinstance(mixer, MLSTMTFLA | RWKV7):
        return awake(mixer)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.dim() > 1 and not parameter.abs().max() > 0:
                parameter.normal_(std=SHAPE.d_model**-0.5)
    return mixer


FILES = sorted((Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))
CONFIGURED: dict[str, Callable[[], Mixer]] = {f"configs-{path.stem}": partial(configured, path) for path in FILES}
"""One entry for each file, under its name."""

MIXERS |= CONFIGURED
