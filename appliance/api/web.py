"""What every HTTP route over an endpoint needs, whatever its JSON looks like: a call, admission, a body, an error page.

    async def route(request: Request) -> Response:
        async with calling(request, "/clarifai.api.V2/PostModelOutputs") as call:
            reply = await unary(request, call, endpoint, request_size)
            ...                                     # `status_in(reply)` says whether it is good

What these raise, `status_of` makes a status of. A body that is not the RPC's own message has a reader in the call
(`Call.reader`): so one that cannot be read is met, counted and logged where every other error is.
"""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping

from clarifai_grpc.grpc.api.status import status_pb2
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from appliance.api import protojson, status
from appliance.api.status import Row
from appliance.core.errors import ApplianceError, EncodingNotRead, InputTooLarge, InvalidRequest
from appliance.core.logs import RateLimitedLog, without_keys
from appliance.core.timing import HEADER
from appliance.core.types import Call, Endpoint, RpcAbort
from appliance.wire import grpc, sentences
from appliance.wire.asgi import PEER, ClientGone, admitted
from appliance.wire.peer import Peer

_log = RateLimitedLog(logging.getLogger(__name__))

_RETRY_AFTER = "1"
"""Seconds after which a caller who was told to try later may do so."""


# ---- calls -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def calling(request: Request, method: str) -> AsyncIterator[Call]:
    """A call to that gRPC method; what it holds of the memory budget is given back at the end of the block.

    Raises: InvalidRequest: a header of it cannot be read.
    """
    peer: Peer = request.scope["extensions"][PEER]
    headers = grpc.metadata(request.scope["headers"])
    call = Call(method, headers, peer.text, _deadline(headers), peer.certificate, peer.chain)
    try:
        yield call
    finally:
        if call.memory is not None:
            call.memory.release()


async def unary(request: Request, call: Call, endpoint: Endpoint, request_size: int) -> bytes:
    """The endpoint's reply message, good or bad; the body is let in once the caller is known.

    Args:    request_size: `limits.request_size`.
    Raises: RpcAbort, ApplianceError: there is no reply message; see `status_of`. ClientDisconnect: nobody is there.
    """
    assert endpoint.unary is not None
    refusal = admit(request, call, endpoint)
    if refusal is not None:
        return refusal
    return await endpoint.unary(call, await body_of(request, call, request_size))


def admit(request: Request, call: Call, endpoint: Endpoint) -> bytes | None:
    """Ask whether this caller may send this body; the reply that says no, or None.

    From then on the part of the body that is on its way is the caller's, no longer the strangers'.
    Raises: RpcAbort, EncodingNotRead.
    """
    assert endpoint.admit is not None, "an endpoint that strangers may call has no HTTP route"
    refusal = endpoint.admit(call, _announced(call))
    if refusal is not None:
        return refusal
    encoding = call.metadata.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise EncodingNotRead(encoding)
    assert call.memory is not None
    admitted(request.scope, call.memory)
    return None


def body_limit(request_size: int) -> int:
    """Bytes that a body may have whose message may have `request_size`: base64 makes it longer by a third."""
    return request_size * 3 // 2


async def body_of(request: Request, call: Call, request_size: int) -> bytes:
    """The body of an admitted call; its memory grows with what comes beyond the length that was announced.

    Raises: InputTooLarge: over `body_limit`. Overloaded: over the memory that is free. ClientDisconnect.
    """
    assert call.memory is not None
    limit = body_limit(request_size)
    too_large = InputTooLarge(sentences.body_too_large(request_size))
    if _announced(call) > limit:
        raise too_large
    pieces = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise too_large
        call.memory.grow(max(0, size - call.memory.count))
        pieces.append(piece)
    return b"".join(pieces)


def _announced(call: Call) -> int:
    """The length that the client says its body has, 0 when it does not say; the wire has seen that it is a number."""
    length = call.metadata.get("content-length", "")
    return int(length) if length.isdecimal() and length.isascii() and len(length) < 20 else 0


def _deadline(headers: Mapping[str, str]) -> float | None:
    """When the caller's time is over; `grpc-timeout` means in HTTP what it means in gRPC. Raises: InvalidRequest."""
    if "grpc-timeout" not in headers:
        return None
    try:
        return time.monotonic() + grpc.timeout_seconds(headers["grpc-timeout"])
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


# ---- how a call ended ------------------------------------------------------------------------------------------------


def status_in(reply: bytes) -> status_pb2.Status:
    """The status of a reply message of any RPC: all of them have it in the same place."""
    return status_pb2.BaseResponse.FromString(reply).status


def status_of(error: Exception, request: Request) -> status_pb2.Status:
    """What the caller reads of an error that `calling`, `unary` and their parts raise.

    Raises: the error itself, when nobody is there to read.
    """
    if isinstance(error, RpcAbort):
        return status.of_abort(error)  # logged where it was made
    if isinstance(error, ClientDisconnect | ClientGone):
        raise error
    if isinstance(error, ApplianceError):
        return _logged(status.of_error(error), request)
    # Last resort of every route: the caller gets a stock sentence, the log the traceback.
    path = without_keys(request.scope["path"])
    logging.getLogger(__name__).error("unforeseen error", exc_info=error, extra={"path": path})
    return status.of_error(error)


def _logged(found: status_pb2.Status, request: Request) -> status_pb2.Status:
    peer: Peer = request.scope["extensions"][PEER]
    _log.write("refused", logging.WARNING, found.details, peer=peer.text, code=status.name_of(found.code))
    return found


def headers_of(found: status_pb2.Status) -> dict[str, str]:
    """The headers that HTTP asks for with a status: how to authenticate, when to come again, what is read."""
    http = status.http_of(found)
    if http == 401:
        return {"www-authenticate": 'Key realm="clarifai"'}
    if http in (429, 503):
        return {"retry-after": _RETRY_AFTER}
    if http == 415:
        return {"accept-encoding": "identity"}
    return {}


def timing_of(call: Call) -> dict[str, str]:
    """The header that says where the time went, to a caller who asked."""
    return {HEADER: call.timing.said} if call.timing is not None and call.timing.said else {}


def problem(found: status_pb2.Status, headers: Mapping[str, str] | None = None) -> Response:
    """A reply that is only a status, as JSON, with the HTTP status that says the same."""
    return JSONResponse(
        {"status": protojson.plain(found)}, status.http_of(found), {**headers_of(found), **(headers or {})}
    )


def refusal(row: Row, details: str, headers: Mapping[str, str] | None = None) -> Response:
    """The same, of a row of the error table."""
    return problem(status.of_row(row, details), headers)
