"""The operators' pages, called as an application: no sockets."""

import json
from pathlib import Path

import httpx

from appliance.core.errors import ConfigError
from appliance.daemon.admin import private_app


class Strange:
    """A daemon whose catalog says what no encoding takes, and whose root is gone."""

    def readiness(self) -> tuple[bool, dict[str, object]]:
        return True, {"not_ready": {"bad\udcff": "half \ud800, \x1b[31m"}}

    def describe(self) -> dict[str, object]:
        return {"catalog": [{"bundle": "bad\udcff", "path": Path("bad\udcff"), "seconds": float("nan")}]}

    def overview(self) -> bytes:
        return b"{}"

    async def reload(self, by: str) -> str:
        raise ConfigError("not \ud800")

    async def look(self) -> None:
        raise ConfigError("catalog.root cannot be read")


async def test_no_page_fails_for_a_text_that_no_encoding_takes() -> None:
    """One bundle must not hide from the operator what is wrong, with it or any other."""
    app = private_app(Strange(), lambda opened: b"")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://appliance") as client:
        ready, status = await client.get("/readyz"), await client.get("/status")
        reload, look = await client.post("/reload"), await client.post("/look")
    assert ready.json() == {"not_ready": {"bad\udcff": "half \ud800, \x1b[31m"}}
    assert [reply.status_code for reply in (ready, status, reload, look)] == [200, 200, 409, 200]
    assert all(reply.content.isascii() for reply in (ready, status, reload, look))
    assert json.loads(look.content)["catalog"][0]["bundle"] == "bad\udcff"
