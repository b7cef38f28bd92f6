"""Predictions over TLS with the raw Clarifai stub: order, limits, options, ids and status codes."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from google.protobuf import struct_pb2
from onnx import ModelProto, TensorProto, helper
from PIL import Image
from support import graphs, pictures
from support.appliance import MODELS, Appliance, Client, Pki, image_input, request_for, text_input

SAMPLES = sorted((MODELS / "digits" / "samples").glob("*.png"))
DIGIT = SAMPLES[0].read_bytes()
MANY = tuple(f"concept-{index:03d}" for index in range(300))


def with_config(
    request: service_pb2.PostModelOutputsRequest, place: str = "new", **config: object
) -> service_pb2.PostModelOutputsRequest:
    """The request with an output_config, in the place of today or in the deprecated one."""
    info = request.model.model_version.output_info if place == "new" else request.model.output_info
    info.output_config.CopyFrom(resources_pb2.OutputConfig(**config))
    return request


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Client]:
    """A client of an appliance whose classifier has 300 concepts, in two versions."""
    appliance = Appliance(tmp_path_factory.mktemp("wide"), pki)
    graphs.write_image_classifier(appliance.models / "wide", concepts=MANY)
    graphs.write_image_classifier(appliance.models / "wide", concepts=MANY, version="2")
    key = appliance.new_key()
    with appliance, Client(appliance.port(), pki.ca, key) as client:
        yield client


def wide_request(**options: str) -> service_pb2.PostModelOutputsRequest:
    """One random picture for the wide classifier."""
    return request_for("wide", [image_input(picture(3))], user="", app="", **options)


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A random PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def constant_scores(scores: list[float]) -> ModelProto:
    """A classifier that gives every picture these scores, to the bit."""
    zeros = np.zeros((3, len(scores)), np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "zeros"], ["nothing"]),
        helper.make_node("Add", ["nothing", "scores"], ["logits"]),
    ]
    return graphs.make(
        nodes,
        {"image": (TensorProto.FLOAT, ["batch", 3, 8, 8])},
        {"logits": (TensorProto.FLOAT, ["batch", len(scores)])},
        {"zeros": zeros, "scores": np.array(scores, np.float32)},
    )


def values(reply: service_pb2.MultiOutputResponse) -> list[float]:
    """The first output's values."""
    return [concept.value for concept in reply.outputs[0].data.concepts]


class TestBatches:
    def test_128_inputs_are_answered_in_order(self, client: Client) -> None:
        chosen = [SAMPLES[index * 7 % len(SAMPLES)] for index in range(128)]
        inputs = [image_input(path.read_bytes(), f"input-{index}") for index, path in enumerate(chosen)]
        reply = client.predict(request_for("digits", inputs))
        assert reply.status.code == StatusCode.SUCCESS
        assert [output.input.id for output in reply.outputs] == [f"input-{index}" for index in range(128)]
        assert {output.status.code for output in reply.outputs} == {StatusCode.SUCCESS}
        truth = [path.stem.rsplit("-", 1)[1] for path in chosen]
        assert [output.data.concepts[0].id for output in reply.outputs] == truth

    def test_129_inputs_are_refused_with_the_limit_named(self, client: Client) -> None:
        reply = client.predict(request_for("digits", [image_input(DIGIT)] * 129))
        assert reply.status.code == StatusCode.INPUT_OVER_LIMIT
        assert "128" in reply.status.details
        assert not reply.outputs

    def test_no_inputs_are_refused_with_the_limit_named(self, client: Client) -> None:
        reply = client.predict(request_for("digits", []))
        assert reply.status.code == StatusCode.INPUT_INVALID_REQUEST
        assert "128" in reply.status.details

    def test_every_output_has_an_id_a_time_and_the_model(self, client: Client) -> None:
        reply = client.predict(request_for("digits", [image_input(DIGIT)] * 2))
        first, second = reply.outputs
        assert len(first.id) == 32
        assert first.id != second.id
        assert first.created_at.seconds > 0
        assert (first.model.id, first.model.user_id, first.model.app_id) == ("digits", "appliance", "main")
        assert first.model.model_version.id == "1"
        assert first.model.model_version.status.code == StatusCode.MODEL_TRAINED
        assert len(first.input.id) == 32, "an input without an id gets one"

    def test_a_request_id_prefix_is_used(self, client: Client) -> None:
        metadata = (*client.metadata, ("x-clarifai-request-id-prefix", "sdk-python-12.5.0"))
        reply = client.stub.PostModelOutputs(request_for("digits", [image_input(DIGIT)]), metadata=metadata)
        assert reply.status.req_id.startswith("sdk-python-12.5.0-")

    def test_a_large_request_within_the_limit_is_served(self, client: Client) -> None:
        picture_of_noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture_of_noise).save(buffer, "BMP")
        reply = client.predict(request_for("digits", [image_input(buffer.getvalue())] * 8))
        assert reply.status.code == StatusCode.SUCCESS
        assert len(reply.outputs) == 8


class TestConcepts:
    def test_20_are_returned_unless_said_otherwise(self, wide: Client) -> None:
        reply = wide.predict(wide_request())
        assert len(values(reply)) == 20
        assert values(reply) == sorted(values(reply), reverse=True)

    @pytest.mark.parametrize(("asked", "given"), [(0, 20), (1, 1), (200, 200)])
    @pytest.mark.parametrize("place", ["new", "deprecated"])
    def test_max_concepts_is_read_from_both_places(self, wide: Client, asked: int, given: int, place: str) -> None:
        reply = wide.predict(with_config(wide_request(), place, max_concepts=asked))
        assert len(values(reply)) == given

    def test_201_concepts_are_refused_with_the_limit_named(self, wide: Client) -> None:
        reply = wide.predict(with_config(wide_request(), max_concepts=201))
        assert reply.status.code == StatusCode.MODEL_INVALID_ARGUMENT
        assert "200" in reply.status.details

    def test_min_value_is_compared_as_float32(self, tmp_path: Path, pki: Pki) -> None:
        """0.6 as float32 is 0.60000002384: a score of exactly that passes, which it would not as a Python double."""
        appliance = Appliance(tmp_path / "appliance", pki)
        model = constant_scores([0.6, 0.59999996, 0.7])
        graphs.write_image_classifier(
            appliance.models / "fixed", concepts=("at", "below", "above"), activation="none", model=model
        )
        with appliance, Client(appliance.port(), pki.ca, appliance.new_key()) as client:
            request = request_for("fixed", [image_input(picture(1))], user="", app="")
            reply = client.predict(with_config(request, min_value=0.6))
            assert [concept.id for concept in reply.outputs[0].data.concepts] == ["c-above", "c-at"]

    @pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
    def test_a_min_value_out_of_range_is_refused(self, client: Client, bad: float) -> None:
        reply = client.predict(with_config(request_for("digits", [image_input(DIGIT)]), min_value=bad))
        assert reply.status.code == StatusCode.MODEL_INVALID_ARGUMENT
        assert "min_value" in reply.status.details

    def test_concepts_are_selected_by_id_or_by_name(self, client: Client) -> None:
        wanted = [resources_pb2.Concept(id="7"), resources_pb2.Concept(name="three"), resources_pb2.Concept(id="7")]
        reply = client.predict(with_config(request_for("digits", [image_input(DIGIT)]), select_concepts=wanted))
        assert reply.status.code == StatusCode.SUCCESS
        assert {concept.id for concept in reply.outputs[0].data.concepts} == {"7", "3"}

    def test_selecting_only_unknown_concepts_is_refused(self, client: Client) -> None:
        wanted = [resources_pb2.Concept(id="cat")]
        reply = client.predict(with_config(request_for("digits", [image_input(DIGIT)]), select_concepts=wanted))
        assert reply.status.code == StatusCode.MODEL_INVALID_ARGUMENT
        assert "cat" in reply.status.details

    def test_selecting_some_unknown_concepts_is_a_mixed_status(self, client: Client) -> None:
        wanted = [resources_pb2.Concept(id="cat"), resources_pb2.Concept(id="1")]
        reply = client.predict(with_config(request_for("digits", [image_input(DIGIT)]), select_concepts=wanted))
        assert reply.status.code == StatusCode.MIXED_STATUS
        assert [concept.id for concept in reply.outputs[0].data.concepts] == ["1"]

    def test_a_selected_concept_beyond_the_best_200_is_found(self, wide: Client) -> None:
        everything = wide.predict(with_config(wide_request(), max_concepts=200))
        best = {concept.id for concept in everything.outputs[0].data.concepts}
        hidden = next(f"c-{name}" for name in MANY if f"c-{name}" not in best)
        wanted = [resources_pb2.Concept(id=hidden)]
        reply = wide.predict(with_config(wide_request(), select_concepts=wanted))
        assert [concept.id for concept in reply.outputs[0].data.concepts] == [hidden]


class TestModelsAndVersions:
    def test_a_version_is_found_by_its_id_and_the_newest_is_the_default(self, wide: Client) -> None:
        by_id = wide.predict(wide_request(version="1"))
        newest = wide.predict(wide_request())
        assert by_id.outputs[0].model.model_version.id == "1"
        assert newest.outputs[0].model.model_version.id == "2"

    @pytest.mark.parametrize(("model", "version"), [("nothing", ""), ("digits", "99")])
    def test_an_unknown_model_or_version_is_refused(self, client: Client, model: str, version: str) -> None:
        reply = client.predict(request_for(model, [image_input(DIGIT)], version=version))
        assert reply.status.code == StatusCode.MODEL_DOES_NOT_EXIST

    def test_a_place_that_is_not_this_one_is_refused(self, client: Client) -> None:
        request = request_for("digits", [image_input(DIGIT)])
        request.runner_selector.deployment.id = "elsewhere"
        assert client.predict(request).status.code == StatusCode.DEPLOYMENT_DOES_NOT_EXIST


class TestBadInputs:
    def test_each_has_its_own_status_and_neighbours_are_answered(self, client: Client) -> None:
        huge, bomb = b"\xff" * (20 * 2**20 + 1), pictures.bomb()
        bodies = [DIGIT, b"no image at all", b"", huge, bomb, DIGIT[:60], DIGIT]
        inputs = [image_input(body, f"input-{index}") for index, body in enumerate(bodies)]
        inputs.append(text_input("not a picture", "input-7"))
        inputs.append(resources_pb2.Input(id="input-8"))
        reply = client.predict(request_for("digits", inputs))
        assert reply.status.code == StatusCode.MIXED_STATUS
        assert [output.input.id for output in reply.outputs] == [f"input-{index}" for index in range(9)]
        codes = [output.status.code for output in reply.outputs]
        assert codes[0] == codes[6] == StatusCode.SUCCESS
        assert codes[1] == StatusCode.INPUT_UNSUPPORTED_FORMAT
        assert codes[2] == StatusCode.INPUT_INVALID_ARGUMENT
        assert codes[3] == codes[4] == StatusCode.INPUT_OVER_LIMIT
        assert codes[5] == StatusCode.INPUT_UNSUPPORTED_FORMAT
        assert codes[7] == codes[8] == StatusCode.INPUT_INVALID_ARGUMENT
        assert "20971520" in reply.outputs[3].status.details
        assert "85000000" in reply.outputs[4].status.details
        assert not any(reply.outputs[index].data.concepts for index in (1, 2, 3, 4, 5, 7, 8))

    def test_only_bad_inputs_are_a_failure(self, client: Client) -> None:
        reply = client.predict(request_for("digits", [image_input(b"x"), image_input(b"")]))
        assert reply.status.code == StatusCode.FAILURE
        assert len(reply.outputs) == 2

    def test_a_text_without_tokens_is_refused_and_its_neighbour_answered(self, client: Client) -> None:
        reply = client.predict(request_for("ml-topics", [text_input(""), text_input("lasso")]))
        assert [output.status.code for output in reply.outputs] == [
            StatusCode.INPUT_INVALID_ARGUMENT,
            StatusCode.SUCCESS,
        ]

    def test_a_url_is_refused_until_hosts_are_listed(self, client: Client) -> None:
        given = resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(url="file:///etc/passwd")))
        reply = client.predict(request_for("digits", [given, image_input(DIGIT)]))
        assert reply.outputs[0].status.code == StatusCode.INPUT_INVALID_URL
        assert reply.outputs[1].status.code == StatusCode.SUCCESS


class TestMethods:
    def test_a_pythonic_call_is_answered_in_the_return_part(self, client: Client) -> None:
        metadata = struct_pb2.Struct()
        metadata["_method_name"] = "predict"
        data = resources_pb2.Data(metadata=metadata)
        data.parts.add(id="image").data.image.base64 = DIGIT
        data.parts.add(id="max_concepts").data.int_value = 3
        reply = client.predict(request_for("digits", [resources_pb2.Input(data=data)]))
        part = reply.outputs[0].data.parts[0]
        assert part.id == "return"
        assert part.data.concepts[0].id == SAMPLES[0].stem.rsplit("-", 1)[1]
        assert len(part.data.concepts) == 3

    def test_generate_and_stream_answer_message_by_message(self, client: Client) -> None:
        request = request_for("ml-topics", [text_input("decision trees vote in a forest")])
        generated = list(client.stub.GenerateModelOutputs(request, metadata=client.metadata))
        assert len(generated) == 1
        streamed = list(client.stub.StreamModelOutputs(iter([request] * 3), metadata=client.metadata))
        assert len(streamed) == 3
        best = {reply.outputs[0].data.concepts[0].id for reply in [*generated, *streamed]}
        assert best == {"trees-ensembles"}
