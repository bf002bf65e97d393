"""Messages of wire format 1: frame headers, the typed contents, compression, and messages longer than a frame.

    frame      "TT", version, type, length (4 bytes, network byte order), then `length` bytes
    plaintext  of a DATA frame: a flags byte, then a body or a part of one; the flags byte alone is a ping
    body       a MessagePack array of requests, or of replies; compressed as a whole, then split into parts

Rules: every size is compared with its bound before memory is taken for it.  What cannot come from an honest peer is
Tampered; a request that is only wrong is Malformed and leaves the others alone.  One thread may use one Assembler;
all else is free of shared state.  Knows no keys, sockets, clock or operations.
"""

import struct
import threading
from typing import Annotated, TypeVar

import msgspec
import zstandard
from msgspec import Meta, Raw, Struct
from msgspec.msgpack import Decoder, Encoder

MAGIC = b"TT"
VERSION = 1
HELLO, WELCOME, DATA, REFUSE = 1, 2, 3, 4  # types of frame
HEADER = 8  # bytes
TAG = 16  # bytes that AES-GCM adds to a plaintext
MAX_PAYLOAD = 192  # bytes of the payload of HELLO and WELCOME
MAX_BEFORE_LOGIN = 4096  # length of a DATA frame to the server before login
MAX_DATA = 65535  # length of any frame; the longest Noise message
MAX_TO_SERVER = 2**20  # bytes of a body to the server, and of its compressed form
MAX_TO_CLIENT = 2**24  # bytes of a body to a client, and of its compressed form
MAX_ENTRIES = 2**12  # requests or replies in one body: decoded in one go, so this bounds the time of that
# Bytes of a body that is worth compressing: one tape's record would be 5 % shorter, take half of the time of its whole
# answer, and fill one packet as before.
MIN_COMPRESSED = 512

COMPRESSED, MORE = 1, 2  # flags; 4 means a built-in dictionary, of which version 1 has none
# Level 3 makes replies of 3 to 6,000 tape records 1 to 4 % smaller and takes 5 to 20 % longer.
COMPRESSION_LEVEL = 1
# Clearing the tables of level 1 takes longer than compressing a short body: below this size smaller ones do, which take
# 0.35 to 0.65 of the time for 5 to 30 records of tapes, and leave 6 to 16 % more.
_SHORT = 4096
_SHORT_PARAMETERS = zstandard.ZstdCompressionParameters(
    window_log=12, hash_log=9, chain_log=6, search_log=1, min_match=4, target_length=1, strategy=zstandard.STRATEGY_FAST
)

_HEADER = struct.Struct(">2sBBI")
_FLAGS = [bytes([flags]) for flags in range((COMPRESSED | MORE) + 1)]

# RecursionError: arrays in arrays.  UnicodeDecodeError: msgspec lets it through as it is.
# Not MemoryError: every size is bounded before, so a lack of memory is ours, and nobody may be timed out for it.
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class BadFrame(Exception):  # noqa: N818 - the names of the protocol's verdicts
    """A frame header is not one of this protocol; the text is for the user."""


class Tampered(Exception):  # noqa: N818
    """An authentic frame holds what no honest peer sends; the text is for the log of this side."""


# ----------------------------------------------------------------------------------------------------------------------
# Frame header
# ----------------------------------------------------------------------------------------------------------------------


def header(kind: int, length: int) -> bytes:
    """Return the 8 header bytes of a frame with `length` bytes behind them; for DATA they are the associated data."""
    return _HEADER.pack(MAGIC, VERSION, kind, length)


def parse_header(data: bytes) -> tuple[int, int]:
    """Return type and length, at most MAX_DATA, from the 8 bytes of a header that the server sent.  Raises BadFrame.

    REFUSE is accepted with any version: its layout never changes, so that a client of any time can read it.
    """
    if len(data) != HEADER:
        raise BadFrame(f"a frame header has {HEADER} bytes, not {len(data)}")
    magic, version, kind, length = _HEADER.unpack(data)
    if magic != MAGIC:
        raise BadFrame("the peer does not speak the tape-tracking protocol")
    if version != VERSION and kind != REFUSE:
        raise BadFrame(f"the peer speaks version {version} of the protocol, not {VERSION}")
    if not HELLO <= kind <= REFUSE:
        raise BadFrame(f"a frame has the unknown type {kind}")
    if length > MAX_DATA:
        raise BadFrame(f"a frame announces {length} bytes, but {MAX_DATA} is the most")
    return kind, length


# ----------------------------------------------------------------------------------------------------------------------
# The contents: MessagePack, decoded by type.  Unknown keys of maps and surplus elements of arrays are ignored, so that
# a later version can add some.
# ----------------------------------------------------------------------------------------------------------------------

_Name = Annotated[str, Meta(max_length=64)]
_Version = Annotated[str, Meta(max_length=32)]
_UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class Hello(Struct, frozen=True):
    """Payload of HELLO: who the client is, for the log, and the ids of the compression dictionaries it holds."""

    name: _Name
    version: _Version
    dictionaries: Annotated[list[_UInt32], Meta(max_length=8)] = []


class Welcome(Struct, frozen=True):
    """Payload of WELCOME: who the server is, and the one dictionary it picked, or 0."""

    name: _Name
    version: _Version
    dictionary: _UInt32 = 0


# gc=False: bodies hold thousands of these, and none can be part of a cycle.
class Request(Struct, array_like=True, frozen=True, gc=False):
    """[id, operation, arguments]: the operation decodes its arguments, a map, by its own type."""

    id: _UInt32
    operation: Annotated[str, Meta(min_length=1, max_length=64)]
    arguments: Raw = Raw(b"\x80")  # the empty map


class Malformed(Struct, frozen=True, gc=False):
    """Stands where a request could not be decoded: its id where that could be read, and a sentence for the reply."""

    id: int | None
    reason: str


class ReplyError(Struct, array_like=True, frozen=True, gc=False):
    """[code, message]: a word for programs and a sentence for people."""

    code: str
    message: str


class Reply(Struct, array_like=True, frozen=True, gc=False):
    """[id, error, result]: the id of the request, or nil where it could not be read; error is nil on success."""

    id: _UInt32 | None
    error: ReplyError | None = None
    result: Raw = Raw(b"\xc0")  # nil


_T = TypeVar("_T")
_AnyRequest = Annotated[list[Request], Meta(min_length=1, max_length=MAX_ENTRIES)]
_AnyItem = Annotated[list[Raw], Meta(min_length=1, max_length=MAX_ENTRIES)]
_AnyReply = Annotated[list[Reply], Meta(min_length=1, max_length=MAX_ENTRIES)]


class _Identified(Struct, array_like=True, gc=False):
    """What can still be read of a request whose other fields are wrong."""

    id: _UInt32


_encoder = Encoder()
_hello_decoder = Decoder(Hello)
_welcome_decoder = Decoder(Welcome)
_request_decoder = Decoder(Request)
_identified_decoder = Decoder(_Identified)
_requests_decoder: Decoder[list[Request]] = Decoder(_AnyRequest)
_items_decoder: Decoder[list[Raw]] = Decoder(_AnyItem)
_replies_decoder: Decoder[list[Reply]] = Decoder(_AnyReply)


def encode_hello(hello: Hello) -> bytes:
    """Return the payload.  Raises ValueError where a field, or all together, are longer than the server takes."""
    payload = _bounded_payload(_encoder.encode(hello))
    _hello_decoder.decode(payload)  # msgspec checks bounds when it decodes alone; ValidationError is a ValueError
    return payload


def decode_hello(payload: bytes) -> Hello:
    """Return the content of the payload of HELLO.  Raises Tampered."""
    return _decode(_hello_decoder, payload, "the payload of HELLO")


def encode_welcome(welcome: Welcome) -> bytes:
    """Return the payload.  Raises ValueError where it is longer than MAX_PAYLOAD."""
    return _bounded_payload(_encoder.encode(welcome))


def decode_welcome(payload: bytes) -> Welcome:
    """Return the content of the payload of WELCOME.  Raises Tampered."""
    return _decode(_welcome_decoder, payload, "the payload of WELCOME")


def encode_requests(requests: list[Request]) -> bytes:
    """Return the body, at most MAX_TO_SERVER bytes with 1 to MAX_ENTRIES requests.  Raises ValueError beyond that."""
    return _bounded_body(_encoder.encode(requests), len(requests), "requests", MAX_TO_SERVER)


def decode_requests(body: bytes) -> list[Request | Malformed]:
    """Return the requests in their order, Malformed where one is wrong.  Raises Tampered for what is no array of items.

    The `arguments` refer to the body, whose memory they keep; who decodes them also finds out whether they are a map.
    """
    try:
        return list(_requests_decoder.decode(body))
    except _UNDECODABLE:
        return [_request(item) for item in _decode(_items_decoder, body, "a body")]


def encode_replies(replies: list[Reply]) -> bytes:
    """Return the body, at most MAX_TO_CLIENT bytes with 1 to MAX_ENTRIES replies.  Raises ValueError beyond that."""
    return _bounded_body(_encoder.encode(replies), len(replies), "replies", MAX_TO_CLIENT)


def decode_replies(body: bytes) -> list[Reply]:
    """Return the replies in their order; each `result` refers to the body.  Raises Tampered."""
    return _decode(_replies_decoder, body, "a body")


def _request(item: Raw) -> Request | Malformed:
    try:
        return _decode(_request_decoder, item, "a request is [id, operation, arguments]")
    except Tampered as error:
        reason = str(error)
    try:
        return Malformed(_decode(_identified_decoder, item, "").id, reason)
    except Tampered:
        return Malformed(None, reason)


def _decode(decoder: Decoder[_T], data: bytes | Raw, what: str) -> _T:
    try:
        return decoder.decode(data)
    except UnicodeDecodeError:
        raise Tampered(f"{what}: text is not UTF-8") from None  # its own text quotes the peer's bytes
    except _UNDECODABLE as error:
        raise Tampered(f"{what}: {error}") from None


def _bounded_payload(payload: bytes) -> bytes:
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"name and version make {len(payload)} bytes, but {MAX_PAYLOAD} is the most: shorten the name")
    return payload


def _bounded_body(body: bytes, count: int, what: str, most: int) -> bytes:
    if not 1 <= count <= MAX_ENTRIES:
        raise ValueError(f"{count} {what} in one message, but it holds 1 to {MAX_ENTRIES}: send several messages")
    if len(body) > most:
        raise ValueError(f"{what} of {len(body)} bytes in one message, but {most} is the most: send several messages")
    return body


# ----------------------------------------------------------------------------------------------------------------------
# Bodies to plaintexts and back
# ----------------------------------------------------------------------------------------------------------------------


class _Contexts(threading.local):
    """A zstd context serves one thread at a time, and is released from the GIL while it works."""

    def __init__(self) -> None:
        # The content size is written by default; a checksum would repeat what AES-GCM proves.
        self.compress = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress
        self.compress_short = zstandard.ZstdCompressor(compression_params=_SHORT_PARAMETERS).compress
        self.decompress = zstandard.ZstdDecompressor().decompress


_zstd = _Contexts()


def split_message(body: bytes, max_frame: int, *, compress: bool) -> list[bytes]:
    """Return the plaintexts of the DATA frames that carry the body, none longer than `max_frame` when sealed.

    A body of at least MIN_COMPRESSED bytes is compressed where that is shorter and `compress` allows it.  A secret must
    not be compressed together with what others chose: the length of the frame would tell about it.  Before login a
    body must fit into one frame, and `compress` be false.  The empty body is the ping.
    """
    flags = 0
    if compress and len(body) >= MIN_COMPRESSED:
        compressed = _zstd.compress_short(body) if len(body) <= _SHORT else _zstd.compress(body)
        if len(compressed) < len(body):
            body = compressed
            flags = COMPRESSED
    room = max_frame - TAG - 1
    if len(body) <= room:
        return [_FLAGS[flags] + body]
    starts = range(0, len(body), room)
    parts = [_FLAGS[flags | MORE] + body[start : start + room] for start in starts[:-1]]
    parts.append(_FLAGS[flags] + body[starts[-1] :])
    return parts


class Assembler:
    """Joins the plaintexts of one direction of a connection to bodies of at most `max_message` bytes.

    It holds at most `max_message` bytes between calls, and at most two buffers of that size during one.
    A plaintext that raises Tampered changes nothing.
    """

    __slots__ = ("_compressed", "_max_message", "_parts", "flags_allowed")

    def __init__(self, max_message: int) -> None:
        self.flags_allowed = False  # set at login
        self._max_message = max_message
        # One growing buffer and no list of parts: as objects of their own, parts of one byte take 40 times their size.
        self._parts = bytearray()
        self._compressed = False  # of the message that _parts begins

    def feed(self, plaintext: bytes) -> bytes | None:
        """Return the body that the plaintext completes, or None where MORE follows; b"" is a ping.  Raises Tampered."""
        if not plaintext:
            raise Tampered("a frame has no flags byte")
        flags = plaintext[0]
        size = len(plaintext) - 1
        if not flags and not self._parts and size <= self._max_message:
            return plaintext[1:]
        return self._feed_part(flags, memoryview(plaintext)[1:])

    def _feed_part(self, flags: int, part: memoryview) -> bytes | None:
        if flags and not self.flags_allowed:
            raise Tampered("a frame before login has flags")
        if flags & ~(COMPRESSED | MORE):
            raise Tampered("a frame has unknown flags")
        if not part:
            raise Tampered("a part of a message is empty")
        compressed = bool(flags & COMPRESSED)
        if self._parts and compressed != self._compressed:
            raise Tampered("the parts of a message differ in the compression flag")
        if len(self._parts) + len(part) > self._max_message:
            raise Tampered(f"a message is longer than {self._max_message} bytes")
        if flags & MORE:
            self._parts += part
            self._compressed = compressed
            return None
        body = b"".join((self._parts, part))
        if compressed:
            body = _decompress(body, self._max_message)
        self._parts = bytearray()
        return body


def _decompress(data: bytes, most: int) -> bytes:
    """Return the content of the one zstd frame (RFC 8878) that `data` is, at most `most` bytes.  Raises Tampered.

    The frame's header is judged first, because `max_output_size` binds nothing where the frame names its size.
    """
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size > most or frame.window_size > most:  # no size at all is CONTENTSIZE_UNKNOWN, 2^64 - 1
            raise Tampered(f"a compressed message announces no size or more than {most} bytes")
        if frame.content_size == 0:
            # The library returns at once for such a frame and never looks at what follows.
            raise Tampered("a compressed message is empty")
        if frame.dict_id != 0:
            raise Tampered("a compressed message needs an unknown dictionary")
        return _zstd.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Tampered(f"a compressed message does not decompress: {error}") from None
