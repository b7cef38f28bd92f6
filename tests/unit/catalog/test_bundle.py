"""The bundle format: read strictly, every problem at once, and nothing outside the bundle is ever read."""

import hashlib
import os
import shutil
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import graphs

from appliance.catalog import bundle as bundles
from appliance.catalog.bundle import (
    CLARIFAI_KEYS,
    BundleConfig,
    as_yaml,
    check_inside,
    concepts_of,
    find_versions,
    read_config,
    read_text,
    signature,
    verify_checksums,
    write_checksums,
)
from appliance.catalog.sections import FORBIDDEN_SUFFIXES
from appliance.core.config import Engine
from appliance.core.errors import BundleInvalid
from appliance.core.types import Concept, ModelKey

IMAGE = {"input": "image", "size": [8, 8]}


def config_of(folder: Path) -> BundleConfig:
    config, _, _ = read_config(folder, "owner", "app")
    assert config is not None
    return config


def written(tmp_path: Path, content: Any) -> Path:
    """A bundle folder whose config.yaml is this text, these bytes or this mapping."""
    folder = tmp_path / "b"
    folder.mkdir(exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else yaml.safe_dump(content)).encode()
    (folder / "config.yaml").write_bytes(content)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(BundleInvalid) as caught:
        read_config(folder, "owner", "app")
    return str(caught.value)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_complete_bundle_is_read_as_it_says(tmp_path: Path) -> None:
    config = config_of(graphs.write_image_classifier(tmp_path / "cats", concepts=("cat", "dog"), color="grey"))
    assert config.key == ModelKey(graphs.USER, graphs.APP, "cats")
    assert config.model_type_id == "visual-classifier"
    assert config.concepts == (Concept("c-cat", "cat"), Concept("c-dog", "dog"))
    assert config.onnx.image is not None
    assert (config.onnx.image.channels, config.onnx.image.size) == (1, (8, 8))
    assert config.onnx.scores is not None
    assert config.onnx.scores.activation == "softmax"
    assert config.sentence == ""


@pytest.mark.parametrize(
    "write",
    [
        graphs.write_uint8_classifier,
        graphs.write_image_embedder,
        graphs.write_text_classifier,
        graphs.write_text_embedder,
        graphs.write_raw,
    ],
)
def test_every_type_of_bundle_is_read(tmp_path: Path, write: Any) -> None:
    assert config_of(write(tmp_path / "b")).key.model_id == "b"


def test_an_owner_is_filled_in_when_the_file_names_none(tmp_path: Path) -> None:
    folder = written(tmp_path, {"model": {"id": "m"}, "onnx": {}})
    assert config_of(folder).key == ModelKey("owner", "app", "m")
    assert config_of(folder).name == "m"


def test_a_file_without_an_onnx_section_is_left_to_the_importer(tmp_path: Path) -> None:
    folder = written(tmp_path, {"model": {"id": "m"}, "concepts": [{"id": "a"}, {"id": 7, "name": "seven"}]})
    config, model, concepts = read_config(folder, "owner", "app")
    assert config is None
    assert model is not None
    assert model.id == "m"
    assert concepts == (Concept("a", "a"), Concept("7", "seven"))


def test_a_folder_without_a_config_is_left_to_the_importer(tmp_path: Path) -> None:
    assert read_config(tmp_path, "owner", "app") == (None, None, ())


def test_clarifais_own_keys_are_accepted_and_ours_stay_strict(tmp_path: Path) -> None:
    """A folder that is uploaded to Clarifai loads as it is (PROTOCOL 4.6)."""
    folder = written(
        tmp_path,
        {
            "model": {
                "id": "m",
                "user_id": "u",
                "app_id": "a",
                "model_type_id": "any-to-any",
                "visibility": {"gettable": 10},
                "use_case": "text",
            },
            "inference_compute_info": {"cpu_limit": "1", "accelerator_type": ["NVIDIA-*"]},
            "build_info": {"python_version": "3.12", "platform": "linux/amd64"},
            "checkpoints": {"type": "huggingface", "repo_id": "x/y", "when": "runtime", "hf_token": "t"},
            "num_threads": 16,
            "secrets": [{"id": "s"}],
            "toolkit": {"provider": "x"},
            "onnx": {},
        },
    )
    config = config_of(folder)
    assert config.key == ModelKey("u", "a", "m")
    assert config.compute == {"cpu_limit": "1", "accelerator_type": ["NVIDIA-*"]}
    assert config.model_type_id == bundles.RAW_TYPE


@pytest.mark.parametrize("key", sorted(CLARIFAI_KEYS - {"model", "concepts", "inference_compute_info"}))
@pytest.mark.parametrize("value", [None, 1, "x", [], {"a": [1]}])
def test_whatever_stands_under_clarifais_other_keys_is_let_be(tmp_path: Path, key: str, value: object) -> None:
    assert config_of(written(tmp_path, {"model": {"id": "m"}, key: value, "onnx": {}}))


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        {
            "model": {"id": "a b"},
            "modell": {},
            "concepts": [{"name": "x"}],
            "onnx": {
                "file": "/etc/model.onnx",
                "device": "tpu",
                "batching": {"max_rows": 0},
                "image": {"input": "x", "size": [0, 8], "color": "cmyk", "wobble": 1},
            },
        },
    )
    text = refusal(folder)
    for part in (
        "modell:",
        "model.id:",
        "concepts.0.id:",
        "onnx.file:",
        "onnx.device:",
        "onnx.batching.max_rows:",
        "onnx.image.size.0:",
        "onnx.image.color:",
        "onnx.image.wobble:",
    ):
        assert part in text
    assert str(folder / "config.yaml") in text


DEVICES = ("auto", "cpu", "gpu", "gpu:0", "gpu:17", "gpu:GPU-8a56a4bc-3b2f", "gpu:MIG-8a56a4bc", "gpu:MIG-GPU-8a/1/0")


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_is_a_kind_a_number_or_a_uuid(tmp_path: Path, device: str) -> None:
    """The same words as in engine.device; whether it is there is known at load."""
    assert config_of(written(tmp_path, {"model": {"id": "m"}, "onnx": {"device": device}})).onnx.device == device
    assert Engine(device=device).device == device


@pytest.mark.parametrize("device", ["GPU", "gpu:", "gpu:-1", "gpu:x", "gpu:GPU-", "gpu:GPU-a b", "cuda:0", "gpu:0,1"])
def test_another_word_is_no_device(tmp_path: Path, device: str) -> None:
    assert "onnx.device:" in refusal(written(tmp_path, {"model": {"id": "m"}, "onnx": {"device": device}}))


def test_what_a_gpu_may_do_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    """Answers are those of single precision."""
    plain = config_of(written(tmp_path, {"model": {"id": "m"}, "onnx": {}})).onnx
    assert (plain.precision, plain.tf32, plain.cuda_graphs) == ("fp32", False, None)
    asked = {"precision": "fp16", "tf32": True, "cuda_graphs": True}
    onnx = config_of(written(tmp_path, {"model": {"id": "m"}, "onnx": asked})).onnx
    assert (onnx.precision, onnx.tf32, onnx.cuda_graphs) == ("fp16", True, True)


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"image": IMAGE, "text": {}, "scores": {"output": "y", "activation": "none"}}, "cannot both"),
        (
            {"image": IMAGE, "scores": {"output": "y", "activation": "none"}, "embedding": {"output": "y"}},
            "cannot both",
        ),
        ({"scores": {"output": "y", "activation": "none"}}, "need an image or text"),
        ({"image": IMAGE, "embedding": {"output": "y", "pooling": "mean"}}, "pooling is for text"),
        ({"text": {}, "embedding": {"output": "y", "pooling": "mean"}, "plan": "raw"}, "plan must be"),
        ({"image": {**IMAGE, "mean": [0, 0]}, "scores": {"output": "y", "activation": "none"}}, "mean has 2 values"),
        ({"image": {**IMAGE, "std": [0.5, 0, 0.5]}, "scores": {"output": "y", "activation": "none"}}, "must not be 0"),
        ({"image": {**IMAGE, "size": [9000, 8]}, "scores": {"output": "y", "activation": "none"}}, "over 8192"),
        ({"image": {**IMAGE, "resize": "crop", "resize_shorter": 7}}, "smaller than size"),
        ({"image": {**IMAGE, "resize": "crop", "resize_shorter": 10**9}}, "over 8192"),
        ({"image": {**IMAGE, "scale": float("nan")}}, "scale"),
        ({"image": {**IMAGE, "mean": [float("inf")]}}, "mean"),
        ({"image": {**IMAGE, "std": [float("nan")]}}, "std"),
        ({"image": IMAGE}, "onnx.scores: is needed"),
        ({"text": {"max_tokens": 8193}}, "max_tokens"),
        ({"scores": {"output": "y", "activation": "relu"}}, "activation"),
        ({"custom_ops": "ops.so"}, "custom_ops"),
        ({"scores": {"output": "y"}}, "activation"),
        (3, "onnx"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(tmp_path: Path, section: object, word: str) -> None:
    folder = written(tmp_path, {"model": {"id": "m", "model_type_id": "visual-classifier"}, "onnx": section})
    assert word in refusal(folder)


def test_a_type_of_ours_needs_its_keys_and_another_type_has_none(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": {"id": "m", "model_type_id": "text-embedder"}, "onnx": {"text": {}}}
    assert "onnx.embedding: is needed by model type text-embedder" in refusal(written(tmp_path, content))
    content["model"]["model_type_id"] = "visual-segmenter"
    assert "visual-segmenter" in refusal(written(tmp_path, content))


@pytest.mark.parametrize("ids", [["a", "a"], ["a", "b", "a", "b"]])
def test_concepts_listed_twice_are_named(tmp_path: Path, ids: list[str]) -> None:
    folder = written(tmp_path, {"model": {"id": "m"}, "concepts": [{"id": i} for i in ids], "onnx": {}})
    assert "'a' is listed twice" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"- a\n- b\n",
        b"just text",
        b"model: [",
        b"model:\n\tid: x\n",
        b"model: {id: m}\nonnx: {}\nmodel2: !!python/object/apply:os.system ['true']\n",
        b"model: !!python/name:os.system\n",
        b"model: {id: m}\nbuilt: 2024-99-99\n",
        b"\x00",
        b"model: {id: &a [*a]}\n",
        b"model: {id: 2024}\nonnx: {}\n",
        b"model: {id: 2024-01-01}\nonnx: {}\n",
        b"model: {id: true}\n",
        b"model: {id: ''}\n",
        b"model: {id: ../up}\n",
        b"model: {id: null}\n",
        b"model: null\n",
        b"{}\n",
        b"model: {id: m}\nconcepts: [{id: ''}]\n",
        b"model: {id: m}\nconcepts: {a: b}\n",
        b"model: {id: m}\ninference_compute_info: null\n",
        b"? [complex, key]\n: 1\n",
        b"model: {id: m, user_id: 'a b'}\n",
        b"model: {id: m}\n---\nmodel: {id: n}\n",
        b"[" * 5000,
        b"a: " * 5000,
        b"x: *undefined\n",
        b"a" * (2**20 + 1),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused_and_nothing_else_happens(tmp_path: Path, content: bytes) -> None:
    assert "config.yaml" in refusal(written(tmp_path, content))


@pytest.mark.parametrize("merge", [True, False])
def test_a_billion_laughs_are_refused_at_once(tmp_path: Path, merge: bool) -> None:
    """Nine levels of ten aliases each would be a billion nodes once they are merged."""
    lines = ["a0: &a0 {k: lol}" if merge else "a0: &a0 [lol]"]
    for level in range(1, 10):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{aliases}]}}" if merge else f"[{aliases}]"))
    folder = written(tmp_path, "\n".join([*lines, "model: {id: m}", "onnx: {image: *a9}", ""]))
    begun = time.perf_counter()
    assert "aliases" in refusal(folder)
    assert time.perf_counter() - begun < 2


def test_a_few_aliases_are_fine(tmp_path: Path) -> None:
    folder = written(tmp_path, "build_info: &x {a: 1}\ntoolkit: {<<: *x}\nmodel: {id: m}\nonnx: {}\n")
    assert config_of(folder).key.model_id == "m"


def test_a_folder_named_like_a_config_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "one" / "config.yaml").mkdir(parents=True)
    assert read_config(tmp_path / "one", "o", "a") == (None, None, ())


# ---- names and texts that nothing could show -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my model", "[red]", "-", "x" * 65, os.fsdecode(b"bad\xff"), "esc\x1b[31m"])
def test_a_folder_whose_name_no_bundle_may_have_is_refused_by_a_printable_sentence(tmp_path: Path, name: str) -> None:
    text = refusal(graphs.write_raw(tmp_path / "good").rename(tmp_path / name))
    assert "cannot be a bundle's name" in text
    assert text.isprintable()


@pytest.mark.parametrize("name", [b"note\xff.txt", b"a\x1b[31m", b"a\nb", b"deep\xff/file"])
def test_a_file_whose_name_is_not_printable_utf_8_is_refused(tmp_path: Path, name: bytes) -> None:
    folder = graphs.write_raw(tmp_path / "b")
    path = Path(os.fsdecode(os.fsencode(folder / "1") + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    text = refusal(folder)
    assert "name is not printable UTF-8" in text
    assert text.isprintable()


@pytest.mark.parametrize("bad", ["\\ud800", "\\e[31m", "\\x00", "\\x7f", "\\x9b", "\\b"])
@pytest.mark.parametrize(
    ("content", "key"),
    [
        ('model: {id: m, name: "a%s"}', "model.name"),
        ('model: {id: m, description: "a%s"}', "model.description"),
        ('model: {id: m, model_type_id: "a%s"}', "model.model_type_id"),
        ('model: {id: m}\nconcepts: [{id: a}, {id: b, name: "a%s"}]', "concepts.1.name"),
        ('model: {id: m}\nconcepts: [{id: "a%s"}]', "concepts.0.id"),
        ('model: {id: m}\nonnx: {scores: {output: "a%s"}}', "onnx.scores.output"),
        ('model: {id: m}\nbuild_info: {deep: [&x [*x, "a%s"]]}', "build_info.deep.0.1"),
        ('model: {id: m, "a%s": 1}', "this key"),
    ],
)
def test_a_text_that_nothing_could_show_is_refused_with_its_key(
    tmp_path: Path, content: str, key: str, bad: str
) -> None:
    text = refusal(written(tmp_path, content % bad))
    assert key in text
    assert "surrogate" in text
    assert text.isprintable()


def test_a_description_may_have_lines_and_a_name_or_concept_is_one_line(tmp_path: Path) -> None:
    model: dict[str, Any] = {"id": "m", "description": "one\n\ttwo\r\n"}
    assert config_of(written(tmp_path, {"model": model, "onnx": {}})).description == "one\n\ttwo\r\n"
    assert "model.name" in refusal(written(tmp_path, {"model": {**model, "name": "a\nb"}, "onnx": {}}))
    concepts = [{"id": "a"}, {"id": "b\nc"}]
    assert "concepts.1" in refusal(written(tmp_path, {"model": model, "concepts": concepts, "onnx": {}}))


def test_a_labels_file_with_a_control_character_is_refused_with_its_line(tmp_path: Path) -> None:
    folder = graphs.write_raw(tmp_path / "b")
    (folder / "1" / "labels.txt").write_bytes(b"cat\r\ndo\tg\r\n")
    version = find_versions(folder)[0]
    assert [concept.name for concept in concepts_of(config_of(folder), version)] == ["cat", "do\tg"]
    (folder / "1" / "labels.txt").write_bytes(b"cat\ndog\x1b[31m\n")
    with pytest.raises(BundleInvalid, match=r"labels\.txt: line 2 holds a control character"):
        concepts_of(config_of(folder), version)


# ---- files that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "1/config.json", "1/labels.txt", "1/tokenizer.json", "1/SHA256SUMS"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_in_a_bundle_is_refused_and_not_waited_for(tmp_path: Path, name: str, linked: bool) -> None:
    folder = graphs.write_raw(tmp_path / "b")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / "pipe" if linked else folder / name)
    if linked:
        (folder / name).symlink_to(folder / "pipe")
    assert "is not a regular file" in refusal(folder)


def test_nothing_but_a_regular_file_of_a_bounded_size_is_read(tmp_path: Path) -> None:
    """Also what took a file's place after the bundle was looked through."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    for name in ("pipe", "socket", "."):
        with pytest.raises(BundleInvalid, match="is not a regular file"):
            read_text(tmp_path / name)
    with pytest.raises(BundleInvalid, match="is over 4 bytes"):
        read_text(tmp_path / "large", 4)
    assert read_text(tmp_path / "large", 5) == "12345"
    os.truncate(tmp_path / "large", bundles.MAX_TEXT_BYTES + 1)
    with pytest.raises(BundleInvalid, match="is over 16777216 bytes"):
        read_text(tmp_path / "large")


def test_a_pipe_named_like_a_bare_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.onnx")
    assert "is not a regular file" in refusal(tmp_path / "net.onnx")


def test_a_pipe_is_not_a_file_inside_a_bundle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(BundleInvalid, match="is not a regular file"):
            check_inside(tmp_path, tmp_path / name)


def test_a_version_set_aside_does_not_change_what_a_bundle_looks_like(tmp_path: Path) -> None:
    """Or every version were loaded again whenever one is replaced."""
    folder = graphs.write_raw(tmp_path / "b")
    before = signature(folder)
    shutil.copytree(folder / "1", folder / ".replaced-1")
    assert signature(folder) == before


# ---- nothing outside -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.onnx", "a/../../x.onnx", "", ".."])
@pytest.mark.parametrize("key", ["file", "tokenizer"])
def test_paths_that_leave_the_bundle_are_refused(tmp_path: Path, path: str, key: str) -> None:
    section: dict[str, Any] = {"file": path} if key == "file" else {"text": {"tokenizer": path}}
    assert "inside the version's folder" in refusal(written(tmp_path, {"model": {"id": "m"}, "onnx": section}))


@pytest.mark.parametrize("suffix", sorted(FORBIDDEN_SUFFIXES))
def test_files_that_may_run_code_are_refused(tmp_path: Path, suffix: str) -> None:
    folder = written(tmp_path, {"model": {"id": "m"}, "onnx": {"file": f"model{suffix}"}})
    assert "may run code" in refusal(folder)


@pytest.mark.parametrize("suffix", [".PKL", ".Pt", ".SO"])
def test_their_case_does_not_matter(tmp_path: Path, suffix: str) -> None:
    folder = written(tmp_path, {"model": {"id": "m"}, "onnx": {"file": f"model{suffix}"}})
    assert "may run code" in refusal(folder)


@pytest.mark.parametrize("place", ["config.yaml", "1/labels.txt", "1/tokenizer.json", "1/deep/er", "2"])
def test_a_link_out_of_the_bundle_is_refused_wherever_it_is(tmp_path: Path, place: str) -> None:
    outside = tmp_path / "secret"
    outside.mkdir() if place == "2" else outside.write_text("root:x:0:0\n")
    folder = graphs.write_raw(tmp_path / "b")
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).unlink(missing_ok=True)
    (folder / place).symlink_to(outside)
    text = refusal(folder)
    assert "leads out of the bundle" in text
    assert "root:x" not in text


def test_a_relative_link_out_and_a_link_to_nowhere_outside_are_refused(tmp_path: Path) -> None:
    folder = graphs.write_raw(tmp_path / "b")
    (folder / "x").symlink_to("../nowhere")
    assert "leads out" in refusal(folder)


def test_links_inside_the_bundle_are_followed(tmp_path: Path) -> None:
    """As a mounted ConfigMap has them."""
    folder = graphs.write_raw(tmp_path / "b")
    (folder / "..data").mkdir()
    (folder / "config.yaml").rename(folder / "..data" / "config.yaml")
    (folder / "config.yaml").symlink_to("..data/config.yaml")
    (folder / "2").symlink_to("1")
    assert config_of(folder).key.model_id == "b"
    assert [version.id for version in find_versions(folder)] == ["1", "2"]


def test_a_bundle_may_itself_be_a_link(tmp_path: Path) -> None:
    graphs.write_raw(tmp_path / "store" / "b")
    (tmp_path / "b").symlink_to(tmp_path / "store" / "b")
    assert config_of(tmp_path / "b").key.model_id == "b"
    assert check_inside(tmp_path / "b", tmp_path / "b" / "1" / "model.onnx").is_file()


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    folder = graphs.write_raw(tmp_path / "b")
    (folder / "1" / "loop").symlink_to("loop")
    (folder / "1" / "self").symlink_to(".")
    assert config_of(folder).key.model_id == "b"
    assert signature(folder)
    with pytest.raises(BundleInvalid):
        check_inside(folder, folder / "1" / "loop")


def test_check_inside_tells_out_from_missing(tmp_path: Path) -> None:
    folder = graphs.write_raw(tmp_path / "b")
    (tmp_path / "beside").write_text("x")
    assert check_inside(folder, folder / "1" / "model.onnx") == (folder / "1" / "model.onnx").resolve()
    for path in (folder / ".." / "beside", tmp_path / "beside", tmp_path / "b2"):
        with pytest.raises(BundleInvalid, match="leads out"):
            check_inside(folder, path)
    with pytest.raises(BundleInvalid, match="missing"):
        check_inside(folder, folder / "1" / "none")


# ---- versions --------------------------------------------------------------------------------------------------------


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(bundle: Path, file: str = "model.onnx") -> list[str]:
    return sorted(version.id for version in find_versions(bundle, file))


def test_tritons_layout_has_a_folder_for_each_version(tmp_path: Path) -> None:
    touch(tmp_path / "1" / "model.onnx", tmp_path / "12" / "model.onnx", tmp_path / "v2.1-beta" / "model.onnx")
    assert ids(tmp_path) == ["1", "12", "v2.1-beta"]


def test_clarifais_layout_has_checkpoints_in_a_version(tmp_path: Path) -> None:
    touch(tmp_path / "1" / "checkpoints" / "model.onnx", tmp_path / "1" / "model.py")
    (version,) = find_versions(tmp_path)
    assert (version.id, version.path) == ("1", tmp_path / "1")
    assert version.model_file == tmp_path / "1" / "checkpoints" / "model.onnx"


def test_folders_without_a_model_are_no_versions(tmp_path: Path) -> None:
    touch(tmp_path / "1" / "model.onnx", tmp_path / "samples" / "a.png", tmp_path / ".staging" / "model.onnx")
    (tmp_path / "2" / "model.onnx").mkdir(parents=True)
    touch(tmp_path / "a b" / "model.onnx")
    assert ids(tmp_path) == ["1"]


def test_the_file_may_have_another_name(tmp_path: Path) -> None:
    touch(tmp_path / "1" / "net.onnx", tmp_path / "2" / "model.onnx")
    assert ids(tmp_path, "net.onnx") == ["1"]


def test_a_model_at_the_top_and_a_bare_file_are_version_1(tmp_path: Path) -> None:
    touch(tmp_path / "b" / "model.onnx", tmp_path / "bare.onnx")
    (top,) = find_versions(tmp_path / "b")
    assert (top.id, top.path, top.bare) == ("1", tmp_path / "b", False)
    (bare,) = find_versions(tmp_path / "bare.onnx")
    assert (bare.id, bare.model_file, bare.bare) == ("1", tmp_path / "bare.onnx", True)


def test_a_bundle_without_a_version_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match=r"<version>/net\.onnx"):
        find_versions(tmp_path, "net.onnx")


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bundles.LABEL_FILES)
@pytest.mark.parametrize("where", [".", "1"])
def test_labels_are_read_from_a_file_beside_the_model_or_the_config(tmp_path: Path, name: str, where: str) -> None:
    folder = graphs.write_raw(tmp_path / "b")
    (folder / where / name).write_text("katze\n\n  hund \r\nmaus", encoding="utf-8")
    (version,) = find_versions(folder)
    assert [concept.id for concept in concepts_of(config_of(folder), version)] == ["katze", "hund", "maus"]


def test_the_configs_concepts_come_first(tmp_path: Path) -> None:
    folder = graphs.write_image_classifier(tmp_path / "b", concepts=("one", "two"))
    (folder / "1" / "labels.txt").write_text("other\n")
    (version,) = find_versions(folder)
    assert [concept.name for concept in concepts_of(config_of(folder), version)] == ["one", "two"]


def test_labels_that_are_not_utf_8_are_the_bundles_fault(tmp_path: Path) -> None:
    folder = graphs.write_raw(tmp_path / "b")
    (folder / "1" / "labels.txt").write_bytes("größe".encode("latin-1"))
    (version,) = find_versions(folder)
    with pytest.raises(BundleInvalid, match=r"labels\.txt is not UTF-8"):
        concepts_of(config_of(folder), version)


def test_a_bare_file_has_no_labels_of_its_neighbours(tmp_path: Path) -> None:
    touch(tmp_path / "a.onnx")
    (tmp_path / "labels.txt").write_text("x\n")
    folder = graphs.write_raw(tmp_path / "b")
    (version,) = find_versions(tmp_path / "a.onnx")
    assert concepts_of(config_of(folder), version) == ()


# ---- checksums -------------------------------------------------------------------------------------------------------


def test_checksums_are_those_of_sha256sum_and_verify(tmp_path: Path) -> None:
    folder = graphs.write_external(tmp_path / "b")
    (version,) = find_versions(folder)
    write_checksums(version)
    subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=version.path, check=True, capture_output=True
    )
    found = verify_checksums(version)
    assert set(found) == {"model.onnx", "weights.bin"}
    assert found["model.onnx"] == hashlib.sha256((version.path / "model.onnx").read_bytes()).hexdigest()


def test_without_a_listing_the_checksums_are_still_computed(tmp_path: Path) -> None:
    (version,) = find_versions(graphs.write_raw(tmp_path / "b"))
    assert set(verify_checksums(version)) == {"model.onnx"}


@pytest.mark.parametrize("style", ["text", "binary", "dotted", "upper"])
def test_a_changed_file_is_named_however_the_listing_was_written(tmp_path: Path, style: str) -> None:
    """`sha256sum -b` puts a star before the name, `sha256sum ./*` a ./"""
    (version,) = find_versions(graphs.write_raw(tmp_path / "b"))
    digest = hashlib.sha256(version.model_file.read_bytes()).hexdigest()
    line = {
        "text": f"{digest}  model.onnx",
        "binary": f"{digest} *model.onnx",
        "dotted": f"{digest}  ./model.onnx",
        "upper": f"{digest.upper()}  model.onnx",
    }[style]
    (version.path / "SHA256SUMS").write_text(f"{line}\n\n")
    assert verify_checksums(version)
    version.model_file.write_bytes(b"changed")
    with pytest.raises(BundleInvalid, match=r"model\.onnx differs from"):
        verify_checksums(version)
    version.model_file.unlink()
    with pytest.raises(BundleInvalid, match="is missing, but listed in"):
        verify_checksums(version)


@pytest.mark.parametrize("content", [b"nonsense\n", b"abc  model.onnx\n", b"\xff\xfe\n", b"<html>\n"])
def test_a_listing_that_says_nothing_is_refused_and_not_passed_over(tmp_path: Path, content: bytes) -> None:
    (version,) = find_versions(graphs.write_raw(tmp_path / "b"))
    (version.path / "SHA256SUMS").write_bytes(content)
    with pytest.raises(BundleInvalid, match="SHA256SUMS"):
        verify_checksums(version)


# ---- what it looks like from outside ---------------------------------------------------------------------------------


def test_the_signature_changes_with_every_kind_of_change(tmp_path: Path) -> None:
    folder = graphs.write_raw(tmp_path / "b")
    seen = [signature(folder)]
    assert signature(folder) == seen[0]
    (folder / "1" / "new").write_text("x")
    seen.append(signature(folder))
    os.utime(folder / "1" / "new", ns=(1, 1))
    seen.append(signature(folder))
    (folder / "1" / "new").chmod(0o600)
    seen.append(signature(folder))
    (folder / "1" / "other").write_text("x")
    os.utime(folder / "1" / "other", ns=(1, 1))
    os.replace(folder / "1" / "other", folder / "1" / "new")
    seen.append(signature(folder))
    (folder / "1" / "new").unlink()
    seen.append(signature(folder))
    assert len(set(seen[:-1])) == 5
    assert seen[-1] == seen[0]


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        graphs.write_image_classifier,
        graphs.write_uint8_classifier,
        graphs.write_image_embedder,
        graphs.write_text_classifier,
        graphs.write_text_embedder,
        graphs.write_raw,
    ],
)
def test_a_config_written_down_is_read_as_itself(tmp_path: Path, write: Any) -> None:
    config = config_of(write(tmp_path / "b"))
    again = config_of(written(tmp_path / "b", as_yaml(config)))
    assert again == config


def test_odd_texts_survive_being_written_down(tmp_path: Path) -> None:
    config = config_of(graphs.write_raw(tmp_path / "b"))
    odd = replace(
        config,
        name="no: yes # 'x'",
        description="größe\nzwei zeilen: [1]\n",
        concepts=(Concept("1", "null"), Concept("yes", "- a"), Concept("0x1", "\u2028")),
        sentence="Understood as raw tensors.",
    )
    text = as_yaml(odd)
    assert text.startswith("# Understood as raw tensors.\n")
    assert config_of(written(tmp_path / "b", text)) == replace(odd, sentence="")
