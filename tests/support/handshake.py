"""TLS handshakes in memory."""

import ssl


def shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext, host: str | None = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shake hands. Returns: the server's end and the client's. Raises: ssl.SSLError: one side refuses."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_end = client.wrap_bio(down, up, server_hostname=host)
    server_end = server.wrap_bio(up, down, server_side=True)
    waiting = [client_end, server_end]
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
        if not waiting:
            return server_end, client_end
    raise AssertionError("the handshake does not end")
