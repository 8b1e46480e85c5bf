"""Whether any mixer lets later tokens change earlier ones: `python -m benchmarks.causality`.

Every mixer of `configs/mixer`, all causal modes of routing, and for each mechanism of selection a control that leaks
(`benchmarks.causality_controls`), as models of two layers (`longmix.analysis.causality.scale_model`). Each is trained
on independent, evenly distributed tokens in short rows, where a causal model cannot get below the entropy; then its
weights are audited in longer rows, in float64: later tokens, or other documents, are changed, and no earlier output may
be. The controls show what the probes see of a selection by ranks, and what a mean over the whole row gives away.
"""

import argparse
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.causality_controls import CONTROLS, LeakyControl
from benchmarks.command import RESULTS, Parser, positive, progress
from longmix.analysis.causality import EntropyFinding, Finding, audit, entropy_test, model_function, scale_model
from longmix.composing import composed
from longmix.config import Choice, ModelConfig
from longmix.evaluation.tasks.causality import CHANGES_HEIGHT, draw_changes
from longmix.files import replace_text
from longmix.mixers.parts.routing_modes import CAUSAL
from longmix.model.backbone import LanguageModel
from longmix.reporting.plots import AROUND, drawing, new_figure, save_figure, set_title
from longmix.reporting.style import INK, SOFT, nth_style

CONFIGS = results.ROOT / "configs"
MODES = {f"routing, {mode}": {"mode": mode} for mode in CAUSAL[1:]}
"""By name: settings of `routing` besides those of its file."""

SIZES = ("model.d_model=64", "model.num_layers=2", "model.num_heads=2", "model.mlp_hidden=128")
VOCABULARY = 8
FOOTNOTE = """\
Columns from "last token" to "document alone": largest change of an output that must not change, relative, after one
token or all from some place on were drawn anew, became 10,000 times as large, or were cut off; after other documents of
the row were changed; and of a document alone against itself in a row. below: bits per token that the trained model's
loss is below the entropy of its tokens, with its standard error."""


def configurations(names: Sequence[str]) -> dict[str, ModelConfig]:
    """Small models with these mixers, and then with routing's modes and the controls."""
    found = {name: _small(name) for name in names}
    modes = {name: LeakyControl("routing", settings) for name, settings in MODES.items()} if "routing" in names else {}
    for name, control in (modes | CONTROLS).items():
        base = _small(control.mixer or "routing")
        own = {} if control.mixer is None else base.mixer.entries
        found[name] = ModelConfig(mixer=Choice.of("mixer", {**own, **control.settings}), model=base.model)
    return found


@functools.cache
def _small(mixer: str) -> ModelConfig:
    return ModelConfig.of(composed("train", [f"mixer={mixer}", *SIZES]).content)


def examined(config: ModelConfig, options: argparse.Namespace) -> tuple[list[Finding], EntropyFinding]:
    """Train on unpredictable tokens, and audit the trained weights in longer rows."""
    torch.manual_seed(0)
    trained = scale_model(config, options.short, VOCABULARY)
    entropy = entropy_test(trained, seq_len=options.short, steps=options.steps, batch_size=options.rows)
    model = with_weights(scale_model(config, options.length, VOCABULARY), trained).double().eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, options.length), generator=generator)
    return audit(model_function(model), model.embedding(tokens).detach()), entropy


def with_weights(model: LanguageModel, trained: LanguageModel) -> LanguageModel:
    """The model with the trained weights; the trained one where their shapes follow its blocks, as in `nsa`."""
    weights, own = trained.state_dict(), model.state_dict()
    if any(weights[name].shape != tensor.shape for name, tensor in own.items()):
        return trained
    model.load_state_dict(weights)
    return model


def record(name: str, findings: list[Finding], entropy: EntropyFinding) -> results.Record:
    """One line of the table."""
    kinds = sorted({finding.kind for finding in findings} - {"none"})
    causal = entropy.passed and not any(finding.leaks for finding in findings)
    return {
        "mixer": name,
        "control": name in CONTROLS,
        **{finding.probe: finding.change for finding in findings},
        "leak": ", ".join(kinds) or "none",
        "loss": entropy.loss,
        "entropy": entropy.entropy,
        "bits_below": (entropy.entropy - entropy.loss) / math.log(2),
        "bits_error": entropy.error / math.log(2),
        "causal": causal,
    }


def table(records: Sequence[results.Record], probes: Sequence[str]) -> str:
    """The records as text, changes as powers of ten."""
    columns = {"mixer": "mixer", **{probe: probe for probe in probes}, "leak": "leak", "below": "below, bits"}
    rows = []
    for row in records:
        changes = {probe: f"{row[probe]:.0e}" for probe in probes}
        below = f"{row['bits_below']:+.4f} +- {row['bits_error']:.4f}"
        rows.append({**row, **changes, "below": below, "verdict": "causal" if row["causal"] else "NOT CAUSAL"})
    return results.text_table(rows, columns | {"verdict": ""})


def draw(path: Path, found: dict[str, list[Finding]], records: Sequence[results.Record]) -> None:
    """Draw the changes, and beside them how far each mixer's loss is below the entropy."""
    with drawing():
        figure, (changes, below) = new_figure(2, width=600, height=CHANGES_HEIGHT * len(records) + AROUND)
        draw_changes(changes, found)
        heights = range(len(records))
        colours = [nth_style(0 if row["causal"] else 1).light for row in records]
        errors = [3 * row["bits_error"] for row in records]
        below.barh(heights, [row["bits_below"] for row in records], xerr=errors, color=colours, ecolor=SOFT)
        below.set_yticks(heights, [row["mixer"] for row in records])
        below.set_ylim(len(records) - 0.5, -0.5)
        below.grid(visible=False)
        below.axvline(0.0, color=INK, linewidth=0.8)
        below.set_xscale("symlog", linthresh=0.01)
        below.xaxis.set_major_formatter("{x:g}")
        below.set_xlabel("bits per token, with three standard errors")
        set_title(below, "trained loss below the entropy")
    save_figure(figure, path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    every = sorted(path.stem for path in (CONFIGS / "mixer").glob("*.yaml"))
    parser = Parser(prog="python -m benchmarks.causality", description="Audit of every mixer, and of what leaks.")
    add = parser.add_argument
    add("--mixers", nargs="+", default=every, choices=every, metavar="NAME", help="default: every one there is")
    add("--length", type=positive(int, 1 << 12), default=64, metavar="T", help="tokens of the audited rows, 8 at least")
    add("--short", type=positive(int, 1 << 12), default=8, metavar="T", help="tokens of the rows of the training")
    add("--steps", type=positive(int), default=200, help="of the training")
    add("--rows", type=positive(int), default=64, help="of a step")
    add("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    if options.length < 8:
        parser.error(f"--length {options.length} is too short to audit; allowed are 8 tokens or more")
    parser.make_folder(options.out)
    return options


def measure(options: argparse.Namespace) -> Iterator[tuple[str, list[Finding], EntropyFinding]]:
    """Name and findings of each mixer and control."""
    configs = configurations(options.mixers)
    with progress(len(configs)) as (announce, finish):
        for name, config in configs.items():
            announce(name)
            yield name, *examined(config, options)
            finish(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine, write and print; 1 if a mixer leaks that is no control, or a control does not."""
    options = parse(arguments)
    environment = results.environment(torch.device("cpu"), "fp64")
    measured = list(measure(options))
    found = {name: findings for name, findings, _ in measured}
    records = [record(*some) for some in measured]
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    path = options.out / f"{results.file_stem('causality', environment)}.json"
    content = {"benchmark": "causality", "environment": environment, "settings": settings, "results": records}
    results.write_json(path, content)
    title = f"Causality, rows of {options.length}; trained for {options.steps} steps on rows of {options.short}"
    probes = [finding.probe for finding in next(iter(found.values()))]
    text = "\n\n".join([title, table(records, probes), FOOTNOTE]) + "\n"
    replace_text(path.with_suffix(".txt"), text)
    draw(path.with_suffix(".png"), found, records)
    print(f"{text}\nwritten: {path}, .txt, .png")
    return int(any(row["causal"] == row["control"] for row in records))


if __name__ == "__main__":
    sys.exit(main())
