"""Assembles a server and runs it: configuration, key, log, time-out table, listeners, loop; and takes all down again.

Rules: whatever is wrong before the loop runs is one line for the operator and exit code 2; nothing is left half made.
Once it runs, a failure of our own is logged and never ends the service.  Signals come through the loop: SIGTERM and
SIGINT end it, SIGHUP reads the configuration again.
It must not know what a frame holds (dispatch.py) nor which bytes are a verdict (the extension).
"""

import ctypes
import errno
import logging
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from tt import __version__, config, keys, known_servers, log, sources
from tt._core import Server, TimeoutTable
from tt.dispatch import Dispatcher
from tt.guard import Guard

PROCESS_NAME = b"TapeTrackServer"  # 15 bytes: all that the kernel keeps as a thread's name
SPARE_DESCRIPTORS = 256  # for all that is no client: listeners, files, the log, threads
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_NAME = 15
# Another thread that wants the GIL gets it after this, and the loop gets it back as soon: s.
SWITCH_INTERVAL = 0.0005


class StartError(Exception):
    """The server cannot start; the text is one line that names the thing, the rule and the remedy."""


def main(settings: config.Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit code: 0, or 2 with one line on stderr."""
    try:
        return _serve(settings)
    except (StartError, keys.KeyFileError) as error:
        print(f"tt: {error}", file=sys.stderr)
        return 2


def _serve(settings: config.Config) -> int:
    data = _data_directory(settings.data)
    key, created = keys.create_or_load(data)
    places = _places(settings.max_connections)
    gateways = _gateways()
    listeners = open_listeners(settings)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # before any thread starts: threads inherit it
    sys.setswitchinterval(SWITCH_INTERVAL)
    _name_process()
    handler = log.start(settings.log_format, limit=settings.log_buffer)
    try:
        if created:
            log.event(logging.INFO, "server key made", file=str(data / keys.PRIVATE_FILE))
        table = TimeoutTable(settings.table_size, ipv6_prefix=settings.ipv6_prefix, now=time.monotonic_ns())
        guard = Guard(settings, table, data / "timeouts", gateways, handler)
        guard.restore()
        application = Application(settings, Dispatcher([key], {}), guard)
        addresses = [listener.getsockname() for listener in listeners]
        server = Server(
            [listener.detach() for listener in listeners], places, table, application, settings,
            exempt=guard.exempt, signals=SIGNALS,
        )  # fmt: skip
        application.serve(server)
        _enter_known_servers(addresses, key.public)
        _say_started(addresses, key.public, settings, places)
        server.run()
        guard.save_now()
        log.event(logging.INFO, "stopped")
    finally:
        handler.close()
    return 0


class Application:
    """What the loop calls: strangers' HELLOs go to the dispatcher, time-outs and the clock to the guard."""

    def __init__(self, settings: config.Config, dispatcher: Dispatcher, guard: Guard) -> None:
        self._settings = settings
        self._guard = guard
        self._server: Server
        self.hello = dispatcher.hello
        self.turn = guard.turn
        self.failed = guard.failed

    def serve(self, server: Server) -> None:
        """The loop that calls, for what changes it."""
        self._server = server
        self._guard.counters = server.counters

    def tick(self) -> None:
        """About once a second."""
        self._guard.tick()

    def signal(self, number: int) -> None:
        """SIGHUP: read the configuration again; else stop."""
        if number == signal.SIGHUP:
            self._reload()
            return
        log.event(logging.INFO, "stopping", signal=signal.Signals(number).name)
        self._server.stop()

    def _reload(self) -> None:
        try:
            settings, held = config.reload(self._settings)
        except config.ConfigError as error:
            log.event(logging.ERROR, "configuration not reloaded, the running one stays", error=str(error))
            return
        self._settings = settings
        self._guard.configure(settings, _gateways())
        self._server.configure(settings, self._guard.exempt)
        log.event(logging.INFO, "configuration reloaded", needs_restart=",".join(held) or None)


# ---- the parts ------------------------------------------------------------------------------------------------------


def _name_process() -> None:
    """Be TapeTrackServer to `ps`, `pidof` and `perf`: as the thread's name, and as the command line."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, PROCESS_NAME, 0, 0, 0)
    # Fields 48 and 49 of proc(5)'s stat: where the command line lies in our memory.  The interpreter has its own copy.
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    line = b"\0".join([PROCESS_NAME, *map(os.fsencode, sys.argv[1:])])[: end - start - 1]
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


def _data_directory(path: Path) -> Path:
    path = path.absolute()  # the working directory may be another one later
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        _refuse(f"data directory {path}", error, "name one that can be made, with --data")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StartError(f"data directory {path}: not writable: give it to this user, or name another with --data")
    return path


def _places(configured: int) -> int:
    """How many connections: as configured, within what the descriptor limit leaves.  The soft limit is raised first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    room = hard - SPARE_DESCRIPTORS
    if room < 1:
        raise StartError(f"descriptor limit {hard}: it must be over {SPARE_DESCRIPTORS}: raise it (ulimit -Hn)")
    most = config.OPTIONS["max_connections"].most
    return int(min(configured or most, room, most))


def _gateways() -> tuple[sources.Network, ...]:
    try:
        return sources.gateways()
    except OSError as error:
        raise StartError(f"gateways: netlink does not answer: {error.strerror}: allow AF_NETLINK sockets") from error


def open_listeners(settings: config.Config) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    try:
        for address in settings.listen:
            listener = _listen(address, settings)
            if listener is not None:
                listeners.append(listener)
    except StartError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen(address: config.Address, settings: config.Config) -> socket.socket | None:
    """A listener, or None for the default IPv6 one on a host without IPv6."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    by_default = settings.origin("listen") == config.DEFAULT
    try:
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        if by_default and family == socket.AF_INET6:
            _say_left_out(address)
            return None
        _refuse(f"{address}", error, "leave the address out with --listen")
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Both are inherited by what is accepted: a drop is then accept and close, with a reset and nothing left behind.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((address.host, address.port))
        listener.listen(settings.backlog)
    except OSError as error:
        listener.close()
        if by_default and family == socket.AF_INET6 and error.errno == errno.EADDRNOTAVAIL:
            _say_left_out(address)
            return None
        _refuse(f"{address}", error, "name a free address and port with --listen, or stop who has it (ss -ltnp)")
    return listener


def _say_left_out(address: config.Address) -> None:
    print(f"tt: {address}: no IPv6 on this host: listening on IPv4 alone", file=sys.stderr)


def _refuse(what: str, error: OSError, remedy: str) -> NoReturn:
    raise StartError(f"{what}: {error.strerror or error}: {remedy}") from error


def _enter_known_servers(addresses: Iterable[Sequence[object]], public: bytes) -> None:
    """So that the first `tt ping 127.0.0.1` of the user who starts the server just works."""
    loopback = {"0.0.0.0": ["127.0.0.1", "localhost"], "::": ["::1"]}  # noqa: S104 - a look-up, not a bind
    for host, port, *_ in addresses:
        for name in loopback.get(str(host), [str(host)]):
            try:
                known_servers.add(name, int(str(port)), public)
            except (known_servers.KnownServersError, OSError) as error:
                log.event(logging.WARNING, "not entered into known servers", server=name, error=str(error))
                return


def _say_started(addresses: Iterable[Sequence[object]], public: bytes, settings: config.Config, places: int) -> None:
    for host, port, *_ in addresses:
        log.event(logging.INFO, "listening", address=str(config.Address(str(host), int(str(port)))))
    log.event(
        logging.INFO, "started", version=__version__, pid=os.getpid(), key=keys.to_text(public), connections=places,
        observe=settings.observe or None,
    )  # fmt: skip
