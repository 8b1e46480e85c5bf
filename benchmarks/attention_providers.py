"""Whom `benchmarks.attention` compares: our attention with several patterns, and the implementations of others.

All take query, key and value [B, T, H, D] and return [B, T, H, D]. What depends on the length alone (block lists,
masks) is made before the clock runs; orderings depend on the data, so they are made inside each timed call.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import attention_work as work
from benchmarks import timing
from benchmarks.comparison import PASSES, TRAINING, Provider, Workload, both_passes
from longmix.mixers.parts.features import FeatureMap
from longmix_kernels.attention import Ordering, attention, launch, order_by_label, row_bounds, sink_and_local_blocks
from longmix_kernels.scatter import scatter_attention

WINDOW = 512
BUCKETS = 16
BLOCK_SIZE, SINK_BLOCKS, LOCAL_BLOCKS = 128, 1, 8
PAST_BLOCKS, FEATURES = 1, 64
DOCUMENTS = 8
MATH_LENGTH = 2048
"""Longest sequence for torch's math backend, which stores all scores."""

SEED = 0

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What is attended: [batch, length, heads, dim] of a dtype on a device."""

    batch: int
    length: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def tensors(self) -> list[torch.Tensor]:
        """Query, key, value and the gradient of the output, all normal; the same for every provider."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        size = self.batch, self.length, self.heads, self.dim
        options = {"generator": generator, "dtype": self.dtype, "device": self.device}
        return [torch.randn(size, **options) for _ in range(4)]  # type: ignore[call-overload]

    def workload(
        self,
        attend: Attend,
        pairs: int | None = None,
        bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
        order: timing.Call | None = None,
        context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> Workload:
        """What is to be timed.

        Args:
            attend: the call.
            pairs: visible pairs of its mathematics, over batch and heads; those of causal attention by default.
            bounds: `lo` and `hi`, where there are such.
            order: the part of the call that makes the ordering, if there is one.
            context: what the call has to run in.
        """
        *inputs, grad = self.tensors
        pairs = work.causal_pairs(self.length) * self.batch * self.heads if pairs is None else pairs
        flops = {direction: work.attention_flops(pairs, self.dim, direction == TRAINING) for direction in PASSES}
        waste = {f"waste_{tile}": work.tile_waste(*bounds, tile) for tile in work.TILES} if bounds else {}
        parts = {} if order is None else {"order_ms": order}
        return Workload(both_passes(attend, inputs, grad, context), flops, parts, {"pairs": pairs, **waste})


def _window(window: int | None, shape: Shape) -> Workload:
    lo, hi = row_bounds(shape.length, shape.length, window=window)
    pairs = work.visible_pairs(lo, hi) * shape.batch * shape.heads
    return shape.workload(functools.partial(attention, window=window), pairs, (lo, hi))


def _documents(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids [B, T] of documents of one length, the first row that each begins in over all rows, and pairs they see."""
    length = -(-shape.length // DOCUMENTS)
    ids = (torch.arange(shape.length, device=shape.device) // length).int().expand(shape.batch, -1).contiguous()
    begins = torch.arange(0, shape.length, length, dtype=torch.int32, device=shape.device)
    rows = shape.length * torch.arange(shape.batch, dtype=torch.int32, device=shape.device)
    every = torch.cat([(rows[:, None] + begins).flatten(), rows.new_tensor([shape.batch * shape.length])])
    sizes = every.diff().tolist()
    return ids, every, sum(map(work.causal_pairs, sizes)) * shape.heads


def _packed(shape: Shape) -> Workload:
    ids, _, pairs = _documents(shape)
    return shape.workload(functools.partial(attention, document_ids=ids), pairs)


def _varlen(shape: Shape) -> Workload:
    """torch's FlashAttention of packed documents, with lengths that are known before."""
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    _, begins, pairs = _documents(shape)
    longest = int(begins.diff().max())

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        result: torch.Tensor = function(q, k, v, begins, begins, longest, longest, window_size=(-1, 0))
        return result.view_as(query)

    return shape.workload(attend, pairs)


def _sink_local(shape: Shape) -> Workload:
    sizes = {"sink": SINK_BLOCKS, "local": LOCAL_BLOCKS}
    blocks = sink_and_local_blocks(shape.length, BLOCK_SIZE, **sizes, device=shape.device)
    pairs = work.block_pairs(blocks, shape.length) * shape.batch * shape.heads
    return shape.workload(functools.partial(attention, blocks=blocks), pairs)


def _sorted(
    shape: Shape, query_labels: torch.Tensor, key_labels: torch.Tensor | None, num_labels: int, copies: bool = False
) -> Workload:
    return _ordered(shape, functools.partial(order_by_label, query_labels, key_labels, num_labels=num_labels), copies)


def _ordered(shape: Shape, order: Callable[[], Ordering], copies: bool = False) -> Workload:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, **order()._asdict())

    bounds = work.ordering_bounds(order())
    context = launch.gathered_before if copies else contextlib.nullcontext
    return shape.workload(attend, work.visible_pairs(*bounds), bounds, order, context)


def _hash(shape: Shape, *, shared: bool, copies: bool = False) -> Workload:
    sizes = shape.batch, shape.length, shape.heads, BUCKETS
    labels = [work.uniform_labels(*sizes, seed=SEED + side).to(shape.device) for side in range(2 - shared)]
    return _sorted(shape, labels[0], None if shared else labels[1], BUCKETS, copies)


def _routing(shape: Shape) -> Workload:
    """One cluster for query and key, that of the nearest of random centroids; finding it is part of the ordering."""
    query, clusters = shape.tensors[0], max(2, shape.length // WINDOW)
    generator = torch.Generator().manual_seed(SEED)
    centroids = F.normalize(torch.randn(shape.heads, clusters, shape.dim, generator=generator), dim=-1)
    centroids = centroids.to(shape.device).mT

    def order() -> Ordering:
        nearest = (F.normalize(query.transpose(1, 2).float(), dim=-1) @ centroids).argmax(-1)
        return order_by_label(nearest.transpose(1, 2), num_labels=clusters, members=WINDOW)

    return _ordered(shape, order)


def _scatterbrain(shape: Shape) -> Workload:
    """Features are made from queries and keys in the call; as pairs they are so many keys more."""
    favor = FeatureMap("favor", shape.heads, shape.dim, FEATURES, SEED).to(shape.device)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        features = (favor(F.normalize(x.float(), dim=-1)) for x in (query, key))
        call = functools.partial(scatter_attention, block_size=BLOCK_SIZE, past_blocks=PAST_BLOCKS)
        return call(query, key, value, *features).output

    row = torch.arange(shape.length)
    seen = row - (row // BLOCK_SIZE - PAST_BLOCKS).clamp(min=0) * BLOCK_SIZE + 1
    return shape.workload(attend, int((seen + FEATURES).sum()) * shape.batch * shape.heads)


def _drop(shape: Shape) -> Workload:
    generator = torch.Generator().manual_seed(SEED)
    order = [torch.rand(shape.batch, shape.length, shape.heads, generator=generator).argsort(1) for _ in range(2)]
    dropped = [(x >= shape.length // 2).long().to(shape.device) for x in order]
    # Queries that are kept have the label of the keys that are kept; a dropped query's label no key has.
    return _sorted(shape, 2 * dropped[0], dropped[1], 3)


def _sdpa(backend: SDPBackend, shape: Shape) -> Workload:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return shape.workload(attend)


def _flex(shape: Shape) -> Workload:
    from torch.nn.attention.flex_attention import flex_attention

    # Otherwise a few lengths would exhaust the number of versions that torch compiles, and fail.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask = _causal_block_mask(shape.length, shape.device)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    return shape.workload(attend)


def _causal_block_mask(length: int, device: torch.device) -> Any:
    """FlexAttention's lists for causal attention, without the [T, T] mask that its own builder goes through."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-length // BLOCK_SIZE)
    number = torch.arange(blocks, dtype=torch.int32, device=device)
    ones = torch.ones_like(number)
    before = number.expand(blocks, blocks).contiguous()
    own_first = torch.cat([number[:, None], before[:, :-1]], 1)
    return BlockMask.from_kv_blocks(
        ones[None, None],
        own_first[None, None],
        number[None, None],
        before[None, None],
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=lambda batch, head, query, key: query >= key,
        seq_lengths=(length, length),
    )


def _package(module: str, shape: Shape) -> Workload:
    function = importlib.import_module(module).flash_attn_func

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result = function(query, key, value, causal=True)
        return result[0] if isinstance(result, tuple) else result

    return shape.workload(attend)


def _package_missing(module: str, capabilities: tuple[int, ...], device: torch.device) -> str:
    if device.type != "cuda":
        return "needs CUDA"
    if torch.cuda.get_device_capability(device)[0] not in capabilities:
        return "is not made for this GPU"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"is not installed ({error})"
    return ""


def _needs_cuda(device: torch.device) -> str:
    return "" if device.type == "cuda" else "needs CUDA"


def _long_math(shape: Shape, direction: str) -> str:
    return f"skipped: stores all scores, timed up to T = {MATH_LENGTH} only" if shape.length > MATH_LENGTH else ""


def _flex_missing(asked: bool, device: torch.device) -> str:
    return "" if asked or device.type == "cuda" else "compiles for tens of seconds at each length; give --flex"


def _flex_refuses(shape: Shape, direction: str) -> str:
    no_backward = shape.device.type == "cpu" and direction == TRAINING
    return "skipped: FlexAttention has no backward pass on the CPU" if no_backward else ""


HASH = ("hash-shared", "hash-separate", "hash-shared-copies", "hash-separate-copies")
OURS = ("dense", "window", "documents", *HASH, "routing", "scatterbrain", "drop", "sink-local")
SDPA = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math")
NAMES = (*OURS, *SDPA, "varlen", "flex", "fa3", "fa4")

LEGEND = f"""\
ours:  dense          plain causal attention
       window         the last {WINDOW} keys
       documents      plain causal attention in {DOCUMENTS} packed documents of one length
       hash-shared    keys in the query's bucket: {BUCKETS} uniform random buckets per head, one for query and key
       hash-separate  the same with buckets of queries and keys drawn independently
       hash-*-copies  the same with rows copied into order before the kernels, instead of gathered by their loads
       routing        the last {WINDOW} keys of the query's cluster: T / {WINDOW} random centroids per head, one cluster
                      for query and key; finding the nearest is part of the ordering
       scatterbrain   the own block of {BLOCK_SIZE} keys and {PAST_BLOCKS} before it; for the others {FEATURES} random
                      features, which are made in the call
       drop           half of the queries and half of the keys of each head, at random
       sink-local     the first {SINK_BLOCKS * BLOCK_SIZE} keys and the last {LOCAL_BLOCKS} blocks of {BLOCK_SIZE}
peers: sdpa-*         torch's backends, each on its own, causal; flash is FlashAttention 2 on CUDA
       varlen         torch's FlashAttention of the same packed documents
       flex           FlexAttention, compiled, causal
       fa3, fa4       FlashAttention 3 and 4 from their own packages, causal"""


def providers(flex: bool) -> dict[str, Provider]:
    """All providers by name; `flex` asks for FlexAttention where compiling it takes long."""
    partial = functools.partial
    every = [
        Provider("dense", partial(_window, None)),
        Provider("window", partial(_window, WINDOW)),
        Provider("documents", _packed),
        Provider("hash-shared", partial(_hash, shared=True)),
        Provider("hash-separate", partial(_hash, shared=False)),
        Provider("hash-shared-copies", partial(_hash, shared=True, copies=True), _needs_cuda),
        Provider("hash-separate-copies", partial(_hash, shared=False, copies=True), _needs_cuda),
        Provider("routing", _routing),
        Provider("scatterbrain", _scatterbrain),
        Provider("drop", _drop),
        Provider("sink-local", _sink_local),
        Provider("sdpa-flash", partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
        Provider("sdpa-cudnn", partial(_sdpa, SDPBackend.CUDNN_ATTENTION), _needs_cuda),
        Provider("sdpa-efficient", partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION), _needs_cuda),
        Provider("sdpa-math", partial(_sdpa, SDPBackend.MATH), refuses=_long_math),
        Provider("varlen", _varlen, _needs_cuda),
        Provider("flex", _flex, partial(_flex_missing, flex), _flex_refuses),
    ]
    for name, module, capabilities in (
        ("fa3", "flash_attn_interface", (9,)),
        ("fa4", "flash_attn.cute.interface", (9, 10)),
    ):
        every.append(Provider(name, partial(_package, module), partial(_package_missing, module, capabilities)))
    return {provider.name: provider for provider in every}
