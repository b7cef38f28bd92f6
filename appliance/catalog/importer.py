"""Bundles that do not say what they are: a Clarifai folder without an `onnx:` section, Triton's layout, a bare file.

The importer looks at the files beside the model, then at the graph's names, types and shapes, and writes down what it
found as the explicit config, with a sentence for the operator. Whatever stays ambiguous is served as raw tensors: how
a picture is normalised, say, is never guessed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto
from pydantic import ValidationError

from appliance.catalog.bundle import (
    RAW_TYPE,
    BundleConfig,
    ModelSection,
    OnnxSection,
    VersionFolder,
    check_labels,
    concepts_of,
    read_bytes,
)
from appliance.catalog.graph import axes, graph_inputs, read_graph
from appliance.core.config import said
from appliance.core.errors import BundleInvalid
from appliance.core.types import NAME_PATTERN, Concept, ModelKey

_TEXT_INPUTS = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "types"}
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's resampling filters by number, as preprocessor_config.json stores them (Pillow, Image.Resampling)."""

_EMBEDDING_NAME = re.compile(r"embed|pooler|feature", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Finding:
    """What a graph turned out to be."""

    model_type_id: str
    onnx: dict[str, Any]
    sentence: str
    concepts: tuple[Concept, ...] = ()


def infer_config(
    bundle: Path,
    version: VersionFolder,
    model: ModelSection | None,
    concepts: tuple[Concept, ...],
    user_id: str,
    app_id: str,
) -> BundleConfig:
    """The explicit config of a bundle that has no `onnx:` section.

    Args:    model, concepts: from its config.yaml, if it has one.
    Raises:  BundleInvalid: its name cannot be a model id, or its graph cannot be read.
    """
    identity = model.id if model else bundle.stem if bundle.is_file() else bundle.name
    if not NAME_PATTERN.fullmatch(identity):
        raise BundleInvalid(f"{bundle}: {identity!r} cannot be a model id; use letters, digits and . _ - inside.")
    graph = read_graph(bundle, version.model_file)
    blank = BundleConfig(ModelKey(user_id, app_id, identity), RAW_TYPE, identity, "", concepts, {}, OnnxSection())
    labels = concepts_of(blank, version) or _hf_labels(version)
    finding = _text(graph, version, labels) or _image(graph, version, labels) or _raw(graph)
    file = str(version.model_file.relative_to(version.path))
    try:
        section = OnnxSection.model_validate({"file": file, **finding.onnx})
    except ValidationError as error:
        reason = said(error.errors()[0])
        finding = _raw(graph, f"the files beside it ask for what cannot be done ({reason})")
        section = OnnxSection(file=file)
    return BundleConfig(
        key=ModelKey((model and model.user_id) or user_id, (model and model.app_id) or app_id, identity),
        model_type_id=finding.model_type_id,
        name=(model and model.name) or identity,
        description=model.description if model else "",
        concepts=finding.concepts,
        compute=model.inference_compute_info if model else {},
        onnx=section,
        sentence=f"Understood without an onnx section as {finding.sentence}.{_overruled(model, finding)}",
    )


def _overruled(model: ModelSection | None, finding: _Finding) -> str:
    """A sentence when the config names another model type than what was found."""
    declared = model.model_type_id if model else None
    if declared in (None, finding.model_type_id):
        return ""
    return f" Its config.yaml says {declared}, which takes an onnx section that says how to feed the graph."


def _text(graph: ModelProto, version: VersionFolder, labels: tuple[Concept, ...]) -> _Finding | None:
    """Graphs exported from transformers: token ids in, logits or hidden states out, a tokenizer beside them."""
    inputs = graph_inputs(graph)
    names = {value.name for value in inputs}
    integers = all(value.type.tensor_type.elem_type == TensorProto.INT64 for value in inputs)
    if "input_ids" not in names or names - set(_TEXT_INPUTS) or not integers:
        return None
    if not (version.path / "tokenizer.json").is_file():
        return None
    roles: dict[str, str | None] = {"ids": None, "mask": None, "types": None}
    roles.update({_TEXT_INPUTS[name]: name for name in names})
    limit = _json(version.path / "config.json").get("max_position_embeddings")
    limit = min(limit, 512) if isinstance(limit, int) and limit > 0 else 512
    text = {"tokenizer": "tokenizer.json", "max_tokens": limit, "inputs": roles}
    outputs = {value.name: axes(value) for value in graph.graph.output}
    for name, shape in outputs.items():
        if len(shape) == 2 and labels and shape[1] in (None, len(labels)) and not _EMBEDDING_NAME.search(name):
            activation = _activation(graph, version, name)
            return _Finding(
                "text-classifier",
                {"text": text, "scores": {"output": name, "activation": activation}},
                f"a text classifier with {len(labels)} concepts from the files beside it, {activation} on {name!r}",
                labels,
            )
    for name, shape in outputs.items():
        if len(shape) == 2 and _EMBEDDING_NAME.search(name):
            return _Finding(
                "text-embedder",
                {"text": text, "embedding": {"output": name}},
                f"a text embedder whose output {name!r} is the vector as it is",
            )
    pooling = _pooling(version)
    for name, shape in outputs.items():
        if len(shape) == 3 and pooling:
            return _Finding(
                "text-embedder",
                {"text": text, "embedding": {"output": name, "pooling": pooling}},
                f"a text embedder, {pooling} pooling of {name!r} as 1_Pooling/config.json says",
            )
    return None


def _image(graph: ModelProto, version: VersionFolder, labels: tuple[Concept, ...]) -> _Finding | None:
    """A picture in, with a preprocessor_config.json that says how to make it; or uint8, made by the graph itself."""
    inputs = graph_inputs(graph)
    if len(inputs) != 1 or len(axes(inputs[0])) != 4:
        return None
    shape = axes(inputs[0])
    layout = "nchw" if shape[1] in (1, 3) else "nhwc" if shape[3] in (1, 3) else ""
    if not layout:
        return None
    channels = shape[1] if layout == "nchw" else shape[3]
    image: dict[str, Any] = {"input": inputs[0].name, "layout": layout, "color": "grey" if channels == 1 else "rgb"}
    fixed = shape[2:] if layout == "nchw" else shape[1:3]
    made = _hf_image(_json(version.path / "preprocessor_config.json"))
    if made is not None:
        image |= made
    elif inputs[0].type.tensor_type.elem_type == TensorProto.UINT8 and None not in fixed:
        image |= {"size": fixed}
    else:
        return None
    for value in graph.graph.output:
        width = axes(value)
        if len(width) == 2 and labels and width[1] in (None, len(labels)):
            activation = _activation(graph, version, value.name)
            return _Finding(
                "visual-classifier",
                {"image": image, "scores": {"output": value.name, "activation": activation}},
                f"an image classifier with {len(labels)} concepts from the files beside it, {activation} on "
                f"{value.name!r}",
                labels,
            )
        if len(width) == 2 and not labels and _EMBEDDING_NAME.search(value.name):
            return _Finding(
                "visual-embedder",
                {"image": image, "embedding": {"output": value.name}},
                f"an image embedder whose output {value.name!r} is the vector as it is",
            )
    return None


def _raw(graph: ModelProto, why: str = "") -> _Finding:
    if not why:
        four_axes = any(len(axes(value)) == 4 for value in graph_inputs(graph))
        why = (
            "it may take pictures, but no preprocessor_config.json or onnx section says how they are normalised"
            if four_axes
            else "nothing says what its tensors mean"
        )
    return _Finding(
        RAW_TYPE, {}, f"raw tensors, arrays in and out ({why}); an onnx section in config.yaml can say more"
    )


def _activation(graph: ModelProto, version: VersionFolder, output: str) -> str:
    """ "none" when the graph ends in a softmax or sigmoid already."""
    last = next((node.op_type for node in graph.graph.node if output in node.output), "")
    if last in ("Softmax", "Sigmoid"):
        return "none"
    problem = _json(version.path / "config.json").get("problem_type")
    return "sigmoid" if problem == "multi_label_classification" else "softmax"


def _hf_labels(version: VersionFolder) -> tuple[Concept, ...]:
    path = version.path / "config.json"
    labels = _json(path).get("id2label")
    if not isinstance(labels, dict) or set(labels) != {str(index) for index in range(len(labels))}:
        return ()
    names = [str(labels[str(index)]) for index in range(len(labels))]
    return check_labels(tuple(Concept(name, name) for name in names), path, "id2label.")


def _hf_image(made: dict[str, Any]) -> dict[str, Any] | None:
    """preprocessor_config.json in our words; None when it does not fix the picture's size."""
    size, crop = made.get("size"), made.get("crop_size")
    resample = made.get("resample", 2)
    image: dict[str, Any] = {
        "interpolation": _FILTERS[resample] if isinstance(resample, int) and 0 <= resample < 6 else "bilinear",
        "scale": made.get("rescale_factor", 1 / 255) if made.get("do_rescale", True) else 1.0,
    }
    if made.get("do_normalize", True) and "image_mean" in made and "image_std" in made:
        image |= {"mean": made["image_mean"], "std": made["image_std"]}
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if not isinstance(size, dict):
        return None
    if {"height", "width"} <= set(size) and not made.get("do_center_crop"):
        return image | {"size": [size["height"], size["width"]], "resize": "stretch"}
    shorter = size.get("shortest_edge")
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if shorter and made.get("do_center_crop") and isinstance(crop, dict):
        return image | {"size": [crop["height"], crop["width"]], "resize": "crop", "resize_shorter": shorter}
    return None


def _pooling(version: VersionFolder) -> str:
    made = _json(version.path / "1_Pooling" / "config.json")
    if made.get("pooling_mode_mean_tokens"):
        return "mean"
    return "cls" if made.get("pooling_mode_cls_token") else ""


def _json(path: Path) -> dict[str, Any]:
    """What a file beside the model says; nothing when it is not there or not JSON.

    Raises: BundleInvalid: it is no regular file, cannot be read, or is too large.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
