"""The control socket: a Unix socket in the data directory, through which commands on this host ask the server.

    request   one JSON object a line: {"do": "bans.add", "source": "192.0.2.1", "seconds": 600}
    answer    JSON objects, a line each, the last one {"end": true, ...} or {"error": "one line"}

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
import socket
import stat
import struct
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tt import log
from tt._core import Server
from tt.asking import PIECE_ENDS, Answer, Caller, RequestError, user_name
from tt.ban_history import Coming
from tt.pending import Pending
from tt.requests import Requests

# What the service group may ask for: all of an operator's day.  Not an account of the catalogue: who may give one out
# can make himself its administrator, and that is for root to allow.  A new request is not theirs until it is here.
FOR_GROUP = frozenset((
    "status", "bans.list", "bans.add", "bans.import", "bans.remove", "bans.clear", "bans.history", "bans.watch",
    "exempt.list", "exempt.add", "exempt.remove",
))  # fmt: skip
SO_PEERGROUPS = 59  # asm-generic/socket.h; Python does not name it
NGROUPS_MAX = 65536  # credentials(7)
BACKLOG = 128  # clients that the kernel holds until they are accepted, one a turn
MAX_CLIENTS = 32  # at a time; the one that has been there longest gives way
MAX_REQUEST = 16 * 1024  # bytes of a line
PAUSE = 0.0001  # s between pieces: longer than what a turn takes from one client's call to the next one's

_encode = msgspec.json.Encoder().encode
_libc = ctypes.CDLL(None)


class ControlError(Exception):
    """The socket cannot be made; the text is one line that names it, the rule and the remedy."""


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
    """The clients of the socket, and who of them may ask for what; all calls are the loop's thread."""

    def __init__(self, door: ControlSocket, server: Server, requests: Requests) -> None:
        """The user that this process is by now is the one who may do all."""
        self._door = door
        self._listener = door.listener
        self._uid = os.geteuid()
        self._owners = f"root and {user_name(self._uid)}" if self._uid else "root"
        self._group = _group_name(door.group) if door.group is not None else None
        self._server = server
        self._requests_tick = requests.tick
        self._requests = requests.all
        self._clients: dict[int, _Client] = {}
        self._queue: dict[_Client, None] = {}  # who can go on, in the order of becoming so
        self._next_piece = 0.0  # not before this, monotonic s
        self._pausing = False  # for want of descriptors nobody is taken until the next tick
        server.watch(self._listener.fileno(), self._accept)
        if not door.reachable:
            words, folder = "the data directory may be closed to the control group", door.path.parent
            remedy = f"chgrp {self._group} {folder}; chmod g+x {folder}"
            log.event(logging.WARNING, words, group=self._group, remedy=remedy)

    def close(self) -> None:
        """At the end of the server: no socket and no client is left."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._requests_tick()
        self._server.unwatch(self._listener.fileno())
        self._door.close()

    def tick(self) -> None:
        """About once a second: what is due; and clients are taken again after a pause for want of descriptors."""
        self._requests_tick()
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
            # Not watched for writing meanwhile: it is ready all the time, and the loop would never sleep.
            self._server.unwatch(client.connection.fileno())
            if isinstance(client.waits_for, Coming):  # perhaps never: then his going away is all that can be seen
                self._server.watch(client.connection.fileno(), lambda _readable, _writable: self._drop(client))
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
    me, name = user_name(os.geteuid()), _group_name(group)
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


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _denied(text: str) -> dict[str, Any]:
    return {"error": text, "denied": True}


def _decode(line: bytes) -> Mapping[str, Any]:
    if len(line) > MAX_REQUEST:
        raise RequestError(f"a request of over {MAX_REQUEST} bytes: it must be one JSON object a line, and shorter")
    return msgspec.json.decode(line, type=dict[str, Any])
