"""THE error table: what each error is called on the wire. No other module knows a status number of an error.

Application errors travel as gRPC OK with `response.status.code`, as every Clarifai client expects (PROTOCOL 0.3); only
what a transport must act on (retry elsewhere, give up) has a gRPC status of its own. The HTTP status says the same.
Where Clarifai documents no code the choice is ours (DESIGN "Limits").
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from clarifai_grpc.grpc.api.status import status_code_pb2, status_pb2
from google.protobuf import any_pb2
from google.rpc import status_pb2 as rpc_status_pb2  # type: ignore[import-untyped]

from appliance.core import errors
from appliance.core.errors import ApplianceError
from appliance.core.types import RpcAbort, RpcStatus

_GRPC = {
    400: RpcStatus.INVALID_ARGUMENT,
    401: RpcStatus.UNAUTHENTICATED,
    403: RpcStatus.PERMISSION_DENIED,
    404: RpcStatus.NOT_FOUND,
    405: RpcStatus.UNIMPLEMENTED,
    409: RpcStatus.FAILED_PRECONDITION,
    413: RpcStatus.INVALID_ARGUMENT,
    415: RpcStatus.INVALID_ARGUMENT,
    424: RpcStatus.FAILED_PRECONDITION,
    429: RpcStatus.RESOURCE_EXHAUSTED,
    499: RpcStatus.CANCELLED,
    500: RpcStatus.INTERNAL,
    501: RpcStatus.UNIMPLEMENTED,
    503: RpcStatus.UNAVAILABLE,
    504: RpcStatus.DEADLINE_EXCEEDED,
}
"""HTTP status → gRPC status, as google.rpc.Code pairs them; an input that is too large will be so the next time too."""

Code = status_code_pb2.StatusCode


@dataclass(frozen=True, slots=True)
class Row:
    """One error on the wire.

    Attributes:
        code: Clarifai's number.
        description: Clarifai's short text; the error's own sentence goes into `details`.
        http: HTTP status of the REST twin.
        rpc: gRPC status the call ends with; OK when the reply message carries the code.
        reason: label of `rejected_total`, "" when the error is no rejection.
    """

    code: int
    description: str
    http: int
    rpc: RpcStatus = RpcStatus.OK
    reason: str = ""

    @property
    def grpc(self) -> RpcStatus:
        """gRPC status in protocols whose replies carry no status of their own (KServe)."""
        return _GRPC[self.http] if self.rpc is RpcStatus.OK else self.rpc


INTERNAL = Row(Code.INTERNAL_SERVER_ISSUE, "Internal error", 500)
"""Whatever was not foreseen; the log has the traceback, the caller gets a stock sentence."""

TABLE: dict[type[ApplianceError], Row] = {
    errors.InvalidRequest: Row(Code.CONN_BAD_REQUEST_FORMAT, "Malformed request", 400, reason="malformed"),
    errors.EncodingNotRead: Row(Code.CONN_BAD_REQUEST_FORMAT, "Malformed request", 415, reason="malformed"),
    errors.NoInputs: Row(Code.INPUT_INVALID_REQUEST, "Invalid request: no inputs", 400, reason="batch_limit"),
    errors.TooManyInputs: Row(Code.INPUT_OVER_LIMIT, "Too many inputs", 400, reason="batch_limit"),
    errors.InvalidArgument: Row(Code.MODEL_INVALID_ARGUMENT, "Invalid model argument", 400, reason="argument"),
    errors.UnknownMethod: Row(Code.MODEL_INVALID_ARGUMENT, "Invalid model argument", 400, reason="argument"),
    errors.UnknownModel: Row(Code.MODEL_DOES_NOT_EXIST, "Model does not exist", 404, reason="unknown_model"),
    errors.UnknownType: Row(Code.CONN_DOES_NOT_EXIST, "Resource does not exist", 404),
    errors.UnknownStatusCode: Row(Code.CONN_DOES_NOT_EXIST, "Resource does not exist", 404),
    errors.NotServed: Row(Code.CONN_DOES_NOT_EXIST, "Resource does not exist", 404),
    errors.UnknownUser: Row(Code.CONN_DOES_NOT_EXIST, "Resource does not exist", 404),
    errors.UnknownWorkflow: Row(Code.WORKFLOW_DOES_NOT_EXIST, "Workflow does not exist", 404, reason="unknown_model"),
    errors.WorkflowArgument: Row(Code.WORKFLOW_INVALID_ARGUMENT, "Invalid workflow argument", 400, reason="argument"),
    errors.UnknownApp: Row(Code.CONN_DOES_NOT_EXIST, "Resource does not exist", 404),
    errors.PlacementUnknown: Row(Code.DEPLOYMENT_DOES_NOT_EXIST, "Deployment does not exist", 404),
    errors.PlacementMismatch: Row(Code.DEPLOYMENT_INVALID_ARGUMENT, "Invalid deployment argument", 400),
    errors.DeploymentDisabled: Row(Code.DEPLOYMENT_DISABLED, "Deployment is disabled", 409),
    errors.InvalidInput: Row(Code.INPUT_INVALID_ARGUMENT, "Invalid input", 400, reason="decode"),
    errors.UnsupportedFormat: Row(Code.INPUT_UNSUPPORTED_FORMAT, "Input format not supported", 400, reason="decode"),
    errors.InputTooLarge: Row(Code.INPUT_OVER_LIMIT, "Input is too large", 413, reason="too_large"),
    errors.UrlRefused: Row(Code.INPUT_INVALID_URL, "Invalid input URL", 400, reason="ssrf"),
    errors.DownloadFailed: Row(Code.INPUT_DOWNLOAD_FAILED, "Input download failed", 400, reason="download"),
    errors.NodeMismatch: Row(Code.WORKFLOW_NO_MATCHING_INPUT, "No matching input for the workflow's node", 400),
    errors.NodeNotRun: Row(Code.WORKFLOW_INTERNAL_FAILURE, "A node before it failed", 424),
    errors.CredentialsMissing: Row(Code.CONN_INVALID_REQUEST, "Credentials missing", 401, reason="auth"),
    errors.KeyInvalid: Row(Code.CONN_KEY_INVALID, "API key is not valid", 401, reason="auth"),
    errors.NotPermitted: Row(Code.CONN_INSUFFICIENT_SCOPES, "Insufficient scopes", 403, reason="auth"),
    errors.RateLimited: Row(Code.CONN_THROTTLED, "Request limit exceeded", 429, reason="rate_limit"),
    errors.Overloaded: Row(Code.MODEL_BUSY_PLEASE_RETRY, "Model is busy, please retry", 503, reason="queue_full"),
    errors.NotReady: Row(Code.MODEL_DEPLOYING, "Model is deploying", 503, reason="loading"),
    errors.NotDeployed: Row(Code.MODEL_DEPLOYMENT_FAILED, "Model deployment failed", 500, reason="not_deployed"),
    errors.Draining: Row(Code.TRY_AGAIN, "Try again", 503, RpcStatus.UNAVAILABLE, reason="draining"),
    errors.NotRecorded: Row(Code.TRY_AGAIN, "Try again", 503, RpcStatus.UNAVAILABLE, reason="audit"),
    errors.DeadlineExceeded: Row(
        Code.INTERNAL_UNEXPECTED_TIMEOUT, "Deadline exceeded", 504, RpcStatus.DEADLINE_EXCEEDED, reason="deadline"
    ),
    errors.Cancelled: Row(Code.INTERNAL_CONTEXT_CANCELED, "Cancelled", 499, RpcStatus.CANCELLED),
    errors.BundleInvalid: Row(Code.MODEL_DEPLOYMENT_FAILED, "Model deployment failed", 500),
    errors.InferenceFailed: Row(Code.MODEL_PREDICTION_FAILED, "Model prediction failed", 500),
    errors.WorkflowInvalid: Row(Code.WORKFLOW_INVALID_GRAPH, "Invalid workflow", 500),
}

REASONS = tuple(dict.fromkeys(row.reason for row in TABLE.values() if row.reason))
"""All labels of `rejected_total`; those of the wire are among them."""

INPUT_REASONS: dict[int, str] = {
    int(row.code): row.reason for kind, row in TABLE.items() if issubclass(kind, errors.InputError) and row.reason
}
"""Code of an input that was refused by itself → label of `rejected_total`."""

SUCCESS = Row(Code.SUCCESS, "Ok", 200)
MIXED = Row(Code.MIXED_STATUS, "Mixed Success", 207)
FAILURE = Row(Code.FAILURE, "Failure", 400)
METHOD_NOT_ALLOWED = Row(Code.CONN_METHOD_NOT_ALLOWED, "Method not allowed", 405)
NOT_IMPLEMENTED = Row(Code.NOT_IMPLEMENTED, "Not implemented", 501)
READY_VERSION = Row(Code.MODEL_TRAINED, "Model is trained and ready", 200)

_PLACEMENTS = {
    "deployment": TABLE[errors.PlacementUnknown],
    "nodepool": Row(Code.NODEPOOL_DOES_NOT_EXIST, "Nodepool does not exist", 404),
    "compute_cluster": Row(Code.COMPUTE_CLUSTER_DOES_NOT_EXIST, "Compute cluster does not exist", 404),
    "runner": Row(Code.RUNNER_DOES_NOT_EXIST, "Runner does not exist", 404),
}
_MISMATCHES = {
    "deployment": TABLE[errors.PlacementMismatch],
    "runner": Row(Code.RUNNER_INVALID_ARGUMENT, "Invalid runner argument", 400),
}


_BY_RPC = {
    RpcStatus.CANCELLED: TABLE[errors.Cancelled],
    RpcStatus.DEADLINE_EXCEEDED: TABLE[errors.DeadlineExceeded],
    RpcStatus.INVALID_ARGUMENT: TABLE[errors.InvalidRequest],
    RpcStatus.NOT_FOUND: TABLE[errors.UnknownType],
    RpcStatus.PERMISSION_DENIED: TABLE[errors.NotPermitted],
    RpcStatus.RESOURCE_EXHAUSTED: TABLE[errors.Overloaded],
    RpcStatus.UNIMPLEMENTED: NOT_IMPLEMENTED,
    RpcStatus.UNAVAILABLE: TABLE[errors.Draining],
    RpcStatus.UNAUTHENTICATED: TABLE[errors.KeyInvalid],
}


def row_of(error: Exception) -> Row:
    """The table's row for an error; a subclass without one uses its parent's."""
    if isinstance(error, errors.PlacementUnknown):
        return _PLACEMENTS[error.kind]
    if isinstance(error, errors.PlacementMismatch):
        return _MISMATCHES[error.kind]
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), INTERNAL)


class Refusal(RpcAbort):
    """Ends a call with what the table says of an error; a surface that speaks HTTP finds the error itself in it.

    Attributes:
        row: the error's.
        error: what went wrong; its sentence is `message` unless it was not foreseen.
        req_id: what users quote.
    """

    def __init__(self, error: Exception, req_id: str = "") -> None:
        self.row = row_of(error)
        self.error = error
        self.req_id = req_id
        told = of_error(error, req_id)
        details = rpc_status_pb2.Status(code=int(self.row.grpc), message=told.details)
        packed = any_pb2.Any()
        packed.Pack(told)
        details.details.append(packed)
        super().__init__(self.row.grpc, told.details, details.SerializeToString())


def failure_of(failures: Iterable[Exception]) -> Row:
    """FAILURE, when every input of a request failed; its HTTP status says who can act.

    That of all of them when they agree; else the caller's part first, as trying again would not mend that.
    """
    found = sorted({row_of(error).http for error in failures})
    http = found[0] if len(found) == 1 else FAILURE.http if found and found[0] < 500 else INTERNAL.http
    return replace(FAILURE, http=http)


def success(req_id: str = "") -> status_pb2.Status:
    """10000."""
    return of_row(SUCCESS, "", req_id)


def of_row(row: Row, details: str, req_id: str = "") -> status_pb2.Status:
    """A status message; its HTTP status is in it unless that is 200, as some codes have more than one."""
    return status_pb2.Status(
        code=row.code,
        description=row.description,
        details=details,
        req_id=req_id,
        http_status_code=0 if row.http == SUCCESS.http else row.http,
    )


def http_of(message: status_pb2.Status) -> int:
    """The HTTP status of a reply with this status."""
    return message.http_status_code or SUCCESS.http


def of_abort(abort: RpcAbort) -> status_pb2.Status:
    """What a call that ended with a gRPC status would have said in a reply."""
    packed = rpc_status_pb2.Status.FromString(abort.details).details
    found = status_pb2.Status()
    if packed and packed[0].Unpack(found):
        return found
    return of_row(_BY_RPC.get(abort.status, INTERNAL), abort.message)


def of_error(error: Exception, req_id: str = "") -> status_pb2.Status:
    """What a caller may read of an error; of one that was not foreseen, only where to look."""
    if isinstance(error, ApplianceError):
        return of_row(row_of(error), str(error), req_id)
    return of_row(INTERNAL, "Something went wrong in the appliance; its log tells more under this req_id.", req_id)


def name_of(code: int) -> str:
    """Clarifai's name of a number, for logs."""
    try:
        return str(status_code_pb2.StatusCode.Name(code))
    except ValueError:
        return str(code)
