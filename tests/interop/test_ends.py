"""Tokens that end a text: of folders of other libraries in every permutation, there, in generation, and back."""

import json
from pathlib import Path

import pytest
import torch

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import ByteTokenizer, LibraryTokenizer, NumberTokenizer, TokenizerFile
from longmix.errors import CheckpointError, DataError
from longmix.generation.run import generate

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

from longmix.interop.huggingface.export import export  # noqa: E402
from longmix.interop.huggingface.load import import_folder  # noqa: E402
from longmix.interop.huggingface.tokenizer import byte_letters, huggingface_tokenizer  # noqa: E402

BEGIN, END, TURN, OTHER = 256, 257, 258, 259
SPECIALS = {BEGIN: "<|begin|>", END: "<|end|>", TURN: "<|turn|>", OTHER: "<|other|>"}
VOCABULARY = 264


def library_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(byte_letters())}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(SPECIALS.values()))
    return library.to_str()


def speaker(folder: Path, says: int, config: dict, generation: dict | None, names: dict) -> Path:
    """A folder as another library writes it, of a model that always says one token.

    Args:
        folder: to write.
        says: the token.
        config, generation: of `config.json` and `generation_config.json`, of which None is none.
        names: of `tokenizer_config.json`.
    """
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        model.lm_head.weight[says] = 1.0
    model.save_pretrained(folder)
    changed(folder / "config.json", **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config})
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "tokenizer.json").write_text(library_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


def changed(path: Path, **settings) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def imported(folder: Path, run: Path, **options) -> LibraryTokenizer:
    state = load_checkpoint(find_checkpoint(import_folder(folder, run, **options).checkpoint))
    assert state["config"]["tokenizer"].get("end_ids") == state["tokenizer"].get("end_ids")
    tokenizer = tokenizer_from_state(state["tokenizer"])
    assert isinstance(tokenizer, LibraryTokenizer)
    return tokenizer


@pytest.fixture
def write(compose_config):
    """`write(run)`: the ids that generate.py writes after a prompt."""

    def run(checkpoint: Path, *words: str) -> list[int]:
        greedy = ("prompt=ab", "temperature=0", "max_tokens=6")
        done = generate(compose_config(f"checkpoint={checkpoint}", *greedy, *words, entry_point="generate"))
        return done.ids[0][3:]

    return run


def written_by_transformers(folder: Path) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[BEGIN, *b"ab"]])
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[0, 3:].tolist()


NAMES = {"bos_token": "<|begin|>", "eos_token": "<|turn|>"}
LLAMA3 = ({"bos_token_id": BEGIN, "eos_token_id": [END, TURN]}, {"eos_token_id": [END, TURN]}, NAMES)
FOLDERS = {
    "llama-3": (*LLAMA3, BEGIN, (TURN, END)),
    "one-id": ({"bos_token_id": BEGIN, "eos_token_id": END}, None, {**NAMES, "eos_token": "<|end|>"}, BEGIN, (END,)),
    "in-generation-config-alone": ({}, {"eos_token_id": [TURN, END]}, {"bos_token": "<|begin|>"}, BEGIN, (TURN, END)),
    "in-the-tokenizer-alone": ({}, None, NAMES, BEGIN, (TURN,)),
    "everywhere-another": ({"eos_token_id": END}, {"eos_token_id": OTHER}, NAMES, BEGIN, (TURN, END, OTHER)),
    "no-begin": ({"eos_token_id": END}, {"eos_token_id": [END, TURN]}, {"eos_token": "<|turn|>"}, TURN, (TURN, END)),
    "begin-in-the-config-alone": ({"bos_token_id": END}, None, {"eos_token": "<|turn|>"}, END, (TURN,)),
    "begin-is-end": (
        {"bos_token_id": END, "eos_token_id": END},
        {"bos_token_id": END, "eos_token_id": END},
        {"bos_token": "<|end|>", "eos_token": "<|end|>"},
        END,
        (END,),
    ),
    "no-end": ({"bos_token_id": BEGIN}, None, {"bos_token": "<|begin|>"}, BEGIN, (BEGIN,)),
    "an-end-that-is-no-id": ({"eos_token_id": [END, 9999, -1]}, None, NAMES, BEGIN, (TURN, END)),
    "an-end-that-is-text": ({"eos_token_id": [10]}, None, NAMES, BEGIN, (TURN, 10)),
}


@pytest.mark.parametrize(("config", "generation", "names", "separator", "ends"), FOLDERS.values(), ids=FOLDERS)
def test_a_folders_ends_end_texts_here_and_again_there(tmp_path, write, config, generation, names, separator, ends):
    folder = speaker(tmp_path / "folder", ends[-1], config, generation, names)
    tokenizer = imported(folder, tmp_path / "run")
    assert (tokenizer.separator_id, tokenizer.end_ids) == (separator, ends)
    assert write(tmp_path / "run") == [ends[-1]]
    export(tmp_path / "run", tmp_path / "again")
    assert written_by_transformers(tmp_path / "again") == [ends[-1]]
    again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert again.eos_token_id == (list(ends) if len(ends) > 1 else ends[0])
    assert again.bos_token_id == separator
    told = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (told["eos_token_id"], told["bos_token_id"]) == (again.eos_token_id, separator)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (theirs.bos_token, theirs.eos_token) == (SPECIALS[separator], SPECIALS[ends[0]])
    assert theirs.pad_token_id == again.pad_token_id == ends[0]
    text = "\n <|turn|> é\x02"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text).tolist()
    back = imported(tmp_path / "again", tmp_path / "back")
    (tmp_path / "again" / "longmix.json").unlink()
    alone = imported(tmp_path / "again", tmp_path / "alone")
    assert {(one.separator_id, one.end_ids) for one in (back, alone)} == {(separator, ends)}


@pytest.mark.parametrize("says", [END, TURN, BEGIN])
def test_a_model_that_always_ends_writes_one_token(tmp_path, write, says):
    run = tmp_path / "run"
    imported(speaker(tmp_path / "folder", says, *LLAMA3), run)
    assert write(run) == [says]  # another document begins where the separator is
    assert written_by_transformers(tmp_path / "folder") == [says] * (6 if says == BEGIN else 1)
    export(run, tmp_path / "own", "longmix")
    assert written_by_transformers(tmp_path / "own") == [says] * (6 if says == BEGIN else 1)


def test_another_separator_ends_texts_too(tmp_path, write):
    folder = speaker(tmp_path / "folder", OTHER, *LLAMA3)
    tokenizer = imported(folder, tmp_path / "run", separator="<|other|>")
    assert (tokenizer.separator_id, tokenizer.end_ids) == (OTHER, (TURN, END))
    assert write(tmp_path / "run") == [OTHER]


@pytest.mark.parametrize("wrong", ["<|end|>", [END, "<|end|>"], True, 1.5, {}])
def test_an_end_that_is_no_number_is_refused_by_name(tmp_path, wrong):
    folder = speaker(tmp_path / "folder", END, {}, {"eos_token_id": wrong}, NAMES)
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: eos_token_id is .*; it must be an id or a list"
    ):
        import_folder(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damaged_files_and_no_named_token_are_refused(tmp_path):
    folder = speaker(tmp_path / "folder", END, {}, None, {})
    with pytest.raises(DataError, match="names no token that begins or ends a text; give one by --separator"):
        import_folder(folder, tmp_path / "run")
    assert imported(folder, tmp_path / "named", separator="<|begin|>").end_ids == (BEGIN,)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config.json cannot be read"):
        import_folder(folder, tmp_path / "run", separator="<|begin|>")


def test_a_tokenizer_that_transformers_cannot_make_is_taken_with_a_separator(tmp_path):
    folder = speaker(tmp_path / "folder", END, {"eos_token_id": END}, None, NAMES)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"the tokenizer in .* cannot be read"):
        import_folder(folder, tmp_path / "run")
    assert imported(folder, tmp_path / "run", separator="<|begin|>").end_ids == (END,)


def test_models_trained_here_begin_end_and_pad_with_the_separator(tmp_path):
    (tmp_path / "tokenizer.json").write_text(library_json())
    for tokenizer in (ByteTokenizer(), TokenizerFile(str(tmp_path / "tokenizer.json"), "<|other|>")):
        theirs = huggingface_tokenizer(tokenizer)
        assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == tokenizer.separator_id
    assert NumberTokenizer(5).end_ids == ()
