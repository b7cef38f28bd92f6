"""Joined replies say exactly what replies built as messages say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.resources_pb2 import Data, Image, Input, Text
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from support import reference_replies

from appliance.api import messages, replies
from appliance.api.replies import ReplyWriter
from appliance.api.varints import Pieces
from appliance.catalog.view import Running, Version
from appliance.core.errors import ApplianceError, InferenceFailed, InvalidInput
from appliance.core.types import Concept, ConceptScores, Embedding, ModelKey, Tensors

KEY = ModelKey("user", "app", "model")


class Fake:
    """A servable as a reply needs it."""

    def __init__(self, concepts: tuple[Concept, ...] = ()) -> None:
        self.key, self.concepts, self.problem = KEY, concepts, None


def version_of(servable: Fake, name: str = "A model") -> Version[Any]:
    """Ready, with a config as a bundle has it."""
    config: Any = SimpleNamespace(key=KEY, name=name, model_type_id="visual-classifier")
    version: Version[Any] = Version("1", config, Path(), (), 1_700_000_000.25)  # type: ignore[arg-type]
    version.running = Running(servable)
    return version


def written(
    writer: ReplyWriter, version: Version[Any] | None, inputs: list[Any], answers: list[Any], pythonic: bool, note: str
) -> service_pb2.MultiOutputResponse:
    """The joined reply, parsed; its code is checked on the way."""
    head = writer.head(writer.brief(version), replies.success("req"))
    outputs: Pieces = []
    for asked, answer in zip(inputs, writer.scored(answers), strict=True):
        if isinstance(answer, ApplianceError):
            outputs += replies.error_output(asked, answer, "req")
        else:
            outputs += writer.output(head, asked, answer, pythonic=pythonic)
    failures = [answer for answer in answers if isinstance(answer, ApplianceError)]
    reply = replies.reply(outputs, len(answers), failures, note, "req")
    response = service_pb2.MultiOutputResponse.FromString(reply.body)
    assert response.status.code == reply.code
    return response


def same(found: service_pb2.MultiOutputResponse, wanted: service_pb2.MultiOutputResponse, inputs: list[Any]) -> None:
    """Equal but for what is new in each reply: ids, and the time."""
    for output, other, asked in zip(found.outputs, wanted.outputs, inputs, strict=True):
        assert len(bytes.fromhex(output.id)) == 16
        assert abs(output.created_at.seconds - other.created_at.seconds) <= 60
        assert output.input.id == asked.id or len(bytes.fromhex(output.input.id)) == 16
        output.id = other.id
        output.created_at.CopyFrom(other.created_at)
        output.input.id = other.input.id
    # Bytes, as a message that holds NaN is not equal to itself.
    assert found.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)


concepts = st.lists(st.builds(Concept, st.text(max_size=300), st.text(max_size=8)), min_size=1, max_size=6)
floats = st.floats(width=32)
inputs = st.builds(
    Input,
    id=st.text(max_size=200),
    data=st.one_of(
        st.just(Data()),
        st.builds(lambda url: Data(image=Image(url=url, base64=b"x")), st.text(max_size=200)),
        st.builds(lambda url: Data(text=Text(url=url, raw="x")), st.text(max_size=9)),
    ),
)
arrays = numpy_strategies.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_, np.float16]),
    numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
)
tensors = st.builds(Tensors, st.dictionaries(st.text(max_size=9), arrays, min_size=1, max_size=3))
vectors = st.builds(Embedding, numpy_strategies.arrays(np.float32, st.integers(1, 200)))
errors = st.builds(InferenceFailed, st.text(max_size=9)) | st.builds(InvalidInput, st.text(max_size=9))


@st.composite
def scores(draw: st.DrawFn, known: int) -> ConceptScores:
    """Of some of the concepts, in any order."""
    indices = draw(st.lists(st.integers(0, known - 1), max_size=8))
    return ConceptScores(np.array(indices, np.int64), np.array([draw(floats) for _ in indices], np.float32))


@given(data=st.data(), known=concepts, pythonic=st.booleans(), note=st.sampled_from(["", "a note"]), gone=st.booleans())
def test_any_reply_is_the_message_it_would_be(
    data: st.DataObject, known: list[Concept], pythonic: bool, note: str, gone: bool
) -> None:
    """Whatever was answered, whoever asked, and also when the model is gone meanwhile."""
    servable = Fake(tuple(known))
    version = None if gone else version_of(servable)
    answer = st.one_of(scores(len(known)), vectors, tensors, errors)
    pairs = data.draw(st.lists(st.tuples(inputs, answer), min_size=1, max_size=4))
    asked, answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = written(ReplyWriter(servable), version, asked, answers, pythonic, note)  # type: ignore[arg-type]
    wanted = reference_replies.reply(
        asked,
        answers,
        model=messages.model_brief(version) if version else None,
        concepts=known,
        app_id="app",
        pythonic=pythonic,
        note=note,
        req_id="req",
    )
    same(found, wanted, asked)


@given(data=st.data(), known=concepts, pythonic=st.booleans())
def test_many_concepts_are_written_as_few_are(data: st.DataObject, known: list[Concept], pythonic: bool) -> None:
    """From so many on that all their values are written at once; some answers have none, some inputs failed."""
    servable = Fake(tuple(known))
    counts = data.draw(st.lists(st.sampled_from([0, 1, 3, 20, 200]), min_size=1, max_size=6))
    random = np.random.default_rng(len(counts))
    answers: list[Any] = [
        ConceptScores(random.integers(0, len(known), count), random.random(count, np.float32))
        for count in [*counts, replies._MANY]
    ]
    answers.insert(data.draw(st.integers(0, len(answers))), InferenceFailed("no"))
    asked = [Input(id=str(index)) for index in range(len(answers))]
    found = written(ReplyWriter(servable), version_of(servable), asked, answers, pythonic, "")  # type: ignore[arg-type]
    wanted = reference_replies.reply(
        asked,
        answers,
        model=messages.model_brief(version_of(servable)),
        concepts=known,
        app_id="app",
        pythonic=pythonic,
        note="",
        req_id="req",
    )
    same(found, wanted, asked)


def test_scores_that_are_views_into_a_batch_are_written_as_they_are() -> None:
    """Rows of larger arrays, cut to a few columns, and of another width of floats."""
    servable = Fake(tuple(Concept(f"c{index}", "") for index in range(200)))
    indices = np.tile(np.arange(200), (9, 1))
    for dtype in (np.float32, np.float16, np.dtype(">f4")):
        values = np.random.default_rng(0).random((9, 200)).astype(dtype)
        answers = [ConceptScores(row, value) for row, value in zip(indices[:, 3:70:2], values[:, 3:70:2], strict=True)]
        asked = [Input()] * 9
        found = written(ReplyWriter(servable), None, asked, answers, False, "")  # type: ignore[arg-type]
        for output, answer in zip(found.outputs, answers, strict=True):
            assert [concept.id for concept in output.data.concepts] == [f"c{index}" for index in range(3, 70, 2)]
            assert [concept.value for concept in output.data.concepts] == answer.values.astype(np.float32).tolist()


def test_a_large_reply_is_the_message_it_would_be() -> None:
    """Lengths of several bytes."""
    servable = Fake()
    sizes = (0, 1, 31, 32, 4095, 4096, 700_000)
    answers: list[Any] = [Tensors({"y": np.arange(size, dtype=np.float32)}) for size in sizes]
    answers += [Embedding(np.arange(size, dtype=np.float32)) for size in sizes[1:]]
    answers.append(Tensors({"strided": np.arange(40_000.0).reshape(200, 200).T, "half": np.ones(9000, np.float16)}))
    asked = [Input(id="x" * index) for index in range(len(answers))]
    version = version_of(servable)
    found = written(ReplyWriter(servable), version, asked, answers, False, "")  # type: ignore[arg-type]
    model = messages.model_brief(version)
    wanted = reference_replies.reply(
        asked, answers, model=model, concepts=(), app_id="app", pythonic=False, note="", req_id="req"
    )
    same(found, wanted, asked)


def test_what_an_output_says_of_its_model_follows_the_catalog() -> None:
    """A config that was read anew, or a model that died meanwhile, shows in the next reply."""
    servable = Fake()
    version = version_of(servable, "old")
    writer = ReplyWriter(servable)  # type: ignore[arg-type]

    def model() -> resources_pb2.Model:
        return written(writer, version, [Input()], [Tensors({"y": np.ones(1)})], False, "").outputs[0].model

    assert (model().name, model().model_version.status.code) == ("old", 21100)
    version.config = version_of(servable, "new").config
    assert (model().name, model().model_version.status.code) == ("new", 21100)
    servable.problem = "died"  # type: ignore[assignment]
    assert model() == messages.model_brief(version)
    assert model().model_version.status.code != 21100
    version.first_seen += 1
    servable.problem = None
    assert model() == messages.model_brief(version)


# ---- what the message says -------------------------------------------------------------------------------------------

CONCEPTS = (Concept("c-cat", "cat"), Concept("c-dog", "dog"))
ARRAY = np.array([[1, 2], [3, 4]], np.float32)


def both(result: Any) -> tuple[Any, Any]:
    """Where callers of the old form look, and where pythonic ones do."""
    writer = ReplyWriter(Fake(CONCEPTS))  # type: ignore[arg-type]
    old, new = (written(writer, None, [Input()], [result], pythonic, "").outputs[0].data for pythonic in (False, True))
    (part,) = new.parts
    assert part.id == "return"
    return old, part.data


def test_concepts_are_given_by_id_name_and_value() -> None:
    """In both forms, in order, the value exact to the bit."""
    for data in both(ConceptScores(np.array([1, 0]), np.array([0.6, 0.25], np.float32))):
        assert [(c.id, c.name, c.app_id) for c in data.concepts] == [("c-dog", "dog", "app"), ("c-cat", "cat", "app")]
        assert data.concepts[0].value == np.float32(0.6)


def test_a_vector_is_an_embedding_or_an_array() -> None:
    """embeddings[0] in the old form, an array as the signature says in the new one."""
    old, new = both(Embedding(np.array([1, 2, 3], np.float32)))
    assert list(old.embeddings[0].vector) == [1, 2, 3]
    assert old.embeddings[0].num_dimensions == 3
    assert (list(new.ndarray.shape), new.ndarray.dtype) == ([3], "float32")


@pytest.mark.parametrize("array", [ARRAY, ARRAY.T, np.float32(3).reshape(()), np.array([True]), np.zeros((0, 2))])
def test_one_tensor_is_an_array(array: Any) -> None:
    """In C order, whatever its strides were; it can be read back."""
    for data in both(Tensors({"y": array})):
        assert data.ndarray.dtype == array.dtype.name
        found = np.frombuffer(data.ndarray.buffer, data.ndarray.dtype).reshape(tuple(data.ndarray.shape))
        np.testing.assert_array_equal(found, array)


def test_several_tensors_are_named_parts() -> None:
    """By the graph's output names."""
    for data in both(Tensors({"sum": ARRAY, "ids": np.array([1, 2])})):
        assert [(part.id, list(part.data.ndarray.shape)) for part in data.parts] == [("sum", [2, 2]), ("ids", [2])]
