"""JSON Lines as they are met: what `json.loads` reads is read, exactly; the rest is refused by file and line."""

import bz2
import gzip
import io
import json
import lzma
import random
import tracemalloc
import zipfile

import pytest

from longmix.data.corpora import json_records
from longmix.data.corpora.files import JsonLines
from longmix.data.corpora.json_records import JsonRecords
from longmix.data.corpora.records import texts_of_json
from longmix.errors import DataError


def texts(content: bytes, field: str = "text") -> list[str]:
    return list(texts_of_json(io.BytesIO(content), field, "x.jsonl"))


def corpus_of(path) -> list[str]:
    return list(JsonLines(str(path), validation_fraction=0).documents("train"))


def lines(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


TAKEN = {
    "plain": (lines({"text": "a"}, {"text": "b"}), ["a", "b"]),
    "nothing": (b"", []),
    "blanks-only": (b" \n\n\t\r\n", []),
    "no-newline-at-the-end": (b'{"text": "a"}', ["a"]),
    "blank-lines-and-crlf": (b'\n\n  \n{"text": "a"}\r\n\r\n\t\n {"text": "b"} \r\n', ["a", "b"]),
    "cr-alone": (b'{"text": "a"}\r{"text": "b"}\r', ["a", "b"]),
    "byte-order-mark": (b'\xef\xbb\xbf{"text": "a"}\n', ["a"]),
    "byte-order-mark-alone": (b"\xef\xbb\xbf", []),
    "several-in-a-line": (b'{"text": "a"}{"text": "b"} {"text": "c"}\n', ["a", "b", "c"]),
    "over-several-lines": (b'{\n "text": "a",\n "x": [\n1\n]\n}\n{\n"text": "b"\n}', ["a", "b"]),
    "array": (b'\n [\n{"text": "a"},\n {"text": "b", "x": {"y": [1]}}\n ] \n', ["a", "b"]),
    "array-of-texts": (b'["a", "b"]', ["a", "b"]),
    "array-of-nothing": (b"[ ]", []),
    "dates": (lines({"text": "2024-01-22"}, {"text": "2024-01-22T10:00:00Z"}), ["2024-01-22", "2024-01-22T10:00:00Z"]),
    "texts-that-look-like-other-types": (
        lines(*({"text": text} for text in ("1", "1.50", "true", "null", "NaN", "[]", "{}", " a ", "001", "1e5"))),
        ["1", "1.50", "true", "null", "NaN", "[]", "{}", " a ", "001", "1e5"],
    ),
    "null-and-missing-are-empty": (b'{"text": null}\n{"text": "a"}\n{"x": 1}\nnull\n{}\n', ["", "a", "", "", ""]),
    "first-lacks-it": (b'{"x": 1}\n{"text": "b"}\n', ["", "b"]),
    "all-null": (b'{"text": null}\n{"text": null}\n', ["", ""]),
    "duplicate-key": (b'{"text": "a", "x": 1, "text": "b", "x": "c"}\n', ["b"]),
    "inner-field-of-the-same-name": (b'{"meta": {"text": "a"}, "text": "b"}\n', ["b"]),
    "not-numbers": (b'{"text": "a", "x": NaN, "y": -Infinity, "z": Infinity}\n', ["a"]),
    "long-integer": (b'{"text": "a", "x": ' + b"7" * 5000 + b', "y": -' + b"7" * 5000 + b"}\n", ["a"]),
    "nul-and-separators": (
        '{"text": "a\\u0000b"}\n{"text": "a\u2028b\u2029c\x85d"}\n'.encode(),
        ["a\0b", "a\u2028b\u2029c\x85d"],
    ),
    "escapes": (b'{"text": "\\ud83d\\ude42 \\/ \\t \\n \\u00e9"}', ["\U0001f642 / \t \n \u00e9"]),
    "types-change": (
        lines(
            {"x": 1, "y": None, "z": [], "text": "a"},
            {"x": "2024-01-01", "y": [1], "z": ["b"], "text": "b"},
            {"x": {"deep": [1, {"a": None}]}, "y": "c", "z": 1.5, "new": True, "text": "c"},
        ),
        ["a", "b", "c"],
    ),
}

REFUSED = {
    "cut": (b'{"text": "a"}\n{"text": "b"}\n{"text": "c', r"the file ends within this record \(line 3\)"),
    "cut-after-a-colon": (b'{"text": "a"}\n{"text":\n\n', r"ends within this record \(line 4, .* begins in line 2\)"),
    "cut-within-a-line": (b'{"text": "a"}\n{"text": "b\n{"text": "c"}\n', r"Invalid control character \(line 2\)"),
    "cut-before-the-bracket": (
        b'{"text": "a"\n{"text": "b"}\n',
        r"Expecting ',' delimiter \(line 2, in the record that begins in line 1\)",
    ),
    "commas-between-lines": (b'{"text": "a"},\n{"text": "b"}\n', r"Expecting value \(line 1\)"),
    "single-quotes": (b"{'text': 'a'}\n", r"Expecting property name enclosed in double quotes \(line 1\)"),
    "raw-tab": (b'{"text": "a"}\n\n{"text": "a\tb"}\n', r"Invalid control character \(line 3\)"),
    "raw-nul": (b'{"text": "a"}\n{"text": "a\0b"}\n', r"Invalid control character \(line 2\)"),
    "latin-1": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"not UTF-8 text in line 2 \(byte 27\)"),
    "cut-character": (b'{"text": "caf\xc3', r"not UTF-8 text in line 1 \(byte 13\)"),
    "encoded-surrogate": (b'{"text": "\xed\xa0\x80"}\n', r"not UTF-8 text in line 1 \(byte 10\)"),
    "utf-16": ('{"text": "a"}\n'.encode("utf-16"), "x.jsonl is UTF-16"),
    "utf-16-without-mark": ('{"text": "a"}\n'.encode("utf-16-le"), "looks like UTF-16"),
    "gzip-by-another-name": (gzip.compress(b"{}"), "compressed by gzip, which its name does not tell"),
    "lone-surrogate": (
        b'{"text": "a"}\n{"text": "a\\ud800"}\n',
        r"field 'text' in line 2 of x\.jsonl holds a lone surrogate at character 1",
    ),
    "number-as-text": (
        lines({"text": "a"}, {"text": 3}),
        r"'text' of record 1 of x\.jsonl \(line 2\) holds int, not text",
    ),
    "number-after-blank-lines": (b'\n\n{"text": "a"}\n\n{"text": [1]}', r"record 1 of .* \(line 5\) holds list"),
    "texts-in-lines": (b'"a"\n"b"\n', r"line 1 of x\.jsonl holds a str, not an object"),
    "arrays-in-lines": (b'["a"]\n["b"]\n', r"something follows the end of the array \(line 2\)"),
    "array-without-end": (b'[{"text": "a"},\n{"text": "b"}\n', r"the array has no end \(line 3\)"),
    "array-without-comma": (b'[{"text": "a"}\n{"text": "b"}]', r"a comma is expected .* \(line 2\)"),
    "too-deep": (
        b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        r"its values are nested too deeply \(line 1\)",
    ),
    "no-such-field": (
        b'{"id": 1, "body": "a"}\n{"id": 2, "more": 1}',
        "have no field 'text'; they have id, body, more",
    ),
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", TAKEN)
def test_taken(name, chunk, monkeypatch):
    monkeypatch.setattr(json_records, "CHUNK_BYTES", chunk)
    content, expected = TAKEN[name]
    assert texts(content) == expected


@pytest.mark.parametrize("chunk", [5, 1 << 20])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_file_and_line(name, chunk, monkeypatch):
    monkeypatch.setattr(json_records, "CHUNK_BYTES", chunk)
    content, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as info:
        texts(content)
    assert "x.jsonl" in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("seed", range(5))
def test_any_records_and_chunks_give_what_json_gives(seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(json_records, "CHUNK_BYTES", draw.choice([1, 3, 64, 1000]))
    alphabet = ["a", '"', "\\", "\n", "é", "\U0001f642", "\u2028", " ", "{", "]", "\0"]
    records = [
        {
            "text": "".join(draw.choice(alphabet) for _ in range(draw.randrange(40))),
            "x": draw.choice([1, None, "a", [1.5]]),
        }
        for _ in range(50)
    ]
    content = "".join(json.dumps(record, ensure_ascii=draw.random() < 0.5) + "\r\n" for record in records).encode()
    assert list(JsonRecords(io.BytesIO(content), "x")) == records
    array = json.dumps(records, indent=draw.choice([None, 2])).encode()
    assert list(JsonRecords(io.BytesIO(array), "x")) == records


LATE = {
    "a-late-field": ({"text": "x"}, {"text": "a", "new": 1}),
    "number-then-text": ({"text": "x", "id": 1}, {"text": "a", "id": "b"}),
    "date-then-text": ({"text": "x", "date": "2024-01-01"}, {"text": "a", "date": "unknown"}),
    "null-then-text": ({"text": "x", "id": None}, {"text": "a", "id": "b"}),
    "empty-then-texts": ({"text": "x", "tags": []}, {"text": "a", "tags": ["b"]}),
    "null-text-at-first": ({"text": None}, {"text": "a"}),
    "dates-at-last": ({"text": "x"}, {"text": "2024-01-22"}),
}


@pytest.mark.parametrize("name", LATE)
def test_a_change_beyond_the_first_blocks(name, tmp_path):
    """Readers that guess a schema from each block of 10 MiB refuse these files or alter their texts."""
    first, last = LATE[name]
    padding = "p" * 1000
    with (tmp_path / "a.jsonl").open("w") as stream:
        stream.writelines(json.dumps({**first, "padding": padding}) + "\n" for _ in range(11_000))
        stream.writelines(json.dumps({**last, "padding": padding}) + "\n" for _ in range(20))
    found = corpus_of(tmp_path)
    assert len(found) == 11_020
    assert (found[0], found[-1]) == (first["text"] or "", last["text"])


def test_a_wrong_field_is_met_early(tmp_path, monkeypatch):
    monkeypatch.setattr("longmix.data.corpora.records.FIELD_WITHIN_BYTES", 1000)
    monkeypatch.setattr(json_records, "CHUNK_BYTES", 100)
    stream = io.BytesIO(lines({"body": "a"}) * 1000)
    with pytest.raises(DataError, match="have no field 'text'; they have body"):
        list(texts_of_json(stream, "text", "x.jsonl"))
    assert stream.tell() < 2000


@pytest.mark.parametrize("kind", ["a-long-line", "an-array-in-one-line", "many-lines"])
def test_memory_holds_a_record_not_the_file(kind, tmp_path):
    record = json.dumps({"text": "a" * 1000})
    with (tmp_path / "a.jsonl").open("w") as stream:
        if kind == "a-long-line":
            stream.write(json.dumps({"text": "b" * (8 << 20)}) + "\n")
        elif kind == "an-array-in-one-line":
            stream.write("[" + ", ".join([record] * 30_000) + "]")
        else:
            stream.writelines([record + "\n"] * 30_000)
    tracemalloc.start()
    count = sum(1 for _ in JsonLines(str(tmp_path), validation_fraction=0).documents("train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == (1 if kind == "a-long-line" else 30_000)
    assert peak < (80 << 20 if kind == "a-long-line" else 12 << 20)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zip"])
def test_compressed(suffix, tmp_path):
    path, content = tmp_path / f"a.jsonl.{suffix}", lines({"text": "a"}, {"text": "2024-01-01"})
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jsonl", content)
    else:
        path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[suffix].compress(content))
    assert corpus_of(path) == ["a", "2024-01-01"]


@pytest.mark.parametrize("damage", ["cut", "not gzip"])
def test_damaged_compression(damage, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines({"text": "a"}) * 1000)[:-20] if damage == "cut" else b"hello")
    with pytest.raises(DataError, match=rf"{path} is cut or damaged"):
        corpus_of(path)
