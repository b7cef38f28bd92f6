"""The plan: the wrapped graph gives what NumPy and the unwrapped graph give, and says which number does not fit."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from support import graphs
from support.engine_graphs import CPU, SIZE, constant_model, opened, pixel_model, plain, planned, write_pixels

from appliance.catalog.bundle import Batching, concepts_of, find_versions, read_config
from appliance.core.errors import BundleInvalid, InferenceFailed
from appliance.core.types import PredictOptions
from appliance.engine import plan as plans
from appliance.engine.cache import FileCache
from appliance.engine.session import Session, TensorSpec
from appliance.tasks.base import ImageSide
from appliance.tasks.classifier import Classifier, probabilities

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pictures(channels: int = 3, count: int = 4) -> np.ndarray:
    """uint8 (count, height, width, channels), all values, and the extremes."""
    random = np.random.default_rng(3)
    noise = random.integers(0, 256, (count, *SIZE, channels), dtype=np.uint8)
    noise[0], noise[1] = 0, 255
    return noise


def reference(folder: Path, pixels: np.ndarray, activation: str, image: dict[str, Any], dtype: Any) -> np.ndarray:
    """The scores the slow way: NumPy in front, the bundle's own file, NumPy behind."""
    values: np.ndarray = pixels
    if dtype != np.uint8:
        mean, std = image.get("mean", [0.0]), image.get("std", [1.0])
        values = (pixels.astype(np.float64) * image.get("scale", 1 / 255) - np.array(mean)) / np.array(std)
    if image.get("layout", "nchw") == "nchw":
        values = values.transpose(0, 3, 1, 2)
    raw = plain(folder).run(["scores"], {"image": np.ascontiguousarray(values.astype(dtype))})[0]
    logits = raw.reshape(len(pixels), -1).astype(np.float64)
    if activation == "softmax":
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
    return 1 / (1 + np.exp(-logits)) if activation == "sigmoid" else logits


def check(
    folder: Path, activation: str, image: dict[str, Any], dtype: Any = np.float32, tolerance: float = 1e-5
) -> None:
    """Scores, and the best of them with their indices, equal the reference; the plan does both halves."""
    bundle = opened(folder)
    assert bundle.plan.wrapped_input
    assert bundle.plan.wrapped_output
    assert bundle.plan.notes == ()
    pixels = pictures(1 if image.get("color") == "grey" else 3)
    wanted = reference(folder, pixels, activation, image, dtype)
    feeds = {plans.IMAGE: pixels}
    scores, values, indices = bundle.session.run([plans.SCORES, plans.TOP_VALUES, plans.TOP_INDICES], feeds)
    np.testing.assert_allclose(scores, wanted, atol=tolerance, rtol=0)
    top = min(200, wanted.shape[1])
    assert values.shape == indices.shape == (len(pixels), top)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, order, axis=1))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("color", ["rgb", "bgr", "grey"])
def test_the_wrapped_graph_equals_numpy_and_the_plain_graph(
    tmp_path: Path, color: str, layout: str, activation: str
) -> None:
    """For every layout, channel order and activation. (Channel order is the decoder's work; here it is just pixels.)"""
    channels = 1 if color == "grey" else 3
    image = {"color": color, "layout": layout, "mean": [0.5] * channels, "std": [0.25] * channels}
    folder = write_pixels(
        tmp_path / "b", pixel_model(5, channels=channels, layout=layout), activation=activation, image=image
    )
    check(folder, activation, image)


@pytest.mark.parametrize(
    "image",
    [
        {},
        {"mean": MEAN, "std": STD},
        {"scale": 1.0, "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
        {"scale": 1 / 127.5, "mean": [1.0]},
        {"std": [0.5, 0.25, 0.125]},
    ],
)
def test_normalisation_is_scale_then_mean_then_std(tmp_path: Path, image: dict[str, Any]) -> None:
    """(pixel · scale - mean) / std, each for one channel or for all."""
    check(write_pixels(tmp_path / "b", pixel_model(5), image=image), "softmax", image)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_uint8_graph_gets_the_pixels_as_they_are(tmp_path: Path, layout: str) -> None:
    """Its exporter put the normalisation inside."""
    model = pixel_model(5, layout=layout, dtype=TensorProto.UINT8)
    image = {"layout": layout}
    check(write_pixels(tmp_path / "b", model, image=image), "softmax", image, np.uint8)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [(TensorProto.FLOAT16, np.float16, 2e-3), (TensorProto.DOUBLE, np.float64, 1e-5)],
)
def test_graphs_of_other_precisions_are_cast(tmp_path: Path, kind: int, dtype: Any, tolerance: float) -> None:
    """Input and output; the scores that come out are float32 in any case."""
    folder = write_pixels(tmp_path / "b", pixel_model(5, dtype=kind))
    check(folder, "softmax", {}, dtype, tolerance)
    assert opened(folder).session.outputs[0].dtype == np.float32


@pytest.mark.parametrize("tail", [(), (1, 1)])
def test_axes_of_one_behind_the_concepts_are_flattened(tmp_path: Path, tail: tuple[int, ...]) -> None:
    """(batch, concepts, 1, 1) is what some exporters leave of a pooling."""
    check(write_pixels(tmp_path / "b", pixel_model(5, tail=tail)), "softmax", {})


@pytest.mark.parametrize("count", [1, 2, 199, 200, 201, 1000])
def test_no_more_than_200_concepts_leave_the_graph(tmp_path: Path, count: int) -> None:
    """Unless the full vector is asked for."""
    folder = write_pixels(tmp_path / "b", pixel_model(count), concepts=count)
    check(folder, "softmax", {})
    assert [spec.shape for spec in planned(folder)[3].outputs] == [(None, count), *[(None, min(200, count))] * 2]


@pytest.mark.parametrize("opset", [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22])
def test_operator_sets_are_wrapped_from_10_on(tmp_path: Path, opset: int) -> None:
    """The nodes we add mean the same in all of them."""
    check(write_pixels(tmp_path / "b", pixel_model(5, opset=opset)), "softmax", {})


@pytest.mark.parametrize("opset", [7, 8, 9])
def test_below_operator_set_10_the_host_picks_the_best(tmp_path: Path, opset: int) -> None:
    """TopK takes no K there; the bundle is served all the same, and a note says how."""
    model = pixel_model(5, opset=opset, ir_version=3, listed=True)
    folder = write_pixels(tmp_path / "b", model)
    bundle = opened(folder)
    assert (bundle.plan.wrapped_input, bundle.plan.wrapped_output) == (True, False)
    assert bundle.plan.notes == (
        f"operator set {opset} has no TopK with a variable K: the best concepts are picked on the host",
    )
    pixels = pictures()
    raw = bundle.session.run(["scores"], {plans.IMAGE: pixels})[0]
    task = Classifier(ImageSide(bundle.config.onnx.image, True), bundle.config.onnx.scores, False, 20)  # type: ignore[arg-type]
    answers = task.encode({"scores": raw}, len(pixels), PredictOptions())
    wanted = reference(folder, pixels, "softmax", {}, np.float32)
    for answer, row in zip(answers, wanted, strict=True):
        np.testing.assert_allclose(answer.values, np.sort(row)[::-1], atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("ir_version", [3, 8])
def test_initializers_among_the_inputs_are_not_inputs(tmp_path: Path, ir_version: int) -> None:
    """As PyTorch before 1.3 and many Caffe converters write them; IR version 3 demands it."""
    model = pixel_model(5, listed=True, ir_version=ir_version, opset=10)
    folder = write_pixels(tmp_path / "b", model)
    assert [spec.name for spec in planned(folder)[3].inputs] == [plans.IMAGE]
    check(folder, "softmax", {})


def test_a_fixed_batch_axis_is_kept(tmp_path: Path) -> None:
    """The engine must know that it has to run one row at a time."""
    plan = planned(write_pixels(tmp_path / "b", pixel_model(5, batch=1)))[3]
    assert plan.inputs == (TensorSpec(plans.IMAGE, np.dtype(np.uint8), (1, *SIZE, 3)),)


def test_without_concepts_the_graph_says_how_many_there_are(tmp_path: Path) -> None:
    """The bundle names none; they are numbered."""
    check(write_pixels(tmp_path / "b", pixel_model(7), concepts=0), "softmax", {})


def test_equal_scores_keep_the_order_of_the_concepts(tmp_path: Path) -> None:
    """In the graph's TopK, also at the edge of the 200."""
    scores = np.full(300, 0.25)
    scores[[250, 40]] = 0.5
    session = opened(write_pixels(tmp_path / "b", constant_model(scores), concepts=300, activation="none")).session
    indices = session.run([plans.TOP_INDICES], {plans.IMAGE: pictures()})[0]
    assert indices[0].tolist() == [40, 250, *[i for i in range(200) if i != 40][:198]]


def test_outputs_that_the_task_does_not_read_are_not_computed(tmp_path: Path) -> None:
    """Here one that fails whenever it is: of a wrapped graph only what the task reads is left."""
    model = pixel_model(5)
    model.graph.node.append(helper.make_node("Gather", ["scores", "far"], ["broken"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([99]), "far"))
    model.graph.output.append(helper.make_tensor_value_info("broken", TensorProto.FLOAT, ["rows", 5]))
    folder = write_pixels(tmp_path / "b", model)
    with pytest.raises(InferenceFailed):
        plain(folder).run(["broken"], {"image": np.zeros((1, 3, *SIZE), np.float32)})
    bundle, sound = opened(folder), opened(write_pixels(tmp_path / "sound", pixel_model(5)))
    assert bundle.plan.outputs == sound.plan.outputs
    names, feeds = [plans.SCORES, plans.TOP_INDICES], {plans.IMAGE: pictures()}
    for one, other in zip(bundle.session.run(names, feeds), sound.session.run(names, feeds), strict=True):
        np.testing.assert_array_equal(one, other)


def forked_model() -> Any:
    """`x` → `y` = x + 1, by way of a branch that reads a value from outside, and `z`, which fails."""
    model = graphs.if_model()
    model.graph.node.append(helper.make_node("Gather", ["x", "far"], ["z"]))
    model.graph.initializer.append(numpy_helper.from_array(np.full(500, 99), "far"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["rows", 3]))
    then = next(each.g for each in model.graph.node[0].attribute if each.name == "then_branch")
    del then.initializer[:]
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "outer"))
    model.graph.node.insert(0, helper.make_node("Identity", ["outer"], ["one"]))
    return model


@pytest.mark.parametrize("listed", [False, True])
def test_a_graph_is_cut_down_to_some_outputs(listed: bool) -> None:
    """onnxruntime computes every node, whatever is asked for. What a branch reads from outside is kept."""
    model = forked_model()
    if listed:  # among the inputs, as old exporters do
        model.graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            for tensor in model.graph.initializer
        )
    content = model.SerializeToString()
    feeds = {"x": np.zeros((1, 3), np.float32)}
    with pytest.raises(InferenceFailed):
        Session(content, Path("/nowhere"), CPU, 1).run(["y"], feeds)
    assert plans.only(content, {"y", "z"}) == content
    less = plans.only(content, {"y", "w"})
    session = Session(less, Path("/nowhere"), CPU, 1)
    assert session.run(["y"], feeds)[0].tolist() == [[1, 1, 1]]
    assert [spec.name for spec in session.outputs] == ["y"]
    assert [spec.name for spec in session.inputs] == ["x"]
    assert {tensor.name for tensor in ModelProto.FromString(less).graph.initializer} == {"yes", "outer"}


@pytest.mark.parametrize("scores", [[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [88.8, 88.7, -88.8]])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_large_logits_do_not_overflow(tmp_path: Path, scores: list[float], activation: str) -> None:
    """Wrapped or on the host."""
    array = np.array(scores)
    wrapped = opened(write_pixels(tmp_path / "w", constant_model(array), concepts=3, activation=activation))
    graph = wrapped.session.run([plans.SCORES], {plans.IMAGE: pictures()})[0]
    host = probabilities(np.tile(array.astype(np.float32), (4, 1)), activation)
    assert np.isfinite(graph).all()
    np.testing.assert_allclose(graph, host, atol=1e-6)


# ---- plan: raw -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(TensorProto.FLOAT, 1e-6), (TensorProto.UINT8, 1e-6), (TensorProto.FLOAT16, 2e-3), (TensorProto.DOUBLE, 1e-6)],
)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_a_raw_plan_gives_the_same_answers(
    tmp_path: Path, activation: str, kind: int, tolerance: float, layout: str
) -> None:
    """The host does what the graph would have done, whatever the graph's own dtype."""
    model = pixel_model(5, layout=layout, dtype=kind)
    image = {"layout": layout, "mean": MEAN, "std": STD} if kind != TensorProto.UINT8 else {"layout": layout}
    folders = [
        write_pixels(tmp_path / plan, model, activation=activation, plan=plan, image=image)
        for plan in ("wrapped", "raw")
    ]
    answers = []
    for folder in folders:
        bundle = opened(folder)
        assert bundle.plan.wrapped_input == bundle.plan.wrapped_output == (folder.name == "wrapped")
        section = bundle.config.onnx
        side = ImageSide(section.image, bundle.plan.wrapped_input, bundle.plan.inputs[0].dtype)  # type: ignore[arg-type]
        task = Classifier(side, section.scores, bundle.plan.wrapped_output, 20)  # type: ignore[arg-type]
        rows = [side._row(picture).feeds for picture in pictures()]
        results = []
        for row in rows:
            names = task.outputs(PredictOptions())
            arrays = dict(zip(names, bundle.session.run(names, row), strict=True))
            results += task.encode(arrays, 1, PredictOptions())
        answers.append(results)
    for wrapped, raw in zip(*answers, strict=True):
        np.testing.assert_allclose(wrapped.values, raw.values, atol=tolerance)
        assert sorted(wrapped.indices) == sorted(raw.indices)


def test_a_raw_plan_says_so(tmp_path: Path) -> None:
    """The operator asked for it; `models inspect` shows what it means."""
    plan = planned(write_pixels(tmp_path / "b", pixel_model(5), plan="raw"))[3]
    assert plan.notes == ("plan: raw, so pre- and post-processing run on the host",)
    assert [spec.name for spec in plan.inputs] == ["image"]
    assert [spec.name for spec in plan.outputs] == ["scores"]


# ---- pooling ---------------------------------------------------------------------------------------------------------

IDS = np.array([[2, 5, 9, 3, 0, 0], [2, 7, 3, 0, 0, 0], [2, 4, 5, 6, 7, 3]])
MASK = (IDS != 0).astype(np.int64)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_equals_numpy(tmp_path: Path, pooling: str) -> None:
    """Over the unmasked tokens, or the first one."""
    bundle = opened(graphs.write_text_embedder(tmp_path / "b", pooling=pooling))
    result = bundle.session.run([plans.EMBEDDING], {"input_ids": IDS, "attention_mask": MASK})[0]
    hidden = graphs.token_table()[IDS]
    if pooling == "cls":
        wanted = hidden[:, 0]
    else:
        wanted = (hidden * MASK[:, :, None]).sum(axis=1) / MASK.sum(axis=1, keepdims=True)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, wanted, atol=1e-6)
    assert bundle.plan.wrapped_output
    assert not bundle.plan.wrapped_input


def test_pooling_of_half_precision_gives_float32(tmp_path: Path) -> None:
    """The sum over many tokens must not lose digits."""
    model = graphs.text_hidden_model()
    model.graph.node[-1].output[0] = "wide"
    model.graph.node.append(helper.make_node("Cast", ["wide"], ["last_hidden_state"], to=TensorProto.FLOAT16))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    folder = graphs.write_text_embedder(tmp_path / "b")
    (folder / "1" / "model.onnx").write_bytes(model.SerializeToString())
    result = opened(folder).session.run([plans.EMBEDDING], {"input_ids": IDS, "attention_mask": MASK})[0]
    assert result.dtype == np.float32


def test_token_vectors_without_pooling_are_refused(tmp_path: Path) -> None:
    """One embedding must not be as long as its text."""
    folder = graphs.write_text_embedder(tmp_path / "b", pooling="none")
    with pytest.raises(
        BundleInvalid, match=r"\['\?', '\?', 4\], which is not one vector a row; set .*pooling to mean or cls"
    ):
        planned(folder)


def test_nothing_to_pool_is_said(tmp_path: Path) -> None:
    """The output has no token axis."""
    folder = graphs.write_text_embedder(tmp_path / "b")
    model = graphs.text_classifier_model(2)
    model.graph.node[-1].output[0] = model.graph.output[0].name = "last_hidden_state"
    (folder / "1" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleInvalid, match=r"'last_hidden_state' is not \(batch, tokens, dimensions\)"):
        planned(folder)


def test_mean_pooling_needs_a_mask(tmp_path: Path) -> None:
    """Padding would be averaged in."""
    folder = graphs.write_text_embedder(tmp_path / "b")
    config = (folder / "config.yaml").read_text().replace("max_tokens: 32", "max_tokens: 32\n    inputs: {mask: null}")
    (folder / "config.yaml").write_text(config)
    with pytest.raises(BundleInvalid, match=r"pooling: mean needs onnx\.text\.inputs\.mask"):
        planned(folder)


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "image", "words"),
    [
        (pixel_model(5), {"size": [6, 4]}, ["'image'", "'?', 3, 4, 6", "[6, 4]", "'?', 3, 6, 4"]),
        (pixel_model(5), {"layout": "nhwc"}, ["layout nhwc", "'?', 3, 4, 6", "'?', 4, 6, 3"]),
        (pixel_model(5, layout="nhwc"), {}, ["layout nchw", "'?', 4, 6, 3", "'?', 3, 4, 6"]),
        (pixel_model(5), {"color": "grey"}, ["color grey", "'?', 1, 4, 6"]),
        (pixel_model(5, channels=1), {}, ["color rgb", "'?', 1, 4, 6"]),
        (pixel_model(5), {"input": "picture"}, ["no input 'picture'", "onnx.image.input", "it has 'image'"]),
        (pixel_model(5, dtype=TensorProto.INT64, result=1), {}, ["'image' is INT64, not a picture"]),
    ],
)
def test_an_image_input_that_does_not_fit_is_named(
    tmp_path: Path, model: Any, image: dict[str, Any], words: list[str]
) -> None:
    """Both sides of the contradiction, so that the operator sees which one is wrong."""
    folder = write_pixels(tmp_path / "b", model, image=image)
    with pytest.raises(BundleInvalid) as failure:
        planned(folder)
    for word in words:
        assert word in str(failure.value)


@pytest.mark.parametrize("plan", ["wrapped", "raw"])
def test_the_number_of_concepts_must_be_that_of_the_scores(tmp_path: Path, plan: str) -> None:
    """Else every answer would have the wrong name."""
    folder = write_pixels(tmp_path / "b", pixel_model(5), concepts=4, plan=plan)
    if plan == "wrapped":
        with pytest.raises(BundleInvalid, match=r"shape \['\?', 5\], but the bundle lists 4 concepts"):
            planned(folder)


def test_an_output_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With those there are."""
    folder = write_pixels(tmp_path / "b", pixel_model(5), scores={"output": "probs", "activation": "none"})
    with pytest.raises(BundleInvalid, match=r"no output 'probs' \(onnx\.scores\.output\); it has 'scores'"):
        planned(folder)


def test_scores_must_be_floating_point(tmp_path: Path) -> None:
    """Labels are not scores."""
    folder = write_pixels(tmp_path / "b", pixel_model(5, result=TensorProto.INT64))
    with pytest.raises(BundleInvalid, match="'scores' does not hold floating point scores"):
        planned(folder)


def test_a_second_input_is_refused_by_name(tmp_path: Path) -> None:
    """Nobody could feed it."""
    model = pixel_model(5)
    model.graph.input.append(helper.make_tensor_value_info("im_shape", TensorProto.FLOAT, ["batch", 2]))
    with pytest.raises(BundleInvalid, match="more inputs than the image: im_shape; serve it as raw tensors"):
        planned(write_pixels(tmp_path / "b", model))


def test_an_unknown_number_of_scores_needs_concepts(tmp_path: Path) -> None:
    """The graph does not say, and neither does the bundle."""
    model = pixel_model(5)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    with pytest.raises(BundleInvalid, match=r"list the concepts in config\.yaml"):
        planned(write_pixels(tmp_path / "a", model, concepts=0))
    check(write_pixels(tmp_path / "b", model, concepts=5), "softmax", {})


def test_a_file_that_is_not_onnx_is_named(tmp_path: Path) -> None:
    """Garbage, nothing, or half of a graph."""
    whole = pixel_model(5).SerializeToString()
    for number, content in enumerate((b"not a graph at all", b"", whole[: len(whole) // 2])):
        folder = write_pixels(tmp_path / str(number), pixel_model(5))
        (folder / "1" / "model.onnx").write_bytes(content)
        with pytest.raises(BundleInvalid, match=r"model\.onnx is not an ONNX model"):
            planned(folder)


def test_an_operator_of_a_custom_library_is_refused_by_name(tmp_path: Path) -> None:
    """Loading a library is running a stranger's code."""
    with pytest.raises(BundleInvalid, match=r"example\.custom::Magic needs a custom library"):
        planned(graphs.write_raw(tmp_path / "b", graphs.custom_op_model()))


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["weights.bin", "deep/er/weights.bin", "./weights.bin"])
def test_weights_beside_the_graph_stay_where_they_are(tmp_path: Path, location: str) -> None:
    """The wrapped graph is small: it refers to the bundle's file."""
    model = pixel_model(50)
    data = graphs.store_outside(model.graph.initializer[0], location)
    folder = write_pixels(tmp_path / "b", model, concepts=50)
    target = folder / "1" / location
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    plan = planned(folder)[3]
    assert plan.model is not None
    assert len(plan.model) < len(data) / 4
    assert plan.weights == {location: data}
    check(folder, "softmax", {})


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_weights_in_the_graph_s_file_stay_there(tmp_path: Path, kind: int, ir_version: int) -> None:
    """Of a file that holds all, the graph alone is wrapped; it refers to the bytes of that file."""
    content = pixel_model(50, dtype=kind, opset=10, ir_version=ir_version, listed=True)
    folder = write_pixels(tmp_path / "b", content, concepts=50)
    plan = planned(folder)[3]
    assert plan.model is not None
    assert len(plan.model) < content.ByteSize() / 4
    assert plan.weights == {"model.onnx": content.SerializeToString()}
    check(folder, "softmax", {}, np.float16 if kind == TensorProto.FLOAT16 else np.float32, 2e-3)


def test_the_file_may_change_once_the_plan_is_made(tmp_path: Path) -> None:
    """What is loaded is what was read, and what runs is what was loaded: nobody looks at the files again."""
    folder = write_pixels(tmp_path / "b", pixel_model(50), concepts=50)
    before = opened(folder).session.run([plans.SCORES], {plans.IMAGE: pictures()})[0]
    plan = planned(folder)[3]
    (folder / "1" / "model.onnx").write_bytes(b"")
    assert plan.model is not None
    session = Session(plan.model, plan.file.parent, CPU, 1, weights=plan.weights)
    np.testing.assert_array_equal(session.run([plans.SCORES], {plans.IMAGE: pictures()})[0], before)


def test_a_file_with_weights_may_be_cut_off_while_it_is_served(tmp_path: Path) -> None:
    """Copying a new file over the old one does that. A mapped file would end the process with SIGBUS here."""
    table = np.random.default_rng(0).random((5000, 64)).astype(np.float32)
    model = graphs.make(
        [helper.make_node("Gather", ["table", "index"], ["y"])],
        {"index": (TensorProto.INT64, ["n"])},
        {"y": (TensorProto.FLOAT, ["n", 64])},
        {"table": table},
    )
    data = graphs.store_outside(model.graph.initializer[0], "weights.bin")
    folder = graphs.write_raw(tmp_path / "b", model)
    weights = folder / "1" / "weights.bin"
    weights.write_bytes(data)
    session = opened(folder).session
    assert str(weights) not in Path("/proc/self/maps").read_text()
    os.truncate(weights, 0)
    np.testing.assert_array_equal(session.run(["y"], {"index": np.array([4999])})[0], table[[4999]])


def test_weights_of_a_branch_may_lie_outside_too(tmp_path: Path) -> None:
    """Wherever in the graph a tensor stands."""
    tensor = numpy_helper.from_array(np.full(3, 4.0, np.float32), "one")
    data = graphs.store_outside(tensor, "branch.bin")
    folder = graphs.write_raw(tmp_path / "b", graphs.if_model(tensor))
    (folder / "1" / "branch.bin").write_bytes(data)
    bundle = opened(folder)
    assert bundle.plan.weights == {"branch.bin": data}
    assert bundle.session.run(["y"], {"x": np.zeros((1, 3), np.float32)})[0].tolist() == [[4.0, 4.0, 4.0]]


def test_weights_beside_a_raw_graph_are_found(tmp_path: Path) -> None:
    """Without a wrapping too."""
    bundle = opened(graphs.write_external(tmp_path / "b"))
    assert bundle.session.run(["y"], {"x": np.zeros((1, 3), np.float32)})[0].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("location", ["../../secret.bin", "/etc/hostname", "a/../../../secret.bin", ""])
def test_weights_outside_the_bundle_are_refused(tmp_path: Path, location: str) -> None:
    """A graph must not read the machine's files."""
    (tmp_path / "secret.bin").write_bytes(b"\0" * 12)
    folder = graphs.write_raw(tmp_path / "b", graphs.external_data_model(location))
    with pytest.raises(BundleInvalid, match="outside the bundle"):
        planned(folder)


def test_a_link_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    """Weights or the graph itself."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\0" * 12)
    folder = graphs.write_raw(tmp_path / "b", graphs.external_data_model("weights.bin"))
    (folder / "1" / "weights.bin").symlink_to(secret)
    with pytest.raises(BundleInvalid, match="leads out of the bundle"):
        planned(folder)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """Somebody copied only the graph."""
    with pytest.raises(BundleInvalid, match=r"weights\.bin is missing"):
        planned(graphs.write_raw(tmp_path / "b", graphs.external_data_model("weights.bin")))


# ---- the cache -------------------------------------------------------------------------------------------------------


def replanned(folder: Path, cache: FileCache, **config: Any) -> plans.Plan:
    """The bundle's plan, made with a cache; `config` replaces fields of its section."""
    made, version, concepts, _ = planned(folder)
    made = replace(made, onnx=made.onnx.model_copy(update=config))
    return plans.make_plan(folder, made, version, len(concepts), cache)


@pytest.fixture
def wraps(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were wrapped, rather than found wrapped."""
    found: list[Path] = []
    original = plans._made

    def made(bundle: Path, file: Path, *rest: Any) -> Any:
        found.append(file)
        return original(bundle, file, *rest)

    monkeypatch.setattr(plans, "_made", made)
    return found


@pytest.mark.parametrize("plan", ["wrapped", "raw"])
def test_a_graph_is_wrapped_once(tmp_path: Path, wraps: list[Path], plan: str) -> None:
    """The second time it comes from the cache, equal in all it says; without its weights, which come from the file."""
    folder = write_pixels(tmp_path / "b", pixel_model(50), concepts=50, plan=plan)
    first = replanned(folder, FileCache(tmp_path / "cache", 10**6))
    wraps.clear()
    second = plans.make_plan(folder, *planned_parts(folder), FileCache(tmp_path / "cache", 10**6))
    assert wraps == []
    for name in plans.Plan.__dataclass_fields__:
        assert getattr(second, name) == getattr(first, name), name
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.stat().st_size < len(second.weights["model.onnx"]) / 2


def planned_parts(folder: Path) -> tuple[Any, Any, int]:
    config, _, _ = read_config(folder, "u", "a")
    assert config is not None
    version = find_versions(folder, config.onnx.file)[0]
    return config, version, len(concepts_of(config, version))


def test_what_the_graph_depends_on_makes_another_entry(tmp_path: Path, wraps: list[Path]) -> None:
    """The file's content, and every word of the config about it; not those that the engine reads."""
    cache = FileCache(tmp_path / "cache", 10**6)
    folder = write_pixels(tmp_path / "b", pixel_model(50), concepts=50)
    section = planned(folder)[0].onnx
    assert section.image is not None
    assert section.scores is not None
    keys = {replanned(folder, cache).key}
    wraps.clear()
    keys.add(replanned(folder, cache, device="cpu", batching=Batching(max_rows=3)).key)
    assert len(wraps) == 1  # `planned` itself, without a cache
    changes = [
        {"plan": "raw"},
        {"image": section.image.model_copy(update={"mean": (0.1,)})},
        {"scores": section.scores.model_copy(update={"activation": "none"})},
    ]
    for change in changes:
        keys.add(replanned(folder, cache, **change).key)
    model = pixel_model(50)
    content = bytearray(model.SerializeToString())
    content[content.index(model.graph.initializer[0].raw_data) + 7] ^= 1
    (folder / "1" / "model.onnx").write_bytes(content)
    keys.add(replanned(folder, cache).key)
    assert len(keys) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_weights_outside_are_part_of_the_key(tmp_path: Path) -> None:
    """What was measured with other weights says nothing about these."""
    folder = graphs.write_external(tmp_path / "b")
    cache = FileCache(tmp_path / "cache", 10**6)
    before = replanned(folder, cache).key
    assert replanned(folder, cache).key == before
    (folder / "1" / "weights.bin").write_bytes(b"\1" * 12)
    assert replanned(folder, cache).key != before


def test_a_link_out_of_the_bundle_is_refused_from_the_cache_too(tmp_path: Path) -> None:
    """The graph is the same; where its weights lie is looked at every time."""
    folder = graphs.write_external(tmp_path / "b")
    cache = FileCache(tmp_path / "cache", 10**6)
    parts = planned_parts(folder)
    plans.make_plan(folder, *parts, cache)
    weights = folder / "1" / "weights.bin"
    weights.rename(tmp_path / "secret.bin")
    weights.symlink_to(tmp_path / "secret.bin")
    with pytest.raises(BundleInvalid, match="leads out of the bundle"):
        plans.make_plan(folder, *parts, cache)


def test_an_entry_that_says_something_else_is_made_again(tmp_path: Path) -> None:
    """Whole, but not what we write: of a version of ours that wrote it otherwise, say."""
    cache = FileCache(tmp_path / "cache", 10**6)
    folder = write_pixels(tmp_path / "b", pixel_model(50), concepts=50)
    first = replanned(folder, cache)
    (entry,) = (tmp_path / "cache").iterdir()
    for content in (b"", b"{}\n", b"[]\nx", b"no json\nx", b'{"plan": {}, "outside": []}\n'):
        cache.put(entry.name, content)
        assert replanned(folder, cache).described() == first.described()


# ---- its description -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_pixels(folder, pixel_model(5)),
        lambda folder: write_pixels(folder, pixel_model(5, dtype=TensorProto.FLOAT16, batch=1), plan="raw"),
        graphs.write_text_embedder,
        lambda folder: graphs.write_raw(folder, graphs.dynamic_quantize_model()),
        lambda folder: graphs.write_raw(folder, graphs.no_batch_axis_model()),
        lambda folder: graphs.write_raw(folder, graphs.string_model()),
        lambda folder: graphs.write_raw(folder, graphs.identity_model(dtype=TensorProto.BFLOAT16)),
    ],
    ids=["wrapped", "raw half precision", "pooled", "mixes rows", "no axes", "strings", "bfloat16"],
)
def test_what_a_plan_says_of_itself_survives_json(tmp_path: Path, write: Any) -> None:
    """A process without the graph makes its tasks of it: all there is, in plain data, but the graph."""
    plan = planned(write(tmp_path / "b"))[3]
    again = plans.Plan.of(json.loads(json.dumps(plan.described())))
    assert again.model is None
    for name in plans.Plan.__dataclass_fields__:
        if name not in ("model", "weights"):
            assert getattr(again, name) == getattr(plan, name), name


@pytest.mark.parametrize("content", [{}, [], {"file": 1}])
def test_what_is_no_description_is_refused(content: Any) -> None:
    """By one of three errors that whoever reads a stored one expects."""
    with pytest.raises((KeyError, TypeError, ValueError)):
        plans.Plan.of(content)


# ---- operators that mix rows -----------------------------------------------------------------------------------------


def test_an_operator_that_mixes_rows_is_named(tmp_path: Path) -> None:
    """The reason shows in `models inspect`."""
    plan = planned(graphs.write_raw(tmp_path / "b", graphs.dynamic_quantize_model()))[3]
    assert plan.mixes_rows == "the operator DynamicQuantizeLinear takes one scale over all rows of a batch"


def test_an_operator_that_mixes_rows_is_found_in_a_branch(tmp_path: Path) -> None:
    """The probes may never take that branch."""
    model = graphs.if_model()
    branch = model.graph.node[0].attribute[0].g
    branch.node.insert(0, helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]))
    branch.node.insert(1, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x8"]))
    branch.node[2].input[0] = "x8"
    plan = planned(graphs.write_raw(tmp_path / "b", model))[3]
    assert "DynamicQuantizeLinear" in plan.mixes_rows


def test_an_ordinary_graph_mixes_nothing(tmp_path: Path) -> None:
    """As far as its operators say."""
    assert planned(write_pixels(tmp_path / "b", pixel_model(5)))[3].mixes_rows == ""
