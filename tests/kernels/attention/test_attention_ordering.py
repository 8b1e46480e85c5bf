"""Rows sorted by label: which keys a query sees, against a loop over all pairs; and that nothing later changes it."""

import itertools

import pytest
import torch
from attention_cases import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from longmix_kernels.attention import attention, order_by_label

DOCUMENTS = torch.tensor([[0] * 13 + [4] * 20 + [5] * 7, [1] * 40])


def labels(heads: int, length: int = 40, count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, count, (2, length, heads), generator=torch.Generator().manual_seed(seed))


def visible(ordering, queries: int, keys: int, heads: int, key_heads: int) -> torch.Tensor:
    """bool [B, Hq, Tq, Tk] in the original order, spelled out."""
    lo, query_rows, key_rows = ordering.lo, ordering.query_rows, ordering.key_rows
    hi = torch.arange(1, queries + 1).expand(lo.shape) if ordering.hi is None else ordering.hi
    mask = torch.zeros(2, heads, queries, keys, dtype=torch.bool)
    for b, h, i in itertools.product(range(2), range(heads), range(queries)):
        seen = key_rows[b, h * key_heads // heads, lo[b, h, i] : hi[b, h, i]]
        mask[b, h, query_rows[b, h, i], seen.long()] = True
    return mask


def wanted(query_labels, key_labels, document_ids, gap: int, members: int | None) -> torch.Tensor:
    queries, keys = query_labels.shape[1], key_labels.shape[1]
    group = query_labels.shape[2] // key_labels.shape[2]
    position = torch.arange(keys)
    mask = query_labels.transpose(1, 2)[..., None] == key_labels.transpose(1, 2).repeat_interleave(group, 1)[:, :, None]
    mask &= position <= position[keys - queries :, None] - gap
    if document_ids is not None:
        mask &= (document_ids[:, keys - queries :, None] == document_ids[:, None])[:, None]
    if members is not None:
        later = mask.flip(-1).cumsum(-1).flip(-1)
        mask &= later <= members
    return mask


@pytest.mark.parametrize("members", [None, 1, 3])
@pytest.mark.parametrize("gap", [0, 1, 6])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("form", ["shared", "separate", "grouped", "chunk"])
def test_a_query_sees_the_keys_of_its_label(form, packed, gap, members):
    heads, key_heads = {"grouped": (4, 2)}.get(form, (2, 2))
    queries = 11 if form == "chunk" else 40
    key_labels = labels(key_heads)
    query_labels = key_labels if form == "shared" else labels(heads, queries, seed=1)
    ids = DOCUMENTS if packed else None
    ordering = order_by_label(
        query_labels,
        None if form == "shared" else key_labels,
        num_labels=4,
        document_ids=ids,
        gap=gap,
        members=members,
    )
    for bound in (ordering.lo, ordering.hi):
        assert bound is None or (bound[..., 1:] >= bound[..., :-1]).all()
    assert (ordering.hi is None) == (form == "shared" and gap == 0)
    mask = visible(ordering, queries, 40, heads, key_heads)
    assert torch.equal(mask, wanted(query_labels, key_labels, ids, gap, members))


@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("form", ["shared", "separate", "chunk"])
def test_each_query_may_be_told_where_its_keys_end(form, packed, members):
    queries = 11 if form == "chunk" else 40
    key_labels = labels(2)
    query_labels = key_labels if form == "shared" else labels(4, queries, seed=1)
    ids, heads = DOCUMENTS if packed else None, query_labels.shape[2]
    before = torch.randint(41, (2, queries), generator=torch.Generator().manual_seed(3)).sort(-1).values
    ordering = order_by_label(
        query_labels,
        None if form == "shared" else key_labels,
        num_labels=4,
        document_ids=ids,
        members=members,
        before=before,
    )
    for bound in (ordering.lo, ordering.hi):
        assert (bound[..., 1:] >= bound[..., :-1]).all()
    same = query_labels.mT[..., None] == key_labels.mT.repeat_interleave(heads // 2, 1)[..., None, :]
    mask = same & (torch.arange(40) < before[:, None, :, None])
    if ids is not None:
        mask &= (ids[:, -queries:, None] == ids[:, None])[:, None]
    if members is not None:
        mask &= mask.flip(-1).cumsum(-1).flip(-1) <= members
    assert torch.equal(visible(ordering, queries, 40, heads, 2), mask)


def test_shared_labels_are_separate_ones_that_are_equal():
    shared = labels(2)
    for gap in (0, 1, 5):
        a, b = (order_by_label(shared, other, num_labels=4, gap=gap) for other in (None, shared))
        hi = torch.arange(1, 41).expand(b.hi.shape).int() if a.hi is None else a.hi
        assert torch.equal(a.lo, b.lo) and torch.equal(hi, b.hi)
        assert torch.equal(a.query_rows, b.query_rows) and torch.equal(a.key_rows, b.key_rows)


def test_attention_in_this_order_is_attention_under_the_mask():
    query_labels, key_labels = labels(4, seed=1), labels(2)
    ordering = order_by_label(query_labels, key_labels, num_labels=4, document_ids=DOCUMENTS)
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 40, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    mask = wanted(query_labels, key_labels, DOCUMENTS, 0, None)
    oracle = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask, enable_gqa=True
    )
    for backend in ("reference", "blocked"):
        output = attention(query, key, value, backend=backend, **ordering._asdict())
        assert_close(output, oracle.transpose(1, 2), 1e-12, backend)


@pytest.mark.parametrize("members", [None, 4])
@pytest.mark.parametrize("gap", [0, 1, 6])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("queries", [40, 11])
def test_a_position_may_have_several_keys_with_labels_of_their_own(queries, packed, gap, members):
    """Against 125 positions, the last three times 40 of which have a query each third."""
    query_labels, key_labels = labels(4, queries, seed=1), labels(2, length=125)
    ids = torch.cat((DOCUMENTS[:, :5], DOCUMENTS.repeat_interleave(3, 1)), 1) if packed else None
    ordering = order_by_label(
        query_labels, key_labels, num_labels=4, document_ids=ids, gap=gap, members=members, copies=3
    )
    for bound in (ordering.lo, ordering.hi):
        assert (bound[..., 1:] >= bound[..., :-1]).all()
    stands = torch.arange(7, 125, 3)[-queries:]
    every = torch.full((2, 125, 4), 99)
    every[:, stands] = query_labels
    mask = wanted(every, key_labels, ids, 3 * gap, members)[:, :, stands]
    assert torch.equal(visible(ordering, queries, 125, 4, 2), mask)


def test_many_labels_and_documents_do_not_overflow():
    ids = torch.arange(3000)[None] // 2
    wide = torch.full((1, 3000, 1), 2**30 - 1)
    ordering = order_by_label(wide, num_labels=2**30, document_ids=ids)
    assert torch.equal(ordering.lo[0, 0], (torch.arange(3000) // 2 * 2).int())


@pytest.mark.parametrize(
    "options", [{"gap": -1}, {"members": 0}, {"copies": 0}, {"copies": 2}, {"before": 0, "gap": 1}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        order_by_label(labels(1), num_labels=4, **options)


class Sorts(TorchDispatchMode):
    """Notes the kind and the size of what is sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::sort":
            self.found.append((args[0].dtype, tuple(args[0].shape)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    ("count", "kind"),
    [(2, torch.uint8), (256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)],
)
def test_labels_are_sorted_once_and_as_narrow_numbers(packed, count, kind):
    """The largest labels there may be, in rows of which a number of 8 bits cannot count."""
    key_labels, query_labels = (count - 1 - labels(2, length=600, count=2, seed=seed) for seed in (0, 1))
    ids = DOCUMENTS.repeat_interleave(15, 1) if packed else None
    for form, shape in ((None, (2, 2, 600)), (key_labels, (8, 600))):
        with Sorts() as sorts:
            ordering = order_by_label(query_labels, form, num_labels=count, document_ids=ids, gap=1, members=7)
        assert sorts.found == [(kind, shape)]
        keys = query_labels if form is None else form
        mask = wanted(query_labels, keys, ids, 1, 7)
        assert torch.equal(visible(ordering, 600, 600, 2, 2), mask)


def test_a_caller_may_know_where_documents_begin():
    first = torch.searchsorted(DOCUMENTS, DOCUMENTS, out_int32=True)
    for gap in (0, 1, 4):
        made = [
            order_by_label(labels(2), labels(2, seed=1), num_labels=4, document_ids=DOCUMENTS, gap=gap, **known)
            for known in ({}, {"first_rows": first})
        ]
        assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
