"""What the bundles in `models/` promise, held against ONNX Runtime, Pillow and numpy: no code of the appliance."""

import importlib.util
import io
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

MODELS = Path(__file__).parents[3] / "models"
BUNDLES = sorted(path.parent.name for path in MODELS.glob("*/config.yaml"))

DIGITS_BAR = 0.97
TOPICS_BAR = 0.78
"""The shipped model names 117 of its 143 held-out passages (0.818); the margin is five of them."""

Feeds = dict[str, NDArray[Any]]


def config(bundle: str) -> dict[str, Any]:
    return yaml.safe_load((MODELS / bundle / "config.yaml").read_text(encoding="utf-8"))


def model_file(bundle: str) -> Path:
    return MODELS / bundle / "1" / config(bundle)["onnx"]["file"]


def data_of(bundle: str) -> ModuleType:
    """Return the bundle's data.py, the very split its make.py uses."""
    spec = importlib.util.spec_from_file_location(f"{bundle.replace('-', '_')}_data", MODELS / bundle / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(bundle: str, feeds: Feeds) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model_file(bundle), providers=["CPUExecutionProvider"])
    (logits,) = session.run([config(bundle)["onnx"]["scores"]["output"]], feeds)
    return logits


def image_feeds(files: list[bytes]) -> Feeds:
    """Prepare picture files as the `image` section of digits/config.yaml says."""
    image = config("digits")["onnx"]["image"]
    assert (image["layout"], image["color"], image["resize"]) == ("nchw", "grey", "stretch")
    height, width = image["size"]
    resampling = Image.Resampling[image["interpolation"].upper()]
    rows = []
    for file in files:
        grey = Image.open(io.BytesIO(file)).convert("L").resize((width, height), resampling)
        scaled = np.asarray(grey, dtype=np.float32) * np.float32(image["scale"])
        rows.append(((scaled - image["mean"][0]) / image["std"][0])[None])
    return {image["input"]: np.stack(rows).astype(np.float32)}


def text_feeds(texts: list[str], length: int | None = None, filler: int = 0) -> Feeds:
    """Prepare texts as the `text` section of ml-topics/config.yaml says, padded to the longest or to `length`."""
    text = config("ml-topics")["onnx"]["text"]
    tokenizer = Tokenizer.from_file(str(MODELS / "ml-topics" / "1" / text["tokenizer"]))
    encoded = [encoding.ids[: text["max_tokens"]] for encoding in tokenizer.encode_batch(texts)]
    ids = np.full((len(texts), length or max(map(len, encoded))), filler, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, numbers in enumerate(encoded):
        ids[row, : len(numbers)] = numbers
        mask[row, : len(numbers)] = 1
    return {text["inputs"]["ids"]: ids, text["inputs"]["mask"]: mask}


def held_out_files(size: int, format: str) -> tuple[list[bytes], NDArray[np.int64]]:
    digits = data_of("digits")
    pictures, labels = digits.held_out()
    return [digits.encoded(digits.enlarged(picture, size), format) for picture in pictures], labels


def held_out_texts() -> list[str]:
    return [passage.text for passage in data_of("ml-topics").read_held_out()]


def some_feeds(bundle: str) -> Feeds:
    return image_feeds(held_out_files(8, "PNG")[0][:40]) if bundle == "digits" else text_feeds(held_out_texts()[:40])


def test_both_bundles_are_shipped() -> None:
    """The parametrised tests below run over what is there; this one says what must be there."""
    assert BUNDLES == ["digits", "ml-topics"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_model_is_valid_onnx_in_one_file(bundle: str) -> None:
    """The checker passes with shape inference, and no weight lies outside the file."""
    file = model_file(bundle)
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file, load_external_data=False)
    assert not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer)
    assert {opset.domain for opset in model.opset_import} <= {"", "ai.onnx"}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_model_file_names_no_path_of_the_machine_that_made_it(bundle: str) -> None:
    """Exporters like to note source files and modules; the shipped bytes carry none."""
    assert not re.search(rb"site-packages|\.py\b|/(home|root|tmp|work|usr)/", model_file(bundle).read_bytes())


@pytest.mark.parametrize("bundle", BUNDLES)
def test_each_output_has_its_concept(bundle: str) -> None:
    """There are as many concepts as the model has outputs, and no id stands twice."""
    ids = [concept["id"] for concept in config(bundle)["concepts"]]
    assert run(bundle, some_feeds(bundle)).shape == (40, len(ids))
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_config_is_named_after_its_folder(bundle: str) -> None:
    """The id callers use is the folder's name."""
    assert config(bundle)["model"]["id"] == bundle


@pytest.mark.parametrize("bundle", BUNDLES)
def test_batch_axis_is_free_and_rows_are_independent(bundle: str) -> None:
    """A row alone, among others, and in another order gives the same scores within 1e-5."""
    feeds = some_feeds(bundle)
    together = run(bundle, feeds)
    assert together.dtype == np.float32
    backwards = run(bundle, {name: array[::-1] for name, array in feeds.items()})
    np.testing.assert_allclose(backwards[::-1], together, rtol=0, atol=1e-5)
    for row in range(len(together)):
        alone = run(bundle, {name: array[row : row + 1] for name, array in feeds.items()})
        np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("filler", [0, 7])
def test_topics_do_not_depend_on_padding(filler: int) -> None:
    """A text padded to its neighbours' length or to 128, with whatever ids, scores as it does alone within 1e-5."""
    texts = held_out_texts()[:40]
    together, padded = run("ml-topics", text_feeds(texts)), run("ml-topics", text_feeds(texts, 128, filler))
    np.testing.assert_allclose(padded, together, rtol=0, atol=1e-5)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(run("ml-topics", text_feeds([text]))[0], row, rtol=0, atol=1e-5)


def test_topics_scores_of_a_text_without_tokens_are_finite() -> None:
    """An empty text, alone or among others, gives numbers."""
    assert np.isfinite(run("ml-topics", text_feeds(["", "a decision tree"]))).all()
    assert np.isfinite(run("ml-topics", text_feeds([""], 1))).all()


def test_topics_tokenizer_and_embedding_agree() -> None:
    """Every token has a row in the embedding, padding is token 0, and the tokenizer itself neither pads nor cuts."""
    tokenizer = Tokenizer.from_file(str(MODELS / "ml-topics" / "1" / "tokenizer.json"))
    assert tokenizer.token_to_id("[PAD]") == 0
    assert tokenizer.padding is None
    assert tokenizer.truncation is None
    last = tokenizer.get_vocab_size() - 1
    assert sorted(tokenizer.get_vocab().values()) == list(range(last + 1))
    ids = np.array([[last]], dtype=np.int64)
    assert run("ml-topics", {"input_ids": ids, "attention_mask": np.ones_like(ids)}).shape == (1, 9)


@pytest.mark.parametrize(("size", "format"), [(8, "PNG"), (32, "PNG"), (64, "PNG"), (32, "JPEG"), (64, "JPEG")])
def test_digits_are_right_on_held_out_pictures(size: int, format: str) -> None:
    """Scans as they are, and enlarged to what a person would send, are read at least 97 times in 100."""
    files, labels = held_out_files(size, format)
    assert len(labels) == 360
    assert (run("digits", image_feeds(files)).argmax(1) == labels).mean() >= DIGITS_BAR


def test_digits_are_right_in_dark_ink_on_a_light_ground() -> None:
    """The negative of a scan is read as well as the scan."""
    files, labels = held_out_files(8, "PNG")
    (feeds,) = image_feeds(files).values()
    assert (run("digits", {"image": -feeds}).argmax(1) == labels).mean() >= DIGITS_BAR


def test_digits_held_out_scans_are_not_among_the_training_scans() -> None:
    """The split leaves nothing out, and no held-out picture was trained on."""
    digits = data_of("digits")
    trained, _ = digits.training()
    held, _ = digits.held_out()
    assert len(trained) + len(held) == len(digits.scans()[0])
    assert not {picture.tobytes() for picture in trained} & {picture.tobytes() for picture in held}


def test_digits_config_says_what_the_model_was_measured_with() -> None:
    """The `image` section and the reference in data.py prepare the same numbers."""
    files, _ = held_out_files(64, "JPEG")
    expected = np.stack([data_of("digits").model_input(file) for file in files])
    (feeds,) = image_feeds(files).values()
    np.testing.assert_allclose(feeds, expected, rtol=0, atol=1e-6)


def test_digits_samples_are_the_held_out_scans_their_names_say() -> None:
    """`held-out-017-label-4.png` is held-out scan 17, which the data set labels 4, at 64×64."""
    digits = data_of("digits")
    pictures, labels = digits.held_out()
    samples = sorted((MODELS / "digits" / "samples").iterdir())
    assert len(samples) == 32
    for sample in samples:
        match = re.fullmatch(r"held-out-(\d{3})-label-(\d)\.png", sample.name)
        assert match, sample.name
        number, label = map(int, match.groups())
        assert labels[number] == label
        with Image.open(sample) as image:
            assert (image.format, image.size) == ("PNG", (64, 64))
            assert np.array_equal(np.asarray(image), np.asarray(digits.enlarged(pictures[number], 64)))


def test_topics_are_right_on_held_out_texts() -> None:
    """The stored texts of held-out classes and functions are named at least 78 times in 100, and no area is lost."""
    passages = data_of("ml-topics").read_held_out()
    concepts = [concept["id"] for concept in config("ml-topics")["concepts"]]
    best = run("ml-topics", text_feeds([passage.text for passage in passages])).argmax(1)
    right = np.array([concepts[index] == passage.label for index, passage in zip(best, passages, strict=True)])
    assert right.mean() >= TOPICS_BAR
    for concept in concepts:
        assert right[[passage.label == concept for passage in passages]].mean() >= 0.5, concept


def test_topics_concepts_are_the_areas_of_the_data() -> None:
    """The config's concepts are data.py's areas, in the order the network was trained with."""
    areas = data_of("ml-topics").AREAS
    assert [(c["id"], c["name"]) for c in config("ml-topics")["concepts"]] == [(i, n) for i, (n, _) in areas.items()]


def test_bundles_stay_small() -> None:
    """Both together stay under 3 MB in git, the topics bundle under 2 MB, its held-out texts under 150 kB."""
    sizes = {
        bundle: sum(path.stat().st_size for path in (MODELS / bundle).rglob("*") if "__pycache__" not in path.parts)
        for bundle in BUNDLES
    }
    assert sum(sizes.values()) < 3_000_000
    assert sizes["ml-topics"] < 2_000_000
    assert data_of("ml-topics").HELD_OUT_FILE.stat().st_size < 150_000


def test_topics_held_out_objects_are_apart_from_the_training_objects() -> None:
    """Whatever scikit-learn is installed, no object and no text is on both sides of the split."""
    topics = data_of("ml-topics")
    training, held_out = topics.split(topics.passages())
    assert not {passage.owner for passage in training} & {passage.owner for passage in held_out}
    assert not {passage.text for passage in training} & {passage.text for passage in held_out}
    assert {passage.label for passage in training} == set(topics.LABELS)
