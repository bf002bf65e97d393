"""The log against readers that stop, come late, or go away; and what a peer's bytes may do to a line: nothing."""

import errno
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from fcntl import F_GETFL, F_GETPIPE_SZ, F_SETPIPE_SZ, fcntl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tt import log

LIMIT = 64 * 1024
Start = Callable[..., log.Handler]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of 4096 bytes: (read, write); the reading end does not wait."""
    reader, writer = os.pipe()
    fcntl(writer, F_SETPIPE_SZ, 4096)
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.fixture
def start(pipe: tuple[int, int]) -> Iterator[Start]:
    """log.start, undone at the end, before the pipe is closed."""
    handlers: list[log.Handler] = []

    def run(descriptor: int, form: str = "text", limit: int = LIMIT) -> log.Handler:
        handlers.append(log.start(form, limit=limit, descriptor=descriptor))
        return handlers[-1]

    yield run
    logging.captureWarnings(capture=False)
    for handler in handlers:
        logging.getLogger().removeHandler(handler)
        handler.close()


def drain(descriptor: int, handler: log.Handler) -> bytes:
    """All that comes while the log is flushed."""
    text = b""
    while True:
        try:
            text += os.read(descriptor, 1 << 20)
        except BlockingIOError:
            handler.flush()
            try:
                text += os.read(descriptor, 1 << 20)
            except BlockingIOError:
                return text


def fill(count: int) -> None:
    for number in range(count):
        log.event(logging.INFO, "filling", number=number, padding="x" * 50)


# ---- readers ------------------------------------------------------------------------------------------------------


def test_a_pipe_that_nobody_reads_stops_nothing_and_is_bounded(start: Start, pipe: tuple[int, int]) -> None:
    handler = start(pipe[1], limit=LIMIT)
    for _ in range(100):
        fill(100)
        handler.flush()
    assert handler.pending
    assert handler._held <= LIMIT


def test_a_full_pipe_that_is_read_later_gives_whole_lines_in_order_then_the_count(
    start: Start, pipe: tuple[int, int]
) -> None:
    handler = start(pipe[1], limit=16 * 1024)
    for _ in range(10):
        fill(100)
        handler.flush()
    *lines, notice = drain(pipe[0], handler).decode("ascii").splitlines()
    numbers = [re.fullmatch(r"\S+ info filling number=(\d+) padding=x{50}", line)[1] for line in lines]  # type: ignore[index]
    assert [int(number) for number in numbers] == [number % 100 for number in range(len(lines))]
    assert f" warning {1000 - len(lines)} log lines dropped" in notice
    log.event(logging.INFO, "again")
    handler.flush()
    assert os.read(pipe[0], 4096).endswith(b" info again\n")
    assert handler._held == 0


def test_a_line_written_in_parts_is_never_torn(start: Start, pipe: tuple[int, int]) -> None:
    capacity = fcntl(pipe[1], F_GETPIPE_SZ)
    handler = start(pipe[1])
    log.event(logging.INFO, "long", text="a" * (capacity + 1000))
    log.event(logging.INFO, "next")
    handler.flush()
    log.event(logging.INFO, "after")
    lines = drain(pipe[0], handler).splitlines()
    assert [line.split()[2] for line in lines] == [b"long", b"next", b"after"]
    assert lines[0].endswith(b"text=" + b"a" * (capacity + 1000))


def test_a_reader_that_closed_is_survived_and_a_later_one_is_told(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    handler = start(writer)
    log.event(logging.INFO, "read")
    handler.flush()
    assert os.read(reader, 4096).endswith(b" info read\n")
    os.close(reader)
    for _ in range(3):
        fill(1)
        handler.flush()
    assert not handler.pending, "a turn of the loop has nothing to do for a reader that is gone"
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    handler.flush()
    assert b" warning 3 log lines dropped" in os.read(reader, 4096)
    os.close(reader)
    os.close(writer)


def test_a_pipe_whose_reader_left_before_the_start_is_survived(start: Start) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    handler = start(writer)
    fill(10)
    handler.flush()
    assert not handler.pending
    handler.close()
    os.close(writer)


def test_the_shared_file_description_is_not_made_non_blocking(start: Start, pipe: tuple[int, int]) -> None:
    handler = start(pipe[1])
    fill(1000)
    handler.flush()
    assert not fcntl(pipe[1], F_GETFL) & os.O_NONBLOCK


def test_without_proc_a_full_pipe_stops_nothing_either(
    start: Start, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "refused")

    monkeypatch.setattr(log.os, "open", refuse)
    handler = start(pipe[1])
    monkeypatch.undo()
    fill(500)
    handler.flush()
    assert handler.pending
    assert drain(pipe[0], handler).count(b"\n") == 500


def test_a_file_gets_every_line_behind_what_others_wrote_to_it(start: Start, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb", buffering=0) as file:  # as the shell's 2>log: no O_APPEND
        handler = start(file.fileno())
        log.event(logging.INFO, "first")
        handler.flush()
        file.write(b"a traceback\n")
        log.event(logging.INFO, "second")
        handler.flush()
    words = [line.split()[-1] for line in (tmp_path / "log").read_bytes().splitlines()]
    assert words == [b"first", b"traceback", b"second"]


def test_a_socket_that_is_not_read_stops_nothing_and_gets_whole_lines_later(start: Start) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        handler = start(ours.fileno(), limit=4 << 20)
        fill(20_000)
        handler.flush()
        assert handler.pending
        assert ours.getblocking()
        theirs.setblocking(False)
        lines = drain(theirs.fileno(), handler).splitlines()
        assert [line.split()[3] for line in lines] == [b"number=%d" % number for number in range(20_000)]


def test_a_full_disk_keeps_the_lines_and_does_not_delay_the_end(start: Start) -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        handler = start(file.fileno())
        fill(3)
        handler.flush()
        assert handler.pending


def test_the_last_lines_reach_a_reader_that_is_slow(start: Start, pipe: tuple[int, int]) -> None:
    handler = start(pipe[1])
    log.event(logging.ERROR, "the end")
    handler.close()
    assert os.read(pipe[0], 4096).endswith(b" error the end\n")


def test_a_line_after_the_end_goes_to_no_file_that_took_over_the_descriptor(start: Start, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb", buffering=0) as file:
        handler = start(file.fileno())
        handler.close()
        fill(1)
        handler.flush()
        handler.close()
    assert (tmp_path / "log").read_bytes() == b""


def test_a_closed_stderr_is_survived(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    handler = start(2)
    fill(1)
    handler.flush()
    assert not handler.pending


# ---- lines --------------------------------------------------------------------------------------------------------


def one_line(start: Start, pipe: tuple[int, int], form: str, **fields: object) -> str:
    handler = start(pipe[1], form)
    log.event(logging.WARNING, "timed out", **fields)
    handler.flush()
    text = os.read(pipe[0], 4096).decode("ascii")
    assert text.index("\n") == len(text) - 1
    return text.rstrip("\n")


FIELDS = {
    "source": "2001:db8::/64",
    "looks": "HTTP request",
    "first": b'GET /"\r\n\x00\xff',
    "seconds": 600.0,
    "no": None,
}


def test_a_text_line_is_time_level_words_and_fields(start: Start, pipe: tuple[int, int]) -> None:
    line = one_line(start, pipe, "text", **FIELDS)
    moment, rest = line.split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", moment)
    assert rest == (
        'warning timed out source=2001:db8::/64 looks="HTTP request" first="GET /\\x22\\r\\n\\x00\\xff" seconds=600'
    )


def test_a_json_line_is_one_object(start: Start, pipe: tuple[int, int]) -> None:
    line = json.loads(one_line(start, pipe, "json", **FIELDS))
    assert list(line) == ["time", "level", "event", "source", "looks", "first", "seconds"]
    assert (line["event"], line["first"], line["seconds"]) == ("timed out", r"GET /\x22\r\n\x00\xff", 600.0)


def test_a_json_field_cannot_pose_as_the_level(start: Start, pipe: tuple[int, int]) -> None:
    assert json.loads(one_line(start, pipe, "json", level="none"))["level"] == "warning"


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_one_line_with_its_traceback(start: Start, pipe: tuple[int, int], form: str) -> None:
    handler = start(pipe[1], form)
    try:
        int("a\nforged line \x1b[31m")
    except ValueError:
        log.LOGGER.exception("failed\nforged")
    handler.flush()
    text = os.read(pipe[0], 4096)
    assert text.count(b"\n") == 1
    assert text.endswith(b"\n")
    assert b"\x1b" not in text
    assert b"ValueError: invalid" in text


def test_a_warning_of_a_library_is_a_line_too(start: Start, pipe: tuple[int, int]) -> None:
    handler = start(pipe[1])
    logging.getLogger("library").info("chatter")
    logging.getLogger("library").warning("bad \N{SNOWMAN}")
    handler.flush()
    assert os.read(pipe[0], 4096).endswith(b" warning bad \\u2603\n")


@given(st.binary(max_size=200))
def test_a_peers_bytes_become_short_plain_text(first: bytes) -> None:
    text = log.escape(first)
    assert text.isascii()
    assert text.isprintable() or not text
    assert '"' not in text
    assert text.encode().decode("unicode_escape").encode("latin-1") == first[:32]


# ---- not more than so many a second -------------------------------------------------------------------------------


def test_a_flood_of_time_outs_is_cut_and_counted() -> None:
    limiter = log.Limiter(100)
    assert sum(limiter.allow(50.0 + number / 1000) for number in range(999)) == 100
    assert limiter.left_out(50.5) == 0, "that second is not over"
    assert limiter.left_out(51.0) == 899
    assert limiter.left_out(51.1) == 0
    assert limiter.allow(51.2)


def test_a_count_is_not_lost_when_the_next_second_begins_before_anyone_asks() -> None:
    limiter = log.Limiter(1)
    assert [limiter.allow(now) for now in (0.0, 0.1, 1.5, 1.6)] == [True, False, True, False]
    assert limiter.left_out(2.5) == 2
