"""The error table: every error has a row, the numbers are Clarifai's, and gRPC and HTTP say the same."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from clarifai_grpc.grpc.api.status import status_code_pb2
from google.protobuf import any_pb2
from google.rpc import status_pb2 as rpc_status_pb2

import appliance
from appliance.api import status
from appliance.core import errors
from appliance.core.errors import ApplianceError, ConfigError
from appliance.core.types import RpcAbort, RpcStatus
from appliance.engine.session import OutOfMemory

PACKAGE = Path(appliance.__file__).parent


def tree(kind: type[ApplianceError]) -> Iterator[type[ApplianceError]]:
    """All classes below, without the operator's: those are exit codes, never replies."""
    for child in kind.__subclasses__():
        if child is not ConfigError and child.__module__.startswith("appliance"):
            yield child
            yield from tree(child)


ERRORS = sorted(set(tree(ApplianceError)), key=lambda kind: kind.__name__)
GROUPS = {kind for kind in ERRORS if not any(parent in status.TABLE for parent in kind.__mro__)}


def test_the_tree_is_not_empty() -> None:
    """The walk finds the errors, those outside core too."""
    assert len(ERRORS) > 25
    assert OutOfMemory in ERRORS


@pytest.mark.parametrize("kind", [k for k in ERRORS if k not in GROUPS], ids=lambda kind: kind.__name__)
def test_every_error_has_a_row_of_its_own_or_its_parents(kind: type[ApplianceError]) -> None:
    """And that row is not the one of the unforeseen."""
    error = kind.__new__(kind)
    if isinstance(error, errors.PlacementUnknown):
        error.kind = "nodepool"
    if isinstance(error, errors.PlacementMismatch):
        error.kind = "runner"
    row = status.row_of(error)
    assert row is not status.INTERNAL
    assert row.description


def test_only_groups_have_no_row() -> None:
    """They exist to be caught."""
    groups = {
        errors.RequestError,
        errors.InputError,
        errors.AccessError,
        errors.CapacityError,
        errors.ModelError,
    }
    assert groups == GROUPS


@pytest.mark.parametrize("kind", sorted(GROUPS, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_groups_are_never_raised(kind: type[ApplianceError]) -> None:
    """Else they would end as internal errors."""
    pattern = re.compile(rf"\braise (?:errors\.)?{kind.__name__}\b")
    assert [str(path) for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())] == []


def test_every_row_belongs_to_an_error_of_the_tree() -> None:
    """No row is left behind."""
    assert set(status.TABLE) <= set(ERRORS)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidRequest, 11100),
        (errors.EncodingNotRead, 11100),
        (errors.NoInputs, 39999),
        (errors.TooManyInputs, 30105),
        (errors.InvalidArgument, 21202),
        (errors.UnknownMethod, 21202),
        (errors.UnknownModel, 21200),
        (errors.UnknownType, 11101),
        (errors.UnknownStatusCode, 11101),
        (errors.UnknownUser, 11101),
        (errors.UnknownApp, 11101),
        (errors.InvalidInput, 30104),
        (errors.UnsupportedFormat, 30101),
        (errors.InputTooLarge, 30105),
        (errors.UrlRefused, 30106),
        (errors.DownloadFailed, 30002),
        (errors.CredentialsMissing, 11102),
        (errors.KeyInvalid, 11008),
        (errors.NotPermitted, 11007),
        (errors.RateLimited, 11005),
        (errors.Overloaded, 21354),
        (errors.NotReady, 21351),
        (errors.NotDeployed, 21350),
        (errors.DeadlineExceeded, 98009),
        (errors.BundleInvalid, 21350),
        (errors.InferenceFailed, 21313),
        (errors.UnknownWorkflow, 22102),
        (errors.DeploymentDisabled, 25903),
    ],
)
def test_the_numbers_are_those_of_the_design(kind: type[ApplianceError], code: int) -> None:
    """Which are Clarifai's where it documents any."""
    assert status.TABLE[kind].code == code


@pytest.mark.parametrize(
    ("kind", "code"),
    [("deployment", 25900), ("nodepool", 25700), ("compute_cluster", 25800), ("runner", 25600)],
)
def test_an_unknown_place_is_named_by_its_kind(kind: str, code: int) -> None:
    """Clarifai has a number for each."""
    assert status.of_error(errors.PlacementUnknown(kind, "x")).code == code


@pytest.mark.parametrize(("kind", "code"), [("deployment", 25901), ("runner", 25602)])
def test_a_place_for_another_model_is_named_by_its_kind(kind: str, code: int) -> None:
    """Likewise."""
    assert status.of_error(errors.PlacementMismatch(kind, "x", "a/b/c", "a/b/d")).code == code


MEANING = {
    RpcStatus.CANCELLED: 499,
    RpcStatus.DEADLINE_EXCEEDED: 504,
    RpcStatus.RESOURCE_EXHAUSTED: 429,
    RpcStatus.UNIMPLEMENTED: 501,
    RpcStatus.INTERNAL: 500,
    RpcStatus.UNAVAILABLE: 503,
}
"""Source: google/rpc/code.proto, the HTTP mapping beside each code."""


def rows() -> list[status.Row]:
    """Every row there is."""
    others = [status.INTERNAL, status.SUCCESS, status.MIXED, status.FAILURE, status.READY_VERSION]
    return [*status.TABLE.values(), *status._PLACEMENTS.values(), *others]


@pytest.mark.parametrize("row", rows(), ids=lambda row: status.name_of(row.code))
def test_grpc_and_http_mean_the_same(row: status.Row) -> None:
    """A row with a gRPC status of its own has the HTTP status of that meaning."""
    if row.rpc is not RpcStatus.OK:
        assert row.http == MEANING[row.rpc]
    assert row.code in status_code_pb2.StatusCode.values()
    assert 200 <= row.http < 600


@pytest.mark.parametrize("row", rows(), ids=lambda row: status.name_of(row.code))
def test_the_http_status_belongs_to_the_family_of_the_code(row: status.Row) -> None:
    """Clarifai's numbers come in families; 4xx is the caller's, 5xx ours."""
    name = status.name_of(row.code)
    if name.startswith(("INPUT_", "CONN_", "MODEL_INVALID")) or name.endswith("DOES_NOT_EXIST"):
        assert 400 <= row.http < 500
    if name.startswith(("INTERNAL_", "MODEL_BUSY", "MODEL_DEPLOY", "MODEL_PRED")) and row.http != 499:
        assert row.http >= 500


def test_only_what_clients_may_retry_is_unavailable_or_throttled() -> None:
    """Stock clients retry UNAVAILABLE, 11005 and 11003, for ever and a day (PROTOCOL 0.9)."""
    retried = {kind for kind, row in status.TABLE.items() if row.rpc is RpcStatus.UNAVAILABLE or row.code == 11005}
    assert retried == {errors.Draining, errors.NotRecorded, errors.RateLimited}
    assert not any(row.code == 11003 for row in rows())


def test_polled_codes_are_used_only_for_what_passes() -> None:
    """Clients wait up to ten minutes on 21351, 21354 and 21355 (PROTOCOL 1.5)."""
    polled = {kind for kind, row in status.TABLE.items() if row.code in (21351, 21354, 21355)}
    assert polled == {errors.NotReady, errors.Overloaded}


def test_no_other_module_knows_a_number_of_an_error() -> None:
    """One table. The catalogue lists all codes, and uses none."""
    names = "|".join(set(status_code_pb2.StatusCode.keys()) - {"ZERO", "SUCCESS"})
    pattern = re.compile(rf"StatusCode\.(?:{names})\b|\bcode\s*=\s*\d{{5}}\b")
    found = {
        str(path.relative_to(PACKAGE)): pattern.findall(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path.name != "status.py" and pattern.search(path.read_text())
    }
    assert found == {}


def test_what_was_not_foreseen_tells_the_caller_nothing() -> None:
    """A stock sentence and the request id; the log has the rest."""
    reply = status.of_error(KeyError("/etc/shadow"), "sdk-1")
    assert reply.code == 98004
    assert reply.req_id == "sdk-1"
    assert "shadow" not in str(reply)
    assert list(reply.stack_trace) == []


def test_the_detail_of_an_error_stays_in_the_log() -> None:
    """Two fields: what the caller may read, and what happened."""
    reply = status.of_error(errors.InferenceFailed("The model failed.", detail="node Conv_3 at 0xdead"))
    assert reply.details == "The model failed."
    assert "Conv_3" not in str(reply)


def test_a_number_without_a_name_is_a_number() -> None:
    """In logs."""
    assert status.name_of(10000) == "SUCCESS"
    assert status.name_of(424242) == "424242"


@pytest.mark.parametrize("row", status.TABLE.values(), ids=lambda row: f"{row.code}-{row.http}")
def test_every_error_has_a_grpc_status_where_a_reply_has_no_place_for_its_own(row: status.Row) -> None:
    """It says the same as the HTTP status; a transport's own status stays."""
    assert row.grpc is not RpcStatus.OK
    assert row.rpc in (RpcStatus.OK, row.grpc)
    assert (row.grpc is RpcStatus.INTERNAL) == (row.http == 500)


def test_a_refusal_says_nothing_of_what_was_not_foreseen() -> None:
    """Only where to look."""
    refusal = status.Refusal(RuntimeError("secret"), "id-1")
    assert refusal.status is RpcStatus.INTERNAL
    assert "secret" not in refusal.message
    assert b"secret" not in refusal.details
    assert b"id-1" in refusal.details


@pytest.mark.parametrize("row", rows(), ids=lambda row: status.name_of(row.code))
def test_a_status_says_its_http_status(row: status.Row) -> None:
    """30105 has two; 200 goes without saying."""
    found = status.of_row(row, "")
    assert status.http_of(found) == row.http
    assert bool(found.http_status_code) == (row.http != 200)


def test_a_call_that_ended_without_a_reply_has_the_status_that_it_would_have_had() -> None:
    """In REST; what only the wire said, in the words of the table."""
    packed = any_pb2.Any()
    packed.Pack(status.of_error(errors.Draining(), "r"))
    details = rpc_status_pb2.Status(code=14, message="x", details=[packed]).SerializeToString()
    assert status.of_abort(RpcAbort(RpcStatus.UNAVAILABLE, "x", details)) == status.of_error(errors.Draining(), "r")
    for rpc in RpcStatus:
        found = status.of_abort(RpcAbort(rpc, "why"))
        assert found.details == "why"
        assert status.http_of(found) >= 400
        assert MEANING.get(rpc, status.http_of(found)) == status.http_of(found) or rpc is RpcStatus.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("failures", "http"),
    [
        ([errors.InputTooLarge("")], 413),
        ([errors.InputTooLarge(""), errors.InvalidInput("")], 400),
        ([errors.Overloaded(""), errors.Overloaded("")], 503),
        ([errors.Overloaded(""), errors.InferenceFailed("")], 500),
        ([errors.InvalidInput(""), errors.InferenceFailed("")], 400),
    ],
)
def test_when_all_inputs_failed_the_http_status_says_who_can_act(failures: list[ApplianceError], http: int) -> None:
    assert status.failure_of(failures).http == http
    assert status.failure_of(failures).code == status.FAILURE.code
