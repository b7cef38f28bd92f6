"""Bundles that do not say what they are: understood from the files beside them, else raw tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto, TensorProto, helper
from support import graphs

from appliance.catalog import bundle as bundles
from appliance.catalog.bundle import RAW_TYPE, BundleConfig
from appliance.catalog.importer import infer_config
from appliance.core.errors import BundleInvalid
from appliance.core.types import Concept, ModelKey

PREPROCESSOR = {
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 0.5,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}
LABELS = {"id2label": {"0": "cat", "1": "dog"}}


def understood(folder: Path, model: ModelProto, *, config: dict[str, Any] | None = None, **files: Any) -> BundleConfig:
    """What the importer makes of a bundle; `config_json` is config.json, dicts are written as JSON."""
    named = {
        name.replace("__", "/").replace("_json", ".json").replace("_txt", ".txt"): json.dumps(content)
        if isinstance(content, dict)
        else content
        for name, content in files.items()
    }
    named = {name.replace("Pooling", "1_Pooling"): content for name, content in named.items()}
    graphs.write_bundle(folder, model, config, files=named)
    _, section, concepts = bundles.read_config(folder, "owner", "app")
    (version,) = bundles.find_versions(folder)
    return infer_config(folder, version, section, concepts, "owner", "app")


def read_back(folder: Path, config: BundleConfig) -> BundleConfig:
    """The config after it was frozen into the bundle, as `appliance models add` does."""
    (folder / "config.yaml").write_text(bundles.as_yaml(config), encoding="utf-8")
    again, _, _ = bundles.read_config(folder, "other", "other")
    assert again is not None
    return again


def raw(config: BundleConfig) -> bool:
    return config.model_type_id == RAW_TYPE and config.onnx.image is None and config.onnx.text is None


# ---- texts -----------------------------------------------------------------------------------------------------------

TOKENIZER = graphs.make_tokenizer().to_str()


def test_a_transformers_folder_with_labels_is_a_text_classifier(tmp_path: Path) -> None:
    config = understood(
        tmp_path / "b",
        graphs.text_classifier_model(2),
        tokenizer_json=TOKENIZER,
        config_json={**LABELS, "max_position_embeddings": 128},
    )
    assert config.key == ModelKey("owner", "app", "b")
    assert config.model_type_id == "text-classifier"
    assert config.concepts == (Concept("cat", "cat"), Concept("dog", "dog"))
    assert config.onnx.text is not None
    assert config.onnx.text.max_tokens == 128
    assert (config.onnx.text.inputs.ids, config.onnx.text.inputs.mask, config.onnx.text.inputs.types) == (
        "input_ids",
        "attention_mask",
        None,
    )
    assert config.onnx.scores is not None
    assert (config.onnx.scores.output, config.onnx.scores.activation) == ("logits", "softmax")
    assert "a text classifier with 2 concepts" in config.sentence
    assert read_back(tmp_path / "b", config).onnx == config.onnx


def test_several_labels_at_once_means_sigmoid(tmp_path: Path) -> None:
    config = understood(
        tmp_path / "b",
        graphs.text_classifier_model(2),
        tokenizer_json=TOKENIZER,
        config_json={**LABELS, "problem_type": "multi_label_classification"},
    )
    assert config.onnx.scores is not None
    assert config.onnx.scores.activation == "sigmoid"


@pytest.mark.parametrize(("mode", "pooling"), [("pooling_mode_mean_tokens", "mean"), ("pooling_mode_cls_token", "cls")])
def test_a_sentence_transformers_folder_is_a_text_embedder(tmp_path: Path, mode: str, pooling: str) -> None:
    config = understood(
        tmp_path / "b", graphs.text_hidden_model(), tokenizer_json=TOKENIZER, Pooling__config_json={mode: True}
    )
    assert config.model_type_id == "text-embedder"
    assert config.onnx.embedding is not None
    assert config.onnx.embedding.pooling == pooling
    assert pooling in config.sentence
    again = read_back(tmp_path / "b", config)
    assert (again.onnx, again.key) == (config.onnx, config.key)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_json": TOKENIZER},  # nothing says how to pool
        {"Pooling__config_json": {"pooling_mode_mean_tokens": True}},  # no tokenizer
        {"tokenizer_json": TOKENIZER, "Pooling__config_json": {"pooling_mode_max_tokens": True}},
        {"tokenizer_json": TOKENIZER, "Pooling__config_json": "broken"},
    ],
)
def test_texts_stay_raw_tensors_when_something_is_not_said(tmp_path: Path, files: dict[str, Any]) -> None:
    config = understood(tmp_path / "b", graphs.text_hidden_model(), **files)
    assert raw(config)
    assert "raw tensors" in config.sentence


def test_more_labels_than_scores_is_not_a_classifier(tmp_path: Path) -> None:
    config = understood(tmp_path / "b", graphs.text_classifier_model(3), tokenizer_json=TOKENIZER, config_json=LABELS)
    assert raw(config)


@pytest.mark.parametrize("limit", ["many", -1, 0, None, [], 1e9, 10**9, {}])
def test_an_odd_length_is_the_usual_one(tmp_path: Path, limit: object) -> None:
    config = understood(
        tmp_path / "b",
        graphs.text_classifier_model(2),
        tokenizer_json=TOKENIZER,
        config_json={**LABELS, "max_position_embeddings": limit},
    )
    assert config.onnx.text is not None
    assert config.onnx.text.max_tokens == 512


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_preprocessor_config_says_how_a_picture_is_made(tmp_path: Path) -> None:
    config = understood(
        tmp_path / "b", graphs.image_classifier_model(2), preprocessor_config_json=PREPROCESSOR, config_json=LABELS
    )
    assert config.model_type_id == "visual-classifier"
    image = config.onnx.image
    assert image is not None
    assert (image.size, image.resize, image.interpolation, image.layout) == ((8, 8), "stretch", "bicubic", "nchw")
    assert (image.scale, image.mean, image.std) == (0.5, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert [concept.id for concept in config.concepts] == ["cat", "dog"]
    assert read_back(tmp_path / "b", config).onnx == config.onnx


def test_a_centre_crop_is_taken_over(tmp_path: Path) -> None:
    made = {
        **PREPROCESSOR,
        "size": {"shortest_edge": 10},
        "do_center_crop": True,
        "crop_size": {"height": 8, "width": 8},
    }
    config = understood(
        tmp_path / "b", graphs.image_classifier_model(2), preprocessor_config_json=made, config_json=LABELS
    )
    assert config.onnx.image is not None
    assert (config.onnx.image.resize, config.onnx.image.resize_shorter) == ("crop", 10)


def test_without_normalisation_pixels_are_only_scaled(tmp_path: Path) -> None:
    made = {**PREPROCESSOR, "do_normalize": False, "do_rescale": False}
    config = understood(
        tmp_path / "b", graphs.image_classifier_model(2), preprocessor_config_json=made, config_json=LABELS
    )
    image = config.onnx.image
    assert image is not None
    assert (image.scale, image.mean, image.std) == (1.0, (0.0,), (1.0,))


@pytest.mark.parametrize("operator", ["Softmax", "Sigmoid"])
def test_a_graph_that_ends_in_probabilities_gets_no_second_activation(tmp_path: Path, operator: str) -> None:
    config = understood(
        tmp_path / "b",
        graphs.image_classifier_model(2, ends_in=operator),
        preprocessor_config_json=PREPROCESSOR,
        labels_txt="cat\ndog\n",
    )
    assert config.onnx.scores is not None
    assert config.onnx.scores.activation == "none"


def test_a_uint8_graph_makes_its_own_picture(tmp_path: Path) -> None:
    model = graphs.image_classifier_model(2, layout="nhwc", dtype=TensorProto.UINT8)
    config = understood(tmp_path / "b", model, labels_txt="cat\ndog\n")
    assert config.onnx.image is not None
    assert (config.onnx.image.layout, config.onnx.image.size) == ("nhwc", (8, 8))


def test_an_output_called_embedding_is_the_vector(tmp_path: Path) -> None:
    folder = graphs.write_image_embedder(tmp_path / "b")
    (folder / "config.yaml").unlink()
    (folder / "1" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (version,) = bundles.find_versions(folder)
    assert infer_config(folder, version, None, (), "o", "a").model_type_id == "visual-embedder"


def test_a_picture_whose_normalisation_nobody_says_stays_raw_tensors(tmp_path: Path) -> None:
    config = understood(tmp_path / "b", graphs.image_classifier_model(2), config_json=LABELS)
    assert raw(config)
    assert "how they are normalised" in config.sentence
    assert "an onnx section in config.yaml can say more" in config.sentence


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"shortest_edge": 10}},
        {"size": "big"},
        {"size": None},
        {"size": {"height": "x", "width": 8}},
        {"size": {"height": 0, "width": 8}},
        {"size": {"height": 10**9, "width": 8}},
        {"image_mean": [0.1, 0.2]},
        {"image_mean": "grey"},
        {"image_std": [0, 1, 1]},
        {"rescale_factor": "half"},
        {"rescale_factor": None},
        {"size": {"shortest_edge": 4}, "do_center_crop": True, "crop_size": 8},
    ],
)
def test_a_preprocessor_config_that_makes_no_sense_stays_raw_tensors(tmp_path: Path, change: dict[str, Any]) -> None:
    made = {**PREPROCESSOR, **change}
    config = understood(
        tmp_path / "b", graphs.image_classifier_model(2), preprocessor_config_json=made, config_json=LABELS
    )
    assert raw(config)


@pytest.mark.parametrize("resample", [True, 1.0, 2.5, "3", -1, 6, [], None, {}])
def test_an_odd_filter_number_is_no_traceback(tmp_path: Path, resample: object) -> None:
    made = {**PREPROCESSOR, "resample": resample}
    assert understood(
        tmp_path / "b", graphs.image_classifier_model(2), preprocessor_config_json=made, config_json=LABELS
    )


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "\x00", "[" * 100_000])
def test_files_beside_the_model_that_are_not_json_say_nothing(tmp_path: Path, content: str) -> None:
    config = understood(
        tmp_path / "b", graphs.image_classifier_model(2), preprocessor_config_json=content, config_json=content
    )
    assert raw(config)


@pytest.mark.parametrize("bad", ["\ud800", "\x1b[31m", "a\nb"])
def test_a_label_that_nothing_could_show_is_refused_with_its_key(tmp_path: Path, bad: str) -> None:
    with pytest.raises(BundleInvalid, match=r"config\.json: id2label\.1 holds"):
        understood(
            tmp_path / "b",
            graphs.image_classifier_model(2),
            preprocessor_config_json=PREPROCESSOR,
            config_json={"id2label": {"0": "cat", "1": bad}},
        )


@pytest.mark.parametrize("labels", [{"0": "a", "2": "b"}, {"1": "a", "2": "b"}, ["a", "b"], {"a": 0}, {}])
def test_labels_that_do_not_count_from_zero_are_no_labels(tmp_path: Path, labels: object) -> None:
    config = understood(
        tmp_path / "b",
        graphs.image_classifier_model(2),
        preprocessor_config_json=PREPROCESSOR,
        config_json={"id2label": labels},
    )
    assert raw(config)


# ---- everything else -------------------------------------------------------------------------------------------------


def test_any_other_graph_is_raw_tensors_with_a_sentence(tmp_path: Path) -> None:
    config = understood(tmp_path / "b", graphs.two_in_two_out_model())
    assert raw(config)
    assert config.sentence.startswith("Understood without an onnx section as raw tensors, arrays in and out")
    assert read_back(tmp_path / "b", config).onnx == config.onnx


def test_a_clarifai_folder_keeps_its_name_owner_and_concepts(tmp_path: Path) -> None:
    config = understood(
        tmp_path / "b",
        graphs.image_classifier_model(2),
        config={
            "model": {"id": "m", "user_id": "u", "app_id": "a", "name": "Name", "description": "What it is."},
            "concepts": [{"id": "1", "name": "one"}, {"id": "2", "name": "two"}],
        },
        preprocessor_config_json=PREPROCESSOR,
    )
    assert config.key == ModelKey("u", "a", "m")
    assert (config.name, config.description) == ("Name", "What it is.")
    assert [concept.name for concept in config.concepts] == ["one", "two"]


def test_clarifais_compute_info_is_kept(tmp_path: Path) -> None:
    config = understood(
        tmp_path / "b",
        graphs.identity_model(),
        config={"model": {"id": "m"}, "inference_compute_info": {"cpu_limit": "1"}},
    )
    assert config.compute == {"cpu_limit": "1"}
    assert read_back(tmp_path / "b", config).compute == {"cpu_limit": "1"}


def test_a_model_in_clarifais_checkpoints_folder_is_found_again(tmp_path: Path) -> None:
    folder = graphs.write_bundle(tmp_path / "b", graphs.identity_model(), None, file="checkpoints/model.onnx")
    (version,) = bundles.find_versions(folder)
    config = infer_config(folder, version, None, (), "o", "a")
    again = read_back(folder, config)
    assert [v.model_file for v in bundles.find_versions(folder, again.onnx.file)] == [version.model_file]


def test_a_bare_file_is_named_after_itself(tmp_path: Path) -> None:
    (tmp_path / "net-2.onnx").write_bytes(graphs.identity_model().SerializeToString())
    (version,) = bundles.find_versions(tmp_path / "net-2.onnx")
    config = infer_config(tmp_path / "net-2.onnx", version, None, (), "o", "a")
    assert (config.key, config.onnx.file) == (ModelKey("o", "a", "net-2"), "net-2.onnx")


def test_a_name_that_cannot_be_a_model_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match="cannot be a bundle's name"):
        understood(tmp_path / "my model", graphs.identity_model())


def test_a_graph_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = graphs.write_bundle(tmp_path / "b", b"nothing", None)
    (version,) = bundles.find_versions(folder)
    with pytest.raises(BundleInvalid):
        infer_config(folder, version, None, (), "o", "a")


def test_names_from_a_graph_cannot_write_lines_into_the_config(tmp_path: Path) -> None:
    """An output's name is a stranger's text, and the sentence goes into the config as a comment."""
    model = graphs.image_classifier_model(2, output="evil\nmodel: {id: other}\n#")
    config = understood(tmp_path / "b", model, preprocessor_config_json=PREPROCESSOR, config_json=LABELS)
    assert config.model_type_id == "visual-classifier"
    assert read_back(tmp_path / "b", config).key.model_id == "b"


def test_sequences_and_scalars_are_no_pictures(tmp_path: Path) -> None:
    model = graphs.identity_model()
    model.graph.output.append(helper.make_tensor_sequence_value_info("many", TensorProto.FLOAT, None))
    assert raw(understood(tmp_path / "b", model))
    assert raw(understood(tmp_path / "c", graphs.no_batch_axis_model()))
