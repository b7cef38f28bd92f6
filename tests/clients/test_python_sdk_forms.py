"""Every classic form of the stock Python SDKs, old and new: what its user writes, and what comes back."""

from typing import Any

import pytest
from support.appliance import Appliance, Pki
from support.client_matrix import Matrix
from support.forms import DIGIT, TOPIC, Of, check, refused, row_of, says
from support.stock import SAMPLES, run_script, versions

pytestmark = pytest.mark.clients


LABELS = [path.stem.rsplit("-", 1)[1] for path in sorted(SAMPLES.glob("*.png"))]

FORMS: dict[str, Any] = {
    "`Model(url=…)`": DIGIT,
    '`Model("https://…")`, the URL as first argument': DIGIT,
    "`Model(url=…/versions/1)`": DIGIT,
    "`Model(model_id=…, user_id=…, app_id=…)`": DIGIT,
    "`Model(model_id=…, model_version={'id': …})`": DIGIT,
    "`Model(pat=…)`": DIGIT,
    "an unknown model": refused("MODEL_DOES_NOT_EXIST", "appliance/main/nothing", 'req_id: "sdk-python-'),
    "an unknown version": refused("MODEL_DOES_NOT_EXIST", "ready versions: 1"),
    "a wrong PAT": refused("CONN_KEY_INVALID", "not known to this appliance"),
    "a principal over its rate: the SDK waits five seconds and tries again": [DIGIT, [5]],
    "`predict([Input, …])`": DIGIT,
    "`predict(inputs=[Input, …])`": DIGIT,
    "`predict_by_bytes(…, input_type='image')`": DIGIT,
    "`predict_by_bytes(…, input_type='text')`": TOPIC,
    "`predict_by_bytes('…', 'text')`, a str": TOPIC,
    "`predict_by_bytes(…)` without input_type, an image": DIGIT,
    "`predict_by_bytes(…)` without input_type, a text": TOPIC,
    "`predict_by_filepath(…, input_type='image')`": DIGIT,
    "`predict_by_filepath(…)` without input_type": DIGIT,
    "`predict_by_url(…, input_type='image')`": DIGIT,
    "`predict_by_url(…, input_type='text')`": TOPIC,
    "`predict_by_url(…)` without input_type": DIGIT,
    "`Inputs.get_input_from_file`": DIGIT,
    "`Inputs.get_input_from_url`": DIGIT,
    "`Inputs.get_text_input`": TOPIC,
    "a batch of 128": [[f"demo_{index}", LABELS[index % len(LABELS)]] for index in range(128)],
    "a batch of 129": refused("UserError: Too many inputs. Max is 128"),
    "bytes that are no image": refused("INPUT_UNSUPPORTED_FORMAT", "send a JPEG, PNG"),
    "a URL of a host that is not allowed": refused("INPUT_INVALID_URL", "169.254.169.254"),
    "`inference_params={'max_concepts': 3}`, a method's argument": Of("digits", 3),
    "`inference_params={…}` that the model has not": refused(
        "MODEL_INVALID_ARGUMENT", "temperature|max_tokens", "max_concepts"
    ),
    "`output_config={'max_concepts': 3}`": Of("digits", 3),
    "`output_config={'max_concepts': 201}`": refused("MODEL_INVALID_ARGUMENT", "from 1 to 200"),
    "`output_config={'min_value': 0.6}`": Of("digits", 1),
    "`output_config={'select_concepts': [Concept(id=…), Concept(name=…)]}`": ["4", "5"],
    "`output_config={'select_concepts': [{'id': …}]}`": ["4"],
    "`output_config={'select_concepts': ['name']}`": says(
        "TypeError: Parameter to initialize message field must be dict",
        why="documented so, but the SDK raises a TypeError: it takes Concept messages, or dicts",
    ),
    "`output_config={'select_concepts': …}` that matches in part": says(
        "MIXED_STATUS",
        "has no concept .*no such",
        why="the reply has the concepts that match and says MIXED_STATUS; the SDK raises on that",
    ),
    "`output_config={'select_concepts': …}` that matches nothing": refused("MODEL_INVALID_ARGUMENT", "none"),
    "`generate([Input])`": [DIGIT],
    "`generate_by_bytes(…)`": [DIGIT],
    "`generate_by_filepath(…)`": [DIGIT],
    "`generate_by_url(…)`": [DIGIT],
    "`generate(…, output_config=…)`": [Of("digits", 3)],
    "`stream(iter([[Input], …]))`": [DIGIT, DIGIT],
    "`stream_by_bytes(iter([…]))`": [DIGIT, DIGIT],
    "`stream_by_filepath(…)`": [DIGIT],
    "`stream_by_url(iter([…]))`": [DIGIT],
    "`stream(…, output_config=…)`": [Of("digits", 3)],
    "`list_versions()`": ["1"],
    "`list_versions(page_no=1, per_page=1)`": ["1"],
    "`load_info()`": ["digits"],
    "`load_input_types()`": ["image"],
    "`App.list_models()`": ["digits", "ml-topics"],
    "`App.list_concepts()`": "19 concepts",
    "`App.model(…).predict_by_bytes(…)`": DIGIT,
    "`App.list_trainable_model_types()`": None,
    "`User.app(…)`": "main",
    "`User.list_apps()`": ["main"],
}
"""What each form gives; None: whatever the SDK makes of it, as a list."""

ONLY_12: dict[str, Any] = {
    "`generate(…, output_config=…)`": says(
        "AttributeError: MergeFromDict", why="the SDK raises AttributeError: MergeFromDict before it sends anything"
    ),
    "`stream(…, output_config=…)`": says(
        "generator raised StopIteration", why="the SDK's AttributeError: MergeFromDict ends its own stream"
    ),
    "`User.get_user_info('me')`": "appliance",
    "`User.list_models()`": ["digits", "ml-topics"],
    "`User.list_models(return_clarifai_model=True)`": says(
        "MODEL_DOES_NOT_EXIST",
        "Handwritten digits",
        why="the SDK takes a model's display name for its id; it works for bundles whose name is their id",
    ),
}
SDKS = {"sdk-12": "Python SDK 12.5.0", "sdk-11": "Python SDK 11.0.7", "sdk-10": "Python SDK 10.11.1"}
EXPECTED = {environment: FORMS | (ONLY_12 if environment == "sdk-12" else {}) for environment in SDKS}
CASES = [(environment, form) for environment in SDKS for form in EXPECTED[environment]]


@pytest.fixture(scope="module")
def found(native: Appliance, pki: Pki, web: str, slow_key: str) -> dict[str, dict[str, Any]]:
    """By environment, what each form gave."""
    target = f"https://localhost:{native.port()}"
    return {
        environment: run_script(
            environment, "script_sdk_forms.py", target, pki.ca, SAMPLES, web, slow_key, CLARIFAI_PAT=native.key
        )
        for environment in SDKS
    }


@pytest.mark.parametrize(("environment", "form"), CASES)
def test_form(
    environment: str, form: str, found: dict[str, dict[str, Any]], truth: dict[str, list[str]], matrix: Matrix
) -> None:
    """It gives what the raw stub reads, or the error that it should."""
    check(found[environment][form], EXPECTED[environment][form], truth)
    row, why = row_of(form, EXPECTED[environment][form])
    matrix.row(SDKS[environment], row, why=why)
    matrix.version(SDKS[environment], versions(environment, "clarifai", "clarifai-grpc", "grpcio", "protobuf"))


@pytest.mark.parametrize("environment", SDKS)
def test_no_form_is_forgotten(environment: str, found: dict[str, dict[str, Any]]) -> None:
    """Each that the script drives is looked at."""
    assert set(found[environment]) == set(EXPECTED[environment])
