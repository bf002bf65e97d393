"""Operations whose result comes later: what waits, what goes on meanwhile, what is left when nobody waits any more."""

import os
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from harness import LOGIN, Running, reset, until, until_end
from test_core_close import in_the_loop, reconfigure

from tt import dispatch
from tt.dispatch import OperationError, Session, Write
from tt.pending import Later, Pending
from tt.wire import MAX_TO_CLIENT, Assembler, Request, decode_replies, encode_requests


class Work:
    """Operations that wait until the test says so; what ends them comes through the loop, as from a thread."""

    def __init__(self) -> None:
        self.waiting: list[Pending] = []
        self.calls: list[str] = []
        self.commit: Pending | None = None
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK)
        self._jobs: list[Any] = []
        self.operations = {
            **LOGIN,
            "wait": self.wait,
            "write": Write(self.write, lambda: self.commit),
            "read": self.read,
            "steps": self.steps,
            "count": lambda _session, _arguments: len(self.calls),
        }

    def on(self, server: Running) -> "Work":
        server.server.watch(self._descriptor, self._run)
        return self

    def finish(self, count: int, error: Exception | None = None) -> None:
        """In the loop, once so many wait."""
        until(f"{count} wait, not {len(self.waiting)}", lambda: len(self.waiting) >= count)
        waiting = self.waiting[:count]
        del self.waiting[:count]  # and no new list: the loop may be adding to this one
        self.do(lambda: [pending.finish(error) for pending in waiting])

    def do(self, job: Any) -> None:
        self._jobs.append(job)
        os.eventfd_write(self._descriptor, 1)

    def _run(self, _readable: bool, _writable: bool) -> None:
        os.eventfd_read(self._descriptor)
        while self._jobs:
            self._jobs.pop(0)()

    def close(self, server: Running) -> None:
        server.server.unwatch(self._descriptor)
        os.close(self._descriptor)

    # ---- the operations ---------------------------------------------------------------------------------------------

    def _later(self, word: str) -> Later:
        self.calls.append(word)
        pending = Pending()
        self.waiting.append(pending)

        def result() -> str:
            if pending.error:
                raise OperationError("storage", str(pending.error))
            return word

        return Later(pending, result)

    def wait(self, _session: Session, _arguments: msgspec.Raw) -> Later:
        return self._later("waited")

    def write(self, _session: Session, _arguments: msgspec.Raw) -> Later:
        return self._later("written")

    def read(self, _session: Session, _arguments: msgspec.Raw) -> str:
        self.calls.append("read")
        return "read"

    def steps(self, _session: Session, _arguments: msgspec.Raw) -> Iterator[Pending | None]:
        yield None
        pending = Pending()
        self.waiting.append(pending)
        yield pending
        yield None
        return "stepped"


@pytest.fixture
def work(run_server, monkeypatch) -> Iterator[tuple[Running, Work]]:
    monkeypatch.setattr(dispatch, "SLICE_TIME", 10.0)  # a message here is one slice, on any machine
    jobs = Work()
    server = run_server(jobs.operations)
    yield server, jobs.on(server)
    jobs.close(server)


def results(server: Running, peer: Any, transport: Any) -> list[Any]:
    replies = decode_replies(server.read_plaintext(peer, transport)[1:])
    return [reply.error.code if reply.error else msgspec.msgpack.decode(reply.result) for reply in replies]


def send(server: Running, peer: Any, transport: Any, *operations: str) -> None:
    requests = [Request(number, operation) for number, operation in enumerate(operations)]
    peer.sendall(server.seal(transport, b"\0" + encode_requests(requests)))


def test_who_waits_holds_up_nobody_and_is_answered_in_order(work):
    server, jobs = work
    peer, transport = server.handshake()
    send(server, peer, transport, "wait", "read")
    peer.sendall(server.seal(transport, b"\0"))
    until("it waits", lambda: jobs.waiting)
    other, others_transport = server.handshake("127.0.0.3")
    for _ in range(20):
        assert [msgspec.msgpack.decode(reply.result) for reply in server.ask(other, others_transport, "read")] == [
            "read"
        ]
    jobs.finish(1)
    assert results(server, peer, transport) == ["waited", "read"]
    assert server.read_plaintext(peer, transport) == b"\0"
    assert jobs.calls == ["waited"] + 21 * ["read"]


def test_writes_of_a_message_are_all_made_before_the_first_has_to_be_durable(work):
    server, jobs = work
    peer, transport = server.handshake()
    send(server, peer, transport, *16 * ["write"], "count", "write")
    until("all are made", lambda: len(jobs.waiting) == 16)
    assert jobs.calls == 16 * ["written"]  # what reads waits for all of them
    jobs.finish(16)
    jobs.finish(1)
    assert results(server, peer, transport) == [*16 * ["written"], 16, "written"]


def test_no_write_is_made_while_another_is_being_committed(work):
    server, jobs = work
    jobs.commit = commit = Pending()
    peer, transport = server.handshake()
    send(server, peer, transport, "write")
    peers = server.handshake("127.0.0.3")
    assert server.ask(*peers, "count")  # it has had its turn
    assert not jobs.calls

    def committed() -> None:
        jobs.commit = None
        commit.finish()

    jobs.do(committed)
    jobs.finish(1)
    assert results(server, peer, transport) == ["written"]


def test_a_write_that_cannot_be_stored_is_an_error_for_its_request_alone(work):
    server, jobs = work
    peer, transport = server.handshake()
    send(server, peer, transport, "write", "write")
    jobs.finish(1, OSError("no space"))
    jobs.finish(1)
    assert results(server, peer, transport) == ["storage", "written"]


def test_an_operation_of_many_steps_waits_between_them(work):
    server, jobs = work
    peer, transport = server.handshake()
    send(server, peer, transport, "steps", "read")
    jobs.finish(1)
    assert results(server, peer, transport) == ["stepped", "read"]


def test_our_own_slowness_is_not_held_against_who_waits(work):
    server, jobs = work
    peer, transport = server.handshake()
    send(server, peer, transport, "wait")
    until("it waits", lambda: jobs.waiting)
    server.handshake("127.0.0.3")  # silent from here on, as long as the one that waits
    reconfigure(server, idle_before_login=1.0)
    server.await_closed("idle")
    jobs.finish(1)
    assert results(server, peer, transport) == ["waited"]
    assert server.closed("slow_reader") == 0


@pytest.mark.parametrize("leave", ["close", "half-close", "reset"])
def test_who_leaves_while_he_waits_leaves_nothing_behind(work, leave):
    server, jobs = work
    peer, transport = server.handshake()
    send(server, peer, transport, "wait", "read")
    until("it waits", lambda: jobs.waiting)
    if leave == "reset":
        peer.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0
    if leave == "half-close":
        peer.shutdown(1)
    else:
        peer.close()
    other = server.handshake("127.0.0.3")
    server.ask(*other, "count")
    jobs.finish(1)
    server.await_closed("peer_closed")
    if leave == "half-close":
        assert results(server, peer, transport) == ["waited", "read"]
        assert until_end(peer) == b""


def test_what_comes_while_an_earlier_reply_is_not_read_is_not_missed(run_server, monkeypatch):
    monkeypatch.setattr(dispatch, "SLICE_TIME", 10.0)  # both are done in one slice, on any machine
    jobs = Work()
    page = random.Random(1).randbytes(dispatch.SLICE_SIZE)  # does not compress
    server = run_server(jobs.operations | {"page": lambda *_: page}, send_buffer=16384)
    jobs.on(server)
    peer, transport = server.user(buffer=16384)
    frames = [encode_requests([Request(number, name)]) for number, name in enumerate(("page", "write"))]
    peer.sendall(b"".join(server.seal(transport, b"\0" + body) for body in frames))
    until("it is made", lambda: jobs.waiting)
    jobs.finish(1)  # the page still goes out: nobody is parked yet
    replies: list[Any] = []
    parts = Assembler(MAX_TO_CLIENT)
    parts.flags_allowed = True
    while len(replies) < 2:
        body = parts.feed(server.read_plaintext(peer, transport))
        replies += decode_replies(body) if body else []
    assert [msgspec.msgpack.decode(reply.result) for reply in replies] == [page, "written"]
    jobs.close(server)


def test_who_resets_while_he_waits_is_gone_before_it_ends(work):
    server, jobs = work
    peer, transport = server.handshake()
    send(server, peer, transport, "wait")
    until("it waits", lambda: jobs.waiting)
    reset(peer)
    server.await_closed("peer_closed")
    assert jobs.waiting
    jobs.finish(1)
    other, transport = server.handshake("127.0.0.3")
    assert server.ask(other, transport, "count")


def test_many_wait_at_once_and_each_gets_its_own(work):
    server, jobs = work
    peers = [server.handshake(f"127.0.1.{number // 50 + 1}") for number in range(200)]
    for peer, transport in peers:
        send(server, peer, transport, "wait")
    jobs.finish(200)
    for peer, transport in peers:
        assert results(server, peer, transport) == ["waited"]


def test_a_stop_waits_for_what_is_being_written(work):
    """For 3 s at most: so it ends in the loop's thread, in the turn behind the one with the stop."""
    server, jobs = work
    peer, transport = server.handshake()
    send(server, peer, transport, "write")
    until("it is made", lambda: jobs.waiting)
    closing: list[int] = []

    def finish() -> None:
        closing.append(server.counters()["connections"]["closing"])  # no new ones
        jobs.waiting.pop().finish()

    in_the_loop(server, server.server.stop, finish)
    assert results(server, peer, transport) == ["written"]
    assert until_end(peer) == b""
    assert closing == [1]


def test_a_word_too_late_finds_nobody(work):
    server, jobs = work
    peer, transport = server.handshake()
    send(server, peer, transport, "wait")
    until("it waits", lambda: jobs.waiting)
    peer.close()
    peer = server.connect()  # perhaps in the place of the other
    jobs.finish(1)
    hello, _ = server.hello()
    peer.sendall(hello)
    assert server.read_frame(peer)
