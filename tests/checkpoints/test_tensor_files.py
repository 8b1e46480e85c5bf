"""Files of tensors with a digest: every flipped bit and every truncation is one error, and old files still load."""

import logging
import os
import random
import zipfile

import pytest
import torch

from longmix.checkpoints import load_tensors, save_tensors
from longmix.errors import CheckpointError, StorageError
from longmix.files import refusal_of

CONTENT = {"format": 2, "weights": {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.bfloat16)}, "text": "ü"}


@pytest.fixture
def path(tmp_path):
    save_tensors(tmp_path / "tensors.pt", CONTENT)
    return tmp_path / "tensors.pt"


def load(path):
    return load_tensors(path, "file of tensors", format_number=2, without_digest=1, cure="; make it again")


def assert_refused(path, words="."):
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text and "make it again" in text and "\n" not in text


def test_what_was_saved_comes_back_and_torch_alone_reads_it_too(path, caplog):
    for content in (load(path), torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)):
        assert torch.equal(content["weights"]["a"], CONTENT["weights"]["a"])
        assert content["text"] == "ü"
    with zipfile.ZipFile(path) as archive:
        assert archive.comment.startswith(b"longmix sha256 ")
    assert not caplog.records


@pytest.mark.slow
def test_every_flipped_bit_is_refused(path):
    content = path.read_bytes()
    drawn = random.Random(0)
    places = [drawn.randrange(8 * len(content)) for _ in range(400)]
    places += range(8 * (len(content) - 110), 8 * len(content))  # the end of the archive and the digest itself
    for place in places:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        assert_refused(path)


def test_every_truncation_and_addition_is_refused(path):
    content = path.read_bytes()
    for size in [*range(0, len(content), 97), *range(len(content) - 120, len(content))]:
        path.write_bytes(content[:size])
        assert_refused(path)
    for more in (b"\0", b"x" * 200, content):
        path.write_bytes(content + more)
        assert_refused(path)


def test_files_of_earlier_versions_load_with_one_warning(tmp_path, caplog):
    path = tmp_path / "old.pt"
    torch.save(CONTENT | {"format": 1}, path)
    with caplog.at_level(logging.WARNING):
        assert load(path)["text"] == "ü"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} has no SHA-256, as earlier versions wrote it; damage would go unnoticed."
    ]
    torch.save(CONTENT, path)
    assert_refused(path, "SHA-256 is missing")


def test_what_is_no_such_file_is_refused_by_name_and_never_waited_for(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").write_text("")
    torch.save([1], tmp_path / "list")
    for name in ("folder", "fifo", "loop", "text", "empty", "list", "absent"):
        assert_refused(tmp_path / name)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"format": 1, "weights": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert path.stat().st_size < 20_000
    assert_refused(path, "compressed")


def test_a_failed_write_is_a_storage_error_and_leaves_the_old_file(path, monkeypatch, limited_file_size):
    before = path.read_bytes()
    with limited_file_size(1000), pytest.raises(StorageError, match="could not write"):
        save_tensors(path, CONTENT)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208


def test_the_refusal_is_found_behind_what_torch_makes_of_it():
    refusal = OSError(28, "No space left on device")
    wrapped = RuntimeError("unexpected pos")
    wrapped.__context__ = refusal
    assert refusal_of(wrapped) is refusal
