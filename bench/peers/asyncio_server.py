"""Our protocol as a Python programmer would serve it: asyncio, with tt's own handshake, ciphers and frames.

    asyncio_server.py FOLDER PORT asyncio|uvloop

Beside our loop: pings, handshakes, and sources that are timed out for what they sent, kept in a dict.  Rules: protocols
and not streams, which asyncio's manual calls slower; one write for all that one read brought; no log; the garbage
collector freezes what is there at the start, as ours does not need to.  No limit and no deadline: it is spared them.
"""

import asyncio
import gc
import sys
import time
from pathlib import Path
from typing import cast

from tt import keys, wire
from tt.keys import ServerKey
from tt.noise import NoiseError, Transport, consume_hello, create_welcome

TIMEOUT = 6 * 3600.0  # s
BACKLOG = 4096  # as ours

_ended: dict[str, float] = {}  # source -> the end of its time-out, s of the monotonic clock
_welcome = wire.encode_welcome(wire.Welcome("asyncio", "0"))
_PING = b"\0"


class Session(asyncio.Protocol):
    """One connection."""

    __slots__ = ("_buffer", "_key", "_noise", "_source", "_transport")

    def __init__(self, key: ServerKey) -> None:
        self._key = key
        self._buffer = b""
        self._noise: Transport | None = None
        self._transport: asyncio.Transport | None = None
        self._source = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class is none of asyncio's
        self._source = transport.get_extra_info("peername")[0]
        if _ended.get(self._source, 0.0) > time.monotonic():
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None  # noqa: S101 - a fact for the type checker
        if self._transport.is_closing():
            return
        data = self._buffer + data if self._buffer else data
        try:
            replies = self._answers(data)
        except (wire.BadFrame, wire.Tampered, NoiseError):
            _ended[self._source] = time.monotonic() + TIMEOUT
            self._transport.abort()
            return
        if replies:
            self._transport.write(b"".join(replies))

    def _answers(self, data: bytes) -> list[bytes]:
        """To the whole frames; the rest is kept.  Raises what is evidence."""
        if data[:2] != wire.MAGIC[: len(data)]:
            raise wire.BadFrame("not this protocol")
        replies, at, size = [], 0, len(data)
        while size - at >= wire.HEADER:
            header = data[at : at + wire.HEADER]
            kind, length = wire.parse_header(header)
            if size - at < wire.HEADER + length:
                break
            replies.append(self._answer(kind, header, data[at + wire.HEADER : at + wire.HEADER + length]))
            at += wire.HEADER + length
        self._buffer = data[at:]
        return replies

    def _answer(self, kind: int, header: bytes, body: bytes) -> bytes:
        if self._noise is None:
            if kind != wire.HELLO:
                raise wire.BadFrame("no HELLO")
            payload, pending = consume_hello(self._key, body)
            wire.decode_hello(payload)
            welcome, self._noise = create_welcome(pending, _welcome)
            return wire.header(wire.WELCOME, len(welcome)) + welcome
        if kind != wire.DATA or self._noise.open(header, body) != _PING:
            raise wire.BadFrame("no ping")
        answer = wire.header(wire.DATA, len(_PING) + wire.TAG)
        return answer + self._noise.seal(answer, _PING)


async def serve(key: ServerKey, port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Session(key), "127.0.0.1", port, backlog=BACKLOG)
    gc.freeze()
    async with server:
        await server.serve_forever()


def main() -> None:
    folder, port, kind = sys.argv[1:]
    key, _ = keys.create_or_load(Path(folder))
    if kind == "uvloop":
        import uvloop  # noqa: PLC0415 - only where it is wanted

        uvloop.run(serve(key, int(port)))
    else:
        asyncio.run(serve(key, int(port)))


if __name__ == "__main__":
    main()
