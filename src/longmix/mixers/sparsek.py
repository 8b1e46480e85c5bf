"""SparseK attention (Lou et al. 2024, arXiv 2406.16747) in blocks: near keys exactly, and of all others the best.

    u_j     = w . x_j + slope * position_j           a score a key head, in which no query has a say
    near    s_ij = q_i . k_j / sqrt(d)               keys of the own block and of `past_blocks` before it
    far     s_ij + log p_j                           the `keep` keys of the largest u of those before
    p       = SparseK(u of the candidates, keep)     each p_j from 0 to 1, their sum is `keep`
    y_i     = W_o (softmax over both together) v

When a block leaves the near side, its keys and those kept before are the candidates; p is theirs, and the largest are
kept. u learns through p alone, by the exact gradient of the operator (`sparsek_operator`). A key that is about to be
dropped has faded out before, since its weight is p_j exp(s_ij).

What differs from the paper: there each query has a p and a threshold of its own, and the state of its exact form can
be all keys, since equal scores all stay in. With one threshold a block, p is a bias of the keys, which any attention
takes, and the state is `keep` keys. The largest of a union do not depend on how it was made: training by blocks,
prefill in any split and decoding agree. `gate=value` weighs the value alone, as public implementations do; a key that
is about to be dropped then has weight exp(0) until it is.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows, with_sinks
from longmix.mixers.parts.base import REAL, TOKENS, ModelShape, at_most
from longmix.mixers.parts.documents import goes_on
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.head_options import HeadOptions, Selection
from longmix.mixers.parts.kept_blocks import FarBlocks
from longmix.mixers.parts.kept_keys import Gate, Kept, Pool
from longmix.mixers.parts.metrics import Mean, Metric
from longmix.mixers.parts.scatterbrain_cache import Keys, ScatterbrainState, recent_after, recent_limit
from longmix.mixers.parts.scatterbrain_summaries import Part, numbered
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.sparsek_slices import kept_before
from longmix.mixers.parts.step_sums import summed
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.attention import merge
from longmix_kernels.runtime import is_readable
from longmix_kernels.scatter import scatter_attention

GATES = ("log", "value", "both")


class SparseK(SoftmaxAttention):
    """The nearest blocks exactly, and of everything earlier the keys of the largest scores. The head has the equations.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`.
        keep: keys that are kept of all before the near blocks.
        block: tokens of a block, counted from the beginning of the document.
        past_blocks: blocks before the own one that are seen exactly.
        slope: of the scores over the position at first; above 0 the latest keys are kept then.
        gate: what p multiplies: the weight of a key ("log": it is added to the score as log p), its "value", or "both".

    Raises:
        ConfigError: naming the setting.
    """

    pairwise = True
    takes_sink_logits = True
    rows_in_place = False
    sizes: ClassVar = {"block": 1, "keep": 1}
    small: ClassVar = {"past_blocks": 1}
    changeable: ClassVar = (*SoftmaxAttention.changeable, "keep", "past_blocks")

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        keep: int = 256,
        block: int = 64,
        past_blocks: int = 4,
        slope: float = 1e-3,
        gate: Gate = "log",
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, keep=keep, block=block, past_blocks=past_blocks)
        at_most(REAL, slope=slope)
        for name, number, least in (("keep", keep, 1), ("block", block, 1), ("past_blocks", past_blocks, 0)):
            if number < least:
                raise ConfigError(f"mixer.{name}={number} must be at least {least}.")
        if gate not in GATES:
            raise ConfigError(f"mixer.gate={gate} is unknown; use {', '.join(GATES)}.")
        self.keep, self.block, self.past_blocks, self.gate = keep, block, past_blocks, gate
        self.score = nn.Linear(self.d_model, self.num_kv_heads, bias=False)  # a bias would move tau alone
        self.slope = nn.Parameter(torch.full((self.num_kv_heads,), float(slope)))
        nn.init.zeros_(self.score.weight)
        set_recipe(self.score.weight, Recipe("scalar"))

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """Score the tokens; the scores are what is kept of them as labels."""
        score = exact_linear(self.score, x)
        return Selection(key_labels=score + self.slope.to(score.dtype) * positions.unsqueeze(-1).to(score.dtype))

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Attend to near keys and kept ones in one softmax."""
        return self._attend(rows, _keys(rows), None, None)[:2]

    def attend_after(self, rows: Rows, slices: Slices) -> tuple[Tensor, dict[str, Metric]]:
        """Attend as in `attend`, with near keys of earlier slices and the best of all keys before those."""
        keys, before, number = kept_before(_keys(rows), slices, self.block, self.past_blocks, self.keep)
        return self._attend(rows, keys, before, number)[:2]

    def attend_from(self, rows: Rows, state: Any, next_position: Tensor) -> tuple[Tensor, dict[str, Metric], Any]:
        """Attend as in `attend`, continuing from a state; returns the state after the new keys too."""
        assert rows.document_ids is not None
        ids = rows.document_ids.int()
        continues = goes_on(state, ids)
        number = numbered(ids, continues)
        keys, before = state.followed_by(_keys(replace(rows, document_ids=number))), state.far.kept_of(continues)
        state = replace(state, last_id=ids[:, -1], next_position=next_position, carried=rows.carried)
        if ids.shape[1] == 1:
            part = before.attend(rows.query, number == 0, self.gate, _scale(rows))
            return *self._merged(rows, keys, part), self._after_one(keys, before, state)
        mixed, metrics, after = self._attend(rows, keys, before, torch.zeros_like(ids[:, 0]))
        return mixed, metrics, self._after(keys, after(), state)

    def _attend(
        self, rows: Rows, keys: Keys, before: Kept | None, number: Tensor | None
    ) -> tuple[Tensor, dict[str, Metric], Callable[[], Kept]]:
        """Output, metrics, and what is kept after the rows; `before` is of the document `number` [B] before them."""
        assert keys.features is not None
        blocks = FarBlocks.of(keys.document_ids, keys.key, self.block, self.past_blocks, number)
        pool = Pool.of(before, keys.key, keys.value, keys.features)
        chosen = blocks.choose(pool, before, self.keep)
        part = blocks.attend(rows.query, pool, chosen, self.gate, _scale(rows))

        def after() -> Kept:
            return pool.taken(chosen, blocks.of_next()[:, None]).kept_of(blocks.next_is_far())

        return *self._merged(rows, keys, part), after

    def _after_one(self, keys: Keys, before: Kept, state: ScatterbrainState) -> ScatterbrainState:
        """The state after one more token, with which at most one block leaves the near side."""
        leaves = self._leaves(keys, state)
        # A GPU would have to be waited for, and a compiled graph cannot branch: both always choose, perhaps of nothing.
        if keys.features is not None and (not is_readable(leaves) or bool(leaves.any())):
            first = slice(0, self.block)  # recent keys are as many as make it the first one
            score = keys.features[:, first].masked_fill(~leaves[:, first].unsqueeze(-1), -torch.inf)
            before = before.followed_by(keys.key[:, first], keys.value[:, first], score)
        return self._after(keys, before, state)

    def _leaves(self, keys: Keys, state: ScatterbrainState) -> Tensor:
        """Which keys the token after them does not see exactly, of the last one's document: bool [B, T]."""
        assert keys.document_ids is not None
        ids, next_position = keys.document_ids, state.next_position
        position = next_position[:, None] - torch.arange(ids.shape[1], 0, -1, device=ids.device)
        begin = (next_position // self.block - self.past_blocks).clamp(min=0) * self.block
        return (ids == ids[:, -1:]) & (position < begin[:, None])

    def _after(self, keys: Keys, kept: Kept, state: ScatterbrainState) -> ScatterbrainState:
        recent = recent_after(keys, self._leaves(keys, state), self.block, self.past_blocks)
        return replace(state, recent=recent, far=kept)

    def _merged(self, rows: Rows, keys: Keys, far: Part) -> tuple[Tensor, dict[str, Metric]]:
        """Both sides in one softmax, and the share of the near one."""
        near = scatter_attention(
            rows.query,
            keys.key,
            keys.value,
            block_size=self.block,
            past_blocks=self.past_blocks,
            document_ids=keys.document_ids,
            scale=_scale(rows),
        )
        mixed, logsumexp = merge([(near.output, near.logsumexp), far])
        metrics: dict[str, Metric] = {}
        if self.training:
            metrics["exact_mass"] = Mean.of((near.exact_logsumexp - logsumexp.detach()).exp())
        return with_sinks(mixed, logsumexp, rows.sinks), metrics

    def state_type(self) -> type:
        """The class of the state."""
        return ScatterbrainState

    def init_state(self, batch: int) -> Any:
        """The state before the first token, for `batch` rows."""
        weight = self.value.weight
        widths = self.key_dim(weight.dtype), self.head_dim
        key, value = (weight.new_empty(batch, 0, self.num_kv_heads, width) for width in widths)
        last_id = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        far = Kept.none(weight, batch, self.keep, self.num_kv_heads, *widths)
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        recent = Keys(key, value, far.score[:, :0], last_id[:, None][:, :0])
        return ScatterbrainState(recent, far, last_id, position, carried=self.carried_before(batch))

    def state_bytes(self, length: int) -> int:
        """Bytes of recent keys, values and scores, and of the kept ones with their gates, of one row."""
        exact = torch.promote_types(self.value.weight.dtype, torch.float32).itemsize
        recent = min(length, recent_limit(self.block, self.past_blocks))
        pair, heads = self.row_bytes(), self.num_kv_heads
        return heads * (recent * (pair + exact) + self.keep * (pair + 2 * exact)) + self.carried_bytes()

    def step_bytes(self, length: int) -> int:
        """The base's bytes, and those of the gates."""
        exact = torch.promote_types(self.value.weight.dtype, torch.float32).itemsize
        return super().step_bytes(length) + self.num_kv_heads * exact * self._far_of(length)

    def decoding_bytes(self, length: int, steps: int) -> int:
        """The sum of `step_bytes`."""
        exact = torch.promote_types(self.value.weight.dtype, torch.float32).itemsize
        far = self._far_pairs(length + steps) - self._far_pairs(length)
        return self.seen_bytes(length, steps) + self.num_kv_heads * exact * far

    def _far_of(self, position: int) -> int:
        """How many kept keys a token at this position sees."""
        return min(self.keep, max(0, position // self.block - self.past_blocks) * self.block)

    def _far_pairs(self, length: int) -> int:
        """The sum of `_far_of` over the positions of `length` tokens."""
        later = max(0, length - self.past_blocks * self.block)
        blocks, rest = divmod(self.keep, self.block)
        full = max(0, later - (blocks + 1) * self.block)  # those with more blocks before them than are kept whole
        return self.block * summed(0, later, self.block, blocks) + rest * full

    def visible_pairs(self, length: int) -> int:
        """A triangle in the own block, all of the `past_blocks` before it, and the kept keys."""
        blocks, rest = divmod(length, self.block)
        triangles = blocks * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        past = self.block * summed(0, length, self.block, self.past_blocks)
        return triangles + past + self._far_pairs(length)

    def flops(self, length: int) -> int:
        """The base's operations, and one more channel in far scores, which adds log p."""
        bias = 0 if self.gate == "value" else 2 * self.num_heads * self._far_pairs(length)
        return super().flops(length) + bias


def _scale(rows: Rows) -> float:
    return rows.key.shape[-1] ** -0.5 if rows.scale is None else rows.scale


def _keys(rows: Rows) -> Keys:
    return Keys(rows.key, rows.value, rows.key_labels, rows.document_ids)
