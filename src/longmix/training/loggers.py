"""Logs of metrics. Neither a lost remote logger nor a full disk ends a run."""

import contextlib
import csv
import io
import logging
import secrets
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from longmix.files import storage_errors
from longmix.metrics import METRICS_FILE, Metrics, read_cells

INIT_TIMEOUT_SECONDS = 30

Row = Mapping[str, Any]
"""A row of the file: a number or its text by column."""

log = logging.getLogger(__name__)


class MetricLog(Protocol):
    """Receives rows of metrics."""

    def open(self, folder: Path, config: Mapping[str, object], name: str, first_step: int) -> None:
        """Begin, or continue after `first_step` rows of steps that count."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Record metrics of one step; a step may be written several times with different metrics."""

    def close(self, exit_code: int) -> None:
        """Finish; 0 for a run that ended well."""

    def upload_command(self) -> str | None:
        """The command that uploads metrics kept on this machine; None if there is nothing to upload."""


class NoLog:
    """Keeps nothing."""

    def open(self, folder: Path, config: Mapping[str, object], name: str, first_step: int) -> None:
        """Do nothing."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Do nothing."""

    def close(self, exit_code: int) -> None:
        """Do nothing."""

    def upload_command(self) -> str | None:
        """None: nothing is kept."""
        return None


class CsvLog:
    """`metrics.csv` in the run's folder: a row per call, a column per metric, empty where a row has none.

    A resumed run drops the rows of steps it will take again, so that every step stands there once. Rows that cannot be
    written wait in memory: a full disk ends a run where its checkpoints are written, not here.
    """

    def __init__(self) -> None:
        self.path = Path()
        self.columns: list[str] = []
        self._first_step = 0
        self._waiting: list[Row] = []

    def open(self, folder: Path, config: Mapping[str, object], name: str, first_step: int) -> None:
        """Begin the file, or continue it after `first_step`.

        Raises:
            StorageError: the file cannot be written; nothing is trained yet.
        """
        self.path, self._first_step = folder / METRICS_FILE, first_step
        with storage_errors(self.path):
            rows = [row for row in read_cells(folder) if int(row["step"]) <= first_step] if first_step else []
            self.columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
            self._rewrite(rows)

    def write(self, step: int, metrics: Metrics) -> None:
        """Record metrics of one step."""
        if step == self._first_step:
            with contextlib.suppress(OSError):
                self._drop(step, metrics)
        self._waiting.append({"step": step, **metrics})
        try:
            self._append()
        except OSError as error:
            if len(self._waiting) == 1:
                log.warning("%s cannot be written: %s; training goes on.", self.path, error.strerror or error)
        else:
            self._waiting = []

    def _drop(self, step: int, metrics: Metrics) -> None:
        """Drop rows of steps that will be taken again: a kill may come between a row and the checkpoint of its step."""
        rows = read_cells(self.path.parent)
        kept = [row for row in rows if int(row["step"]) != step or not any(row.get(key) for key in metrics)]
        if len(kept) < len(rows):
            self._rewrite(kept)

    def _append(self) -> None:
        new = list(dict.fromkeys(key for row in self._waiting for key in row if key not in self.columns))
        if new:
            columns = self.columns
            try:
                self.columns = columns + new
                self._rewrite(read_cells(self.path.parent))
            except OSError:
                self.columns = columns
                raise
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="").writerows(self._waiting)
        with self.path.open("ab", buffering=0) as stream:
            size = stream.tell()
            content = text.getvalue().encode()
            try:
                while content:
                    content = content[stream.write(content) :]
            except OSError:
                stream.truncate(size)  # a row that is cut short would spoil the next one
                raise

    def _rewrite(self, rows: Sequence[Row]) -> None:
        temporary = self.path.with_suffix(".csv.tmp")
        try:
            with temporary.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, self.columns, restval="")
                writer.writeheader()
                writer.writerows(rows)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def close(self, exit_code: int) -> None:
        """Do nothing: every row that could be written is on the disk already."""

    def upload_command(self) -> str | None:
        """None: the file is where it should be."""
        return None


class WandbLog(CsvLog):
    """The CSV file, and a Weights & Biases run that falls back to offline, then to nothing, but never fails.

    Args:
        project: the project's name.
        entity: user or team; None takes the account's own.
        mode: "auto" is online where an API key is known, else offline.
        tags: tags of the run.
    """

    def __init__(
        self,
        project: str = "longmix",
        entity: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        tags: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.project, self.entity, self.mode, self.tags = project, entity, mode, tags
        self.run: Any = None

    def open(self, folder: Path, config: Mapping[str, object], name: str, first_step: int) -> None:
        """Begin both logs. The run's id is kept in `wandb_id.txt`, so that a resumed run continues it."""
        super().open(folder, config, name, first_step)
        try:
            self.run = self._started(folder, config, name)
        except Exception as error:
            log.warning("wandb did not start (%s); metrics go to %s alone.", error, self.path)

    def _started(self, folder: Path, config: Mapping[str, object], name: str) -> Any:
        if self._goes_online():
            try:
                return self._init("online", folder, config, name)
            except Exception as error:
                log.warning("wandb cannot go online (%s); `wandb sync` can upload this run later.", error)
        return self._init("offline", folder, config, name)

    def _goes_online(self) -> bool:
        if self.mode != "auto":
            return self.mode == "online"
        import wandb

        return wandb.login(prompt=False, verify=False)

    def _init(self, mode: Literal["online", "offline"], folder: Path, config: Mapping[str, object], name: str) -> Any:
        import wandb

        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,
            tags=self.tags,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            name=name,
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_SECONDS),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def write(self, step: int, metrics: Metrics) -> None:
        """Record metrics of one step."""
        super().write(step, metrics)
        if self.run is not None:
            try:
                self.run.log({"step": step, **metrics})
            except Exception as error:
                log.warning("wandb stopped (%s); metrics go on to %s.", error, self.path)
                self.run = None

    def close(self, exit_code: int) -> None:
        """Finish both logs; 0 for a run that ended well."""
        if self.run is not None:
            try:
                self.run.finish(exit_code=exit_code)
            except Exception as error:
                log.warning("wandb did not finish (%s); metrics are in %s.", error, self.path)
            self.run = None

    def upload_command(self) -> str | None:
        """The command that sends all that this run logged offline; None if there is nothing to send."""
        if self.path == Path():  # not opened, as nothing was left to do
            return None
        if not any(self.path.parent.glob("wandb/offline-run-*")):
            return None
        folder = self.path.parent
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        return f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"
