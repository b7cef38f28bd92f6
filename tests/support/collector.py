"""A collector of traces: OTLP over HTTP on TLS, read by OpenTelemetry's own messages."""

import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from support.appliance import PATIENCE_S, Pki


class Collector:
    """Listens on a port of its own until `close`.

    Attributes:
        headers: of each message that it took.
        resources: what the senders said of themselves, name to value.
        spans: all that came.
        answers: HTTP statuses for the next messages; 200 when there is none.
    """

    def __init__(self, pki: Pki, port: int = 0) -> None:
        self.headers: list[Mapping[str, str]] = []
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Any] = []
        self.answers: deque[int] = deque()
        self.asked = 0
        self._news = threading.Condition()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pki.folder / "server.crt", pki.folder / "server.key")
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = collector._take(self.path, dict(self.headers), body)
                reply = ExportTraceServiceResponse().SerializeToString() if status == 200 else b""
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, format: str, *arguments: object) -> None:
                """Tests read what came, not what was printed."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port: int = self._server.server_address[1]
        self.url = f"https://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def _take(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        headers = {name.lower(): value for name, value in headers.items()}
        with self._news:
            self.asked += 1
            status = self.answers.popleft() if self.answers else 200
            if status == 200:
                assert path == "/v1/traces"
                assert headers["content-type"] == "application/x-protobuf"
                self.headers.append(headers)
                for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                    self.resources.append(attributes(each.resource))
                    self.spans += [span for scope in each.scope_spans for span in scope.spans]
            self._news.notify_all()
            return status

    def wait(self, ready: Callable[[], object]) -> None:
        """Return when it is true, looked at whenever something came."""
        end = time.monotonic() + PATIENCE_S
        with self._news:
            while not ready():
                assert self._news.wait(end - time.monotonic()), f"did not come; there are {self.names()}"

    def calls(self) -> list[Any]:
        """The spans of calls."""
        return [span for span in self.spans if span.kind == span.SPAN_KIND_SERVER]

    def names(self) -> list[str]:
        """What came."""
        return [span.name for span in self.spans]

    def steps(self, call: Any) -> dict[str, Any]:
        """The steps of a call, by name; of several of a name the last one."""
        return {span.name: span for span in self.spans if span.parent_span_id == call.span_id}

    def close(self) -> None:
        """Be gone: nobody listens on the port any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attributes(of: Any) -> dict[str, Any]:
    """The attributes of a span or a resource."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}
