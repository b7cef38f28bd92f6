"""What the main port answers in plain HTTP: whether we are alive and ready, for whoever stands before us, and the API.

The first two need no credentials, and so tell no names and no reasons; those are on the admin port. Every error is JSON
with a `status`, like the API's replies.
"""

from collections.abc import Callable, Mapping, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from appliance.api import status, web
from appliance.core.errors import InvalidRequest, UnknownType

_NOT_SERVED = status.TABLE[UnknownType]
_MALFORMED = status.TABLE[InvalidRequest]

_FRESH = {"cache-control": "no-store"}


def pages(readiness: Callable[[], tuple[bool, Mapping[str, object]]], routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The ASGI application.

    Args:
        readiness: whether we serve; what else it tells stays inside.
        routes: what else is served; the first one that matches wins.
    """

    async def livez(request: Request) -> Response:
        return JSONResponse({"alive": True}, headers=_FRESH)

    async def readyz(request: Request) -> Response:
        ready, _ = readiness()
        return JSONResponse({"ready": ready}, 200 if ready else 503, headers=_FRESH)

    served = [Route("/livez", livez), Route("/readyz", readyz), *routes]
    app = Starlette(routes=served, exception_handlers={HTTPException: _refuse, Exception: _fail})
    app.router.redirect_slashes = False
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: a path or a method that nobody serves."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return web.refusal(_NOT_SERVED, "This path is not served here; /v2/openapi.json lists those that are.")
    if error.status_code == 405:
        return web.refusal(status.METHOD_NOT_ALLOWED, "This path is served, but not with this method.", error.headers)
    return web.refusal(_MALFORMED, error.detail, error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    """Whatever was not foreseen; the connection's side logs it."""
    return web.refusal(status.INTERNAL, "Something went wrong in the appliance; its log tells more.")
