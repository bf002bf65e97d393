"""tt.wire: what honest ends exchange comes back as it was; every abuse is Tampered, bounded, and nothing else."""

import contextlib
import itertools
import random
import threading
import tracemalloc

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tt import wire
from tt.wire import Malformed, Reply, ReplyError, Request, Tampered

pack = msgspec.msgpack.encode
RECORD = {"volume": "A00001L8", "location": "vault-3", "status": "scratch"}
BODY_4K = pack([[n, None, RECORD] for n in range(66)])[:4096]


def assembler(max_message: int = wire.MAX_TO_SERVER, *, logged_in: bool = True) -> wire.Assembler:
    new = wire.Assembler(max_message)
    new.flags_allowed = logged_in
    return new


def joined(receiver: wire.Assembler, plaintexts: list[bytes]) -> bytes:
    *parts, last = plaintexts
    assert [receiver.feed(part) for part in parts] == [None] * len(parts)
    body = receiver.feed(last)
    assert isinstance(body, bytes)
    return body


def zstd_frame(content: bytes, *, size: int | None = None, window: int | None = None, dictionary: int = 0) -> bytes:
    """Make a zstd frame of one raw block (RFC 8878, section 3.1.1); `window` is the window descriptor's byte."""
    descriptor = 0xC0 | (0 if window is not None else 0x20) | bool(dictionary)
    frame = b"\x28\xb5\x2f\xfd" + bytes([descriptor])
    if window is not None:
        frame += bytes([window])
    if dictionary:
        frame += bytes([dictionary])
    frame += (len(content) if size is None else size).to_bytes(8, "little")
    return frame + (len(content) << 3 | 1).to_bytes(3, "little") + content


def peak(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- frame header ----


def test_header_layout():
    assert wire.header(wire.DATA, 0x01020304) == bytes.fromhex("5454010301020304")


@pytest.mark.parametrize("kind", [wire.HELLO, wire.WELCOME, wire.DATA, wire.REFUSE])
@pytest.mark.parametrize("length", [0, 17, wire.MAX_DATA])
def test_header_round_trip(kind, length):
    assert wire.parse_header(wire.header(kind, length)) == (kind, length)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1",
        bytes.fromhex("5455010300000011"),
        bytes.fromhex("5454020300000011"),  # another version
        bytes.fromhex("5454010000000011"),  # no such type
        bytes.fromhex("54540103") + (wire.MAX_DATA + 1).to_bytes(4, "big"),
        bytes.fromhex("54540103ffffffff"),
        b"",
        bytes.fromhex("54540103000000"),
        bytes.fromhex("545401030000001100"),
    ],
    ids=bytes.hex,
)
def test_header_that_no_server_sends(data):
    with pytest.raises(wire.BadFrame):
        wire.parse_header(data)


def test_refuse_of_a_server_of_another_version_can_be_read():
    assert wire.parse_header(bytes.fromhex("5454070400000001")) == (wire.REFUSE, 1)


# ---- HELLO and WELCOME ----


def test_hello_and_welcome_round_trip():
    hello = wire.Hello("tt", "0.1.0", [1, 2**32 - 1])
    assert wire.decode_hello(wire.encode_hello(hello)) == hello
    welcome = wire.Welcome("TapeTrackServer", "0.1.0", 7)
    assert wire.decode_welcome(wire.encode_welcome(welcome)) == welcome


def test_hello_and_welcome_are_maps_whose_unknown_keys_are_ignored():
    assert wire.decode_hello(pack({"name": "a", "version": "1", "new": [1, {}]})) == wire.Hello("a", "1", [])
    assert wire.decode_welcome(pack({"name": "a", "version": "1", "new": None})) == wire.Welcome("a", "1", 0)
    expected = {"name": "a", "version": "1", "dictionaries": []}
    assert msgspec.msgpack.decode(wire.encode_hello(wire.Hello("a", "1"))) == expected


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        pack(["a", "1"]),
        pack({"name": "a"}),
        pack({"name": "a", "version": 1}),
        pack({"name": "a" * 65, "version": "1"}),
        pack({"name": "a", "version": "1" * 33}),
        pack({"name": "a", "version": "1"}) + b"\0",
        pack({"name": "a", "version": "1"})[:-1],
        pack({1: "a", "version": "1"}),
        b"\x82\xa4name\xa1\xff\xa7version\xa11",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1x" + b"\x91" * 180 + b"\xdd\xff\xff\xff\xff",
    ],
    ids=bytes.hex,
)
def test_payload_that_no_honest_end_sends(payload):
    with pytest.raises(Tampered):
        wire.decode_hello(payload)
    with pytest.raises(Tampered):
        wire.decode_welcome(payload)


@pytest.mark.parametrize("dictionaries", [[-1], [2**32], [2**64 - 1], [1.5], list(range(9)), "1", None])
def test_hello_with_impossible_dictionaries(dictionaries):
    with pytest.raises(Tampered):
        wire.decode_hello(pack({"name": "a", "version": "1", "dictionaries": dictionaries}))


def test_payload_longer_than_a_hello_is_refused_to_its_author():
    longest = wire.Hello("n" * 64, "v" * 32, [2**32 - 1] * 8)
    assert len(wire.encode_hello(longest)) <= wire.MAX_PAYLOAD
    with pytest.raises(ValueError, match="192 is the most: shorten the name"):
        wire.encode_hello(wire.Hello("\U0001f4fc" * 64, "1"))
    with pytest.raises(ValueError, match="192 is the most"):
        wire.encode_welcome(wire.Welcome("n" * 200, "1"))


# ---- requests and replies ----

ids = st.integers(0, 2**32 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | text | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)


def plain(message):
    """Return what a message says as values that can be compared; Raw compares by identity."""
    if isinstance(message, Request):
        return message.id, message.operation, msgspec.msgpack.decode(message.arguments)
    return message.id, message.error, msgspec.msgpack.decode(message.result)


@given(
    st.lists(st.tuples(ids, text.filter(bool), st.dictionaries(text, values, max_size=4)), min_size=1, max_size=8),
    st.integers(wire.TAG + 2, 300),
)
def test_requests_round_trip_through_frames_of_any_size(contents, max_frame):
    requests = [Request(number, operation, msgspec.Raw(pack(arguments))) for number, operation, arguments in contents]
    plaintexts = wire.split_message(wire.encode_requests(requests), max_frame, compress=True)
    received = wire.decode_requests(joined(assembler(), plaintexts))
    assert [plain(request) for request in received] == contents


@given(
    st.lists(st.tuples(ids | st.none(), st.none() | st.builds(ReplyError, text, text), values), min_size=1, max_size=8)
)
def test_replies_round_trip(contents):
    body = wire.encode_replies([Reply(number, error, msgspec.Raw(pack(result))) for number, error, result in contents])
    assert [plain(reply) for reply in wire.decode_replies(body)] == contents


def test_arguments_and_result_may_be_left_out():
    assert [plain(request) for request in wire.decode_requests(pack([[1, "a"]]))] == [(1, "a", {})]
    assert [plain(reply) for reply in wire.decode_replies(pack([[1]]))] == [(1, None, None)]
    assert wire.encode_requests([Request(1, "a")]) == pack([[1, "a", {}]])
    assert wire.encode_replies([Reply(1)]) == pack([[1, None, None]])


def test_surplus_elements_of_a_later_version_are_ignored():
    assert [plain(request) for request in wire.decode_requests(pack([[1, "a", {}, "new"]]))] == [(1, "a", {})]
    (reply,) = wire.decode_replies(pack([[1, ["c", "m", 5], 2, 3]]))
    assert plain(reply) == (1, ReplyError("c", "m"), 2)


BAD_ITEMS = [
    (pack([5]), 5),
    (pack([5, 7, {}]), 5),
    (pack([5, "", {}]), 5),
    (pack([5, "a" * 65, {}]), 5),
    (pack([5, None]), 5),
    (b"\x92\x05\xa1\xff", 5),  # text that is not UTF-8
    (pack([-1, "a", {}]), None),
    (pack([2**32, "a", {}]), None),
    (pack([2**64 - 1, "a", {}]), None),
    (pack([5.0, "a", {}]), None),
    (pack([True, "a", {}]), None),
    (pack(["5", "a", {}]), None),
    (pack([]), None),
    (pack({}), None),
    (pack({"id": 5, "operation": "a"}), None),
    (pack(None), None),
    (pack("a"), None),
    (pack(5), None),
]


@pytest.mark.parametrize("position", [0, 4, 9])
@pytest.mark.parametrize(("item", "number"), BAD_ITEMS, ids=[item.hex()[:40] for item, _ in BAD_ITEMS])
def test_one_bad_request_of_ten_keeps_the_nine(item, number, position):
    items = [pack([n, "tape.get", {"n": n}]) for n in range(100, 110)]
    items[position] = item
    received = wire.decode_requests(b"\x9a" + b"".join(items))
    bad = received.pop(position)
    assert isinstance(bad, Malformed)
    assert bad.id == number
    assert bad.reason.startswith("a request is [id, operation, arguments]: ")
    assert "\n" not in bad.reason
    expected = [(n, "tape.get", {"n": n}) for n in range(100, 110) if n != 100 + position]
    assert [plain(request) for request in received] == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        pack({}),
        pack(None),
        pack([]),
        pack([[1, "a"]]) + b"\0",
        pack([[1, "a"]])[:-1],
        b"\xc1",
        b"\x91\xc1",
        b"\x91\x93\x01\xa1a\xc1",
        b"\xdc\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff" + pack([1, "a"]) * 100,
        b"\x91\x93\x01\xa1a\xdd\xff\xff\xff\xff",
        b"\x91\x93\x01\xa1a\xc6\xff\xff\xff\xff",
        b"\x91\x93\x01\xdb\xff\xff\xff\xff",
        b"\xdd" + (wire.MAX_ENTRIES + 1).to_bytes(4, "big") + pack([1, "a"]) * (wire.MAX_ENTRIES + 1),
    ],
    ids=lambda body: body.hex()[:40],
)
def test_body_that_is_no_array_of_whole_items(body):
    with pytest.raises(Tampered):
        wire.decode_requests(body)
    with pytest.raises(Tampered):
        wire.decode_replies(body)


@pytest.mark.parametrize("start", [b"", b"\x91", b"\x91\x93\x01\xa1a", b"\x91\x93\x01\xc0"], ids=bytes.hex)
@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1k"], ids=["arrays", "maps"])
def test_nested_arrays_never_raise_anything_else(start, opener):
    with pytest.raises(Tampered):
        wire.decode_requests(start + opener * 300_000 + b"\x90")
    # How deep is too deep differs between versions of Python: 4,000 may pass as an item that nobody decodes.
    try:
        received = wire.decode_requests(start + opener * 4000 + b"\x90")
    except Tampered:
        return
    assert len(received) == 1


def test_replies_with_wrong_fields():
    for item in (["1", None, 1], [1, "wrong", 1], [1, ["code"], 1], [1, [1, 2], 1], [2**32, None, 1], 5):
        with pytest.raises(Tampered):
            wire.decode_replies(pack([item]))


@given(st.binary(max_size=200) | values.map(pack))
def test_no_body_raises_anything_but_tampered(body):
    for decode in (wire.decode_requests, wire.decode_replies, wire.decode_hello, wire.decode_welcome):
        with contextlib.suppress(Tampered):
            decode(body)


@pytest.mark.parametrize("encode", [wire.encode_requests, wire.encode_replies])
def test_too_few_or_too_many_entries_are_refused_to_their_author(encode):
    entry = Request(1, "a") if encode is wire.encode_requests else Reply(1)
    with pytest.raises(ValueError, match="it holds 1 to 4096"):
        encode([])
    with pytest.raises(ValueError, match="send several messages"):
        encode([entry] * (wire.MAX_ENTRIES + 1))
    encode([entry] * wire.MAX_ENTRIES)


def test_too_long_a_body_is_refused_to_its_author():
    def request(size):
        return [Request(1, "a", msgspec.Raw(pack(bytes(size))))]

    overhead = len(wire.encode_requests(request(2**19))) - 2**19
    most = wire.MAX_TO_SERVER - overhead
    assert len(wire.encode_requests(request(most))) == wire.MAX_TO_SERVER
    with pytest.raises(ValueError, match="1048576 is the most: send several messages"):
        wire.encode_requests(request(most + 1))
    with pytest.raises(ValueError, match="16777216 is the most"):
        wire.encode_replies([Reply(1, None, msgspec.Raw(pack(bytes(wire.MAX_TO_CLIENT))))])


# ---- splitting and joining ----


@given(st.binary(max_size=600), st.integers(wire.TAG + 2, 700), st.booleans(), st.integers(1, 60))
def test_any_body_comes_back_whatever_the_size_of_the_frames(data, max_frame, compress, repeats):
    body = data * repeats
    plaintexts = wire.split_message(body, max_frame, compress=compress)
    assert all(2 <= len(part) <= max_frame - wire.TAG for part in plaintexts[:-1])
    assert len(plaintexts[-1]) <= max_frame - wire.TAG
    receiver = assembler()
    assert joined(receiver, plaintexts) == body
    assert joined(receiver, plaintexts) == body  # the first message left nothing behind


@given(st.binary(min_size=130, max_size=300), st.sets(st.integers(1, 400)), st.booleans())
def test_the_body_does_not_depend_on_the_cuts(data, cuts, compress):
    (whole,) = wire.split_message(data * 3, wire.MAX_DATA, compress=compress)
    flags, content = whole[0], whole[1:]
    edges = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    parts = [content[start:end] for start, end in itertools.pairwise(edges)]
    plaintexts = [bytes([flags | wire.MORE]) + part for part in parts[:-1]] + [bytes([flags]) + parts[-1]]
    assert joined(assembler(), plaintexts) == data * 3


def test_more_on_all_parts_but_the_last_and_compressed_on_every_one():
    noise = random.Random(1).randbytes(1000)
    plain_parts = wire.split_message(noise, 317, compress=True)
    assert [part[0] for part in plain_parts] == [wire.MORE] * 3 + [0]
    assert [len(part) for part in plain_parts] == [301, 301, 301, 101]
    compressed = wire.split_message(noise * 2, 317, compress=True)
    assert [part[0] for part in compressed] == [wire.MORE | wire.COMPRESSED] * 3 + [wire.COMPRESSED]


def test_ping_is_the_flags_byte_alone():
    assert wire.split_message(b"", wire.MAX_BEFORE_LOGIN, compress=True) == [b"\0"]
    assert assembler(logged_in=False).feed(b"\0") == b""
    assert assembler().feed(b"\0") == b""


def test_the_longest_frame_is_no_longer_than_allowed():
    for max_frame in (wire.MAX_BEFORE_LOGIN, wire.MAX_DATA):
        room = max_frame - wire.TAG - 1
        assert len(wire.split_message(bytes(room), max_frame, compress=False)) == 1
        first, second = wire.split_message(bytes(room + 1), max_frame, compress=False)
        assert len(first) + wire.TAG == max_frame
        assert second == b"\0\0"


def test_a_compressible_body_of_4_kib_is_much_smaller_on_the_wire():
    frames = wire.split_message(BODY_4K, wire.MAX_DATA, compress=True)
    assert sum(wire.HEADER + len(frame) + wire.TAG for frame in frames) < len(BODY_4K) / 4
    assert joined(assembler(), frames) == BODY_4K


def test_a_body_is_compressed_from_512_bytes_on_where_that_is_shorter_and_allowed():
    for body in (b"a" * 512, b"a" * 4096, b"a" * 4097):
        assert assembler().feed(b"\1" + wire.split_message(body, wire.MAX_DATA, compress=True)[0][1:]) == body
    for body in (b"a" * 511, random.Random(1).randbytes(4096)):
        assert wire.split_message(body, wire.MAX_DATA, compress=True) == [b"\0" + body]
    assert wire.split_message(b"a" * 4000, wire.MAX_DATA, compress=False) == [b"\0" + b"a" * 4000]


def test_the_longest_message_arrives_whole():
    body = random.Random(1).randbytes(2**20) * 16
    assert joined(assembler(wire.MAX_TO_CLIENT), wire.split_message(body, wire.MAX_DATA, compress=True)) == body
    assert joined(assembler(wire.MAX_TO_CLIENT), wire.split_message(body, wire.MAX_DATA, compress=False)) == body


def test_threads_compress_and_decompress_at_once():
    failures = []

    def work(seed):
        body = random.Random(seed).randbytes(3000) * 40
        receiver = assembler()
        failures.extend(
            seed for _ in range(30) if joined(receiver, wire.split_message(body, 5000, compress=True)) != body
        )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ---- abuse of flags and parts ----


@pytest.mark.parametrize("flags", range(1, 256))
def test_any_flag_before_login(flags):
    receiver = assembler(logged_in=False)
    for rest in (b"", b"body", zstd_frame(b"body")):
        with pytest.raises(Tampered):
            receiver.feed(bytes([flags]) + rest)
    assert receiver.feed(b"\0body") == b"body"


@pytest.mark.parametrize("flags", [flags for flags in range(256) if flags & ~3])
def test_unknown_flag(flags):
    with pytest.raises(Tampered):
        assembler().feed(bytes([flags]) + zstd_frame(b"body"))


@pytest.mark.parametrize(
    "plaintexts",
    [
        [b""],
        [b"\1"],  # compressed nothing
        [b"\2"],  # an empty part
        [b"\3"],
        [b"\2a", b""],
        [b"\2a", b"\0"],  # a ping between parts
        [b"\2a", b"\2"],
        [b"\2a", b"\1b"],  # compressed from the second part on
        [b"\3" + zstd_frame(b"body")[:5], b"\0" + zstd_frame(b"body")[5:]],
    ],
    ids=str,
)
def test_parts_that_no_honest_end_sends(plaintexts):
    *good, bad = plaintexts
    receiver = assembler()
    assert [receiver.feed(part) for part in good] == [None] * len(good)
    with pytest.raises(Tampered):
        receiver.feed(bad)


def test_tampered_part_changes_nothing():
    receiver = assembler(1000)
    first, second = wire.split_message(b"ab" * 200, 300, compress=False)
    assert receiver.feed(first) is None
    for bad in (b"", b"\0", b"\1x", b"\4x", b"\0" + bytes(1000), b"\2" + bytes(1000)):
        with pytest.raises(Tampered):
            receiver.feed(bad)
    assert receiver.feed(second) == b"ab" * 200


@pytest.mark.parametrize("flags", [0, wire.MORE])
def test_message_longer_than_the_bound(flags):
    receiver = assembler(1000)
    with pytest.raises(Tampered, match="longer than 1000 bytes"):
        receiver.feed(bytes([flags]) + bytes(1001))
    assert receiver.feed(b"\2" + bytes(600)) is None
    with pytest.raises(Tampered, match="longer than 1000 bytes"):
        receiver.feed(bytes([flags]) + bytes(401))
    assert receiver.feed(b"\0" + bytes(400)) == bytes(1000)


@given(st.lists(st.builds(lambda flags, rest: bytes([flags]) + rest, st.integers(0, 7), st.binary(max_size=40))))
def test_no_plaintext_raises_anything_but_tampered(plaintexts):
    receiver = assembler(64)
    for plaintext in plaintexts:
        try:
            body = receiver.feed(plaintext)
        except Tampered:
            continue
        assert body is None or len(body) <= 64


# ---- abuse of compression ----

BOMB_SIZE = 120 * 2**20
LIBRARY = zstandard.ZstdCompressor()


def bomb(size: int) -> bytes:
    """Return a zstd frame of 3.9 kB that claims `size` bytes and holds BOMB_SIZE: 960 blocks of one repeated byte."""
    last = BOMB_SIZE // 2**17 - 1
    blocks = [(2**17 << 3 | 1 << 1 | (n == last)).to_bytes(3, "little") + b"\0" for n in range(last + 1)]
    return b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"".join(blocks)


BOMB = bomb(BOMB_SIZE)
COMPRESSED_4K = LIBRARY.compress(BODY_4K)
BAD_FRAMES = {
    "bomb in a small frame": BOMB,
    "claims 2^40 bytes": zstd_frame(b"body", size=2**40),
    "claims 2^64 - 1 bytes": zstd_frame(b"body", size=2**64 - 1),
    "claims one byte more than allowed": zstd_frame(b"body", size=wire.MAX_TO_SERVER + 1),
    "really holds one byte more than allowed": LIBRARY.compress(bytes(wire.MAX_TO_SERVER + 1)),
    "claims 64 MiB with a small window": zstd_frame(b"body", size=2**26, window=0),
    "holds less than it claims": zstd_frame(b"body", size=5),
    "holds more than it claims": zstd_frame(b"body", size=3),
    "window of 2 MiB": zstd_frame(b"body", window=11 << 3),
    "window of 2^41": zstd_frame(b"body", window=31 << 3),
    "no size": zstandard.ZstdCompressor(write_content_size=False).compress(BODY_4K),
    "bomb without its size": zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**24)),
    "unknown dictionary": zstd_frame(b"body", size=2**20, dictionary=9),
    "trailing byte": COMPRESSED_4K + b"\0",
    "two frames": COMPRESSED_4K * 2,
    "empty": LIBRARY.compress(b""),
    "empty, then a bomb": LIBRARY.compress(b"") + BOMB,
    "skippable frame of no bytes": bytes.fromhex("502a4d1800000000"),
    "skippable frame": bytes.fromhex("502a4d1804000000") + b"body",
    "skippable frame before a good one": bytes.fromhex("502a4d1804000000") + b"body" + COMPRESSED_4K,
    "no zstd at all": b"body" * 50,
    "reserved bit": zstd_frame(b"body")[:4] + bytes([zstd_frame(b"body")[4] | 8]) + zstd_frame(b"body")[5:],
}


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_compressed_message_that_no_honest_end_sends(frame):
    receiver = assembler()

    def feed():
        with pytest.raises(Tampered):
            receiver.feed(b"\1" + frame)

    assert peak(feed) < len(frame) + 2**18  # judged by the header: nothing is taken for it
    assert receiver.feed(b"\1" + COMPRESSED_4K) == BODY_4K


def test_the_frames_above_are_bad_only_in_what_they_say():
    assert len(BOMB) < 3900
    assert len(zstandard.ZstdDecompressor().decompress(BOMB)) == BOMB_SIZE
    for frame in (zstd_frame(b"body"), zstd_frame(b"body", window=0), zstd_frame(b"body", window=10 << 3)):
        assert assembler().feed(b"\1" + frame) == b"body"
    assert joined(assembler(), wire.split_message(bytes(2**20), wire.MAX_DATA, compress=True)) == bytes(2**20)


def test_compressed_message_truncated_at_every_length():
    receiver = assembler()
    for length in range(len(COMPRESSED_4K)):
        with pytest.raises(Tampered):
            receiver.feed(b"\1" + COMPRESSED_4K[:length])
    assert receiver.feed(b"\1" + COMPRESSED_4K) == BODY_4K


def test_compressed_message_with_any_bit_flipped_raises_nothing_else():
    for bit in range(8 * len(COMPRESSED_4K)):
        frame = bytearray(COMPRESSED_4K)
        frame[bit // 8] ^= 1 << bit % 8
        try:
            assembler().feed(b"\1" + frame)
        except Tampered:
            continue


def test_a_bomb_that_understates_its_size_takes_no_more_than_the_bound():
    frame = bomb(wire.MAX_TO_SERVER)

    def feed():
        with pytest.raises(Tampered):
            assembler().feed(b"\1" + frame)

    assert peak(feed) < wire.MAX_TO_SERVER + 2**18


def test_parts_of_one_byte_take_no_more_than_twice_the_bound():
    receiver = assembler(2**16)

    def feed():
        for _ in range(2**16 - 1):
            receiver.feed(b"\2x")
        assert receiver.feed(b"\0x") == b"x" * 2**16

    assert peak(feed) < 2.2 * 2**16 + 4096
    assert peak(lambda: receiver.feed(b"\2x")) < 4096


def test_claimed_array_takes_no_memory():
    def decode():
        with pytest.raises(Tampered):
            wire.decode_requests(b"\xdd\xff\xff\xff\xff" + bytes(1000))

    assert peak(decode) < 2**16


def test_out_of_memory_on_the_way_is_our_own_failure_and_no_evidence(monkeypatch):
    class Exhausted:
        def decode(self, _data):
            raise MemoryError

        def decompress(self, _data, **_options):
            raise MemoryError

    monkeypatch.setattr(wire, "_items_decoder", Exhausted())
    monkeypatch.setattr(wire, "_requests_decoder", Exhausted())
    with pytest.raises(MemoryError):
        wire.decode_requests(pack([[1, "a"]]))
    monkeypatch.setattr(wire, "_zstd", Exhausted())
    with pytest.raises(MemoryError):
        assembler().feed(b"\1" + COMPRESSED_4K)
