"""The built-in profiles, and those from files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.core.errors import CertificateError
from appliance.pki.profiles import DEFAULTS, Kind, load_profile

SHIPPED = Path(__file__).parents[3] / "certs" / "profiles"


@pytest.mark.parametrize("kind", ["root", "server", "client"])
def test_the_documented_profiles_are_the_built_in_ones(kind: Kind) -> None:
    assert load_profile(SHIPPED / f"{kind}.toml", kind) == DEFAULTS[kind]


@pytest.mark.parametrize("kind", ["root", "server", "client"])
def test_the_documented_profiles_name_every_value(kind: Kind) -> None:
    text = (SHIPPED / f"{kind}.toml").read_text()
    absent = {"path_length"} if DEFAULTS[kind].path_length is None else set()
    for field in DEFAULTS[kind].__dataclass_fields__.keys() - absent:
        assert f"\n{field} = " in text


def test_keys_left_out_have_their_defaults(put: Callable[..., Path]) -> None:
    path = put("mine.toml", b'kind = "server"\ndays = 30\nkey = "rsa-3072"\n')
    profile = load_profile(path, "server")
    assert (profile.days, profile.key, profile.extended_key_usage) == (30, "rsa-3072", ("serverAuth",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('kind = "client"', "kind"),
        ("days = 3", "kind"),
        ("kind = ", "TOML"),
        ('kind = "server"\ndayz = 3', "dayz"),
        ('kind = "server"\ndays = "3"', "days"),
        ('kind = "server"\ndays = true', "days"),
        ('kind = "server"\ndays = 0', "days"),
        ('kind = "server"\ndays = 99999999', "days"),
        ('kind = "server"\nkey = "dsa"', "key"),
        ('kind = "server"\nkey = "ed25519"', "gRPC"),
        ('kind = "server"\nkey_usage = ["keyAgreement"]', "digitalSignature"),
        ('kind = "server"\nkey_usage = [1]', "key_usage"),
        ('kind = "server"\nkey_usage = ["digitalSignature", "keyCertSign"]', "keyCertSign"),
        ('kind = "server"\nkey_usage = ["digitalSignature", "sign"]', "sign"),
        ('kind = "server"\nextended_key_usage = ["clientAuth"]', "serverAuth"),
        ('kind = "server"\nextended_key_usage = ["serverAuth", "web"]', "web"),
        ('kind = "server"\npath_length = 0', "path_length"),
        ('kind = "server"\nbackdate_minutes = -5', "backdate_minutes"),
    ],
)
def test_a_bad_profile_is_refused_with_its_file_and_key(put: Callable[..., Path], text: str, says: str) -> None:
    path = put("mine.toml", text.encode())
    with pytest.raises(CertificateError, match=says) as caught:
        load_profile(path, "server")
    assert str(path) in str(caught.value)


def test_all_problems_of_a_profile_are_told_at_once(put: Callable[..., Path]) -> None:
    path = put("mine.toml", b'kind = "root"\ndays = 0\nkey_usage = ["cRLSign"]\npath_length = -1\n')
    with pytest.raises(CertificateError) as caught:
        load_profile(path, "root")
    for word in ("days", "keyCertSign", "path_length"):
        assert word in str(caught.value)


def test_a_missing_profile_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"none\.toml"):
        load_profile(tmp_path / "none.toml", "server")
