"""What strangers may use of the server, and how long a time-out keeps them away: on a real server."""

import gc
import os
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import CDLL, get_errno
from pathlib import Path

import pytest
from harness import HOST, LOGIN, Running, ended, until
from test_core_close import LONG, SLOW, reconfigure, seconds
from test_frame import DATA, head

from tt._core import REASON_CODES
from tt.dispatch import Session
from tt.noise import Transport
from tt.wire import Request, encode_requests

PING = b"\0"
GARBAGE = b"GET / HTTP/1.1\r\n\r\n"
NS = 10**9
CLONE_NEWNET = 0x40000000


def is_open(server: Running, peer: socket.socket, transport: Transport) -> bool:
    """Whether a connection that has its WELCOME still gets answers."""
    try:
        peer.sendall(server.seal(transport, PING))
        return server.read_plaintext(peer, transport) == PING
    except (ConnectionError, AssertionError):
        return False


def states(server: Running) -> dict[str, int]:
    return {name: count for name, count in server.counters()["connections"].items() if count}


def await_states(server: Running, **expected: int) -> None:
    until(f"{expected}", lambda: states(server) == expected)


def misbehave(server: Running, source: str, packet: bytes = GARBAGE, host: str = HOST) -> None:
    peer = server.connect(source, host=host)
    peer.sendall(packet)
    ended(peer)


def bad_hello(server: Running) -> bytes:
    hello, _ = server.hello()
    return hello[:-1] + bytes([hello[-1] ^ 1])


# ---- connections of a source ----


def test_65th_connection_without_a_login_is_turned_away_and_the_others_live(run_server):
    server = run_server(LOGIN, hello_deadline="60")
    users = [server.user() for _ in range(3)]  # no part of the count
    silent = [server.connect() for _ in range(32)]
    guests = [server.handshake() for _ in range(32)]
    await_states(server, logged_in=3, new=32, open=32)
    assert server.is_dropped()
    server.await_closed("too_many")
    assert all(is_open(server, *guest) for guest in guests + users)
    with server.client("127.0.0.3") as other:
        other.ping()
    silent.pop().close()
    await_states(server, logged_in=3, new=31, open=32)
    last = server.handshake()
    assert is_open(server, *last)
    assert not server.events.of("timed out")
    assert server.closed("too_many") == 1


def test_connection_that_logs_in_makes_room_for_another(run_server):
    server = run_server(LOGIN, connections_per_source="1")
    for count in range(1, 6):
        server.user()
        await_states(server, logged_in=count)


def test_closing_connection_of_a_guest_counts_in_the_share_of_its_source_until_it_has_gone(run_server):
    def bye(session, _arguments):
        session.close("idle")
        return LONG  # which nobody reads

    server = run_server({**LOGIN, "bye": bye}, connections_per_source="2", **SLOW)
    peers = []
    for come in (server.user, server.handshake, server.handshake):  # the user's is no part of the share
        peer, transport = come(buffer=4096)
        peer.sendall(server.seal(transport, b"\0" + encode_requests([Request(1, "bye")])))
        peers.append(peer)
        await_states(server, closing=len(peers))
    assert server.is_dropped()
    assert server.closed("too_many") == 1
    assert not server.is_dropped("127.0.0.3")
    peers[-1].close()
    await_states(server, closing=2)
    assert not server.is_dropped()


# ---- HELLOs of a source ----


def send_hellos(server: Running, source: str, count: int) -> list[socket.socket]:
    """So many at once; each has been served by then or waits for its turn."""
    peers = [server.connect(source) for _ in range(count)]
    for peer in peers:
        peer.sendall(server.hello()[0])

    def are_there() -> bool:
        now = states(server)
        return now.keys() <= {"open", "waiting"} and sum(now.values()) == count

    until("all HELLOs there", are_there)
    return peers


def assert_held_to(server: Running, burst: int, begin: float) -> None:
    """One HELLO a second and the burst; those that wait end with a time-out of their source."""
    until("the burst", lambda: server.counters()["handshakes"] >= burst)
    made = server.counters()["handshakes"]
    assert made <= burst + seconds(begin)
    assert states(server)["waiting"] > 0
    misbehave(server, "127.0.0.2")


def test_hello_over_the_burst_waits_for_its_turn_at_the_rate(run_server):
    server = run_server(hello_rate="5", hello_burst="2")
    begin = time.monotonic()
    peers = [server.connect() for _ in range(4)]
    for peer in peers:
        peer.sendall(server.hello()[0])
    for peer in peers:
        assert server.read_frame(peer)[3] == 2
    assert time.monotonic() - begin >= 0.4  # two at once, one at 0.2 s, one at 0.4 s
    assert server.counters()["handshakes"] == 4


def test_waiting_hello_holds_up_no_other_source(run_server):
    server = run_server(hello_rate="1", hello_burst="1", hello_deadline="300")
    begin = time.monotonic()
    send_hellos(server, "127.0.0.2", 30)
    with server.client("127.0.0.3") as other:
        other.ping()
    assert_held_to(server, 2, begin)  # of two sources


def test_hello_that_never_gets_its_turn_is_too_many_and_times_nobody_out(run_server):
    server = run_server(hello_rate="1", hello_burst="1", hello_deadline="300")
    peers = send_hellos(server, "127.0.0.2", 30)
    reconfigure(server, hello_deadline=1.0)  # those that wait are looked at every second
    until("nobody who waits", lambda: "waiting" not in states(server))
    served = sum(first_byte(peer) == b"T" for peer in peers)
    assert server.counters()["handshakes"] == served
    assert server.closed("too_many") == 30 - served > 0
    assert not server.events.of("timed out")


def first_byte(peer: socket.socket) -> bytes:
    """That of a WELCOME, or none."""
    try:
        return peer.recv(1)
    except ConnectionResetError:
        return b""


def test_replayed_hello_flood_from_one_source_is_held_to_the_burst(run_server):
    server = run_server(hello_rate="1", hello_burst="10", hello_deadline="300")
    hello, _ = server.hello()
    begin = time.monotonic()
    peers = [server.connect() for _ in range(60)]
    for peer in peers:
        peer.sendall(hello)
    assert_held_to(server, 10, begin)


def test_more_handshakes_than_a_turn_makes_are_all_made(run_server):
    server = run_server(handshakes_per_turn="1")
    peers = [server.connect() for _ in range(50)]
    for peer in peers:
        peer.sendall(server.hello()[0])
    for peer in peers:
        assert server.read_frame(peer)[3] == 2


# ---- connections in all ----


def test_at_capacity_the_newest_wins_over_the_oldest_without_a_hello_then_over_the_longest_idle_guest(run_server):
    server = run_server(LOGIN, places=5)
    user = server.user("127.0.1.1")
    guests = [server.handshake("127.0.1.2"), server.handshake("127.0.1.3")]
    silent = [server.connect("127.0.1.4"), server.connect("127.0.1.5")]
    await_states(server, logged_in=1, open=2, new=2)
    assert is_open(server, *guests[0])  # so that the other one has been idle for longer

    for victim in silent:
        newcomer = server.handshake("127.0.2.1")
        guests.append(newcomer)
        assert ended(victim) == b""
    await_states(server, logged_in=1, open=4)
    for victim in (guests[1], guests[0]):
        guests.append(server.handshake("127.0.2.2"))
        assert ended(victim[0]) == b""
    assert server.closed("too_many") == 4
    assert all(is_open(server, *guest) for guest in [*guests[2:], user])
    assert not server.events.of("timed out")


def test_user_never_gives_way(run_server):
    server = run_server(LOGIN, places=3)
    users = [server.user(f"127.0.1.{number}") for number in (1, 2, 3)]
    for _ in range(5):
        assert server.is_dropped("127.0.2.1")
    assert all(is_open(server, *user) for user in users)
    server.await_closed("too_many", 5)


@pytest.mark.parametrize("begun", [False, True], ids=["idle", "within a frame"])
def test_user_who_is_logged_in_from_outside_his_own_turn_gives_way_no_more(run_server, begun):
    """As when the check of a password has ended: log_in() comes in another connection's turn."""
    kept: list[Session] = []
    server = run_server(
        {"keep": lambda session, _arguments: kept.append(session), "admit": lambda *_: kept[0].log_in()}, places=3
    )
    peer, transport = server.handshake("127.0.1.1")
    server.ask(peer, transport, "keep")
    ping = server.seal(transport, PING)
    peer.sendall(ping[: 10 * begun])
    until("its part", lambda: server.server.waiting()["partial_frames"] == begun)
    other = server.handshake("127.0.1.2")
    server.ask(*other, "admit")
    await_states(server, logged_in=1, open=1)
    server.handshake("127.0.1.3")
    server.handshake("127.0.1.4")
    assert ended(other[0]) == b""
    peer.sendall(ping[10 * begun :])
    assert server.read_plaintext(peer, transport) == PING


def test_flood_of_silent_connections_from_many_sources_keeps_no_client_out(run_server):
    server = run_server(LOGIN, places=100)
    user = server.user("127.0.3.1")
    flood = [server.connect(f"127.9.{n // 250}.{1 + n % 250}") for n in range(500)]
    with server.client("127.0.3.2") as client:
        client.ping()
    assert is_open(server, *user)
    assert server.closed("too_many") >= 400
    assert not server.events.of("timed out")
    for peer in flood:
        peer.close()


def test_connection_of_a_source_over_its_share_costs_nobody_his_place(run_server):
    server = run_server(LOGIN, places=3, connections_per_source="2")
    flood = [server.handshake("127.0.1.1") for _ in range(2)]
    other = server.handshake("127.0.1.2")
    assert all(is_open(server, *guest) for guest in flood)  # so that the other has been idle for longest
    assert server.is_dropped("127.0.1.1")
    assert is_open(server, *other)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Within it this process, the server and its peers, has no descriptor left; one that is closed can be had again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # what an earlier test left must not give one back meanwhile
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] < highest:  # else who gives way might free one above the limit
        taken.append(os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def unconnected(source: str) -> socket.socket:
    peer = socket.socket()
    peer.bind((source, 0))
    peer.settimeout(10)
    return peer


def test_without_descriptors_the_connections_wait_in_the_backlog_and_that_is_said(run_server):
    server = run_server(LOGIN)
    user = server.user()
    with unconnected("127.0.1.1") as peer:
        with no_descriptors():
            peer.connect(server.addresses[0])
            until("a failed accept", lambda: server.counters()["accept_failures"])
            assert is_open(server, *user)
            tries = server.counters()["accept_failures"]
            event = until("the log", lambda: [e for e in server.events.all if "accept" in e["words"]])
            assert tries < 1000  # it pauses, and does not spin
            assert len(event) < 5
        peer.sendall(server.hello()[0])
        assert server.read_frame(peer)[3] == 2
    assert is_open(server, *user)


def test_without_descriptors_who_has_waited_longest_makes_room(run_server):
    server = run_server(LOGIN)
    user, silent = server.user(), server.connect()
    await_states(server, logged_in=1, new=1)
    with unconnected("127.0.1.1") as peer, no_descriptors():
        peer.connect(server.addresses[0])
        peer.sendall(server.hello()[0])
        assert server.read_frame(peer)[3] == 2
        assert ended(silent) == b""
    assert is_open(server, *user)
    assert server.closed("too_many") == 1


# ---- a time-out lands, and ends ----


def test_when_a_time_out_lands_every_guest_of_the_source_is_reset_and_its_users_stay(run_server):
    server = run_server(LOGIN)
    user = server.user("127.0.1.1")
    silent, guest = server.connect("127.0.1.1"), server.handshake("127.0.1.1")
    begun = server.connect("127.0.1.1")
    begun.sendall(b"TT")
    neighbour = server.handshake("127.0.1.2")
    await_states(server, logged_in=1, new=2, open=2)
    misbehave(server, "127.0.1.1")
    assert ended(silent) == ended(begun) == ended(guest[0]) == b""
    assert is_open(server, *user)
    assert is_open(server, *neighbour)
    assert server.closed("timed_out") == 3
    assert server.closed("not_protocol") == 1
    assert len(server.events.of("timed out")) == 1


def test_tampering_user_is_disconnected_with_the_guests_of_his_source_and_his_colleagues_stay(run_server):
    server = run_server(LOGIN)
    colleague, culprit = server.user("127.0.1.1"), server.user("127.0.1.1")
    guest = server.handshake("127.0.1.1")
    culprit[0].sendall(head(DATA, 17) + bytes(17))
    assert ended(culprit[0]) == ended(guest[0]) == b""
    assert is_open(server, *colleague)
    assert server.is_dropped("127.0.1.1")
    assert is_open(server, *colleague)


def test_waiting_hellos_of_a_source_end_with_its_time_out(run_server):
    server = run_server(hello_rate="1", hello_burst="1", hello_deadline="300")
    send_hellos(server, "127.0.1.1", 30)
    assert states(server)["waiting"] > 0
    misbehave(server, "127.0.1.1")
    server.await_closed("timed_out", 30)
    assert len(server.events.of("timed out")) == 1


def test_attempts_during_a_time_out_are_counted_and_do_not_extend_it(run_server):
    server = run_server()
    misbehave(server, "127.0.1.1")
    event = server.await_timed_out("127.0.1.1")
    end = end_of(server, "127.0.1.1")
    for _ in range(20):
        with suppress(ConnectionError):
            server.connect("127.0.1.1").sendall(GARBAGE)
    server.await_closed("timed_out", 20)
    record = server.table.find("127.0.1.1", time.monotonic_ns())
    assert (record.end, record.dropped, record.before) == (end, 20, 0)
    assert server.events.of("timed out") == [event]


def end_of(server: Running, source: str) -> int:
    """When its last time-out ends, or ended: a busy machine may come to ask the table when that is over."""
    server.await_timed_out(source)
    return next(entry.end for entry in reversed(server.guard.history.snapshot()) if entry.source == source)


def await_end(server: Running, source: str, end: int) -> int:
    """Before the end every connection is dropped; how long after it one was begun that was dropped too, in ns."""
    late = 0

    def over() -> bool:
        nonlocal late
        begin = time.monotonic_ns()
        if server.is_dropped(source):
            late = max(late, begin - end)
            return False
        assert time.monotonic_ns() >= end, "served before the end"
        return True

    until(f"the end of the time-out of {source}", over)
    return late


def test_time_out_ends_on_time_and_the_repeat_of_a_hard_one_doubles_while_a_mild_one_keeps_its_length(run_server):
    server = run_server(timeout="1", timeout_bad_hello="1", timeout_max="3")
    misbehave(server, "127.0.1.1")
    misbehave(server, "127.0.1.2", bad_hello(server))
    ends = {source: end_of(server, source) for source in ("127.0.1.1", "127.0.1.2")}
    for source, end in ends.items():
        await_end(server, source, end)
    server.events.all.clear()
    misbehave(server, "127.0.1.1")
    misbehave(server, "127.0.1.2", bad_hello(server))
    hard, mild = server.await_timed_out("127.0.1.1"), server.await_timed_out("127.0.1.2")
    assert (hard["seconds"], hard["before"]) == (2, 1)
    assert (mild["seconds"], mild["before"]) == (1, 1)
    await_end(server, "127.0.1.1", end_of(server, "127.0.1.1"))
    server.events.all.clear()
    misbehave(server, "127.0.1.1")
    assert server.await_timed_out("127.0.1.1")["seconds"] == 3  # timeout_max


def test_without_escalation_the_repeat_is_as_long_as_the_first_and_ends_within_20_ms(run_server):
    """Unless the machine is busy just then: but one of several repeats does."""
    server = run_server(timeout="1", escalate="false")
    late: list[int] = []
    while len(late) < 2 or min(late) >= NS // 50:
        assert len(late) < 10, late
        server.events.all.clear()
        misbehave(server, "127.0.1.1")
        event = server.await_timed_out("127.0.1.1")
        assert (event["seconds"], event["before"]) == (1, len(late))
        late.append(await_end(server, "127.0.1.1", end_of(server, "127.0.1.1")))


def test_full_table_gives_up_the_source_nearest_its_end(run_server):
    server = run_server(table_size="1024", log_timeouts_per_second="100000", timeout_bad_hello="300")
    for number in range(1025):
        packet = bad_hello(server) if number == 500 else GARBAGE  # 300 s, the others 600 s
        misbehave(server, f"127.8.{number // 250}.{1 + number % 250}", packet)
    until("the last time-out", lambda: server.timed_out("127.8.4.25"))
    assert server.table.evictions == 1
    assert not server.is_dropped("127.8.2.1")
    assert server.is_dropped("127.8.0.1")
    assert server.is_dropped("127.8.4.25")


def test_source_timed_out_by_hand_loses_its_guests_and_comes_back_when_it_is_lifted(run_server):
    def time_out(_session, _arguments):
        return server.server.time_out("127.0.1.1", 60 * NS).reason

    def lift(_session, _arguments):
        return server.server.lift("127.0.1.1"), server.server.lift("127.0.1.1")

    server = run_server({"time_out": time_out, "lift": lift, **LOGIN})
    user, guest = server.user("127.0.1.1"), server.handshake("127.0.1.1")
    with server.client() as operator:
        assert operator.request("time_out") == REASON_CODES["operator"]
        assert ended(guest[0]) == b""
        assert is_open(server, *user)
        assert server.is_dropped("127.0.1.1")
        assert operator.request("lift") == [True, False]
        assert not server.is_dropped("127.0.1.1")
    event = server.await_timed_out("127.0.1.1")
    assert (event["reason"], event["seconds"]) == ("operator", 60)


# ---- exempt, and only observed ----


@pytest.mark.parametrize("exempt", ["127.0.9.0/24", "loopback", "127.0.9.9/32"])
def test_exempt_source_is_disconnected_and_logged_and_not_timed_out(run_server, exempt):
    server = run_server(exempt=[exempt])
    guest = server.handshake("127.0.9.9")
    for packet, reason in ((GARBAGE, "not_protocol"), (bad_hello(server), "bad_hello")):
        server.events.all.clear()
        misbehave(server, "127.0.9.9", packet)
        (event,) = until("the log", lambda: server.events.of("exempt, disconnected"))
        assert (event["source"], event["reason"]) == ("127.0.9.9", reason)
        assert event["first"] == packet[:32]
        assert "seconds" not in event
    assert not server.is_dropped("127.0.9.9")
    assert is_open(server, *guest)
    assert server.table.running == 0
    assert not [event for event in server.events.all if event.get("remedy")]


def test_source_beside_the_exempt_network_is_timed_out(run_server):
    server = run_server(exempt=["127.0.9.0/25"])
    misbehave(server, "127.0.9.128")
    assert server.is_dropped("127.0.9.128")


def test_ipv6_network_exempts_no_ipv4_source(run_server):
    """Though ::/0 covers the v4-mapped form of each."""
    server = run_server(exempt=["::/0"])
    misbehave(server, "127.0.9.9")
    assert server.await_timed_out("127.0.9.9")["reason"] == "not_protocol"
    assert server.is_dropped("127.0.9.9")


def test_observe_says_who_would_be_timed_out_and_times_nobody_out(run_server):
    server = run_server(observe="true")
    guest = server.handshake("127.0.1.1")
    for count in (1, 2):
        misbehave(server, "127.0.1.1")
        events = until("the log", lambda n=count: len(e := server.events.of("would be timed out")) == n and e)
        assert events[-1]["source"] == "127.0.1.1"
        assert events[-1]["reason"] == "not_protocol"
        assert events[-1]["looks"] == "HTTP request"
    assert not server.is_dropped("127.0.1.1")
    assert is_open(server, *guest)
    assert server.table.running == 0
    assert not server.events.of("timed out")


# ---- IPv6 ----


def in_a_namespace(test: Callable[[], None]) -> None:
    """Runs `test` in a thread that has a network of its own: a loopback interface with addresses of two /64."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            assert CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0, os.strerror(get_errno())
            for words in (
                "link set lo up", "address add fd00:1::1/64 dev lo nodad", "address add fd00:1::2/64 dev lo nodad",
                "address add fd00:2::1/64 dev lo nodad",
            ):  # fmt: skip
                subprocess.run(["ip", *words.split()], check=True, capture_output=True)
            test()
        except BaseException as error:  # noqa: BLE001 - handed on
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


NAMESPACE = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2 for a namespace"
)


@pytest.mark.root
@NAMESPACE
@pytest.mark.parametrize("prefix", ["64", "128"])
def test_ipv6_source_is_its_64_or_what_the_prefix_says(tmp_path: Path, prefix: str):
    def test() -> None:
        with Running(tmp_path, listen=["[::]:0"], ipv6_prefix=prefix) as server:
            neighbour = server.connect("fd00:1::2", host="fd00:1::1")
            peer = server.connect("fd00:1::1", host="fd00:1::1")
            await_states(server, new=2)
            peer.sendall(GARBAGE)
            assert ended(peer) == b""
            source = "fd00:1::/64" if prefix == "64" else "fd00:1::1"
            assert server.await_timed_out(source)["reason"] == "not_protocol"
            assert server.is_dropped("fd00:1::1", host="fd00:1::1")
            assert server.is_dropped("fd00:1::2", host="fd00:1::1") == (prefix == "64")
            assert not server.is_dropped("fd00:2::1", host="fd00:1::1")
            if prefix == "64":
                assert ended(neighbour) == b""

    in_a_namespace(test)


@pytest.mark.root
@NAMESPACE
@pytest.mark.parametrize("prefix", ["64", "128"])
def test_exempt_address_exempts_its_whole_source(tmp_path: Path, prefix: str):
    """A time-out of its neighbour would hit it too."""

    def test() -> None:
        with Running(tmp_path, listen=["[::]:0"], ipv6_prefix=prefix, exempt=["fd00:1::2/128"]) as server:
            for source in ("fd00:1::1", "fd00:2::1"):
                misbehave(server, source, host="fd00:1::1")
            assert server.is_dropped("fd00:2::1", host="fd00:1::1")
            assert not server.is_dropped("fd00:1::2", host="fd00:1::1")
            assert server.is_dropped("fd00:1::1", host="fd00:1::1") == (prefix == "128")
            exempted = [event["source"] for event in server.events.of("exempt, disconnected")]
            assert exempted == (["fd00:1::/64"] if prefix == "64" else [])

    in_a_namespace(test)


def test_ipv6_loopback_is_timed_out_while_ipv4_is_served(run_server):
    server = run_server(listen=["127.0.0.1:0", "[::1]:0"])
    server.port, port = server.addresses[1][1], server.port
    with socket.create_connection(server.addresses[1][:2]) as peer:
        peer.sendall(GARBAGE)
        assert ended(peer) == b""
    assert server.await_timed_out("::/64")["looks"] == "HTTP request"
    assert server.is_dropped("::1", host="::1")
    server.port = port
    assert not server.is_dropped("127.0.0.1")
