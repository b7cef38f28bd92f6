"""What the centre knows, in SQLite: it survives a restart, unless a test takes the file away."""

import hashlib
import sqlite3
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS resources (
    sequence INTEGER PRIMARY KEY, kind TEXT, owner TEXT, scope TEXT, id TEXT, body BLOB,
    UNIQUE (kind, owner, scope, id)
);
CREATE TABLE IF NOT EXISTS pats (digest TEXT PRIMARY KEY, owner TEXT, revoked INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS reports (sequence INTEGER PRIMARY KEY, owner TEXT, type TEXT, body BLOB);
"""


@dataclass(frozen=True)
class Place:
    """Where a resource lies: whose it is, and what it lies in ("cluster", "cluster/nodepool", "app", "app/model")."""

    owner: str
    scope: str = ""


@dataclass(frozen=True)
class Found:
    """A resource with its place."""

    place: Place
    id: str
    message: Any


class Store:
    """All resources, access tokens (as hashes) and reports."""

    def __init__(self, file: Path) -> None:
        self._database = sqlite3.connect(file, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        self._database.close()

    # ---- who may come in ----

    def admit(self, pat: str, owner: str) -> None:
        """From now on `pat` acts for `owner`."""
        self._database.execute("INSERT OR REPLACE INTO pats (digest, owner) VALUES (?, ?)", (_digest(pat), owner))

    def revoke(self, pat: str) -> None:
        """From now on `pat` acts for nobody."""
        self._database.execute("UPDATE pats SET revoked = 1 WHERE digest = ?", (_digest(pat),))

    def owner_of(self, pat: str) -> str:
        """For whom a token acts; "" for nobody."""
        row = self._database.execute(
            "SELECT owner FROM pats WHERE digest = ? AND NOT revoked", (_digest(pat),)
        ).fetchone()
        return row[0] if row else ""

    def has_user(self, user: str) -> bool:
        """Somebody acts, or acted, for this user."""
        return self._database.execute("SELECT 1 FROM pats WHERE owner = ?", (user,)).fetchone() is not None

    # ---- resources ----

    def put(self, kind: str, place: Place, message: Any) -> bool:
        """Keep a new resource; an empty id is given one. False: there is one already."""
        message.id = message.id or uuid.uuid4().hex
        if "created_at" in message.DESCRIPTOR.fields_by_name:
            message.created_at.FromNanoseconds(time.time_ns())
            message.modified_at.CopyFrom(message.created_at)
        done = self._database.execute(
            "INSERT OR IGNORE INTO resources (kind, owner, scope, id, body) VALUES (?, ?, ?, ?, ?)",
            (kind, place.owner, place.scope, message.id, message.SerializeToString()),
        )
        return done.rowcount == 1

    def change(self, kind: str, found: Found) -> None:
        """Keep what became of a resource."""
        if "modified_at" in found.message.DESCRIPTOR.fields_by_name:
            found.message.modified_at.FromNanoseconds(time.time_ns())
        self._database.execute(
            "UPDATE resources SET body = ? WHERE kind = ? AND owner = ? AND scope = ? AND id = ?",
            (found.message.SerializeToString(), kind, found.place.owner, found.place.scope, found.id),
        )

    def delete(self, kind: str, found: Found) -> None:
        """Forget a resource."""
        self._database.execute(
            "DELETE FROM resources WHERE kind = ? AND owner = ? AND scope = ? AND id = ?",
            (kind, found.place.owner, found.place.scope, found.id),
        )

    def find(self, kind: str, message: type, owner: str, scope: str = "", id: str = "") -> Iterator[Found]:
        """Resources, oldest first. An empty `scope` or `id` means any; a scope also finds what lies deeper in it."""
        rows = self._database.execute(
            "SELECT scope, id, body FROM resources WHERE kind = ? AND owner = ? ORDER BY sequence", (kind, owner)
        ).fetchall()
        for its_scope, its_id, body in rows:
            if id not in ("", its_id) or (scope and its_scope != scope and not its_scope.startswith(f"{scope}/")):
                continue
            yield Found(Place(owner, its_scope), its_id, message.FromString(body))

    # ---- reports ----

    def report(self, owner: str, message: Any) -> None:
        """Keep what was reported (metrics of the compute plane)."""
        self._database.execute(
            "INSERT INTO reports (owner, type, body) VALUES (?, ?, ?)",
            (owner, message.DESCRIPTOR.name, message.SerializeToString()),
        )


def _digest(pat: str) -> str:
    return hashlib.sha256(pat.encode()).hexdigest()
