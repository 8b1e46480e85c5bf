"""`Subject`, the input of every task: model, data, the words of the command line, and a folder for results."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from longmix.batch import Batch
from longmix.config import EvaluateConfig
from longmix.data.training_data import TrainingData
from longmix.errors import ConfigError, DataError
from longmix.evaluation import provenance
from longmix.evaluation.loss import to_device
from longmix.evaluation.memory import check_memory
from longmix.evaluation.statistics import LossStatistics
from longmix.files import replace_json, storage_errors
from longmix.model.backbone import LanguageModel
from longmix.printable import printable
from longmix.progress import tracked
from longmix.restore import Restored
from longmix.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        restored: the model and what came with it.
        data: gives batches of any split and length.
        config: the words of `evaluate.py`.
        output: folder for results.
        own_data: the data are those that the checkpoint was trained on.
    """

    restored: Restored
    data: TrainingData
    config: EvaluateConfig
    output: Path
    own_data: bool = True

    @property
    def model(self) -> LanguageModel:
        """The model, in evaluation mode; a task that changes it takes a copy."""
        return self.restored.model

    @property
    def step(self) -> int:
        """The checkpoint's step."""
        return self.restored.step

    @property
    def split(self) -> str:
        """The split asked for."""
        return self.config.split

    @property
    def trained_seq_len(self) -> int:
        """Tokens in a training window of the checkpoint."""
        return self.restored.config.seq_len

    def seq_lens(self) -> list[int]:
        """The context lengths asked for, shortest first."""
        asked = self.config.seq_len
        if asked is None:
            return [self.trained_seq_len]
        return sorted(set(asked if isinstance(asked, list) else [asked]))

    def checked_seq_lens(self) -> list[int]:
        """`seq_lens`, each of which the split and this machine have room for.

        Raises:
            DataError: the split has fewer tokens than a length, or there is no such split.
            ConfigError: the memory that is free does not hold a row.
        """
        lengths = self.seq_lens()
        for length in lengths:
            self.check_length(length, "seq_len")
            self.check_memory(length, "seq_len")
        return lengths

    def check_length(self, length: int, key: str) -> None:
        """Refuse windows longer than the split; those of the trained length are padded instead.

        Raises:
            DataError: names both numbers, or says that there is no such split.
        """
        tokens = self.data.content(self.split)["tokens"]
        if tokens is not None and length > max(tokens, self.trained_seq_len):
            raise DataError(
                f"{key}={length} is more than the {self.split} split of {self.data.label} has, "
                f"{counted(tokens, 'token')}; give "
                f"at most {max(tokens, self.trained_seq_len)}, or data with more text."
            )

    def check_memory(self, length: int, key: str) -> None:
        """Refuse windows whose activations cannot fit into the memory that is free.

        Args:
            length: tokens of a window.
            key: the word or setting that gave it.

        Raises:
            ConfigError: names the numbers.
        """
        tokens = min(self.rows(length), self.windows(length)) * length
        check_memory(self.model, tokens, self.restored, f"{key}={length}")

    def windows(self, length: int) -> int:
        """The number of windows of a length that are evaluated."""
        limit, stride = self.config.max_tokens, self.config.stride
        try:
            if stride is None:
                return len(self.data.evaluation_windows(self.split, length, limit))
            return len(self.data.strided_windows(self.split, length, limit, stride))
        except OverflowError as error:
            raise ConfigError(f"max_tokens={self.config.max_tokens} is more than can be counted.") from error

    def rows(self, seq_len: int) -> int:
        """Windows of a length that are evaluated at once."""
        return self.config.batch_size or max(1, TOKENS_AT_ONCE // seq_len)

    def batches(self, seq_len: int, data: TrainingData | None = None) -> Iterator[Batch]:
        """Windows of the split, of the subject's data or of others, on the model's device and beneath a progress bar.

        Raises:
            DataError: there is no such split, or not one window of it.
        """
        data = self.data if data is None else data
        words = self.config
        loader = data.evaluation_loader(self.split, seq_len, self.rows(seq_len), words.max_tokens, stride=words.stride)
        for batch in tracked(loader, f"seq_len {seq_len}", len(loader)):
            yield to_device(batch, self.restored.device)

    def loss_statistics(self, seq_len: int) -> LossStatistics:
        """Sums for the losses of windows of that length, on the model's device."""
        return LossStatistics(torch.as_tensor(self.data.token_bytes), seq_len, self.restored.device)

    def heading(self) -> dict[str, Any]:
        """The heading of a report: its model and split."""
        facts = {"split": self.split, "step": self.step, "trained_seq_len": self.trained_seq_len}
        return facts | {"precision": self.restored.precision}

    def stride_used(self) -> dict[str, int]:
        """The word `stride` if it was given, for the settings of a result."""
        return {} if self.config.stride is None else {"stride": self.config.stride}

    def save(
        self,
        task: str,
        report: dict[str, Any],
        figure: "Figure | None",
        settings: dict[str, Any],
        of_data: bool = True,
    ) -> None:
        """Write a result as JSON and, of a figure, as PNG into the folder for results, and say so.

        The file says besides the report of which weights, data, settings, versions and day it is, and its name differs
        from that of every other result but an earlier one of the very same (`longmix.evaluation.provenance`).

        Args:
            task: the name begins with it.
            report: results.
            figure: to draw.
            settings: of the task, and the words that it went by.
            of_data: the task has read the split.

        Raises:
            StorageError: they cannot be written.
        """
        from longmix.reporting.plots import save_figure
        from longmix.versions import versions

        facts: dict[str, Any] = provenance.model_facts(self.restored, self.config.states)
        if of_data:
            facts |= provenance.data_facts(self.data, self.split, self.own_data)
        facts |= {"task": task, "settings": settings, "versions": versions(), "date": provenance.now()}
        name = provenance.file_name(task, facts)
        with storage_errors(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        written = f"wrote {self.output / name}.json"
        if figure is not None:
            save_figure(figure, self.output / f"{name}.png")
            written += f" and {name}.png"
        replace_json(self.output / f"{name}.json", facts | report)
        Console().print(printable(written), highlight=False, markup=False, soft_wrap=True)
