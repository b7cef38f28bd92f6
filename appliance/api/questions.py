"""What a predict request asks: which method each input calls, with what, and how the answer is cut (PROTOCOL 4).

An input that names a method, or brings arguments as parts, is pythonic: its answer goes into a part named `return`. Any
other is of the old form: its content stands at the top of `data`, its limits in `output_config` and `inference_params`.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from google.protobuf import struct_pb2

from appliance.api import messages, methods, values
from appliance.api.contents import NOTHING, Contents
from appliance.api.limits import Asked, options_for, usual_options
from appliance.api.messages import UrlInput
from appliance.core.config import Limits
from appliance.core.errors import (
    ApplianceError,
    InvalidArgument,
    InvalidInput,
    Overloaded,
    RequestError,
    UnknownMethod,
)
from appliance.core.memory import Reservation
from appliance.core.types import FieldType, Media, Method, MethodKind, Payload, PredictOptions, Value
from appliance.tasks.servable import PREDICT, Servable


class Rpc(enum.Enum):
    """The three RPCs that call methods, and the method that each calls when none is named."""

    POST = PREDICT
    GENERATE = "generate"
    STREAM = "stream"


_SERVED_BY = {
    MethodKind.UNARY: (Rpc.POST, Rpc.GENERATE, Rpc.STREAM),
    MethodKind.GENERATE: (Rpc.GENERATE, Rpc.STREAM),
    MethodKind.STREAM: (Rpc.STREAM,),
}
_NAMES = {Rpc.GENERATE: "GenerateModelOutputs", Rpc.STREAM: "StreamModelOutputs"}
_NO_PARAMS = struct_pb2.Struct()
_NO_OPTIONS = PredictOptions()
_NOTHING = Payload()
"""Where a payload is still to come."""


@dataclass(slots=True)
class Question:
    """One input, understood.

    Attributes:
        payload: what the method takes, once all `links` are fetched; or why there is none.
        options: how the answer is cut.
        links: what lies behind URLs, each with who takes it once it is here.
    """

    method: Method
    payload: Payload | ApplianceError
    options: PredictOptions
    pythonic: bool
    links: Sequence[tuple[UrlInput, Callable[[Payload], None]]] = ()

    def take(self, payload: Payload | UrlInput) -> None:
        """Set what the method takes, or the link that leads to it."""
        if isinstance(payload, UrlInput):
            self.links = ((payload, self.take),)
        else:
            self.payload = payload


class Conversation:
    """What is kept between the messages of one stream: the first one carries the arguments that do not change."""

    def __init__(self, keep: Callable[[str], Reservation]) -> None:
        """Args: keep: a reservation of a principal's share that lasts as long as the stream."""
        self._keep = keep
        self._memory: Reservation | None = None
        self._size = 0
        self._given: dict[tuple[str, str], Mapping[str, resources_pb2.Data]] = {}

    def complete(
        self, model: str, method: Method, given: Mapping[str, resources_pb2.Data]
    ) -> Mapping[str, resources_pb2.Data]:
        """The arguments of a message, with those of the first message that it leaves out."""
        streamed = method.streamed
        if streamed is None:
            return given
        key = (model, method.name)
        if key not in self._given:
            constant = {name: data for name, data in given.items() if name != streamed.name}
            self._size += sum(data.ByteSize() for data in constant.values())
            # Copies: a part would keep the whole message.
            self._given[key] = {
                name: resources_pb2.Data.FromString(d.SerializeToString()) for name, d in constant.items()
            }
        return {**self._given[key], **given}

    def reserve(self, principal: str) -> None:
        """Reserve what is kept; on the loop's thread. Raises: Overloaded: and nothing is kept then."""
        if not self._size:
            return
        if self._memory is None:
            self._memory = self._keep(principal)
        try:
            self._memory.grow(max(0, self._size - self._memory.count))
        except Overloaded:
            self._given.clear()
            self._size = 0
            raise


def understand(
    request: service_pb2.PostModelOutputsRequest,
    servable: Servable,
    limits: Limits,
    rpc: Rpc,
    conversation: Conversation | None = None,
    contents: Mapping[int, Contents] = NOTHING,
) -> tuple[list[Question], list[str]]:
    """Each input as a question, and the selected concepts that the model does not have.

    Args:    contents: what was left out of the request, by input.
    Raises: InvalidArgument: this holds for the request as a whole.
    """
    questions = []
    unknown: list[str] = []
    usual = rpc.value if rpc.value in servable.offers else PREDICT
    # What holds for all inputs that call one method is found out with the first of them.
    called: dict[str, Method] = {}
    in_old_form: dict[str, tuple[PredictOptions, list[str]]] = {}
    for number, given in enumerate(request.inputs):
        data = given.data
        pythonic = methods.is_pythonic(data)
        name = (methods.method_name(data) if pythonic else "") or usual
        method = called.get(name)
        if method is None:
            if name not in servable.offers:
                no_such = UnknownMethod(name[:80], tuple(servable.offers))
                questions.append(Question(servable.task.method, no_such, _NO_OPTIONS, pythonic))
                continue
            method = called[name] = servable.offers[name].task.method
            _check_call(method, rpc, len(request.inputs))
        question = Question(method, _NOTHING, _NO_OPTIONS, pythonic)
        missing: list[str] = []
        if not pythonic:
            if name not in in_old_form:
                in_old_form[name] = options_of(request, servable, method, limits)
            question.options, missing = in_old_form[name]
        apart = contents.get(number, NOTHING)
        try:
            if pythonic:
                missing = _ask_pythonic(question, data, apart, servable, limits, conversation)
            else:
                _ask_in_old_form(question, data, apart, servable, request)
        except RequestError as error:
            question.payload = error
        unknown += [text for text in missing if text not in unknown]
        questions.append(question)
    return questions, unknown


def options_of(
    request: service_pb2.PostModelOutputsRequest, servable: Servable, method: Method, limits: Limits
) -> tuple[PredictOptions, list[str]]:
    """How an old form's answers are cut, and the selected concepts that the model does not have.

    Raises: InvalidArgument.
    """
    if not request.HasField("model"):
        return usual_options(limits.concepts_default), []
    return options_for(_asked_by_request(request, method), servable.concepts, limits)


def _check_call(method: Method, rpc: Rpc, inputs: int) -> None:
    """Raises: InvalidArgument: the method is not called so."""
    served_by = _SERVED_BY[method.kind]
    if rpc not in served_by:
        raise InvalidArgument(f"Method {method.name!r} streams; call it with {_NAMES[served_by[0]]}.")
    if method.kind is not MethodKind.UNARY and inputs != 1:
        raise InvalidArgument(f"Method {method.name!r} streams, and {inputs} inputs came; send one in a message.")


def _ask_pythonic(
    question: Question,
    data: resources_pb2.Data,
    contents: Contents,
    servable: Servable,
    limits: Limits,
    conversation: Conversation | None,
) -> list[str]:
    method = question.method
    given = methods.arguments(method, data)
    apart = methods.contents_of(method, data, given, contents)
    if conversation is not None:
        given = conversation.complete(str(servable.key), method, given)
    methods.check_complete(method, given)
    asked = methods.asked_by_arguments(given) if _returns_concepts(method) else Asked()
    question.options, unknown = options_for(asked, servable.concepts, limits)
    kind = servable.offers[method.name].task.kind
    if kind == "values":
        _fill(question, methods.read_arguments(method, given, apart))
        _set_least(question)
    else:
        question.take(messages.payload_of_arguments(kind, method.arguments[0].name, given, apart))
    return unknown


def _ask_in_old_form(
    question: Question,
    data: resources_pb2.Data,
    contents: Contents,
    servable: Servable,
    request: service_pb2.PostModelOutputsRequest,
) -> None:
    method = question.method
    kind = servable.offers[method.name].task.kind
    if kind == "values":
        params = request.model.model_version.output_info.params if request.HasField("model") else _NO_PARAMS
        _fill(question, methods.read_old_form(method, data, params, contents))
        if method.least in params.fields or not question.options.min_value:  # output_config says the same otherwise
            _set_least(question)
    else:
        question.take(messages.payload_of(kind, data, contents))


def _fill(question: Question, arguments: dict[str, Value]) -> None:
    method = question.method
    question.payload = Payload(arguments=arguments)
    question.links = [
        (UrlInput(media.url, _content, kind), partial(_put, media))
        for field in method.arguments
        for kind, media in values.links(field, arguments[field.name])
    ]


def _set_least(question: Question) -> None:
    """Cut the answer by the argument that the method has for that. Raises: InvalidInput: it is no number."""
    name = question.method.least
    if name:
        assert isinstance(question.payload, Payload)
        least = question.payload.arguments[name]
        if not math.isfinite(least):
            raise InvalidInput(f"{name} is {least:g}; it must be a number.")
        with np.errstate(over="ignore"):  # beyond every score
            question.options = dataclasses.replace(question.options, min_value=np.float32(least))


def _content(body: bytes) -> Payload:
    """Any kind of file, as it came."""
    return Payload(image=body)


def _put(media: Media, fetched: Payload) -> None:
    media.content = bytes(fetched.image or b"")


def _returns_concepts(method: Method) -> bool:
    return method.returns.type is FieldType.LIST and method.returns.items[0].type is FieldType.CONCEPT


def _asked_by_request(request: service_pb2.PostModelOutputsRequest, method: Method) -> Asked:
    """`output_config` from both places; what the model version says wins over the deprecated place (PROTOCOL 0.5).

    What neither says, `inference_params` may: they name the method's arguments.
    """
    info = request.model.model_version.output_info
    new, old = info.output_config, request.model.output_info.output_config
    select = new.select_concepts or old.select_concepts
    language = new.language or old.language
    if language not in ("", "en"):
        raise InvalidArgument(
            f"language is {language[:20]!r}; models here name concepts in one language: leave it out."
        )
    asked = Asked(
        max_concepts=new.max_concepts or old.max_concepts,
        min_value=new.min_value or old.min_value,
        select=tuple((concept.id, concept.name) for concept in select),
    )
    if not info.params.fields:
        return asked
    methods.check_params(method, info.params)
    named = methods.asked_by_params(info.params) if _returns_concepts(method) else Asked()
    return Asked(
        asked.max_concepts or named.max_concepts, asked.min_value or named.min_value, asked.select or named.select
    )
