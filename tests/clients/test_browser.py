"""A real browser calls from a page of another origin: `fetch` over REST, and gRPC-Web by Clarifai's own package."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import MODELS, ROOT, Appliance, Pki, make_pki
from support.browser import Pages, chromium, chromium_version
from support.client_matrix import Matrix
from support.forms import DIGIT, TOPIC, Instead, Of, Says, check, says, why
from support.programs import bundle, node_project, node_versions
from support.stock import CLIENT_TESTS, SAMPLES
from support.wire_server import Server

pytestmark = pytest.mark.clients

FETCH, GRPC_WEB = "Browser `fetch`", "gRPC-Web"
PATHS = sorted(SAMPLES.glob("*.png"))
LABELS = [path.stem.rsplit("-", 1)[1] for path in PATHS]
BATCH = [[f"demo_{index}", LABELS[index % len(LABELS)]] for index in range(128)]

FETCH_FORMS: dict[str, Any] = {
    "the documentation's sample: `POST /v2/models/…/outputs`, user_app_id in the body, no Content-Type": DIGIT,
    "`POST /v2/users/…/apps/…/models/…/outputs`": DIGIT,
    "`POST …/versions/…/outputs`": DIGIT,
    "`Content-Type: application/json`": DIGIT,
    "`Authorization: Bearer …`": DIGIT,
    "an image by URL": DIGIT,
    "a text": TOPIC,
    "a batch of 128": BATCH,
    "a batch of 129": says("HTTP 400, 30105", "129 inputs; the limit is 128"),
    "`max_concepts`": Of("digits", 3),
    "`min_value`": Of("digits", 1),
    "`select_concepts`": ["4", "5"],
    "`max_concepts` 201": says("HTTP 400, 21202", "from 1 to 200"),
    "bytes that are no image": says("HTTP 400, 10020, 30101", "send a JPEG, PNG"),
    "a wrong PAT": says("HTTP 401, 11008", "not known to this appliance"),
    "an unknown model": says("HTTP 404, 21200", "appliance/main/nothing"),
    "`GET …/models`": ["digits", "ml-topics"],
    "`GET …/models/…`": "1",
    "`POST …/outputs/generate`, read line by line": [DIGIT],
    "a certificate of an unknown authority": Says(
        ("TypeError: Failed to fetch",),
        "the browser refuses the connection; import the root into the system or browser",
    ),
}
WEB_FORMS: dict[str, Any] = {
    '`ClarifaiStub.grpc("https://…").postModelOutputs(…)`': DIGIT,
    '`new V2PromiseClient("https://…")`': DIGIT,
    "`X-Clarifai-Session-Token`, as the package's README has it": DIGIT,
    '`format: "text"`': DIGIT,
    '`format: "binary"`': DIGIT,
    "a text": TOPIC,
    "a batch of 128": BATCH,
    "a batch of 129": says("30105", "129 inputs; the limit is 128"),
    "`setMaxConcepts`": Of("digits", 3),
    "`setSelectConceptsList`": ["4", "5"],
    "`getModel`": "1",
    "`listModels`": ["digits", "ml-topics"],
    "`GenerateModelOutputs`, by grpc-web's `serverStreaming`": [DIGIT],
    "`StreamModelOutputs`": Instead("undefined", "gRPC-Web has no streams of requests, and the package no such method"),
    "a wrong PAT": says("11008", "not known to this appliance"),
    "an RPC that is not served": says("gRPC 12: .*ListInputs"),
}

_BLOCKED = """
let said;
try {
  const { base } = await (await fetch("/config.json")).json();
  said = `answered ${(await fetch(`${base}/v2/status_codes`, { headers: { Authorization: "Key none" } })).status}`;
} catch (error) {
  said = `${error.name}: ${error.message}`;
}
await fetch("/found", { method: "POST", body: JSON.stringify(said) });
location.replace(location.href.replace("127.0.0.1", "localhost").replace("blocked", "forms"));
"""
"""A page of an origin that may not call; the next one may."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of the page, the packages it imports, and what docs/sdk.md has for browsers."""
    folder = tmp_path_factory.mktemp("web")
    node_project(folder)
    shutil.copy(CLIENT_TESTS / "web" / "forms.mjs", folder)
    text = (ROOT / "docs" / "sdk.md").read_text("utf-8")
    for name, content in re.findall(r"^```(?:html|mjs) (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(content, "utf-8")
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page that anybody may read, behind a certificate of an authority that nobody knows."""
    with Server(make_pki(tmp_path_factory.mktemp("stranger") / "tls"), "native", "asyncio") as server:
        yield f"https://localhost:{server.ports['tls']}/hello"


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, project: Path, pki: Pki, web: str, stranger: str
) -> dict[str, dict[str, Any]]:
    """What each form gave in one browser, and what a page of a foreign origin heard."""
    config: dict[str, Any] = {"web": web, "stranger": stranger}
    pages = {
        "/forms": ("text/html", '<!doctype html><script type="module" src="/forms.js"></script>'),
        "/forms.js": ("text/javascript", bundle(project, "forms.mjs")),
        "/blocked": ("text/html", f'<!doctype html><script type="module">{_BLOCKED}</script>'),
    }
    home = tmp_path_factory.mktemp("chromium")
    with Pages(pages) as server:
        place = web.removeprefix("http://")
        settings = {
            "server": {"cors_origins": [f"http://localhost:{server.port}"]},
            "urls": {"hosts": [place.partition(":")[0], place], "private_addresses": True},
        }
        appliance = Appliance(tmp_path_factory.mktemp("browsed"), pki, settings, transport="native")
        for name in ("digits", "ml-topics"):
            shutil.copytree(MODELS / name, appliance.models / name)
        pictures = [base64.b64encode(path.read_bytes()).decode() for path in PATHS]
        config |= {"key": appliance.new_key(), "pictures": pictures, "picture": PATHS[0].name}
        with appliance:
            config["base"] = f"https://localhost:{appliance.port()}"
            pages["/config.json"] = ("application/json", json.dumps(config))
            for path, kind, content in (
                ("/page.html", "text/html", (project / "page.html").read_text("utf-8")),
                ("/digits.js", "text/javascript", bundle(project, "digits.mjs")),
            ):
                own = content.replace("https://appliance.example:8443", config["base"])
                pages[path] = (kind, own.replace("YOUR_PAT", config["key"]))
            with chromium(home, pki.ca, f"http://127.0.0.1:{server.port}/blocked") as browser:
                blocked = server.next(browser, home / "log")
                return {"blocked": {"a foreign origin": blocked}, **server.next(browser, home / "log")}


@pytest.fixture
def about(matrix: Matrix) -> Matrix:
    """The matrix, told what is driven."""
    matrix.version(FETCH, chromium_version())
    matrix.version(
        GRPC_WEB, f"{node_versions('clarifai-web-grpc', 'grpc-web').rpartition(', ')[0]}, {chromium_version()}"
    )
    return matrix


@pytest.mark.parametrize("form", FETCH_FORMS)
def test_fetch(form: str, found: dict[str, dict[str, Any]], truth: dict[str, list[str]], about: Matrix) -> None:
    """It gives what the raw stub of Python reads, or the error that it should."""
    check(found["fetch"][form], FETCH_FORMS[form], truth)
    about.row(FETCH, form, why=why(FETCH_FORMS[form]))


@pytest.mark.parametrize("form", WEB_FORMS)
def test_grpc_web(form: str, found: dict[str, dict[str, Any]], truth: dict[str, list[str]], about: Matrix) -> None:
    """It gives what the raw stub of Python reads, or the error that it should."""
    check(found["web"][form], WEB_FORMS[form], truth)
    about.row(GRPC_WEB, form, why=why(WEB_FORMS[form]))


def test_the_page_of_the_documentation_is_right(found: dict[str, dict[str, Any]]) -> None:
    """What docs/sdk.md has to copy for browsers."""
    assert found["page"] == {"Browser": "two 0.97", "gRPC-Web": ["two", "four"]}


def test_an_allowed_origin_may_send_a_key(
    found: dict[str, dict[str, Any]], truth: dict[str, list[str]], about: Matrix
) -> None:
    """The browser asks first (OPTIONS), as the header Authorization makes it do, and sends the call only then."""
    check(found["fetch"]["`Authorization: Bearer …`"], DIGIT, truth)
    about.row(FETCH, "the preflight that `Authorization` causes, from a page of `server.cors_origins`")


def test_a_foreign_origin_is_stopped_by_the_browser(found: dict[str, dict[str, Any]], about: Matrix) -> None:
    """Its page hears nothing, not even the status."""
    assert found["blocked"]["a foreign origin"] == "TypeError: Failed to fetch"
    about.row(
        FETCH,
        "a page whose origin is not in `server.cors_origins`",
        why="the browser stops it, as it should; name the origin in `server.cors_origins`",
    )


def test_no_form_is_forgotten(found: dict[str, dict[str, Any]]) -> None:
    """Each that the page drives is looked at."""
    assert set(found["fetch"]) == set(FETCH_FORMS)
    assert set(found["web"]) == set(WEB_FORMS)
