"""What the connections of a server share, above all the heads of calls that were understood once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from appliance.core.memory import MemoryBudget
from appliance.core.timing import HEADER
from appliance.core.types import Endpoint, RpcAbort
from appliance.wire import grpc
from appliance.wire.asgi import ASGIApp
from appliance.wire.settings import WireSettings

_HEADS = 4096
"""Heads that are remembered. Most clients send the same one with every call."""

_HEAD_KEPT = 2048
"""Bytes of a head that is remembered: whoever sends others must not fill our memory with them."""

_ONCE = b"\0traceparent\0"
"""In a head that does not come again: each call has its own."""

_NOWHERE = Endpoint()


@dataclass(frozen=True, slots=True)
class Head:
    """The headers of gRPC calls, understood once for all calls that send the same ones.

    Attributes:
        refusal: how such a call ends at once, or None.
        gzip: whether its compressed messages are gzip.
        wants_gzip: whether the replies shall be, too: who packs what it sends, and says so, unpacks what it gets.
        timed: whether the caller wants to be told where the time goes.
    """

    method: str
    metadata: Mapping[str, str]
    endpoint: Endpoint
    refusal: RpcAbort | None
    gzip: bool
    wants_gzip: bool
    timed: bool


@dataclass(slots=True)
class Context:
    """What all connections of a server share.

    Attributes:
        too_large: told of every request that is turned away for its size.
        leaving: HTTP/1.1 connections shall end with their next answer.
        load: what gRPC calls say of us in their trailers, base64; b"": nothing.
    """

    endpoints: Mapping[str, Endpoint]
    app: ASGIApp
    settings: WireSettings
    budget: MemoryBudget
    too_large: Callable[[], None] = lambda: None
    heads: dict[bytes, Head] = field(default_factory=dict)
    leaving: bool = False
    load: bytes = b""

    def head(self, block: bytes) -> Head:
        """Headers as the native session gives them."""
        known = self.heads.get(block)
        if known is None:
            known = _parse_head(block, self.endpoints)
            if len(block) > _HEAD_KEPT or _ONCE in block:
                return known
            if len(self.heads) >= _HEADS:
                self.heads.clear()
            self.heads[block] = known
        return known


def header_pairs(block: bytes) -> list[tuple[bytes, bytes]]:
    """Headers as the native session gives them, one by one."""
    parts = block.split(b"\0")
    return list(zip(parts[0::2], parts[1::2], strict=False))


def _parse_head(block: bytes, endpoints: Mapping[str, Endpoint]) -> Head:
    raw: dict[bytes, bytes] = {}
    for name, value in header_pairs(block):
        raw.setdefault(name, value)
    method = raw.get(b":path", b"").decode("latin-1")
    encoding = raw.get(b"grpc-encoding", b"identity")
    endpoint = endpoints.get(method, _NOWHERE)
    refusal = None
    if raw.get(b":method") != b"POST" or endpoint is _NOWHERE:
        refusal = grpc.not_served(method)
    elif encoding not in (b"identity", b"gzip"):
        refusal = grpc.encoding_not_served(encoding.decode("latin-1"))
    gzip = encoding == b"gzip"
    wants_gzip = gzip and b"gzip" in raw.get(b"grpc-accept-encoding", b"")
    metadata = grpc.metadata(raw.items())
    return Head(method, metadata, endpoint, refusal, gzip, wants_gzip, HEADER in metadata)
