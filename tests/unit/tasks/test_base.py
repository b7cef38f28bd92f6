"""The input sides: what one input costs, what it becomes, and what a model is tried with."""

from typing import Any

import numpy as np
import pytest
from support import graphs, pictures

from appliance.catalog.sections import ImageInput, TextInput, TextInputs
from appliance.core.config import Limits
from appliance.core.errors import InputTooLarge, InvalidInput, UnsupportedFormat
from appliance.core.types import Payload
from appliance.engine import plan
from appliance.media.text import TextTokenizer
from appliance.tasks.base import ImageSide, TextSide

LIMITS = Limits()


def image_side(wrapped: bool = True, dtype: Any = None, **image: Any) -> ImageSide:
    """Pictures of the size that `pictures.rgb_pixels` has, so that nothing is scaled."""
    section = ImageInput(**{"input": "image", "size": (pictures.HEIGHT, pictures.WIDTH), **image})
    return ImageSide(section, wrapped, None if dtype is None else np.dtype(dtype))


@pytest.fixture
def text_side(tmp_path: Any) -> TextSide:
    """A word-level tokenizer, 40 tokens at most."""
    return make_text_side(tmp_path, {})


def make_text_side(folder: Any, dtypes: Any, **inputs: Any) -> TextSide:
    path = folder / "tokenizer.json"
    path.write_text(graphs.make_tokenizer().to_str())
    return TextSide(TextInput(max_tokens=40, inputs=TextInputs(**inputs)), TextTokenizer(path, 40), dtypes)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_costs_its_pixels_from_the_header_alone() -> None:
    """Four bytes each; a bomb is refused before it is decoded."""
    side = image_side()
    assert side.cost(Payload(image=pictures.png()), LIMITS) == 4 * pictures.WIDTH * pictures.HEIGHT
    with pytest.raises(InputTooLarge, match=r"limits\.image_pixels"):
        side.cost(Payload(image=pictures.bomb()), LIMITS)
    with pytest.raises(InputTooLarge, match=r"limits\.image_size"):
        side.cost(Payload(image=pictures.png()), Limits(image_size=10))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (Payload(), "the input has nothing in it"),
        (Payload(text="a cat"), "the input has a text"),
        (Payload(arrays={"": np.ones(3)}), "the input has arrays"),
    ],
)
def test_an_input_without_a_picture_says_what_it_has(payload: Payload, words: str) -> None:
    """And where a picture goes."""
    with pytest.raises(InvalidInput, match=rf"takes images, and {words}; set data\.image\.base64"):
        image_side().cost(payload, LIMITS)


@pytest.mark.parametrize(
    "data", [b"\0" * 100, b"GIF89a", pictures.png()[:20]], ids=["zeros", "a header too short", "a header cut off"]
)
def test_bytes_that_are_no_picture_are_refused(data: bytes) -> None:
    """By their header."""
    with pytest.raises(UnsupportedFormat):
        image_side().cost(Payload(image=data), LIMITS)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("color", ["rgb", "bgr", "grey"])
def test_a_wrapped_graph_gets_the_pixels(layout: Any, color: Any) -> None:
    """uint8 (1, h, w, c), in the graph's channel order; the layout is the graph's own business."""
    pixels = pictures.rgb_pixels()
    feeds = image_side(layout=layout, color=color).decode(Payload(image=pictures.png())).feeds
    assert set(feeds) == {plan.IMAGE}
    array = feeds[plan.IMAGE]
    assert array.dtype == np.uint8
    if color == "grey":
        assert array.shape == (1, *pixels.shape[:2], 1)
    else:
        np.testing.assert_array_equal(array[0], pixels if color == "rgb" else pixels[:, :, ::-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_raw_graph_gets_normalised_floats(layout: Any, dtype: Any) -> None:
    """In its own layout and dtype, under its own name."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    side = image_side(False, dtype, layout=layout, mean=mean, std=std)
    array = side.decode(Payload(image=pictures.png())).feeds["image"]
    wanted = (pictures.rgb_pixels() / 255 - mean) / std
    assert array.dtype == dtype
    np.testing.assert_allclose(array[0], wanted.transpose(2, 0, 1) if layout == "nchw" else wanted, atol=2e-3)


def test_a_raw_graph_of_bytes_gets_the_pixels() -> None:
    """Its normalisation is inside."""
    array = image_side(False, np.uint8, layout="nhwc").decode(Payload(image=pictures.png())).feeds["image"]
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array[0], pictures.rgb_pixels())


def test_a_model_is_tried_with_four_different_pictures() -> None:
    """All of the graph's shape; white is the outlier."""
    ((*_, white),) = image_side().examples()
    assert (white[plan.IMAGE] == 255).all()
    ((first, second, third, fourth),) = image_side(False).examples()
    arrays = [row["image"] for row in (first, second, third, fourth)]
    assert {array.shape for array in arrays} == {(1, 3, pictures.HEIGHT, pictures.WIDTH)}
    assert len({array.tobytes() for array in arrays}) == 4


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_a_text_becomes_ids_and_mask(text_side: TextSide) -> None:
    """Padded to a bucket."""
    feeds = text_side.decode(Payload(text="good model")).feeds
    assert set(feeds) == {"input_ids", "attention_mask"}
    assert feeds["input_ids"].shape == (1, 16)
    assert feeds["attention_mask"].sum() == 4
    assert feeds["input_ids"].dtype == np.int64


def test_the_graphs_own_integers_are_used(tmp_path: Any) -> None:
    """TensorFlow's exporter makes int32."""
    dtypes = {"ids": np.dtype(np.int32), "mask": np.dtype(np.int32)}
    side = make_text_side(tmp_path, dtypes, ids="ids", mask="mask", types="types")
    feeds = side.decode(Payload(text="good")).feeds
    assert [feeds[name].dtype for name in ("ids", "mask", "types")] == [np.int32, np.int32, np.int64]
    assert side.examples()[0][0]["ids"].dtype == np.int32


def test_an_empty_text_is_a_text(text_side: TextSide) -> None:
    """It is tokens of its own: begin and end."""
    assert text_side.decode(Payload(text="")).feeds["attention_mask"].sum() == 2


def test_a_long_text_is_cut(text_side: TextSide) -> None:
    """To the model's length."""
    feeds = text_side.decode(Payload(text="good " * 500)).feeds
    assert feeds["input_ids"].shape == (1, 40)
    assert feeds["attention_mask"].all()


def test_an_input_without_a_text_says_what_it_has(text_side: TextSide) -> None:
    """And where a text goes."""
    with pytest.raises(InvalidInput, match=r"takes texts, and the input has an image; set data\.text\.raw"):
        text_side.cost(Payload(image=b"\xff\xd8"), LIMITS)


def test_a_text_costs_some_of_its_size_and_has_a_limit(text_side: TextSide) -> None:
    """Named in the refusal."""
    assert text_side.cost(Payload(text="good"), LIMITS) > 4
    with pytest.raises(InputTooLarge, match=r"4 bytes; the limit is 3 \(limits\.text_size\)"):
        text_side.cost(Payload(text="good"), Limits(text_size=3))


def test_a_model_is_tried_in_every_bucket(text_side: TextSide) -> None:
    """With rows that fill it, one that barely does, and an outlier."""
    buckets = text_side.examples()
    assert [rows[0]["input_ids"].shape for rows in buckets] == [(1, 16), (1, 32), (1, 40)]
    assert [[int(row["attention_mask"].sum()) for row in rows] for rows in buckets] == [
        [16, 1, 16, 16],
        [32, 17, 32, 32],
        [40, 33, 40, 40],
    ]
    for rows in buckets:
        assert len({row["input_ids"].tobytes() for row in rows}) == 4
