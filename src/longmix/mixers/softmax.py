"""What every softmax-attention mixer shares: projections, query-key norm, rotary positions and the key-value cache.

    q_i = rotate(norm(W_q x_i)),  k_j = rotate(norm(W_k x_j)),  v_j = W_v x_j
    y_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d)) v_j        over the j that the subclass lets i see

Notable: grouped key-value heads; RMSNorm on each query and key head before the rotation (Henry et al. 2020, arXiv
2010.04245; the form of Qwen3), which bounds the scores by sqrt(d); positions restart at each document.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.base import Mixer, MixerOutput, ModelShape, divided
from longmix.mixers.rotary import rotary_angles, rotate
from longmix_kernels.attention import positions_from_document_ids


@dataclass
class AttentionState:
    """Keys and values seen so far.

    Attributes:
        key, value: [B, S, Hkv, head_dim].
        document_ids: int32 [B, S], or None while every row is one document.
        next_position: int64 [B], the position within its document that the next token of each row would take.
    """

    key: Tensor
    value: Tensor
    document_ids: Tensor | None
    next_position: Tensor


class HeadNorm(nn.RMSNorm):
    """RMSNorm whose weight follows the input's dtype, since torch's fused kernel takes no mixture of dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., head_dim] -> [..., head_dim]."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SoftmaxAttention(Mixer):
    """Base of the softmax mixers; a subclass says in `attend` which keys a query sees, and in `visible_pairs` how many.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0.
        num_heads: query heads; None takes the model's.
        num_kv_heads: key-value heads, a divisor of `num_heads`; None gives every query head its own.
        rotary_base: wavelength base of the rotary embedding.
        qk_norm: RMSNorm on query and key heads.

    Raises:
        ConfigError: heads that do not divide, an odd head size, a base that is not above 1.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float = 10_000.0,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        heads_key = "model.num_heads" if num_heads is None else "mixer.num_heads"
        self.num_heads = shape.num_heads if num_heads is None else num_heads
        self.head_dim = divided(shape.d_model, self.num_heads, "model.d_model", heads_key)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        divided(self.num_heads, self.num_kv_heads, heads_key, "mixer.num_kv_heads")
        if self.head_dim % 2:
            raise ConfigError(
                f"rotary positions need an even head size; {heads_key}={self.num_heads} gives {self.head_dim}."
            )
        if rotary_base <= 1:
            raise ConfigError(f"mixer.rotary_base={rotary_base} must be above 1.")
        self.d_model = shape.d_model
        self.rotary_base = rotary_base

        kv_width = self.num_kv_heads * self.head_dim
        self.query = nn.Linear(self.d_model, self.d_model, bias=False)
        self.key = nn.Linear(self.d_model, kv_width, bias=False)
        self.value = nn.Linear(self.d_model, kv_width, bias=False)
        self.output = nn.Linear(self.d_model, self.d_model, bias=False)
        self.query_norm = HeadNorm(self.head_dim, eps=shape.norm_eps) if qk_norm else nn.Identity()
        self.key_norm = HeadNorm(self.head_dim, eps=shape.norm_eps) if qk_norm else nn.Identity()

        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=self.d_model**-0.5)
        nn.init.normal_(self.output.weight, std=self.d_model**-0.5 / math.sqrt(2 * shape.num_layers))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None) -> Tensor:
        """Attention of the last Tq of Tk rows: query [B, Tq, Hq, D] on key, value [B, Tk, Hkv, D], ids [B, Tk]."""
        raise NotImplementedError

    def visible_pairs(self, length: int) -> int:
        """Query-key pairs the mixer computes in one row of `length` tokens, per query head."""
        raise NotImplementedError

    def cached_keys(self) -> int | None:
        """How many past keys a later query can still see; None for all."""
        return None

    def forward(
        self, x: Tensor, *, state: AttentionState | None = None, document_ids: Tensor | None = None
    ) -> MixerOutput:
        """See `Mixer.forward`."""
        batch, length, _ = x.shape
        query = self.query_norm(self.query(x).view(batch, length, self.num_heads, self.head_dim))
        key = self.key_norm(self.key(x).view(batch, length, self.num_kv_heads, self.head_dim))
        value = self.value(x).view(batch, length, self.num_kv_heads, self.head_dim)

        document_ids = _continued_ids(document_ids, state, batch, length)
        positions = _positions(document_ids, state, length, x.device)
        cosine, sine = rotary_angles(positions, self.head_dim, self.rotary_base)
        query = rotate(query, cosine, sine).to(value.dtype)
        key = rotate(key, cosine, sine).to(value.dtype)

        new_state = None
        if state is not None:
            key, value = torch.cat((state.key, key), dim=1), torch.cat((state.value, value), dim=1)
            document_ids = _all_ids(document_ids, state)
            new_state = self._kept(key, value, document_ids, positions[:, -1].expand(batch) + 1)
        mixed = self.attend(query, key, value, document_ids)
        return MixerOutput(y=self.output(mixed.reshape(batch, length, self.d_model)), state=new_state)

    def _kept(self, key: Tensor, value: Tensor, document_ids: Tensor | None, next_position: Tensor) -> AttentionState:
        limit = self.cached_keys()
        start = 0 if limit is None else max(0, key.shape[1] - limit)
        if start:
            key, value = key[:, start:].clone(), value[:, start:].clone()
            document_ids = None if document_ids is None else document_ids[:, start:].clone()
        return AttentionState(key, value, document_ids, next_position)

    def init_state(self, batch: int) -> AttentionState:
        """An empty cache for `batch` rows, on the mixer's device and in its dtype."""
        weight = self.key.weight
        empty = weight.new_empty(batch, 0, self.num_kv_heads, self.head_dim)
        return AttentionState(empty, empty, None, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def state_bytes(self, length: int) -> int:
        """Bytes of keys and values one row holds after `length` tokens."""
        limit = self.cached_keys()
        rows = length if limit is None else min(length, limit)
        return 2 * rows * self.num_kv_heads * self.head_dim * self.key.weight.element_size()

    def flops(self, length: int) -> int:
        """Projections, and 2 * head_dim for the score and for the value of every visible pair."""
        weights = sum(layer.weight.numel() for layer in (self.query, self.key, self.value, self.output))
        return 2 * length * weights + 4 * self.num_heads * self.head_dim * self.visible_pairs(length)


def _continued_ids(document_ids: Tensor | None, state: AttentionState | None, batch: int, length: int) -> Tensor | None:
    """Ids of the new tokens: as given, or each row's last document going on."""
    if document_ids is not None or state is None or state.document_ids is None:
        return document_ids
    return state.document_ids[:, -1:].expand(batch, length)


def _positions(document_ids: Tensor | None, state: AttentionState | None, length: int, device: torch.device) -> Tensor:
    """Position of each new token within its document, [B or 1, T]."""
    if document_ids is None:
        positions = torch.arange(length, device=device)[None]
        return positions if state is None else positions + state.next_position[:, None]
    positions = positions_from_document_ids(document_ids)
    if state is None or state.key.shape[1] == 0:
        return positions
    last_id = _cached_ids(state)[:, -1:]
    return positions + torch.where(document_ids == last_id, state.next_position[:, None], 0)


def _cached_ids(state: AttentionState) -> Tensor:
    if state.document_ids is not None:
        return state.document_ids
    return torch.zeros(state.key.shape[:2], dtype=torch.int32, device=state.key.device)


def _all_ids(document_ids: Tensor | None, state: AttentionState) -> Tensor | None:
    return None if document_ids is None else torch.cat((_cached_ids(state), document_ids), dim=1)
