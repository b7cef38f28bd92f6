"""The probes: rows share a run only when it is shown that a neighbour cannot change an answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from support import graphs
from support.engine_graphs import CPU
from support.fake_model import FakeModel

from appliance.engine.probes import row_dependence
from appliance.engine.session import Session


def session_of(model: Any) -> Session:
    """A session on the CPU."""
    return Session(model.SerializeToString(), Path("/nowhere"), CPU, 1)


def examples(width: int = 3, outlier: float = 100.0) -> list[dict[str, Any]]:
    """Three ordinary rows and an outlier."""
    random = np.random.default_rng(0)
    return [{"x": random.random((1, width), np.float32) * scale} for scale in (1, 1, 1, outlier)]


def test_independent_rows_may_share_a_run() -> None:
    """Nothing to say against it."""
    assert row_dependence(session_of(graphs.identity_model()), ["y"], examples()) == ""


@pytest.mark.parametrize("model", [graphs.dynamic_quantize_model(), graphs.batch_mean_model()])
def test_a_neighbour_that_changes_an_answer_is_detected(model: Any) -> None:
    """By the numbers, whatever the operators are called."""
    reason = row_dependence(session_of(model), ["y"], examples())
    assert reason == "the output 'y' of a row changes with its neighbours in the batch"


def test_equal_rows_would_hide_a_dependence() -> None:
    """Why one of the examples must be an outlier, and none equal to another."""
    same = [examples()[0]] * 4
    assert row_dependence(session_of(graphs.dynamic_quantize_model()), ["y"], same) == ""
    assert row_dependence(session_of(graphs.dynamic_quantize_model()), ["y"], examples()) != ""


@pytest.mark.parametrize("offset", [0.01, 1.0])
def test_a_leak_of_a_percent_is_detected(offset: float) -> None:
    """A model that adds a share of the batch's greatest value."""
    model = FakeModel()
    model.compute = lambda name, x: x + np.float32(offset) * x.max()  # type: ignore[method-assign]
    assert "changes with its neighbours" in row_dependence(model, ["double"], examples())


def test_rounding_is_no_dependence() -> None:
    """Sums are ordered differently in larger batches."""
    model = FakeModel()
    model.compute = lambda name, x: x * np.float32(1 + 1e-6 * len(x))  # type: ignore[method-assign]
    assert row_dependence(model, ["double"], examples()) == ""


def test_rounding_of_half_precision_is_no_dependence() -> None:
    """Three digits is all it has."""
    model = FakeModel()
    model.compute = lambda name, x: (x * np.float32(1 + 2e-3 * len(x))).astype(np.float16)  # type: ignore[method-assign]
    assert row_dependence(model, ["double"], examples()) == ""


def test_integers_must_be_equal() -> None:
    """Indices and labels have no tolerance."""
    model = FakeModel()
    model.compute = lambda name, x: (x * 100).astype(np.int64) + len(x)  # type: ignore[method-assign]
    assert "changes with its neighbours" in row_dependence(model, ["double"], examples())


def test_nan_equals_nan() -> None:
    """An outlier may overflow; that is no dependence."""
    model = FakeModel()
    model.compute = lambda name, x: np.where(x > 10, np.float32(np.nan), x)  # type: ignore[method-assign]
    assert row_dependence(model, ["double"], examples()) == ""


def test_a_neighbour_in_another_place_is_detected() -> None:
    """The first row, or the last, may be the one that leaks."""
    for place in (0, -1):
        model = FakeModel()
        model.compute = lambda name, x, place=place: x + x[place]  # type: ignore[method-assign]
        assert "changes with its neighbours" in row_dependence(model, ["double"], examples())


def test_an_output_without_one_entry_a_row_is_said() -> None:
    """Rows could not be told apart."""
    model = graphs.make(
        [helper.make_node("ReduceMax", ["x"], ["y"], keepdims=0)],
        {"x": (TensorProto.FLOAT, ["batch", 3])},
        {"y": (TensorProto.FLOAT, [])},
    )
    reason = row_dependence(session_of(model), ["y"], examples())
    assert reason == "the output 'y' does not have one entry for each row of a batch"


@pytest.mark.parametrize("model", [graphs.fixed_batch_model(), graphs.no_batch_axis_model()])
def test_a_graph_that_fails_on_a_batch_is_said(model: Any) -> None:
    """With onnxruntime's first line."""
    reason = row_dependence(session_of(model), ["y"], examples())
    assert reason.startswith("a batch of two or three rows failed: ")
    assert "\n" not in reason


def test_all_outputs_are_looked_at() -> None:
    """The second one may be the one that leaks."""
    model = FakeModel()
    model.compute = lambda name, x: x if name == "good" else x + x.sum()  # type: ignore[method-assign]
    assert row_dependence(model, ["good"], examples()) == ""
    assert "'bad'" in row_dependence(model, ["good", "bad"], examples())
