"""`evaluate.py task=decode_cost`: what it counts, measures and refuses."""

import json

import pytest
import torch
from matplotlib import image

from longmix.caches.named import kinds_of
from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate
from longmix.evaluation.tasks.cache_counts import cache_bytes
from longmix.evaluation.tasks.decode_cost import measure, with_flash
from longmix.generation.session import Session
from longmix.mixers.parts.states import held_bytes

WIDTH, LAYERS, HEADS = 64, 2, 4


def tokens(length: int) -> torch.Tensor:
    return torch.randint(20, (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["flash", "gated_deltanet"])
def test_what_is_measured_is_the_session(small_model, name):
    model = small_model(name, dtype=torch.float32)
    session = Session(model, 1)
    session.prefill([tokens(37)])
    found = measure(model, tokens(39), context=37, steps=3)
    assert found["state_bytes"] == found["counted_state_bytes"] == model.state_bytes(37)
    assert sum(held_bytes(session.state)) == session.state_bytes() > found["state_bytes"]
    assert 0 < found["milliseconds"] < 60_000


def test_flash_in_its_place_has_its_caches(small_model):
    model = small_model("rwkv7", dtype=torch.float32)
    changed = with_flash(model)
    shift = LAYERS * WIDTH * 4  # what the channel mixing of RWKV-7's block remembers
    assert changed.state_bytes(100) == LAYERS * 2 * WIDTH * 4 * 100 + shift
    assert [type(mixer).__name__ for mixer in model.mixers()] == ["RWKV7"] * 2


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    return run_training("mixer=mlstm_tfla", "seq_len=32", "max_steps=1", f"data.cache_dir={shared_cache}")


@pytest.fixture
def costed(compose_config, run_folder, tmp_path):
    def run(*overrides: str) -> dict:
        words = f"checkpoint={run_folder}", "task=decode_cost", f"output={tmp_path}/out", *overrides
        return evaluate(compose_config(*words, entry_point="evaluate"))["decode_cost"]

    return run


@pytest.mark.slow
def test_the_task_counts_and_measures(costed, tmp_path, capsys):
    report = costed("task.decode_cost.steps=2", "task.decode_cost.contexts=[4096,1024]")
    assert [row["context"] for row in report["counted"]] == [1024, 4096]
    first, last = report["counted"]
    assert first["total"] == last["total"] == pytest.approx(last["parameters"] + last["mixing"])
    assert last["mixing"] == last["mixing_flops"] + report["intensity"] * last["state_bytes"]
    assert report["flash"][1]["held_bytes"] == 2 * 2 * 32 * 4096
    assert report["cheaper_than_flash"] == 1024 and report["mixing_dominates"] is None
    assert [row["context"] for row in report["measured"]] == [8, 32]
    for row in report["measured"]:
        assert row["milliseconds"] > 0 and row["state_bytes"] == row["counted_state_bytes"] == 4 * 4 * 4 * 8
    (saved,) = (tmp_path / "out").glob("decode_cost_*_step1_*.json")
    assert json.loads(saved.read_text()).items() >= report.items()
    assert image.imread(saved.with_suffix(".png"))[..., :3].std() > 0.05
    assert "mixing costs less than flash attention's: from 1,024 tokens" in capsys.readouterr().out


def test_nothing_need_be_measured(costed, run_folder):
    report = costed("task.decode_cost.measured=[]", "task.decode_cost.dtype=float32", "task.decode_cost.batch=8")
    assert report["measured"] == [] and len(report["counted"]) == 7
    weights = json.loads((run_folder / "summary.json").read_text())["parameters"]["non_embedding"]
    assert report["counted"][0]["weight_bytes"] == 4 * weights / 8


@pytest.mark.slow
def test_generations_of_several_mixers_are_counted(costed, tmp_path, capsys):
    prefix, name = "task.decode_cost.", "rwkv7:head_dim=16"
    words = [
        "contexts=[1024,64]",
        "generated=[32,8]",
        "samples=[4,1]",
        "measured=[]",
        "mixers=['sliding_window:window=4','rwkv7:head_dim=16']",
    ]
    scores = ["attempts=8", "correct=[[2,0,1],[],[],[8,8,0]]"]
    report = costed(*(prefix + word for word in [*words, *scores, "flops=4.5e15", "bandwidth=8e12"]))
    assert report["intensity"] == 562.5 and report["hardware"] == "4500 TFLOP/s and 8 TB/s"
    rows = report["generations"]
    assert len(rows) == 4 * 2 * 2 * 2 and list(dict.fromkeys(row["mixer"] for row in rows)) == [
        "this",
        "flash",
        "sliding_window:window=4",
        name,
    ]
    by_sizes = {(row["mixer"], row["context"], row["generated"], row["samples"]): row for row in rows}
    row = by_sizes["flash", 1024, 32, 4]
    token = 2 * 2 * 32  # bytes of keys and values in the one layer of 32 channels
    assert row["state_bytes"] == token * (32 * 1024 + 4 * 32 * 33 / 2)
    assert row["held_bytes"] == token * (1024 + 4 * 32)
    assert row["total"] == row["parameter_flops"] + row["mixing_flops"] + 562.5 * (
        row["weight_bytes"] + row["state_bytes"]
    )
    own = by_sizes["this", 64, 8, 1]["total"]
    assert own == pytest.approx(8 * report["counted"][0]["total"], rel=1e-12)
    covered = {(row["mixer"], row["samples"]): row["coverage"] for row in report["coverage"]}
    assert covered["this", 1] == pytest.approx(1 / 8) and covered[name, 4] == pytest.approx(2 / 3)
    last = report["equal_coverage"][-2:]
    assert [(row["mixer"], row["samples"]) for row in last] == [("this", 4), (name, 1)]
    assert last[1]["total"] == by_sizes[name, 1024, 32, 1]["total"]
    (saved,) = (tmp_path / "out").glob("decode_cost_step1_*.json")
    assert json.loads(saved.read_text()).items() >= report.items()
    assert image.imread(saved.with_suffix(".png"))[..., :3].std() > 0.05
    shown = capsys.readouterr().out
    assert "4 generations from one prompt" in shown and "right answers among samples of 32 tokens" in shown


def test_no_generation_need_be_counted(costed):
    report = costed("task.decode_cost.measured=[]", "task.decode_cost.generated=[]", "task.decode_cost.contexts=[64]")
    assert report["generations"] == report["break_even"] == report["coverage"] == []


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flops=1e15"], r"bandwidth=null, and task.decode_cost.flops is given"),
        (["flops=0", "bandwidth=1e12"], r"flops=0.* must be from 1 to"),
        (["mixers=['rwkv7:size=3']"], r"mixers names rwkv7:size=3: .*size"),
        (["mixers=[rwkv7]", "measured=[]"], r"mixers names rwkv7: mixer.head_dim=64 does not divide"),
        (["mixers=[abacus]"], r"mixers names abacus: .*abacus"),
        (["generated=[2000000]"], r"generated=\[2000000\] must be whole numbers from 1 to 1048576"),
        (["samples=[]"], r"samples=\[\] must be whole"),
        (["correct=[[1]]"], r"attempts=null: task.decode_cost.correct is given"),
        (["correct=[[1]]", "attempts=0"], r"attempts=0 must be from 1"),
        (["correct=[[1],[],[2]]", "attempts=8"], r"correct has 3 lists, and 2 models are compared"),
        (["correct=[[9]]", "attempts=8"], r"correct has \[9\]; it must be a list for each model"),
        (["correct=[3]", "attempts=8"], r"correct=\[3\] is not a list, each a list"),
        (["correct=[[1]]", "attempts=8", "samples=[9]"], r"samples has 9, and there were .*attempts=8"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_impossible_generations_are_refused(costed, words, message):
    with pytest.raises(ConfigError, match=message):
        costed(*(f"task.decode_cost.{word}" for word in words))


@pytest.mark.parametrize(
    "words",
    ["contexts=[0]", "contexts=[]", "measured=[8,0]", "batch=0", "steps=0", "hardware=abacus", "dtype=int8"],
)
def test_impossible_settings_are_refused(costed, words):
    with pytest.raises(ConfigError, match=rf"task\.decode_cost\.{words.split('=')[0]}="):
        costed(f"task.decode_cost.{words}")


def test_caches_are_counted_beside_exact(small_model):
    model = small_model("flash", dtype=torch.float32)
    kinds = kinds_of(["exact", "h2o:budget=0.25:recent=0.125", "snapkv:budget=64"], "task.caches")
    rows = {(row["cache"].partition(":")[0], row["context"]): row for row in cache_bytes(model, kinds, [128, 1024])}
    for context in (128, 1024):
        assert rows["exact", context]["held_bytes"] == model.state_bytes(context)
        assert rows["exact", context]["read_bytes"] == model.state_bytes(context + 1)
        of_token = model.state_bytes(1)
        scores = LAYERS * HEADS * 4  # of float32
        assert rows["h2o", context]["held_bytes"] == context // 4 * (of_token + scores)
        assert rows["snapkv", context] == {
            **{"cache": "snapkv:budget=64", "context": context},
            **{"held_bytes": 64 * of_token, "read_bytes": 65 * of_token},
        }
    with pytest.raises(ConfigError, match=r"^task\.caches names h2o:budget=0.25:recent=0.125: cache=h2o keeps"):
        cache_bytes(small_model("rwkv7"), kinds, [8])


@pytest.mark.slow
def test_a_table_of_caches(costed, capsys):
    words = "task.decode_cost.generated=[]", "task.decode_cost.measured=[]", "task.decode_cost.contexts=[64]"
    with pytest.raises(ConfigError, match=r"^task\.decode_cost\.caches names h2o: cache=h2o keeps"):
        costed(*words, "task.decode_cost.caches=[h2o]")
    assert "caches" not in capsys.readouterr().out
