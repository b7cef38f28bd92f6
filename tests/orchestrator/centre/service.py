"""The gRPC service: who calls, what goes wrong today, what is written down, and the handler of each RPC."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from email.utils import formatdate
from typing import Any

import grpc
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2
from google.protobuf import message_factory
from orchestrator.centre.faults import Faults
from orchestrator.centre.recorder import Recorder
from orchestrator.centre.resources import Refused, Resources
from orchestrator.centre.store import Store
from orchestrator.centre.work import Work

log = logging.getLogger("centre")

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["V2"]
_PREDICTS = {
    "PostModelOutputs": resources_pb2.UNARY_UNARY,
    "GenerateModelOutputs": resources_pb2.UNARY_STREAMING,
    "StreamModelOutputs": resources_pb2.STREAMING_STREAMING,
}
_WORK = "ProcessRunnerItems"


class Aborted(Exception):
    """The call ends with a gRPC code."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class Call:
    """One call: reads and writes its messages, written down, with today's faults."""

    def __init__(self, centre: "Centre", rpc: str, context: Any) -> None:
        self.rpc, self.context = rpc, context
        self._centre = centre
        self._got = self._sent = 0
        metadata = tuple(context.invocation_metadata() or ())
        header = next((value for name, value in metadata if name == "authorization"), "")
        self.pat = header.removeprefix("Key ").removeprefix("Bearer ").strip()
        self.number = centre.recorder.open(rpc, metadata)
        self._types = _types(rpc)

    async def happen(self, at: str, nth: int = 1) -> None:
        """Let today's faults happen. Raises: Aborted, Refused."""
        for fault in self._centre.faults.take(self.rpc, at, nth):
            await asyncio.sleep(fault.delay_s)
            if fault.grpc:
                raise Aborted(grpc.StatusCode[fault.grpc], "a fault of the test")
            if fault.status:
                raise Refused(fault.status, "a fault of the test")

    async def read(self) -> Any:
        """The next message; None after the last."""
        message = await self.context.read()
        if message is grpc.aio.EOF:
            return None
        self._got += 1
        self._centre.recorder.message(self.number, self.rpc, "request", message, self.pat)
        await self.happen("request", self._got)
        return message

    async def messages(self) -> AsyncIterator[Any]:
        """All messages that are still to come."""
        while (message := await self.read()) is not None:
            yield message

    async def write(self, message: Any) -> None:
        """Send a message."""
        await self.happen("reply", self._sent + 1)
        self._sent += 1
        self._centre.recorder.message(self.number, self.rpc, "reply", message, self.pat)
        await self.context.write(message)

    async def refuse(self, refused: Refused) -> None:
        """Answer with nothing but a status."""
        message = self._types[1](status=refused.status)
        message.status.req_id = f"{self.number:08x}"
        self._centre.recorder.message(self.number, self.rpc, "reply", message, self.pat)
        await self.context.write(message)


class Centre(grpc.GenericRpcHandler):
    """All RPCs of clarifai.api.V2; those that the centre does not know are UNIMPLEMENTED."""

    def __init__(self, store: Store, recorder: Recorder, patience_s: float = 1.0, queue_s: float = 30.0) -> None:
        self.store, self.recorder = store, recorder
        self.faults = Faults()
        self.clock_ahead_s = 0.0
        resources = Resources(store)
        self.work = Work(resources, self.faults, patience_s, queue_s)
        self._unary = resources.handlers()
        self._streams: dict[str, set[asyncio.Task[Any]]] = {}

    def service(self, details: Any) -> Any:
        """The handler of a method, as grpc asks for it."""
        service, _, rpc = details.method.lstrip("/").partition("/")
        if service != _SERVICE.full_name or rpc not in {*self._unary, *_PREDICTS, _WORK}:
            return None
        request_type, reply_type = _types(rpc)

        async def handle(_: Any, context: Any) -> None:
            await self._handle(rpc, context)

        # Every call is treated as a stream: on the wire a unary one is a stream of one message each way.
        return grpc.stream_stream_rpc_method_handler(handle, request_type.FromString, reply_type.SerializeToString)

    async def _handle(self, rpc: str, context: Any) -> None:
        call = Call(self, rpc, context)
        outcome = "CANCELLED"
        try:
            try:
                await call.happen("open")
                await self._answer(call)
            except Refused as refused:
                await call.refuse(refused)
            outcome = "OK"
        except Aborted as aborted:
            outcome = aborted.code.name
            await context.abort(aborted.code, aborted.details)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            log.exception("%s failed", rpc)
            raise
        finally:
            self.recorder.end(call.number, rpc, outcome)

    async def _answer(self, call: Call) -> None:
        caller = self.store.owner_of(call.pat)
        if not caller:
            code = "CONN_KEY_INVALID" if call.pat else "CONN_INVALID_REQUEST"
            raise Refused(status_code_pb2.StatusCode.Value(code), "This access token acts for nobody.")
        if call.rpc == _WORK:
            await self._serve_runner(caller, call)
        elif call.rpc in _PREDICTS:
            await self._predict(caller, call)
        else:
            request = await call.read()
            # As every HTTP server that has a clock (RFC 9110, 6.6.1).
            date = formatdate(time.time() + self.clock_ahead_s, usegmt=True)
            await call.context.send_initial_metadata((("date", date),))
            await call.write(self._unary[call.rpc](caller, request))

    async def _predict(self, caller: str, call: Call) -> None:
        request = await call.read()
        more = call.messages() if call.rpc == "StreamModelOutputs" else None
        async with aclosing(self.work.ask(caller, _PREDICTS[call.rpc], request, more)) as replies:
            async for reply in replies:
                await call.write(reply)

    async def _serve_runner(self, caller: str, call: Call) -> None:
        """A runner's stream; it can be broken off (`break_streams`)."""
        serving = asyncio.ensure_future(self.work.serve(caller, call))
        mine = self._streams.setdefault(call.pat, set())
        mine.add(serving)
        try:
            await serving
        except asyncio.CancelledError:
            reason = getattr(serving, "reason", None)
            if reason is None:
                serving.cancel()
                raise
            raise reason from None
        finally:
            mine.discard(serving)

    def break_streams(self, reason: Exception, pat: str = "") -> int:
        """End all streams of runners (of one token) with `reason`. Returns how many there were."""
        chosen = [task for key, tasks in self._streams.items() if pat in ("", key) for task in tasks]
        for task in chosen:
            task.reason = reason  # type: ignore[attr-defined]
            task.cancel()
        return len(chosen)


def _types(rpc: str) -> tuple[Any, Any]:
    method = _SERVICE.methods_by_name[rpc]
    return message_factory.GetMessageClass(method.input_type), message_factory.GetMessageClass(method.output_type)
