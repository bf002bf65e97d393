"""The log in systemd's journal: its native protocol, a journal that stops, comes late, or starts itself anew."""

import logging
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import until
from process import Process, need, refused

from tt import log

Entry = dict[str, str]
FIELD = re.compile(r"[A-Z][A-Z0-9_]{0,63}")  # as the journal takes them: others it drops


class Journal:
    """Who has the journal's socket at a path; it understands fields that are one line each."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        path.chmod(0o666)
        self.entries: list[Entry] = []

    def read(self) -> list[Entry]:
        """All entries so far."""
        while True:
            try:
                datagram = self._socket.recv(1 << 20)
            except BlockingIOError:
                return self.entries
            assert datagram.endswith(b"\n")
            lines = datagram.decode("ascii").removesuffix("\n").split("\n")
            assert all(FIELD.fullmatch(line.partition("=")[0]) and "=" in line for line in lines), lines
            self.entries.append(dict(line.split("=", 1) for line in lines))
            assert len(self.entries[-1]) == len(lines), "no field twice"

    def of(self, event: str) -> list[Entry]:
        return [entry for entry in self.read() if entry["TT_EVENT"] == event]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(log, "JOURNAL", str(tmp_path / "socket"))
    return tmp_path / "socket"


@pytest.fixture
def journal(place: Path) -> Iterator[Journal]:
    made = Journal(place)
    yield made
    made.close()


@pytest.fixture
def start() -> Iterator[Callable[..., log.Handler]]:
    handlers: list[log.Handler] = []

    def run(limit: int = 1 << 20) -> log.Handler:
        handlers.append(log.start("journal", limit=limit))
        return handlers[-1]

    yield run
    logging.captureWarnings(capture=False)
    for handler in handlers:
        logging.getLogger().removeHandler(handler)
        handler.close()


def fail(words: str) -> None:
    raise ValueError(words)


def test_an_entry_has_a_line_to_read_and_a_field_for_each_to_select_by(start, journal: Journal) -> None:
    handler = start()
    log.event(
        logging.WARNING, "timed out", source="192.0.2.1", seconds=600.0, before=0, looks="HTTP request",
        first=b'GET /"\r\n\x00\xff', none=None,
    )  # fmt: skip
    handler.flush()
    assert journal.read() == [
        {
            "MESSAGE": 'timed out source=192.0.2.1 seconds=600 before=0 looks="HTTP request" '
            'first="GET /\\x22\\r\\n\\x00\\xff"',
            "PRIORITY": "4",
            "SYSLOG_IDENTIFIER": "TapeTrackServer",
            "TT_EVENT": "timed out",
            "TT_SOURCE": "192.0.2.1",
            "TT_SECONDS": "600",
            "TT_BEFORE": "0",
            "TT_LOOKS": "HTTP request",
            "TT_FIRST": r"GET /\x22\r\n\x00\xff",
        }
    ]


def test_every_level_has_its_priority(start, journal: Journal) -> None:
    handler = start()
    for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO):
        log.event(level, "x")
    handler.flush()
    assert [entry["PRIORITY"] for entry in journal.read()] == ["2", "3", "4", "6"]


def test_nothing_that_is_logged_makes_a_field_of_its_own(start, journal: Journal) -> None:
    handler = start()
    forged = "a\nPRIORITY=0\n_UID=0\x1b[31m\N{SNOWMAN}"
    log.event(logging.INFO, forged, event=forged, source=forged)
    try:
        fail(forged)
    except ValueError:
        log.LOGGER.exception(forged)
    handler.flush()
    event, failure = journal.read()
    assert list(event) == ["MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "TT_EVENT", "TT_SOURCE"]
    assert event["TT_EVENT"] == event["TT_SOURCE"] == r"a\nPRIORITY=0\n_UID=0\x1b[31m\u2603"
    assert (event["PRIORITY"], failure["PRIORITY"]) == ("6", "3")
    assert "ValueError: a\\nPRIORITY=0" in failure["TT_TRACEBACK"]


def test_a_journal_that_reads_nothing_holds_up_nobody_and_later_has_whole_entries_and_the_count(
    start, journal: Journal
) -> None:
    handler = start(limit=64 * 1024)
    for number in range(2000):
        log.event(logging.INFO, "filling", number=number)
        handler.flush()
    assert handler.pending
    assert handler._held <= 64 * 1024
    until("all that is held", lambda: (journal.read(), handler.flush(), handler.pending)[2] is False)
    *filling, notice = journal.read()
    assert [entry["TT_NUMBER"] for entry in filling] == [str(number) for number in range(len(filling))]
    words = f"{2000 - len(filling)} log lines dropped: the journal was not read fast enough"
    assert (notice["TT_EVENT"], notice["PRIORITY"]) == (words, "4")
    assert handler.dropped_lines == 2000 - len(filling)
    assert handler._held == 0


def test_a_journal_that_starts_itself_anew_gets_what_comes_then_and_the_count_of_what_it_missed(
    start, place: Path
) -> None:
    before = Journal(place)
    handler = start()
    log.event(logging.INFO, "heard")
    handler.flush()
    assert [entry["TT_EVENT"] for entry in before.read()] == ["heard"]
    before.close()
    place.unlink()
    for _ in range(3):
        log.event(logging.INFO, "missed")
        handler.flush()
    assert not handler.pending
    again = Journal(place)
    handler.flush()
    log.event(logging.INFO, "heard again")
    handler.flush()
    words = [entry["TT_EVENT"] for entry in again.read()]
    assert words == ["3 log lines dropped: the journal was not read fast enough", "heard again"]
    assert handler.dropped_lines == 3
    again.close()


def test_an_entry_that_no_datagram_can_hold_is_counted_and_those_behind_it_come(start, journal: Journal) -> None:
    handler = start(limit=64 << 20)
    log.event(logging.INFO, "long", text="x" * (16 << 20))
    handler.flush()
    log.event(logging.INFO, "short")
    handler.flush()
    assert [entry["TT_EVENT"] for entry in journal.read()] == [
        "1 log line dropped: the journal was not read fast enough", "short",
    ]  # fmt: skip
    assert handler._held == 0


def test_what_is_held_at_the_end_still_goes(start, journal: Journal) -> None:
    handler = start()
    while not handler.pending:  # its queue is full
        log.event(logging.INFO, "filling")
        handler.flush()
    log.event(logging.INFO, "the end")
    journal.read()
    handler.close()
    assert journal.of("the end")


def test_without_a_journal_a_start_is_refused(tmp_path: Path) -> None:
    need("unshare", "mount", root=True)
    wrap = ("unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /run; exec "$@"', "sh")
    line = refused(
        tmp_path, "--listen", "127.0.0.1:0", "--data", str(tmp_path / "data"), "--log-format", "journal", wrap=wrap
    )
    assert "tt: --log-format journal: /run/systemd/journal/socket: No such file or directory: " in line
    assert "text or json" in line


def test_a_server_logs_into_the_journal_of_its_host(tmp_path: Path) -> None:
    need("unshare", "mount", root=True)
    journal = Journal(tmp_path / "journal")
    there = "/run/systemd/journal"
    bind = f"mkdir -p {there}; touch {there}/socket; mount --bind {tmp_path}/journal {there}/socket"
    wrap = ("unshare", "--mount", "sh", "-ec", f'mount -t tmpfs none /run; {bind}; exec "$@"', "sh")
    with Process(tmp_path, "--log-format", "journal", wrap=wrap, blind=True) as server:
        server.send_http("127.0.0.9")
        (timed_out,) = until("the entry of a time-out", lambda: journal.of("timed out"))
        assert (timed_out["TT_SOURCE"], timed_out["TT_REASON"]) == ("127.0.0.9", "not_protocol")
        assert timed_out["TT_LOOKS"] == "HTTP request"
        assert server.stop() == 0
        assert server.log == "", "nothing by stderr"
        events = [entry["TT_EVENT"] for entry in journal.read()]
        assert {"listening", "started", "stopping", "stopped"} <= set(events)
    journal.close()
