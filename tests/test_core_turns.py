"""The loop's turns, on a real server: how much a connection gets in one, and that the rest is not forgotten.

The second is the trap of edge-triggered epoll, which tells of what arrives and not of what is left at a bound.
"""

import socket
import threading
import time

import pytest
from harness import LOGIN, PATIENCE, Running, read_exactly, reset, until, until_end
from test_core_close import PING, PONG, many, seconds, unacknowledged
from test_frame import HELLO, head

from tt._core import PROTOCOL
from tt.dispatch import Session

# ---- how much one is given ----


class Noting:
    """A session that notes how many bytes it is given at a time, and waits with them until it may go on."""

    def __init__(self, session: Session, sizes: list[int], go_on: threading.Event) -> None:
        self._session = session
        self._sizes = sizes
        self._go_on = go_on
        self.closed = session.closed

    def receive(self, frames: list[bytes]) -> object:
        self._sizes.append(sum(map(len, frames)))
        assert self._go_on.wait(PATIENCE)
        return self._session.receive(frames)


@pytest.mark.parametrize("logged_in", [False, True])
def test_guest_is_given_the_bytes_of_one_frame_a_turn_and_a_user_all_that_came(run_server, logged_in):
    server = run_server(LOGIN)
    sizes: list[int] = []
    go_on = threading.Event()
    hello = server.application.hello

    def hello_noting(connection, frame):
        session, welcome = hello(connection, frame)
        return Noting(session, sizes, go_on), welcome

    server.application.hello = hello_noting
    go_on.set()
    peer, transport = server.user() if logged_in else server.handshake()
    go_on.clear()
    sizes.clear()
    peer.sendall(server.seal(transport, PING))
    until("the first turn", lambda: sizes)
    peer.sendall(many(server, transport, 2000))
    until("all of it there", lambda: unacknowledged(peer) == 0)
    go_on.set()
    read_exactly(peer, 2001 * PONG)
    if logged_in:
        assert sizes == [PONG, 2000 * PONG]
    else:
        assert max(sizes) < PROTOCOL["HEADER"] + PROTOCOL["DATA_MOST_GUEST"] + PONG  # and what was held of a frame


# ---- what is left at a bound ----


def test_more_bytes_than_a_turn_reads_in_one_burst(run_server):
    server = run_server(read_per_turn="4096")
    peer, transport = server.handshake()
    peer.sendall(many(server, transport, 3000))  # 75,000 bytes
    read_exactly(peer, 3000 * PONG)


def test_more_connections_than_a_turn_accepts_wait_in_the_backlog_before_the_loop_starts(tmp_path):
    server = Running(tmp_path, accepts_per_turn="1", read_per_turn="4096")
    peers = [server.connect(f"127.0.1.{number}") for number in range(1, 101)]
    for peer in peers:
        peer.sendall(server.hello()[0])
    with server:
        begin = time.monotonic()
        for peer in peers:
            assert server.read_frame(peer)[3] == 2
        assert seconds(begin) < 50  # and not one at each tick of a second


@pytest.mark.parametrize("packet", [b"G", b"GET / HTTP/1.1\r\n\r\n", head(HELLO, 0)])
def test_data_followed_by_a_reset_before_the_accept_is_judged(tmp_path, packet):
    server = Running(tmp_path)
    peer = server.connect()
    peer.sendall(packet)
    reset(peer)
    with server:
        assert server.await_timed_out()["reason"] == "not_protocol"
        assert server.timed_out()["first"] == packet


def test_part_of_a_hello_followed_by_a_reset_or_a_close_before_the_accept_is_no_evidence(tmp_path):
    server = Running(tmp_path)
    for close in (reset, socket.socket.close):
        peer = server.connect()
        peer.sendall(b"TT\1")
        close(peer)
    with server:
        server.await_closed("peer_closed", 2)
        assert not server.events.of("timed out")


def test_hello_and_half_close_before_the_accept_is_welcomed_and_ended(tmp_path):
    server = Running(tmp_path)
    peer = server.connect()
    peer.sendall(server.hello()[0])
    peer.shutdown(socket.SHUT_WR)
    with server:
        assert until_end(peer)[3] == 2
        server.await_closed("peer_closed")


def test_half_close_after_the_request_still_gets_its_reply(run_server):
    server = run_server()
    for count in (1, 500):
        peer, transport = server.handshake()
        peer.sendall(many(server, transport, count))
        peer.shutdown(socket.SHUT_WR)
        assert len(until_end(peer)) == count * PONG
    server.await_closed("peer_closed", 2)


def test_client_that_pipelines_10000_pings_before_it_reads(run_server):
    server = run_server()
    peer, transport = server.handshake()
    peer.sendall(many(server, transport, 10_000))
    replies = read_exactly(peer, 10_000 * PONG)
    for start in range(0, len(replies), PONG):
        assert transport.open(replies[start : start + 8], replies[start + 8 : start + PONG]) == PING
    peer.sendall(server.seal(transport, PING))
    assert server.read_plaintext(peer, transport) == PING
