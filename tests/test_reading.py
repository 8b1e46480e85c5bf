import os
import tracemalloc

import pytest

from longmix.config import GenerateConfig
from longmix.errors import ConfigError
from longmix.generation.run import given_prompts
from longmix.reading import DEEPEST, LARGEST_YAML_BYTES, found_below, read_bytes, read_json, read_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))

YAMLS = {
    "aliases": (BOMB, "alias"),
    "merge": ("a: &a {x: 1}\nb: {<<: *a}", "alias"),
    "deep": ("a: " + "[" * 100_000, "nest"),
    "deep-blocks": ("\n".join(" " * n + "a:" for n in range(DEEPEST + 2)), "nested more than"),
    "empty": ("", "empty"),
    "list": ("[1, 2]", "no mapping"),
    "text": ("a text", "no mapping"),
    "torn": ("a: [1,", "cannot be read as YAML"),
    "tab": ("a:\n\t- b", "cannot be read as YAML"),
    "object": ("a: !!python/object/apply:os.system [id]", "cannot be read as YAML"),
    "two-documents": ("a: 1\n---\nb: 2", "cannot be read as YAML"),
    "repeated-key": ("a: 1\na: 2", "cannot be read as YAML"),
    "not-utf8": (b"a: \xff", "cannot be read as YAML"),
    "huge": (b"#" * (LARGEST_YAML_BYTES + 1), "larger than"),
    "control": (b"a: \x00", "cannot be read as YAML"),
    "list-as-key": ("[1, 2]: 3", "cannot be read as YAML"),
    "open-interpolation": ("a: ${", "cannot be read as YAML"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("content", "words"), YAMLS.values(), ids=YAMLS)
def test_yaml_that_cannot_be_used_is_one_line_with_its_name(tmp_path, content, words):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_comes_back_as_omegaconf_reads_it(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nname: ${other}\nlist: [1, null, true]\nnode: {a: ü}\n")
    assert read_yaml(tmp_path / "a.yaml") == {
        "lr": 0.001,
        "name": "${other}",
        "list": [1, None, True],
        "node": {"a": "ü"},
    }


JSONS = {
    "list": ("[]", "no JSON object"),
    "number": ("1", "no JSON object"),
    "deep": ('{"a":' * 200_000, "nested too deeply"),
    "deep-list": ("[" * 200_000, "nested too deeply"),
    "not-utf8": (b'{"a": "\xff"}', "codec can't decode"),
    "torn": ('{"a": ', "Expecting value"),
    "long-number": ('{"a": ' + "9" * 10_000 + "}", "integer"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("content", "words"), JSONS.values(), ids=JSONS)
def test_json_that_cannot_be_used_is_a_value_error(tmp_path, content, words):
    path = tmp_path / "info.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        read_json(path)


@pytest.mark.timeout(60)
def test_only_regular_files_are_read_and_none_beyond_its_limit(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for name in ("fifo", "folder", "loop", "absent"):
        with pytest.raises(OSError):
            read_bytes(tmp_path / name)
        with pytest.raises(ConfigError, match=name):
            read_yaml(tmp_path / name)
    with pytest.raises(ValueError, match="larger than 10"):
        read_bytes(tmp_path / "large", 10)
    (tmp_path / "link").symlink_to("large")
    assert read_bytes(tmp_path / "link", 11) == b"x" * 11


@pytest.mark.parametrize("what", ["bytes", "prompt"])
def test_a_file_takes_the_memory_of_its_content(what, tmp_path):
    path = tmp_path / "small.json"
    path.write_bytes(b"x" * 3_000_000)
    config = GenerateConfig(checkpoint="runs/a", prompt_file=str(path))
    tracemalloc.start()
    try:
        if what == "bytes":
            assert read_bytes(path) == path.read_bytes()
        else:
            assert given_prompts(config) == [path.read_text()]
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_names_are_found_below_a_folder_whatever_may_not_be_listed(tmp_path, monkeypatch):
    for name in ("b/checkpoints", "a/deep/checkpoints", "a/gone/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "checkpoints").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    list_folder = os.scandir

    def vanishing(path):
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    found = found_below(tmp_path, "checkpoints")
    assert [str(path.relative_to(tmp_path).parent) for path in found] == ["a/deep", "b", "c"]
    assert found_below(tmp_path / "nowhere", "checkpoints") == []
