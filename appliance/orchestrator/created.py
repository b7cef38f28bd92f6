"""What we created at the orchestrator, kept over a restart: `leave` deletes that, and nothing else."""

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.struct_pb2 import Struct

from appliance.core.errors import ConfigError
from appliance.core.files import alone, file_error, make_folder, write_atomically

ORDER = ("place", "deployment", "runner", "model_version", "model", "app", "nodepool", "compute_cluster")
"""Kinds in the order in which they can be deleted: nothing goes while something stands on it."""


CREATOR = "appliance_creator"
"""The field of a version's or runner's metadata that tells which appliance made it: their ids are the orchestrator's,
and the reply that brought one may have been lost."""


@contextlib.contextmanager
def registering(state_dir: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep others from changing what is registered, and from noting it, meanwhile: the agent, and who calls a verb.

    Raises: BlockingIOError: somebody does, and `wait` is not wanted. ConfigError: the state folder cannot be used.
    """
    folder = state_dir / "orchestrator.lock"
    with contextlib.ExitStack() as stack:
        try:
            make_folder(folder)
            stack.enter_context(alone(folder, wait=wait))
        except BlockingIOError:
            raise
        except OSError as error:
            raise file_error(error, f"{folder} cannot be used ({error.strerror}); run this as root.") from error
        yield


class Created:
    """The file `orchestrator.json` of the state folder: kind → paths, a path being ids from the outermost in.

    An app or a cluster is [id], a nodepool [cluster, id], a model [app, id], a version [app, model, local id, id], a
    runner [cluster, nodepool, app, model, local version, id], a deployment [cluster, nodepool, app, model, id]; so is a
    place, that of our nodepool in a deployment of somebody else's. Each user of each base URL has its own.

    Attributes:
        creator: what we call ourselves in the metadata of what has no id of ours; the same as long as this machine and
            its state folder are.
    """

    def __init__(self, state_dir: Path, base: str, user_id: str) -> None:
        """Raises: ConfigError: the file is there and cannot be read, or is not ours."""
        self._path = state_dir / "orchestrator.json"
        self._of = f"{user_id}@{base}"
        self.creator = hashlib.sha256(f"{_machine()}/{state_dir}".encode()).hexdigest()[:32]
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self._all: dict[str, dict[str, list[list[str]]]] = {
                of: {kind: [list(map(str, path)) for path in paths] for kind, paths in kinds.items()}
                for of, kinds in content.items()
            }
        except FileNotFoundError:
            self._all = {}
        except OSError as error:
            raise file_error(error, f"{self._path} cannot be read ({error.strerror}).") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{self._path} is not a file of ours ({error}); move it away. `leave` will not know what was created."
            ) from error

    def is_mine(self, metadata: Struct) -> bool:
        """Whether the metadata of something there says that we created it."""
        return CREATOR in metadata.fields and metadata[CREATOR] == self.creator

    def paths(self, kind: str) -> list[tuple[str, ...]]:
        """Of what we created of a kind, oldest first."""
        return [tuple(path) for path in self._all.get(self._of, {}).get(kind, [])]

    def add(self, kind: str, *path: str) -> None:
        """It was created by us. Raises: ConfigError: that cannot be kept."""
        paths = self._all.setdefault(self._of, {}).setdefault(kind, [])
        if list(path) not in paths:
            paths.append(list(path))
            self._write()

    def remove(self, kind: str, *path: str) -> None:
        """It is gone. Raises: ConfigError: that cannot be kept."""
        kinds = self._all.get(self._of, {})
        if list(path) in kinds.get(kind, []):
            kinds[kind].remove(list(path))
            self._write()

    def _write(self) -> None:
        try:
            write_atomically(self._path, json.dumps(self._all, indent=1) + "\n")
        except OSError as error:
            raise file_error(
                error, f"{self._path} cannot be written ({error.strerror}); who runs this must be able to write there."
            ) from error


def _machine() -> str:
    """What tells this machine from others (machine-id(5)); its name where there is no such file."""
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip() or platform.node()
    except (OSError, UnicodeDecodeError):
        return platform.node()
