"""Java: stubs that Debian's protoc plugin makes of the protos, over Debian's grpc-java; the stock channel's ways.

Debian's netty has no ALPN of its own in Java; netty-tcnative gives it, once its library has the name netty looks for.
"""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import MODELS, Appliance, Pki
from support.client_matrix import Matrix
from support.forms import DIGIT, TOPIC, Of, Says, check, says, why
from support.programs import debian_versions, generate, need, need_programs, run
from support.stock import CLIENT_TESTS, SAMPLES

pytestmark = pytest.mark.clients

JAVA = "Java"
JARS = Path("/usr/share/java")
CLASSPATH = [
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
PACKAGES = (
    "default-jdk-headless protobuf-compiler protobuf-compiler-grpc-java-plugin libgrpc-java libprotobuf-java "
    "libnetty-java libnetty-tcnative-java libguava-java libperfmark-java libgeronimo-annotation-1.3-spec-java"
)
RPCS = ("PostModelOutputs", "GenerateModelOutputs", "StreamModelOutputs", "GetModel", "ListModels", "ListModelConcepts")
PORT = 443
STOCK_HOST, NOBODYS_HOST = "127.44.3.1", "127.44.3.2"
"""Loopback, and in no certificate."""

LABELS = [path.stem.rsplit("-", 1)[1] for path in sorted(SAMPLES.glob("*.png"))]

FORMS: dict[str, Any] = {
    "`GrpcSslContexts.forClient().trustManager(ca)`": DIGIT,
    "`withCallCredentials(…)`": DIGIT,
    "`MetadataUtils.newAttachHeadersInterceptor(…)`": DIGIT,
    "`V2Grpc.newFutureStub`": DIGIT,
    "`PostModelOutputs`, `image.base64`": DIGIT,
    "`PostModelOutputs`, `image.url`": DIGIT,
    "`PostModelOutputs`, `text.raw`": TOPIC,
    "`setVersionId`": DIGIT,
    "`model.output_info.output_config`, as documented": Of("digits", 3),
    "`model.model_version.output_info.output_config`": Of("digits", 3),
    "`setMinValue`": Of("digits", 1),
    "`addSelectConcepts`": ["4", "5"],
    "`setMaxConcepts(201)`": says("MODEL_INVALID_ARGUMENT", "from 1 to 200"),
    "a batch of 128": [[f"demo_{index}", LABELS[index % len(LABELS)]] for index in range(128)],
    "a batch of 129": says("INPUT_OVER_LIMIT", "129 inputs; the limit is 128"),
    "a method's arguments as parts": Of("digits", 2),
    "`GenerateModelOutputs`": [DIGIT],
    "`StreamModelOutputs`": [DIGIT, DIGIT],
    "`GetModel`": "1",
    "`ListModels`": ["digits", "ml-topics"],
    "`ListModelConcepts`": "10 concepts",
    "a wrong PAT": says("CONN_KEY_INVALID", "not known to this appliance"),
    "no PAT": says("CONN_INVALID_REQUEST", "authorization: Key"),
    "an unknown model": says("MODEL_DOES_NOT_EXIST", "appliance/main/nothing"),
    "a client certificate: `keyManager(certificate, key)`": DIGIT,
    "without a client certificate, where one is needed": says("CONN_INVALID_REQUEST", "client certificate"),
    "the JVM's own trust store": Says(
        ("UNAVAILABLE", "unable to find valid certification path"),
        "it does not know the custom root; import it with keytool, or name it as `trustManager`",
    ),
}
STOCK_FORMS: dict[str, Any] = {
    "the stock channel's trust": DIGIT,
    "the certificate's name, where it is verified": says("UNAVAILABLE", "127.44.3.1"),
    "the stock channel's port": says("UNAVAILABLE", "Connection refused: .*127.44.3.2:443"),
    "the stock channel with another port": says("Invalid host or port: localhost:"),
}
"""What a channel made like the stock package's does: port 443 and whoever answers there (PROTOCOL 1.3)."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Forms.class, the stubs it uses, and netty's native library under the name that netty looks for."""
    need_programs(PACKAGES, "javac", "java", "protoc", "grpc_java_plugin")
    for name in CLASSPATH:
        need((JARS / f"{name}.jar").exists(), f"{name}.jar", f"apt-get install {PACKAGES}")
    folder = tmp_path_factory.mktemp("java")
    stubs = folder / "stubs"
    plugin = f"--plugin=protoc-gen-grpc-java={shutil.which('grpc_java_plugin')}"
    generate(stubs, "--java_out=.", plugin, "--grpc-java_out=.", rpcs=RPCS)
    classpath = ":".join(str(JARS / f"{name}.jar") for name in CLASSPATH)
    options = ["-J-XX:TieredStopAtLevel=1", "-proc:none", "-nowarn", "-implicit:class", "-cp", classpath]
    run("javac", *options, "-sourcepath", stubs, "-d", folder, CLIENT_TESTS / "java" / "Forms.java")
    library = next(Path("/usr/lib").glob("*/jni/libnetty-tcnative.so"))
    shutil.copy(library, folder / "libnetty_tcnative.so")
    return folder


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Appliance]:
    """An appliance that knows its callers by certificate."""
    line_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}
    config = {"auth": {"require": "certificate"}, "principal": [line_3]}
    yield from running(tmp_path_factory.mktemp("certified"), pki, config)


@pytest.fixture(scope="module")
def at_443(tmp_path_factory: pytest.TempPathFactory, pki: Pki, native: Appliance) -> Iterator[Appliance | None]:
    """An appliance where the stock channel looks for one, with the keys of `native`; None where 443 is not ours."""
    try:
        with socket.create_server((STOCK_HOST, PORT)):
            pass
    except PermissionError:
        yield None
        return
    config = {"server": {"listen": f"{STOCK_HOST}:{PORT}"}, "auth": {"keys_file": native.home / "keys.json"}}
    yield from running(tmp_path_factory.mktemp("at-443"), pki, config)


def running(home: Path, pki: Pki, config: dict[str, Any]) -> Iterator[Appliance]:
    """A running appliance with the digits."""
    appliance = Appliance(home, pki, config, transport="native")
    shutil.copytree(MODELS / "digits", appliance.models / "digits")
    with appliance:
        yield appliance


@pytest.fixture(scope="module")
def found(
    compiled: Path, native: Appliance, certified: Appliance, at_443: Appliance | None, pki: Pki, web: str
) -> dict[str, Any]:
    """What each form gave, in one JVM."""
    pair = [pki.folder / "clients" / f"line-3.{kind}" for kind in ("key", "crt")]
    classpath = ":".join([str(compiled), *(str(JARS / f"{name}.jar") for name in CLASSPATH)])
    words = ["localhost", native.port(), pki.ca, SAMPLES, web, certified.port(), *pair, STOCK_HOST, NOBODYS_HOST]
    options = [f"-Djava.library.path={compiled}", "-XX:TieredStopAtLevel=1", "-cp", classpath]
    said = run("java", *options, "Forms", *words, CLARIFAI_PAT=native.key)
    return dict(json.loads(said.splitlines()[-1]))


@pytest.fixture
def about(matrix: Matrix) -> Matrix:
    """The matrix, told what is driven."""
    matrix.version(JAVA, debian_versions("libgrpc-java", "libprotobuf-java", "libnetty-java", "default-jdk-headless"))
    return matrix


@pytest.mark.parametrize("form", FORMS)
def test_java(form: str, found: dict[str, Any], truth: dict[str, list[str]], about: Matrix) -> None:
    """It gives what the raw stub of Python reads, or the error that it should."""
    check(found[form], FORMS[form], truth)
    about.row(JAVA, form, why=why(FORMS[form]))


def test_a_channel_like_the_stock_one(
    found: dict[str, Any], at_443: Appliance | None, truth: dict[str, list[str]], about: Matrix
) -> None:
    """It dials 443 and nothing else, and believes any certificate."""
    need(at_443 is not None, f"the right to listen on port {PORT}", "run the tests as root")
    for form, expected in STOCK_FORMS.items():
        check(found[form], expected, truth)
    about.row(JAVA, 'the stock `ClarifaiChannel.getGrpcChannel("host")`, on port 443; it verifies no certificate')
    about.row(
        JAVA,
        'the stock `ClarifaiChannel.getGrpcChannel("host:port")`',
        why="its port is 443 always; let the appliance listen there, or make the channel with grpc-java itself",
    )
    about.row(
        JAVA,
        "a root certificate in the stock `ClarifaiChannel`",
        why="it has no parameter for one and believes any certificate; make the channel with grpc-java itself",
    )


def test_no_form_is_forgotten(found: dict[str, Any]) -> None:
    """Each that the program drives is looked at."""
    assert set(found) == set(FORMS) | set(STOCK_FORMS)
