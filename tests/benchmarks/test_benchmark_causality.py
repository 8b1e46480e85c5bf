"""`python -m benchmarks.causality`, for few mixers and steps."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import causality as benchmark
from benchmarks.causality_controls import CONTROLS, MECHANISMS, LeakyControl, RowMean
from longmix.analysis.causality import audit, mixer_function
from longmix.config import locate
from longmix.mixers.parts.softmax import SoftmaxAttention

EVERY = {path.stem: OmegaConf.load(path)["_target_"] for path in (benchmark.CONFIGS / "mixer").glob("*.yaml")}


@pytest.mark.parametrize("name", CONTROLS)
def test_an_audit_finds_what_a_control_leaks(name):
    torch.manual_seed(0)
    mixer = benchmark.scale_model(benchmark.configurations([])[name], 32, 8).double().eval().mixers()[0]
    x = torch.randn(2, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kinds = {finding.kind for finding in audit(mixer_function(mixer), x)} - {"none"}
    assert mixer.leaky and kinds == set(CONTROLS[name].kinds)


def test_every_mixer_that_selects_by_content_has_a_control():
    """Where a class says so itself; of what selects in another way, `MECHANISMS` says it."""
    classes = {name: locate(target, "mixer") for name, target in EVERY.items()}
    selecting = {
        name
        for name, kind in classes.items()
        if issubclass(kind, SoftmaxAttention) and kind.select is not SoftmaxAttention.select
    }
    assert selecting <= set(MECHANISMS) <= set(EVERY) and set(MECHANISMS.values()) <= set(CONTROLS)


@pytest.mark.parametrize("name", EVERY)
def test_longer_rows_are_audited_with_the_trained_weights(name):
    """Also those of `nsa`, whose shapes follow its blocks."""
    config = benchmark.configurations([name])[name]
    trained, longer = (benchmark.scale_model(config, length, 8) for length in (8, 64))
    found = benchmark.with_weights(longer, trained).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in trained.state_dict().items())


@pytest.mark.slow
def test_a_run_leaves_table_picture_and_records(tmp_path, capsys):
    folder = tmp_path / "results"
    words = ["--mixers", "flash", "scatterbrain_content", "--steps", "40", "--rows", "8"]
    assert benchmark.main([*words, "--length", "32", "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    (path,) = folder.glob("causality_cpu_*.json")
    content = json.loads(path.read_text())
    assert path.with_suffix(".txt").read_text() in printed and path.with_suffix(".png").stat().st_size > 10_000
    found = {record["mixer"]: record for record in content["results"]}
    assert list(found) == ["flash", "scatterbrain_content", *CONTROLS]
    for name, row in found.items():
        control = name in CONTROLS
        assert row["control"] is control and row["causal"] is not control
        changed = max(row["last token"], row["later tokens"])  # of blocks, those at a border show in one of the two
        assert (changed > 1e-3) is control and row["bits_error"] < 0.03
        assert row["leak"] == (", ".join(CONTROLS[name].kinds) if control else "none")
    mean = found["mean of the row"]
    assert mean["bits_below"] > 10 * mean["bits_error"] and mean["bits_below"] == pytest.approx(
        (mean["entropy"] - mean["loss"]) / 0.6931, rel=1e-3
    )


@pytest.mark.slow
def test_a_mixer_that_leaks_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "CONTROLS", {"flash": LeakyControl("flash")})
    words = ["--mixers", "sliding_window", "--steps", "1", "--rows", "1", "--length", "8"]
    assert benchmark.main([*words, "--out", str(tmp_path)]) == 1


class Asleep(RowMean):
    """Of the fresh weights it shows nothing."""

    def __init__(self, shape, layer_index):
        super().__init__(shape, layer_index)
        torch.nn.init.zeros_(self.output.weight)


@pytest.mark.slow
def test_trained_weights_are_audited(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "CONTROLS", {"asleep": LeakyControl(settings={"_target_": f"{__name__}.Asleep"})})
    words = ["--mixers", "sliding_window", "--steps", "2", "--rows", "1", "--length", "8"]
    assert benchmark.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"][1]["leak"] == "content, placement"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixers", "flsh"], "invalid choice: 'flsh'"),
        (["--length", "7"], "--length 7 is too short to audit; allowed are 8 tokens or more"),
        (["--steps", "0"], "'0' is not allowed; allowed are whole numbers above 0"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
