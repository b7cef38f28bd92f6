"""The status page: three files, the document that they show, and a way to try a model.

Who reads it may run any page in the same browser, so that every door is shut that such a page might use: a foreign name
that was made to mean this machine (DNS rebinding) is refused by the Host header, foreign pages by Origin; nothing is
kept in the browser, and only our own files run in it.
"""

import ipaddress
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from appliance.core.errors import ApplianceError, ConfigError, InputTooLarge, KeyInvalid, Overloaded
from appliance.core.files import printable
from appliance.core.types import NAME_PATTERN
from appliance.daemon.trial import Trial

KEY_HEADER = "x-appliance-key"
"""The key that a model is tried with. Not `Authorization`, which is for whoever may read the page; and a header that no
page of another origin may send without asking first."""

DOCUMENT = "/status.json"
FILES = {"/": "status.html", "/status.css": "status.css", "/status.js": "status.js"}
"""Paths that tell nothing of this appliance: anybody may read them, where pages need credentials."""

_ASSETS = Path(__file__).with_name("assets")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_HTTP: tuple[tuple[type[ApplianceError], int], ...] = (
    (KeyInvalid, 401),
    (InputTooLarge, 413),
    (ConfigError, 501),
    (Overloaded, 503),
)
"""What keeps a call from the API, as HTTP status; anything else is 502."""


def page_routes(document: Callable[[], bytes], trial: Trial, *, local: bool) -> list[Route]:
    """The page's routes.

    Args: document: the status, as JSON. local: only this machine comes here, without TLS and without credentials.
    """
    files = {path: ((_ASSETS / name).read_bytes(), _TYPES[Path(name).suffix]) for path, name in FILES.items()}

    async def file(request: Request) -> Response:
        content, kind = files[request.scope["path"]]
        return _refusal(request, local) or Response(content, headers=_HEADERS, media_type=kind)

    async def status(request: Request) -> Response:
        return _refusal(request, local) or Response(document(), headers=_HEADERS, media_type="application/json")

    async def attempt(request: Request) -> Response:
        refusal = _refusal(request, local)
        if refusal is not None:
            return refusal
        user, app, model = (request.path_params[name] for name in ("user", "app", "model"))
        if not all(NAME_PATTERN.fullmatch(name) for name in (user, app, model)):
            return _failed(404, "There is no such model.")
        path = f"/v2/users/{user}/apps/{app}/models/{model}/outputs"
        try:
            reply = await trial.predict(path, request.headers.get(KEY_HEADER, ""), request.stream())
        except ApplianceError as error:
            return _failed(next((http for kind, http in _HTTP if isinstance(error, kind)), 502), str(error))
        except ClientDisconnect:
            return _failed(499, "You went away.")  # nobody reads it
        return Response(reply.body, reply.http, _HEADERS, "application/json")

    return [
        *(Route(path, file) for path in files),
        Route(DOCUMENT, status),
        Route("/try/{user}/{app}/{model}", attempt, methods=["POST"]),
    ]


def _refusal(request: Request, local: bool) -> Response | None:
    """The answer to whoever must not come in, or None."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if local and not _means_this_machine(host):
        sentence = (
            "This page is for this machine alone, and answers to localhost, 127.0.0.1 and [::1], not to "
            f'"{printable(host[:100])}". From elsewhere come through a tunnel (ssh -L 9464:localhost:9464), or see '
            "docs/status.md."
        )
        return PlainTextResponse(f"{sentence}\n", 421, _HEADERS)
    if origin is not None and _place(origin) != host.lower():
        return _failed(403, "Pages of other origins may not ask here.")
    return None


def _means_this_machine(host: str) -> bool:
    """Whether no name server can have made that name mean this machine: it means nothing else."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _place(origin: str) -> str:
    """Host and port of an origin; "" for one that has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _failed(http: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, http, _HEADERS)
