"""Keys and values: the rows that attention is computed from, and the state that the next call goes on from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longmix.caches.store import keys_like
from longmix.distributed.slices import Slices
from longmix.mixers.parts.layout import Layout
from longmix.mixers.parts.states import mixer_state
from longmix_kernels.attention import attention, merge


@mixer_state(bookkeeping=("document_ids", "next_position"))
@dataclass
class AttentionState:
    """Keys and values seen so far.

    Attributes:
        key, value: [B, S, Hkv, head_dim].
        key_labels: integer [B, S, Hkv, R] where the mixer labels its tokens, else None.
        document_ids: int32 [B, S], or None while every row is one document.
        next_position: int64 [B], the position within its document that the next token of each row would take.
        carried: [B, ...], what else `SoftmaxAttention.place` needs of the tokens before; None for nothing.
    """

    key: Tensor
    value: Tensor
    key_labels: Tensor | None
    document_ids: Tensor | None
    next_position: Tensor
    carried: Tensor | None = None

    @property
    def last_id(self) -> Tensor | None:
        """int [B], the document of the last token; None before the first."""
        return None if self.key.shape[1] == 0 else _cached_ids(self)[:, -1]

    def latest(self, count: int, copy: bool = False) -> "AttentionState":
        """The state with no more than the last `count` keys.

        Args:
            count: at least 0.
            copy: whether earlier keys may be freed, as none of the result is a view of all keys.
        """
        start = max(0, self.key.shape[1] - count)

        def cut(x: Tensor) -> Tensor:
            return x[:, start:].clone() if copy else x[:, start:]

        labels = None if self.key_labels is None else cut(self.key_labels)
        ids = None if self.document_ids is None else cut(self.document_ids)
        return replace(self, key=cut(self.key), value=cut(self.value), key_labels=labels, document_ids=ids)

    @property
    def one_document(self) -> bool:
        """Whether no ids were passed so far."""
        return self.document_ids is None


@dataclass
class Rows:
    """The inputs of attention; the queries are the last Tq of the Tk positions.

    Attributes:
        query: [B, Tq, Hq, K], key: [B, Tk, Hkv, K], value: [B, Tk, Hkv, head_dim]. K is head_dim, and the columns of a
            bias if there are any.
        document_ids: int32 [B, Tk], or None while every row is one document.
        query_labels: [B, Tq, Hq, R] and key_labels: [B, Tk, Hkv, R], as selected; None where nothing is.
        layout: of these rows, where it was made before and all keys are new; else None.
        carried: what `AttentionState.carried` will be after these rows.
        scale: the factor on the scores; None for that of the width of the keys.
        slopes: float32 [Hq], ALiBi's slope of each query head; None for no such bias.
        sinks: [Hq], a logit of each query head that takes part in its softmax and has no value; None for none.
        gain: whether the columns are the logarithm of factors on the weights, which are no part of the softmax.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    document_ids: Tensor | None = None
    query_labels: Tensor | None = None
    key_labels: Tensor | None = None
    layout: Layout | None = None
    carried: Tensor | None = None
    scale: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    gain: bool = False

    @property
    def plain(self) -> bool:
        """Whether scores are inner products of heads as wide as the values, so that any attention kernel will do."""
        usual = self.scale is None and self.slopes is None and self.sinks is None
        return usual and self.key.shape[-1] == self.value.shape[-1]

    def heads(self, query_heads: slice, key_heads: slice) -> "Rows":
        """The rows of some heads; labels stay as they are."""
        return replace(
            self,
            query=self.query[:, :, query_heads],
            key=self.key[:, :, key_heads],
            value=self.value[:, :, key_heads],
            slopes=None if self.slopes is None else self.slopes[query_heads],
            sinks=None if self.sinks is None else self.sinks[query_heads],
        )

    def attended(self, **bounds: Any) -> tuple[Tensor, Tensor]:
        """Output [B, Tq, Hq, head_dim] and logsumexp [B, Tq, Hq] of `attention` with these bounds."""
        tensors, scores = (self.query, self.key, self.value), {"scale": self.scale, "alibi_slopes": self.slopes}
        output, logsumexp = attention(*tensors, **(scores | bounds), return_logsumexp=True)
        if not self.gain:
            return output, logsumexp
        # sum_j p_j c_j v_j for the weights p of the narrow scores: exp(lse - lse') times attention with scores + log c
        query, key = (x[..., : self.value.shape[-1]] for x in (self.query, self.key))
        plain = replace(self, query=query, key=key, gain=False).attended(**bounds)[1]
        factor = (logsumexp - plain).masked_fill(plain.isneginf(), 0.0).exp()
        return output * factor.unsqueeze(-1).to(output.dtype), plain

    def merged(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The output heads [B, Tq, Hq, head_dim] of one softmax over several sets of keys, and over the sinks.

        Args:
            parts: output and logsumexp of each set, as `attended` returns them; no key is in two.
        """
        output, logsumexp = parts[0] if len(parts) == 1 else merge(parts)
        return with_sinks(output, logsumexp, self.sinks)

    def bounds(self, window: int | None = None) -> dict[str, Any]:
        """The arguments with which `attention` sees the own document alone, at most its last `window` keys.

        Args:
            window: that of the mixer's `layout_needs`.
        """
        if self.layout is not None and self.layout.first_key is not None:
            return {"lo": self.layout.first_key}
        return {"window": window, "document_ids": self.document_ids}

    def documents(self) -> dict[str, Any]:
        """The arguments with which `order_by_label` keeps documents apart."""
        return {"document_ids": self.document_ids, "first_rows": None if self.layout is None else self.layout.first_row}


def with_sinks(output: Tensor, logsumexp: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention [B, T, H, D] whose softmax is also over one logit [H] without a value: out * sigmoid(lse - sink)."""
    if sinks is None:
        return output
    return output * (logsumexp - sinks.to(logsumexp.dtype)).sigmoid().unsqueeze(-1).to(output.dtype)


def _cached_ids(state: AttentionState) -> Tensor:
    if state.document_ids is not None:
        return state.document_ids
    return torch.zeros(state.key.shape[:2], dtype=torch.int32, device=state.key.device)


def continued(rows: Rows, state: AttentionState) -> Rows:
    """The same queries; cached keys come before the new ones."""
    ids, labels = rows.document_ids, rows.key_labels
    if ids is not None:
        ids = torch.cat((_cached_ids(state), ids), dim=1)
    if labels is not None and state.key_labels is not None:
        labels = torch.cat((state.key_labels, labels), dim=1)
    # An empty cache is in the dtype of the weights, which under autocast is not that of the keys.
    past_key, past_value = keys_like(state.key, rows.key), state.value.to(rows.value.dtype)
    key, value = torch.cat((past_key, rows.key), dim=1), torch.cat((past_value, rows.value), dim=1)
    return replace(rows, key=key, value=value, document_ids=ids, key_labels=labels)


def after_earlier_slices(rows: Rows, slices: Slices, limit: int | None) -> Rows:
    """The same queries; the last `limit` keys of earlier slices, or all of them, come before this slice's own."""

    def after(x: Tensor) -> Tensor:
        return torch.cat((slices.before(x, limit), x), dim=1)

    labels = None if rows.key_labels is None else after(rows.key_labels)
    ids = slices.ids_from(limit)
    rows = replace(rows, key=after(rows.key), value=after(rows.value), document_ids=ids, key_labels=labels)
    if slices.carried is None:
        return rows
    reach = slices.carried.key.shape[1] if limit is None else max(0, limit - slices.start)
    return continued(rows, slices.carried.latest(reach))
