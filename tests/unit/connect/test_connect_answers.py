"""What clients hear that could not be forwarded."""

import json
import time

import pytest
from clarifai_grpc.grpc.api.status import status_code_pb2

from appliance.api import status
from appliance.connect import answers
from appliance.connect.trouble import Trouble
from appliance.core import errors


def trouble(http: int) -> Trouble:
    """Some trouble."""
    return Trouble("kind", "Something is wrong:\r\n“so”.", "Mend it.", http)


def parts(answer: bytes) -> tuple[str, dict[str, str], bytes]:
    """Status line, headers, body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    return first, {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body


@pytest.mark.parametrize(
    ("http", "line", "code"),
    [
        (400, "HTTP/1.1 400 Bad Request", 11100),
        (502, "HTTP/1.1 502 Bad Gateway", 40034),
        (503, "HTTP/1.1 503 Service Unavailable", 10030),
    ],
)
def test_an_http1_client_gets_json_like_the_apis(http: int, line: str, code: int) -> None:
    first, headers, body = parts(answers.over_http1(trouble(http), head=False, retry_at=time.monotonic() + 3.5))
    assert first == line
    assert headers["content-length"] == str(len(body))
    assert headers["connection"] == "close"
    assert headers.get("retry-after") == ("4" if http == 503 else None)
    content = json.loads(body)["status"]
    assert content["code"] == code
    assert content["details"] == trouble(http).sentence


def test_a_head_request_gets_no_body_and_a_past_retry_is_a_second() -> None:
    _, headers, body = parts(answers.over_http1(trouble(503), head=True, retry_at=0.0))
    assert body == b""
    assert int(headers["content-length"]) > 0
    assert headers["retry-after"] == "1"


def test_codes_are_the_apis() -> None:
    """This room may not see that one's table."""
    for http, row in {400: status.TABLE[errors.InvalidRequest], 503: status.TABLE[errors.Draining]}.items():
        assert answers._PROBLEMS[http] == (row.code, row.description)
    assert answers._PROBLEMS[502][0] == status_code_pb2.EXTERNAL_CONNECTION_ERROR
