"""The log: one line an event on stderr, as text or JSON, or an entry of systemd's journal; by the standard `logging`.

`event` is how this project logs; `start` sends the records of every logger here.  A Handler keeps finished lines in a
bounded buffer and `flush` writes what the reader takes at once, so one that stops never stops the loop: what does not
fit is dropped, counted, and said later.  A line is never torn by a partial write.

Rules: `flush` is for the loop's thread; other threads may log.  Time is an argument, but for the time in a line.
What a peer sent is escaped and cut here, and nowhere else.  Must not know: the loop, verdicts, the configuration.
"""

import errno
import json
import logging
import os
import re
import select
import socket
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import ClassVar, NamedTuple

LOGGER = logging.getLogger("tt")
PEER_BYTES = 32  # of what a peer sent, in a line
WRITE_BYTES = 64 * 1024  # at most, in one write
FAREWELL = 0.5  # s that `close` waits for a reader of the last lines
JOURNAL = "/run/systemd/journal/socket"
IDENTIFIER = "TapeTrackServer"  # in the journal: what `journalctl -t` selects by


# ---- one line -----------------------------------------------------------------------------------------------------


def event(level: int, words: str, /, **fields: object) -> None:
    """Log one event: a `logging` level, its words, and fields in order.  A field of None is left out.

    Bytes are what a peer sent: they are escaped and cut to PEER_BYTES.
    """
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, "%s", words, extra={"fields": fields})


def escape(first: bytes) -> str:
    r"""At most PEER_BYTES bytes of a peer as printable ASCII without quotes: others as \r, \n, \t, \\ or \xNN."""
    return "".join(_ESCAPED[byte] for byte in first[:PEER_BYTES])


_SHORT = {0x09: r"\t", 0x0A: r"\n", 0x0D: r"\r", 0x5C: r"\\"}
_ESCAPED = [
    _SHORT.get(byte, chr(byte) if 0x20 <= byte < 0x7F and byte != 0x22 else f"\\x{byte:02x}") for byte in range(256)
]
_BARE = re.compile(r"[A-Za-z0-9._:/%+@,\[\]-]+")  # a text that needs no quotes in a line


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    """The fields of an event, and the traceback of a record that has one."""
    fields: dict[str, object] = dict(getattr(record, "fields", {}))
    if record.exc_info:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return {name: value for name, value in fields.items() if value is not None}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _line(record: logging.LogRecord) -> str:
    """The words of a record and its fields, in ASCII."""
    words = record.getMessage().encode("unicode_escape").decode("ascii")  # no line break, no control character
    return " ".join([words, *(f"{name}={_quoted(value)}" for name, value in _fields(record).items())])


def _quoted(value: object) -> str:
    if isinstance(value, bytes):
        return f'"{escape(value)}"'
    text = _plain(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)  # in ASCII


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z warning timed out source=192.0.2.1 looks="TLS ClientHello" seconds=600`, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join([_time(record), record.levelname.lower(), _line(record)])


class JsonFormatter(logging.Formatter):
    """One JSON object (RFC 8259) in ASCII: time, level, event, then the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        head = {"time": _time(record), "level": record.levelname.lower(), "event": record.getMessage()}
        # The head last in precedence and first in order: a field cannot pose as the time or the level.
        return json.dumps(head | {k: self._value(v) for k, v in _fields(record).items() if k not in head}, default=str)

    @staticmethod
    def _value(value: object) -> object:
        return escape(value) if isinstance(value, bytes) else value


class JournalFormatter(logging.Formatter):
    """An entry in the journal's native protocol: MESSAGE, PRIORITY (syslog(3)), TT_EVENT, and TT_SOURCE for `source`.

    The protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL) is a line NAME=VALUE a field; what would break one is escaped.
    MESSAGE is the line of the text form: its time and its level the journal has by itself.
    """

    PRIORITIES: ClassVar = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "MESSAGE": _line(record),
            "PRIORITY": str(self.PRIORITIES.get(record.levelno, 7)),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "TT_EVENT": self._value(record.getMessage()),
        }
        for name, value in _fields(record).items():
            # The head last in precedence: a field cannot pose as the event.
            entry.setdefault(f"TT_{name.upper()}", self._value(value))
        return "\n".join(f"{name}={value}" for name, value in entry.items())

    @staticmethod
    def _value(value: object) -> str:
        return escape(value) if isinstance(value, bytes) else _plain(value).encode("unicode_escape").decode("ascii")


FORMATTERS: Mapping[str, type[logging.Formatter]] = {
    "text": TextFormatter,
    "json": JsonFormatter,
    "journal": JournalFormatter,
}


# ---- writing without waiting --------------------------------------------------------------------------------------


class _Writer(NamedTuple):
    """Writes without ever waiting: takes bytes, returns how many went; BlockingIOError where that is none."""

    write: Callable[[bytes], int]
    close: Callable[[], None]
    descriptor: int  # what is to be asked whether it takes more
    reader: str = "stderr"  # as the notice of dropped lines names it
    whole: bool = False  # it takes one line at a time, all of it or nothing


def _writer(descriptor: int) -> _Writer:
    """The writer for what this descriptor is.

    A pipe or terminal is opened anew: O_NONBLOCK belongs to the open file description, which others share (the shell
    that started us would find its terminal non-blocking).  A regular file is written through the descriptor itself, for
    O_NONBLOCK means nothing there, and a second description would have an offset of its own and overwrite.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        own_socket = socket.socket(fileno=os.dup(descriptor))
        at_once = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        return _Writer(lambda data: own_socket.send(data, at_once), own_socket.close, descriptor)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC
        try:
            own = os.open(f"/proc/self/fd/{descriptor}", flags)
        except OSError:  # no /proc, another user's terminal, or a pipe that nobody reads any more
            return _polled_writer(descriptor)
        return _Writer(lambda data: os.write(own, data), lambda: os.close(own), descriptor)
    return _Writer(lambda data: os.write(descriptor, data), lambda: None, descriptor)


def _polled_writer(descriptor: int) -> _Writer:
    """For a descriptor that blocks: "writable" means that a pipe takes PIPE_BUF bytes at once (pipe(7))."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)

    def write(data: bytes) -> int:
        if not poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, "not writable now")
        return os.write(descriptor, data[: select.PIPE_BUF])

    return _Writer(write, lambda: None, descriptor)


def _journal_writer() -> _Writer:
    """A datagram an entry.  Raises OSError where there is no journal."""
    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        journal.connect(JOURNAL)
    except OSError:
        journal.close()
        raise

    def write(data: bytes) -> int:
        try:
            return journal.send(data, socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE):
                raise
        journal.connect(JOURNAL)  # it has been started anew since
        return journal.send(data, socket.MSG_NOSIGNAL)

    return _Writer(write, journal.close, journal.fileno(), "the journal", whole=True)


class Handler(logging.Handler):
    """Keeps lines until `flush` can write them to a descriptor (None: the journal); at most `limit` bytes of them."""

    def __init__(self, descriptor: int | None = 2, *, limit: int) -> None:
        """Raises OSError where there is no journal."""
        super().__init__()
        self._writer = _journal_writer() if descriptor is None else _writer(descriptor)
        self._limit = limit
        self.dropped_lines = 0  # since the start
        self._lines: deque[bytes] = deque()
        self._out = b""  # lines being written, of which the first may have gone in part
        self._held = 0  # bytes in both
        self._dropped = 0  # lines, since that was last said
        self._closed = False
        self._saying = 0  # where `_out` is the notice of dropped lines: how many it says

    def createLock(self) -> None:  # noqa: N802 - the name that `logging` calls
        """No lock: the loop must not wait for another thread's line.  One append to a deque is whole by itself."""
        self.lock = nullcontext()  # type: ignore[assignment]  # from Python 3.13 on there must be something to enter

    def acquire(self) -> None:
        """Nothing: see createLock."""

    def release(self) -> None:
        """Nothing: see createLock."""

    @property
    def pending(self) -> bool:
        """Whether `flush` has a line to write.  Dropped ones are said at the next tick: nobody may be reading."""
        return bool(self._out or self._lines)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line of a record, or count it as dropped where the buffer is full."""
        try:
            line = self.format(record).encode("ascii", "backslashreplace") + b"\n"
        except (TypeError, ValueError):  # a call whose words do not fit its arguments: `logging` shows where it is
            self.handleError(record)
            return
        # Once one is dropped all are, until the buffer is empty and the notice is out: one gap, said where it is.
        if self._dropped or self._held + len(line) > self._limit:
            self._drop(1)
            return
        self._lines.append(line)
        self._held += len(line)

    def flush(self) -> None:
        """Write what goes at once.  Never waits and never raises."""
        while self.pending or self._dropped:
            if not self._out:
                self._gather()
            try:
                written = self._writer.write(self._out)
            except OSError as error:
                if error.errno == errno.EMSGSIZE:  # an entry too long for a datagram: the next one may go
                    self._lose_out()
                    continue
                # A full disk or queue may have room later; what else fails has no reader any more.
                if error.errno not in (errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.ENOBUFS):
                    self._lose()
                return
            self._out = self._out[written:]
            self._held -= written
        self._held = 0  # two threads may have added at once and one sum been lost: that must not last

    def close(self) -> None:
        """Write the last lines, for which a reader gets FAREWELL seconds, and let go of the descriptor."""
        if self._closed:  # `logging` closes every handler once more at the interpreter's end
            return
        self._closed = True
        poll = select.poll()
        poll.register(self._writer.descriptor, select.POLLOUT)
        end = time.monotonic() + FAREWELL
        self.flush()
        while (left := end - time.monotonic()) > 0 and self.pending:
            before = self._held
            if not poll.poll(left * 1000):
                break
            self.flush()
            if self._held == before:  # writable and still nothing goes: a full disk
                break
        self._writer.close()
        self._writer = _Writer(len, lambda: None, -1)  # the descriptor's number may be another file's from now on
        super().close()

    def _gather(self) -> None:
        """Move lines up to one write's worth into `_out`; after the last of them, alone, the notice of dropped ones."""
        self._saying = 0
        if not self._lines:
            self._saying, self._dropped = self._dropped, 0
            self._out = self._notice(self._saying)
            self._held += len(self._out)
            return
        size = 0
        taken: list[bytes] = []
        while self._lines and size < (1 if self._writer.whole else WRITE_BYTES):
            taken.append(self._lines.popleft())
            size += len(taken[-1])
        self._out = b"".join(taken)

    def _notice(self, count: int) -> bytes:
        words = f"{count} log line{'s' * (count != 1)} dropped: {self._writer.reader} was not read fast enough"
        record = LOGGER.makeRecord(LOGGER.name, logging.WARNING, __file__, 0, "%s", (words,), None)
        return self.format(record).encode("ascii") + b"\n"

    def _lose(self) -> None:
        """Nobody reads: drop all, the torn line too, so that a later reader begins with a whole one."""
        self._lose_out()
        self._drop(len(self._lines))
        self._lines.clear()
        self._held = 0

    def _lose_out(self) -> None:
        """What was being written is dropped; where that was the notice, those lines are to be said again."""
        if self._saying:
            self._dropped += self._saying
        else:
            self._drop(int(bool(self._out)) if self._writer.whole else self._out.count(b"\n"))
        self._held -= len(self._out)
        self._out, self._saying = b"", 0

    def _drop(self, lines: int) -> None:
        self._dropped += lines
        self.dropped_lines += lines


def start(form: str, *, limit: int, descriptor: int = 2) -> Handler:
    """Send every logger's lines to a descriptor, in one of the FORMATTERS; ours from INFO on, others from WARNING on.

    The form "journal" goes to the journal instead; raises OSError where there is none.  `limit` bytes of lines are held
    while it is not read.  The caller calls `flush` whenever there is something pending.
    """
    if (
        form != "journal" and descriptor == 2 and sys.stderr is None
    ):  # started with stderr closed: that number may be any file by now
        descriptor = os.open(os.devnull, os.O_WRONLY)
    handler = Handler(None if form == "journal" else descriptor, limit=limit)
    handler.setFormatter(FORMATTERS[form]())
    logging.getLogger().addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
    return handler


# ---- not more than so many a second -------------------------------------------------------------------------------


class Limiter:
    """Lets `per_second` events of each second through and counts the others.  Time is monotonic seconds."""

    def __init__(self, per_second: int) -> None:
        self.per_second = per_second
        self._began = float("-inf")  # of the second that is counted
        self._passed = 0
        self._left_out = 0

    def allow(self, now: float) -> bool:
        """Whether this event is to be logged."""
        if now - self._began >= 1:
            self._began = now
            self._passed = 0
        if self._passed < self.per_second:
            self._passed += 1
            return True
        self._left_out += 1
        return False

    def left_out(self, now: float) -> int:
        """The events held back since the last answer, once their second is over; 0 before, and where none were."""
        if now - self._began < 1:
            return 0
        count, self._left_out = self._left_out, 0
        return count
