"""The words all rooms share: what a call is, what goes into a model and what comes out of it.

No protobuf here and no onnxruntime: `api/` turns messages into these, `tasks/` turns these into tensors.
"""

import enum
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from appliance.core.memory import Reservation
from appliance.core.timing import Timing

Array: TypeAlias = NDArray[Any]
Row: TypeAlias = dict[str, Array]
"""One input as the graph wants it: graph input name → array without the batch axis."""


# ---- calls -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Call:
    """One gRPC or REST call, as a transport hands it to a handler.

    Attributes:
        method: full gRPC name, `/clarifai.api.V2/PostModelOutputs`.
        metadata: header name in lower case → first value; binary headers are left out.
        peer: who is on the other end, for the log (`ipv4:10.0.0.7:51234`).
        deadline: `time.monotonic()` seconds, or None when the client set none.
        certificate: the client's verified leaf certificate as PEM, or None when none was sent.
        chain: the verified certificates above it as PEM, leaf's issuer first; empty where the transport knows none.
        memory: what the call holds of the memory budget since it was admitted, if the transport asked for admission;
            the transport releases it when the call is over.
        reader: makes the request message of a body that is not in the RPC's own encoding; None: it is. Called once the
            call is authenticated and counted, under its deadline, on any thread, perhaps more than once. What it raises
            is answered, counted and logged like a handler's error.
        timing: what is noted of its time, where somebody wants to know; of a stream, its present message's.
    """

    method: str
    metadata: Mapping[str, str]
    peer: str
    deadline: float | None = None
    certificate: bytes | None = None
    chain: bytes = b""
    memory: Reservation | None = None
    reader: Callable[[bytes], Any] | None = None
    timing: Timing | None = None


Admission: TypeAlias = Callable[[Call, int], bytes | None]
Done: TypeAlias = "Callable[[bytes | RpcAbort], None]"
QuickHandler: TypeAlias = Callable[[Call, bytes, Done], bool]
UnaryHandler: TypeAlias = Callable[[Call, bytes], Awaitable[bytes]]
StreamHandler: TypeAlias = Callable[[Call, AsyncIterator[bytes]], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A handler and the shape of its call; exactly one of the first two is set. Bytes in, bytes out.

    Attributes:
        stream: serves server-, client- and bidirectional streaming: it reads what messages there are.
        admit: asked with the headers and the size of the body, before it is read; size 0 when unknown. Returns the
            reply that refuses the call, or None; then `call.memory` holds as many bytes. Raises: RpcAbort, which ends
            the call.
        quick: the unary handler without a task, for calls that need no waiting: `quick(call, body, done)` returns True
            when it took the call, and then calls `done` exactly once, on the loop, now or soon: with the reply, or with
            the RpcAbort that `unary` would raise. False: it left the call alone, and `unary` must serve it. It never
            raises.
    """

    unary: UnaryHandler | None = None
    stream: StreamHandler | None = None
    admit: Admission | None = None
    quick: QuickHandler | None = None


class RpcStatus(enum.IntEnum):
    """gRPC status codes that a call may end with. Source: grpc/grpc doc/statuscodes.md."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class RpcAbort(Exception):
    """Ends a call with a gRPC status instead of a message; raised by handlers, mapped by the transport.

    Attributes:
        details: serialised `google.rpc.Status`, sent as `grpc-status-details-bin`; empty for none.
    """

    def __init__(self, status: RpcStatus, message: str, details: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.details = details


# ---- values: what methods take and return (PROTOCOL 4.2) -------------------------------------------------------------


@dataclass(slots=True)
class Media:
    """A picture, a sound, a film or a text by its bytes, or by a URL that is to be fetched first.

    Attributes:
        content: file bytes; of a text, UTF-8.
    """

    content: bytes = b""
    url: str = ""


@dataclass(frozen=True, slots=True)
class ScoredConcept:
    """A concept with its value, by itself."""

    id: str
    name: str
    value: float = 1.0


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a picture.

    Attributes:
        box: left, top, right, bottom as parts of width and height, 0 to 1; None when it has none.
        point: column, row and depth; None when it has none.
    """

    box: tuple[float, float, float, float] | None = None
    concepts: tuple[ScoredConcept, ...] = ()
    value: float = 0.0
    id: str = ""
    text: str = ""
    track_id: str = ""
    mask: Media | None = None
    point: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of a film, and what is seen in it.

    Attributes:
        number: from 0.
        time_ms: since the film's beginning, in milliseconds.
    """

    image: Media = field(default_factory=Media)
    number: int = 0
    time_ms: int = 0
    concepts: tuple[ScoredConcept, ...] = ()
    regions: tuple[Region, ...] = ()


Value: TypeAlias = Any
"""A value by its field's type: STR str · BYTES bytes · INT int · FLOAT float · BOOL bool · NDARRAY Array · JSON dict or
list · TEXT, IMAGE, AUDIO, VIDEO Media · CONCEPT ScoredConcept · REGION Region · FRAME Frame · LIST list · TUPLE tuple ·
NAMED_FIELDS dict."""


# ---- what goes in ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Payload:
    """What one input of a request carries; the task takes the part it understands.

    Attributes:
        image: encoded file bytes (JPEG, PNG, …); a view of the request's body must not outlive the request.
        text: decoded text.
        arrays: tensors by graph input name; "" for a tensor that came without a name.
        arguments: what a declared method is called with, by name; defaults are filled in.
        opened: what looking at the header left for the decoder; the task's own.
        tokens: how many the text was for the model, once it is decoded; 0 for all else.
    """

    image: bytes | memoryview | None = None
    text: str | None = None
    arrays: dict[str, Array] = field(default_factory=dict)
    arguments: Mapping[str, Value] = field(default_factory=dict)
    opened: object = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """How a classifier's scores are cut: select → min_value → sort by value, descending → cut.

    Attributes:
        max_concepts: 1–200.
        min_value: float32, compared with ≥; 0 lets everything pass.
        selected: indices into the model's concepts, or None for all of them.
    """

    max_concepts: int = 20
    min_value: np.float32 = np.float32(0.0)
    selected: tuple[int, ...] | None = None


# ---- what comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing a classifier can say; its place in the model's list is the graph's output index."""

    id: str
    name: str


@dataclass(slots=True, eq=False)
class ConceptScores:
    """A classifier's answer, best first: places in the model's concepts, integers (n,), and their values, float32 (n,).

    Both may be views into the arrays of a whole batch.
    """

    indices: Array
    values: Array


@dataclass(slots=True, eq=False)
class Embedding:
    """An embedder's answer: float32 (dimensions,)."""

    vector: Array


@dataclass(slots=True)
class Tensors:
    """A raw model's answer: graph output name → array without the batch axis."""

    arrays: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Returned:
    """What a declared method returns: a value of the type that its signature says."""

    value: Value


Result: TypeAlias = ConceptScores | Embedding | Tensors | Returned


# ---- method signatures -----------------------------------------------------------------------------------------------


class FieldType(enum.Enum):
    """Types of method arguments; names are those of Clarifai's ModelTypeField.DataType (PROTOCOL 4.1)."""

    STR = "STR"
    BYTES = "BYTES"
    INT = "INT"
    FLOAT = "FLOAT"
    BOOL = "BOOL"
    NDARRAY = "NDARRAY"
    JSON = "JSON_DATA"
    TEXT = "TEXT"
    IMAGE = "IMAGE"
    CONCEPT = "CONCEPT"
    REGION = "REGION"
    FRAME = "FRAME"
    AUDIO = "AUDIO"
    VIDEO = "VIDEO"
    NAMED_FIELDS = "NAMED_FIELDS"
    TUPLE = "TUPLE"
    LIST = "LIST"


class MethodKind(enum.Enum):
    """How a method is called; names are those of Clarifai's RunnerMethodType."""

    UNARY = "UNARY_UNARY"
    GENERATE = "UNARY_STREAMING"
    STREAM = "STREAMING_STREAMING"


@dataclass(frozen=True, slots=True)
class MethodField:
    """One argument of a method, or its return value.

    Attributes:
        default: the value as text when the argument may be left out, else None: a text as it is, others as JSON.
        items: the types inside a LIST (one), TUPLE or NAMED_FIELDS.
        iterator: one element a message, not all at once.
        range: least and largest number allowed, both included.
        choices: the only texts allowed; empty: any.
    """

    name: str
    type: FieldType
    description: str = ""
    default: str | None = None
    items: tuple["MethodField", ...] = ()
    iterator: bool = False
    range: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """A method that a model offers to `model.<name>(…)`; `returns.name` is "return".

    Attributes:
        least: the argument that says how good what is returned must be (`PredictOptions.min_value`), "" for none.
    """

    name: str
    description: str
    arguments: tuple[MethodField, ...]
    returns: MethodField
    kind: MethodKind = MethodKind.UNARY
    least: str = ""

    @property
    def streamed(self) -> MethodField | None:
        """The argument that comes one element a message, if there is one."""
        return next((argument for argument in self.arguments if argument.iterator), None)


# ---- names -----------------------------------------------------------------------------------------------------------

NAME_PATTERN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
"""Ids of users, apps, models and versions: what fits a file name, a URL path and a metric label alike."""


@dataclass(frozen=True, slots=True, order=True)
class ModelKey:
    """Which model, without its version: user id, app id, model id."""

    user_id: str
    app_id: str
    model_id: str

    def __str__(self) -> str:
        return f"{self.user_id}/{self.app_id}/{self.model_id}"
