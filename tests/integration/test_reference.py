"""Answers equal a plain reference (Pillow full decode + numpy + onnxruntime on the bundle's own file) within 1e-4."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from support.appliance import MODELS, Client, image_input, request_for, text_input
from tokenizers import Tokenizer

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime

TOLERANCE = 1e-4


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Rows that sum to 1, in double precision."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def digit_scores(bodies: list[bytes]) -> NDArray[Any]:
    """Reference scores, one picture at a time."""
    session = onnxruntime.InferenceSession(str(MODELS / "digits" / "1" / "model.onnx"))
    rows = []
    for body in bodies:
        grey = Image.open(io.BytesIO(body)).convert("L").resize((8, 8), Image.Resampling.BOX)
        values = (np.asarray(grey, np.float32) / 255 - 0.5) / 0.5
        rows.append(session.run(["logits"], {"image": values[None, None]})[0][0])
    return softmax(np.array(rows))


def topic_scores(texts: list[str]) -> NDArray[Any]:
    """Reference scores, one text at a time, without padding."""
    folder = MODELS / "ml-topics" / "1"
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    rows = []
    for text in texts:
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        rows.append(session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0])
    return softmax(np.array(rows))


def pictures() -> list[bytes]:
    """Held-out digits as PNG, and the same as JPEG, WebP and BMP of other sizes."""
    bodies = []
    for index, path in enumerate(sorted((MODELS / "digits" / "samples").glob("*.png"))):
        bodies.append(path.read_bytes())
        buffer = io.BytesIO()
        kind = ("JPEG", "WEBP", "BMP")[index % 3]
        Image.open(path).convert("RGB").resize((24 + index, 30)).save(buffer, kind)
        bodies.append(buffer.getvalue())
    return bodies


def texts() -> list[str]:
    """Held-out passages, and a few of other lengths."""
    lines = (MODELS / "ml-topics" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    passages = [str(json.loads(line)["text"]) for line in lines]
    return [*passages[:60], "k", " ".join(passages[:9])]


CASES = {"digits": (pictures, digit_scores, image_input), "ml-topics": (texts, topic_scores, text_input)}


@pytest.fixture(params=sorted(CASES))
def bundle(request: pytest.FixtureRequest) -> str:
    """Every shipped bundle."""
    return str(request.param)


def test_every_shipped_bundle_has_a_reference() -> None:
    assert {path.parent.name for path in MODELS.glob("*/config.yaml")} == set(CASES)


@pytest.mark.parametrize("size", [1, 2, 7, 128])
def test_served_scores_equal_the_reference_alone_and_in_any_batch(client: Client, bundle: str, size: int) -> None:
    make, reference, as_input = CASES[bundle]
    contents: list[Any] = make()  # type: ignore[operator]
    expected = reference(contents)  # type: ignore[operator]
    order = np.random.default_rng(size).permutation(len(contents))
    concepts = [c["id"] for c in yaml.safe_load(Path(MODELS / bundle / "config.yaml").read_text())["concepts"]]
    for start in range(0, len(order), size):
        members = order[start : start + size]
        request = request_for(bundle, [as_input(contents[index]) for index in members])  # type: ignore[operator]
        request.model.model_version.output_info.output_config.max_concepts = 200
        reply = client.predict(request)
        assert len(reply.outputs) == len(members)
        for index, output in zip(members, reply.outputs, strict=True):
            served = {concept.id: concept.value for concept in output.data.concepts}
            values = [served[concept] for concept in concepts]
            np.testing.assert_allclose(values, expected[index], atol=TOLERANCE, rtol=0)
