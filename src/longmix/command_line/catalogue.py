"""The commands of the console: what each is for, what runs it, and its words where Hydra does not know them.

Nothing heavy is imported here.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from longmix.command_line.arguments import Argument
from longmix.errors import ConfigError
from longmix.wording import did_you_mean, nearest

_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
LARGEST = 2**31 - 1
"""Of whole numbers whose limit only the work knows."""

_ALL = f"[{','.join(_ARCHITECTURES)}]"


@dataclass(frozen=True)
class Command:
    """A command of the console.

    Attributes:
        name: the first word after `longmix`.
        about: what it does, in one line.
        hydra: the command whose words Hydra composes; None where `module` does the work.
        module: has `main(arguments)`, which returns an exit code.
        adds: arguments besides the user's.
        words: what it takes where Hydra does not know it; none where the module explains itself.
        besides: the command whose words it takes too; `module` gets all words as they were given.
        examples: lines for the help.
    """

    name: str
    about: str
    hydra: str | None = None
    module: str | None = None
    adds: tuple[str, ...] = ()
    words: tuple[Argument, ...] = ()
    besides: str | None = None
    examples: tuple[str, ...] = ()

    def help(self) -> str:
        """The text that `-h` prints."""
        width = max(len(f"{word.name}={word.default}") for word in self.words)
        lines = [f"  {f'{word.name}={word.default}':<{width}}  {word.about}" for word in self.words]
        positional = [word.name.upper() + "..." * word.many for word in self.words if word.positional]
        names = "its name" if len(positional) == 1 else "their names, in this order"
        note = f"{' '.join(positional)} may stand without {names}." if positional else ""
        if self.besides:
            note = f"The words of `longmix {self.besides}` are taken too; `longmix {self.besides} -h` lists them."
        examples = ["", *(f"  {example}" for example in self.examples)] if self.examples else []
        return "\n".join([f"longmix {self.name}: {self.about}", *examples, "", "Words", *lines, "", note]).rstrip()

    def options(self, given: Sequence[str]) -> list[str]:
        """The arguments for `module`: `name=value` becomes `--name value` or the value alone, options stay.

        Raises:
            ConfigError: an unknown word, or one that is missing.
        """
        if not self.words or self.besides:
            return list(given)
        known = {word.name: word for word in self.words}
        positional: dict[str, list[str]] = {word.name: [] for word in self.words if word.positional}
        options: list[str] = []
        alone: list[str] = []
        named: list[Argument] = []
        for argument in given:
            found = re.fullmatch(r"(\w+)=(.*)", argument, re.DOTALL)
            if found and found[1] in known and found[2] == known[found[1]].default == "null":
                continue
            if found and found[1] in positional:
                positional[found[1]] = known[found[1]].values(found[2])
            elif found and found[1] in known:
                options += _option(known[found[1]], found[2])
                named.append(known[found[1]])
            elif found and not self._may_be_path(argument, found[1]):
                meant = did_you_mean(nearest(found[1], known))
                raise ConfigError(f"unknown word {found[1]}.{meant} Words are: {', '.join(known)}.")
            else:
                alone.append(argument)
        placed = self._with_positional(positional, alone)
        if not any(argument.startswith("-") for argument in alone):  # `module` explains its options
            needed = [word for word in self.words if word.default == "???" and not word.positional]
            self._check_given([word.name for word in needed if word not in named])
        for word in named:
            self._check_goes_with(word, placed[:1])
        return [*placed, *options]

    def _may_be_path(self, argument: str, name: str) -> bool:
        """Whether `name=value`, which is none of the words, may be a folder's name: those of a sweep's runs look so."""
        if not any(word.many and word.path and word.positional for word in self.words):
            return False
        return os.path.exists(argument) or not nearest(name, [word.name for word in self.words])  # noqa: PTH110

    def _check_goes_with(self, word: Argument, first: list[str]) -> None:
        if word.only and not set(first) & set(word.only):
            raise ConfigError(
                f"{word.name} goes with {self.words[0].name}={' or '.join(word.only)}"
                f"{f', and {self.words[0].name} is {first[0]}' if first else ''}. "
                f"`longmix {self.name} -h` lists the words."
            )

    def _with_positional(self, positional: dict[str, list[str]], alone: list[str]) -> list[str]:
        """Give values without a name to the positional words that no name has filled."""
        if any(argument.startswith("-") for argument in alone):
            # `module` explains its options
            return [*(value for values in positional.values() for value in values), *alone]
        for name in positional:
            if not positional[name]:
                count = len(alone) if self._word(name).many else 1
                positional[name], alone = alone[:count], alone[count:]
                for value in positional[name]:
                    self._word(name).check(value)
        self._check_given(
            [name for name, values in positional.items() if not values and self._word(name).default == "???"]
        )
        if alone:
            raise ConfigError(f"{alone[0]} is a word too many. `longmix {self.name} -h` lists the words.")
        return [value for values in positional.values() for value in values]

    def _check_given(self, missing: list[str]) -> None:
        if missing:
            raise ConfigError(
                f"no value was given for: {', '.join(missing)}. `longmix {self.name} -h` lists the words."
            )

    def _word(self, name: str) -> Argument:
        return next(word for word in self.words if word.name == name)


def _option(word: Argument, value: str) -> list[str]:
    option = f"--{word.name.replace('_', '-')}"
    values = word.values(value)
    if word.switch:
        return [option] if value == "true" else []
    return [option, *values]


_CHECKPOINT = "folder of a run or of a checkpoint"

_GPUS = ("GB200", "B200", "H200", "H100 PCIe", "H100 NVL", "H100", "A100-SXM4-40GB", "A100", "L40S", "RTX 4090")
"""The table of accelerators, which would import torch."""

_COMMANDS = (
    Command("train", "train a language model whose sequence mixer is one word", hydra="train"),
    Command("evaluate", "evaluate a checkpoint, or all of a sweep", hydra="evaluate"),
    Command("generate", "generate text from a checkpoint", hydra="generate"),
    Command("prepare", "make the token files of a corpus ahead of training", hydra="prepare"),
    Command(
        "report",
        "runs side by side, as a table, one HTML page, pictures and data",
        module="longmix.reporting.__main__",
        words=(
            Argument(
                "folders", "folders of sweeps or runs; searched through", "???", positional=True, many=True, path=True
            ),
            Argument("output", "where the files go; null takes the first folder", path=True),
            Argument(
                "best",
                "settings such as optimizer.learning_rate; of runs that differ in them alone the best one is taken",
                many=True,
            ),
        ),
        examples=("longmix report runs", "longmix report multirun/DATE runs/NAME output=compared"),
    ),
    Command(
        "plan",
        "memory, traffic and time of a run on machines that need not be here",
        module="longmix.planning.__main__",
        words=(
            Argument("gpus", "how many of all machines together; null: trainer.devices times trainer.num_nodes"),
            Argument("gpu", "which; cpu is this machine", "H200", choices=(*_GPUS, "cpu")),
            Argument("teacher", "its mixer, with keep=, objective=layers or logits; all else is the model's", "flash"),
            Argument("output", "folder to write plan.json and plan.png to", path=True),
        ),
        besides="train",
        examples=(
            "longmix plan model=7b mixer=flash seq_len=65536 gpus=64",
            "longmix plan experiment=125m_16k gpu=H100 output=plan",
        ),
    ),
    Command(
        "export",
        "write a checkpoint as a folder that transformers loads",
        module="longmix.interop.huggingface.__main__",
        adds=("export",),
        words=(
            Argument("checkpoint", _CHECKPOINT, "???", positional=True, path=True),
            Argument(
                "folder", "to write; FILE.pth: RWKV-7 as its authors' code reads it", "???", positional=True, path=True
            ),
            Argument(
                "as",
                "the format; only longmix needs longmix to run",
                "auto",
                choices=("auto", "llama", "xlstm", "rwkv7", "gated_deltanet", "longmix"),
            ),
            Argument("dtype", "of the weights", "float32", choices=("float32", "bfloat16", "float16")),
            Argument("weights", "ema: averaged over the steps (loop.ema_decay)", "trained", choices=("trained", "ema")),
            Argument("force", "replace the folder if it is there", "false", switch=True),
        ),
        examples=("longmix export runs/NAME exported", "longmix export checkpoint=runs/NAME folder=exported as=llama"),
    ),
    Command(
        "import",
        "make a checkpoint of a Hugging Face folder",
        module="longmix.interop.huggingface.__main__",
        adds=("import",),
        words=(
            Argument(
                "folder",
                "with config.json, safetensors and tokenizer.json; or RWKV-7's FILE.pth",
                "???",
                positional=True,
                path=True,
            ),
            Argument("checkpoint", "folder to write the checkpoint to", "???", positional=True, path=True),
            Argument("separator", "the token that starts each document; null: the one that begins a text"),
            Argument(
                "missing_bytes",
                "what happens to characters that the tokenizer has no tokens for; null: refuse",
                choices=("refuse", "replace"),
            ),
            Argument(
                "tokenizer",
                "tokenizer.json, rwkv_vocab_v20230424.txt, a folder with one, or bytes; null: that beside the model",
                path=True,
            ),
        ),
        examples=(
            "longmix import SmolLM-135M runs/smol",
            "longmix import rwkv7.pth runs/rwkv tokenizer=rwkv_vocab_v20230424.txt",
        ),
    ),
    Command(
        "consolidate",
        "write a sharded checkpoint in one file",
        module="longmix.checkpoints.__main__",
        adds=("consolidate",),
        words=(
            Argument("checkpoint", f"{_CHECKPOINT}; of a run its newest one", "???", positional=True, path=True),
            Argument("output", "folder to make; null: the checkpoint's name with -whole", positional=True, path=True),
        ),
        examples=("longmix consolidate runs/NAME",),
    ),
    Command(
        "average",
        "write the mean of a run's last checkpoints as one",
        module="longmix.checkpoints.__main__",
        adds=("average",),
        words=(
            Argument("checkpoint", "folder of a run", "???", positional=True, path=True),
            Argument("last", "how many checkpoints, the newest", "???", whole=(1, LARGEST)),
            Argument("weights", "ema: averaged over the steps (loop.ema_decay)", "trained", choices=("trained", "ema")),
            Argument("output", "folder to make; null: average-of-LAST in the run's", path=True),
        ),
        examples=("longmix average runs/NAME last=5", "longmix average runs/NAME last=1 weights=ema output=mean"),
    ),
    Command(
        "share",
        "write a trained model whose layers share projections, or none again",
        module="longmix.share",
        words=(
            Argument("checkpoint", f"{_CHECKPOINT}; of a run its newest one", "???", positional=True, path=True),
            Argument("names", "projections that all layers share, such as [query,key,value]", many=True),
            Argument("atoms", "matrices of each name, fewer than layers", whole=(1, LARGEST)),
            Argument("undo", "give all layers weights of their own again", "false", switch=True),
            Argument("weights", "ema: averaged over the steps (loop.ema_decay)", "trained", choices=("trained", "ema")),
            Argument("output", "folder to make; null: the checkpoint's name with -shared, or -own", path=True),
        ),
        examples=("longmix share runs/NAME names=[query,key,value] atoms=4", "longmix share runs/NAME undo=true"),
    ),
    Command(
        "audit",
        "whether a checkpoint's model and each of its mixers are causal",
        hydra="evaluate",
        adds=("task=causality",),
    ),
    Command(
        "kernels",
        "compile the GPU kernels without a GPU: registers, memory, faults",
        module="longmix_kernels.report",
        words=(
            Argument("engine", "null: all", positional=True, choices=("attention", "linear", "delta", "scatter")),
            Argument(
                "arch",
                "architectures, as sm_80 is 80",
                f"[{','.join(_ARCHITECTURES)}]",
                many=True,
                choices=_ARCHITECTURES,
            ),
            Argument("dtype", "of the inputs", "bf16", choices=("bf16", "fp16", "fp32")),
            Argument("cost_only", "compile nothing", "false", switch=True),
            Argument("json", "a file for the records", file=True),
            Argument("dim", "head dimensions, 1 to 256", many=True, whole=(1, 256), only=("attention",)),
            Argument(
                "mode",
                "where bounds come from",
                "causal",
                many=True,
                choices=("full", "causal", "window", "documents", "bounds"),
                only=("attention",),
            ),
            Argument(
                "feature",
                "what a call has besides; attention takes the first five, ragged to decode; others plain and the last",
                "plain",
                many=True,
                choices=("plain", "permuted", "alibi", "blocks", "ragged", "documents", "state", "documents-state"),
                only=("attention", "linear", "delta"),
            ),
            Argument(
                "dims",
                "head dimensions of keys and values, such as 64/128",
                many=True,
                pair=(1, 512),
                only=("linear", "delta"),
            ),
            Argument("gate", "of the input", "[exp,sig]", many=True, choices=("exp", "sig"), only=("linear",)),
            Argument("states", "how states are stored", "fp32", choices=("fp32", "bf16"), only=("linear",)),
            Argument(
                "decay",
                "of the state: of channels with a bound or without, or of heads",
                "[bounded,exact,head]",
                many=True,
                choices=("bounded", "exact", "head"),
                only=("delta",),
            ),
            Argument(
                "form", "of the transitions", "low-rank", many=True, choices=("low-rank", "diagonal"), only=("delta",)
            ),
            Argument(
                "sizes",
                "features and head dimension of values, such as 64/64",
                many=True,
                pair=(0, 256),
                only=("scatter",),
            ),
            Argument("block", "tokens of a block", "[64,128,256]", many=True, whole=(1, LARGEST), only=("scatter",)),
        ),
        examples=("longmix kernels", "longmix kernels engine=attention arch=90 dim=[64,128]"),
    ),
)

CATALOGUE = {command.name: command for command in _COMMANDS}
"""The commands by name, in the order of the help."""


def overview() -> str:
    """The text that `longmix` alone prints."""
    width = max(map(len, CATALOGUE))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in CATALOGUE.items()]
    return "\n".join(
        [
            "longmix trains language models at 8k-64k context and lets one word choose what mixes the sequence.",
            "",
            "  longmix train mixer=flash seq_len=16384",
            "",
            "Commands",
            *lines,
            "",
            "`longmix COMMAND -h` lists the words of a command, `longmix --version` the versions.",
        ]
    )
