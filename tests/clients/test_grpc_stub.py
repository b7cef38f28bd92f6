"""The stock clarifai-grpc: sync and aio stubs, one's own channel with a client certificate, and the JSON channel."""

from typing import Any

import pytest
from support.appliance import Appliance, Pki
from support.client_matrix import Matrix
from support.forms import DIGIT, Of, check, says
from support.stock import SAMPLES, run_script, versions

pytestmark = pytest.mark.clients

NOT_TRUSTED = "CERTIFICATE_VERIFY_FAILED"

RAW: dict[str, Any] = {
    "`ClarifaiChannel.get_grpc_channel(base='host:port', root_certificates_path=…)`": DIGIT,
    "`get_grpc_channel(base='https://host:port')`": says(
        "ValueError: .*should not start with http", why="the stub takes host:port: leave the scheme out"
    ),
    "`CLARIFAI_GRPC_BASE`": DIGIT,
    "`get_grpc_channel()` without root_certificates_path": says(NOT_TRUSTED),
    "`get_insecure_grpc_channel(base=…, port=…)`": says(
        "UNAVAILABLE", why="plaintext; the appliance serves nothing without TLS: take get_grpc_channel"
    ),
    "`V2Stub` on one's own channel": DIGIT,
    "`V2Stub` on one's own channel with a client certificate (mTLS)": DIGIT,
    "`V2Stub` before any `ClarifaiChannel.get_…_channel()`": says(
        "TypeError: 'NoneType' object is not callable",
        why="the stub needs what the first stock channel of a process sets: make one and close it",
    ),
    "metadata `authorization: Key …`": DIGIT,
    "metadata `x-clarifai-session-token`": DIGIT,
    "metadata `x-clarifai-request-id-prefix`": "line-3-",
    "no metadata": says("11102: .*authorization: Key <PAT>"),
    "`PostModelOutputs` by bytes": DIGIT,
    "`PostModelOutputs` by URL": DIGIT,
    "`PostModelOutputs` with `version_id`": DIGIT,
    "`PostModelOutputs` with `model.output_info`, as the documentation's samples": Of("digits", 3),
    "`PostModelOutputs` with `model.model_version.output_info`, as the SDK": Of("digits", 3),
    "`PostModelOutputs` with both": Of("digits", 2),
    "`PostModelOutputs` with one bad input of three": [10010, [["a", 10000, 10], ["b", 30101, 0], ["c", 10000, 10]]],
    "`PostModelOutputs` with 128 inputs": 128,
    "`PostModelOutputs` with 129 inputs": says("30105: .*129 inputs; the limit is 128"),
    "`PostModelOutputs` with 16 MB": DIGIT,
    "`PostModelOutputs` without inputs": says("39999: .*no inputs"),
    "`PostModelOutputs` of `_GET_SIGNATURES`": says("'predict'"),
    "`PostModelOutputs` of a method and its arguments": Of("digits", 3),
    "`PostModelOutputs.future`": DIGIT,
    "`compression=Gzip`": DIGIT,
    "`GenerateModelOutputs`": [DIGIT],
    "`StreamModelOutputs`": [DIGIT, DIGIT],
    "`GetModel`": "digits",
    "`GetModelVersion`": "predict",
    "`GetModelOutputInfo`": 10,
    "`ListModels`": ["digits", "ml-topics"],
    "`ListModelVersions`": ["1"],
    "`ListModelConcepts`": 10,
    "`ListConcepts`": 19,
    "`GetModelType`": ["image"],
    "`ListModelTypes`": True,
    "`GetApp`, `ListApps`": ["main", "main"],
    "`GetUser`": "appliance",
    "`MyScopes`": True,
    "`ListStatusCodes`, `GetStatusCode`": [True, 21200],
    "an RPC that is not served (`PostInputs`)": says("UNIMPLEMENTED: .*does not serve"),
}
AIO: dict[str, Any] = {
    "`await stub.PostModelOutputs(…)`": DIGIT,
    "`asyncio.gather` of eight": [DIGIT] * 8,
    "`async for … in stub.GenerateModelOutputs(…)`": [DIGIT],
    "`async for … in stub.StreamModelOutputs(iter([…]))`": [DIGIT, DIGIT],
    "`await stub.GetModel(…)`": "digits",
}
JSON: dict[str, Any] = {
    "`ClarifaiChannel.get_json_channel(base_url='https://host:port')`, the root in `REQUESTS_CA_BUNDLE`": DIGIT,
    "the root not in `REQUESTS_CA_BUNDLE`": says(
        NOT_TRUSTED, why="the channel has no parameter for it; it trusts what requests trusts: set REQUESTS_CA_BUNDLE"
    ),
    "`base_url='host:port'`": says(
        "InvalidSchema|MissingSchema|No connection adapters", why="the channel wants a URL: write https://"
    ),
    "`base_url='https://host:port/'`": says(
        "11101: .*not served here", why="the channel then asks for //v2/…: leave the slash at the end out"
    ),
    "`CLARIFAI_API_BASE`": DIGIT,
    "`PostModelOutputs` by URL": DIGIT,
    "`PostModelOutputs` with `version_id`": DIGIT,
    "`PostModelOutputs` with `model.output_info`": Of("digits", 3),
    "`PostModelOutputs` with 129 inputs": says("30105: .*129 inputs; the limit is 128"),
    "`GetModel`": "digits",
    "`ListModels`": ["digits", "ml-topics"],
    "`ListModels(page=…, per_page=…)`": 1,
    "`GetModelOutputInfo`": 10,
    "`GetModelVersion`": "predict",
    "`ListModelVersions`": ["1"],
    "`ListConcepts`": 19,
    "`GetUser`": "appliance",
    "a wrong key": says("11008: .*not known to this appliance"),
    "`GenerateModelOutputs`": says(
        "NotImplementedError", why="the channel has no server streams; take the gRPC channel"
    ),
    "`StreamModelOutputs` of one message": says(
        "^.'0: '.$", why="REST answers a stream of results, and the channel looks for one reply: take PostModelOutputs"
    ),
    "`StreamModelOutputs` of several": says(
        "The input request must be of type", why="the channel sends one message; take the gRPC channel"
    ),
}
GROUPS = {
    "raw": ("clarifai-grpc 12.6.0", RAW),
    "aio": ("clarifai-grpc 12.6.0, aio", AIO),
    "json": ("clarifai-grpc 12.6.0, JSON channel", JSON),
}


@pytest.fixture(scope="module")
def found(native: Appliance, pki: Pki, web: str) -> dict[str, dict[str, Any]]:
    """What each form gave, by channel."""
    key = pki.folder / "clients" / "line-3.key"
    ports = (native.port(), native.port("server.mtls_listen"))
    given: dict[str, dict[str, Any]] = run_script(
        "sdk-12",
        "script_grpc.py",
        *(*ports, pki.ca, key, key.with_suffix(".crt"), SAMPLES, web, native.key),
        REQUESTS_CA_BUNDLE=pki.ca,
    )
    return given


@pytest.mark.parametrize(("group", "form"), [(group, form) for group, (_, forms) in GROUPS.items() for form in forms])
def test_form(
    group: str, form: str, found: dict[str, dict[str, Any]], truth: dict[str, list[str]], matrix: Matrix
) -> None:
    """It gives what the raw stub reads, or the error that it should."""
    client, forms = GROUPS[group]
    check(found[group][form], forms[form], truth)
    matrix.row(client, form, why=getattr(forms[form], "why", ""))
    matrix.version(client, versions("sdk-12", "clarifai-grpc", "grpcio", "protobuf"))


def test_no_form_is_forgotten(found: dict[str, dict[str, Any]]) -> None:
    """Each that the script drives is looked at."""
    assert {group: set(forms) for group, forms in found.items()} == {name: set(g[1]) for name, g in GROUPS.items()}
