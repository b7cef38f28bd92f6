"""Requests of every served RPC: anything that their descriptors allow, and such as real callers write, nearly right."""

import json
import math
from functools import cache
from typing import Any

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from fuzz import media
from fuzz.world import World
from google.protobuf import message_factory, struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from appliance.api import inference_pb2
from appliance.api.catalogue import RPCS
from appliance.api.methods import GET_SIGNATURES, METHOD_KEY

SERVICE = service_pb2.DESCRIPTOR.services_by_name["V2"]
KSERVE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
PREDICTING = ("PostModelOutputs", "GenerateModelOutputs", "StreamModelOutputs")
_DEPTH = 4
_F = FieldDescriptor

_INTS = (0, 1, 2, -1, 20, 128, 129, 200, 201, 2**31 - 1, -(2**31), 2**32 - 1, 2**53, 2**63 - 1, -(2**63), 2**64 - 1)
_FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 1.17e-38, 3.4e38, math.inf, -math.inf, math.nan, 2.0**53, 1e-300, 1e308)
_RANGES = {
    _F.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _F.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _F.CPPTYPE_UINT32: (0, 2**32 - 1),
    _F.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_POOL_OF = {
    "id": ("model_id", "concept_id", "method", "workflow_id", "deployment_id", "runner_id", "nodepool_id"),
    "name": ("concept_id", "method", "model_id"),
    "model_version_id": ("version_id",),
    "ids": ("concept_id", "model_id"),
    "model_name": ("model_id",),
    "model_version": ("version_id",),
}


@cache
def _json_values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.floats(),
        st.sampled_from(_FLOATS),
        media.texts(),
        st.sampled_from(["_list", METHOD_KEY]),
    )
    names = st.one_of(st.text(max_size=5), st.sampled_from(["_list", "max_concepts", "x", METHOD_KEY]))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
    )


def value_of(content: Any) -> struct_pb2.Value:
    """A google.protobuf.Value, also of what JSON has no word for."""
    value = struct_pb2.Value()
    if content is None:
        value.null_value = 0  # type: ignore[assignment]
    elif isinstance(content, bool):
        value.bool_value = content
    elif isinstance(content, int | float):
        value.number_value = content
    elif isinstance(content, str):
        value.string_value = content
    elif isinstance(content, list):
        value.list_value.SetInParent()
        value.list_value.values.extend(map(value_of, content))
    else:
        value.struct_value.CopyFrom(struct_of(content))
    return value


def struct_of(content: dict[str, Any]) -> struct_pb2.Struct:
    """The same of an object."""
    struct = struct_pb2.Struct()
    for name, value in content.items():
        struct.fields[name].CopyFrom(value_of(value))
    return struct


def deep(depth: int) -> struct_pb2.Value:
    """Lists in lists; beyond fifty nobody's parser is sure of itself."""
    value = struct_pb2.Value(number_value=1)
    for _ in range(depth):
        outer = struct_pb2.Value()
        outer.list_value.values.append(value)
        value = outer
    return value


class Requests:
    """Strategies for one world's ids and methods."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pools = world.pools
        # A strategy that was made once is understood once; making them anew for each example takes most of the time.
        self.generic = cache(self._generic)
        self.ids = cache(self._ids)
        self.data = cache(self._data)
        self.options = cache(self._options)
        self.inputs = cache(self._inputs)
        self._scalar = cache(self._scalar_of)

    # ---- anything that a descriptor allows ----

    def _generic(self, descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
        """Any message of that type, a few fields at a time."""
        special = {
            "google.protobuf.Struct": lambda: st.dictionaries(st.text(max_size=5), _json_values(), max_size=3).map(
                struct_of
            ),
            "google.protobuf.Value": lambda: st.one_of(_json_values().map(value_of), st.integers(0, 60).map(deep)),
        }.get(descriptor.full_name)
        if special is not None:
            return special()
        kind = message_factory.GetMessageClass(descriptor)
        fields = [field for field in descriptor.fields if depth < _DEPTH or field.message_type is None]
        if not fields:
            return st.builds(kind)

        @st.composite
        def build(draw: st.DrawFn) -> Message:
            message = kind()
            for field in draw(st.lists(st.sampled_from(fields), max_size=4 if depth else 6)):
                self._set(draw, message, field, depth)
            return message

        return build()

    def _set(self, draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int) -> None:
        known = field.message_type
        if known is not None and known.GetOptions().map_entry:
            target = getattr(message, field.name)
            key, value = known.fields_by_name["key"], known.fields_by_name["value"]
            for _ in range(draw(st.integers(1, 2))):
                place = draw(self._scalar(key))
                if value.message_type is not None:
                    target[place].CopyFrom(draw(self.generic(value.message_type, depth + 1)))
                else:
                    target[place] = draw(self._scalar(value))
            return
        one = self.generic(known, depth + 1) if known is not None else self._scalar(field)
        if field.is_repeated:
            values = draw(st.lists(one, max_size=3))
            if values and draw(st.integers(0, 19)) == 0:
                values *= draw(st.sampled_from([2, 50, 300]))
            getattr(message, field.name).extend(values)
        elif known is not None:
            getattr(message, field.name).CopyFrom(draw(one))
        else:
            setattr(message, field.name, draw(one))

    def _ids(self, *pools: str) -> st.SearchStrategy[str]:
        """An id that exists, mostly."""
        known = [name for pool in pools for name in self._pools[pool]]
        odd = st.sampled_from(["", "nobody", "a/b", "..", "%2F", "a" * 70, "ü", "\0", "x\ny", " "])
        return st.one_of(st.sampled_from(known), st.sampled_from(known), odd)

    def _scalar_of(self, field: FieldDescriptor) -> st.SearchStrategy[Any]:
        kind = field.cpp_type
        if kind in _RANGES:
            least, most = _RANGES[kind]
            return st.one_of(
                st.integers(0, 5),
                st.sampled_from([i for i in _INTS if least <= i <= most]),
                st.integers(least, most),
            )
        if kind in (_F.CPPTYPE_FLOAT, _F.CPPTYPE_DOUBLE):
            wide = kind == _F.CPPTYPE_DOUBLE
            return st.one_of(st.sampled_from(_FLOATS), st.floats(width=64 if wide else 32))
        if kind == _F.CPPTYPE_BOOL:
            return st.booleans()
        if kind == _F.CPPTYPE_ENUM:
            known = [value.number for value in field.enum_type.values]  # type: ignore[union-attr]
            return st.one_of(st.sampled_from(known), st.sampled_from([-1, 4711, 2**31 - 1]))
        if field.type == _F.TYPE_BYTES:
            return st.one_of(st.binary(max_size=24), st.sampled_from(media.pictures_of_all_kinds()))
        pools = [pool for pool in _POOL_OF.get(field.name, (field.name,)) if pool in self._pools]
        texts = st.one_of(
            media.texts(), st.sampled_from(["en", "de", "http://127.0.0.1:1/x.png", "file:///etc/passwd"])
        )
        return st.one_of(self.ids(*pools), self.ids(*pools), texts) if pools else texts

    def of_rpc(self, rpc: str) -> st.SearchStrategy[Message]:
        """Any request of an RPC."""
        anything = self.generic(SERVICE.methods_by_name[rpc].input_type)
        return st.one_of(anything, self.owned(anything))

    def owned(self, requests: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        """The same, of a user and an app that exist, so that more of the rest is looked at."""

        @st.composite
        def build(draw: st.DrawFn) -> Any:
            request = draw(requests)
            if "user_app_id" in request.DESCRIPTOR.fields_by_name:
                model = getattr(request, "model_id", "")
                user, app = self._world.owners.get(model, ("tester", "tests"))
                request.user_app_id.user_id, request.user_app_id.app_id = user, app
            return request

        return build()

    def any_rpc(self) -> st.SearchStrategy[tuple[str, Message]]:
        """An RPC, and a request of it."""
        return st.one_of(*(st.tuples(st.just(rpc), self.of_rpc(rpc)) for rpc in RPCS))

    # ---- what callers write ----

    @staticmethod
    @cache
    def arrays() -> st.SearchStrategy[resources_pb2.NDArray]:
        """Arrays that are whole, and ones whose parts do not fit together."""
        dtypes = st.sampled_from(
            [
                "float32",
                "float32",
                "float32",
                "float64",
                "int64",
                "uint8",
                "bool",
                "float16",
                "complex64",
                "object",
                "<f4",
            ]
        )

        @st.composite
        def build(draw: st.DrawFn) -> resources_pb2.NDArray:
            dtype = draw(dtypes)
            shape = draw(
                st.one_of(
                    st.sampled_from([[3], [1, 3], [2], [1, 2], [4, 3], [1], [0, 3], []]),
                    st.lists(st.integers(0, 4), max_size=4),
                )
            )
            try:
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            except (TypeError, ValueError):
                size = 12
            buffer = bytes(size) if draw(st.booleans()) else draw(st.binary(min_size=size, max_size=size))
            if draw(st.integers(0, 5)) == 0:
                shape = draw(st.lists(st.sampled_from([0, 1, 3, 2**31 - 1, 2**32 - 1]), max_size=40))
            if draw(st.integers(0, 5)) == 0:
                buffer = buffer[:-1]
            return resources_pb2.NDArray(buffer=buffer, shape=shape, dtype=dtype)

        return build()

    def _data(self) -> st.SearchStrategy[resources_pb2.Data]:
        """What an input of the old form carries."""
        of = resources_pb2.Data
        picture = st.builds(lambda body: of(image=resources_pb2.Image(base64=body)), media.harmed_pictures())
        text = st.builds(lambda raw: of(text=resources_pb2.Text(raw=raw)), media.texts())
        link = st.sampled_from(
            ["http://127.0.0.1:1/x", "file:///etc/passwd", "https://[::1]/", "http://0x7f.1/", "x", "http://a b/", "//"]
        ).map(lambda url: of(image=resources_pb2.Image(url=url)))
        array = self.arrays().map(lambda made: of(ndarray=made))
        named = st.lists(st.tuples(st.sampled_from(["a", "b", "x", "index", "", "a"]), self.arrays()), max_size=3).map(
            lambda parts: of(parts=[resources_pb2.Part(id=name, data=of(ndarray=made)) for name, made in parts])
        )
        anything = self.generic(of.DESCRIPTOR, 1)
        return st.one_of(picture, text, array, named, link, anything)

    def argument(self, field: dict[str, Any], depth: int = 0) -> st.SearchStrategy[resources_pb2.Data]:
        """A value of the type that a signature says, or of another one."""
        of = resources_pb2.Data
        right = {
            "STR": st.one_of(media.texts(), st.sampled_from(["yes", "no"])).map(lambda v: of(string_value=v)),
            "BYTES": st.binary(max_size=40).map(lambda v: of(bytes_value=v)),
            "INT": st.one_of(
                st.integers(-1000, 1000), st.sampled_from([i for i in _INTS if -(2**63) <= i < 2**63])
            ).map(lambda v: of(int_value=v)),
            "FLOAT": st.one_of(st.floats(width=32), st.sampled_from(_FLOATS)).map(lambda v: of(float_value=v)),
            "BOOL": st.booleans().map(lambda v: of(bool_value=v)),
            "NDARRAY": self.arrays().map(lambda v: of(ndarray=v)),
            "JSON_DATA": st.one_of(
                st.dictionaries(st.sampled_from(["_list", "x"]), _json_values(), max_size=2).map(
                    lambda v: of(struct_value=struct_of(v))
                ),
                _json_values().map(lambda v: of(string_value=json.dumps(v))),
                st.integers(1, 1500).map(lambda n: of(string_value="[" * n + "1" + "]" * n)),
                st.sampled_from(
                    ["[1e400]", "[1" + "0" * 400 + "]", "[1" + "0" * 5000 + "]", "[NaN]", "[[1],[1,2]]"]
                ).map(lambda v: of(string_value=v)),
            ),
            "TEXT": media.texts().map(lambda v: of(text=resources_pb2.Text(raw=v))),
            "IMAGE": media.harmed_pictures().map(lambda v: of(image=resources_pb2.Image(base64=v))),
            "AUDIO": media.harmed_sounds().map(lambda v: of(audio=resources_pb2.Audio(base64=v))),
            "VIDEO": st.binary(max_size=40).map(lambda v: of(video=resources_pb2.Video(base64=v))),
            "FRAME": media.harmed_pictures().map(
                lambda v: of(frames=[resources_pb2.Frame(data=of(image=resources_pb2.Image(base64=v)))])
            ),
            "CONCEPT": st.tuples(self.ids("concept_id"), st.sampled_from(_FLOATS)).map(
                lambda v: of(concepts=[resources_pb2.Concept(id=v[0], value=v[1])])
            ),
            "REGION": st.lists(st.sampled_from(_FLOATS), min_size=4, max_size=4).map(_region),
        }.get(field.get("type", ""), st.just(of()))
        items = field.get("typeArgs", [])
        if items and depth < 3:
            if field["type"] == "LIST":
                right = self._list(items[0], depth)
            else:
                right = st.tuples(*(self.argument(item, depth + 1) for item in items)).map(
                    lambda made: of(
                        parts=[
                            resources_pb2.Part(id=item.get("name", ""), data=one)
                            for item, one in zip(items, made, strict=True)
                        ]
                    )
                )
        return st.one_of(right, right, right, right, right, right, self.data())

    def _list(self, inner: dict[str, Any], depth: int) -> st.SearchStrategy[resources_pb2.Data]:
        of = resources_pb2.Data
        element = self.argument(inner, depth + 1)
        if inner["type"] in ("CONCEPT", "REGION", "FRAME"):
            return st.lists(element, max_size=4).map(
                lambda made: of(
                    concepts=[c for d in made for c in d.concepts],
                    regions=[r for d in made for r in d.regions],
                    frames=[f for d in made for f in d.frames],
                )
            )
        return st.lists(element, max_size=4).map(lambda made: of(parts=[resources_pb2.Part(data=one) for one in made]))

    def call(self, signature: dict[str, Any]) -> st.SearchStrategy[resources_pb2.Data]:
        """A call of a method by its signature: arguments left out, doubled and strange ones among them."""
        fields = [(field, self.argument(field)) for field in signature.get("inputFields", [])]

        @st.composite
        def build(draw: st.DrawFn) -> resources_pb2.Data:
            data = resources_pb2.Data()
            data.metadata.CopyFrom(struct_of({METHOD_KEY: signature["name"]}))
            for field, values in fields:
                if field.get("required") or draw(st.booleans()):
                    data.parts.add(id=field["name"]).data.CopyFrom(draw(values))
            if draw(st.integers(0, 9)) == 0:
                data.parts.add(id=draw(st.sampled_from(["", "unknown", "x", "x"]))).data.CopyFrom(draw(self.data()))
            if data.parts and draw(st.integers(0, 9)) == 0:
                del data.parts[draw(st.integers(0, len(data.parts) - 1))]
            return data

        return build()

    def _options(self) -> st.SearchStrategy[resources_pb2.Model]:
        """`model` of a predict request: output_config at its edges, inference_params."""
        concepts = st.lists(
            st.tuples(self.ids("concept_id"), self.ids("concept_id")).map(
                lambda pair: resources_pb2.Concept(id=pair[0], name=pair[1])
            ),
            max_size=3,
        )
        config = st.builds(
            lambda most, least, select, language: resources_pb2.OutputConfig(
                max_concepts=most, min_value=least, select_concepts=select, language=language
            ),
            st.sampled_from([0, 1, 2, 200, 201, 2**32 - 1]),
            st.sampled_from([*_FLOATS, 0.3]),
            concepts,
            st.sampled_from(["", "", "", "en", "de"]),
        )
        params = st.one_of(
            st.just({}),
            st.dictionaries(
                st.sampled_from(["max_concepts", "min_value", "select_concepts", "x", "f", "i"]),
                _json_values(),
                max_size=2,
            ),
        )
        return st.builds(
            lambda one, two, given: resources_pb2.Model(
                model_version=resources_pb2.ModelVersion(
                    output_info=resources_pb2.OutputInfo(output_config=one, params=struct_of(given))
                ),
                output_info=resources_pb2.OutputInfo(output_config=two),
            ),
            config,
            config,
            params,
        )

    def _inputs(self, model: str, method: str) -> st.SearchStrategy[list[resources_pb2.Data]]:
        """Calls of a method, "" for none, and other inputs among them."""
        calls = [self.call(self._world.signatures[model][method])] * 2 if method else []
        return st.lists(st.one_of(*calls, self.data()), min_size=1, max_size=4)

    @st.composite
    def predictions(draw: st.DrawFn, self: "Requests") -> service_pb2.PostModelOutputsRequest:  # type: ignore[misc]
        """A predict request as callers write it, and nearly right."""
        model = draw(self.ids("model_id"))
        if draw(st.integers(0, 2)) == 0:
            model = "tools"
        user, app = self._world.owners.get(model, ("tester", "tests"))
        request = service_pb2.PostModelOutputsRequest(model_id=model)
        request.user_app_id.user_id, request.user_app_id.app_id = user, app
        if draw(st.integers(0, 9)) == 0:
            request.version_id = draw(self.ids("version_id"))
        method = draw(st.sampled_from(["", *self._world.signatures.get(model, {})]))
        for data in draw(self.inputs(model, method)):
            request.inputs.add(id=draw(st.sampled_from(["", "a", "ü"]))).data.CopyFrom(data)
        rare = draw(st.integers(0, 30))
        if rare == 0:
            del request.inputs[:]
        elif rare == 1:
            request.inputs.extend([request.inputs[0]] * draw(st.sampled_from([20, 127, 128])))
        elif rare == 2:
            request.runner_selector.CopyFrom(draw(self.generic(resources_pb2.RunnerSelector.DESCRIPTOR, 1)))
        elif rare == 3:
            request.inputs[0].data.metadata.CopyFrom(struct_of({METHOD_KEY: GET_SIGNATURES}))
        elif rare == 4:
            request.inputs[0].data.metadata.CopyFrom(struct_of({METHOD_KEY: draw(_json_values())}))
        elif rare == 5:
            request.MergeFrom(draw(self.generic(request.DESCRIPTOR)))  # type: ignore[arg-type]
        if draw(st.integers(0, 3)) == 0:
            request.model.CopyFrom(draw(self.options()))
        request.use_predict_cache = draw(st.booleans())
        return request

    def predicting(self) -> st.SearchStrategy[service_pb2.PostModelOutputsRequest]:
        """Likewise."""
        return Requests.predictions(self)  # type: ignore[call-arg,arg-type]

    @st.composite
    def workflow(draw: st.DrawFn, self: "Requests") -> service_pb2.PostWorkflowResultsRequest:  # type: ignore[misc]
        """A workflow's request."""
        name = draw(self.ids("workflow_id"))
        owner = ("appliance", "main") if name == "digits" else ("tester", "tests")
        request = service_pb2.PostWorkflowResultsRequest(workflow_id=name)
        request.user_app_id.user_id, request.user_app_id.app_id = owner
        for data in draw(st.lists(self.data(), max_size=4)):
            request.inputs.add().data.CopyFrom(data)
        if draw(st.integers(0, 4)) == 0:
            request.MergeFrom(draw(self.generic(request.DESCRIPTOR)))  # type: ignore[arg-type]
        return request

    def workflows(self) -> st.SearchStrategy[service_pb2.PostWorkflowResultsRequest]:
        """Likewise."""
        return Requests.workflow(self)  # type: ignore[call-arg,arg-type]

    def infers(self) -> st.SearchStrategy[inference_pb2.ModelInferRequest]:
        """A KServe request that is nearly right."""

        @st.composite
        def build(draw: st.DrawFn) -> inference_pb2.ModelInferRequest:
            model = draw(self.ids("model_id"))
            request = inference_pb2.ModelInferRequest(model_name=model, id=draw(st.sampled_from(["", "7", "ü"])))
            for _ in range(draw(st.integers(0, 3))):
                made = request.inputs.add(
                    name=draw(st.sampled_from(["x", "a", "b", "image", "text", "index", ""])),
                    datatype=draw(st.sampled_from(["FP32", "FP32", "FP16", "INT64", "BYTES", "BOOL", "BF16", "fp32"])),
                    shape=draw(
                        st.one_of(
                            st.sampled_from([[1, 3], [2, 3], [1, 2], [1, 1], [3], [1]]),
                            st.lists(st.sampled_from([0, 1, 3, -1, 2**31, 2**63 - 1, -(2**63)]), max_size=5),
                        )
                    ),
                )
                kind = draw(st.sampled_from(["", "fp32_contents", "int64_contents", "bytes_contents", "bool_contents"]))
                if kind:
                    values: list[Any] = [b"good"] if kind == "bytes_contents" else [1, 0, 1]
                    getattr(made.contents, kind).extend(values)
            raw = st.one_of(st.binary(max_size=40), st.sampled_from([bytes(12), bytes(24), b"\4\0\0\0good"]))
            request.raw_input_contents.extend(draw(st.lists(raw, max_size=3)))
            if draw(st.integers(0, 4)) == 0:
                request.MergeFrom(draw(self.generic(request.DESCRIPTOR)))  # type: ignore[arg-type]
            return request

        return build()


def _region(box: list[float]) -> resources_pb2.Data:
    region = resources_pb2.Region(value=box[0])
    if not math.isnan(box[1]):
        sides = region.region_info.bounding_box
        sides.left_col, sides.top_row, sides.right_col, sides.bottom_row = box
    return resources_pb2.Data(regions=[region])


# ---- bytes that are no message, or nearly one ------------------------------------------------------------------------

_TAILS = (
    b"\xfa\xff\xff\xff\x0f\x03abc",  # a field that nobody knows
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",  # a varint without an end
    b"\x0b" * 200,  # groups in groups
    b"\x0a\xff\xff\xff\xff\x0f",  # a length that lies
    b"\x0a\x02\x0a\x00" * 50,
    b"\x12\x80\x80\x80\x80\x10",
)


@st.composite
def harmed_bytes(draw: st.DrawFn, requests: st.SearchStrategy[Message]) -> bytes:
    """A serialised request after a few harms."""
    body = draw(requests).SerializeToString()
    for harm in draw(st.lists(media.harms("flip", "cut", "lose", "double", "put", "lie"), max_size=4)):
        body = harm(body)
    return body + draw(st.sampled_from((b"", b"", *_TAILS)))
