"""Rung 2: the tiled implementation against the definition, and the properties tiling must not break."""

import functools
import gc

import pytest
import torch
from attention_cases import CASES, EXTREME, PANEL_MATHS, TOLERANCE, Case, assert_close, built, documents, ragged
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longmix_kernels.attention import order_by_label
from longmix_kernels.attention.blocked import blocked_backward, blocked_forward
from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.panels import FLASH, MATMUL, PanelMath, _row_folds
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.reference import reference_forward

RESULTS = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")
every_math = pytest.mark.parametrize("math", PANEL_MATHS.values(), ids=PANEL_MATHS.keys())
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=("float64", "float32"))


def incoming(case: Case, through_logsumexp: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    shape = (case.batch, case.queries, case.heads)
    grad_output = torch.randn(*shape, case.value_dim or case.dim, generator=generator, dtype=torch.float64)
    grad_logsumexp = torch.randn(shape, generator=generator, dtype=torch.float64)
    return grad_output, grad_logsumexp if through_logsumexp else None


@functools.lru_cache(maxsize=8)
def expected_results(case: Case, dtype: torch.dtype, through_logsumexp: bool) -> list[torch.Tensor]:
    """The definition in float64, on the inputs as the dtype holds them."""
    tensors, pattern, scale = case.inputs(dtype)
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    output, logsumexp = reference_forward(Inputs(*tensors, pattern, scale))
    grad_output, grad_logsumexp = incoming(case, through_logsumexp)
    loss = (output * grad_output).sum()
    if grad_logsumexp is not None:
        loss = loss + (logsumexp.masked_fill(logsumexp.isneginf(), 0.0) * grad_logsumexp).sum()
    return [output, logsumexp, *torch.autograd.grad(loss, tensors)]


def blocked_results(case: Case, dtype: torch.dtype, math: PanelMath, through_logsumexp: bool) -> list[torch.Tensor]:
    tensors, pattern, scale = case.inputs(dtype)
    tensors = [x.detach() for x in tensors]
    output, logsumexp = blocked_forward(Inputs(*tensors, pattern, scale), math)
    grad_output, grad_logsumexp = (None if x is None else x.to(dtype) for x in incoming(case, through_logsumexp))
    grads = blocked_backward(Inputs(*tensors, pattern, scale), grad_output, grad_logsumexp, output, logsumexp, math)
    return [output, logsumexp, *grads]


def assert_matches(case: Case, dtype: torch.dtype, math: PanelMath) -> None:
    for through_logsumexp in (False, True):
        results = blocked_results(case, dtype, math, through_logsumexp)
        expected = expected_results(case, dtype, through_logsumexp)
        for name, result, wanted in zip(RESULTS, results, expected, strict=True):
            assert_close(result, wanted, TOLERANCE[dtype], f"{name}, logsumexp gradient {through_logsumexp}")


@pytest.mark.sampled(5)
@every_math
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case, dtype, math):
    assert_matches(case, dtype, math)


@every_math
@pytest.mark.parametrize(
    ("dtype", "case"), [(d, c) for d, cases in EXTREME.items() for c in cases], ids=lambda x: getattr(x, "name", str(x))
)
def test_extreme_scores(dtype, case, math):
    assert_matches(case, dtype, math)


@pytest.mark.slow
@every_dtype
def test_default_tiles_of_a_long_sequence(dtype):
    """Long enough for uncut segments and for rows wider than one masked panel."""
    assert_matches(Case("long-documents", built([60, 2200]), queries=2300, batch=1), dtype, FLASH)
    assert_matches(Case("long-ragged", ragged(), queries=300, keys=4000, batch=1), dtype, FLASH)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [128, 127])
def test_folding_rows_into_heads_for_idle_threads(rows, four_threads):
    assert_matches(Case("folded", ragged(), queries=rows, heads=3, key_heads=3, batch=1), torch.float64, FLASH)
    assert_matches(Case("folded-gqa", built([40]), queries=rows, heads=4, batch=1), torch.float64, FLASH)


def test_rows_are_folded_until_no_thread_is_idle(four_threads):
    folds = {(1, 1, 128): 4, (1, 3, 128): 2, (1, 4, 128): 1, (1, 9, 128): 1, (2, 1, 128): 1, (1, 1, 126): 1}
    for shape, expected in folds.items():
        assert _row_folds(torch.empty(*shape, 8)) == expected
    assert FLASH.sizes_for(4) == FLASH.sizes
    assert FLASH.sizes_for(3).whole_rows is None


@every_math
def test_packed_documents_equal_each_document_alone(math):
    lengths = [13, 40, 1, 30, 16]
    case = Case("packed", built(lengths), queries=sum(lengths), batch=1)
    packed = blocked_results(case, torch.float64, math, True)
    (tensors, _, scale), (grad_output, grad_logsumexp) = case.inputs(torch.float64), incoming(case, True)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        query, key, value = (x.detach()[:, own] for x in tensors)
        pattern = Pattern(*row_bounds(length, length))
        inputs = Inputs(query, key, value, pattern, scale)
        output, logsumexp = blocked_forward(inputs, math)
        grads = blocked_backward(inputs, grad_output[:, own], grad_logsumexp[:, own], output, logsumexp, math)
        for name, alone, together in zip(RESULTS, (output, logsumexp, *grads), packed, strict=True):
            assert_close(together[:, own], alone, TOLERANCE[torch.float64], f"{name} of the document at {start}")
        start += length


@every_math
@pytest.mark.parametrize("bounds", [built(), built(window=20), built([100, 50, 61])], ids=["causal", "window", "docs"])
def test_later_tokens_change_nothing_before_them(bounds, math):
    case = Case("causality", bounds, queries=300, batch=1)
    tensors, pattern, scale = case.inputs(torch.float32)
    query, key, value = (x.detach() for x in tensors)
    before = blocked_forward(Inputs(query, key, value, pattern, scale), math)
    for token in (1, 120, 299):
        changed = [x.clone() for x in (query, key, value)]
        for x in changed:
            x[:, token:] = 1e6 * torch.randn_like(x[:, token:])
        after = blocked_forward(Inputs(*changed, pattern, scale), math)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:, :token], new[:, :token])
            assert not torch.equal(old[:, token], new[:, token])


@every_math
def test_rows_that_see_nothing_ignore_the_gradients_they_receive(math):
    case = Case("empty", ragged(sparse=True), batch=1)
    tensors, pattern, scale = case.inputs(torch.float64)
    tensors = [x.detach() for x in tensors]
    output, logsumexp = blocked_forward(Inputs(*tensors, pattern, scale), math)
    grad_output, grad_logsumexp = incoming(case, True)
    empty = logsumexp.isneginf()
    assert empty.any() and not empty.all() and not output[empty].any()
    wanted = blocked_backward(Inputs(*tensors, pattern, scale), grad_output, grad_logsumexp, output, logsumexp, math)
    grad_logsumexp = grad_logsumexp.masked_fill(empty, torch.nan)
    grad_output = grad_output.masked_fill(empty.unsqueeze(-1), 1e30)
    grads = blocked_backward(Inputs(*tensors, pattern, scale), grad_output, grad_logsumexp, output, logsumexp, math)
    assert not grads[0][empty].any()
    for grad, want in zip(grads, wanted, strict=True):
        assert torch.equal(grad, want)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return result


def in_buckets(length: int) -> Pattern:
    """Rows sorted by random buckets of about 200 rows, queries and keys each by their own."""
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, length // 200, (1, length, 1), generator=generator) for _ in range(2)]
    return Pattern(**order_by_label(*labels, num_labels=length // 200)._asdict())


LINEAR_PATTERNS = {
    "causal": lambda length: Pattern(*row_bounds(length, length)),
    "window": lambda length: Pattern(*row_bounds(length, length, window=100)),
    "buckets": in_buckets,
}


@pytest.mark.parametrize("math", [FLASH, MATMUL], ids=["flash", "matmul"])
@pytest.mark.parametrize("make", LINEAR_PATTERNS.values(), ids=LINEAR_PATTERNS)
def test_no_tensor_grows_with_the_square_of_the_length(make, math):
    for length in (3072, 6144):
        query, key, value = (torch.randn(1, length, 1, 8) for _ in range(3))
        pattern = make(length)
        with LargestTensor() as largest:
            output, logsumexp = blocked_forward(Inputs(query, key, value, pattern, 0.3), math)
            blocked_backward(Inputs(query, key, value, pattern, 0.3), output, logsumexp, output, logsumexp, math)
        of_a_panel = math.sizes.rows * max(math.sizes.masked_keys, math.sizes.repeated_keys)
        assert 8 * length <= largest.elements <= of_a_panel + 16 * length < length * length // 4


@pytest.mark.parametrize("make", LINEAR_PATTERNS.values(), ids=LINEAR_PATTERNS)
def test_a_call_leaves_no_tensor_behind(make):
    """Reference counts alone must free everything: a cycle would hold it until the garbage collector runs."""
    query, key, value = (torch.randn(1, 600, 1, 8) for _ in range(3))
    pattern = make(600)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(x) is torch.Tensor for x in gc.get_objects())
        output, logsumexp = blocked_forward(Inputs(query, key, value, pattern, 0.3))
        blocked_backward(Inputs(query, key, value, pattern, 0.3), output, logsumexp, output, logsumexp)
        del output, logsumexp
        after = sum(type(x) is torch.Tensor for x in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


def counted(math: PanelMath) -> tuple[PanelMath, dict[str, int]]:
    """The same arithmetic, and the scores it computes."""
    scores = {"forward": 0, "backward": 0}

    def forward(query, key, *rest):
        scores["forward"] += query.shape[:3].numel() * key.shape[2]
        return math.forward(query, key, *rest)

    def backward(grad_output, output, logsumexp, query, key, *rest):
        scores["backward"] += query.shape[:3].numel() * key.shape[2]
        return math.backward(grad_output, output, logsumexp, query, key, *rest)

    return math._replace(forward=forward, backward=backward), scores


@pytest.mark.parametrize("math", [FLASH, MATMUL], ids=["flash", "matmul"])
@pytest.mark.parametrize(
    ("bounds", "waste"),
    # A tile of R rows computes for each row R - 1 scores too many at most where both bounds move one key a row, and
    # half as many where only one does; documents shorter than a tile add their length.
    [(built(window=256), 127), (built([500] * 4), 64), (built([16] * 128), 127 + 16)],
    ids=["window", "documents", "short-documents"],
)
def test_work_outside_the_bounds_is_skipped(bounds, waste, math):
    case = Case("work", bounds, queries=2048, batch=1, heads=2)
    tensors, pattern, scale = case.inputs(torch.float32)
    tensors = [x.detach() for x in tensors]
    math, scores = counted(math)
    output, logsumexp = blocked_forward(Inputs(*tensors, pattern, scale), math)
    blocked_backward(Inputs(*tensors, pattern, scale), output, logsumexp, output, logsumexp, math)
    lo, hi = pattern.bounds()
    needed = 2 * int((hi - lo).sum())
    rows = 2 * case.queries
    for computed in scores.values():
        assert needed <= computed <= needed + rows * waste


def test_heads_with_equal_bounds_share_their_panels():
    case = Case("shared", lambda case: documents_per_batch_row(case), queries=64, batch=3, heads=4, key_heads=4)
    (query, key, value), pattern, scale = case.inputs(torch.float32)
    tensors = [x.detach() for x in (query, key, value)]
    shapes = []

    def forward(query, *rest):
        shapes.append(tuple(query.shape[:2]))
        return FLASH.forward(query, *rest)

    spying = FLASH._replace(forward=forward)
    shared = Pattern(*(x[:1] for x in pattern.bounds()))
    blocked_forward(Inputs(*tensors, shared, scale), spying)
    assert shapes == [(3, 4)]
    shapes.clear()
    blocked_forward(Inputs(*tensors, pattern, scale), spying)
    assert shapes == [(1, 4)] * 3


def documents_per_batch_row(case: Case):
    return row_bounds(case.queries, case.queries, document_ids=documents(case, [10, 20]))
