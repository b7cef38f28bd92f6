"""What the forwarder shows and trusts: read as a whole, kept until better files come."""

import logging
from pathlib import Path

import pytest

from appliance.connect import credentials
from appliance.connect.credentials import Credentials
from appliance.connect.settings import PASSPHRASE_VARIABLE
from appliance.core.errors import CertificateError
from appliance.pki.signing import certificate_pem

from .conftest import Site


def problem(site: Site) -> str:
    """Why the files cannot be used."""
    with pytest.raises(CertificateError) as error:
        Credentials(site.settings, {})
    return str(error.value)


def test_good_files_make_a_context_for_each_protocol(site: Site) -> None:
    loaded = Credentials(site.settings, {}).loaded
    assert set(loaded.contexts) == {"h2", "http/1.1"}
    assert loaded.title().startswith("'ada', issued by 'Site Root', valid until 20")
    assert loaded.problems() == []
    assert all(context.check_hostname for context in loaded.contexts.values())


def test_all_that_is_wrong_is_told_at_once(site: Site) -> None:
    site.settings.certificate.write_bytes(b"nothing")
    site.settings.key.unlink()
    assert site.settings.ca is not None
    site.settings.ca.write_bytes(certificate_pem(site.make().certificate))
    text = problem(site)
    assert f"{site.settings.certificate} (certificate): The content is not PEM" in text
    assert f"{site.settings.key} (key) does not exist" in text
    assert f"{site.settings.ca} (ca): 'ada' is not a certificate authority" in text


def test_a_key_of_another_certificate_is_refused(site: Site) -> None:
    certificate = site.settings.certificate.read_bytes()
    site.install(site.make())
    site.settings.certificate.write_bytes(certificate)
    assert "does not belong to" in problem(site)


def test_a_passphrase_comes_from_the_environment_or_a_file(site: Site, tmp_path: Path) -> None:
    site.install(site.make(), b"sesame")
    assert PASSPHRASE_VARIABLE in problem(site)
    assert Credentials(site.settings, {PASSPHRASE_VARIABLE: "sesame"}).loaded
    with pytest.raises(CertificateError, match="the passphrase is wrong"):
        Credentials(site.settings, {PASSPHRASE_VARIABLE: "wrong"})
    file = tmp_path / "passphrase"
    settings = site.settings.model_copy(update={"key_passphrase_file": file})
    with pytest.raises(CertificateError, match=r"passphrase \(key_passphrase_file\) does not exist"):
        Credentials(settings, {})
    file.write_bytes(b"sesame\r\nmore\n")
    assert Credentials(settings, {}).loaded


def test_changed_files_are_taken_over_and_bad_ones_are_not(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    shown = Credentials(site.settings, {})
    first = shown.loaded
    assert not shown.refresh()
    site.install(site.make("bob"))
    assert shown.refresh()
    assert "'bob'" in shown.loaded.title()
    second = shown.loaded
    assert second is not first
    site.settings.key.write_bytes(b"-----BEGIN PRIVATE KEY-----\nsecret\n")
    for _ in range(3):
        assert not shown.refresh()
    assert shown.loaded is second
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "are not taken over" in errors[0]
    assert "secret" not in caplog.text
    site.install(site.make("cyd"))
    assert shown.refresh()
    assert shown.refused == ""


def test_what_is_refused_is_tried_again_after_a_while(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate that is not valid yet becomes so without a change."""
    shown = Credentials(site.settings, {})
    good = site.make("bob")
    site.install(site.make("bob", days_left=95))  # begins in five days
    assert not shown.refresh()
    assert "is not valid before" in shown.refused
    site.install(good)
    monkeypatch.setattr(shown, "_stamps", shown._look())
    assert not shown.refresh()
    monkeypatch.setattr(credentials, "_TRY_AGAIN_S", 0.0)
    assert shown.refresh()


def test_an_expired_certificate_is_no_reason_not_to_start_but_one_not_to_change(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.install(site.make(days_left=-1))
    shown = Credentials(site.settings, {})
    assert "expired on" in shown.loaded.problems()[0]
    shown.warn()
    shown.warn()
    assert caplog.text.count("the appliance will refuse the client certificate") == 1
    site.install(site.make("bob", days_left=-2))
    assert shown.refresh()  # neither is any good: the newer one is what its owner wants
    site.install(site.make("cyd"))
    assert shown.refresh()
    site.install(site.make("dan", days_left=-1))
    assert not shown.refresh()
    assert "'cyd'" in shown.loaded.title()


@pytest.mark.parametrize(("days", "warned"), [(31, 0), (29, 1), (6, 1), (0.5, 1)])
def test_the_end_is_announced(site: Site, caplog: pytest.LogCaptureFixture, days: float, warned: int) -> None:
    site.install(site.make(days_left=days))
    shown = Credentials(site.settings, {})
    for _ in range(3):
        shown.warn()
    assert caplog.text.count(f"ends in {days:.1f} days") == warned


def test_each_of_the_three_days_is_announced_once(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Credentials(site.settings, {})
    for days in (40.0, 30.0, 29.0, 8.0, 7.0, 6.0, 1.0, 0.5):
        monkeypatch.setattr(credentials.inspect, "days_left", lambda *_, days=days: days)
        shown.warn()
    assert [record.getMessage().split(" days")[0].split()[-1] for record in caplog.records] == ["30.0", "7.0", "1.0"]


def test_a_key_that_others_may_read_is_told(site: Site) -> None:
    assert credentials.open_key(site.settings) is None
    site.settings.key.chmod(0o644)
    assert "has mode 0644" in str(credentials.open_key(site.settings))
