"""The mean of a run's last checkpoints, which often is a better model than the last one (Izmailov et al. 2018, SWA,
arXiv 1803.05407; as a soup of checkpoints Llama 3 and OLMo end with it)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.checkpoints.find import is_checkpoint
from longmix.checkpoints.load import Checkpoint, open_checkpoint
from longmix.checkpoints.store import CheckpointStore
from longmix.checkpoints.tensors import AVERAGED, join
from longmix.checkpoints.verify import INFO_FILE, WHOLE, read_info
from longmix.checkpoints.whole import write_whole
from longmix.errors import CheckpointError, ConfigError
from longmix.files import atomic_directory, check_folder, write_json
from longmix.progress import bytes_bar
from longmix.reading import shortened
from longmix.wording import counted

KEPT = ("step", "config", "tokenizer", "data_fingerprint", "versions")
"""The entries of the newest checkpoint that the mean has; no run goes on from it, so nothing of one is there."""

SAME = ("model", "mixer", "tokenizer")
"""Settings that all have alike."""


def last_checkpoints(run: Path | str, count: int) -> list[Path]:
    """The newest `count` checkpoints of a run, oldest first; between them none was deleted.

    Raises:
        ConfigError: a count below 1, or the folder of a checkpoint.
        CheckpointError: the run has fewer.
    """
    run = Path(run)
    if count < 1:
        raise ConfigError(f"last={count} must be at least 1.")
    if is_checkpoint(run):
        raise ConfigError(f"{run} is one checkpoint; give the folder of a run, whose last ones are averaged.")
    stores = [CheckpointStore(folder) for folder in (run / "checkpoints", run)]
    store = next((store for store in stores if store.all()), stores[0])
    found = store.in_a_row()
    if len(found) < count:
        older = len(store.all()) - len(found)
        best = f" and {counted(older, 'older one')}, between which others were deleted" if older else ""
        raise CheckpointError(
            f"{run} holds {counted(len(found), 'checkpoint')}{best}, and last={count} needs so many: give a smaller "
            f"number, or train with loop.keep_checkpoints={count}."
        )
    return found[-count:]


def average(checkpoints: list[Path], target: Path | str, weights: str = "trained") -> None:
    """Write the mean of the weights of several checkpoints as one, from which models are loaded and new runs begin.

    It is formed tensor by tensor in float64, so that memory has one model and a tensor. Numbers that are no fractions,
    such as counts, are those of the last one.

    Args:
        checkpoints: their folders, the newest last.
        target: the folder to make.
        weights: "trained", or "ema" for the averages over the steps in each.

    Raises:
        CheckpointError: one is damaged, or has no averages.
        ConfigError: they are of different models, or the target is there.
        StorageError: the target cannot be written.
    """
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} is there already; give another folder.")
    check_folder(target.parent)
    opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
    newest = opened[-1]
    contents = [checkpoint.rest() for checkpoint in opened]
    aliases = {name: other for name, other in newest.aliases().items() if name.startswith("model/")}
    names = [name for name in newest.shapes if name.startswith("model/") and name not in aliases]
    for checkpoint, content in zip(opened, contents, strict=True):
        _check_same(checkpoint, content, newest, contents[-1])
        if weights == "ema" and not any(name.startswith(f"{AVERAGED}/") for name in checkpoint.shapes):
            raise CheckpointError(f"{checkpoint.checkpoint} has no averaged weights; its run had no loop.ema_decay.")
        checkpoint.verify()
    size = len(opened) * sum(newest.shapes[name].numel() * newest.dtypes[name].itemsize for name in names)
    with bytes_bar(f"averaging {len(opened)} checkpoints", size) as advance:
        means: dict[str, Tensor] = {}
        for name in names:
            means[name] = _mean(opened, name, weights)
            advance(len(opened) * means[name].nbytes)
    rest: dict[str, Any] = {key: contents[-1][key] for key in KEPT if key in contents[-1]}
    state = join(means | {name: means[other] for name, other in aliases.items()}, rest | {"model": {}})
    steps = [content["step"] for content in contents]
    info = {"format": WHOLE, "step": steps[-1], "averaged": {"steps": steps, "weights": weights}}
    about = {key: value for key, value in read_info(checkpoints[-1]).items() if key in ("tokens", "stage")}
    with atomic_directory(target) as folder, bytes_bar(f"writing {target}", size // len(opened)) as advance:
        facts = write_whole(folder, state, advance)
        write_json(folder / INFO_FILE, about | {"validation": {}} | info | facts)


def _mean(checkpoints: list[Checkpoint], name: str, weights: str) -> Tensor:
    averaged = name.replace("model/", f"{AVERAGED}/", 1)
    total = torch.zeros(())
    dtype = checkpoints[-1].dtypes[name]
    for checkpoint in checkpoints:
        own = averaged if weights == "ema" and averaged in checkpoint.shapes else name
        part = torch.empty(checkpoint.shapes[own], dtype=checkpoint.dtypes[own])
        checkpoint.read({own: part})
        if not dtype.is_floating_point:
            total = part
        else:
            total = part.double() if checkpoint is checkpoints[0] else total.add_(part)
    return total.div_(len(checkpoints)).to(dtype) if dtype.is_floating_point else total


def _check_same(checkpoint: Checkpoint, content: dict[str, Any], newest: Checkpoint, wanted: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model than the newest one's.

    Raises:
        ConfigError: names what differs.
    """
    config, other = (part.get("config", {}) for part in (content, wanted))
    for key in SAME:
        if config.get(key) != other.get(key):
            raise ConfigError(f"{checkpoint.checkpoint} is of another {key} than {newest.checkpoint}: no mean of both.")
    for name, shape in newest.shapes.items():
        if name.startswith("model/") and checkpoint.shapes.get(name) != shape:
            raise ConfigError(
                f"{checkpoint.checkpoint} is of another model than {newest.checkpoint}: "
                f"{shortened(name.removeprefix('model/'))} differs in shape."
            )
