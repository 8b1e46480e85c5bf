"""A kernel without the rest: gated linear attention with its gradients, on a GPU or on a CPU."""

import torch

from longmix_kernels import linear_attention

if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, length, heads, key_width, value_width = 2, 256, 4, 32, 64
    query, key = (torch.randn(batch, length, heads, key_width, device=device, requires_grad=True) for _ in range(2))
    value = torch.randn(batch, length, heads, value_width, device=device, requires_grad=True)
    log_decay = torch.nn.functional.logsigmoid(torch.randn(batch, length, heads, device=device) + 4)

    whole, _ = linear_attention(query, key, value, log_decay=log_decay)
    whole.square().mean().backward()
    assert query.grad is not None
    print(f"output {list(whole.shape)}, gradient of the queries {query.grad.norm().item():.3e}")

    # a state takes the place of all tokens before, however many they were
    half, state = length // 2, None
    parts = []
    for part in (slice(0, half), slice(half, length)):
        inputs = [tensor[:, part].detach() for tensor in (query, key, value)]
        output, state = linear_attention(*inputs, log_decay=log_decay[:, part], initial_state=state)
        parts.append(output)
    print(f"largest difference in two parts {(torch.cat(parts, 1) - whole).abs().max().item():.1e}")
