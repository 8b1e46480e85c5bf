"""Data sets of the Hugging Face hub, of folders in its layout, and of storage."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longmix.data.corpora.corpus import CountedReading, Reading, SplitByContent, check_split
from longmix.data.corpora.hub_access import hub_access
from longmix.data.corpora.record_files import RecordFiles, downloaded, files_of_split, of_builder, text_alone
from longmix.data.corpora.records import texts_of
from longmix.data.corpora.retry import reason_of
from longmix.data.corpora.stream import TOGETHER, Limit, Stream, StreamReading, identify_stream
from longmix.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


class HubDataset(SplitByContent):
    """A data set of the Hugging Face hub, downloaded and cached by `datasets`, or streamed; or a local folder in its
    layout; or files at URLs that `fsspec` knows.

    Streamed, records are read as they come and nothing of them is stored; see `longmix.data.corpora.stream`. The
    documents and their order are the same. A branch is followed to its commit, which is part of what
    identifies the corpus.

    Args:
        name: such as "allenai/c4"; with `data_files` also a format: "parquet", "json", "csv", "text".
        config: configuration of the data set, where it has several.
        field: the field that holds the text. A null one counts as an empty document.
        revision: branch, tag or commit; give a commit for a run that can be repeated.
        train: the hub's name of the split to train on.
        validation: the hub's name of the validation split; without it, `validation_fraction` of `train` is held out.
        test: the hub's name of the test split; without it, `test_fraction` of `train` is held out.
        validation_fraction: share of the documents of `train` held out for validation, chosen by their content.
        test_fraction: share held out for test.
        streaming: read records as they come.
        data_files: paths, patterns or URLs, of the `train` split or by the hub's name of the split.
        max_documents: take the first so many documents of each of the hub's splits; what is held out counts in
            `train`.
        max_bytes: likewise until the texts have so many bytes in UTF-8.

    Raises:
        ConfigError: a fraction or limit is impossible.
        DataError: from the methods: the data set cannot be read.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        field: str = "text",
        revision: str | None = None,
        train: str = "train",
        validation: str | None = None,
        test: str | None = None,
        validation_fraction: float = 0.005,
        test_fraction: float = 0.0,
        streaming: bool = False,
        data_files: str | list[str] | dict[str, Any] | None = None,
        max_documents: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        sources = {"train": train, "validation": validation, "test": test}
        super().__init__(sources, validation_fraction, test_fraction)
        if name == "pandas":
            raise ConfigError("data.corpus.name=pandas reads pickles, which can run any code; use parquet or json.")
        self.name = name
        self._config = config
        self._field = field
        self._revision = revision
        self._streaming = streaming
        self._data_files = data_files
        self._limit = Limit(max_documents, max_bytes)
        self._loaded: dict[str, Any] = {}
        self._builder: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_builder": None}

    def parts(self, split: str) -> int:
        """The number of files of a stream; 1 with a limit, because only reading in order shows where it falls."""
        check_split(self, split)
        return self._stream(self._source(split)).num_files if self._streaming and not self._limit.as_dict() else 1

    def read(self, split: str, part: int, position: Any = None) -> Reading:
        """The documents of a part, from a position on."""
        if not self._streaming:
            return CountedReading(self, split, position)
        stream = self._stream(self._source(split))
        numbers = range(stream.num_files) if self.parts(split) == 1 else range(part, part + 1)
        if split != "train" and split in self._sources:
            return StreamReading(stream, numbers, self._limit, position=position)
        return StreamReading(stream, numbers, self._limit, lambda text: self._split_of(text) == split, position)

    def _source(self, split: str) -> str:
        return self._sources.get(split, self._sources["train"])

    def _compute_fingerprint(self) -> dict[str, Any]:
        settings = {"name": self.name, "config": self._config, "field": self._field, **self._limit.as_dict()}
        # What is streamed is known by its commit, whatever branch led there.
        how = {"streaming": True} if self._streaming else {"revision": self._revision}
        return {**super()._compute_fingerprint(), **settings, **how}

    def _identify(self, source: str) -> dict[str, Any]:
        if self._streaming:
            return {"split": source, **self._load(source)[1]}
        records = self._load(source)
        if isinstance(records, RecordFiles):  # the same as of a table of these files
            fingerprint = self._opened_builder()._get_dataset_fingerprint(source)
            return {"split": source, **records.identity(), "fingerprint": fingerprint}
        return {"split": source, "rows": len(records), "fingerprint": records._fingerprint}

    def _read(self, source: str) -> Iterator[str]:
        if self._streaming:
            stream = self._stream(source)
            return iter(StreamReading(stream, range(stream.num_files), self._limit))
        records = self._load(source)
        if isinstance(records, RecordFiles):
            return self._limit.take(records.texts())
        if self._field in records.column_names:
            records = records.select_columns([self._field])
        return self._limit.take(texts_of(records, self._field, self._source_name(source)))

    def _source_name(self, source: str) -> str:
        return f"split {source!r} of {self.name}"

    def _stream(self, source: str) -> Stream:
        return self._load(source)[0]

    def _load(self, source: str) -> Any:
        if source not in self._loaded:
            with hub_access(self._data_files is None and not Path(self.name).exists()) as unreachable:
                try:
                    self._loaded[source] = self._open_stream(source) if self._streaming else self._download(source)
                except DataError:
                    raise
                except Exception as error:  # hub, network and readers each raise their own kinds
                    reason = f"{unreachable}, and no copy is in the cache" if unreachable else reason_of(error)
                    raise DataError(
                        f"cannot load split {source!r} of the data set {self.name!r} from the Hugging Face hub: "
                        f"{reason}. Check the name and the network; without one, save the texts as files and use "
                        "data=text, data=jsonl or data=parquet with data.corpus.path=<those files>."
                    ) from error
                if unreachable:
                    logger.warning("%s; the copy of %s in the cache is used", unreachable, self.name)
        return self._loaded[source]

    def _download(self, source: str) -> Any:
        from datasets import load_dataset

        builder = self._opened_builder()
        files = downloaded(builder, source, self._field, self._source_name(source))
        if files is not None:
            return files
        return load_dataset(self.name, self._config, split=source, **self._origin())

    def _opened_builder(self) -> Any:
        if self._builder is None:
            from datasets import load_dataset_builder

            self._builder = load_dataset_builder(self.name, self._config, **self._origin())
        return self._builder  # of all splits, so that they are of one commit

    def _open_stream(self, source: str) -> tuple[Stream, dict[str, Any]]:
        builder = self._opened_builder()
        if of_builder(builder, [], self._field, "") is not None:
            files = files_of_split(builder, source)
            read = of_builder(builder, files, self._field, self._source_name(source))
            return Stream(read, files, self._field, self._source_name(source)), identify_stream(files)
        text_alone(builder, self._field)
        records = builder.as_streaming_dataset(split=source)
        if self._field in (records.column_names or ()) and hasattr(builder.config, "columns"):
            # Parquet: nothing but the text comes over the network, and not a whole row group at a time.
            builder.config.columns, builder.config.batch_size = [self._field], TOGETHER
            records = builder.as_streaming_dataset(split=source)
        files = list(builder.config.data_files[source])
        return Stream(records, files, self._field, self._source_name(source)), identify_stream(files)

    def _origin(self) -> dict[str, Any]:
        files = {} if self._data_files is None else {"data_files": self._data_files}
        return {"revision": self._revision, **files}
