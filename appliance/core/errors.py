"""Everything that can go wrong, sorted by who can act.

    ApplianceError
      RequestError            the caller must change something
        InvalidRequest          the message cannot be read, or misses something
          EncodingNotRead         its body is compressed
        NoInputs                no inputs in the request
        TooManyInputs           more inputs than one request may carry
        InvalidArgument         max_concepts, min_value, select_concepts, a method argument
        UnknownMethod           no such method on this model
        UnknownModel            no such model or version
        UnknownType             no such model type
        UnknownStatusCode       no such status code
        NotServed               something of another protocol that we do not do
        UnknownUser             a user id that is not the caller's
        UnknownWorkflow         no such workflow, or no such version of it
        WorkflowArgument        a parameter of a workflow that does not fit it
        PlacementUnknown        a deployment, nodepool, compute cluster or runner that is not this appliance's
        PlacementMismatch       one that is, but not for the model asked for
        DeploymentDisabled      one whose model is held back, or not here
        UnknownApp              no such app, or none of its models is the caller's to use
        InputError              one input of many is at fault
          InvalidInput            it carries the wrong thing, or nothing
          UnsupportedFormat       its bytes are not a format we read
          InputTooLarge           over the bytes or pixels one input may have
          UrlRefused              its URL may not be fetched
          DownloadFailed          its URL was allowed, and could not be fetched
          NodeMismatch            a workflow's node cannot take what the nodes before it give
          NodeNotRun              a node before it failed
        AccessError             who is calling
          CredentialsMissing      no key (or certificate) where one is required
          KeyInvalid              a key that is unknown or revoked
          NotPermitted            known, but not allowed to do this
          RateLimited             over this principal's rate or concurrency
      CapacityError           the caller should try later
        Overloaded              a queue or the memory budget is full
        NotReady                the model is still loading
        NotDeployed             the model could not be loaded
        Draining                the appliance is stopping
        NotRecorded             the audit log is required, and cannot be written
        DeadlineExceeded        the time for this call is over
        Cancelled               the caller went away
      ModelError              the bundle is at fault
        BundleInvalid           it cannot be loaded
        InferenceFailed         it was loaded, and this run of it failed
        WorkflowInvalid         a workflow's file cannot be served
      ConfigError             the operator: an exit code, never a reply
        CertificateError        a certificate, key or trust bundle is unusable
        AddressError            a port or socket cannot be listened on
        AccessRefused           a file or folder may not be read or written
        DiskFull                there is no space for what must be written
        DeviceError             the device asked for cannot be used

An error holds values and builds its sentence. `str(error)` is what the caller may read: it names the limit, key or
file and says what to do. What happened inside goes into `detail`, which is for the log only. This module imports
nothing, so that everybody may import it.
"""

LONGEST_SENTENCE = 1000
"""Bytes of a sentence that quotes a caller. gRPC carries it twice in a call's last headers, percent-encoded and in
base64, and clients take 8 KiB of headers."""


def readable(sentence: str) -> str:
    """The sentence without its middle, when it has too much of what a caller sent: its end says what to do.

    Half of a surrogate pair, which JSON can name and nothing can write, becomes a question mark.
    """
    whole = sentence.encode("utf-8", "replace")
    if len(whole) <= LONGEST_SENTENCE:
        return whole.decode("utf-8")
    start, end = whole[: LONGEST_SENTENCE // 2], whole[-LONGEST_SENTENCE // 2 :]
    return f"{start.decode('utf-8', 'ignore')} … {end.decode('utf-8', 'ignore')}"


class ApplianceError(Exception):
    """Root of all errors raised on purpose; `str()` of it is safe to show to the caller."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class RequestError(ApplianceError):
    """The caller must change the request. Whatever of it the sentence quotes, one can still read it."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(readable(message), detail=detail)


class InvalidRequest(RequestError):
    """The message cannot be read, or misses something."""


class EncodingNotRead(InvalidRequest):
    """The body of an HTTP request is compressed."""

    def __init__(self, encoding: str) -> None:
        super().__init__(f"A body with content-encoding {encoding[:40]!r} is not read here; send it as it is.")


class NoInputs(RequestError):
    """The request carries no inputs."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request has no inputs; send between 1 and {limit}.")


class TooManyInputs(RequestError):
    """The request carries more inputs than one request may."""

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(f"The request has {count} inputs; the limit is {limit} per request. Send several requests.")


class InvalidArgument(RequestError):
    """A parameter of the prediction is out of its range."""


class UnknownMethod(RequestError):
    """The model has no method of that name."""

    def __init__(self, method: str, known: tuple[str, ...]) -> None:
        super().__init__(f"The model has no method {method!r}; it has {', '.join(known)}.")


class UnknownModel(RequestError):
    """No such model, or no such version of it."""


class UnknownType(RequestError):
    """No such model type."""


class UnknownStatusCode(RequestError):
    """No such status code."""


class NotServed(RequestError):
    """A protocol has it, and this appliance does not serve it."""


class UnknownUser(RequestError):
    """A user id that is not the caller's."""


class UnknownApp(RequestError):
    """No such app, or none of its models is the caller's to use."""


class UnknownWorkflow(RequestError):
    """No such workflow, or no such version of it."""


class WorkflowArgument(RequestError):
    """A parameter of a workflow request that does not fit the workflow, or that is not served here."""


class PlacementUnknown(RequestError):
    """A place that is not this appliance.

    Attributes: kind: "deployment" | "nodepool" | "compute_cluster" | "runner".
    """

    def __init__(self, kind: str, name: str, user_id: str = "") -> None:
        """Args: user_id: whose it would be, where that is what makes it unknown."""
        of = f" of user {user_id!r}" if user_id else ""
        known = f"List{kind.replace('_', ' ').title().replace(' ', '')}s"
        super().__init__(
            f"There is no {kind.replace('_', ' ')} {name!r}{of} on this appliance; {known} names what there is. To "
            "predict, leave the selector out."
        )
        self.kind = kind


class PlacementMismatch(RequestError):
    """A place of this appliance that is not where the model asked for runs.

    Attributes: kind: "deployment" | "runner".
    """

    def __init__(self, kind: str, name: str, serves: str, asked: str) -> None:
        super().__init__(
            f"The {kind} {name!r} serves model {serves}, and not {asked}; name that model, or another {kind}."
        )
        self.kind = kind


class DeploymentDisabled(RequestError):
    """A deployment of this appliance whose model is held back, or not in its catalog."""


class InputError(RequestError):
    """One input of the request is at fault; its neighbours are answered."""


class InvalidInput(InputError):
    """The input carries the wrong kind of data, or none."""


class UnsupportedFormat(InputError):
    """The input's bytes are not a format the appliance reads."""


class InputTooLarge(InputError):
    """The input is over the bytes or pixels that one input may have."""


class UrlRefused(InputError):
    """The input's URL may not be fetched."""


class DownloadFailed(InputError):
    """The input's URL was allowed, and could not be fetched."""


class NodeMismatch(InputError):
    """A node of a workflow cannot take what the nodes before it give."""


class NodeNotRun(InputError):
    """A node of a workflow was not run for an input, as a node before it failed.

    Attributes: failed, why: where that began, which may be several nodes before, and what was said there.
    """

    def __init__(self, node: str, failed: str, why: str) -> None:
        super().__init__(f"Node {node!r} was not run: node {failed!r}, whose output it needs, failed. {why}")
        self.failed, self.why = failed, why


class AccessError(RequestError):
    """Who is calling is not known, or not allowed."""


class CredentialsMissing(AccessError):
    """No key (or certificate) came where one is required."""


class KeyInvalid(AccessError):
    """The key is unknown or revoked."""


class NotPermitted(AccessError):
    """The caller is known, and not allowed to do this."""


class RateLimited(AccessError):
    """The principal is over its rate or its concurrency."""


class CapacityError(ApplianceError):
    """Nothing is wrong with the request; try later."""


class Overloaded(CapacityError):
    """A queue or the memory budget is full."""


class NotReady(CapacityError):
    """The model is still loading."""


class NotDeployed(CapacityError):
    """The model is in the catalog and could not be loaded; the operator sees why."""


class Draining(CapacityError):
    """The appliance is stopping."""

    def __init__(self) -> None:
        super().__init__("The appliance is shutting down; try again, or try another one.")


class NotRecorded(CapacityError):
    """The audit log is required, and cannot be written."""

    def __init__(self) -> None:
        super().__init__("The appliance cannot record calls now, which it must; try again, or try another one.")


class DeadlineExceeded(CapacityError):
    """The time for this call is over."""

    def __init__(self, seconds: float | None = None) -> None:
        allowed = f" of {seconds:g} s" if seconds is not None else ""
        super().__init__(f"The deadline{allowed} passed before the answer was ready.")


class Cancelled(CapacityError):
    """The caller went away; nobody reads this."""

    def __init__(self) -> None:
        super().__init__("The call was cancelled.")


class ModelError(ApplianceError):
    """The bundle is at fault."""


class BundleInvalid(ModelError):
    """The bundle cannot be loaded; says which file and what to do."""


class InferenceFailed(ModelError):
    """The model was loaded, and this run of it failed."""


class WorkflowInvalid(ModelError):
    """A workflow's file cannot be served; says which file, which node and what to do."""


class ConfigError(ApplianceError):
    """The operator must change the configuration, a file or the machine."""


class CertificateError(ConfigError):
    """A certificate, key or trust bundle is unusable."""


class AddressError(ConfigError):
    """A port or a socket's path cannot be listened on: it is taken, or not ours to take."""


class AccessRefused(ConfigError):
    """A file or folder may not be read or written: its permissions, or a read-only file system."""


class DiskFull(ConfigError):
    """There is no space, or no quota, for what must be written."""


class DeviceError(ConfigError):
    """The device asked for cannot be used."""


def as_data(error: ApplianceError) -> dict[str, str]:
    """The error as plain data, for another process of the appliance; its nearest class that stands here goes along."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == __name__)
    return {"error": name, "message": str(error), "detail": error.detail}


def of_data(data: dict[str, str]) -> ApplianceError:
    """The error that `as_data` wrote: class, sentence and detail, without what else it held."""
    kind = globals().get(data["error"], ApplianceError)
    error: ApplianceError = kind.__new__(kind)
    Exception.__init__(error, data["message"])
    error.detail = data["detail"]
    return error
