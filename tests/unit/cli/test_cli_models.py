"""`appliance models` while the daemon does not run: every change is one rename, checked first, and undone by none."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import graphs
from support.command import Command

from appliance.catalog import bundle as bundles
from appliance.catalog import changes
from appliance.catalog.state import read_held
from appliance.cli import admin
from appliance.cli.models import _served
from appliance.core.files import alone


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return graphs.write_image_classifier(tmp_path / "source" / "cats", concepts=("cat", "dog"))


def versions(appliance: Command, name: str) -> list[str]:
    rows = json.loads(appliance.good("models", "list", "--json"))
    return [entry["version"] for row in rows if row["bundle"] == name for entry in row["versions"]]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- add -------------------------------------------------------------------------------------------------------------


def test_a_bundle_is_copied_with_checksums(appliance: Command, source: Path) -> None:
    assert appliance.good("models", "add", source) == "added cats, version 1\n"
    added = tree(appliance.root / "cats")
    assert set(added) == {"config.yaml", "1/model.onnx", "1/SHA256SUMS"}
    assert added["1/model.onnx"] == (source / "1" / "model.onnx").read_bytes()
    subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=appliance.root / "cats" / "1", check=True, capture_output=True
    )
    assert os.listdir(appliance.root) == ["cats"]
    assert versions(appliance, "cats") == ["1"]


def test_a_bare_file_gets_an_explicit_config_and_its_sentence_is_told(appliance: Command, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(graphs.identity_model().SerializeToString())
    output = appliance.good("models", "add", tmp_path / "net.onnx")
    assert output.startswith("added net, version 1\nUnderstood without an onnx section as raw tensors")
    config, _, _ = bundles.read_config(appliance.root / "net", "x", "y")
    assert config is not None
    assert config.key.model_id == "net"
    assert config.key.user_id == appliance.config.catalog.user_id


def test_a_model_at_the_top_of_a_folder_gets_its_version_folder(appliance: Command, tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(graphs.external_data_model().SerializeToString())
    (folder / "weights.bin").write_bytes(b"\0" * 12)
    appliance.good("models", "add", folder)
    assert set(tree(appliance.root / "flat")) == {"config.yaml", "1/model.onnx", "1/weights.bin", "1/SHA256SUMS"}


def test_what_clarifais_config_says_survives_the_explicit_one(appliance: Command, tmp_path: Path) -> None:
    config = {"model": {"id": "m", "user_id": "u", "app_id": "a"}, "inference_compute_info": {"cpu_limit": "2"}}
    config["build_info"] = {"python_version": "3.12"}  # a key of Clarifai's that we do not read
    graphs.write_bundle(tmp_path / "m", graphs.identity_model(), config)
    appliance.good("models", "add", tmp_path / "m")
    written = yaml.safe_load((appliance.root / "m" / "config.yaml").read_text())
    assert written["inference_compute_info"] == {"cpu_limit": "2"}
    assert written["build_info"] == {"python_version": "3.12"}
    assert written["model"]["user_id"] == "u"
    assert written["onnx"]["file"] == "model.onnx"


def test_a_name_may_be_given(appliance: Command, source: Path) -> None:
    appliance.good("models", "add", source, "--name", "felines")
    assert (appliance.root / "felines" / "1" / "model.onnx").is_file()


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "a b", "x" * 65, "-"])
def test_a_name_that_leads_elsewhere_is_refused(appliance: Command, source: Path, name: str) -> None:
    assert "cannot be a bundle's name" in appliance.bad("models", "add", source, f"--name={name}")
    assert os.listdir(appliance.root) == []


def test_a_new_version_joins_those_there_are(appliance: Command, source: Path) -> None:
    appliance.good("models", "add", source)
    os.rename(source / "1", source / "2")
    assert appliance.good("models", "add", source) == "added cats, version 2\n"
    assert sorted(versions(appliance, "cats")) == ["1", "2"]


def test_a_version_that_is_there_is_replaced_only_when_told_to(appliance: Command, source: Path) -> None:
    appliance.good("models", "add", source)
    before = tree(appliance.root)
    graphs.write_image_classifier(source, concepts=("cat", "dog"), opset=16)
    assert "version 1 already" in appliance.bad("models", "add", source)
    assert tree(appliance.root) == before
    appliance.good("models", "add", source, "--replace")
    after = tree(appliance.root)
    assert after["cats/1/model.onnx"] == (source / "1" / "model.onnx").read_bytes()
    assert set(after) == set(before)


def test_another_config_is_taken_over_only_when_told_to(appliance: Command, source: Path) -> None:
    appliance.good("models", "add", source)
    shutil.rmtree(source)
    graphs.write_image_classifier(source, concepts=("dog", "cat"), version="2")
    assert "config.yaml of cats" in appliance.bad("models", "add", source)
    appliance.good("models", "add", source, "--replace")
    assert yaml.safe_load((appliance.root / "cats" / "config.yaml").read_text())["concepts"][0]["name"] == "dog"


def test_a_bundle_whose_graph_has_another_name_takes_new_versions(appliance: Command, tmp_path: Path) -> None:
    for version in ("1", "2"):
        folder = tmp_path / version / "net"
        config = graphs.bundle_config(folder, "tensor-to-tensor", {"file": "net.onnx"})
        graphs.write_bundle(folder, graphs.identity_model(), config, version=version, file="net.onnx")
        appliance.good("models", "add", folder)
    assert sorted(versions(appliance, "net")) == ["1", "2"]
    assert "newest is 1; held back: 2" in appliance.good("models", "rollback", "net")


def test_a_bundle_put_there_by_hand_without_a_config_can_be_replaced(appliance: Command, tmp_path: Path) -> None:
    graphs.write_bundle(appliance.root / "net", graphs.identity_model(), None)
    graphs.write_raw(tmp_path / "net", version="2")
    assert "--replace" in appliance.bad("models", "add", tmp_path / "net")
    appliance.good("models", "add", tmp_path / "net", "--replace")
    assert sorted(versions(appliance, "net")) == ["1", "2"]


def test_a_file_of_that_name_is_not_hidden_by_a_folder(appliance: Command, tmp_path: Path) -> None:
    (appliance.root / "net.onnx").write_bytes(graphs.identity_model().SerializeToString())
    assert "already" in appliance.bad("models", "add", graphs.write_raw(tmp_path / "net"))


def broken_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {id: 7}\n")


def custom_operator(folder: Path) -> None:
    (folder / "1" / "model.onnx").write_bytes(graphs.custom_op_model().SerializeToString())


def no_model(folder: Path) -> None:
    shutil.rmtree(folder / "1")


def broken_model(folder: Path) -> None:
    (folder / "1" / "model.onnx").write_bytes(b"nothing")


def link_out(folder: Path) -> None:
    (folder / "1" / "labels.txt").symlink_to("/etc/passwd")


def weights_outside(folder: Path) -> None:
    (folder / "1" / "model.onnx").write_bytes(graphs.external_data_model("../../x.bin").SerializeToString())


@pytest.mark.parametrize("spoil", [broken_config, custom_operator, no_model, broken_model, link_out, weights_outside])
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    appliance: Command, source: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(source)
    appliance.bad("models", "add", source)
    assert os.listdir(appliance.root) == []


def test_a_source_that_is_not_there_is_told(appliance: Command, tmp_path: Path) -> None:
    assert "There is no" in appliance.bad("models", "add", tmp_path / "none")


def test_a_root_that_is_not_there_is_made(appliance: Command, source: Path) -> None:
    """The README's first commands need no mkdir."""
    appliance.root.rmdir()
    appliance.good("models", "add", source)
    assert (appliance.root / "cats" / "1" / "model.onnx").is_file()


def test_a_root_that_cannot_be_made_is_told(appliance: Command, source: Path) -> None:
    appliance.root.rmdir()
    appliance.root.write_text("a file")
    assert str(appliance.root) in appliance.bad("models", "add", source)


def test_pipes_in_a_source_are_refused_and_not_read_for_ever(appliance: Command, source: Path) -> None:
    os.mkfifo(source / "1" / "pipe")
    appliance.bad("models", "add", source)
    assert os.listdir(appliance.root) == []


# ---- list, inspect ---------------------------------------------------------------------------------------------------


def test_list_says_that_the_daemon_does_not_run_and_what_lies_on_disk(appliance: Command, source: Path) -> None:
    appliance.good("models", "add", source)
    (appliance.root / "broken").mkdir()
    result = appliance("models", "list")
    assert "The daemon does not run" in result.stderr
    assert "tester/tests/cats" in result.stdout
    assert "holds no <version>/model.onnx" in " ".join(result.stdout.split())
    assert result.exit_code == 0


def test_list_survives_what_is_no_bundle(appliance: Command, source: Path) -> None:
    appliance.good("models", "add", source)
    (appliance.root / "README.md").write_text("not a bundle")
    (appliance.root / "dead.onnx").symlink_to("/nowhere")
    rows = json.loads(appliance.good("models", "list", "--json"))
    assert [row["bundle"] for row in rows if row["versions"]] == ["cats"]
    assert "README" not in {row["bundle"] for row in rows}


def test_inspect_shows_the_explicit_config_and_checksums(appliance: Command, source: Path) -> None:
    appliance.good("models", "add", source)
    output = appliance.good("models", "inspect", "cats")
    assert "model_type_id: visual-classifier" in output
    assert "version 1: on disk" in output
    assert "sha256 " in output
    content = json.loads(appliance.good("models", "inspect", "cats", "--json"))
    assert yaml.safe_load(content["config"])["model"]["id"] == "cats"


def test_inspect_says_how_a_bundle_was_understood(appliance: Command, tmp_path: Path) -> None:
    graphs.write_bundle(appliance.root / "net", graphs.identity_model(), None)
    assert "# Understood without an onnx section as raw tensors" in appliance.good("models", "inspect", "net")


# ---- remove ----------------------------------------------------------------------------------------------------------


def test_remove_takes_a_bundle_or_one_version_away(appliance: Command, source: Path) -> None:
    for version in ("1", "2"):
        shutil.rmtree(source)
        appliance.good("models", "add", graphs.write_image_classifier(source, concepts=("cat", "dog"), version=version))
    assert appliance.good("models", "remove", "cats", "--version", "1") == "removed cats version 1\n"
    assert versions(appliance, "cats") == ["2"]
    appliance.good("models", "remove", "cats")
    assert os.listdir(appliance.root) == []


def test_a_bare_file_is_removed_by_its_name(appliance: Command) -> None:
    (appliance.root / "net.onnx").write_bytes(b"x")
    appliance.good("models", "remove", "net")
    assert os.listdir(appliance.root) == []


@pytest.mark.parametrize("version", ["../other", "..", ".", "1/../../other", "/tmp", "3"])
def test_a_version_that_leads_elsewhere_removes_nothing(appliance: Command, version: str) -> None:
    graphs.write_raw(appliance.root / "cats")
    graphs.write_raw(appliance.root / "other")
    before = tree(appliance.root)
    assert "has no version" in appliance.bad("models", "remove", "cats", f"--version={version}")
    assert tree(appliance.root) == before


@pytest.mark.parametrize("name", ["none", "../models", ".", "", "cats/1", "/etc"])
def test_a_name_that_is_no_bundle_removes_nothing(appliance: Command, name: str) -> None:
    graphs.write_raw(appliance.root / "cats")
    before = tree(appliance.root)
    assert "there are: cats" in appliance.bad("models", "remove", name)
    assert tree(appliance.root) == before


# ---- rollback --------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(appliance: Command) -> Command:
    """A bundle with versions 1, 2 and 10."""
    for version in ("1", "2", "10"):
        graphs.write_raw(appliance.root / "net", version=version)
    return appliance


def held(appliance: Command) -> set[str]:
    return set(read_held(appliance.config.catalog.state_dir).get("net", frozenset()))


def test_rollback_holds_back_the_newest_and_again_the_next(three: Command) -> None:
    assert three.good("models", "rollback", "net") == "net: newest is 2; held back: 10\n"
    assert held(three) == {"10"}
    assert three.good("models", "rollback", "net") == "net: newest is 1; held back: 10, 2\n"
    assert "no older version" in three.bad("models", "rollback", "net")
    assert held(three) == {"2", "10"}


def test_rolling_forward_releases(three: Command) -> None:
    three.good("models", "rollback", "net", "--to", "1")
    assert held(three) == {"2", "10"}
    assert "none held back" in three.good("models", "rollback", "net", "--to", "10")
    assert held(three) == set()


def test_rolling_to_a_version_that_is_not_there_changes_nothing(three: Command) -> None:
    assert "has no version '7'; it has 1, 2, 10" in three.bad("models", "rollback", "net", "--to", "7")
    assert held(three) == set()


def test_list_shows_what_is_held_back(three: Command) -> None:
    three.good("models", "rollback", "net")
    rows = json.loads(three.good("models", "list", "--json"))
    assert {entry["version"]: entry["state"] for entry in rows[0]["versions"]} == {
        "1": "on disk",
        "2": "on disk",
        "10": "held",
    }


def test_rollback_of_one_bundle_leaves_the_others_held(three: Command) -> None:
    for version in ("1", "2"):
        graphs.write_raw(three.root / "other", version=version)
    three.good("models", "rollback", "net")
    three.good("models", "rollback", "other")
    assert held(three) == {"10"}


def test_waiting_for_a_daemon_that_does_not_run_is_an_error(three: Command) -> None:
    assert "is it running" in three.bad("models", "rollback", "net", "--wait", "1")


def test_rollbacks_at_once_are_both_kept(appliance: Command) -> None:
    """Each reads, changes and writes the one file of what is held back."""
    names = [f"net{index}" for index in range(4)]
    for name in names:
        for version in ("1", "2"):
            graphs.write_raw(appliance.root / name, version=version)
    settings = appliance.config.catalog
    for _ in range(5):
        (appliance.folder / "state" / "wanted.json").unlink(missing_ok=True)
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda name: changes.rollback(name, "1", settings), names))
        assert read_held(settings.state_dir) == dict.fromkeys(names, frozenset({"2"}))


# ---- held back, and added again --------------------------------------------------------------------------------------


def test_what_is_removed_is_no_longer_held_back(three: Command) -> None:
    three.good("models", "rollback", "net", "--to", "1")
    three.good("models", "remove", "net", "--version", "10")
    assert held(three) == {"2"}
    three.good("models", "remove", "net")
    assert held(three) == set()


def test_a_version_that_is_added_is_no_longer_held_back_and_that_is_said(three: Command, tmp_path: Path) -> None:
    three.good("models", "rollback", "net", "--to", "1")
    source = graphs.write_raw(tmp_path / "source" / "net", version="10")
    assert "no longer held back: 10\n" in three.good("models", "add", source, "--replace")
    assert held(three) == {"2"}


def test_a_bundle_put_back_in_place_of_one_removed_by_hand_is_not_held_back(three: Command, tmp_path: Path) -> None:
    three.good("models", "rollback", "net", "--to", "2")
    shutil.rmtree(three.root / "net")
    assert "no longer held back: 10\n" in three.good(
        "models", "add", graphs.write_raw(tmp_path / "source" / "net", version="10")
    )
    assert held(three) == set()


def test_what_is_held_back_and_unreadable_is_told_before_anything_is_changed(three: Command, tmp_path: Path) -> None:
    (three.folder / "state" / "wanted.json").write_text("nothing")
    before = tree(three.root)
    source = graphs.write_raw(tmp_path / "source" / "net", version="3")
    assert "wanted.json" in three.bad("models", "add", source)
    assert "wanted.json" in three.bad("models", "remove", "net")
    assert tree(three.root) == before


@pytest.mark.parametrize(
    ("states", "served"),
    [(["ready"], True), (["ready", "held"], True), (["held"], False), ([], False), (["ready", "loading"], False)],
)
def test_waiting_ends_when_a_version_is_ready_and_none_is_on_its_way(states: list[str], served: bool) -> None:
    row = {"bundle": "net", "problem": "", "versions": [{"state": state, "problem": ""} for state in states]}
    assert _served(row) is served


def test_waiting_for_a_bundle_that_is_held_back_says_so(three: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"bundle": "net", "problem": "", "versions": [{"version": "1", "state": "held", "problem": ""}]}
    monkeypatch.setattr(admin, "ask", lambda *_, **__: {"catalog": [row]})
    assert "all its versions are held back" in three.bad("models", "rollback", "net", "--wait", "0.01")


# ---- replacing ends with the old one or the new one ------------------------------------------------------------------


@pytest.fixture
def replacement(appliance: Command, source: Path) -> tuple[dict[str, bytes], Path]:
    """What lies under the root, with versions 1 and 2 of a bundle, and the source of others to replace them."""
    shutil.copytree(source / "1", source / "2")
    appliance.good("models", "add", source)
    before = tree(appliance.root)
    shutil.rmtree(source)
    for version in ("1", "2"):
        graphs.write_image_classifier(source, concepts=("dog", "cat"), opset=16, version=version)
    return before, source


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_replacement_that_fails_at_any_rename_leaves_all_as_it_was(
    appliance: Command,
    replacement: tuple[dict[str, bytes], Path],
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    """Two renames for each of two versions."""
    before, source = replacement
    rename, count = os.rename, 0

    def flaky(old: Path, new: Path) -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(new))
        rename(old, new)

    monkeypatch.setattr(os, "rename", flaky)
    assert "No space left on device" in appliance.bad("models", "add", source, "--replace", status=6)
    assert tree(appliance.root) == before
    assert os.listdir(appliance.root) == ["cats"]


def test_a_replacement_leaves_nothing_of_the_old_version(
    appliance: Command, replacement: tuple[dict[str, bytes], Path]
) -> None:
    before, source = replacement
    appliance.good("models", "add", source, "--replace")
    after = tree(appliance.root)
    assert set(after) == set(before)
    assert after["cats/2/model.onnx"] == (source / "2" / "model.onnx").read_bytes()


def test_a_version_that_a_killed_command_set_aside_is_put_back_by_the_next(appliance: Command, tmp_path: Path) -> None:
    folder = graphs.write_raw(appliance.root / "net", version="1")
    (folder / "1").rename(folder / ".replaced-1")
    (folder / ".replaced-").mkdir()
    appliance.good("models", "add", graphs.write_raw(tmp_path / "source" / "net", version="2"))
    assert sorted(versions(appliance, "net")) == ["1", "2"]
    assert not (folder / ".replaced-1").exists()


def test_what_a_killed_command_set_aside_does_not_come_back_for_what_is_removed(appliance: Command) -> None:
    folder = graphs.write_raw(appliance.root / "net", version="1")
    shutil.copytree(folder / "1", folder / ".replaced-1")
    appliance.good("models", "remove", "net", "--version", "1")
    changes.mend(appliance.root)
    assert tree(appliance.root).keys() == {"net/config.yaml"}


def test_what_is_set_aside_is_not_put_back_while_another_command_is_at_it(appliance: Command) -> None:
    folder = graphs.write_raw(appliance.root / "net", version="1")
    (folder / "1").rename(folder / ".replaced-1")
    with alone(appliance.root):
        changes.mend(appliance.root)
        assert not (folder / "1").exists()
    changes.mend(appliance.root)
    assert (folder / "1").is_dir()


# ---- what a killed command left --------------------------------------------------------------------------------------


def test_staging_folders_of_the_dead_are_swept_and_those_of_the_living_are_not(
    appliance: Command, source: Path
) -> None:
    for name in ("dead", "early", "living"):
        (appliance.root / f".staging-{name}" / "cats").mkdir(parents=True)
    for name in ("dead", "living"):
        (appliance.root / f".staging-{name}" / ".lock").touch()
    with (appliance.root / ".staging-living" / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        appliance.good("models", "add", source)
        assert sorted(os.listdir(appliance.root)) == [".staging-living", "cats"]
    appliance.good("models", "remove", "cats")
    assert os.listdir(appliance.root) == []


def test_a_staging_folder_is_locked_while_its_maker_works(
    appliance: Command, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = changes._stage

    def add_another(*arguments: Any) -> Any:
        monkeypatch.setattr(changes, "_stage", stage)
        appliance.good("models", "add", source, "--name", "other")
        return stage(*arguments)

    monkeypatch.setattr(changes, "_stage", add_another)
    appliance.good("models", "add", source)
    assert sorted(os.listdir(appliance.root)) == ["cats", "other"]


# ---- names and texts of strangers ------------------------------------------------------------------------------------


def test_a_source_with_a_file_name_that_is_not_utf_8_is_refused_by_a_sentence(appliance: Command, source: Path) -> None:
    Path(os.fsdecode(os.fsencode(source) + b"/1/note\xff.txt")).write_text("x")
    assert r"note\xff.txt: the file's name is not printable UTF-8" in appliance.bad("models", "add", source)
    assert os.listdir(appliance.root) == []


@pytest.mark.parametrize("running", [False, True])
def test_list_shows_markup_and_control_characters_as_text(
    appliance: Command, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    for name in (b"[red]x[", b"[b]", b"esc\x1b[31m", b"bad\xff", b":smile:"):
        os.mkdir(os.fsencode(appliance.root) + b"/" + name)
    if running:
        entry = {"version": "1", "state": "failed", "problem": "[/b] \x1b[31m \ud800"}
        row = {"bundle": "[red]x[", "model": "", "problem": "", "versions": [entry]}
        monkeypatch.setattr(admin, "ask", lambda *_: {"catalog": [row]})
    output = appliance.good("models", "list")
    shown = (
        ["[red]x[", r"[/b] \x1b[31m \ud800"] if running else ["[red]x[", "[b]", r"esc\x1b[31m", r"bad\xff", ":smile:"]
    )
    assert all(text in output for text in shown)
    assert "\x1b" not in output
    json.loads(appliance.good("models", "list", "--json"))


def test_inspect_shows_declared_methods(appliance: Command) -> None:
    """As they would be frozen."""
    declared = {"name": "ask", "arguments": [{"name": "x", "type": "list[float]"}], "returns": {"type": "list[float]"}}
    graphs.write_raw(appliance.root / "b", methods=[declared])
    shown = yaml.safe_load(appliance.good("models", "inspect", "b").partition("\nversion ")[0])
    (method,) = shown["onnx"]["methods"]
    assert (method["name"], method["arguments"][0]["type"], method["returns"]["type"]) == (
        "ask",
        "list[float]",
        "list[float]",
    )


# ---- compile ---------------------------------------------------------------------------------------------------------


def test_compiling_without_a_gpu_says_what_is_missing(appliance: Command, source: Path) -> None:
    """Before anything is loaded or written."""
    appliance.good("models", "add", source)
    with appliance.file.open("a") as file:
        file.write('[engine]\ndevice = "cpu"\n')
    assert "TensorRT needs a GPU, and the device is the CPU: as configured." in appliance.bad(
        "models", "compile", "cats", status=7
    )
    assert not (appliance.folder / "state" / "cache").exists()
