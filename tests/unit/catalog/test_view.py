"""A front's copy of the catalog answers as the catalog itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.catalog.bundle import VersionFolder, read_config
from appliance.catalog.view import Bundle, Mirror, Running, State, Version, View, tell
from appliance.core.errors import NotDeployed, NotReady, UnknownModel

MODELS = Path(__file__).parents[3] / "models"


class Loaded:
    """What answers for a version."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.problem: str | None = None

    async def drain(self) -> None: ...

    def close(self) -> None: ...


class Catalog(View[Loaded]):
    """One whose bundles the test sets."""

    complete = True

    def __init__(self, bundles: list[Bundle[Loaded]]) -> None:
        super().__init__()
        self._bundles = {bundle.name: bundle for bundle in bundles}


def bundle(*versions: tuple[str, State, int | None], name: str = "digits") -> Bundle[Loaded]:
    """The shipped digits with these versions: id, state, number of what answers."""
    path = MODELS / "digits"
    config, _, _ = read_config(path, "appliance", "main")
    assert config is not None
    made: Bundle[Loaded] = Bundle(name, path, key=config.key, settling=False)
    for version_id, state, number in versions:
        folder = VersionFolder(version_id, path / "1", path / "1" / "model.onnx")
        version: Version[Loaded] = Version(version_id, config, folder, (), 5.0, state, problem="why")
        version.checksums, version.loaded_at, version.load_seconds = {"model.onnx": "ab"}, 6.0, 0.5
        version.running = None if number is None else Running(Loaded(number))
        made.versions[version_id] = version
    return made


def mirrored(catalog: Catalog, mirror: Mirror[Loaded] | None = None) -> Mirror[Loaded]:
    """A copy, by way of what is sent, in which `number` answers for a version."""
    mirror = mirror or Mirror()
    told = json.loads(json.dumps(tell(catalog, lambda loaded: loaded.number)))
    mirror.take(told, {number: Running(Loaded(number)) for number in range(10)})
    return mirror


def test_a_copy_has_all_that_callers_are_told() -> None:
    """Configs, states, times and checksums; and what answers, by its number."""
    catalog = Catalog([bundle(("1", State.READY, 4), ("2", State.LOADING, None))])
    mirror = mirrored(catalog)
    original, copy = catalog.bundles[0], mirror.bundles[0]
    assert (copy.name, copy.path, copy.key, copy.settling) == (original.name, original.path, original.key, False)
    for version_id, version in original.versions.items():
        found = copy.versions[version_id]
        for field in ("config", "folder", "first_seen", "state", "problem", "checksums", "loaded_at", "load_seconds"):
            assert getattr(found, field) == getattr(version, field), field
        assert found.ready == version.ready
    running = copy.versions["1"].running
    assert running is not None
    assert running.servable.number == 4
    assert [v.id for v in mirror.versions(copy)] == [v.id for v in catalog.versions(original)]


def test_a_config_that_did_not_change_is_the_same_object() -> None:
    """Replies that were prepared with it stay good."""
    catalog = Catalog([bundle(("1", State.READY, 4))])
    mirror = mirrored(catalog)
    before = mirror.bundles[0].versions["1"].config
    assert mirrored(catalog, mirror).bundles[0].versions["1"].config is before


def test_who_answers_changes_with_the_copy() -> None:
    """What was found before is not remembered beyond it."""
    mirror = mirrored(Catalog([bundle(("1", State.READY, 4))]))
    first = mirror.answering("", "", "digits", "").running
    assert first is not None
    mirrored(Catalog([bundle(("1", State.READY, 4), ("2", State.READY, 5))]), mirror)
    second = mirror.answering("", "", "digits", "").running
    assert second is not None
    assert (first.servable.number, second.servable.number) == (4, 5)


@pytest.mark.parametrize(
    ("versions", "error"),
    [((), UnknownModel), ((("1", State.LOADING, None),), NotReady), ((("1", State.FAILED, None),), NotDeployed)],
)
def test_what_does_not_answer_says_why(versions: Any, error: type[Exception]) -> None:
    """As the catalog itself does."""
    with pytest.raises(error):
        mirrored(Catalog([bundle(*versions)])).answering("", "", "digits", "")


def test_before_it_is_told_nothing_is_unknown() -> None:
    """There may be such a model."""
    with pytest.raises(NotReady):
        Mirror[Loaded]().find("", "", "digits")


def test_a_catalog_that_is_not_read_yet_makes_a_copy_that_is_not_either() -> None:
    """Nor is a model unknown there."""
    catalog = Catalog([])
    catalog.complete = False
    with pytest.raises(NotReady):
        mirrored(catalog).find("", "", "digits")
