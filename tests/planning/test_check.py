"""The planner against training steps that were run: every allocation of this process, as torch's profiler saw it.

What an engine takes and gives back within one call is not planned for. On a CPU that is a few MiB whatever the length,
so lengths are such that it is small.
"""

import json

import pytest

from longmix.errors import ConfigError
from longmix.planning import check
from longmix.planning.check import CPU_SIZES, Outcome

CASES = {
    "micro-batches": ("mixer=retention", "optimizer=adamw", "trainer.micro_batch_size=1"),
    "recomputed": ("mixer=sliding_window*2+mlstm_tfla", "model.tie_head=true", "model.activation_checkpointing=block"),
    "selective": ("mixer=sliding_window*2+mlstm_tfla", "model.activation_checkpointing=selective"),
    "int8": ("mixer=flash", "model.saved_activations=int8"),
    "shared": ("mixer=flash", "model.share.names=[query,key,value]", "model.share.atoms=1"),
    "rwkv7": ("mixer=rwkv7", "model.logit_penalty=0.0001"),
    "large-optimizer": ("mixer=flash", "seq_len=32", "batch_size=1", "model.mlp_hidden=1024"),
    "ddp": ("mixer=flash", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"),
    "fsdp": ("mixer=flash", "trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"),
    # of two rows each: where gradients of a layer, not what it keeps, make the peak, some 0.6 MB are missing
    "fsdp-adamw": (
        *("mixer=gla", "optimizer=adamw", "batch_size=4"),
        *("trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"),
    ),
    "sliced-loss": ("mixer=flash", "seq_len=512", "tokenizer=bpe", "tokenizer.vocab_size=30000", "model.num_layers=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_a_step_holds_what_was_planned(words):
    outcome = check.check([*CPU_SIZES, *words])
    assert outcome.error == pytest.approx(0, abs=0.01)
    assert outcome.measured > 2**21


def test_the_command_writes_its_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "check", lambda words: Outcome(tuple(words), 3 * 2**29, 2**30))
    assert check.main(["seq_len=64", "--mixers", "flash", "gla", "--output", str(tmp_path / "found.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["1.5000", "GiB", "predicted", "1.0000", "GiB", "measured", "+50.0%", "mixer=flash"]
    cases = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert [case["words"][-2:] for case in cases] == [["seq_len=64", "mixer=flash"], ["seq_len=64", "mixer=gla"]]
    assert cases[0]["error"] == 0.5


@pytest.mark.parametrize(("ends", "code"), [(KeyboardInterrupt(), 130), (ConfigError("no memory."), 2)])
def test_what_was_done_is_kept_when_the_command_ends_early(monkeypatch, tmp_path, capsys, ends, code):
    found = tmp_path / "found.json"

    def measured(words):
        if words[-1] == "mixer=gla":
            assert len(json.loads(found.read_text())["cases"]) == 1
            raise ends
        return Outcome(tuple(words), 2**30, 2**30)

    monkeypatch.setattr(check, "check", measured)
    assert check.main(["--mixers", "flash", "gla", "kda", "--output", str(found)]) == code
    (case,) = json.loads(found.read_text())["cases"]
    assert case["words"][-1] == "mixer=flash"
    (message,) = capsys.readouterr().err.splitlines()
    assert message.endswith(f"{found} holds 1 case.")


def test_a_place_that_cannot_be_written_is_refused_before_the_first_case(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "check", lambda words: pytest.fail("no case should run"))
    assert check.main(["--mixers", "flash", "--output", str(tmp_path / "nowhere" / "found.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_impossible_words_are_one_line(capsys):
    assert check.main(["model.num_heads=3", "--mixers", "flash"]) == 2
    assert "model.num_heads=3" in capsys.readouterr().err


TAUGHT = {
    "layers": ("mixer=gla", "objective=layers", "seq_len=8192", "model.num_layers=2", "trainer.micro_batch_size=1"),
    "logits": ("mixer=gla", "objective=logits", "distil.hard_share=0.5"),
    "layers-fsdp": ("mixer=gla", "objective=layers", "seq_len=8192", "model.num_layers=2", "trainer=fsdp"),
    "logits-fsdp": ("mixer=gla", "objective=logits", "trainer=fsdp"),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", TAUGHT.values(), ids=TAUGHT)
def test_a_step_that_learns_from_a_teacher_holds_what_was_planned(words):
    processes = ("trainer.devices=2", "trainer.accelerator=cpu") if "trainer=fsdp" in words else ()
    outcome = check.check([*CPU_SIZES, *words, *processes])
    assert outcome.error == pytest.approx(0, abs=0.01)
