"""The words all rooms share: what a call is, what goes into a model and what comes out of it.

No protobuf here and no onnxruntime: `api/` turns messages into these, `tasks/` turns these into tensors.
"""

import enum
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from appliance.core.memory import Reservation

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
    """

    method: str
    metadata: Mapping[str, str]
    peer: str
    deadline: float | None = None
    certificate: bytes | None = None
    chain: bytes = b""
    memory: Reservation | None = None
    reader: Callable[[bytes], Any] | None = None


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
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
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


# ---- what goes in ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Payload:
    """What one input of a request carries; the task takes the part it understands.

    Attributes:
        image: encoded file bytes (JPEG, PNG, …).
        text: decoded text.
        arrays: tensors by graph input name; "" for a tensor that came without a name.
        opened: what looking at the header left for the decoder; the task's own.
    """

    image: bytes | None = None
    text: str | None = None
    arrays: dict[str, Array] = field(default_factory=dict)
    opened: object = None


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


@dataclass(frozen=True, slots=True)
class ConceptScores:
    """A classifier's answer, best first: indices into the model's concepts and their float32 values, equally long."""

    indices: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Embedding:
    """An embedder's answer: float32 (dimensions,)."""

    vector: Array


@dataclass(slots=True)
class Tensors:
    """A raw model's answer: graph output name → array without the batch axis."""

    arrays: Mapping[str, Array]


Result: TypeAlias = ConceptScores | Embedding | Tensors


# ---- method signatures -----------------------------------------------------------------------------------------------


class FieldType(enum.Enum):
    """Types of method arguments; names are those of Clarifai's ModelTypeField.DataType (PROTOCOL 4.1)."""

    STR = "STR"
    INT = "INT"
    FLOAT = "FLOAT"
    NDARRAY = "NDARRAY"
    IMAGE = "IMAGE"
    CONCEPT = "CONCEPT"
    NAMED_FIELDS = "NAMED_FIELDS"
    LIST = "LIST"


@dataclass(frozen=True, slots=True)
class MethodField:
    """One argument of a method, or its return value.

    Attributes:
        default: the value as text when the argument may be left out, else None.
        items: the types inside a LIST or NAMED_FIELDS.
    """

    name: str
    type: FieldType
    description: str = ""
    default: str | None = None
    items: tuple["MethodField", ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """A unary method that a model offers to `model.<name>(…)`."""

    name: str
    description: str
    arguments: tuple[MethodField, ...]
    returns: MethodField


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
