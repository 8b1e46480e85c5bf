"""The rehearsal on tensors without memory, against what real models keep for their backward pass."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longmix.mixers.parts import rms_norm
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.planning.arguments import Request, read
from longmix.planning.dry_run import Part, Rehearsal, Setting, rehearse, rehearse_ends

MIXERS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "mixer").glob("*.yaml"))
SIZES = {"narrow": (64, 160, 2), "wide": (128, 96, 1)}
"""Width, tokens, windows."""

CASES = [(mixer, "narrow") for mixer in MIXERS]
CASES += [(mixer, "wide") for mixer in ("flash", "kda", "rwkv7")]


CHECKPOINTED = {"tensor": 5}
"""Vectors of each token and layer that a checkpoint inside a mixer holds, which are no saved tensors."""


def request(*words: str, width: int = 64, length: int = 128) -> Request:
    sizes = (f"model.d_model={width}", "model.num_layers=2", f"model.mlp_hidden={2 * width}", f"seq_len={length}")
    return read(["gpu=cpu", *sizes, *words])


def setting(rows: int = 1, length: int = 128, **changes) -> Setting:
    usual = {
        "precision": "32-true",
        "sharded": False,
        "accumulates": False,
        "checkpointing": "none",
        "device": "cpu",
    }
    return Setting(rows, length, **(usual | changes))


def rehearsed(model: LanguageModel, how: Setting) -> Rehearsal:
    return rehearse(model, how, rehearse_ends(model, how))


def saved_bytes(model: LanguageModel, tokens: Tensor, ids: Tensor) -> int:
    """What autograd keeps of a forward pass, storages counted once; neither weights and buffers nor inputs."""
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        output = model(tokens, tokens, document_ids=ids)
    for known in (tokens, ids, *model.parameters(), *model.buffers()):
        storages.pop(known.untyped_storage().data_ptr(), None)
    del output
    return sum(x.untyped_storage().nbytes() for x in storages.values())


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("mixer", "size"), CASES, ids=map("-".join, CASES))
def test_what_is_kept_is_what_autograd_saves(mixer, size):
    width, length, rows = SIZES[size]
    asked = request(f"mixer={mixer}", width=width, length=length)
    found = rehearsed(asked.model(), setting(rows, length))
    predicted = found.ends.kept + sum(part.kept + part.output for part in found.layers)

    model = build_model(asked.config, asked.vocab_size).train()
    tokens = torch.randint(asked.vocab_size, (rows, length))
    packed = (torch.arange(length) >= length // 3).int().expand(rows, -1)  # rows of one document keep less on a CPU
    measured = saved_bytes(model, tokens, packed) + CHECKPOINTED.get(mixer, 0) * 2 * rows * length * width * 4
    assert predicted == pytest.approx(measured, rel=0.05)
    assert found.layers[1].parameters == sum(weight.numel() for weight in model.blocks[1].parameters())


def test_the_model_stays_as_it_is():
    model = request("mixer=rwkv7").model()
    weights = dict(model.named_parameters())
    rehearsed(model, setting())
    assert dict(model.named_parameters()) == weights
    assert {weight.device.type for weight in weights.values()} == {"meta"}
    assert len(model.blocks) == 2


def test_a_checkpointed_block_keeps_its_input_alone():
    model = request("mixer=mlstm_tfla").model()
    kept, again = rehearsed(model, setting()), rehearsed(model, setting(checkpointing="block"))
    assert again.ends == kept.ends
    for before, after in zip(kept.layers, again.layers, strict=True):
        assert after.kept == 0
        assert before.kept <= after.backward < before.kept + before.backward + 8 * before.output


def test_every_kind_of_layer_is_rehearsed_on_its_own():
    found = rehearsed(request("mixer=flash+mlstm_tfla", "model.num_layers=4").model(), setting())
    assert found.layers[1] == found.layers[3] != found.layers[2]
    alone = rehearsed(request("mixer=mlstm_tfla").model(), setting())
    assert found.layers[1] == alone.layers[1]


def test_a_window_twice_as_long_keeps_twice_as_much():
    model = request("mixer=sliding_window").model()
    short, long = (rehearsed(model, setting(1, length)).layers[1] for length in (256, 512))
    assert long.kept == pytest.approx(2 * short.kept, rel=0.01)


def test_autocast_keeps_its_copies_of_matrices_for_the_backward_pass_alone():
    model = request("mixer=flash").model()
    rounded = setting(precision="bf16-mixed", device="cuda")
    part, again = (
        rehearsed(model, dataclasses.replace(rounded, checkpointing=checkpointing)).layers[1]
        for checkpointing in ("none", "block")
    )
    matrices = sum(weight.numel() for weight in model.blocks[1].parameters() if weight.dim() == 2)
    assert part.kept > 2 * matrices > again.kept
    assert part.gradients == 4 * part.parameters


def test_gathered_weights_are_those_of_one_process():
    model = request("mixer=flash").model()
    parts = [
        rehearsed(model, setting(precision="bf16-mixed", device="cuda", sharded=sharded)).layers[1]
        for sharded in (True, False)
    ]
    assert parts[0] == parts[1]


def test_norms_keep_their_input_alone(monkeypatch):
    model = request("mixer=flash", "mixer.qk_norm=false").model()
    cpu, gpu = (rehearsed(model, setting(device=device)).layers[1] for device in ("cpu", "cuda"))
    monkeypatch.setattr(rms_norm, "has_own_gradient", lambda *_: False)
    torchs = rehearsed(model, setting(device="cpu")).layers[1]
    rows = 128 * 4
    steps = 2 * (64 + 1 - 1) * rows  # of each norm's row: its input scaled, kept besides the input; one number in all
    assert torchs.kept - gpu.kept == pytest.approx(steps, abs=2 * rows)
    assert cpu.kept == pytest.approx(gpu.kept, abs=2 * rows)


def test_on_a_gpu_the_delta_rule_keeps_less_and_makes_it_again():
    model = request("mixer=deltanet").model()
    cpu, gpu = (rehearsed(model, setting(device=device)).layers[1].kept for device in ("cpu", "cuda"))
    assert gpu < cpu / 2


@pytest.mark.slow
def test_gradients_that_accumulate_are_not_part_of_the_backward_pass():
    model = request("mixer=flash", "model.mlp_hidden=4096").model()
    first, later = (rehearsed(model, setting(1, 16, accumulates=again)).layers[1] for again in (False, True))
    assert isinstance(first, Part)
    assert later.backward < first.backward - first.gradients / 4


RECEIVED = {  # numbers that a layer gets of the other three slices of 128 tokens, for each window; 2 heads of 32
    "flash": ("mixer=flash", 3 * 128 * 2 * 64),
    "window": ("mixer=sliding_window mixer.window=33", 32 * 2 * 64),
    "lightning": ("mixer=lightning", 3 * 2 * (16 * 32 + 16)),
    "routing": ("mixer=routing", 3 * 128 * (2 * 64 + 1)),
}


@pytest.mark.parametrize(("words", "numbers"), RECEIVED.values(), ids=RECEIVED)
def test_a_slice_gets_what_its_mixers_ask_for(words, numbers):
    for checkpointing in ("none", "block"):
        found = rehearsed(request(*words.split()).model(), setting(2, slices=4, checkpointing=checkpointing))
        assert [part.received for part in found.layers] == [4 * 2 * numbers] * 2, checkpointing
        assert found.ends.received == 0


def test_a_slice_keeps_the_keys_it_got_unless_it_gets_them_again():
    model = request("mixer=flash").model()
    alone, shared = (rehearsed(model, setting(slices=slices)).layers[1] for slices in (1, 4))
    assert shared.kept - alone.kept >= shared.received
    again = rehearsed(model, setting(slices=4, checkpointing="block")).layers[1]
    assert again.kept == 0 and again.backward > shared.backward + shared.received


def test_fixed_blocks_are_planned_for_slices():
    found = rehearsed(request("mixer=block_sparse").model(), setting(1, slices=4))
    assert found.layers[1].received > 0
    assert found.layers[0] == found.layers[1]


def test_selective_blocks_keep_products_and_compute_none_of_them_again():
    model = request("mixer=flash", "mixer.qk_norm=false").model()
    found = {kind: rehearsed(model, setting(checkpointing=kind)).layers[1] for kind in ("none", "selective", "block")}
    kept = {kind: part.kept / (4 * 128) for kind, part in found.items()}  # numbers for each token
    # Query, key, value, both results of attention and its projection; gate and up of the SwiGLU.
    assert kept["selective"] == pytest.approx(5 * 64 + 2 + 2 * 128, rel=0.01)
    assert 0 == kept["block"] < kept["selective"] < kept["none"] / 1.5
    assert found["none"].again == found["selective"].again == 0
    assert 0.6 < found["block"].again < 1  # the last product is not needed


def test_offloaded_layers_keep_little_and_the_last_one_all():
    model = request("mixer=flash", width=512, length=1024).model()
    for kind in ("none", "block"):
        how = setting(length=1024, device="cuda", checkpointing=kind)
        plain, found = (rehearsed(model, dataclasses.replace(how, offloads=offloads)) for offloads in (False, True))
        assert found.layers[1] == plain.layers[1]
        first = found.layers[0]
        assert first.input_offloaded == 4 * 1024 * 512
        # A storage of the input's size travels in vain: autograd saves it and lets go of it at once.
        in_vain = first.kept + first.offloaded - first.input_offloaded - plain.layers[0].kept
        assert in_vain in (0, first.input_offloaded)
        assert first.kept <= 2 * first.parameters + 2**21  # rounded weights, and storages below 1 MiB
        assert first.backward >= plain.layers[0].backward + first.input_offloaded
