"""The loop's verdicts, on a real server: what strangers send first, HELLOs, and frames after the handshake."""

import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from harness import HOST, LOGIN, PATIENCE, Running, ended, reset, until, until_end
from hypothesis import given, settings
from hypothesis import strategies as st
from test_frame import DATA, FIRST_PACKETS, HELLO, HELLO_LEAST, head, judge_frame, mutated_frames
from test_noise import LOW_ORDER

from tt.client import Client
from tt.dispatch import SERVER_NAME, Session
from tt.wire import COMPRESSED, MORE, Request, encode_requests

PING = b"\0"
WELCOME = 2
REFUSE = bytes.fromhex("5454010400000001") + b"\1"
SOURCES = (f"127.{1 + n // 62500}.{n // 250 % 250}.{1 + n % 250}" for n in itertools.count())  # each a new one


def closed(server: Running) -> dict[str, int]:
    return dict(server.counters()["closed"])


def judged(server: Running, parts: Iterable[bytes], source: str) -> str:
    """The reason with which a stranger's connection ends that sends these parts and then hangs up."""
    before = closed(server)
    peer = server.connect(source)
    with suppress(OSError):  # reset: judged before the last part
        for part in parts:
            peer.sendall(part)
    peer.close()
    after = until("a close", lambda: (now := closed(server)) != before and now)
    (reason,) = (name for name in after if after[name] != before[name])
    return reason


def reason_of(packet: bytes) -> str:
    """What the loop makes of a first packet and nothing behind it."""
    verdict, _ = judge_frame(packet[:1000], "new")
    return {"more": "peer_closed", "whole": "bad_hello"}.get(verdict, verdict)


# ---- first packets ----


def test_a_ping_is_answered(run_server):
    server = run_server()
    with server.client() as client:
        assert client.ping().size == 25


def test_the_first_packet_that_is_not_the_protocol_times_out_and_the_next_connection_is_closed_at_once(run_server):
    server = run_server()
    peer = server.connect("127.0.0.9")
    peer.sendall(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
    assert ended(peer) == b""
    event = server.await_timed_out("127.0.0.9")
    assert event["reason"] == "not_protocol"
    assert event["looks"] == "HTTP request"
    assert event["first"] == b"GET / HTTP/1.1\r\nHost: example.or"
    assert event["seconds"] == 600
    assert event["before"] == 0
    assert server.is_dropped("127.0.0.9")
    server.await_closed("timed_out")
    with server.client("127.0.0.1") as client:
        client.ping()


@pytest.mark.parametrize("name", FIRST_PACKETS)
def test_first_packet_whole_and_byte_by_byte(run_server, name):
    server = run_server()
    packet, verdict = FIRST_PACKETS[name]
    expected = {"more": "peer_closed", "whole": "bad_hello"}.get(verdict, verdict)
    whole = next(SOURCES)
    assert judged(server, [packet], whole) == expected
    assert judged(server, (packet[i : i + 1] for i in range(min(len(packet), 1000))), next(SOURCES)) == expected
    if expected in ("not_protocol", "bad_hello"):
        event = server.await_timed_out(whole)
        assert event["first"]
        assert packet.startswith(event["first"])  # it may have been judged before all of it was there


def test_first_packet_cut_anywhere(run_server):
    """The second part leaves only when the server holds the first."""
    server = run_server()
    for name in ("HTTP", "DATA before HELLO", "version 2", "HELLO of the most length + 1", "least HELLO of zeros"):
        packet, _ = FIRST_PACKETS[name]
        for cut in (1, 2, 3, 4, 7, 8, 9, len(packet) - 1):
            source, before = next(SOURCES), closed(server)

            def parts(packet=packet, cut=cut, before=before):
                yield packet[:cut]
                until("judged or held", lambda: server.server.waiting()["partial_frames"] or closed(server) != before)
                yield packet[cut:]

            assert judged(server, parts(), source) == reason_of(packet), (name, cut)


def test_any_bytes_with_any_cuts_come_to_the_verdict_of_the_header(run_server):
    server = run_server(connections_per_source=1000)

    @settings(max_examples=150)
    @given(st.binary(min_size=1, max_size=300) | mutated_frames(), st.sets(st.integers(1, 300), max_size=5))
    def check(data: bytes, cuts: set[int]) -> None:
        edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
        parts = [data[start:end] for start, end in itertools.pairwise(edges)]
        assert judged(server, parts, next(SOURCES)) == reason_of(data)

    check()


def test_bytes_behind_the_verdict_change_nothing(run_server):
    server = run_server()
    hello, _ = server.hello()
    assert judged(server, [b"GET / HTTP/1.1\r\n\r\n" + hello], next(SOURCES)) == "not_protocol"
    assert judged(server, [b"T" + hello], next(SOURCES)) == "bad_version"  # "TTT": the third byte is the version


# ---- unknown versions ----


def test_unknown_version_is_refused_once_and_not_timed_out(run_server):
    server = run_server()
    for tail in (b"", bytes(1000)):
        source = next(SOURCES)
        peer = server.connect(source)
        peer.sendall(head(HELLO, 1000, version=2) + tail)
        assert until_end(peer) == REFUSE  # an end of stream behind it, no reset
        assert not server.is_dropped(source)
    assert server.closed("bad_version") == 2
    assert not server.events.of("timed out")


def test_refuse_at_most_once_a_second_and_timed_out_at_the_fifth_unknown_version_in_a_minute(run_server):
    server = run_server()
    begin = time.monotonic()
    answers = []
    for _ in range(5):
        peer = server.connect("127.0.0.9")
        peer.sendall(b"TT\2")
        answers.append(ended(peer))
    assert answers[0] == REFUSE
    assert answers[4] == b""
    assert set(answers) == {REFUSE, b""}
    assert answers.count(REFUSE) <= 1 + int(time.monotonic() - begin)
    event = server.await_timed_out("127.0.0.9")
    assert event["reason"] == "not_protocol"
    assert event["first"] == b"TT\2"
    assert server.closed("bad_version") == 4
    assert server.closed("not_protocol") == 1


def test_refuse_again_after_a_second(run_server):
    server = run_server()
    answers = []
    for _ in range(2):
        peer = server.connect()
        peer.sendall(b"TT\2")
        answers.append(until_end(peer))
        peer.close()
        until("a later turn", lambda: not any(server.counters()["connections"].values()))  # which looks at the clock
        end = time.monotonic()  # not of the begin: the server's second begins in between
        until("a second", lambda end=end: time.monotonic() > end + 1)
    assert answers == [REFUSE, REFUSE]


def test_honest_client_of_the_same_source_is_served_between_unknown_versions(run_server):
    server = run_server()
    for _ in range(4):
        peer = server.connect("127.0.0.9")
        peer.sendall(b"TT\2")
        ended(peer)
        with server.client("127.0.0.9") as client:
            client.ping()


# ---- HELLO ----


def test_recorded_hello_on_a_new_connection_is_welcomed_and_opens_nothing(run_server):
    server = run_server()
    hello, _ = server.hello()
    for source in ("127.0.0.2", "127.0.0.3"):
        peer = server.connect(source)
        peer.sendall(hello)
        assert server.read_frame(peer)[3] == WELCOME
        peer.sendall(head(DATA, 17) + bytes(17))  # all that who recorded it can do: guess
        assert server.await_timed_out(source)["reason"] == "tampered"


def test_hello_as_second_message(run_server):
    server = run_server()
    hello, _ = server.hello()
    peer = server.connect()
    peer.sendall(hello)
    server.read_frame(peer)
    peer.sendall(hello)
    assert server.await_timed_out()["reason"] == "not_protocol"
    assert server.await_timed_out()["first"] == hello[:32]


def test_hello_for_another_key_is_timed_out_for_30_s(run_server):
    server = run_server()
    hello, _ = server.hello(X25519PrivateKey.generate().public_key().public_bytes_raw())
    peer = server.connect("127.0.0.9")
    peer.sendall(hello)
    assert ended(peer) == b""
    event = server.await_timed_out("127.0.0.9")
    assert (event["reason"], event["seconds"], event["before"]) == ("bad_hello", 30, 0)
    assert event["looks"] == "tape-tracking frame"
    assert server.is_dropped("127.0.0.9")


def test_hello_with_a_bit_flipped_anywhere_behind_its_header(run_server):
    server = run_server()
    hello, _ = server.hello()
    for bit in [*range(64, 8 * len(hello), 37), 8 * 40 - 1]:  # and the top bit of the key, which X25519 ignores
        flipped = bytearray(hello)
        flipped[bit // 8] ^= 1 << bit % 8
        assert judged(server, [bytes(flipped)], next(SOURCES)) == "bad_hello", bit


def test_hello_with_an_all_zero_or_low_order_key(run_server):
    server = run_server()
    hello, _ = server.hello()
    for point in LOW_ORDER:
        assert judged(server, [hello[:8] + point + hello[40:]], next(SOURCES)) == "bad_hello", point.hex()
        assert judged(server, [head(length=HELLO_LEAST) + point + bytes(16)], next(SOURCES)) == "bad_hello"


def test_hello_whose_payload_is_too_short_for_its_length(run_server):
    server = run_server()
    hello, _ = server.hello()
    assert judged(server, [hello[:-1]], next(SOURCES)) == "peer_closed"
    longer = head(length=len(hello) - 8 + 1) + hello[8:]
    assert judged(server, [longer], next(SOURCES)) == "peer_closed"
    assert judged(server, [longer + b"\0"], next(SOURCES)) == "bad_hello"
    shorter = head(length=len(hello) - 8 - 1) + hello[8:-1]
    assert judged(server, [shorter], next(SOURCES)) == "bad_hello"


def test_hello_split_anywhere_is_welcomed(run_server):
    server = run_server()
    hello, _ = server.hello()
    for cut in (*range(1, 10), 39, 40, len(hello) - 1):
        peer = server.connect(next(SOURCES))
        peer.sendall(hello[:cut])
        until("a partial frame", lambda: server.server.waiting()["partial_frames"])
        peer.sendall(hello[cut:])
        assert server.read_frame(peer)[3] == WELCOME
        peer.close()
    peer = server.connect(next(SOURCES))
    for i in range(len(hello)):
        peer.sendall(hello[i : i + 1])
    assert server.read_frame(peer)[3] == WELCOME


BEHIND = {
    "text": (b"GET / HTTP/1.1\r\n\r\n", "not_protocol"),
    "a byte": (b"G", "not_protocol"),
    "another version": (head(DATA, 17, version=2) + bytes(17), "not_protocol"),
    "DATA that cannot be sealed yet": (head(DATA, 17) + bytes(17), "tampered"),
    "DATA of the longest length before login": (head(DATA, 4096) + bytes(4096), "tampered"),
    "too long DATA": (head(DATA, 4097) + bytes(100), "too_long"),
    "too short DATA": (head(DATA, 16) + bytes(16), "not_protocol"),
    "a header": (head(DATA, 17), "peer_closed"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_bytes_behind_a_hello_lead_to_the_same_end_wherever_they_are_cut(run_server, name):
    server = run_server()
    hello, _ = server.hello()
    rest, expected = BEHIND[name]
    packet = hello + rest
    for cut in (0, 5, len(hello) - 1, len(hello), len(hello) + 1, len(packet) - 1):
        parts = [part for part in (packet[:cut], packet[cut:]) if part]
        assert judged(server, parts, next(SOURCES)) == expected, cut


@pytest.mark.parametrize("name", BEHIND)
def test_bytes_behind_a_bad_hello_are_never_looked_at(run_server, name):
    server = run_server()
    hello, _ = server.hello()
    bad = hello[:-1] + bytes([hello[-1] ^ 1]) + BEHIND[name][0]
    assert judged(server, [bad], next(SOURCES)) == "bad_hello"


# ---- DATA ----


def assert_tampered(server: Running, peer: socket.socket, source: str = "127.0.0.2") -> None:
    with pytest.raises(ConnectionResetError):  # no end of stream: nothing is owed to him
        peer.recv(1)
    event = server.await_timed_out(source)
    assert (event["reason"], event["seconds"]) == ("tampered", 600)
    assert server.closed("tampered") == 1


def test_data_replayed(run_server):
    server = run_server()
    peer, transport = server.handshake()
    frame = server.seal(transport, PING)
    peer.sendall(frame)
    assert server.read_plaintext(peer, transport) == PING
    peer.sendall(frame)
    assert_tampered(server, peer)


def test_data_reordered(run_server):
    server = run_server()
    peer, transport = server.handshake()
    first, second = server.seal(transport, PING), server.seal(transport, PING)
    peer.sendall(second + first)
    assert_tampered(server, peer)


def test_data_of_another_connection(run_server):
    server = run_server()
    peer, _ = server.handshake()
    _, other = server.handshake("127.0.0.3")
    peer.sendall(server.seal(other, PING))
    assert_tampered(server, peer)


@pytest.mark.parametrize("byte", [7, 8, 9, 24])
def test_data_with_a_bit_flipped(run_server, byte):
    """Also one of the header, which is authenticated with the rest."""
    server = run_server()
    peer, transport = server.handshake()
    frame = bytearray(server.seal(transport, PING))
    frame[byte] ^= 2
    peer.sendall(frame + bytes(2))  # as long as its flipped length says
    assert_tampered(server, peer)


def test_what_was_good_before_a_tampered_frame_was_served_and_the_source_is_timed_out_all_the_same(run_server):
    calls = []
    server = run_server({"count": lambda _session, _arguments: calls.append(1)})
    peer, transport = server.handshake()
    good = server.seal(transport, b"\0" + encode_requests([Request(1, "count")]))
    peer.sendall(good + good)
    server.await_timed_out()
    assert calls == [1]


@pytest.mark.parametrize("before", [0, 1])
def test_tampered_data_followed_by_a_reset_is_judged(run_server, before):
    """What comes before it has an answer, which cannot be sent any more; that must not hide the verdict."""
    server = run_server()
    peer, transport = server.handshake()
    good = b"".join(server.seal(transport, PING) for _ in range(before))
    peer.sendall(good + head(DATA, 17) + bytes(17))
    reset(peer)
    until("a close", lambda: sum(closed(server).values()))
    assert server.closed("tampered") == 1
    assert server.await_timed_out()["reason"] == "tampered"


@pytest.mark.parametrize("length", [4097, 2**16, 2**31, 2**32 - 1])
def test_over_long_data_before_login_closes_gracefully_and_times_nobody_out(run_server, length):
    server = run_server()
    peer, transport = server.handshake()
    peer.sendall(server.seal(transport, PING) + head(DATA, length) + bytes(5000))
    assert server.read_plaintext(peer, transport) == PING
    assert until_end(peer) == b""
    server.await_closed("too_long")
    assert not server.is_dropped()
    assert not server.events.of("timed out")


@pytest.mark.parametrize("length", [65536, 2**31, 2**32 - 1])
def test_over_long_data_after_login_closes_gracefully_and_times_nobody_out(run_server, length):
    server = run_server(LOGIN)
    peer, _ = server.user()
    peer.sendall(head(DATA, length))
    assert until_end(peer) == b""
    server.await_closed("too_long")
    assert not server.is_dropped()


def test_longest_data_is_taken_in_each_state(run_server):
    server = run_server(LOGIN)
    peer, transport = server.handshake()
    for longest in (4096, 65535):
        item = Request(1, "none", msgspec.Raw(msgspec.msgpack.encode(bytes(longest - 100))))
        overhead = len(encode_requests([item])) - (longest - 100)
        item = Request(1, "none", msgspec.Raw(msgspec.msgpack.encode(bytes(longest - 17 - overhead))))
        frame = server.seal(transport, b"\0" + encode_requests([item]))
        assert len(frame) == 8 + longest
        peer.sendall(frame)
        assert b"unknown_operation" in server.read_plaintext(peer, transport)
        if longest == 4096:
            server.ask(peer, transport, "login")


@pytest.mark.parametrize("flags", [COMPRESSED, MORE, COMPRESSED | MORE, 4, 8, 128, 255])
def test_flags_before_login(run_server, flags):
    server = run_server()
    peer, transport = server.handshake()
    peer.sendall(server.seal(transport, bytes([flags]) + zstandard.compress(encode_requests([Request(1, "none")]))))
    assert_tampered(server, peer)


BOMB = zstandard.compress(bytes(120 << 20))
BAD_PLAINTEXTS = {
    "no flags byte of its own": b"\0" + b"\xc1",
    "bomb that names 120 MiB": bytes([COMPRESSED]) + BOMB,
    "one byte over a MiB": bytes([COMPRESSED]) + zstandard.compress(bytes((1 << 20) + 1)),
    "size of 2^40 claimed": bytes([COMPRESSED]) + b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**40) + bytes(20),
    "no size": bytes([COMPRESSED]) + zstandard.ZstdCompressor(write_content_size=False).compress(bytes(500)),
    "trailing data": bytes([COMPRESSED]) + zstandard.compress(b"\x90") + b"\0",
    "truncated": bytes([COMPRESSED]) + zstandard.compress(random.Random(1).randbytes(500))[:-1],
    "no zstd": bytes([COMPRESSED]) + b"GET / HTTP/1.1",
    "unknown flag": b"\4" + encode_requests([Request(1, "none")]),
    "empty part": bytes([MORE]),
    "300,000 arrays in arrays": bytes([COMPRESSED]) + zstandard.compress(b"\x91" * 300_000 + b"\x90"),
    "map": b"\0" + msgspec.msgpack.encode({"id": 1}),
    "empty array": b"\0\x90",
    "text": b"\0GET / HTTP/1.1\r\n\r\n",
    "array of 2^32 - 1": b"\0\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", BAD_PLAINTEXTS)
def test_plaintext_of_a_logged_in_user_that_no_honest_client_sends(run_server, name):
    assert len(BOMB) < 16_000
    server = run_server(LOGIN)
    peer, transport = server.user()
    peer.sendall(server.seal(transport, BAD_PLAINTEXTS[name]))
    assert_tampered(server, peer)
    with server.client("127.0.0.3") as client:
        client.ping()


def test_4000_arrays_in_arrays_answer_with_an_error_or_end_as_tampered_and_nothing_fails(run_server):
    """Which of the two differs between versions of Python; the harness checks that nothing failed."""
    server = run_server(LOGIN)
    peer, transport = server.user()
    peer.sendall(server.seal(transport, b"\0\x91" + b"\x91" * 4000 + b"\x90"))
    try:
        plaintext = server.read_plaintext(peer, transport)
    except ConnectionResetError:
        assert server.await_timed_out()["reason"] == "tampered"
    else:
        assert b"malformed" in plaintext


# ---- on the wire ----


class Relay:
    """Between one client and a server; keeps what passes, both ways."""

    def __init__(self, server: Running) -> None:
        self.to_server = bytearray()
        self.to_client = bytearray()
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._server = server
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        server = self._server.connect()
        back = threading.Thread(target=self._pump, args=(server, client, self.to_client), daemon=True)
        back.start()
        self._pump(client, server, self.to_server)
        back.join()
        client.close()

    @staticmethod
    def _pump(here: socket.socket, there: socket.socket, kept: bytearray) -> None:
        while part := here.recv(65536):
            kept += part
            there.sendall(part)
        there.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Both ends have closed."""
        self._thread.join(PATIENCE)
        self._listener.close()


def words_in(capture: bytes, plaintext: bytes, size: int = 8) -> Sequence[bytes]:
    """The parts of `size` bytes of a plaintext that stand in a capture."""
    return [part for i in range(len(plaintext) - size) if (part := plaintext[i : i + size]) in capture]


def test_compressible_body_is_smaller_on_the_wire_and_no_plaintext_is_in_a_capture(run_server):
    text = " ".join(f"tape {n:05} in rack {n % 7} of vault {n % 3}" for n in range(130))[:4096]

    def echo(session: Session, arguments: msgspec.Raw) -> object:
        assert session.logged_in
        return msgspec.msgpack.decode(arguments)["text"]

    server = run_server({**LOGIN, "operation echo": echo})
    relay = Relay(server)
    with Client(HOST, relay.port, key=server.key.public, name="librarian's client") as client:
        client.request("login")
        before = len(relay.to_server), len(relay.to_client)
        assert client.request("operation echo", {"text": text}) == text
    relay.close()
    assert len(text) == 4096
    assert len(relay.to_server) - before[0] < 2048
    assert len(relay.to_client) - before[1] < 2048
    capture = bytes(relay.to_server + relay.to_client)
    for plaintext in (text.encode(), b"librarian's client", b"operation echo", SERVER_NAME.encode()):
        assert not words_in(capture, plaintext)
    assert b"\x28\xb5\x2f\xfd" not in capture  # the magic of zstd
