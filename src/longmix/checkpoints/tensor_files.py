"""Files of tensors that are no checkpoints: tuned states, saved generations, weights for other programs.

Such a file is what torch.save writes, a zip archive. Its SHA-256 is the archive's comment, which every reader of zip
archives and of torch's files passes over. It is verified before anything of the file is believed, because torch
itself does not notice a flipped bit.
"""

import hashlib
import logging
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from longmix.checkpoints.verify import check_weight, reading
from longmix.errors import CheckpointError
from longmix.files import HASH_CHUNK_BYTES, replace_file
from longmix.progress import Advance, silent
from longmix.reading import require_regular, shortened

TAG = b"longmix sha256 "
COMMENT_BYTES = len(TAG) + 64

logger = logging.getLogger(__name__)


def write_tensors(path: Path | str, content: Any, advance: Advance = silent) -> None:
    """Write a file as torch.save does, telling `advance` the bytes; given a path, torch would hide a full disk.

    Raises:
        OSError, RuntimeError: see `longmix.files.refusal_of`.
    """
    with Path(path).open("wb") as stream:
        torch.save(content, _Counted(stream, advance))


class _Counted:
    """A stream that tells how much is written to it."""

    def __init__(self, stream: BinaryIO, advance: Advance) -> None:
        self._stream, self._advance = stream, advance

    def write(self, content: Any) -> int:
        count = self._stream.write(content)
        self._advance(count)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def save_tensors(path: Path | str, content: Any) -> None:
    """Replace a file of tensors, numbers, texts, and lists and dicts of them; its digest goes with it.

    Raises:
        StorageError: it cannot be written; what was there before stays.
    """

    def write(temporary: Path) -> None:
        write_tensors(temporary, content)
        _add_digest(temporary)

    replace_file(Path(path), write)


def load_tensors(
    path: Path | str,
    what: str,
    *,
    format_number: int,
    earlier: tuple[int, ...] = (),
    without_digest: int | None = None,
    device: torch.device | str = "cpu",
    cure: str = "",
) -> dict[str, Any]:
    """The verified content of a file that `save_tensors` wrote; none of its code is run.

    Args:
        path: the file.
        what: it should hold, for messages.
        format_number: the content's "format".
        earlier: formats before it that are read as well.
        without_digest: an earlier format whose files have no digest; they are read with a warning.
        device: where the tensors go.
        cure: what to do about a file that cannot be used, for messages; begins with "; ".

    Raises:
        CheckpointError: there is no such file, it is damaged, or of another format.
    """
    path = Path(path)
    with reading(path, what, cure):
        require_regular(path)
        verified = _verify(path)
        check_archive(path)
        content = torch.load(path, map_location=device, weights_only=True)
        number = content["format"] if isinstance(content, dict) else None
        if number not in (format_number, *earlier, without_digest) or isinstance(number, bool):
            found = shortened(number)
            raise CheckpointError(f"{path} has format {found}; this version of longmix reads {format_number}{cure}.")
        if not verified and number != without_digest:
            raise ValueError("its SHA-256 is missing")
    if not verified:
        logger.warning("%s has no SHA-256, as earlier versions wrote it; damage would go unnoticed.", path)
    return content


def load_foreign_tensors(path: Path | str, what: str) -> dict[str, torch.Tensor]:
    """The tensors by name in a file that another program may have written by torch.save; none of its code is run.

    They stay on the disk until they are used. A digest is verified where there is one.

    Args:
        path: the file.
        what: it should hold, for messages.

    Raises:
        CheckpointError: there is no such file, it is damaged, or holds something else.
    """
    path = Path(path)
    with reading(path, what):
        require_regular(path)
        _verify(path)
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict) or not content:
            raise ValueError(f"it holds a {type(content).__name__} in the place of weights by name")
        for name, weight in content.items():
            check_weight(name, weight)
    return content


def check_archive(path: Path | str) -> None:
    """Refuse an archive that would expand while it is read, as torch's files never do.

    Raises:
        ValueError, zipfile.BadZipFile: it is compressed, larger inside than outside, or no archive.
    """
    path = Path(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("it claims to hold more than its size")


def _add_digest(path: Path) -> None:
    """Make the digest of an archive its comment."""
    with path.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)  # the last two bytes are the length of the comment
        if stream.read() != b"\0\0":
            raise ValueError(f"{path} has a comment already")
        stream.seek(-2, os.SEEK_END)
        stream.write(struct.pack("<H", COMMENT_BYTES))
        stream.flush()
        digest = _digest(path, path.stat().st_size)
        stream.write(TAG + digest)


def _verify(path: Path) -> bool:
    """Verify the digest of a file. Returns False where it has none."""
    size = path.stat().st_size - COMMENT_BYTES
    with path.open("rb") as stream:
        stream.seek(max(size, 0))
        comment = stream.read()
    if size < 0 or not comment.startswith(TAG):
        return False
    if comment[len(TAG) :] != _digest(path, size):
        raise ValueError("its content does not have the SHA-256 that was written with it")
    return True


def _digest(path: Path, size: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while size > 0 and (chunk := stream.read(min(size, HASH_CHUNK_BYTES))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest().encode()
