"""Hugging Face folders: every mixer there and back bit for bit, Llama's family against transformers' own models."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_folders import NO_NORM, SMALL, foreign, loaded, logits_of, same_weights, tokens
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.config import StoredConfig, resolved
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import PROBE, ByteTokenizer, LibraryTokenizer, NumberTokenizer
from longmix.errors import CheckpointError, ConfigError
from longmix.evaluation.run import evaluate
from longmix.generation.session import Session
from longmix.mixers.parts.base import Mixer
from longmix.model.backbone import LanguageModel
from longmix.model.build import model_from_checkpoint
from longmix.model.tuned_states_file import tune_states
from longmix.training.run import train

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

from longmix.interop.huggingface import folder as folders  # noqa: E402
from longmix.interop.huggingface.export import export  # noqa: E402
from longmix.interop.huggingface.load import import_folder  # noqa: E402
from longmix.interop.huggingface.model import CACHE_FIELD, CACHE_NAMES, LongmixConfig  # noqa: E402
from longmix.interop.huggingface.tokenizer import byte_letters, huggingface_tokenizer  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs"


MIXERS = sorted(path.stem for path in (CONFIGS / "mixer").glob("*.yaml"))


EXTRA = {"rwkv7": ("mixer.head_dim=32",), "sparse_flash_drop": ("mixer.score=random",), "routing": ("mixer.window=8",)}


STRETCHED = ("mixer.rotary_factor=4", "mixer.rotary_original_length=16", "mixer.rotary_base=100")
FAMILY = {
    "llama": (NO_NORM, "mixer.rotary_base=500"),
    "llama-tied-grouped": (NO_NORM, "model.tie_head=true", "mixer.num_kv_heads=2", "model.norm_eps=1e-3"),
    "qwen3": ("mixer.num_kv_heads=1", "mixer.num_heads=2"),
    "mistral": ("mixer=sliding_window", "mixer.window=5", NO_NORM),
    "llama-linear": (NO_NORM, "mixer.rotary_scaling=linear", "mixer.rotary_factor=4"),
    "llama-llama3": (NO_NORM, "mixer.rotary_scaling=llama3", *STRETCHED, "mixer.rotary_options={high_freq_factor:5}"),
    "mistral-yarn": ("mixer=sliding_window", "mixer.window=25", NO_NORM, "mixer.rotary_scaling=yarn", *STRETCHED),
    "qwen3-yarn": (
        *("mixer.rotary_scaling=yarn", *STRETCHED),
        "mixer.rotary_options={beta_fast:9,truncate:false,attention_factor:1.4}",
    ),
    "phi3": (NO_NORM, "mixer.rotary_fraction=0.5", "mixer.num_kv_heads=2"),
    "phi3-window": ("mixer=sliding_window", "mixer.window=5", NO_NORM, "mixer.rotary_fraction=0.25"),
    "qwen3-windows": ("mixer=sliding_window+flash", "mixer.sliding_window.window=5"),
}


@torch.no_grad()
def written_on(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The prompts and the most likely tokens after them, by our own session."""
    session = Session(model, len(ids))
    session.prefill(list(ids))
    rows = [ids]
    for _ in range(count):
        rows.append(session.logits.argmax(-1, keepdim=True))
        session.step(rows[-1][:, 0])
    return torch.cat(rows, 1)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_goes_there_and_back_bit_for_bit(saved, tmp_path, mixer):
    run, model = saved(f"mixer={mixer}", *EXTRA.get(mixer, ()))
    assert export(run, tmp_path / "folder", "longmix").model_type == "longmix"
    theirs, ids = loaded(tmp_path / "folder"), tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, logits_of(model, ids))
    generated = theirs.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, written_on(model, ids, 6))
    theirs.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in theirs.state_dict().items())
    import_folder(tmp_path / "folder", tmp_path / "back")
    assert same_weights(tmp_path / "back", model)
    back, before = (load_checkpoint(find_checkpoint(path)) for path in (tmp_path / "back", run))
    assert all(back[key] == before[key] for key in ("step", "config", "tokenizer"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("overrides", FAMILY.values(), ids=FAMILY)
def test_llamas_family_computes_the_same_and_comes_back(saved, tmp_path, overrides, request):
    run, model = saved(*overrides)
    expected = request.node.callspec.id.partition("-")[0]
    assert export(run, tmp_path / "folder").model_type == expected
    theirs, ids = loaded(tmp_path / "folder"), tokens(2, 40)
    assert type(theirs).__module__.startswith("transformers.")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, logits_of(model, ids), rtol=0, atol=1e-5)
        double = theirs.double()(ids).logits  # norms and angles stay float32 there
    torch.testing.assert_close(double, logits_of(model.double(), ids), rtol=0, atol=1e-5)
    model.float()
    import_folder(tmp_path / "folder", tmp_path / "back")
    assert same_weights(tmp_path / "back", model)
    (tmp_path / "folder" / folders.OWN_FILE).unlink()
    import_folder(tmp_path / "folder", tmp_path / "alone")
    state = load_checkpoint(find_checkpoint(tmp_path / "alone"))
    assert same_weights(tmp_path / "alone", model)
    assert torch.equal(logits_of(model_from_checkpoint(state).eval(), ids), logits_of(model, ids))


ROPES = {
    "default": {},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.75},
    "linear": {"factor": 3.0},
    "llama3": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5},
}


KINDS = [("Llama", name) for name in ROPES if name != "partial"]
KINDS += [("Qwen3", "default"), ("Mistral", "yarn"), ("Phi3", "partial")]


@pytest.mark.parametrize(("kind", "rope"), KINDS)
def test_models_of_transformers_are_imported(tmp_path, kind, rope):
    parameters = {"rope_type": rope, "rope_theta": 700.0, **ROPES[rope]}
    specials = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    theirs = foreign(tmp_path / "folder", kind, rope_parameters=parameters, **specials)
    done = import_folder(tmp_path / "folder", tmp_path / "run")
    state, ids = load_checkpoint(done.checkpoint), tokens(2, 30)
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits_of(model_from_checkpoint(state).eval(), ids), expected, rtol=0, atol=1e-5)
    assert not done.has_data
    assert list(tokenizer_from_state(state["tokenizer"]).encode("é<|endoftext|>")) == list("é<|endoftext|>".encode())


def test_shorter_types_are_read_exactly_and_tied_heads_stay_tied(tmp_path):
    theirs = foreign(tmp_path / "folder", tie_word_embeddings=True).bfloat16()
    theirs.save_pretrained(tmp_path / "folder")
    state = load_checkpoint(import_folder(tmp_path / "folder", tmp_path / "run").checkpoint)
    model = model_from_checkpoint(state)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, theirs.get_input_embeddings().weight.float())


@pytest.mark.slow
def test_an_imported_model_is_evaluated_and_trained(tmp_path, composed, compose_config):
    foreign(tmp_path / "folder", "Qwen3", eos_token_id=[7, 9])
    import_folder(tmp_path / "folder", tmp_path / "run")
    (tmp_path / "text").mkdir()
    for name in "abcdefgh":
        (tmp_path / "text" / f"{name}.txt").write_text(f"the letter {name}. " * 40)
    data = ["data=text", f"data.corpus.path={tmp_path / 'text'}", "data.corpus.validation_fraction=0.3"]
    words = [f"checkpoint={tmp_path / 'run'}", *data, f"data.cache_dir={tmp_path / 'cache'}"]
    report = evaluate(compose_config(*words, entry_point="evaluate", output=tmp_path / "evaluation"))
    (before,) = (length["loss"] for length in report["loss"]["lengths"].values())
    loop = ["logger=csv", "trainer=cpu", "seq_len=32", "batch_size=2", "max_steps=8", "data.validation_tokens=128"]
    train(composed([*words, *loop], "train", tmp_path / "tuned"))
    after = json.loads((tmp_path / "tuned" / "summary.json").read_text())["validation"]["loss"]
    assert math.isfinite(before)
    assert after < before - 0.5
    state = load_checkpoint(find_checkpoint(tmp_path / "tuned"))
    assert tokenizer_from_state(state["tokenizer"]).end_ids == (256, 7, 9)
    with pytest.raises(CheckpointError, match=r"holds a model and no run to continue; begin from it with checkpoint="):
        train(composed([f"resume={tmp_path / 'run'}", *data, *loop], "train", tmp_path / "resumed"))


def test_padding_sees_nothing_and_is_not_seen(saved, tmp_path):
    run, model = saved("mixer=mlstm_tfla+flash")
    export(run, tmp_path / "folder", "longmix")
    theirs, ids = loaded(tmp_path / "folder"), tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 11:] = 0
    with torch.no_grad():
        logits = theirs(ids, attention_mask=mask).logits
        assert theirs(ids, logits_to_keep=3, return_dict=False)[0].shape == (2, 3, 257)
    torch.testing.assert_close(logits[:1, 5:], logits_of(model, ids[:1, 5:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1:, :11], logits_of(model, ids[1:, :11]), rtol=0, atol=1e-5)
    mask[1] = 1
    generated = theirs.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(generated[:1, 5:], written_on(model, ids[:1, 5:], 5))
    mask[0, :5] = torch.tensor([1, 0, 1, 0, 0])
    with pytest.raises(ValueError, match="padding in the middle of a row; pad before the text"):
        theirs(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 14\]; it must be \[batch, 13\]"):
        theirs(ids[:, :13], attention_mask=mask)


def test_beams_samples_and_a_kept_cache(saved, tmp_path):
    run, _ = saved("mixer=gated_deltanet+sliding_window", "mixer.sliding_window.window=4", "model.tie_head=true")
    export(run, tmp_path / "folder", "longmix")
    theirs, ids = loaded(tmp_path / "folder"), tokens(2, 9)
    assert theirs.model.head.weight is theirs.model.embedding.weight
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}):
        pair = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            pair.append(theirs.generate(ids, max_new_tokens=6, use_cache=use_cache, **options))
        assert torch.equal(*pair)
    with torch.no_grad():
        first = theirs(ids[:, :5], use_cache=True)
        second = theirs(ids[:, 5:], past_key_values=first[CACHE_FIELD])
        whole = theirs(ids)
    assert whole.get(CACHE_FIELD) is None
    assert second[CACHE_FIELD].get_seq_length() == 9
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        second[CACHE_FIELD].crop(3)


@pytest.mark.parametrize("mixer", ["rwkv7", "flash"])
def test_generate_goes_on_from_the_cache_of_an_earlier_call(saved, tmp_path, mixer):
    run, _ = saved(f"mixer={mixer}", *EXTRA.get(mixer, ()))
    export(run, tmp_path / "folder", "longmix")
    theirs, ids = loaded(tmp_path / "folder"), tokens(2, 9)
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    first = theirs.generate(ids, max_new_tokens=4, **options)
    more = torch.cat([first.sequences, tokens(2, 3)], 1)
    alone = theirs.generate(more, max_new_tokens=5, **options)
    going_on = theirs.generate(more, max_new_tokens=5, **{CACHE_FIELD: first[CACHE_FIELD]}, **options)
    torch.testing.assert_close(going_on.logits, alone.logits, rtol=0, atol=1e-5)


def test_a_cache_has_the_names_of_old_and_new_versions(saved, tmp_path):
    run, _ = saved("mixer=retention")
    export(run, tmp_path / "folder", "longmix")
    theirs, ids = loaded(tmp_path / "folder"), tokens(2, 9)
    with torch.no_grad():
        caches = [theirs(ids[:, :5], use_cache=True)[CACHE_FIELD] for _ in CACHE_NAMES]
        ends = [theirs(ids[:, 5:], **{name: cache}) for name, cache in zip(CACHE_NAMES, caches, strict=True)]
        assert torch.equal(ends[0].logits, ends[1].logits)
        assert ends[0][CACHE_FIELD] is caches[0]
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one thing"):
            theirs(ids, **dict(zip(CACHE_NAMES, caches, strict=True)))


def test_the_loss_is_that_of_the_next_token(saved, tmp_path):
    run, model = saved("mixer=routing", "mixer.window=8")
    export(run, tmp_path / "folder", "longmix")
    theirs, ids = loaded(tmp_path / "folder"), tokens(2, 16)
    labels = ids.clone()
    labels[0, :6] = -100
    expected = F.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(theirs(ids, labels=labels).loss, expected)
    theirs.train()
    result = theirs(ids, labels=labels)
    auxiliary = sum(model.train()(ids).losses.values())
    assert auxiliary > 0
    torch.testing.assert_close(result.loss, expected + auxiliary)
    result.loss.backward()
    assert all(weight.grad is not None for weight in theirs.model.embedding.parameters())


@pytest.mark.slow
def test_types_and_tuned_states(saved, tmp_path):
    def tuned(model):
        tune_states(model, features=4)

    run, model = saved("mixer=mlstm_tfla", change=tuned)
    assert export(run, tmp_path / "half", dtype="bfloat16").dtype == "bfloat16"
    half = loaded(tmp_path / "half")
    types = {name: weight.dtype for name, weight in half.named_parameters()}
    assert all(kind == (torch.float32 if ".tuned." in name else torch.bfloat16) for name, kind in types.items())
    assert half(tokens(1, 8)).logits.isfinite().all()
    export(run, tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "folder")(tokens(1, 8)).logits, logits_of(model, tokens(1, 8)))
    import_folder(tmp_path / "folder", tmp_path / "back")
    assert same_weights(tmp_path / "back", model)
    import_folder(tmp_path / "half", tmp_path / "back-half")
    state = load_checkpoint(find_checkpoint(tmp_path / "back-half"))["model"]
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight if ".tuned." in name else weight.bfloat16().float()), name


class Remembering(Mixer):
    """Whose tuned states follow the contract of `Mixer`, without the base of the recurrent mixers."""

    tunes_states = True

    def tune_states(self, features=0, decorrelation=0.0):
        self.tuned = torch.nn.ParameterDict({"start": torch.zeros(2, 3)})


def test_any_mixer_may_have_tuned_states(compose_config):
    config = StoredConfig.of(resolved(compose_config(*SMALL)))
    for tuned, features in ((False, None), (True, 0)):
        model = LanguageModel(
            lambda shape, index: Remembering(), 20, d_model=16, num_layers=2, num_heads=2, mlp_hidden=8
        )
        if tuned:
            tune_states(model)
        assert LongmixConfig.of(model, config).tuned_features == features


def trained_library() -> LibraryTokenizer:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.normalizer = normalizers.NFC()  # changes texts; longmix takes it out
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["the cat sat on the mat, the cat"] * 3, trainer)
    library.add_special_tokens(["<|endoftext|>", "[X]"])
    return LibraryTokenizer(library.to_str(), "<|endoftext|>", "the test")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), trained_library()], ids=["bytes", "library"])
def test_tokenizers_give_the_same_ids(tmp_path, tokenizer):
    huggingface_tokenizer(tokenizer).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    drawn = random.Random(0)
    ranges = [(32, 127), (0x80, 0xD800), (0x10000, 0x110000)]
    noise = "".join(chr(drawn.randrange(*drawn.choice(ranges))) for _ in range(300))
    for text in ("", "a", " x  y\n\n", "the cat [X]", PROBE, noise):
        ids = [int(token) for token in tokenizer.encode(text)]
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs(text).input_ids == [tokenizer.separator_id, *ids]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    for _ in range(100):  # bytes that are no text
        ids = [drawn.randrange(256) for _ in range(8)]
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert len(theirs) == tokenizer.vocab_size
    padded = theirs(["a", "b c d"], padding=True)
    assert padded.attention_mask[0][0] == 0
    assert padded.attention_mask[0][-1] == 1
    assert set(byte_letters()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_numbers_are_tokens_of_their_own(tmp_path):
    huggingface_tokenizer(NumberTokenizer(20)).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("3 4 19").input_ids == [3, 4, 19]
    assert theirs.decode([3, 4, 19]) == "3 4 19"
    with pytest.raises(Exception, match="Missing"):
        theirs("20")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("mixer=retention",),
            r"mixer=longmix.mixers.retention.Retention is not in Llama's family; use --as longmix",
        ),
        (("mixer=rwkv7", "mixer.head_dim=32"), r"model.block=longmix.model.rwkv_blocks.RWKVBlocks is not in Llama's"),
        (
            ("mixer=sliding_window+flash", "mixer.sliding_window.qk_norm=false", "mixer.flash.qk_norm=false"),
            "mixer.qk_norm=false with windows in some layers alone",
        ),
        (
            ("mixer=sliding_window+flash", "mixer.flash.rotary_base=7"),
            r"mixer.flash.rotary_base=7.0 is not that of the first layer, 10000.0",
        ),
        (("mixer.rotary_base=null",), r"mixer.rotary_base=null cannot be said in Llama's family; use --as longmix"),
        (("mixer.bias=alibi",), r"mixer.bias='alibi' cannot be said in Llama's family; use --as longmix"),
        (("mixer.position=context",), r"mixer.position='context' cannot be said in Llama's family"),
        (("mixer.sink_logits=true",), r"mixer.sink_logits=[Tt]rue cannot be said in Llama's family"),
        (
            ("mixer.rotary_fraction=0.5",),
            r"mixer.rotary_fraction=0.5 with mixer.qk_norm=true or a mixer.rotary",
        ),
        (
            ("mixer=sliding_window+flash", "mixer.flash.rotary_scaling=linear", "mixer.flash.rotary_factor=2"),
            r"mixer.flash.rotary_scaling=linear is not that of the first layer",
        ),
        (("mixer=flash+retention",), r"mixer.retention=longmix.mixers.retention.Retention is not in"),
    ],
)
def test_what_llamas_family_has_not_is_refused_by_name(saved, tmp_path, overrides, message):
    run, _ = saved(*overrides)
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / "folder", "llama")
    assert not (tmp_path / "folder").exists()
    assert export(run, tmp_path / "folder", "auto").model_type == "longmix"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("Llama", {"attention_bias": True}, "attention_bias=True in config.json: longmix has False alone"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("Llama", {"head_dim": 16}, "head_dim=16"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"rope_parameters.rope_type='dynamic' in config.json: longmix has default, linear, yarn, llama3 alone",
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}},
            r"rope_parameters.partial_rotary_factor=0.5 in config.json",
        ),
        ("Llama", {"mlp_bias": True}, "mlp_bias=True in config.json: longmix has False alone"),
        ("Qwen3", {"attention_bias": True}, "attention_bias=True in config.json: longmix has False alone"),
        ("Mistral", {"head_dim": 16}, "head_dim=16 in config.json: longmix has"),
        ("GPT2", {}, "a model of type 'gpt2'; the types that can be read are longmix, llama, mistral, qwen3, phi3"),
    ],
)
def test_what_longmix_has_not_is_refused_by_name(tmp_path, kind, settings, message):
    if kind == "GPT2":
        transformers.GPT2Config().save_pretrained(tmp_path / "folder")
    else:
        foreign(tmp_path / "folder", kind, **settings)
    with pytest.raises(ConfigError, match=message) as caught:
        import_folder(tmp_path / "folder", tmp_path / "run")
    assert re.fullmatch(r"[^\n]*\.", str(caught.value))
    assert not (tmp_path / "run").exists()
