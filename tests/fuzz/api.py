"""Fuzz a real daemon: every predict RPC, REST, the other doors, streams and media files, for a number of seconds.

Usage: python -m fuzz.api SECONDS [KIND …], with tests/ among the paths of Python (`make fuzz-api SECONDS=600`)

What is sent follows from SEED (environment; a random one is printed), round by round, so that a finding comes again
with the same seed; ROUND begins at a later round. After every request the daemon's log is read, after every round its
process, its counters and its answers to good requests are looked at (`oracle`, `world`). The first finding is made
small by hypothesis, written to build/fuzz-api/, and ends the run with exit code 1; with KEEP_GOING=1 the run goes on,
and ends so.
"""

import contextlib
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpcore
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from fuzz import media
from fuzz.messages import KSERVE, PREDICTING, SERVICE, Requests, harmed_bytes
from fuzz.oracle import Finding, Oracle, bad_log, json_of
from fuzz.texts import Asked, Texts
from fuzz.world import DIGIT, Canary, World, running, sample
from google.protobuf import message_factory, text_format
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.appliance import ROOT, image_input, request_for

from appliance.api.catalogue import RPCS
from appliance.api.methods import METHOD_KEY

FOLDER = ROOT / "build" / "fuzz-api"
EXAMPLES = 60
"""Examples a round."""

PATIENCE_S = 40.0
"""How long one call may take; the daemon itself answers after half of that that its time is over."""

_V2 = f"/{SERVICE.full_name}/"
_KSERVE = f"/{KSERVE.full_name}/"
_REPLIES = {
    **{f"{_V2}{rpc}": message_factory.GetMessageClass(SERVICE.methods_by_name[rpc].output_type) for rpc in RPCS},
    **{f"{_KSERVE}{rpc.name}": message_factory.GetMessageClass(rpc.output_type) for rpc in KSERVE.methods},
}


class Fuzzer:
    """Sends and judges. Each method named after a kind of call is one example of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.calls: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self._lost = 0.0
        whole = request_for("digits", [image_input(DIGIT)])
        self._digit = world.ask("PostModelOutputs", whole).outputs[0].data.concepts[0].id
        self._oracle = Oracle((world.key, str(world.folder)))
        self.requests = Requests(world)
        answer = world.http[False].request("GET", self.url(b"/v2/openapi.json"))
        self.texts = Texts(world, self.requests, json_of(answer.content))

    def kinds(self) -> dict[str, Callable[[int, int], None]]:
        """Kind of round → runs one: seed and number of examples in."""
        anything, predicting = self.requests.any_rpc(), self.requests.predicting()
        named = st.sampled_from(PREDICTING)
        raw = st.one_of(
            st.tuples(named, harmed_bytes(predicting)),
            *(st.tuples(st.just(rpc), harmed_bytes(self.requests.of_rpc(rpc))) for rpc in RPCS),
        )
        infers = st.one_of(
            self.requests.infers().map(lambda made: made.SerializeToString()), harmed_bytes(self.requests.infers())
        )
        others = st.one_of(
            *(
                st.tuples(st.just(rpc.name), self.requests.generic(rpc.input_type))
                for rpc in KSERVE.methods
                if rpc.name != "ModelInfer"
            )
        )
        conversations = st.tuples(named, st.lists(self._streamed(), min_size=1, max_size=4), st.integers(-1, 3))
        return {
            "predictions": self._kind(st.tuples(named, predicting), self.message),
            "protos": self._kind(anything, self.message),
            "media": self._kind(st.lists(self._files(), min_size=1, max_size=8), self.media),
            "rest": self._kind(self.texts.twins(), self.http),
            "bytes": self._kind(raw, self.body),
            "streams": self._kind(conversations, self.stream),
            "workflows": self._kind(
                self.requests.workflows(), lambda made: self.message(("PostWorkflowResults", made))
            ),
            "http": self._kind(self.texts.odd(), self.http),
            "kserve": self._kind(st.one_of(infers.map(lambda body: ("ModelInfer", body)), others), self.kserve),
            "kserve-rest": self._kind(self.texts.kserve(), self.http),
            "openai": self._kind(self.texts.openai(), self.http),
            "grpc-web": self._kind(self.texts.grpc_web(), self.http),
        }

    def _kind(self, strategy: st.SearchStrategy[Any], example: Callable[[Any], None]) -> Callable[[int, int], None]:
        def run(number: int, examples: int) -> None:
            @seed(number)
            @settings(
                max_examples=examples,
                database=None,
                deadline=None,
                phases=(Phase.generate,) if os.environ.get("KEEP_GOING") else (Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
                print_blob=False,
            )
            @given(strategy)
            def one(made: Any) -> None:
                example(made)

            one()

        return run

    # ---- one example of a kind ----

    def message(self, asked: tuple[str, Any]) -> None:
        """A message to an RPC."""
        rpc, message = asked
        with self._judged(rpc, str(message) if message.ByteSize() < 20_000 else "(large)", message.SerializeToString()):
            self._call(rpc, message.SerializeToString())

    def body(self, asked: tuple[str, bytes]) -> None:
        """Bytes to an RPC."""
        rpc, body = asked
        with self._judged(rpc, repr(body[:20_000]), body):
            self._call(rpc, body)

    def kserve(self, asked: tuple[str, Any]) -> None:
        """A call of KServe's service."""
        rpc, made = asked
        body = made if isinstance(made, bytes) else made.SerializeToString()
        with self._judged(rpc, repr(body[:20_000]), body):
            if rpc == "ModelStreamInfer":
                self._stream(_KSERVE + rpc, [body], -1)
            else:
                self._unary(_KSERVE + rpc, body)

    def stream(self, asked: tuple[str, list[Any], int]) -> None:
        """Several messages; the caller leaves after so many replies, unless that is negative."""
        rpc, messages, leave_after = asked
        if rpc != "StreamModelOutputs":
            messages = messages[:1]
        bodies = [message.SerializeToString() for message in messages]
        shown = "\n---\n".join(map(str, messages))[:50_000] + f"\nleaves after {leave_after}"
        with self._judged(rpc, shown, b"".join(bodies)):
            if rpc == "PostModelOutputs":
                self._cancelled(bodies[0])
            else:
                self._stream(_V2 + rpc, bodies, leave_after)

    def media(self, files: list[tuple[str, str, Any]]) -> None:
        """Broken files in one request, and a whole one in their midst, which has the answer that it always has."""
        by_model: dict[str, list[resources_pb2.Data]] = {}
        for model, _, data in files:
            by_model.setdefault(model, []).append(data)
        for model, each in by_model.items():
            user, app = self.world.owners[model]
            request = request_for(model, [resources_pb2.Input(data=data) for data in each], user=user, app=app)
            if model == "digits":
                request.inputs.add(data=resources_pb2.Data(image=resources_pb2.Image(base64=DIGIT)))
            with self._judged("PostModelOutputs", text_format.MessageToString(request), request.SerializeToString()):
                reply = self._call("PostModelOutputs", request.SerializeToString())
                if reply is not None and model == "digits":
                    whole = reply.outputs[-1]
                    if whole.status.code != 10000 or whole.data.concepts[0].id != self._digit:
                        raise Finding(f"a whole picture beside broken ones got {whole.status} {whole.data}")

    def http(self, asked: Asked | None) -> None:
        """A request of HTTP."""
        if asked is None:
            return
        with self._judged("http", str(asked), asked.body):
            host = f"localhost:{self.world.port}"
            headers = [("host", host), *asked.headers]
            if asked.body or asked.verb in ("POST", "PUT", "PATCH"):
                headers.append(("content-length", str(len(asked.body))))
            timeout = dict.fromkeys(("connect", "read", "write", "pool"), PATIENCE_S)
            # httpcore would wait for ever to send what an answer left unread beyond HTTP/2's first window.
            pool = self.world.http[asked.two and len(asked.body) <= 60_000]
            try:
                answer = pool.request(
                    asked.verb,
                    self.url(asked.target),
                    headers=headers,
                    content=asked.body or None,
                    extensions={"timeout": timeout},
                )
            except httpcore.LocalProtocolError:  # what the client does not send
                self.ends["not sent"] += 1
                return
            except httpcore.RemoteProtocolError as error:
                if not asked.two or "StreamReset" not in str(error):
                    raise Finding(f"the connection ended: {error!r}") from error
                # A stream that is reset is how HTTP/2 refuses what is no HTTP; all else has an answer.
                self.ends["reset"] += 1
                return
            fields = {name.lower(): value for name, value in answer.headers}
            kind = fields.get(b"content-type", b"").decode("latin-1")
            self.ends[f"HTTP {answer.status}"] += 1
            self._oracle.http(answer.status, answer.content, kind, asked.target.decode("latin-1"))

    def url(self, target: bytes) -> httpcore.URL:
        """A path of the daemon's, as it is."""
        return httpcore.URL(scheme=b"https", host=b"localhost", port=self.world.port, target=target)

    # ---- strategies that belong to one kind ----

    def _files(self) -> st.SearchStrategy[tuple[str, str, Any]]:
        of = resources_pb2.Data
        picture = media.harmed_pictures().map(lambda body: of(image=resources_pb2.Image(base64=body)))
        sound = media.harmed_sounds().map(lambda body: of(audio=resources_pb2.Audio(base64=body)))
        words = media.texts().map(lambda text: of(text=resources_pb2.Text(raw=text)))
        return st.one_of(
            st.tuples(st.sampled_from(["digits", "digits", "colours", "vector", "fragile"]), st.just(""), picture),
            st.tuples(st.just("tools"), st.just("picture"), picture.map(lambda data: _calling("picture", data))),
            st.tuples(st.just("tools"), st.just("sound"), sound.map(lambda data: _calling("sound", data))),
            st.tuples(st.sampled_from(["topic", "sentence", "ml-topics"]), st.just(""), words),
            st.tuples(st.just("tools"), st.just("say"), words.map(lambda data: _calling("say", data, "text"))),
        )

    def _streamed(self) -> st.SearchStrategy[Any]:
        signatures = self.world.signatures["tools"]

        def request(data: resources_pb2.Data) -> service_pb2.PostModelOutputsRequest:
            user, app = self.world.owners["tools"]
            return request_for("tools", [resources_pb2.Input(data=data)], user=user, app=app)

        calls = [self.requests.call(signatures[name]).map(request) for name in ("stream", "generate", "stream", "add")]
        return st.one_of(*calls, self.requests.predicting())

    # ---- calls ----

    def _call(self, rpc: str, body: bytes) -> Any:
        if rpc in ("GenerateModelOutputs", "StreamModelOutputs"):
            self._stream(_V2 + rpc, [body], -1)
            return None
        return self._unary(_V2 + rpc, body)

    def _unary(self, method: str, body: bytes) -> Any:
        try:
            reply = self.world.channel.unary_unary(method)(body, metadata=self.world.metadata, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            self._ended(error)
            return None
        return self._reply(method, reply)

    def _stream(self, method: str, bodies: list[bytes], leave_after: int) -> None:
        call = self.world.channel.stream_stream(method)(iter(bodies), metadata=self.world.metadata, timeout=PATIENCE_S)
        try:
            for count, reply in enumerate(call):
                if count == leave_after:
                    call.cancel()
                    break
                self._reply(method, reply)
        except grpc.RpcError as error:
            self._ended(error)
        else:
            self.ends["left" if leave_after >= 0 else "OK"] += 1

    def _cancelled(self, body: bytes) -> None:
        """A caller that does not wait for its answer."""
        call = self.world.channel.unary_unary(_V2 + "PostModelOutputs").future(
            body, metadata=self.world.metadata, timeout=PATIENCE_S
        )
        call.cancel()
        self.ends["left"] += 1

    def _reply(self, method: str, reply: bytes) -> Any:
        message = _REPLIES[method].FromString(reply)
        if method.startswith(_V2):
            code = self._oracle.message(message, lists_codes="StatusCode" in method)
            self.ends[str(code)] += 1
        else:
            self._oracle.text(reply)
            self.ends["OK"] += 1
        return message

    def _ended(self, error: Any) -> None:
        name = error.code().name
        self.ends[name] += 1
        self._oracle.ended(name, error.details() or "", dict(error.trailing_metadata() or ()))

    @contextlib.contextmanager
    def _judged(self, kind: str, shown: str, body: bytes) -> Iterator[None]:
        """Around a call: what it finds knows its request; the log has nothing to say; a dead daemon is started anew."""
        self.calls[kind] += 1
        try:
            try:
                yield
            except (Finding, grpc.RpcError):
                raise
            except httpcore.TimeoutException as error:
                raise Finding(f"no answer: {error!r}") from error
            except (httpcore.NetworkError, httpcore.ProtocolError) as error:
                raise Finding(f"the connection failed: {error!r}") from error
            self.look_at_log()
        except Finding as finding:
            if not self.world.alive():
                code = self.world.appliance.process.returncode if self.world.appliance.process else None
                log = self.world.new_log()
                self.world.revive()
                raise Finding(f"the daemon ended with {code}\n{log[-3000:]}", f"{kind}: {shown}", body) from finding
            log = self.world.new_log()[-6000:]
            raise Finding(finding.what, f"{kind}: {shown}\nlog: {log}", body) from finding

    # ---- the daemon ----

    def look_at_log(self) -> None:
        """Raises: Finding: it logged what it must not."""
        bad = bad_log(self.world.new_log(), self.world.key)
        if bad:
            raise Finding(f"the log has: {bad}")

    def look(self, canary: Canary) -> None:
        """After a round. Raises: Finding: the daemon is not as it was."""
        world = self.world
        if not world.alive() or world.appliance.process is None or world.appliance.process.pid != world.pid:
            raise Finding(f"the daemon is not alive: {world.new_log()[-3000:]}")
        try:
            world.idle()
        except AssertionError as error:
            page = "\n".join(line for line in world.appliance.metrics().splitlines() if "in_flight" in line)
            raise Finding(f"{error}\n{page}") from error
        lost = sample(world.appliance.metrics(), "inference_appliance_requests_lost_total")
        if lost > self._lost:
            self._lost = lost
            raise Finding(f"{lost:g} requests were lost")
        down = {name: state for name, state in world.states().items() if state != "ready" and name != "broken"}
        if down:
            raise Finding(f"models are not ready any more: {down}")
        failures = canary.failures()
        try:
            canary.check()
        except (grpc.RpcError, AssertionError) as error:
            failures.append(str(error))
        if failures:
            raise Finding(f"{len(failures)} good requests went wrong, the first: {failures[0]}")
        self.look_at_log()


def _calling(method: str, data: resources_pb2.Data, name: str = "x") -> resources_pb2.Data:
    made = resources_pb2.Data(parts=[resources_pb2.Part(id=name, data=data)])
    made.metadata.update({METHOD_KEY: method})
    return made


def report(finding: BaseException, kind: str, number: int, count: int) -> str:
    """Write a finding into the folder and say where it is."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    place = FOLDER / f"{kind}-{number}-{count}"
    text = "".join(traceback.format_exception(finding))
    if isinstance(finding, Finding):
        place.with_suffix(".bin").write_bytes(finding.body)
        text = f"{finding}\n\n{text}"
    place.with_suffix(".txt").write_text(text, encoding="utf-8", errors="replace")
    shown = str(finding)
    return f"{shown[:6000]}\n\n{place}.txt has all of it; again: SEED={number} ROUND={count}"


def main(arguments: list[str]) -> int:
    """Fuzz; 0 when nothing was found."""
    seconds = float(arguments[0]) if arguments else 60.0
    chosen = int(os.environ.get("SEED") or random.SystemRandom().randrange(2**32))
    count = int(os.environ.get("ROUND") or 0)
    going_on = bool(os.environ.get("KEEP_GOING"))
    print(f"SEED={chosen}", flush=True)
    findings: Counter[str] = Counter()
    with running() as world, Canary(world) as canary:
        fuzzer = Fuzzer(world)
        kinds = fuzzer.kinds()
        world.new_log()  # of the start, with the bundle that is meant to be broken
        names = arguments[1:] or list(kinds)
        begun, rounds, said = time.monotonic(), 0, time.monotonic()
        while time.monotonic() < begun + seconds:
            kind = names[count % len(names)]
            try:
                with canary.calling():
                    kinds[kind](chosen * 1_000_003 + count, EXAMPLES)
                fuzzer.look(canary)
            except Exception as finding:
                what = (finding.what if isinstance(finding, Finding) else str(finding)).splitlines()[:1]
                findings["".join(what)[:100]] += 1
                print(f"\n=== {kind}: {report(finding, kind, chosen, count)}\n", flush=True)
                if not world.alive():
                    world.revive()
                    canary.failures()
                if not going_on:
                    break
            count, rounds = count + 1, rounds + 1
            if time.monotonic() > said + 30:
                said = time.monotonic()
                print(f"{said - begun:.0f} s, round {count}: {sum(fuzzer.calls.values())} calls", flush=True)
        elapsed = time.monotonic() - begun
        print(f"{elapsed:.0f} s, {rounds} rounds, {sum(fuzzer.calls.values())} calls, {canary.count} good ones beside")
        print("calls:", ", ".join(f"{name} {number}" for name, number in fuzzer.calls.most_common()))
        print("ends:", ", ".join(f"{name} {number}" for name, number in fuzzer.ends.most_common()))
        if world.alive() and (code := world.stop()):
            findings[f"the daemon ended with {code}"] += 1
    print(f"findings: {sum(findings.values())}", *(f"\n  {n} × {what}" for what, n in findings.items()))
    return 1 if findings else 0


if __name__ == "__main__":
    Path("build").mkdir(exist_ok=True)
    sys.exit(main(sys.argv[1:]))
