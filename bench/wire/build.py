"""What is compiled for a run: the C++ server, and the client certificate for h2load."""

import shutil
import subprocess
from pathlib import Path

_HERE = Path(__file__).parent
_PROGRAMS = {"g++": "g++", "protoc": "protobuf-compiler"}
_HEADERS = {"grpcpp/grpcpp.h": "libgrpc++-dev", "google/protobuf/message.h": "libprotobuf-dev"}
_TIMEOUT_S = 300.0
_LIBRARIES = ("-lgrpc++", "-lgrpc", "-lgpr", "-lprotobuf", "-lpthread")


def cpp_server(folder: Path) -> Path:
    """Compile echo.cc into `folder`; the program's path.

    Raises: RuntimeError: a package is missing (it names them), or the compiler refuses; the sentence is for the report.
    """
    missing = _missing_packages()
    if missing:
        raise RuntimeError(f"missing packages; on Debian: apt-get install {' '.join(missing)}")
    program = folder / "echo"
    _run("protoc", f"--proto_path={_HERE}", f"--cpp_out={folder}", "predict.proto")
    sources = [str(_HERE / "echo.cc"), str(folder / "predict.pb.cc")]
    _run("g++", "-std=c++17", "-O2", f"-I{folder}", *sources, "-o", str(program), *_LIBRARIES)
    return program


def client_certificate(folder: Path) -> Path:
    """Compile client_certificate.c, to be preloaded into h2load. Raises: RuntimeError: there is no compiler."""
    if shutil.which("gcc") is None:
        raise RuntimeError("missing packages; on Debian: apt-get install gcc")
    library = folder / "client_certificate.so"
    _run("gcc", "-shared", "-fPIC", "-O2", str(_HERE / "client_certificate.c"), "-o", str(library))
    return library


def grpc_version() -> str:
    """The version of the C++ library that echo.cc is compiled with, or "unknown"."""
    try:
        return _run("pkg-config", "--modversion", "grpc++").strip()
    except (OSError, RuntimeError):
        return "unknown"


def _missing_packages() -> list[str]:
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    if "g++" in missing:
        return [*missing, *_HEADERS.values()]  # nothing to ask for headers with; those present do no harm
    return missing + [package for header, package in _HEADERS.items() if not _has_header(header)]


def _has_header(header: str) -> bool:
    done = subprocess.run(
        ["g++", "-E", "-x", "c++", "-"], input=f"#include <{header}>\n", text=True, capture_output=True, check=False
    )
    return done.returncode == 0


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
