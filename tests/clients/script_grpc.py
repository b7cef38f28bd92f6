"""Runs inside an environment with the stock clarifai-grpc: sync, aio, one's own channel and the JSON channel.

Usage: script_grpc.py PORT MTLS_PORT ROOT_CERTIFICATE CLIENT_KEY CLIENT_CERTIFICATE SAMPLES WEB KEY. Prints a JSON
object: form → what came back, or the error that its user sees. The root is in REQUESTS_CA_BUNDLE too.
"""

import asyncio
import importlib
import json
import os
import sys
from pathlib import Path

import grpc
from clarifai_grpc.channel import clarifai_channel
from clarifai_grpc.channel.clarifai_channel import ClarifaiChannel
from clarifai_grpc.grpc.api import resources_pb2, service_pb2, service_pb2_grpc

port, mtls_port, root, client_key, client_certificate, samples, web, key = sys.argv[1:9]
PATHS = sorted(Path(samples).glob("*.png"))
DIGIT = PATHS[0].read_bytes()
BASE = f"localhost:{port}"
METADATA = (("authorization", f"Key {key}"),)
IDS = resources_pb2.UserAppIDSet(user_id="appliance", app_id="main")
PATIENCE_S = 120


def own_channel(target, *certificate):
    """A channel of one's own, with a client certificate when one is given."""
    chain = [Path(path).read_bytes() for path in certificate]
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(Path(root).read_bytes(), *chain))


def outcome(call):
    """What a form gives, or what its user reads."""
    try:
        return call()
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    except Exception as error:
        # The JSON channel's own error does not say what happened; the one before it does.
        return f"{type(error).__name__}: {error.__context__ or error}"


# Before any stock channel was made in this process.
too_early = outcome(lambda: service_pb2_grpc.V2Stub(own_channel(BASE)) and "a stub")


def image(data=DIGIT, input_id=""):
    """An input with a picture's bytes."""
    return resources_pb2.Input(id=input_id, data=resources_pb2.Data(image=resources_pb2.Image(base64=data)))


def request(*inputs, **fields):
    """As the documentation's samples write it."""
    return service_pb2.PostModelOutputsRequest(user_app_id=IDS, model_id="digits", inputs=inputs or [image()], **fields)


def limited(place, **config):
    """A request with an output_config: "old" in model.output_info, "new" in model.model_version.output_info."""
    info = resources_pb2.OutputInfo(output_config=resources_pb2.OutputConfig(**config))
    version = resources_pb2.ModelVersion(output_info=info)
    model = resources_pb2.Model(output_info=info) if place == "old" else resources_pb2.Model(model_version=version)
    return request(model=model)


def both_places():
    """Two limits: the new place counts."""
    asked = limited("old", max_concepts=5)
    asked.model.MergeFrom(limited("new", max_concepts=2).model)
    return asked


def ids(reply):
    """Concept ids of the first output; else what the status says."""
    if reply.status.code != 10000:
        return f"{reply.status.code}: {reply.status.details}"
    return [concept.id for concept in reply.outputs[0].data.concepts]


def mixed(reply):
    """The reply's code, and the outputs' input ids, codes and numbers of concepts."""
    outputs = [[output.input.id, output.status.code, len(output.data.concepts)] for output in reply.outputs]
    return [reply.status.code, outputs]


channel = ClarifaiChannel.get_grpc_channel(base=BASE, root_certificates_path=root)
stub = service_pb2_grpc.V2Stub(channel)


def call(rpc, message, metadata=METADATA, **options):
    """One RPC over the stock channel."""
    return getattr(stub, rpc)(message, metadata=metadata, timeout=PATIENCE_S, **options)


def predict(message=None, **options):
    """What one prediction says."""
    return ids(call("PostModelOutputs", message or request(), **options))


def streamed(replies):
    """What each message says."""
    return [ids(reply) for reply in replies]


def over(made):
    """A prediction over a channel made here."""
    with made:
        return ids(service_pb2_grpc.V2Stub(made).PostModelOutputs(request(), metadata=METADATA, timeout=PATIENCE_S))


def from_environment(**variables):
    """The stock channel, with everything from the environment."""
    os.environ.update(variables)
    try:
        return over(ClarifaiChannel.get_grpc_channel(root_certificates_path=root))
    finally:
        for name in variables:
            del os.environ[name]


def request_id():
    """A prefix that the caller chose stands before the request's id."""
    headers = (*METADATA, ("x-clarifai-request-id-prefix", "line-3"))
    return call("PostModelOutputs", request(), headers).status.req_id[:7]


def in_future():
    """The call in the background."""
    return ids(stub.PostModelOutputs.future(request(), metadata=METADATA).result(PATIENCE_S))


def signatures():
    """The names of the methods, as the SDK asks when GetModelVersion names none."""
    asked = resources_pb2.Input()
    asked.data.parts.add()
    asked.data.metadata["_method_name"] = "_GET_SIGNATURES"
    return list(json.loads(call("PostModelOutputs", request(asked)).outputs[0].data.text.raw))


def pythonic():
    """What `predict(image, max_concepts=3)` returns, as its concepts."""
    asked = resources_pb2.Input()
    asked.data.metadata["_method_name"] = "predict"
    asked.data.parts.add(id="image").data.image.base64 = DIGIT
    asked.data.parts.add(id="max_concepts").data.int_value = 3
    (part,) = call("PostModelOutputs", request(asked)).outputs[0].data.parts
    return [concept.id for concept in part.data.concepts]


get_model = service_pb2.GetModelRequest(user_app_id=IDS, model_id="digits")
get_version = service_pb2.GetModelVersionRequest(user_app_id=IDS, model_id="digits", version_id="1")
RAW = {
    "`ClarifaiChannel.get_grpc_channel(base='host:port', root_certificates_path=…)`": predict,
    "`get_grpc_channel(base='https://host:port')`": lambda: over(
        ClarifaiChannel.get_grpc_channel(base=f"https://{BASE}", root_certificates_path=root)
    ),
    "`CLARIFAI_GRPC_BASE`": lambda: from_environment(CLARIFAI_GRPC_BASE=BASE),
    "`get_grpc_channel()` without root_certificates_path": lambda: over(ClarifaiChannel.get_grpc_channel(base=BASE)),
    "`get_insecure_grpc_channel(base=…, port=…)`": lambda: over(
        ClarifaiChannel.get_insecure_grpc_channel(base="127.0.0.1", port=int(port))
    ),
    "`V2Stub` on one's own channel": lambda: over(own_channel(BASE)),
    "`V2Stub` on one's own channel with a client certificate (mTLS)": lambda: over(
        own_channel(f"localhost:{mtls_port}", client_key, client_certificate)
    ),
    "`V2Stub` before any `ClarifaiChannel.get_…_channel()`": lambda: too_early,
    "metadata `authorization: Key …`": predict,
    "metadata `x-clarifai-session-token`": lambda: predict(metadata=(("x-clarifai-session-token", key),)),
    "metadata `x-clarifai-request-id-prefix`": request_id,
    "no metadata": lambda: predict(metadata=()),
    "`PostModelOutputs` by bytes": predict,
    "`PostModelOutputs` by URL": lambda: predict(
        request(resources_pb2.Input(data={"image": {"url": f"{web}/{PATHS[0].name}"}}))
    ),
    "`PostModelOutputs` with `version_id`": lambda: predict(request(version_id="1")),
    "`PostModelOutputs` with `model.output_info`, as the documentation's samples": lambda: predict(
        limited("old", max_concepts=3)
    ),
    "`PostModelOutputs` with `model.model_version.output_info`, as the SDK": lambda: predict(
        limited("new", max_concepts=3)
    ),
    "`PostModelOutputs` with both": lambda: predict(both_places()),
    "`PostModelOutputs` with one bad input of three": lambda: mixed(
        call("PostModelOutputs", request(image(input_id="a"), image(b"none", "b"), image(input_id="c")))
    ),
    "`PostModelOutputs` with 128 inputs": lambda: len(
        call("PostModelOutputs", request(*[image() for _ in range(128)])).outputs
    ),
    "`PostModelOutputs` with 129 inputs": lambda: predict(request(*[image() for _ in range(129)])),
    "`PostModelOutputs` with 16 MB": lambda: predict(request(image(DIGIT + bytes(16_000_000)))),
    "`PostModelOutputs` without inputs": lambda: ids(
        call("PostModelOutputs", service_pb2.PostModelOutputsRequest(user_app_id=IDS, model_id="digits"))
    ),
    "`PostModelOutputs` of `_GET_SIGNATURES`": signatures,
    "`PostModelOutputs` of a method and its arguments": pythonic,
    "`PostModelOutputs.future`": in_future,
    "`compression=Gzip`": lambda: predict(compression=grpc.Compression.Gzip),
    "`GenerateModelOutputs`": lambda: streamed(call("GenerateModelOutputs", request())),
    "`StreamModelOutputs`": lambda: streamed(call("StreamModelOutputs", iter([request(), request()]))),
    "`GetModel`": lambda: call("GetModel", get_model).model.id,
    "`GetModelVersion`": lambda: call("GetModelVersion", get_version).model_version.method_signatures[0].name,
    "`GetModelOutputInfo`": lambda: len(
        call("GetModelOutputInfo", get_model).model.model_version.output_info.data.concepts
    ),
    "`ListModels`": lambda: sorted(
        model.id for model in call("ListModels", service_pb2.ListModelsRequest(user_app_id=IDS)).models
    ),
    "`ListModelVersions`": lambda: [
        version.id
        for version in call(
            "ListModelVersions", service_pb2.ListModelVersionsRequest(user_app_id=IDS, model_id="digits")
        ).model_versions
    ],
    "`ListModelConcepts`": lambda: len(
        call("ListModelConcepts", service_pb2.ListModelConceptsRequest(user_app_id=IDS, model_id="digits")).concepts
    ),
    "`ListConcepts`": lambda: len(call("ListConcepts", service_pb2.ListConceptsRequest(user_app_id=IDS)).concepts),
    "`GetModelType`": lambda: list(
        call("GetModelType", service_pb2.GetModelTypeRequest(model_type_id="visual-classifier")).model_type.input_fields
    ),
    "`ListModelTypes`": lambda: (
        "visual-classifier"
        in [found.id for found in call("ListModelTypes", service_pb2.ListModelTypesRequest()).model_types]
    ),
    "`GetApp`, `ListApps`": lambda: [
        call("GetApp", service_pb2.GetAppRequest(user_app_id=IDS)).app.id,
        *[app.id for app in call("ListApps", service_pb2.ListAppsRequest(user_app_id=IDS)).apps],
    ],
    "`GetUser`": lambda: call("GetUser", service_pb2.GetUserRequest(user_app_id={"user_id": "me"})).user.id,
    "`MyScopes`": lambda: "Predict" in call("MyScopes", service_pb2.MyScopesRequest()).scopes,
    "`ListStatusCodes`, `GetStatusCode`": lambda: [
        len(call("ListStatusCodes", service_pb2.ListStatusCodesRequest()).statuses) > 400,
        call("GetStatusCode", service_pb2.GetStatusCodeRequest(status_code_id="21200")).status.code,
    ],
    "an RPC that is not served (`PostInputs`)": lambda: call("PostInputs", service_pb2.PostInputsRequest()).status.code,
}


async def aio():
    """The forms of the aio channel."""
    made = ClarifaiChannel.get_aio_grpc_channel(base=BASE, root_certificates_path=root)
    stub = service_pb2_grpc.V2Stub(made)
    options = {"metadata": METADATA, "timeout": PATIENCE_S}
    async with made:
        several = await asyncio.gather(*(stub.PostModelOutputs(request(), **options) for _ in range(8)))
        return {
            "`await stub.PostModelOutputs(…)`": ids(await stub.PostModelOutputs(request(), **options)),
            "`asyncio.gather` of eight": [ids(reply) for reply in several],
            "`async for … in stub.GenerateModelOutputs(…)`": [
                ids(reply) async for reply in stub.GenerateModelOutputs(request(), **options)
            ],
            "`async for … in stub.StreamModelOutputs(iter([…]))`": [
                ids(reply) async for reply in stub.StreamModelOutputs(iter([request(), request()]), **options)
            ],
            "`await stub.GetModel(…)`": (await stub.GetModel(get_model, **options)).model.id,
        }


def over_json(base_url=f"https://{BASE}", trust=True):
    """A stub that speaks JSON over HTTP."""
    made = ClarifaiChannel.get_json_channel(base_url=base_url)
    made.session.trust_env = trust
    return service_pb2_grpc.V2Stub(made)


def over_json_from_environment():
    """The base is read as the module is imported."""
    os.environ["CLARIFAI_API_BASE"] = f"https://{BASE}"
    module = importlib.reload(clarifai_channel)
    made = service_pb2_grpc.V2Stub(module.ClarifaiChannel.get_json_channel())
    return ids(made.PostModelOutputs(request(), metadata=METADATA))


JSON = {
    "`ClarifaiChannel.get_json_channel(base_url='https://host:port')`, the root in `REQUESTS_CA_BUNDLE`": lambda: ids(
        over_json().PostModelOutputs(request(), metadata=METADATA)
    ),
    "the root not in `REQUESTS_CA_BUNDLE`": lambda: ids(
        over_json(trust=False).PostModelOutputs(request(), metadata=METADATA)
    ),
    "`base_url='host:port'`": lambda: ids(over_json(BASE).PostModelOutputs(request(), metadata=METADATA)),
    "`base_url='https://host:port/'`": lambda: ids(
        over_json(f"https://{BASE}/").PostModelOutputs(request(), metadata=METADATA)
    ),
    "`CLARIFAI_API_BASE`": over_json_from_environment,
    "`PostModelOutputs` by URL": lambda: ids(
        over_json().PostModelOutputs(
            request(resources_pb2.Input(data={"image": {"url": f"{web}/{PATHS[0].name}"}})), metadata=METADATA
        )
    ),
    "`PostModelOutputs` with `version_id`": lambda: ids(
        over_json().PostModelOutputs(request(version_id="1"), metadata=METADATA)
    ),
    "`PostModelOutputs` with `model.output_info`": lambda: ids(
        over_json().PostModelOutputs(limited("old", max_concepts=3), metadata=METADATA)
    ),
    "`PostModelOutputs` with 129 inputs": lambda: ids(
        over_json().PostModelOutputs(request(*[image() for _ in range(129)]), metadata=METADATA)
    ),
    "`GetModel`": lambda: over_json().GetModel(get_model, metadata=METADATA).model.id,
    "`ListModels`": lambda: sorted(
        model.id
        for model in over_json().ListModels(service_pb2.ListModelsRequest(user_app_id=IDS), metadata=METADATA).models
    ),
    "`ListModels(page=…, per_page=…)`": lambda: len(
        over_json()
        .ListModels(service_pb2.ListModelsRequest(user_app_id=IDS, page=2, per_page=1), metadata=METADATA)
        .models
    ),
    "`GetModelOutputInfo`": lambda: len(
        over_json().GetModelOutputInfo(get_model, metadata=METADATA).model.model_version.output_info.data.concepts
    ),
    "`GetModelVersion`": lambda: (
        over_json().GetModelVersion(get_version, metadata=METADATA).model_version.method_signatures[0].name
    ),
    "`ListModelVersions`": lambda: [
        version.id
        for version in over_json()
        .ListModelVersions(service_pb2.ListModelVersionsRequest(user_app_id=IDS, model_id="digits"), metadata=METADATA)
        .model_versions
    ],
    "`ListConcepts`": lambda: len(
        over_json().ListConcepts(service_pb2.ListConceptsRequest(user_app_id=IDS), metadata=METADATA).concepts
    ),
    "`GetUser`": lambda: (
        over_json().GetUser(service_pb2.GetUserRequest(user_app_id={"user_id": "me"}), metadata=METADATA).user.id
    ),
    "a wrong key": lambda: ids(
        over_json().PostModelOutputs(request(), metadata=(("authorization", "Key " + "0" * 64),))
    ),
    "`GenerateModelOutputs`": lambda: streamed(over_json().GenerateModelOutputs(request(), metadata=METADATA)),
    "`StreamModelOutputs` of one message": lambda: [ids(over_json().StreamModelOutputs(request(), metadata=METADATA))],
    "`StreamModelOutputs` of several": lambda: streamed(
        over_json().StreamModelOutputs(iter([request()]), metadata=METADATA)
    ),
}

found = {"raw": {form: outcome(form_call) for form, form_call in RAW.items()}}
found["aio"] = asyncio.run(aio())
found["json"] = {form: outcome(form_call) for form, form_call in JSON.items()}
print(json.dumps(found))
