"""Reading a graph: what it says of itself, and what is refused wherever in it that hides."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, helper, numpy_helper
from support import graphs

from appliance.catalog.graph import axes, every_node, graph_inputs, locations, read_graph, without_weights
from appliance.core.errors import BundleInvalid


def read(folder: Path, model: ModelProto) -> ModelProto:
    graphs.write_raw(folder, model)
    return read_graph(folder, folder / "1" / "model.onnx")


def test_inputs_and_axes_are_the_graphs_own(tmp_path: Path) -> None:
    model = read(tmp_path / "b", graphs.image_classifier_model(2, size=(8, "w")))
    (value,) = graph_inputs(model)
    assert (value.name, axes(value)) == ("image", [None, 3, 8, None])


def test_initializers_that_old_exporters_list_as_inputs_are_not_inputs(tmp_path: Path) -> None:
    model = graphs.external_data_model()
    weight = numpy_helper.from_array(np.zeros(3, np.float32), "offset")
    model.graph.initializer[0].CopyFrom(weight)
    model.graph.input.append(helper.make_tensor_value_info("offset", TensorProto.FLOAT, [3]))
    assert [value.name for value in graph_inputs(read(tmp_path / "b", model))] == ["x"]


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"text", b"\xff" * 64, b"\x08\x0a"])
def test_what_is_not_onnx_is_named(tmp_path: Path, data: bytes) -> None:
    folder = graphs.write_bundle(tmp_path / "b", data, None)
    with pytest.raises(BundleInvalid, match=r"model\.onnx is not an ONNX model"):
        read_graph(folder, folder / "1" / "model.onnx")


def test_a_truncated_model_is_named(tmp_path: Path) -> None:
    data = graphs.image_classifier_model().SerializeToString()
    folder = graphs.write_bundle(tmp_path / "b", data[: len(data) // 2], None)
    with pytest.raises(BundleInvalid, match="is not an ONNX model"):
        read_graph(folder, folder / "1" / "model.onnx")


def test_weights_outside_the_graph_but_inside_the_bundle_are_fine(tmp_path: Path) -> None:
    folder = graphs.write_external(tmp_path / "b")
    assert read_graph(folder, folder / "1" / "model.onnx").graph.initializer[0].data_location == TensorProto.EXTERNAL


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = graphs.write_external(tmp_path / "b")
    (folder / "1" / "weights.bin").unlink()
    with pytest.raises(BundleInvalid, match=r"weights\.bin is missing"):
        read_graph(folder, folder / "1" / "model.onnx")


@pytest.mark.parametrize("location", ["../../outside.bin", "/etc/passwd", "", "sub/../../../x"])
def test_weights_outside_the_bundle_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "outside.bin").write_bytes(b"\0" * 12)
    with pytest.raises(BundleInvalid, match="outside the bundle"):
        read(tmp_path / "b", graphs.external_data_model(location))


def test_weights_behind_a_link_out_of_the_bundle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside.bin").write_bytes(b"\0" * 12)
    folder = graphs.write_external(tmp_path / "b")
    (folder / "1" / "weights.bin").unlink()
    (folder / "1" / "weights.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(BundleInvalid, match="leads out"):
        read_graph(folder, folder / "1" / "model.onnx")


def outside_tensor(name: str = "one") -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(3, np.float32), name)
    graphs.store_outside(tensor, "../../../../../../etc/hostname")
    return tensor


def hidden_models() -> dict[str, ModelProto]:
    """A weight stored outside, in each place of a graph where a weight may be."""
    shape = (TensorProto.FLOAT, ["batch", 3])
    constant = graphs.make(
        [helper.make_node("Constant", [], ["c"], value=outside_tensor()), helper.make_node("Add", ["x", "c"], ["y"])],
        {"x": shape},
        {"y": shape},
    )
    nested = graphs.if_model()
    branch = nested.graph.node[0].attribute[0].g
    branch.node.insert(0, helper.make_node("Constant", [], ["extra"], value=outside_tensor()))
    function = graphs.make(
        [helper.make_node("Plus", ["x"], ["y"], domain="local")], {"x": shape}, {"y": shape}, domains=["local"]
    )
    body = [helper.make_node("Constant", [], ["c"], value=outside_tensor()), helper.make_node("Add", ["a", "c"], ["b"])]
    function.functions.append(helper.make_function("local", "Plus", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    sparse = graphs.identity_model()
    sparse.graph.sparse_initializer.add().values.CopyFrom(outside_tensor())
    return {
        "branch": graphs.if_model(outside_tensor()),
        "constant": constant,
        "constant in a branch": nested,
        "function": function,
        "sparse": sparse,
    }


@pytest.mark.parametrize("where", list(hidden_models()))
def test_weights_outside_the_bundle_are_found_wherever_they_hide(tmp_path: Path, where: str) -> None:
    with pytest.raises(BundleInvalid, match="outside the bundle"):
        read(tmp_path / "b", hidden_models()[where])


def test_operators_that_need_a_custom_library_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match=r"example\.custom::Magic needs a custom library"):
        read(tmp_path / "b", graphs.custom_op_model())


def test_operators_that_need_a_custom_library_are_found_in_branches(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match="needs a custom library"):
        read(tmp_path / "b", graphs.if_model(domain="example.custom"))


def test_functions_that_the_model_brings_along_are_fine(tmp_path: Path) -> None:
    model = hidden_models()["function"]
    model.functions[0].node[0].CopyFrom(
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(3, np.float32)))
    )
    assert read(tmp_path / "b", model)


def test_branches_are_walked(tmp_path: Path) -> None:
    model = read(tmp_path / "b", graphs.if_model())
    assert [node.op_type for node in every_node(model.graph.node)] == ["If", "Add", "Add"]


def test_a_graph_without_outputs_is_refused(tmp_path: Path) -> None:
    model = graphs.identity_model()
    del model.graph.output[:]
    with pytest.raises(BundleInvalid, match="outputs"):
        read(tmp_path / "b", model)


def test_the_test_graphs_are_valid_onnx() -> None:
    for make in (graphs.if_model, graphs.two_in_two_out_model, graphs.gather_model, graphs.dynamic_quantize_model):
        onnx.checker.check_model(make())


# ---- without weights -------------------------------------------------------------------------------------------------


def refilled(model: ModelProto, content: bytes) -> ModelProto:
    """The model with the bytes that its tensors refer to put back."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert where["location"] == "here"
            start = int(where["offset"])
            tensor.raw_data = content[start : start + int(where["length"])]
            del tensor.external_data[:]
            tensor.ClearField("data_location")
    return model


def heavy_model(*sizes: int) -> ModelProto:
    """A chain of Adds with a weight of so many float32 each."""
    weights = {f"w{i}": np.random.default_rng(i).random(size).astype(np.float32) for i, size in enumerate(sizes)}
    nodes = [helper.make_node("Add", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(len(sizes))]
    shape = (TensorProto.FLOAT, ["batch", None])
    return graphs.make(nodes, {"v0": shape}, {f"v{len(sizes)}": shape}, weights)


@pytest.mark.parametrize("sizes", [(), (1,), (256,), (257,), (1, 300, 2, 40_000, 1), (300_000,) * 3])
def test_large_tensors_are_referred_to_and_nothing_else_changes(sizes: tuple[int, ...]) -> None:
    """Put back, they make the model that there was, field by field; small ones were never taken out."""
    model = heavy_model(*sizes)
    model.metadata_props.add(key="k", value="v" * 2000)
    model.graph.doc_string = "d" * 5000
    content = model.SerializeToString()
    light = without_weights(content, "here")
    assert len(light) < 20_000
    read = ModelProto.FromString(light)
    assert [t.data_location == TensorProto.EXTERNAL for t in read.graph.initializer] == [n > 256 for n in sizes]
    assert locations(read) == (["here"] if max(sizes, default=0) > 256 else [])
    assert refilled(read, content) == model


def test_what_protobuf_merges_is_merged_still() -> None:
    """A message may be written in parts, and a field twice: the last one counts."""
    first, second = heavy_model(300), heavy_model(400)
    second.graph.initializer[0].name = "other"
    content = first.SerializeToString() + second.SerializeToString()
    read = ModelProto.FromString(without_weights(content, "here"))
    assert refilled(read, content) == ModelProto.FromString(content)
    twice = TensorProto(name="t", dims=[300], data_type=1, raw_data=b"a" * 1200).SerializeToString()
    twice += TensorProto(raw_data=b"b" * 1200).SerializeToString()
    graph = b"\x2a" + bytes([len(twice) & 0x7F | 0x80, len(twice) >> 7]) + twice
    content = b"\x3a" + bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7]) + graph
    read = ModelProto.FromString(without_weights(content, "here"))
    assert refilled(read, content).graph.initializer[0].raw_data == b"b" * 1200


def test_what_is_no_protobuf_is_said_or_copied() -> None:
    """Bytes at random, and a model cut off anywhere or with bytes changed: one of three errors, and nothing else."""
    random = np.random.default_rng(5)
    whole = heavy_model(300, 300).SerializeToString()
    for _ in range(2000):
        content = bytearray(whole if random.random() < 0.8 else random.bytes(int(random.integers(1, 200))))
        for place in random.integers(0, min(len(content), 120), 3):
            content[place] = int(random.integers(256))
        del content[int(random.integers(1, len(content) + 1)) :]
        try:
            light = without_weights(bytes(content), "here")
        except (ValueError, IndexError, DecodeError):
            continue
        assert len(light) <= len(content) + 200
