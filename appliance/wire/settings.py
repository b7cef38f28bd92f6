"""What the wire must know; the daemon fills it from the configuration."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WireSettings:
    """Limits of connections and calls; sizes in bytes, times in seconds. Names follow `[connections]` and `[limits]`.

    Attributes:
        max_message: one request message (`limits.request_size`).
        max_reply: one reply message (`limits.reply_size`).
        metadata: one call's headers, counted as HTTP/2 does (`limits.metadata_size`).
        request_timeout_s: in which a body must arrive, and a client take its reply (`limits.request_timeout_s`).
        trusted_proxies: addresses or networks whose connections begin with a PROXY v2 header.
        cors_origins: web origins whose pages may call.
    """

    max_message: int = 128 * 2**20
    max_reply: int = 512 * 2**20
    metadata: int = 16 * 2**10
    request_timeout_s: float = 60.0
    max_connections: int = 16_384
    per_address: int = 2048
    handshakes: int = 256
    handshake_timeout_s: float = 10.0
    idle_s: float = 3600.0
    keepalive_s: float = 300.0
    keepalive_timeout_s: float = 20.0
    age_s: float = 0.0
    age_grace_s: float = 60.0
    streams: int = 256
    trusted_proxies: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a port shows and trusts, PEM.

    Attributes:
        key: unencrypted private key.
        client_ca: authorities for client certificates; None on the port that asks for none.
    """

    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None
