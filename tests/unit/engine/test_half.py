"""`precision: fp16`: products in half precision, answers within the tolerance, everything delicate as it was.

On a CPU onnxruntime computes half in float32, and leaves out casts there and back; onnx's own reference evaluator keeps
to the types, overflows and all.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator
from support import graphs
from support.engine_graphs import CPU, loaded, planned

from appliance.engine.half import TOLERANCE, halve
from appliance.engine.session import Session

RANDOM = np.random.default_rng(3)


def weights(*shape: int, scale: float = 0.2) -> np.ndarray:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


def run(model: ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    """All outputs, on the CPU."""
    session = Session(model.SerializeToString(), Path("/nowhere"), CPU, 1)
    return session.run([spec.name for spec in session.outputs], feeds)


def run_in_half(model: ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    """All outputs, every value in the very type that the graph says."""
    with np.errstate(over="ignore", invalid="ignore"):
        return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, feeds)]


def halved(model: ModelProto) -> ModelProto:
    """A copy with half precision in it, and valid."""
    copy = ModelProto.FromString(model.SerializeToString())
    assert halve(copy) > 0
    onnx.checker.check_model(copy, full_check=True)
    return copy


def network() -> ModelProto:
    """`x` (batch, 3, 8, 8) → `p`: convolution, norm, pooling, a product and softmax."""
    node = helper.make_node
    return graphs.make(
        [
            node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
            node("Relu", ["n"], ["r"]),
            node("GlobalAveragePool", ["r"], ["pool"]),
            node("Flatten", ["pool"], ["flat"]),
            node("Gemm", ["flat", "g", "h"], ["logits"]),
            node("Softmax", ["logits"], ["p"]),
        ],
        {"x": (TensorProto.FLOAT, ["batch", 3, 8, 8])},
        {"p": (TensorProto.FLOAT, ["batch", 5])},
        {
            "w": weights(8, 3, 3, 3),
            "b": weights(8),
            "scale": 1 + weights(8),
            "shift": weights(8),
            "mean": weights(8),
            "var": 1 + np.abs(weights(8)),
            "g": weights(8, 5, scale=1),
            "h": weights(5),
        },
    )


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type != "Cast"]


def types(model: ModelProto) -> dict[str, int]:
    """Output name of each node → its type."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}


def test_probabilities_stay_within_the_tolerance() -> None:
    """And are not the same: the weights were rounded."""
    model = network()
    pixels = RANDOM.random((16, 3, 8, 8), np.float32)
    (exact,) = run(model, x=pixels)
    for evaluate in (run, run_in_half):
        (rounded,) = evaluate(halved(model), x=pixels)
        assert rounded.dtype == np.float32
        np.testing.assert_allclose(rounded, exact, atol=TOLERANCE)
        assert not np.array_equal(rounded, exact)


def test_products_and_what_follows_are_in_half_and_softmax_is_not() -> None:
    """No operator is added, lost or moved but casts, and none between a product and its activation."""
    model = network()
    result = halved(model)
    assert operators(result) == operators(model)
    known = types(result)
    for name in ("c", "n", "r", "pool", "flat", "logits"):
        assert known[f"{name}_appliance_half"] == TensorProto.FLOAT16
    assert known["p"] == TensorProto.FLOAT
    order = [node.op_type for node in result.graph.node]
    at = order.index("Conv")
    assert order[at : order.index("Flatten") + 1].count("Cast") == 4, "those of the norm's four constants alone"


def test_weights_stay_as_they_are_in_the_file() -> None:
    """They may lie outside the graph: only casts are put in front of them."""
    model = network()
    assert halved(model).graph.initializer == model.graph.initializer
    outside = graphs.external_data_model()
    halve(outside)
    assert all(tensor.data_location == TensorProto.EXTERNAL for tensor in outside.graph.initializer)


def test_inputs_and_outputs_keep_names_and_types() -> None:
    """Also an output that is computed in half, and one in the middle of the graph."""
    model = network()
    model.graph.output.extend(
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5]),
            helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", 8, 8, 8]),
        ]
    )
    result = halved(model)
    assert result.graph.input == model.graph.input
    assert result.graph.output == model.graph.output
    pixels = RANDOM.random((2, 3, 8, 8), np.float32)
    for exact, rounded in zip(run(model, x=pixels), run(result, x=pixels), strict=True):
        np.testing.assert_allclose(rounded, exact, atol=TOLERANCE)


def test_a_norm_of_large_values_does_not_overflow() -> None:
    """A layer norm as old exporters write it squares values of a thousand, which is more than half can hold."""
    node = helper.make_node
    model = graphs.make(
        [
            node("MatMul", ["x", "w"], ["y"]),
            node("ReduceMean", ["y"], ["m"], axes=[-1]),
            node("Sub", ["y", "m"], ["d"]),
            node("Pow", ["d", "two"], ["q"]),
            node("ReduceMean", ["q"], ["v"], axes=[-1]),
            node("Sqrt", ["v"], ["s"]),
            node("Div", ["d", "s"], ["n"]),
            node("MatMul", ["n", "w"], ["z"]),
        ],
        {"x": (TensorProto.FLOAT, ["batch", 16])},
        {"z": (TensorProto.FLOAT, ["batch", 16])},
        {"w": weights(16, 16), "two": np.array(2, np.float32)},
    )
    x = RANDOM.standard_normal((4, 16)).astype(np.float32) * 3000
    (exact,), (rounded,) = run(model, x=x), run_in_half(halved(model), x=x)
    assert np.isfinite(rounded).all()
    np.testing.assert_allclose(rounded, exact, atol=0.02)


def test_bodies_of_if_read_float32() -> None:
    """They take values of the graph around them by name."""
    node = helper.make_node
    bodies = {
        name: helper.make_graph(
            [node(operator, ["y"], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
        )
        for name, operator in (("then", "Neg"), ("else", "Abs"))
    }
    model = graphs.make(
        [
            node("MatMul", ["x", "w"], ["y"]),
            node("If", ["flag"], ["z"], then_branch=bodies["then"], else_branch=bodies["else"]),
        ],
        {"x": (TensorProto.FLOAT, ["batch", 4]), "flag": (TensorProto.BOOL, [])},
        {"z": (TensorProto.FLOAT, ["batch", 4])},
        {"w": weights(4, 4)},
    )
    x = RANDOM.random((2, 4), np.float32)
    for flag in (True, False):
        feeds: dict[str, Any] = {"x": x, "flag": np.array(flag)}
        np.testing.assert_allclose(run(halved(model), **feeds)[0], run(model, **feeds)[0], atol=TOLERANCE)


@pytest.mark.parametrize("model", [graphs.identity_model(), graphs.gather_model(), graphs.string_model()])
def test_a_graph_without_products_stays_as_it_is(model: ModelProto) -> None:
    before = model.SerializeToString()
    assert halve(model) == 0
    assert model.SerializeToString() == before


def test_a_graph_that_is_in_half_already_stays_as_it_is() -> None:
    """The bundle's author knew better."""
    model = halved(network())
    before = operators(model)
    again = ModelProto.FromString(model.SerializeToString())
    halve(again)
    pixels = RANDOM.random((2, 3, 8, 8), np.float32)
    assert operators(again) == before
    np.testing.assert_array_equal(run(again, x=pixels)[0], run(model, x=pixels)[0])


def test_a_bundle_asks_for_it(tmp_path: Path) -> None:
    """The plan says what was done, and the answers of the wrapped graph stay within the tolerance."""
    folder = graphs.write_image_classifier(tmp_path / "cats")
    exact = planned(folder)[3]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["onnx"]["precision"] = "fp16"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rounded = planned(folder)[3]
    assert (exact.half, rounded.half) == (False, True)
    assert any("compute in half precision" in note for note in rounded.notes)
    shape = tuple(axis or 4 for axis in exact.inputs[0].shape)
    pixels = RANDOM.integers(0, 255, shape, np.uint8)
    answers = []
    for plan in (exact, rounded):
        assert plan.model is not None
        session = Session(plan.model, plan.file.parent, CPU, 1)
        answers.append(session.run(["appliance_scores"], {plan.inputs[0].name: pixels})[0])
    np.testing.assert_allclose(answers[1], answers[0], atol=TOLERANCE)


async def test_a_declared_methods_graph_is_halved_too(tmp_path: Path) -> None:
    """It is another graph of the same bundle, and what the bundle says holds for all of them."""
    declared = {"name": "ask", "arguments": [{"name": "x", "type": "list[float]"}], "returns": {"type": "list[float]"}}
    shapes = {"x": (TensorProto.FLOAT, ["batch", 4])}, {"y": (TensorProto.FLOAT, ["batch", 4])}
    model = graphs.make([helper.make_node("MatMul", ["x", "w"], ["y"])], *shapes, {"w": weights(4, 4)})
    folder = graphs.write_raw(tmp_path / "b", model, precision="fp16", methods=[declared])
    answers = []
    for precision in ("fp16", "fp32"):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["onnx"]["precision"] = precision
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        servable = await loaded(folder)
        outcome = await servable.offers["ask"].model.submit({"x": np.ones((1, 4), np.float32)}, ("y",), None, "ada")
        answers.append(outcome.arrays["y"])
        servable.close()
    np.testing.assert_allclose(answers[0], answers[1], atol=TOLERANCE)
    assert not np.array_equal(*answers)
