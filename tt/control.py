"""The control socket: a Unix socket in the data directory through which `tt bans` and `tt status` speak to the server.

    request   one JSON object a line: {"do": "bans.add", "source": "192.0.2.1", "seconds": 600}
    answer    JSON objects, a line each, the last one {"end": true, …} or {"error": "one line"}

The loop serves it between the turns of the connections: an answer is made in pieces, which delay nobody each, and a
client that does not read holds up its own answer alone.  Who may open the socket may do all of this: its mode is 0660.
It must not know the network protocol, nor how the command line shows an answer.
"""

import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import msgspec

from tt import __version__, sources, spoke
from tt._core import REASONS, Server, TimeoutRecord, TimeoutTable, source_text
from tt.guard import Guard

MODE = 0o660
MAX_CLIENTS = 32  # at a time; the one that has been there longest gives way
MAX_REQUEST = 16 * 1024  # bytes of a line
PIECE = 128  # places of the table looked at in one turn of the loop: about 0.3 ms when all are taken
LONGEST = 30 * 86400  # s
NS = 1_000_000_000

Answer = Iterator[dict[str, Any]]
PIECE_ENDS: dict[str, Any] = {}  # in an answer: here the loop goes on with the others
_encode = msgspec.json.Encoder().encode


class ControlError(Exception):
    """The socket cannot be made; the text is one line that names it, the rule and the remedy."""


class RequestError(Exception):
    """A request cannot be done; the text is one line for who asked."""


class Control:
    """The listening socket and what can be asked; all calls are the loop's thread."""

    def __init__(self, path: Path, server: Server, table: TimeoutTable, guard: Guard) -> None:
        self._path = path
        self._server = server
        self._table = table
        self._guard = guard
        self._started = time.monotonic()
        self._clients: dict[int, _Client] = {}
        self._requests: Mapping[str, Callable[[Mapping[str, Any]], Answer]] = {
            "status": self._status,
            "bans.list": self._list,
            "bans.add": self._add,
            "bans.remove": self._remove,
            "bans.clear": self._clear,
        }
        self._listener = _listen(path)
        server.watch(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """At the end of the server: no socket and no client is left."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._server.unwatch(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)

    # ---- clients ----------------------------------------------------------------------------------------------------

    def _accept(self, _readable: bool, _writable: bool) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again, or no descriptor: the next turn tries again
            return
        connection.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(next(iter(self._clients.values())))
        client = _Client(connection)
        self._clients[connection.fileno()] = client
        self._server.watch(connection.fileno(), lambda readable, writable: self._serve(client, readable, writable))

    def _serve(self, client: "_Client", readable: bool, _writable: bool) -> None:
        try:
            if client.answering:
                client.write()
            elif readable and not client.read():
                self._drop(client)
                return
            while not client.answering and (line := client.next_line()) is not None:
                client.answer(self._answer(line))
                client.write()
        except OSError:
            self._drop(client)
            return
        self._server.watch(
            client.connection.fileno(),
            lambda readable, writable: self._serve(client, readable, writable),
            reading=not client.answering,
            writing=client.answering,
        )

    def _drop(self, client: "_Client") -> None:
        self._server.unwatch(client.connection.fileno())
        del self._clients[client.connection.fileno()]
        client.connection.close()

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _answer(self, line: bytes) -> Answer:
        try:
            request = msgspec.json.decode(line, type=dict[str, Any])
            yield from self._requests.get(str(request.get("do")), self._unknown)(request)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            yield {"error": "a request is one JSON object a line"}
        except (RequestError, ValueError) as error:
            yield {"error": str(error)}

    def _unknown(self, request: Mapping[str, Any]) -> Answer:
        yield {"error": f"no request {str(request.get('do'))[:40]!r}; there are {', '.join(self._requests)}"}

    def _status(self, _request: Mapping[str, Any]) -> Answer:
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
        }

    def _list(self, request: Mapping[str, Any]) -> Answer:
        network = _network(request["network"]) if request.get("network") else None
        for record in self._running():
            if record is None:
                yield PIECE_ENDS
            elif _within(record.source, network):
                yield self._shown(record)
        count = self._table.running
        if self._guard.gate is not None:
            yield from ({"source": source, "reason": "preloaded"} for source in self._guard.gate.preloaded())
        yield {"end": True, "running": count}

    def _add(self, request: Mapping[str, Any]) -> Answer:
        source, seconds = _text(request, "source"), request.get("seconds", self._guard.settings.timeout)
        if not isinstance(seconds, (int, float)) or not 1 <= seconds <= LONGEST:
            raise RequestError(f"a time-out of {seconds!r} s: it must be 1 s to {LONGEST // 86400} days")
        if sources.holds(self._guard.exempt, source_text(source, self._table.ipv6_prefix)):
            raise RequestError(f"{source} is exempt: take it out of `exempt` first")
        record = self._server.time_out(source, int(seconds * NS))
        if note := request.get("reason"):
            self._guard.notes[record.source] = str(note)[:200]
        yield {"end": True, **self._shown(record)}

    def _remove(self, request: Mapping[str, Any]) -> Answer:
        text = _text(request, "source")
        network = _network(text)
        if network.num_addresses == 1 or (network.version == 6 and network.prefixlen == self._table.ipv6_prefix):
            yield {"end": True, "removed": int(self._server.lift(text))}
            return
        yield from self._lift_within(network)

    def _clear(self, _request: Mapping[str, Any]) -> Answer:
        yield from self._lift_within(None)

    def _lift_within(self, network: "sources.Network | None") -> Answer:
        count = 0
        for record in self._running():
            if record is None:
                yield PIECE_ENDS
            elif _within(record.source, network):
                count += self._server.lift(record.source)
        yield {"end": True, "removed": count}

    # ---- records ----------------------------------------------------------------------------------------------------

    def _running(self) -> Iterator[TimeoutRecord | None]:
        """All that runs; None ends a piece, so that the loop goes on with the others."""
        place: int | None = 0
        while place is not None:
            records, place = self._table.page(place, PIECE, time.monotonic_ns())
            yield from records
            yield None

    def _shown(self, record: TimeoutRecord) -> dict[str, Any]:
        now = time.monotonic_ns()
        since = datetime.fromtimestamp(time.time() - (now - record.start) / NS, UTC)
        return {
            "source": record.source,
            "reason": REASONS[record.reason][0],
            "since": since.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "ends_in_s": round((record.end - now) / NS, 3),
            "before": record.before,
            "dropped": record.dropped,
            "in_kernel": self._guard.in_kernel(record.source),
            "looks": spoke.NAMES[record.spoke],
            "note": self._guard.notes.get(record.source),
        }


class _Client:
    """One connection: lines in, an answer out, piece by piece."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._in = b""
        self._out = b""
        self._answer: Answer | None = None

    @property
    def answering(self) -> bool:
        return self._answer is not None or bool(self._out)

    def read(self) -> bool:
        """False at the end of the stream, or of our patience."""
        try:
            data = self.connection.recv(MAX_REQUEST)
        except BlockingIOError:
            return True
        self._in += data
        return bool(data) and (len(self._in) <= MAX_REQUEST or b"\n" in self._in)

    def next_line(self) -> bytes | None:
        line, end, rest = self._in.partition(b"\n")
        if not end:
            return None
        self._in = rest
        return line

    def answer(self, answer: Answer) -> None:
        self._answer = answer

    def write(self) -> None:
        """What the socket did not take, or the next piece."""
        if not self._out and self._answer is not None:
            lines: list[bytes] = []
            for item in self._answer:
                if item is PIECE_ENDS:
                    break
                lines.append(_encode(item) + b"\n")
            else:
                self._answer = None
            self._out = b"".join(lines)
        try:
            self._out = self._out[self.connection.send(self._out) :] if self._out else b""
        except BlockingIOError:
            return


def _listen(path: Path) -> socket.socket:
    """The listening socket.  We hold the data directory's lock: a name that is there was left by a killed server."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o777 & ~MODE)  # made with its mode: nobody gets in between bind and chmod
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
        listener.bind(str(path))
        listener.listen(MAX_CLIENTS)
    except OSError as error:
        listener.close()
        remedy = "move away what is there, or name another directory with a shorter path, with --data"
        raise ControlError(f"control socket {path}: {error.strerror or error}: {remedy}") from error
    finally:
        os.umask(mask)
    return listener


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


def _within(source: str, network: "sources.Network | None") -> bool:
    return network is None or sources.holds((network,), source)
