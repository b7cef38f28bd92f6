"""A folder of what costs time to make again: what is not whole is made again, and no trouble with it is anybody's.

Several processes may use one folder. A disk that is full or cannot be written to costs time, and one line in the log.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path

_log = logging.getLogger(__name__)

_DIGEST = 64
"""Characters of a SHA-256 in hexadecimal: the first line of every file, over all that follows."""

_NEW = ".new-"
_ABANDONED_S = 3600.0
"""Seconds after which a file that is still being written belongs to nobody: its process was killed."""


class FileCache:
    """Pieces of content by key, in files; of too many the ones that were not used for longest go."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Args: folder: made when it is first needed. most_bytes: of all files together."""
        self._folder = folder
        self._most_bytes = most_bytes
        self._failing = False

    def get(self, key: str) -> bytes | None:
        """What was put there, unchanged; None when there is nothing that is whole. Called from any thread.

        Args:    key: a file's name, such as a digest in hexadecimal.
        """
        path = self._folder / key
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        content = stored[_DIGEST + 1 :]
        with contextlib.suppress(OSError):
            if stored[: _DIGEST + 1] != _first_line(content):
                path.unlink()
                return None
            os.utime(path)
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep `content`, if it can be kept. Called from any thread."""
        temporary = ""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=_NEW)
            with os.fdopen(handle, "wb") as file:
                file.write(_first_line(content) + content)
            os.replace(temporary, self._folder / key)
            self._make_room()
            self._failing = False
        except OSError as error:
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            if not self._failing:
                _log.warning("%s cannot be written (%s): loading models takes longer", self._folder, error.strerror)
            self._failing = True

    def _make_room(self) -> None:
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process made room
                found = path.stat()
                if not path.name.startswith(_NEW):
                    files.append((found.st_mtime_ns, found.st_size, path))
                elif time.time() - found.st_mtime > _ABANDONED_S:
                    path.unlink()
        room = self._most_bytes
        for _, size, path in sorted(files, reverse=True):
            room -= size
            if room < 0:
                path.unlink(missing_ok=True)


def _first_line(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"
