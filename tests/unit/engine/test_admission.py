"""Whether a model fits: what its content is, what it took, and that a load which does not fit is refused."""

import json
from pathlib import Path

import pytest
from support import graphs
from support.engine_graphs import planned

from appliance.core.errors import DeviceError
from appliance.engine import admission
from appliance.engine.admission import Admission, Content, Footprints, content_of, need
from appliance.engine.gpu import Gpu
from appliance.engine.session import Device

GIB = 2**30
H200 = Device("gpu", 0, name="NVIDIA H200")
MODEL = Content("abc", GIB)


class Memory:
    """A GPU of 10 GiB; the test says how much of it is used."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: int | None = 2 * GIB
        monkeypatch.setattr(admission, "_used", lambda device: self.used)
        monkeypatch.setattr(admission, "_now", self._now)

    def _now(self, device: Device) -> Gpu:
        return Gpu(0, 0, "", device.name, 10 * GIB, None if self.used is None else 10 * GIB - self.used)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


# ---- content ---------------------------------------------------------------------------------------------------------


def test_the_key_is_the_contents_and_the_size_is_all_of_it(tmp_path: Path) -> None:
    """Weights outside the graph count; where the bundle lies does not."""
    one = planned(graphs.write_external(tmp_path / "one"))[3]
    same = planned(graphs.write_external(tmp_path / "other" / "place"))[3]
    assert content_of(one) == content_of(same)
    weights = one.file.parent / "weights.bin"
    assert content_of(one).size == one.file.stat().st_size + weights.stat().st_size
    weights.write_bytes(bytes(weights.stat().st_size))
    assert content_of(planned(tmp_path / "one")[3]).key != content_of(same).key


def test_a_wrapped_graph_is_another_content_than_its_file(tmp_path: Path) -> None:
    """Another activation is another graph, with the same file."""
    plan = planned(graphs.write_image_classifier(tmp_path / "cats"))[3]
    assert plan.model is not None
    assert content_of(plan).key != content_of(planned(graphs.write_raw(tmp_path / "raw"))[3]).key


# ---- what to reckon with ---------------------------------------------------------------------------------------------


def test_an_unknown_model_is_estimated_and_a_known_one_is_not() -> None:
    """The sentence says which."""
    estimate = need(MODEL, None)
    assert estimate.size == int(1.2 * GIB) + 512 * 2**20
    assert "estimated from 1.0 GiB" in str(estimate)
    assert str(need(MODEL, 3 * GIB)) == "3.0 GiB of GPU memory (measured when it was last loaded)"


# ---- footprints.json -------------------------------------------------------------------------------------------------


def test_footprints_outlive_the_process(tmp_path: Path) -> None:
    """Another engine process that writes too takes nothing away."""
    one, other = Footprints(tmp_path), Footprints(tmp_path)
    one.put("a", 5, "cats:1")
    other.put("b", 6, "dogs:1")
    one.put("a", 7, "cats:1")
    assert (Footprints(tmp_path).get("a"), one.get("b"), one.get("c")) == (7, 6, None)
    assert json.loads((tmp_path / "footprints.json").read_text())["a"] == {"model": "cats:1", "bytes": 7}


def test_the_oldest_footprints_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays small however many models come and go; one that is measured again is new."""
    monkeypatch.setattr(admission, "_KEPT", 2)
    kept = Footprints(tmp_path)
    for key in ("a", "b", "a", "c"):
        kept.put(key, 1, "m:1")
    assert [kept.get(key) for key in ("a", "b", "c")] == [1, None, 1]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"a": {"bytes": "many"}}', '{"a": {"bytes": -1}}'])
def test_a_broken_file_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    """The next load measures anew, and writes it anew."""
    (tmp_path / "footprints.json").write_text(text)
    kept = Footprints(tmp_path)
    assert kept.get("a") is None
    kept.put("a", 4, "cats:1")
    assert kept.get("a") == 4


def test_without_a_state_folder_nothing_is_kept() -> None:
    kept = Footprints(None)
    kept.put("a", 4, "cats:1")
    assert kept.get("a") is None


# ---- admission -------------------------------------------------------------------------------------------------------


def test_a_load_is_measured_and_the_next_one_reckons_with_it(tmp_path: Path, memory: Memory) -> None:
    """For this content, provider and kind of GPU."""
    door = Admission(tmp_path, headroom=GIB)
    with door.load(MODEL, H200, "cuda", "cats:1"):
        memory.used = 6 * GIB
    assert memory.used is not None
    with pytest.raises(DeviceError, match=r"It needs 4\.0 GiB of GPU memory \(measured when it was last loaded\)"):
        door.load(MODEL, H200, "cuda", "cats:1").__enter__()
    with door.load(MODEL, H200, "tensorrt", "cats:1"):
        pass
    with door.load(Content("other", GIB), H200, "cuda", "dogs:1"):
        pass


def test_a_load_that_does_not_fit_is_not_begun(tmp_path: Path, memory: Memory) -> None:
    """With the numbers, and the key that keeps memory free."""
    memory.used = 9 * GIB
    with pytest.raises(DeviceError) as error, Admission(tmp_path, headroom=GIB).load(MODEL, H200, "cuda", "cats:1"):
        pytest.fail("it was begun")
    assert "1.0 GiB must stay free (engine.gpu_headroom)" in str(error.value)
    assert "1.0 of 10.0 GiB free" in str(error.value)


def test_a_failed_load_leaves_no_footprint(tmp_path: Path, memory: Memory) -> None:
    """It had not taken all that it needs."""

    def fail() -> None:
        with Admission(tmp_path, headroom=0).load(MODEL, H200, "cuda", "cats:1"):
            memory.used = 3 * GIB
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not (tmp_path / "footprints.json").exists()


def test_loads_at_the_same_time_are_not_mixed_up(tmp_path: Path, memory: Memory) -> None:
    """Whose memory it is cannot be told then; alone again, a load is measured."""
    door = Admission(tmp_path, headroom=0)
    with door.load(MODEL, H200, "cuda", "cats:1"):
        memory.used = 3 * GIB
        with door.load(Content("other", 1), H200, "cuda", "dogs:1"):
            memory.used = 4 * GIB
    assert not (tmp_path / "footprints.json").exists()
    with door.load(MODEL, H200, "cuda", "cats:1"):
        memory.used = 5 * GIB
    assert Footprints(tmp_path).get("abc/cuda/NVIDIA H200") == GIB


def test_where_nothing_is_known_everything_is_let_in(tmp_path: Path, memory: Memory) -> None:
    """Without NVML and CUDA's library, CUDA itself says when the GPU is full."""
    memory.used = None
    with Admission(tmp_path, headroom=GIB).load(MODEL, H200, "cuda", "cats:1"):
        pass
    assert not (tmp_path / "footprints.json").exists()
