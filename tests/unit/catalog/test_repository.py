"""The repository keeps what is served in step with the disk, and no bundle hurts another.

Real files in a real folder, and a small fake in place of a loaded model: loading is what the engine's tests are about.
"""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support import graphs
from support.graphs import write_raw
from support.waiting import eventually_async

from appliance.catalog import changes
from appliance.catalog import repository as module
from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.catalog.repository import Repository
from appliance.catalog.state import write_held
from appliance.catalog.view import State, describe
from appliance.core.config import Catalog
from appliance.core.errors import BundleInvalid, ConfigError, NotDeployed, NotReady, UnknownModel


class Fake:
    """A servable that says which file it was made of, and what was done to it."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.problem: str | None = None
        self.drained = False
        self.closed = False

    async def drain(self) -> None:
        assert not self.closed
        self.drained = True

    def close(self) -> None:
        self.closed = True


class World:
    """A root, a state folder, a repository on them, and a loader that can be told to wait or to fail."""

    def __init__(self, folder: Path) -> None:
        self.root, self.state = folder / "models", folder / "state"
        self.root.mkdir()
        self.state.mkdir()
        self.loaded: list[tuple[str, str, Fake]] = []
        self.swapped: list[str] = []
        self.changes = 0
        self.gates: dict[str, asyncio.Event] = {}
        self.failing: dict[str, Exception] = {}
        self.task: asyncio.Task[None] | None = None

    def settings(self, **more: Any) -> Catalog:
        return Catalog(root=self.root, state_dir=self.state, **{"scan_interval_s": 0.01, "settle_s": 0, **more})

    def open(self, **more: Any) -> Repository[Fake]:
        self.repository = Repository(self.settings(**more), self.load, self.changed, self.swapped.append)
        return self.repository

    def watch(self, **more: Any) -> Repository[Fake]:
        repository = self.open(**more)
        self.task = asyncio.create_task(repository.run())
        return repository

    def changed(self) -> None:
        self.changes += 1

    async def load(self, bundle: Path, config: BundleConfig, version: VersionFolder) -> Fake:
        if bundle.name in self.gates:
            await self.gates[bundle.name].wait()
        if bundle.name in self.failing:
            raise self.failing[bundle.name]
        content = version.model_file.read_bytes()
        if b"bad" in content:
            raise BundleInvalid(f"{version.model_file} is bad.")
        fake = Fake(content)
        self.loaded.append((bundle.name, version.id, fake))
        return fake

    async def stop(self) -> None:
        if self.task:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task
        await self.repository.close()

    # what an operator does

    def put(self, name: str, content: bytes = b"good", version: str = "1", model_id: str = "") -> Path:
        """Write a version in place; its signature differs from that of any content before."""
        folder = self.root / name
        config = json.dumps(graphs.bundle_config(folder, "tensor-to-tensor", {}, model_id=model_id or name))
        present = folder / "config.yaml"
        same = present.is_file() and present.read_text() == config
        return graphs.write_bundle(folder, content, None if same else config, version=version)

    # what a caller sees

    def content(self, name: str, version: str = "") -> bytes | None:
        """What answers for a model now; None when nothing does."""
        try:
            with self.repository.use("", "", name, version) as fake:
                return fake.content
        except (NotReady, NotDeployed, UnknownModel):
            return None

    async def until(self, name: str, content: bytes | None, version: str = "") -> None:
        await eventually_async(lambda: self.content(name, version) == content, what=f"{name} answers {content!r}")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    made.open()
    yield made
    await made.stop()


# ---- adding and removing ---------------------------------------------------------------------------------------------


async def test_a_bundle_that_is_there_at_start_is_served_once_settled(world: World) -> None:
    world.put("a")
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert world.content("a") == b"good"
    assert world.repository.not_ready() == {}
    assert world.changes > 0


async def test_a_bundle_that_was_added_as_a_whole_is_not_waited_for(world: World, tmp_path: Path) -> None:
    """`appliance models add` and `setup` rename it into place. One that is copied there is waited for as ever, and so
    is an added one that somebody touches afterwards."""
    source = tmp_path / "source"
    write_raw(source / "added", graphs.identity_model())
    changes.add(source / "added", world.settings())
    shutil.copytree(world.root / "added", world.root / "copied")
    shutil.copytree(world.root / "added", world.root / "swapped")
    changes.add(source / "added", world.settings(), name="touched")
    os.utime(world.root / "touched" / "1" / "model.onnx", (1, 1))
    changes.add(source / "added", world.settings(), name="odd")
    changes.remove("odd", "", world.settings())
    os.rename(world.root / "swapped", world.root / "odd")

    world.open(settle_s=3600)
    await world.repository.look()
    settling = {bundle.name: bundle.settling for bundle in world.repository.bundles}
    assert settling == {"added": False, "copied": True, "odd": True, "touched": True}


async def test_a_note_that_cannot_be_read_costs_only_time(world: World, tmp_path: Path) -> None:
    write_raw(tmp_path / "a", graphs.identity_model())
    world.state.joinpath("published.json").write_text("[")
    changes.add(tmp_path / "a", world.settings())
    world.open(settle_s=3600)
    await world.repository.look()
    assert [bundle.settling for bundle in world.repository.bundles] == [True]


async def test_an_empty_root_settles_at_once(world: World) -> None:
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert world.repository.bundles == []


async def test_a_bundle_renamed_into_place_is_served_and_removed_is_gone(world: World) -> None:
    world.watch()
    await world.repository.wait_settled()
    world.put(".staging-x", model_id="a")
    await asyncio.sleep(0)
    assert world.repository.bundles == []
    os.rename(world.root / ".staging-x", world.root / "a")
    await world.until("a", b"good")
    fake = world.loaded[0][2]
    os.rename(world.root / "a", world.root / ".gone")
    await eventually_async(lambda: not world.repository.bundles)
    await eventually_async(lambda: fake.closed)
    assert fake.drained
    with pytest.raises(UnknownModel, match="ListModels"):
        world.repository.find("", "", "a")


async def test_hidden_folders_and_other_files_are_not_bundles(world: World) -> None:
    world.put(".hidden")
    (world.root / "README.md").write_text("x")
    (world.root / "model.bin").write_text("x")
    world.watch()
    await world.repository.wait_settled()
    assert world.repository.bundles == []


async def test_a_bare_onnx_file_is_a_bundle(world: World) -> None:
    (world.root / "net.onnx").write_bytes(graphs.identity_model().SerializeToString())
    world.watch()
    await eventually_async(lambda: world.content("net") is not None)
    assert world.repository.find("", "", "net").versions["1"].config.sentence


async def test_files_that_still_change_are_not_read(world: World) -> None:
    """Settle time: a copy that goes on is left alone, and said to be so."""
    world.put("a", b"half")
    world.watch(settle_s=3600)
    await eventually_async(lambda: world.repository.bundles)
    await eventually_async(lambda: describe(world.repository, lambda _: {})[0]["problem"])
    assert world.repository.not_ready() == {"a": "its files are still changing"}
    assert world.loaded == []


async def test_a_bundle_is_read_once_it_has_been_quiet_for_the_settle_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is turned by hand; every look sees a file grow until the copy ends."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

        def time(self) -> float:
            return os.stat(world.root / "a" / "1" / "model.onnx").st_ctime  # as if the change were just now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    world.put("a", b"x")
    repository = world.open(settle_s=10)
    for step in range(1, 5):
        await repository.look()
        world.put("a", b"x" * (step + 1))
        clock.now += 9
        await repository.look()
        assert repository.bundles[0].versions == {}
    clock.now += 9.9
    await repository.look()
    assert repository.bundles[0].versions == {}
    clock.now += 0.2
    monkeypatch.setattr(clock, "time", lambda: 0.0, raising=False)
    await repository.look()
    monkeypatch.undo()
    await world.until("a", b"x" * 5)
    assert [content.content for _, _, content in world.loaded] == [b"x" * 5]


async def test_files_that_were_quiet_long_before_start_are_read_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put("a")
    real = module._look_at
    monkeypatch.setattr(module, "_look_at", lambda path: (real(path)[0], 0.0))
    repository = world.open(settle_s=30)
    await repository.look()
    await world.until("a", b"good")


# ---- bad bundles -----------------------------------------------------------------------------------------------------


def half_utf8(folder: Path) -> None:
    (folder / "1" / "labels.txt").write_bytes(b"\xff\xfe")
    (folder / "config.yaml").unlink()
    (folder / "1" / "model.onnx").write_bytes(graphs.identity_model().SerializeToString())


BAD: dict[str, Callable[[Path], object]] = {
    "no version": lambda folder: shutil.rmtree(folder / "1"),
    "config is not YAML": lambda folder: (folder / "config.yaml").write_bytes(b"\xff["),
    "config has a number as id": lambda folder: (folder / "config.yaml").write_text("model: {id: 7}\nonnx: {}\n"),
    "config has an impossible date": lambda folder: (folder / "config.yaml").write_text("model: {id: 2024-99-99}\n"),
    "config is brackets": lambda folder: (folder / "config.yaml").write_text("[" * 10_000),
    "link out": lambda folder: (folder / "x").symlink_to("/etc/passwd"),
    "nothing to infer from": lambda folder: (folder / "config.yaml").unlink(),
    "labels are not UTF-8": half_utf8,
    "model is bad": lambda folder: (folder / "1" / "model.onnx").write_bytes(b"bad"),
    "checksums differ": lambda folder: (folder / "1" / "SHA256SUMS").write_text("0" * 64 + "  model.onnx\n"),
    "checksums are not text": lambda folder: (folder / "1" / "SHA256SUMS").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("kind", list(BAD))
async def test_one_bad_bundle_never_hurts_another_and_its_reason_is_visible(world: World, kind: str) -> None:
    for name in ("a", "m", "z"):
        world.put(name)
    BAD[kind](world.root / "m")
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert (world.content("a"), world.content("m"), world.content("z")) == (b"good", None, b"good")
    (problem,) = world.repository.not_ready().values()
    assert problem
    rows = {row["bundle"]: row for row in describe(world.repository, lambda _: {})}
    shown = str(rows["m"]["problem"]) + "".join(str(entry["problem"]) for entry in rows["m"]["versions"])  # type: ignore[attr-defined]
    assert shown
    assert not rows["a"]["problem"]


@pytest.mark.parametrize(
    "error", [BundleInvalid("no"), ConfigError("no"), OSError("no"), RuntimeError("no"), MemoryError(), KeyError("x")]
)
async def test_whatever_loading_raises_is_that_bundles_failure_only(world: World, error: Exception) -> None:
    world.failing["m"] = error
    for name in ("a", "m", "z"):
        world.put(name)
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert set(world.repository.not_ready()) == {"m:1"}
    with pytest.raises(NotDeployed, match="appliance models list") as caught, world.repository.use("", "", "m", ""):
        pass
    assert type(error).__name__ in caught.value.detail or "no" in caught.value.detail
    assert world.content("z") == b"good"


async def test_whatever_reading_raises_is_that_bundles_failure_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parser's own bug must not end the look before the other bundles had their turn."""
    real = module._read

    def read(path: Path, settings: Catalog) -> Any:
        if path.name == "a":
            raise AttributeError("surprise")
        return real(path, settings)

    monkeypatch.setattr(module, "_read", read)
    world.put("a")
    world.put("z")
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert world.content("z") == b"good"
    assert "surprise" in world.repository.not_ready()["a"]


async def test_a_mended_bundle_is_served(world: World) -> None:
    folder = world.put("a", b"bad")
    world.watch()
    await world.repository.wait_settled()
    assert world.content("a") is None
    (folder / "1" / "model.onnx").write_bytes(b"mended")
    await world.until("a", b"mended")
    assert world.repository.not_ready() == {}


async def test_mended_rights_are_noticed(world: World) -> None:
    """A file copied as root is not readable for the service; `chmod` alone must suffice."""
    folder = world.put("a")
    world.failing["a"] = PermissionError(13, "Permission denied")
    world.watch()
    await world.repository.wait_settled()
    assert "Permission denied" in world.repository.not_ready()["a:1"]
    del world.failing["a"]
    (folder / "1" / "model.onnx").chmod(0o604)
    await world.until("a", b"good")


async def test_a_folder_named_like_a_file_is_a_bundle_with_a_reason(world: World) -> None:
    (world.root / "x.onnx").mkdir()
    os.mkfifo(world.root / "pipe.onnx")
    (world.root / "dead.onnx").symlink_to("/nowhere/at/all")
    world.put("a")
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert set(world.repository.not_ready()) == {"x.onnx", "pipe.onnx", "dead.onnx"}
    assert world.content("a") == b"good"


async def test_a_folder_and_a_file_of_one_name_are_two_bundles_and_none_hides_the_other(world: World) -> None:
    world.put("net", b"folder")
    (world.root / "net.onnx").write_bytes(graphs.identity_model().SerializeToString())
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert [str(bundle.key) for bundle in world.repository.bundles] == ["tester/tests/net", "appliance/main/net"]
    with world.repository.use(graphs.USER, "", "net", "") as fake:
        assert fake.content == b"folder"


# ---- two bundles, one model ------------------------------------------------------------------------------------------


async def test_of_two_bundles_that_say_they_are_one_model_the_second_says_so(world: World) -> None:
    world.put("a", b"first", model_id="same")
    world.put("b", b"second", model_id="same")
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert world.content("same") == b"first"
    problem = world.repository.not_ready()["b"]
    assert "tester/tests/same" in problem
    assert "'a'" in problem


async def test_when_the_first_goes_the_second_takes_its_place(world: World) -> None:
    world.put("a", b"first", model_id="same")
    world.put("b", b"second", model_id="same")
    world.watch()
    await world.until("same", b"first")
    shutil.rmtree(world.root / "a")
    await world.until("same", b"second")
    assert world.repository.not_ready() == {}


async def test_when_the_first_is_renamed_the_second_takes_its_place(world: World) -> None:
    world.put("a", b"first", model_id="same")
    world.put("b", b"second", model_id="same")
    world.watch()
    await world.until("same", b"first")
    world.put("a", b"first", model_id="other")
    await world.until("same", b"second")
    await world.until("other", b"first")


async def test_one_model_id_of_two_owners_needs_the_owner(world: World) -> None:
    for name, user in (("a", "ada"), ("b", "bob")):
        config = graphs.bundle_config(world.root / name, "tensor-to-tensor", {}, model_id="same", user_id=user)
        graphs.write_bundle(world.root / name, user.encode(), config)
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    with pytest.raises(UnknownModel, match="Several models match"):
        world.repository.find("", "", "same")
    with world.repository.use("bob", "", "same", "") as fake:
        assert fake.content == b"bob"


# ---- hot swap --------------------------------------------------------------------------------------------------------


async def test_a_change_in_place_is_swapped_in_and_the_old_one_drained_when_its_users_leave(world: World) -> None:
    world.put("a", b"old")
    world.watch()
    await world.until("a", b"old")
    old = world.loaded[0][2]
    with world.repository.use("", "", "a", "") as held:
        world.put("a", b"newer")
        await world.until("a", b"newer")
        assert held is old
        assert not old.drained
        assert not old.closed
    await eventually_async(lambda: old.closed)
    assert old.drained
    assert world.swapped == ["a"]


async def test_the_old_one_answers_while_the_new_one_loads(world: World) -> None:
    world.put("a", b"old")
    world.watch()
    await world.until("a", b"old")
    world.gates["a"] = asyncio.Event()
    world.put("a", b"newer")
    await eventually_async(lambda: "loading" in world.repository.not_ready().values())
    assert world.content("a") == b"old"
    world.gates["a"].set()
    await world.until("a", b"newer")


async def test_several_users_are_all_waited_for(world: World) -> None:
    world.put("a", b"old")
    world.watch()
    await world.until("a", b"old")
    old = world.loaded[0][2]
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(world.repository.use("", "", "a", ""))
        second.enter_context(world.repository.use("", "", "a", ""))
        world.put("a", b"newer")
        await world.until("a", b"newer")
        first.close()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not old.closed
    await eventually_async(lambda: old.closed)


@pytest.mark.parametrize(
    "kind", [kind for kind in BAD if kind not in ("nothing to infer from", "labels are not UTF-8")]
)
async def test_new_content_that_is_bad_leaves_the_last_good_one_serving(world: World, kind: str) -> None:
    world.put("a", b"old")
    world.watch()
    await world.until("a", b"old")
    BAD[kind](world.root / "a")
    await eventually_async(lambda: any(problem != "loading" for problem in world.repository.not_ready().values()))
    assert world.content("a") == b"old"
    assert not world.loaded[0][2].closed
    (row,) = describe(world.repository, lambda _: {})
    shown = str(row["problem"]) + "".join(str(entry["problem"]) for entry in row["versions"])  # type: ignore[attr-defined]
    assert shown


async def test_a_change_while_it_loads_ends_with_the_last_content(world: World) -> None:
    world.gates["a"] = asyncio.Event()
    world.put("a", b"one")
    world.watch()
    await eventually_async(lambda: "loading" in world.repository.not_ready().values())
    world.put("a", b"three")
    world.gates["a"].set()
    await world.until("a", b"three")
    await world.repository.wait_settled()
    assert world.content("a") == b"three"


async def test_removed_while_it_loads_is_never_served(world: World) -> None:
    world.gates["a"] = asyncio.Event()
    world.put("a")
    world.watch()
    await eventually_async(lambda: "loading" in world.repository.not_ready().values())
    with pytest.raises(NotReady, match="still loading"), world.repository.use("", "", "a", ""):
        pass
    shutil.rmtree(world.root / "a")
    await eventually_async(lambda: not world.repository.bundles)
    world.gates["a"].set()
    await world.repository.wait_settled()
    assert world.loaded == []


async def test_a_version_that_does_not_change_is_not_loaded_again(world: World) -> None:
    world.put("a", b"one", version="1")
    world.watch()
    await world.until("a", b"one", "1")
    world.put("a", b"two", version="2")
    await world.until("a", b"two", "2")
    await world.repository.look()
    assert [(name, version) for name, version, _ in world.loaded] == [("a", "1"), ("a", "2")]


async def test_a_changed_config_reloads_every_version(world: World) -> None:
    world.put("a", b"one", version="1")
    world.put("a", b"two", version="2")
    world.watch()
    await world.repository.wait_settled()
    config = world.root / "a" / "config.yaml"
    config.write_text(config.read_text() + "\n# changed\n")
    await eventually_async(lambda: len(world.loaded) == 4)
    assert {version for _, version, _ in world.loaded[2:]} == {"1", "2"}


async def test_one_heavy_bundle_loads_at_a_time(world: World) -> None:
    running = []
    peak = []
    inner = world.load

    async def load(bundle: Path, config: BundleConfig, version: VersionFolder) -> Fake:
        running.append(1)
        peak.append(len(running))
        await asyncio.sleep(0)
        made = await inner(bundle, config, version)
        running.pop()
        return made

    world.load = load  # type: ignore[method-assign]
    for name in ("a", "b", "c"):
        world.put(name)
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert peak == [1, 1, 1]


async def test_a_servable_that_died_is_not_ready_and_says_why(world: World) -> None:
    world.put("a")
    world.watch()
    await world.until("a", b"good")
    world.loaded[0][2].problem = "its worker died"
    assert world.repository.not_ready() == {"a:1": "its worker died"}
    with pytest.raises(NotDeployed) as caught, world.repository.use("", "", "a", ""):
        pass
    assert caught.value.detail == "its worker died"
    (row,) = describe(world.repository, lambda _: {})
    assert "its worker died" in str(row)


# ---- versions --------------------------------------------------------------------------------------------------------


async def test_newest_is_the_highest_number_and_all_versions_answer(world: World) -> None:
    for version in ("2", "10", "9"):
        world.put("a", f"v{version}".encode(), version=version)
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert world.content("a") == b"v10"
    assert [world.content("a", version) for version in ("2", "9", "10")] == [b"v2", b"v9", b"v10"]
    with pytest.raises(UnknownModel, match=r"no version '3'; ready versions: 10, 9, 2"):
        world.repository.version(world.repository.find("", "", "a"), "3")


async def test_named_versions_are_ordered_by_when_they_were_first_seen(world: World) -> None:
    world.put("a", b"zebra", version="zebra")
    world.watch()
    await world.until("a", b"zebra")
    world.put("a", b"ant", version="ant")
    await world.until("a", b"ant")


async def test_newest_means_newest_ready(world: World) -> None:
    world.put("a", b"one", version="1")
    world.put("a", b"bad", version="2")
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert world.content("a") == b"one"
    assert set(world.repository.not_ready()) == {"a:2"}
    with pytest.raises(NotDeployed), world.repository.use("", "", "a", "2"):
        pass


async def test_what_was_found_before_follows_the_catalog(world: World) -> None:
    """A newer version, a death, a second owner of the name: each shows at the next request."""
    world.put("a", b"one", version="1")
    world.watch()
    await world.until("a", b"one")
    assert world.content("a") == b"one"
    world.put("a", b"two", version="2")
    await world.until("a", b"two")
    newest = next(fake for _, version, fake in world.loaded if version == "2")
    newest.problem = "its worker died"
    assert world.content("a") == b"one"
    config = graphs.bundle_config(world.root / "b", "tensor-to-tensor", {}, model_id="a", user_id="bob")
    graphs.write_bundle(world.root / "b", b"bob", config)
    await eventually_async(lambda: any(b.name == "b" and b.key for b in world.repository.bundles))
    with pytest.raises(UnknownModel, match="Several models match"):
        world.repository.use("", "", "a", "")
    await eventually_async(lambda: world.repository.find("bob", "", "a").versions["1"].ready)
    with world.repository.use("bob", "", "a", "") as fake:
        assert fake.content == b"bob"


async def test_a_held_version_is_not_served_and_comes_back_when_released(world: World) -> None:
    world.put("a", b"one", version="1")
    world.put("a", b"two", version="2")
    world.watch()
    await world.until("a", b"two")
    second = next(fake for _, version, fake in world.loaded if version == "2")
    write_held(world.state, {"a": frozenset({"2"})})
    await world.until("a", b"one")
    await eventually_async(lambda: second.closed)
    assert world.content("a", "2") is None
    assert world.repository.not_ready() == {}
    assert world.repository.find("", "", "a").versions["2"].state is State.HELD
    write_held(world.state, {})
    await world.until("a", b"two")
    assert [version for _, version, _ in world.loaded].count("1") == 1


async def test_a_removed_version_is_drained_and_the_others_go_on(world: World) -> None:
    world.put("a", b"one", version="1")
    world.put("a", b"two", version="2")
    world.watch()
    await world.until("a", b"two")
    second = next(fake for _, version, fake in world.loaded if version == "2")
    shutil.rmtree(world.root / "a" / "2")
    await world.until("a", b"one")
    await eventually_async(lambda: second.closed)
    assert [version for _, version, _ in world.loaded].count("1") == 1


# ---- memory ----------------------------------------------------------------------------------------------------------


async def test_when_versions_were_first_seen_survives_a_restart_for_every_bundle(world: World) -> None:
    """Order of named versions, so what "newest" means, must not change because the service was restarted."""
    for name in ("a", "b", "c"):
        world.put(name, b"first", version="zebra")
    world.watch()
    for name in ("a", "b", "c"):
        await world.until(name, b"first")
    for name in ("a", "b", "c"):
        world.put(name, b"second", version="ant")
    for name in ("a", "b", "c"):
        await world.until(name, b"second")
    await world.stop()
    before = json.loads((world.state / "catalog.json").read_text())
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    assert [world.content(name) for name in ("a", "b", "c")] == [b"second"] * 3
    after = json.loads((world.state / "catalog.json").read_text())
    assert after == before
    assert set(after) == {"a", "b", "c"}


async def test_a_bundle_that_is_unreadable_for_a_while_is_not_forgotten(world: World) -> None:
    world.put("a", b"first", version="zebra")
    world.watch()
    await world.until("a", b"first")
    await world.stop()
    before = json.loads((world.state / "catalog.json").read_text())
    config = (world.root / "a" / "config.yaml").read_text()
    (world.root / "a" / "config.yaml").write_text("[")
    world.put("b")
    world.watch()
    await world.until("b", b"good")
    (world.root / "a" / "config.yaml").write_text(config)
    await world.until("a", b"first")
    after = json.loads((world.state / "catalog.json").read_text())
    assert after["a"]["zebra"]["first_seen"] == before["a"]["zebra"]["first_seen"]


async def test_what_is_removed_is_forgotten(world: World) -> None:
    world.put("a")
    world.put("b")
    world.watch()
    await world.until("b", b"good")
    shutil.rmtree(world.root / "a")
    await eventually_async(lambda: set(json.loads((world.state / "catalog.json").read_text())) == {"b"})


async def test_a_full_disk_for_the_state_does_not_stop_serving(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("appliance.catalog.state.write_atomically", full)
    world.put("a")
    world.watch()
    await world.until("a", b"good")
    world.put("a", b"newer")
    await world.until("a", b"newer")
    assert not (world.state / "catalog.json").exists()


async def test_wanted_state_that_became_unreadable_keeps_what_was_held(world: World) -> None:
    world.put("a", b"one", version="1")
    world.put("a", b"two", version="2")
    write_held(world.state, {"a": frozenset({"2"})})
    world.watch()
    await world.until("a", b"one")
    (world.state / "wanted.json").write_text("broken")
    world.put("b")
    await world.until("b", b"good")
    assert world.content("a") == b"one"
    assert world.content("a", "2") is None


@pytest.mark.parametrize("name", ["catalog.json", "wanted.json"])
async def test_state_that_is_not_ours_is_told_at_start(world: World, name: str) -> None:
    (world.state / name).write_text("broken")
    with pytest.raises(ConfigError, match=name):
        Repository(world.settings(), world.load)


async def test_a_root_or_state_folder_that_is_not_there_is_told_at_start(world: World) -> None:
    for key in ("root", "state_dir"):
        with pytest.raises(ConfigError, match=f"catalog.{key}"):
            Repository(world.settings().model_copy(update={key: world.root / "none"}), world.load)


async def test_only_looking_writes_nothing(world: World) -> None:
    world.put("a")
    repository = Repository(world.settings(), world.load, remember=False)
    await repository.look()
    await repository.wait_settled()
    assert os.listdir(world.state) == []
    await repository.close()


# ---- the watch itself ------------------------------------------------------------------------------------------------


async def test_a_root_that_vanishes_for_a_while_stops_nothing(world: World) -> None:
    """A disk error must neither end the watch nor take down what is served."""
    world.put("a")
    world.watch()
    await world.until("a", b"good")
    os.rename(world.root, world.root.with_name("away"))
    (world.root.with_name("away") / "a" / "1" / "model.onnx").write_bytes(b"changed meanwhile")
    await asyncio.sleep(0.03)  # some looks that fail; whether one ran does not matter for what follows
    assert world.content("a") == b"good"
    os.rename(world.root.with_name("away"), world.root)
    await world.until("a", b"changed meanwhile")


async def test_a_root_that_cannot_be_read_is_said_once_and_shown_until_it_is_back(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.put("a")
    world.watch()
    await world.until("a", b"good")
    os.rename(world.root, world.root.with_name("away"))
    await eventually_async(lambda: "catalog.root" in world.repository.not_ready(), what="the root's problem")
    assert "No such file or directory" in world.repository.not_ready()["catalog.root"]
    with pytest.raises(ConfigError, match=r"catalog\.root .* cannot be read"):
        await world.repository.look()
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1
    assert not any(record.exc_info for record in caplog.records)
    assert world.content("a") == b"good"
    os.rename(world.root.with_name("away"), world.root)
    await eventually_async(lambda: not world.repository.not_ready(), what="the root is back")
    assert world.content("a") == b"good"


async def test_a_version_that_a_killed_add_set_aside_is_served_again(world: World) -> None:
    folder = world.put("a")
    (folder / "1").rename(folder / ".replaced-1")
    world.watch()
    await world.until("a", b"good")
    assert not (folder / ".replaced-1").exists()


async def test_only_looking_puts_nothing_back(world: World) -> None:
    folder = world.put("a")
    (folder / "1").rename(folder / ".replaced-1")
    await Repository(world.settings(), world.load, remember=False).look()
    assert (folder / ".replaced-1").exists()


async def test_names_that_no_bundle_may_have_are_problems_under_printable_names(world: World) -> None:
    """One folder must not keep `/readyz` and `/status` from being written."""
    names = (b"bad\xff", b"esc\x1b[31m\nline", b"my model", rb"bad\xff")
    for name in names:
        os.mkdir(os.fsencode(world.root) + b"/" + name)
    world.put("a")
    os.mkfifo(os.fsencode(world.put("b") / "1") + b"/note\xff.txt")
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    problems = world.repository.not_ready()
    assert set(problems) == {r"bad\xff", r"esc\x1b[31m\nline", "my model", r"bad\\xff", "b"}
    assert all(text.isprintable() for text in problems.values())
    assert all(row["bundle"].isprintable() for row in describe(world.repository, lambda _: {}))  # type: ignore[attr-defined]
    assert world.content("a") == b"good"


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "config.json", "labels.txt", "tokenizer.json", "SHA256SUMS"]
)
async def test_a_pipe_in_one_bundle_does_not_keep_the_others_from_being_read(world: World, name: str) -> None:
    os.mkfifo(world.put("a") / "1" / name)
    world.watch()
    await asyncio.wait_for(world.repository.wait_settled(), 20)
    world.put("later")
    await world.until("later", b"good")
    assert "is not a regular file" in world.repository.not_ready()["a"]


async def test_a_bundle_that_cannot_be_looked_at_hurts_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    look_at, broken = module._look_at, True

    def flaky(path: Path) -> Any:
        if broken and path.name == "a":
            raise OSError(5, "Input/output error", str(path))
        return look_at(path)

    monkeypatch.setattr(module, "_look_at", flaky)
    world.put("a")
    world.put("b")
    world.watch()
    await world.until("b", b"good")
    await world.repository.look()
    assert "Input/output error" in world.repository.not_ready()["a"]
    assert len([record for record in caplog.records if "Input/output" in record.message]) == 1
    broken = False
    await world.until("a", b"good")


async def test_two_looks_at_once_do_not_disturb_each_other(world: World) -> None:
    world.put("a")
    repository = world.open()
    await asyncio.gather(*(repository.look() for _ in range(5)))
    await repository.wait_settled()
    assert len(world.loaded) == 1
    shutil.rmtree(world.root / "a")
    await asyncio.gather(*(repository.look() for _ in range(5)))
    assert repository.bundles == []


async def test_being_woken_looks_at_once(world: World) -> None:
    world.watch(scan_interval_s=3600)
    await world.repository.wait_settled()
    world.put("a")
    world.repository.wake()
    await world.until("a", b"good")


async def test_closing_lets_everything_go_and_stops_what_loads(world: World) -> None:
    world.put("a")
    world.watch()
    await world.until("a", b"good")
    world.gates["b"] = asyncio.Event()
    world.put("b")
    await eventually_async(lambda: "loading" in world.repository.not_ready().values())
    await asyncio.wait_for(world.stop(), 20)
    assert [fake.closed for _, _, fake in world.loaded] == [True]


async def test_the_catalog_as_plain_data_says_what_is_served(world: World) -> None:
    world.put("a", b"one", version="1")
    world.watch()
    await world.until("a", b"one")
    (row,) = describe(world.repository, lambda fake: {"device": fake.content.decode()})
    assert (row["bundle"], row["model"], row["problem"]) == ("a", "tester/tests/a", "")
    (version,) = row["versions"]  # type: ignore[misc]
    assert (version["version"], version["state"], version["device"]) == ("1", "ready", "one")  # type: ignore[index]
    assert set(version["sha256"]) == {"model.onnx"}  # type: ignore[index]
    assert json.dumps(row)
