"""The reading RPCs, signatures, other tasks than the shipped ones, deadlines, budgets and URL inputs, over TLS."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from google.protobuf import json_format, struct_pb2
from PIL import Image
from support import graphs, pictures
from support.appliance import MODELS, Appliance, Client, Pki, array_input, image_input, request_for, text_input

Make = Callable[..., Appliance]
IDS = resources_pb2.UserAppIDSet(user_id="appliance", app_id="main")
DIGIT = sorted((MODELS / "digits" / "samples").glob("*.png"))[0].read_bytes()
LISTS = {
    "ListModels": (service_pb2.ListModelsRequest, {}, "models", 2),
    "ListModelVersions": (service_pb2.ListModelVersionsRequest, {"model_id": "digits"}, "model_versions", 1),
    "ListModelConcepts": (service_pb2.ListModelConceptsRequest, {"model_id": "digits"}, "concepts", 10),
    "ListConcepts": (service_pb2.ListConceptsRequest, {}, "concepts", 19),
    "ListModelTypes": (service_pb2.ListModelTypesRequest, {}, "model_types", 5),
}


class TestReading:
    @pytest.mark.parametrize("rpc", sorted(LISTS))
    def test_lists_are_paged_and_past_the_end_there_is_only_a_status(self, client: Client, rpc: str) -> None:
        """Clients' listers ask for pages until one has nothing but a status (PROTOCOL 0.7)."""
        kind, fields, items, total = LISTS[rpc]
        whole = getattr(client.call(rpc, kind(user_app_id=IDS, **fields)), items)
        assert len(whole) == total
        seen = []
        for number in range(1, total + 2):
            reply = client.call(rpc, kind(user_app_id=IDS, page=number, per_page=1, **fields))
            assert reply.status.code == StatusCode.SUCCESS
            seen += [item.id for item in getattr(reply, items)]
        assert seen == [item.id for item in whole]
        assert [field.name for field, _ in reply.ListFields()] == ["status"]

    @pytest.mark.parametrize("version", ["", "1"])
    def test_a_model_is_read_with_or_without_a_version(self, client: Client, version: str) -> None:
        model = client.call(
            "GetModel", service_pb2.GetModelRequest(user_app_id=IDS, model_id="digits", version_id=version)
        ).model
        assert (model.id, model.user_id, model.app_id) == ("digits", "appliance", "main")
        assert model.model_type_id == "visual-classifier"
        assert model.model_version.id == "1"
        assert model.model_version.status.code == StatusCode.MODEL_TRAINED
        found = client.call(
            "GetModelVersion",
            service_pb2.GetModelVersionRequest(user_app_id=IDS, model_id="digits", version_id=version),
        ).model_version
        assert found.id == "1"
        assert found.method_signatures == model.model_version.method_signatures

    def test_concepts_are_told_in_the_place_of_today_and_in_the_deprecated_one(self, client: Client) -> None:
        request = service_pb2.GetModelRequest(user_app_id=IDS, model_id="digits")
        model = client.call("GetModelOutputInfo", request).model
        new, old = model.model_version.output_info, model.output_info
        assert [concept.id for concept in new.data.concepts] == [str(digit) for digit in range(10)]
        assert new.data.concepts == old.data.concepts

    def test_model_types_say_what_an_input_must_carry(self, client: Client) -> None:
        """The SDK takes the input type from `input_fields`, which must be exactly one word (PROTOCOL 2.1)."""
        for name, field in (("visual-classifier", "image"), ("text-classifier", "text")):
            request = service_pb2.GetModelTypeRequest(user_app_id=IDS, model_type_id=name)
            assert list(client.call("GetModelType", request).model_type.input_fields) == [field]
        request = service_pb2.GetModelTypeRequest(user_app_id=IDS, model_type_id="no-such-type")
        assert client.call("GetModelType", request).status.code == StatusCode.CONN_DOES_NOT_EXIST

    def test_the_caller_is_told_who_they_are_and_what_they_may(self, client: Client) -> None:
        me = client.call("GetUser", service_pb2.GetUserRequest(user_app_id={"user_id": "me"}))
        assert me.user.id == "appliance"
        scopes = client.call("MyScopes", service_pb2.MyScopesRequest())
        assert "Predict" in scopes.scopes
        assert "/clarifai.api.V2/PostModelOutputs" in scopes.endpoints

    def test_status_codes_are_listed_and_looked_up(self, client: Client) -> None:
        listed = client.call("ListStatusCodes", service_pb2.ListStatusCodesRequest())
        assert len(listed.statuses) > 400
        for wanted in ("21200", "MODEL_DOES_NOT_EXIST"):
            found = client.call("GetStatusCode", service_pb2.GetStatusCodeRequest(status_code_id=wanted))
            assert found.status.code == StatusCode.MODEL_DOES_NOT_EXIST
        unknown = client.call("GetStatusCode", service_pb2.GetStatusCodeRequest(status_code_id="1"))
        assert unknown.status.code == StatusCode.CONN_DOES_NOT_EXIST


class TestSignatures:
    def test_they_are_the_same_in_all_three_places(self, client: Client) -> None:
        request = service_pb2.GetModelVersionRequest(user_app_id=IDS, model_id="digits")
        published = client.call("GetModelVersion", request).model_version.method_signatures
        metadata = struct_pb2.Struct()
        metadata["_method_name"] = "_GET_SIGNATURES"
        data = resources_pb2.Data(metadata=metadata, parts=[resources_pb2.Part()])
        reply = client.predict(request_for("digits", [resources_pb2.Input(data=data)]))
        assert reply.status.code == StatusCode.SUCCESS
        told = json.loads(reply.outputs[0].data.text.raw)
        assert set(told) == {"predict"}
        parsed = json_format.ParseDict(told["predict"], resources_pb2.MethodSignature())
        assert parsed == published[0]

    def test_a_failing_question_for_them_has_one_output(self, client: Client) -> None:
        """The SDK reads outputs[0] of the error reply (PROTOCOL 2.2)."""
        metadata = struct_pb2.Struct()
        metadata["_method_name"] = "_GET_SIGNATURES"
        data = resources_pb2.Data(metadata=metadata, parts=[resources_pb2.Part()])
        reply = client.predict(request_for("nothing", [resources_pb2.Input(data=data)]))
        assert reply.status.code == StatusCode.MODEL_DOES_NOT_EXIST
        assert len(reply.outputs) == 1


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Client]:
    """A client of an appliance with a bundle of every task that no shipped bundle has."""
    appliance = Appliance(tmp_path_factory.mktemp("tasks"), pki)
    graphs.write_image_embedder(appliance.models / "image-embedder", normalize=True)
    graphs.write_text_embedder(appliance.models / "text-embedder")
    graphs.write_raw(appliance.models / "raw", graphs.identity_model())
    graphs.write_raw(appliance.models / "several", graphs.two_in_two_out_model())
    key = appliance.new_key()
    with appliance, Client(appliance.port(), pki.ca, key) as client:
        yield client


def ask(client: Client, model: str, *inputs: resources_pb2.Input) -> service_pb2.MultiOutputResponse:
    """Predict with a bundle whose owner does not matter."""
    return client.predict(request_for(model, list(inputs), user="", app=""))


def as_array(message: resources_pb2.NDArray) -> Any:
    """What an ndarray message holds."""
    return np.frombuffer(message.buffer, message.dtype).reshape(tuple(message.shape))


class TestOtherTasks:
    def test_an_image_embedder_gives_a_vector_of_length_one(self, tasks: Client) -> None:
        embedding = ask(tasks, "image-embedder", image_input(DIGIT)).outputs[0].data.embeddings[0]
        assert embedding.num_dimensions == len(embedding.vector) > 0
        assert np.linalg.norm(embedding.vector) == pytest.approx(1, abs=1e-5)

    def test_a_text_embedder_gives_each_text_the_same_vector_alone_and_in_a_batch(self, tasks: Client) -> None:
        texts = ["the quick fox", "good dog", "the lazy brown dog jumps over the red model " * 6]
        together = ask(tasks, "text-embedder", *map(text_input, texts))
        for text, output in zip(texts, together.outputs, strict=True):
            alone = ask(tasks, "text-embedder", text_input(text)).outputs[0].data.embeddings[0].vector
            np.testing.assert_allclose(output.data.embeddings[0].vector, alone, atol=1e-5)

    def test_raw_tensors_come_back_as_they_are_shaped(self, tasks: Client) -> None:
        row, batch = np.array([1, 2, 3], np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
        reply = ask(tasks, "raw", array_input(row), array_input(batch))
        assert reply.status.code == StatusCode.SUCCESS
        for given, output in zip((row, batch), reply.outputs, strict=True):
            np.testing.assert_array_equal(as_array(output.data.ndarray), given)

    def test_several_tensors_are_named_parts(self, tasks: Client) -> None:
        signature = tasks.call(
            "GetModelVersion", service_pb2.GetModelVersionRequest(model_id="several")
        ).model_version.method_signatures[0]
        data = resources_pb2.Data()
        for field in signature.input_fields:
            width = int(field.description.rsplit(" ", 1)[1].rstrip(")"))  # "float32 (?, 2)"
            array = array_input(np.ones((2, width), np.float32)).data.ndarray
            data.parts.add(id=field.name).data.ndarray.CopyFrom(array)
        reply = ask(tasks, "several", resources_pb2.Input(data=data))
        assert reply.status.code == StatusCode.SUCCESS, reply
        (returned,) = reply.outputs[0].data.parts  # parts came, so parts go: the method protocol
        assert returned.id == "return"
        names = {part.id for part in returned.data.parts}
        assert names == {field.name for field in signature.output_fields[0].type_args}

    def test_a_contradictory_array_is_that_inputs_error(self, tasks: Client) -> None:
        good = array_input(np.zeros(3, np.float32))
        bad = resources_pb2.Input()
        bad.CopyFrom(good)
        bad.data.ndarray.shape[:] = [2**31, 2**31]
        reply = ask(tasks, "raw", bad, good)
        assert [output.status.code for output in reply.outputs] == [
            StatusCode.INPUT_INVALID_ARGUMENT,
            StatusCode.SUCCESS,
        ]


class TestLimitsOfTheAppliance:
    @pytest.fixture
    def slow(self, make_appliance: Make) -> Appliance:
        """An appliance with a model that takes a while; not started."""
        made = make_appliance()
        graphs.write_raw(made.models / "slow", graphs.slow_model(rounds=100, width=512))
        made.key = made.new_key()
        return made

    SLOW = array_input(np.ones((128, 512), np.float32))

    def test_the_callers_deadline_is_kept(self, slow: Appliance, pki: Pki) -> None:
        with slow, Client(slow.port(), pki.ca, slow.key) as client:
            request = request_for("slow", [self.SLOW] * 30, user="", app="")
            with pytest.raises(grpc.RpcError) as error:
                client.stub.PostModelOutputs(request, metadata=client.metadata, timeout=0.5)
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            slow.wait(lambda: slow.admin("/status")["in_flight"] == 0, "the end of the call in the appliance")

    def test_a_caller_without_a_deadline_gets_the_appliances(self, slow: Appliance, pki: Pki) -> None:
        slow.write_config(limits={"request_timeout_s": 0.2})
        with slow, Client(slow.port(), pki.ca, slow.key) as client:
            with pytest.raises(grpc.RpcError) as error:
                client.stub.PostModelOutputs(
                    request_for("slow", [self.SLOW] * 30, user="", app=""), metadata=client.metadata
                )
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "deadline" in error.value.details()

    def test_a_full_queue_is_refused_at_once(self, slow: Appliance, pki: Pki) -> None:
        slow.write_config(engine={"queue_rows": 256})
        with slow, Client(slow.port(), pki.ca, slow.key) as client:
            reply = ask(client, "slow", *[self.SLOW] * 30)
            assert reply.status.code == StatusCode.MODEL_BUSY_PLEASE_RETRY
            assert "engine.queue_rows" in reply.status.details

    def test_over_the_memory_budget_is_refused_and_the_next_one_served(self, make_appliance: Make, pki: Pki) -> None:
        appliance = make_appliance("digits", limits={"memory_in_flight": "1MiB"})
        with appliance, Client(appliance.port(), pki.ca, appliance.new_key()) as client:
            reply = client.predict(request_for("digits", [image_input(b"x" * 2**21)]))
            assert reply.status.code == StatusCode.MODEL_BUSY_PLEASE_RETRY
            assert "limits.memory_in_flight" in reply.status.details
            assert client.predict(request_for("digits", [image_input(DIGIT)])).status.code == StatusCode.SUCCESS
            appliance.wait(lambda: "inference_appliance_memory_in_flight_bytes 0.0" in appliance.metrics())

    def test_memory_stays_near_the_budget_whatever_the_pictures_decode_to(self, make_appliance: Make, pki: Pki) -> None:
        """Small files of many pixels: 32 of 36 megapixels are 3.5 GB decoded, of which few are held at once."""
        appliance = make_appliance("digits", limits={"memory_in_flight": "600MiB"})
        picture = pictures.encoded(Image.new("RGB", (6000, 6000)), "PNG")
        with appliance, Client(appliance.port(), pki.ca, appliance.new_key()) as client:
            assert client.predict(request_for("digits", [image_input(DIGIT)])).status.code == StatusCode.SUCCESS
            reply = client.predict(request_for("digits", [image_input(picture)] * 32))
            assert reply.status.code == StatusCode.SUCCESS
            assert peak_memory(appliance) < 1000 * 2**20

    def test_a_body_without_credentials_is_not_read(self, make_appliance: Make, pki: Pki) -> None:
        """The refusal comes on the headers; a hundred MB behind them stay with the caller."""
        appliance = make_appliance("digits")
        body = request_for("digits", [image_input(b"x" * 100 * 2**20)])
        with appliance, Client(appliance.port(), pki.ca) as client:
            assert client.predict(body).status.code == StatusCode.CONN_INVALID_REQUEST
            assert peak_memory(appliance) < 300 * 2**20

    def test_a_listed_host_is_fetched_from(self, make_appliance: Make, pki: Pki) -> None:
        class Pictures(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(DIGIT)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            hosts = [f"127.0.0.1:{server.server_port}"]
            appliance = make_appliance("digits", urls={"hosts": hosts, "private_addresses": True})
            with appliance, Client(appliance.port(), pki.ca, appliance.new_key()) as client:
                url = f"http://127.0.0.1:{server.server_port}/digit.png"
                linked = resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(url=url)))
                reply = client.predict(request_for("digits", [linked, image_input(DIGIT)]))
                assert reply.status.code == StatusCode.SUCCESS, reply
                assert reply.outputs[0].data == reply.outputs[1].data
                assert reply.outputs[0].input.data.image.url == url
        finally:
            server.shutdown()
            server.server_close()


def peak_memory(appliance: Appliance) -> int:
    """The most memory that the daemon has had, bytes (`VmHWM`, proc(5))."""
    assert appliance.process is not None
    status = Path(f"/proc/{appliance.process.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
