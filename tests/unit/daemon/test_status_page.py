"""The status page's routes, called as an application: who may come in, and what their answers forbid a browser."""

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from support.appliance import ROOT, Pki

from appliance.core.config import Config
from appliance.core.errors import ApplianceError, InputTooLarge, KeyInvalid, Overloaded
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.page import DOCUMENT, FILES, KEY_HEADER, page_routes
from appliance.daemon.trial import Reply, Trial

ASSETS = ROOT / "appliance" / "daemon" / "assets"
LOCAL = ["localhost", "localhost:9464", "127.0.0.1:1", "127.8.8.8", "[::1]:9464", "LOCALHOST:9464"]
FOREIGN = [
    "evil.example", "evil.example:9464", "localhost.evil.example", "127.0.0.1.evil.example:9464", "10.0.0.5:9464",
    "[fe80::1]", "", "[::1", "a b", "localhost:x@evil.example", "0.0.0.0:9464", "[::ffff:10.0.0.5]",
]  # fmt: skip


class Recorded(Trial):
    """Makes no call: keeps what it was asked, and answers what a test says."""

    def __init__(self, config: Config, certificates: CertificateFiles) -> None:
        super().__init__(config, certificates)
        self.asked: list[tuple[str, str, bytes]] = []
        self.error: ApplianceError | None = None

    async def predict(self, path: str, key: str, body: AsyncIterator[bytes]) -> Reply:
        if self.error is not None:
            raise self.error
        self.asked.append((path, key, b"".join([piece async for piece in body])))
        return Reply(404, b'{"status": {"code": 21200}}')


@pytest.fixture
def trial(pki: Pki) -> Recorded:
    folder = pki.folder
    tls = {"certificate": folder / "server.crt", "key": folder / "server.key", "client_ca": folder / "ca.crt"}
    config = Config.model_validate({"tls": tls})
    return Recorded(config, CertificateFiles(config))


async def ask(trial: Trial, method: str, path: str, local: bool = True, **options: Any) -> httpx.Response:
    app = Starlette(routes=page_routes(lambda: b'{"health":"healthy"}', trial, local=local))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:9464") as client:
        return await client.request(method, path, **options)


@pytest.mark.parametrize("host", LOCAL)
async def test_who_means_this_machine_comes_in(trial: Recorded, host: str) -> None:
    for path in (*FILES, DOCUMENT):
        assert (await ask(trial, "GET", path, headers={"host": host})).status_code == 200
    reply = await ask(trial, "POST", "/try/a/b/c", headers={"host": host, "origin": f"http://{host}"}, content=b"{}")
    assert reply.status_code == 404
    assert len(trial.asked) == 1


@pytest.mark.parametrize("host", FOREIGN)
async def test_a_name_that_was_made_to_mean_this_machine_does_not(trial: Recorded, host: str) -> None:
    """DNS rebinding: the browser believes it talks to evil.example, which means 127.0.0.1 now."""
    for method, path in [("GET", path) for path in (*FILES, DOCUMENT)] + [("POST", "/try/a/b/c")]:
        reply = await ask(trial, method, path, headers={"host": host})
        assert reply.status_code == 421
        assert "localhost" in reply.text
        assert "healthy" not in reply.text
    assert trial.asked == []


async def test_where_tls_and_credentials_guard_the_page_any_name_is_good(trial: Recorded) -> None:
    reply = await ask(trial, "GET", DOCUMENT, local=False, headers={"host": "edge-7.example.com:9464"})
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://localhost", "http://localhost:9465", "[", "http://x@localhost:9464"],
)
@pytest.mark.parametrize("local", [True, False])
async def test_pages_of_other_origins_may_not_ask(trial: Recorded, origin: str, local: bool) -> None:
    for method, path in (("POST", "/try/a/b/c"), ("GET", DOCUMENT)):
        assert (await ask(trial, method, path, local=local, headers={"origin": origin})).status_code == 403
    assert trial.asked == []


async def test_no_answer_lets_a_browser_run_keep_or_tell_anything(trial: Recorded) -> None:
    """Of any kind: files, document, answers and refusals; and none of it may be kept or set a cookie."""
    replies = [await ask(trial, "GET", path) for path in (*FILES, DOCUMENT)]
    replies.append(await ask(trial, "POST", "/try/a/b/c", content=b"{}"))
    replies.append(await ask(trial, "POST", "/try/a/b/c", headers={"origin": "null"}))
    replies.append(await ask(trial, "GET", "/", headers={"host": "evil.example"}))
    for reply in replies:
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
        assert not {"'unsafe-inline'", "'unsafe-eval'", "*"} & set(" ".join(policy.values()).split())
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
        assert "set-cookie" not in reply.headers
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "path",
    ["/try/a/b/..", "/try/a/b/%2e%2e", "/try/a/b/c%2fd", "/try/a/b/c%3fx=1", "/try/a/b/c%0d%0aX: y", "/try/a/b/%C3%BC"],
)
async def test_only_names_of_models_make_a_path(trial: Recorded, path: str) -> None:
    assert (await ask(trial, "POST", path, content=b"{}")).status_code in (404, 405)
    assert trial.asked == []


async def test_a_call_is_handed_over_as_it_is(trial: Recorded) -> None:
    reply = await ask(trial, "POST", "/try/user/app/model-1", headers={KEY_HEADER: "k"}, content=b'{"inputs": []}')
    assert trial.asked == [("/v2/users/user/apps/app/models/model-1/outputs", "k", b'{"inputs": []}')]
    assert (reply.status_code, reply.json()) == (404, {"status": {"code": 21200}})


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyInvalid("x"), 401), (InputTooLarge("x"), 413), (Overloaded("x"), 503), (ApplianceError("x"), 502)],
)
async def test_what_keeps_a_call_from_the_api_is_said(trial: Recorded, error: ApplianceError, status: int) -> None:
    trial.error = error
    reply = await ask(trial, "POST", "/try/user/app/model", content=b"{}")
    assert (reply.status_code, reply.json()) == (status, {"error": "x"})


# ---- the files -------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Every element with its attributes, and what stands in scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style") and data.strip():
            self.inside.append(data)


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    """What the policy would refuse is not there, so that nothing is missing with it."""
    page = Elements((ASSETS / "status.html").read_text("utf-8"))
    assert page.inside == []
    sources = [value for _, attributes in page.found for name, value in attributes.items() if name in ("src", "href")]
    assert sorted(sources) == ["#main", "/status.css", "/status.js", "data:,"]  # type: ignore[type-var]
    assert not [
        attributes for _, attributes in page.found if any(n == "style" or n.startswith("on") for n in attributes)
    ]
    assert "url(" not in (ASSETS / "status.css").read_text("utf-8")
    assert "@import" not in (ASSETS / "status.css").read_text("utf-8")


def test_what_is_data_never_becomes_markup_or_stays_in_the_browser() -> None:
    script = (ASSETS / "status.js").read_text("utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "cookie"):
        assert word not in script
    for word in ("localStorage", "sessionStorage", "indexedDB", "caches", "serviceWorker"):
        assert word not in script


def test_the_files_are_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in ASSETS.iterdir() if path.is_file()}
    assert set(files) == set(FILES.values())
    assert sum(files.values()) < 48 * 1024
    script = (ASSETS / "status.js").read_text("utf-8")
    ids = set(re.findall(r'\bid="([^"]+)"', (ASSETS / "status.html").read_text("utf-8")))
    assert set(re.findall(r'byId\("([^"]+)"\)', script)) <= ids


@pytest.mark.parametrize("name", ["status-light.png", "status-dark.png"])
def test_the_pictures_of_the_page_are_small(name: str) -> None:
    picture = Path(ROOT / "docs" / name)
    assert picture.stat().st_size <= 150_000
    assert f"]({name})" in (ROOT / "docs" / "status.md").read_text("utf-8")
