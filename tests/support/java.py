"""Java over Debian's packages: the API's stubs, compiled once, and programs that use them.

Debian's netty has no ALPN of its own in Java; netty-tcnative gives it, once its library has the name netty looks for.
"""

import functools
import hashlib
import shutil
import tempfile
from pathlib import Path

from support.appliance import ROOT
from support.programs import generate, need, need_programs, protos, run

_JARS = Path("/usr/share/java")
_CLASSPATH = [
    *("grpc-api", "grpc-context", "grpc-core", "grpc-netty", "grpc-protobuf", "grpc-protobuf-lite", "grpc-stub"),
    *("netty-buffer", "netty-codec", "netty-codec-http", "netty-codec-http2", "netty-common", "netty-handler"),
    *(
        "netty-handler-proxy",
        "netty-resolver",
        "netty-tcnative",
        "netty-transport",
        "netty-transport-native-unix-common",
    ),
    *("protobuf", "guava", "perfmark-api", "geronimo-annotation-1.3-spec"),
]
_PACKAGES = (
    "default-jdk-headless protobuf-compiler protobuf-compiler-grpc-java-plugin libgrpc-java libprotobuf-java "
    "libnetty-java libnetty-tcnative-java libguava-java libperfmark-java libgeronimo-annotation-1.3-spec-java"
)
_RPCS = (
    "PostModelOutputs",
    "GenerateModelOutputs",
    "StreamModelOutputs",
    "GetModel",
    "ListModels",
    "ListModelConcepts",
)
"""All 400 take a compiler a minute."""
_QUICKLY = "-XX:TieredStopAtLevel=1"


@functools.cache
def stubs() -> Path:
    """A folder with the classes of the stubs and netty's library; it is kept in build/ until protos or tools change."""
    need_programs(_PACKAGES, "javac", "java", "protoc", "grpc_java_plugin")
    for name in _CLASSPATH:
        need((_JARS / f"{name}.jar").exists(), f"{name}.jar", f"apt-get install {_PACKAGES}")
    tools = (
        run("protoc", "--version")
        + run("javac", "--version")
        + str([(_JARS / f"{n}.jar").resolve() for n in _CLASSPATH])
    )
    digest = hashlib.sha256(protos(_RPCS).SerializeToString(deterministic=True) + tools.encode()).hexdigest()[:16]
    kept = ROOT / "build" / f"java-{digest}"
    if kept.exists():
        return kept
    kept.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as place:
        sources, classes = Path(place) / "sources", Path(place) / "classes"
        plugin = f"--plugin=protoc-gen-grpc-java={shutil.which('grpc_java_plugin')}"
        generate(sources, "--java_out=.", plugin, "--grpc-java_out=.", rpcs=_RPCS)
        options = ["-implicit:class", "-sourcepath", sources, "-cp", _classpath(), "-d", classes]
        _compile(*options, sources / "com" / "clarifai" / "grpc" / "api" / "V2Grpc.java")
        library = next(Path("/usr/lib").glob("*/jni/libnetty-tcnative.so"))
        shutil.copy(library, classes / "libnetty_tcnative.so")
        if not kept.exists():
            classes.rename(kept)
    return kept


def java_command(source: str, name: str, folder: Path) -> list[str | Path]:
    """Compile a program of one class in a folder; the command that runs it."""
    found = stubs()
    (folder / f"{name}.java").write_text(source, "utf-8")
    _compile("-cp", _classpath(found), "-d", folder, folder / f"{name}.java")
    return ["java", _QUICKLY, f"-Djava.library.path={found}", "-cp", _classpath(folder, found), name]


def _compile(*options: str | Path) -> None:
    run("javac", f"-J{_QUICKLY}", "-proc:none", "-nowarn", *options)


def _classpath(*folders: Path) -> str:
    return ":".join(map(str, [*folders, *(_JARS / f"{name}.jar" for name in _CLASSPATH)]))
