"""Linear attention whose heads are single channels: h_t = exp(f_t) h_{t-1} + exp(i_t) k_t v_t, y_t = s q_t h_t.

On a GPU this is a call of `linear_attention`. On a CPU matrices of weights within chunks would cost several times the
recurrence itself, so there it runs step by step, over about sqrt(T) chunks of sqrt(T) tokens at once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix_kernels.linear import LinearState, linear_attention
from longmix_kernels.runtime import on_gpu


def channel_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor,
    log_input: Tensor | None = None,
    scale: float = 1.0,
    initial_state: LinearState | None = None,
    carried_state: LinearState | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, LinearState]:
    """Return what `linear_attention` does for query, key and value [B, T, H, 1], and its state; see there."""
    if on_gpu(query):
        return linear_attention(
            query,
            key,
            value,
            log_decay=log_decay,
            log_input=log_input,
            scale=scale,
            initial_state=initial_state,
            carried_state=carried_state,
            document_ids=document_ids,
        )
    exact = log_decay.dtype
    added, decay = (key.to(exact) * value.to(exact)).squeeze(-1), log_decay.exp()
    if log_input is not None:
        added = added * log_input.exp()
    initial, carried = (None if state is None else state.memory[..., 0, 0] for state in (initial_state, carried_state))
    first = initial if carried is None else carried
    entering = torch.zeros_like(added[:, 0]) if first is None else decay[:, 0] * first
    if document_ids is not None and (query.shape[1] > 1 or torch.is_grad_enabled()):
        begins = (document_ids[:, 1:] != document_ids[:, :-1]).unsqueeze(-1)
        begins = F.pad(begins, (0, 0, 1, 0))
        if initial is not None:
            added = added + (decay * initial.unsqueeze(1)).masked_fill(~begins, 0.0)
        decay = decay.masked_fill(begins, 0.0)
    hidden = _scan(torch.cat([added[:, :1] + entering.unsqueeze(1), added[:, 1:]], 1), decay)
    output = (scale * query.squeeze(-1) * hidden).unsqueeze(-1).to(query.dtype)
    return output, LinearState(hidden[:, -1, :, None, None])


def _scan(added: Tensor, decay: Tensor) -> Tensor:
    """h [B, T, H] of h_t = decay_t h_{t-1} + added_t, from h = 0."""
    length = added.shape[1]
    if length == 1 and not added.requires_grad:
        return added
    chunk = max(1, round(math.sqrt(length)))
    padding = (0, 0, 0, -length % chunk)
    added, decay = (F.pad(x, padding).unflatten(1, (-1, chunk)) for x in (added, decay))
    hidden, kept = [added[:, :, 0]], [decay[:, :, 0]]
    for step in range(1, chunk):
        now = decay[:, :, step]
        hidden.append(torch.addcmul(added[:, :, step], now, hidden[-1]))
        kept.append(now * kept[-1])
    entering = [torch.zeros_like(hidden[-1][:, 0])]
    for index in range(added.shape[1] - 1):
        entering.append(torch.addcmul(hidden[-1][:, index], kept[-1][:, index], entering[-1]))
    before = torch.stack(entering, 1).unsqueeze(2)
    return torch.addcmul(torch.stack(hidden, 2), torch.stack(kept, 2), before).flatten(1, 2)[:, :length]
