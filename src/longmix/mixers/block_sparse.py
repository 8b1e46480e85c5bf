"""Fixed block-sparse attention: which blocks of keys a block of queries sees depends on their places alone.

Every document is cut into blocks of its own, from its first token on. Where each row is one document, one list of
blocks serves all rows. With packed documents, or rows that wait behind padding, blocks begin anywhere: then the keys
that a query sees are a few contiguous runs, and attention to each run is merged through its logsumexp, exactly.

sink_local   the first blocks and the latest ones (Xiao et al. 2024, arXiv 2309.17453)
stripe       the latest blocks and every stride-th block (Child et al. 2019, arXiv 1904.10509)
butterfly    the blocks 0, 1, 2, 4, 8, ... before the own one (Dao et al. 2022, arXiv 2205.14135)
"""

from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import TOKENS, ModelShape, at_most
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix_kernels.attention import (
    BlockList,
    attention,
    butterfly_blocks,
    positions_from_document_ids,
    sink_and_local_blocks,
    stripe_blocks,
)


class Run(NamedTuple):
    """The bounds of the keys that queries see, int32 [B, 1, Tq], and the order of the keys [B, 1, Tk] or None."""

    lo: Tensor
    hi: Tensor
    key_rows: Tensor | None = None


LAYOUTS: dict[str, tuple[Callable[..., BlockList], tuple[str, ...]]] = {
    "sink_local": (sink_and_local_blocks, ("sink", "local")),
    "stripe": (stripe_blocks, ("local", "stride")),
    "butterfly": (butterfly_blocks, ()),
}
"""What lists the blocks of each layout, and the settings that it takes."""


@lru_cache(maxsize=64)
def _listed(
    layout: str, block: int, sizes: tuple[tuple[str, int], ...], blocks: int, device: torch.device
) -> BlockList:
    # Their sizes have to be known, for which a GPU would be waited for: so they are made on the CPU.
    size, *parts = LAYOUTS[layout][0](blocks * block, block, device="cpu", **dict(sizes))
    return BlockList(size, *(part.to(device) for part in parts))


class BlockSparse(SoftmaxAttention):
    """Causal attention to listed blocks, counted from the beginning of the document.

    Args:
        shape, layer_index: see `SoftmaxAttention`, as `options`.
        layout: "sink_local", "stripe" or "butterfly".
        block: tokens of a block, a power of two from 16 on; 128 suits the GPU kernels.
        sink: blocks at the beginning that are always seen, of "sink_local".
        local: latest blocks that are seen, the own one included, of "sink_local" and "stripe".
        stride: blocks from one stripe to the next, of "stripe".

    Raises:
        ConfigError: besides those of the base, an unknown layout, a size that is not allowed.
    """

    pairwise = True
    takes_sink_logits = True
    takes_gain = True
    sizes: ClassVar = {"block": 16}  # a tile of the engine
    changeable: ClassVar = (*SoftmaxAttention.changeable, "sink", "local", "stride")
    small: ClassVar = {"local": 1, "stride": 2}

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        layout: str = "sink_local",
        block: int = 128,
        sink: int = 1,
        local: int = 4,
        stride: int = 8,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, block=block, sink=sink, local=local, stride=stride)
        for name, number, least in (
            ("block", block, 16),
            ("sink", sink, 0),
            ("local", local, 1),
            ("stride", stride, 1),
        ):
            if number < least:
                raise ConfigError(f"mixer.{name}={number} must be at least {least}.")
        if layout not in LAYOUTS:
            raise ConfigError(f"mixer.layout={layout} is unknown; use {', '.join(LAYOUTS)}.")
        self.block = block
        self.layout = layout
        self.sink, self.local, self.stride = sink, local, stride
        self.prepared: BlockList | None = None
        try:
            self.lists(1, torch.device("cpu"))
        except ValueError as error:
            raise ConfigError(f"mixer.layout={layout}, mixer.block={block}: {error}") from None

    def lists(self, blocks: int, device: torch.device) -> BlockList:
        """The list for a row of so many blocks; layers of equal settings share it."""
        sizes = tuple((name, getattr(self, name)) for name in LAYOUTS[self.layout][1])
        return _listed(self.layout, self.block, sizes, blocks, device)

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Call the engine, which visits only the listed blocks, or with documents the runs of their blocks."""
        if rows.document_ids is None:
            blocks = self._blocks(rows.key)
            if rows.plain:
                return attention(rows.query, rows.key, rows.value, blocks=blocks), {}
            return rows.merged([rows.attended(blocks=blocks)]), {}
        runs = self._runs(rows.document_ids, rows.query.shape[1])
        return rows.merged([rows.attended(**run._asdict()) for run in runs]), {}

    def _blocks(self, key: Tensor) -> BlockList:
        """The list for these keys: as prepared, which a compiled graph takes as an input, else made here."""
        blocks, ready = -(-key.shape[1] // self.block), self.prepared
        if ready is not None and ready.row_blocks.device == key.device and ready.row_offsets.shape[0] == blocks + 1:
            return ready
        return self.lists(blocks, key.device)

    def _runs(self, document_ids: Tensor, queries: int) -> list[Run]:
        """The runs of keys that the last queries see, the latest blocks first; no key is in two of them."""
        keys = document_ids.shape[1]
        row = torch.arange(keys, dtype=torch.int32, device=document_ids.device)
        position = positions_from_document_ids(document_ids)
        last = slice(keys - queries, None)
        first, number, end = (row - position)[:, last], (position // self.block)[:, last], (row + 1)[None, last]
        latest = {"butterfly": 2}.get(self.layout, self.local)
        near = first + (number + 1 - latest).clamp(min=0) * self.block
        runs = [_run(near, end.expand_as(near))]
        if self.layout == "sink_local" and self.sink:
            runs.append(_run(first, torch.minimum(first + min(self.sink * self.block, keys), near)))
        elif self.layout == "stripe":
            # Keys of stripes come first in the order of keys, so that those before `near` lie side by side.
            striped = position // self.block % self.stride == self.stride - 1
            before = F.pad(striped.cumsum(1, dtype=torch.int32), (1, 0))
            place = torch.where(striped, before[:, :-1], before[:, -1:] + row - before[:, :-1])
            key_rows = torch.empty_like(place).scatter_(1, place.long(), row.expand_as(place))
            runs.append(_run(before.gather(1, first.long()), before.gather(1, near.long()), key_rows))
        elif self.layout == "butterfly":
            distance = 2
            while distance * self.block < keys:
                lo = first + (number - distance).clamp(min=0) * self.block
                runs.append(_run(lo, torch.where(number >= distance, lo + self.block, lo)))
                distance *= 2
        return runs

    def prepare(self, length: int) -> None:
        """Make the list of blocks now: it needs real tensors and their values, which a compiled graph does not have."""
        device = self.value.weight.device
        self.prepared = self.lists(-(-length // self.block), torch.device("cpu") if device.type == "meta" else device)

    def visible_pairs(self, length: int) -> int:
        """Whole blocks before the own one, and a triangle in the own block."""
        mask = self.lists(-(-length // self.block), torch.device("cpu")).mask()
        ends = torch.arange(1, mask.shape[0] + 1) * self.block
        rows = ends.clamp(max=length) - (ends - self.block)
        earlier = mask.tril(-1).sum(1)
        return int((rows * (earlier * self.block) + mask.diagonal() * rows * (rows + 1) // 2).sum())


def _run(lo: Tensor, hi: Tensor, key_rows: Tensor | None = None) -> Run:
    """A run whose bounds [B, Tq] are the same for all heads."""
    order = None if key_rows is None else key_rows[:, None]
    return Run(lo[:, None].contiguous(), hi[:, None].contiguous(), order)
