"""`appliance keys` and the store: shown once, stored as a hash, revoked at once, never lost to a broken file."""

import hashlib
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.command import Command

from appliance.api.keys import LOOK_S, KeyStore, create_key, digest, read_keys, revoke_key
from appliance.core.errors import ConfigError


def made(appliance: Command, *arguments: str) -> tuple[str, str]:
    """Id and key of a new key."""
    output = appliance.good("keys", "create", *arguments)
    return tuple(re.search(rf"^{name} +(\S+)$", output, re.M)[1] for name in ("id", "key"))  # type: ignore[index, return-value]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_key_is_256_random_bits_shown_once_and_stored_as_a_hash(appliance: Command) -> None:
    key_id, key = made(appliance, "--note", "for ada")
    other_id, other = made(appliance)
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    assert key != other
    stored = appliance.keys.read_text()
    assert key not in stored
    assert hashlib.sha256(key.encode()).hexdigest() in stored
    listed = appliance.good("keys", "list") + appliance.good("keys", "list", "--json")
    assert key not in listed
    assert digest(key) not in listed
    assert key_id in listed
    assert other_id in listed
    assert "for ada" in listed


def test_quiet_prints_the_key_alone(appliance: Command) -> None:
    output = appliance.good("keys", "create", "--quiet")
    assert re.fullmatch(r"[0-9a-f]{64}\n", output)
    assert KeyStore(appliance.keys).find(output.strip())


def test_the_file_is_for_its_owner_and_group_only(appliance: Command) -> None:
    old = os.umask(0)
    try:
        made(appliance)
    finally:
        os.umask(old)
    assert stat.S_IMODE(appliance.keys.stat().st_mode) & 0o027 == 0


def test_a_revoked_key_is_gone_and_the_others_stay(appliance: Command) -> None:
    key_id, key = made(appliance)
    _, other = made(appliance)
    assert f"revoked {key_id}" in appliance.good("keys", "revoke", key_id)
    store = KeyStore(appliance.keys)
    assert store.find(key) is None
    assert store.find(other)


def test_an_id_that_is_not_there_is_told_with_those_there_are(appliance: Command) -> None:
    key_id, _ = made(appliance)
    error = appliance.bad("keys", "revoke", "00000000x")
    assert "'00000000x'" in error
    assert key_id in error
    assert len(read_keys(appliance.keys)) == 1


def test_a_principal_must_be_configured(appliance: Command) -> None:
    assert "There is no [[principal]] 'ada'; configured: default" in appliance.bad(
        "keys", "create", "--principal", "ada"
    )
    appliance.file.write_text(appliance.file.read_text() + '[[principal]]\nname = "ada"\n')
    made(appliance, "--principal", "ada")
    assert [entry.principal for entry in read_keys(appliance.keys)] == ["ada"]


def test_listing_without_a_file_lists_nothing(appliance: Command) -> None:
    assert json.loads(appliance.good("keys", "list", "--json")) == []


def test_a_note_is_shown_as_text_without_markup_and_control_characters(appliance: Command) -> None:
    appliance.good("keys", "create", "--note", "[/x] [red]\x1b[31m :smile:")
    assert r"[/x] [red]\x1b[31m :smile:" in appliance.good("keys", "list")


def test_a_broken_file_is_told_and_never_overwritten(appliance: Command) -> None:
    appliance.keys.write_text("broken")
    for arguments in (("create",), ("list",), ("revoke", "x")):
        assert "keys.json" in appliance.bad("keys", *arguments)
    assert appliance.keys.read_text() == "broken"


def test_a_place_that_cannot_be_written_is_told(appliance: Command) -> None:
    (appliance.folder / "plain").write_text("x")
    assert "cannot be written" in appliance.bad(
        "keys", "create", "--keys-file", appliance.folder / "plain" / "keys.json"
    )


# ---- the store -------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_change_of_the_file_takes_effect_at_the_next_look(path: Path) -> None:
    """A new key is looked for at once; a revoked one may be found a moment longer, as many calls share a look."""
    now = [100.0]
    store = KeyStore(path, clock=lambda: now[0])
    assert len(store) == 0
    key, entry = create_key(path, "default", "")
    assert store.find(key) == entry
    revoke_key(path, entry.id)
    now[0] += LOOK_S / 2
    assert store.find(key) == entry
    now[0] += LOOK_S / 2
    assert store.find(key) is None


def test_an_unknown_key_is_none(path: Path) -> None:
    create_key(path, "default", "")
    store = KeyStore(path)
    for key in ("", "x", "0" * 64, "é", read_keys(path)[0].sha256, read_keys(path)[0].id):
        assert store.find(key) is None


BROKEN = [
    b"",
    b"{",
    b"\xff",
    b"[]",
    b"null",
    b"{}",
    b'{"keys": null}',
    b'{"keys": {}}',
    b'{"keys": ""}',
    b'{"keys": [{}]}',
    b'{"keys": [{"id": 1, "sha256": null, "principal": [], "note": "", "created_at": 0}]}',
    b'{"keys": [{"id": "a", "sha256": "b", "principal": "c", "note": "", "created_at": "d"}]}',
    b'{"keys": [7]}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_file_that_became_bad_leaves_the_keys_that_were_valid(path: Path, content: bytes) -> None:
    key, _ = create_key(path, "default", "")
    store = KeyStore(path)
    path.write_bytes(content)
    assert store.find(key)
    other, _ = create_key(path.with_name("good.json"), "default", "")
    os.replace(path.with_name("good.json"), path)
    assert store.find(other)
    assert store.find(key) is None


@pytest.mark.parametrize("content", BROKEN)
def test_a_file_that_is_bad_at_start_is_told(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"keys\.json"):
        KeyStore(path)


def test_a_file_that_went_away_leaves_the_keys_that_were_valid(path: Path) -> None:
    key, _ = create_key(path, "default", "")
    store = KeyStore(path)
    path.unlink()
    assert store.find(key)
    assert store.find(key)


def test_a_file_that_could_not_be_read_is_read_again_once_its_rights_are_mended(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keys create` as root: the daemon may look just before the file is given to its group."""
    store = KeyStore(path)
    key, _ = create_key(path, "default", "")
    real = Path.read_text

    def refused(self: Path, *arguments: object, **more: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)
    assert store.find(key) is None
    monkeypatch.setattr(Path, "read_text", real)
    path.chmod(0o644)
    assert store.find(key)


def test_keys_made_at_once_are_all_there(path: Path) -> None:
    """Two administrators at work: neither undoes the other's change."""
    with ThreadPoolExecutor(8) as pool:
        keys = [key for key, _ in pool.map(lambda number: create_key(path, "default", str(number)), range(24))]
    store = KeyStore(path)
    assert len(store) == 24
    assert all(store.find(key) for key in keys)


def test_a_store_can_become_another_one(tmp_path: Path) -> None:
    one, two = KeyStore(tmp_path / "one.json"), KeyStore(tmp_path / "two.json")
    key, _ = create_key(tmp_path / "two.json", "default", "")
    one.adopt(two)
    assert one.find(key)
