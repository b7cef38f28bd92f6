"""A restart that nobody notices: the listening socket stays open, and the next daemon serves those who waited."""

import signal
import socket
from collections.abc import Callable

import pytest
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from support.appliance import Appliance, Load, Pki, image_input, request_for
from support.pictures import png

DIGIT = request_for("digits", [image_input(png())])


@pytest.fixture
def transport() -> str:
    """Only the native wire takes over sockets."""
    return "native"


def test_a_restart_on_a_kept_socket_loses_and_refuses_nobody(
    make_appliance: Callable[..., Appliance], pki: Pki
) -> None:
    """Three daemons in turn on one socket, as systemd's store hands it on, and callers that try nothing twice: each
    call is answered, or told that the model is still loading, which the stock SDKs wait for."""
    appliance = make_appliance("digits", shutdown={"lame_duck_s": 0.1, "drain_s": 60})
    appliance.key = appliance.new_key()
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as kept:
        listening = {"server.listen": kept}
        appliance.spawn(listening=listening)
        appliance.wait(lambda: appliance.admin("/readyz").get("ready") is True)
        with Load(kept.getsockname()[1], pki.ca, appliance.key, DIGIT) as load:
            load.wait_for(20)
            for _ in range(2):
                appliance.signal(signal.SIGTERM)
                assert appliance.process is not None
                assert appliance.process.wait(120) == 0
                appliance.spawn(listening=listening)
                load.wait_for(20)
        appliance.stop()
    assert set(load.ends) <= {"answered", f"status {StatusCode.MODEL_DEPLOYING}"}, (load.ends, load.odd)
    assert "lost" not in appliance.log
