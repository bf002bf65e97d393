"""The real server under strangers who mean harm: floods, slow peers, churn, evasion and aiming of bans; a soak.

Honest clients go on through all of it, at a price that is bounded: by what one source may use, and by what the whole
server does in a turn.  The long forms run by hand: FLOODS_CHURN (connections; 1,000,000 is the documented number) and
FLOODS_SOAK (seconds of mixed traffic; 3,600).
"""

import os
import random
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from docs_kit import code, table
from faults import LONG, client, pinging
from harness import LOGIN, Running, ended, reset, until
from hostile import Crowd, source
from process import Process
from test_budget import GARBAGE, await_states, in_a_namespace, is_open, misbehave
from test_faults import ask, running
from test_frame import HELLO, head

from tt import config, keys
from tt._core import TimeoutTable
from tt.noise import create_hello
from tt.wire import Hello, encode_hello, header

NS = 10**9
CHURN = int(os.environ.get("FLOODS_CHURN", "10000"))
SOAK = float(os.environ.get("FLOODS_SOAK", "4"))
TICKS = os.sysconf("SC_CLK_TCK")
SANITIZED = os.environ.get("TT_BUILD") == "asan"


def hellos(server: Process, count: int) -> bytes:
    """Valid HELLOs, as everybody can make who has the server's public key."""
    public = keys.from_text((server.place / "data/server.pub").read_text())
    messages = [create_hello(public, encode_hello(Hello("flood", "0")))[0] for _ in range(count)]
    return b"".join(header(HELLO, len(message)) + message for message in messages)


def forgeries(count: int) -> bytes:
    """HELLOs of the right form, as they can be made without it."""
    return b"".join(head(HELLO, 80) + os.urandom(80) for _ in range(count))


def memory(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def grew(server: Process, before: int) -> int:
    """By how many bytes; a sanitizer keeps what is freed for a while, so that there it cannot be told."""
    return 0 if SANITIZED else memory(server.pid) - before


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def await_descriptors(server: Process, most: int) -> None:
    """Until it has no more than so many: a `tt status` that has gone, or a save under way, has one for a moment."""
    until(f"at most {most} descriptors", lambda: descriptors(server.pid) <= most)


def welcomes(server: Process, count: int, patience: float = 30) -> float:
    """The longest that a newcomer from another source waited for his WELCOME and a ping, of so many one by one."""
    longest = 0.0
    for number in range(count):
        begin = time.monotonic()
        with client(server, f"127.0.77.{number + 1}", timeout=patience) as newcomer:
            newcomer.ping()
        longest = max(longest, time.monotonic() - begin)
    return longest


# ---- HELLO floods ---------------------------------------------------------------------------------------------------


def test_who_floods_valid_hellos_gets_each_sources_rate_and_costs_the_others_little(tmp_path: Path) -> None:
    with Process(tmp_path) as server:
        before = memory(server.pid)
        begin = time.monotonic()
        with Crowd(server.port, 0, 20, 1200, does="flood", data=hellos(server, 50)) as crowd:
            crowd.await_line()
            assert welcomes(server, 20) < LONG
            until("the bursts", lambda: ask(server, "status")[0]["handshakes"] >= 20 * 100, 60)
            used, since = processor(server.pid), time.monotonic()
            assert welcomes(server, 200) < LONG
            share = (processor(server.pid) - used) / (time.monotonic() - since)
            status = ask(server, "status")[0]
            seconds = time.monotonic() - begin
            crowd.end()
        assert status["handshakes"] <= 20 * (100 + 20 * seconds) + 220
        assert status["table"]["running"] == 0, "a HELLO too many is no evidence"
        assert grew(server, before) < 32 << 20
        assert share < 0.9


def test_replayed_hellos_of_a_hundred_sources_leave_the_newcomer_a_place_in_the_queue(tmp_path: Path) -> None:
    """3,000 connections wait for their handshakes, each within its source's burst; he comes last."""
    with Process(tmp_path) as server, ExitStack() as crowds:
        recorded = hellos(server, 1)
        for first in (0, 50):
            crowd = crowds.enter_context(Crowd(server.port, first, 50, 1500, does="flood", data=recorded))
            crowd.await_line()
        welcomes(server, 3, 60)  # behind 3,000, so that it takes as long as this machine takes for them
        assert not running(server)


def test_who_floods_forged_hellos_is_out_after_one_of_each_source(tmp_path: Path) -> None:
    # Until the end nobody is to be over: he would come once more.
    with Process(tmp_path, environ={"TT_TIMEOUT_BAD_HELLO": "1h"}) as server, pinging(server) as pings:
        before = memory(server.pid)
        with Crowd(server.port, 0, 2000, 300, does="flood", data=forgeries(50)) as crowd:
            crowd.await_line()
            until("all timed out", lambda: running(server) == 2000, 60)
            assert welcomes(server, 50) < LONG
            crowd.end()
        status = ask(server, "status")[0]
        assert status["closed"]["bad_hello"] == 2000
        assert status["handshakes"] <= 52
        assert grew(server, before) < 32 << 20
    assert max(pings) < LONG


# ---- slow peers and churn -------------------------------------------------------------------------------------------


def test_10000_slow_peers_at_once_are_stalled_and_hold_up_nobody(tmp_path: Path) -> None:
    # A deadline that is longer than LONG: who is held up by them for as long is seen.
    options = {"TT_HELLO_DEADLINE": "9", "TT_TIMEOUT_STALLED": "1h"}
    with Process(tmp_path, environ=options) as server, pinging(server) as pings, ExitStack() as crowds:
        hello = hellos(server, 1)
        both = [
            crowds.enter_context(Crowd(server.port, first, 100, 5000, does="slow", data=hello)) for first in (0, 100)
        ]
        for _ in range(3):
            for crowd in both:
                crowd.await_line()
                crowd.act()
        until("200 time-outs", lambda: running(server) == 200, 60)
        until("an end of all", lambda: ask(server, "status")[0]["connections"]["new"] == 0, 60)
        assert ask(server, "status")[0]["closed"]["stalled"] == 200
    assert max(pings) < LONG


def test_peers_that_reset_in_mid_frame_half_close_trickle_or_never_read_are_no_evidence_and_leave_nothing(
    run_server: Callable[..., Running],
) -> None:
    server = run_server(LOGIN, frame_deadline="1", connections_per_source="1000")
    honest = server.user("127.0.7.1")
    pings = head(3, 17)
    for number in range(50):
        peer, transport = server.handshake()
        peer.sendall(server.seal(transport, b"\0")[: number % 25])
        reset(peer)
        peer, transport = server.handshake()
        peer.sendall(server.seal(transport, b"\0"))
        peer.shutdown(socket.SHUT_WR)
        assert len(ended(peer)) == len(pings) + 17
        assert is_open(server, *honest)
    trickling, transport = server.handshake()
    deaf, unread = server.user(buffer=4096)
    deaf.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            deaf.sendall(b"".join(server.seal(unread, b"\0") for _ in range(1000)))
    begin = time.monotonic()
    try:
        for byte in server.seal(transport, b"\0")[:4]:
            trickling.sendall(bytes([byte]))
            assert is_open(server, *honest)
    except ConnectionError:  # on a machine that is so slow that its time is over already
        assert time.monotonic() - begin >= 1
    server.await_closed("idle")
    assert ended(trickling) == b""
    assert not server.events.of("timed out")
    assert is_open(server, *honest)
    deaf.close()


def test_churn_of_connections_leaves_neither_memory_nor_descriptors_behind(tmp_path: Path) -> None:
    options = {"TT_HELLO_RATE": "1000000", "TT_HELLO_BURST": "1000000"}
    with Process(tmp_path, environ=options) as server:
        hello = hellos(server, 1)
        kinds = [("leave", 0, b""), ("once", 100, hello), ("once", 200, b"GET /"), ("leave", 300, hello[:20])]

        def churn(count: int) -> None:
            with pinging(server), ExitStack() as started:
                crowds = [
                    started.enter_context(Crowd(server.port, first, 100, count // len(kinds), does=does, data=data))
                    for does, first, data in kinds
                ]
                for crowd in crowds:
                    crowd.await_line()
            until("an end of all", lambda: not any(ask(server, "status")[0]["connections"].values()))

        churn(4000)
        before = memory(server.pid), descriptors(server.pid)
        churn(CHURN)
        status = ask(server, "status")[0]
        assert status["accepted"] >= CHURN
        assert status["table"]["running"] == 100
        await_descriptors(server, before[1])
        assert grew(server, before[0]) < 4 << 20


# ---- evasion and aiming of bans -------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2 for a namespace")
def test_all_addresses_of_one_64_are_one_source_in_its_share_and_in_its_ban(tmp_path: Path) -> None:
    def test() -> None:
        for net in ("fd00:1::/64", "fd00:2::/64"):
            subprocess.run(["ip", "route", "add", "local", net, "dev", "lo"], check=True)
        subprocess.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv6/ip_nonlocal_bind"], check=True)
        with Running(tmp_path, listen=["[::]:0"], hello_deadline="60") as server:
            peers = [server.connect(f"fd00:1::{number:x}", host="fd00:2::1") for number in range(16, 80)]
            await_states(server, new=64)
            assert server.is_dropped("fd00:1::ffff", host="fd00:2::1")  # the 65th
            assert not server.is_dropped("fd00:2::9", host="fd00:2::1")
            peers[5].sendall(GARBAGE)
            assert [ended(peer) for peer in peers] == [b""] * 64
            assert server.await_timed_out("fd00:1::/64")["before"] == 0
            dice = random.Random(1)
            for _ in range(200):
                address = ":".join(["fd00:1:0:0", *(f"{dice.randrange(1 << 16):x}" for _ in range(4))])
                assert server.is_dropped(address, host="fd00:2::1")
            assert len(server.events.of("timed out")) == 1
            assert not server.is_dropped("fd00:2::9", host="fd00:2::1")

    in_a_namespace(test)


def test_who_comes_as_v4_mapped_is_his_ipv4_address(run_server: Callable[..., Running]) -> None:
    server = run_server()
    with socket.socket(socket.AF_INET6) as peer:
        peer.settimeout(10)
        peer.bind(("::ffff:127.0.5.1", 0))
        peer.connect(("::ffff:127.0.0.1", server.port))
        peer.sendall(GARBAGE)
        assert ended(peer) == b""
    server.await_timed_out("127.0.5.1")
    assert server.is_dropped("127.0.5.1")


def test_behind_a_gateway_a_bad_machine_costs_those_who_are_logged_in_nothing_however_often_it_knocks(
    run_server: Callable[..., Running],
) -> None:
    server = run_server(LOGIN)
    colleagues = [server.user("127.0.5.1") for _ in range(20)]
    misbehave(server, "127.0.5.1")
    end = server.await_timed_out("127.0.5.1")["seconds"]
    for _ in range(1000):
        with suppress(ConnectionError):
            misbehave(server, "127.0.5.1")
    assert all(is_open(server, *colleague) for colleague in colleagues)
    record = server.table.find("127.0.5.1", time.monotonic_ns())
    assert record is not None
    assert (record.end - record.start, record.dropped) == (end * NS, 1000)


def test_a_million_sources_through_a_table_of_65536_evict_the_soonest_over_and_touch_no_honest_one() -> None:
    table = TimeoutTable(65536)
    honest = [f"192.0.2.{number}" for number in range(1, 255)]
    for number in range(1_000_000):
        table.add(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0, 600 * NS, number)
    assert (table.running, table.evictions) == (65536, 1_000_000 - 65536)
    assert not [source_ for source_ in honest if table.find(source_, 10**6)]
    first = 1_000_000 - 65536
    for number in (first - 1, first, 999_999):  # the newest end last: they are who stays
        found = table.find(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 10**6)
        assert (found is None) == (number < first)
    assert len(table.expire(700 * NS, 1 << 20)) == 65536
    assert table.running == 0


def test_more_sources_than_the_table_holds_evict_and_are_counted_while_the_honest_are_served(tmp_path: Path) -> None:
    with Process(tmp_path, "--table-size", "1024") as server, pinging(server) as pings:
        with Crowd(server.port, 0, 5000, 5000, does="once", data=b"GET /") as crowd:
            crowd.await_line()
        table = until("all of them", lambda: (t := ask(server, "status")[0]["table"])["evictions"] == 3976 and t)
        assert table["running"] == 1024
        assert server.drops(source(4999))
        assert not server.drops(source(0))
        assert welcomes(server, 20) < LONG
    assert max(pings) < LONG


# ---- a soak ---------------------------------------------------------------------------------------------------------


class Traffic:
    """Mixed traffic, by counts: each call of `once` is one visit of somebody, drawn by lot."""

    def __init__(self, server: Process) -> None:
        self._server = server
        self._dice = random.Random(2)
        self._hello = hellos(server, 1)
        self.visits = 0
        self.honest = 0

    def once(self) -> None:
        self.visits += 1
        visit = self._dice.choice([self._ping, self._ping, self._begin, self._silence, self._garbage, self._forgery])
        with suppress(ConnectionError):  # strangers may be timed out; who is honest has his own errors
            visit()

    def _stranger(self, data: bytes) -> None:
        with self._server.connect(source(self._dice.randrange(5000))) as peer:
            peer.sendall(data)
            if self._dice.random() < 0.5:
                reset(peer)

    def _ping(self) -> None:
        with client(self._server, f"127.0.60.{self._dice.randrange(250)}") as honest:
            for _ in range(self._dice.randrange(1, 20)):
                honest.ping()
        self.honest += 1

    def _begin(self) -> None:
        self._stranger(self._hello[: self._dice.randrange(len(self._hello))])

    def _silence(self) -> None:
        self._stranger(b"")

    def _garbage(self) -> None:
        self._stranger(self._dice.randbytes(self._dice.randrange(1, 400)))

    def _forgery(self) -> None:
        self._stranger(forgeries(1))


def test_after_a_soak_of_mixed_traffic_everything_is_where_it_began(tmp_path: Path) -> None:
    options = {
        "TT_TIMEOUT_BAD_HELLO": "1", "TT_ESCALATE": "false", "TT_SAVE_INTERVAL": "1", "TT_HELLO_RATE": "1000",
        "TT_HELLO_BURST": "1000",
    }  # fmt: skip
    with Process(tmp_path, "--timeout", "1", environ=options) as server:
        traffic = Traffic(server)

        def rest() -> tuple[int, int]:
            until("no connection", lambda: not any(ask(server, "status")[0]["connections"].values()))
            until("no time-out", lambda: running(server) == 0)
            until("nothing that waits", lambda: set(ask(server, "status")[0]["waiting"].values()) == {0})
            return memory(server.pid), descriptors(server.pid)

        for _ in range(1000):
            traffic.once()
        began = rest()
        end = time.monotonic() + SOAK
        while time.monotonic() < end:
            traffic.once()
        rest()
        assert traffic.honest > traffic.visits // 4
        await_descriptors(server, began[1])
        # 24 h of the repeat rule: up to 5,000 strangers are remembered.
        assert grew(server, began[0]) < 8 << 20


# ---- docs/threats.md ------------------------------------------------------------------------------------------------


def test_the_document_names_each_budget_with_the_default_of_the_code() -> None:
    text = (Path(__file__).parents[1] / "docs/threats.md").read_text("utf-8")
    documented = {code(name): default for name, default, _ in table(text, "option", "default", "what it bounds")}
    assert documented == {name: config.show(name, config.default(name)) for name in documented}
    bounded = {name for name, option in config.OPTIONS.items() if option.kind.metavar in ("N", "SECONDS", "BYTES")}
    assert bounded - set(documented) == set()
