"""Parallax: softmax attention whose weights a learned probe of each query tilts along the keys (arXiv 2605.29157).

    r_i = rotate(W_r x_i)                                        the probe, rotated as the query is
    p_ij = softmax_j(q_i . k_j / sqrt(d)),  t_ij = r_i . k_j     over the j <= i of the document, or the last `window`
    e_i = sum_j p_ij t_ij
    y_i = W_o sum_j p_ij (1 + e_i - t_ij) v_j

It is the scalable form of Local Linear Attention (arXiv 2510.01450): softmax attention averages the values around a
query, and a regression of the values on the keys also corrects for keys that lie to one side of it. Parallax learns the
slope of that regression instead of solving for it at every query.

Notable: the weights of a row sum to 1, and may be negative or above 1. `W_r = 0` is exactly `flash` with the other
weights. A shift of all keys changes nothing. What is cached is what `flash` caches, since a step makes its own probe;
every pair of a query and a key costs 8 d operations instead of 4 d. `W_r` is a matrix for the optimizer, as the authors
find its gain larger under Muon than under AdamW; the metric `probe_rms` shows how large the probe grows.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.distributed.balance import balanced, rows_needed
from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import AttentionState, Rows
from longmix.mixers.parts.base import REAL, TOKENS, ModelShape, at_most
from longmix.mixers.parts.head_options import HeadNorm, HeadOptions
from longmix.mixers.parts.metrics import Metric, RootMeanSquare
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix_kernels.attention import probe_attention


@dataclass
class ProbeRows(Rows):
    """The inputs of attention with a probe.

    Attributes:
        probe: [B, Tq, Hq, head_dim].
    """

    probe: Tensor | None = None


class Parallax(SoftmaxAttention):
    """Every token sees itself and earlier tokens of its document, with weights that its probe tilts.

    Args:
        window: visible keys including the token itself; None for all.
        probe_norm: RMSNorm on each head of the probe, as on queries and keys.
        probe_std: standard deviation of the weights of the probe at first; with 0 training begins as `flash`.

    The other arguments are those of `SoftmaxAttention`.

    Raises:
        ConfigError: a window below 1, or a negative standard deviation.
    """

    pairwise = True
    refused: ClassVar = {
        "sink_logits": "the tilt of its probe keeps the sum of the weights at 1",
        "heads_router": "its probes stand beside its queries",
    }
    sizes: ClassVar = {"window": 1}
    changeable: ClassVar = (*SoftmaxAttention.changeable, "window")

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        window: int | None = None,
        probe_norm: bool = False,
        probe_std: float = 0.02,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, window=window)
        at_most(REAL, probe_std=probe_std)
        if window is not None and window < 1:
            raise ConfigError(f"mixer.window={window} must be at least 1, as a token sees itself, or null for all.")
        if probe_std < 0 or not math.isfinite(probe_std):
            raise ConfigError(f"mixer.probe_std={probe_std} must be at least 0.")
        self.window = window
        self.probe = nn.Linear(self.d_model, self.d_model, bias=False)
        nn.init.normal_(self.probe.weight, std=probe_std)
        self.probe_norm = HeadNorm(self.head_dim, eps=shape.norm_eps) if probe_norm else nn.Identity()

    @property
    def carries_in_slices(self) -> bool:  # type: ignore[override]
        """Whether a state may come before slices: where a window bounds it."""
        return self.window is not None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `SoftmaxAttention`; each query head is followed by its probe, so that both are placed alike."""
        query, key, value = super().project(x)
        probe = self.probe_norm(self.probe(x).unflatten(-1, (-1, self.head_dim)))
        return torch.stack((query, probe.to(query.dtype)), 3).flatten(2, 3), key, value

    def rows(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None) -> Rows:
        """The inputs of attention, the probes apart from the queries."""
        query, probe = query.to(value.dtype).unflatten(2, (-1, 2)).unbind(3)
        return ProbeRows(query, key.to(value.dtype), value, document_ids, probe=probe)

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Call the engine; the columns of a bias are no part of what the probe measures."""
        assert isinstance(rows, ProbeRows) and rows.probe is not None
        probe = F.pad(rows.probe, (0, rows.key.shape[-1] - self.head_dim))
        scores = {"scale": rows.scale, "alibi_slopes": rows.slopes}
        mixed = probe_attention(rows.query, probe, rows.key, rows.value, **(scores | rows.bounds(self.window)))
        return mixed, {"probe_rms": RootMeanSquare.of(rows.probe)}

    def attend_after(self, rows: Rows, slices: Slices) -> tuple[Tensor, dict[str, Metric]]:
        """Attend to earlier slices too. Where slices are balanced, all processes get equal work."""
        if not slices.balanced or self.window is not None:
            return super().attend_after(rows, slices)
        assert isinstance(rows, ProbeRows) and rows.probe is not None
        key, value, width = rows_needed(rows.key, slices), rows_needed(rows.value, slices), rows.query.shape[-1]

        def attend(both: Tensor, end: int) -> Tensor:
            ids = None if slices.whole_ids is None else slices.whole_ids[:, :end]
            some: dict[str, Any] = {"key": key[:, :end], "value": value[:, :end], "document_ids": ids}
            return self.attend(replace(rows, query=both[..., :width], probe=both[..., width:], **some))[0]

        mixed = balanced(attend, torch.cat((rows.query, rows.probe), -1), slices)
        return mixed, {"probe_rms": RootMeanSquare.of(rows.probe)}

    def engine_window(self) -> int | None:
        """The window."""
        return self.window

    def visible_pairs(self, length: int) -> int:
        """The causal triangle with its diagonal; from a full window on, `window` keys for every token."""
        full = length if self.window is None else min(self.window, length)
        return full * (full + 1) // 2 + (length - full) * full

    def cached_keys(self) -> int | None:
        """All, or `window - 1`, because the next token sees itself too; at least one, which tells its document."""
        return None if self.window is None else max(1, self.window - 1)

    def state_between_documents(self, batch: int) -> AttentionState:
        """With a window a full cache of keys that no document sees, for `batch` rows: later states have its shape."""
        state, keys = self.init_state(batch), self.cached_keys()
        if keys is None:
            return state
        key, value = (x.new_zeros(batch, keys, *x.shape[2:]) for x in (state.key, state.value))
        ids = torch.full((batch, keys), -1, dtype=torch.int32, device=key.device)
        return replace(state, key=key, value=value, document_ids=ids)

    def flops(self, length: int) -> int:
        """As in `SoftmaxAttention`; every visible pair costs as much again for the probe."""
        return super().flops(length) + 4 * self.num_heads * self.head_dim * self.visible_pairs(length)
