"""The cases every implementation of the delta rule is held to, and how an error is measured."""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
INPUTS = ("query", "key", "value", "log_decay", "low_rank_read", "low_rank_write", "initial_state", "carried_state")

FASTEST_DECAY = -0.6065306597126334
"""RWKV-7's lower bound of the log decay, -exp(-1/2)."""


@dataclass(frozen=True)
class Case:
    """One call. Removal keys have length 1, and what is written back is at most what was read: RWKV-7's transitions."""

    name: str
    length: int = 100
    kind: str = "random"
    """"random"; "correlated" removal keys, nearly no decay and strong removal; "fastest" decay; "identical" keys.

    "overwriting" removes up to twice what is held, "reflecting" exactly that, again and again at one key.
    """
    low_rank: bool = True
    scalar_decay: bool = False
    with_state: bool = True
    with_carried: bool = False
    batch: int = 2
    heads: int = 2
    dim: int = 16
    value_dim: int = 24
    documents: tuple[int, ...] = field(default=())
    chunk_size: int | None = None

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor | None]:
        """The tensors named `INPUTS`, with gradients wanted; None for those that are missing."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        tokens = self.batch, self.length, self.heads
        removal, rate = normal(*tokens, self.dim), normal(*tokens, self.dim).sigmoid()
        decay = FASTEST_DECAY * normal(*tokens, self.dim).sigmoid()
        if self.kind == "correlated":
            removal, rate, decay = removal[:, :1] + 0.1 * removal, 0.85 + 0.1 * rate, 0.01 * decay
        elif self.kind in ("identical", "reflecting"):
            removal, rate, decay = removal[:, :1].expand_as(removal), torch.ones_like(rate), torch.zeros_like(decay)
            rate = 2.0 * rate if self.kind == "reflecting" else rate
        elif self.kind == "overwriting":
            removal, rate, decay = removal[:, :1] + 0.3 * removal, 1.5 + 0.5 * rate[..., :1], 0.01 * decay
        elif self.kind == "fastest":
            decay = torch.full_like(decay, FASTEST_DECAY)
        removal = F.normalize(removal, dim=-1)
        made = {
            "query": normal(*tokens, self.dim),
            "key": normal(*tokens, self.dim),
            "value": normal(*tokens, self.value_dim),
            "log_decay": decay[..., 0] if self.scalar_decay else decay,
            "low_rank_read": -removal,
            "low_rank_write": rate * removal,
            "initial_state": normal(self.batch, self.heads, self.dim, self.value_dim),
            "carried_state": normal(self.batch, self.heads, self.dim, self.value_dim),
        }
        absent = set() if self.low_rank else {"low_rank_read", "low_rank_write"}
        absent |= set() if self.with_state else {"initial_state"}
        absent |= set() if self.with_carried else {"carried_state"}
        exact = torch.promote_types(dtype, torch.float32)
        kept = {"log_decay": exact, "initial_state": exact, "carried_state": exact}
        return {
            name: None if name in absent else x.to(kept.get(name, dtype)).contiguous().requires_grad_()
            for name, x in made.items()
        }

    def document_ids(self) -> torch.Tensor | None:
        """Ids of documents with these lengths, the last one filling up; batch row b starts b tokens in."""
        if not self.documents:
            return None
        ids = torch.repeat_interleave(torch.arange(len(self.documents)), torch.tensor(self.documents))
        ids = torch.cat([ids, torch.full((self.length + self.batch,), len(self.documents))])
        return torch.stack([ids[b : b + self.length] for b in range(self.batch)]).int()


def call(function, case: Case, inputs: dict[str, torch.Tensor | None], **options) -> list[torch.Tensor]:
    """Call `delta_rule`, with RWKV-7's scale unless there is another, and return output and final state."""
    query, key, value = (inputs[name] for name in INPUTS[:3])
    others = {name: inputs.get(name) for name in INPUTS[3:]}
    options = {"document_ids": case.document_ids(), "chunk_size": case.chunk_size, "scale": 1.0, **options}
    return list(function(query, key, value, **others, **options))


def gradients(results: list[torch.Tensor], inputs: dict[str, torch.Tensor | None], seed: int = 1) -> dict:
    """Gradients by input name, for random gradients of the output and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    wanted = {name: x for name, x in inputs.items() if x is not None}
    return dict(zip(wanted, torch.autograd.grad(results, list(wanted.values()), grads), strict=True))


def assert_close(result: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Hold the RMS and the largest absolute error, each relative to the same measure of `expected`, to a tolerance."""
    result, expected = result.detach().double(), expected.detach().double()
    assert result.shape == expected.shape, f"{name}: {list(result.shape)} is not {list(expected.shape)}"
    assert result.isfinite().all(), f"{name} is not finite"
    error = result - expected
    for measure, of in (
        ("RMS", lambda x: x.square().mean().sqrt().item()),
        ("max-abs", lambda x: x.abs().max().item()),
    ):
        size = of(expected)
        assert of(error) <= tolerance * max(size, tolerance), (
            f"{name}: relative {measure} error {of(error) / max(size, 1e-300):.2e} > {tolerance:.0e}"
        )


CASES = [
    *(Case(f"T{n}", length=n) for n in (1, 15, 16, 17, 63, 64, 100, 257, 1000)),
    *(Case(kind, kind=kind, length=200) for kind in ("correlated", "fastest", "identical")),
    Case("overwriting", kind="overwriting", length=200, chunk_size=64),
    *(Case(f"{a}-{b}", dim=a, value_dim=b) for a, b in ((48, 80), (80, 48), (96, 16), (64, 64), (1, 3))),
    Case("scalar-decay", scalar_decay=True),
    Case("gated-linear-attention", low_rank=False),
    Case("no-state", with_state=False),
    Case("documents", documents=(13, 40, 3)),
    Case("documents-no-state", documents=(1, 1, 1, 30, 2), with_state=False),
    Case("documents-of-one-token", documents=(1,) * 60),
    Case("carried-one-document", with_carried=True),
    *(
        Case(f"carried-{'state' if state else 'no-state'}-T{n}", n, documents=documents, with_carried=True, **kind)
        for n, documents in ((100, (13, 40, 3)), (400, (130, 1, 160)))
        for state in (True, False)
        for kind in ({"with_state": state, "scalar_decay": not state},)
    ),
    Case("documents-correlated-T1000", documents=(300, 1, 160, 239), length=1000, batch=1, kind="correlated"),
    *(Case(f"chunk-{n}", chunk_size=n, length=150, documents=(70,)) for n in (16, 32, 64)),
]
