"""PoNet's three poolings, causal, in a state that does not grow (after Tan et al. 2022, arXiv 2110.02442).

With q, k, o, s, l = W x, segments of `segment` tokens counted from each document's first, per head of d channels

    global   g_t = sum_{j <= t} w_j k_j / sum_{j <= t} w_j,    w_j = exp(m_j . k_j / sqrt(d))
             m_j = mean of q over the segments of the document that closed before j's own; 0 while there is none
    segment  the largest s, channel by channel, from the first token of t's segment to t
    local    the largest l of t and the two tokens before it
    y_t = W_o ((global + segment) * o_t + local)

Notable: as published the query of the global pooling is the mean over the whole row, all keys take part, and the local
pooling looks one token ahead. Here a key's weight is fixed when it comes, under the mean of what came before, so that
running sums suffice. A token costs the same at any length. No token selects another by content, so that it recalls
nothing in particular: a floor for other mixers.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import TOKENS, Mixer, MixerOutput, ModelShape, at_most, checked_sizes, divided
from longmix.mixers.parts.documents import continued_ids, goes_on
from longmix.mixers.parts.projections import weight_count
from longmix.mixers.parts.recurrent import select
from longmix.mixers.parts.rotary import token_positions
from longmix.mixers.parts.states import mixer_state
from longmix_kernels.linear import LinearState, linear_attention

NEIGHBOURS = 3
"""Tokens of the local pooling."""

LARGEST_SCORE = 2.0**13
"""What scores beyond are taken for: the engine keeps documents apart for gates up to twice as large."""


@mixer_state(bookkeeping=("last_id", "next_position"))
@dataclass
class PoNetState:
    """What each row remembers of the document of its last token.

    Attributes:
        pooled: the sums of the global pooling, [B, H, 1, d], [B, H, 1] and their log scale [B, H].
        queries: sum of all queries, [B, H, 1, d].
        closed: sum of those of the segments closed before the last token's own, [B, H, d].
        largest: of the segment so far, [B, H, d].
        recent: l of the last two tokens, [B, 2, D].
        last_id: int32 [B], the document of the last token.
        next_position: int64 [B], the position in it that the next token would take.
    """

    pooled: LinearState
    queries: Tensor
    closed: Tensor
    largest: Tensor
    recent: Tensor
    last_id: Tensor
    next_position: Tensor


class PoNet(Mixer):
    """PoNet in a causal, streamable form. The head of this file has the equations.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0.
        segment: tokens of a segment.
        num_heads: heads of the global pooling; None takes the model's.

    Raises:
        ConfigError: heads that do not divide, a segment of no token.
    """

    sizes: ClassVar = {"segment": 1}
    changeable: ClassVar = ("segment",)

    def __init__(self, shape: ModelShape, layer_index: int, *, segment: int = 64, num_heads: int | None = None) -> None:
        super().__init__()
        at_most(TOKENS, segment=segment)
        if segment < 1:
            raise ConfigError(f"mixer.segment={segment} must be at least 1.")
        width = self.d_model = shape.d_model
        self.segment, self.num_heads = segment, shape.num_heads if num_heads is None else num_heads
        self.head_dim = divided(width, self.num_heads, "model.d_model", "mixer.num_heads")
        self.query, self.key, self.gate, self.pool, self.local, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(6)
        )
        for layer in (self.query, self.key, self.gate, self.pool, self.local):
            nn.init.normal_(layer.weight, std=width**-0.5)
        nn.init.normal_(self.output.weight, std=width**-0.5 / math.sqrt(2 * shape.num_layers))

    def forward(self, x: Tensor, *, state: PoNetState | None = None, document_ids: Tensor | None = None) -> MixerOutput:
        """See `Mixer.forward`."""
        batch, length = checked_sizes(x, self.d_model, document_ids, state, (PoNetState,))
        ids = continued_ids(document_ids, state, batch, length)
        before = self.init_state(batch) if state is None else state
        if state is not None and ids is not None:
            fresh = self.init_state(batch)
            before = select(goes_on(state, ids), state, fresh)
        last_id, next_position = (None, None) if state is None else (state.last_id, state.next_position)
        positions = token_positions(ids, last_id, next_position, length, x.device).expand(batch, length)
        projected = [layer(x) for layer in (self.query, self.key, self.gate, self.pool, self.local)]
        mixed, after = self.pooled(*projected, positions=positions, before=before, ids=ids)
        if state is not None and ids is not None:
            after.last_id, after.next_position = ids[:, -1].int(), positions[:, -1] + 1
        return MixerOutput(self.output(mixed.to(x.dtype)), None if state is None else after)

    def pooled(
        self,
        query: Tensor,
        key: Tensor,
        gate: Tensor,
        pool: Tensor,
        local: Tensor,
        *,
        positions: Tensor,
        before: PoNetState,
        ids: Tensor | None,
    ) -> tuple[Tensor, PoNetState]:
        """What the last projection is given, [B, T, D], and the state after these tokens.

        Args:
            query, key, gate, pool, local: q, k, o, s and l, [B, T, D].
            positions: integer [B, T], within the document.
            before: the state that the first token's document goes on from.
            ids: integer [B, T], the documents; None if each row is one.
        """
        length, dtype = query.shape[1], query.dtype
        query, key, gate, pool = (part.unflatten(-1, (self.num_heads, -1)) for part in (query, key, gate, pool))
        exact = torch.promote_types(dtype, torch.float32)
        place = positions % self.segment
        begins = (
            torch.arange(length, device=place.device) - place
        )  # of the token's segment; negative in what came before
        mean, queries, closed = self._mean_of_closed(query.to(exact), positions, begins, before, ids)
        score = (mean * key.to(exact)).sum(-1) * self.head_dim**-0.5
        score = score.clamp(-LARGEST_SCORE, LARGEST_SCORE)
        ones = torch.ones_like(key[..., :1])
        everything, sums = self.call_engine(
            linear_attention,
            ones,
            ones,
            key,
            log_decay=score.new_zeros(self.num_heads),
            log_input=score + 1.0,  # weights of a first segment are e, so that their sum is above 1, the least divisor
            normalize=True,
            scale=1.0,
            carried_state=before.pooled,
            document_ids=ids,
        )
        largest = _largest_since(pool.to(exact), begins, before.largest, self.segment)
        near, recent = self._largest_of_neighbours(local, positions, before.recent)
        mixed = ((everything.to(exact) + largest) * gate.to(exact)).flatten(2) + near
        return mixed, PoNetState(sums, queries, closed, largest[:, -1], recent, before.last_id, before.next_position)

    def _mean_of_closed(
        self, query: Tensor, positions: Tensor, begins: Tensor, before: PoNetState, ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's mean query of closed segments [B, T, H, d]; the sum of all, and the last token's of closed."""
        ones = torch.ones_like(query[..., :1])
        zeros = query.new_zeros(self.num_heads)
        sums, total = linear_attention(
            ones, ones, query, log_decay=zeros, scale=1.0, carried_state=LinearState(before.queries), document_ids=ids
        )
        earlier = torch.cat([before.queries.transpose(1, 2), sums[:, :-1]], 1)
        chosen = begins.clamp_min(0)[..., None, None].expand_as(sums)
        closed = torch.where((begins < 0)[..., None, None], before.closed[:, None], earlier.gather(1, chosen))
        count = positions - positions % self.segment
        closed = torch.where((count == 0)[..., None, None], 0.0, closed)
        mean = closed / count.clamp_min(1).to(closed.dtype)[..., None, None]
        return mean, total.memory, closed[:, -1]

    def _largest_of_neighbours(self, local: Tensor, positions: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        """The largest l of each token and the two before it in its document [B, T, D], and the last two."""
        whole, length = torch.cat([recent.to(local.dtype), local], 1), local.shape[1]
        found = local
        for lag in range(1, NEIGHBOURS):
            start = NEIGHBOURS - 1 - lag
            there = (positions >= lag).unsqueeze(-1)
            found = torch.maximum(found, whole[:, start : start + length].masked_fill(~there, -torch.inf))
        return found, whole[:, length:]

    def init_state(self, batch: int) -> PoNetState:
        """Nothing remembered."""
        weight = self.output.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        sums = weight.new_zeros(batch, self.num_heads, 1, self.head_dim, dtype=exact)
        pooled = LinearState(sums, sums[..., 0].clone(), sums[..., 0, 0].clone())
        recent = weight.new_zeros(batch, NEIGHBOURS - 1, self.d_model)
        ids = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        none = torch.full_like(sums[:, :, 0], -torch.inf)
        return PoNetState(pooled, sums.clone(), sums[:, :, 0].clone(), none, recent, ids, ids.long())

    def state_bytes(self, length: int) -> int:
        """Four sums or maxima a channel, two numbers a head, and two tokens; bookkeeping does not count."""
        weight = self.output.weight
        exact = torch.promote_types(weight.dtype, torch.float32).itemsize
        held = (4 * self.d_model + 2 * self.num_heads) * exact
        return held + (NEIGHBOURS - 1) * self.d_model * weight.element_size()

    def step_bytes(self, length: int) -> int:
        """Bytes of the whole state, which each token reads and writes."""
        return 2 * self.state_bytes(length)

    def decoding_bytes(self, length: int, steps: int) -> int:
        """Bytes of the whole state, for each step."""
        return steps * self.step_bytes(length)

    def flops(self, length: int) -> int:
        """Projections, and per channel and token an update and a reading of each of the two running sums."""
        return 2 * length * weight_count(self.children()) + 8 * length * self.d_model


def _largest_since(x: Tensor, begins: Tensor, before: Tensor, longest: int) -> Tensor:
    """The largest of x [B, T, H, d] from row `begins` [B, T] on, and of `before` [B, H, d] where that is negative."""
    rows = torch.arange(x.shape[1], device=x.device)
    lag = 1
    while lag < min(longest, x.shape[1]):  # doubles the rows that each maximum is over (Hillis and Steele 1986)
        inside = (rows - lag >= begins.clamp_min(0))[..., None, None]
        earlier = F.pad(x[:, :-lag], (0, 0, 0, 0, lag, 0))
        x, lag = torch.maximum(x, earlier.masked_fill(~inside, -torch.inf)), 2 * lag
    return torch.maximum(x, before.unsqueeze(1).masked_fill((begins >= 0)[..., None, None], -torch.inf))
