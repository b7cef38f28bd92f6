"""What the main port answers in plain HTTP: whether we are alive and ready, for whoever stands before us.

These pages need no credentials, and so tell no names and no reasons; those are on the admin port. Every error is JSON
with a `status`, like the API's replies.
"""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from appliance.api import status
from appliance.api.status import Row
from appliance.core.errors import InvalidRequest, UnknownType

_NOT_SERVED = status.TABLE[UnknownType]
_MALFORMED = status.TABLE[InvalidRequest]

_FRESH = {"cache-control": "no-store"}


def pages(readiness: Callable[[], tuple[bool, Mapping[str, object]]]) -> Starlette:
    """The ASGI application.

    Args:    readiness: whether we serve; what else it tells stays inside.
    """

    async def livez(request: Request) -> Response:
        return JSONResponse({"alive": True}, headers=_FRESH)

    async def readyz(request: Request) -> Response:
        ready, _ = readiness()
        return JSONResponse({"ready": ready}, 200 if ready else 503, headers=_FRESH)

    routes: list[BaseRoute] = [
        Route("/livez", livez),
        Route("/readyz", readyz),
        # The REST twins of the RPCs come here.
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refuse, Exception: _fail})
    app.router.redirect_slashes = False
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: a path or a method that nobody serves."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _problem(_NOT_SERVED, "This path is not served here. The API is served over gRPC and gRPC-Web.")
    if error.status_code == 405:
        return _problem(status.METHOD_NOT_ALLOWED, "This path is served, but not with this method.", error.headers)
    return _problem(_MALFORMED, error.detail, error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    """Whatever was not foreseen; the connection's side logs it."""
    return _problem(status.INTERNAL, "Something went wrong in the appliance; its log tells more.")


def _problem(row: Row, details: str, headers: Mapping[str, str] | None = None) -> Response:
    content: dict[str, Any] = MessageToDict(
        status.of_row(row, details), preserving_proto_field_name=True, use_integers_for_enums=True
    )
    return JSONResponse({"status": content}, row.http, headers=headers)
