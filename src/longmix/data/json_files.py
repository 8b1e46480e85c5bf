"""Files of JSON on this machine or at URLs, read record by record; what `datasets` would guess a schema for."""

from collections.abc import Iterator, Sequence
from typing import Any

from longmix.data.records import texts_of_json, uncompressed

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


class JsonFiles:
    """The records of some files, each with nothing but its text; small to pickle.

    Args:
        files: paths or URLs that `fsspec` knows; the end of each tells its compression.
        field: the field that holds the text.
        place: for messages.
        names: of the files, where they lie under other names, such as in a cache.
    """

    def __init__(self, files: Sequence[str], field: str, place: str, names: Sequence[str] | None = None) -> None:
        self._files, self._field, self._place = list(files), field, place
        self._names = self._files if names is None else list(names)

    @property
    def num_shards(self) -> int:
        """How many files there are."""
        return len(self._files)

    def shard(self, num_shards: int, index: int) -> "JsonFiles":
        """One of the files; as `IterableDataset.shard` for as many shards as there are files."""
        if num_shards != self.num_shards:
            raise ValueError(f"{self.num_shards} files cannot be divided into {num_shards} shards")
        return JsonFiles([self._files[index]], self._field, self._place, [self._names[index]])

    def texts(self) -> Iterator[str]:
        """The documents of all files.

        Raises:
            DataError: a file is damaged or has no such field; names file and line.
        """
        import fsspec

        for file, name in zip(self._files, self._names, strict=True):
            with fsspec.open(file, "rb") as stream, uncompressed(stream, name) as content:
                yield from texts_of_json(content, self._field, f"{name} of {self._place}")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The documents of all files as records."""
        return ({self._field: text} for text in self.texts())


def reads_json(builder: Any) -> bool:
    """Whether a builder of `datasets` reads whole files of JSON, and no archives of these."""
    config = builder.config
    if type(config).__name__ != "JsonConfig" or getattr(config, "field", None) is not None:
        return False
    files = [file for files in (config.data_files or {}).values() for file in files]
    return bool(files) and not any(str(file).lower().endswith(ARCHIVES) or "::" in str(file) for file in files)


def files_of_split(builder: Any, split: str) -> list[str]:
    """The files of a split.

    Raises:
        ValueError: there is no such split.
    """
    files = builder.config.data_files
    if split not in files:
        raise ValueError(f"Bad split: {split}. There are {', '.join(map(str, files))}")
    return [str(file) for file in files[split]]


def downloaded_json(builder: Any, split: str, field: str, place: str) -> JsonFiles:
    """The files of a split in the cache of `datasets`, downloaded if they are not there."""
    from datasets import DownloadConfig, DownloadManager

    files = files_of_split(builder, split)
    manager = DownloadManager(builder.dataset_name, download_config=DownloadConfig(token=builder.token))
    return JsonFiles([str(path) for path in manager.download(files)], field, place, files)
