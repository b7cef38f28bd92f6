"""Fronts and engines as processes: what one of them does when it ends, hurts nobody else."""

import contextlib
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from support import graphs
from support.appliance import (
    MODELS,
    PATIENCE_S,
    Appliance,
    Client,
    Load,
    Pki,
    array_input,
    image_input,
    mode,
    request_for,
)

DIGIT = next((MODELS / "digits" / "samples").glob("*.png")).read_bytes()
PREDICT = request_for("digits", [image_input(DIGIT)] * 3)

Make = Callable[..., Appliance]


@pytest.fixture
def transport() -> Iterator[str]:
    """grpcio binds its own port, for one front; here there are two."""
    with mode("processes"):
        yield "native"


def processes(appliance: Appliance) -> dict[str, int]:
    """Name → process number of every child that is there."""
    return {row["name"]: row["pid"] for row in appliance.admin("/status")["processes"] if row["pid"]}


def replaced(appliance: Appliance, name: str, pid: int) -> bool:
    """Whether another process has that place, and all is well."""
    return processes(appliance).get(name, pid) != pid and appliance.admin("/readyz")["ready"] is True


def alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(appliance: Appliance, kind: str = "") -> set[int]:
    """Every process that the supervisor has started, also those that it does not show; of that kind."""
    assert appliance.process is not None
    pid = appliance.process.pid
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())
    return {child for child in found if kind in Path(f"/proc/{child}/cmdline").read_text(encoding="ascii")}


def cpu_ticks(pid: int) -> int:
    """CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


class TestEngine:
    def test_a_killed_engine_loses_no_call(self, appliance: Appliance, pki: Pki) -> None:
        """What queued is run by the next one, and what was in the run is run again. A third time would be too often."""
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT, callers=8) as load:
            for _ in range(2):
                load.wait_for(30)
                pid = processes(appliance)["engine"]
                os.kill(pid, signal.SIGKILL)
                appliance.wait(lambda pid=pid: replaced(appliance, "engine", pid), "a new engine")  # type: ignore[misc]
                load.wait_for(30)
        assert set(load.ends) == {"answered"}, (load.ends, load.odd[:3])
        assert appliance.metric("inference_appliance_requests_lost_total") == 0

    def test_readiness_tells_the_truth_meanwhile(self, appliance: Appliance) -> None:
        """Not ready with the reason, until the models are loaded again; fronts stay what they are."""
        before = processes(appliance)
        os.kill(before["engine"], signal.SIGSTOP)  # so that it is seen: a new engine is there soon
        try:
            os.kill(before["engine"], signal.SIGKILL)
            appliance.wait(lambda: not appliance.admin("/readyz")["ready"], "not ready")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(before["engine"], signal.SIGCONT)
        appliance.wait(lambda: appliance.admin("/readyz")["ready"], "ready")
        after = processes(appliance)
        assert after["engine"] != before["engine"]
        assert {name: pid for name, pid in after.items() if name != "engine"} == {
            name: pid for name, pid in before.items() if name != "engine"
        }
        assert "was ended by SIGKILL" in appliance.log

    def test_an_engine_that_stands_still_is_replaced_within_two_seconds(self, appliance: Appliance, pki: Pki) -> None:
        """As one that hangs on a lock; who waited is answered by the next one. One that computes has longer."""
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT) as load:
            load.wait_for(10)
            pid = processes(appliance)["engine"]
            os.kill(pid, signal.SIGSTOP)
            appliance.wait(lambda: replaced(appliance, "engine", pid), "a new engine")
            load.wait_for(10)
        assert set(load.ends) == {"answered"}, (load.ends, load.odd[:3])
        assert not alive(pid)
        (silence,) = re.findall(r"shows no sign of life for ([0-9.]+) s", appliance.log)
        assert float(silence) < 9, "the ten seconds of engine_silence_s were waited for"

    def test_a_row_that_takes_the_engine_down_is_answered_and_its_neighbours_too(
        self, make_appliance: Make, pki: Pki
    ) -> None:
        """Twice in a run of its own when the engine ended: that row fails, the others have their results.

        The row's run never ends, so that it is the one that is on when the engine is killed.
        """
        appliance = make_appliance("digits")
        graphs.write_raw(appliance.models / "moody", graphs.endless_model(only_above=1000.0))
        appliance.key = appliance.new_key()
        inputs = [array_input(np.full((1, 2), value, np.float32)) for value in (1, 5000, 2)]
        request = request_for("moody", inputs, user="", app="")
        with appliance, Client(appliance.port(), pki.ca, appliance.key) as client:
            call = client.stub.PostModelOutputs.future(request, metadata=client.metadata, timeout=PATIENCE_S)
            kills = kill_while_running(appliance, call)
            reply = call.result()
            assert kills == 2
            assert reply.status.code == StatusCode.MIXED_STATUS
            codes = [output.status.code for output in reply.outputs]
            assert codes == [StatusCode.SUCCESS, StatusCode.MODEL_PREDICTION_FAILED, StatusCode.SUCCESS]
            assert "crashed" in reply.outputs[1].status.details
            # A third crash within five minutes, and the version is run no more; others are.
            call = client.stub.PostModelOutputs.future(request, metadata=client.metadata, timeout=PATIENCE_S)
            kill_while_running(appliance, call)
            with contextlib.suppress(grpc.RpcError):
                call.result()
            appliance.wait(lambda: "moody:1" in appliance.admin("/readyz")["not_ready"], "given up")
            assert "crashed the engine 3 times" in appliance.admin("/readyz")["not_ready"]["moody:1"]
            refused = client.predict(request_for("moody", [array_input(np.ones((1, 2), np.float32))], user="", app=""))
            assert refused.status.code == StatusCode.MODEL_DEPLOYMENT_FAILED, refused.status
            assert client.predict(PREDICT).status.code == StatusCode.SUCCESS
            # Touched, it is tried again.
            os.utime(appliance.models / "moody" / "1" / "model.onnx")
            appliance.wait(lambda: "moody:1" not in appliance.admin("/readyz")["not_ready"], "loaded again")
            good = request_for("moody", [array_input(np.ones((1, 2), np.float32))], user="", app="")
            assert client.predict(good).status.code == StatusCode.SUCCESS

    def test_a_model_that_takes_the_engine_down_while_it_is_loaded_is_not_loaded_again(
        self, make_appliance: Make, pki: Pki
    ) -> None:
        """Its neighbours are, and the reason is shown."""
        appliance = make_appliance("digits", catalog={"start_wait_s": 0.5})
        graphs.write_raw(appliance.models / "never", graphs.endless_model())
        appliance.key = appliance.new_key()
        appliance.spawn()
        appliance.wait(lambda: appliance.state_of("digits") == "ready" and appliance.state_of("never") == "loading")
        pid = processes(appliance)["engine"]
        appliance.wait(lambda: ticks_within(pid, 0.5) > 5, "the engine loads it")
        os.kill(pid, signal.SIGKILL)
        appliance.wait(lambda: appliance.state_of("never") == "failed", "given up")
        appliance.wait(lambda: replaced(appliance, "engine", pid), "a new engine")
        problem = appliance.admin("/readyz")["not_ready"]["never:1"]
        assert "was ended by SIGKILL while it loaded this model" in problem
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            assert client.predict(PREDICT).status.code == StatusCode.SUCCESS


class TestAtAnyMoment:
    """A process ends, or stands still, while another one starts, loads or is told something."""

    def test_a_front_that_starts_while_there_is_no_engine_serves_every_model(
        self, appliance: Appliance, pki: Pki
    ) -> None:
        """It is told of them before it is joined to the engine."""
        before = processes(appliance)
        os.kill(before["engine"], signal.SIGKILL)
        appliance.wait(lambda: children(appliance, "engine_process") - {before["engine"]}, "an engine that starts")
        (starting,) = children(appliance, "engine_process") - {before["engine"]}
        os.kill(starting, signal.SIGSTOP)
        try:
            os.kill(before["front 0"], signal.SIGKILL)
            appliance.wait(lambda: processes(appliance).get("front 0", 0) not in (0, before["front 0"]), "a new front")
            appliance.wait(lambda: "front 0" not in appliance.admin("/readyz")["not_ready"], "a front that serves")
            assert "engine" in appliance.admin("/readyz")["not_ready"]
        finally:
            os.kill(starting, signal.SIGCONT)
        appliance.wait(lambda: appliance.admin("/readyz")["ready"] and not appliance.admin("/readyz")["not_ready"])
        for _ in range(24):  # a connection each: the system chooses the front
            with Client(appliance.port(), pki.ca, appliance.key) as client:
                assert client.predict(PREDICT).status.code == StatusCode.SUCCESS

    def test_a_front_that_ends_while_it_starts_is_replaced_once(self, make_appliance: Make) -> None:
        """Nobody knows a second one, which would go on with what was served when it began."""
        appliance = make_appliance("digits")
        for number in range(8):  # so that its start takes a while
            graphs.write_raw(appliance.models / f"m{number}")
        with appliance:
            caught = False
            while not caught:
                pid = processes(appliance)["front 0"]
                os.kill(pid, signal.SIGKILL)

                def there(pid: int = pid) -> bool:
                    return processes(appliance).get("front 0", pid) != pid

                appliance.wait(there, "a front that starts")
                row = next(row for row in appliance.admin("/status")["processes"] if row["name"] == "front 0")
                os.kill(row["pid"], signal.SIGKILL)
                caught = bool(row["problem"])
                appliance.wait(lambda row=row: replaced(appliance, "front 0", row["pid"]), "a new front")  # type: ignore[misc]
                appliance.wait(lambda: not appliance.admin("/readyz")["not_ready"], "all is well")
            assert children(appliance) == set(processes(appliance).values())

    @pytest.mark.parametrize("kind", ["engine_process", "front_process"])
    def test_a_child_that_is_ended_while_the_daemon_starts_is_started_once_more(
        self, make_appliance: Make, kind: str
    ) -> None:
        """That is nothing an operator could change."""
        appliance = make_appliance("digits")
        appliance.spawn()
        with contextlib.ExitStack() as stack:
            stack.callback(appliance.stop)
            appliance.wait(lambda: children(appliance, kind))
            pid = min(children(appliance, kind))
            os.kill(pid, signal.SIGKILL)
            appliance.wait(lambda: appliance.admin("/readyz")["ready"] and not appliance.admin("/readyz")["not_ready"])
            assert pid not in children(appliance)
            assert children(appliance) == set(processes(appliance).values())

    def test_an_engine_that_ends_during_a_drain_is_replaced(self, appliance: Appliance, pki: Pki) -> None:
        """What was accepted is answered, and the drain ends with that."""
        engine = processes(appliance)["engine"]
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            assert client.predict(PREDICT).status.code == StatusCode.SUCCESS
            os.kill(engine, signal.SIGSTOP)
            call = client.stub.PostModelOutputs.future(PREDICT, metadata=client.metadata, timeout=PATIENCE_S)
            appliance.wait(lambda: appliance.metric("inference_appliance_in_flight_requests") == 1, "accepted")
            appliance.signal(signal.SIGTERM)
            appliance.wait(lambda: "draining" in appliance.log, "it drains")
            os.kill(engine, signal.SIGKILL)
            assert call.result().status.code == StatusCode.SUCCESS
        assert appliance.stop() == 0

    def test_whatever_signal_ends_a_child_it_is_replaced(self, appliance: Appliance) -> None:
        """Also one that has no name."""
        for name in ("engine", "front 0"):
            pid = processes(appliance)[name]
            os.kill(pid, signal.SIGRTMIN + 5)
            appliance.wait(lambda name=name, pid=pid: replaced(appliance, name, pid), f"a new {name}")  # type: ignore[misc]

    def test_a_load_that_nobody_waits_for_any_more_is_ended(self, make_appliance: Make) -> None:
        """The bundle is removed while it loads: the engine has nothing to do with it any more."""
        appliance = make_appliance("digits", catalog={"start_wait_s": 0.5}, engine={"load_timeout_s": 3600})
        graphs.write_raw(appliance.models / "never", graphs.endless_model())
        appliance.spawn()
        with contextlib.ExitStack() as stack:
            stack.callback(appliance.stop)
            appliance.wait(lambda: appliance.state_of("digits") == "ready" and appliance.state_of("never") == "loading")
            pid = processes(appliance)["engine"]
            appliance.wait(lambda: ticks_within(pid, 0.5) > 5, "it loads")
            shutil.rmtree(appliance.models / "never")
            appliance.wait(lambda: not appliance.state_of("never"), "removed")
            appliance.wait(lambda: ticks_within(pid, 3.0) < 15, "the engine is at rest")
            assert processes(appliance)["engine"] == pid

    def test_whoever_stood_still_with_all_the_others_is_not_blamed(self, make_appliance: Make) -> None:
        """A container that is paused and goes on: nothing is replaced for it."""
        appliance = make_appliance("digits", processes={"engine_silence_s": 1.0})
        with appliance:
            before = processes(appliance)
            assert appliance.process is not None
            everybody = [appliance.process.pid, *before.values()]
            for pid in everybody:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(2.5)  # what is tested is that time passes
            for pid in everybody:
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.1)
            appliance.wait(lambda: appliance.admin("/readyz")["ready"])
            time.sleep(1.0)
            assert processes(appliance) == before

    def test_an_engine_keeps_nothing_of_a_front_that_is_gone(self, appliance: Appliance, pki: Pki) -> None:
        """Its slab's memory is the system's again."""
        engine = processes(appliance)["engine"]
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT) as load:
            for _ in range(2):
                load.wait_for(20)
                pid = processes(appliance)["front 0"]
                os.kill(pid, signal.SIGKILL)
                appliance.wait(lambda pid=pid: replaced(appliance, "front 0", pid), "a new front")  # type: ignore[misc]
            load.wait_for(20)

        def slabs() -> int:
            return Path(f"/proc/{engine}/maps").read_text(encoding="utf-8").count("/memfd:front 0 slab")

        appliance.wait(lambda: slabs() == 1, "the old slabs are gone")


def ticks_within(pid: int, seconds: float) -> int:
    """CPU time that a process takes from now on."""
    before = cpu_ticks(pid)
    time.sleep(seconds)
    return cpu_ticks(pid) - before


def kill_while_running(appliance: Appliance, call: Any) -> int:
    """Kill the engine whenever a run that never ends keeps it busy, until the call is over. Returns: how often."""
    kills = 0
    deadline = time.monotonic() + PATIENCE_S
    while not call.done():
        assert time.monotonic() < deadline, "the call never ended"
        pid = processes(appliance).get("engine")
        if pid is None:
            time.sleep(0.02)
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            before = cpu_ticks(pid)
            busy = time.monotonic() + PATIENCE_S
            # All is loaded, and it computes all the same.
            while not call.done() and not (
                "engine" not in appliance.admin("/readyz")["not_ready"]
                and "moody:1" not in appliance.admin("/readyz")["not_ready"]
                and cpu_ticks(pid) > before + 50
            ):
                assert time.monotonic() < busy, "the engine has nothing to do"
                if "moody:1" in appliance.admin("/readyz")["not_ready"]:
                    before = cpu_ticks(pid)
                time.sleep(0.02)
            if not call.done():
                os.kill(pid, signal.SIGKILL)
                kills += 1
                appliance.wait(lambda pid=pid: processes(appliance).get("engine", pid) != pid)  # type: ignore[misc]
    return kills


class TestFronts:
    def test_a_killed_front_is_replaced_on_its_own_socket(self, appliance: Appliance, pki: Pki) -> None:
        """Its clients' calls end UNAVAILABLE, and are counted as lost; whoever comes then is served by the next one."""
        engine = processes(appliance)["engine"]
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT, callers=6) as load:
            load.wait_for(20)
            for name in ("front 0", "front 1"):
                pid = processes(appliance)[name]
                os.kill(pid, signal.SIGKILL)
                appliance.wait(lambda name=name, pid=pid: replaced(appliance, name, pid), "a new front")  # type: ignore[misc]
                load.wait_for(20)
        assert set(load.ends) <= {"answered", "UNAVAILABLE"}, (load.ends, load.odd[:3])
        assert processes(appliance)["engine"] == engine
        assert "front 0 was ended by SIGKILL" in appliance.log

    def test_counts_outlive_a_front(self, appliance: Appliance, pki: Pki) -> None:
        """What it answered stays counted once it is gone, and no gauge of it stays."""
        name = 'inference_appliance_inputs_total{code="10000",model="digits",version="1"}'
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            for _ in range(4):
                client.predict(PREDICT)
        appliance.wait(lambda: appliance.metric(name) == 12)
        for front in ("front 0", "front 1"):
            pid = processes(appliance)[front]
            os.kill(pid, signal.SIGKILL)
            appliance.wait(lambda front=front, pid=pid: replaced(appliance, front, pid))  # type: ignore[misc]
        assert appliance.metric(name) == 12
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            client.predict(PREDICT)
        appliance.wait(lambda: appliance.metric(name) == 15)
        assert appliance.metric("inference_appliance_in_flight_requests") == 0

    def test_all_fronts_serve(self, appliance: Appliance, pki: Pki) -> None:
        """The system spreads connections over their sockets; each knows every model."""
        fronts = {name: pid for name, pid in processes(appliance).items() if name.startswith("front")}
        before = {name: cpu_ticks(pid) for name, pid in fronts.items()}
        with ThreadPoolExecutor(8) as pool:

            def ask(_: int) -> None:
                with Client(appliance.port(), pki.ca, appliance.key) as client:
                    for _ in range(10):
                        assert client.predict(PREDICT).status.code == StatusCode.SUCCESS

            list(pool.map(ask, range(40)))
        assert all(cpu_ticks(pid) > before[name] for name, pid in fronts.items())

    def test_a_principal_s_rate_holds_for_all_fronts_together(self, make_appliance: Make, pki: Pki) -> None:
        """Not once for each of them."""
        appliance = make_appliance("digits")
        appliance.write_config(principal=[{"name": "default", "requests_per_second": 0.01, "burst": 10}])
        appliance.key = appliance.new_key()
        ends: Counter[int] = Counter()
        with appliance:
            for _ in range(30):  # a connection each: the system chooses the front
                with Client(appliance.port(), pki.ca, appliance.key) as client:
                    ends[client.predict(PREDICT).status.code] += 1
        assert ends[StatusCode.SUCCESS] == 10
        assert sum(ends.values()) == 30


class TestSupervisor:
    def test_children_do_not_outlive_it(self, appliance: Appliance) -> None:
        """Not even when it is killed; the next one starts on the same files and ports."""
        children = list(processes(appliance).values())
        assert len(children) == 3
        assert appliance.process is not None
        appliance.process.kill()
        appliance.process.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while any(alive(pid) for pid in children):
            assert time.monotonic() < deadline, "an orphan lives"
            time.sleep(0.02)
        appliance.start()
        assert set(processes(appliance)) == {"engine", "front 0", "front 1"}

    def test_a_drain_loses_no_call(self, appliance: Appliance, pki: Pki) -> None:
        """Every front finishes what it took; clients move on, or are told that it is over."""
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT, callers=6) as load:
            load.wait_for(30)
            assert appliance.stop() == 0
        assert set(load.ends) <= {"answered", "UNAVAILABLE"}, (load.ends, load.odd[:3])
        assert "were lost" not in appliance.log

    def test_signals_to_the_whole_group_are_the_supervisor_s(self, appliance: Appliance, pki: Pki) -> None:
        """A terminal's interrupt reaches children too; they wait for its word."""
        for pid in processes(appliance).values():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            assert client.predict(PREDICT).status.code == StatusCode.SUCCESS

    def test_every_front_hears_of_a_reload(self, make_appliance: Make, pki: Pki) -> None:
        """Keys, limits and certificates; whichever front a connection meets."""
        appliance = make_appliance("digits")
        appliance.key = appliance.new_key()
        with appliance:
            appliance.write_config(limits={"inputs_per_request": 2})
            key = appliance.new_key()
            appliance.command("reload")
            for _ in range(12):
                with Client(appliance.port(), pki.ca, key) as client:
                    assert client.predict(PREDICT).status.code == 30105

    def test_a_swap_under_load_loses_nothing(self, appliance: Appliance, pki: Pki) -> None:
        """The new version is known to every front before it answers; the old one ends when nobody uses it."""
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT, callers=6) as load:
            load.wait_for(20)
            staged = appliance.home / "staged" / "digits"
            shutil.copytree(MODELS / "digits", staged)
            (staged / "1").rename(staged / "2")
            appliance.command("models", "add", staged, "--wait", "100")
            load.wait_for(20)
            shutil.rmtree(appliance.models / "digits" / "1")
            appliance.wait(lambda: not appliance.state_of("digits", "1"), "the old version is gone")
            load.wait_for(20)
        assert set(load.ends) == {"answered"}, (load.ends, load.odd[:3])


def test_one_process_does_everything_where_that_is_asked_for(make_appliance: Make) -> None:
    """And has no children."""
    appliance = make_appliance("digits")
    appliance.mode = "single"
    appliance.write_config()
    with appliance:
        status = appliance.admin("/status")
        assert status["mode"] == "single"
        assert "processes" not in status
        assert appliance.process is not None
        tasks = Path(f"/proc/{appliance.process.pid}/task/{appliance.process.pid}/children")
        assert not tasks.read_text(encoding="ascii").strip()
