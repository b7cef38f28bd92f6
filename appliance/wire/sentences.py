"""What the wire says when a limit is passed or it fails: the same words, whichever HTTP or gRPC the client speaks."""

UNFORESEEN = "Something went wrong in the appliance; its log tells more."


def request_too_large(limit: int) -> str:
    """For a request, or a message of one, of more than `limit` bytes."""
    return f"The request is over limits.request_size, {limit} bytes. Send fewer or smaller inputs."


def body_too_large(limit: int) -> str:
    """For the body of an HTTP request, which may be longer than a message of `limit` bytes; see `asgi.body_limit`."""
    return (
        f"The request's body is over one and a half times limits.request_size, {limit} bytes. "
        "Send fewer or smaller inputs."
    )


def request_too_late(seconds: float) -> str:
    """For a request that was not all here within `limits.request_timeout_s`."""
    return f"The request did not arrive within {seconds:g} s."


def headers_too_large(limit: int) -> str:
    """For headers of more than `limit` bytes."""
    return f"The request's headers are over limits.metadata_size, {limit} bytes. Send fewer or shorter headers."


def reply_too_large(size: int, limit: int) -> str:
    """For a reply message of `size` bytes."""
    return f"The reply has {size} bytes; limits.reply_size allows {limit}. Ask for fewer inputs at once."
