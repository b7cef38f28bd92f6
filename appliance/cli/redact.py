"""Taking secrets out of text that leaves the machine: keys (PATs), private keys, passphrases, whatever is named so."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from appliance.api.keys import digest, read_keys
from appliance.core.config import Config, LoadedConfig
from appliance.core.errors import ConfigError

GONE = "[removed]"

_PRIVATE_KEY = re.compile(r"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.DOTALL)
_HEX = re.compile(r"\b[0-9a-fA-F]{64}\b")
_CREDENTIALS = re.compile(r"\b(key|bearer|basic|token)(\s+)[A-Za-z0-9+/=._~-]{16,}", re.IGNORECASE)
_NAMED = re.compile(
    r"""(?P<name>[\w.-]*(?:passphrase|password|secret|authorization|session[-_]token|api[-_]?key|(?<![a-z])pat|[_-]token))
        (?P<between>["']?\s*[=:]\s*)
        (?P<value>"[^"\n]*"|'[^'\n]*'|[^"'\n]+)""",
    re.IGNORECASE | re.VERBOSE,
)
"""`key_passphrase = "…"`, `CLARIFAI_PAT=…`, `authorization: …`: all behind the sign, to the quote or the end."""

_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://)[^/@\s\"']+@", re.IGNORECASE)
"""A proxy's user and password in its URL."""

_FILES = ("pat_file", "token_file", "passphrase_file", "secret_file", "password_file", "headers_file")
"""Endings of settings that name a file with a secret in it."""

_SHORTEST = 4
"""A secret with fewer characters would take half of the text with it."""


class Redactor:
    """Knows this appliance's secrets, and what secrets look like."""

    def __init__(self, secrets: Iterable[str] = (), key_hashes: Iterable[str] = ()) -> None:
        """Args: secrets: texts that must not stand anywhere. key_hashes: SHA-256 of keys, as the keys file has them."""
        known = sorted({text for text in secrets if len(text) >= _SHORTEST}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None
        self._hashes = frozenset(key_hashes)

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        if self._known is not None:
            text = self._known.sub(GONE, text)
        text = _PRIVATE_KEY.sub(f"[private key {GONE[1:]}", text)
        text = _HEX.sub(self._hex, text)
        text = _CREDENTIALS.sub(rf"\1\2{GONE}", text)
        text = _USERINFO.sub(rf"\1{GONE}@", text)
        return _NAMED.sub(rf"\g<name>\g<between>{GONE}", text)

    def _hex(self, match: re.Match[str]) -> str:
        """Digests and fingerprints have 64 digits too, and stay: a key is known by its hash."""
        return GONE if digest(match[0]) in self._hashes or digest(match[0].lower()) in self._hashes else match[0]


def of(loaded: LoadedConfig | None, environ: Mapping[str, str] = os.environ) -> Redactor:
    """A redactor for what is configured; files that cannot be read have no secrets that could be told."""
    secrets = [value for name, value in environ.items() if _NAMED.fullmatch(f"{name}=x")]
    hashes: list[str] = []
    if loaded is not None:
        secrets += _configured(loaded.config)
        for key, value, _ in loaded.rows():
            if key.endswith(_FILES) and isinstance(value, str):
                secrets += _lines(Path(value))
        try:
            hashes = [entry.sha256 for entry in read_keys(loaded.config.auth.keys_file)]
        except ConfigError:
            hashes = []
    return Redactor(secrets, hashes)


def _configured(config: Config) -> list[str]:
    passphrase = config.tls.key_passphrase
    return [passphrase.get_secret_value()] if passphrase else []


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return []
