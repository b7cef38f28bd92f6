"""The status page in a real browser: what it shows, how it is used, and that nothing that it shows can take it over.

UPDATE_DOCS=1 writes its pictures for docs/status.md.
"""

import dataclasses
import io
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.appliance import MODELS, PATIENCE_S, ROOT, Appliance, Client, Pki, image_input, request_for, text_input
from support.devtools import Page, page
from support.status import document, model, served
from support.stock import SAMPLES, executable, plain_environment

from appliance.core.config import Config
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.status import Failure, LogLine, Process, Reason
from appliance.daemon.trial import Trial

pytestmark = pytest.mark.clients

PICTURE = SAMPLES / "held-out-000-label-2.png"
DOCS = ROOT / "docs"
EVIL = "<img src=x onerror=\"document.body.dataset.evil='1'\"><script>document.body.dataset.evil='2'</script>"

CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = parse(getComputedStyle(e).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.closest("noscript, .hidden")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), texts.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()
"""
"""Each shown text's contrast with its ground. Source: WCAG 2.2, definitions of contrast ratio, relative luminance."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Appliance]:
    """One with both bundles and a key, in processes, at ports that it keeps over a restart."""
    port = free_port()
    settings = {
        "server": {"base_url": f"https://localhost:{port}", "listen": f"127.0.0.1:{port}"},
        "admin": {"listen": f"127.0.0.1:{free_port()}"},
    }
    made = Appliance(tmp_path_factory.mktemp("page"), pki, settings, transport="native", mode="processes")
    for name in ("digits", "ml-topics"):
        shutil.copytree(MODELS / name, made.models / name)
    made.key = made.new_key()
    with made:
        yield made


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser for all tests."""
    with page(tmp_path_factory.mktemp("chromium")) as made:
        made.size(1280, 1000)
        yield made


@pytest.fixture
def shown(tab: Page, appliance: Appliance) -> Iterator[Page]:
    """The page, filled; at the end nothing was complained of, and nobody else was asked for anything."""
    tab.events.clear()
    address = f"http://127.0.0.1:{appliance.port('admin.listen')}/"
    tab.open(address)
    tab.until("!document.getElementById('main').hidden")
    yield tab
    assert tab.complaints() == []
    assert [each for each in tab.requested() if not each.startswith((address, "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def trial(pki: Pki) -> Trial:
    """One that reaches nobody, for pages over documents of our own."""
    folder = pki.folder
    tls = {"certificate": folder / "server.crt", "key": folder / "server.key", "client_ca": folder / "ca.crt"}
    config = Config.model_validate({"tls": tls})
    return Trial(config, CertificateFiles(config))


# ---- what it shows ---------------------------------------------------------------------------------------------------


def test_it_shows_what_the_document_says(shown: Page, appliance: Appliance) -> None:
    found = appliance.admin("/status.json")
    assert found["health"] in shown.text("#health")
    assert found["host"] in shown.text("h1")
    assert found["base_url"] in shown.text("#about")
    rows = shown.js("[...document.querySelectorAll('#models tbody tr')].map((row) => row.innerText)")
    assert [row.split("\t")[:3] for row in rows] == [
        ["appliance/main/digits", "1", "ready"],
        ["appliance/main/ml-topics", "1", "ready"],
    ]
    assert "2 of 2 ready" in shown.text("#models-count")
    assert "stands alone" in shown.text("#orchestrator")
    assert "server" in shown.text("#certificates")
    assert "ends in" in shown.text("#certificates")
    for name in ("engine", "front 0", "front 1"):
        assert f"● {name}, process" in shown.text("#processes")


def test_sparklines_move_with_the_calls(shown: Page, appliance: Appliance, pki: Pki) -> None:
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        for _ in range(40):
            client.predict(request_for("digits", [image_input(PICTURE.read_bytes())]))
    label = "document.querySelector('#sparks svg').getAttribute('aria-label')"
    shown.until(f"/Calls a second: .* now, at most [1-9]/.test({label})")
    assert shown.js("document.querySelector('#sparks .line').getAttribute('d').includes('L')")


def test_what_is_wrong_shows_as_text_and_goes(shown: Page, appliance: Appliance) -> None:
    """The live region says so once."""
    folder = appliance.models / "<b onclick=x>bold"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: [", "utf-8")
    shown.until("document.getElementById('reasons').innerText.includes('<b onclick=x>bold')")
    assert "degraded" in shown.text("#health")
    assert "docs/runbook/model-not-ready.md" in shown.text("#reasons")
    assert "The appliance is degraded" in shown.js("document.getElementById('said').textContent")
    assert shown.js("document.querySelectorAll('main b').length") == 0
    shutil.rmtree(folder)
    shown.until("!document.getElementById('reasons').innerText.includes('bold')")


def test_failed_calls_show_with_their_ids(shown: Page, appliance: Appliance, pki: Pki) -> None:
    with Client(appliance.port(), pki.ca, "invented") as client:
        req_id = client.predict(request_for("digits", [image_input(b"x")])).status.req_id
    shown.until(f"document.getElementById('failures').innerText.includes({json.dumps(req_id)})")
    assert "11008 CONN_KEY_INVALID" in shown.text("#failures")


def test_it_says_when_the_daemon_is_away_and_goes_on_when_it_is_back(tab: Page, appliance: Appliance) -> None:
    tab.open(f"http://127.0.0.1:{appliance.port('admin.listen')}/")
    tab.until("!document.getElementById('main').hidden")
    appliance.stop()
    tab.until("!document.getElementById('trouble').hidden")
    assert "does not answer" in tab.text("#trouble")
    assert "appliance/main/digits" in tab.text("#models")  # what was known stays
    appliance.start()
    tab.until("document.getElementById('trouble').hidden")
    assert "answers again" in tab.js("document.getElementById('said').textContent")


def test_nothing_that_is_shown_takes_the_page_over(tab: Page, trial: Trial) -> None:
    """Every text of a document may have been made by a bundle, a caller or somebody in between."""
    tab.events.clear()
    hostile = document(
        host=EVIL, version=EVIL, base_url=EVIL, root_certificate=EVIL, device=EVIL,
        reasons=[Reason(EVIL, EVIL, EVIL)],
        models=[dataclasses.replace(model("digits"), bundle=EVIL, model=EVIL, version=EVIL, device=EVIL, problem=EVIL)],
        processes=[Process(EVIL, 1, EVIL)],
        failures=[Failure(1.0, 1, EVIL, EVIL, EVIL, EVIL, 1, EVIL)],
        log=[LogLine(1.0, EVIL, EVIL)],
    )  # fmt: skip
    with served(json.dumps(hostile, default=vars).encode(), trial) as address:
        tab.open(address)
        tab.until("!document.getElementById('main').hidden")
        assert tab.js("document.body.innerText.split('<img src=x').length") > 10
        assert tab.js("document.querySelectorAll('main script, main img:not(#try-preview)').length") == 0
        assert tab.js("document.body.dataset.evil") is None
        assert EVIL.replace('"', '\\"') in tab.text("#try-code")
        assert not tab.complaints()


def test_of_a_thousand_models_a_few_are_shown_and_all_are_found(tab: Page, trial: Trial) -> None:
    models = [model(f"model-{number:04}") for number in range(1000)]
    models[700] = model("broken", "failed", "its checksum is wrong")
    body = json.dumps(document(models=models), default=vars).encode()
    with served(body, trial) as address:
        tab.open(address)
        tab.until("document.querySelectorAll('#models tbody tr').length === 50")
        assert "broken" in tab.js("document.querySelector('#models tbody tr').innerText")
        assert "999 of 1,000 ready; the first 50 shown" in tab.text("#models-count")
        tab.type("#filter", "model-0777")
        tab.until("document.querySelectorAll('#models tbody tr').length === 1")
        tab.js(
            "(() => { const f = document.getElementById('filter'); f.value = '';"
            " f.dispatchEvent(new Event('input')); })()"
        )
        tab.js("document.getElementById('models-more').click()")
        tab.until("document.querySelectorAll('#models tbody tr').length === 1000")
        took = tab.js("(() => { const begun = performance.now(); show(latest); return performance.now() - begun; })()")
        print(f"1000 models shown again: {took:.1f} ms; {len(body)} bytes")


# ---- trying a model --------------------------------------------------------------------------------------------------


def choose(tab: Page, name: str) -> None:
    tab.js(
        "(() => { const s = document.getElementById('try-model'); "
        f"s.value = {json.dumps(name)}; s.dispatchEvent(new Event('change')); }})()"
    )


def answers(code: str, appliance: Appliance, folder: Path) -> list[str]:
    """What the snippet prints, run in a folder as its user would."""
    done = subprocess.run(
        [executable("sdk-12"), "-c", code],
        cwd=folder,
        env=plain_environment(CLARIFAI_PAT=appliance.key),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_picture_is_tried_with_the_keyboard_and_the_snippet_does_the_same(
    shown: Page, appliance: Appliance, pki: Pki, tmp_path: Path
) -> None:
    """The stock SDK runs the snippet as it stands there."""
    choose(shown, "appliance/main/digits")
    shown.choose_file("#try-file", PICTURE)
    shown.type("#try-key", appliance.key)
    shown.press("Enter")
    shown.until("document.getElementById('try-answer').innerText.includes('Answered')")
    rows = shown.js("[...document.querySelectorAll('#try-answer tbody tr')].map((row) => row.innerText.split('\\t'))")
    assert rows[0][0] == "two"
    assert shown.js("document.getElementById('try-preview').naturalWidth") > 0
    code = shown.text("#try-code")
    assert appliance.key not in code
    shutil.copy(PICTURE, tmp_path)
    assert answers(code, appliance, tmp_path) == [f"{name} {value}" for name, value, *_ in rows]


def test_a_text_is_tried_and_the_snippet_does_the_same(shown: Page, appliance: Appliance, tmp_path: Path) -> None:
    choose(shown, "appliance/main/ml-topics")
    shown.type("#try-words", 'a "support" vector\nmachine – ☃ 💾')
    shown.type("#try-key", appliance.key)
    shown.press("Enter")
    shown.until("document.getElementById('try-answer').innerText.includes('Answered')")
    rows = shown.js("[...document.querySelectorAll('#try-answer tbody tr')].map((row) => row.innerText.split('\\t'))")
    found = answers(shown.text("#try-code"), appliance, tmp_path)
    assert found == [f"{name} {value}" for name, value, *_ in rows]


def test_a_refusal_is_shown_in_the_api_s_words(tab: Page, appliance: Appliance) -> None:
    tab.open(f"http://127.0.0.1:{appliance.port('admin.listen')}/")
    tab.until("!document.getElementById('main').hidden")
    choose(tab, "appliance/main/ml-topics")
    tab.type("#try-words", "a text")
    tab.press("Tab")
    tab.type("#try-key", "wrong")
    tab.press("Enter")
    tab.until("document.getElementById('try-answer').innerText.includes('11008')")
    assert "not known to this appliance" in tab.text("#try-answer")


def test_the_key_is_nowhere_but_in_the_page_s_memory(tab: Page, appliance: Appliance) -> None:
    tab.events.clear()
    address = f"http://127.0.0.1:{appliance.port('admin.listen')}/"
    tab.open(address)
    tab.until("!document.getElementById('main').hidden")
    choose(tab, "appliance/main/ml-topics")
    tab.type("#try-words", "a text")
    tab.type("#try-key", appliance.key)
    tab.press("Enter")
    tab.until("document.getElementById('try-answer').innerText.includes('Answered')")
    kept = tab.js(
        "JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}, location.href, history.state, "
        "document.documentElement.outerHTML])"
    )
    assert appliance.key not in kept
    assert [each for each in tab.requested() if appliance.key in each] == []
    assert tab.ask("Network.getCookies")["cookies"] == []
    tab.ask("Page.reload")
    tab.until("document.readyState === 'complete' && !document.getElementById('main').hidden")
    assert tab.js("document.getElementById('try-key').value") == ""


def test_a_page_of_another_origin_gets_nothing(tab: Page, appliance: Appliance) -> None:
    """The policy stops the page from framing; the browser stops reads; the appliance stops calls."""
    tab.open("about:blank")
    base = f"http://127.0.0.1:{appliance.port('admin.listen')}"
    for options in ("{}", "{mode: 'no-cors'}"):
        assert tab.js(f"fetch('{base}/status.json', {options}).then((r) => r.text(), () => 'refused')") in (
            "refused",
            "",
        )
    options = "{method: 'POST', headers: {'x-appliance-key': 'k'}, body: '{}'}"
    call = f"fetch('{base}/try/appliance/main/digits', {options})"
    assert tab.js(f"{call}.then((r) => r.text(), () => 'refused')") == "refused"


def test_where_credentials_are_asked_for_the_page_asks_for_the_key(
    tmp_path_factory: pytest.TempPathFactory, pki: Pki
) -> None:
    """Over TLS, in a browser that trusts the root."""
    principals = [{"name": "operator", "models": []}, {"name": "ada"}]
    made = Appliance(
        tmp_path_factory.mktemp("guarded"),
        pki,
        {"principal": principals, "admin": {"listen": "0.0.0.0:0", "principals": ["operator"]}},
        transport="native",
        mode="single",
    )
    shutil.copytree(MODELS / "digits", made.models / "digits")
    key, other = made.new_key("--principal", "operator"), made.new_key("--principal", "ada")
    with made, page(tmp_path_factory.mktemp("chromium"), pki.ca) as tab:
        tab.open(f"https://localhost:{made.port('admin.listen')}/")
        tab.until("!document.getElementById('reader').hidden")
        assert tab.js("document.getElementById('main').hidden")
        tab.type("#reader-key", "wrong")
        tab.press("Enter")
        tab.until("document.getElementById('trouble').innerText.includes('not known')")
        tab.type("#reader-key", key)
        tab.press("Enter")
        tab.until("!document.getElementById('main').hidden")
        assert "appliance/main/digits" in tab.text("#models")
        assert tab.js("document.getElementById('reader').hidden")
        tab.choose_file("#try-file", PICTURE)
        tab.type("#try-key", other)
        tab.press("Enter")
        tab.until("document.getElementById('try-answer').innerText.includes('Answered')")


# ---- everybody can use it --------------------------------------------------------------------------------------------


def roles(tab: Page) -> list[tuple[str, str]]:
    """Role and name of everything that assistive technology sees."""
    nodes = tab.ask("Accessibility.getFullAXTree")["nodes"]
    return [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored", False)
    ]


def test_landmarks_headings_and_controls_have_names(shown: Page) -> None:
    found = roles(shown)
    count = [role for role, _ in found]
    assert (count.count("banner"), count.count("main"), count.count("contentinfo")) == (1, 1, 1)
    regions = {name for role, name in found if role == "region"}
    assert regions == {
        "Health", "Calls", "Devices and processes", "Models", "Certificates and keys", "Orchestrator", "Last errors",
        "Try it",
    }  # fmt: skip
    controls = {"button", "textbox", "searchbox", "combobox", "table", "image", "img", "meter", "link", "group"}
    assert [(role, name) for role, name in found if role in controls and not name] == []
    levels = shown.js(
        "[...document.querySelectorAll('h1, h2, h3')].filter((h) => h.checkVisibility()).map((h) => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert shown.js("document.documentElement.lang") == "en"
    assert shown.js("['said', 'trouble'].map((id) => document.getElementById(id).role)") == ["status", "alert"]


def test_the_keyboard_reaches_everything_and_shows_where_it_is(shown: Page) -> None:
    choose(shown, "appliance/main/digits")
    shown.js("document.body.focus(), document.activeElement.blur()")
    reached: list[str] = []
    for _ in range(40):
        shown.press("Tab")
        where = shown.js(
            "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
        )
        if where == "BODY" or where in reached[:1]:
            break
        reached.append(where)
        assert shown.js("getComputedStyle(document.activeElement).outlineStyle") != "none", where
    assert reached[0] == "skip"
    order = [each for each in reached if each in ("filter", "try-model", "try-file", "try-key", "try-send")]
    assert order == ["filter", "try-model", "try-file", "try-key", "try-send"]


def test_what_is_shown_again_leaves_focus_and_choice_alone(shown: Page, appliance: Appliance) -> None:
    choose(shown, "appliance/main/ml-topics")
    shown.type("#try-words", "half a text")
    before = shown.text("#foot")
    shown.until(f"document.getElementById('foot').innerText !== {json.dumps(before)}")
    assert shown.js("[document.activeElement.id, document.activeElement.value]") == ["try-words", "half a text"]
    assert shown.js("document.getElementById('try-model').value") == "appliance/main/ml-topics"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(tab: Page, trial: Trial, scheme: str) -> None:
    """A contrast of 4.5 : 1 (WCAG AA), in both schemes, with all colours that there are."""
    with served(json.dumps(document(), default=vars).encode(), trial) as address:
        tab.prefer(color_scheme=scheme)
        tab.open(address)
        tab.until("!document.getElementById('main').hidden")
        found = tab.js(CONTRAST)
        assert len(found) > 60
        assert [each for each in found if each[0] < 4.5] == []


def test_nothing_moves_and_nothing_is_cut_off(shown: Page) -> None:
    """Not even for those who would like motion; and a narrow window is scrolled down only."""
    assert shown.js("document.getAnimations().length") == 0
    moving = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s').length"
    assert shown.js(moving) == 0
    try:
        for width in (320, 640):
            shown.size(width, 800)
            assert shown.js("document.documentElement.scrollWidth <= window.innerWidth"), width
    finally:
        shown.size(1280, 1000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(tab: Page, appliance: Appliance, pki: Pki, scheme: str) -> None:
    """As it looks, with calls of each kind; the ground tells which scheme it is."""
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        for path in sorted(SAMPLES.glob("*.png")):
            client.predict(request_for("digits", [image_input(path.read_bytes())]))
        client.predict(request_for("ml-topics", [text_input("decision trees and forests")]))
        client.predict(request_for("digits", [image_input(b"no picture")]))
    tab.prefer(color_scheme=scheme)
    tab.size(1280, 1000)
    tab.open(f"http://127.0.0.1:{appliance.port('admin.listen')}/")
    tab.until("!document.getElementById('main').hidden")
    choose(tab, "appliance/main/digits")
    tab.choose_file("#try-file", PICTURE)
    tab.type("#try-key", appliance.key)
    tab.press("Enter")
    tab.until("document.getElementById('try-answer').innerText.includes('Answered')")
    values = 8 if os.environ.get("UPDATE_DOCS") else 1
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        line = "document.querySelector('#sparks .line').getAttribute('d')"
        while tab.js(f"{line}.split('L').length <= {values}"):  # until the lines can be seen
            for path in random.choices(sorted(SAMPLES.glob("*.png")), k=random.randint(20, 200)):
                client.predict(request_for("digits", [image_input(path.read_bytes())]))
    tab.until("!asking && (clearTimeout(timer), asking = true)")  # nothing is shown anew from here on
    own = {str(appliance.tls): "/etc/inference-appliance/tls", socket.gethostname(): "edge-7"}
    tab.js(
        "document.activeElement.blur(), scrollTo(0, 0), ['host', 'try-code'].forEach((id) => byId(id).textContent = "
        f"Object.entries({json.dumps(own)}).reduce((text, pair) => text.replace(...pair), byId(id).textContent))"
    )
    picture = Image.open(io.BytesIO(tab.picture())).convert("RGB")
    ground: Any = picture.getpixel((2, 2))
    assert (sum(ground) > 600) == (scheme == "light")
    assert len(picture.getcolors(2**20) or ()) > 20
    if os.environ.get("UPDATE_DOCS"):
        file = DOCS / f"status-{scheme}.png"
        picture.quantize(64).save(file, optimize=True)
        assert file.stat().st_size <= 150_000
