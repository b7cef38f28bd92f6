"""The stock Node clients over TLS from a custom root: the SDK, and the gRPC stub of the documentation's samples."""

from collections.abc import Callable
from typing import Any

import pytest
from support.appliance import Appliance, Pki
from support.client_matrix import Matrix
from support.forms import DIGIT, TOPIC, Instead, Of, Says, check, says, why
from support.programs import node_versions, run_node
from support.stock import SAMPLES

pytestmark = pytest.mark.clients

SDK = "Node SDK"
STUB = "Node stub"
LABELS = [path.stem.rsplit("-", 1)[1] for path in sorted(SAMPLES.glob("*.png"))]
BATCH = [[f"demo_{index}", LABELS[index % len(LABELS)]] for index in range(128)]

SDK_FORMS: dict[str, Any] = {
    "`new Model({ url, authConfig: { pat, base, rootCertificatesPath } })`": DIGIT,
    '`new Model({ url: "…/versions/1", authConfig })`': DIGIT,
    "`new Model({ modelId, authConfig: { userId, appId, … } })`": DIGIT,
    "`new Model({ modelId, modelVersion: { id }, authConfig })`": DIGIT,
    "the PAT from CLARIFAI_PAT": DIGIT,
    "the base from CLARIFAI_API_BASE": Instead(
        "https://api.clarifai.com", "`Model` reads this variable never; give it `authConfig.base`"
    ),
    "the root certificate from CLARIFAI_ROOT_CERTIFICATES_PATH": Instead(
        "", "`Model` reads this variable never; give it `authConfig.rootCertificatesPath`"
    ),
    "a base without `https://`": Says(
        ("Please provide a valid scheme",), "the SDK asks for the scheme: write https:// before the host"
    ),
    "a root certificate that is not there": says("ENOENT.*/nowhere/ca.crt"),
    "a wrong PAT": says('"code":11008', "not known to this appliance"),
    "an unknown model": says('"code":21200', "appliance/main/nothing"),
    "an unknown version": says('"code":21200', "ready versions: 1"),
    '`predictByBytes({ inputBytes, inputType: "image" })`': DIGIT,
    '`predictByBytes({ inputBytes, inputType: "text" })`': TOPIC,
    '`predictByFilepath({ filepath, inputType: "image" })`': DIGIT,
    '`predictByUrl({ url, inputType: "image" })`': DIGIT,
    '`predictByUrl({ url, inputType: "text" })`': TOPIC,
    "a URL of a host that is not allowed": says("INPUT_INVALID_URL", "169.254.169.254"),
    "bytes that are no image": says("INPUT_UNSUPPORTED_FORMAT", "send a JPEG, PNG"),
    "`predict({ inputs })`": DIGIT,
    "a batch of 128": BATCH,
    "a batch of 129": says("Too many inputs. Max is 128"),
    "one bad input of two": Says(
        ('"code":10010', "1 of 2 inputs failed", "INPUT_UNSUPPORTED_FORMAT"),
        "the reply has the good output; the SDK throws on MIXED_STATUS, and its user finds it in `error.cause`",
    ),
    "`outputConfig` with max_concepts": Of("digits", 3),
    "`outputConfig` with max_concepts 201": says('"code":21202', "from 1 to 200"),
    "`outputConfig` with min_value": Of("digits", 1),
    "`outputConfig` with select_concepts, by id and by name": ["4", "5"],
    "`loadInfo()`, then `outputConfig`": Of("digits", 3),
    "`inferenceParams` beside `outputConfig`": Of("digits", 3),
    "`inferenceParams` that the model does not have": says('"code":21202', "no parameter '"),
    "`inferenceParams` alone": Instead("not sent", "the SDK drops them where no `outputConfig` is given with them"),
    "`availableMethods()`": ["predict"],
    "`methodSignatures()`": ["image", "max_concepts", "min_value", "select_concepts"],
    "`predict({ methodName, image: { base64 } })`": DIGIT,
    "`predict({ methodName, image: { url } })`": DIGIT,
    '`predict({ methodName, text: "…" })`': TOPIC,
    "`predict({ methodName, …, max_concepts })`": Of("digits", 2),
    "`predict({ methodName, …, min_value })`": Of("digits", 1),
    '`predict({ methodName, …, select_concepts: ["4", "five"] })`': ["4", "5"],
    "`predict({ methodName, …, max_concepts: 201 })`": says("MODEL_INVALID_ARGUMENT", "from 1 to 200"),
    "a whole number for a FLOAT argument, `min_value: 0`": Says(
        ("Validation failed for field min_value",),
        "the SDK takes whole numbers for no FLOAT; leave the argument out for 0, write 0.999 for 1",
    ),
    "a missing argument": says("Missing required fields: image"),
    "an unknown argument": says("Field colour not found"),
    "an unknown method": says("Invalid Method: analyze, available methods are predict"),
    "`Model.getOutputDataFromModelResponse(outputs)`": DIGIT,
    "`generate({ methodName, … })`": [DIGIT],
    "`runner: { deployment: { id } }`": DIGIT,
    "`setRunner({ deployment: { id, userId } })`": DIGIT,
    "`runner: { nodepool: { id, computeCluster: { id } } }`": DIGIT,
    "`runner`, with `predict({ methodName, … })`": DIGIT,
    "a deployment that is not here": says('"code":25900', "other"),
    "a nodepool that is not here": says('"code":25700', "other"),
    "a compute cluster that is not here": says('"code":25800', "other"),
    '`Workflow.predictByBytes(inputBytes, "image")`': [[Of("digits", 1), DIGIT]],
    '`Workflow.predictByUrl(url, "image")`': [[Of("digits", 1), DIGIT]],
    "`Workflow.predict({ inputs })`": [[Of("digits", 1), DIGIT]] * 2,
    "`new Workflow({ …, outputConfig: { maxConcepts } })`": [[Of("digits", 2), Of("digits", 2)]],
    "a workflow that is not here": says("Workflow Predict failed with response Workflow does not exist"),
    "`listVersions()`": ["1"],
    "`listVersions({ pageNo, perPage })`": Instead(
        ["1"], "the SDK takes one for the other: page 2 of 1 each is asked for as page 1 of 2 each"
    ),
    "`App.listModels()`": ["digits", "ml-topics"],
    "`App.listConcepts()`": "19 concepts",
}

STUB_FORMS: dict[str, Any] = {
    '`ClarifaiStub.grpc("host:port")`': DIGIT,
    "`ClarifaiStub.json()`": Instead(
        "dns:api.clarifai.com", "deprecated in the package; it takes no host but that of CLARIFAI_GRPC_BASE"
    ),
    "`ClarifaiStub.insecureGrpc()`": Instead(
        "dns:api-grpc.clarifai.com:18080", "the package has Clarifai's own host in it, and no parameter for another"
    ),
    "`PostModelOutputs`, `image: { base64 }`": DIGIT,
    "`PostModelOutputs`, `image: { url }`": DIGIT,
    "`PostModelOutputs`, `text: { raw }`": TOPIC,
    "`PostModelOutputs`, `img: { url }`, as the documentation writes it": Says(
        ("30104", "the input has nothing in it; set data.image"),
        "the field is `image`: the stub drops `img`, and the reply says that the input is empty",
    ),
    "`version_id`": DIGIT,
    "`model.output_info.output_config`, as documented": Of("digits", 3),
    "`model.model_version.output_info.output_config`": Of("digits", 3),
    "`min_value`": Of("digits", 1),
    "`select_concepts`": ["4", "5"],
    "`select_concepts` that matches in part": [10010, "4"],
    "`max_concepts` 201": says("21202", "from 1 to 200"),
    "a batch of 128": BATCH,
    "a batch of 129": says("30105", "129 inputs; the limit is 128"),
    "one bad input of two": [10010, 10000, 30101],
    "a method's arguments as parts": Of("digits", 2),
    "`GenerateModelOutputs`": [DIGIT],
    "`StreamModelOutputs`": [DIGIT, DIGIT],
    "`GetModel`": "1",
    "`GetModelVersion`": "1",
    "`GetModelOutputInfo`": 10,
    "`ListModels`": ["digits", "ml-topics"],
    "`ListModelVersions`": ["1"],
    "`ListConcepts`": 19,
    "`ListModelConcepts`": 10,
    "`GetModelType`": ["image"],
    "`GetUser`, `me`": 10000,
    "`MyScopes`": 10000,
    "an RPC that is not served": says("12 UNIMPLEMENTED", "ListInputs"),
    "a wrong PAT": says("11008", "not known to this appliance"),
    "no PAT": says("11102", "authorization: Key"),
    "an unknown model": says("21200", "appliance/main/nothing"),
    "the generated `V2Client` of `service_grpc_pb`": DIGIT,
}


def about(matrix: Matrix) -> None:
    """The versions that were driven."""
    matrix.version(SDK, node_versions("clarifai-nodejs", "clarifai-nodejs-grpc", "@grpc/grpc-js"))
    matrix.version(STUB, node_versions("clarifai-nodejs-grpc", "@grpc/grpc-js"))


@pytest.fixture(scope="module")
def sdk(native: Appliance, pki: Pki, web: str) -> dict[str, Any]:
    """What each form of the SDK gave."""
    base = f"https://localhost:{native.port()}"
    return dict(run_node("sdk_forms.mjs", base, pki.ca, SAMPLES, web, CLARIFAI_PAT=native.key))


@pytest.fixture(scope="module")
def stub(native: Appliance, pki: Pki, web: str) -> dict[str, Any]:
    """What each form of the stub gave."""
    return run_stub(native, pki, web, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=pki.ca)


def run_stub(appliance: Appliance, pki: Pki, *words: object, **variables: Any) -> dict[str, Any]:
    """One process of the stub."""
    target = f"localhost:{appliance.port()}"
    return dict(run_node("stub_forms.js", target, pki.ca, SAMPLES, *words, CLARIFAI_PAT=appliance.key, **variables))


@pytest.mark.parametrize("form", SDK_FORMS)
def test_the_sdk(form: str, sdk: dict[str, Any], truth: dict[str, list[str]], matrix: Matrix) -> None:
    """It gives what the raw stub reads, or the error that it should."""
    check(sdk[form], SDK_FORMS[form], truth)
    matrix.row(SDK, form, why=why(SDK_FORMS[form]))
    about(matrix)


@pytest.mark.parametrize("form", STUB_FORMS)
def test_the_stub(form: str, stub: dict[str, Any], truth: dict[str, list[str]], matrix: Matrix) -> None:
    """It gives what the raw stub of Python reads, or the error that it should."""
    check(stub[form], STUB_FORMS[form], truth)
    matrix.row(STUB, form, why=why(STUB_FORMS[form]))
    about(matrix)


def test_no_form_is_forgotten(sdk: dict[str, Any], stub: dict[str, Any]) -> None:
    """Each that the scripts drive is looked at."""
    assert set(sdk) == set(SDK_FORMS)
    assert set(stub) == set(STUB_FORMS)


class TestTheStubsTrust:
    """The stub has no parameter for a root certificate; the process's environment says whom it trusts."""

    def test_by_grpcs_own_variable(self, stub: dict[str, Any], matrix: Matrix) -> None:
        assert stub['`ClarifaiStub.grpc("host:port")`']
        matrix.row(STUB, "the root certificate from GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")

    def test_by_nodes_variable(
        self, native: Appliance, pki: Pki, truth: dict[str, list[str]], web: str, matrix: Matrix
    ) -> None:
        target = f"localhost:{native.port()}"
        found = run_stub(native, pki, web, "predict", NODE_EXTRA_CA_CERTS=pki.ca, CLARIFAI_GRPC_BASE=target)
        assert found["predict"] == truth["digits"]
        matrix.row(STUB, "the root certificate from NODE_EXTRA_CA_CERTS, where gRPC's own variable is not set")
        matrix.row(STUB, "`ClarifaiStub.grpc()`, the host from CLARIFAI_GRPC_BASE")

    def test_nobody_by_default(self, native: Appliance, pki: Pki, web: str, matrix: Matrix) -> None:
        found = run_stub(native, pki, web, "predict", CLARIFAI_GRPC_BASE=f"localhost:{native.port()}")
        assert "UNAVAILABLE" in found["predict"]
        assert "self-signed certificate in certificate chain" in found["predict"]
        matrix.row(
            STUB,
            "the root certificate as a parameter",
            why="`ClarifaiStub.grpc` has none; set GRPC_DEFAULT_SSL_ROOTS_FILE_PATH before Node starts",
        )


@pytest.mark.parametrize("transport", ["native"], indirect=True)
def test_a_client_certificate(
    make_appliance: Callable[..., Appliance], pki: Pki, truth: dict[str, list[str]], matrix: Matrix
) -> None:
    """The stub's own class takes credentials of one's own; the stock ways of making a client have none to take."""
    line_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}
    form = "a client certificate: `new stub.constructor(base, createSsl(ca, key, certificate))`"
    with make_appliance("digits", auth={"require": "certificate"}, principal=[line_3]) as appliance:
        pair = [pki.folder / "clients" / f"line-3.{kind}" for kind in ("key", "crt")]
        by_stub = run_stub(appliance, pki, "-", "certificate", *pair, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=pki.ca)
        first, base = next(iter(SDK_FORMS)), f"https://localhost:{appliance.port()}"
        by_sdk = run_node("sdk_forms.mjs", base, pki.ca, SAMPLES, "-", first, CLARIFAI_PAT="none")
    assert by_stub[form] == truth["digits"]
    matrix.row(STUB, form)
    needed = "connect with one that a \\[\\[principal\\]\\]"
    check(by_stub["without a client certificate"], says("11102", needed), truth)
    matrix.row(
        STUB, "a client certificate by `ClarifaiStub.grpc`", why="it has no parameter for one; see the row above"
    )
    check(by_sdk[first], says('"code":11102', needed), truth)
    matrix.row(SDK, "a client certificate", why="`authConfig` takes none; point `base` at `appliance connect`")
