"""The loop, on a real server: deadlines, long replies, and how connections end.

A short deadline begins, by `reconfigure`, when the test has done all that must come before it: a busy machine may stop
this thread for seconds at any place.
"""

import fcntl
import os
import random
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from harness import LOGIN, PATIENCE, Running, ended, read_exactly, reset, until, until_end
from test_frame import head

from tt.dispatch import Session
from tt.wire import DATA, MAX_BEFORE_LOGIN, Request, encode_requests, header

PING = b"\0"
PONG = 25  # bytes: header, flags, tag
LONG = random.Random(2).randbytes(2 << 20)  # a reply that does not compress
SLOW = {"send_buffer": 16384}  # with a reader's small buffer, most of a long reply waits in the server


def many(server: Running, transport, count: int) -> bytes:
    return b"".join(server.seal(transport, PING) for _ in range(count))


def seconds(begin: float) -> float:
    return time.monotonic() - begin


def in_the_loop(server: Running, *jobs: Callable[[], object]) -> None:
    """Does each job in the server's own thread at the beginning of another turn, where a signal is taken."""
    left, done = list(jobs), threading.Event()
    descriptor = os.eventfd(1)  # always readable

    def next_job(_readable: bool, _writable: bool) -> None:
        try:
            left.pop(0)()
        finally:
            if not left:
                server.server.unwatch(descriptor)
                done.set()

    server.server.watch(descriptor, next_job)
    assert done.wait(PATIENCE)
    os.close(descriptor)


def configure(server: Running, **options: float) -> None:
    """For the loop's thread: the options with which the server began, but for these."""
    server.server.configure(replace(server.settings, **options), server.guard.exempt)


def reconfigure(server: Running, **options: float) -> None:
    in_the_loop(server, lambda: configure(server, **options))


def expire(server: Running, option: str, before: float, after: float) -> None:
    """For one turn a deadline that is over for what began till `before`, and not for what began from `after` on.

    However late that turn is, the second holds; the first unless the loop stood still within it: then do it again.
    """
    between = (before + after) / 2
    shorten = lambda: configure(server, **{option: time.monotonic() - between})  # noqa: E731
    in_the_loop(server, shorten, lambda: configure(server))


def nobody(server: Running) -> bool:
    return not any(server.counters()["connections"].values())


# ---- silence, and what is begun and not ended ----


def test_zero_bytes_then_close_a_thousand_times_from_one_source(run_server):
    server = run_server()
    for count in range(50, 1001, 50):  # fewer than 64 at a time, or some would be too_many
        for _ in range(50):
            server.connect().close()
        server.await_closed("peer_closed", count)
    assert server.closed("peer_closed") == 1000
    assert not server.events.of("timed out")
    with server.client("127.0.0.2") as client:
        client.ping()


def test_no_byte_till_the_deadline_is_silent_and_times_nobody_out(run_server):
    server = run_server(hello_deadline="1")
    begin = time.monotonic()
    peers = [server.connect() for _ in range(3)]
    assert [ended(peer) for peer in peers] == [b""] * 3
    assert seconds(begin) >= 1
    server.await_closed("silent", 3)
    reconfigure(server, hello_deadline=60.0)  # who asks has to say his HELLO within it
    assert not server.is_dropped()
    assert not server.events.of("timed out")


@pytest.mark.parametrize("trickle", [False, True], ids=["silence", "a byte now and then"])
def test_begun_hello_is_stalled_at_the_deadline(tmp_path: Path, trickle: bool):
    server = Running(tmp_path, hello_deadline="1")
    hello, _ = server.hello()
    peer = server.connect()
    peer.sendall(hello[:5])  # before the loop runs: else it might find silence at the deadline
    peer.settimeout(0.1)
    begin = time.monotonic()
    with server:
        with suppress(ConnectionError):
            for byte in hello[5:-1]:
                with suppress(TimeoutError):  # nothing heard for a tenth of a second
                    assert peer.recv(1) == b""
                    break
                if trickle:
                    peer.sendall(bytes([byte]))
        event = server.await_timed_out()
        assert seconds(begin) >= 1
        assert (event["reason"], event["seconds"]) == ("stalled", 10)
        assert hello.startswith(event["first"])
        assert server.is_dropped()


@pytest.mark.parametrize("before", [0, 40], ids=["nothing of it", "a part of it"])
def test_hello_that_lies_whole_in_the_socket_when_a_late_loop_looks_at_its_deadline_is_welcomed(run_server, before):
    """Its rest comes when the loop has asked which sockets have bytes, in a turn that begins behind the deadline."""
    server = run_server()
    hello, _ = server.hello()
    peer = server.connect()
    peer.sendall(hello[:before])
    until("its place", lambda: server.counters()["connections"]["new"] == 1)
    until("its part", lambda: server.server.waiting()["partial_frames"] == (before > 0))
    begin = time.monotonic()
    until("the deadline", lambda: seconds(begin) > 0.1)

    def late() -> None:
        configure(server, hello_deadline=0.1)
        peer.sendall(hello[before:])

    in_the_loop(server, late)
    assert server.read_frame(peer)[3] == 2
    assert not server.events.of("timed out")


def test_idle_before_login_is_closed_gracefully(run_server):
    server = run_server()
    peer, transport = server.handshake()
    begin = time.monotonic()
    peer.sendall(server.seal(transport, PING))
    assert server.read_plaintext(peer, transport) == PING
    reconfigure(server, idle_before_login=1.0)
    assert until_end(peer) == b""
    assert seconds(begin) >= 1
    server.await_closed("idle")
    assert not server.is_dropped()


def test_idle_after_login_is_closed_gracefully_and_later_than_before_login(run_server):
    server = run_server(LOGIN)
    begin = time.monotonic()
    user, _ = server.user()
    guest, _ = server.handshake()
    reconfigure(server, idle_before_login=1.0)
    assert until_end(guest) == b""
    assert server.counters()["connections"]["logged_in"] == 1
    reconfigure(server, idle_after_login=2.0)
    assert until_end(user) == b""
    assert seconds(begin) >= 2
    server.await_closed("idle", 2)


@pytest.mark.parametrize("logged_in", [False, True])
def test_frame_begun_and_not_ended_is_idle_even_when_bytes_trickle(run_server, logged_in):
    server = run_server(LOGIN, frame_deadline="1")
    peer, transport = server.user() if logged_in else server.handshake()
    frame = server.seal(transport, b"\0" + bytes(100))
    begin = time.monotonic()
    peer.settimeout(0.1)
    with suppress(ConnectionError):
        for byte in frame[:-1]:
            peer.sendall(bytes([byte]))
            with suppress(TimeoutError):
                assert peer.recv(1) == b""
                break
    assert seconds(begin) >= 1
    server.await_closed("idle")
    assert not server.is_dropped()


def test_pings_keep_a_connection(run_server):
    server = run_server()
    (peer, transport), (silent, _) = server.handshake(), server.handshake("127.0.0.3")
    before = time.monotonic()
    for _ in range(3):
        begin = time.monotonic()
        until("a while", lambda begin=begin: seconds(begin) > 0.2)
        after = time.monotonic()
        peer.sendall(server.seal(transport, PING))
        assert server.read_plaintext(peer, transport) == PING
    until("the silent one idle", lambda: expire(server, "idle_before_login", before, after) or server.closed("idle"))
    assert until_end(silent) == b""
    peer.sendall(server.seal(transport, PING))
    assert server.read_plaintext(peer, transport) == PING
    assert server.closed("idle") == 1


# ---- long replies ----


class Streaming:
    """A session that answers whatever comes with raw bytes in parts, and then ends its connection."""

    def __init__(self, connection, reason: str | None, size: int, *, at_once: bool) -> None:
        self._connection = connection
        self._reason = reason
        self._size = size
        self._at_once = at_once
        self.closed_for: list[str] = []

    def receive(self, _frames: list[bytes]) -> bytes | Iterator[bytes]:
        if self._reason is not None:
            self._connection.close(self._reason)
        if self._at_once:
            return LONG
        return (LONG[start : start + self._size] for start in range(0, len(LONG), self._size))

    def closed(self, reason: str) -> None:
        self.closed_for.append(reason)


def await_told(sessions: list[Streaming], *reasons: str) -> None:
    until(
        f"the sessions told {reasons}", lambda: [session.closed_for for session in sessions] == [[r] for r in reasons]
    )


def streaming_server(run_server, *, at_once: bool, reason: str | None = None, size: int = 1000, **options):
    """A server whose sessions are Streaming; and the list of them."""
    server = run_server(**options)
    sessions = []
    hello = server.application.hello

    def hello_streaming(connection, frame):
        _, welcome = hello(connection, frame)
        sessions.append(Streaming(connection, reason, size, at_once=at_once))
        return sessions[-1], welcome

    server.application.hello = hello_streaming
    return server, sessions


READERS = pytest.mark.parametrize(("buffer", "options"), [(None, {}), (4096, SLOW)], ids=["any reader", "slow reader"])
AT_ONCE = pytest.mark.parametrize("at_once", [True, False], ids=["bytes", "iterator"])


@AT_ONCE
@pytest.mark.parametrize("half_close", [False, True])
@READERS
def test_reply_of_2_mb_then_a_close_by_the_server_arrives_whole(run_server, at_once, half_close, buffer, options):
    server, _ = streaming_server(run_server, at_once=at_once, reason="idle", read_per_turn="4096", **options)
    peer, transport = server.handshake(buffer=buffer)
    peer.sendall(server.seal(transport, PING))
    if half_close:
        peer.shutdown(socket.SHUT_WR)
    assert until_end(peer) == LONG
    server.await_closed("idle")


@AT_ONCE
@READERS
def test_reply_of_2_mb_then_a_half_close_by_the_client_arrives_whole(run_server, at_once, buffer, options):
    server, sessions = streaming_server(run_server, at_once=at_once, **options)
    peer, transport = server.handshake(buffer=buffer)
    peer.sendall(server.seal(transport, PING))
    peer.shutdown(socket.SHUT_WR)
    assert until_end(peer) == LONG
    await_told(sessions, "peer_closed")


@AT_ONCE
def test_requests_behind_a_long_reply_are_answered_after_it(run_server, at_once):
    server, _ = streaming_server(run_server, at_once=at_once, **SLOW)
    peer, transport = server.handshake(buffer=4096)
    peer.sendall(server.seal(transport, PING))
    until("the first part", lambda: server.server.waiting()["unsent"])
    peer.sendall(server.seal(transport, PING))
    assert read_exactly(peer, len(LONG)) == LONG
    assert read_exactly(peer, len(LONG)) == LONG


@AT_ONCE
def test_peer_that_never_reads_a_long_reply_is_a_slow_reader(run_server, at_once):
    server, sessions = streaming_server(run_server, at_once=at_once, **SLOW)
    peer, transport = server.handshake(buffer=4096)
    peer.sendall(server.seal(transport, PING))
    until("the first part", lambda: server.server.waiting()["unsent"])
    reconfigure(server, idle_before_login=1.0)
    await_told(sessions, "slow_reader")
    assert not server.is_dropped()


@AT_ONCE
def test_frame_begun_behind_a_long_reply_has_no_deadline_while_it_is_not_read(run_server, at_once):
    server, _ = streaming_server(run_server, at_once=at_once, frame_deadline="1", **SLOW)
    peer, transport = server.handshake(buffer=4096)
    first, second = server.seal(transport, PING), server.seal(transport, PING)
    peer.sendall(first + second[:10])
    until("the first part", lambda: server.server.waiting()["unsent"])
    begin = time.monotonic()
    until("the deadline", lambda: seconds(begin) > 1.2)
    assert read_exactly(peer, len(LONG)) == LONG
    peer.sendall(second[10:])
    assert read_exactly(peer, len(LONG)) == LONG


@AT_ONCE
def test_peer_that_resets_in_the_midst_of_a_long_reply(run_server, at_once):
    server, sessions = streaming_server(run_server, at_once=at_once, **SLOW)
    peer, transport = server.handshake(buffer=4096)
    peer.sendall(server.seal(transport, PING))
    read_exactly(peer, 1000)
    reset(peer)
    await_told(sessions, "peer_closed")


def test_failure_in_the_midst_of_a_long_reply_is_said_and_ends_the_connection(run_server):
    server, _ = streaming_server(run_server, at_once=False, size=0)  # range() refuses the step 0
    peer, transport = server.handshake()
    peer.sendall(server.seal(transport, PING))
    assert ended(peer) == b""
    server.await_closed("internal")
    (event,) = server.events.of("internal error")
    server.events.all.remove(event)
    assert not server.is_dropped()


def test_2_mb_reply_of_an_operation_through_the_client(run_server):
    server = run_server({**LOGIN, "long": lambda _session, _arguments: LONG})
    with server.client() as client:
        client.request("login")
        assert client.request("long") == LONG


def test_peer_that_pipelines_and_never_reads_is_a_slow_reader_and_not_read_on(run_server):
    server = run_server(output_limit_before_login="4096", **SLOW)
    peer, transport = server.handshake(buffer=4096)
    peer.settimeout(0.1)
    with suppress(TimeoutError):  # all that the kernel holds is far more than the bounds, whenever the loop reads it
        while True:
            peer.sendall(many(server, transport, 1000))
    until("unread replies", lambda: server.server.waiting()["unsent"])
    reconfigure(server, idle_before_login=1.0, frame_deadline=1.0)
    server.await_closed("slow_reader")
    assert server.counters()["frames"] < 50_000
    assert not server.events.of("timed out")


# ---- closing ----


def test_closing_connection_whose_peer_stays_is_gone_at_the_drain_deadline(run_server):
    server = run_server(drain_deadline="0.1")
    peer, transport = server.handshake()
    peer.sendall(server.seal(transport, b"\0" + encode_requests([Request(n, "none") for n in range(65)])))
    server.await_closed("too_long")
    until("the connection gone", lambda: nobody(server))


def test_closing_connection_takes_no_more_than_the_drain_limit(run_server):
    server = run_server(drain_deadline="30", drain_limit="64 KiB")
    peer, _ = server.handshake()
    peer.sendall(head(DATA, 5000))
    server.await_closed("too_long")
    until("closing", lambda: server.counters()["connections"]["closing"] == 1)
    peer.sendall(bytes(10_000))
    until("all of it there", lambda: unacknowledged(peer) == 0)
    server.handshake("127.0.0.3")[0].close()  # the loop has turned since, and thrown it away
    assert server.counters()["connections"]["closing"] == 1
    with suppress(ConnectionError):
        for _ in range(100):
            peer.sendall(bytes(10_000))
    until("the connection gone", lambda: nobody(server))


@AT_ONCE
def test_what_arrives_while_the_last_reply_goes_out_does_not_count_to_the_drain_limit(run_server, at_once):
    server, _ = streaming_server(run_server, at_once=at_once, reason="idle", drain_limit="64 KiB", **SLOW)
    peer, transport = server.handshake(buffer=4096)
    peer.sendall(server.seal(transport, PING))
    until("closing", lambda: server.counters()["connections"]["closing"])
    peer.sendall(bytes(200_000))
    until("all of it there", lambda: unacknowledged(peer) == 0)
    server.handshake("127.0.0.3")  # the loop has turned since, and thrown it away
    assert until_end(peer) == LONG


def unacknowledged(peer: socket.socket) -> int:
    """Bytes that were sent and have not arrived (SIOCOUTQ of tcp(7), the same number as TIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4)))[0])


@AT_ONCE
def test_closing_connection_that_is_not_read_is_reset_and_leaves_the_kernel_nothing_to_send(run_server, at_once):
    server, _ = streaming_server(run_server, at_once=at_once, reason="idle", **SLOW)
    peer, transport = server.handshake(buffer=4096)
    peer.sendall(server.seal(transport, PING))
    until("closing", lambda: server.counters()["connections"]["closing"])
    reconfigure(server, frame_deadline=1.0)
    until("the connection gone", lambda: nobody(server))
    with pytest.raises(ConnectionResetError):
        until_end(peer)


def test_reply_that_the_kernel_has_taken_whole_arrives_though_its_connection_ends_before_it_is_read(run_server):
    def bye(session, _arguments):
        session.close("idle")
        return LONG[:100_000]

    server = run_server({"bye": bye}, drain_deadline="0.1", send_buffer=200_000)
    peer, transport = server.handshake(buffer=4096)
    peer.sendall(server.seal(transport, b"\0" + encode_requests([Request(1, "bye")])))
    server.await_closed("idle")
    until("the connection gone", lambda: nobody(server))
    assert len(until_end(peer)) > 100_000


def test_garbage_behind_the_frame_that_closed_is_thrown_away(run_server):
    """The connection is closing, not the protocol's any more: nothing that arrives is evidence."""
    server = run_server({"bye": lambda session, _arguments: session.close("idle")})
    peer, transport = server.handshake()
    peer.sendall(server.seal(transport, b"\0" + encode_requests([Request(1, "bye")])) + b"GET / HTTP/1.1\r\n\r\n")
    assert server.read_plaintext(peer, transport)
    assert until_end(peer) == b""
    server.await_closed("idle")
    assert not server.events.of("timed out")


def test_session_is_told_once_why_it_ended(run_server):
    server, sessions = streaming_server(run_server, at_once=True)
    first, _ = server.handshake()
    first.close()
    await_told(sessions, "peer_closed")  # before the verdict on the second, which would take it along
    second, _ = server.handshake()
    second.sendall(b"GET")
    third, _ = server.handshake("127.0.0.3")
    reconfigure(server, idle_before_login=1.0)
    assert until_end(third) == b""
    await_told(sessions, "peer_closed", "not_protocol", "idle")


class TimingOut:
    """A session that times out its own source, at the moment that `when` names."""

    def __init__(self, connection, time_out: Callable[[str], object], when: str) -> None:
        self._connection = connection
        self._time_out = time_out
        self._when = when

    def receive(self, _frames: list[bytes]) -> bytes | Iterator[bytes]:
        if self._when == "a part":
            return self._parts()
        self.act("receive")
        self.act("failure")
        assert self._when != "failure"
        return LONG

    def _parts(self) -> Iterator[bytes]:
        yield PING
        self.act("a part")
        yield PING

    def closed(self, _reason: str) -> None:
        self.act("closed")

    def act(self, now: str) -> None:
        if self._when.startswith(now):
            self._time_out(self._connection.source)


@pytest.mark.parametrize("when", ["hello", "receive", "failure", "a part", "closed", "closed gracefully"])
def test_session_that_times_out_its_own_source_ends_with_it_and_harms_no_other(run_server, when):
    server = run_server(places=6)
    hello = server.application.hello

    def hello_timing_out(connection, frame):
        session, welcome = hello(connection, frame)
        if connection.source.startswith("127.0.1."):
            session = TimingOut(connection, lambda source: server.server.time_out(source, 10**10), when)
            session.act("hello")
        return session, welcome

    server.application.hello = hello_timing_out
    other, other_transport = server.handshake("127.0.0.3")
    for number in range(1, 6):
        if when == "hello":
            peer = server.connect(f"127.0.1.{number}")
            peer.sendall(server.hello()[0])
            assert ended(peer) == b""
            assert server.is_dropped(f"127.0.1.{number}")
            continue
        guest, _ = server.handshake(f"127.0.1.{number}")
        peer, transport = server.handshake(f"127.0.1.{number}")
        if when == "closed gracefully":
            peer.sendall(header(DATA, MAX_BEFORE_LOGIN + 1))  # too_long
        else:
            peer.sendall(server.seal(transport, PING))
        if when == "closed":
            reset(peer)
        else:
            assert ended(peer) in (b"", PING)
        assert ended(guest) == b""
        assert server.is_dropped(f"127.0.1.{number}")
    failures = [event for event in server.events.all if event["failure"]]
    assert len(failures) == (5 if when == "failure" else 0)
    for event in failures:
        server.events.all.remove(event)
    peers = [(other, other_transport), *(server.handshake(f"127.0.2.{number}") for number in range(1, 6))]
    for peer, transport in peers:  # every place can be taken again, and serves
        peer.sendall(server.seal(transport, PING))
        assert server.read_plaintext(peer, transport) == PING
    assert server.counters()["connections"]["open"] == 6


def test_connection_object_outlives_its_connection_and_harms_nobody(run_server):
    kept: list[Session] = []

    def keep(session, _arguments):
        kept.append(session)

    server = run_server({"keep": keep, **LOGIN})
    peer, transport = server.handshake()
    server.ask(peer, transport, "keep")
    peer.close()
    server.await_closed("peer_closed")
    other, transport = server.handshake()  # at the same place
    kept[0].close("tampered")
    kept[0].log_in()
    assert server.ask(other, transport, "none")[0].error.code == "unknown_operation"
    assert server.counters()["connections"]["open"] == 1
    assert server.counters()["connections"]["logged_in"] == 0


def test_failure_of_an_operation_costs_its_connection_alone(run_server):
    def fail(_session, _arguments):
        raise RuntimeError("no such vault")

    server = run_server({"fail": fail})
    other, other_transport = server.handshake()
    peer, transport = server.handshake()
    peer.sendall(server.seal(transport, b"\0" + encode_requests([Request(1, "fail")])))
    assert ended(peer) == b""
    server.await_closed("internal")
    (event,) = server.events.of("internal error")
    assert event["failure"][0] is RuntimeError
    server.events.all.remove(event)
    other.sendall(server.seal(other_transport, PING))
    assert server.read_plaintext(other, other_transport) == PING
    assert not server.is_dropped()


def stop_in_flight(server: Running) -> None:
    silent, begun = server.connect(), server.connect()
    begun.sendall(b"TT")
    idle, _ = server.handshake()
    busy, transport = server.user(buffer=4096)
    busy.sendall(server.seal(transport, b"\0" + encode_requests([Request(1, "long")])))
    until("output", lambda: server.server.waiting()["unsent"])
    server.server.stop()
    server.wake()
    assert until_end(idle) == b""
    assert ended(silent) == ended(begun) == b""
    assert len(until_end(busy)) > len(LONG)
    server.await_closed("shutdown", 4)


def test_what_is_in_flight_is_finished_at_a_stop(tmp_path):
    """For at most 3 s: where a busy machine stops this thread for so long, the loop ends first, and we try anew."""

    def stop() -> bool:
        server = Running(tmp_path, {**LOGIN, "long": lambda _session, _arguments: LONG}, **SLOW)
        try:
            with server:
                stop_in_flight(server)
        except TimeoutError:  # nothing more comes of a loop that has ended
            return False
        assert not server.events.of("timed out")
        return True

    until("a stop that nothing holds up", stop, 60)
