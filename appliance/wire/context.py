"""What the connections of a server share, above all the heads of calls that were understood once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from appliance.core.memory import MemoryBudget
from appliance.core.types import Endpoint, RpcStatus
from appliance.wire.asgi import ASGIApp
from appliance.wire.settings import WireSettings

_HEADS = 4096
"""Heads that are remembered. Most clients send the same one with every call."""

_HEAD_KEPT = 2048
"""Bytes of a head that is remembered: whoever sends others must not fill our memory with them."""

_NOWHERE = Endpoint()
_ENCODINGS = (None, b"identity", b"gzip")


@dataclass(frozen=True, slots=True)
class Head:
    """The headers of gRPC calls, understood once for all calls that send the same ones.

    Attributes:
        refusal: the status and sentence that such a call ends with, or None.
        gzip: whether its compressed messages are gzip.
        wants_gzip: whether the replies shall be, too: who packs what it sends, and says so, unpacks what it gets.
    """

    method: str
    metadata: Mapping[str, str]
    endpoint: Endpoint
    refusal: tuple[RpcStatus, str] | None
    gzip: bool
    wants_gzip: bool


@dataclass(slots=True)
class Context:
    """What all connections of a server share.

    Attributes:
        leaving: HTTP/1.1 connections shall end with their next answer.
    """

    endpoints: Mapping[str, Endpoint]
    app: ASGIApp
    settings: WireSettings
    budget: MemoryBudget
    heads: dict[bytes, Head] = field(default_factory=dict)
    leaving: bool = False

    def head(self, block: bytes) -> Head:
        """Headers as the native session gives them."""
        known = self.heads.get(block)
        if known is None:
            known = _parse_head(block, self.endpoints)
            if len(block) > _HEAD_KEPT:
                return known
            if len(self.heads) >= _HEADS:
                self.heads.clear()
            self.heads[block] = known
        return known


def _parse_head(block: bytes, endpoints: Mapping[str, Endpoint]) -> Head:
    parts = block.split(b"\0")
    raw: dict[bytes, bytes] = {}
    for name, value in zip(parts[0::2], parts[1::2], strict=False):
        raw.setdefault(name, value)
    method = raw.get(b":path", b"").decode("latin-1")
    encoding = raw.get(b"grpc-encoding")
    metadata = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in raw.items()
        if name[:1] != b":" and name[-4:] != b"-bin"
    }
    endpoint = endpoints.get(method, _NOWHERE)
    refusal = None
    if raw.get(b":method") != b"POST" or endpoint is _NOWHERE:
        refusal = (RpcStatus.UNIMPLEMENTED, f"This appliance does not serve {method[:200]}.")
    elif encoding not in _ENCODINGS:
        shown = encoding.decode("latin-1")[:40] if encoding else ""
        refusal = (RpcStatus.UNIMPLEMENTED, f"Messages encoded as {shown!r} are not understood; use gzip or identity.")
    gzip = encoding == b"gzip"
    wants_gzip = gzip and b"gzip" in raw.get(b"grpc-accept-encoding", b"")
    return Head(method, metadata, endpoint, refusal, gzip, wants_gzip)
