"""The PROXY protocol's header: bytes in, a verdict and a client out.  Then behind real proxies, on a real server."""

import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
from harness import HOST, LOGIN, Running, ended, read_exactly, reset, until
from hypothesis import given
from hypothesis import strategies as st
from netns import HOST as HOST_ADDRESS
from netns import MAP, NEIGHBOURS, PORT, Lab
from process import need, plain_environment
from test_core_close import expire, in_the_loop, reconfigure, seconds, unacknowledged

from tt import config
from tt._core import judge_proxy_header
from tt.front import ARRIVALS
from tt.noise import consume_welcome

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL, PROXY = 0x20, 0x21
TCP4, TCP6 = 0x11, 0x21
BEHIND = "127.0.7.7"  # a proxy
HTTP = b"GET / HTTP/1.1\r\n\r\n"
MORE = ("more", 0, "", 0)
BAD = ("bad_proxy", 0, "", 0)


def proxy_header(client: str, port: int = 4321, *, values: bytes = b"", command: int = PROXY) -> bytes:
    """Version 2, for a TCP connection of that client."""
    source = ip_address(client)
    addresses = source.packed + bytes(len(source.packed)) + struct.pack(">HH", port, 5000)
    return head(command, TCP4 if source.version == 4 else TCP6, len(addresses + values)) + addresses + values


def head(command: int, family: int, length: int) -> bytes:
    return SIGNATURE + struct.pack(">BBH", command, family, length)


# ---- the verdict ----


@pytest.mark.parametrize(
    ("client", "shown"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),  # one client is one source, however the proxy met him
    ],
)
def test_a_header_names_the_client(client, shown):
    packet = proxy_header(client, 40000)
    assert judge_proxy_header(packet) == ("whole", len(packet), shown, 40000)
    assert judge_proxy_header(packet + b"TT") == ("whole", len(packet), shown, 40000)


def test_values_behind_the_addresses_are_skipped():
    packet = proxy_header("192.0.2.1", values=b"\x04\0\x03abc")
    assert judge_proxy_header(packet) == ("whole", len(packet), "192.0.2.1", 4321)
    longest = proxy_header("192.0.2.1", values=bytes(4096 - 12))
    assert judge_proxy_header(longest)[:2] == ("whole", 4112)


@pytest.mark.parametrize("family", [0x00, TCP4, TCP6, 0x12, 0x31])
def test_local_is_the_proxy_itself_whatever_else_the_header_says(family):
    assert judge_proxy_header(head(LOCAL, family, 0)) == ("whole", 16, "", 0)
    assert judge_proxy_header(head(LOCAL, family, 12) + bytes(12)) == ("whole", 28, "", 0)


def test_a_client_that_the_proxy_does_not_tell_is_the_proxy_itself():
    assert judge_proxy_header(head(PROXY, 0x00, 0)) == ("whole", 16, "", 0)


@pytest.mark.parametrize(
    "packet",
    {
        "HTTP": HTTP,
        "version 1": b"PROXY TCP4 192.0.2.1 192.0.2.2 4321 5000\r\n",
        "our own HELLO": b"TT\1\1\0\0\0\x30",
        "another signature": b"\r\n\r\n\0\r\nQUIX\n",
        "version 3": head(0x31, TCP4, 12),
        "command 2": head(0x22, TCP4, 12),
        "a datagram": head(PROXY, 0x12, 12),
        "a Unix socket": head(PROXY, 0x31, 216),
        "an unknown family": head(PROXY, 0x41, 12),
        "too short for IPv4": head(PROXY, TCP4, 11),
        "too short for IPv6": head(PROXY, TCP6, 35),
        "values without end": head(PROXY, TCP4, 4097),
        "the longest length": head(LOCAL, 0, 65535),
    }.items(),
    ids=lambda item: item[0],
)
def test_anything_else_is_refused_at_its_first_wrong_byte(packet):
    _, data = packet
    verdicts = [judge_proxy_header(data[:n]) for n in range(len(data) + 1)]
    first = verdicts.index(BAD)
    assert verdicts == [MORE] * first + [BAD] * (len(verdicts) - first)


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda rest: SIGNATURE + rest), st.binary(max_size=9))
def test_a_verdict_falls_once_and_what_follows_does_not_change_it(data, rest):
    verdict = judge_proxy_header(data)
    if verdict != MORE:
        assert judge_proxy_header(data + rest) == verdict
    assert [judge_proxy_header(data[:n]) for n in range(len(data))].count(MORE) >= (len(data) if verdict == MORE else 0)


# ---- on the loop ----


@pytest.fixture
def proxied(run_server) -> Running:
    return run_server(LOGIN, proxy_from=[f"{BEHIND}/32"])


def send(server: Running, data: bytes, *, source: str = BEHIND) -> socket.socket:
    peer = server.connect(source)
    with suppress(ConnectionError):
        peer.sendall(data)
    return peer


def shake(server: Running, client: str, *, source: str = BEHIND) -> bool:
    """Whether that client of the proxy gets a WELCOME."""
    peer = send(server, proxy_header(client) + server.hello()[0], source=source)
    try:
        return peer.recv(1) == b"T"
    except ConnectionResetError:
        return False


def test_the_client_behind_a_proxy_is_timed_out_and_the_others_come_in(proxied):
    assert ended(send(proxied, proxy_header("192.0.2.1") + HTTP)) == b""
    event = proxied.await_timed_out("192.0.2.1")
    assert event["reason"] == "not_protocol"
    assert event["first"] == HTTP
    assert not shake(proxied, "192.0.2.1")
    assert proxied.closed("timed_out") == 1
    assert proxied.table.find("192.0.2.1", 0).proxied
    assert proxied.table.find("192.0.2.1", 0).dropped == 1
    assert proxied.timed_out(BEHIND) is None
    assert shake(proxied, "192.0.2.2")
    assert shake(proxied, "2001:db8::2")


def test_a_header_cut_anywhere_means_the_same(proxied):
    first = proxy_header("192.0.2.3", values=b"\x04\0\x01x")
    packet = first + proxied.hello()[0]
    for cut in {*range(1, len(packet))} - {len(first)}:  # there nothing is left to hold
        peer = send(proxied, packet[:cut])
        until("held", lambda: proxied.server.waiting()["partial_frames"] == 1)
        peer.sendall(packet[cut:])
        assert read_exactly(peer, 1) == b"T", cut
        reset(peer)
        until("gone", lambda: not any(proxied.counters()["connections"].values()))


def test_a_proxy_without_a_header_is_closed_and_never_timed_out(proxied):
    for number, packet in enumerate((HTTP, proxied.hello()[0], b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"), 1):
        assert ended(send(proxied, packet)) == b""
        proxied.await_closed("bad_proxy", number)
    assert not proxied.events.of("timed out")
    assert shake(proxied, "192.0.2.4")


def test_a_stranger_who_speaks_for_others_is_timed_out_himself(proxied):
    assert not shake(proxied, "192.0.2.5", source="127.0.7.8")
    assert proxied.await_timed_out("127.0.7.8")["looks"] == "PROXY protocol"
    assert proxied.timed_out("192.0.2.5") is None


def test_who_shares_the_proxys_64_may_not_speak_for_others(run_server):
    server = run_server(listen=["[::1]:0"], proxy_from=["::2/128"])
    peer = server.connect("::1", host="::1")
    with suppress(ConnectionError):
        peer.sendall(proxy_header("192.0.2.5") + server.hello()[0])
    assert ended(peer) == b""
    server.await_closed("not_protocol")
    assert server.timed_out("192.0.2.5") is None


def test_a_proxys_own_connection_is_served_and_never_timed_out(proxied):
    own = head(LOCAL, 0, 0)
    peer = send(proxied, own + proxied.hello()[0])
    assert read_exactly(peer, 1) == b"T"
    assert ended(send(proxied, own + HTTP)) == b""
    until("said", lambda: proxied.events.of("exempt, disconnected"))
    assert not proxied.events.of("timed out")
    send(proxied, b"").close()  # a health check that only connects
    proxied.await_closed("peer_closed")


def test_a_header_that_does_not_end_in_time_is_the_proxys_fault_and_silence_is_nobodys(run_server):
    server = run_server(proxy_from=[f"{BEHIND}/32"], hello_deadline="60s")
    peers = [send(server, data) for data in (SIGNATURE, b"", proxy_header("192.0.2.6") + b"T")]
    until("they are there", lambda: server.counters()["connections"]["new"] == 3)
    until("what is begun", lambda: server.server.waiting()["partial_frames"] == 2)
    reconfigure(server, hello_deadline=1.0)
    assert [ended(peer) for peer in peers] == [b""] * 3
    server.await_closed("bad_proxy")
    server.await_closed("silent")
    assert server.await_timed_out("192.0.2.6")["reason"] == "stalled"
    assert len(server.events.of("timed out")) == 1


def test_connections_count_as_the_clients_and_not_as_the_proxys(run_server):
    server = run_server(proxy_from=[f"{BEHIND}/32"], connections_per_source=2)
    waiting = [send(server, proxy_header(f"192.0.2.{n // 2}")) for n in range(20)]
    until("20 connections", lambda: server.counters()["connections"]["new"] == 20)
    assert ended(send(server, proxy_header("192.0.2.0"))) == b""
    server.await_closed("too_many")
    until("10 sources", lambda: server.server.waiting()["sources"] == 10)
    waiting[0].sendall(HTTP)  # his other connection goes with him, the other clients' stay
    server.await_timed_out("192.0.2.0")
    until("two connections less", lambda: server.counters()["connections"]["new"] == 18)


def test_a_header_that_comes_late_takes_nothing_of_the_clients_time(run_server):
    server = run_server(proxy_from=[f"{BEHIND}/32"], hello_deadline="60s")
    header, hello = proxy_header("192.0.2.9"), server.hello()[0]
    peer, other = send(server, header[:12]), send(server, header[:12])
    until("both begun", lambda: server.server.waiting()["partial_frames"] == 2)
    before = time.monotonic()
    until("a while", lambda: seconds(before) > 0.5)
    after = time.monotonic()
    peer.sendall(header[12:] + hello[:20])
    until("all of it there", lambda: unacknowledged(peer) == 0)
    server.handshake("127.0.0.3")  # the loop has turned since, and read it
    until(
        "the end of the proxy's time",
        lambda: expire(server, "hello_deadline", before, after) or server.closed("bad_proxy"),
    )
    assert ended(other) == b""
    peer.sendall(hello[20:])
    assert read_exactly(peer, 1) == b"T"


def test_no_client_can_have_a_proxy_timed_out(run_server):
    """Neither another proxy, nor a program on the proxy's host, nor who shares its /64."""
    server = run_server(proxy_from=[f"{BEHIND}/32", "127.0.7.8/32", "2001:db8:7::7/128"])
    for count, client in enumerate((BEHIND, "127.0.7.8", "2001:db8:7::8"), 1):
        assert ended(send(server, proxy_header(client) + HTTP)) == b""
        server.await_closed("not_protocol", count)
    until("said", lambda: len(server.events.of("exempt, disconnected")) == 3)
    assert not server.table.entries(0)
    assert not server.events.of("timed out")


def test_connections_that_wait_for_a_header_are_nobodys_share(run_server):
    server = run_server(proxy_from=[f"{BEHIND}/32"], connections_per_source=1)
    waiting = [send(server, b"") for _ in range(5)]
    until("they are there", lambda: server.counters()["connections"]["new"] == 5)
    assert shake(server, BEHIND)  # a client on the proxy's own host
    for number, peer in enumerate(waiting):
        peer.sendall(proxy_header(f"192.0.2.{number}") + server.hello()[0])
        assert read_exactly(peer, 1) == b"T"


def test_strangers_behind_a_proxy_are_no_hint_of_another_one(run_server):
    server = run_server(LOGIN, proxy_from=[f"{BEHIND}/32"], observe=True)
    assert ended(send(server, proxy_header("198.51.100.1") + HTTP)) == b""
    until("said", lambda: server.events.of("would be timed out"))
    in_the_loop(server, lambda: server.server.time_out("203.0.113.1", 10**9))  # nor is who is timed out by hand
    assert ended(send(server, HTTP, source="127.0.0.9")) == b""
    for _ in range(ARRIVALS):
        server.handshake("127.0.0.9")
    until("said", lambda: any("one private address" in event["words"] for event in server.events.all))


def test_a_network_of_mapped_addresses_is_that_of_ipv4():
    loaded = config.load(None, {}, {"proxy_from": ["::ffff:10.0.0.5/128", "::ffff:192.0.2.0/120", "::/0"]})
    assert [str(network) for network in loaded.proxy_from] == ["10.0.0.5/32", "192.0.2.0/24", "::/0"]


def test_a_session_knows_the_client(proxied):
    seen = []
    proxied.dispatcher.operations = {"who": lambda session, _: seen.append((session.address, session.source))}
    server, client = proxied, "2001:db8:1:2:3::4"
    hello, pending = server.hello()
    peer = send(server, proxy_header(client) + hello)
    _, transport = consume_welcome(pending, server.read_frame(peer)[8:])
    assert server.ask(peer, transport, "who")[0].error is None
    assert seen == [(client, "2001:db8:1:2::/64")]


def test_a_reload_changes_whose_headers_count(run_server):
    server = run_server()
    assert not shake(server, "192.0.2.7")
    server.await_timed_out(BEHIND)
    changed = config.load(None, {}, {"listen": [f"{HOST}:0"], "proxy_from": [f"{BEHIND}/32"]})
    in_the_loop(server, lambda: server.server.configure(changed, ()))
    assert shake(server, "192.0.2.7")  # though his own time-out runs: a proxy is not looked up


def test_what_was_learnt_behind_a_proxy_stays_so_in_a_saved_table(proxied):
    assert ended(send(proxied, proxy_header("192.0.2.8") + HTTP)) == b""
    proxied.await_timed_out("192.0.2.8")

    def restart() -> None:
        dump = proxied.table.dump(0)
        proxied.table.remove("192.0.2.8")
        proxied.table.load(dump, 0)

    in_the_loop(proxied, restart)
    assert proxied.table.find("192.0.2.8", 0).proxied


# ---- a real proxy, and the kernel ----

HAPROXY = """
global
    maxconn 100
defaults
    mode tcp
    timeout connect 10s
    timeout client 60s
    timeout server 60s
frontend in
    bind {host}:{port}
    default_backend tt
backend tt
    server tt {server} send-proxy-v2 source {source}
"""


@contextmanager
def haproxy(place: Path, *, wrap: tuple[str, ...] = (), **where: str) -> Iterator[None]:
    file = place / "haproxy.cfg"
    file.write_text(HAPROXY.format(**where))
    process = subprocess.Popen([*wrap, "haproxy", "-db", "-q", "-f", str(file)], env=plain_environment())
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    need("haproxy")
    with Lab(tmp_path) as lab:
        yield lab


def test_behind_haproxy_a_scanner_is_timed_out_for_himself_and_never_in_the_kernel(lab: Lab, tmp_path: Path) -> None:
    one = lab.make_map()
    scanner, honest = NEIGHBOURS[:2]
    behind = {"host": HOST_ADDRESS, "port": "5001", "server": f"{HOST_ADDRESS}:{PORT}", "source": HOST_ADDRESS}
    options = ("-B", MAP, "--proxy-from", f"{HOST_ADDRESS}/32")
    with haproxy(tmp_path, wrap=lab.host.wrap, **behind):
        with lab.serve(*options) as server:
            until("HAProxy serves", lambda: lab.meet(server, honest, 5001) == "served")
            lab.misbehave(server, scanner, 5001)
            assert lab.meet(server, scanner, 5001) == "closed"
            assert lab.meet(server, honest, 5001) == "served"
            assert lab.meet(server, scanner) == "closed"  # past the proxy, too: in the process, not in the kernel
            assert not one.entries()
            assert lab.bans(server)[scanner]["in_kernel"] is False
        with lab.serve(*options) as server:  # the saved table remembers it
            assert lab.meet(server, scanner, 5001) == "closed"
            assert not one.entries()
            lab.misbehave(server, honest)  # not behind the proxy: the kernel has him
            assert lab.meet(server, honest) == "silent"
