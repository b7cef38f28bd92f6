"""Asking the central orchestrator: its RPCs by name over one TLS channel, with the PAT, deadlines and retries.

The PAT is read from its file, sent as metadata, and shown nowhere: not in a log, not in a sentence.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2
from google.protobuf import message_factory

from appliance import __version__
from appliance.core.config import Orchestrator
from appliance.core.errors import ConfigError
from appliance.core.files import file_error, printable
from appliance.orchestrator.backoff import pause_s
from appliance.orchestrator.pat import read_pat

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["V2"]

CALL_S = 30.0
"""How long one attempt of a unary call may take."""

_ATTEMPTS = 5
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0

TRY_AGAIN = frozenset(
    {
        status_code_pb2.CONN_THROTTLED,
        status_code_pb2.CONN_EXCEED_HOURLY_LIMIT,
        status_code_pb2.TRY_AGAIN,
    }
)
"""Codes in a reply's status after which the same call may succeed (PROTOCOL 1.5)."""

_REPEATABLE = ("PostNodepoolStatus", "PostComputePlaneMetrics")
"""Posts that create nothing."""

_OPTIONS = (
    ("grpc.max_receive_message_length", 2**30),
    ("grpc.max_send_message_length", 2**30),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Streams that wait for work say nothing for hours.
    ("grpc.http2.max_pings_without_data", 0),
    # A connection for each channel: an orchestrator may bound the streams of one.
    ("grpc.use_local_subchannel_pool", 1),
    # When to try again is our own decision (`backoff`), not that of the library.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_PER_PAGE = 100


class CentralError(ConfigError):
    """The orchestrator cannot be reached, or does not do what it is asked.

    Attributes:
        code: of the reply's status, NOT_IMPLEMENTED where there is no such RPC; 0 where there was no reply.
    """

    def __init__(self, sentence: str, code: int = 0) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Secrets:
    """What a connection is made with: the PAT, and what the files of TLS hold, PEM; None for those that are not set."""

    pat: str = field(repr=False)
    root_ca: bytes | None
    key: bytes | None = field(repr=False)
    certificate: bytes | None

    @classmethod
    def read(cls, settings: Orchestrator, pat: str | None = None) -> Self:
        """Args: pat: None: that of its file. Raises: ConfigError: a file cannot be read, or holds something else."""
        return cls(
            pat or read_pat(settings.pat_file),
            _content(settings.root_ca, "orchestrator.root_ca"),
            _content(settings.key, "orchestrator.key"),
            _content(settings.certificate, "orchestrator.certificate"),
        )


class Central:
    """A channel to the orchestrator. Used from one event loop.

    Attributes:
        clock: Unix time that the last reply bore as its `date` (RFC 9110, 6.6.1), to the second; None: it bore none.
    """

    def __init__(self, settings: Orchestrator, secrets: Secrets) -> None:
        """Args: settings: with an api_base."""
        assert settings.api_base is not None, "it is enrolled"
        self.base = settings.api_base
        self.secrets = secrets
        self.pat = pat = secrets.pat
        self.clock: float | None = None
        credentials = grpc.ssl_channel_credentials(secrets.root_ca, secrets.key, secrets.certificate)
        options: list[tuple[str, Any]] = [*_OPTIONS, ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000))]
        # What the environment says about proxies is for other programs: the configuration alone decides.
        options += [("grpc.http_proxy", settings.proxy)] if settings.proxy else [("grpc.enable_http_proxy", 0)]
        self._channel = grpc.aio.secure_channel(self.base.removeprefix("https://"), credentials, options=options)
        self._metadata = (
            ("authorization", f"Key {pat}"),
            ("x-clarifai-request-id-prefix", f"inference-appliance-{__version__}"),
        )
        self._calls: dict[str, Callable[..., Any]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def call(self, rpc: str, **fields: Any) -> Any:
        """The reply to a unary RPC, which is a success.

        A post is not sent again after UNAVAILABLE: it may have been done. Who gets first and posts then finds out.

        Raises: CentralError: it is none, or there is none after some attempts.
        """
        attempts = _ATTEMPTS if rpc in _REPEATABLE or not rpc.startswith("Post") else 1
        request = message_factory.GetMessageClass(_SERVICE.methods_by_name[rpc].input_type)(**fields)
        for attempt in range(1, _ATTEMPTS + 1):
            sent = self._callable(rpc)(request, metadata=self._metadata, timeout=CALL_S)
            try:
                reply = await sent
                self.clock = _date(await sent.initial_metadata())
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or attempt >= attempts:
                    unknown = error.code() is grpc.StatusCode.UNIMPLEMENTED
                    code = status_code_pb2.NOT_IMPLEMENTED if unknown else 0
                    raise CentralError(self._unreachable(rpc, error), code) from None
            else:
                if reply.status.code == status_code_pb2.SUCCESS:
                    return reply
                if reply.status.code not in TRY_AGAIN or attempt == _ATTEMPTS:
                    raise CentralError(self._refused(rpc, reply.status), reply.status.code)
            await asyncio.sleep(pause_s(attempt, _FIRST_WAIT_S, _LONGEST_WAIT_S))
        raise AssertionError("the last attempt returns or raises")

    async def find(self, rpc: str, missing: int, **fields: Any) -> Any | None:
        """The reply to a Get; None when there is no such thing. Raises: CentralError."""
        try:
            return await self.call(rpc, **fields)
        except CentralError as error:
            if error.code == missing:
                return None
            raise

    async def pages(self, rpc: str, field: str, **fields: Any) -> AsyncIterator[Any]:
        """What a List finds, over all pages. Raises: CentralError."""
        page = 1
        while True:
            reply = await self.call(rpc, page=page, per_page=_PER_PAGE, **fields)
            found = getattr(reply, field)
            for message in found:
                yield message
            if len(found) < _PER_PAGE:
                return
            page += 1

    def stream(self, rpc: str, request_id: str) -> Any:
        """Begin a bidirectional RPC: an open call, to be read and written (`grpc.aio.StreamStreamCall`)."""
        method = _SERVICE.methods_by_name[rpc]
        if rpc not in self._calls:
            self._calls[rpc] = self._channel.stream_stream(
                f"/{_SERVICE.full_name}/{rpc}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )
        return self._calls[rpc](metadata=(*self._metadata, ("x-request-id", request_id)))

    async def close(self) -> None:
        """Close the channel; open calls are cancelled."""
        await self._channel.close()

    async def whose(self) -> str:
        """The id of the user that the PAT acts for. Raises: CentralError."""
        me = resources_pb2.UserAppIDSet(user_id="me")
        return str((await self.call("GetUser", user_app_id=me)).user.id)

    def shown(self, text: str, most: int = 300) -> str:
        """What the orchestrator, or a proxy, said: in one line, and without the PAT, which it may repeat."""
        return printable(text.replace(self.pat, "********"))[:most]

    def _unreachable(self, rpc: str, error: grpc.aio.AioRpcError) -> str:
        return (
            f"{self.base} does not answer {rpc}: {error.code().name}, {self.shown(error.details() or '')}. "
            "Check orchestrator.api_base, root_ca and proxy, and that the port is open from here."
        )

    def _refused(self, rpc: str, status: Any) -> str:
        known = status.code in status_code_pb2.StatusCode.values()
        name = status_code_pb2.StatusCode.Name(status.code) if known else "?"
        said = self.shown(": ".join(part for part in (status.description, status.details) if part), 500)
        return f"{self.base} refuses {rpc}: {name} ({status.code}): {said}"

    def _callable(self, rpc: str) -> Callable[..., Any]:
        # Not V2Stub: it works only once a stock channel was made in this process (PROTOCOL 1.3).
        if rpc not in self._calls:
            reply = message_factory.GetMessageClass(_SERVICE.methods_by_name[rpc].output_type)
            self._calls[rpc] = self._channel.unary_unary(
                f"/{_SERVICE.full_name}/{rpc}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=reply.FromString,
            )
        return self._calls[rpc]


def _date(metadata: Iterable[tuple[str, str | bytes]]) -> float | None:
    text = next((str(value) for name, value in metadata if name == "date"), "")
    try:
        return parsedate_to_datetime(text).timestamp()
    except ValueError:
        return None


def _content(path: Path | None, key: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error(error, f"{key} {path} cannot be read ({error.strerror}).") from error
