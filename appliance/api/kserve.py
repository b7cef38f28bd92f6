"""KServe V2 over gRPC: `inference.GRPCInferenceService` as endpoints beside Clarifai's.

Errors are gRPC statuses, as this protocol has no other place for them; in a stream a request at fault is told in its
message, as Triton does. Whether server and models live and are ready everybody may ask, as with health.
Sources: kserve/open-inference-protocol; triton-inference-server/common, grpc_service.proto.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
from google.protobuf.message import Message

from appliance import __version__
from appliance.api import inference_pb2 as pb
from appliance.api import oip, quick, status
from appliance.api.context import Context
from appliance.api.direct import Direct, Maker, ModelName
from appliance.api.health import Health
from appliance.api.parsing import parsed
from appliance.api.quick import Begun
from appliance.api.replies import Reply, length_head
from appliance.api.varints import Pieces
from appliance.catalog.view import State, Version
from appliance.core.config import Limits
from appliance.core.errors import ApplianceError, InvalidInput, InvalidRequest, NotReady
from appliance.core.types import Array, Call, Endpoint
from appliance.engine.inline import Waiter
from appliance.tasks.servable import Answer, Servable

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_MANY = 100_000
"""Numbers from which they become an array on a thread: Python looks at each."""

_FEW = 4096
"""Numbers up to which they become one on the quick way, which may be in vain: 150 µs."""

_GOOD = int(status.SUCCESS.code)

_RAW_OUTPUT = pb.ModelInferResponse.DESCRIPTOR.fields_by_name["raw_output_contents"].number
_INFER_RESPONSE = pb.ModelStreamInferResponse.DESCRIPTOR.fields_by_name["infer_response"].number

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    oip.BYTES: "bytes_contents",
}
"""Datatype → the field of InferTensorContents that carries it; FP16 has none."""

_WIRE = {
    "bool_contents": np.bool_,
    "int_contents": np.int32,
    "int64_contents": np.int64,
    "uint_contents": np.uint32,
    "uint64_contents": np.uint64,
    "fp32_contents": np.float32,
    "fp64_contents": np.float64,
}

_STATES = {State.READY: "READY", State.LOADING: "LOADING", State.SETTLING: "LOADING"}


METRIC = "kserve."
"""Before the names of this protocol's calls in metrics and logs, whichever wire they came by."""


class Kserve:
    """What both wires of the protocol answer."""

    def __init__(self, direct: Direct, health: Health) -> None:
        self.direct = direct
        self.health = health

    def server(self) -> pb.ServerMetadataResponse:
        """Who answers."""
        return pb.ServerMetadataResponse(
            name="inference-appliance", version=__version__, extensions=["binary_tensor_data"]
        )

    def model(self, context: Context, text: str, version: str) -> pb.ModelMetadataResponse:
        """A model's versions that answer, and what the named one, or the newest, takes and gives.

        Raises: UnknownModel, NotReady, NotDeployed, NotPermitted.
        """
        name = ModelName.parse(text, version)
        with self.direct.serving(context, name) as servable:
            key, form = servable.key, servable.companion(oip.Form)
            all_versions = ModelName(key.user_id, key.app_id, key.model_id)
            return pb.ModelMetadataResponse(
                name=text,
                versions=[found.id for found in self.direct.versions_of(context, all_versions) if found.ready],
                platform=oip.PLATFORM,
                inputs=[_metadata(declared) for declared in form.inputs.values()],
                outputs=[_metadata(declared) for declared in form.outputs.values()],
            )

    def ready(self, context: Context, text: str, version: str) -> bool:
        """Whether a model, or that version of it, answers. Raises: UnknownModel, NotPermitted."""
        try:
            found = self.direct.versions_of(context, ModelName.parse(text, version))
        except NotReady:  # bundles are still being read
            return False
        return self.health.ready and any(known.ready for known in found)

    def index(self, context: Context, ready: bool) -> pb.RepositoryIndexResponse:
        """The versions of all models that the caller may use. Args: ready: only those that answer."""
        reply = pb.RepositoryIndexResponse()
        for version in self.direct.versions(context):
            if version.ready or not ready:
                reply.models.add(name=str(version.config.key), version=version.id, state=_state(version))
        return reply

    async def infer(self, context: Context, request: pb.ModelInferRequest) -> bytes:
        """ModelInfer: the reply, serialised. Raises: ApplianceError."""
        name = ModelName.parse(request.model_name, request.model_version)
        limits, numbers = self.direct.config.limits, _typed_numbers(request)
        context.memory.grow(16 * numbers)  # as they came, and as the datatype says
        large = numbers > _MANY
        tensors = await asyncio.to_thread(_tensors, request, limits) if large else _tensors(request, limits)
        answer = await oip.infer(self.direct, context, name, tensors, _wanted(request), _parameters(request.parameters))
        return _response(request, answer)

    def begin(self, context: Context, body: bytes, waiter: Waiter) -> Begun | None:
        """ModelInfer on the quick way; see `quick.Begin`."""
        request = pb.ModelInferRequest.FromString(body)
        running = self.direct.running(ModelName.parse(request.model_name, request.model_version))
        servable = running.servable
        if not context.grant.allows(servable.key) or not servable.model.prompt(1):
            return None
        numbers = _typed_numbers(request)
        if numbers > _FEW:
            return None
        context.memory.grow(16 * numbers)
        limits = self.direct.config.limits
        tensors, parameters = _tensors(request, limits), _parameters(request.parameters)
        asked = oip.understood(servable, tensors, _wanted(request), parameters, limits)
        if len(asked.payloads) != 1:
            return None
        write = partial(_reply_of_one, context, request, servable, asked)
        return quick.begin(context, running, asked.payloads[0], asked.options, limits, waiter, write)


def kserve_endpoints(kserve: Kserve, doors: Maker) -> dict[str, Endpoint]:
    """Endpoint by full gRPC method name."""

    async def server_live(call: Call, body: bytes) -> bytes:
        return bytes(pb.ServerLiveResponse(live=True).SerializeToString())

    async def server_ready(call: Call, body: bytes) -> bytes:
        return bytes(pb.ServerReadyResponse(ready=kserve.health.ready).SerializeToString())

    async def model_ready(context: Context, body: bytes) -> Reply:
        request = await parsed(pb.ModelReadyRequest, body, context.memory)
        return good(pb.ModelReadyResponse(ready=kserve.ready(context, request.name, request.version)))

    async def server_metadata(context: Context, body: bytes) -> Reply:
        return good(kserve.server())

    async def model_metadata(context: Context, body: bytes) -> Reply:
        request = await parsed(pb.ModelMetadataRequest, body, context.memory)
        return good(kserve.model(context, request.name, request.version))

    async def repository_index(context: Context, body: bytes) -> Reply:
        request = await parsed(pb.RepositoryIndexRequest, body, context.memory)
        return good(kserve.index(context, request.ready))

    async def model_infer(context: Context, body: bytes) -> Reply:
        request = await parsed(pb.ModelInferRequest, body, context.memory)
        return Reply(await kserve.infer(context, request), _GOOD)

    async def model_stream_infer(context: Context, body: bytes) -> Reply:
        answer = await kserve.infer(context, await parsed(pb.ModelInferRequest, body, context.memory))
        return Reply(length_head(_INFER_RESPONSE, len(answer)) + answer, _GOOD)

    served = {
        "ServerLive": Endpoint(unary=server_live),
        "ServerReady": Endpoint(unary=server_ready),
        "ModelReady": doors.door(f"{METRIC}ModelReady", model_ready),
        "ServerMetadata": doors.door(f"{METRIC}ServerMetadata", server_metadata),
        "ModelMetadata": doors.door(f"{METRIC}ModelMetadata", model_metadata),
        "RepositoryIndex": doors.door(f"{METRIC}RepositoryIndex", repository_index),
        "ModelInfer": doors.door(f"{METRIC}ModelInfer", model_infer, kserve.begin),
        "ModelStreamInfer": doors.door_stream(f"{METRIC}ModelStreamInfer", model_stream_infer, _told),
    }
    assert set(served) == set(_SERVICE.methods_by_name)
    return {f"/{_SERVICE.full_name}/{name}": endpoint for name, endpoint in served.items()}


def good(message: Message) -> Reply:
    """A reply that tells no error."""
    return Reply(message.SerializeToString(), _GOOD)


def _told(error: ApplianceError) -> bytes:
    return bytes(pb.ModelStreamInferResponse(error_message=str(error)).SerializeToString())


def _metadata(declared: oip.Declared) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=declared.name, datatype=declared.datatype, shape=declared.shape)


def _state(version: Version[Servable]) -> str:
    return "READY" if version.ready else _STATES.get(version.state, "UNAVAILABLE")


def _parameters(given: Mapping[str, pb.InferParameter]) -> oip.Parameters:
    found: dict[str, bool | int | float | str] = {}
    if not given:
        return found
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(f"The parameter {name[:80]!r} has no value.")
        found[name] = getattr(parameter, kind)
    return found


def _typed_numbers(request: pb.ModelInferRequest) -> int:
    """How many values there are to be made into arrays, and elements; none of those that came raw."""
    if request.raw_input_contents:
        return 0
    count = 0
    for given in request.inputs:
        for _, values in given.contents.ListFields():
            count += len(values)
    return count


def _wanted(request: pb.ModelInferRequest) -> Sequence[str]:
    """The names of the outputs asked for. Raises: InvalidArgument: one has parameters."""
    if not request.outputs:
        return ()
    for output in request.outputs:
        if output.parameters:
            oip.check_parameters(f"The output {output.name[:80]!r}", _parameters(output.parameters), ())
    return [output.name for output in request.outputs]


def _tensors(request: pb.ModelInferRequest, limits: Limits) -> list[oip.Tensor]:
    """The request's inputs, from raw or from typed contents. Raises: RequestError."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            f"The request has {len(request.inputs)} inputs and {len(raw)} raw_input_contents; give one for each, or "
            "none and set contents."
        )
    tensors = []
    for index, given in enumerate(request.inputs):
        if given.parameters:
            oip.check_parameters(f"The input {given.name[:80]!r}", _parameters(given.parameters), ())
        shape = tuple(given.shape)
        if raw:
            if given.HasField("contents"):
                raise InvalidInput(f"The input {given.name[:80]!r} has contents beside raw_input_contents; send one.")
            tensors.append(oip.from_bytes(given.name, given.datatype, shape, raw[index], limits))
        else:
            tensors.append(_typed(given, shape, limits))
    return tensors


def _typed(given: pb.ModelInferRequest.InferInputTensor, shape: tuple[int, ...], limits: Limits) -> oip.Tensor:
    dtype = oip.dtype_of(given.name, given.datatype)
    field = _CONTENTS.get(given.datatype)
    if field is None:
        raise InvalidInput(f"The input {given.name[:80]!r} is {given.datatype}, which only raw_input_contents carry.")
    others = [found.name for found, _ in given.contents.ListFields() if found.name != field]
    if others:
        raise InvalidInput(
            f"The input {given.name[:80]!r} is {given.datatype}; its values belong into {field}, not {others[0]}."
        )
    values = getattr(given.contents, field)
    if dtype is None:
        return oip.from_elements(given.name, shape, values, limits)
    wide: Array = np.array(values, _WIRE[field])
    narrow = wide.astype(dtype, copy=False)
    if wide.dtype.kind in "iu" and not np.array_equal(wide, narrow):
        raise InvalidInput(f"The input {given.name[:80]!r} has values that {given.datatype} cannot hold.")
    return oip.from_array(given.name, given.datatype, shape, narrow)


def _reply_of_one(
    context: Context, request: pb.ModelInferRequest, servable: Servable, asked: oip.Understood, answer: Answer
) -> Reply:
    """The reply to a request of one input. Raises: ApplianceError: the answer is one."""
    if isinstance(answer, ApplianceError):
        raise answer
    context.count(_GOOD)
    return Reply(_response(request, oip.answer_of(servable, asked, [answer])), _GOOD)


def _response(request: pb.ModelInferRequest, answer: oip.Answer) -> bytes:
    """The reply. Its arrays are joined behind what was serialised: in a message they would be copied twice more."""
    head = pb.ModelInferResponse(model_name=request.model_name, model_version=answer.version, id=request.id)
    outputs = [_output(tensor.name, tensor.datatype, tensor.shape) for tensor in answer.tensors]
    pieces: Pieces = []
    for tensor in answer.tensors:
        data = oip.to_bytes(tensor)
        pieces += (length_head(_RAW_OUTPUT, len(data)), data)
    return b"".join((head.SerializeToString(), *outputs, *pieces))


@lru_cache(maxsize=1024)
def _output(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    """The reply's field that declares an output: they are a few in a model's answers."""
    output = pb.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
    return bytes(pb.ModelInferResponse(outputs=[output]).SerializeToString())
