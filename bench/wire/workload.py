"""What is asked and answered: three requests, their replies, and the work that every server does between the two."""

import struct
from dataclasses import dataclass
from pathlib import Path

from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2, status_pb2

ONE = "/bench.Wire/One"
"""Answers the prepared reply of one input, whatever is sent."""
BATCH = "/bench.Wire/Batch"
"""Answers the prepared reply of `BATCH_SIZE` inputs."""
PREDICT = "/bench.Wire/Predict"
"""Parses the request and builds the reply."""

BATCH_SIZE = 128
CONCEPTS = 20
_TEXT = "The quick brown fox jumps over the lazy dog, and the inference appliance says what the text is about: " * 2
_TEXT_BYTES = 150
_JPEG_BYTES = 50_000

_IDS = [f"concept-{rank:02}" for rank in range(CONCEPTS)]
_NAMES = [f"what the model sees here {rank:02}" for rank in range(CONCEPTS)]


@dataclass(frozen=True, slots=True)
class Payload:
    """One kind of request. Attributes: prepared: the method that answers with its prepared reply."""

    name: str
    title: str
    prepared: str
    request: bytes
    reply: bytes

    def write(self, folder: Path) -> None:
        """Write what h2load and the servers read: the request with gRPC's prefix, and both messages alone."""
        (folder / f"{self.name}.request").write_bytes(self.request)
        (folder / f"{self.name}.framed").write_bytes(b"\0" + len(self.request).to_bytes(4, "big") + self.request)
        (folder / f"{self.name}.expected").write_bytes(self.reply)


def payloads() -> dict[str, Payload]:
    """Text, JPEG and batch, by name."""
    text = resources_pb2.Data(text=resources_pb2.Text(raw=_TEXT[:_TEXT_BYTES]))
    # Nothing decodes it here, so what is between the markers does not matter.
    picture = (b"\xff\xd8\xff\xe0" + bytes(range(256)) * (_JPEG_BYTES // 256 + 1))[: _JPEG_BYTES - 2] + b"\xff\xd9"
    image = resources_pb2.Data(image=resources_pb2.Image(base64=picture))
    made = [
        _payload("text", ONE, "one text of 150 bytes → 20 concepts", [text]),
        _payload("jpeg", ONE, "one JPEG of 50 kB → 20 concepts", [image]),
        _payload("batch", BATCH, "128 texts of 150 bytes → 128 × 20 concepts", [text] * BATCH_SIZE),
    ]
    return {payload.name: payload for payload in made}


def write(folder: Path) -> dict[str, Payload]:
    """Write all files of the payloads, and the replies that the prepared methods answer; return the payloads."""
    made = payloads()
    for payload in made.values():
        payload.write(folder)
    (folder / "one.reply").write_bytes(made["text"].reply)
    (folder / "batch.reply").write_bytes(made["batch"].reply)
    return made


def _payload(name: str, prepared: str, title: str, inputs: list[resources_pb2.Data]) -> Payload:
    message = service_pb2.PostModelOutputsRequest(
        user_app_id=resources_pb2.UserAppIDSet(user_id="appliance", app_id="main"),
        model_id="general",
        version_id="0123456789abcdef0123456789abcdef",
        inputs=[resources_pb2.Input(data=data) for data in inputs],
    )
    request = bytes(message.SerializeToString())
    # One prepared reply serves text and JPEG; `PREDICT` answers each with its own, of the same length.
    reply = reference_answer(request)
    return Payload(name, f"{title} ({len(request)} bytes up, {len(reply)} down)", prepared, request, reply)


def value(length: int, rank: int) -> float:
    """A concept's value; depends on the input, so that no server can keep the reply from one request to the next."""
    return (length % 97 + 1) / (100 * (rank + 1))


def reference_answer(body: bytes) -> bytes:
    """The right reply, built the plain way; what `answer` and echo.cc must equal, byte for byte."""
    request = service_pb2.PostModelOutputsRequest.FromString(body)
    success = status_pb2.Status(code=status_code_pb2.SUCCESS, description="Ok")
    response = service_pb2.MultiOutputResponse(status=success)
    for item in request.inputs:
        concepts = [
            resources_pb2.Concept(id=_IDS[rank], name=_NAMES[rank], value=value(_length(item.data), rank))
            for rank in range(CONCEPTS)
        ]
        response.outputs.add(status=success, data=resources_pb2.Data(concepts=concepts))
    return bytes(response.SerializeToString())


def _length(data: resources_pb2.Data) -> int:
    return len(data.text.raw.encode()) if data.HasField("text") else len(data.image.base64)


# ---- the same work, as fast as Python does it ------------------------------------------------------------------------
# What does not change between replies is serialised once. A value that is not zero always takes four bytes, so that
# every length on the way is known too.


def _pieces() -> tuple[bytes, struct.Struct, list[bytes]]:
    """The reply's status; an output as a struct of texts and floats; and the texts, one before each float."""
    success = status_pb2.Status(code=status_code_pb2.SUCCESS, description="Ok")
    mark = 1.0
    concepts = [resources_pb2.Concept(id=_IDS[rank], name=_NAMES[rank], value=mark) for rank in range(CONCEPTS)]
    message = service_pb2.MultiOutputResponse()
    message.outputs.add(status=success, data=resources_pb2.Data(concepts=concepts))
    texts = message.SerializeToString().split(struct.pack("<f", mark))[:-1]
    layout = struct.Struct("<" + "".join(f"{len(text)}sf" for text in texts))
    return service_pb2.MultiOutputResponse(status=success).SerializeToString(), layout, texts


_STATUS, _OUTPUT, _TEXTS = _pieces()
_DIVISORS = [100 * (rank + 1) for rank in range(CONCEPTS)]


def answer(body: bytes) -> bytes:
    """Parse a request and build its reply."""
    parts = [_STATUS]
    fields: list[bytes | float] = [b""] * (2 * CONCEPTS)
    fields[::2] = _TEXTS
    for item in service_pb2.PostModelOutputsRequest.FromString(body).inputs:
        score = _length(item.data) % 97 + 1
        fields[1::2] = [score / divisor for divisor in _DIVISORS]
        parts.append(_OUTPUT.pack(*fields))
    return b"".join(parts)
