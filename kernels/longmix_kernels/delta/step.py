"""The delta rule of few tokens, one after the other: what generation calls for each token.

Chunks are of use to many tokens. For one, copies into chunks, inverses and their products cost many times the
recurrence, which reads the state, updates it and reads it again. The equations are those of `reference`.
"""

import torch

from longmix_kernels.delta.inputs import Inputs


def step_forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute token by token, without gradients; every row is one document, which goes on from the carried state.

    Returns:
        The output [B, T, H, V] in the dtype of `query`, and the state after the last token.
    """
    state = entering(inputs)
    exact = inputs.log_decay.dtype
    query, key, value = (x.to(exact) for x in (inputs.query, inputs.key, inputs.value))
    reads, writes = (None if x is None else x.to(exact) for x in (inputs.low_rank_read, inputs.low_rank_write))
    decays = inputs.log_decay.exp()
    if decays.dim() == 3:
        decays = decays.unsqueeze(-1)
    outputs = []
    for t in range(query.shape[1]):
        columns, row = key[:, t].unsqueeze(-1), value[:, t].unsqueeze(-2)
        if state is None:
            state = columns * row
        else:
            kept = state * decays[:, t].unsqueeze(-1)
            if reads is not None and writes is not None:
                kept = kept.addcmul_(writes[:, t].unsqueeze(-1), reads[:, t].unsqueeze(-2) @ state)
            state = kept.addcmul_(columns, row)
        scaled = query[:, t] if inputs.scale == 1 else query[:, t] * inputs.scale
        outputs.append((scaled.unsqueeze(-2) @ state).squeeze(-2))
    output = outputs[0].unsqueeze(1) if len(outputs) == 1 else torch.stack(outputs, 1)
    assert state is not None
    return output.to(inputs.query.dtype), state


def entering(inputs: Inputs) -> torch.Tensor | None:
    """Return the state before the first token; None for zeros."""
    return inputs.initial_state if inputs.carried_state is None else inputs.carried_state
