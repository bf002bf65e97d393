"""The bridge from frames to operations: what a peer sends is answered, refused by request, or evidence.  No socket."""

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from test_noise import LOW_ORDER, static_key

from tt import dispatch
from tt.dispatch import (
    MAX_REQUESTS_BEFORE_LOGIN,
    SERVER_NAME,
    SLICE,
    SLICE_SIZE,
    Dispatcher,
    Operation,
    OperationError,
    Secret,
    Session,
)
from tt.noise import Transport, consume_welcome, create_hello
from tt.wire import (
    COMPRESSED,
    DATA,
    HELLO,
    MAX_DATA,
    MAX_TO_CLIENT,
    Assembler,
    Hello,
    Reply,
    Request,
    decode_replies,
    decode_welcome,
    encode_hello,
    encode_requests,
    header,
    parse_header,
    split_message,
)

KEY = static_key(X25519PrivateKey.generate())
PING = b"\0"
pack = msgspec.msgpack.encode


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice ends by what is done in it, on any machine."""
    monkeypatch.setattr(dispatch, "SLICE_TIME", 60.0)


class FakeConnection:
    """What the loop lends a session, with what the session did to it."""

    def __init__(self) -> None:
        self.source = "192.0.2.1"
        self.closed: list[str] = []
        self.logged_in = False

    def close(self, reason: str, /) -> None:
        self.closed.append(reason)

    def log_in(self) -> None:
        self.logged_in = True


class Peer:
    """A client's end of a session."""

    def __init__(self, operations: dict[str, Operation] | None = None, *, logged_in: bool = False) -> None:
        self.connection = FakeConnection()
        message, pending = create_hello(KEY.public, encode_hello(Hello("test", "0")))
        answer = Dispatcher([KEY], operations or {}).hello(self.connection, header(HELLO, len(message)) + message)
        assert answer is not None
        self.session, welcome = answer
        _, self.transport = consume_welcome(pending, welcome[8:])
        self.assembler = Assembler(MAX_TO_CLIENT)
        if logged_in:
            self.session.log_in()
            self.assembler.flags_allowed = True

    def seal(self, plaintext: bytes) -> bytes:
        head = header(DATA, len(plaintext) + 16)
        return head + self.transport.seal(head, plaintext)

    def send(self, *plaintexts: bytes) -> list[bytes]:
        """The plaintexts that come back for frames that are handed over together."""
        answer = self.session.receive([self.seal(plaintext) for plaintext in plaintexts])
        frames = answer if isinstance(answer, bytes) else b"".join(answer or ())
        return list(opened(self.transport, frames))

    def bodies(self, *plaintexts: bytes) -> list[bytes]:
        parts = [self.assembler.feed(plaintext) for plaintext in self.send(*plaintexts)]
        return [body for body in parts if body is not None]

    def ask(self, body: bytes) -> list[Reply]:
        """The replies to a body of requests, of all messages."""
        plaintexts = split_message(body, MAX_DATA, compress=self.session.logged_in)
        return [reply for answer in self.bodies(*plaintexts) for reply in decode_replies(answer)]

    def tampers(self, *plaintexts: bytes) -> bool:
        """Whether that is answered with nothing and ends the connection as tampered."""
        return not self.send(*plaintexts) and self.connection.closed == ["tampered"]


def opened(transport: Transport, frames: bytes) -> list[bytes]:
    plaintexts = []
    while frames:
        kind, length = parse_header(frames[:8])
        assert kind == DATA
        plaintexts.append(transport.open(frames[:8], frames[8 : 8 + length]))
        frames = frames[8 + length :]
    return plaintexts


def result(reply: Reply) -> Any:
    assert reply.error is None
    return msgspec.msgpack.decode(reply.result)


def codes(replies: list[Reply]) -> list[str | None]:
    return [reply.error and reply.error.code for reply in replies]


def log_in(session: Session, _arguments: msgspec.Raw) -> None:
    session.log_in()


class Shelf(msgspec.Struct):
    rack: str
    level: int = 0


def shelve(_session: Session, arguments: msgspec.Raw) -> str:
    shelf = msgspec.msgpack.decode(arguments, type=Shelf)
    return f"{shelf.rack}/{shelf.level}"


def requests(count: int, operation: str = "shelve", **arguments: Any) -> bytes:
    return encode_requests([Request(n, operation, msgspec.Raw(pack(arguments))) for n in range(1, count + 1)])


# ---- HELLO ----


def hello(payload: bytes, public: bytes = KEY.public) -> bytes:
    message, _ = create_hello(public, payload)
    return header(HELLO, len(message)) + message


def test_hello_is_welcomed_by_name_and_version():
    connection = FakeConnection()
    message, pending = create_hello(KEY.public, encode_hello(Hello("librarian", "7.1", [3, 4])))
    session, welcome = Dispatcher([KEY], {}).hello(connection, header(HELLO, len(message)) + message)
    payload, _ = consume_welcome(pending, welcome[8:])
    assert decode_welcome(payload).name == SERVER_NAME
    assert decode_welcome(payload).dictionary == 0
    assert session.hello == Hello("librarian", "7.1", [3, 4])
    assert session.source == "192.0.2.1"
    assert not session.logged_in


def test_hello_for_either_key_while_the_key_changes():
    old, new, other = (static_key(X25519PrivateKey.generate()) for _ in range(3))
    dispatcher = Dispatcher([new, old], {})
    payload = encode_hello(Hello("test", "0"))
    for key in (old, new):
        assert dispatcher.hello(FakeConnection(), hello(payload, key.public)) is not None
    assert dispatcher.hello(FakeConnection(), hello(payload, other.public)) is None
    dispatcher.keys = [new]
    assert dispatcher.hello(FakeConnection(), hello(payload, old.public)) is None


def test_hello_with_any_bit_flipped_does_not_authenticate():
    dispatcher = Dispatcher([KEY], {})
    frame = hello(encode_hello(Hello("t", "0")))
    for bit in range(64, 8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        assert dispatcher.hello(FakeConnection(), bytes(flipped)) is None, bit


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:16])
def test_hello_with_an_all_zero_or_low_order_key_does_not_authenticate(point):
    for rest in (bytes(16), hello(b"")[40:]):
        assert Dispatcher([KEY], {}).hello(FakeConnection(), header(HELLO, 32 + len(rest)) + point + rest) is None


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\xc1", pack(None), pack([]), pack({}), pack({"name": "a"}), pack({"name": 1, "version": "0"}),
        pack({"name": "a" * 65, "version": "0"}), pack({"name": "a", "version": "0", "dictionaries": [2**32]}),
        pack({"name": "a", "version": "0"}) + b"\0", b"\x91" * 190, b"\x82\xa4name\xa1\xff\xa7version\xa10",
    ],
    ids=lambda payload: payload.hex()[:24],
)  # fmt: skip
def test_authentic_hello_with_a_payload_that_no_client_makes(payload):
    assert Dispatcher([KEY], {}).hello(FakeConnection(), hello(payload)) is None


@given(st.binary(max_size=192))
def test_no_payload_of_a_hello_raises(payload):
    Dispatcher([KEY], {}).hello(FakeConnection(), hello(payload))


def test_unknown_keys_of_a_hello_are_ignored():
    payload = pack({"name": "a", "version": "0", "colour": "red"})
    assert Dispatcher([KEY], {}).hello(FakeConnection(), hello(payload)) is not None


# ---- frames ----


def test_pings_are_answered_in_one_go():
    peer = Peer()
    assert peer.send(PING, PING, PING) == [PING] * 3
    assert peer.connection.closed == []


@pytest.mark.parametrize("change", ["bit", "replay", "order", "other key", "header"])
def test_frame_that_does_not_authenticate_is_tampered_and_what_came_before_it_is_answered(change):
    peer, other = Peer(), Peer()
    first, second, third = (peer.seal(PING) for _ in range(3))
    frames = {
        "bit": [first, second[:-1] + bytes([second[-1] ^ 128]), third],
        "replay": [first, first, second],
        "order": [first, third, second],
        "other key": [first, other.seal(PING), second],
        "header": [first, header(DATA, 18) + second[8:] + b"\0", third],
    }[change]
    assert opened(peer.transport, peer.session.receive(frames)) == [PING]
    assert peer.connection.closed == ["tampered"]


@pytest.mark.parametrize("flags", range(1, 256))
def test_any_flag_before_login_is_tampered(flags):
    assert Peer().tampers(bytes([flags]) + zstandard.compress(requests(1)))


MESSAGE = bytes([COMPRESSED])
TAMPERED = {
    "bomb": MESSAGE + zstandard.compress(bytes(64 << 20)),
    "one byte over a MiB": MESSAGE + zstandard.compress(bytes((1 << 20) + 1)),
    "no size": MESSAGE + zstandard.ZstdCompressor(write_content_size=False).compress(requests(50)),
    "trailing byte": MESSAGE + zstandard.compress(requests(1)) + b"\0",
    "two frames": MESSAGE + zstandard.compress(requests(1)) * 2,
    "no zstd": MESSAGE + b"GET / HTTP/1.1",
    "unknown flag": b"\4" + requests(1),
    "nested": MESSAGE + zstandard.compress(b"\x91" * 500_000 + b"\x90"),
    "nested maps": MESSAGE + zstandard.compress(b"\x81\xa0" * 300_000 + b"\x90"),
    "map": b"\0" + pack({"id": 1}),
    "number": b"\0" + pack(5),
    "no requests": b"\0\x90",
    "trailing": b"\0" + requests(1) + b"\0",
    "unused code": b"\0\xc1",
    "cut": b"\0" + requests(3)[:-1],
    "array of 2^32 - 1": b"\0\xdd\xff\xff\xff\xff",
    "65,537 requests": MESSAGE + zstandard.compress(b"\xdd\0\1\0\1" + pack([1, "a"]) * 65537),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_message_of_a_user_that_no_honest_client_sends(name):
    assert Peer({"shelve": shelve}, logged_in=True).tampers(TAMPERED[name])


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=5), st.booleans())
def test_no_plaintext_raises(plaintexts, logged_in):
    peer = Peer({"shelve": shelve}, logged_in=logged_in)
    peer.send(*plaintexts)
    assert set(peer.connection.closed) <= {"tampered", "too_long"}


def test_message_of_several_frames_compressed_and_plain():
    noise = random.Random(3).randbytes(300_000)
    peer = Peer({"size": lambda _session, arguments: len(bytes(arguments))}, logged_in=True)
    for data in (noise, bytes(300_000)):
        arguments = pack({"data": data})
        (reply,) = peer.ask(encode_requests([Request(9, "size", msgspec.Raw(arguments))]))
        assert (reply.id, result(reply)) == (9, len(arguments))


def test_long_reply_comes_in_several_frames():
    noise = random.Random(4).randbytes(1 << 20)
    peer = Peer({"long": lambda _session, _arguments: noise}, logged_in=True)
    assert [result(reply) for reply in peer.ask(requests(1, "long"))] == [noise]


# ---- requests ----


def test_replies_come_in_the_order_of_the_requests_with_their_ids():
    peer = Peer({"shelve": shelve})
    body = encode_requests(
        [Request(n, "shelve", msgspec.Raw(pack({"rack": "B", "level": n}))) for n in (7, 3, 3, 2**32 - 1, 0)]
    )
    assert [(reply.id, result(reply)) for reply in peer.ask(body)] == [
        (n, f"B/{n}") for n in (7, 3, 3, 2**32 - 1, 0)
    ]  # fmt: skip


def good(number: int) -> bytes:
    return pack([number, "shelve", {"rack": "A"}])


BAD_REQUESTS = {
    "unknown operation": (pack([2, "burn", {}]), "unknown_operation", 2),
    "empty name": (pack([2, "", {}]), "malformed", 2),
    "name of 65 letters": (pack([2, "a" * 65, {}]), "malformed", 2),
    "name that is a number": (pack([2, 5, {}]), "malformed", 2),
    "negative id": (pack([-1, "shelve", {}]), "malformed", None),
    "id of 2^32": (pack([2**32, "shelve", {}]), "malformed", None),
    "no array": (pack("shelve"), "malformed", None),
    "map": (pack({"id": 2}), "malformed", None),
    "nil": (pack(None), "malformed", None),
    "no fields": (pack([]), "malformed", None),
    "no operation": (pack([2]), "malformed", 2),
    "name that is no UTF-8": (b"\x93\x02\xa2\xff\xfe\x80", "malformed", 2),
    "no arguments where some are needed": (pack([2, "shelve"]), "malformed", 2),
    "arguments of another type": (pack([2, "shelve", {"rack": 5}]), "malformed", 2),
    "arguments that are a list": (pack([2, "shelve", ["A", 1]]), "malformed", 2),
    "arguments that are nil": (pack([2, "shelve", None]), "malformed", 2),
    "argument that is no UTF-8": (b"\x93\x02\xa6shelve\x81\xa4rack\xa2\xff\xfe", "malformed", 2),
    "name of an argument that is no UTF-8": (b"\x93\x02\xa6shelve\x81\xa2\xff\xfe\x01", "malformed", 2),
    "argument of 200 arrays in arrays": (b"\x93\x02\xa6shelve\x81\xa1x" + b"\x91" * 200 + b"\x90", "malformed", 2),
}


@pytest.mark.parametrize("logged_in", [False, True])
@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_wrong_request_is_answered_with_an_error_and_the_others_as_ever(name, logged_in):
    peer = Peer({"shelve": shelve}, logged_in=logged_in)
    item, code, number = BAD_REQUESTS[name]
    replies = peer.ask(b"\x93" + good(1) + item + good(3))
    assert codes(replies) == [None, code, None]
    assert [reply.id for reply in replies] == [1, number, 3]
    assert [result(replies[0]), result(replies[2])] == ["A/0", "A/0"]
    assert "\n" not in replies[1].error.message
    assert peer.connection.closed == []


def test_arguments_nested_deeper_than_can_be_decoded_are_malformed_or_tampered():
    """1,000 levels pass the outer decoder as they are; the operation's own decoder meets them."""
    for depth in (500, 900, 990, 1000, 1100, 2000, 4000, 20_000):
        peer = Peer({"shelve": shelve, "any": lambda _s, a: msgspec.msgpack.decode(a) and None}, logged_in=True)
        for operation in ("shelve", "any"):
            item = b"\x93\x02" + pack(operation) + b"\x81\xa4rack" + b"\x91" * depth + b"\x90"
            replies = peer.ask(b"\x92" + good(1) + item)
            if not peer.connection.closed:
                assert replies[1].error is None or replies[1].error.code == "malformed"
            else:
                assert peer.connection.closed == ["tampered"]
                break


@given(st.binary(min_size=1, max_size=60))
def test_no_arguments_raise(arguments):
    peer = Peer({"shelve": shelve})
    peer.send(b"\0\x92" + good(1) + b"\x93\x02\xa6shelve" + arguments)
    assert peer.connection.closed in ([], ["tampered"])


def test_operation_refuses_with_its_own_code_and_words():
    def refuse(_session: Session, _arguments: msgspec.Raw) -> None:
        raise OperationError("no_such_tape", "there is no tape A00001: scan it in first")

    replies = Peer({"refuse": refuse, "shelve": shelve}).ask(b"\x92" + pack([1, "refuse"]) + good(2))
    assert codes(replies) == ["no_such_tape", None]
    assert replies[0].error.message == "there is no tape A00001: scan it in first"


def test_long_work_comes_in_slices_so_that_others_are_served_between():
    done: list[int] = []
    peer = Peer({"count": lambda _session, _arguments: done.append(1)}, logged_in=True)
    frames = [
        peer.seal(plaintext) for plaintext in split_message(requests(3 * SLICE, "count"), MAX_DATA, compress=True)
    ]
    answer = peer.session.receive(frames)
    assert not isinstance(answer, bytes)
    assert [len(done) for _part in answer] == [SLICE, 2 * SLICE, 3 * SLICE]


@pytest.mark.parametrize("result", ["x" * SLICE_SIZE, None], ids=["long results", "slow operations"])
def test_few_requests_of_much_work_are_sliced_by_their_size_and_time(result, monkeypatch):
    if result is None:
        monkeypatch.setattr(dispatch, "SLICE_TIME", 0.0)
    peer = Peer({"work": lambda *_: result}, logged_in=True)
    frames = [peer.seal(plaintext) for plaintext in split_message(requests(4, "work"), MAX_DATA, compress=True)]
    answer = peer.session.receive(frames)
    assert len(list(answer)) == 4


@pytest.mark.parametrize("operations", [("count",), ()], ids=["requests", "pings"])
def test_many_small_messages_of_one_turn_are_sliced_too(operations):
    done: list[int] = []
    peer = Peer({"count": lambda _session, _arguments: done.append(1)}, logged_in=True)
    body = requests(1, *operations) if operations else b""
    answer = peer.session.receive([peer.seal(b"\0" + body) for _ in range(2 * SLICE + 1)])
    assert not isinstance(answer, bytes)
    assert len(done) <= SLICE
    parts = [len(list(opened(peer.transport, part))) for part in answer]
    assert parts == [SLICE, SLICE, 1]
    assert len(done) == len(operations) * sum(parts)


def test_failure_of_an_operation_is_not_hidden():
    def fail(_session: Session, _arguments: msgspec.Raw) -> None:
        raise LookupError("a fault of ours")

    with pytest.raises(LookupError):
        Peer({"fail": fail}).send(b"\0" + requests(1, "fail"))


def test_replies_that_are_together_longer_than_a_message_are_all_given():
    """Each alone is short enough, and a client is asked to pack its requests."""
    noise = random.Random(5).randbytes(1 << 20)
    peer = Peer({"long": lambda _session, _arguments: noise}, logged_in=True)
    replies = peer.ask(requests(17, "long"))
    assert [reply.id for reply in replies] == list(range(1, 18))
    assert all(result(reply) == noise for reply in replies)


def test_result_longer_than_a_message_is_an_error_for_its_request_alone():
    peer = Peer({"long": lambda _session, _arguments: bytes(MAX_TO_CLIENT), "shelve": shelve}, logged_in=True)
    replies = peer.ask(b"\x92" + pack([1, "long"]) + good(2))
    assert codes(replies) == ["too_long", None]


# ---- login ----


def test_requests_before_login_are_few_in_one_message():
    calls: list[int] = []
    operations = {"count": lambda _session, _arguments: calls.append(1)}
    peer = Peer(operations)
    assert len(peer.ask(requests(MAX_REQUESTS_BEFORE_LOGIN, "count"))) == MAX_REQUESTS_BEFORE_LOGIN
    assert peer.connection.closed == []
    assert len(peer.ask(requests(MAX_REQUESTS_BEFORE_LOGIN + 1, "count"))) == MAX_REQUESTS_BEFORE_LOGIN
    assert peer.connection.closed == ["too_long"]
    assert len(calls) == 2 * MAX_REQUESTS_BEFORE_LOGIN
    peer = Peer(operations, logged_in=True)
    assert len(peer.ask(requests(4000, "count"))) == 4000
    assert peer.connection.closed == []


def test_login_widens_what_the_session_takes():
    peer = Peer({"login": log_in, "shelve": shelve})
    assert not peer.connection.logged_in
    assert codes(peer.ask(requests(1, "login"))) == [None]
    assert peer.connection.logged_in
    peer.assembler.flags_allowed = True
    assert [result(reply) for reply in peer.ask(requests(2000, rack="A"))] == ["A/0"] * 2000
    assert peer.connection.closed == []


def test_reply_to_login_has_no_flags():
    """The client may take flags from the moment on at which it knows that it is logged in: after that reply."""

    def log_in_with_a_long_answer(session: Session, _arguments: msgspec.Raw) -> list[str]:
        session.log_in()
        return ["tape.read"] * 200

    (plaintext,) = Peer({"login": log_in_with_a_long_answer}).send(b"\0" + requests(1, "login"))
    assert plaintext[0] == 0


def closing(after: int, calls: list[int]) -> Callable[[Session, msgspec.Raw], None]:
    """An operation that ends the connection the first time, as a failed login may."""

    def operation(session: Session, _arguments: msgspec.Raw) -> None:
        calls.append(1)
        if len(calls) == after:
            session.close("login_failed")

    return operation


@pytest.mark.parametrize("together", [True, False], ids=["in one message", "in frames of one turn"])
def test_nothing_is_done_any_more_once_the_session_has_closed(together):
    """Else the guess that times a guesser out would be followed by as many as he packed."""
    calls: list[int] = []
    peer = Peer({"login": closing(2, calls)})
    if together:
        peer.send(b"\0" + requests(5, "login"))
    else:
        peer.send(*[b"\0" + requests(1, "login")] * 5)
    assert len(calls) == 2
    assert peer.connection.closed == ["login_failed"]


def test_a_reply_with_a_secret_is_not_compressed_and_neither_is_what_comes_with_it():
    text = "same" * 200
    peer = Peer({"open": lambda *_: text, "secret": Secret(lambda *_: text)}, logged_in=True)
    for names, compressed in ((["open"], True), (["secret"], False), (["open", "secret"], False), (["open"], True)):
        body = encode_requests([Request(number, name) for number, name in enumerate(names)])
        (plaintext,) = peer.send(*split_message(body, MAX_DATA, compress=True))
        assert bool(plaintext[0] & COMPRESSED) is compressed, names
