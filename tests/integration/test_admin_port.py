"""The admin port where others than this machine reach it: TLS, and only for those whom the configuration names."""

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from support.appliance import Appliance, Pki, make_pki, mode

Make = Callable[..., Appliance]


@pytest.fixture(scope="module", params=["single", "processes"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """The pages are the daemon's own process's, whoever answers calls."""
    with mode(request.param):
        yield "native"


@pytest.fixture
def watched(make_appliance: Make) -> Iterator[Appliance]:
    """An appliance whose admin port is open to other machines; `prometheus` may read it, by certificate or key."""
    principals = [
        {"name": "prometheus", "identities": ["uri:spiffe://test/line-3"], "models": []},
        {"name": "ada", "identities": ["uri:spiffe://test/laptop"]},
    ]
    made = make_appliance("digits", principal=principals, admin={"listen": "0.0.0.0:0", "principals": ["prometheus"]})
    made.key = made.new_key("--principal", "prometheus")
    with made:
        yield made


def ask(appliance: Appliance, page: str = "/metrics", key: str = "", certificate: str = "") -> httpx.Response:
    """One page, as another machine asks for it."""
    context = ssl.create_default_context(cafile=appliance.pki.ca)
    if certificate:
        folder = appliance.pki.folder / "clients"
        context.load_cert_chain(folder / f"{certificate}.crt", folder / f"{certificate}.key")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"https://localhost:{appliance.port('admin.listen')}{page}"
    with httpx.Client(verify=context, headers=headers) as client:
        return client.get(url)


def test_who_is_named_reads_the_pages(watched: Appliance) -> None:
    """By bearer or by client certificate; nothing else of the daemon is there."""
    for credentials in ({"key": watched.key}, {"certificate": "line-3"}):
        reply = ask(watched, **credentials)
        assert reply.status_code == 200
        assert "inference_appliance_build_info" in reply.text
        assert ask(watched, "/readyz", **credentials).json()["ready"] is True
        assert ask(watched, "/status", **credentials).status_code == 404


def test_nobody_else_does(watched: Appliance) -> None:
    """Each is told why, in a sentence; the log says who tried, and never with which key."""
    other = watched.new_key("--principal", "ada")
    for credentials, code, words in (
        ({}, 401, "brings no key"),
        ({"key": "invented"}, 401, "not known"),
        ({"key": other}, 403, "admin.principals"),
        ({"certificate": "laptop"}, 403, "admin.principals"),
    ):
        for page in ("/metrics", "/readyz", "/livez"):
            reply = ask(watched, page, **credentials)  # type: ignore[arg-type]
            assert (reply.status_code, words in reply.json()["error"]) == (code, True), reply.text
    assert "an admin page was refused" in watched.log
    assert other not in watched.log
    assert "invented" not in watched.log
    url = f"http://localhost:{watched.port('admin.listen')}/metrics"
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url)


def test_a_reload_changes_who_may(watched: Appliance) -> None:
    """At once, on live connections too: every request is asked."""
    other = watched.new_key("--principal", "ada")
    assert ask(watched, key=other).status_code == 403
    watched.write_config(admin={"principals": ["ada"]})
    watched.command("reload")
    assert ask(watched, key=other).status_code == 200
    assert ask(watched, key=watched.key).status_code == 403


def test_a_rotated_certificate_is_shown_here_too(watched: Appliance, tmp_path: Path) -> None:
    """One set of certificate files for all ports."""
    new = make_pki(tmp_path / "new")
    for name in ("server.key", "server.crt"):
        (watched.tls / name).write_bytes((new.folder / name).read_bytes())
    url = f"https://localhost:{watched.port('admin.listen')}/metrics"
    context = ssl.create_default_context(cafile=new.ca)

    def answers() -> bool:
        return httpx.get(url, verify=context).status_code == 401

    watched.wait(answers, "the new certificate")


@pytest.mark.parametrize(
    ("admin", "words"),
    [
        ({"listen": "0.0.0.0:0"}, "admin.principals names nobody"),
        ({"listen": "0.0.0.0:0", "principals": ["nobody"]}, "no [[principal]] of this configuration"),
    ],
)
def test_without_protection_it_does_not_start(
    make_appliance: Make, pki: Pki, admin: dict[str, object], words: str
) -> None:
    """With the key and what to do."""
    refused = make_appliance("digits", admin=admin).command("serve", check=False)
    assert refused.returncode == 2
    assert words in refused.stderr
