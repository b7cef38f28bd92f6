"""What the catalog remembers: over a restart, in files that a crash cannot half write."""

import json
from pathlib import Path

import pytest

from appliance.catalog.state import Memory, read_held, write_held
from appliance.core.errors import ConfigError


def test_first_seen_and_checksums_survive_a_restart(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert memory.first_seen("b", "1", 10.0) == 10.0
    memory.remember("b", "1", {"model.onnx": "ab"})
    memory.save()
    again = Memory(tmp_path)
    assert again.first_seen("b", "1", 99.0) == 10.0
    assert again.first_seen("b", "2", 99.0) == 99.0
    assert again.checksums("b", "1") == {"model.onnx": "ab"}
    assert again.checksums("other", "1") == {}


def test_what_is_gone_is_forgotten_and_what_is_not_known_now_is_kept(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    for bundle in ("a", "b", "c"):
        for version in ("1", "2"):
            memory.first_seen(bundle, version, 1.0)
    memory.keep_only({"a": {"2"}, "b": None})
    assert memory.first_seen("a", "1", 5.0) == 5.0
    assert memory.first_seen("a", "2", 5.0) == 1.0
    assert memory.first_seen("b", "1", 5.0) == 1.0
    assert memory.first_seen("c", "1", 5.0) == 5.0


def test_versions_held_back_are_written_and_read(tmp_path: Path) -> None:
    assert read_held(tmp_path) == {}
    write_held(tmp_path, {"b": frozenset({"3", "2"}), "free": frozenset()})
    assert read_held(tmp_path) == {"b": frozenset({"2", "3"})}
    assert json.loads((tmp_path / "wanted.json").read_text()) == {"b": {"held": ["2", "3"]}}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00", '{"b": []}', '{"b": 3}', '{"b": null}'])
def test_a_state_file_that_is_not_ours_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "catalog.json").write_text(content)
    (tmp_path / "wanted.json").write_text(content)
    with pytest.raises(ConfigError, match=r"catalog\.json"):
        Memory(tmp_path)
    with pytest.raises(ConfigError, match=r"wanted\.json"):
        read_held(tmp_path)


def test_state_of_the_wrong_kind_further_inside_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "catalog.json").write_text('{"b": {"1": 3}}')
    (tmp_path / "wanted.json").write_text('{"b": {"held": 3}}')
    with pytest.raises(ConfigError, match=r"catalog\.json"):
        Memory(tmp_path)
    with pytest.raises(ConfigError, match=r"wanted\.json"):
        read_held(tmp_path)


def test_a_state_file_that_is_not_utf_8_or_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "catalog.json").write_bytes(b"\xff")
    (tmp_path / "wanted.json").mkdir()
    with pytest.raises(ConfigError, match=r"catalog\.json"):
        Memory(tmp_path)
    with pytest.raises(ConfigError, match=r"wanted\.json"):
        read_held(tmp_path)
