"""Messages are paid for before they are parsed: what is small on the wire may be large in memory."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.inference_pb2 import ModelInferRequest
from appliance.api.parsing import parsed, weight
from appliance.core.errors import InputTooLarge, InvalidRequest, Overloaded
from appliance.core.memory import MemoryBudget

Request = service_pb2.PostModelOutputsRequest
MIB = 2**20
EMPTY_INPUT = b"\x22\x00"
EMPTY_CONCEPT = b"\x1a\x00"


def framed(tag: bytes, content: bytes) -> bytes:
    """A field with that content, as the wire has it."""
    length, head = len(content), b""
    while length > 127:
        head += bytes([length & 127 | 128])
        length >>= 7
    return tag + head + bytes([length]) + content


def one_input(data: bytes) -> bytes:
    return framed(b"\x22", framed(b"\x12", data))


def read(body: bytes, kind: Any = Request, budget: int = 1024 * MIB) -> tuple[Any, int]:
    """The message, and what it and its body hold of the budget."""
    memory = MemoryBudget(budget).hold(len(body))
    found = []

    async def main() -> None:  # `asyncio.run` makes a text of what it returns
        found.append(await parsed(kind, body, memory))

    asyncio.run(main())
    return found[0], memory.count


def resident() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * 4096


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (EMPTY_INPUT * 900_000, Request),
        (one_input(EMPTY_CONCEPT * 900_000), Request),
        (b"\x0a\x00" * 900_000, service_pb2.ListStatusCodesRequest),
        (framed(b"\x2a", framed(b"\x2a", framed(b"\x12", b"\x01" * 16 * MIB))), ModelInferRequest),
        (framed(b"\x2a", framed(b"\x2a", b"\x42\x00" * 900_000)), ModelInferRequest),
    ],
    ids=["inputs", "concepts", "unknown", "packed numbers", "empty texts"],
)
def test_what_a_message_takes_is_held(body: bytes, kind: Any) -> None:
    before = resident()
    message, held = read(body, kind)
    assert message.ByteSize()
    assert resident() - before <= held * 1.2 + 8 * MIB


def test_a_message_for_which_there_is_no_memory_is_not_parsed() -> None:
    with pytest.raises(Overloaded):
        read(one_input(EMPTY_CONCEPT * 500_000), budget=32 * MIB)


def test_a_message_of_too_many_fields_is_refused() -> None:
    with pytest.raises(InputTooLarge, match="more than 1000000 fields"):
        read(one_input(EMPTY_CONCEPT * 1_000_001))


def test_what_is_only_bytes_takes_nothing_more() -> None:
    """A large picture is as large as it is."""
    data = resources_pb2.Data(image=resources_pb2.Image(base64=bytes(20 * MIB)))
    body = Request(inputs=[resources_pb2.Input(data=data)] * 4).SerializeToString()
    message, held = read(body)
    assert len(message.inputs) == 4
    assert held - len(body) < 8192


@given(st.binary(max_size=200))
def test_any_bytes_are_weighed(body: bytes) -> None:
    """Also those that are no message: saying so is the parser's."""
    assert weight(Request.DESCRIPTOR, body) >= 0


@pytest.mark.parametrize("size", [0, 100_000, 3 * MIB // 2])
def test_what_is_no_message_is_refused(size: int) -> None:
    with pytest.raises(InvalidRequest, match="not a PostModelOutputsRequest"):
        read(b"\x0a\x00" * (size // 2) + b"\x0a\x7f")
