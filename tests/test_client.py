"""tt.client against a peer on real loopback sockets: honest, broken, slow and hostile.

Waiting is bounded by the client's own time-outs; the only pause is that of the peer that sends slowly on purpose.
"""

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from scripted_server import (
    Link,
    Peer,
    Script,
    after_welcome,
    answer_pings,
    new_key,
    reply,
    reset_before_welcome,
    result,
    send,
    silence,
)

from tt import known_servers, noise, wire
from tt.client import (
    Client,
    ConnectionLost,
    NoConnection,
    NotAccepted,
    ProtocolError,
    Refused,
    RequestFailed,
    UnknownServer,
)

SHORT = 0.2  # seconds: the time-out where the peer lets it run out
HINT = "this address may be timed out.*see the server's log, or run 'tt bans list' on the server"


@pytest.fixture
def start() -> Iterator[Callable[..., Peer]]:
    """Start peers that end with the test; what fails inside them fails the test."""
    with contextlib.ExitStack() as stack:

        def start(*scripts: Script, **options: str) -> Peer:
            peer = Peer(*scripts, **options)
            stack.callback(peer.close)
            return peer

        yield start


@pytest.fixture(autouse=True)
def no_known_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


Start = Callable[..., Peer]


# --- an honest server -------------------------------------------------------------------------------------------------


def test_a_ping_measures_what_is_on_the_wire(start: Start) -> None:
    peer = start(answer_pings)
    with peer.client(name="pytest", source="127.0.0.5") as connection:
        assert connection.connected
        assert connection.address == "127.0.0.1"
        pongs = [connection.ping() for _ in range(3)]
        assert [pong.size for pong in pongs] == [8 + 1 + 16] * 3
        assert all(0 < pong.seconds < 10 for pong in pongs)
        assert peer.links[0].sock.getpeername()[0] == "127.0.0.5"
        assert connection._session._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert peer.links[0].hello.name == "pytest"
    assert not connection.connected
    connection.close()  # a second time is nothing


def test_requests_are_answered_and_an_error_reply_keeps_the_connection(start: Start) -> None:
    def make(number: int, operation: str, arguments: object) -> bytes:
        if operation == "fail":
            return wire.encode_replies([wire.Reply(number, wire.ReplyError("no_such_tape", "tape X is unknown"), NIL)])
        return result(number, [operation, arguments])

    with start(reply(make)).client() as connection:
        assert connection.request("echo", {"volume": "X00001"}) == ["echo", {"volume": "X00001"}]
        with pytest.raises(RequestFailed, match=r"tape X is unknown \(no_such_tape\)") as error:
            connection.request("fail")
        assert (error.value.code, error.value.message) == ("no_such_tape", "tape X is unknown")
        assert connection.request("echo") == ["echo", {}]
        with pytest.raises(TypeError):
            connection.request("echo", {"what": object()})
        assert connection.connected


NIL = msgspec.Raw(msgspec.msgpack.encode(None))


def test_long_messages_pass_both_ways_after_login_and_not_before(start: Start) -> None:
    peer = start(reply(lambda number, operation, arguments: result(number, arguments)))
    text = "".join(f"volume {n} in slot {n * 7919 % 10007}\n" for n in range(30_000))[: 900 * 1024]
    with peer.client() as connection:
        with pytest.raises(RequestFailed, match=r"before login 4096 is the most: log in \(too_long\)"):
            connection.request("echo", {"text": text[:4079]})
        connection.request("login")
        assert connection.request("echo", {"text": text}) == {"text": text}
        with pytest.raises(RequestFailed, match=r"send several messages \(too_long\)"):
            connection.request("echo", {"text": "x" * wire.MAX_TO_SERVER})
        assert connection.connected


def test_every_address_is_tried(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = start(answer_pings)
    refusing = socket.create_server(("127.0.0.2", 0))
    refusing.close()
    use_addresses(monkeypatch, refusing_address := ("127.0.0.2", peer.port), ("127.0.0.1", peer.port))
    with Client("tapes.example", peer.port, key=peer.key.public) as connection:
        assert connection.address == "127.0.0.1"
    use_addresses(monkeypatch, refusing_address, ("127.0.0.3", peer.port))
    with pytest.raises(NoConnection, match=r"127.0.0.2: Connection refused, 127.0.0.3: Connection refused"):
        Client("tapes.example", peer.port, key=peer.key.public).connect()


def test_an_address_that_swallows_packets_leaves_time_for_the_next(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = start(answer_pings)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):  # fills its backlog: the kernel drops every further SYN
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        use_addresses(monkeypatch, full.getsockname(), ("127.0.0.1", peer.port))
        connection = Client("tapes.example", peer.port, key=peer.key.public, timeout=SHORT)
        in_some_time(connection, connection.connect)
        assert connection.ping().size == 25
        connection.close()


def in_some_time(client: Client, connect: Callable[[], None]) -> None:
    """With ever longer time-outs, the last one of seconds, until a busy machine is quick enough for one."""
    for _ in range(5):
        client._timeout *= 2.5
        with contextlib.suppress(NoConnection):
            return connect()
    return connect()


def use_addresses(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)


# --- which key --------------------------------------------------------------------------------------------------------


def test_an_unknown_server_is_sent_nothing(start: Start) -> None:
    peer = start(answer_pings)
    with pytest.raises(UnknownServer, match=f"run 'tt known add 127.0.0.1:{peer.port} KEY'"):
        peer.client(key=None).connect()
    assert peer.links == []


@pytest.mark.parametrize("drop", [True, False], ids=["the server drops an old key's HELLO", "WELCOME is not for it"])
def test_the_second_known_key_is_tried_on_a_fresh_connection(start: Start, *, drop: bool) -> None:
    def judge(link: Link) -> None:
        if drop:
            with pytest.raises(noise.NoiseError):
                noise.consume_hello(link.key, link.frame()[1])
            link.reset()
        else:
            send(garbled_welcome())(link)

    peer = start(judge, answer_pings)
    known_servers.add("127.0.0.1", peer.port, peer.key.public)
    known_servers.add("127.0.0.1", peer.port, new_key().public)  # the newest, so the first to be tried
    with peer.client(key=None) as connection:
        assert connection.ping().size == 25
    assert len(peer.links) == 2


def garbled_welcome() -> bytes:
    return wire.header(wire.WELCOME, 60) + new_key().public + bytes(28)


def test_a_key_of_low_order_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(NotAccepted, match="no usable X25519 key"),
    ):
        Client("127.0.0.1", listener.getsockname()[1], key=bytes(32)).connect()


# --- no connection ----------------------------------------------------------------------------------------------------


def test_a_refused_client_is_told_where_to_look() -> None:
    with socket.socket() as silent:  # which nobody else can listen on meanwhile
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(NoConnection, match=rf"no connection to 127.0.0.1:{port} \(Connection refused\).*{HINT}"):
            Client("127.0.0.1", port, key=new_key().public).connect()


def close_before_welcome(link: Link) -> None:
    link.frame()


def half_a_welcome(link: Link) -> None:
    link.frame()
    link.sock.sendall(garbled_welcome()[:30])


@pytest.mark.parametrize("script", [reset_before_welcome, close_before_welcome, half_a_welcome])
def test_a_client_dropped_before_welcome_is_told_where_to_look(start: Start, script: Script) -> None:
    connection = start(script).client()
    with pytest.raises(NoConnection, match=f"dropped before WELCOME.*{HINT}"):
        connection.connect()
    assert not connection.connected


def test_a_client_that_gets_silence_is_told_where_to_look(start: Start) -> None:
    why = refusal(start(silence).client(timeout=SHORT))
    assert re.search(rf"no WELCOME within {SHORT} s\).*{HINT}", why), why


def refusal(client: Client) -> str:
    """Why it cannot connect; asked anew where a busy machine let the time run out before anything was sent."""
    for _ in range(5):
        with pytest.raises(NoConnection) as error:
            client.connect()
        if "no connection within" not in str(error.value):
            break
    return str(error.value)


def drip(data: bytes) -> Script:
    """Sends a byte every 20 ms: each soon enough, all of them too late."""

    def script(link: Link) -> None:
        if data[3] == wire.DATA:
            link.accept()
        link.frame()
        for number in range(len(data)):
            link.sock.sendall(data[number : number + 1])
            link.stopped.wait(0.02)

    return script


def test_a_welcome_in_slow_drops_ends_at_the_deadline(start: Start) -> None:
    assert "no WELCOME within" in refusal(start(drip(garbled_welcome())).client(timeout=SHORT))


def test_a_host_without_an_address_is_named() -> None:
    for host in ("no-such-host.invalid", "a" * 64 + ".invalid"):  # the second is no name at all for the DNS
        with pytest.raises(NoConnection, match=rf"no address found for {host}:5000 \(.+\): check the host's name"):
            Client(host, key=new_key().public).connect()


def test_a_source_that_is_not_ours_is_named(start: Start) -> None:
    peer = start(answer_pings)
    with pytest.raises(NoConnection, match=r"from 192\.0\.2\.1 \(.+\): give an address of this machine"):
        peer.client(source="192.0.2.1").connect()
    with pytest.raises(NoConnection, match="has an address of the family of ::1"):
        peer.client(source="::1").connect()


@pytest.mark.parametrize("host", ["", "two words", "[::1]", "host:1"])
def test_what_is_no_host_is_refused_at_once(host: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        Client(host)


# --- a WELCOME that is none -------------------------------------------------------------------------------------------


def test_a_peer_without_the_servers_key_is_not_accepted(start: Start) -> None:
    def other_key(link: Link) -> None:
        """Knows the public key, as everyone may, but not the private one: it cannot make WELCOME."""
        link.frame()
        ours, _ = noise.create_hello(link.key.public, b"x")
        _, pending = noise.consume_hello(link.key, ours)
        welcome, _ = noise.create_welcome(pending, wire.encode_welcome(wire.Welcome(name="", version="")))
        link.sock.sendall(wire.header(wire.WELCOME, len(welcome)) + welcome)

    with pytest.raises(NotAccepted, match=r"does not hold the key that is known for it.*tt known add 127.0.0.1:"):
        start(other_key).client().connect()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak the tape-tracking protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak the tape-tracking protocol"),
        (b"TT\x02\x02" + bytes(4), "speaks version 2 of the protocol, not 1"),
        (b"TT\x01\x02\xff\xff\xff\xff", "a frame announces 4294967295 bytes"),
        (b"TT\x01\x02\x80\x00\x00\x00", "a frame announces 2147483648 bytes"),
        (b"TT\x01\x02\x00\x00\x00\x00", "a frame of type 2 and length 0"),
        (b"TT\x01\x02\x00\x00\x00\x2f", "a frame of type 2 and length 47"),
        (b"TT\x01\x02\x00\x00\x00\xf1", "a frame of type 2 and length 241"),
        (b"TT\x01\x01\x00\x00\x00\x30", "a frame of type 1 and length 48"),
        (b"TT\x01\x03\x00\x00\x00\x30", "a frame of type 3 and length 48"),
        (b"TT\x01\x04\x00\x00\x00\x00", "a frame of type 4 and length 0"),
        (b"TT\x01\x04\x00\x00\x01\x00", "a frame of type 4 and length 256"),
    ],
)
def test_garbage_in_place_of_welcome_is_judged_by_its_header_alone(start: Start, data: bytes, what: str) -> None:
    with pytest.raises(NotAccepted, match=rf"did not answer with WELCOME \(.*{what}.*\): check that host and port"):
        start(send(data)).client().connect()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93\x01\x02\x03",
        b"\x91" * 190,
        msgspec.msgpack.encode({"name": "", "version": "", "dictionary": 7}),
    ],
)
def test_an_authentic_welcome_with_a_bad_payload_is_not_accepted(start: Start, payload: bytes) -> None:
    with pytest.raises(NotAccepted, match=r"did not answer with WELCOME \(.+\)"):
        start(lambda link: link.accept(payload)).client().connect()


@pytest.mark.parametrize("header_version", [1, 2, 255])
def test_refuse_names_the_versions_whatever_its_own_version(start: Start, header_version: int) -> None:
    refuse = b"TT" + bytes([header_version, 4, 0, 0, 0, 2, 2, 3])
    with pytest.raises(Refused, match="speaks version 2, 3 of the protocol, not 1") as error:
        start(send(refuse)).client().connect()
    assert error.value.versions == (2, 3)


# --- after WELCOME ----------------------------------------------------------------------------------------------------


def corrupted(link: Link) -> bytes:
    frame = link.seal(b"\0")
    return frame[:-1] + bytes([frame[-1] ^ 1])


def replayed(link: Link) -> bytes:
    """The second of two equal frames: the nonce has gone on."""
    link.sock.sendall(frame := link.seal(b"\0"))
    link.read()
    return frame


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (corrupted, "does not authenticate"),
        (lambda link: b"TT\x01\x03\x00\x00\x00\x11" + bytes(17), "does not authenticate"),
        (lambda link: b"TT\x01\x03\x00\x00\x00\x10", "length 16"),
        (lambda link: b"TT\x01\x03\x00\x01\x00\x00", "announces 65536 bytes"),
        (lambda link: b"TT\x01\x03\xff\xff\xff\xff", "announces 4294967295 bytes"),
        (lambda link: b"TT\x01\x02\x00\x00\x00\x11", "type 2"),
        (lambda link: b"TT\x02\x03\x00\x00\x00\x11", "speaks version 2"),
        (lambda link: b"GET / HT", "does not speak"),
        (lambda link: link.seal(b"\x01" + bytes(20)), "before login has flags"),
        (lambda link: link.seal(b"\x02"), "before login has flags"),
        (lambda link: link.seal(b"\x80"), "before login has flags"),
        (lambda link: link.seal(b"\0" + result(1, None)), "a message in place of the answer to a ping"),
    ],
)
def test_a_bad_frame_ends_the_connection(start: Start, make: Callable[[Link], bytes], what: str) -> None:
    connection = start(after_welcome(make)).client()
    connection.connect()
    with pytest.raises(ProtocolError, match=rf"127.0.0.1:\d+ broke the protocol \(.*{what}.*\): connect again"):
        connection.ping()
    assert not connection.connected
    with pytest.raises(ConnectionLost, match="call connect"):
        connection.ping()


def test_a_replayed_frame_ends_the_connection(start: Start) -> None:
    connection = start(after_welcome(replayed)).client()
    connection.connect()
    connection.ping()
    with pytest.raises(ProtocolError, match="does not authenticate"):
        connection.ping()


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda number: b"", "cannot be read"),
        (lambda number: b"\xc1", "cannot be read"),
        (lambda number: b"\x91" * 4000, "cannot be read"),
        (lambda number: msgspec.msgpack.encode({"id": number}), "cannot be read"),
        (lambda number: msgspec.msgpack.encode([[number, "error", None]]), "cannot be read"),
        (lambda number: msgspec.msgpack.encode([[number, None]]) + b"\x91" * 4000, "cannot be read"),
        (lambda number: b"\x90", "cannot be read"),
        (lambda number: result(number + 1, None), "reply to another request"),
        (lambda number: wire.encode_replies([wire.Reply(number, None, NIL)] * 2), "reply to another request"),
        (lambda number: wire.encode_replies([wire.Reply(number, None, msgspec.Raw(b"\x91" * 2000 + b"\xc0"))]), "read"),
    ],
)
def test_a_bad_reply_ends_the_connection(start: Start, make: Callable[[int], bytes], what: str) -> None:
    connection = start(reply(lambda number, _, __: make(number))).client()
    connection.connect()
    with pytest.raises(ProtocolError, match=what):
        connection.request("any")
    assert not connection.connected


def test_an_endless_message_is_cut_off_at_16_mib(start: Start) -> None:
    sent = 0

    def flood(link: Link) -> None:
        nonlocal sent
        link.accept()
        (request,) = wire.decode_requests(link.read()[1:])
        assert isinstance(request, wire.Request)
        link.sock.sendall(link.seal(b"\0" + result(request.id, None)))
        link.read()
        part = b"\x02" + bytes(60_000)
        while sent < 2 * wire.MAX_TO_CLIENT:
            link.sock.sendall(link.seal(part))
            sent += len(part)

    connection = start(flood).client()
    connection.connect()
    connection.request("login")
    with pytest.raises(ProtocolError, match="a message is longer than 16777216 bytes"):
        connection.request("list")
    assert sent < 2 * wire.MAX_TO_CLIENT


def fin_after_welcome(link: Link) -> None:
    link.accept()
    link.read()


def reset_after_welcome(link: Link) -> None:
    link.accept()
    link.read()
    link.reset()


def half_a_frame(link: Link) -> None:
    link.accept()
    link.read()
    link.sock.sendall(link.seal(b"\0")[:-1])


@pytest.mark.parametrize("script", [fin_after_welcome, reset_after_welcome, half_a_frame])
def test_a_lost_connection_is_told_and_can_be_made_anew(start: Start, script: Script) -> None:
    connection = start(script, answer_pings).client()
    connection.connect()
    with pytest.raises(
        ConnectionLost, match=rf"the connection to 127.0.0.1:\d+ was lost \(.+\): connect again.*{HINT}"
    ):
        connection.ping()
    assert not connection.connected
    connection.connect()
    assert connection.ping().size == 25
    connection.close()


@pytest.mark.parametrize("script", [after_welcome(lambda link: b""), drip(b"TT\x01\x03\x00\x00\xff\xff" + bytes(200))])
def test_silence_and_slow_drops_after_welcome_end_at_the_deadline(start: Start, script: Script) -> None:
    connection = start(script).client()
    connection.connect()
    connection._timeout = SHORT  # which the handshake need not keep
    with pytest.raises(ConnectionLost, match=rf"no answer from 127.0.0.1:\d+ within {SHORT} s"):
        connection.ping()
    assert not connection.connected


def test_ctrl_c_in_the_middle_of_an_operation_closes_the_connection(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = start(answer_pings).client()
    connection.connect()

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("tt.connection._receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        connection.ping()
    assert not connection.connected
