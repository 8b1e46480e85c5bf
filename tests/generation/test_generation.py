"""Generation: every mixer's session against full passes, and the entry point."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_mixers import small_mixer
from torch import nn
from torch.utils._pytree import register_pytree_node

from longmix.checkpoints import CheckpointStore, find_checkpoint, load_checkpoint, save_tensors
from longmix.config import ModelConfig, resolved
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StorageError
from longmix.generation import session as sessions
from longmix.generation.run import generate
from longmix.generation.session import Session
from longmix.mixers.parts.base import Mixer, MixerOutput
from longmix.mixers.parts.states import held_bytes, mixer_state, named_leaves
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model, model_from_checkpoint
from longmix.model.tuned_states_file import save_states, tune_states

CONFIGS = Path(__file__).parents[2] / "configs"
MIXERS = sorted(path.stem for path in (CONFIGS / "mixer").glob("*.yaml"))
STACKS = [*MIXERS, "rwkv7+flash+mlstm_tfla", "sparse_flash+gated_deltanet"]
SMALL = ("model.d_model=64", "model.num_layers=3", "model.num_heads=2", "model.mlp_hidden=32")


@pytest.fixture
def model(compose_config, request) -> LanguageModel:
    """A small model with the mixer or pattern that the test is given, with noise on every weight."""
    torch.manual_seed(0)
    name = request.param
    config = resolved(compose_config(f"mixer={name}", *SMALL))
    made = build_model(ModelConfig.of({**config, "mixer": small_mixer(config["mixer"], 8)}), vocab_size=20)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return made.double().eval()


def last_logits(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens[None]).hidden[0, -1]).detach()


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (length,), generator=generator) for length in lengths]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("model", STACKS, indirect=True)
def test_rows_of_any_length_forks_and_saved_sessions_go_on_as_alone(model, monkeypatch, tmp_path):
    monkeypatch.setattr(sessions, "PREFILL_TOKENS", 20)
    given = prompts(37, 5, 18)
    session = Session(model, 3)
    session.prefill(given)
    forked = session.fork(2)
    for row, prompt in enumerate(given):
        torch.testing.assert_close(session.logits[row], last_logits(model, prompt), rtol=0, atol=1e-10)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.cat([prompt, torch.zeros(0, dtype=torch.int64)]) for prompt in given for _ in range(2)]
    for step in range(9):
        tokens = torch.randint(20, (6,), generator=generator)
        forked.step(tokens)
        rows = [torch.cat([row, token[None]]) for row, token in zip(rows, tokens, strict=True)]
        if step == 4:
            forked.save(tmp_path / "state", {"note": 3})
            forked, about = Session.load(tmp_path / "state", model, torch.device("cpu"))
            assert about == {"note": 3} and forked.batch == 6
    for row, tokens in enumerate(rows):
        torch.testing.assert_close(forked.logits[row], last_logits(model, tokens), rtol=0, atol=1e-10)
    session.step(torch.zeros(3, dtype=torch.int64))
    for row, prompt in enumerate(given):
        wanted = last_logits(model, torch.cat([prompt, torch.zeros(1, dtype=torch.int64)]))
        torch.testing.assert_close(session.logits[row], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", ["flash", "rwkv7"], indirect=True)
def test_a_constant_state_does_not_grow(model, request):
    sizes = []
    for length in (10, 30):
        session = Session(model, 2)
        session.prefill(prompts(length, length))
        sizes.append(session.state_bytes())
    assert (sizes[0] == sizes[1]) == (request.node.callspec.params["model"] == "rwkv7")


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    words = ("mixer=rwkv7+flash", "mixer.rwkv7.head_dim=16", "model.num_layers=2", "seq_len=64", "max_steps=3")
    return run_training(*words, f"data.cache_dir={shared_cache}")


@pytest.fixture
def generated(compose_config, run_folder):
    def run(*words: str):
        return generate(compose_config(f"checkpoint={run_folder}", *words, entry_point="generate"))

    return run


@pytest.mark.slow
def test_a_saved_text_goes_on_as_if_it_had_never_stopped(generated, tmp_path, capsys):
    whole = generated("prompt=The state", "max_tokens=20", "seed=3")
    assert capsys.readouterr().out == whole.texts[0] + "\n"
    generated("prompt=The state", "max_tokens=12", "seed=3", f"save={tmp_path}/here")
    rest = generated(f"load={tmp_path}/here", "max_tokens=8")
    assert rest.ids == whole.ids and len(whole.ids[0]) == 1 + len("The state") + 20
    assert generated(f"load={tmp_path}/here", "max_tokens=8", "seed=9").ids != whole.ids
    forks = generated(f"load={tmp_path}/here", "max_tokens=8", "samples=3")
    assert len({tuple(row) for row in forks.ids}) == 3


PENALTIES = ("repetition_penalty=1.3", "presence_penalty=0.5", "frequency_penalty=0.8", "logit_bias={101:1.5}")


@pytest.mark.slow
def test_penalties_go_on_with_a_saved_text(generated, tmp_path):
    """The prompt counts for one of them, the text for all: which is which is saved."""
    words = ("prompt=[The state,eee]", "seed=5", *PENALTIES)
    whole = generated(*words, "max_tokens=20")
    assert whole.ids != generated("prompt=[The state,eee]", "seed=5", "max_tokens=20").ids
    generated(*words, "max_tokens=11", f"save={tmp_path}/here")
    assert generated(f"load={tmp_path}/here", "max_tokens=9", *PENALTIES).ids == whole.ids
    both = generated(f"load={tmp_path}/here", "max_tokens=9", "samples=2", *PENALTIES)
    assert [both.ids[0], both.ids[2]] == whole.ids and both.ids[1] != both.ids[0]


@pytest.mark.slow
def test_a_saved_text_of_an_earlier_version_goes_on(generated, tmp_path):
    """It had one generator for all rows, and did not say where the prompts end, nor of which states it was."""
    generated("prompt=[The state,The state]", "max_tokens=3", "temperature=0", f"save={tmp_path}/here")
    content = torch.load(tmp_path / "here", weights_only=True)
    for name in ("prompts", "keys", "states"):
        del content["about"][name]
    content["about"]["generator"] = torch.Generator().manual_seed(3).get_state()
    save_tensors(tmp_path / "earlier", content)
    found = generated(f"load={tmp_path}/earlier", "max_tokens=9").ids
    assert found == generated(f"load={tmp_path}/earlier", "max_tokens=9").ids and found[0] != found[1]
    content["about"]["generator"] = torch.Generator().manual_seed(4).get_state()
    save_tensors(tmp_path / "earlier", content)
    assert found != generated(f"load={tmp_path}/earlier", "max_tokens=9").ids


@pytest.mark.slow
def test_a_saved_text_is_of_its_states_too(generated, run_folder, tmp_path):
    state = load_checkpoint(run_folder)
    model = model_from_checkpoint(state)
    tune_states(model)
    save_states(tmp_path / "states.pt", ModelConfig.of(state["config"]), model.state_dict())
    states = f"states={tmp_path}/states.pt"
    generated("prompt=ab", "max_tokens=2", states, f"save={tmp_path}/with")
    generated("prompt=ab", "max_tokens=2", f"save={tmp_path}/without")
    generated(states, "max_tokens=2", f"load={tmp_path}/with")
    for given in ([f"load={tmp_path}/with"], [states, f"load={tmp_path}/without"]):
        with pytest.raises(ConfigError, match="with another checkpoint, or other weights or states of it"):
            generated(*given)


def early_letter(texts: list[str]) -> str:
    """A letter that one of the texts has soon and another has not."""
    return next(
        letter
        for text in texts
        for letter in text[1:8]
        if letter.isascii() and letter.isalnum() and not all(letter in other for other in texts)
    )


SAMPLES = ("prompt=[The state,Of]", "samples=2", "seed=3")


@pytest.mark.slow
def test_rows_that_ended_early_are_saved_as_they_stood_at_their_end(generated, run_folder, tmp_path):
    stop = early_letter(generated(*SAMPLES, "max_tokens=20").texts)
    short = generated(*SAMPLES, "max_tokens=20", f"stop=[{stop}]", f"save={tmp_path}/here")
    assert len({len(row) for row in short.ids}) > 2
    model = model_from_checkpoint(load_checkpoint(find_checkpoint(run_folder))).eval()
    saved, about = Session.load(tmp_path / "here", model, torch.device("cpu"))
    assert about["ids"] == short.ids
    rest = generated(f"load={tmp_path}/here", "temperature=0", "max_tokens=9")
    for row, ids in enumerate(short.ids):
        torch.testing.assert_close(saved.logits[row], last_logits(model, torch.tensor(ids)), rtol=0, atol=1e-4)
        for _ in range(9):
            ids.append(int(last_logits(model, torch.tensor(ids)).argmax()))
    assert rest.ids == short.ids


@pytest.mark.slow
def test_rows_whose_text_ended_stay_as_they_are(generated, tmp_path, monkeypatch, capsys):
    end = early_letter(generated(*SAMPLES, "max_tokens=20").texts)
    monkeypatch.setattr(ByteTokenizer, "end_ids", property(lambda self: (ord(end),)))
    whole = generated(*SAMPLES, "max_tokens=28")
    short = generated(*SAMPLES, "max_tokens=20", f"save={tmp_path}/here")
    assert min(map(len, short.ids)) < 20
    assert generated(f"load={tmp_path}/here", "max_tokens=8").ids == whole.ids
    one = generated("prompt=The state", "max_tokens=4000", "seed=3", f"save={tmp_path}/one")
    assert one.ids[0][-1] == ord(end)
    capsys.readouterr()
    assert generated(f"load={tmp_path}/one", "max_tokens=8").ids == one.ids
    assert "every text in the saved generation has ended" in capsys.readouterr().err


def test_rows_are_those_of_each_prompt_alone(generated, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Of the Union")
    options = ("temperature=0", "max_tokens=10")
    alone = [generated(f"prompt={text}", *options).ids[0] for text in ("To the Congress", "x")]
    from_file = generated(f"prompt_file={tmp_path}/prompt.txt", *options)
    assert from_file.ids[0][:13] == [256, *b"Of the Union"]
    capsys.readouterr()
    together = generated("prompt=[To the Congress,x]", *options, "samples=2")
    assert together.ids == [alone[0], alone[0], alone[1], alone[1]]
    assert capsys.readouterr().out.count("---") == 4
    assert together.state_bytes > 0 and together.tokens_per_second > 0


@pytest.mark.slow
def test_clear_errors(generated, tmp_path, run_training, shared_cache):
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    generated("max_tokens=1", f"save={tmp_path}/saved")
    for words, kind, message in (
        (["max_tokens=0"], ConfigError, "max_tokens=0"),
        (["samples=0"], ConfigError, "samples=0"),
        (["samples=1000000000000"], ConfigError, "more memory than there is, .*; give fewer samples, or fewer prompts"),
        (["samples=1000000000"], ConfigError, "samples=1000000000: 1,000,000,000 rows at once take more memory"),
        (["repetition_penalty=0"], ConfigError, "repetition_penalty=0.0 must be from"),
        (["presence_penalty=nan"], ConfigError, "presence_penalty=nan is not a number"),
        (["frequency_penalty=1e9"], ConfigError, "frequency_penalty=1000000000.0 must be from"),
        (["logit_bias={999:1}"], ConfigError, "999 is not among the ids, 0 to 256"),
        (["logit_bias=5"], ConfigError, "logit_bias=5 is no mapping; write it like"),
        (["logprobs=2"], ConfigError, "give output=FILE.jsonl too, or use Python"),
        (["input=x.jsonl"], ConfigError, "input needs output=FILE.jsonl"),
        (["seed=-1"], ConfigError, "seed=-1 must lie between 0 and"),
        (["seed=4294967296"], ConfigError, "seed=4294967296 must lie between 0 and"),
        (["temperature=nan"], ConfigError, "temperature=nan is not a number"),
        (["temperature=inf"], ConfigError, "temperature=inf is not a number"),
        (["stop=['']"], ConfigError, "empty text"),
        (["prompt=[]"], ConfigError, "empty list"),
        (["prompt=a", f"prompt_file={tmp_path}/latin"], ConfigError, "not both"),
        ([f"prompt_file={tmp_path}/latin"], DataError, "not UTF-8"),
        ([f"prompt_file={tmp_path}/absent"], DataError, "cannot be read"),
        (["prompt_file=/dev/zero"], DataError, "is longer than 67,108,864 bytes"),
        ([f"load={tmp_path}/latin"], CheckpointError, "holds no saved generation"),
        ([f"load={tmp_path}/absent"], CheckpointError, "holds no saved generation"),
        (["prompt=a", f"load={tmp_path}/saved"], ConfigError, "leave prompt"),
    ):
        with pytest.raises(kind, match=message):
            generated(*words)


def test_weights_that_are_no_numbers_are_one_clear_error(generated, run_folder, tmp_path):
    state = load_checkpoint(find_checkpoint(run_folder))
    state["model"]["norm.weight"][0] = torch.nan
    store = CheckpointStore(tmp_path / "broken" / "checkpoints")
    store.save(state, {})
    for temperature in (0, 1):
        with pytest.raises(NonFiniteError, match="the checkpoint's weights hold such numbers"):
            generated(f"checkpoint={tmp_path}/broken", f"temperature={temperature}", "max_tokens=2")


def changed_class(content: dict, name: str) -> None:
    content["state"][0] = {"class": name, "fields": {}}


WRONG_OBJECTS = {
    "function": (lambda x: changed_class(x, "torch.serialization.load"), "it lacks"),
    "own-function": (lambda x: changed_class(x, "longmix.cli.help_text"), "it lacks"),
    "own-class": (lambda x: changed_class(x, "longmix.data.prepared.RemoteShards"), "it lacks"),
    "no-fields": (lambda x: x["state"].__setitem__(0, {}), "fields"),
    "fewer-layers": (lambda x: x["state"].pop(), r"it lacks \[2\].mixer"),
    "more-layers": (lambda x: x["state"].append(x["state"][0]), r"'\[3\].mixer[^ ]*', which is in no state"),
}
"""Only files of format 2, which nest lists and objects, can be wrong so."""

WRONG_NAMES = {
    "stranger": (lambda x: x["state"].update({"[0].mixer.keys": torch.zeros(2, 1)}), "is in no state of this model"),
    "number-name": (lambda x: x["state"].update({3: torch.zeros(2, 1)}), "3, which is in no state of this model"),
    "missing": (lambda x: x["state"].pop(next(iter(x["state"]))), r"it lacks \[0\].mixer"),
    "text": (lambda x: x["state"].update({next(iter(x["state"])): "text"}), "'text' in the place of a"),
    "list": (lambda x: x.update(state=list(x["state"].values())), "in the place of a state"),
}
"""Only files of formats 3 and 4, which hold tensors by name, can be wrong so."""

WRONG = {
    "no-layers": (lambda x: x.update(state=5), "saved generation of this model"),
    "no-state": (lambda x: x.pop("state"), "state"),
    "tensor-as-state": (lambda x: x.update(state=torch.zeros(2)), "saved generation"),
    "other-batch": (lambda x: x.update(batch=3), "shape"),
    "batch-0": (lambda x: x.update(batch=0), "batch is 0"),
    "huge-batch": (lambda x: x.update(batch=10**12), "shape"),
    "text-batch": (lambda x: x.update(batch="2"), "batch is '2'"),
    "negative-length": (lambda x: x.update(length=-1), "length is -1"),
    "other-vocabulary": (lambda x: x.update(logits=torch.zeros(2, 21)), "scores"),
    "no-logits": (lambda x: x.update(logits=None), "scores"),
    "about-list": (lambda x: x.update(about=[]), "what it is of"),
    "about-missing": (lambda x: x.pop("about"), "about"),
    "format-text": (lambda x: x.update(format="4"), "has format 4"),
    "format-true": (lambda x: x.update(format=True), "has format True"),
    "format-missing": (lambda x: x.pop("format"), "format"),
    "later-format": (lambda x: x.update(format=5), "has format 5"),
    "truncated-state": (lambda x: shrink(x["state"]), "saved generation of this model"),
    "meta": (lambda x: shrink(x["state"], lambda t: t.to("meta")), "saved generation of this model"),
}


RESAVED = {
    "no-ids": lambda about: about.pop("ids"),
    "ids-text": lambda about: about.update(ids="ab"),
    "fewer-rows": lambda about: about["ids"].clear(),
    "more-rows": lambda about: about["ids"].append([1]),
    "row-text": lambda about: about.update(ids=["ab"]),
    "large-id": lambda about: about["ids"][0].append(10**9),
    "negative-id": lambda about: about["ids"][0].append(-1),
    "true-id": lambda about: about["ids"][0].append(True),
    "long-row": lambda about: about["ids"][0].extend([1] * 1000),
    "no-prompts": lambda about: about.pop("prompts"),
    "fewer-prompts": lambda about: about["prompts"].clear(),
    "long-prompt": lambda about: about.update(prompts=[1000]),
    "prompts-text": lambda about: about.update(prompts="a"),
    "keys-text": lambda about: about.update(keys="a"),
    "more-keys": lambda about: about["keys"].append(1),
    "negative-key": lambda about: about.update(keys=[-1]),
    "large-key": lambda about: about.update(keys=[2**63]),
    "true-key": lambda about: about.update(keys=[True]),
    "no-generator": lambda about: about.pop("keys"),
    "generator-text": lambda about: about.update(generator="x") or about.pop("keys"),
    "generator-float": lambda about: about.update(generator=torch.zeros(9)) or about.pop("keys"),
}


def test_a_saved_text_goes_on_with_its_own_weights_alone(compose_config, run_folder, tmp_path):
    """Another run's checkpoint may be of the same step."""

    def generated(folder, *words):
        return generate(compose_config(f"checkpoint={folder}", "max_tokens=2", *words, entry_point="generate"))

    generated(run_folder, "prompt=ab", f"save={tmp_path}/saved")
    state = load_checkpoint(run_folder)
    state["model"]["embedding.weight"] += 1
    CheckpointStore(tmp_path / "other" / "checkpoints").save(state, {})
    with pytest.raises(ConfigError, match="was saved with another checkpoint"):
        generated(tmp_path / "other", f"load={tmp_path}/saved")
    content = torch.load(tmp_path / "saved", weights_only=True)
    del content["about"]["weights"]  # as earlier versions wrote it
    save_tensors(tmp_path / "earlier", content)
    generated(run_folder, f"load={tmp_path}/earlier")


@pytest.mark.slow
def test_a_saved_text_with_other_tokens_is_refused_by_name(generated, tmp_path):
    generated("max_tokens=3", "prompt=ab", f"save={tmp_path}/saved")
    generated("max_tokens=1", f"load={tmp_path}/saved")
    for name, change in RESAVED.items():
        content = torch.load(tmp_path / "saved", weights_only=True)
        change(content["about"])
        save_tensors(tmp_path / name, content)
        with pytest.raises(CheckpointError, match=name) as caught:
            generated("max_tokens=1", f"load={tmp_path / name}")
        assert "\n" not in str(caught.value), name


def shrink(plain, change=lambda x: x[..., :-1]):
    """Change every tensor of a state in its plain form."""
    items = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, part in list(items):
        if isinstance(part, torch.Tensor):
            plain[key] = change(part)
        else:
            shrink(part, change)


@pytest.mark.parametrize("model", ["flash", "rwkv7"], indirect=True)
def test_a_saved_text_of_anything_else_is_refused_by_name_and_runs_no_code(model, tmp_path):
    session = Session(model, 2)
    session.prefill(prompts(7, 7))
    session.save(tmp_path / "saved", {})
    earlier = earlier_state(model, prompts(7, 7))
    formats = {2: nested(earlier), 3: named_leaves(earlier)}
    for number, cases in ((2, WRONG | WRONG_OBJECTS), (3, WRONG | WRONG_NAMES), (4, WRONG | WRONG_NAMES)):
        for name, (change, words) in cases.items():
            content = torch.load(tmp_path / "saved", weights_only=True)
            if number in formats:
                content |= {"format": number, "state": copy.deepcopy(formats[number])}
            change(content)
            save_tensors(tmp_path / name, content)
            with pytest.raises(CheckpointError, match=words) as caught:
                Session.load(tmp_path / name, model, torch.device("cpu"))
            assert str(tmp_path / name) in str(caught.value)
            assert "\n" not in str(caught.value)


def nested(state):
    """A state as files of format 2 hold it."""
    if isinstance(state, torch.Tensor | int | None):
        return state
    if isinstance(state, list):
        return [nested(part) for part in state]
    names = getattr(state, "_fields", None) or [field.name for field in dataclasses.fields(state)]
    fields = {name: nested(getattr(state, name)) for name in names}
    return {"class": f"{type(state).__module__}.{type(state).__qualname__}", "fields": fields}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("model", STACKS, indirect=True)
def test_a_file_of_the_format_before_goes_on_alike(model, tmp_path):
    session = Session(model, 2)
    session.prefill(prompts(37, 5))
    session.save(tmp_path / "saved", {})
    content = torch.load(tmp_path / "saved", weights_only=True)
    assert content.pop("cache") == {"name": "exact", "settings": {"exact_layers": []}}
    before = earlier_state(model, prompts(37, 5))
    save_tensors(tmp_path / "2", content | {"format": 2, "state": nested(before)})
    save_tensors(tmp_path / "3", content | {"format": 3, "state": named_leaves(before)})
    loaded = [Session.load(tmp_path / name, model, torch.device("cpu"))[0] for name in ("saved", "2", "3")]
    for step in range(9):
        for each in (session, *loaded):
            each.step(torch.tensor([3 + step, 4]))
        assert torch.equal(loaded[0].logits, session.logits)
        for each in loaded[1:]:
            torch.testing.assert_close(each.logits, session.logits, rtol=0, atol=1e-12)


@torch.no_grad()
def earlier_state(model, given):
    """The state after prompts as versions before caches had it."""
    longest = max(map(len, given))
    tokens, ids = torch.zeros(2, len(given), longest, dtype=torch.int64)
    for row, prompt in enumerate(given):
        tokens[row, longest - len(prompt) :], ids[row, longest - len(prompt) :] = prompt, 1
    padded = bool((ids == 0).any())
    return model(tokens, state=model.init_state(len(given)), document_ids=ids.int() if padded else None).state


@mixer_state(bookkeeping=("count",))
@dataclasses.dataclass
class Sum:
    total: torch.Tensor
    count: torch.Tensor


class Summing(Mixer):
    """Of another package: the sum of all tokens, remembered in a class, a dict and a node that has no names."""

    def __init__(self, shape, layer_index):
        super().__init__()
        self.matrix = nn.Linear(shape.d_model, shape.d_model)

    def forward(self, x, *, state=None, document_ids=None):
        own = Sum(x.new_zeros(x.shape[0], x.shape[2]), x.new_zeros(x.shape[0])) if state is None else state["sum"]
        total = own.total[:, None] + x.cumsum(1)
        after = None if state is None else {**state, "sum": Sum(total[:, -1], own.count + x.shape[1])}
        return MixerOutput(self.matrix(total), after)

    def init_state(self, batch):
        return {"sum": Sum(self.matrix.weight.new_zeros(batch, self.matrix.in_features), torch.zeros(batch))}

    def state_bytes(self, length):
        return self.matrix.weight[0].nbytes

    def flops(self, length):
        return 2 * length * self.matrix.weight.numel()


class Pair:
    def __init__(self, *parts):
        self.parts = parts


register_pytree_node(Pair, lambda pair: (list(pair.parts), None), lambda parts, _: Pair(*parts))


class Paired(Summing):
    def init_state(self, batch):
        return {**super().init_state(batch), "pair": Pair(torch.zeros(batch), torch.zeros(batch, 2))}


class Unknown(Summing):
    def init_state(self, batch):
        return {**super().init_state(batch), "pair": object()}


class Turned(Summing):
    def init_state(self, batch):
        return {**super().init_state(batch), "pair": torch.zeros(3, batch)}


def of_another_package(kind) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(kind, 20, d_model=16, num_layers=2, num_heads=2, mlp_hidden=8).double().eval()


@pytest.mark.parametrize("kind", [Summing, Paired])
def test_a_mixer_of_another_package_is_forked_saved_and_loaded(kind, tmp_path):
    model = of_another_package(kind)
    session = Session(model, 2)
    session.prefill(prompts(7, 7))
    session.fork(3).save(tmp_path / "saved", {})
    loaded, _ = Session.load(tmp_path / "saved", model, torch.device("cpu"))
    assert type(loaded.state[0].mixer["sum"]) is Sum and loaded.state_bytes() == 3 * session.state_bytes()
    assert held_bytes(loaded.state)[0] >= 6 * model.state_bytes(7)
    loaded.step(torch.tensor([5] * 6))
    session.step(torch.tensor([5] * 2))
    torch.testing.assert_close(loaded.logits, session.logits.repeat_interleave(3, 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "words"), [(Unknown, r"Unknown.init_state\(2\) holds a object, which is no pytree"), (Turned, "the row")]
)
def test_a_state_that_cannot_be_forked_is_refused_at_once(kind, words):
    with pytest.raises(ConfigError, match=words):
        Session(of_another_package(kind), 2)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "true",
        "42",
        "We, the people",
        "It's",
        'a "b" [c]',
        "ends with \\",
        "it\\'s",
        "${seed}",
        "a=b",
        "x: y",
        " ",
    ],
)
def test_a_prompt_is_taken_literally(text, compose_config):
    from longmix import cli
    from longmix.command_line.schema import Schema

    words = cli.command_line(Schema("generate", CONFIGS), ["checkpoint=x", f"prompt={text}"])
    assert compose_config(*words, entry_point="generate").prompt == text


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["prompt=null"], ConfigError, "prompt=null is no text"),
        (["prompt=[a,null]"], ConfigError, r"prompt=\['a', null\] is no text"),
        (["prompt=a", "save=missing/x.state"], StorageError, "there is no folder missing"),
        (
            ["prompt=a", "save=x/"],
            ConfigError,
            "save=x/ is the name of a folder; give that of a file, such as save=x/x.",
        ),
        (["prompt=a", "save=."], ConfigError, "save=. is the name of a folder"),
        (["prompt=a", "save=/dev/null"], StorageError, "not a regular file"),
    ],
)
def test_refused_before_anything_is_read(generated, monkeypatch, words, error, message):
    monkeypatch.setattr("longmix.generation.run.restored_for", lambda config: pytest.fail("the model was loaded"))
    with pytest.raises(error, match=message):
        generated(*words)


@pytest.mark.slow
def test_the_command_line(run_process, run_folder):
    done = run_process("generate.py", f"checkpoint={run_folder}", "prompt=We, the people", "max_tokens=5")
    assert done.code == 0 and done.out and "tokens/s" in done.err and "MiB" in done.err
    helped = run_process("generate.py", "-h")
    assert helped.code == 0 and "temperature" in helped.out


@pytest.mark.slow
def test_the_command_line_answers_a_file(run_process, run_folder, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "We", "id": 7, "logprobs": 2}\n{"prompt": "Of", "logit_bias": {"e": 1e6}}\n'
    )
    words = (
        "input=in.jsonl",
        "output=out.jsonl",
        "max_tokens=5",
        "temperature=0",
        "logit_bias={256:-100,' ':-50,\",\":-50}",
    )
    done = run_process("generate.py", f"checkpoint={run_folder}", *words)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert done.code == 0 and done.out == "" and "2 prompts answered with 10 tokens" in done.err
    assert [line["index"] for line in lines] == [0, 1] and lines[0]["id"] == 7 and len(lines[0]["logprobs"]) == 5
    assert lines[1]["text"] == "eeeee" and not {" ", ","} & set(lines[0]["text"])
    again = run_process("generate.py", f"checkpoint={run_folder}", *words)
    assert again.code == 0 and "2 prompts had been answered before" in again.err
    refused = run_process("generate.py", f"checkpoint={run_folder}", *words, "seed=2")
    assert refused.code == 2 and "of other words or weights" in refused.err and refused.err.count("\n") == 1
