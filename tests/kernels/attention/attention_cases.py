"""The cases every implementation of the attention engine is held to, and how an error is measured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from longmix_kernels.attention import (
    BlockList,
    block_list,
    butterfly_blocks,
    sink_and_local_blocks,
    stripe_blocks,
)
from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.panels import FLASH, MATMUL, PanelMath
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.tiling import TileSizes

Bounds = tuple[torch.Tensor, torch.Tensor]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

# Tiny tiles send short sequences through every way of cutting: whole segments, split and merged rows, key chunks.
TINY = TileSizes(rows=16, masked_keys=40, full_keys=24, whole_rows=48, repeated_keys=100)
TINY_CUT = TileSizes(rows=16, masked_keys=40, full_keys=24, whole_rows=None, repeated_keys=100)
PANEL_MATHS: dict[str, PanelMath] = {
    "flash": FLASH,
    "flash-tiny": FLASH._replace(sizes=TINY),
    "flash-tiny-cut": FLASH._replace(sizes=TINY_CUT),
    "matmul": MATMUL,
    "matmul-tiny": MATMUL._replace(sizes=TINY),
    "matmul-tiny-cut": MATMUL._replace(sizes=TINY_CUT),
}


@dataclass(frozen=True)
class Case:
    """One call: shapes, and a function that makes the bounds for them."""

    name: str
    bounds: Callable[["Case"], Bounds]
    queries: int = 100
    keys: int | None = None
    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    dim: int = 16
    value_dim: int | None = None
    extras: Callable[["Case"], dict[str, object]] = lambda case: {}
    """What its pattern has besides bounds."""
    spread: float | None = None
    """Standard deviation of the entries of query and key, then whole numbers and not scaled down."""

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[list[torch.Tensor], Pattern, float]:
        """Query, key and value (with gradients wanted), the pattern, and the scale."""
        generator = torch.Generator().manual_seed(seed)
        keys = self.keys or self.queries
        query = torch.randn(self.batch, self.queries, self.heads, self.dim, generator=generator, dtype=torch.float64)
        key = torch.randn(self.batch, keys, self.key_heads, self.dim, generator=generator, dtype=torch.float64)
        value = torch.randn(
            self.batch, keys, self.key_heads, self.value_dim or self.dim, generator=generator, dtype=torch.float64
        )
        scale = self.dim**-0.5
        if self.spread is not None:
            # Whole numbers make every score exact in every dtype: what is tested is the softmax, not the matmul.
            query, key, scale = (self.spread * query).round(), (self.spread * key).round(), 1.0
        tensors = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        return tensors, Pattern(*self.bounds(self), **self.extras(self)), scale


def assert_close(result: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Hold the RMS and the largest absolute error, each relative to the same measure of `expected`, to a tolerance.

    -inf must be where it is expected. Where what is expected vanishes (a row that sees one key has no gradient in its
    query), errors are measured against 1, the size of the inputs.
    """
    result, expected = result.detach().double(), expected.detach().double()
    assert result.shape == expected.shape
    assert torch.equal(result.isneginf(), expected.isneginf())
    expected = expected.masked_fill(expected.isneginf(), 0.0)
    error = result.masked_fill(result.isneginf(), 0.0) - expected
    for measure, of in (
        ("RMS", lambda x: x.square().mean().sqrt().item()),
        ("max-abs", lambda x: x.abs().max().item()),
    ):
        size = of(expected) if of(expected) > tolerance else 1.0
        assert of(error) <= tolerance * size, (
            f"{name}: relative {measure} error {of(error) / size:.2e} > {tolerance:.0e}"
        )


def documents(case: Case, lengths: list[int]) -> torch.Tensor:
    """Ids [batch, keys] of documents with these lengths, the last one filling up; batch row b starts b tokens in."""
    keys = case.keys or case.queries
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ids = torch.cat([ids, torch.full((keys + case.batch,), len(lengths))])
    return torch.stack([ids[b : b + keys] for b in range(case.batch)]).int()


def built(lengths: list[int] | None = None, **options: object) -> Callable[[Case], Bounds]:
    """Bounds by the builder, with documents of these lengths."""

    def bounds(case: Case) -> Bounds:
        ids = None if lengths is None else documents(case, lengths)
        return row_bounds(case.queries, case.keys or case.queries, document_ids=ids, **options)

    return bounds


def sorted_buckets(buckets: int, **options: object) -> Callable[[Case], Bounds]:
    """Bounds of rows sorted by a random bucket, different for every batch row and head."""

    def bounds(case: Case) -> Bounds:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, buckets, (case.batch, case.heads, case.keys or case.queries), generator=generator)
        return row_bounds(case.queries, ids.shape[-1], document_ids=ids.sort(-1).values.int(), **options)

    return bounds


def ragged(per_head: bool = True, sparse: bool = False) -> Callable[[Case], Bounds]:
    """Random non-decreasing bounds with jumps; `sparse` makes most rows see nothing, among them the first and last."""

    def bounds(case: Case) -> Bounds:
        generator = torch.Generator().manual_seed(2)
        keys = case.keys or case.queries
        shape = (case.batch, case.heads if per_head else 1, case.queries)
        lo, hi = (torch.randint(0, keys + 1, shape, generator=generator).sort(-1).values.int() for _ in range(2))
        if not sparse:
            return torch.minimum(lo, hi), torch.maximum(lo, hi)
        lo[..., -3:], hi[..., :3] = keys, 0
        return lo, hi

    return bounds


def permuted(case: Case) -> dict[str, object]:
    """Rows in a random order, different for every batch row and head."""
    generator = torch.Generator().manual_seed(4)
    sizes = (case.heads, case.queries), (case.key_heads, case.keys or case.queries)
    rows = [torch.rand(case.batch, *size, generator=generator).argsort(-1).int() for size in sizes]
    return {"query_rows": rows[0], "key_rows": rows[1]}


def alibi(case: Case) -> dict[str, object]:
    """ALiBi's slopes: a geometric sequence over the heads."""
    return {"alibi_slopes": 2.0 ** -torch.arange(1, case.heads + 1, dtype=torch.float32)}


def together(*extras: Callable[[Case], dict[str, object]]) -> Callable[[Case], dict[str, object]]:
    """Several extras at once."""
    return lambda case: {name: x for extra in extras for name, x in extra(case).items()}


def in_blocks(make: Callable[..., object], **options: int) -> Callable[[Case], dict[str, object]]:
    """A list of blocks of 16, by its builder."""
    return lambda case: {"blocks": make(case.keys or case.queries, 16, **options)}


def random_blocks(length: int, size: int) -> BlockList:
    """Blocks at random; the first row block sees none."""
    blocks = -(-length // size)
    mask = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(5)) < 0.4
    mask[0] = False
    return block_list(mask, size)


def ragged_end(case: Case) -> Bounds:
    """Every row begins at the first key; where it ends differs between heads."""
    _, hi = ragged()(case)
    return torch.zeros_like(hi), hi


def sliding_start(case: Case) -> Bounds:
    """The first key moves on with every row, the last one does not."""
    lo = torch.arange(case.queries, dtype=torch.int32)[None, None]
    return lo, torch.maximum(ragged_end(case)[1], lo)


CASES = [
    *(Case(f"causal-T{n}", built(), queries=n) for n in (1, 15, 16, 17, 63, 100, 257, 1000)),
    *(Case(f"full-T{n}", built(causal=False), queries=n) for n in (1, 17, 100, 257)),
    *(Case(f"causal-d{d}", built(), dim=d) for d in (1, 48, 80, 96)),
    Case("causal-d16-v48", built(), value_dim=48),
    Case("causal-d96-v16", built(), dim=96, value_dim=16),
    Case("causal-gqa", built(), heads=6, key_heads=2),
    Case("causal-mqa", built(), heads=4, key_heads=1),
    Case("window-1", built(window=1)),
    Case("window-7", built(window=7)),
    Case("window-100-T257", built(window=100), queries=257),
    Case("window-33-T1000-gqa", built(window=33), queries=1000, batch=1, heads=4),
    Case("window-longer-than-T", built(window=5000)),
    Case("documents", built([13, 40, 3])),
    Case("documents-T1000", built([300, 1, 160, 239]), queries=1000, batch=1),
    Case("documents-of-one-token", built([1] * 60)),
    Case("documents-full", built([13, 40, 3], causal=False)),
    Case("documents-window", built([13, 40, 3], window=9)),
    Case("documents-gqa-v48", built([13, 40, 3]), heads=6, value_dim=48),
    Case("documents-one-batch-row", built([13, 40, 3]), batch=1, heads=4, key_heads=1),
    Case("decode", built(), queries=1, keys=257),
    Case("decode-window", built(window=20), queries=1, keys=257),
    Case("decode-documents", built([200, 20]), queries=1, keys=257),
    Case("prefill-chunk", built(), queries=63, keys=257),
    Case("prefill-chunk-window", built(window=30), queries=63, keys=257),
    Case("prefill-chunk-documents", built([150, 60]), queries=100, keys=257),
    Case("more-queries-than-keys", built(), queries=100, keys=63),
    Case("cross", built(causal=False), queries=100, keys=63),
    Case("buckets", sorted_buckets(4), heads=4),
    Case("buckets-gqa", sorted_buckets(4), heads=4),
    Case("buckets-window-T257", sorted_buckets(3, window=20), queries=257),
    Case("ragged", ragged()),
    Case("ragged-shared", ragged(per_head=False), batch=3),
    Case("ragged-gqa-T257", ragged(), queries=257, heads=4),
    Case("ragged-empty-rows", ragged(sparse=True)),
    Case("ragged-empty-rows-T257-mqa", ragged(sparse=True), queries=257, heads=3, key_heads=1),
    Case("ragged-wide", ragged(), queries=60, keys=1000),
    Case("ragged-wide-empty-rows", ragged(sparse=True), queries=60, keys=1000),
    Case("ragged-end-gqa", ragged_end, heads=4),
    Case("ragged-end-one-batch-row", ragged_end, batch=1),
    Case("sliding-start", sliding_start),
    Case("permuted-buckets-gqa", sorted_buckets(4), heads=4, extras=permuted),
    Case("permuted-ragged-T257", ragged(), queries=257, heads=4, extras=permuted),
    Case("permuted-cross-v48", ragged(per_head=False), queries=60, keys=130, value_dim=48, extras=permuted),
    Case(
        "permuted-one-order-for-all", built(window=20), extras=lambda c: {k: x[:1, :1] for k, x in permuted(c).items()}
    ),
    Case("permuted-queries", ragged(), extras=lambda c: {"query_rows": permuted(c)["query_rows"]}),
    Case("permuted-keys-empty-rows", ragged(sparse=True), extras=lambda c: {"key_rows": permuted(c)["key_rows"]}),
    Case("alibi-gqa-T257", built(), queries=257, heads=4, extras=alibi),
    Case("alibi-window-T257", built(window=33), queries=257, extras=alibi),
    Case("alibi-documents", built([13, 40, 3]), heads=4, key_heads=1, extras=alibi),
    Case("alibi-decode", built(), queries=1, keys=257, extras=alibi),
    Case("alibi-permuted-ragged-gqa", ragged(), heads=4, extras=together(alibi, permuted)),
    Case("blocks-sink-local-gqa", built(), heads=4, extras=in_blocks(sink_and_local_blocks, sink=1, local=2)),
    Case("blocks-stripe-T257", built(), queries=257, extras=in_blocks(stripe_blocks, local=1, stride=3)),
    Case("blocks-butterfly-T300", built(), queries=300, extras=in_blocks(butterfly_blocks)),
    Case("blocks-random-full", built(causal=False), queries=130, extras=in_blocks(random_blocks)),
    Case("blocks-documents-window", built([13, 60, 3], window=50), queries=130, extras=in_blocks(random_blocks)),
    Case("blocks-chunk-alibi", built(), queries=84, keys=100, extras=together(alibi, in_blocks(butterfly_blocks))),
    Case("nothing-visible", lambda case: (torch.full((1, 1, 100), 7, dtype=torch.int32),) * 2),
]
# exp overflows above 88 in float32 and above 709 in float64; the highest scores here are about 150 and 1000.
EXTREME = {
    torch.float64: [Case("scores-1000", built(), spread=8.0), Case("scores-1000-window", built(window=9), spread=8.0)],
    torch.float32: [Case("scores-150", built(), spread=3.0), Case("scores-150-window", built(window=9), spread=3.0)],
}
