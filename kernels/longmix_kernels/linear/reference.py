"""The definition of scalar-gated linear attention, twice; exact in float64 and differentiated by autograd.

With decays exp(f_t), input gates exp(i_t) and the state (C, n), per head,

    C_t = exp(f_t) C_{t-1} + exp(i_t) k_t v_t^T             y_t = C_t^T (s q_t)                           plain
    n_t = exp(f_t) n_{t-1} + exp(i_t) k_t                   y_t = C_t^T (s q_t) / max(|n_t . s q_t|, 1)   normalised

(Beck et al. 2024, arXiv 2405.04517, equations 19-27: the mLSTM; with f constant, retention and Lightning Attention.) A
document begins from the initial state, the first one of a row from the carried state.

`recurrent` keeps C and n as they are divided by exp(m_t), m_t = max(f_t + m_{t-1}, i_t), so that exp(i_t) cannot
overflow. The division cancels in y, so m is a constant to autograd, except that of the initial state. `parallel` is the
same sum written with the matrix of all weights exp(f_{j+1} + ... + f_t + i_j).
"""

import torch

from longmix_kernels.linear.state import LinearState


def recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    log_input: torch.Tensor,
    state: LinearState,
    carried: LinearState,
    document_ids: torch.Tensor | None,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, LinearState]:
    """Compute token by token.

    Args:
        query, key: [B, T, H, Dk].
        value: [B, T, H, Dv].
        log_decay, log_input: [B, T, H].
        state: before each document.
        carried: before the first token of each row.
        document_ids: integer [B, T], non-decreasing along T, or None.
        normalize: divide by the normaliser.
        scale: factor on the queries.

    Returns:
        The output [B, T, H, Dv] in the dtype of `query`, and the state after the last token.
    """
    dtype, exact = query.dtype, state.memory.dtype
    query, key, value = (x.to(exact) for x in (query, key, value))
    batch, length, heads, _ = query.shape
    zero = log_decay.new_zeros(batch, heads, dtype=exact)
    initial, first = (
        (
            x.memory,
            zero[..., None] if x.normalizer is None else x.normalizer,
            zero if x.log_scale is None else x.log_scale,
        )
        for x in (state, carried)
    )
    starts = torch.zeros(batch, length, dtype=torch.bool, device=query.device)
    if document_ids is not None:
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    memory, normalizer, log_scale = first
    outputs = []
    for t in range(length):
        memory, normalizer, log_scale = (
            torch.where(starts[:, t].view(-1, *[1] * (now.dim() - 1)), new, now)
            for new, now in zip(initial, (memory, normalizer, log_scale), strict=True)
        )
        decay, gate = log_decay[:, t].to(exact), log_input[:, t].to(exact)
        new_scale = torch.maximum(decay + log_scale, gate).detach() if normalize else zero
        kept, taken = (decay + log_scale - new_scale).exp(), (gate - new_scale).exp()
        k, q = key[:, t], scale * query[:, t]
        memory = kept[..., None, None] * memory + (taken[..., None] * k).unsqueeze(-1) * value[:, t].unsqueeze(-2)
        read = torch.einsum("bhkv,bhk->bhv", memory, q)
        if normalize:
            normalizer = kept[..., None] * normalizer + taken[..., None] * k
            along = (normalizer * q).sum(-1)
            read = read / torch.maximum(along.abs(), (-new_scale).exp())[..., None]
        log_scale = new_scale
        outputs.append(read)
    final = LinearState(memory, normalizer, log_scale) if normalize else LinearState(memory)
    return torch.stack(outputs, 1).to(dtype), final


def parallel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    log_input: torch.Tensor,
    state: LinearState,
    carried: LinearState,
    document_ids: torch.Tensor | None,
    normalize: bool,
    scale: float,
) -> torch.Tensor:
    """Compute all outputs from the matrix of weights, in memory T * T; arguments and result as `recurrent`."""
    dtype, exact = query.dtype, state.memory.dtype
    batch, length, heads, _ = query.shape
    query, key, value = (x.to(exact).transpose(1, 2) for x in (scale * query, key, value))
    decay, gate = (x.to(exact).transpose(1, 2) for x in (log_decay, log_input))
    ids = torch.zeros(batch, length, device=query.device) if document_ids is None else document_ids
    row = torch.arange(length, device=query.device)
    same = ids[:, None, :, None] == ids[:, None, None, :]  # [B, 1, T, T]
    earlier = same & (row[:, None] >= row)

    total = decay.cumsum(-1)
    first = same.int().argmax(-1)  # [B, 1, T], where each token's document begins
    before = (total - decay).gather(-1, first.expand(batch, heads, length))
    log_weight = (total[..., :, None] - total[..., None, :] + gate[..., None, :]).masked_fill(~earlier, -torch.inf)
    from_state = total - before
    own = (first == 0).expand(batch, heads, length)  # whose document is the row's first
    if state.log_scale is not None and carried.log_scale is not None:
        from_state = from_state + torch.where(own, carried.log_scale[..., None], state.log_scale[..., None])
    highest = torch.maximum(log_weight.amax(-1), from_state).detach() if normalize else torch.zeros_like(total)
    scores = (query @ key.mT) * (log_weight - highest[..., None]).exp()
    share = (from_state - highest).exp()
    held = torch.where(own[..., None], query @ carried.memory, query @ state.memory)
    read = scores @ value + share[..., None] * held
    if normalize:
        along = scores.sum(-1)
        if state.normalizer is not None and carried.normalizer is not None:
            of_carried, of_initial = (query @ x.unsqueeze(-1) for x in (carried.normalizer, state.normalizer))
            along = along + share * torch.where(own, of_carried.squeeze(-1), of_initial.squeeze(-1))
        read = read / torch.maximum(along.abs(), (-highest).exp())[..., None]
    return read.transpose(1, 2).to(dtype)
