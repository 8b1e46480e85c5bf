"""Mixture of block attention (Lu et al. 2025, arXiv 2502.13189): each query chooses the blocks of keys that it sees.

    s_ib = q_i . mean_{j in b} k_j            equation 6, for every earlier block b of the document
    I_i  = the own block of i, and the top_k - 1 blocks with the highest s_ib          equation 5
    y_i  = softmax over the j <= i in the blocks of I_i                                equation 2

Notable: there are no parameters beyond those of `flash`, and with `top_k` blocks or fewer it is `flash`. Blocks are
complete before a query may choose them, so that a mean holds no later token. The own block counts as one of `top_k`, as
published: `top_k=1` is the own block alone. Blocks are counted from the first token of each document. Of equal scores
the earlier block wins. Each query head chooses for itself, also where heads share keys. Choosing has no gradient, as
published. A bias is part of a block's score: the mean of it over the block's keys.

A step of decoding reads the blocks' means, which are in the state, and the keys of the chosen blocks alone.
"""

from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows, continued
from longmix.mixers.parts.base import COUNT, TOKENS, ModelShape, at_most
from longmix.mixers.parts.block_choice import chosen_blocks, gathered, listed_rows
from longmix.mixers.parts.block_states import BlockState
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.step_sums import summed
from longmix_kernels.attention import (
    KeyBlocks,
    attention_to_blocks,
    key_blocks,
    positions_from_document_ids,
)


class MoBA(SoftmaxAttention):
    """Attention to the own block and to those earlier blocks whose mean key fits the query best.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`.
        block: tokens of a block.
        top_k: blocks that a query sees, its own included.

    Raises:
        ConfigError: besides those of the base, a number below 1.
    """

    pairwise = True
    takes_sink_logits = True
    rows_in_place = False
    sizes: ClassVar = {"block": 1}
    changeable: ClassVar = (*SoftmaxAttention.changeable, "block", "top_k")

    def __init__(
        self, shape: ModelShape, layer_index: int, *, block: int = 512, top_k: int = 3, **options: Unpack[HeadOptions]
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, block=block)
        at_most(COUNT, top_k=top_k)
        if block < 1:
            raise ConfigError(f"mixer.block={block} must be at least 1.")
        if top_k < 1:
            raise ConfigError(f"mixer.top_k={top_k} must be at least 1: a query sees its own block.")
        self.block = block
        self.top_k = top_k

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Merge the own block, in which keys up to the query are seen, and the chosen ones, which are seen whole."""
        queries, keys = rows.query.shape[1], rows.key.shape[1]
        last = slice(keys - queries, None)
        row = torch.arange(keys, dtype=torch.int32, device=rows.key.device)[None]
        position = row if rows.document_ids is None else positions_from_document_ids(rows.document_ids)
        number = position[:, last] // self.block
        lo = (row - position % self.block)[:, None, last].contiguous()
        hi = (row + 1)[:, None, last].expand_as(lo).contiguous()
        own = rows.attended(lo=lo, hi=hi)
        blocks = self._blocks(rows)
        if self.top_k == 1 or blocks.starts.shape[1] == 0:
            return rows.merged([own]), {}
        first = blocks.first[:, last]
        chosen = self._chosen(rows.query, self.means(rows.key, blocks), first, first + number)
        past = attention_to_blocks(rows.query, rows.key, rows.value, chosen, blocks, scale=rows.scale)
        return rows.merged([own, past]), {}

    def _blocks(self, rows: Rows) -> KeyBlocks:
        return key_blocks(rows.key.shape[1], self.block, document_ids=rows.document_ids, device=rows.key.device)

    @torch.no_grad()
    def means(self, key: Tensor, blocks: KeyBlocks) -> Tensor:
        """The mean key of each block, [B, N, Hkv, head_dim], in float32 or wider."""
        return blocks.rows(key).to(torch.promote_types(key.dtype, torch.float32)).mean(2)

    @torch.no_grad()
    def _chosen(self, query: Tensor, means: Tensor, first: Tensor, end: Tensor) -> Tensor:
        """The blocks besides the own one that queries choose of those from `first` to before `end` [B or 1, Tq]."""

        def scores_of(some: slice) -> Tensor:
            part = query[:, some].to(means.dtype).unflatten(2, (self.num_kv_heads, -1))
            with torch.autocast(query.device.type, enabled=False):
                return torch.einsum("bthgd,bnhd->bthgn", part, means).flatten(2, 3)

        at_once = query.shape[0] * query.shape[2] * means.shape[1]
        return chosen_blocks(scores_of, query.shape[1], first, end, self.top_k - 1, at_once)

    def attend_from(self, rows: Rows, state: Any, next_position: Tensor) -> tuple[Tensor, dict[str, Metric], Any]:
        """Continue from a state; a single token reads the means, and the keys of the blocks that it chooses."""
        rows = continued(rows, state.seen)
        seen = self._kept(rows, next_position)
        if rows.query.shape[1] == 1:
            means = state.means
            if means.shape[-1] != rows.key.shape[-1]:  # a bias has other columns in another dtype
                means = self._means_of_last(replace(rows, key=rows.key[:, :-1]), state.next_position)
            means = self._means_after(means, rows.key, next_position)
            return self._step(rows, means, next_position - 1), {}, BlockState(seen, means)
        mixed, metrics = self.attend(rows)
        return mixed, metrics, BlockState(seen, self._means_of_last(rows, next_position))

    def _means_of_last(self, rows: Rows, next_position: Tensor) -> Tensor:
        """The means of the blocks of each row's last document, zeros behind them."""
        blocks = self._blocks(rows)
        means = self.means(rows.key, blocks)
        number = torch.arange(means.shape[1], device=means.device)
        place = (blocks.first[:, -1:] + number).clamp(max=max(means.shape[1] - 1, 0)).long()
        taken = means.gather(1, place.expand(len(means), -1)[:, :, None, None].expand_as(means))
        return taken * (number < next_position[:, None] // self.block)[:, :, None, None]

    @torch.no_grad()
    def _means_after(self, means: Tensor, key: Tensor, next_position: Tensor) -> Tensor:
        """The means with that of the block which the last key fills, where it fills one."""
        keys = key.shape[1]
        if keys < self.block:
            return means
        means = F.pad(means, (0, 0, 0, 0, 0, keys // self.block - means.shape[1]))
        latest = key[:, keys - self.block :].to(means.dtype).mean(1, keepdim=True)
        number = torch.arange(means.shape[1], device=means.device)
        count = next_position[:, None] // self.block
        filled = (number == count - 1) & (next_position[:, None] % self.block == 0)
        means = torch.where(filled[:, :, None, None], latest, means)
        return means * (number < count)[:, :, None, None]  # a new document has none of the one before

    def _step(self, rows: Rows, means: Tensor, position: Tensor) -> Tensor:
        """The output [B, 1, H, head_dim] of one query a row, at a position [B] of its document."""
        first = rows.key.shape[1] - 1 - position
        number, offset = position // self.block, position % self.block
        chosen = self._chosen(rows.query, means, torch.zeros_like(number)[:, None], number[:, None])[:, 0]
        own = first + number * self.block
        places, lo = listed_rows(chosen, means.shape[1], first, self.block, own, self.block)
        key, value = (gathered(x, places) for x in (rows.key, rows.value))
        hi = (places.shape[-1] - self.block + 1 + offset[:, None]).int().expand_as(lo)
        listed = replace(rows, key=key, value=value, document_ids=None, layout=None)
        return rows.merged([listed.attended(lo=lo[..., None].contiguous(), hi=hi[..., None].contiguous())])

    def state_type(self) -> type:
        """The class of the state."""
        return BlockState

    def init_state(self, batch: int) -> Any:
        """An empty cache without blocks."""
        seen = super().init_state(batch)
        exact = torch.promote_types(seen.key.dtype, torch.float32)
        return BlockState(seen, seen.key.new_empty(seen.key.shape, dtype=exact))

    def state_bytes(self, length: int) -> int:
        """Bytes of keys, values, and the means of complete blocks of one row after `length` tokens."""
        return super().state_bytes(length) + self._mean_bytes(length)

    def _mean_bytes(self, length: int) -> int:
        exact = torch.promote_types(self.value.weight.dtype, torch.float32).itemsize
        return length // self.block * self.num_kv_heads * self.key_dim(self.value.weight.dtype) * exact

    def step_bytes(self, length: int) -> int:
        """Bytes of the means, the own block, and the chosen blocks, which heads that share keys may choose apart."""
        chosen = min(self.top_k - 1, length // self.block) * self.block
        rows = self.num_kv_heads * (length % self.block + 1) + self.num_heads * chosen
        return rows * self.row_bytes() + self._mean_bytes(length) + self.carried_bytes()

    def decoding_bytes(self, length: int, steps: int) -> int:
        """The sum of `step_bytes`."""
        blocks = summed(length, steps, self.block)
        own = summed(length, steps) - self.block * blocks + steps
        chosen = self.block * summed(length, steps, self.block, self.top_k - 1)
        rows = self.num_kv_heads * own + self.num_heads * chosen
        means = blocks * self._mean_bytes(self.block)
        return rows * self.row_bytes() + means + steps * self.carried_bytes()

    def visible_pairs(self, length: int) -> int:
        """A triangle in each block, and the chosen blocks before it."""
        blocks, rest = divmod(length, self.block)
        earlier = self.top_k - 1
        triangles = blocks * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        some = min(blocks, earlier)
        past = some * (some - 1) // 2 + (blocks - some) * earlier
        return triangles + self.block * (past * self.block + min(blocks, earlier) * rest)

    def choosing_flops(self, length: int) -> int:
        """Operations of the scores of all blocks, of which there is no gradient."""
        blocks = length // self.block if self.top_k > 1 else 0
        wide = self.head_dim + (0 if self.bias is None else self.bias.rank)
        return 2 * length * blocks * self.num_heads * wide

    def flops(self, length: int) -> int:
        """The base's operations, and the scores of the blocks."""
        return super().flops(length) + self.choosing_flops(length)
