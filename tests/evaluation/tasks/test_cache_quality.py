"""`evaluate.py task=cache_quality`: its cells agree with tasks that need no cache, its bytes with what kinds count."""

import json

import pytest
from matplotlib import image

from longmix.errors import ConfigError, DataError
from longmix.evaluation.run import evaluate
from longmix.reporting.results import read_evaluations

WORDS = "h2o:budget=0.25:recent=0.125", "snapkv:budget=9:window=4", "citrus:budget=12:piece=6"
CACHES = f"task.cache_quality.caches=[{','.join(map(repr, WORDS))}]"


@pytest.fixture(scope="module")
def text_run(run_training, shared_cache):
    return run_training("mixer=flash", "seq_len=32", f"data.cache_dir={shared_cache}")


@pytest.fixture(scope="module")
def number_run(run_training):
    return run_training("mixer=flash", "data=mqar", "data.task.vocabulary=64", "data.task.pairs=4", "seq_len=32")


@pytest.fixture
def evaluated(compose_config, text_run, tmp_path):
    def run(*words: str, checkpoint=text_run) -> dict:
        place = f"checkpoint={checkpoint}", f"output={tmp_path}/run/evaluation"
        return evaluate(compose_config(*place, *words, entry_point="evaluate"))

    return run


def cell_of(report: dict, cache: str, question: str | None = None) -> dict:
    (found,) = (c for c in report["cells"] if c["cache"].partition(":")[0] == cache and c["question"] == question)
    return found


@pytest.mark.slow
def test_needles_and_text(evaluated, tmp_path, capsys):
    words = CACHES, "task.cache_quality.windows=3", "task.cache_quality.needles=2", "task.cache_quality.depths=[0,0.5]"
    report = evaluated("task=cache_quality", "seq_len=128", *words, "task.cache_quality.steps=1")["cache_quality"]
    places = {(c["cache"].partition(":")[0], c["question"]) for c in report["cells"]}
    names = ["exact", "h2o", "snapkv", "citrus"]
    assert places == {(n, None) for n in names} | {(n, "before") for n in names} | {(n, "after") for n in names[:3]}
    for cell in report["cells"]:
        assert cell["context"] == 128 and cell["held_bytes"] == cell["counted_held_bytes"] and cell["milliseconds"] > 0
        assert (cell["kl"] == 0) == (cell["cache"] == "exact") and cell["loss"] > 0
        assert (cell["found"] is None) == (cell["by_depth"] is None) == (cell["by_distance"] is not None)
    exact, dropped = cell_of(report, "exact"), cell_of(report, "h2o")
    assert exact["prompt"] == 64 and exact["rows"] == 3 and sum(r["targets"] for r in exact["by_distance"]) == 3 * 64
    assert dropped["held_bytes"] == 16 * (exact["held_bytes"] // 64 + 2 * 4)  # a score in each of two layers
    assert cell_of(report, "citrus")["told"] == "truth" and cell_of(report, "citrus", "before")["told"] == "question"
    (saved,) = (tmp_path / "run/evaluation").glob("*.json")
    assert json.loads(saved.read_text())["cells"] == report["cells"]
    assert image.imread(saved.with_suffix(".png"))[..., :3].std() > 0.05
    (kept,) = read_evaluations(tmp_path / "run").caches.values()
    assert [cell.cache for cell in kept] == [cell["cache"] for cell in report["cells"]]
    assert "question read before compression" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
def test_values_of_the_exact_cache_are_those_of_the_needle_task(evaluated, depth):
    words = "seq_len=128", "task=[needle,cache_quality]", f"task.needle.depths=[{depth}]", "task.needle.needles=3"
    own = f"task.cache_quality.depths=[{depth}]", "task.cache_quality.needles=3", "task.cache_quality.windows=1"
    reports = evaluated(*words, *own, "task.cache_quality.steps=1")
    (cell,), (without,) = reports["needle"]["cells"], reports["needle"]["without"]
    wanted = -(cell["gain"] + without["log_probability"])  # nats a value
    for question in ("after", "before"):
        found = cell_of(reports["cache_quality"], "exact", question)
        assert 5 * found["loss"] == pytest.approx(wanted, rel=1e-4)  # a blank and four digits
        assert found["found"] == cell["accuracy"] and found["token_accuracy"] == pytest.approx(cell["token_accuracy"])


@pytest.mark.slow
def test_synthetic_data(evaluated, number_run):
    words = "task=[accuracy,cache_quality]", "max_tokens=640", "task.cache_quality.windows=20", CACHES
    reports = evaluated(*words, "task.cache_quality.steps=1", checkpoint=number_run)
    exact = cell_of(reports["cache_quality"], "exact")
    (wanted,) = reports["accuracy"]["lengths"].values()
    assert exact["found"] == pytest.approx(wanted["accuracy"]) and exact["rows"] == 20
    assert sum(row["targets"] for row in exact["by_distance"]) == wanted["targets"] == 20 * 4
    assert exact["prompt"] == 8  # the pairs


@pytest.mark.slow
def test_targets_apart(evaluated, number_run):
    words = "task=cache_quality", "task.cache_quality.windows=5", CACHES, "task.cache_quality.apart=true"
    report = evaluated(*words, "task.cache_quality.steps=1", checkpoint=number_run)["cache_quality"]
    assert {cell["rows"] for cell in report["cells"]} == {5 * 4}
    assert [row["targets"] for row in cell_of(report, "snapkv")["by_distance"]] == [20]
    assert cell_of(report, "exact")["read_bytes"] == cell_of(report, "exact")["counted_read_bytes"]


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["caches=[h20]"], ConfigError, r"^task\.cache_quality\.caches names h20: .*Did you mean h2o"),
        (["contexts=[1]"], ConfigError, r"^task\.cache_quality\.contexts=\[1\] must be whole numbers from 2"),
        (["depths=[2]"], ConfigError, r"^task\.cache_quality\.depths=\[2\] must be a list of numbers from 0 to 1"),
        (["windows=0"], ConfigError, r"^task\.cache_quality\.windows=0 must be from 1"),
        (["needles=-1"], ConfigError, r"needles=-1 must be from 0"),
        (["draft="], ConfigError, r"^task\.cache_quality\.draft is empty; was a variable"),
        (["draft=x"], ConfigError, r"^task\.cache_quality\.draft=x writes ahead for caches such as speckv"),
        (["contexts=[99999999]", "windows=1"], (ConfigError, DataError), r"contexts=99999999"),
        (["contexts=[32]"], ConfigError, "no room for a haystack"),
        (["question=What"], ConfigError, r"^task\.cache_quality\.question='What' must hold"),
    ],
)
def test_refuses(evaluated, words, kind, message):
    with pytest.raises(kind, match=message):
        evaluated("task=cache_quality", *(f"task.cache_quality.{word}" for word in words))


def test_refuses_a_prompt_that_leaves_nothing(evaluated, number_run):
    with pytest.raises(ConfigError, match=r"^task\.cache_quality\.prompt=32 leaves nothing of 32 tokens"):
        evaluated("task=cache_quality", "task.cache_quality.prompt=32", checkpoint=number_run)
