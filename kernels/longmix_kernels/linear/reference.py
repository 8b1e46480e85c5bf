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

from longmix_kernels.linear.inputs import Inputs
from longmix_kernels.linear.state import LinearState, empty_state


def reference_forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute token by token; `chunk_size` changes nothing.

    Returns:
        The output [B, T, H, Dv] in the dtype of `query`, and memory, normaliser and log scale of the state after the
        last token; the last two mean nothing without `normalize`.
    """
    initial, carried = states_of(inputs)
    exact = initial.memory.dtype
    query, key, value = (x.to(exact) for x in (inputs.query, inputs.key, inputs.value))
    log_decay = inputs.log_decay
    log_input = torch.zeros_like(log_decay) if inputs.log_input is None else inputs.log_input
    batch, length, heads, _ = query.shape
    zero = log_decay.new_zeros(batch, heads, dtype=exact)
    first, (memory, normalizer, log_scale) = (
        (
            x.memory,
            zero[..., None] if x.normalizer is None else x.normalizer,
            zero if x.log_scale is None else x.log_scale,
        )
        for x in (initial, carried)
    )
    starts = torch.zeros(batch, length, dtype=torch.bool, device=query.device)
    if inputs.document_ids is not None:
        starts[:, 1:] = inputs.document_ids[:, 1:] != inputs.document_ids[:, :-1]
    outputs = []
    for t in range(length):
        memory, normalizer, log_scale = (
            torch.where(starts[:, t].view(-1, *[1] * (now.dim() - 1)), new, now)
            for new, now in zip(first, (memory, normalizer, log_scale), strict=True)
        )
        decay, gate = log_decay[:, t].to(exact), log_input[:, t].to(exact)
        new_scale = torch.maximum(decay + log_scale, gate).detach() if inputs.normalize else zero
        kept, taken = (decay + log_scale - new_scale).exp(), (gate - new_scale).exp()
        k, q = key[:, t], inputs.scale * query[:, t]
        memory = kept[..., None, None] * memory + (taken[..., None] * k).unsqueeze(-1) * value[:, t].unsqueeze(-2)
        read = torch.einsum("bhkv,bhk->bhv", memory, q)
        if inputs.normalize:
            normalizer = kept[..., None] * normalizer + taken[..., None] * k
            along = (normalizer * q).sum(-1)
            read = read / torch.maximum(along.abs(), (-new_scale).exp())[..., None]
        log_scale = new_scale
        outputs.append(read)
    return torch.stack(outputs, 1).to(inputs.query.dtype), memory, normalizer, log_scale


def parallel(inputs: Inputs) -> torch.Tensor:
    """Compute all outputs of `reference_forward` from the matrix of weights, in memory T * T."""
    state, carried = states_of(inputs)
    exact = state.memory.dtype
    batch, length, heads, _ = inputs.query.shape
    query, key, value = (x.to(exact).transpose(1, 2) for x in (inputs.scale * inputs.query, inputs.key, inputs.value))
    log_input = torch.zeros_like(inputs.log_decay) if inputs.log_input is None else inputs.log_input
    decay, gate = (x.to(exact).transpose(1, 2) for x in (inputs.log_decay, log_input))
    ids = inputs.document_ids
    ids = torch.zeros(batch, length, device=query.device) if ids is None else ids
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
    highest = torch.maximum(log_weight.amax(-1), from_state).detach() if inputs.normalize else torch.zeros_like(total)
    scores = (query @ key.mT) * (log_weight - highest[..., None]).exp()
    share = (from_state - highest).exp()
    held = torch.where(own[..., None], query @ carried.memory, query @ state.memory)
    read = scores @ value + share[..., None] * held
    if inputs.normalize:
        along = scores.sum(-1)
        if state.normalizer is not None and carried.normalizer is not None:
            of_carried, of_initial = (query @ x.unsqueeze(-1) for x in (carried.normalizer, state.normalizer))
            along = along + share * torch.where(own, of_carried.squeeze(-1), of_initial.squeeze(-1))
        read = read / torch.maximum(along.abs(), (-highest).exp())[..., None]
    return read.transpose(1, 2).to(inputs.query.dtype)


def states_of(inputs: Inputs) -> tuple[LinearState, LinearState]:
    """Return the states before each document and before the first token."""
    initial = empty_state(inputs.query, inputs.value, inputs.normalize)
    if inputs.memory is not None:
        initial = LinearState(inputs.memory, inputs.normalizer, inputs.log_scale)
    if inputs.carried_memory is None:
        return initial, initial
    return initial, LinearState(inputs.carried_memory, inputs.carried_normalizer, inputs.carried_log_scale)
