"""A profiled step: a trace that viewers read, shares that sum to the whole, and training that is the same."""

import json

import pytest
import torch
from launched import train
from torch.profiler import ProfilerActivity, profile

from longmix.checkpoints import load_checkpoint
from longmix.errors import ConfigError
from longmix.training.profile import mark_parts
from longmix.training.trace import (
    CHANNELS,
    COMMUNICATION,
    DATA,
    FUSED,
    HEAD,
    LINEAR,
    MARK,
    MIXER,
    NORMS,
    OPTIMIZER,
    OTHER,
    STEP,
    WAITING,
    shares_of,
    timelines,
)

WORDS = ["model.d_model=64", "batch_size=1", "max_steps=3", "loop.checkpoint_every=2", "loop.keep_checkpoints=9"]


def profile_of(run, step):
    content = json.loads((run / f"profile/step-{step:08d}.json").read_text())
    trace = json.loads((run / f"profile/step-{step:08d}.trace.json").read_text())
    return content, trace


@pytest.fixture(scope="module")
def plain(run_training, tiny_overrides):
    return run_training(*tiny_overrides, *WORDS, "seq_len=64")


@pytest.fixture(scope="module")
def profiled(run_training, tiny_overrides):
    return run_training(*tiny_overrides, *WORDS, "seq_len=64", "loop.profile=[2,3]", "trainer.micro_batch_size=1")


@pytest.fixture(scope="module")
def profiled_long(run_training, tiny_overrides):
    return run_training(*tiny_overrides, *WORDS, "seq_len=2048", "loop.profile=2")


def test_training_is_the_same_bit_for_bit(plain, profiled):
    one, other = (load_checkpoint(run / "checkpoints/step-00000003")["model"] for run in (plain, profiled))
    assert all(torch.equal(other[name], weight) for name, weight in one.items())
    assert not (plain / "profile").exists()


def test_shares_sum_to_the_whole_and_every_class_has_some(profiled):
    for step in (2, 3):
        content, trace = profile_of(profiled, step)
        assert sum(content["shares"].values()) == pytest.approx(1)
        assert sum(content["seconds_of_training_thread"].values()) == pytest.approx(content["seconds"])
        wanted = {MIXER, LINEAR, NORMS, CHANNELS, HEAD, OPTIMIZER, DATA, OTHER}
        assert set(content["shares"]) == wanted
        assert all(share > 0 for share in content["shares"].values())
        assert sum(content["memory"]["bytes_by_class"].values()) == content["memory"]["peak_bytes"] > 0
        ranges = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
        assert ranges.count(STEP) == 1
        assert ranges.count(MARK + MIXER) == 1


def test_the_share_of_attention_grows_with_the_length(profiled, profiled_long):
    short, long = profile_of(profiled, 2)[0]["shares"], profile_of(profiled_long, 2)[0]["shares"]
    assert long[MIXER] > 1.5 * short[MIXER]


def test_a_run_that_goes_on_behind_the_step_does_not_profile_it_again(profiled, run_training, tiny_overrides):
    words = [*tiny_overrides, *WORDS, "seq_len=64", "loop.profile=2"]
    again = run_training(*words, f"resume={profiled / 'checkpoints/step-00000002'}")
    assert not (again / "profile").exists()


@pytest.mark.parametrize("word", ["[1,9]", "0"])
def test_steps_that_are_not_taken_are_refused(word, run_training, tiny_overrides):
    with pytest.raises(ConfigError, match=r"loop\.profile"):
        run_training(*tiny_overrides, *WORDS, f"loop.profile={word}")


def test_the_backward_pass_belongs_to_the_class_of_the_forward_pass(small_model, tmp_path):
    """Blocks are computed again in it, which belongs there too."""
    model = small_model("flash", "model.activation_checkpointing=block").train()
    handles = mark_parts(model, compiled=False)
    tokens = torch.randint(0, 20, (1, 16))
    with profile(activities=[ProfilerActivity.CPU]) as record, torch.profiler.record_function(STEP):
        model(tokens, tokens).token_losses.sum().backward()
    for handle in handles:
        handle.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    record.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    (line,) = timelines(trace).values()
    found: dict[str, list[str]] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") == "cpu_op":
            found.setdefault(event["name"], []).append(line.class_at(event["ts"] + event["dur"] / 2))
    assert found["aten::silu"] == [CHANNELS] * 4  # 2 layers, each twice
    assert found["SiluBackward0"] == [CHANNELS] * 2
    assert found["EmbeddingBackward0"] == [HEAD]
    assert set(found["aten::linear"]) == {LINEAR, HEAD}


def event(name, ts, dur, cat="cpu_op", tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_a_kernel_has_the_class_of_what_launched_it():
    """A step of 100: data until 10; kernels of mixer, its backward pass in another thread, and others by name."""
    events = [
        event(STEP, 0, 100, "user_annotation"),
        event(MARK + DATA, 0, 10, "user_annotation"),
        event(MARK + MIXER, 10, 10, "user_annotation"),
        event("aten::mul", 11, 5, **{"Sequence number": 7}),
        event("cudaLaunchKernel", 12, 1, "cuda_runtime", correlation=1),
        event("Torch-Compiled Region: 0/0", 20, 10, "user_annotation"),
        event("cuLaunchKernelEx", 21, 1, "cuda_driver", correlation=2),
        event("cuLaunchKernelEx", 22, 1, "cuda_driver", correlation=3),
        event("autograd::engine::evaluate_function: MulBackward0", 40, 9, tid=2, **{"Sequence number": 7}),
        event("cudaLaunchKernel", 41, 1, "cuda_runtime", 2, correlation=4),
        event("cudaLaunchKernel", 60, 1, "cuda_runtime", correlation=5),
        event("mul", 13, 7, "kernel", 9, correlation=1),
        event("triton_red_fused_rms_norm_3", 22, 8, "kernel", 9, correlation=2),
        event("triton_poi_fused_add_1", 30, 5, "kernel", 9, correlation=3),
        event("mul_grad", 45, 10, "kernel", 9, correlation=4),
        event("ncclDevKernel_AllReduce", 50, 10, "kernel", 8, correlation=4),
        event("multi_tensor_apply", 61, 9, "kernel", 9, correlation=5),
    ]
    shares = shares_of({"traceEvents": events})
    wanted = {DATA: 10, MIXER: 17, NORMS: 8, FUSED: 5, COMMUNICATION: 10, OPTIMIZER: 9, WAITING: 3 + 2 + 10 + 1 + 30}
    assert {name: round(1e6 * seconds) for name, seconds in shares.device.items()} == wanted
    assert sum(share for *_, share in shares.rows()) == pytest.approx(1)
    assert sum(shares.host.values()) == pytest.approx(shares.seconds)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp"])
def test_the_first_of_several_processes_is_profiled(strategy, tmp_path, tiny_overrides):
    words = [*tiny_overrides[:-2], *WORDS, "batch_size=2", "seq_len=64", "loop.profile=2", tiny_overrides[-1]]
    train(2, [*words, f"trainer={strategy}", "trainer.devices=2", "trainer.accelerator=cpu", "name=two"], tmp_path)
    shares = profile_of(tmp_path / "runs/two", 2)[0]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[COMMUNICATION], shares[MIXER], shares[LINEAR]) > 0
