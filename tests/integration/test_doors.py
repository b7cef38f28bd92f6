"""The other protocols on a real daemon's port: KServe V2 over both transports, its REST twin and OpenAI's surface."""

import json
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support import graphs
from support.appliance import PATIENCE_S, Appliance, Pki

from appliance.api import inference_pb2 as pb

Make = Callable[..., Appliance]
SERVICE = "inference.GRPCInferenceService"
OPENAI = "/v2/ext/openai/v1"


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, pki: Pki, transport: str) -> Iterator[Appliance]:
    """A running one with a raw model, a classifier of pictures and an embedder of texts."""
    made = Appliance(tmp_path_factory.mktemp("doors"), pki, transport=transport)
    graphs.write_raw(made.models / "same", graphs.identity_model(("batch", 3)))
    graphs.write_image_classifier(made.models / "colours")
    graphs.write_text_embedder(made.models / "sentence")
    made.key = made.new_key()
    with made:
        yield made


@pytest.fixture
def browser(appliance: Appliance, pki: Pki) -> Iterator[httpx.Client]:
    """An HTTP client with a key. grpcio serves no HTTP."""
    if appliance.transport == "grpcio":
        pytest.skip("grpcio serves no HTTP")
    with httpx.Client(
        verify=ssl.create_default_context(cafile=str(pki.ca)),
        base_url=f"https://localhost:{appliance.port()}",
        headers={"authorization": f"Bearer {appliance.key}"},
        timeout=PATIENCE_S,
    ) as made:
        yield made


@pytest.fixture
def channel(appliance: Appliance, pki: Pki) -> Iterator[grpc.Channel]:
    """A plain gRPC channel, without Clarifai's stub."""
    credentials = grpc.ssl_channel_credentials(pki.ca.read_bytes())
    sizes = [(f"grpc.max_{way}_message_length", 2**30) for way in ("send", "receive")]
    with grpc.secure_channel(f"localhost:{appliance.port()}", credentials, options=sizes) as made:
        yield made


def ask(channel: grpc.Channel, rpc: str, request: Any, key: str, timeout: float = PATIENCE_S) -> Any:
    """One unary call."""
    descriptor = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[rpc]
    call = channel.unary_unary(
        f"/{SERVICE}/{rpc}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=getattr(pb, descriptor.output_type.name).FromString,
    )
    return call(request, metadata=(("authorization", f"Key {key}"),) if key else (), timeout=timeout)


def infer_request(rows: int, model: str = "same") -> tuple[pb.ModelInferRequest, bytes]:
    """That many rows for the model that gives back what it gets."""
    data = np.arange(3 * rows, dtype=np.float32).tobytes()
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[data])
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 3])
    return request, data


class TestKserveOverGrpc:
    def test_health_for_everybody_all_else_with_a_key(self, appliance: Appliance, channel: grpc.Channel) -> None:
        assert ask(channel, "ServerLive", pb.ServerLiveRequest(), "").live
        assert ask(channel, "ServerReady", pb.ServerReadyRequest(), "").ready
        with pytest.raises(grpc.RpcError) as caught:
            ask(channel, "ModelInfer", infer_request(1)[0], "")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = ask(channel, "ModelMetadata", pb.ModelMetadataRequest(name="same"), appliance.key)
        assert list(metadata.inputs[0].shape) == [-1, 3]

    @pytest.mark.parametrize("rows", [1, 1_000_000])
    def test_tensors_of_any_size_come_back_as_they_went(
        self, appliance: Appliance, channel: grpc.Channel, rows: int
    ) -> None:
        request, data = infer_request(rows)
        reply = ask(channel, "ModelInfer", request, appliance.key)
        assert list(reply.outputs[0].shape) == [rows, 3]
        assert reply.raw_output_contents[0] == data

    def test_errors_are_statuses_with_a_sentence(self, appliance: Appliance, channel: grpc.Channel) -> None:
        request, _ = infer_request(2)
        request.inputs[0].shape[0] = 3
        for asked, status in ((request, "INVALID_ARGUMENT"), (infer_request(1, "nothing")[0], "NOT_FOUND")):
            with pytest.raises(grpc.RpcError) as caught:
                ask(channel, "ModelInfer", asked, appliance.key)
            assert caught.value.code().name == status
            assert caught.value.details()
            assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata())

    def test_a_stream_goes_on_after_a_bad_request(self, appliance: Appliance, channel: grpc.Channel) -> None:
        call = channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        requests = [infer_request(1)[0], infer_request(1, "nothing")[0], infer_request(2)[0]]
        metadata = (("authorization", f"Key {appliance.key}"),)
        replies = list(call(iter(requests), metadata=metadata, timeout=PATIENCE_S))
        assert [bool(reply.error_message) for reply in replies] == [False, True, False]
        assert replies[2].infer_response.raw_output_contents[0] == requests[2].raw_input_contents[0]

    def test_calls_are_counted_and_nothing_is_kept(self, appliance: Appliance, channel: grpc.Channel) -> None:
        name = 'inference_appliance_requests_total{code="10000",method="kserve.ModelInfer",model="same",version="1"}'
        before = appliance.metric(name)
        ask(channel, "ModelInfer", infer_request(1)[0], appliance.key)
        assert appliance.metric(name) == before + 1
        appliance.wait(lambda: appliance.metric("inference_appliance_memory_in_flight_bytes ") == 0, "an empty budget")

    def test_reflection_names_the_service(self, appliance: Appliance, pki: Pki) -> None:
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(pki.ca.read_bytes()),
            grpc.metadata_call_credentials(
                lambda context, done: done((("authorization", f"Key {appliance.key}"),), None)
            ),
        )
        with grpc.secure_channel(f"localhost:{appliance.port()}", credentials) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert SERVICE in database.get_services()
            file = database.FindFileContainingSymbol(SERVICE)
            assert "ModelInfer" in {method.name for method in file.service[0].method}


class TestKserveOverHttp:
    def test_a_large_tensor_in_binary_form(self, browser: httpx.Client) -> None:
        data = np.arange(3_000_000, dtype=np.float32).tobytes()
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": "x",
                        "datatype": "FP32",
                        "shape": [1_000_000, 3],
                        "parameters": {"binary_data_size": len(data)},
                    }
                ],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        answer = browser.post(
            "/kserve/v2/models/same/infer",
            content=header + data,
            headers={"inference-header-content-length": str(len(header))},
        )
        assert answer.status_code == 200
        assert answer.content[int(answer.headers["inference-header-content-length"]) :] == data

    def test_json_with_a_name_in_three_segments(self, browser: httpx.Client) -> None:
        content = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}
        answer = browser.post(f"/kserve/v2/models/{graphs.USER}/{graphs.APP}/same/versions/1/infer", json=content)
        assert answer.json()["outputs"][0]["data"] == [1, 2, 3]

    def test_a_stranger_is_refused_before_the_body_is_here(self, browser: httpx.Client) -> None:
        """It is larger than the window: whoever is not known cannot send it."""
        answer = browser.post("/kserve/v2/models/same/infer", content=bytes(2**20), headers={"authorization": "Key x"})
        assert answer.status_code == 401
        assert "error" in answer.json()


class TestOpenai:
    def test_embeddings(self, browser: httpx.Client) -> None:
        model = f"{graphs.USER}/{graphs.APP}/models/sentence"
        assert model in {entry["id"] for entry in browser.get(f"{OPENAI}/models").json()["data"]}
        answer = browser.post(f"{OPENAI}/embeddings", json={"model": model, "input": ["good", "bad model"]})
        assert answer.status_code == 200
        assert [len(entry["embedding"]) for entry in answer.json()["data"]] == [graphs.DIMENSIONS] * 2
        assert answer.json()["usage"]["total_tokens"] == 7

    def test_what_is_not_served_is_told_in_its_shape(self, browser: httpx.Client) -> None:
        answer = browser.post(f"{OPENAI}/chat/completions", json={"model": "x", "messages": []})
        assert answer.status_code == 404
        assert "no language models" in answer.json()["error"]["message"]


class TestStopping:
    def test_a_running_inference_is_finished_and_later_ones_are_sent_elsewhere(
        self, make_appliance: Make, pki: Pki, transport: str
    ) -> None:
        """The other doors are drained with the first one: a call in flight has its answer."""
        made = make_appliance()
        graphs.write_raw(made.models / "slow", graphs.slow_model(rounds=200, width=512))
        key = made.new_key()
        made.start()
        credentials = grpc.ssl_channel_credentials(pki.ca.read_bytes())
        with grpc.secure_channel(f"localhost:{made.port()}", credentials) as channel:
            request = pb.ModelInferRequest(model_name="slow", raw_input_contents=[bytes(4 * 512 * 256)])
            request.inputs.add(name="x", datatype="FP32", shape=[256, 512])
            call = channel.unary_unary(
                f"/{SERVICE}/ModelInfer",
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelInferResponse.FromString,
            )
            future = call.future(request, metadata=(("authorization", f"Key {key}"),), timeout=PATIENCE_S)
            made.wait(lambda: made.admin("/status")["in_flight"] > 0 or future.done(), "the call")
            assert made.stop() == 0
            assert list(future.result().outputs[0].shape) == [256, 512]
