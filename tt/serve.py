"""Assembles a server and runs it: log, listeners, data directory, key, time-out table, loop, catalogue; and takes all
down again.

Rules: whatever is wrong before the loop runs is one line for the operator and exit code 2; the listeners come before
anything is written, so that a start that fails leaves nothing behind.  Once it runs, a failure of our own is logged and
never ends the service.  Signals come through the loop: SIGTERM and SIGINT end it, SIGHUP reads the configuration again.
It must not know what a frame holds (dispatch.py) nor which bytes are a verdict (the extension).
"""

import ctypes
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from tt import __version__, config, data_lock, keys, known_servers, log, metrics, metrics_http, privileges, sources
from tt._core import REASON_CODES, Connection, Server, TimeoutTable
from tt.catalog.service import Service
from tt.catalog.store import StoreError
from tt.control import Control, ControlError, ControlSocket, find_group, open_socket
from tt.data_lock import DataInUseError
from tt.dispatch import Dispatcher, Session
from tt.guard import Guard
from tt.kernel_gate import GateError, KernelGate
from tt.listeners import ListenError, addresses, open_listeners
from tt.privileges import PrivilegesError
from tt.requests import Requests
from tt.systemd import Manager, ManagerError, Passed, take_passed

PROCESS_NAME = b"TapeTrackServer"  # 15 bytes: all that the kernel keeps as a thread's name
SPARE_DESCRIPTORS = 256  # for all that is no client: listeners, files, the log, threads
SOCKET_PATH = 107  # bytes of a Unix socket's path (unix(7))
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_NAME = 15
VOUCHED = 4096  # sources that are vouched for, in each family; the one that was first gives way
VOUCHED_FOR = 86_400_000_000_000  # ns since its last good login
# Another thread that wants the GIL gets it after this, and the loop gets it back as soon: s.
SWITCH_INTERVAL = 0.0005


class StartError(Exception):
    """The server cannot start; the text is one line that names the thing, the rule and the remedy."""


def main(settings: config.Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit code: 0, 1 if the time-outs were not saved, 2 with one line on stderr."""
    _fill_standard_descriptors()
    try:
        with ExitStack() as ends:
            return 0 if _serve(settings, ends) else 1
    except (
        StartError, DataInUseError, keys.KeyFileError, GateError, ControlError, PrivilegesError, StoreError,
        ListenError, ManagerError, metrics_http.MetricsError,
    ) as error:  # fmt: skip
        # Escaped: a path may hold a line break.  And not by print(), which takes stdout where stderr was closed.
        os.write(2, b"tt: " + str(error).encode("unicode_escape") + b"\n")
        return 2


class _Opened(NamedTuple):
    """What a server stands on: all that can fail for want of a right or a place, before anything runs."""

    handler: log.Handler
    manager: Manager
    passed: list[Passed]
    user: privileges.User | None
    places: int
    gateways: tuple[sources.Network, ...]
    gate: KernelGate | None
    listeners: list[socket.socket]
    for_metrics: list[socket.socket]
    data: Path
    key: keys.ServerKey
    old_key: keys.ServerKey | None
    door: ControlSocket


def _open(settings: config.Config, ends: ExitStack) -> _Opened:
    handler = _log(settings)
    ends.callback(handler.close)
    manager = Manager(os.environ)
    ends.callback(manager.close)
    passed = take_passed(os.environ)
    user = privileges.find(settings.user)
    group = find_group(settings.control_group)
    places = _places(settings.max_connections)
    gateways = _gateways(settings)
    gate = _gate(settings)
    if gate is not None:
        ends.callback(gate.close)
    listeners = open_listeners(settings, gate, passed)
    for_metrics = metrics_http.open_listeners(settings.metrics)
    for listener in (*listeners, *for_metrics):
        ends.callback(listener.close)
    data = _data_directory(settings.data)
    privileges.hand_over(data, user)
    with privileges.acting_as(_member(user, group)):
        _check_writable(data)
        ends.callback(os.close, data_lock.take(data))
        key, created = keys.create_or_load(data)
        old_key = keys.load_old(data)
        door = open_socket(data / config.CONTROL_SOCKET, group)
        ends.callback(door.close)
    if created:
        log.event(logging.INFO, "server key made", file=str(data / keys.PRIVATE_FILE))
    if old_key is not None and old_key.public == key.public:
        remedy = "to change the key, move server.key there instead of copying it, and restart"
        log.event(logging.WARNING, "old key is the key in force", file=str(data / keys.OLD_FILE), remedy=remedy)
        old_key = None
    return _Opened(
        handler, manager, passed, user, places, gateways, gate, listeners, for_metrics, data, key, old_key, door
    )  # fmt: skip


def _serve(settings: config.Config, ends: ExitStack) -> bool:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # before any thread starts: threads inherit it
    sys.setswitchinterval(SWITCH_INTERVAL)
    opened = _open(settings, ends)
    gate, where = opened.gate, addresses(opened.listeners)
    _name_process()
    try:
        table = TimeoutTable(settings.table_size, ipv6_prefix=settings.ipv6_prefix, now=time.monotonic_ns())
        vouched = TimeoutTable(VOUCHED, ipv6_prefix=settings.ipv6_prefix, now=time.monotonic_ns())
        guard = Guard(settings, table, opened.data / "timeouts", opened.gateways, opened.handler)
        dispatcher = Dispatcher([opened.key, *([opened.old_key] if opened.old_key else [])], {})
        application = Application(settings, dispatcher, guard)
        server = Server(
            [listener.detach() for listener in opened.listeners], opened.places, table, application, settings,
            exempt=guard.exempt, signals=SIGNALS, vouched=vouched,
        )  # fmt: skip
        _enter_known_servers(where, opened.key.public)  # of who started it
        privileges.drop(opened.user, [one.map for one in gate.maps] if gate else [])
        # From here on there are threads: a thread that was there before would have kept its capabilities.
        catalog = Service(opened.data, settings, lambda source: _vouch(vouched, source))
        ends.callback(catalog.close)
        guard.restore(gate)
    except MemoryError as error:
        raise StartError(
            f"not enough memory for {opened.places} connections and 2 x {settings.table_size} timed-out sources: "
            "lower max_connections or --table-size"
        ) from error
    application.serve(server)
    application.offer(catalog, dispatcher)
    requests = Requests(server, table, guard, dispatcher, catalog)
    application.control = control = Control(opened.door, server, requests)
    ends.callback(control.close)
    if opened.for_metrics:
        endpoint = metrics_http.Endpoint(
            opened.for_metrics, server, requests.status.counts, metrics.page_now, metrics.CONTENT_TYPE
        )
        ends.callback(endpoint.close)
    privileges.warn_of_root()
    _warn_of_no_reload(settings)
    _say_started(where, opened, settings)
    opened.handler.flush()
    application.announce(opened.manager, "listening on " + ", ".join(map(str, where)))
    server.run()
    saved = guard.close()
    log.event(logging.INFO, "stopped")
    return saved


class Application:
    """What the loop calls: HELLOs go to the dispatcher, time-outs to the guard, the clock to all."""

    def __init__(self, settings: config.Config, dispatcher: Dispatcher, guard: Guard) -> None:
        self._settings = settings
        self._guard = guard
        self._server: Server
        self._catalog: Service | None = None
        self.control: Control | None = None
        self._manager = Manager({})
        self._status = ""
        self._dispatcher = dispatcher
        self.turn = guard.turn
        self.failed = guard.failed

    def serve(self, server: Server) -> None:
        """The loop that calls, for what changes it."""
        self._server = server
        self._guard.counters = server.counters
        self._guard.lift = server.lift

    def offer(self, catalog: Service, dispatcher: Dispatcher) -> None:
        """The catalogue behind the loop, whose operations the dispatcher has from here on."""
        self._catalog = catalog
        dispatcher.operations, dispatcher.ended = catalog.operations, catalog.ended
        catalog.start(self._server)

    def announce(self, manager: Manager, status: str) -> None:
        """The service manager that from here on hears how it goes: it serves."""
        self._manager, self._status = manager, status
        manager.ready(status)

    def hello(self, connection: Connection, frame: bytes) -> "tuple[Session, bytes] | None":
        """A whole HELLO: the session and the WELCOME, or None where it does not authenticate."""
        answer = self._dispatcher.hello(connection, frame)
        if answer is not None and not connection.proxied:
            self._guard.front.arrived(connection.source, stranger=False)
        return answer

    def tick(self) -> None:
        """About once a second."""
        self._manager.tick()  # first: whatever fails below, it is not for the watchdog to end the others' connections
        self._guard.tick()
        if self._catalog is not None:
            self._catalog.tick(time.monotonic())
        if self.control is not None:
            self.control.tick()

    def signal(self, number: int) -> None:
        """SIGHUP: read the configuration again; else stop."""
        if number == signal.SIGHUP:
            wrong = "a failure of our own"
            self._manager.reloading()
            try:
                wrong = self._reload()
            finally:
                self._manager.ready(f"{self._status}; configuration not reloaded: {wrong}" if wrong else self._status)
        else:
            self._manager.stopping()
            log.event(logging.INFO, "stopping", signal=signal.Signals(number).name)
            self._server.stop()
        self.tick()  # writes the log: who sent the signal waits for its line

    def _reload(self) -> str:
        """Why it could not be done; "" where it is."""
        try:
            settings, held = config.reload(self._settings)
            gateways = _gateways(settings)
        except (config.ConfigError, StartError) as error:
            log.event(logging.ERROR, "configuration not reloaded, the running one stays", error=str(error))
            return str(error)
        self._settings = settings
        self._guard.configure(settings, gateways)
        self._server.configure(settings, self._guard.exempt)
        if self._catalog is not None:
            self._catalog.configure(settings)
        log.event(logging.INFO, "configuration reloaded", needs_restart=",".join(held) or None)
        return ""


# ---- the parts ------------------------------------------------------------------------------------------------------


def _fill_standard_descriptors() -> None:
    """Where 0, 1 or 2 was closed for us, no socket may get that number: a library's message would reach a peer."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _log(settings: config.Config) -> log.Handler:
    try:
        return log.start(settings.log_format, limit=settings.log_buffer)
    except OSError as error:
        _refuse(f"--log-format {settings.log_format}: {log.JOURNAL}", error, "without a journal, text or json")


def _name_process() -> None:
    """Be TapeTrackServer to `ps`, `pidof` and `perf`: as the thread's name, and as the command line."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, PROCESS_NAME, 0, 0, 0)
    with suppress(OSError):  # no /proc: nobody could read the command line either
        # Fields 48 and 49 of proc(5)'s stat: where it lies in our memory.  The interpreter has its own copy.
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        options = sys.argv[2:] if sys.argv[1:2] == ["serve"] else sys.argv[1:]
        line = b"\0".join([PROCESS_NAME, *map(os.fsencode, options)])[: end - start - 1]
        ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


def _data_directory(path: Path) -> Path:
    remedy = "name a directory that can be made or written, with --data"
    try:
        path = path.absolute()  # fails where the working directory is gone
        too_long = len(os.fsencode(path / config.CONTROL_SOCKET)) - SOCKET_PATH
        if too_long > 0:  # said here, where nothing is made yet
            raise StartError(f"data directory {path}: too long by {too_long} bytes for the socket in it: {remedy}")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise StartError(f"data directory {path}: not a directory: {remedy}") from None
    except OSError as error:
        _refuse(f"data directory {path}", error, remedy)
    return path


def _member(user: privileges.User | None, group: int | None) -> privileges.User | None:
    """The user while he gives the group the control socket; the server is to have no rights from that group."""
    return user if user is None or group is None else user._replace(groups=(*user.groups, group))


def _vouch(vouched: TimeoutTable, source: str) -> None:
    now = time.monotonic_ns()
    vouched.expire(now)
    vouched.add(source, REASON_CODES["operator"], VOUCHED_FOR, now)


def _check_writable(data: Path) -> None:
    """For who this process is just now."""
    if not os.access(data, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise StartError(
            f"data directory {data}: not writable: give it to this user, or "
            "name a directory that can be made or written, with --data"
        )


def _warn_of_no_reload(settings: config.Config) -> None:
    """Who was root when the configuration was read may not read it again."""
    path = settings.sources.path
    if path is not None and not os.access(path, os.R_OK):
        remedy = "let the user of --user read it, and enter its folder"
        log.event(logging.WARNING, "a SIGHUP cannot read the configuration again", file=str(path), remedy=remedy)


def _places(configured: int) -> int:
    """How many connections: as configured, within what the descriptor limit leaves.  The soft limit is raised first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    room = hard - SPARE_DESCRIPTORS
    if room < 1:
        raise StartError(f"descriptor limit {hard}: it must be over {SPARE_DESCRIPTORS}: raise it (ulimit -Hn)")
    if configured > room:
        remedy = f"raise the descriptor limit (ulimit -Hn) to {configured + SPARE_DESCRIPTORS}"
        log.event(
            logging.WARNING, "fewer connections than configured", configured=configured, connections=room, remedy=remedy
        )
    most = config.OPTIONS["max_connections"].most
    return int(min(configured or most, room, most))


def _gateways(settings: config.Config) -> tuple[sources.Network, ...]:
    """Without an answer nobody is exempt who should be; where no gateway is, only a warning in the log is lost."""
    try:
        return sources.gateways()
    except OSError as error:
        if "gateways" in settings.exempt:
            _refuse("--exempt gateways: asking netlink", error, "allow AF_NETLINK, or exempt the gateways' addresses")
        log.event(logging.WARNING, "gateways not known: a time-out of one is not pointed out", error=error.strerror)
        return ()


def _gate(settings: config.Config) -> KernelGate | None:
    if not settings.block_map:
        return None
    gate = KernelGate.open(settings.block_map, settings.ipv6_prefix)
    if settings.listener_filter:
        gate.load_filter()
    return gate


def _refuse(what: str, error: OSError, remedy: str) -> NoReturn:
    raise StartError(f"{what}: {error.strerror or error}: {remedy}") from error


def _enter_known_servers(where: Iterable[config.Address], public: bytes) -> None:
    """So that the first `tt ping 127.0.0.1` of the user who starts the server just works."""
    local = ["127.0.0.1", "localhost"]
    loopback = {"0.0.0.0": local, "127.0.0.1": local, "::": ["::1"]}  # noqa: S104 - a look-up, not a bind
    for host, port in where:
        for name in loopback.get(host, [host]):
            try:
                known_servers.add(name, port, public)
            except (known_servers.KnownServersError, OSError) as error:
                log.event(logging.WARNING, "not entered into known servers", server=name, error=str(error))
                return


def _say_started(where: Iterable[config.Address], opened: _Opened, settings: config.Config) -> None:
    passed_as = ",".join(one.name for one in opened.passed) or None
    for address in where:
        log.event(logging.INFO, "listening", address=str(address), passed_as=passed_as)
    log.event(
        logging.INFO, "started", version=__version__, pid=os.getpid(), key=keys.to_text(opened.key.public),
        connections=opened.places, observe=settings.observe or None,
    )  # fmt: skip
    if opened.old_key is not None:
        log.event(
            logging.INFO, "old key in force, too", key=keys.to_text(opened.old_key.public),
            remedy=f"remove {opened.data / keys.OLD_FILE} and restart, when all clients have the new one",
        )  # fmt: skip
    metrics_http.say(opened.for_metrics)
