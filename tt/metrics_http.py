"""Serves the page of metrics by HTTP, in a thread of its own: GET /metrics, and nothing else.

Rules: whoever reaches the port gets the page, without a password, so it belongs on a trusted network; and what a
stranger can do there is bounded: the loop is asked at most once in PAGE_AGE, CONNECTIONS are held at a time (the
one that was first gives way), each for DEADLINE at most, and one is taken in every PAUSE.  The loop's thread takes the
counts, woken by an eventfd, so that none is half changed; where it does not within PATIENCE, the reply is 503.  By
asyncio: one thread, and nobody who is silent holds it.
It must not know what the metrics are.
"""

import asyncio
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from tt import log
from tt._core import Server
from tt.config import Address

PATH = "/metrics"
METHODS = ("GET", "HEAD")  # RFC 9110 section 9.1: who has the one must have the other
CONNECTIONS = 16  # at a time
BACKLOG = 64  # connections that the kernel holds until they are taken
PAUSE = 0.01  # s from one connection to the next
DEADLINE = 5.0  # s from a connection to its end
PATIENCE = 3.0  # s that the loop may take
PAGE_AGE = 1.0  # s, up to which the same page is given again
MAX_REQUEST = 8192  # bytes of its head
REQUEST_LINE = re.compile(rb"([!-~]+) ([!-~]+) HTTP/1\.[0-9]\r\n")  # RFC 9112 section 3


class MetricsError(Exception):
    """The metrics cannot be served; the text is one line that names the thing, the rule and the remedy."""


def open_listeners(addresses: Iterable[Address]) -> list[socket.socket]:
    """Listening sockets, non-blocking, closed again where one cannot be had.  Raises MetricsError."""
    listeners: list[socket.socket] = []
    for address in addresses:
        listener = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)
        listeners.append(listener)
        try:
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listener.family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address.host, address.port))
            listener.listen(BACKLOG)
        except OSError as error:
            for opened in listeners:
                opened.close()
            remedy = "name a free port and an address of this host, or leave --metrics out"
            raise MetricsError(f"--metrics {address}: {error.strerror or error}: {remedy}") from error
    return listeners


def say(listeners: Iterable[socket.socket]) -> None:
    """One line for each in the log, which warns where strangers may get there."""
    for listener in listeners:
        host, port, *_ = listener.getsockname()
        place = ip_address(host.partition("%")[0])
        if place.is_unspecified or place.is_global:
            words, remedy = "metrics for whoever reaches this address", "name a loopback or private one with --metrics"
            log.event(logging.WARNING, words, address=str(Address(host, port)), remedy=remedy)
        else:
            log.event(logging.INFO, "metrics", address=str(Address(host, port)))


class Endpoint:
    """The thread, and what the loop does for it."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        server: Server,
        take: Callable[[], Mapping[str, Any]],
        page: Callable[[Mapping[str, Any]], bytes],
        content_type: str,
    ) -> None:
        """`take` is called in the loop's thread, `page` in this one's.  Raises MetricsError.

        The listeners stay the caller's, to be closed after `close`.
        """
        self._listeners = listeners
        self._server = server
        self._take = take
        self._make_page = page
        self._content_type = content_type
        self._wish = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable: the thread waits for counts
        self._loop = asyncio.new_event_loop()
        self._counts: asyncio.Future[Mapping[str, Any]] = self._loop.create_future()
        self._page = b""
        self._made_at = float("-inf")
        self._making = asyncio.Lock()
        self._tasks: dict[asyncio.Task[None], None] = {}  # of connections, in the order of their coming
        self._end = asyncio.Event()
        server.watch(self._wish, self._answer_wish)
        self._thread = threading.Thread(target=self._run, name="tt-metrics", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._release()
            remedy = "raise the limit of tasks (ulimit -u, TasksMax)"
            raise MetricsError(f"--metrics: no thread can be had: {remedy}") from error

    def close(self) -> None:
        """End the thread, and let go of all but the listeners.  For the thread that made it."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._release()

    def _release(self) -> None:
        self._server.unwatch(self._wish)
        os.close(self._wish)
        self._loop.close()

    # ---- the loop's thread ------------------------------------------------------------------------------------------

    def _answer_wish(self, _readable: bool, _writable: bool) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wish)
        self._loop.call_soon_threadsafe(self._have, self._take())

    # ---- this thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        for listener in self._listeners:
            self._listen(listener)
        await self._end.wait()
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _listen(self, listener: socket.socket) -> None:
        if not self._end.is_set():
            self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        self._loop.remove_reader(listener)
        self._loop.call_later(PAUSE, self._listen, listener)
        with suppress(OSError):  # no descriptor, or gone again: after the pause it is tried anew
            peer, _ = listener.accept()
            peer.setblocking(False)
            task = self._loop.create_task(self._converse(peer))
            self._tasks[task] = None
            task.add_done_callback(partial(self._ended, peer))
            if len(self._tasks) > CONNECTIONS:
                next(iter(self._tasks)).cancel()

    def _ended(self, peer: socket.socket, task: asyncio.Task[None]) -> None:
        """Also that of a connection whose task was cancelled before its first step."""
        self._tasks.pop(task)
        peer.close()

    async def _converse(self, peer: socket.socket) -> None:
        """One request and its reply; then the peer closes, or the deadline does."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(DEADLINE):
                await self._loop.sock_sendall(peer, await self._reply(await self._request(peer)))
                peer.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(peer, MAX_REQUEST):  # closed with bytes unread, it would be a reset
                    pass

    async def _request(self, peer: socket.socket) -> bytes:
        """The head of a request up to its empty line, or what there is of one that is too long or is not ended."""
        head = b""
        while b"\r\n\r\n" not in head and len(head) <= MAX_REQUEST:
            part = await self._loop.sock_recv(peer, MAX_REQUEST)
            if not part:
                break
            head += part
        return head

    async def _reply(self, head: bytes) -> bytes:
        line = REQUEST_LINE.match(head)
        method, target = (part.decode() for part in line.groups()) if line else ("", "")
        if line is None or b"\r\n\r\n" not in head:
            too_long = len(head) > MAX_REQUEST
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if too_long else HTTPStatus.BAD_REQUEST
            return _response(status, f"an HTTP request of at most {MAX_REQUEST} bytes: GET {PATH}")
        if _path(target) != PATH:
            return _response(HTTPStatus.NOT_FOUND, f"there is {PATH} alone", method)
        if method not in METHODS:
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, f"{PATH} is for {' and '.join(METHODS)}", method)
        try:
            page = await self._fresh_page()
        except TimeoutError:
            return _response(
                HTTPStatus.SERVICE_UNAVAILABLE, f"the server's loop has not answered for {PATIENCE:g} s", method
            )
        return _response(HTTPStatus.OK, page, method, self._content_type)

    async def _fresh_page(self) -> bytes:
        """Raises TimeoutError."""
        async with self._making:  # who waits here gets what the one before him had made
            if time.monotonic() - self._made_at >= PAGE_AGE:
                self._counts = self._loop.create_future()
                os.eventfd_write(self._wish, 1)
                counts = await asyncio.wait_for(self._counts, PATIENCE)
                self._page, self._made_at = self._make_page(counts), time.monotonic()
            return self._page

    def _have(self, counts: Mapping[str, Any]) -> None:
        if not self._counts.done():  # given up meanwhile
            self._counts.set_result(counts)


def _path(target: str) -> str:
    try:
        return urlsplit(target).path
    except ValueError:  # such as http://[
        return ""


def _response(
    status: HTTPStatus, body: str | bytes, method: str = "GET", content_type: str = "text/plain; charset=utf-8"
) -> bytes:
    data = body if isinstance(body, bytes) else f"{body}\n".encode()
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(data)}",
        *([f"Allow: {', '.join(METHODS)}"] if status is HTTPStatus.METHOD_NOT_ALLOWED else []),
        "Cache-Control: no-store",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else data)
