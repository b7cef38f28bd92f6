"""The anatomy all tasks share: `cost` and `decode` an input, `encode` a reply; and the two input sides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from appliance.catalog.sections import ImageInput, TextInput
from appliance.core.config import Limits
from appliance.core.errors import ApplianceError, InputTooLarge, InvalidInput
from appliance.core.types import Array, FieldType, Method, MethodField, Payload, PredictOptions, Result
from appliance.engine import plan
from appliance.media import images
from appliance.media.text import TextTokenizer


@dataclass(slots=True)
class Decoded:
    """One input as rows for the graph.

    Attributes:
        feeds: graph input name → array whose first axis counts rows.
        rows: how many rows that are; 1 except for raw tensors.
        squeeze: whether the answer is given without that axis.
    """

    feeds: Mapping[str, Array]
    rows: int = 1
    squeeze: bool = True


class Task(Protocol):
    """What a model type knows: how its inputs become rows and how its arrays become an answer.

    All methods are pure and may be called from several threads.
    """

    method: Method
    kind: str
    """What an input must carry: "image", "text", "ndarray", or "values" by the method's signature."""
    merges: bool
    """Whether each input is one row, so that those of equal shape may be stacked."""

    def cost(self, payload: Payload, limits: Limits) -> int:
        """Bytes that decoding this input will take, from its header alone. Raises: InputError."""

    def decode(self, payload: Payload) -> Decoded:
        """The input as rows. Raises: InputError."""

    def outputs(self, options: PredictOptions) -> tuple[str, ...]:
        """Which graph outputs these options need."""

    def compared(self) -> tuple[str, ...]:
        """Outputs whose values the independence probe may compare."""

    def examples(self) -> Sequence[Sequence[dict[str, Array]]]:
        """Rows to probe and warm up with: four for each shape bucket, with a batch axis of 1, the last an outlier.

        Shortest bucket first; empty when the inputs have axes whose length only the caller knows.
        """

    def encode(
        self, arrays: Mapping[str, Array], count: int, options: PredictOptions
    ) -> Sequence[Result | ApplianceError]:
        """The answers of `count` rows, in their order."""


class InputSide(Protocol):
    """The half of a task that is shared by all tasks on images, or on texts."""

    kind: str
    argument: MethodField

    def cost(self, payload: Payload, limits: Limits) -> int:
        """See `Task.cost`."""

    def decode(self, payload: Payload) -> Decoded:
        """See `Task.decode`."""

    def examples(self) -> Sequence[Sequence[dict[str, Array]]]:
        """See `Task.examples`."""


class ImageSide:
    """Pictures in: uint8 pixels for a wrapped graph; for a raw one what it takes, normalised if that is floats."""

    kind = "image"
    argument = MethodField("image", FieldType.IMAGE, "The picture: JPEG, PNG, WebP, BMP, TIFF or GIF.")

    def __init__(self, image: ImageInput, wrapped: bool, dtype: np.dtype[Any] | None = None) -> None:
        """Args: dtype: of the graph's input; float32 unless given."""
        height, width = image.size
        shorter = image.resize_shorter or max(image.size)
        self._recipe = images.ImageRecipe(height, width, image.color, image.resize, shorter, image.interpolation)
        self._image = image
        self._wrapped = wrapped
        self._dtype = dtype or np.dtype(np.float32)

    def cost(self, payload: Payload, limits: Limits) -> int:
        """Bytes that decoding the picture takes; what its header tells."""
        if payload.image is None:
            raise InvalidInput(f"This model takes images, and the input has {_found(payload)}; set data.image.base64.")
        header = images.read_header(payload.image, limits.image_size, limits.image_pixels)
        payload.opened = header
        return header.decoding_bytes

    def decode(self, payload: Payload) -> Decoded:
        """Pixels, uint8 (1, h, w, c); for a raw plan in the graph's own layout and dtype."""
        assert payload.image is not None
        source = payload.opened if isinstance(payload.opened, images.ImageHeader) else payload.image
        payload.opened = None  # once decoded it would hold all its pixels until the request ends
        return self._row(images.decode_image(source, self._recipe))

    def examples(self) -> Sequence[Sequence[dict[str, Array]]]:
        """Noise, a gradient, black; white as the outlier."""
        shape = (self._recipe.height, self._recipe.width, self._image.channels)
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        ramp = np.broadcast_to(np.linspace(0, 255, shape[1])[None, :, None], shape).astype(np.uint8)
        pictures = (noise, ramp, np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8))
        return [[dict(self._row(picture).feeds) for picture in pictures]]

    def _row(self, pixels: Array) -> Decoded:
        if self._wrapped:
            return Decoded({plan.IMAGE: pixels[None]})
        values: Array = pixels
        if self._dtype != np.uint8:
            factor, offset = plan.normalisation(self._image)
            values = (pixels.astype(np.float32) * factor + offset).astype(self._dtype)
        if self._image.layout == "nchw":
            values = np.ascontiguousarray(values.transpose(2, 0, 1))
        return Decoded({self._image.input: values[None]})


class TextSide:
    """Texts in: token ids, mask and type ids, padded to a bucket."""

    kind = "text"
    argument = MethodField("text", FieldType.STR, "The text.")

    def __init__(self, text: TextInput, tokenizer: TextTokenizer, dtypes: Mapping[str, np.dtype[Any]]) -> None:
        """Args: dtypes: of the graph's inputs; int64 where nothing is said."""
        self._inputs = text.inputs
        self._tokenizer = tokenizer
        self._dtypes = dtypes

    def cost(self, payload: Payload, limits: Limits) -> int:
        """Bytes of the text, some times over: the tokenizer keeps offsets and words beside the ids."""
        if payload.text is None:
            raise InvalidInput(f"This model takes texts, and the input has {_found(payload)}; set data.text.raw.")
        size = len(payload.text)
        if 4 * size > limits.text_size:  # a character has four bytes at most: count only where it may matter
            size = len(payload.text.encode("utf-8", "surrogatepass"))
        if size > limits.text_size:
            raise InputTooLarge(f"The text has {size} bytes; the limit is {limits.text_size} (limits.text_size).")
        return 16 * size

    def decode(self, payload: Payload) -> Decoded:
        """Token ids, integers (1, bucket)."""
        assert payload.text is not None
        ids, mask, types = self._tokenizer.encode(payload.text)
        payload.tokens = int(np.count_nonzero(mask))
        return Decoded(self._row(ids, mask, types))

    def examples(self) -> Sequence[Sequence[dict[str, Array]]]:
        """For each bucket rows that fill it, fill it barely and in other orders; one token over and over as outlier."""
        words, mask, _ = self._tokenizer.encode("The quick brown fox jumps over the lazy dog; 0123456789 times, again.")
        known = words[mask == 1]
        buckets = []
        shorter = 0
        for size in self._tokenizer.buckets:
            rows = []
            for length, shift in ((size, 0), (shorter + 1, 0), (size, 3)):
                rows.append(self._filled(np.resize(np.roll(known, shift), length), size))
            rows.append(self._filled(np.full(size, known[len(known) // 2]), size))
            buckets.append(rows)
            shorter = size
        return buckets

    def _filled(self, tokens: Array, size: int) -> dict[str, Array]:
        ids = np.full(size, self._tokenizer.pad_id, np.int64)
        ids[: len(tokens)] = tokens
        mask = (np.arange(size) < len(tokens)).astype(np.int64)
        return self._row(ids, mask, np.zeros(size, np.int64))

    def _row(self, ids: Array, mask: Array, types: Array) -> dict[str, Array]:
        feeds = {self._inputs.ids: ids[None]}
        if self._inputs.mask:
            feeds[self._inputs.mask] = mask[None]
        if self._inputs.types:
            feeds[self._inputs.types] = types[None]
        # Most exporters make int64 of all three, TensorFlow's int32.
        return {name: array.astype(self._dtypes.get(name, array.dtype), copy=False) for name, array in feeds.items()}


def _found(payload: Payload) -> str:
    parts = [("an image", payload.image), ("a text", payload.text), ("arrays", payload.arrays or None)]
    return " and ".join(name for name, part in parts if part is not None) or "nothing in it"
