"""The pythonic methods and the async calls of the stock Python SDK 12, form by form."""

from typing import Any

import pytest
from support.appliance import Appliance, Pki
from support.client_matrix import Matrix
from support.forms import DIGIT, TOPIC, Of, check, says
from support.stock import SAMPLES, run_script

pytestmark = pytest.mark.clients

CLIENT = "Python SDK 12.5.0"
LABELS = [path.stem.rsplit("-", 1)[1] for path in sorted(SAMPLES.glob("*.png"))]

FORMS: dict[str, Any] = {
    "`available_methods()`": says("predict"),
    "`method_signature(…)`": says(r"def predict\(image: data_types.Image, max_concepts: int = 20, .*List\[.*Concept\]"),
    "`generate_client_script()`": says("https://clarifai.com/appliance/main/models/digits", "predict", "max_concepts"),
    "`predict(image=Image(bytes=…))`": DIGIT,
    "`predict(image=Image(url=…))`": DIGIT,
    "`predict(image=Image.from_pil(…))`": DIGIT,
    "`predict(image=Image.from_numpy(…))`": DIGIT,
    "`predict(image=<PIL image>)`": DIGIT,
    "`predict(Image(…))`, positional": DIGIT,
    "`predict(Image(…), 3)`, limits too": Of("digits", 3),
    "`predict(text='…')`": TOPIC,
    "`predict('…')`": TOPIC,
    "`predict(text=Text(…))`": says(
        "Incompatible type", why="the signature says str, and the SDK takes nothing else for it"
    ),
    "`predict(…, max_concepts=3)`": Of("digits", 3),
    "`predict(…, min_value=0.6)`": Of("digits", 1),
    "`predict(…, min_value=0.0)`": DIGIT,
    "`predict(…, select_concepts=['4', 'five'])`": ["4", "5"],
    "`predict([{…}, {…}])`, a batch of 128": [LABELS[index % len(LABELS)] for index in range(128)],
    "`predict([{…}, …])`, a batch of 129": says("UserError: Too many inputs. Max is 128"),
    "`predict(…, with_proto=True)`": [DIGIT, 10000, "return"],
    "`model.client.predict(…)`": DIGIT,
    "an unknown argument": says("TypeError: .*threshold"),
    "too many arguments": says("TypeError: .*takes 4 positional arguments"),
    "an argument given twice": says("TypeError: Multiple values for argument image"),
    "a required argument that is missing": says("TypeError: Missing required argument: image"),
    "an argument of the wrong type": says("TypeError: Incompatible type"),
    "`max_concepts=201` as argument": says("MODEL_INVALID_ARGUMENT", "max_concepts is 201; it must be from 1 to 200"),
    "a method that the model has not": says("AttributeError: .*analyze"),
    "a picture that is none": says("INPUT_UNSUPPORTED_FORMAT", "send a JPEG, PNG"),
    "`await async_predict([Input, …])`": DIGIT,
    "`await async_predict(inputs=[Input, …], output_config=…)`": Of("digits", 3),
    "`await (await async_predict(image=…))`": DIGIT,
    "`await async_predict(image=…)`": says(
        "^coroutine$", why="this SDK gives another coroutine, not the answer: write await twice"
    ),
    "`await (await client.predict(image=…))`": DIGIT,
    "`asyncio.gather` of eight": [DIGIT] * 8,
    "an error of `async_predict`": says(
        "timed out after 10 minutes",
        why="the SDK catches the error, tries again for ten seconds, and says only that it timed out; the same call "
        "without async says what is wrong",
    ),
    "`async for … in await async_generate([Input])`": [DIGIT],
    "`async for … in await async_stream(iter([[Input], …]))`": [DIGIT, DIGIT],
}


@pytest.fixture(scope="module")
def found(native: Appliance, pki: Pki, web: str) -> dict[str, Any]:
    """What each form gave."""
    target = f"https://localhost:{native.port()}"
    given: dict[str, Any] = run_script(
        "sdk-12", "script_sdk_methods.py", target, pki.ca, SAMPLES, web, CLARIFAI_PAT=native.key
    )
    return given


@pytest.mark.parametrize("form", FORMS)
def test_form(form: str, found: dict[str, Any], truth: dict[str, list[str]], matrix: Matrix) -> None:
    """It gives what the raw stub reads, or the error that it should."""
    check(found[form], FORMS[form], truth)
    matrix.row(CLIENT, form, why=getattr(FORMS[form], "why", ""))


def test_no_form_is_forgotten(found: dict[str, Any]) -> None:
    """Each that the script drives is looked at."""
    assert set(found) == set(FORMS)
