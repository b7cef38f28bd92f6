"""A client's files, made in a moment."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from appliance.connect.settings import Settings
from appliance.pki.keys import key_pem
from appliance.pki.leaf import Subject, issue
from appliance.pki.names import client_sans
from appliance.pki.profiles import CLIENT
from appliance.pki.root import create_root
from appliance.pki.signing import Issued, certificate_pem

NOW = datetime.now(UTC)
_LIFE_DAYS = 90


@dataclass
class Site:
    """A folder with a client's certificate, key and root, and the settings that name them."""

    root: Issued
    settings: Settings

    def make(self, name: str = "ada", days_left: float = 60) -> Issued:
        """A client certificate that ends in so many days."""
        profile = replace(CLIENT, days=_LIFE_DAYS)
        began = NOW - timedelta(days=_LIFE_DAYS - days_left)
        return issue(self.root, Subject(name, client_sans([f"uri:spiffe://site/{name}"])), profile, began)

    def install(self, made: Issued, passphrase: bytes | None = None) -> None:
        """Put a pair in place."""
        self.settings.certificate.write_bytes(certificate_pem(made.certificate))
        self.settings.key.touch(mode=0o600)
        self.settings.key.write_bytes(key_pem(made.key, passphrase))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """All is well in it."""
    made = Site(create_root("Site Root", None, NOW - timedelta(days=200)), settings_in(tmp_path))
    made.install(made.make())
    assert made.settings.ca is not None
    made.settings.ca.write_bytes(certificate_pem(made.root.certificate))
    return made


def settings_in(folder: Path, **more: Any) -> Settings:
    """Settings whose files lie in a folder."""
    names = {"certificate": folder / "client.crt", "key": folder / "client.key", "ca": folder / "ca.crt"}
    return Settings.model_validate({"upstream": "https://localhost:1", **names, **more})
