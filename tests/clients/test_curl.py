"""curl over REST: the documentation's commands and every option of a prediction, over TLS from a custom root."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.appliance import MODELS, PATIENCE_S, Appliance, Pki
from support.client_matrix import Matrix
from support.forms import DIGIT, TOPIC, Of, Says, check, says, why
from support.programs import environment, need_programs, run
from support.stock import SAMPLES

pytestmark = pytest.mark.clients

CURL = "cURL"
PATHS = sorted(SAMPLES.glob("*.png"))
LABELS = [path.stem.rsplit("-", 1)[1] for path in PATHS]
PICTURES = [base64.b64encode(path.read_bytes()).decode() for path in PATHS]
TEXT = "Decision trees are grown on bootstrap samples and vote together."

Reply = dict[str, Any]


def ids(reply: Reply) -> list[str]:
    """Concept ids of the first output."""
    return [concept["id"] for concept in reply["outputs"][0]["data"]["concepts"]]


def results(reply: Reply) -> list[list[str]]:
    """Concept ids of each node of a workflow."""
    outputs = reply["results"][0]["outputs"]
    return [[concept["id"] for concept in output["data"]["concepts"]] for output in outputs]


def named(field: str) -> Callable[[Reply], list[str]]:
    """The ids of a list."""
    return lambda reply: sorted(entry["id"] for entry in reply[field])


def codes(reply: Reply) -> list[int]:
    """The whole reply's status code, and each output's."""
    return [reply["status"]["code"], *(output["status"]["code"] for output in reply["outputs"])]


def batch(reply: Reply) -> list[list[str]]:
    """Id and best concept of each output."""
    return [[output["input"]["id"], output["data"]["concepts"][0]["id"]] for output in reply["outputs"]]


@dataclass(frozen=True)
class Form:
    """A command, as its user's shell runs it, and what it gives.

    Attributes:
        command: with the variables BASE, KEY, PICTURE and WEB, and the files of `bodies`.
        gives: what `read` finds in the reply of a good status, else the error.
    """

    command: str
    gives: Any = DIGIT
    read: Callable[[Reply], Any] = ids


AUTH = '-H "Authorization: Key $KEY"'
JSON = '-H "Content-Type: application/json"'
MAIN = '"$BASE/v2/users/appliance/apps/main'
INPUTS = '"inputs": [{"data": {"image": {"base64": "\'"$PICTURE"\'"}}}]'


def post(more: str = "", *, path: str = "/models/digits/outputs", options: str = f"{AUTH} {JSON}") -> str:
    """A prediction of one image, with more fields."""
    return f"curl -X POST {MAIN}{path}\" {options} -d '{{{INPUTS}{more}}}'"


def configured(config: str) -> str:
    """A prediction under an output_config."""
    return post(f', "model": {{"model_version": {{"output_info": {{"output_config": {config}}}}}}}')


def get(path: str) -> str:
    """A catalogue's page of the app."""
    return f'curl {MAIN}{path}" {AUTH}'


OWNER = ', "user_app_id": {"user_id": "appliance", "app_id": "main"}'
PARTS = (
    '"inputs": [{"data": {"metadata": {"_method_name": "predict"}, "parts": [{"id": "image", "data": {"image": '
    '{"base64": "\'"$PICTURE"\'"}}}, {"id": "max_concepts", "data": {"int_value": "2"}}]}}]'
)

FORMS: dict[str, Form] = {
    "`POST /v2/users/…/apps/…/models/…/outputs`": Form(post()),
    "`POST …/models/…/versions/…/outputs`": Form(post(path="/models/digits/versions/1/outputs")),
    "`POST /v2/models/…/outputs`, user_app_id in the body": Form(
        f"curl -X POST \"$BASE/v2/models/digits/outputs\" {AUTH} {JSON} -d '{{{INPUTS}{OWNER}}}'"
    ),
    "`POST /v2/models/…/versions/…/outputs`": Form(
        f"curl -X POST \"$BASE/v2/models/digits/versions/1/outputs\" {AUTH} {JSON} -d '{{{INPUTS}{OWNER}}}'"
    ),
    "`POST /v2/users/…/deployments/…/outputs`": Form(
        f"curl -X POST \"$BASE/v2/users/appliance/deployments/digits/outputs\" {AUTH} {JSON} -d '{{{INPUTS}}}'"
    ),
    "a deployment that is not here": Form(
        f"curl -X POST \"$BASE/v2/users/appliance/deployments/other/outputs\" {AUTH} {JSON} -d '{{{INPUTS}}}'",
        says("HTTP 404, 25900", "other"),
    ),
    "`POST …/workflows/…/results`": Form(post(path="/workflows/twice/results"), [Of("digits", 1), DIGIT], results),
    "`POST /v2/workflows/…/results`, user_app_id in the body": Form(
        f"curl -X POST \"$BASE/v2/workflows/twice/results\" {AUTH} {JSON} -d '{{{INPUTS}{OWNER}}}'",
        [Of("digits", 1), DIGIT],
        results,
    ),
    "fields in camelCase": Form(
        post(', "model": {"modelVersion": {"outputInfo": {"outputConfig": {"maxConcepts": 3}}}}'), Of("digits", 3)
    ),
    "`authorization: Key …`, in lower case": Form(post(options=f'-H "authorization: Key $KEY" {JSON}')),
    "`Authorization: Bearer …`": Form(post(options=f'-H "Authorization: Bearer $KEY" {JSON}')),
    "curl's own Content-Type, of a form": Form(post(options=AUTH)),
    "no Content-Type": Form(post(options=f'{AUTH} -H "Content-Type:"')),
    "`--http1.1`": Form(post(options=f"--http1.1 {AUTH} {JSON}")),
    "`--http2`": Form(post(options=f"--http2 {AUTH} {JSON}")),
    "`--compressed`": Form(post(options=f"--compressed {AUTH} {JSON}")),
    "`--data-binary @file`": Form(
        f'curl -X POST {MAIN}/models/digits/outputs" {AUTH} {JSON} --data-binary @one.json',
    ),
    "a body of unknown length, from stdin": Form(
        f'cat one.json | curl -X POST {MAIN}/models/digits/outputs" {AUTH} {JSON} -T -',
    ),
    "an image by URL": Form(
        f'curl -X POST {MAIN}/models/digits/outputs" {AUTH} {JSON} '
        """-d '{"inputs": [{"data": {"image": {"url": "'"$WEB"'"}}}]}'"""
    ),
    "a URL of a host that is not allowed": Form(
        f'curl -X POST {MAIN}/models/digits/outputs" {AUTH} {JSON} '
        """-d '{"inputs": [{"data": {"image": {"url": "http://169.254.169.254/x.png"}}}]}'""",
        says("HTTP 400, 10020, 30106", "169.254.169.254"),
    ),
    "a text": Form(
        f'curl -X POST {MAIN}/models/ml-topics/outputs" {AUTH} {JSON} '
        f"""-d '{{"inputs": [{{"data": {{"text": {{"raw": "{TEXT}"}}}}}}]}}'""",
        TOPIC,
    ),
    "a batch of 128": Form(
        f'curl -X POST {MAIN}/models/digits/outputs" {AUTH} {JSON} -d @128.json',
        [[f"demo_{index}", LABELS[index % len(LABELS)]] for index in range(128)],
        batch,
    ),
    "a batch of 129": Form(
        f'curl -X POST {MAIN}/models/digits/outputs" {AUTH} {JSON} -d @129.json',
        says("HTTP 400, 30105", "129 inputs; the limit is 128"),
    ),
    "`model.output_info.output_config`, as documented": Form(
        post(', "model": {"output_info": {"output_config": {"max_concepts": 3}}}'), Of("digits", 3)
    ),
    "`model.model_version.output_info.output_config`": Form(configured('{"max_concepts": 3}'), Of("digits", 3)),
    "`min_value`": Form(configured('{"min_value": 0.6}'), Of("digits", 1)),
    "`select_concepts`": Form(configured('{"select_concepts": [{"id": "4"}, {"name": "five"}]}'), ["4", "5"]),
    "`select_concepts` that matches in part": Form(
        configured('{"select_concepts": [{"id": "4"}, {"id": "no such"}]}'),
        says("HTTP 207, 10010", "no such"),
    ),
    "`select_concepts` that matches nothing": Form(
        configured('{"select_concepts": [{"id": "no such"}]}'), says("HTTP 400, 21202", "no such")
    ),
    "`max_concepts` 201": Form(configured('{"max_concepts": 201}'), says("HTTP 400, 21202", "from 1 to 200")),
    "a method's arguments as parts": Form(
        f"curl -X POST {MAIN}/models/digits/outputs\" {AUTH} {JSON} -d '{{{PARTS}}}'",
        Of("digits", 2),
        lambda reply: [concept["id"] for concept in reply["outputs"][0]["data"]["parts"][0]["data"]["concepts"]],
    ),
    "one bad input of two": Form(
        f'curl -X POST {MAIN}/models/digits/outputs" {AUTH} {JSON} -d @mixed.json',
        says("HTTP 207, 10010, 30101", "send a JPEG, PNG"),
    ),
    "bytes that are no image": Form(
        f'curl -X POST {MAIN}/models/digits/outputs" {AUTH} {JSON} '
        """-d '{"inputs": [{"data": {"image": {"base64": "bm8gcGljdHVyZQ=="}}}]}'""",
        says("HTTP 400, 10020, 30101", "send a JPEG, PNG"),
    ),
    "no inputs": Form(
        f"curl -X POST {MAIN}/models/digits/outputs\" {AUTH} {JSON} -d '{{}}'", says("HTTP 400, 39999", "input")
    ),
    "a body that is no JSON": Form(
        f'curl -X POST {MAIN}/models/digits/outputs" {AUTH} {JSON} -d \'{{"inputs": [}}\'',
        says("HTTP 400, 11100", "JSON"),
    ),
    "a wrong PAT": Form(post(options='-H "Authorization: Key 0123456789"'), says("HTTP 401, 11008")),
    "no PAT": Form(post(options=JSON), says("HTTP 401, 11102", "authorization: Key")),
    "an unknown model": Form(post(path="/models/nothing/outputs"), says("HTTP 404, 21200", "main/nothing")),
    "an unknown version": Form(
        post(path="/models/digits/versions/9/outputs"), says("HTTP 404, 21200", "ready versions: 1")
    ),
    "an unknown path": Form(get("/inputs"), says("HTTP 404, 11101", "openapi.json")),
    "a method that a path does not have": Form(
        f'curl -X PUT {MAIN}/models/digits/outputs" {AUTH}', says("HTTP 405, 11103")
    ),
    "`POST …/outputs/generate`": Form(
        post(path="/models/digits/outputs/generate"), [DIGIT], lambda reply: [ids(reply)]
    ),
    "`POST /v2/models/outputs/stream`, a line each": Form(
        f'curl -X POST "$BASE/v2/models/outputs/stream" {AUTH} --data-binary @lines.json',
        [DIGIT, DIGIT],
        lambda reply: [ids(line["result"]) for line in reply["lines"]],
    ),
    "`GET …/models`": Form(get("/models"), ["digits", "ml-topics"], named("models")),
    "`GET …/models?page=2&per_page=1`": Form(get("/models?page=2&per_page=1"), ["ml-topics"], named("models")),
    "`GET /v2/users/…/models`": Form(
        f'curl "$BASE/v2/users/appliance/models" {AUTH}', ["digits", "ml-topics"], named("models")
    ),
    "`GET /v2/models`": Form(f'curl "$BASE/v2/models" {AUTH}', ["digits", "ml-topics"], named("models")),
    "`GET …/models/…`": Form(get("/models/digits"), "1", lambda reply: reply["model"]["model_version"]["id"]),
    "`GET …/models/…/versions`": Form(get("/models/digits/versions"), ["1"], named("model_versions")),
    "`GET …/models/…/versions/…`": Form(
        get("/models/digits/versions/1"), 21100, lambda reply: reply["model_version"]["status"]["code"]
    ),
    "`GET …/models/…/output_info`": Form(
        get("/models/digits/output_info"),
        10,
        lambda reply: len(reply["model"]["model_version"]["output_info"]["data"]["concepts"]),
    ),
    "`GET …/models/…/concepts`": Form(get("/models/digits/concepts"), 10, lambda reply: len(reply["concepts"])),
    "`GET …/concepts`": Form(get("/concepts?per_page=100"), 19, lambda reply: len(reply["concepts"])),
    "`GET …/models/types`": Form(
        get("/models/types?per_page=100"), True, lambda reply: "visual-classifier" in named("model_types")(reply)
    ),
    "`GET …/models/types/…`": Form(
        get("/models/types/visual-classifier"), ["image"], lambda reply: reply["model_type"]["input_fields"]
    ),
    "`GET …/workflows`": Form(get("/workflows"), ["twice"], named("workflows")),
    "`GET /v2/users/…/deployments`": Form(
        f'curl "$BASE/v2/users/appliance/deployments" {AUTH}', ["digits", "ml-topics"], named("deployments")
    ),
    "`GET /v2/users/…/compute_clusters`": Form(
        f'curl "$BASE/v2/users/appliance/compute_clusters" {AUTH}', ["on-prem"], named("compute_clusters")
    ),
    "`GET /v2/users/me`": Form(f'curl "$BASE/v2/users/me" {AUTH}', "appliance", lambda reply: reply["user"]["id"]),
    "`GET /v2/myscopes`": Form(f'curl "$BASE/v2/myscopes" {AUTH}', 10000, lambda reply: reply["status"]["code"]),
    "`GET /v2/status_codes/…`": Form(
        f'curl "$BASE/v2/status_codes/21200" {AUTH}', says("HTTP 200, 21200", "MODEL_DOES_NOT_EXIST")
    ),
    "`GET /v2/openapi.json`": Form('curl "$BASE/v2/openapi.json"', True, lambda reply: len(reply["paths"]) > 20),
}


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Path:
    """A folder with the files that commands send, and curl's configuration, as its user has it."""
    need_programs("curl", "curl", "bash")
    folder = tmp_path_factory.mktemp("curl")

    def image(index: int, name: str = "") -> dict[str, Any]:
        return {"id": name, "data": {"image": {"base64": PICTURES[index % len(PICTURES)]}}}

    def body(*inputs: dict[str, Any]) -> str:
        return json.dumps({"inputs": inputs})

    for count in (128, 129):
        (folder / f"{count}.json").write_text(body(*(image(index, f"demo_{index}") for index in range(count))))
    (folder / "one.json").write_text(body(image(0)))
    (folder / "mixed.json").write_text(body(image(0), {"data": {"image": {"base64": "bm8gcGljdHVyZQ=="}}}))
    owner = {"user_id": "appliance", "app_id": "main"}
    line = json.dumps({"user_app_id": owner, "model_id": "digits", "inputs": [image(0)]})
    (folder / "lines.json").write_text(f"{line}\n{line}\n")
    (folder / ".curlrc").write_text(f'cacert = "{pki.ca}"\nsilent\nshow-error\nwrite-out = "\\n%{{http_code}}"\n')
    return folder


def ask(
    command: str, folder: Path, appliance: Appliance, **variables: str | Path
) -> "subprocess.CompletedProcess[str]":
    """Run a command as its user's shell does."""
    base = f"https://localhost:{appliance.port()}"
    settings = environment(CURL_HOME=folder, BASE=base, KEY=appliance.key, PICTURE=PICTURES[0], **variables)
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def found(done: "subprocess.CompletedProcess[str]", read: Callable[[Reply], Any]) -> Any:
    """What a command gave: what is read from a good reply, else "HTTP status, codes: details"."""
    assert done.returncode == 0, done.stderr
    text, _, status = done.stdout.rpartition("\n")
    lines = [json.loads(line) for line in text.splitlines()]
    reply = lines[0] if len(lines) == 1 else {"status": {"code": 10000}, "lines": lines}
    reply = reply.get("result", reply)
    told = reply.get("status", {"code": 10000})
    if status == "200" and told["code"] == 10000:
        return read(reply)
    worst = next((one["status"] for one in reply.get("outputs", ()) if one["status"]["code"] != 10000), told)
    return f"HTTP {status}, {told['code']}, {worst['code']}: {told.get('details')} {worst.get('details')}"


@pytest.mark.parametrize("form", FORMS)
def test_curl(
    form: str, native: Appliance, web: str, bodies: Path, truth: dict[str, list[str]], matrix: Matrix
) -> None:
    """It gives what the raw stub of Python reads, or the error that it should, with the HTTP status that means it."""
    expected = FORMS[form]
    done = ask(expected.command, bodies, native, WEB=f"{web}/{PATHS[0].name}")
    check(found(done, expected.read), expected.gives, truth)
    matrix.row(CURL, form, why=why(expected.gives))
    matrix.version(CURL, " ".join(run("curl", "--version").split()[:2]))


def test_without_the_root_certificate(native: Appliance, bodies: Path, matrix: Matrix) -> None:
    """curl believes the system's authorities, unless it is told of another."""
    done = ask(f'curl -q -sS {MAIN}/models"', bodies, native)
    assert done.returncode == 60
    check(done.stderr, Says(("self-signed certificate in certificate chain",)), {})
    matrix.row(
        CURL, "without `--cacert`", why="the system does not trust the custom root; name it, or install it there"
    )


@pytest.fixture
def certified(tmp_path: Path, pki: Pki) -> Iterator[Appliance]:
    """An appliance that knows its callers by certificate."""
    line_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}
    config = {"auth": {"require": "certificate"}, "principal": [line_3]}
    appliance = Appliance(tmp_path / "certified", pki, config, transport="native")
    shutil.copytree(MODELS / "digits", appliance.models / "digits")
    with appliance:
        yield appliance


def test_a_client_certificate(
    certified: Appliance, pki: Pki, bodies: Path, truth: dict[str, list[str]], matrix: Matrix
) -> None:
    """It stands for the key where the appliance asks for one."""
    pair = {"PAIR": pki.folder / "clients" / "line-3"}
    command = post(options=f'--cert "$PAIR.crt" --key "$PAIR.key" {JSON}')
    check(found(ask(command, bodies, certified, **pair), ids), DIGIT, truth)
    check(found(ask(post(), bodies, certified), ids), says("HTTP 401, 11102", "client certificate"), truth)
    matrix.row(CURL, "a client certificate: `--cert`, `--key`")
    by_url = FORMS["an image by URL"].command.replace(AUTH, '--cert "$PAIR.crt" --key "$PAIR.key"')
    refusal = found(ask(by_url, bodies, certified, WEB="http://localhost/x.png", **pair), ids)
    check(refusal, says("HTTP 400, 10020, 30106", "urls.hosts is empty"), truth)
    matrix.row(
        CURL, "an image by URL, where no host is allowed", why="off until the operator names hosts in `urls.hosts`"
    )
