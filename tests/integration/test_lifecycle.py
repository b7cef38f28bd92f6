"""Start, reload, swap, drain and stop, under load: nothing accepted is lost."""

import contextlib
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import graphs
from support.appliance import (
    MODELS,
    Appliance,
    Client,
    Load,
    Pki,
    array_input,
    image_input,
    make_pki,
    notify_socket,
    request_for,
    text_input,
)

DIGIT = next((MODELS / "digits" / "samples").glob("*.png")).read_bytes()
PREDICT = request_for("digits", [image_input(DIGIT)] * 3)

Make = Callable[..., Appliance]


class TestSwap:
    def test_a_hot_swap_under_load_loses_nothing(self, appliance: Appliance, pki: Pki) -> None:
        """A new version, the same version with other content, a rollback and a removal, all while calls go on."""
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT) as load:
            load.wait_for(20)
            staged = appliance.home / "staged"
            shutil.copytree(MODELS / "digits", staged / "digits")
            (staged / "digits" / "1").rename(staged / "digits" / "2")
            appliance.command("models", "add", staged / "digits", "--wait", "100")
            load.wait_for(20)
            model = appliance.models / "digits" / "2" / "model.onnx"
            graph = model.read_bytes()
            (appliance.models / "digits" / "2" / "SHA256SUMS").unlink()
            replacement = appliance.models / "digits" / ".model"
            replacement.write_bytes(graph + b"")
            replacement.replace(model)
            appliance.wait(lambda: swaps(appliance) >= 1, "the swap in place")
            load.wait_for(20)
            appliance.command("models", "rollback", "digits", "--wait", "100")
            appliance.wait(lambda: appliance.state_of("digits", "2") == "held", "the rollback")
            load.wait_for(20)
            appliance.command("models", "remove", "digits", "--version", "2")
            appliance.wait(lambda: appliance.state_of("digits", "2") == "", "the removal")
            load.wait_for(20)
        assert set(load.ends) == {"answered"}, f"{load.ends} {load.odd}"
        assert "inference_appliance_requests_lost_total 0.0" in appliance.metrics()

    def test_versions_are_served_side_by_side_and_the_newest_by_default(self, appliance: Appliance, pki: Pki) -> None:
        shutil.copytree(appliance.models / "digits" / "1", appliance.home / "next")
        (appliance.home / "next").rename(appliance.models / "digits" / "7")
        appliance.wait(lambda: appliance.state_of("digits", "7") == "ready")
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            for asked, served in (("", "7"), ("1", "1"), ("7", "7")):
                reply = client.predict(request_for("digits", [image_input(DIGIT)], version=asked))
                assert reply.outputs[0].model.model_version.id == served

    def test_a_bad_bundle_hurts_nobody_and_says_why(self, appliance: Appliance, pki: Pki) -> None:
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT, callers=2) as load:
            bad = appliance.models / "broken" / "1"
            bad.mkdir(parents=True)
            (bad / "model.onnx").write_bytes(b"this is no graph")
            appliance.wait(lambda: "broken" in str(appliance.admin("/readyz")["not_ready"]))
            appliance.wait(lambda: "not an ONNX model" in str(appliance.admin("/readyz")["not_ready"]))
            load.wait_for(10)
        assert set(load.ends) == {"answered"}
        assert appliance.admin("/readyz")["ready"] is True
        listed = appliance.command("models", "list", "--json").stdout
        assert "not an ONNX model" in listed

    def test_bad_new_content_keeps_the_last_good_version_running(self, appliance: Appliance, pki: Pki) -> None:
        (appliance.models / "digits" / "1" / "model.onnx").write_bytes(b"half a cop")
        appliance.wait(lambda: "not an ONNX model" in str(appliance.admin("/readyz")["not_ready"]))
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            assert client.predict(PREDICT).status.code == StatusCode.SUCCESS

    def test_held_versions_are_held_after_a_restart(self, appliance: Appliance, pki: Pki) -> None:
        shutil.copytree(appliance.models / "digits" / "1", appliance.home / "next")
        (appliance.home / "next").rename(appliance.models / "digits" / "2")
        appliance.wait(lambda: appliance.state_of("digits", "2") == "ready")
        appliance.command("models", "rollback", "digits")
        appliance.wait(lambda: appliance.state_of("digits", "2") == "held")
        appliance.stop()
        appliance.start()
        assert appliance.state_of("digits", "2") == "held"
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            assert client.predict(PREDICT).outputs[0].model.model_version.id == "1"


class TestEndless:
    """Graphs that never end: they cost their own bundle, and nothing else."""

    def test_a_bundle_that_never_loads_fails_and_the_others_are_served(self, make_appliance: Make, pki: Pki) -> None:
        appliance = make_appliance("digits", engine={"load_timeout_s": 2})
        graphs.write_raw(appliance.models / "aaa-endless", graphs.endless_model())
        appliance.key = appliance.new_key()
        with appliance, Client(appliance.port(), pki.ca, appliance.key) as client:
            assert client.predict(PREDICT).status.code == StatusCode.SUCCESS
            appliance.wait(lambda: appliance.state_of("aaa-endless") == "failed")
            assert "engine.load_timeout_s" in str(appliance.admin("/readyz")["not_ready"])
        assert appliance.stop() == 0

    def test_a_run_that_never_ends_is_ended_with_its_callers_deadline(self, make_appliance: Make, pki: Pki) -> None:
        appliance = make_appliance()
        graphs.write_raw(appliance.models / "moody", graphs.endless_model(only_above=1000.0))
        appliance.key = appliance.new_key()
        good = request_for("moody", [array_input(np.ones((1, 2), np.float32))], user="", app="")
        bad = request_for("moody", [array_input(np.full((1, 2), 5000, np.float32))], user="", app="")
        with appliance, Client(appliance.port(), pki.ca, appliance.key) as client:
            assert client.predict(good).status.code == StatusCode.SUCCESS
            with pytest.raises(grpc.RpcError) as error:
                client.stub.PostModelOutputs(bad, metadata=client.metadata, timeout=1)
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert client.predict(good).status.code == StatusCode.SUCCESS
        assert appliance.stop() == 0

    def test_stopping_does_not_wait_for_a_run_that_never_ends(self, make_appliance: Make, pki: Pki) -> None:
        appliance = make_appliance(shutdown={"drain_s": 0.5})
        graphs.write_raw(appliance.models / "moody", graphs.endless_model(only_above=1000.0))
        appliance.key = appliance.new_key()
        bad = request_for("moody", [array_input(np.full((1, 2), 5000, np.float32))], user="", app="")
        with appliance, Client(appliance.port(), pki.ca, appliance.key) as client:
            future = client.stub.PostModelOutputs.future(bad, metadata=client.metadata)
            appliance.wait(lambda: appliance.admin("/status")["in_flight"] == 1)
            appliance.signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as error:
                future.result(100)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert appliance.stop() == 0


class TestReload:
    def test_sighup_under_load_loses_nothing_and_takes_over(self, appliance: Appliance, pki: Pki) -> None:
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT) as load:
            load.wait_for(10)
            for limit in (2, 128):
                appliance.write_config(limits={"inputs_per_request": limit})
                done = reloads(appliance, "ok")
                appliance.signal(signal.SIGHUP)
                appliance.wait(lambda done=done: reloads(appliance, "ok") > done, "the reload")
                load.wait_for(5, "answered" if limit == 128 else f"status {StatusCode.INPUT_OVER_LIMIT}")
        assert set(load.ends) == {"answered", f"status {StatusCode.INPUT_OVER_LIMIT}"}

    def test_a_bad_configuration_keeps_the_last_good_one(self, appliance: Appliance, pki: Pki) -> None:
        good = appliance.file.read_text(encoding="utf-8")
        appliance.file.write_text(good + "\n[limits]\ninputs_per_request = 1000\n", encoding="utf-8")
        refused = appliance.command("reload", check=False)
        assert refused.returncode == 2
        assert "inputs_per_request" in refused.stderr
        appliance.signal(signal.SIGHUP)
        appliance.wait(lambda: reloads(appliance, "failed") >= 1)
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            assert client.predict(PREDICT).status.code == StatusCode.SUCCESS

    def test_what_needs_a_restart_is_said(self, appliance: Appliance) -> None:
        appliance.write_config(engine={"queue_rows": 7}, log={"level": "debug"})
        said = appliance.command("reload").stdout
        assert "engine.queue_rows" in said
        assert "log.level" not in said

    def test_what_only_a_restart_changes_is_checked_together_with_the_rest(
        self, appliance: Appliance, pki: Pki, transport: str
    ) -> None:
        """Certificates would be demanded on a port that is not there yet, and nobody could call."""
        if transport == "native":
            pytest.skip("the native wire asks for certificates on every port")
        appliance.stop()
        appliance.write_config(server={"mtls_listen": None})
        appliance.start()
        appliance.write_config(server={"mtls_listen": "127.0.0.1:0"}, auth={"require": "certificate"})
        refused = appliance.command("reload", check=False)
        assert refused.returncode == 2
        assert "auth.require" in refused.stderr
        assert answers(appliance, pki.ca)

    def test_the_memory_budget_follows_a_reload(self, appliance: Appliance) -> None:
        appliance.write_config(limits={"memory_in_flight": "100MiB"})
        appliance.command("reload")
        assert appliance.metric("inference_appliance_memory_in_flight_limit_bytes") == 100 * 2**20

    def test_a_rotated_certificate_is_shown_to_new_connections(
        self, appliance: Appliance, pki: Pki, tmp_path: Path
    ) -> None:
        """Live connections stay; new ones see the new authority's certificate, without a word to the daemon."""
        fresh = make_pki(tmp_path / "fresh")
        with Client(appliance.port(), pki.ca, appliance.key) as live:
            assert live.predict(PREDICT).status.code == StatusCode.SUCCESS
            for name in ("server.key", "server.crt"):
                temporary = appliance.tls / f".{name}"
                shutil.copyfile(fresh.folder / name, temporary)
                temporary.replace(appliance.tls / name)
            appliance.wait(lambda: answers(appliance, fresh.ca), "the new certificate")
            assert live.predict(PREDICT).status.code == StatusCode.SUCCESS

    def test_a_bad_certificate_keeps_the_last_good_one(self, appliance: Appliance, pki: Pki) -> None:
        (appliance.tls / "server.crt").write_text("no certificate", encoding="utf-8")
        appliance.wait(lambda: "not taken over" in appliance.log)
        assert answers(appliance, pki.ca)
        refused = appliance.command("reload", check=False)
        assert refused.returncode == 2
        assert "server.crt" in refused.stderr
        assert answers(appliance, pki.ca)


class TestStop:
    def test_sigterm_under_load_loses_nothing(self, make_appliance: Make, pki: Pki) -> None:
        """Calls in flight are finished; later ones are told UNAVAILABLE, which the stock clients try again."""
        appliance = make_appliance("digits", shutdown={"lame_duck_s": 0.5, "drain_s": 60})
        appliance.key = appliance.new_key()
        appliance.start()
        with Load(appliance.port(), pki.ca, appliance.key, PREDICT) as load:
            load.wait_for(20)
            appliance.signal(signal.SIGTERM)
            load.wait_for(1, "UNAVAILABLE")
            assert appliance.stop() == 0
        # grpcio resets a call that arrives in the very moment of its shutdown: at most one a caller, never accepted.
        assert set(load.ends) - {"CANCELLED"} == {"answered", "UNAVAILABLE"}, f"{load.ends} {load.odd}"
        assert load.ends["CANCELLED"] <= 4
        assert "calls were lost" not in appliance.log
        print(", ".join(f"{count} {end}" for end, count in sorted(load.ends.items())))

    def test_a_call_in_flight_is_finished_while_draining(self, slow: Appliance, pki: Pki) -> None:
        with Client(slow.port(), pki.ca, slow.key) as client:
            future = client.stub.PostModelOutputs.future(
                request_for("slow", [array_input(SLOW_INPUT)], user="", app=""), metadata=client.metadata
            )
            slow.wait(lambda: slow.admin("/status")["in_flight"] == 1)
            slow.signal(signal.SIGTERM)
            assert future.result(100).status.code == StatusCode.SUCCESS
        assert slow.stop() == 0

    def test_what_is_not_finished_in_time_is_told_unavailable(self, slow: Appliance, pki: Pki) -> None:
        with Client(slow.port(), pki.ca, slow.key) as client:
            request = request_for("slow", [array_input(SLOW_INPUT)] * 30, user="", app="")
            future = client.stub.PostModelOutputs.future(request, metadata=client.metadata)
            slow.wait(lambda: slow.admin("/status")["in_flight"] == 1)
            slow.signal(signal.SIGTERM)
            slow.wait(lambda: "draining" in slow.log)
            slow.signal(signal.SIGTERM)  # a second signal means now
            with pytest.raises(grpc.RpcError) as error:
                future.result(100)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in error.value.details()
        assert slow.stop() == 0

    def test_not_ready_is_said_before_the_door_closes(self, make_appliance: Make, pki: Pki) -> None:
        appliance = make_appliance("digits", shutdown={"lame_duck_s": 30})
        appliance.key = appliance.new_key()
        with appliance, Client(appliance.port(), pki.ca, appliance.key) as client:
            watch = health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            appliance.signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert appliance.admin("/readyz")["phase"] == "draining"
            assert client.predict(PREDICT).status.code == StatusCode.SUCCESS, "lame, but not dead"
            watch.cancel()
            appliance.signal(signal.SIGTERM)


SLOW_INPUT = np.ones((128, 512), np.float32)


@pytest.fixture
def slow(make_appliance: Make) -> Iterator[Appliance]:
    """A running appliance whose one model takes a while."""
    made = make_appliance()
    graphs.write_raw(made.models / "slow", graphs.slow_model(rounds=100, width=512))
    made.key = made.new_key()
    with made:
        yield made


class TestStart:
    def test_a_second_daemon_on_the_same_state_is_refused(self, appliance: Appliance) -> None:
        refused = appliance.command("serve", check=False)
        assert refused.returncode == 2
        assert "Another appliance" in refused.stderr

    def test_another_daemons_admin_socket_is_left_alone(self, appliance: Appliance, make_appliance: Make) -> None:
        socket_path = appliance.home / "admin.sock"
        refused = make_appliance("digits", admin={"socket": str(socket_path)}).command("serve", check=False)
        assert refused.returncode == 4
        assert f"admin.socket {socket_path}" in refused.stderr
        assert appliance.admin("/readyz")["ready"] is True

    def test_after_a_kill_it_starts_again(self, appliance: Appliance, pki: Pki) -> None:
        """What a killed daemon leaves (its socket, its lock file) is in nobody's way."""
        assert appliance.process is not None
        appliance.process.kill()
        appliance.process.wait()
        appliance.start()
        assert answers(appliance, pki.ca)

    def test_a_taken_port_is_an_error_that_names_it(self, make_appliance: Make) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            refused = make_appliance("digits", server={"listen": address}).command("serve", check=False)
        assert refused.returncode == 4
        assert f"server.listen {address} cannot be bound" in refused.stderr

    def test_missing_certificates_are_an_error_with_the_remedy(self, make_appliance: Make) -> None:
        appliance = make_appliance("digits")
        shutil.rmtree(appliance.tls)
        refused = appliance.command("serve", check=False)
        assert refused.returncode == 3
        assert "appliance certs init" in refused.stderr

    def test_a_gpu_that_is_required_and_missing_is_an_error(self, make_appliance: Make) -> None:
        refused = make_appliance("digits", engine={"device": "gpu"}).command("serve", check=False)
        if refused.returncode == 0:
            pytest.skip("this machine has a GPU")
        assert refused.returncode == 7
        assert 'engine.device is "gpu"' in refused.stderr

    def test_a_base_url_outside_the_certificate_is_a_warning(self, make_appliance: Make) -> None:
        with make_appliance("digits", server={"base_url": "https://elsewhere.example:8443"}) as appliance:
            assert "elsewhere.example" in appliance.log
            assert "subject alternative names" in appliance.log

    def test_a_model_that_still_loads_says_so(self, make_appliance: Make, pki: Pki) -> None:
        """Start does not wait for ever: 21351 meanwhile, which the stock SDKs poll on; /readyz names it."""
        appliance = make_appliance("digits", catalog={"start_wait_s": 0, "settle_s": 3600})
        key = appliance.new_key()
        graphs.write_raw(appliance.models / "late", graphs.identity_model())
        appliance.spawn()
        appliance.wait(lambda: "late" in appliance.admin("/readyz")["not_ready"])
        with Client(appliance.port(), pki.ca, key) as client:
            reply = client.predict(request_for("late", [text_input("x")]))
            assert reply.status.code == StatusCode.MODEL_DEPLOYING

    def test_probes_and_metrics_are_served_on_loopback(self, appliance: Appliance, pki: Pki) -> None:
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            client.predict(PREDICT)
        base = f"http://127.0.0.1:{appliance.port('admin.listen')}"
        assert httpx.get(f"{base}/livez").status_code == 200
        assert httpx.get(f"{base}/readyz").json()["ready"] is True
        page = httpx.get(f"{base}/metrics").text
        assert 'inference_appliance_requests_total{code="10000",method="PostModelOutputs",model="digits"' in page
        assert 'inference_appliance_model_state{model="digits",state="ready",version="1"} 1.0' in page
        accept = {"accept": "application/openmetrics-text"}
        assert httpx.get(f"{base}/metrics", headers=accept).text.rstrip().endswith("# EOF")
        assert httpx.get(f"{base}/status").status_code == 404, "the operator's pages are on the socket only"

    def test_no_telemetry_is_written(self, make_appliance: Make, tmp_path: Path) -> None:
        """onnxruntime's own device database would lie in the home folder's cache."""
        home = tmp_path / "home"
        home.mkdir()
        appliance = make_appliance("digits")
        appliance.spawn({"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")})
        appliance.wait(lambda: appliance.admin("/readyz")["ready"])
        appliance.stop()
        assert list(home.rglob("*")) == []


class TestSystemd:
    def test_it_is_told_ready_reloading_alive_and_stopping(self, make_appliance: Make, tmp_path: Path) -> None:
        pytest.importorskip("systemd.daemon", reason="systemd-python could not be built here")
        appliance = make_appliance("digits")
        with notify_socket(tmp_path) as notified:
            address = notified.getsockname()
            appliance.spawn({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "2000000"})
            until(notified, "READY=1")
            until(notified, "WATCHDOG=1")
            appliance.signal(signal.SIGHUP)
            assert "MONOTONIC_USEC=" in until(notified, "RELOADING=1")
            until(notified, "READY=1")
            appliance.signal(signal.SIGTERM)
            until(notified, "STOPPING=1")
        assert appliance.stop() == 0

    def test_a_reload_takes_no_stop_back(self, make_appliance: Make, tmp_path: Path) -> None:
        """Neither one that is asked for while it stops, nor the end of one that was going on: READY would."""
        pytest.importorskip("systemd.daemon", reason="systemd-python could not be built here")
        appliance = make_appliance("digits", shutdown={"lame_duck_s": 60, "drain_s": 60})
        with notify_socket(tmp_path) as notified:
            appliance.spawn({"NOTIFY_SOCKET": notified.getsockname()})
            until(notified, "READY=1")
            appliance.signal(signal.SIGTERM)
            until(notified, "STOPPING=1")
            appliance.signal(signal.SIGHUP)
            refused = appliance.command("reload", check=False)
            assert refused.returncode != 0
            assert "shutting down" in refused.stdout + refused.stderr
            assert appliance.stop() == 0
            notified.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while text := notified.recv(4096).decode():
                    assert not {"READY=1", "RELOADING=1"} & set(text.splitlines())

    def test_a_reload_during_the_start_is_no_end(self, make_appliance: Make) -> None:
        """The signal is heard before the ports are bound."""
        appliance = make_appliance("digits")
        appliance.spawn()
        appliance.wait(lambda: "device cpu" in appliance.log)
        appliance.signal(signal.SIGHUP)
        appliance.wait(lambda: appliance.admin("/readyz")["ready"])
        appliance.wait(lambda: reloads(appliance, "ok") >= 1)

    def test_a_storm_of_reloads_is_few(self, appliance: Appliance) -> None:
        """What waits already takes over what the others would."""
        before, count = reloads(appliance, "ok"), 500
        for _ in range(count):
            appliance.signal(signal.SIGHUP)
        appliance.command("reload")  # comes after those that wait
        assert 1 <= reloads(appliance, "ok") - before < count


def until(notified: socket.socket, word: str) -> str:
    """Read notifications until one has that line, and return it."""
    while True:
        text = notified.recv(4096).decode()
        if word in text.splitlines():
            return text


def answers(appliance: Appliance, ca: Path) -> bool:
    """Whether a fresh connection that trusts `ca` is answered."""
    with Client(appliance.port(), ca, appliance.key) as client:
        try:
            return bool(client.predict(PREDICT).status.code == StatusCode.SUCCESS)
        except grpc.RpcError:
            return False


def reloads(appliance: Appliance, result: str) -> float:
    """How many reloads ended so."""
    return appliance.metric(f'inference_appliance_config_reloads_total{{result="{result}"}}')


def swaps(appliance: Appliance) -> float:
    """How often a running version of digits was replaced."""
    return appliance.metric('inference_appliance_model_swaps_total{model="digits"}')
