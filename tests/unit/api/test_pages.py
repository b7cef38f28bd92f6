"""The main port's plain HTTP: alive, ready, and nothing else without credentials."""

import httpx
import pytest

from appliance.api import status
from appliance.api.pages import pages
from appliance.core import errors
from appliance.wire import asgi


async def ask(method: str, path: str, ready: bool = True) -> httpx.Response:
    def readiness() -> tuple[bool, dict[str, object]]:
        return ready, {"models": {"secret-model": "its problem"}}

    transport = httpx.ASGITransport(pages(readiness), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="https://box") as client:
        return await client.request(method, path)


@pytest.mark.parametrize(("ready", "code"), [(True, 200), (False, 503)])
async def test_readyz_says_whether_and_not_why(ready: bool, code: int) -> None:
    answer = await ask("GET", "/readyz", ready)
    assert (answer.status_code, answer.json()) == (code, {"ready": ready})
    assert answer.headers["cache-control"] == "no-store"


async def test_readyz_answers_head() -> None:
    answer = await ask("HEAD", "/readyz", False)
    assert (answer.status_code, answer.content) == (503, b"")


async def test_livez_answers() -> None:
    assert (await ask("GET", "/livez", False)).status_code == 200


@pytest.mark.parametrize("path", ["/", "/readyz/", "/metrics", "/status", "/v2/models", "/READYZ", "//readyz"])
async def test_another_path_is_not_served(path: str) -> None:
    answer = await ask("GET", path)
    assert answer.status_code == 404
    content = answer.json()["status"]
    assert (content["code"], content["description"]) == (11101, "Resource does not exist")
    assert "not served" in content["details"]


async def test_another_method_is_not_allowed() -> None:
    answer = await ask("POST", "/readyz")
    assert answer.status_code == 405
    assert answer.json()["status"]["code"] == 11103
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_what_was_not_foreseen_tells_nothing() -> None:
    def readiness() -> tuple[bool, dict[str, object]]:
        raise ValueError("secret text")

    transport = httpx.ASGITransport(pages(readiness), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="https://box") as client:
        answer = await client.get("/readyz")
    assert answer.status_code == 500
    assert answer.json()["status"]["code"] == 98004
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("problem", "row"),
    [
        (asgi.MALFORMED, status.TABLE[errors.InvalidRequest]),
        (asgi.TOO_LARGE, status.TABLE[errors.InputTooLarge]),
        (asgi.OVERLOADED, status.TABLE[errors.Overloaded]),
        (asgi.INTERNAL, status.INTERNAL),
    ],
)
def test_the_wire_refuses_in_the_words_of_the_error_table(problem: asgi.Problem, row: status.Row) -> None:
    assert (problem.status, problem.code, problem.description) == (row.http, row.code, row.description)


def test_the_wires_other_numbers_are_clarifais() -> None:
    assert status.name_of(asgi.METHOD_REFUSED.code) == "CONN_METHOD_NOT_ALLOWED"
    assert asgi.TIMED_OUT.code == status.TABLE[errors.DeadlineExceeded].code
