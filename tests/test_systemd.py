"""A server under a service manager: what it takes over, what it tells, and that a restart refuses nobody."""

import errno
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from activation import FIRST, Manager
from harness import HOST, Events, read_exactly, until
from process import Process, refused

from tt import keys, log, systemd, timeouts
from tt._core import TimeoutTable
from tt.client import Client
from tt.guard import NAMES_STAMP
from tt.noise import consume_welcome, create_hello
from tt.systemd import ManagerError, Passed, take_passed
from tt.wire import DATA, HELLO, Hello, encode_hello, header

BANNED = "127.0.0.9"  # and a digit
THREADS = 4
RESTARTS = 3


# ---- sd_listen_fds(3) -----------------------------------------------------------------------------------------------


def listening(**more: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b", "KEPT": "1"} | more


def test_descriptors_are_counted_from_three_and_named() -> None:
    environ = listening()
    assert take_passed(environ) == [Passed(3, "a"), Passed(4, "b"), Passed(5, "unknown")]
    assert environ == {"KEPT": "1"}, "a program that is started later must not take them for its own"


def test_descriptors_for_another_process_are_not_taken() -> None:
    environ = listening(LISTEN_PID="1")
    assert take_passed(environ) == []
    assert environ == {"KEPT": "1"}
    assert take_passed({}) == []


@pytest.mark.parametrize("count", ["", "three", "-1", "1 ", "9" * 9, "9" * 100, "\N{SUPERSCRIPT TWO}"])
def test_a_count_that_is_none_is_refused_with_a_remedy(count: str) -> None:
    with pytest.raises(ManagerError, match=r"LISTEN_FDS=.*it must be the number .*start through a socket unit"):
        take_passed(listening(LISTEN_FDS=count))


# ---- sd_notify(3) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_what_is_notified_are_the_documented_variables(tmp_path: Path, abstract: bool) -> None:
    with Manager(tmp_path, [], abstract=abstract) as manager:
        environ = dict(manager.environ)
        teller = systemd.Manager(environ)
        assert environ == {}
        teller.ready("listening on 127.0.0.1:5000\nMAINPID=1")
        teller.reloading()
        teller.stopping()
        teller.tick()
        ready, reloading, stopping = manager.hear()
        teller.close()
        teller.stopping()
        assert len(manager.hear()) == 3
    assert ready == {"READY": "1", "STATUS": "listening on 127.0.0.1:5000 MAINPID=1"}
    assert (reloading["RELOADING"], stopping["STOPPING"]) == ("1", "1")
    assert reloading["MONOTONIC_USEC"].isdecimal()


def test_without_a_manager_nothing_is_done() -> None:
    teller = systemd.Manager({})
    teller.ready("")
    teller.tick()
    teller.close()


def test_a_manager_that_reads_nothing_holds_up_nobody_and_hears_all_in_order_later(tmp_path: Path) -> None:
    with Manager(tmp_path, []) as manager:
        teller = systemd.Manager(dict(manager.environ))
        for number in range(40):  # a queue of datagrams holds 10 (net.unix.max_dgram_qlen), if nobody changed that
            teller.ready(str(number))
        for _ in range(40):
            manager.hear()
            teller.tick()
        assert [one["STATUS"] for one in manager.hear()] == [str(number) for number in range(40)]
        teller.close()


def test_a_manager_that_starts_itself_anew_hears_what_was_said_meanwhile(tmp_path: Path) -> None:
    with Manager(tmp_path, []) as before:
        teller = systemd.Manager(dict(before.environ))
    teller.ready("refused")  # the socket is there, and nobody has it
    (tmp_path / "notify").unlink()
    teller.ready("gone")
    with Manager(tmp_path, []) as again:
        teller.tick()
        assert [one["STATUS"] for one in again.hear()] == ["refused", "gone"]
    teller.close()


def test_the_watchdog_hears_once_in_half_of_its_time_less_a_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(systemd.time, "monotonic", lambda: now)
    with Manager(tmp_path, [], watchdog=30) as manager:
        teller = systemd.Manager(manager.environ | {"WATCHDOG_PID": str(os.getpid())})
        heard = []
        for _ in range(60):
            now += 1
            teller.tick()
            if len(manager.heard_with("WATCHDOG")) > len(heard):
                heard.append(now)
        teller.close()
    assert heard == [1014.0, 1028.0, 1042.0, 1056.0]


def test_a_watchdog_of_another_process_is_not_fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Manager(tmp_path, [], watchdog=2) as manager:
        teller = systemd.Manager(manager.environ | {"WATCHDOG_PID": "1"})
        later = systemd.time.monotonic() + 100
        monkeypatch.setattr(systemd.time, "monotonic", lambda: later)
        teller.tick()
        assert manager.hear() == []
        teller.close()


def test_a_watchdog_that_would_kill_a_healthy_server_is_said(tmp_path: Path) -> None:
    events = Events()
    log.LOGGER.addHandler(events)
    try:
        for seconds in ("1999999", "2000000"):
            systemd.Manager({"WATCHDOG_USEC": seconds})
    finally:
        log.LOGGER.removeHandler(events)
    (warned,) = events.all
    assert (warned["seconds"], warned["remedy"]) == (1.999999, "WatchdogSec=2 or more")


WRONG = {
    "NOTIFY_SOCKET=relative": "an absolute path or @NAME",
    f"NOTIFY_SOCKET=/{'x' * 108}": ".*of at most 107 bytes",
    "NOTIFY_SOCKET=vsock:2:1": "an absolute path or @NAME",
    "WATCHDOG_USEC=soon": "a number of microseconds",
    "WATCHDOG_USEC=0": "a number of microseconds",
}


@pytest.mark.parametrize("variable", WRONG)
def test_a_variable_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, variable: str) -> None:
    name, _, value = variable.partition("=")
    line = refused(tmp_path, "--listen", f"{HOST}:0", environ={name: value})
    assert re.search(rf"{name}=.*: it must be {WRONG[variable]}.*: start through a service unit", line), line


# ---- a server and its manager ---------------------------------------------------------------------------------------


@pytest.fixture
def bind() -> Callable[..., socket.socket]:
    return lambda host=HOST: socket.create_server(
        (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=4096, dualstack_ipv6=host == "::"
    )


def key_of(place: Path) -> bytes:
    return keys.from_text((place / "data/server.pub").read_text())


def test_it_is_ready_when_it_serves_and_stopping_when_it_was_told_to_end(tmp_path: Path, bind) -> None:
    with Manager(tmp_path, [bind()]) as manager, Process(tmp_path, **manager.start()) as server:
        (ready,) = until("READY", lambda: manager.heard_with("READY"))
        assert ready["STATUS"] == f"listening on {HOST}:{server.port}"
        server.await_line(rf"listening address={HOST}:{server.port} passed_as=tapetrack.socket")
        assert server.ping().returncode == 0
        assert manager.heard_with("STOPPING") == []
        assert server.stop() == 0
        assert [list(one) for one in manager.hear()] == [["READY", "STATUS"], ["STOPPING", "STATUS"]]


def test_a_start_that_fails_is_never_ready(tmp_path: Path) -> None:
    with Manager(tmp_path, []) as manager, socket.create_server((HOST, 0)) as other:
        refused(tmp_path, "--listen", f"{HOST}:{other.getsockname()[1]}", environ=manager.environ)
        assert manager.hear() == []


def test_a_reload_is_told_with_its_end_and_with_what_went_wrong(tmp_path: Path, bind) -> None:
    file = tmp_path / "tt.toml"
    file.write_text("timeout = 600\n")
    with Manager(tmp_path, [bind()]) as manager, Process(tmp_path, "-c", str(file), **manager.start()) as server:
        for count, text in ((2, "timeout = 500\n"), (3, "timeout = ")):
            file.write_text(text)
            server.send(signal.SIGHUP)
            until("READY again", lambda count=count: len(manager.heard_with("READY")) == count)
        first, second = manager.heard_with("RELOADING")
        assert int(first["MONOTONIC_USEC"]) < int(second["MONOTONIC_USEC"])
        assert [next(iter(one)) for one in manager.hear()] == ["READY", "RELOADING", "READY", "RELOADING", "READY"]
        _, good, bad = (one["STATUS"] for one in manager.heard_with("READY"))
        assert good == f"listening on {HOST}:{server.port}"
        assert re.fullmatch(rf"{good}; configuration not reloaded: .*tt\.toml: not TOML: .*", bad)


def test_the_watchdog_is_fed_while_the_loop_turns(tmp_path: Path, bind) -> None:
    with Manager(tmp_path, [bind()], watchdog=2) as manager, Process(tmp_path, **manager.start()) as server:
        until("three pings of the watchdog", lambda: len(manager.heard_with("WATCHDOG")) >= 3)
        server.send(signal.SIGSTOP)  # as one that hangs: from here on nothing comes, and the manager would end it
        until("it stands still", lambda: "T (stopped)" in Path(f"/proc/{server.pid}/status").read_text())
        before = len(manager.heard_with("WATCHDOG"))
        assert not threading.Event().wait(1.5)
        assert len(manager.heard_with("WATCHDOG")) == before
        server.send(signal.SIGCONT)


def test_it_passes_nothing_on_and_keeps_no_descriptor_for_a_child(tmp_path: Path, bind) -> None:
    with Manager(tmp_path, [bind(), bind()]) as manager, Process(tmp_path, **manager.start("a:b")) as server:
        for number in (FIRST, FIRST + 1):
            flags = re.search(r"^flags:\s+(\d+)", Path(f"/proc/{server.pid}/fdinfo/{number}").read_text(), re.M)
            assert flags is not None
            assert int(flags[1], 8) & os.O_CLOEXEC
        assert len(re.findall(r"listening address=\S+ passed_as=a,b", server.log)) == 2


def test_an_ipv6_socket_that_takes_ipv4_times_out_the_ipv4_address(tmp_path: Path, bind) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with Manager(tmp_path, [bind("::")]) as manager, Process(tmp_path, **manager.start()) as server:
        server.await_line(rf"listening address=\[::\]:{server.port} ")
        server.await_line(rf"listening address=0\.0\.0\.0:{server.port} ")
        assert " source=127.0.0.9 " in server.time_out("127.0.0.9")
        assert server.drops("127.0.0.9")
        assert server.ping().returncode == 0, "127.0.0.1 is among the known servers"


# ---- a restart ------------------------------------------------------------------------------------------------------


class Load:
    """Threads that connect, ping and go, again and again, each time from another source; what became of each try."""

    def __init__(self, port: int, public: bytes) -> None:
        self.outcomes: Counter[str] = Counter()
        self._address = (HOST, port)
        self._public = public
        self._end = threading.Event()
        self._answered = [0] * THREADS
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(THREADS)]

    def _run(self, number: int) -> None:
        count = 0
        while not self._end.is_set():
            count += 1
            outcome = self._visit(f"127.{1 + number}.{count // 250 % 250}.{1 + count % 250}")
            self.outcomes[outcome] += 1
            self._answered[number] += outcome == "answered"

    def _visit(self, source: str) -> str:
        with socket.socket() as peer:
            peer.settimeout(60)
            peer.bind((source, 0))
            try:
                peer.connect(self._address)
            except ConnectionResetError:  # taken, and cut off by the stop before connect() came back
                return "cut off"
            except OSError as error:
                return errno.errorcode.get(error.errno or 0, str(error))
            try:
                return self._ping(peer)
            except (ConnectionError, AssertionError):
                return "cut off"
            except TimeoutError:
                return "not answered"

    def _ping(self, peer: socket.socket) -> str:
        message, pending = create_hello(self._public, encode_hello(Hello("test", "0")))
        peer.sendall(header(HELLO, len(message)) + message)
        head = read_exactly(peer, 8)
        _, transport = consume_welcome(pending, read_exactly(peer, int.from_bytes(head[4:])))
        ping = header(DATA, 17)
        peer.sendall(ping + transport.seal(ping, b"\0"))
        pong = read_exactly(peer, 25)
        return "answered" if transport.open(pong[:8], pong[8:]) == b"\0" else "wrong"

    def await_answers(self) -> None:
        """Until every thread has had ten more answers."""
        goals = [count + 10 for count in self._answered]
        until(
            f"answers for every thread: {self.outcomes}",
            lambda: all(has >= goal for has, goal in zip(self._answered, goals, strict=True)),
            patience=60,
        )

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """While a server still runs: what waits in the backlog is to be answered."""
        self._end.set()
        for thread in self._threads:
            thread.join()


def saved_of(file: Path) -> int:
    """How many time-outs a saved table has."""
    now = time.monotonic_ns()
    return timeouts.load(file, TimeoutTable(1024, now=now), now, time.time_ns(), NAMES_STAMP)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_restarts_under_load_refuse_nobody_and_forget_no_ban(tmp_path: Path, bind, number: signal.Signals) -> None:
    saved, killed = tmp_path / "data/timeouts", number == signal.SIGKILL
    with ExitStack() as stack:
        manager = stack.enter_context(Manager(tmp_path, [bind()]))
        # A kill loses at most what was not saved yet; a stop saves, and until then nothing does here.
        manager.environ["TT_SAVE_INTERVAL"] = "1s" if killed else "1h"
        load = None
        for turn in range(RESTARTS + 1):
            server = stack.enter_context(Process(tmp_path, **manager.start()))
            if load is None:
                load = stack.enter_context(Load(server.port, key_of(tmp_path)))
            else:
                server.await_line(f"time-outs restored running={turn}")
            load.await_answers()
            assert all(server.drops(f"{BANNED}{past}") for past in range(turn)), f"after {turn} restarts"
            if turn < RESTARTS:
                server.time_out(f"{BANNED}{turn}")
                if killed:
                    until("a save", lambda turn=turn: saved_of(saved) == turn + 1)
                server.send(number)
                assert server.wait() == (-number if killed else 0)
        assert load is not None
        load.end()
    cut_off = load.outcomes.pop("cut off", 0)
    assert set(load.outcomes) == {"answered"}, load.outcomes
    # A stop ends a connection that is under way: of each thread one, at most.  Its next one is answered.
    assert cut_off <= THREADS * RESTARTS


def test_who_comes_while_no_server_runs_waits_and_is_answered(tmp_path: Path, bind) -> None:
    with ExitStack() as stack:
        manager = stack.enter_context(Manager(tmp_path, [bind()]))
        with Process(tmp_path, **manager.start()) as first:
            port = first.port
        waiting = stack.enter_context(socket.create_connection((HOST, port), 60, ("127.0.0.2", 0)))
        timed_out = stack.enter_context(socket.create_connection((HOST, port), 60, ("127.0.0.3", 0)))
        timed_out.sendall(b"GET / HTTP/1.1\r\n\r\n")
        message, pending = create_hello(key_of(tmp_path), encode_hello(Hello("test", "0")))
        waiting.sendall(header(HELLO, len(message)) + message)
        with Process(tmp_path, **manager.start()) as second:
            head = read_exactly(waiting, 8)
            consume_welcome(pending, read_exactly(waiting, int.from_bytes(head[4:])))
            second.await_timed_out("127.0.0.3")
            with Client(HOST, port, key=key_of(tmp_path)) as client:
                client.ping()
