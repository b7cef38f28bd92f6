"""Keys with another name: read for one version more, with a warning that says what to do."""

from pathlib import Path
from typing import Any

import pytest

from appliance import __version__
from appliance.core import config as configuration
from appliance.core import migration
from appliance.core.migration import CHANGES, Change, bring_up_to_date

RENAMED = Change("limits.picture_size", "limits.image_size", "0.2", "0.3")
MOVED = Change("server.level", "log.level", "0.2", "0.3")
GONE = Change("engine.magic", "", "0.2", "0.3", "Models choose by themselves.")
IN_TABLE = Change("principal.rate", "principal.requests_per_second", "0.2", "0.3")


@pytest.mark.parametrize(
    ("layer", "after"),
    [
        ({"limits": {"picture_size": 5}}, {"limits": {"image_size": 5}}),
        ({"limits": {"picture_size": 5, "image_size": 6}}, {"limits": {"image_size": 6}}),
        ({"server": {"level": "debug"}}, {"server": {}, "log": {"level": "debug"}}),
        ({"engine": {"magic": 1}}, {"engine": {}}),
        ({"principal": [{"name": "a", "rate": 3}]}, {"principal": [{"name": "a", "requests_per_second": 3}]}),
    ],
)
def test_old_keys_mean_what_they_meant(layer: dict[str, Any], after: dict[str, Any]) -> None:
    assert len(bring_up_to_date(layer, "f", (RENAMED, MOVED, GONE, IN_TABLE))) == 1
    assert layer == after


@pytest.mark.parametrize("layer", [{}, {"limits": {"image_size": 1}}, {"limits": 3}, {"limits": [1]}])
def test_what_is_up_to_date_or_malformed_is_left_as_it_is(layer: dict[str, Any]) -> None:
    before = dict(layer)
    assert bring_up_to_date(layer, "f", (RENAMED,)) == []
    assert layer == before


def test_a_warning_names_place_new_name_and_how_long() -> None:
    assert RENAMED.warning("/etc/x.toml") == (
        "limits.picture_size (/etc/x.toml) is called limits.image_size since 0.2; rename it. "
        "It is an error from 0.3 on."
    )
    assert GONE.warning("APPLIANCE_ENGINE__MAGIC") == (
        "engine.magic (APPLIANCE_ENGINE__MAGIC) means nothing since 0.2; remove it. Models choose by themselves. "
        "It is an error from 0.3 on."
    )


def test_a_configuration_with_old_keys_loads_and_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "CHANGES", (RENAMED, MOVED))
    monkeypatch.setattr(configuration, "VENDOR_FILE", tmp_path / "none")
    main = tmp_path / "appliance.toml"
    main.write_text('[limits]\npicture_size = "1MiB"\n')
    loaded = configuration.load(main, {"APPLIANCE_SERVER__LEVEL": "debug"})
    assert loaded.config.limits.image_size == 2**20
    assert loaded.config.log.level == "debug"
    assert [warning.split()[0] for warning in loaded.warnings] == ["limits.picture_size", "server.level"]
    origins = {key: origin for key, _, origin in loaded.rows()}
    assert origins["limits.image_size"] == str(main)
    assert origins["log.level"] == "APPLIANCE_SERVER__LEVEL"


def test_no_row_outlives_its_time_and_every_new_name_is_a_key() -> None:
    for change in CHANGES:
        assert [int(part) for part in __version__.split(".")] < [int(part) for part in change.until.split(".")]
        section, _, key = change.new.partition(".")
        assert not change.new or key in configuration._known_keys([section])
        section, _, key = change.old.partition(".")
        assert key not in configuration._known_keys([section])
