"""Comparisons of runs: what is finished is not repeated, what fails stops no other, and what claims and mixers try."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import arms, claims, mixers
from benchmarks.arms import Arm
from longmix.errors import Interrupted

SMALL = ("--word", "model.d_model=32", "--word", "model.num_layers=2", "--length", "16", "--step-tokens", "16")


@pytest.fixture
def trained(monkeypatch):
    """Seeds of the runs begun; that of seed 1 fails while `failing`, that of seed 2 is stopped while `stopped`."""
    found = SimpleNamespace(seeds=[], failing=True, stopped=False)

    def train(words, folder):
        seed = int(next(word for word in words if word.startswith("seed=")).partition("=")[2])
        found.seeds.append(seed)
        if seed == 1 and found.failing:
            raise ValueError("seed 1")
        if seed == 2 and found.stopped:
            raise Interrupted("stopped")
        folder.mkdir(parents=True, exist_ok=True)
        summary = {"parameters": {"total": 9}, "tokens": 8, "training_seconds": 2.0, "tokens_per_second": 4.0}
        summary["peak_memory_bytes"] = 16
        parts = {"mixer": {"_target_": "mixer"}, "model": {"_target_": "model", "mlp_hidden": 3}}
        loaded = SimpleNamespace(config={**parts, "seq_len": 16})
        return SimpleNamespace(summary=summary, load=lambda device: loaded)

    monkeypatch.setattr("longmix.train", train)
    return found


def examine(options, asked=1):
    """All of three seeds of one arm."""
    names = [Arm("arm / 1", (f"seed={seed}",)) for seed in range(3)]
    return arms.run_all(names, options, lambda loaded, place: {"loss": 0.5}, {"tokens": asked}, {"device": "cpu"})


def test_what_is_finished_is_not_repeated_and_what_fails_stops_no_other(trained, tmp_path, capsys):
    options = SimpleNamespace(runs=tmp_path)
    records, failed = examine(options)
    assert trained.seeds == [0, 1, 2] and failed == ["arm / 1"] and "ValueError: seed 1" in capsys.readouterr().err
    assert [record["words"] for record in records] == [["seed=0"], ["seed=2"]]
    assert json.loads((tmp_path / "results.json").read_text())["results"] == records
    trained.failing = False
    again, failed = examine(options)
    assert trained.seeds == [0, 1, 2, 1] and not failed and again[::2] == records
    examine(options, asked=2)
    assert trained.seeds[4:] == [0, 1, 2]  # measured anew; what is trained is not trained again by resume=auto


def test_a_signal_ends_all_and_the_same_command_goes_on(trained, tmp_path, capsys):
    trained.failing, trained.stopped = False, True
    words = ["sinks", "--seeds", "0", "2", "--parameters", "9"]
    options = claims.parse([*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    lengths = {"lengths": {str(factor): {"bits_per_byte": 2.0} for factor in claims.FACTORS}}
    given = (claims.arms_of(options), options, lambda loaded, place: lengths, {}, claims.table, claims.drawn)
    assert arms.main(*given) == 75 and "The same command goes on." in capsys.readouterr().err
    measured = json.loads((tmp_path / "runs" / "results.json").read_text())["results"]
    assert [record["arm"] for record in measured] == ["positions: RoPE", "sinks: sink logits"]
    trained.stopped = False
    assert arms.main(*given) == 0 and trained.seeds == [0, 0, 2, 2, 2]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".png"}


def test_other_words_are_another_folder():
    assert Arm("a: b/c", ("seed=0",)).folder.startswith("a_b_c-")
    assert Arm("a", ("seed=0",)).folder != Arm("a", ("seed=1",)).folder


def record_of_claim(arm, seed, bits):
    lengths = {str(factor): {"bits_per_byte": bits + factor} for factor in claims.FACTORS}
    facts = {"arm": arm, "words": [f"seed={seed}"], "trained_length": 16, "parameters": 1000, "mlp_hidden": 3}
    return facts | {"lengths": lengths, "first_token_mass": None, "kept_bytes": 2048, "tokens_per_second": 7.0}


def test_claims_share_exact_attention():
    options = claims.parse(["positions", "sinks", "moh", "--parameters", "9", "--seeds", "0", "1"])
    found = claims.arms_of(options)
    assert len(found) == 2 * (7 + 1 + 5) and len({arm.folder for arm in found}) == len(found)
    names = list(dict.fromkeys(arm.name for arm in found))
    records = [record_of_claim(name, seed, seed * 0.5) for seed in (0, 1) for name in names]
    lines = claims.table(records).splitlines()
    assert len(lines) == 2 + 7 + 5 + 2
    row = "| 1,000 | 3 | 1.2500 | 2.2500 | 4.2500 | 0.5000 | - | 2,048 | 7 |"
    assert lines[2] == f"| positions | RoPE {row}" and lines[-2] == f"| sinks | no sink {row}"
    assert [axes.get_title(loc="left") for axes in claims.drawn(records).axes] == ["positions", "moh", "sinks"]


@pytest.mark.slow
def test_every_claim_has_models_of_equal_size(capsys):
    deeper = [word.replace("num_layers=2", "num_layers=3") for word in SMALL]  # for three matrices
    assert claims.main(["--check", *deeper]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    counts = [int(row[-2]) for row in rows]
    assert len(rows) == len(claims.NAMES) and max(counts) < 1.02 * min(counts)


def test_a_row_and_a_dot_for_each_mixer():
    own = {"parameters": 5, "seconds": 60.0, "tokens_per_second": 7.0, "state_bytes": 64}
    speeches = [{"arm": f"speeches: {name}", "bits_per_byte": bits, **own} for name, bits in (("kda", 3), ("flash", 2))]
    recall = [{"arm": f"recall: {name}", "accuracy": 0.5, **own} for name in ("kda", "ponet")]
    lines = mixers.table([*speeches, *recall]).splitlines()
    assert lines[2] == "| `flash` | 2.0000 | - | 5 | 60 | 7 | 64 | - | - | - | - | - |"
    assert lines[3] == "| `kda` | 3.0000 | - | 5 | 60 | 7 | 64 | 0.5000 | - | 5 | 60 | 64 |"
    assert lines[4].startswith("| `ponet` | - ") and len(lines) == 5
    assert len(mixers.drawn([*speeches, *recall]).axes) == 4 and len(mixers.drawn(recall).axes) == 1


@pytest.mark.parametrize("mixer", ["hgrn2", "nsa"])
def test_recall_sets_nothing_that_a_mixer_has_not(mixer):
    options = mixers.parse([mixer, "--check", "--tasks", "recall"])
    (arm,) = mixers.arms_of(options)
    config, parameters = arm.matched()
    assert abs(parameters / options.recall_parameters - 1) < 0.01
    wanted = mixers.settings_of_recall(mixer)
    assert {name: config.mixer.settings[name] for name in wanted} == wanted


@pytest.mark.parametrize(("main", "word", "says"), [(claims.main, "x", "no claim x"), (mixers.main, "x", "no mixer x")])
def test_what_is_not_there_is_one_line(main, word, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main([word])
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_known_results_are_not_repeated(trained, tmp_path, capsys):
    trained.failing = False
    options = SimpleNamespace(runs=tmp_path / "first")
    before, _ = examine(options)
    again = SimpleNamespace(runs=tmp_path / "second", known=[tmp_path / "first" / "results.json"])
    names = [Arm("arm / 1", (f"seed={seed}",)) for seed in (0, 2, 3)]
    arms.take_known(names, again)
    found, _ = arms.run_all(names, again, lambda loaded, place: {"loss": 0.5}, {"tokens": 1}, {"device": "cpu"})
    assert trained.seeds == [0, 1, 2, 3] and found[:2] == before[::2]
    (tmp_path / "wrong.json").write_text('{"results": 3}')
    words = ["sinks", "--parameters", "9", "--runs", str(tmp_path / "runs"), "--known", str(tmp_path / "wrong.json")]
    options = claims.parse([*words, "--out", str(tmp_path / "out")])
    given = (claims.arms_of(options), options, examine, {}, claims.table, claims.drawn)
    assert arms.main(*given) == 2 and "wrong.json holds no results" in capsys.readouterr().err
