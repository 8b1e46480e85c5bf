"""Layouts of token files that other programs wrote, and where the tokens lie in such a file.

| format | written by | how it is known |
|---|---|---|
| megatron | Megatron-LM, RWKV's binidx tools | X.idx beside X.bin, which begins with MMIDIDX |
| llmc | llm.c, modded-nanogpt | 256 numbers of 4 bytes, the first one 20240520 (uint16) or 20240801 (uint32) |
| npy | NumPy | begins with \\x93NUMPY |
| raw | OLMo (named .npy), nanoGPT | tokens and nothing else, so that somebody must say their type |
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longmix.errors import ConfigError, DataError
from longmix.reading import require_regular

FORMATS = ("auto", "megatron", "llmc", "npy", "raw")
SUFFIXES = (".bin", ".npy")

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Of a Megatron index: magic, version, code of the type, sequences, entries of the list of documents."""
INDEX_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}

LLMC_HEADER = struct.Struct("<iii1012x")
"""Magic, version, tokens; zeros up to 1,024 bytes."""
LLMC_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
LLMC_MAGICS = (20240520, 20240801)

NUMPY_MAGIC = b"\x93NUMPY"
DTYPES = ("auto", "uint16", "uint32")
MOST_IDS_UINT16 = 1 << 16


@dataclass(frozen=True)
class Place:
    """Where the tokens of a file lie; small to pickle.

    Attributes:
        path: the file.
        format: one of `FORMATS`, without auto.
        dtype: of the tokens, as NumPy writes it.
        offset: byte of the file at which the tokens begin.
        count: how many there are.
    """

    path: Path
    format: str
    dtype: str
    offset: int
    count: int

    def map(self) -> np.ndarray:
        """The tokens, memory-mapped.

        Raises:
            DataError: the file is gone, or shorter than it was.
        """
        dtype = np.dtype(self.dtype)
        try:
            if os.stat(self.path).st_size < self.offset + self.count * dtype.itemsize:  # noqa: PTH116
                raise DataError(f"{self.path} was cut short while it was in use.")
            return np.memmap(self.path, dtype=dtype, mode="r", offset=self.offset, shape=(self.count,))
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error


def index_of(path: Path) -> Path:
    """The index that Megatron writes beside a file of tokens."""
    return path.with_suffix(".idx")


def place_of(path: Path, wanted: str, dtype: str, vocab_size: int) -> Place:
    """Where the tokens of a file lie.

    Args:
        path: the file.
        wanted: one of `FORMATS`.
        dtype: one of `DTYPES`, for tokens without a header; "auto" takes uint16 up to a vocabulary of 65,536 ids.
        vocab_size: of the tokenizer.

    Raises:
        DataError: the file is not of that format, damaged or cut short; or "auto" cannot know the format.
    """
    try:
        require_regular(path)
        kind = _kind(path) if wanted == "auto" else wanted
        place = _READERS[kind](path) if kind != "raw" else _raw(path, dtype, vocab_size)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    if np.dtype(place.dtype).kind not in "iu":
        raise DataError(f"{path} holds numbers of type {np.dtype(place.dtype)}, and tokens are whole numbers.")
    if not place.count:
        raise DataError(f"{path} holds no tokens.")
    return place


def _kind(path: Path) -> str:
    if index_of(path).exists():
        return "megatron"
    with path.open("rb") as stream:
        begin = stream.read(len(NUMPY_MAGIC))
    if begin == NUMPY_MAGIC:
        return "npy"
    if int.from_bytes(begin[:4], "little") in LLMC_MAGICS:
        return "llmc"
    if path.suffix.lower() == ".npy":  # OLMo writes no header
        return "raw"
    raise DataError(
        f"{path}: its format cannot be told. There is no {index_of(path).name} beside it (megatron), and it begins "
        "neither as llm.c's files nor as NumPy's. If it holds tokens and nothing else, give data.corpus.format=raw and "
        "data.corpus.dtype."
    )


def _megatron(path: Path) -> Place:
    with index_of(path).open("rb") as stream:
        code = _index_header(index_of(path), stream.read(INDEX_HEADER.size))[0]
    dtype = np.dtype(INDEX_TYPES[code])
    lengths, _ = read_index(path)
    return Place(path, "megatron", dtype.str, 0, _exactly(path, 0, int(lengths.sum()), dtype, index_of(path).name))


def _index_header(index: Path, header: bytes) -> tuple[int, int, int]:
    """Code of the type, sequences, entries of the list of documents."""
    if len(header) < INDEX_HEADER.size or header[: len(INDEX_MAGIC)] != INDEX_MAGIC:
        raise DataError(f"{index} is no index of Megatron's format: it does not begin with MMIDIDX.")
    _, version, code, sequences, documents = INDEX_HEADER.unpack(header)
    if version != 1 or code not in INDEX_TYPES:
        raise DataError(f"{index} has version {version} and type {code} of Megatron's format; known are 1, and 1 to 8.")
    return code, sequences, documents


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the index beside a file says: the length of each sequence, and which sequence each document begins with.

    Returns:
        int64 [sequences], and int64 [documents + 1] with the number of sequences at its end.

    Raises:
        DataError: the index is damaged or cut short, or its sequences do not lie one after the other.
    """
    index = index_of(path)
    with index.open("rb") as stream:
        code, sequences, documents = _index_header(index, stream.read(INDEX_HEADER.size))
    item, size = np.dtype(INDEX_TYPES[code]).itemsize, index.stat().st_size
    needed = INDEX_HEADER.size + 12 * sequences + 8 * documents
    if size not in (needed, needed + sequences):  # some have a mode of one byte for each sequence
        raise DataError(f"{index} has {size:,} bytes, and what its header counts needs {needed:,}; copy it again.")
    places = iter((INDEX_HEADER.size, INDEX_HEADER.size + 4 * sequences, INDEX_HEADER.size + 12 * sequences))
    lengths = np.fromfile(index, "<i4", sequences, offset=next(places)).astype(np.int64)
    pointers = np.fromfile(index, "<i8", sequences, offset=next(places))
    first = np.fromfile(index, "<i8", documents, offset=next(places))
    if (lengths < 0).any() or (pointers != (np.cumsum(lengths) - lengths) * item).any():
        raise DataError(f"{index}: its sequences do not lie one after the other; write it anew.")
    if not documents or first[0] != 0 or first[-1] != sequences or (np.diff(first) < 0).any():
        raise DataError(f"{index}: its documents do not rise from sequence 0 to {sequences:,}; write it anew.")
    return lengths, first


def document_borders(path: Path) -> np.ndarray:
    """Where documents begin in a file with an index, and the end: int64 [documents + 1]; some may be empty."""
    lengths, first = read_index(path)
    return np.concatenate([[0], np.cumsum(lengths)])[first]


def _llmc(path: Path) -> Place:
    with path.open("rb") as stream:
        header = stream.read(LLMC_HEADER.size)
    if len(header) < LLMC_HEADER.size:
        raise DataError(f"{path} has {len(header)} bytes, and llm.c's header has {LLMC_HEADER.size:,}.")
    magic, version, count = LLMC_HEADER.unpack(header)
    if (magic, version) not in LLMC_TYPES:
        known = " and ".join(f"{magic} of version {version}" for magic, version in LLMC_TYPES)
        raise DataError(f"{path} begins with {magic} of version {version}; llm.c's files of tokens have {known}.")
    dtype = np.dtype(LLMC_TYPES[magic, version])
    return Place(path, "llmc", dtype.str, len(header), _exactly(path, len(header), count, dtype, "its header"))


def _npy(path: Path) -> Place:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy's reader of headers, which is Python's, has many kinds
        raise DataError(f"{path} cannot be read as an array of NumPy: {error}") from error
    if not isinstance(mapped, np.memmap) or mapped.ndim != 1:
        raise DataError(f"{path} holds {getattr(mapped, 'shape', 'several arrays')}; give an array of one dimension.")
    count = _exactly(path, mapped.offset, len(mapped), mapped.dtype, "its header")
    return Place(path, "npy", mapped.dtype.str, mapped.offset, count)


def _raw(path: Path, dtype: str, vocab_size: int) -> Place:
    name = dtype if dtype != "auto" else "uint16" if vocab_size <= MOST_IDS_UINT16 else "uint32"
    item, size = np.dtype(name).itemsize, path.stat().st_size
    if size % item:
        raise DataError(
            f"{path} has {size:,} bytes, which is no whole number of {name} tokens. It was cut short, or "
            "data.corpus.dtype is another."
        )
    return Place(path, "raw", np.dtype(name).newbyteorder("<").str, 0, size // item)


def _exactly(path: Path, offset: int, count: int, dtype: np.dtype, source: str) -> int:
    """The number of tokens, if the file has exactly the bytes for them."""
    needed, size = offset + count * dtype.itemsize, path.stat().st_size
    if count < 0 or size != needed:
        raise DataError(
            f"{path} has {size:,} bytes, and the {count:,} {dtype.name} tokens that {source} counts need {needed:,}. "
            f"{'It was cut short; copy it again.' if size < needed else 'It is another file than that.'}"
        )
    return count


_READERS = {"megatron": _megatron, "llmc": _llmc, "npy": _npy}


def check_words(wanted: str, dtype: str) -> None:
    """Refuse words that are not among `FORMATS` and `DTYPES`.

    Raises:
        ConfigError: names them.
    """
    if wanted not in FORMATS:
        raise ConfigError(f"data.corpus.format={wanted} must be one of {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise ConfigError(f"data.corpus.dtype={dtype} must be one of {', '.join(DTYPES)}.")
