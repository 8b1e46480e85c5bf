"""Fixed block-sparse attention: which blocks of keys a block of queries sees depends on their places alone.

sink_local   the first blocks and the latest ones (Xiao et al. 2024, arXiv 2309.17453)
stripe       the latest blocks and every stride-th block (Child et al. 2019, arXiv 1904.10509)
butterfly    the blocks 0, 1, 2, 4, 8, ... before the own one (Dao et al. 2022, arXiv 2205.14135)
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Unpack

import torch
from torch import Tensor

from longmix.errors import ConfigError
from longmix.mixers.base import ModelShape
from longmix.mixers.measures import Metric
from longmix.mixers.softmax import HeadOptions, Rows, SoftmaxAttention
from longmix_kernels.attention import BlockList, attention, butterfly_blocks, sink_and_local_blocks, stripe_blocks


class BlockSparse(SoftmaxAttention):
    """Causal attention to listed blocks. Blocks are counted from the beginning of the row, not of the document.

    So a packed document sees nothing of its neighbours, but less or more of itself than it would alone: use this mixer
    with one document a row where that matters.

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

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        layout: str,
        block: int = 128,
        sink: int = 1,
        local: int = 4,
        stride: int = 8,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        builders: dict[str, tuple[Callable[..., BlockList], dict[str, int]]] = {
            "sink_local": (sink_and_local_blocks, {"sink": sink, "local": local}),
            "stripe": (stripe_blocks, {"local": local, "stride": stride}),
            "butterfly": (butterfly_blocks, {}),
        }
        if layout not in builders:
            raise ConfigError(f"mixer.layout={layout} is unknown; use {', '.join(builders)}.")
        build, sizes = builders[layout]
        try:
            build(1, block, device="cpu", **sizes)
        except ValueError as error:
            raise ConfigError(f"mixer.layout={layout}, mixer.block={block}: {error}") from None

        @lru_cache(maxsize=8)
        def lists(blocks: int, device: torch.device) -> BlockList:
            return build(blocks * block, block, device=device, **sizes)

        self.block = block
        self.lists = lists

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """The engine, which walks through the listed blocks only."""
        blocks = self.lists(-(-rows.key.shape[1] // self.block), rows.key.device)
        return attention(rows.query, rows.key, rows.value, blocks=blocks, document_ids=rows.document_ids), {}

    def visible_pairs(self, length: int) -> int:
        """All of a block before the own one, a triangle of that."""
        mask = self.lists(-(-length // self.block), torch.device("cpu")).mask()
        ends = torch.arange(1, mask.shape[0] + 1) * self.block
        rows = ends.clamp(max=length) - (ends - self.block)
        earlier = mask.tril(-1).sum(1)
        return int((rows * (earlier * self.block) + mask.diagonal() * rows * (rows + 1) // 2).sum())
