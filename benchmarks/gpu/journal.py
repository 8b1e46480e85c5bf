"""One line for each result, on disk before the next case begins."""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import PASSED, SKIPPED, Result

FILE = "gpu.jsonl"


class Journal:
    """The results of a folder, of this command and of those before it.

    Args:
        path: the file; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Result] = {}
        self.environments: list[Mapping[str, Any]] = []
        self._lock = threading.Lock()
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return  # the last line of a command that was killed while it wrote
        if "environment" in record:
            self.environments.append(record["environment"])
        else:
            result = Result(**record)
            self.results[result.case] = result

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Say under what circumstances what follows is found."""
        self.environments.append(environment)
        self._write({"environment": environment})

    def add(self, result: Result) -> None:
        """Keep a result; the latest of a case counts."""
        self.results[result.case] = result
        self._write(result.record())

    def is_done(self, name: str) -> bool:
        """Whether a case need not be done again: it passed, or there is nothing to do for it here."""
        return name in self.results and self.results[name].status in (PASSED, SKIPPED)

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, sort_keys=True, default=str)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            if self._is_torn():
                file.write("\n")
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _is_torn(self) -> bool:
        """Whether a command was killed in the middle of its last line."""
        content = self.path.read_bytes()
        return bool(content) and not content.endswith(b"\n")
