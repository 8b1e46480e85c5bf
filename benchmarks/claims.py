"""What each option is said to do, tried in small models of equal size: `python -m benchmarks.claims`.

    python -m benchmarks.claims                          # all; the same command goes on where it was broken off
    python -m benchmarks.claims positions moh --seeds 0 1
    python -m benchmarks.claims masa --tokens 2e6 --length 512 --word model.num_layers=12

    positions   RoPE, none, ALiBi, Fourier, CARoPE, FoX: the loss in rows 1, 2 and 4 times as long as in training
    masa        projections of all layers made of 2 or 3 matrices, against a dense model of as many parameters
    moh         the loss against the share of heads that a token keeps
    gates       a sigmoid gate on the output of each head or element: the loss, and the mass on the first token
    sinks       a learned logit in each head's softmax: the same
    mesa        activations saved in 8 bits: the bytes that a token keeps, and the loss
    parallax    parallax against exact attention, with Muon and with AdamW

Every arm is a model of the default size whose feed-forward takes up what its mixer leaves (`match.parameters`), trained
on the same tokens of speeches. Arms that claims share are trained once. Leaves JSON, a Markdown table and a picture.
Negative eigenvalues have a benchmark of their own, `benchmarks.state_tracking`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure

import longmix
from benchmarks import arms
from benchmarks.arms import Arm, cell, mean, spread
from benchmarks.command import Parser, positive
from benchmarks.results import Record
from longmix.config import ModelConfig
from longmix.errors import ConfigError, LongmixError
from longmix.model.build import build_model
from longmix.reporting.plots import draw_curves, draw_trained, drawing, new_figure
from longmix.training.kept_activations import kept_per_token

DESCRIPTION = "What each option is said to do, tried in small models of equal size."
FACTORS = (1, 2, 4)
"""Lengths of the rows that a model is evaluated in, over the trained one."""

HEADS, SHARED, KEPT = 8, 1, (1, 3, 5, 7)
"""Of a mixture of heads: all, those that every token keeps, and how many it keeps of the others."""

FLASH = ""
ADAMW = "optimizer=adamw"


def _masa(atoms: int) -> str:
    return f"model.share.names=[query,key,value] model.share.atoms={atoms}"


def _moh(kept: int) -> str:
    return f"mixer.num_heads={HEADS} mixer.heads_shared={SHARED} mixer.heads_kept={kept}"


CLAIMS: Mapping[str, Mapping[str, str]] = {
    "positions": {
        "RoPE": FLASH,
        "none": "mixer.rotary_base=null",
        "ALiBi": "mixer.bias=alibi mixer.rotary_base=null",
        "Fourier": "mixer.bias=fourier mixer.rotary_base=null",
        "RoPE and Fourier": "mixer.bias=fourier",
        "CARoPE": "mixer.position=context",
        "FoX": "mixer=fox",
    },
    "masa": {
        "dense": FLASH,
        "q, k, v of 3": _masa(3),
        "q, k, v of 2": _masa(2),
    },
    "moh": {
        f"{HEADS} heads": f"mixer.num_heads={HEADS}",
        **{f"{(SHARED + kept) / HEADS:.0%} kept": _moh(kept) for kept in reversed(KEPT)},
    },
    "gates": {
        "no gate": FLASH,
        "of each head": "mixer.output_gate=head",
        "of each element": "mixer.output_gate=element",
    },
    "sinks": {"no sink": FLASH, "sink logits": "mixer.sink_logits=true"},
    "mesa": {"exact": FLASH, "8 bits": "model.saved_activations=int8"},
    "parallax": {
        "flash, Muon": FLASH,
        "parallax, Muon": "mixer=parallax",
        "flash, AdamW": ADAMW,
        "parallax, AdamW": f"mixer=parallax {ADAMW}",
    },
}
"""By name: the words of each arm besides what all have."""

NAMES = {own: f"{claim}: {name}" for claim, claimed in reversed(list(CLAIMS.items())) for name, own in claimed.items()}
"""By its words: the name of an arm, of the first claim that has it."""


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """The arms of the claims asked for, each once, those of the first seed first."""
    common = [f"seq_len={options.length}", f"batch_size={max(1, options.step_tokens // options.length)}"]
    common += [f"max_tokens={options.tokens}", f"match.parameters={options.parameters}", "match.multiple=1"]
    wanted = dict.fromkeys(own for claim in options.claims for own in CLAIMS[claim].values())
    return [
        Arm(NAMES[own], (*common, *options.word, *own.split(), f"seed={seed}"))
        for seed in options.seeds
        for own in wanted
    ]


def examined(loaded: longmix.Loaded, place: Path, tokens: int) -> Record:
    """Loss in rows of all lengths, mass on the first token, and bytes that a token keeps for the backward pass."""
    length = loaded.config["seq_len"]
    words = {"batch_size": 1, "max_tokens": tokens, "output": str(place)}
    report = loaded.evaluate("loss", seq_len=[factor * length for factor in FACTORS], **words)
    try:
        looked = loaded.evaluate("attention", output=str(place))["models"].values()
        heads = [head for model in looked for layer in model["layers"] for head in layer["heads"]]
        first = fmean(head["first_token_mass"] for head in heads)
    except ConfigError:  # its values are not known
        first = None
    with torch.device("meta"):
        model = build_model(ModelConfig.of(loaded.config), loaded.model.vocab_size)
    found = {int(key): value for key, value in report["lengths"].items()}
    lengths = {str(factor): found[factor * length] for factor in FACTORS}
    return {"lengths": lengths, "first_token_mass": first, "kept_bytes": kept_per_token(model, "32-true")}


def of_words(records: Sequence[Record], own: str) -> list[Record]:
    """Records of an arm, of all seeds."""
    return [record for record in records if record["arm"] == NAMES[own]]


def shown(records: Sequence[Record]) -> list[str]:
    """Claims of which there is more than exact attention, which all share."""
    tried = {record["arm"] for record in records}
    return [claim for claim, claimed in CLAIMS.items() if any(NAMES[own] in tried for own in claimed.values() if own)]


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each arm of each claim, means over the seeds."""
    trained = records[0]["trained_length"]
    lengths = [f"bits/byte at {factor * trained:,}" for factor in FACTORS]
    heads = ["claim", "arm", "parameters", "`mlp_hidden`", *lengths, "seeds differ by", "first token's mass"]
    lines = [[*heads, "kept, bytes/token", "tokens/s"]]
    for claim in shown(records):
        for name, own in CLAIMS[claim].items():
            found = of_words(records, own)
            if not found:
                continue
            bits = [mean(found, "lengths", str(factor), "bits_per_byte") for factor in FACTORS]
            differ = spread(found, "lengths", "1", "bits_per_byte") if len(found) > 1 else None
            line = [claim, name, cell(mean(found, "parameters"), ",.0f"), cell(mean(found, "mlp_hidden"), ".0f")]
            line += [*(cell(value, ".4f") for value in bits), cell(differ, ".4f")]
            line += [cell(mean(found, "first_token_mass"), ".1%"), cell(mean(found, "kept_bytes"), ",.0f")]
            lines.append([*line, cell(mean(found, "tokens_per_second"), ",.0f")])
    return arms.markdown(lines, 2)


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """A panel for each claim: bits/byte over the length of the row, or over the share of heads kept."""
    trained = records[0]["trained_length"]
    claims = shown(records)
    figure, panels = new_figure(len(claims), title="Options in models of equal size, trained on the same tokens")
    for axes, claim in zip(panels, claims, strict=True):
        curves: dict[str, tuple[list[float], list[float]]] = {}
        found = {name: of_words(records, own) for name, own in CLAIMS[claim].items()}
        found = {name: own for name, own in found.items() if own}
        if claim == "moh":
            for factor in FACTORS:
                bits = {name: mean(own, "lengths", str(factor), "bits_per_byte") for name, own in found.items()}
                points = [(_share(name), value) for name, value in bits.items() if value is not None]
                points.sort()
                curves[f"rows of {factor * trained:,}"] = [x for x, _ in points], [y for _, y in points]
            label = "% of heads kept; beyond 100: no mixture"
        else:
            for name, own in found.items():
                ys = [mean(own, "lengths", str(factor), "bits_per_byte") or 0.0 for factor in FACTORS]
                curves[name] = [factor * trained for factor in FACTORS], ys
            label = "tokens of a row"
        draw_curves(axes, curves, title=claim, x_label=label, y_label="bits/byte", log_x=claim != "moh")
        if claim != "moh":
            draw_trained(axes, trained)
    return figure


def _share(name: str) -> float:
    """Where an arm of the mixture of heads stands: what it keeps in percent, and plain attention beyond 100."""
    return float(name.partition("%")[0]) if "%" in name else 112.5


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.claims", description=DESCRIPTION)
    add = parser.add_argument
    add("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(CLAIMS)}; default: all")
    add("--tokens", type=positive(float), default=800_000, help="that each arm is trained on")
    add("--length", type=positive(int), default=256, help="tokens of a row in training")
    add("--step-tokens", type=positive(int), default=1024, help="about so many tokens of a step")
    add("--parameters", type=positive(int), help="of every model; default: those of exact attention at these words")
    add("--evaluated", type=positive(int), default=65_536, help="about so many tokens of each length of rows")
    arms.add_options(parser, "claims")
    options = parser.parse_args(arguments)
    if unknown := set(options.claims) - set(CLAIMS):
        parser.error(f"there is no claim {', '.join(sorted(unknown))}; there are {', '.join(CLAIMS)}")
    options.claims, options.tokens = options.claims or list(CLAIMS), int(options.tokens)
    if not options.check:
        parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write and print; 1 if an arm failed."""
    options = parse(arguments)
    asked = {"evaluated": options.evaluated, "factors": list(FACTORS)}
    try:
        options.parameters = options.parameters or Arm("flash", tuple(options.word)).matched()[1]
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return arms.main(
        arms_of(options),
        options,
        lambda loaded, place: examined(loaded, place, options.evaluated),
        asked,
        table,
        drawn,
    )


if __name__ == "__main__":
    sys.exit(main())
