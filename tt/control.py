"""The control socket: a Unix socket in the data directory, through which commands on this host ask the server.

    request   one JSON object a line: {"do": "bans.add", "source": "192.0.2.1", "seconds": 600}
    answer    JSON objects, a line each, the last one {"end": true, …} or {"error": "one line"}

The loop serves it beside the connections: one piece of one answer a turn, however many clients ask, and a client that
does not read holds up its own answer alone.  Who asks is known from the kernel: root and the server's user may do all,
members of the service group what FOR_GROUP names, others nothing; what is done by hand is logged with who did it.
It must not know the network protocol, nor how the command line shows an answer.
"""

import ctypes
import errno
import grp
import logging
import os
import pwd
import socket
import stat
import struct
import time
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tt import __version__, log, sources, spoke
from tt._core import REASONS, Server, TimeoutRecord, TimeoutTable, source_text
from tt.catalog.service import Service
from tt.dispatch import OperationError
from tt.guard import Guard
from tt.kernel_gate import packed
from tt.pending import Pending

# What the service group may ask for: all of an operator's day.  Not an account of the catalogue: who may give one out
# can make himself its administrator, and that is for root to allow.  A new request is not theirs until it is here.
FOR_GROUP = frozenset(("status", "bans.list", "bans.add", "bans.remove", "bans.clear"))
SO_PEERGROUPS = 59  # asm-generic/socket.h; Python does not name it
NGROUPS_MAX = 65536  # credentials(7)
BACKLOG = 128  # clients that the kernel holds until they are accepted, one a turn
MAX_CLIENTS = 32  # at a time; the one that has been there longest gives way
MAX_REQUEST = 16 * 1024  # bytes of a line
MAX_NOTE = 200  # characters of the reason that is given with a time-out
PIECE = 128  # places of the table looked at in one turn of the loop: about 0.5 ms when all are taken
PAUSE = 0.0001  # s between pieces: longer than what a turn takes from one client's call to the next one's
LONGEST = 30 * 86400  # s
NS = 1_000_000_000

Answer = Iterator[dict[str, Any] | Pending]  # a Pending: it goes on when that is done
PIECE_ENDS: dict[str, Any] = {}  # in an answer: here the loop goes on with the others
_encode = msgspec.json.Encoder().encode
_libc = ctypes.CDLL(None)


class ControlError(Exception):
    """The socket cannot be made; the text is one line that names it, the rule and the remedy."""


class RequestError(Exception):
    """A request cannot be done; the text is one line for who asked."""


class Caller(NamedTuple):
    """Who asks, as the kernel had it when the client connected (SO_PEERCRED and SO_PEERGROUPS, unix(7))."""

    uid: int
    groups: frozenset[int]


class ControlSocket(NamedTuple):
    """The listening socket, its place, the service group's id (None: there is none), and whether it can get there."""

    listener: socket.socket
    path: Path
    group: int | None
    reachable: bool

    def close(self) -> None:
        """Leave neither the socket nor its name; may be called twice."""
        self.listener.close()
        self.path.unlink(missing_ok=True)


class Control:
    """What can be asked at the socket, and by whom; all calls are the loop's thread."""

    def __init__(
        self, door: ControlSocket, server: Server, table: TimeoutTable, guard: Guard, catalog: Service | None = None
    ) -> None:
        """The user that this process is by now is the one who may do all."""
        self._door = door
        self._listener = door.listener
        self._uid = os.geteuid()
        self._owners = f"root and {_user_name(self._uid)}" if self._uid else "root"
        self._group = _group_name(door.group) if door.group is not None else None
        self._server = server
        self._table = table
        self._guard = guard
        self._catalog = catalog
        self._started = time.monotonic()
        self._clients: dict[int, _Client] = {}
        self._queue: dict[_Client, None] = {}  # who can go on, in the order of becoming so
        self._next_piece = 0.0  # not before this, monotonic s
        self._pausing = False  # for want of descriptors nobody is taken until the next tick
        self._requests: Mapping[str, Callable[[Mapping[str, Any], Caller], Answer]] = {
            "status": self._status,
            "bans.list": self._list,
            "bans.add": self._add,
            "bans.remove": self._remove,
            "bans.clear": self._clear,
            "user.reset": self._reset,
        }
        server.watch(self._listener.fileno(), self._accept)
        if not door.reachable:
            words, folder = "the data directory may be closed to the control group", door.path.parent
            remedy = f"chgrp {self._group} {folder}; chmod g+x {folder}"
            log.event(logging.WARNING, words, group=self._group, remedy=remedy)

    def close(self) -> None:
        """At the end of the server: no socket and no client is left."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._server.unwatch(self._listener.fileno())
        self._door.close()

    def tick(self) -> None:
        """About once a second: take clients again, after a pause for want of descriptors."""
        if self._pausing:
            self._pausing = False
            self._server.watch(self._listener.fileno(), self._accept)

    # ---- clients ----------------------------------------------------------------------------------------------------

    def _accept(self, _readable: bool, _writable: bool) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # gone again
            return
        except OSError:  # no descriptor: until the next tick nobody is asked for, or the loop would spin
            self._server.unwatch(self._listener.fileno())
            self._pausing = True
            return
        connection.setblocking(False)
        caller = _caller(connection)
        if not self._is_owner(caller) and self._door.group not in caller.groups:
            # Before he has a place here: a stranger must not push out who is let in.
            self._turn_away(connection, caller)
            return
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(next(iter(self._clients.values())))
        client = _Client(connection, caller)
        self._clients[connection.fileno()] = client
        self._watch(client)

    def _turn_away(self, connection: socket.socket, caller: Caller) -> None:
        # Not logged: whoever may open the socket could fill the log.  Nor is a name looked up for a stranger.
        group = f" and members of {self._group}" if self._group else " (control_group = GROUP lets a group in)"
        refusal = _denied(f"uid {caller.uid} may not ask this server: {self._owners} may{group}")
        with suppress(OSError):  # gone already
            connection.send(_encode(refusal) + b"\n")
        connection.close()

    def _is_owner(self, caller: Caller) -> bool:
        return caller.uid in (0, self._uid)

    def _serve(self, client: "_Client", readable: bool) -> None:
        """The next piece of whoever has waited longest.  What is ready stays so: all are called again in each turn."""
        self._queue[client] = None
        if time.monotonic() < self._next_piece or next(iter(self._queue)) is not client:
            return
        del self._queue[client]
        try:
            open_still = client.step(self._answer, readable)
        except OSError:  # it went away
            open_still = False
        except BaseException:
            self._drop(client)
            raise
        if open_still and client.waits_for is not None:
            # Not watched meanwhile: it is ready for writing all the time, and the loop would never sleep.
            self._server.unwatch(client.connection.fileno())
            client.waits_for.when_done(lambda: self._go_on(client))
        elif open_still:
            self._watch(client)
        else:
            self._drop(client)
        self._next_piece = time.monotonic() + PAUSE

    def _go_on(self, client: "_Client") -> None:
        client.waits_for = None
        if client in self._clients.values():  # not dropped meanwhile
            self._watch(client)

    def _watch(self, client: "_Client") -> None:
        self._server.watch(
            client.connection.fileno(),
            lambda readable, _writable: self._serve(client, readable),
            reading=not client.busy,
            writing=client.busy,
        )

    def _drop(self, client: "_Client") -> None:
        self._server.unwatch(client.connection.fileno())
        self._queue.pop(client, None)
        del self._clients[client.connection.fileno()]
        client.close()

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _answer(self, line: bytes, caller: Caller) -> Generator[dict[str, Any] | Pending]:
        try:
            request = _decode(line)
            do = str(request.get("do"))
            if do in self._requests and do not in FOR_GROUP and not self._is_owner(caller):
                yield _denied(f"{do} is for {self._owners} alone, not for all members of {self._group}")
                return
            yield from self._requests.get(do, self._unknown)(request, caller)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            yield {"error": "a request is one JSON object a line"}
        except (RequestError, ValueError) as error:
            yield {"error": str(error)}

    def _unknown(self, request: Mapping[str, Any], _caller: Caller) -> Answer:
        yield {"error": f"no request {str(request.get('do'))[:40]!r}; there are {', '.join(self._requests)}"}

    def _status(self, _request: Mapping[str, Any], _caller: Caller) -> Answer:
        gate = self._guard.gate
        yield {
            "end": True,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "observe": self._guard.settings.observe,
            "exempt": [str(network) for network in self._guard.exempt],
            **self._server.counters(),
            "table": {
                "running": self._table.running,
                "remembered": self._table.remembered,
                "evictions": self._table.evictions,
                "size": self._guard.settings.table_size,
            },
            "gate": gate and gate.status(),
            "catalog": self._catalog and self._catalog.status(),
        }

    def _list(self, request: Mapping[str, Any], _caller: Caller) -> Answer:
        network = None if request.get("network") is None else _network(_text(request, "network"))
        in_kernel: set[bytes] | None = None
        preloaded: list[str] = []
        if self._guard.gate is not None:
            in_kernel = set()
            for _ in self._guard.gate.survey(in_kernel, preloaded):
                yield PIECE_ENDS
        for record in self._running():
            if record is None:
                yield PIECE_ENDS
            elif _within(record.source, network):
                yield self._shown(record, in_kernel)
        for source in preloaded:
            if _within(source, network):
                yield {"source": source, "reason": "preloaded"}
        yield {"end": True, "running": self._table.running}

    def _add(self, request: Mapping[str, Any], caller: Caller) -> Answer:
        source, seconds = _text(request, "source"), request.get("seconds", self._guard.settings.timeout)
        note = None if request.get("reason") is None else _text(request, "reason")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 1 <= seconds <= LONGEST:
            raise RequestError(f"a time-out of {seconds!r:.20} s: it must be 1 s to {LONGEST // 86400} days")
        if note and len(note) > MAX_NOTE:
            raise RequestError(f"a reason of {len(note)} characters: it must be at most {MAX_NOTE}")
        if sources.holds(self._guard.exempt, source_text(source, self._table.ipv6_prefix)):
            raise RequestError(f"{source} is exempt: take it out of `exempt` first, then send the server a SIGHUP")
        record = self._server.time_out(source, int(seconds * NS))
        if note:
            self._guard.notes[record.source] = note
        _say(caller, "bans.add", source=record.source, seconds=float(seconds), note=note)
        yield {"end": True, **self._shown(record, None)}

    def _remove(self, request: Mapping[str, Any], caller: Caller) -> Answer:
        network = _network(_text(request, "source"))
        if not _is_source(network, self._table.ipv6_prefix):
            yield from self._lift_within(network, caller)
            return
        source = source_text(str(network.network_address), self._table.ipv6_prefix)
        running = self._table.find(source, time.monotonic_ns()) is not None
        known, gate = self._server.lift(source), self._guard.gate
        if running or known:
            _say(caller, "bans.remove", source=source, removed=int(running))
        # What was written here goes at the end of this turn; somebody else's entry stays, and goes on dropping.
        others = gate and gate.others(packed(source))
        yield {"end": True, "removed": int(running), "forgotten": known and not running, "others": others}

    def _clear(self, _request: Mapping[str, Any], caller: Caller) -> Answer:
        yield from self._lift_within(None, caller)

    def _lift_within(self, network: "sources.Network | None", caller: Caller) -> Answer:
        count = 0
        try:
            for record in self._running():
                if record is None:
                    yield PIECE_ENDS
                elif _within(record.source, network):
                    count += self._server.lift(record.source)
        finally:  # also where he went away in the middle: what was lifted until then stays so
            if count:
                _say(caller, "bans.remove" if network else "bans.clear", source=network, removed=count)
        yield {"end": True, "removed": count}

    def _reset(self, request: Mapping[str, Any], caller: Caller) -> Answer:
        if self._catalog is None:
            raise RequestError("this server has no catalogue")
        try:
            account = _text(request, "user")
            later = self._catalog.reset(account)
            _say(caller, "user.reset", account=account)
            yield later.pending
            made: Any = later.result()
        except OperationError as error:
            raise RequestError(str(error)) from error
        yield {"end": True, "password": made.password, "sequence": made.sequence, "hash": made.hash.hex()}

    # ---- records ----------------------------------------------------------------------------------------------------

    def _running(self) -> Iterator[TimeoutRecord | None]:
        """All that runs; None ends a piece, so that the loop goes on with the others."""
        place: int | None = 0
        while place is not None:
            records, place = self._table.page(place, PIECE, time.monotonic_ns())
            yield from records
            yield None

    def _shown(self, record: TimeoutRecord, in_kernel: Container[bytes] | None) -> dict[str, Any]:
        now = time.monotonic_ns()
        return {
            "source": record.source,
            "reason": REASONS[record.reason][0],
            "since": _utc((time.time_ns() - now + record.start) // NS),
            "ends_in_s": (record.end - now) // 1_000_000 / 1000,
            "before": record.before,
            "dropped": record.dropped,
            "in_kernel": None if in_kernel is None else packed(record.source) in in_kernel,
            "looks": spoke.NAMES[record.spoke],
            "note": self._guard.notes.get(record.source),
        }


class _Client:
    """One connection: lines in, an answer out, piece by piece."""

    def __init__(self, connection: socket.socket, caller: Caller) -> None:
        self.connection = connection
        self.caller = caller
        self._in = b""
        self._out = b""
        self._answer: Generator[dict[str, Any] | Pending] | None = None
        self.waits_for: Pending | None = None  # for the rest of the answer
        self._last = False  # after this answer the connection ends

    @property
    def busy(self) -> bool:
        """Whether there is something to do without reading."""
        return self._answer is not None or bool(self._out) or b"\n" in self._in

    def close(self) -> None:
        """Ends an answer that is under way, too, so that it says what it has done."""
        if self._answer is not None:
            self._answer.close()
        self.connection.close()

    def step(self, answer: Callable[[bytes, Caller], Generator[dict[str, Any] | Pending]], readable: bool) -> bool:
        """What the socket did not take, else the next piece, else the next line; False: the connection is over."""
        if not self.busy and readable and not self._read():
            return False
        if self._answer is None and not self._out and (line := self._next_line()) is not None:
            self._answer = answer(line, self.caller)
        if self._answer is not None and not self._out:
            self._make_piece(self._answer)
        if self._out:
            with suppress(BlockingIOError):
                self._out = self._out[self.connection.send(self._out) :]
        return self.busy or not self._last

    def _read(self) -> bool:
        """False at the end of the stream."""
        try:
            data = self.connection.recv(MAX_REQUEST)
        except BlockingIOError:
            return True
        self._in += data
        return bool(data)

    def _next_line(self) -> bytes | None:
        line, end, rest = self._in.partition(b"\n")
        if not end and len(line) <= MAX_REQUEST:
            return None
        self._last = len(line) > MAX_REQUEST  # where the next line begins is not worth waiting for
        self._in = b"" if self._last else rest
        return line

    def _make_piece(self, answer: Answer) -> None:
        lines: list[bytes] = []
        for item in answer:
            if isinstance(item, Pending):
                self.waits_for = item
                break
            if item is PIECE_ENDS:
                break
            lines.append(_encode(item))
        else:
            self._answer = None
        self._out = b"".join(line + b"\n" for line in lines)


# ---- the socket, and who is behind it -------------------------------------------------------------------------------


def find_group(name: str) -> int | None:
    """The id of a group, given by name or number; None for "".  Raises ControlError.

    Also where this user could not give it the socket: said here, where nothing is made yet.
    """
    if not name:
        return None
    try:
        gid = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        gid = -1
    if not 0 <= gid < (1 << 32) - 1:  # the last number means "no change" to chown(2)
        raise ControlError(f"--control-group {name}: there is no such group: name one of /etc/group, or a number")
    if os.geteuid() != 0 and gid not in (os.getegid(), *os.getgroups()):
        raise ControlError(_cannot_give(gid))
    return gid


def open_socket(path: Path, group: int | None) -> ControlSocket:
    """The listening socket: for this user alone (0600), or for the group too (0660).  Raises ControlError.

    Called as the user that the server will be, with the group among its own: it is made where that user can write.
    We hold the data directory's lock: a name that is there was left by a killed server.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)  # made with its mode: nobody gets in between bind and chmod
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
        listener.bind(str(path))
        if group is not None:
            _give_to(path, group)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        remedy = "move away what is there, or name another directory with a shorter path, with --data"
        raise ControlError(f"control socket {path}: {error.strerror or error}: {remedy}") from error
    except ControlError:
        listener.close()
        path.unlink()
        raise
    finally:
        os.umask(mask)
    return ControlSocket(listener, path, group, reachable=group is None or _let_in(path.parent, group))


def _give_to(path: Path, group: int) -> None:
    try:
        os.chown(path, -1, group)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):  # EINVAL: not a group of this user namespace
            raise
        raise ControlError(_cannot_give(group)) from error
    path.chmod(0o660)


def _cannot_give(group: int) -> str:
    me, name = _user_name(os.geteuid()), _group_name(group)
    remedy = f"make {me} a member of it (usermod -aG {name} {me}), or start as root"
    return f"--control-group {name}: {me} cannot give it the control socket: {remedy}"


def _let_in(folder: Path, group: int) -> bool:
    """Let the group through the folder to the socket, but not see what else is there: 0710.  Returns whether it can.

    Only where no other group has rights to lose; what the operator has arranged (access control lists, too) stays.
    """
    status = folder.stat()
    through = stat.S_IXGRP if status.st_gid == group else stat.S_IXOTH
    if status.st_mode & through:
        return True
    if not status.st_mode & stat.S_IRWXG:
        with suppress(PermissionError):  # it is another user's
            os.chown(folder, -1, group)
            folder.chmod(stat.S_IMODE(status.st_mode) | stat.S_IXGRP)
            return True
    return False


def _caller(connection: socket.socket) -> Caller:
    _, uid, gid = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    # By getsockopt(2) itself: Python's gives at most 1 KiB, which is 256 groups, and a directory service may give more.
    groups = (ctypes.c_uint32 * NGROUPS_MAX)()
    size = ctypes.c_uint32(ctypes.sizeof(groups))
    failed = _libc.getsockopt(connection.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, groups, ctypes.byref(size))
    # A kernel without it (before 4.13) gives the primary group alone.
    return Caller(uid, frozenset((gid, *groups[: 0 if failed else size.value // ctypes.sizeof(ctypes.c_uint32)])))


@lru_cache(64)  # asked once of a user: a directory service may take its time
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _say(caller: Caller, do: str, **fields: object) -> None:
    log.event(logging.INFO, "done by hand", request=do, **fields, uid=caller.uid, user=_user_name(caller.uid))


def _denied(text: str) -> dict[str, Any]:
    return {"error": text, "denied": True}


# ---- what was asked -------------------------------------------------------------------------------------------------


def _decode(line: bytes) -> Mapping[str, Any]:
    if len(line) > MAX_REQUEST:
        raise RequestError(f"a request of over {MAX_REQUEST} bytes: it must be one JSON object a line, and shorter")
    return msgspec.json.decode(line, type=dict[str, Any])


@lru_cache(1024)  # a list of 50,000 has few different seconds, and each text costs as much as all else in its line
def _utc(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _text(request: Mapping[str, Any], name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str):
        raise RequestError(f"the request needs {name!r}, a text")
    return value


def _network(text: str) -> sources.Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise RequestError(f"{text!r} is no address or network: {error}") from None


def _is_source(network: sources.Network, ipv6_prefix: int) -> bool:
    """Whether it stands for one source.  A link-local address is one by itself, so its /64 is many."""
    if network.version == 6 and network.prefixlen == ipv6_prefix:
        return not network.is_link_local
    return network.num_addresses == 1


def _within(source: str, network: "sources.Network | None") -> bool:
    return network is None or sources.holds((network,), source)
