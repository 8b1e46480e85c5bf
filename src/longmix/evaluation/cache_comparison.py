"""Several caches read the same rows side by side: what each loses against the exact one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longmix.batch import IGNORE_INDEX
from longmix.caches.cache import CacheKind
from longmix.caches.exact import Exact
from longmix.caches.named import names_the_cache
from longmix.evaluation.cached_rows import CachedRows, Prompted
from longmix.model.backbone import LanguageModel

EXACT = Exact.name
"""The name of the cache that the others are held against."""

BINS = 8
"""Number of buckets of distances from the prompt, all equally long."""


@dataclass
class Tally:
    """Sums over the targets of one cache.

    Attributes:
        nats, divergences, hits, counts: float64 [1 + n], by the place of a target in `Prompted.targets`; rows of
            several lengths are laid together from the first token on.
        found: of each row, the group, and whether all its targets were the likeliest tokens.
        prompts: tokens of the prompts of all rows.
        held, counted_held, read, counted_read: bytes of all rows, see `CachedRows`.
    """

    nats: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    divergences: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    hits: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    found: list[tuple[float, bool]] = field(default_factory=list)
    prompts: int = 0
    held: float = 0.0
    counted_held: float = 0.0
    read: float = 0.0
    counted_read: float = 0.0

    def add(self, rows: Prompted, sums: Mapping[str, Tensor], read: CachedRows) -> None:
        """Add a batch: `nats`, `divergences`, `hits` and `counts` [B, 1 + n] by name, and its bytes."""
        for name, each in sums.items():
            before, new = getattr(self, name), each.sum(0).cpu()
            size = max(len(before), len(new))
            setattr(self, name, sum(torch.nn.functional.pad(x, (0, size - len(x))) for x in (before, new)))
        whole = (sums["hits"].sum(1) == sums["counts"].sum(1)).tolist()
        groups = rows.groups or [0.0] * len(whole)
        self.found += list(zip(groups, whole, strict=True))
        batch = len(rows.prompt)
        self.prompts += rows.prompt.numel()
        self.held += batch * read.held
        self.counted_held += batch * read.counted_held
        self.read += batch * read.read_bytes
        self.counted_read += batch * read.counted_read

    def mean(self, name: str) -> float:
        """The mean of sums over all targets."""
        return float(getattr(self, name).sum() / self.counts.sum().clamp(min=1))

    def share_found(self) -> float:
        """The share of rows of which every target was met."""
        return sum(whole for _, whole in self.found) / max(1, len(self.found))

    def by_group(self) -> list[tuple[float, float]]:
        """The share of rows found, of each group."""
        groups = {group: [whole for own, whole in self.found if own == group] for group, _ in self.found}
        return [(group, sum(whole) / len(whole)) for group, whole in groups.items()]

    def bytes(self) -> dict[str, float]:
        """Mean bytes of a row by name, rounded."""
        names = {"held_bytes": self.held, "counted_held_bytes": self.counted_held}
        names |= {"read_bytes": self.read, "counted_read_bytes": self.counted_read}
        return {name: round(total / max(1, len(self.found))) for name, total in names.items()}

    def by_distance(self) -> list[dict[str, float]]:
        """Loss and divergence of buckets of tokens read since the prompt: `{start, end, loss, kl, targets}`."""
        last = len(self.counts)
        edges = sorted({1 + (last - 1) * edge // BINS for edge in range(BINS + 1)})
        found = []
        for start, end in pairwise(edges):
            count = float(self.counts[start:end].sum())
            if count:
                loss, kl = (float(x[start:end].sum()) / count for x in (self.nats, self.divergences))
                found.append({"start": start, "end": end - 1, "loss": loss, "kl": kl, "targets": int(count)})
        return found


def compare(
    model: LanguageModel,
    kinds: Mapping[str, CacheKind],
    batches: Iterable[Prompted],
    draft: LanguageModel | None = None,
) -> dict[str, Tally]:
    """Read rows through caches, all of them side by side, and hold each against the one that is called `EXACT`.

    Args:
        model: in evaluation mode.
        kinds: by name, `EXACT` among them.
        batches: the rows.
        draft: see `CachedRows`.

    Returns:
        A tally for each name.

    Raises:
        ConfigError: no layer takes a kind, or a kind not these rows.
    """
    tallies = {name: Tally() for name in kinds}
    for rows in batches:
        readers = {}
        for name, kind in kinds.items():
            with names_the_cache(name, "task.caches"):
                readers[name] = CachedRows(model, kind, rows, draft)
        sums = _sums(rows, readers)
        for name, reader in readers.items():
            tallies[name].add(rows, sums[name], reader)
    return tallies


def _sums(rows: Prompted, readers: Mapping[str, CachedRows]) -> dict[str, dict[str, Tensor]]:
    """For each reader, four tensors float64 [B, 1 + n]; nothing of the vocabulary's size outlives a piece."""
    first = _first(readers[EXACT])
    parts = {name: [scored(_first(reader), first, rows.targets[:, :1])] for name, reader in readers.items()}
    exact = readers[EXACT].log_probabilities(rows.ahead, rows.together)
    others = {n: each.log_probabilities(rows.ahead, rows.together) for n, each in readers.items() if n != EXACT}
    place = 1
    for baseline in exact:
        targets = rows.targets[:, place : place + baseline.shape[1]]
        place += baseline.shape[1]
        parts[EXACT].append(scored(baseline, baseline, targets))
        for name, found in others.items():
            parts[name].append(scored(next(found), baseline, targets))
    return {
        name: {key: torch.cat([part[key] for part in found], 1) for key in found[0]} for name, found in parts.items()
    }


def _first(reader: CachedRows) -> Tensor:
    """What the prompt's last token predicts, log probabilities [B, 1, V]."""
    logits: Any = reader.session.logits
    return logits[:, None].float().log_softmax(-1)


def scored(found: Tensor, exact: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The loss of targets, divergences from exact distributions, and hits; 0 where there is no target.

    Args:
        found, exact: log probabilities [B, t, V].
        targets: int64 [B, t], or `IGNORE_INDEX`.

    Returns:
        float64 [B, t] each: `nats`, -log q(target); `divergences`, KL(p || q) = sum p (log p - log q), p being `exact`;
        `hits`, 1 where the target is the likeliest token; and `counts`, 1 where there is a target.
    """
    valid = targets != IGNORE_INDEX
    wanted = targets.clamp(min=0)[..., None]
    p, q = exact.double(), found.double()
    terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
    sums = {
        "nats": -q.gather(-1, wanted)[..., 0],
        "divergences": terms.sum(-1),
        "hits": (found.argmax(-1) == targets).double(),
        "counts": torch.ones_like(targets, dtype=torch.float64),
    }
    return {name: torch.where(valid, x, 0.0) for name, x in sums.items()}
