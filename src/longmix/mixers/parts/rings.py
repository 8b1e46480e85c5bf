"""Rings, the state of routed heads: for each cluster its latest keys and values.

A key goes to place `count % window` of its cluster's ring, so that a token costs O(window) whatever came before it.
Where gradients are off rings are written in place: the state that was passed in is used up, as a key-value cache is.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from longmix.mixers.parts.attention_state import AttentionState, Rows, keys_like
from longmix.mixers.parts.states import mixer_state


@mixer_state(bookkeeping=("count",))
@dataclass
class Rings:
    """The latest keys and values of each cluster, of the document that goes on.

    Attributes:
        key, value: [B, H, clusters * window + 1, head_dim]; the last row takes what belongs to no cluster.
        count: int64 [B, H, clusters], keys that the cluster has had.
        window: places of a ring.
    """

    key: Tensor
    value: Tensor
    count: Tensor
    window: int

    @classmethod
    def empty(
        cls, like: Tensor, batch: int, heads: int, clusters: int, window: int, head_dim: int, key_dim: int | None = None
    ) -> "Rings":
        """Rings without keys, in the dtype and on the device of `like`; keys have `key_dim` or `head_dim` channels."""
        widths = head_dim if key_dim is None else key_dim, head_dim
        key, value = (like.new_zeros(batch, heads, clusters * window + 1, width) for width in widths)
        count = torch.zeros(batch, heads, clusters, dtype=torch.int64, device=like.device)
        return cls(key, value, count, window)

    def kept_of(self, rows: Tensor) -> "Rings":
        """The rings of rows where `rows` [B] is set; the others are empty."""
        return replace(self, count=self.count * rows[:, None, None])

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """All places, cluster by cluster and oldest first.

        Returns:
            key and value [B, clusters * window, H, head_dim], labels int64 [B, clusters * window, H], which are
            `clusters` for an empty place.
        """
        clusters = self.count.shape[-1]
        place = torch.arange(self.window, device=self.count.device)
        count = self.count.unsqueeze(-1)
        cluster = torch.arange(clusters, device=count.device)[:, None]
        oldest = torch.where(count > self.window, count % self.window, 0)
        rows = (cluster * self.window + (oldest + place) % self.window).flatten(2)
        labels = torch.where(place < count, cluster, clusters).flatten(2)
        key, value = (_take(x, rows).transpose(1, 2) for x in (self.key, self.value))
        return key, value, labels.transpose(1, 2)

    def read(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ring of one cluster for each query head.

        Args:
            labels: [B, Hq], Hq a multiple of H.

        Returns:
            key and value [B, window, Hq, head_dim] in no order, and how many of their first rows are there [B, Hq].
        """
        group = labels.unflatten(1, (self.count.shape[1], -1)).long()
        place = torch.arange(self.window, device=labels.device)
        rows = (group.unsqueeze(-1) * self.window + place).flatten(2)
        key, value = (_take(x, rows).unflatten(2, (-1, self.window)).flatten(1, 2) for x in (self.key, self.value))
        there = self.count.gather(-1, group).flatten(1).clamp(max=self.window)
        return key.transpose(1, 2), value.transpose(1, 2), there

    def written(self, key: Tensor, value: Tensor, labels: Tensor, wanted: Tensor | None = None) -> "Rings":
        """The rings with new keys.

        Args:
            key, value: [B, T, H, head_dim], oldest first.
            labels: [B, T, H], `clusters` for none.
            wanted: bool [B, T], keys that are to be written; None for all.
        """
        clusters = self.count.shape[-1]
        labels = labels.long() if wanted is None else torch.where(wanted.unsqueeze(-1), labels.long(), clusters)
        member = F.one_hot(labels.transpose(1, 2), clusters + 1)  # [B, H, T, clusters + 1]
        labels = labels.transpose(1, 2)
        rank = member.cumsum(2).gather(-1, labels.unsqueeze(-1)).squeeze(-1) - 1
        new = member.sum(2)
        before = F.pad(self.count, (0, 1)).gather(-1, labels)
        row = labels * self.window + (before + rank) % self.window
        last = rank >= new.gather(-1, labels) - self.window
        row = torch.where((labels < clusters) & last, row, clusters * self.window)
        written = []
        for ring, x in ((self.key, key), (self.value, value)):
            ring = ring.clone() if torch.is_grad_enabled() else ring
            index = row.unsqueeze(-1).expand(*row.shape, ring.shape[-1])
            written.append(ring.scatter_(2, index, keys_like(x.transpose(1, 2), ring)))
        return Rings(written[0], written[1], self.count + new[..., :clusters], self.window)


@mixer_state()
@dataclass
class RoutingState:
    """The state of `Routing` in the modes that keep a bounded number of keys.

    Attributes:
        recent: of the local heads, and how the rows go on.
        rings: of the routed heads.
    """

    recent: AttentionState
    rings: Rings

    @property
    def last_id(self) -> Tensor:
        """int [B], the document of the last token; before the first one, of a row without ids."""
        ids = self.recent.document_ids
        return torch.zeros_like(self.next_position, dtype=torch.int32) if ids is None else ids[:, -1]

    @property
    def carried(self) -> Tensor | None:
        """As in `AttentionState`."""
        return self.recent.carried

    @property
    def next_position(self) -> Tensor:
        """int64 [B], see `AttentionState`."""
        return self.recent.next_position


def with_rings(rows: Rows, rings: Rings, ids: Tensor, last_id: Tensor) -> Rows:
    """Put what the rings hold before the new key rows.

    Args:
        rows: new queries [B, T, Hq, D] and key rows [B, n * T, H, D] with labels [B, n * T, H, 1].
        rings: of the tokens before them.
        ids: int32 [B, n * T], the documents of the new key rows.
        last_id: [B], the document of the rings.
    """
    assert rows.key_labels is not None
    key, value, labels = rings.rows()
    ids = torch.cat((last_id[:, None].expand(-1, key.shape[1]), ids), 1)
    return replace(
        rows,
        key=torch.cat((keys_like(key, rows.key), rows.key), 1),
        value=torch.cat((value.to(rows.value.dtype), rows.value), 1),
        key_labels=torch.cat((labels.unsqueeze(-1).to(rows.key_labels.dtype), rows.key_labels), 1),
        document_ids=ids,
    )


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Gather from `x` [B, H, S, D] the rows with indices [B, H, n]: [B, H, n, D]."""
    return x.gather(2, rows.unsqueeze(-1).expand(*rows.shape, x.shape[-1]))
