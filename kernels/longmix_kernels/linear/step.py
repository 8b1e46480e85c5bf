"""Scalar-gated linear attention of few tokens, one after the other: what generation calls for each token.

Chunks are of use to many tokens. For one, copies into chunks, weights within them and their sums cost many times the
recurrence, which is one update of the state and one reading. The equations are those of `reference`.
"""

import torch

from longmix_kernels.linear.inputs import Inputs


def step_forward(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Compute token by token, without gradients; every row is one document, which goes on from the carried state.

    Returns:
        The output [B, T, H, Dv] in the dtype of `query`; memory, normaliser and log scale of the state after the last
        token; the last two mean nothing without `normalize`.
    """
    memory, normalizer, log_scale = entering(inputs)
    exact = inputs.log_decay.dtype
    query, key, value = (x.to(exact) for x in (inputs.query, inputs.key, inputs.value))
    outputs = []
    for t in range(query.shape[1]):
        decay, gate = inputs.log_decay[:, t], None if inputs.log_input is None else inputs.log_input[:, t]
        if inputs.normalize:
            decay = decay if log_scale is None else decay + log_scale
            log_scale = decay.clamp_min(0.0) if gate is None else torch.maximum(decay, gate)
            decay, gate = decay - log_scale, -log_scale if gate is None else gate - log_scale
        written = key[:, t] if gate is None else key[:, t] * gate.exp().unsqueeze(-1)
        columns, row = written.unsqueeze(-1), value[:, t].unsqueeze(-2)
        if memory is None:
            memory, normalizer = columns * row, written
        else:
            kept = decay.exp().unsqueeze(-1)
            memory = torch.addcmul(memory * kept.unsqueeze(-1), columns, row)
            normalizer = None if normalizer is None else torch.addcmul(written, normalizer, kept)
        scaled = query[:, t] if inputs.scale == 1 else query[:, t] * inputs.scale
        read = (scaled.unsqueeze(-2) @ memory).squeeze(-2)
        if inputs.normalize and normalizer is not None and log_scale is not None:
            along = (normalizer * scaled).sum(-1)
            read = read / torch.maximum(along.abs(), (-log_scale).exp()).unsqueeze(-1)
        outputs.append(read)
    output = outputs[0].unsqueeze(1) if len(outputs) == 1 else torch.stack(outputs, 1)
    assert memory is not None
    others = (memory, memory) if normalizer is None or log_scale is None else (normalizer, log_scale)
    return output.to(inputs.query.dtype), memory, *others


def entering(inputs: Inputs) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return memory, normaliser and log scale before the first token; None for zeros."""
    if inputs.carried_memory is None:
        return inputs.memory, inputs.normalizer, inputs.log_scale
    return inputs.carried_memory, inputs.carried_normalizer, inputs.carried_log_scale
