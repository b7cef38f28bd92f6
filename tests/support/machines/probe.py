"""Whether a machine's sandbox is enforced, or only accepted: asked of the kernel before any test relies on it."""

from support.machines.machine import Machine

_PORT = 7007
_TRIED = f"timeout 2 bash -c 'exec 3<>/dev/tcp/127.0.0.1/{_PORT}'"
_TIMED_OUT = 124


def not_enforced(machine: Machine) -> str:
    """What systemd's sandbox does not do here, in one sentence; "" when addresses and devices are really kept out.

    Each rule is tried with and without: a connection that would fail anyhow proves nothing.
    """
    machine.run(
        *("systemd-run", "--quiet", "--unit=probe", f"--socket-property=ListenStream=127.0.0.1:{_PORT}"),
        *("--socket-property=Accept=yes", "cat"),
    )
    machine.run("mknod", "--mode=666", "/dev/probe", "c", "10", "229")
    try:
        if code := _in_unit(machine, _TRIED):
            return f"a plain unit cannot connect to loopback (status {code})"
        if (code := _in_unit(machine, _TRIED, "IPAddressDeny=any")) != _TIMED_OUT:
            return f"IPAddressDeny=any does not keep packets out (status {code}): bpf(2) is not allowed here"
        if code := _in_unit(machine, ": < /dev/probe"):
            return f"a plain unit cannot open a device (status {code})"
        if not _in_unit(machine, ": < /dev/probe", "DevicePolicy=closed"):
            return "DevicePolicy=closed does not keep devices shut: bpf(2) is not allowed here"
    finally:
        machine.run("systemctl", "stop", "probe.socket")
        machine.run("rm", "/dev/probe")
    return ""


def _in_unit(machine: Machine, script: str, *properties: str) -> int:
    """A script's exit status in a unit of its own with these properties."""
    options = [f"--property={value}" for value in properties]
    return machine.run(
        "systemd-run", "--quiet", "--wait", "--collect", "--pipe", *options, "bash", "-c", script, check=False
    ).returncode
