"""The listening sockets: taken over from systemd or from our predecessor, else bound; kept open while we restart.

What systemd passes (`LISTEN_FDS`, sd_listen_fds(3)) is used so:

- named like a setting (`FileDescriptorName=server.listen` in a .socket unit): it is that setting's socket, whatever
  address the setting names;
- bound to a setting's address: it is that setting's, under any name;
- of our own earlier run (names that begin with `stored.`), and no setting has that address any more, or systemd lets
  in others than then (`ADDRESS_RULE`): closed for good;
- anything else, e.g. port 443 of inference-appliance.socket: served beside `server.listen`, and like it.

What we bind ourselves is put into systemd's store, so that a restart refuses nobody: clients wait in the queue.
"""

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from appliance.core.config import parse_address
from appliance.core.errors import AddressError, ConfigError
from appliance.core.systemd import Notifier
from appliance.daemon.admin import bind_unix

_log = logging.getLogger(__name__)

MAIN = "server.listen"
"""The setting whose port also gets the sockets that belong to no setting."""

RULE_VARIABLE = "ADDRESS_RULE"
"""Names the rule (IPAddressAllow=) that systemd starts us under; 20-clients.conf sets it. The kernel holds a listening
socket to the rule of the control group that it was made in, which a restart leaves behind: a socket that was stored
under another rule would go on letting in, or keeping out, whom that one did."""

_STORED = "stored."
_RULE = "@"
_FIRST_DESCRIPTOR = 3
_BACKLOG = 4096
"""Connections that may wait to be accepted; the system lowers it to net.core.somaxconn."""


@dataclass
class ListeningSockets:
    """Sockets that listen.

    Attributes:
        by_name: setting → its sockets, at least one; several for a name with several addresses, for several fronts,
            and for the main setting when systemd passed more.
    """

    by_name: dict[str, list[socket.socket]]
    _locks: list[socket.socket] = field(default_factory=list)
    _paths: list[Path] = field(default_factory=list)  # of unix sockets that we bound

    def close(self) -> None:
        """Close our descriptors and give up our locks; idempotent. What systemd keeps stays open there."""
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.unlink()
        self._paths.clear()
        for sock in (*(sock for socks in self.by_name.values() for sock in socks), *self._locks):
            sock.close()


class _Place(NamedTuple):
    """An address as the system has it; `host` is the path of a unix socket, whose port is 0."""

    family: socket.AddressFamily
    host: str
    port: int

    def __str__(self) -> str:
        if self.family == socket.AF_UNIX:
            return f"unix:{self.host}"
        return f"[{self.host}]:{self.port}" if self.family == socket.AF_INET6 else f"{self.host}:{self.port}"


@dataclass
class _Inherited:
    """A socket that was passed to us."""

    name: str
    sock: socket.socket
    place: _Place

    @property
    def stored(self) -> bool:
        """Whether our own earlier run put it into systemd's store."""
        return self.name.startswith(_STORED)


def open_listening(
    wanted: Mapping[str, str],
    notifier: Notifier,
    *,
    fronts: int = 1,
    environment: MutableMapping[str, str] = os.environ,
) -> ListeningSockets:
    """Have a listening socket for every setting, and hand to systemd what it shall keep for the next start.

    With more than one front each has its own socket on the same port (SO_REUSEPORT), and the system spreads clients
    over them; a lock keeps other appliances off the port. Such a socket is never closed while the others serve: that
    would reset the clients in its queue. It stays open here until its new front takes it. A socket that came as one
    is shared by all fronts; if more came than there are fronts, all of them must be served.

    Args:
        wanted: setting → "host:port" or "unix:/path", e.g. {"server.listen": "[::]:8443"}.
        environment: where LISTEN_FDS and its kin stand, which are taken out, so that no child believes them; and
            ADDRESS_RULE.
    Raises: AddressError: an address is taken or not ours. ConfigError: what was passed is no listening socket.
    """
    inherited, rule = _inherited(environment), environment.get(RULE_VARIABLE, "")
    opened = ListeningSockets({name: [] for name in wanted})
    try:
        outdated = [item for item in inherited if item.stored and item.name.partition(_RULE)[2] != rule]
        _let_go(outdated, notifier, "the rule on who may connect is another one now")
        inherited = [item for item in inherited if item not in outdated]
        _hand_out(wanted, inherited, opened)
        orphans = [item for item in inherited if item.stored and not _is_in(item.sock, opened)]
        _let_go(orphans, notifier, "no setting has that address any more")
        for name, address in wanted.items():
            from_unit = [item for item in inherited if not item.stored and item.sock in opened.by_name[name]]
            if from_unit:
                continue  # the .socket unit keeps it
            own = opened.by_name[name]
            came_along = bool(own)
            _bind(name, address, own, opened._locks, fronts)
            if address.startswith("unix:") and not came_along:  # only now is what lies there ours to remove
                opened._paths.append(Path(address.removeprefix("unix:")))
            for sock in own:
                if sock.family != socket.AF_UNIX:  # its path goes with /run/inference-appliance when we stop
                    notifier.store(_STORED + name + (_RULE + rule if rule else ""), sock)
        _add_the_rest(inherited, opened)
    except BaseException:
        opened.close()
        for item in inherited:
            item.sock.close()
        raise
    return opened


def close_inherited(notifier: Notifier, environment: MutableMapping[str, str] = os.environ) -> None:
    """Close what was passed to us, for a transport that binds its ports itself; the ports are free when it returns.

    A .socket unit keeps its own ones: the log names them. Raises: ConfigError: as `open_listening`.
    """
    inherited = _inherited(environment)
    _let_go([item for item in inherited if item.stored], notifier, "this transport cannot take it over")
    for item in inherited:
        if not item.stored:
            _log.warning(
                "%s, passed by systemd as %s, is not served: this transport cannot take it over; stop the .socket unit",
                item.place,
                item.name,
            )
            item.sock.close()


# ---- what was passed to us ----


def _inherited(environment: MutableMapping[str, str]) -> list[_Inherited]:
    """Take over what systemd passed. Source: sd_listen_fds(3). Raises: ConfigError: it is of no use to us."""
    pid, count, names = (environment.pop(f"LISTEN_{what}", "") for what in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    known = names.split(":") if names else []
    known += ["unknown"] * (int(count) - len(known))
    found: list[_Inherited] = []
    for index, name in enumerate(known[: int(count)]):
        sock = _listening(name, _FIRST_DESCRIPTOR + index)
        found.append(_Inherited(name, sock, _place_of(sock)))
    return found


def _listening(name: str, descriptor: int) -> socket.socket:
    """The listening stream socket with that descriptor. Raises: ConfigError: it is something else."""
    os.set_inheritable(descriptor, False)
    problem = "is not a socket"
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        sock = socket.socket(fileno=descriptor)
        if sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            problem = "is neither an IP nor a unix socket"
        elif sock.type != socket.SOCK_STREAM:
            problem = "is not a stream socket (ListenStream=)"
        elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            problem = "does not listen (the unit needs Accept=no)"
        else:
            return sock
        sock.detach()
    raise ConfigError(f'What systemd passed as "{name}" (descriptor {descriptor}) {problem}; mend the .socket unit.')


def _place_of(sock: socket.socket) -> _Place:
    where = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return _Place(socket.AF_UNIX, where if isinstance(where, str) else "@" + where[1:].decode(errors="replace"), 0)
    return _Place(socket.AddressFamily(sock.family), where[0], where[1])


def _hand_out(wanted: Mapping[str, str], inherited: Sequence[_Inherited], opened: ListeningSockets) -> None:
    """Give inherited sockets to the settings they are for: by name, else by address."""
    places = {name: _places(name, address) for name, address in wanted.items()}
    for item in inherited:
        if item.stored:
            continue
        owner = item.name if item.name in wanted else _at(item, places)
        if owner:
            opened.by_name[owner].append(item.sock)
    taken = {name for name, socks in opened.by_name.items() if socks}
    for item in inherited:
        owner = _at(item, places) if item.stored else ""
        if owner and owner not in taken:
            opened.by_name[owner].append(item.sock)


def _at(item: _Inherited, places: Mapping[str, Sequence[_Place]]) -> str:
    """The setting with that socket's address, "" when there is none. Any port will do again where the system chose."""
    for name, wanted in places.items():
        anywhere = [
            place.host for place in wanted if place.port == 0 and item.name.partition(_RULE)[0] == _STORED + name
        ]
        if item.place in wanted or (item.place.host in anywhere and item.place.family != socket.AF_UNIX):
            return name
    return ""


def _is_in(sock: socket.socket, opened: ListeningSockets) -> bool:
    return any(sock in socks for socks in opened.by_name.values())


def _let_go(orphans: Sequence[_Inherited], notifier: Notifier, why: str) -> None:
    """Close what an earlier run listened on and we do not, here and in systemd's store."""
    for item in orphans:
        _log.info("%s is closed: %s", item.place, why)
        item.sock.close()
    for name in dict.fromkeys(item.name for item in orphans):
        notifier.forget(name)
    if orphans:
        notifier.wait_heard()  # until then systemd's copy holds the port


def _add_the_rest(inherited: Sequence[_Inherited], opened: ListeningSockets) -> None:
    """Serve what a .socket unit opened and no setting claimed beside the main port."""
    for item in inherited:
        if not item.stored and not _is_in(item.sock, opened):
            _log.info("%s, passed by systemd as %s, is served like %s", item.place, item.name, MAIN)
            opened.by_name.setdefault(MAIN, []).append(item.sock)


# ---- what we bind ----


def _places(name: str, address: str) -> list[_Place]:
    """The addresses that a setting means. Raises: AddressError: the name is unknown."""
    if address.startswith("unix:"):
        return [_Place(socket.AF_UNIX, address.removeprefix("unix:"), 0)]
    host, port = parse_address(address)
    if host == "::" and not _has_ipv6():
        host = "0.0.0.0"  # noqa: S104  # what the operator asked for: every address of this machine
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise AddressError(f"{name} {address} cannot be bound: {error.strerror}.") from error
    return list(dict.fromkeys(_Place(family, str(where[0]), int(where[1])) for family, _, _, _, where in found))


def _has_ipv6() -> bool:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def _bind(name: str, address: str, own: list[socket.socket], locks: list[socket.socket], fronts: int) -> None:
    """Bind what a setting lacks; `own` has what came from the store, and gets the rest.

    Raises: AddressError: the address is taken, or not this machine's.
    """
    if address.startswith("unix:"):
        if not own:
            own.append(bind_unix(Path(address.removeprefix("unix:")), name))
            own[0].listen(_BACKLOG)
        return
    if own and not own[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return  # one socket, shared by all fronts
    missing = None
    for place in dict.fromkeys(map(_place_of, own)) or _places(name, address):
        if place.port == 0 and own:  # a name with several addresses has one port
            place = place._replace(port=_place_of(own[0]).port)
        try:
            _bind_place(name, place, own, locks, fronts)
        except OSError as error:
            missing = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    # "localhost" may mean ::1 on a machine without IPv6; one address is enough then.
    if missing is not None and (not own or missing.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
        raise AddressError(f"{name} {address} cannot be bound: {_why(missing, name)}") from missing


def _bind_place(name: str, place: _Place, own: list[socket.socket], locks: list[socket.socket], fronts: int) -> None:
    """Sockets on one address, one a front."""
    there = [sock for sock in own if _place_of(sock) == place]
    shared = fronts > 1 or bool(there)
    if shared and place.port:
        locks.append(_lock(name, place))
    if not there and shared and place.port:
        _socket(place, shared=False).close()  # whoever is on the port already would share it with us unasked
    for _ in range(len(there), fronts):
        sock = _socket(place, shared=shared)
        own.append(sock)
        sock.listen(_BACKLOG)
        if not place.port:
            place = _place_of(sock)
            if shared:
                locks.append(_lock(name, place))


def _socket(place: _Place, *, shared: bool) -> socket.socket:
    """A bound socket; `shared`: others of this user may bind the same port, if they say so too."""
    sock = socket.socket(place.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier run may still linger
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if place.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] means IPv4 too
        sock.bind((place.host, place.port))
    except BaseException:
        sock.close()
        raise
    return sock


def _lock(name: str, place: _Place) -> socket.socket:
    """Hold a port for this process: with SO_REUSEPORT the system would let a second appliance share it in silence.

    The lock is an abstract unix socket: known to one network namespace, like the port, and gone with the process.

    Raises: AddressError: another appliance has it.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = f"\0inference-appliance {place}"
    try:
        lock.bind(path)
        lock.listen(1)
    except OSError as error:
        lock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise AddressError(
            f"{name} {place} cannot be bound: another appliance ({_holder(path)}) serves it; "
            f"stop that one, or set {name}."
        ) from error
    return lock


def _holder(path: str) -> str:
    """The process that listens on a unix socket, in words. Source: unix(7), SO_PEERCRED."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1)
        try:
            asking.connect(path)
            credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return "it is just going"
    return f"process {struct.unpack('3i', credentials)[0]}"


def _why(error: OSError, name: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"the port is taken (`ss -ltnp` shows by whom); stop that program, or set {name}."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"the address is not this machine's (`ip address` shows those that are); set {name}."
    if error.errno == errno.EACCES:
        return "ports below 1024 are for root; enable inference-appliance.socket, which opens 443 for us."
    return f"{error.strerror or error}."
