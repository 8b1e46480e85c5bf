"""Projections that all layers make of a few matrices: the equations, what training does with them, and conversions."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import longmix
from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.config import ModelConfig, TrainConfig, plain, read, resolved
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.rwkv7 import RWKV7
from longmix.mixers.simple_gla import SimpleGLA
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.model.matching import match_parameters
from longmix.model.sharing import Dictionary, SharedLinear, Sharing
from longmix.model.sharing_conversion import nearest_shared
from longmix.recipe import recipe_of
from longmix.restore import restore
from longmix.share import main as command
from longmix.training.identity import changes
from longmix.training.optimizers import muon

FIXTURE = np.load(Path(__file__).parents[1] / "fixtures/model_side/masa.npz")
SIZES = {"d_model": 32, "num_layers": 4, "num_heads": 2, "mlp_hidden": 48}
TOKENS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))
QKV = ["query", "key", "value"]
WORDS = ["mixer=flash", "model.num_layers=3", "model.share.names=[query,value]", "model.share.atoms=2"]


def read_array(name: str) -> torch.Tensor:
    return torch.from_numpy(FIXTURE[name])


def close(found: torch.Tensor, name: str) -> None:
    expected = read_array(name)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max(), name


def model(kind=Flash, **options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(lambda shape, index: kind(shape, index), 50, **{**SIZES, **options})


def gradients(net: LanguageModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.zero_grad()
    losses = net(TOKENS, TOKENS).token_losses
    losses.mean().backward()
    return losses.detach(), {name: weight.grad.clone() for name, weight in net.named_parameters()}


def test_layers_give_the_published_outputs_and_gradients():
    atoms = [nn.Parameter(atom.clone()) for atom in read_array("atoms")]
    dictionary = Dictionary(atoms, 6, "plain").double()
    layers = [SharedLinear(nn.Linear(7, 5, bias=False), dictionary, place).double() for place in range(6)]
    x = read_array("x").requires_grad_()
    for layer, row in zip(layers, read_array("coefficients"), strict=True):
        layer.coefficients.data.copy_(row)
    y = torch.stack([layer(part) for layer, part in zip(layers, x, strict=True)])
    y.backward(read_array("grad_y"))
    close(torch.stack([layer.weight for layer in layers]), "weights")
    close(y.detach(), "y")
    close(x.grad, "grad_x")
    close(torch.stack([atom.grad for atom in dictionary.atoms]), "grad_atoms")
    close(torch.stack([layer.coefficients.grad for layer in layers]), "grad_coefficients")


def test_the_nearest_atoms_are_the_published_ones():
    given = read_array("given")
    coefficients, atoms, left_out = nearest_shared(list(given), 2)
    nearest = torch.einsum("ls,soi->loi", coefficients, torch.stack(atoms))
    expected = torch.einsum("ls,soi->loi", read_array("pca_coefficients"), read_array("pca_atoms"))
    assert torch.allclose(nearest, expected, rtol=1e-11, atol=1e-11)
    assert left_out * float(given.square().sum()) == pytest.approx(float(FIXTURE["pca_error"]), rel=1e-12)
    assert float(coefficients.square().mean()) == pytest.approx(1 / 2 * 2)


@pytest.mark.parametrize("kind", ["plain", "mlp"])
@pytest.mark.parametrize("mixed", [False, True], ids=["exact", "bf16-mixed"])
def test_the_weight_that_is_formed_again_has_the_gradients_of_one_that_is_kept(kind, mixed, monkeypatch):
    net = model(share=Sharing([*QKV, "output"], 2, kind))
    if not mixed:
        net.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
        losses, found = gradients(net)
        monkeypatch.setattr(SharedLinear, "forward", lambda self, x: nn.functional.linear(x, self.weight, self.bias))
        expected_losses, expected = gradients(net)
    assert torch.equal(losses, expected_losses)
    bound = 1e-2 if mixed else 1e-12
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= bound * gradient.norm(), name


def test_no_layer_keeps_a_weight_and_the_model_holds_each_atom_once():
    net = model(share=Sharing(QKV, 2))
    atoms = {id(atom) for dictionary in net.shared.values() for atom in dictionary.atoms}
    assert len(atoms) == 6
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        net(TOKENS, TOKENS)
    squares = {id(x) for x in kept if x.shape == (32, 32)}
    own = {id(block.mixer.output.weight) for block in net.blocks}
    assert not [x for x in kept if x.shape == (32, 32) and id(x) not in atoms | own and x._base is None]
    assert squares & atoms
    names = [name for name in net.state_dict() if "atoms" in name]
    assert names == [f"shared.{name}.atoms.{number}" for name in QKV for number in range(2)]
    dense = model()
    saved = 3 * (4 - 2) * 32 * 32 - 3 * 4 * 2
    assert net.parameter_counts()["total"] == dense.parameter_counts()["total"] - saved
    assert net.flops(40) == dense.flops(40)
    assert net.state_bytes(40) == dense.state_bytes(40)


def test_muon_takes_each_atom_alone_and_coefficients_take_no_decay():
    net = model(share=Sharing(QKV, 2, "mlp"))
    plain_net = model(share=Sharing(QKV, 2))
    for each in (net, plain_net):
        matrices, others = muon(dict(each.named_parameters()), learning_rate=0.1, weight_decay=0.1)
        taken = [weight for group in matrices.param_groups for weight in group["params"]]
        names = {id(weight): name for name, weight in each.named_parameters()}
        assert {names[id(weight)] for weight in taken if "shared" in names[id(weight)]} == {
            f"shared.{name}.atoms.{number}" for name in QKV for number in range(2)
        }
        assert all(weight.ndim == 2 for weight in taken)
        decayed = [names[id(w)] for group in others.param_groups if group["weight_decay"] for w in group["params"]]
        assert decayed == []
    assert recipe_of(plain_net.blocks[0].mixer.query.coefficients).role == "scalar"


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_recomputing_changes_no_bit(checkpointing):
    share = Sharing(QKV, 2, "mlp")
    losses, expected = gradients(model(share=share))
    again, found = gradients(model(share=share, activation_checkpointing=checkpointing))
    assert torch.equal(losses, again)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (partial(RWKV7, head_dim=16), ["query", "output"]),
        (SimpleGLA, ["key", "output_gate"]),
        (partial(SlidingWindow, window=8), ["value"]),
    ],
    ids=["rwkv7", "simple_gla", "sliding_window"],
)
def test_any_names_of_any_mixer_share_and_begin_with_the_size_that_the_mixer_gave(kind, names):
    net, dense = model(kind, share=Sharing(names, 2)), model(kind)
    for name in names:
        layers = [block.mixer.get_submodule(name) for block in net.blocks]
        first = [block.mixer.get_submodule(name).weight for block in dense.blocks[:2]]
        assert all(torch.equal(atom, own) for atom, own in zip(layers[0].dictionary.atoms, first, strict=True))
        norms = torch.stack([layer.coefficients.norm() for layer in layers])
        assert torch.allclose(norms, torch.ones(4))
    _, found = gradients(net)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    twin = copy.deepcopy(net)
    assert twin.blocks[0].mixer.get_submodule(names[0]).dictionary is twin.shared[names[0]]
    assert net.init_state(2)[0].mixer is not None


def test_a_pattern_shares_among_the_layers_that_have_a_name():
    torch.manual_seed(0)
    kinds = [Flash, SimpleGLA]
    net = LanguageModel(
        lambda shape, index: kinds[index % 2](shape, index), 50, share=Sharing(["output_gate"], 1), **SIZES
    )
    assert [isinstance(block.mixer.get_submodule("output"), SharedLinear) for block in net.blocks] == [False] * 4
    assert sum(isinstance(part, SharedLinear) for part in net.modules()) == 2
    with pytest.raises(ConfigError, match="'key', whose weights have different shapes"):
        LanguageModel(lambda shape, index: kinds[index % 2](shape, index), 50, share=Sharing(["key"], 1), **SIZES)


WRONG = {
    "no-such-name": (Sharing(["q"], 2), "'q', and the linear layers of the mixer are query, key, value, output"),
    "no-atoms": (Sharing(QKV), "atoms=null must be from 1 to 4"),
    "too-many": (Sharing(QKV, 5), "atoms=5 must be from 1 to 4"),
    "no-names": (Sharing(None, 2), "needs model.share.names"),
}


@pytest.mark.parametrize(("sharing", "message"), WRONG.values(), ids=WRONG)
def test_words_that_make_no_sense_are_refused(sharing, message):
    with pytest.raises(ConfigError, match=message):
        model(share=sharing)


def test_an_equal_number_of_parameters_and_runs_of_earlier_versions(compose_config):
    config = read(TrainConfig, compose_config(*WORDS, "match.parameters=1000000", "match.multiple=1"))
    matched = match_parameters(config, 256)
    words = ("match.parameters=1000000", "mixer=flash", WORDS[1])
    dense = match_parameters(read(TrainConfig, compose_config(*words)), 256)
    assert matched.model.number("mlp_hidden") > dense.model.number("mlp_hidden")
    usual = read(TrainConfig, compose_config("mixer=flash"))
    saved = plain(usual)
    del saved["model"]["share"], saved["model"]["saved_activations"]
    assert changes(saved, usual) == {}
    saved = plain(config)
    del saved["model"]["share"]
    assert set(changes(saved, config)) == {"model.share.names", "model.share.atoms"}


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_another_begins_from_it(tiny_overrides, tmp_path):
    words = [word for word in tiny_overrides if not word.startswith(("max_steps", "model.num_layers"))]
    words += [*WORDS, "max_steps=3", "loop.checkpoint_every=1", "loop.keep_checkpoints=9", "seq_len=64"]
    words += ["model.saved_activations=int8", "data.validation_tokens=128"]
    longmix.train(words, folder=tmp_path / "whole")
    store = CheckpointStore(tmp_path / "whole/checkpoints")
    longmix.train([*words, f"resume={store.all()[0]}"], folder=tmp_path / "resumed")
    whole, resumed = (
        load_checkpoint(CheckpointStore(tmp_path / name / "checkpoints").latest()) for name in ("whole", "resumed")
    )
    assert whole["step"] == resumed["step"] == 3
    assert all(torch.equal(weight, resumed["model"][name]) for name, weight in whole["model"].items())
    began = [f"checkpoint={store.latest()}", "max_steps=1", "model.saved_activations=exact"]
    kept = [word for word in words if not word.startswith(("mixer", "model", "max_steps"))]
    longmix.train([*kept, *began], folder=tmp_path / "begun")
    assert restore(tmp_path / "begun").model.shared is not None


def saved_run(compose_config, folder: Path, *words: str) -> LanguageModel:
    config = resolved(compose_config("mixer=flash", "model.num_layers=3", "model.d_model=32", *words))
    torch.manual_seed(0)
    net = build_model(ModelConfig.of(config), ByteTokenizer().vocab_size).eval()
    state = {"step": 7, "model": net.state_dict(), "config": config, "tokenizer": ByteTokenizer().state()}
    CheckpointStore(folder / "checkpoints").save(state, {})
    return net


def test_commands_make_a_trained_model_share_and_undo_it(compose_config, tmp_path, capsys):
    net = saved_run(compose_config, tmp_path / "run")
    expected = net.logits(net(TOKENS).hidden)
    share = [str(tmp_path / "run"), "--names", "query", "output"]
    assert command([*share, "--atoms", "3", "--output", str(tmp_path / "all")]) == 0
    assert "query: 0.00% of the squares of its weights are left out" in capsys.readouterr().out
    assert command([*share, "--atoms", "1", "--output", str(tmp_path / "one")]) == 0
    assert command([str(tmp_path / "all"), "--undo", "--output", str(tmp_path / "back")]) == 0
    for name, is_shared in (("all", True), ("back", False)):
        found = restore(tmp_path / name).model
        assert (found.shared is not None) is is_shared
        assert torch.allclose(found.logits(found(TOKENS).hidden), expected, atol=1e-4)
    one = restore(tmp_path / "one").model
    assert one.parameter_counts()["total"] == net.parameter_counts()["total"] - 2 * 2 * 32 * 32 + 2 * 3
    capsys.readouterr()
    assert command([str(tmp_path / "back"), "--undo", "--output", str(tmp_path / "twice")]) == 2
    assert "shares no matrices" in capsys.readouterr().err
    assert command([*share, "--atoms", "9", "--output", str(tmp_path / "nine")]) == 2
    assert "model.share.atoms=9 must be from 1 to 3" in capsys.readouterr().err
    assert command([str(tmp_path / "run"), "--atoms", "2"]) == command([*share, "--undo"]) == 2
    assert "give --names and --atoms, or --undo alone" in capsys.readouterr().err


@pytest.mark.slow
def test_exports_to_other_types_have_the_weights_that_layers_form(compose_config, tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    from longmix.interop.huggingface.export import export

    net = saved_run(compose_config, tmp_path / "run", *WORDS[2:], "model.share.coefficients=mlp")
    expected = net.logits(net(TOKENS).hidden)
    export(tmp_path / "run", tmp_path / "llama", kind="llama")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    assert torch.allclose(theirs(TOKENS).logits, expected, atol=1e-4)
    done = export(tmp_path / "run", tmp_path / "ours", kind="longmix")
    assert done.parameters == net.parameter_counts()["total"]
