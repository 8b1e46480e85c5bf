"""The definition of the delta rule with diagonal-plus-low-rank transitions; exact in float64, autograd differentiates.

Per head, with the decay w_t = exp(g_t), the state S (keys by values) and vectors a (read), b (write), k, r of its keys,

    S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    y_t = S_t^T (s r_t)

(Peng et al. 2025, arXiv 2503.14456, equation 17, transposed.) What is read for removal is the state before the decay. A
document begins from the initial state, the first one of a row from the carried state. Special cases, with beta a write
strength and k of length 1:

    RWKV-7             a = -kappa, b = kappa * in-context learning rate, k = replacement key
    gated DeltaNet     a = -beta exp(g) k, b = k, k <- beta k, g one number a head
    Comba              a = -beta c k, b = k, k <- beta k, r <- r - d k, g, c and d one number a head
    Kimi delta         a = -beta exp(g) * k, b = k, k <- beta k
    DeltaNet           as gated, g = 0
    GLA                a = b = 0
"""

import torch

from longmix_kernels.delta.inputs import Inputs


def reference_forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute token by token; return the output [B, T, H, V] in the dtype of `query`, and the state after the last one.

    Neither `chunk_size` nor `min_log_decay` changes anything.
    """
    exact = inputs.log_decay.dtype
    query, key, value, log_decay = (x.to(exact) for x in (inputs.query, inputs.key, inputs.value, inputs.log_decay))
    read, write = (
        torch.zeros_like(query) if x is None else x.to(exact) for x in (inputs.low_rank_read, inputs.low_rank_write)
    )
    if log_decay.dim() == 3:
        log_decay = log_decay.unsqueeze(-1)
    initial = inputs.initial_state
    if initial is None:
        initial = query.new_zeros(query.shape[0], *query.shape[2:], value.shape[-1])
    starts = torch.zeros(query.shape[:2], dtype=torch.bool, device=query.device)
    if inputs.document_ids is not None:
        starts[:, 1:] = inputs.document_ids[:, 1:] != inputs.document_ids[:, :-1]
    state, outputs = initial if inputs.carried_state is None else inputs.carried_state, []
    for t in range(query.shape[1]):
        state = torch.where(starts[:, t].view(-1, 1, 1, 1), initial, state)
        removed = torch.einsum("bhk,bhkv->bhv", read[:, t], state)
        state = (
            log_decay[:, t].exp().unsqueeze(-1) * state
            + write[:, t].unsqueeze(-1) * removed.unsqueeze(-2)
            + key[:, t].unsqueeze(-1) * value[:, t].unsqueeze(-2)
        )
        outputs.append(torch.einsum("bhk,bhkv->bhv", inputs.scale * query[:, t], state))
    return torch.stack(outputs, 1).to(inputs.query.dtype), state
