"""`appliance predict`: ask the appliance as a client does, over TLS with a key, to see that all of it works."""

import base64
import json
import mimetypes
import os
import ssl
from pathlib import Path
from typing import Any

import click
import httpx

from appliance.core import config as configuration
from appliance.core.errors import ApplianceError, ConfigError
from appliance.core.files import file_error, printable

_KINDS = ("image", "text", "audio", "video")
_TIMEOUT_S, _CONNECT_S = 120.0, 10.0
KEY_VARIABLE = "CLARIFAI_PAT"


@click.command()
@click.argument("model", metavar="MODEL|USER/APP/MODEL")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--as", "kind", type=click.Choice(_KINDS), help="What the file is; default: by its name, else text.")
@click.option("--key-file", type=click.Path(path_type=Path), help=f"File with the key (PAT); default: {KEY_VARIABLE}.")
@click.option("--base-url", help="Default: server.base_url.")
@click.option("--ca", type=click.Path(path_type=Path), help="Root certificate to trust; default: tls.client_ca.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole reply as JSON.")
@click.pass_obj
def predict(
    config_file: Path | None,
    model: str,
    file: Path,
    kind: str | None,
    key_file: Path | None,
    base_url: str | None,
    ca: Path | None,
    as_json: bool,
) -> None:
    """Send one file to a model, as a client would: its address, its certificate and its key are tried too."""
    config = configuration.load(config_file).config
    user, app, name = _owned(model, config.catalog.user_id, config.catalog.app_id)
    key = _key(key_file)
    url = f"{base_url or config.server.base_url}/v2/users/{user}/apps/{app}/models/{name}/outputs"
    body = {"inputs": [{"data": _data(file, kind)}]}
    reply = _post(url, key, ca or config.tls.client_ca, body)
    if as_json:
        click.echo(json.dumps(reply, indent=1))
    else:
        for output in reply.get("outputs", ()):
            _show(output.get("data", {}))


def _owned(model: str, user_id: str, app_id: str) -> tuple[str, str, str]:
    parts = model.split("/")
    if len(parts) == 1:
        return user_id, app_id, model
    if len(parts) != 3:
        raise click.UsageError(f"{model!r} is neither MODEL nor USER/APP/MODEL.")
    return parts[0], parts[1], parts[2]


def _key(file: Path | None) -> str:
    if file is None:
        return os.environ.get(KEY_VARIABLE, "")
    return _read(file).decode("utf-8", "replace").strip()


def _data(file: Path, kind: str | None) -> dict[str, Any]:
    content = _read(file)
    guessed = (mimetypes.guess_type(file.name)[0] or "").partition("/")[0]
    kind = kind or (guessed if guessed in _KINDS else "text")
    if kind == "text":
        return {"text": {"raw": content.decode("utf-8", "replace")}}
    return {kind: {"base64": base64.b64encode(content).decode()}}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error(error, f"{path} cannot be read: {error.strerror}.") from error


def _post(url: str, key: str, ca: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The reply. Raises: ApplianceError: nobody answers, or the answer is a refusal; in the appliance's words."""
    try:
        trust = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{ca} cannot be trusted: {error}; name the root certificate with --ca.") from error
    headers = {"authorization": f"Key {key}"} if key else {}
    timeout = httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_S)
    try:
        with httpx.Client(verify=trust, trust_env=False, timeout=timeout) as client:
            content: dict[str, Any] = client.post(url, json=body, headers=headers).json()
    except httpx.ConnectTimeout as error:
        raise ApplianceError(
            f"{url} does not answer. What comes from an address that is not let in is dropped, from this machine's own "
            "too: see `appliance doctor`, and `appliance setup --clients`."
        ) from error
    except (httpx.HTTPError, ValueError) as error:
        raise ApplianceError(f"{url}: {error or type(error).__name__}; `appliance doctor` shows more.") from error
    if content.get("status", {}).get("code") != 10000:
        failed = [content, *content.get("outputs", ())]
        said = [entry.get("status", {}) for entry in failed]
        raise ApplianceError(" ".join(printable(f"{s.get('description')}: {s.get('details')}") for s in said if s))
    return content


def _show(data: dict[str, Any]) -> None:
    concepts = data.get("concepts")
    if concepts:
        width = max(len(printable(concept["name"])) for concept in concepts)
        for concept in concepts:
            click.echo(f"{printable(concept['name']):<{width}}  {concept.get('value', 0.0):.3f}")
    else:
        click.echo(json.dumps(data))
