"""Which runs go through slots, which are replayed, and that answers never share memory.

The session is onnxruntime's, on the CPU; its IO binding takes host memory for the device's (tests/support).
"""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from support import graphs
from support.cuda_doubles import HostRuntime, OnHost, entry

from appliance.engine import binding
from appliance.engine.binding import Bound, Graphs

FLOATS = {"x": np.dtype(np.float32)}
OUT = {"y": np.dtype(np.float32), "words": None}
Options = ort.RunOptions


def rows(count: int, value: float = 1.0) -> dict[str, np.ndarray]:
    return {"x": np.full((count, 4), value, np.float32)}


@pytest.fixture
def session() -> OnHost:
    """`y` is twice `x`."""
    axes = {"x": (TensorProto.FLOAT, ["batch", 4])}, {"y": (TensorProto.FLOAT, ["batch", 4])}
    return OnHost(graphs.make([helper.make_node("Add", ["x", "x"], ["y"])], *axes, {}))


@pytest.fixture
def library() -> HostRuntime:
    return HostRuntime()


@pytest.fixture
def bound(session: OnHost, library: HostRuntime) -> Bound:
    return Bound(session, library, 0, FLOATS, OUT)


def test_inputs_are_bound_and_outputs_are_the_callers_own(bound: Bound, session: OnHost) -> None:
    """The next run in the same slot leaves an answer as it is, and the inputs too."""
    first_rows = rows(2, 1.0)
    (first,) = bound.run(["y"], first_rows, Options())
    (second,) = bound.run(["y"], rows(2, 5.0), Options())
    np.testing.assert_array_equal(first, rows(2, 2.0)["x"])
    np.testing.assert_array_equal(second, rows(2, 10.0)["x"])
    np.testing.assert_array_equal(first_rows["x"], rows(2, 1.0)["x"])
    assert session.runs == ["bound", "bound"]


@pytest.mark.parametrize(
    ("outputs", "feeds"),
    [
        (["y"], {"x": np.ones((1, 4))}),
        (["y"], {"z": np.ones((1, 4), np.float32), "x": np.ones((1, 4), np.float32)}),
        (["y"], {}),
        (["words"], {"x": np.ones((1, 4), np.float32)}),
        (["nowhere"], {"x": np.ones((1, 4), np.float32)}),
    ],
    ids=["dtype", "names", "nothing", "no numbers", "no output"],
)
def test_what_cannot_be_bound_is_left_to_onnxruntime(
    bound: Bound, session: OnHost, outputs: list[str], feeds: dict[str, np.ndarray]
) -> None:
    """Whose sentence about it is the same as on a CPU."""
    with pytest.raises(Exception, match=r"(?s)."):
        bound.run(outputs, feeds, Options())
    assert session.runs == ["run"]


def test_no_rows_are_no_run_of_a_slot(bound: Bound, session: OnHost) -> None:
    """Nothing travels."""
    assert bound.run(["y"], rows(0), Options())[0].shape == (0, 4)
    assert session.runs == ["run"]


def test_inputs_over_a_slots_bound_take_no_memory_of_ours(
    bound: Bound, session: OnHost, library: HostRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "SLOT_BYTES", 100)
    bound.run(["y"], rows(100), Options())
    assert session.runs == ["run"]
    assert library.memory_of == {}


def test_after_warm_up_a_larger_run_gives_its_memory_back(bound: Bound, session: OnHost) -> None:
    """By the option that shrinks the arena; runs as large as those of the warm-up go on as before."""
    bound.run(["y"], rows(8), Options())
    bound.settle()
    usual, outlier = Options(), Options()
    bound.run(["y"], rows(8), usual)
    with pytest.raises(Exception, match="arena"):  # the CPU provider has none by that name, and says so
        bound.run(["y"], rows(9), outlier)
    assert session.runs == ["bound", "bound", "run"]
    assert entry(usual, "memory.enable_memory_arena_shrinkage") == ""
    assert entry(outlier, "memory.enable_memory_arena_shrinkage") == "gpu:0"


def test_as_many_slots_as_runs_at_once(bound: Bound, session: OnHost, library: HostRuntime) -> None:
    """One after the other needs one; a run within a run, as two threads would, needs two."""
    bound.run(["y"], rows(1), Options())
    bound.run(["y"], rows(1), Options())
    assert library.calls.count("cudaStreamCreateWithFlags") == 1

    def within() -> None:
        session.before = lambda: None
        bound.run(["y"], rows(1), Options())

    session.before = within
    bound.run(["y"], rows(1), Options())
    assert library.calls.count("cudaStreamCreateWithFlags") == 2
    bound.close()
    assert library.memory_of == {}


def test_a_failed_run_gives_its_slot_back(bound: Bound, session: OnHost, library: HostRuntime) -> None:
    with pytest.raises(Exception, match="invalid dimensions"):
        bound.run(["y"], {"x": np.ones((1, 5), np.float32)}, Options())
    bound.run(["y"], rows(1), Options())
    assert library.calls.count("cudaStreamCreateWithFlags") == 1
    assert session.runs == ["bound", "bound"]


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_captured_shapes_are_replayed_and_others_are_not(session: OnHost, library: HostRuntime) -> None:
    """Each shape has a graph of its own; for what was not captured, capturing is switched off."""
    graphs = Graphs(session, library, 0, OUT)
    graphs.capture(["y"], rows(2), Options)
    graphs.capture(["y"], rows(4), Options)
    session.runs.clear()
    for count in (2, 4, 3, 2):
        (answer,) = graphs.run(["y"], rows(count, 3.0), Options())
        np.testing.assert_array_equal(answer, rows(count, 6.0)["x"])
    assert session.runs == ["bound 1", "bound 2", "bound -1", "bound 1"]
    graphs.close()
    assert library.memory_of == {}


def test_a_replays_answer_is_the_callers_own(session: OnHost, library: HostRuntime) -> None:
    """Although all replays write to the same place."""
    graphs = Graphs(session, library, 0, OUT)
    graphs.capture(["y"], rows(1), Options)
    (first,) = graphs.run(["y"], rows(1, 1.0), Options())
    graphs.run(["y"], rows(1, 9.0), Options())
    np.testing.assert_array_equal(first, rows(1, 2.0)["x"])
    graphs.close()


def test_the_measure_is_a_median_of_some_runs() -> None:
    """One disturbed run does not decide."""
    times = iter([0.0, 0.1, 0.2, 9.2, 9.3, 9.4])
    assert binding.seconds(lambda: None, lambda: next(times)) == pytest.approx(0.1)
