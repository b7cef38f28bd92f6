"""How the stock Python SDKs reach the appliance: addresses, trust, keys and environment variables."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.appliance import Appliance, Pki
from support.client_matrix import Matrix
from support.stock import SAMPLES, run_script

pytestmark = pytest.mark.clients

SDKS = {"sdk-12": "Python SDK 12.5.0", "sdk-11": "Python SDK 11.0.7", "sdk-10": "Python SDK 10.11.1"}
OLD = ("sdk-11", "sdk-10")
CA, KEY, PORT, MTLS_PORT = "{ca}", "{key}", "{port}", "{mtls_port}"
HERE = f"https://localhost:{PORT}"
NOT_TRUSTED = "CERTIFICATE_VERIFY_FAILED"


@dataclass(frozen=True)
class Case:
    """One way to connect.

    Attributes:
        form: its row.
        arguments: of `Model`, beside its URL.
        variables: of the environment; the key is in CLARIFAI_PAT unless another one is given.
        error: what its user reads instead of an answer, a regular expression.
        why: why it cannot work, when it cannot.
        only: in these SDKs.
    """

    form: str
    arguments: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    error: str = ""
    why: str = ""
    only: tuple[str, ...] = tuple(SDKS)


CASES = (
    Case("`base_url='https://host:port', root_certificates_path=…`", {"base_url": HERE, "root_certificates_path": CA}),
    Case(
        "`base_url='https://<IP address>:port'`",
        {"base_url": f"https://127.0.0.1:{PORT}", "root_certificates_path": CA},
    ),
    Case(
        "`base_url='https://host'` dials port 443",
        {"base_url": "https://127.0.0.1", "root_certificates_path": CA},
        error=r"127\.0\.0\.1:443",
    ),
    Case(
        "`base_url='host:443'` is TLS to port 443",
        {"base_url": "127.0.0.1:443", "root_certificates_path": CA},
        error=r"127\.0\.0\.1:443",
        only=("sdk-12",),
    ),
    Case(
        "`base_url='http://host:port'`",
        {"base_url": f"http://127.0.0.1:{PORT}"},
        error="UNAVAILABLE.*Socket closed",
        why="plaintext; the appliance serves nothing without TLS: write https://",
    ),
    Case(
        "`base_url='https://host:port/'`",
        {"base_url": f"{HERE}/", "root_certificates_path": CA},
        error="Failed to parse port in name",
        why="the SDK takes all after the scheme for host and port: leave the slash out",
    ),
    Case(
        "`base_url='https://host:port/path'`",
        {"base_url": f"{HERE}/clarifai", "root_certificates_path": CA},
        error="Failed to parse port in name",
        why="gRPC has no path prefix; give the appliance a host or port of its own",
    ),
    Case(
        "`base_url='host:port'`",
        {"base_url": f"127.0.0.1:{PORT}", "root_certificates_path": CA},
        # The second is what it says when its own five seconds for the question are over.
        error="UNAVAILABLE.*Socket closed|Could not get a valid response",
        why="the SDK asks the host over HTTPS with the system's trust, not with root_certificates_path; a private CA "
        "makes it fall back to plaintext: write https://, or set SSL_CERT_FILE too",
    ),
    Case(
        "`base_url='host:port'` with `SSL_CERT_FILE`",
        {"base_url": f"localhost:{PORT}", "root_certificates_path": CA},
        {"SSL_CERT_FILE": CA},
    ),
    Case("no `root_certificates_path`", {"base_url": f"https://127.0.0.1:{PORT}"}, error=NOT_TRUSTED),
    Case(
        "a `root_certificates_path` that is not there",
        {"base_url": HERE, "root_certificates_path": "/no/such/ca.crt"},
        error="FileNotFoundError.*/no/such/ca.crt",
    ),
    Case("`GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`", {"base_url": HERE}, {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": CA}),
    Case(
        "`SSL_CERT_FILE` instead of `root_certificates_path`",
        {"base_url": f"https://127.0.0.1:{PORT}"},
        {"SSL_CERT_FILE": CA},
        error=NOT_TRUSTED,
        why="gRPC does not read it",
    ),
    Case(
        "`CLARIFAI_ROOT_CERTIFICATES_PATH`",
        {"base_url": HERE},
        {"CLARIFAI_ROOT_CERTIFICATES_PATH": CA},
        only=("sdk-12",),
    ),
    Case(
        "`CLARIFAI_ROOT_CERTIFICATES_PATH`",
        {"base_url": f"https://127.0.0.1:{PORT}"},
        {"CLARIFAI_ROOT_CERTIFICATES_PATH": CA},
        error=NOT_TRUSTED,
        why="this SDK does not read it; pass root_certificates_path or set GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
        only=OLD,
    ),
    Case("`CLARIFAI_API_BASE`", {"root_certificates_path": CA}, {"CLARIFAI_API_BASE": HERE}, only=("sdk-12",)),
    Case(
        "`CLARIFAI_API_BASE`",
        {"root_certificates_path": CA},
        {"CLARIFAI_API_BASE": HERE},
        error=r"api\.clarifai\.com",
        why="this SDK does not read it and calls api.clarifai.com; pass base_url",
        only=OLD,
    ),
    Case("`CLARIFAI_PAT`", {"base_url": HERE, "root_certificates_path": CA}),
    Case(
        "`token=…`, a PAT as session token",
        {"base_url": HERE, "root_certificates_path": CA, "token": KEY},
        {"CLARIFAI_PAT": ""},
    ),
    Case(
        "`CLARIFAI_SESSION_TOKEN`",
        {"base_url": HERE, "root_certificates_path": CA},
        {"CLARIFAI_PAT": "", "CLARIFAI_SESSION_TOKEN": KEY},
    ),
    Case(
        "a model URL of any host",
        {
            "url": "https://models.example/appliance/main/models/digits",
            "base_url": HERE,
            "root_certificates_path": CA,
        },
    ),
    Case(
        "a model URL with a slash at its end",
        {
            "url": "https://clarifai.com/appliance/main/models/digits/",
            "base_url": HERE,
            "root_certificates_path": CA,
        },
        error="must have 4 or 6 parts",
        why="the SDK reads exactly four or six parts after the host: leave the slash out",
    ),
    Case(
        "a port that requires client certificates",
        {"base_url": f"https://127.0.0.1:{MTLS_PORT}", "root_certificates_path": CA},
        error="UNAVAILABLE",
        why="no SDK can present a client certificate; `appliance connect` does it for it, or the raw stub on one's own "
        "channel",
    ),
)


@pytest.fixture(scope="module")
def found(native: Appliance, pki: Pki) -> dict[tuple[str, int], Any]:
    """By SDK and case, what it gave; all at once, for most of the time is waiting."""
    places = {
        CA: str(pki.ca),
        KEY: native.key,
        PORT: str(native.port()),
        MTLS_PORT: str(native.port("server.mtls_listen")),
    }

    def filled(values: dict[str, str]) -> dict[str, str]:
        for mark, text in places.items():
            values = {name: value.replace(mark, text) for name, value in values.items()}
        return values

    def run(group: tuple[tuple[str, str], list[int]]) -> dict[tuple[str, int], Any]:
        (environment, base), numbers = group
        cases = {
            number: [filled(CASES[number].arguments), filled({"CLARIFAI_PAT": KEY} | CASES[number].variables)]
            for number in numbers
        }
        picture = sorted(SAMPLES.glob("*.png"))[0]
        # The SDK reads this one as it is imported.
        variables = filled({"CLARIFAI_API_BASE": base}) if base else {}
        given = run_script(environment, "script_sdk_connect.py", picture, json.dumps(cases), **variables)
        return {(environment, int(number)): answer for number, answer in given.items()}

    groups: dict[tuple[str, str], list[int]] = {}
    for number, case in enumerate(CASES):
        for environment in case.only:
            groups.setdefault((environment, case.variables.get("CLARIFAI_API_BASE", "")), []).append(number)
    answers: dict[tuple[str, int], Any] = {}
    with ThreadPoolExecutor(len(groups)) as pool:
        for part in pool.map(run, groups.items()):
            answers |= part
    return answers


@pytest.mark.parametrize(
    ("environment", "number"),
    [(environment, number) for number, case in enumerate(CASES) for environment in case.only],
    ids=lambda value: CASES[value].form if isinstance(value, int) else value,
)
def test_connecting(
    environment: str,
    number: int,
    found: dict[tuple[str, int], Any],
    truth: dict[str, list[str]],
    matrix: Matrix,
) -> None:
    """It reaches the appliance, or its user reads why not."""
    case, given = CASES[number], found[environment, number]
    if case.error:
        assert re.search(case.error, str(given), re.DOTALL), given
    else:
        assert given == truth["digits"]
    matrix.row(SDKS[environment], case.form, why=case.why)
