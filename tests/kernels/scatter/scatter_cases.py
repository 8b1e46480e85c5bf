"""The cases every implementation of block-local attention with far features is held to, and how errors are measured."""

from dataclasses import dataclass, field

import torch

from longmix_kernels.scatter import FeatureState, ScatterResult, scatter_attention
from longmix_kernels.scatter.bounds import exact_bounds

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
STATE = FeatureState._fields
INPUTS = ("query", "key", "value", "query_features", "key_features", *STATE)
Inputs = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    """One call."""

    name: str
    length: int = 100
    queries: int | None = None
    block_size: int = 8
    past_blocks: int = 1
    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    dim: int = 16
    value_dim: int = 12
    features: int = 6
    """0 for none."""
    spread: float = 1.0
    """Of the log features."""
    with_state: bool = False
    documents: tuple[int, ...] = field(default=())

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """The tensors named `INPUTS`, with gradients wanted; None for those that are missing."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        queries = self.queries or self.length
        per_query, per_key = (self.batch, queries, self.heads), (self.batch, self.length, self.key_heads)
        sums = self.batch, self.key_heads, self.features
        made = {
            "query": normal(*per_query, self.dim),
            "key": normal(*per_key, self.dim),
            "value": normal(*per_key, self.value_dim),
            "query_features": self.spread * normal(*per_query, self.features),
            "key_features": self.spread * normal(*per_key, self.features),
            "memory": normal(*sums, self.value_dim),
            "normalizer": 1 + normal(*sums).abs(),
            "log_scale": 2 * normal(*sums),
        }
        absent = set() if self.with_state else set(STATE)
        absent |= set() if self.features else set(INPUTS[3:])
        exact = torch.promote_types(dtype, torch.float32)
        return {
            name: None if name in absent else x.to(dtype if name in INPUTS[:3] else exact).requires_grad_()
            for name, x in made.items()
        }

    def document_ids(self) -> torch.Tensor | None:
        """Ids of documents with these lengths, the last one filling up; batch row b starts b tokens in."""
        if not self.documents:
            return None
        ids = torch.repeat_interleave(torch.arange(len(self.documents)), torch.tensor(self.documents))
        ids = torch.cat([ids, torch.full((self.length + self.batch,), len(self.documents))])
        return torch.stack([ids[b : b + self.length] for b in range(self.batch)]).int()


def call(case: Case, inputs: Inputs, **options) -> ScatterResult:
    """Call `scatter_attention`."""
    tensors = [inputs[name] for name in INPUTS[:5]]
    state = None if inputs["memory"] is None else FeatureState(*(inputs[name] for name in STATE))
    sizes = {"block_size": case.block_size, "past_blocks": case.past_blocks}
    options = {"document_ids": case.document_ids(), "initial_state": state, **sizes, **options}
    return scatter_attention(*tensors, **options)


def gradients(result: ScatterResult, inputs: Inputs, seed: int = 1) -> dict[str, torch.Tensor]:
    """Gradients by input name, for random gradients of output and logsumexp."""
    generator = torch.Generator().manual_seed(seed)
    results = list(result[:2])
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    wanted = {name: x for name, x in inputs.items() if x is not None}
    return dict(zip(wanted, torch.autograd.grad(results, list(wanted.values()), grads), strict=True))


def everything(case: Case, inputs: Inputs, **options) -> dict[str, torch.Tensor]:
    """Results and all gradients, by name."""
    result = call(case, inputs, **options)
    return {**result._asdict(), **{f"grad_{name}": x for name, x in gradients(result, inputs).items()}}


def plain(case: Case, inputs: Inputs, dtype: torch.dtype) -> ScatterResult:
    """One softmax over all keys and the state's features: tensors and operations in one dtype, but for logarithms."""
    query, key, value, log_q, log_k, *state = (inputs[name] for name in INPUTS)
    group, device = case.heads // case.key_heads, query.device
    ids = case.document_ids()
    sizes = query.shape[1], case.length, case.block_size, case.past_blocks, device
    bounds = exact_bounds(None if ids is None else ids.to(device), *sizes)
    first, lo, hi = (x.unsqueeze(-1) for x in bounds)
    column = torch.arange(case.length, device=device)

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(group, 2).transpose(1, 2)

    scores = case.dim**-0.5 * query.to(dtype).transpose(1, 2) @ by_head(key.to(dtype)).mT
    scores = scores.masked_fill((column < lo) | (column >= hi), -torch.inf)
    exact, values = scores.detach().logsumexp(-1).transpose(1, 2), by_head(value.to(dtype))
    if log_q is not None:
        log_q, log_k = log_q.transpose(1, 2), by_head(log_k)
        highest = [x.detach().amax((-1, -2), keepdim=True) for x in (log_q, log_k)]
        far = ((log_q - highest[0]).exp() @ (log_k - highest[1]).exp().mT).log() + highest[0] + highest[1]
        scores = torch.where((first <= column) & (column < lo), far.to(dtype), scores)
    if state[0] is not None:
        memory, normalizer, log_scale = (x.repeat_interleave(group, 1) for x in state)
        logs = (log_q + (log_scale + normalizer.log()).unsqueeze(2)).to(dtype)
        logs = logs.masked_fill(first > case.length - query.shape[1], -torch.inf)
        scores, values = (
            torch.cat([scores, logs], -1),
            torch.cat([values, (memory / normalizer.unsqueeze(-1)).to(dtype)], 2),
        )
    output = (scores.softmax(-1) @ values).transpose(1, 2)
    return ScatterResult(output, scores.logsumexp(-1).transpose(1, 2), exact)


def assert_close(result: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Hold the RMS and the largest absolute error, each relative to the same measure of `expected`, to a tolerance.

    Where what is expected vanishes, as gradients of features that no query reads, it must vanish.
    """
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
    *(Case(f"block-{c}-past-{p}", block_size=c, past_blocks=p) for c, p in ((1, 0), (1, 3), (7, 0), (5, 2), (64, 1))),
    *(Case(f"d{a}-{b}-m{m}", dim=a, value_dim=b, features=m) for a, b, m in ((48, 80, 5), (80, 48, 33), (3, 1, 1))),
    Case("grouped", heads=6, key_heads=2),
    Case("one-key-head", heads=3, key_heads=1, documents=(50, 3)),
    Case("no-features", features=0),
    Case("no-features-documents", features=0, documents=(40, 7)),
    Case("wide-features", spread=20.0),
    Case("documents", documents=(13, 40, 3)),
    Case("documents-of-one-token", documents=(1,) * 60),
    Case("documents-just-longer", documents=(17, 16, 17, 18)),
    Case("documents-T1000", documents=(300, 1, 160, 239), length=1000, batch=1, block_size=16),
    Case("state", with_state=True),
    Case("state-within-block", with_state=True, length=5),
    Case("state-documents", with_state=True, documents=(30, 20, 4)),
    Case("state-grouped", with_state=True, heads=4, key_heads=2, past_blocks=0),
    Case("last-query", queries=1),
    Case("last-query-state", queries=1, length=13, with_state=True),
    Case("some-queries", queries=37, heads=4),
    Case("some-queries-state", queries=37, with_state=True, past_blocks=2),
    Case("some-queries-documents", queries=55, documents=(20, 30, 11, 9)),
    Case("some-queries-state-documents", queries=55, documents=(20, 40, 11, 9), with_state=True),
]
