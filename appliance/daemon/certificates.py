"""The appliance's certificate, key and trust bundle: read, checked, and kept until better ones come."""

import logging
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import serialization

from appliance.core.config import Config
from appliance.core.errors import CertificateError
from appliance.pki import inspect
from appliance.wire.grpcio import Credentials

_log = logging.getLogger(__name__)


class CertificateFiles:
    """What the ports show and trust now; keeps the last good set when the files become bad.

    `tls` and `mtls` may be read from any thread: each is replaced as a whole.
    """

    def __init__(self, config: Config) -> None:
        """Raises: CertificateError: a file is missing, or the set is unusable; says everything that is wrong."""
        self.config = config
        self.expiry: dict[str, float] = {}
        self._stamps = _stamps(_paths(config))
        self._tls, self._client_ca = self._read(config)

    def tls(self) -> Credentials:
        """For the port that asks for no client certificate."""
        return self._tls

    def mtls(self) -> Credentials:
        """For the port that demands one."""
        return Credentials(self._tls.chain, self._tls.key, self._client_ca)

    def reload(self, config: Config) -> None:
        """Read everything anew. Raises: CertificateError: nothing was taken over."""
        stamps = _stamps(_paths(config))
        self._tls, self._client_ca = self._read(config)
        self.config, self._stamps = config, stamps

    def refresh(self) -> None:
        """Take over files that changed; if they are bad, say so once and keep the last good ones."""
        stamps = _stamps(_paths(self.config))
        if stamps == self._stamps:
            return
        try:
            self.reload(self.config)
        except CertificateError as error:
            self._stamps = stamps
            _log.error("changed certificate files are not taken over, the ones before stay: %s", error)
        else:
            _log.info("certificates reloaded", extra={"certificate": str(self.config.tls.certificate)})

    def _read(self, config: Config) -> tuple[Credentials, bytes | None]:
        now = datetime.now(UTC)
        secret = config.tls.key_passphrase
        passphrase = secret.get_secret_value().encode() if secret else None
        chain, key = read_pem(config.tls.certificate), read_pem(config.tls.key)
        problems = inspect.check_server_pair(chain, key, passphrase, now)
        client_ca = None
        if config.server.mtls_listen:
            client_ca = read_pem(config.tls.client_ca)
            problems += [f"{config.tls.client_ca}: {text}" for text in inspect.check_trust_bundle(client_ca, now)]
        if problems:
            raise CertificateError(
                f"The certificate {config.tls.certificate} (key {config.tls.key}) cannot be used: "
                + " ".join(problems)
                + " `appliance certs inspect` shows more."
            )
        leaf = inspect.load_certificates(chain)[0]
        self.expiry = {"server": leaf.not_valid_after_utc.timestamp()}
        if client_ca is not None:
            ends = [c.not_valid_after_utc.timestamp() for c in inspect.load_certificates(client_ca)]
            self.expiry["client_ca"] = min(ends)
        plain = inspect.load_private_key(key, passphrase).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Credentials(chain, plain, None), client_ca


def base_url_warning(config: Config, chain: bytes) -> str:
    """A sentence when the host that clients are told is not in the certificate's names, else ""."""
    host = urlsplit(config.server.base_url).hostname or ""
    leaf = inspect.load_certificates(chain)[0]
    if inspect.covers_host(leaf, host):
        return ""
    names = ", ".join(inspect.server_names(leaf)) or "none"
    return (
        f"server.base_url names the host {host!r}, which is not among the certificate's subject alternative names "
        f"({names}): clients will refuse the connection unless a proxy in front answers for it. Issue a certificate "
        "for that host, or change server.base_url."
    )


def read_pem(path: Path) -> bytes:
    """The bytes of a file. Raises: CertificateError: names the file and what to do."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(
            f"There is no file {path}; make one with `appliance certs init` and `appliance certs issue server`, or "
            "`appliance certs import` yours."
        ) from None
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from error


def _paths(config: Config) -> list[Path]:
    return [config.tls.certificate, config.tls.key, config.tls.client_ca]


def _stamps(paths: Iterable[Path]) -> tuple[object, ...]:
    stamps: list[object] = []
    for path in paths:
        try:
            stat = os.stat(path)
            stamps.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            stamps.append(error.errno)
    return tuple(stamps)
