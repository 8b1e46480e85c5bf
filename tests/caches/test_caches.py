"""What every kind of cache keeps to: one table, of the kinds in configs/cache."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longmix.caches.cache import Cache
from longmix.caches.exact import Exact
from longmix.caches.kinds import kind_files, kind_of, settings_of
from longmix.errors import ConfigError
from longmix.generation import session as sessions
from longmix.generation.session import Session
from longmix.mixers.flash import Flash
from longmix.mixers.fox import Fox
from longmix.mixers.gla import GLA
from longmix.mixers.parts.states import caches
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.backbone import LanguageModel

KINDS = list(kind_files())
WITHIN_ROOM = {
    "a2ats": {"share": 1.0},
    "citrus": {"budget": 60},
    "exact": {},
    "h2o": {"budget": 60, "recent": 20},
    "quantised": {},
    "sink_recent": {"start": 4, "recent": 56},
    "snapkv": {"budget": 60},
    "speckv": {"budget": 60},
    "squeezed": {},
    "zipcache": {},
}
"""Settings with which a kind gives what `exact` gives for texts of 60 tokens; every kind needs its line here."""

SHORT = {
    "a2ats-codes": {"sinks": 0, "window": 3, "share": 0.3, "codes": 6, "distance": 8},
    "a2ats-share": {"sinks": 2, "window": 5, "share": 0.15, "codes": 0.3},
    "citrus-standard": {"budget": 12, "piece": 4, "kind": "standard"},
    "citrus-share": {"budget": 0.5, "piece": 6, "kind": "standard", "representatives": 0.3},
    "h2o-mean": {"mean": True, "budget": 0.4},
    "h2o-tokens": {"budget": 12, "recent": 5},
    "h2o-all-recent": {"budget": 6, "recent": 6},
    "h2o-representatives": {"budget": 0.5, "recent": 0.1, "representatives": 0.5},
    "h2o-pieces": {"budget": 12, "recent": 5, "when": "piece", "piece": 8, "mean": True},
    "quantised-groups": {"group": 4, "residual": 8},
    "quantised-two-bits": {"bits": 2, "group": 4, "residual": 8, "parameters": "float32"},
    "sink_recent-places": {"start": 2, "recent": 7},
    "sink_recent-positions": {"start": 3, "recent": 9, "positions": True},
    "sink_recent-no-sinks": {"start": 0, "recent": 6},
    "snapkv-share": {"budget": 0.5, "window": 3, "pool": 3},
    "snapkv-means": {"budget": 9, "window": 4, "reduction": "mean", "pooling": "mean"},
    "snapkv-representatives": {"budget": 12, "window": 4, "representatives": 0.5},
    "squeezed-one-level": {"newest": 5, "clusters": 0.3},
    "squeezed-two-levels": {"newest": 3, "clusters": 0.5, "coarse": 0.2, "quantile": 0.5},
    "zipcache-refreshed": {"refresh": 6},
    "zipcache-two-bits": {"refresh": 9, "high_share": 0.0, "random_probes": 0.3},
}
"""Settings with which a kind has to choose what it keeps of such texts, behind the name of the kind."""

LAYERS = {
    "flash": (Flash, {}),
    "grouped": (Flash, {"num_kv_heads": 1}),
    "sink-logits": (Flash, {"sink_logits": True}),
    "fourier": (Flash, {"bias": "fourier"}),
    "low-rank": (Flash, {"bias": "low_rank", "num_kv_heads": 2}),
    "context": (Flash, {"position": "context"}),
    "gates": (Flash, {"output_gate": "element", "heads_kept": 2}),
    "alibi": (Flash, {"bias": "alibi"}),
    "gain": (Flash, {"gain": "fourier"}),
    "no-positions": (Flash, {"position": "none"}),
    "fox": (Fox, {}),
    "window": (SlidingWindow, {"window": 7}),
    "window-1": (SlidingWindow, {"window": 1}),
    "wide-window": (SlidingWindow, {"window": 33, "num_kv_heads": 2, "sink_logits": True}),
    "window-forget": (SlidingWindow, {"window": 9, "bias": "forget"}),
    "window-with-gaps": (SlidingWindow, {"window": 5, "dilation": 2}),
}
SPLITS = {
    "steps": [1] * 60,
    "short-pieces": [20, 1, 5, 16, 1, 1, 16],
    "long-pieces": [3, 40, 17],
    "prompt-then-steps": [50] + [1] * 10,
}


def model_of(layer=Flash, num_layers=2, **options) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(
        lambda shape, index: layer(shape, index, **options),
        vocab_size=30,
        d_model=32,
        num_layers=num_layers,
        num_heads=4,
        mlp_hidden=16,
    )
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return made.double().eval()


def tokens_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(30, (length,), generator=generator) for length in lengths]


def begun(model, kind, *prompts: Tensor, room: int = 100) -> Session:
    session = Session(model, len(prompts), kind)
    session.reserve(max(map(len, prompts)) + room)
    session.prefill(list(prompts))
    return session


def steps(session: Session, tokens: Tensor) -> Tensor:
    """Scores [B, T, V] after each of the tokens [B, T]."""
    found = []
    for column in tokens.unbind(1):
        session.step(column)
        found.append(session.logits)
    return torch.stack(found, 1)


OFTEN = {
    "a2ats-share",
    "h2o",
    "h2o-mean",
    "quantised-groups",
    "sink_recent-places",
    "snapkv-share",
    "squeezed-one-level",
    "zipcache-refreshed",
}
"""Of kinds in `SHORT`, those that the usual tests run; the others are slow."""


def kinds() -> list:
    short = {name.partition("-")[0] for name in SHORT}
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name not in OFTEN and name.partition("-")[0] in short else [])
        for name in (*KINDS, *SHORT)
    ]


@pytest.fixture(params=kinds())
def kind(request):
    return kind_of(request.param.partition("-")[0], SHORT.get(request.param))


def test_every_kind_has_settings_that_keep_everything():
    assert list(WITHIN_ROOM) == KINDS


@pytest.mark.sampled(40)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_keeping_everything_equals_one_full_pass(name, layer, split):
    kind = kind_of(name, WITHIN_ROOM[name])
    cls, options = LAYERS[layer]
    model = model_of(cls, **options)
    if name != "exact" and not any(mixer.takes_cache(kind) for mixer in model.mixers()):
        with pytest.raises(ConfigError, match=f"cache={name} keeps keys"):
            model.decoding_state(2, kind)
        return
    rows = torch.stack(tokens_of(60, 60))
    documents = torch.zeros(2, 60, dtype=torch.int32)
    documents[0, 10:], documents[1, 20:], documents[1, 41:] = 1, 1, 2
    for ids in (None, documents):
        state, found, place = model.decoding_state(2, kind), [], 0
        for count in SPLITS[split]:
            piece = slice(place, place + count)
            output = model(rows[:, piece], state=state, document_ids=None if ids is None else ids[:, piece])
            state, place = output.state, place + count
            found.append(output.hidden)
        wanted = model(rows, document_ids=ids).hidden
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=1e-10)


def test_layers_that_keep_slots_in_order_go_on_from_states_of_their_own():
    held = {name: len(caches(model_of(cls, **options).decoding_state(1))) for name, (cls, options) in LAYERS.items()}
    assert {name for name, count in held.items() if count == 0} == {"alibi", "gain", "window-with-gaps"}


def test_rows_of_any_length_are_what_they_are_alone(kind, monkeypatch):
    monkeypatch.setattr(sessions, "PREFILL_TOKENS", 60)  # pieces of 20
    model, given = model_of(num_kv_heads=2), tokens_of(37, 5, 18)
    more = torch.stack(tokens_of(12, 12, 12))
    together = begun(model, kind, *given)
    first, later = together.logits, steps(together, more)
    monkeypatch.setattr(sessions, "PREFILL_TOKENS", 20)
    for row, prompt in enumerate(given):
        alone = begun(model, kind, prompt)
        torch.testing.assert_close(first[row], alone.logits[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(later[row], steps(alone, more[row : row + 1])[0], rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [Flash, SlidingWindow])
def test_forks_and_forks_of_forks_go_on_independently(kind, layer):
    model = model_of(layer, **({"window": 7} if layer is SlidingWindow else {}))
    if not model.mixers()[0].takes_cache(kind):
        pytest.skip("the layer does not take the kind")
    given = tokens_of(23, 9)
    session = begun(model, kind, *given)
    rows = [list(prompt) for prompt in given]
    lineages = [(session, rows)]
    generator = torch.Generator().manual_seed(2)
    for generation in range(6):
        parent, texts = lineages[-1]
        count = 2 if generation < 2 else 1
        lineages.append((parent.fork(count), [list(text) for text in texts for _ in range(count)]))
        for each, texts in lineages:
            column = torch.randint(30, (each.batch,), generator=generator)
            each.step(column)
            for text, token in zip(texts, column, strict=True):
                text.append(token)
    for each, texts in lineages:
        steps_of = [torch.stack(text) for text in texts]
        for row, text in enumerate(steps_of):
            prompt = len(given[row * 2 // each.batch])
            alone = begun(model, kind, text[:prompt])
            wanted = steps(alone, text[None, prompt:])[0, -1]
            torch.testing.assert_close(each.logits[row], wanted, rtol=0, atol=1e-10)


def test_kept_rows_go_on_independently(kind):
    model = model_of()
    session = begun(model, kind, *tokens_of(20, 20, 20)).fork(2)
    session.step(torch.arange(6))
    order = torch.tensor([5, 0, 0, 3])
    states = copy.copy(session)
    states.state = [type(each)(each.mixer.keep(order), each.channel_mixer) for each in session.state]
    wanted = steps(session, torch.full((6, 3), 7))
    torch.testing.assert_close(steps(states, torch.full((4, 3), 7)), wanted[order], rtol=0, atol=1e-10)


def test_bytes_held_are_those_counted(kind):
    model = model_of(num_kv_heads=2)
    for length in (5, 37):
        for session in (begun(model, kind, *tokens_of(length, length)), begun(model, kind, *tokens_of(length) * 2)):
            for cache in caches(session.state):
                shape = cache.shape
                assert cache.held_bytes() == 2 * kind.bytes(shape, length)
                assert cache.spare_bytes() >= 0 and cache.read_bytes() <= cache.held_bytes()
                live = sum(x.untyped_storage().nbytes() for x in tensors_of(cache))
                known = cache.held_bytes() + cache.spare_bytes() + cache.bookkeeping_bytes()
                assert live <= known + 64 * shape.batch  # what else there may be is a few numbers a row


def tensors_of(node, seen=None):
    """Tensors in an object and the objects of longmix in it, each memory once."""
    seen = {} if seen is None else seen
    if isinstance(node, Tensor):
        seen[node.untyped_storage().data_ptr()] = node
    elif isinstance(node, dict | list | tuple):
        for part in node.values() if isinstance(node, dict) else node:
            tensors_of(part, seen)
    elif type(node).__module__.startswith("longmix"):
        tensors_of({name: x for name, x in vars(node).items() if name not in ("kind", "shape")}, seen)
    return list(seen.values())


def test_saved_and_loaded_it_goes_on_bit_for_bit(kind, tmp_path):
    model, more = model_of(num_kv_heads=2), torch.stack(tokens_of(10, 10, 10, 10))
    for number, lengths in enumerate(((20, 20), (20, 9))):
        session = begun(model, kind, *tokens_of(*lengths)).fork(2)
        steps(session, more[:, :3])
        path = tmp_path / str(number)
        session.save(path, {})
        loaded, _ = Session.load(path, model, torch.device("cpu"))
        assert loaded.cache == kind or settings_of(loaded.cache) == settings_of(kind)
        assert torch.equal(steps(loaded, more[:, 3:]), steps(session, more[:, 3:]))
        assert path.stat().st_size < session.state_bytes() + 40_000  # without spare room; a prefix once


class Waits(TorchDispatchMode):
    """Refuses what waits for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "unique", "masked_select")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        assert not any(word in name for word in self.WAITING), name
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("lengths", [(20, 20), (20, 9)])
def test_a_step_does_not_wait_for_the_device(kind, lengths):
    session = begun(model_of(), kind, *tokens_of(*lengths)).fork(2)
    with Waits():
        session.step(torch.zeros(4, dtype=torch.int64))


class Copied(TorchDispatchMode):
    """Counts the bytes that operators write which could copy a cache."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        copies = ("aten.cat", "clone", "copy", "index", "gather", "pad", "repeat", "new_", "zeros", "empty", "where")
        copied = any(word in str(function) for word in copies) and isinstance(result, Tensor)
        if copied and not _is_read(function, arguments[0], result):
            self.bytes += result.numel() * result.element_size()
        return result


def _is_read(function, argument, result) -> bool:
    """Whether numbers are made of codes, or of what has fewer bits, or places of scores: no copy of a cache."""
    widened = "_to_copy" in str(function) and argument.element_size() < result.element_size()
    return widened or not (result.is_floating_point() or result.dtype == torch.uint8)


def test_a_step_copies_nothing_that_was_there(kind):
    found = []
    for length in (256, 512):
        session = begun(model_of(), kind, *tokens_of(length, length))
        session.step(torch.zeros(2, dtype=torch.int64))
        with Copied() as copied:
            session.step(torch.zeros(2, dtype=torch.int64))
        found.append(copied.bytes)
    assert found[0] == found[1]


class Compared(TorchDispatchMode):
    """Counts comparisons, which masks are made of."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += str(function).startswith("aten.ge")
        return function(*arguments, **(options or {}))


def test_rows_of_different_lengths_keep_their_mask_between_steps():
    session = begun(model_of(), Exact(), *tokens_of(20, 9))
    session.step(torch.zeros(2, dtype=torch.int64))
    with Compared() as compared:
        session.step(torch.zeros(2, dtype=torch.int64))
        session.fork(2).step(torch.zeros(4, dtype=torch.int64))
    assert compared.count == 2  # of the forks' two layers


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=16)
def test_a_step_is_one_graph_for_all_lengths(kind):
    codes = getattr(kind, "recent_size", 100) < 10
    count = 4 * kind.recent_size if codes else 14
    for layer, options in ((Flash, {"sink_logits": True}), (SlidingWindow, {"window": 9})):
        model = model_of(layer, num_layers=1, **options)
        if not model.mixers()[0].takes_cache(kind):
            continue
        for lengths in ((20, 20), (20, 7)):
            session, other = (begun(model, kind, *tokens_of(*lengths)) for _ in range(2))
            more = torch.stack(tokens_of(count, count))
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            graphs = []
            for column in more.unbind(1):
                session.step(column)
                with torch.no_grad():
                    output = compiled(column[:, None], state=other.state)
                other.state = output.state
                found = model.logits(output.hidden[:, -1]).detach()
                torch.testing.assert_close(found, session.logits, rtol=0, atol=1e-12)
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            if codes:  # of no block, one, and more; for the first of the newest tokens, more, and those that fill one
                assert graphs[-1] <= 9 and graphs[-kind.recent_size] == graphs[-1]
            else:
                # one for the first number of tokens, one for any, and one for the first token behind what was kept
                anew = any(getattr(cache, "kept_key", None) is not None for cache in caches(session.state))
                assert graphs[-1] <= 2 + anew


@torch.no_grad()
def test_what_comes_later_in_a_piece_changes_nothing_before(kind):
    model = model_of()
    prompt, piece = (torch.stack(tokens_of(length, length)) for length in (24, 20))
    changed = piece.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 30
    found = []
    for tokens in (piece, changed):
        state = model(prompt, state=model.decoding_state(2, kind)).state
        found.append(model(tokens, state=state).hidden)
    assert torch.equal(found[0][:, :-1], found[1][:, :-1])
    assert not torch.equal(found[0][:, -1], found[1][:, -1])


@torch.no_grad()
def test_a_new_document_in_a_row_forgets_the_one_before(kind):
    model = model_of()
    old, new = (torch.stack(tokens_of(length, length)) for length in (30, 19))
    more = torch.stack(tokens_of(8, 8))
    ids = torch.cat((torch.zeros(2, 30, dtype=torch.int32), torch.ones(2, 19, dtype=torch.int32)), 1)
    for split in (49, 30, 25, 40):  # the document begins within a piece, with one, or goes on in the next
        state = model.decoding_state(2, kind)
        rows = torch.cat((old, new), 1)
        for piece in (slice(0, split), slice(split, 49)):
            if rows[:, piece].shape[1]:
                state = model(rows[:, piece], state=state, document_ids=ids[:, piece]).state
        for each in caches(state):
            each.prompt_ended()
        alone = model(new, state=model.decoding_state(2, kind)).state
        for each in caches(alone):
            each.prompt_ended()
        for column in more.split(1, 1):
            pair = [model(column, state=each) for each in (state, alone)]
            state, alone = (each.state for each in pair)
            torch.testing.assert_close(pair[0].hidden, pair[1].hidden, rtol=0, atol=1e-10)


def test_gradients_are_refused_by_name(kind):
    model = model_of()
    with pytest.raises(ConfigError, match=f"cache={kind.name} is for inference"):
        model(torch.zeros(1, 3, dtype=torch.int64), state=model.decoding_state(1, kind))


def test_layers_that_are_to_be_exact_are():
    class Other(Exact):
        name: ClassVar[str] = "other"

    model = model_of()
    state = model.decoding_state(1, Other(exact_layers=(-1,)))
    assert [cache.kind.name for cache in caches(state)] == ["other", "exact"]
    with pytest.raises(ConfigError, match=r"cache=other keeps keys and values of full attention.* they are GLA; use"):
        model_of(GLA).decoding_state(1, Other())
    with pytest.raises(ConfigError, match="no layer takes it: they are SlidingWindow"):
        model_of(SlidingWindow).decoding_state(1, Other())


def test_a_kind_that_is_none_is_named():
    with pytest.raises(ConfigError, match=r"there is no cache exakt\. Did you mean exact\?.*Caches are: .*exact"):
        kind_of("exakt")
    with pytest.raises(ConfigError, match=r"cache\.size"):
        kind_of("exact", {"size": 3})


def test_a_saved_generation_is_not_loaded_into_another_cache(tmp_path):
    model = model_of()
    begun(model, Exact(), *tokens_of(5)).save(tmp_path / "saved", {})
    with pytest.raises(ConfigError, match="was saved with another cache; leave cache= out, or give cache=exact"):
        Session.load(tmp_path / "saved", model, torch.device("cpu"), Exact(exact_layers=(1,)))


def test_a_cache_without_its_methods_says_so():
    shape = model_of().mixers()[0].cache_shape(1)
    with pytest.raises(NotImplementedError, match="lacks append"):
        Cache(Exact(), shape).append(None)
