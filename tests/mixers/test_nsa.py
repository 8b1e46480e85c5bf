"""Native sparse attention: equal to a naive form of the paper's equations, and sparse in a step."""

import math

import pytest
import torch

from longmix.analysis.causality import audit, mixer_function
from longmix.mixers.nsa import NSA
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.rotary import rotary_angles, rotate

SHAPE = ModelShape(d_model=32, num_layers=2, num_heads=4)
LENGTH = 41
IDS = torch.repeat_interleave(torch.arange(3), torch.tensor([17, 3, 21])).int().expand(1, -1)


def made(**settings) -> NSA:
    torch.manual_seed(3)
    mixer = NSA(SHAPE, 0, **settings).double()
    with torch.no_grad():
        mixer.gate.weight.normal_(std=0.3)
        for network in (mixer.compress_key, mixer.compress_value):
            network.position.normal_(std=0.3)
    return mixer


def naive(mixer: NSA, x: torch.Tensor) -> torch.Tensor:
    """Equations 5 to 12 for one document x [T, D], one query at a time; blocks are numbered from 1, as published."""
    heads, shared, dim = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    size, stride, block = mixer.compress_block, mixer.compress_stride, mixer.block
    query = mixer.query_norm(mixer.query(x).view(-1, heads, dim))
    keys = mixer.key_norm(mixer.key(x).view(-1, 3, shared, dim)).unbind(1)
    values = mixer.value(x).view(-1, 3, shared, dim).unbind(1)
    angles = [a[0] for a in rotary_angles(torch.arange(len(x))[None], mixer.rotary)]
    turned, key2, key3 = (rotate(heads, *angles) for heads in (query, *keys[1:]))
    starts = range(0, len(x) - size + 1, stride)

    def phi(network, rows):
        placed = (rows + network.position[:, None]).transpose(0, 1).flatten(1)
        return torch.nn.functional.gelu(placed @ network.enter.T) @ network.leave.T

    coarse_key = [mixer.compressed_norm(phi(mixer.compress_key, keys[0][s : s + size])) for s in starts]
    coarse_value = [phi(mixer.compress_value, values[0][s : s + size]) for s in starts]

    def soft(q, k, v):
        return torch.softmax(k @ q * dim**-0.5, 0) @ v

    gates = torch.sigmoid(mixer.gate(x)).view(-1, heads, 3)
    outputs = []
    for t in range(len(x)):
        ended = [n for n, s in enumerate(starts) if s + size <= t + 1]
        weights = torch.zeros(heads, len(starts) + 1 + size + block, dtype=x.dtype)
        first = [torch.zeros(dim, dtype=x.dtype)] * heads
        for h in range(heads) if ended else ():
            k, v = (torch.stack([c[n][h * shared // heads] for n in ended]) for c in (coarse_key, coarse_value))
            share = torch.softmax(k @ query[t, h] * dim**-0.5, 0)
            weights[h, 1 : len(ended) + 1] = share.detach()
            first[h] = share @ v
        own = t // block + 1
        for h in range(heads):
            group = slice(h * shared // heads * (heads // shared), (h * shared // heads + 1) * (heads // shared))
            importance = {}
            for j in range(1, own - mixer.local + 1):
                places = [block // stride * j - m - n for m in range(block // stride) for n in range(size // stride)]
                importance[j] = sum(float(weights[group, p].sum()) for p in places if p > 0)
            forced = {1, *range(max(1, own - mixer.local + 1), own + 1)}
            alike = {j: round(1024 * math.log2(max(m, 1e-300))) for j, m in importance.items()}
            best = sorted(set(importance) - forced, key=lambda j: (-alike[j], j))
            chosen = sorted(forced | set(best[: mixer.blocks - mixer.local - 1]))
            seen = torch.tensor([i for j in chosen for i in range((j - 1) * block, min(j * block, t + 1))])
            near = slice(max(0, t + 1 - mixer.window), t + 1)
            k = h * shared // heads
            second = soft(turned[t, h], key2[seen, k], values[1][seen, k])
            third = soft(turned[t, h], key3[near, k], values[2][near, k])
            outputs.append(gates[t, h, 0] * first[h] + gates[t, h, 1] * second + gates[t, h, 2] * third)
    return mixer.output(torch.stack(outputs).view(len(x), -1))


CASES = {
    "plain": ({"blocks": 4, "local": 2}, None),
    "overlapping-grouped": ({"block": 4, "compress_block": 4, "num_kv_heads": 2, "local": 1}, None),
    "packed-grouped": ({"block": 6, "compress_block": 4, "num_kv_heads": 1, "local": 1}, IDS),
    "without-norms": ({"compress_stride": 1, "compress_block": 3, "qk_norm": False, "compress_hidden": 5}, IDS),
}


@pytest.mark.parametrize(("settings", "ids"), CASES.values(), ids=CASES)
def test_output_and_gradients_are_those_of_the_equations(settings, ids):
    usual = {"block": 4, "compress_block": 2, "compress_stride": 2, "blocks": 3, "local": 2, "window": 5}
    mixer = made(**{**usual, **settings})
    x = torch.randn(1, LENGTH, 32, dtype=torch.float64).requires_grad_()
    found = mixer(x, document_ids=ids).y
    pieces = [x[0]] if ids is None else [x[0][ids[0] == n] for n in range(3)]
    wanted = torch.cat([naive(mixer, piece) for piece in pieces])[None]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    grad = torch.randn_like(wanted)
    parameters = {"x": x, **dict(mixer.named_parameters())}
    for (name, _), a, b in zip(
        parameters.items(), *(torch.autograd.grad(y, parameters.values(), grad) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=name)


def test_a_step_reads_what_it_chooses_alone():
    """All other keys are NaN in the state, and the step does not notice."""
    mixer = made(block=4, compress_block=4, compress_stride=2, blocks=3, local=1, window=3, num_kv_heads=1)
    x = torch.randn(1, LENGTH, 32, dtype=torch.float64)
    before = mixer(x[:, :-1], state=mixer.init_state(1)).state
    wanted = mixer(x[:, -1:], state=before).y
    read = []
    for row in range(LENGTH - 1):
        keys = before.seen.key.clone()
        keys[:, row] = torch.nan
        changed = type(before)(type(before.seen)(**{**vars(before.seen), "key": keys}), before.key, before.value)
        read.append(not torch.equal(mixer(x[:, -1:], state=changed).y, wanted))
    assert read[:4] == [True] * 4 and read[-2:] == [True] * 2
    assert sum(read) == 4 + 4 + 3 or sum(read) == 4 + 4 + 2  # first, chosen, and the window or the end of a block
    assert mixer.step_bytes(100_000) < mixer.state_bytes(100_000) / 5


@pytest.mark.parametrize("grouped", [1, 2, 4])
def test_of_equal_blocks_the_same_are_chosen_however_a_row_is_cut(grouped):
    """In a text that repeats itself, blocks have equal importance; rounding must not choose among them."""
    settings = {"block": 4, "compress_block": 4, "compress_stride": 2, "blocks": 4, "local": 1, "window": 3}
    for seed in range(4):
        mixer = made(**settings, num_kv_heads=grouped)
        generator = torch.Generator().manual_seed(seed)
        words = torch.randn(3, 32, dtype=torch.float64, generator=generator)
        x = words[torch.randint(3, (8,), generator=generator)].repeat(10, 1)[None]
        with torch.no_grad():
            whole = mixer(x).y
            for split in (1, 13):
                state, found = mixer.init_state(1), []
                for piece in x.split(split, 1):
                    output = mixer(piece, state=state)
                    state = output.state
                    found.append(output.y)
                torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-12)


class Early(NSA):
    """A control that leaks: importance is that of all compressed blocks, those that have not ended included."""

    def _chosen(self, query, key, logsumexp, seen, allowed, parts):
        seen = seen[0], torch.full_like(seen[1], key.shape[1])
        return super()._chosen(query, key, logsumexp.nan_to_num(neginf=0.0), seen, allowed, parts)


@pytest.mark.parametrize(("kind", "leaks"), [(NSA, False), (Early, True)])
def test_the_audit_sees_who_chooses_by_later_tokens(kind, leaks):
    torch.manual_seed(0)
    settings = {"block": 4, "compress_block": 4, "compress_stride": 2, "blocks": 3, "local": 1, "window": 3}
    mixer = kind(SHAPE, 0, **settings).double().eval()
    found = audit(mixer_function(mixer), torch.randn(2, 40, 32, dtype=torch.float64))
    assert any(finding.leaks for finding in found) is leaks
