"""Stock clients that are no Python: the programs they need, their scripts, and the protos they are generated from."""

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from clarifai_grpc.grpc.api import service_pb2
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor

from support.appliance import PATIENCE_S, ROOT
from support.stock import CLIENT_TESTS, SCRIPT_PATIENCE_S, plain_environment

NODE_MODULES = ROOT / ".clients" / "node" / "node_modules"
_TRUST = ("NODE_EXTRA_CA_CERTS", "SSL_CERT_DIR")


def need(found: bool, what: str, remedy: str) -> None:
    """Skip the test without a program, saying how to get it; where REQUIRE_CLIENTS is set, as in CI, it fails."""
    if found:
        return
    reason = f"{what} is not here: {remedy}"
    if os.environ.get("REQUIRE_CLIENTS"):
        pytest.fail(reason)
    pytest.skip(reason)


def need_programs(package: str, *programs: str) -> None:
    """`need` programs of a Debian package."""
    for program in programs:
        need(shutil.which(program) is not None, program, f"apt-get install {package}")


def need_node(*packages: str) -> None:
    """`need` Node and these npm packages."""
    need(shutil.which("node") is not None, "node", "install Node.js 20")
    for package in packages:
        need((NODE_MODULES / package).is_dir(), package, "make .clients/node/ready")


def environment(**variables: str | Path) -> dict[str, str]:
    """The environment a user starts with, and these variables: no trust but the system's."""
    return plain_environment(**variables) | {
        name: str(variables.get(name, "")) for name in _TRUST if name in os.environ or name in variables
    }


def run(*words: object, cwd: Path | None = None, **variables: str | Path) -> str:
    """Run a program to its end, which must be good; what it printed."""
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=SCRIPT_PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"{words[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- Node ----


def run_node(script: str, *arguments: object, **variables: str | Path) -> Any:
    """Run a script of tests/clients/node with the stock packages in reach; what it printed last, as JSON."""
    need_node("clarifai-nodejs", "clarifai-nodejs-grpc")
    return json.loads(node_source((CLIENT_TESTS / "node" / script).read_text("utf-8"), script, *arguments, **variables))


def node_source(source: str, name: str, *arguments: object, **variables: str | Path) -> str:
    """Run a text as a user's own file `name` (.js or .mjs) in a project with the stock packages; what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "node_modules").symlink_to(NODE_MODULES)
        (project / name).write_text(source, "utf-8")
        return run("node", name, *arguments, cwd=project, **variables)


@functools.cache
def node_versions(*packages: str) -> str:
    """What npm packages and Node say of themselves: "clarifai-nodejs 0.4.0, Node v20.20.2"."""
    found = [(name, json.loads((NODE_MODULES / name / "package.json").read_text("utf-8"))) for name in packages]
    own = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    return ", ".join([f"{name} {about['version']}" for name, about in found] + [f"Node {own.stdout.strip()}"])


# ---- protoc ----


def protos(rpcs: Sequence[str] = ()) -> descriptor_pb2.FileDescriptorSet:
    """The API's protos as a descriptor set, from which protoc generates as from their text.

    Args: rpcs: leave only these in the service, so that a compiler need not look at all 400.
    """
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}

    def take(file: FileDescriptor) -> None:
        if file.name in files:
            return
        for needed in file.dependencies:
            take(needed)
        files[file.name] = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(files[file.name])

    take(service_pb2.DESCRIPTOR)
    for file in files.values():
        for service in file.service:
            kept = [method for method in service.method if not rpcs or method.name in rpcs]
            del service.method[:]
            service.method.extend(kept)
    return descriptor_pb2.FileDescriptorSet(file=files.values())


def generate(folder: Path, *options: str, rpcs: Sequence[str] = ()) -> None:
    """Let protoc write the stubs of a language into a folder; protobuf's own messages come with its runtime."""
    folder.mkdir(parents=True)
    found = protos(rpcs)
    (folder / "api.pb").write_bytes(found.SerializeToString())
    names = [file.name for file in found.file if not file.name.startswith("google/protobuf/")]
    run("protoc", "--descriptor_set_in=api.pb", *options, *names, cwd=folder)


@functools.cache
def debian_versions(*packages: str) -> str:
    """What Debian's packages say of themselves: "libgrpc-java 1.41.3+ds-1"."""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version}, ", *packages],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    return done.stdout.removesuffix(", ")
