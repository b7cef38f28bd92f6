"""When an engine that TensorRT built may serve: only for what it was built for, and only as a whole."""

import json
from pathlib import Path

import numpy as np
import pytest

from appliance.core.errors import BundleInvalid
from appliance.engine import tensorrt
from appliance.engine.tensorrt import Compiled

EXAMPLES = [
    [{"ids": np.zeros((1, length), np.int64), "mask": np.zeros((1, length), np.int64)}] * 4 for length in (16, 64)
]


def built(folder: Path, engines: int = 1) -> Compiled:
    """What a build leaves in its folder."""
    work = tensorrt.begin(folder)
    for number in range(engines):
        (work / f"kernel_{number}.engine").write_bytes(b"engine" * (number + 1))
    shortest, longest = tensorrt.shapes(EXAMPLES, 32)
    return Compiled(work, True, 32, shortest, longest, {})


def test_a_complete_engine_is_found_as_it_was_built(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    complete = tensorrt.complete(built(folder, 2), folder)
    found = tensorrt.find(folder)
    assert found == complete
    assert found is not None
    assert (found.folder, found.fp16, found.max_rows) == (folder, True, 32)
    assert found.longest == {"ids": (32, 64), "mask": (32, 64)}
    assert found.files == {"kernel_0.engine": 6, "kernel_1.engine": 12}
    assert [path.name for path in folder.parent.iterdir()] == ["key"], "nothing is left of the work"


def test_a_build_replaces_the_one_before(tmp_path: Path) -> None:
    """Also one that was broken off: its folder is used anew."""
    folder = tmp_path / "key"
    tensorrt.complete(built(folder, 2), folder)
    built(folder, 3)
    tensorrt.complete(built(folder, 1), folder)
    found = tensorrt.find(folder)
    assert found is not None
    assert list(found.files) == ["kernel_0.engine"]


def test_a_graph_of_which_tensorrt_takes_nothing_has_no_engine(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    with pytest.raises(BundleInvalid, match="takes no part of this graph"):
        tensorrt.complete(built(folder, 0), folder)
    assert tensorrt.find(folder) is None


@pytest.mark.parametrize("harm", ["none", "unfinished", "torn", "lost", "more", "record"])
def test_what_is_not_whole_is_not_used(tmp_path: Path, harm: str) -> None:
    """onnxruntime would build what is missing, for minutes, at load."""
    folder = tmp_path / "key"
    if harm == "unfinished":
        built(folder)
    elif harm != "none":
        tensorrt.complete(built(folder, 2), folder)
    if harm == "torn":
        (folder / "kernel_1.engine").write_bytes(b"eng")
    elif harm == "lost":
        (folder / "kernel_1.engine").unlink()
    elif harm == "more":
        (folder / "kernel_2.engine").touch()
    elif harm == "record":
        (folder / "complete.json").write_text("{}")
    assert tensorrt.find(folder) is None


def test_any_change_is_another_folder(tmp_path: Path) -> None:
    """Content, onnxruntime, TensorRT and GPU: an engine of another one would be wrong, or be built anew."""
    one = ("plan", "1.31.1", 101300, "NVIDIA H200")
    others = [("plan2", *one[1:]), (one[0], "1.32.0", *one[2:]), (*one[:2], 101400, one[3]), (*one[:3], "NVIDIA L4")]
    folders = {tensorrt.folder_of(tmp_path, *each) for each in (one, *others, one)}
    assert len(folders) == 5
    assert all(folder.parent == tmp_path / "cache" / "tensorrt" for folder in folders)


def test_an_engine_covers_the_buckets_it_was_built_for(tmp_path: Path) -> None:
    """A bundle whose max_tokens changed has the same graph, and needs another engine."""
    folder = tmp_path / "key"
    complete = tensorrt.complete(built(folder), folder)
    assert tensorrt.covers(complete, EXAMPLES)
    assert not tensorrt.covers(complete, EXAMPLES[:1])
    assert not tensorrt.covers(complete, EXAMPLES[1:])
    assert not tensorrt.covers(complete, [])


def test_profiles_are_spelled_as_onnxruntime_reads_them(tmp_path: Path) -> None:
    """From one row of the shortest bucket to full batches of the longest."""
    options = tensorrt.options(built(tmp_path / "key"), 2)
    assert options["trt_profile_min_shapes"] == "ids:1x16,mask:1x16"
    assert options["trt_profile_max_shapes"] == options["trt_profile_opt_shapes"] == "ids:32x64,mask:32x64"
    assert (options["device_id"], options["trt_fp16_enable"], options["trt_engine_cache_enable"]) == ("2", "1", "1")


@pytest.mark.parametrize("name", ["a:b", "a,b", ""])
def test_a_name_that_would_break_the_option_is_refused(name: str) -> None:
    with pytest.raises(BundleInvalid, match="has a character"):
        tensorrt.shapes([[{name: np.zeros((1, 3))}]], 8)


def test_inputs_of_unknown_length_are_refused() -> None:
    with pytest.raises(BundleInvalid, match="unknown length"):
        tensorrt.shapes([], 8)


@pytest.mark.skipif(tensorrt.problem() is None, reason="TensorRT is here")
def test_a_missing_library_is_named_with_what_to_install() -> None:
    problem = str(tensorrt.problem())
    assert tensorrt.LIBRARIES[0] in problem
    assert "tensorrt-cu13" in problem
    with pytest.raises(OSError, match="libnvinfer"):
        tensorrt.version()


def test_a_record_that_is_no_json_is_no_engine(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    folder.mkdir()
    for text in ("", "[]", json.dumps({"files": 3}), json.dumps({"fp16": 1, "max_rows": "x"})):
        (folder / "complete.json").write_text(text)
        assert tensorrt.find(folder) is None
