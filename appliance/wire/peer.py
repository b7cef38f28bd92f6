"""Who is on the other end of a connection."""

from dataclasses import dataclass


@dataclass(slots=True)
class Peer:
    """One connection's other end.

    Attributes:
        address: IP address, the real client's behind a trusted proxy; "unix" on a unix socket.
        text: the same for the log, with the port: `ipv4:10.0.0.7:51234`, `ipv6:[::1]:51234`, `unix:`.
        secure: whether the connection is TLS.
        certificate: the verified client certificate as PEM, or None when none was sent.
        chain: the verified certificates above it as PEM, leaf's issuer first.
    """

    address: str
    text: str
    secure: bool
    certificate: bytes | None = None
    chain: bytes = b""
