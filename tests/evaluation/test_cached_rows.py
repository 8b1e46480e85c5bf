"""Rows read on behind a compressed prompt: what a full pass or a session gives, and sums that plain torch gives."""

import pytest
import torch
import torch.nn.functional as F

from longmix.batch import IGNORE_INDEX
from longmix.caches.named import kinds_of
from longmix.errors import ConfigError
from longmix.evaluation.cache_comparison import compare, scored
from longmix.evaluation.cached_rows import CachedRows, Prompted
from longmix.generation.session import Session

PROMPT, AHEAD = 23, 21


def tokens(rows: int = 3, count: int = PROMPT + AHEAD) -> torch.Tensor:
    return torch.randint(20, (rows, count), generator=torch.Generator().manual_seed(5))


def prompted(rows: torch.Tensor | None = None) -> Prompted:
    found = tokens() if rows is None else rows
    ahead = found[:, PROMPT:]
    targets = torch.cat((found[:, PROMPT:], torch.full((len(found), 1), IGNORE_INDEX)), 1)
    return Prompted(found[:, :PROMPT], ahead, targets, ahead, ahead)


def read(model, word: str, rows: Prompted, draft=None) -> torch.Tensor:
    reader = CachedRows(model, kinds_of([word], "caches")[word], rows, draft)
    return torch.cat(list(reader.log_probabilities(rows.ahead)), 1)


def full_pass(model, rows: Prompted) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(torch.cat((rows.prompt, rows.ahead), 1)).hidden
        return model.logits(hidden[:, PROMPT:]).float().log_softmax(-1)


@pytest.mark.parametrize("mixer", ["flash", "sliding_window", "gated_deltanet", "flash+gated_deltanet"])
def test_exact_is_one_full_pass(small_model, mixer):
    model, rows = small_model(mixer), prompted()
    torch.testing.assert_close(read(model, "exact", rows), full_pass(model, rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "word", ["h2o:budget=100:recent=50", "snapkv:budget=100:window=4", "citrus:budget=100:piece=10"]
)
def test_a_budget_that_holds_everything_loses_nothing(small_model, word):
    model, rows = small_model("flash"), prompted()
    found = read(model, word, rows)
    torch.testing.assert_close(found, full_pass(model, rows), rtol=0, atol=1e-6)
    tally = compare(model, kinds_of(["exact", word], "caches"), [rows])[word]
    assert tally.mean("divergences") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "word",
    [
        *("h2o:budget=8:recent=4", "sink_recent:start=2:recent=6", "snapkv:budget=8:window=3:pool=1"),
        *("quantised:bits=2:group=4:residual=8", "squeezed:newest=4:clusters=0.4:quantile=0.9"),
        "a2ats:sinks=1:window=3:share=0.1:codes=5:distance=20",
    ],
)
def test_what_is_read_is_what_a_session_generates_from(small_model, word):
    model, rows = small_model("flash"), prompted()
    session = Session(model, len(rows.prompt), kinds_of([word], "caches")[word])
    session.prefill(list(rows.prompt))
    wanted = []
    for column in rows.ahead.T:
        session.step(column)
        wanted.append(session.logits.float().log_softmax(-1))
    found = read(model, word, rows)
    torch.testing.assert_close(found, torch.stack(wanted, 1), rtol=0, atol=1e-6)
    assert (found - full_pass(model, rows)).abs().max() > 1e-3  # something is lost


@pytest.mark.parametrize("kind", ["standard", "single", "dual"])
def test_a_question_chooses_and_is_then_read(small_model, kind):
    model, word = small_model("flash"), f"citrus:budget=8:piece=4:kind={kind}"
    rows = prompted(tokens(rows=1))
    rows = Prompted(rows.prompt, rows.ahead, rows.targets, rows.ahead[:, :7], rows.follows)
    session = Session(model, 1, kinds_of([word], "caches")[word])
    session.prefill(list(rows.prompt), question=rows.question[0])
    found = read(model, word, rows)
    torch.testing.assert_close(found[:, 6], session.logits.float().log_softmax(-1), rtol=0, atol=1e-6)


def test_a_cache_that_looks_ahead_sees_the_truth_or_the_draft(small_model):
    model, draft, rows = small_model("flash"), small_model("gated_deltanet"), prompted()
    word = "speckv:budget=8:window=2:pool=1:lookahead=5"
    kind = kinds_of([word], "caches")[word]
    shown = {}
    writer = Session(draft, len(rows.prompt))
    writer.prefill(list(rows.prompt))
    written = []
    for _ in range(5):
        written.append(writer.logits.argmax(-1))
        writer.step(written[-1])
    for name, ahead in (("truth", rows.ahead[:, :5]), ("draft", torch.stack(written, 1))):
        session = Session(model, len(rows.prompt), kind)
        session.prefill(list(rows.prompt), lookahead=ahead)
        session.step(rows.ahead[:, 0])
        shown[name] = session.logits.float().log_softmax(-1)
    torch.testing.assert_close(read(model, word, rows)[:, 0], shown["truth"], rtol=0, atol=1e-6)
    torch.testing.assert_close(read(model, word, rows, draft)[:, 0], shown["draft"], rtol=0, atol=1e-6)
    assert (shown["truth"] - shown["draft"]).abs().max() > 1e-4


def test_scores_are_those_of_plain_torch():
    generator = torch.Generator().manual_seed(0)
    found, exact = (torch.randn(2, 5, 11, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2))
    targets = torch.randint(11, (2, 5), generator=generator)
    targets[0, 1], targets[1, 4] = IGNORE_INDEX, found[1, 4].argmax()
    sums = scored(found, exact, targets)
    valid = targets != IGNORE_INDEX
    loss = F.nll_loss(found.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX).view(2, 5)
    divergence = F.kl_div(found, exact, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(sums["nats"], loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums["divergences"], torch.where(valid, divergence, 0.0), rtol=0, atol=1e-12)
    assert sums["counts"].sum() == 9 and sums["counts"][0, 1] == 0
    assert sums["hits"][1, 4] == 1 and bool((sums["hits"] <= sums["counts"]).all())


def test_what_a_token_cannot_be_diverges_by_nothing():
    certain = torch.tensor([[[0.0, -torch.inf]]])
    sums = scored(torch.tensor([[[0.5, 0.5]]]).log(), certain, torch.tensor([[0]]))
    assert sums["divergences"].item() == pytest.approx(torch.tensor(2.0).log().item())


def test_bytes_are_those_that_kinds_count(small_model):
    model, rows = small_model("flash+gated_deltanet", dtype=torch.float32), prompted()
    words = ["exact", "h2o:budget=8:recent=4", "snapkv:budget=8:window=3:pool=1", "sink_recent:start=2:recent=6"]
    for word, kind in kinds_of(words, "caches").items():
        reader = CachedRows(model, kind, rows)
        assert reader.held == reader.counted_held, word
        reader.session.step(rows.ahead[:, 0])
        own = sum(cache.bookkeeping_bytes() for cache in _caches(reader)) // len(rows.prompt)
        assert reader.session.read_bytes() // len(rows.prompt) - own == pytest.approx(reader.counted_read, abs=64), word


def _caches(reader: CachedRows) -> list:
    from longmix.mixers.parts.states import caches

    return caches(reader.session.state)


def test_rows_in_batches_give_the_same_sums(small_model):
    model, whole = small_model("flash"), prompted()
    kinds = kinds_of(["exact", "snapkv:budget=8:window=3:pool=1"], "caches")
    parts = [whole.changed(lambda x, at=at: x[at : at + 1], ()) for at in range(3)]
    together, apart = (compare(model, kinds, rows) for rows in ([whole], parts))
    for name in kinds:
        for sums in ("nats", "divergences", "hits", "counts"):
            torch.testing.assert_close(getattr(together[name], sums), getattr(apart[name], sums), rtol=0, atol=1e-5)
        assert together[name].bytes() == apart[name].bytes() and together[name].found == apart[name].found
    assert together["exact"].counts.tolist() == [3.0] * AHEAD + [0.0]


def test_by_distance_adds_up(small_model):
    tally = compare(small_model("flash"), kinds_of(["exact"], "caches"), [prompted()])["exact"]
    rows = tally.by_distance()
    first = float(tally.nats[0])  # the prompt alone predicts it: no distance
    total = sum(row["loss"] * row["targets"] for row in rows)
    assert total == pytest.approx(float(tally.nats.sum()) - first)
    assert [row["start"] for row in rows[1:]] == [row["end"] + 1 for row in rows[:-1]] and rows[0]["start"] == 1


def test_a_kind_that_no_layer_takes_is_named(small_model):
    with pytest.raises(
        ConfigError, match=r"^task\.caches names h2o: cache=h2o keeps keys and values of full attention"
    ):
        compare(small_model("gated_deltanet"), kinds_of(["exact", "h2o"], "caches"), [prompted()])
