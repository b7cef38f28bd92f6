"""Texts: token ids as the tokenizers library makes them, cut to the model's length and padded to a bucket."""

import contextlib
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import graphs
from tokenizers import Tokenizer

from appliance.core.errors import BundleInvalid, InvalidInput
from appliance.media.text import BUCKETS, TextTokenizer, decode_text


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return folder / "tokenizer.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return saved(tmp_path, graphs.make_tokenizer())


def test_ids_are_the_librarys_padded_to_a_bucket(path: Path) -> None:
    ids, mask, types = TextTokenizer(path, 64).encode("the quick fox")
    assert ids.tolist() == [2, 4, 5, 7, 3] + [0] * 11
    assert mask.tolist() == [1] * 5 + [0] * 11
    assert types.tolist() == [0] * 16
    assert {array.dtype for array in (ids, mask, types)} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("words", "bucket"), [(1, 16), (14, 16), (15, 32), (30, 32), (31, 64), (62, 64), (63, 100), (98, 100)]
)
def test_rows_are_padded_to_the_least_bucket_that_holds_them(path: Path, words: int, bucket: int) -> None:
    ids, mask, _ = TextTokenizer(path, 100).encode("dog " * words)
    assert len(ids) == bucket
    assert mask.sum() == words + 2


def test_longer_texts_are_cut_and_keep_their_last_special_token(path: Path) -> None:
    ids, mask, _ = TextTokenizer(path, 10).encode("dog " * 1000)
    assert ids.tolist() == [2, *[11] * 8, 3]
    assert mask.all()


@pytest.mark.parametrize("text", ["dog fox " * 1_000_000, "dog " + " " * 8_000_000, "x" * 8_000_000])
def test_what_the_model_would_not_see_costs_nothing(path: Path, text: str) -> None:
    """The library makes hundreds of bytes of each byte that it is given, at half a megabyte a second."""
    tokenizer = TextTokenizer(path, 64)
    before = time.process_time()
    with contextlib.suppress(InvalidInput):
        tokenizer.encode(text)
    assert time.process_time() - before < 1  # the first one's whole takes 7


@pytest.mark.parametrize("words", ["dog fox ", "dog  \n the", "x ", "the-quick-brown fox. "])
def test_a_long_text_has_the_tokens_of_the_whole(path: Path, words: str) -> None:
    text = words * 3000
    whole = Tokenizer.from_file(str(path))
    whole.no_padding()
    whole.enable_truncation(64)
    assert TextTokenizer(path, 64).encode(text)[0].tolist() == whole.encode(text).ids


def test_the_largest_bucket_is_the_models_own_length(path: Path) -> None:
    assert TextTokenizer(path, 100).buckets == (16, 32, 64, 100)
    assert TextTokenizer(path, 64).buckets == (16, 32, 64)
    assert TextTokenizer(path, 8192).buckets == BUCKETS
    assert TextTokenizer(path, 5).buckets == (5,)


def test_padding_is_the_tokenizers_own_id(tmp_path: Path) -> None:
    ids, mask, _ = TextTokenizer(saved(tmp_path, graphs.make_tokenizer(padding=7)), 64).encode("dog")
    assert ids.tolist() == [2, 11, 3, *[7] * 13]
    assert mask.sum() == 3


def test_the_files_own_padding_and_truncation_do_not_count(tmp_path: Path) -> None:
    tokenizer = graphs.make_tokenizer()
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(3)
    ids, mask, _ = TextTokenizer(saved(tmp_path, tokenizer), 64).encode("the quick brown fox")
    assert len(ids) == 16
    assert mask.sum() == 6


def test_a_text_without_tokens_is_the_callers_fault(tmp_path: Path) -> None:
    """Its row would be all padding, and a mean over no tokens is not a number."""
    tokenizer = TextTokenizer(saved(tmp_path, graphs.make_tokenizer(special=False)), 64)
    for text in ("", "  \n"):
        with pytest.raises(InvalidInput, match="empty"):
            tokenizer.encode(text)


def test_an_empty_text_is_its_special_tokens_when_the_tokenizer_adds_some(path: Path) -> None:
    ids, mask, _ = TextTokenizer(path, 64).encode("")
    assert (ids[:2].tolist(), mask.sum()) == ([2, 3], 2)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0"}', "[1]", "null", "\x00"])
def test_what_is_not_a_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(BundleInvalid, match=r"tokenizer\.json is not a tokenizer\.json"):
        TextTokenizer(tmp_path / "tokenizer.json", 64)


def test_a_missing_or_binary_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x80")
    for name in ("none.json", "binary.json"):
        with pytest.raises(BundleInvalid, match=name):
            TextTokenizer(tmp_path / name, 64)


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_a_length_that_leaves_no_room_beside_special_tokens_is_the_bundles_fault(path: Path, max_tokens: int) -> None:
    with pytest.raises(BundleInvalid, match="max_tokens"):
        TextTokenizer(path, max_tokens)


@given(st.binary(max_size=6), st.integers(0, 10_000))
@settings(max_examples=150)
def test_a_mutated_tokenizer_is_read_or_is_the_bundles_fault(
    tmp_path_factory: pytest.TempPathFactory, new: bytes, place: int
) -> None:
    data = bytearray(graphs.make_tokenizer().to_str().encode())
    data[place % len(data) : place % len(data) + len(new)] = new
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    path.write_bytes(bytes(data))
    with contextlib.suppress(BundleInvalid, InvalidInput):
        TextTokenizer(path, 64).encode("the quick dog")


def test_a_tokenizer_that_makes_its_library_panic_is_the_bundles_fault(tmp_path: Path) -> None:
    """A panic is no Exception: it would pass every handler and end the daemon."""
    content = json.loads(graphs.make_tokenizer().to_str())
    del content["post_processor"]["special_tokens"]["[SEP]"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BundleInvalid, match=r"not a tokenizer\.json"):
        TextTokenizer(tmp_path / "tokenizer.json", 64)


def test_a_tokenizer_that_names_a_token_it_lacks_is_the_bundles_fault(tmp_path: Path) -> None:
    content = json.loads(graphs.make_tokenizer().to_str())
    content["model"]["unk_token"] = "[NONE]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises((BundleInvalid, InvalidInput)):
        TextTokenizer(tmp_path / "tokenizer.json", 64).encode("unheard")


@given(st.text(max_size=300))
@settings(max_examples=100)
def test_any_text_has_its_librarys_ids(text: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        tokenizer = TextTokenizer(saved(Path(place), graphs.make_tokenizer()), 4096)
    ids, mask, _ = tokenizer.encode(text)
    assert ids[mask == 1].tolist() == graphs.make_tokenizer().encode(text).ids


def test_text_bytes_are_utf_8() -> None:
    assert decode_text("größe 数".encode()) == "größe 数"
    with pytest.raises(InvalidInput, match=r"not UTF-8 \(byte 2\)"):
        decode_text(b"ab\xff")
