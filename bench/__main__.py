"""`python -m bench COMMAND`: one command for each thing that is measured; README.md says how to read the results."""

import importlib
import signal
import sys

COMMANDS = {
    "models": "write the bundles that the others serve",
    "raw": "ONNX Runtime alone: the ceiling",
    "served": "closed loops against the real daemon, beside raw in the same run",
    "open": "a fixed rate, latency from when a call should have left",
    "growth": "what more connections, models, concepts and inputs cost",
    "memory": "a million mixed requests: does memory grow",
    "loading": "latency of light requests while a heavy model loads",
    "kill": "kill -9 of engine processes under load: what is lost",
    "stages": "CPU microseconds a request, stage by stage, and a flame graph",
    "peers": "other servers on the same models, CPUs and load, in turns with ours",
    "inprocess": "the API path without a wire, microseconds a call",
    "metrics": "what counting costs a call, with and without; microseconds",
    "traces": "what tracing costs a call: off, on, and when it is sampled",
    "soak": "honest and hostile traffic at once, for minutes",
    "connect": "what the forwarder costs beside direct TLS",
    "storm": "ten thousand appliances reconnect, in virtual time",
    "wire": "our wire beside C++ gRPC and grpcio, without a model",
    "all": "what the bars stand on, one after the other",
}


def main() -> None:
    """Find the command and run it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: stopped"))  # unwinds, so that servers are stopped too
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name not in COMMANDS:
        print("python -m bench COMMAND [--help]\n")
        for command, text in COMMANDS.items():
            print(f"  {command:<10} {text}")
        sys.exit(0 if name in ("", "--help", "-h") else f"\nbench: there is no command {name!r}")
    try:
        module = importlib.import_module(f"bench.{_MODULES.get(name, name)}")
        module.main(arguments)
    except RuntimeError as error:
        sys.exit(f"bench: {error}")


_MODULES = {"open": "fixed_rate", "models": "write_models", "wire": "wire.__main__", "peers": "peers.run"}


if __name__ == "__main__":
    main()
