"""RWKV-7, Gated DeltaNet and xLSTM of others: the same logits and tokens as their own packages, and back bit for bit.

`fixtures/pretrained` holds small models, and what flash-linear-attention and the rwkv package computed with them.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hf_folders import loaded, logits_of, same_weights

import longmix
from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import LongmixError
from longmix.generation.session import Session
from longmix.model.build import model_from_checkpoint

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

from safetensors.torch import load_file, save_file  # noqa: E402

from longmix.interop.huggingface import families  # noqa: E402
from longmix.interop.huggingface.export import export  # noqa: E402
from longmix.interop.huggingface.load import import_folder  # noqa: E402
from longmix.interop.huggingface.tokenizer import huggingface_tokenizer  # noqa: E402

MADE = Path(__file__).parents[1] / "fixtures" / "pretrained"
KINDS = ("rwkv7", "gated_deltanet", "rwkv")
FOLDERS = ("rwkv7", "gated_deltanet")
CLOSE = 1e-5
CLOSE_TO_XLSTM = 1e-4  # theirs lies 5e-5 from ours in float64, and ours in float32 1e-5


def read(kind: str, path: Path | None = None) -> SimpleNamespace:
    """A reference: config, weights by name, ids, logits, greedy."""
    if kind == "xlstm":
        config = {"model_type": "xlstm", "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 272}
        model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**config))
        return SimpleNamespace(config=config, weights=model.state_dict())
    content = np.load(path or MADE / f"{kind}.npz")
    weights = {name.removeprefix("weight/"): torch.tensor(content[name]) for name in content if "/" in name}
    config = json.loads(str(content["config"])) if "config" in content else None
    return SimpleNamespace(
        config=config, weights=weights, **{key: torch.tensor(content[key]) for key in ("ids", "logits", "greedy")}
    )


def put(folder: Path, kind: str, made: SimpleNamespace, shards: int = 1) -> Path:
    """A reference as its package would save it; the path to import."""
    folder.mkdir(parents=True)
    huggingface_tokenizer(ByteTokenizer()).save_pretrained(folder)
    if kind == "rwkv":
        torch.save(made.weights, folder / "model.pth")
        return folder / "model.pth"
    (folder / "config.json").write_text(json.dumps(made.config))
    names = sorted(made.weights)
    files = {f"model-{shard + 1:05}-of-{shards:05}.safetensors": names[shard::shards] for shard in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {name: file for file, own in files.items() for name in own}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for file, own in files.items():
        save_file({name: made.weights[name] for name in own}, folder / file, {"format": "pt"})
    return folder


def model_of(run: Path):
    return model_from_checkpoint(load_checkpoint(find_checkpoint(run))).eval()


@torch.no_grad()
def greedy(model, ids: torch.Tensor, count: int) -> list[int]:
    """The most likely tokens after ids [T], one by one with the model's state."""
    session, found = Session(model, 1), []
    session.prefill([ids])
    for _ in range(count):
        token = session.logits.argmax(-1)
        found.append(int(token))
        session.step(token)
    return found


def check_same(model, made: SimpleNamespace, close: float) -> None:
    ours = logits_of(model, made.ids[None])[0]
    assert made.logits.std() > 0.3
    torch.testing.assert_close(ours, made.logits, rtol=0, atol=close)
    assert greedy(model, made.ids, len(made.greedy)) == made.greedy.tolist()


def their_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    return {name: weight for file in path.glob("*.safetensors") for name, weight in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_what_its_package_does_and_goes_back_bit_for_bit(tmp_path, kind):
    made = read(kind)
    source = put(tmp_path / "source", kind, made)
    done = import_folder(source, tmp_path / "run")
    assert done.model_type == ("rwkv7" if kind == "rwkv" else kind)
    assert done.tokenizer.encode("é").tolist() == list("é".encode())
    model = model_of(tmp_path / "run")
    check_same(model, made, CLOSE)

    target = tmp_path / ("back.pth" if kind == "rwkv" else "back")
    written = export(tmp_path / "run", target, "rwkv7" if kind == "rwkv" else kind)
    assert written.parameters == model.parameter_counts()["total"]
    weights = their_weights(target)
    assert weights.keys() == made.weights.keys()
    unread = {f"blocks.0.att.v{number}" for number in range(3)}
    for name, weight in made.weights.items():
        assert weights[name].shape == weight.shape or (name in unread and weights[name].ndim == weight.ndim), name
        assert name in unread or torch.equal(weights[name], weight), name
    if kind != "rwkv":
        again = json.loads((target / "config.json").read_text())
        free = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "max_position_embeddings"}
        assert all(again[key] == made.config[key] for key in made.config.keys() & again.keys() - free)
    options = {"tokenizer": source.parent} if kind == "rwkv" else {}
    import_folder(target, tmp_path / "again", **options)
    assert same_weights(tmp_path / "again", model)
    if kind != "rwkv":
        (target / "longmix.json").unlink()
        import_folder(target, tmp_path / "alone")
        assert same_weights(tmp_path / "alone", model)


@pytest.mark.parametrize("kind", FOLDERS)
def test_shards_and_short_types(tmp_path, monkeypatch, kind):
    made = read(kind)
    import_folder(put(tmp_path / "source", kind, made, shards=3), tmp_path / "run")
    model = model_of(tmp_path / "run")
    monkeypatch.setattr(families, "SHARD", "30KB")
    export(tmp_path / "run", tmp_path / "back", kind, "bfloat16")
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors*"))
    assert len(files) > 2
    assert "model.safetensors.index.json" in files
    weights = their_weights(tmp_path / "back")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    import_folder(tmp_path / "back", tmp_path / "again")
    assert same_weights(tmp_path / "again", model)  # bf16 holds these weights exactly
    if kind == "rwkv7":  # early versions had the six shifts in one weight
        for layer in range(3):
            names = [f"model.layers.{layer}.attn.x_{letter}" for letter in "rwkvag"]
            made.weights[f"model.layers.{layer}.attn.x_x"] = torch.cat([made.weights.pop(name)[0] for name in names])
        import_folder(put(tmp_path / "early", kind, made), tmp_path / "of early")
        assert same_weights(tmp_path / "of early", model)


def xlstm(folder: Path, **settings):
    """A small xLSTM of transformers, saved with a tokenizer."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(5)
    sizes = {"vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "qk_dim_factor": 1.0}
    exact = {"autocast_kernel_dtype": "float32", "ffn_proj_factor": 1.3, "ffn_round_up_to_multiple_of": 8}
    caps = {"gate_soft_cap": 3.0, "output_logit_soft_cap": 2.5}
    with torch.device("meta"):  # its own initial values fail where weights are fused
        model = xLSTMForCausalLM(xLSTMConfig(**{**sizes, **exact, **caps, **settings}))
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            about = 1.0 if "norm" in name else 0.0
            weight.copy_(about + 0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    huggingface_tokenizer(ByteTokenizer()).save_pretrained(folder)
    return model


@pytest.mark.parametrize("mode", ["single", "fused"])
def test_xlstm_computes_what_transformers_does_and_goes_back_bit_for_bit(tmp_path, mode):
    theirs = xlstm(tmp_path / "source", weight_mode=mode)
    assert import_folder(tmp_path / "source", tmp_path / "run").model_type == "xlstm"
    model, ids = model_of(tmp_path / "run"), torch.randint(272, (2, 70))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=CLOSE_TO_XLSTM)
    generated = theirs.generate(ids[:1, :20], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert greedy(model, ids[0, :20], 6) == generated[0, 20:].tolist()
    assert export(tmp_path / "run", tmp_path / "back").model_type == "xlstm"
    with torch.no_grad():
        again = loaded(tmp_path / "back", autocast_kernel_dtype="float32")
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=CLOSE_TO_XLSTM)
    if mode == "single":
        before, after = their_weights(tmp_path / "source"), their_weights(tmp_path / "back")
        assert before.keys() == after.keys()
        assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    import_folder(tmp_path / "back", tmp_path / "sealed")
    (tmp_path / "back" / "longmix.json").unlink()
    import_folder(tmp_path / "back", tmp_path / "alone")
    assert same_weights(tmp_path / "sealed", model)
    assert same_weights(tmp_path / "alone", model)


def test_more_heads_of_values_and_negative_eigenvalues_come_in_and_go_out(tmp_path):
    made = read("gated_deltanet")
    made.config.update(num_v_heads=4, expand_v=1.0, allow_neg_eigval=True)  # the same width of values
    per_head = ("b_proj.weight", "a_proj.weight", "A_log", "dt_bias")
    for name, weight in made.weights.items():
        if name.endswith(per_head):
            made.weights[name] = torch.cat([weight, weight.flip(0)])
        elif name.endswith("o_norm.weight"):
            made.weights[name] = weight[:12].clone()
    import_folder(put(tmp_path / "source", "gated_deltanet", made), tmp_path / "run")
    model = model_of(tmp_path / "run")
    layer = model.mixers()[0]
    assert (layer.num_heads, layer.num_value_heads, layer.value_dim, layer.negative_eigenvalues) == (2, 4, 12, True)
    assert logits_of(model, made.ids[None]).std() > 0.1
    export(tmp_path / "run", tmp_path / "back", "gated_deltanet")
    weights = their_weights(tmp_path / "back")
    assert all(torch.equal(weights[name], weight) for name, weight in made.weights.items())
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (again["num_v_heads"], again["expand_v"], again["allow_neg_eigval"]) == (4, 1.0, True)
    (tmp_path / "back" / "longmix.json").unlink()
    import_folder(tmp_path / "back", tmp_path / "alone")
    assert same_weights(tmp_path / "alone", model)


def said(**settings):
    return lambda made: made.config.update(settings)


def without(name):
    return lambda made: made.weights.pop(name)


def having(name, *shape):
    return lambda made: made.weights.update({name: torch.ones(shape)})


SHIFT, HEAD_NORM, THIN = "model.layers.1.attn.x_k", "model.layers.0.attn.o_norm.weight", "blocks.1.att.w1"
CONVOLUTION = "model.layers.1.attn.k_conv1d.weight"
REFUSED = [
    ("xlstm", said(use_bias=True), "use_bias=True in config.json: longmix has False alone"),
    ("xlstm", said(v_dim_factor=0.5), "v_dim_factor=0.5 in config.json: longmix has 1 alone"),
    ("xlstm", said(num_blocks=3), "num_hidden_layers=2 and num_blocks=3 in config.json must be equal"),
    ("xlstm", said(weight_mode="other"), "weight_mode='other' in config.json must be single or fused"),
    ("xlstm", said(output_logit_soft_cap=0), "output_logit_soft_cap=0 in config.json must be a number above 0"),
    ("xlstm", without("backbone.out_norm.weight"), "norm.weight is missing"),
    ("rwkv7", said(norm_first=False), "norm_first=False in config.json: longmix has True alone"),
    ("rwkv7", said(hidden_act="relu"), "hidden_act='relu' in config.json: longmix has 'sqrelu' alone"),
    ("rwkv7", said(attn={"layers": [1]}), "attn="),
    ("rwkv7", said(value_dim=[64, 32, 32]), "value_dim="),
    ("rwkv7", said(head_dim="16"), "head_dim='16' in config.json must be a whole number of at least 1"),
    ("rwkv7", said(num_hidden_layers=2, value_dim=None), r"blocks\.2\..* is not a part of the model"),
    ("rwkv7", without(SHIFT), f"{SHIFT} is missing"),
    ("rwkv7", without("model.layers.0.pre_norm.bias"), "embedding_norm.bias is missing"),
    ("rwkv7", having("model.layers.0.attn.q_proj.weight", 2, 2), "attn.q_proj.weight is not a part of the model"),
    ("rwkv7", having("model.layers.0.attn.r_k", 2, 8), r"mixer.bonus has shape \[16\] instead of \[32\]"),
    ("gated_deltanet", said(allow_neg_eigval=1), "allow_neg_eigval=1 in config.json must be true or false"),
    ("gated_deltanet", said(num_v_heads=3), "num_v_heads=3 in config.json must be a multiple of num_heads=2"),
    ("gated_deltanet", said(use_short_conv=False), "use_short_conv=False in config.json"),
    ("gated_deltanet", said(attnres_block_size=2), "attnres_block_size=2 in config.json"),
    ("gated_deltanet", said(expand_v=1.3), r"expand_v=1.3 in config.json: head_dim=12 times it is not a whole"),
    ("gated_deltanet", said(vocab_size=200), "has 257 ids, and the model 200|shape"),
    ("gated_deltanet", without(CONVOLUTION), f"{CONVOLUTION} is missing"),
    ("gated_deltanet", having(CONVOLUTION, 24, 1, 3), "weights do not fit together: .*k_conv1d.weight .24, 1, 3."),
    ("gated_deltanet", having(HEAD_NORM, 48), r"head_norm.weight has shape \[48\] instead of \[24\]"),
    ("rwkv", without("emb.weight"), "holds no RWKV-7 in its authors' layout: emb.weight is missing"),
    ("rwkv", without("blocks.0.att.r_k"), "holds no RWKV-7 in its authors' layout: blocks.0.att.r_k is missing"),
    ("rwkv", without("blocks.2.att.x_v"), "blocks.2.att.x_v is missing"),
    ("rwkv", without("blocks.0.ln0.weight"), "embedding_norm.weight is missing"),
    ("rwkv", having("blocks.0.ffn.s_emb.weight", 3, 3), "s_emb.weight is not a part of the model"),
    ("rwkv", having(THIN, 32, 5), r"decay.down.weight has shape \[5, 32\] instead of \[8, 32\]"),
]


def test_what_longmix_has_not_is_refused_by_name(tmp_path):
    for number, (kind, change, message) in enumerate(REFUSED):
        made = read(kind)
        change(made)
        source = put(tmp_path / str(number), kind, made)
        with pytest.raises(LongmixError, match=message):
            import_folder(source, tmp_path / "run")
        assert not (tmp_path / "run").exists(), message


def test_damaged_and_foreign_files_are_one_error(tmp_path):
    made = read("rwkv")
    source = put(tmp_path / "source", "rwkv", made)
    source.write_bytes(source.read_bytes()[:-3000])
    for content, message in (
        (None, "holds no weights of RWKV-7"),
        ([1], "it holds a list"),
        ({"a": print}, "holds no w"),
    ):
        if content is not None:
            torch.save(content, source)
        with pytest.raises(LongmixError, match=message):
            import_folder(source, tmp_path / "run")
    torch.save(made.weights, source)
    (source.parent / "tokenizer.json").unlink()
    with pytest.raises(LongmixError, match=r"has no tokenizer.json, .* give one by --tokenizer"):
        import_folder(source, tmp_path / "run")
    with pytest.raises(LongmixError, match=r"there is no|No such file|holds no weights"):
        import_folder(tmp_path / "none.pth", tmp_path / "run")


UNSAID = [
    (
        "xlstm",
        "folder",
        ["mixer=mlstm_tfla", "model.logit_softcap=30"],
        "mixer.gate='sig' cannot be said in the format xlstm",
    ),
    ("xlstm", "folder", ["mixer=mlstm_tfla", "mixer.gate=exp"], "model.logit_softcap=null cannot be said"),
    ("rwkv7", "auto.pth", ["mixer=rwkv7", "model.norm_eps=1e-6"], "model.norm_eps=1e-06 cannot be said in this format"),
    (
        "rwkv7",
        "folder",
        ["mixer=rwkv7", "mixer.norm_eps=1e-6"],
        "mixer.norm_eps=1e-06 cannot be said in the format rwkv7",
    ),
    ("rwkv7", "folder", ["mixer=rwkv7", "block=standard"], "block=standard is not in the format rwkv7"),
    ("rwkv7", "folder", ["mixer=mlstm_tfla"], "MLSTMTFLA is not in the format rwkv7; use as=longmix"),
    ("llama", "auto.pth", ["mixer=rwkv7"], "is the name of a file, which RWKV-7 alone has"),
    (
        "gated_deltanet",
        "folder",
        ["mixer=gated_deltanet"],
        "shared_norm=false cannot be said in the format gated_deltanet",
    ),
    (
        "gated_deltanet",
        "folder",
        ["mixer=gated_deltanet", "mixer.shared_norm=true"],
        "mixer.norm_eps=1e-05 cannot be said",
    ),
    ("gated_deltanet", "folder", ["mixer=gated_deltanet+flash"], "mixer.pattern=.* cannot be said in the format gated"),
    (
        "gated_deltanet",
        "folder",
        ["mixer=gated_deltanet", "mixer.shared_norm=true", "mixer.heads_kept=2", "model.norm_eps=1e-5"],
        "mixer.heads_kept=2 cannot be said",
    ),
    (
        "gated_deltanet",
        "folder",
        ["mixer=gated_deltanet", "mixer.shared_norm=true", "mixer.convolution=0"],
        "convolution=0 cannot be said",
    ),
    (
        "gated_deltanet",
        "folder",
        ["mixer=gated_deltanet", "mixer.shared_norm=true", "mixer.decay=channel", "model.norm_eps=1e-5"],
        "mixer.decay='channel' cannot be said|the weight .*decay",
    ),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "target", "words", "message"), UNSAID)
def test_what_a_format_has_not_is_refused_by_name(saved, tmp_path, kind, target, words, message):
    extra = ["mixer.head_dim=32"] if words[0] == "mixer=rwkv7" else []
    run, _ = saved(*words, *extra)
    with pytest.raises(LongmixError, match=message):
        export(run, tmp_path / target, kind)
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gated_deltanet", ["mixer=gated_deltanet", "mixer.shared_norm=true", "model.norm_eps=1e-5"]),
        ("xlstm", ["mixer=mlstm_tfla", "mixer.gate=exp", "mixer.norm=layer", "model.logit_softcap=30"]),
    ],
)
def test_how_a_model_was_trained_needs_no_place_in_a_format(saved, tmp_path, kind, words):
    trained = ["residual_dropout=0.1", "embedding_dropout=0.1", "activation_offload=true", "logit_penalty=1e-4"]
    run, model = saved(*words, *(f"model.{word}" for word in trained), "model.activation_checkpointing=selective")
    export(run, tmp_path / "folder", kind)
    import_folder(tmp_path / "folder", tmp_path / "again")
    assert model_of(tmp_path / "again").logit_softcap == model.logit_softcap


def test_the_command_line_takes_files_and_folders(tmp_path, command):
    source = put(tmp_path / "source", "rwkv", read("rwkv"))
    tokenizer = source.parent / "tokenizer.json"
    moved = tmp_path / "alone.pth"
    source.rename(moved)
    code, lines = command("import", moved, tmp_path / "run", "--tokenizer", tokenizer)
    assert code == 0
    assert lines[0].startswith(f"wrote {tmp_path / 'run'}")
    assert "of type rwkv7" in lines[0]
    code, (line,) = command("import", moved, tmp_path / "other", "--tokenizer", "none")
    assert code == 2 and "tokenizer none: there is no such file; give a tokenizer.json" in line
    code, (line,) = command("export", tmp_path / "run", tmp_path / "back", "--as", "rwkv7")
    assert code == 2
    assert "mixer.norm_eps=0.00064 cannot be said in the format rwkv7" in line  # there it grows with a head of 16
    assert command("export", tmp_path / "run", tmp_path / "back.pth")[0] == 0
    code, (line,) = command("export", tmp_path / "run", tmp_path / "back.pth")
    assert code == 2
    assert line.endswith("is there already; give another name, or --force to replace it.")
    assert command("export", tmp_path / "run", tmp_path / "back.pth", "--force", "--dtype", "bfloat16")[0] == 0
    assert {weight.dtype for weight in their_weights(tmp_path / "back.pth").values()} == {torch.bfloat16}


def test_both_formats_of_rwkv7_hold_the_same(saved, tmp_path, command):
    run, model = saved("mixer=rwkv7", "mixer.decay_rank=5", "block=rwkv7_published")
    export(run, tmp_path / "folder", "rwkv7")
    export(run, tmp_path / "file.pth")
    code, (line,) = command("import", tmp_path / "folder", tmp_path / "again", "--tokenizer", tmp_path / "folder")
    assert code == 2
    assert "leave --tokenizer out" in line
    (tmp_path / "folder" / "longmix.json").unlink()
    import_folder(tmp_path / "folder", tmp_path / "of folder")
    import_folder(tmp_path / "file.pth", tmp_path / "of file", tokenizer=tmp_path / "folder")
    assert same_weights(tmp_path / "of folder", model)
    assert same_weights(tmp_path / "of file", model)
    ids = torch.arange(20)[None]
    assert torch.equal(logits_of(model_of(tmp_path / "of file"), ids), logits_of(model, ids))
    for source, target in (("of file", "folder"), ("of folder", "file.pth")):
        export(tmp_path / source, tmp_path / target, "rwkv7", force=True)
        import_folder(
            tmp_path / target, tmp_path / f"{source} again", tokenizer=tmp_path / "folder" if "pth" in target else None
        )
        assert same_weights(tmp_path / f"{source} again", model)


def test_a_model_of_bytes_returns_from_a_file(saved, tmp_path, command):
    run, model = saved("mixer=rwkv7", "mixer.decay_rank=5", "block=rwkv7_published")
    export(run, tmp_path / "file.pth")
    code, (line,) = command("import", tmp_path / "file.pth", tmp_path / "none")
    assert code == 2 and "or bytes there for a model of bytes" in line
    code, (line,) = command("import", tmp_path / "file.pth", tmp_path / "a", "--tokenizer", "bytes", "--separator", "x")
    assert code == 2 and "bytes has a token for every byte" in line and "leave --separator out" in line
    assert command("import", tmp_path / "file.pth", tmp_path / "again", "--tokenizer", "bytes")[0] == 0
    assert same_weights(tmp_path / "again", model)
    found = load_checkpoint(find_checkpoint(tmp_path / "again"))
    assert found["tokenizer"] == {"kind": "bytes"}
    assert found["config"]["tokenizer"]["_target_"].endswith("ByteTokenizer")
    assert len(longmix.load(tmp_path / "again", device="cpu").generate("To", max_tokens=2)) == 1


def test_rwkvs_vocabulary_comes_along(tmp_path, command):
    source = put(tmp_path / "source", "rwkv", read("rwkv"))
    (source.parent / "tokenizer.json").unlink()
    lines = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)] + ["257 ' the' 4", "258 'é' 2"]
    (source.parent / "rwkv_vocab_v20230424.txt").write_text("\n".join(lines) + "\n")
    code, (line,) = command("import", source, tmp_path / "run", "--separator", "<s>")
    assert code == 2
    assert "leave --separator out" in line
    done = import_folder(source, tmp_path / "run")
    assert (done.tokenizer.separator_id, done.tokenizer.vocab_size) == (0, 272)
    assert done.tokenizer.encode("é the").tolist() == [258, 257]
    export(tmp_path / "run", tmp_path / "folder", "longmix")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["eos_token_id"] == 0
    before = load_checkpoint(done.checkpoint)["tokenizer"]
    import_folder(tmp_path / "folder", tmp_path / "again")
    (tmp_path / "folder" / "longmix.json").unlink()
    import_folder(tmp_path / "folder", tmp_path / "alone")
    export(tmp_path / "run", tmp_path / "back.pth")
    import_folder(tmp_path / "back.pth", tmp_path / "file", tokenizer=source.parent / "rwkv_vocab_v20230424.txt")
    for run in ("again", "alone", "file"):
        assert load_checkpoint(find_checkpoint(tmp_path / run))["tokenizer"] == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_package_itself_computes_the_same(tmp_path, kind):
    package = "rwkv" if kind == "rwkv" else "flash-linear-attention"
    if not any(each.name == package for each in metadata.distributions()):
        pytest.skip(f"{package} is an optional oracle")
    words = [sys.executable, str(MADE / "make.py"), "--seed=11", f"--folder={tmp_path}", kind]
    subprocess.run(words, check=True, timeout=550, capture_output=True, env=dict(os.environ))
    made = read(kind, tmp_path / f"{kind}.npz")
    import_folder(put(tmp_path / "source", kind, made), tmp_path / "run")
    check_same(model_of(tmp_path / "run"), made, CLOSE)
