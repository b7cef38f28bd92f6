"""`onnx.methods` of config.yaml: what may be declared, and that every refusal says where and what to do."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support import graphs

from appliance.catalog import bundle as bundles
from appliance.catalog.methods import parse_type
from appliance.core.errors import BundleInvalid
from appliance.core.types import FieldType

ANALYZE: dict[str, Any] = {
    "name": "analyze",
    "description": "Objects in the picture.",
    "arguments": [
        {"name": "image", "type": "image", "image": {"size": [8, 8]}},
        {"name": "threshold", "type": "float", "default": 0.25, "range": [0, 1]},
    ],
    "returns": {
        "type": "list[region]",
        "output": "boxes",
        "scores": "scores",
        "labels": "labels",
        "min_score": "threshold",
    },
}


def method(**changes: Any) -> dict[str, Any]:
    """A small method that is right, but for the changes."""
    return {"name": "ask", "arguments": [{"name": "x", "type": "float"}], "returns": {"type": "float"}, **changes}


def argument(**keys: Any) -> dict[str, Any]:
    """A method with one argument."""
    return method(arguments=[{"name": "x", **keys}])


def returns(**keys: Any) -> dict[str, Any]:
    """A method with that return value."""
    return method(returns=keys)


def read(folder: Path, *methods: Any) -> bundles.BundleConfig:
    graphs.write_raw(folder, methods=list(methods))
    config, _, _ = bundles.read_config(folder, "u", "a")
    assert config is not None
    return config


def refusal(folder: Path, *methods: Any) -> str:
    with pytest.raises(BundleInvalid) as caught:
        read(folder, *methods)
    return str(caught.value)


def test_a_declared_method_is_read(tmp_path: Path) -> None:
    (section,) = read(tmp_path / "b", ANALYZE).onnx.methods
    assert section.name == "analyze"
    assert [(a.name, a.kind, a.default) for a in section.arguments] == [
        ("image", FieldType.IMAGE, None),
        ("threshold", FieldType.FLOAT, 0.25),
    ]
    assert section.returns.min_score == "threshold"


def test_the_explicit_config_reads_back_as_the_same(tmp_path: Path) -> None:
    """`models inspect` prints it, and an operator may freeze it."""
    methods = [
        ANALYZE,
        method(
            name="all",
            arguments=[
                {
                    "name": "pair",
                    "type": "tuple",
                    "items": [{"type": "int", "input": "a"}, {"type": "int", "input": "b"}],
                },
                {"name": "sound", "type": "audio", "sample_rate": 16000},
                {"name": "words", "type": "str", "text": {"tokenizer": "t.json"}},
                {"name": "kind", "type": "list[str]", "choices": ["a", "b"], "default": ["a"]},
                {"name": "options", "type": "json", "default": [1, 2.5]},
            ],
            returns={"type": "named_fields", "items": [{"name": "y", "type": "list[int]", "output": "y"}]},
        ),
        method(
            name="stream",
            arguments=[{"name": "x", "type": "float", "iterator": True}],
            returns={"type": "float", "iterator": True},
        ),
    ]
    config = read(tmp_path / "b", *methods)
    text = bundles.as_yaml(config)
    (tmp_path / "b" / "config.yaml").write_text(text, encoding="utf-8")
    again, _, _ = bundles.read_config(tmp_path / "b", "u", "a")
    assert again == config
    assert yaml.safe_load(text)["onnx"]["methods"][0]["name"] == "analyze"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int", (FieldType.INT, 0)),
        ("json", (FieldType.JSON, 0)),
        ("list[ float ]", (FieldType.FLOAT, 1)),
        ("list[list[region]]", (FieldType.REGION, 2)),
    ],
)
def test_types_are_written_as_in_python(text: str, expected: tuple[FieldType, int]) -> None:
    assert parse_type(text) == expected


@pytest.mark.parametrize(
    "text", ["", "list", "list[]", "list[x]", "dict", "Int", "json_data", "list[" * 5 + "int" + "]" * 5, "list[tuple]"]
)
def test_other_types_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a type; there are|is not served"):
        parse_type(text)


IMAGE = {"type": "image", "image": {"size": [4, 4]}}
REGION = {"type": "list[region]", "output": "b", "scores": "s"}


@pytest.mark.parametrize(
    ("section", "place", "words"),
    [
        # names
        (method(name="1st"), "onnx.methods.1st.name", "cannot be a name in Python"),
        (method(name="class"), "onnx.methods.class.name", "use another one"),
        (method(name="_hidden"), "onnx.methods._hidden.name", "the stock SDK has for something else"),
        (method(name="async_ask"), "onnx.methods.async_ask.name", "use another one"),
        (method(name="available_methods"), "onnx.methods.available_methods", "use another one"),
        (method(name="notes"), "onnx.methods.notes", "use another one"),
        (method(name="generate"), "onnx.methods.generate", "return an iterator"),
        (method(name="stream", returns={"type": "int", "iterator": True}), "onnx.methods.stream", "rename it"),
        (method(arguments=[{"type": "int"}]), "onnx.methods.ask", "cannot be a name"),
        (argument(type="int", name="with_proto"), "onnx.methods.ask", "kept for the SDK"),
        (method(arguments=[{"name": "x", "type": "int"}] * 2), "ask", "the argument x is there twice"),
        # keys
        (method(retuns={}), "onnx.methods.ask.retuns", "Extra inputs are not permitted"),
        (argument(type="int", defualt=3), "onnx.methods.ask.arguments.x.defualt", "not permitted"),
        (returns(type="int", outputs="y"), "onnx.methods.ask.returns.outputs", "not permitted"),
        (method(file="../other.onnx"), "onnx.methods.ask.file", "inside the version's folder"),
        (method(file="x.pkl"), "onnx.methods.ask.file", "may run code"),
        (argument(type="float32"), "onnx.methods.ask.arguments.x.type", "there are audio, bool, bytes"),
        # what belongs to a type
        (argument(type="image"), "onnx.methods.ask.arguments.x", "x: image needs image, which says how"),
        (
            argument(type="int", image={"size": [4, 4]}),
            "arguments.x",
            "image is for image, frame; int has none, so remove",
        ),
        (argument(type="str"), "arguments.x", "needs text (a tokenizer) or choices"),
        (argument(type="str", text={}, choices=["a"]), "arguments.x", "one of them"),
        (argument(type="list[str]", text={}), "arguments.x", "use str, no list"),
        (argument(type="str", text={}, input="ids"), "arguments.x", "text.inputs says where"),
        (argument(type="int", choices=["a"]), "arguments.x", "choices is for str, text"),
        (argument(type="audio"), "arguments.x", "needs sample_rate"),
        (argument(type="bytes", sample_rate=8000), "arguments.x", "sample_rate is for audio"),
        (argument(type="str", choices=["a"], range=[0, 1]), "arguments.x", "range is for int, float"),
        (argument(type="int", range=[2, 1]), "arguments.x", "range is [least, largest]"),
        (argument(type="int", box="yxyx"), "arguments.x", "box is for region"),
        (argument(type="list[list[concept]]"), "arguments.x", "list[concept]"),
        (argument(type="tuple"), "arguments.x", "tuple needs items"),
        (
            argument(type="int", items=[{"type": "int", "input": "a"}]),
            "arguments.x",
            "items is for tuple, named_fields",
        ),
        (
            argument(type="tuple", input="x", items=[{"type": "int", "input": "a"}]),
            "arguments.x",
            "input belongs to each",
        ),
        (argument(type="tuple", items=[{"type": "int"}]), "ask: x", "each item names its graph input"),
        (argument(type="tuple", items=[{"type": "int", "input": "a", "default": 1}]), "ask: x", "has no default"),
        (
            argument(type="named_fields", items=[{"name": "a", "type": "int"}, {"name": "a", "type": "int"}]),
            "ask: x",
            "the item a is there twice",
        ),
        # defaults
        (argument(type="int", default="three"), "arguments.x", "default 'three' is not of type int"),
        (argument(type="int", default=1.5), "arguments.x", "is not of type int"),
        (argument(type="int", default=True), "arguments.x", "is not of type int"),
        (argument(type="int", default=2**63), "arguments.x", "is not of type int"),
        (argument(type="float", default=float("nan")), "arguments.x", "is not of type float"),
        (argument(type="bool", default=1), "arguments.x", "is not of type bool"),
        (argument(type="json", default="text"), "arguments.x", "is not of type json"),
        (argument(type="list[int]", default=3), "arguments.x", "default must be a list"),
        (argument(type="list[int]", default=[1, "2"]), "arguments.x", "default '2' is not of type list[int]"),
        (argument(type="int", default=11, range=[0, 10]), "arguments.x", "default 11 is not in range [0.0, 10.0]"),
        (argument(type="str", default="c", choices=["a", "b"]), "arguments.x", "'c' is not one of choices"),
        (argument(**IMAGE, default="x"), "arguments.x", "default is for int, float, bool, str, json"),
        (
            method(arguments=[{"name": "a", "type": "int", "default": 1}, {"name": "b", "type": "int"}]),
            "onnx.methods.ask",
            "b has no default; put it before a",
        ),
        # streams
        (
            method(arguments=[{"name": n, "type": "int", "iterator": True} for n in "ab"]),
            "ask",
            "only one argument may be an iterator; a and b are",
        ),
        (argument(type="int", iterator=True), "ask", "returns must be one (iterator: true)"),
        (argument(type="int", iterator=True, default=1), "arguments.x", "so it has no default; remove it"),
        # what is returned
        (returns(type="region", output="b", scores="s"), "ask.returns", "write list[region]"),
        (returns(type="list[region]", output="b"), "ask.returns", "needs output (the boxes) and scores"),
        (returns(**REGION, min_score="x0"), "ask", "name a float argument, not 'x0'"),
        (returns(type="int", min_score=0.5), "ask.returns", "min_score is for region"),
        (returns(type="int", choices=["a"]), "ask.returns", "choices is for str, text"),
        (returns(type="ndarray", layout="nhwc"), "ask.returns", "layout is for image, frame"),
        (returns(type="list[list[concept]]"), "ask.returns", "list[concept]"),
        (returns(type="audio"), "ask.returns", "needs sample_rate"),
        (returns(type="named_fields"), "ask.returns", "needs items"),
        (
            returns(type="tuple", output="y", items=[{"type": "int", "output": "y"}]),
            "ask.returns",
            "output belongs to each",
        ),
        (returns(type="tuple", items=[{"type": "int"}]), "ask: returns", "each item names its graph output"),
        (returns(type="tuple", items=[{"type": "concept", "output": "y"}]), "ask: returns", "no concept and no region"),
        (
            method(arguments=[{"name": "min_value", "type": "float"}], returns={"type": "list[concept]"}),
            "onnx.methods.ask",
            "every method that returns concepts has min_value; do not declare it",
        ),
    ],
)
def test_a_refusal_says_where_and_what_to_do(tmp_path: Path, section: Any, place: str, words: str) -> None:
    text = refusal(tmp_path / "b", section)
    assert place in text
    assert words in text


def test_a_list_of_thresholds_cannot_cut_an_answer(tmp_path: Path) -> None:
    section = method(arguments=[{"name": "x", "type": "list[float]"}], returns={**REGION, "min_score": "x"})
    assert "name a float argument" in refusal(tmp_path / "b", section)


def test_a_method_is_declared_once(tmp_path: Path) -> None:
    assert "methods: ask is declared twice" in refusal(tmp_path / "b", method(), method())


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    text = refusal(tmp_path / "b", argument(type="int", default="x"), method(name="other", returns={"type": "region"}))
    assert "onnx.methods.ask.arguments.x" in text
    assert "onnx.methods.other.returns" in text


@pytest.mark.parametrize("name", ["analyze", "predict", "generate", "stream", "classify", "add", "x9"])
def test_names_that_callers_may_use(tmp_path: Path, name: str) -> None:
    """Any identifier; `generate` and `stream` where they do what the SDK means by them."""
    streams = name in ("generate", "stream")
    section = method(
        name=name,
        arguments=[{"name": "x", "type": "float", "iterator": name == "stream"}],
        returns={"type": "float", "iterator": streams},
    )
    assert read(tmp_path / "b", section).onnx.methods[0].name == name
