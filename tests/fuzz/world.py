"""The daemon that is fuzzed: shipped bundles, tiny ones of every kind, methods of every type, workflows."""

import contextlib
import json
import shutil
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpcore
import yaml
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from onnx import TensorProto, helper
from support import graphs
from support.appliance import MODELS, PATIENCE_S, Appliance, array_input, image_input, make_pki, request_for, text_input
from support.waiting import eventually

from appliance.api.methods import GET_SIGNATURES, METHOD_KEY

FLOAT, INT64, UINT8, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL
QUICK = {"batching": {"max_rows": 4}}
DIGIT = sorted((MODELS / "digits" / "samples").glob("*.png"))[0].read_bytes()
BLOB = {"name": "blob", "type": "bytes", "input": "x"}


def _same(kind: int, *axes: str | int) -> bytes:
    return graphs.identity_model(("batch", *axes), kind).SerializeToString()


def _sum() -> bytes:
    """`i` int64, `f` float32, `flag` bool (batch,) → `y` float32 (batch,), their sum."""
    nodes = [
        helper.make_node("Cast", ["i"], ["one"], to=FLOAT),
        helper.make_node("Cast", ["flag"], ["two"], to=FLOAT),
        helper.make_node("Sum", ["one", "f", "two"], ["y"]),
    ]
    inputs = {"i": (INT64, ["batch"]), "f": (FLOAT, ["batch"]), "flag": (BOOL, ["batch"])}
    return graphs.make(nodes, inputs, {"y": (FLOAT, ["batch"])}).SerializeToString()


def _both() -> bytes:
    """`a` int64, `b` float32 (batch,) → `c`, `d`, the same."""
    nodes = [helper.make_node("Identity", ["a"], ["c"]), helper.make_node("Identity", ["b"], ["d"])]
    whole, real = (INT64, ["batch"]), (FLOAT, ["batch"])
    return graphs.make(nodes, {"a": whole, "b": real}, {"c": whole, "d": real}).SerializeToString()


def _boxes() -> bytes:
    """`box` float32 (batch, 4) → `boxes` (batch, 1, 4), `scores` (batch, 1): the left side."""
    nodes = [
        helper.make_node("Unsqueeze", ["box", "one"], ["boxes"]),
        helper.make_node("Gather", ["box", "zero"], ["scores"], axis=1),
    ]
    weights = {"one": graphs.np.array([1]), "zero": graphs.np.array([0])}
    return graphs.make(
        nodes,
        {"box": (FLOAT, ["batch", 4])},
        {"boxes": (FLOAT, ["batch", 1, 4]), "scores": (FLOAT, ["batch", 1])},
        weights,
    ).SerializeToString()


def _method(name: str, file: str, arguments: list[dict[str, Any]], returns: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "file": file, "arguments": arguments, "returns": returns}


def _argument(kind: str, name: str = "x", **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, **more}


PAIR_IN = [{"name": "a", "type": "int", "input": "a"}, {"name": "b", "type": "float", "input": "b"}]
PAIR_OUT = [{"name": "c", "type": "int", "output": "c"}, {"name": "d", "type": "float", "output": "d"}]
PICTURE = {"size": [6, 6]}

METHODS = [
    _method(
        "add",
        "sum.onnx",
        [
            _argument("int", "i", range=[-1000, 1000]),
            _argument("float", "f", default=0.5),
            _argument("bool", "flag", default=False),
        ],
        {"type": "float"},
    ),
    _method("numbers", "row.onnx", [_argument("list[float]")], {"type": "list[float]"}),
    _method("grid", "grid.onnx", [_argument("list[list[int]]")], {"type": "list[list[int]]"}),
    _method("blob", "bytes.onnx", [_argument("bytes")], {"type": "bytes"}),
    _method("movie", "bytes.onnx", [_argument("video")], {"type": "str"}),
    _method("array", "row.onnx", [_argument("ndarray")], {"type": "ndarray"}),
    _method("table", "row.onnx", [_argument("json", default=[1, 2])], {"type": "json"}),
    _method("wide_table", "grid.onnx", [_argument("json")], {"type": "json"}),
    _method("pick", "one.onnx", [_argument("str", choices=["no", "yes"])], {"type": "str", "choices": ["no", "yes"]}),
    _method(
        "say",
        "text.onnx",
        [_argument("text", "text", text={"max_tokens": 16})],
        {"type": "list[list[float]]"},
    ),
    _method("picture", "picture.onnx", [_argument("image", image=PICTURE)], {"type": "image"}),
    _method("pictures", "pictures.onnx", [_argument("list[image]", image=PICTURE)], {"type": "ndarray"}),
    _method("still", "picture.onnx", [_argument("frame", image=PICTURE)], {"type": "frame"}),
    _method("sound", "row.onnx", [_argument("audio", sample_rate=16000)], {"type": "audio", "sample_rate": 16000}),
    _method("weigh", "three.onnx", [_argument("list[concept]")], {"type": "list[concept]"}),
    _method("best", "three.onnx", [_argument("concept")], {"type": "concept"}),
    _method(
        "boxes",
        "boxes.onnx",
        [_argument("region", "box"), _argument("float", "least", default=0.1)],
        {"type": "list[region]", "output": "boxes", "scores": "scores", "min_score": "least"},
    ),
    _method("couple", "both.onnx", [_argument("tuple", "p", items=PAIR_IN)], {"type": "tuple", "items": PAIR_OUT}),
    _method(
        "named",
        "both.onnx",
        [_argument("named_fields", "p", items=PAIR_IN)],
        {"type": "named_fields", "items": PAIR_OUT},
    ),
    _method("ratio", "ratio.onnx", [_argument("list[float]")], {"type": "json"}),
    _method("generate", "row.onnx", [_argument("list[float]")], {"type": "float", "iterator": True}),
    _method("stream", "real.onnx", [_argument("float", iterator=True)], {"type": "float", "iterator": True}),
]


def write_tools(folder: Path) -> None:
    """A bundle with a method of every type, and ones that stream."""
    files = {
        "sum.onnx": _sum(),
        "both.onnx": _both(),
        "boxes.onnx": _boxes(),
        "row.onnx": _same(FLOAT, "n"),
        "real.onnx": _same(FLOAT),
        "three.onnx": _same(FLOAT, 3),
        "grid.onnx": _same(INT64, "n", "m"),
        "one.onnx": _same(INT64),
        "bytes.onnx": _same(UINT8, "n"),
        "picture.onnx": _same(FLOAT, 3, 6, 6),
        "pictures.onnx": _same(FLOAT, "n", 3, 6, 6),
        "ratio.onnx": graphs.make(
            [helper.make_node("Div", ["x", "x"], ["y"])], {"x": (FLOAT, ["batch", "n"])}, {"y": (FLOAT, ["batch", "n"])}
        ).SerializeToString(),
        "text.onnx": graphs.text_hidden_model().SerializeToString(),
        "tokenizer.json": graphs.make_tokenizer().to_str(),
    }
    config = graphs.bundle_config(
        folder, "tensor-to-tensor", {"file": "model.onnx", "methods": METHODS, **QUICK}, graphs.CONCEPTS
    )
    graphs.write_bundle(folder, graphs.identity_model(), config, files=files)


WORKFLOWS = {
    "digits": [{"id": "guess", "model": {"model_id": "digits", "user_id": "appliance", "app_id": "main"}}],
    "mixed": [
        {"id": "see", "model": {"model_id": "colours"}},
        {"id": "fragile", "model": {"model_id": "fragile"}},
        {"id": "vector", "model": {"model_id": "vector"}, "suppress_output": True},
        {"id": "after", "model": {"model_id": "tensor"}, "node_inputs": [{"node_id": "vector"}]},
    ],
    "words": [{"id": "topic", "model": {"model_id": "topic"}}, {"id": "deep", "model": {"model_id": "sentence"}}],
}


def _write(appliance: Appliance) -> None:
    for bundle in ("digits", "ml-topics"):
        shutil.copytree(MODELS / bundle, appliance.models / bundle)
    root = appliance.models
    for version in ("1", "2"):
        graphs.write_image_classifier(root / "colours", version=version, onnx_section=QUICK)
    graphs.write_image_classifier(root / "fragile", model=graphs.nan_classifier_model(), onnx_section=QUICK)
    graphs.write_image_embedder(root / "vector")
    graphs.write_text_classifier(root / "topic", max_tokens=16)
    graphs.write_text_embedder(root / "sentence", max_tokens=8)
    graphs.write_raw(root / "tensor", **QUICK)
    graphs.write_raw(root / "pair", graphs.two_in_two_out_model(), **QUICK)
    graphs.write_raw(root / "half", graphs.identity_model(("batch", 3), TensorProto.FLOAT16), **QUICK)
    graphs.write_raw(root / "nans", graphs.nan_model(), **QUICK)
    graphs.write_raw(root / "gather", graphs.gather_model(), **QUICK)
    graphs.write_raw(root / "alone", graphs.no_batch_axis_model(), **QUICK)
    graphs.write_raw(root / "broken", graphs.string_model())
    write_tools(root / "tools")
    folder = appliance.home / "workflows"
    folder.mkdir()
    for name, nodes in WORKFLOWS.items():
        owner = {} if name == "digits" else {"user_id": graphs.USER, "app_id": graphs.APP}
        text = yaml.safe_dump({"workflow": {"id": name, **owner, "nodes": nodes}})
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


class World:
    """A running daemon with TLS, and one connection of each kind to it.

    Attributes:
        pools: what requests may name, by the field's name: ids that exist, harvested from the daemon itself.
        signatures: what each model publishes of its methods: model id → method → its signature as JSON.
        revivals: how often the daemon had to be started again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config: dict[str, Any] = {
            "limits": {"memory_in_flight": "512MiB", "image_pixels": 4_000_000, "request_timeout_s": 30.0},
            "placement": {"compute_cluster_id": "site", "nodepool_id": "plant-7"},
        }
        self.appliance = Appliance(folder / "home", make_pki(folder / "pki"), config, transport="native")
        _write(self.appliance)
        self.appliance.key = self.appliance.new_key()
        self.key = self.appliance.key
        self.revivals = 0
        self.pid = 0
        self._open = contextlib.ExitStack()
        self._log = (self.appliance.home / "daemon.log").open("ab+")
        self.start()
        self.pools: dict[str, tuple[str, ...]] = {}
        self.signatures: dict[str, dict[str, Any]] = {}
        self._harvest()

    # ---- life ----

    def start(self) -> None:
        """Start the daemon; return when it serves. `broken` never does, which is meant."""
        process = self.appliance.spawn()
        self.pid = process.pid
        self.appliance.wait(self._settled, "every bundle but one is ready")
        self._connect()

    def _settled(self) -> bool:
        states = self.states()
        return bool(states) and all(
            state == ("failed" if name == "broken" else "ready") for name, state in states.items()
        )

    def states(self) -> dict[str, str]:
        """State by bundle: "ready" when every version is."""
        rows = self.appliance.admin("/status")["catalog"]
        return {
            row["bundle"]: next((v["state"] for v in row["versions"] if v["state"] != "ready"), "ready") for row in rows
        }

    def alive(self) -> bool:
        """Whether it is still the process that was started."""
        return self.appliance.process is not None and self.appliance.process.poll() is None

    def revive(self) -> None:
        """Start it again after it died, so that the request that did it can be made smaller."""
        self._open.close()
        self.revivals += 1
        self.start()
        self.new_log()

    def stop(self) -> int:
        """End it; its exit code."""
        self._open.close()
        self._log.close()
        return self.appliance.stop()

    def _connect(self) -> None:
        port = self.appliance.port()
        self.port = port
        ca = self.appliance.pki.ca
        self._open = contextlib.ExitStack()
        self.channel = self.new_channel()
        self._open.callback(self.channel.close)
        context = ssl.create_default_context(cafile=str(ca))
        self.http = {
            two: self._open.enter_context(
                httpcore.ConnectionPool(ssl_context=context, http1=not two, http2=two, max_connections=2)
            )
            for two in (False, True)
        }

    def new_channel(self) -> grpc.Channel:
        """A channel of its own."""
        credentials = grpc.ssl_channel_credentials(self.appliance.pki.ca.read_bytes())
        sizes = [(f"grpc.max_{way}_message_length", 2**30) for way in ("send", "receive")]
        options = [*sizes, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        return grpc.secure_channel(f"localhost:{self.port}", credentials, options=options)

    # ---- what it says ----

    def new_log(self) -> str:
        """What it has logged since the last look, whole lines and what is left of one."""
        return self._log.read().decode("utf-8", "replace")

    def idle(self) -> None:
        """Return when no call is being worked on and nothing is held. Raises: AssertionError: that never happens."""
        wanted = ("inference_appliance_memory_in_flight_bytes", "inference_appliance_in_flight_requests")

        def settled() -> bool:
            page = self.appliance.metrics()
            return all(sample(page, name) == 0 for name in wanted)

        eventually(settled, PATIENCE_S / 2, "memory and calls in flight return to 0")

    # ---- asking ----

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers of a caller with a key."""
        return (("authorization", f"Key {self.key}"),)

    def ask(self, rpc: str, request: Any) -> Any:
        """One good call of Clarifai's service, on a channel of its own if need be."""
        descriptor = service_pb2.DESCRIPTOR.services_by_name["V2"].methods_by_name[rpc]
        reply = self.channel.unary_unary(f"/clarifai.api.V2/{rpc}")(
            request.SerializeToString(), metadata=self.metadata, timeout=PATIENCE_S
        )
        return service_pb2.__dict__.get(descriptor.output_type.name).FromString(reply)  # type: ignore[union-attr]

    def _harvest(self) -> None:
        """Learn every id there is, and every method's signature."""
        own = resources_pb2.UserAppIDSet(user_id=graphs.USER, app_id=graphs.APP)
        models = [
            model
            for ids in (own, resources_pb2.UserAppIDSet(user_id="appliance", app_id="main"))
            for model in self.ask("ListModels", service_pb2.ListModelsRequest(user_app_id=ids)).models
        ]
        self.owners = {model.id: (model.user_id, model.app_id) for model in models}
        for name, (user, app) in self.owners.items():
            request = request_for(name, [resources_pb2.Input()], user=user, app=app)
            request.inputs[0].data.metadata.update({METHOD_KEY: GET_SIGNATURES})
            reply = self.ask("PostModelOutputs", request)
            if reply.outputs[0].data.text.raw:
                self.signatures[name] = json.loads(reply.outputs[0].data.text.raw)
        deployments = self.ask("ListDeployments", service_pb2.ListDeploymentsRequest()).deployments
        places = [resources_pb2.UserAppIDSet(user_id=user) for user in ("appliance", graphs.USER)]
        runners = [
            runner.id
            for ids in places
            for runner in self.ask(
                "ListRunners",
                service_pb2.ListRunnersRequest(user_app_id=ids, compute_cluster_id="site", nodepool_id="plant-7"),
            ).runners
        ]
        concepts = [concept.id for model in models for concept in model.model_version.output_info.data.concepts]
        methods = [name for signatures in self.signatures.values() for name in signatures]
        self.pools = {
            "model_id": tuple(self.owners),
            "workflow_id": tuple(WORKFLOWS),
            "version_id": ("", "1", "2", "3"),
            "user_id": ("", "appliance", graphs.USER, "me", "clarifai"),
            "app_id": ("", "main", graphs.APP),
            "deployment_id": tuple(deployment.id for deployment in deployments),
            "nodepool_id": ("plant-7",),
            "compute_cluster_id": ("site",),
            "runner_id": tuple(runners),
            "concept_id": tuple(dict.fromkeys([*concepts, "c-red", "red", "c-good"])),
            "model_type_id": ("visual-classifier", "text-embedder", "tensor-to-tensor"),
            "method": tuple(dict.fromkeys([*methods, GET_SIGNATURES])),
        }
        assert all(self.pools.values()), self.pools


def sample(page: str, name: str) -> float:
    """One sample of a metrics page; 0 when it is not there."""
    return next((float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name)), 0.0)


# ---- good callers ----------------------------------------------------------------------------------------------------


def canaries(world: World) -> dict[str, Callable[[grpc.Channel], bytes]]:
    """Good requests, whose answers never change: name → a call that gives the answer without what differs each time."""

    def predict(model: str, given: Any, method: str = "", **more: Any) -> Callable[[grpc.Channel], bytes]:
        user, app = world.owners[model]
        request = request_for(model, [given], user=user, app=app)
        if method:
            request.inputs[0].data.metadata.update({METHOD_KEY: method})
        body = request.SerializeToString()

        def call(channel: grpc.Channel) -> bytes:
            reply = channel.unary_unary("/clarifai.api.V2/PostModelOutputs")(
                body, metadata=world.metadata, timeout=PATIENCE_S
            )
            answer = service_pb2.MultiOutputResponse.FromString(reply)
            assert answer.status.code == 10000, answer.status
            return bytes(answer.outputs[0].data.SerializeToString(deterministic=True))

        return call

    add = resources_pb2.Input()
    add.data.parts.add(id="i").data.int_value = 3
    return {
        "digits": predict("digits", image_input(DIGIT)),
        "colours": predict("colours", image_input(DIGIT)),
        "ml-topics": predict("ml-topics", text_input("ridge regression")),
        "tensor": predict("tensor", array_input(graphs.np.array([1, 2, 3], graphs.np.float32))),
        "add": predict("tools", add, "add"),
    }


class Canary:
    """A caller beside the fuzzer, on a connection of its own, whose every answer is compared with the first ones."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._calls = canaries(world)
        self._truth: dict[str, bytes] = {}
        self._failures: list[str] = []
        self._go = threading.Event()
        self._still = threading.Event()
        self._over = threading.Event()
        self.count = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Canary":
        with self._world.new_channel() as channel:
            self._truth = {name: call(channel) for name, call in self._calls.items()}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._go.set()
        self._thread.join(PATIENCE_S)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Calls all the while, and is still afterwards."""
        self._still.clear()
        self._go.set()
        try:
            yield
        finally:
            self._go.clear()
            self._still.wait(PATIENCE_S)

    def failures(self) -> list[str]:
        """What went wrong since it was last asked."""
        found, self._failures = self._failures, []
        return found

    def check(self) -> None:
        """Every good request gets its right answer now. Raises: AssertionError, RpcError."""
        with self._world.new_channel() as channel:
            for name, call in self._calls.items():
                assert call(channel) == self._truth[name], f"the answer of {name} has changed"

    def _run(self) -> None:
        while not self._over.is_set():
            self._still.set()
            self._go.wait()
            self._still.clear()
            with self._world.new_channel() as channel:
                while self._go.is_set() and not self._over.is_set():
                    for name, call in self._calls.items():
                        try:
                            if call(channel) != self._truth[name]:
                                self._failures.append(f"the answer of {name} has changed")
                        except (grpc.RpcError, AssertionError) as error:
                            self._failures.append(f"{name}: {error}")
                        self.count += 1
                        self._over.wait(0.2)
        self._still.set()


@contextlib.contextmanager
def running() -> Iterator[World]:
    """A world in a temporary folder, ended at the end."""
    with tempfile.TemporaryDirectory(prefix="fuzz-api-") as folder:
        world = World(Path(folder))
        try:
            yield world
        finally:
            if world.alive():
                world.stop()
