"""Paths of the protos' HTTP annotations, and what a path means."""

import re

import pytest
from clarifai_grpc.grpc.api import service_pb2
from google.api import annotations_pb2
from hypothesis import given
from hypothesis import strategies as st

from appliance.api import bindings
from appliance.api.bindings import SERVICE, Binding, Paths, bindings_of

ALL = [binding for rpc in SERVICE.methods for binding in bindings_of(rpc)]
PATHS = Paths(ALL)


def found(verb: str, path: str) -> tuple[str, tuple[bytes, ...]] | None:
    """RPC and values."""
    meant = PATHS.find(verb, path.encode())
    return None if meant is None or meant.binding is None else (meant.binding.rpc.name, meant.values)


def test_every_annotation_of_clarifais_can_be_read() -> None:
    """Whatever RPC comes to be served, its paths are understood; none has a form that we pass over."""
    assert len(ALL) > 450
    for rpc in SERVICE.methods:
        rule = rpc.GetOptions().Extensions[annotations_pb2.http]
        templates = [getattr(one, one.WhichOneof("pattern")) for one in (rule, *rule.additional_bindings)]
        assert [binding.template for binding in bindings_of(rpc)] == templates


@pytest.mark.parametrize("binding", [b for b in ALL if b.rpc.name in ("PostModelOutputs", "GetModel", "ListModels")])
def test_a_path_means_the_rpc_that_has_it(binding: Binding) -> None:
    path = re.sub(r"\{[^}]*\}", "value", binding.template)
    assert found(binding.verb, path) == (binding.rpc.name, (b"value",) * len(binding.variables))


def test_variables_are_fields_within_fields() -> None:
    names = [binding.variables for binding in bindings_of(SERVICE.methods_by_name["PostModelOutputs"])]
    assert names[0] == (("user_app_id", "user_id"), ("user_app_id", "app_id"), ("model_id",), ("version_id",))
    assert names[4][0] == ("runner_selector", "deployment", "user_id")


@pytest.mark.parametrize(
    ("path", "rpc"),
    [
        ("/v2/models/types", "ListModelTypes"),
        ("/v2/models/typed", "GetModel"),
        ("/v2/models/types/versions", "GetModelType"),
        ("/v2/models/outputs/versions", "ListModelVersions"),
        ("/v2/users/a/apps/b/models/types", "ListModelTypes"),
        ("/v2/users/me", "GetUser"),
    ],
)
def test_literals_win_and_what_they_do_not_lead_to_is_a_value(path: str, rpc: str) -> None:
    assert (found("GET", path) or ("", ()))[0] == rpc


def test_values_are_decoded_after_the_path_is_taken_apart() -> None:
    assert found("GET", "/v2/models/a%2Fb%20c") == ("GetModel", (b"a/b c",))
    assert found("GET", "/v2/models/%C3%BC") == ("GetModel", ("ü".encode(),))


def test_a_path_with_other_verbs_says_which() -> None:
    meant = PATHS.find("PUT", b"/v2/models/m/outputs")
    assert meant is not None
    assert (meant.binding, meant.verbs) == (None, ("POST",))
    meant = PATHS.find("TRACE", b"/v2/models")
    assert meant is not None
    assert set(meant.verbs) >= {"GET", "HEAD", "POST"}


@pytest.mark.parametrize(
    "path", ["", "/", "/v2", "/v2/", "/v2/models/", "//v2/models", "/v2/models//versions", "v2/models"]
)
def test_empty_segments_are_no_values(path: str) -> None:
    assert PATHS.find("GET", path.encode()) is None


@given(st.binary(max_size=80))
def test_any_path_is_answered(path: bytes) -> None:
    PATHS.find("GET", path)


def test_an_annotation_that_is_not_understood_is_no_silent_gap() -> None:
    """The daemon does not start with routes missing."""
    rpc = service_pb2.DESCRIPTOR.services_by_name["V2"].methods_by_name["GetModel"]
    for part in ("{model_id=models/*}", "{model_id=**}", "{nothing}", "a:b", "*"):
        with pytest.raises((ValueError, KeyError)):
            bindings._segment(rpc, part)
    assert bindings._segment(rpc, "{model_id=*}") == ("model_id",)
