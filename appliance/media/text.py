"""Texts: bytes to str, str to token ids."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from appliance.core.errors import BundleInvalid, InvalidInput

BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Token lengths that rows are padded to, so that rows of near length run as one batch."""

_USUAL, _MOST = 16, 256 * 1024
"""Characters a token of a model's length has, generously, and how many of a text are looked at in the end."""

_SMALL = 4096
"""Characters up to which the library may keep the interpreter's lock."""


class TextTokenizer:
    """Turns a text into token ids and mask, cut to `max_tokens` and padded to a bucket. Safe from several threads."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        """Raises: BundleInvalid: the file is not one that the `tokenizers` library wrote, or needs more tokens."""
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
            self._tokenizer.encode("a first text")
        except BaseException as error:
            if not _of_the_library(error):
                raise
            raise BundleInvalid(f"{path} is not a tokenizer.json: {error}") from error
        padding = self._tokenizer.padding
        self.pad_id = int(padding["pad_id"]) if padding else (self._tokenizer.token_to_id("[PAD]") or 0)
        self._tokenizer.no_padding()
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if special >= max_tokens:
            raise BundleInvalid(
                f"onnx.text.max_tokens {max_tokens} leaves no room for words: {path} adds {special} tokens to a text."
            )
        self._tokenizer.enable_truncation(max_tokens)
        self.max_tokens = max_tokens
        self.buckets = (*(size for size in BUCKETS if size < max_tokens), max_tokens)

    def encode(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Token ids, mask (1 where a token is) and type ids, int64 (bucket,) each.

        Of a text over 256 Ki characters only so many are read (more for a model of more than 4096 tokens): only one of
        blanks, or of words longer than that, has fewer tokens in them than the model takes.

        Raises: InvalidInput: the text has no tokens: a row that is all padding has no meaning.
        """
        try:
            encoding = self._read(text)
        except BaseException as error:
            if not _of_the_library(error):
                raise
            raise InvalidInput("The model's tokenizer cannot read this text.", detail=str(error)) from error
        if not encoding.ids:
            raise InvalidInput("The text is empty for this model: its tokenizer finds nothing in it.")
        size = next(bucket for bucket in self.buckets if bucket >= len(encoding.ids))
        ids = np.full(size, self.pad_id, np.int64)
        mask = np.zeros(size, np.int64)
        types = np.zeros(size, np.int64)
        length = len(encoding.ids)
        ids[:length] = encoding.ids
        mask[:length] = 1
        types[:length] = encoding.type_ids
        return ids, mask, types

    def _read(self, text: str) -> Encoding:
        """The text's tokens. The library makes hundreds of bytes of each byte it is given, and cuts only then; so it is
        not given what the model would not see."""
        head = text[: _USUAL * self.max_tokens]
        if len(head) < len(text):
            encoding = self._encoded(head)
            # The last tokens depend on what was cut off; with a whole length of them more, the first do not.
            if len(encoding.overflowing) > 1:
                return encoding
        return self._encoded(text[: max(_MOST, 4 * _USUAL * self.max_tokens)])

    def _encoded(self, text: str) -> Encoding:
        # Only the call for several texts lets other threads run meanwhile.
        return self._tokenizer.encode(text) if len(text) <= _SMALL else self._tokenizer.encode_batch([text])[0]


def _of_the_library(error: BaseException) -> bool:
    """Whether the tokenizers library raised this for a bad file or an odd text.

    That is a plain Exception, or a Rust panic, which pyo3 derives from BaseException and which would end the daemon.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def decode_text(data: bytes) -> str:
    """UTF-8 bytes as text. Raises: InvalidInput."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"The text is not UTF-8 (byte {error.start}); send it as UTF-8.") from error
