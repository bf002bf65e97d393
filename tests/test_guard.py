"""The guard: what it logs of time-outs and how much, and that the saved table outlives the server.  No socket."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from harness import Events, until

from tt import config, guard, log, spoke
from tt._core import REASON_CODES, TimedOut, TimeoutTable
from tt.exemptions import Exemption
from tt.guard import LIFTED_AT_ONCE, Guard
from tt.kernel_gate import packed

SECOND = 10**9
GATEWAYS = (ip_network("192.0.2.254/32"), ip_network("2001:db8::1/128"))


class Clock:
    """Takes the place of the module `time` in the guard."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.utc = 1_800_000_000.0

    def monotonic(self) -> float:
        return self.seconds

    def monotonic_ns(self) -> int:
        return int(self.seconds * SECOND)

    def time_ns(self) -> int:
        return int(self.utc * SECOND)

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds
        self.utc += seconds


class Kept:
    """A guard with its table and clock, and what it logged."""

    def __init__(self, file: Path, clock: Clock, events: Events, handler: log.Handler, **options: Any) -> None:
        self.settings = config.load(None, {}, {"data": str(file.parent), **options})
        self.clock, self.events = clock, events
        self.table = TimeoutTable(1024, now=clock.monotonic_ns())
        self.guard = Guard(self.settings, self.table, file, GATEWAYS, handler)
        self.dropped = 0
        self.guard.counters = lambda: {
            "closed": {"timed_out": self.dropped, "bad_proxy": 0},
            "accept_failures": 0,
        }

    def time_out(self, *sources: str, first: bytes = b"GET / HTTP/1.1\r\n", seconds: int = 600) -> None:
        """What the loop does in one turn when these sources send that."""
        now = self.clock.monotonic_ns()
        added = []
        for source in sources:
            record = self.table.add(source, REASON_CODES["not_protocol"], seconds * SECOND, now, hard=True)
            added.append(
                TimedOut(
                    record.source,
                    packed(record.source),
                    "not_protocol",
                    record.start,
                    record.end,
                    record.before,
                    False,
                    first,
                    False,
                )
            )
        self.guard.turn(added, [])

    def logged(self, words: str) -> list[dict[str, Any]]:
        return self.events.of(words)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(guard, "time", clock)
    return clock


@pytest.fixture
def start(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Kept]]:
    """Makes guards of one data directory; what they log is in `events` of each, from its start on."""
    null = os.open(os.devnull, os.O_WRONLY)
    handler = log.Handler(null, limit=1 << 20)
    attached: list[Events] = []
    log.LOGGER.setLevel(logging.INFO)

    def make(file: Path = tmp_path / "timeouts", **options: Any) -> Kept:
        while attached:
            log.LOGGER.removeHandler(attached.pop())
        attached.append(Events())
        log.LOGGER.addHandler(attached[0])
        return Kept(file, clock, attached[0], handler, **options)

    yield make
    for events in attached:
        log.LOGGER.removeHandler(events)
    os.close(null)


def sources(count: int) -> list[str]:
    return [f"198.51.{100 + n // 250}.{1 + n % 250}" for n in range(count)]


# ---- the log ----


def test_time_out_is_one_line_that_says_who_why_how_long_how_often_before_and_what_it_spoke(start):
    kept = start()
    kept.time_out("198.51.100.7")
    kept.time_out("198.51.100.7", first=b"\x16\x03\x01" + bytes(29))
    first, second = kept.logged("timed out")
    assert {name: value for name, value in first.items() if value is not None} == {
        "words": "timed out", "source": "198.51.100.7", "reason": "not_protocol", "seconds": 600, "before": 0,
        "looks": "HTTP request", "first": b"GET / HTTP/1.1\r\n",
    }  # fmt: skip
    assert (second["seconds"], second["before"], second["looks"]) == (1200, 1, "TLS ClientHello")


def test_what_a_source_spoke_is_kept_in_the_table(start):
    kept = start()
    kept.time_out("198.51.100.7")
    record = kept.table.find("198.51.100.7", kept.clock.monotonic_ns())
    assert spoke.NAMES[record.spoke] == "HTTP request"


def test_time_out_without_a_byte_to_show(start):
    kept = start()
    kept.time_out("198.51.100.7", first=b"")
    (event,) = kept.logged("timed out")
    assert event["looks"] is event["first"] is None


@pytest.mark.parametrize(("exempt", "words"), [(True, "exempt, disconnected"), (False, "would be timed out")])
def test_who_was_not_timed_out_is_said_to_be_so(start, exempt, words):
    kept = start()
    kept.guard.turn([TimedOut("127.0.0.1", bytes([127, 0, 0, 1]), "tampered", 0, 0, 0, exempt, b"", False)], [])
    (event,) = kept.events.all  # and no warning of one's own address
    assert (event["words"], event["source"], event["reason"]) == (words, "127.0.0.1", "tampered")
    assert "seconds" not in event


def test_log_is_limited_a_second_and_says_how_many_it_left_out(start):
    kept = start(log_timeouts_per_second="10")
    kept.time_out(*sources(100))
    kept.time_out(*sources(5))
    assert len(kept.logged("timed out")) == 10
    kept.guard.tick()
    assert not kept.logged("more time-outs not listed")  # the second is not over
    kept.clock.pass_by(1)
    kept.guard.tick()
    assert [event["count"] for event in kept.logged("more time-outs not listed")] == [95]
    kept.time_out("203.0.113.1")
    assert len(kept.logged("timed out")) == 11
    kept.clock.pass_by(1)
    kept.guard.tick()
    assert len(kept.logged("more time-outs not listed")) == 1


def test_new_log_limit_holds_from_a_reload_on(start):
    kept = start(log_timeouts_per_second="10")
    kept.guard.configure(config.load(None, {}, {"log_timeouts_per_second": "3"}), ())
    kept.time_out(*sources(100))
    assert len(kept.logged("timed out")) == 3


def test_dropped_connections_are_one_line_a_minute_with_their_count(start):
    kept = start()
    words = "connections of timed-out sources closed"
    kept.time_out("198.51.100.7")
    for seconds, dropped, counts in (
        (59, 12345, []),
        (1, 20000, [20000]),
        (60, 20000, [20000]),
        (60, 20001, [20000, 1]),
    ):
        kept.dropped = dropped
        kept.clock.pass_by(seconds)
        kept.guard.tick()
        assert [event["count"] for event in kept.logged(words)] == counts
    assert kept.logged(words)[0]["running"] == 1


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("127.0.0.1", "loopback"), ("127.200.0.9", "loopback"), ("::1", "loopback"), ("192.0.2.254", "gateways"),
        ("2001:db8::99", "gateways"),
    ],
)  # fmt: skip
def test_first_time_out_of_ones_own_address_warns_once_with_the_remedy(start, source, word):
    kept = start()
    for _ in range(3):
        kept.time_out(source)
    (event,) = [event for event in kept.events.all if "remedy" in event]
    assert word in event["words"]
    assert event["remedy"] == f"tt bans remove {event['source']}; or serve with --exempt {word}"
    assert len(kept.logged("timed out")) == 3


def test_time_out_of_another_address_warns_of_nothing(start):
    kept = start()
    kept.time_out("198.51.100.7", "192.0.2.253", "2001:db8:1::1")
    assert not [event for event in kept.events.all if "remedy" in event]


def test_failure_of_our_own_is_logged_with_its_traceback(start):
    kept = start()
    kept.guard.failed(RuntimeError("no such vault"))
    (event,) = kept.logged("internal error")
    assert event["failure"][0] is RuntimeError


# ---- saving and restoring ----


def running(kept: Kept) -> dict[str, int]:
    """Seconds left, by source."""
    now = kept.clock.monotonic_ns()
    return {record.source: round((record.end - now) / SECOND) for record in kept.table.entries(now)}


def test_saved_table_outlives_a_restart_and_the_time_spent_down_counts(start):
    kept = start()
    kept.time_out("198.51.100.7", "2001:db8:1::1")
    kept.time_out("198.51.100.8", seconds=60)
    kept.guard.close()
    kept.clock.pass_by(100)
    again = start()
    again.guard.restore()
    assert running(again) == {"198.51.100.7": 500, "2001:db8:1::/64": 500}
    (event,) = again.logged("time-outs restored")
    assert (event["running"], event["remembered"]) == (2, 1)
    again.time_out("198.51.100.8")  # its repeat, though the first ended while the server was down
    assert again.logged("timed out")[0]["before"] == 1


def test_restart_after_a_reboot_whose_monotonic_clock_begins_anew(start):
    kept = start()
    kept.time_out("198.51.100.7")
    kept.guard.close()
    kept.clock.pass_by(100)
    kept.clock.seconds = 5
    again = start()
    again.guard.restore()
    assert running(again) == {"198.51.100.7": 500}


def test_without_a_saved_table_nothing_is_said(start):
    kept = start()
    kept.guard.restore()
    assert kept.events.all == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"GET / HTTP/1.1\r\n"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(bytes(byte ^ (at == 50) for at, byte in enumerate(path.read_bytes()))),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["empty", "another file", "cut", "longer", "byte changed", "directory"],
)
def test_damaged_or_unreadable_file_is_said_and_the_table_starts_empty(start, tmp_path, damage):
    kept = start()
    kept.time_out("198.51.100.7")
    kept.guard.close()
    damage(tmp_path / "timeouts")
    again = start()
    again.guard.restore()
    assert running(again) == {}
    assert again.table.remembered == 0
    (event,) = again.events.all
    assert event["words"] == "time-outs not restored, starting with none"
    assert str(tmp_path / "timeouts") in event["error"]
    assert "\n" not in event["error"]


def test_table_is_saved_when_it_changed_and_the_interval_is_over(start, tmp_path):
    kept = start(save_interval="30")
    file = tmp_path / "timeouts"
    kept.clock.pass_by(100)
    kept.guard.tick()
    assert not file.exists()  # nothing changed
    kept.time_out("198.51.100.7")
    kept.guard.tick()
    until("the first save", file.exists)
    first = file.stat().st_ino
    kept.clock.pass_by(100)
    kept.guard.tick()
    kept.guard.close()
    assert file.stat().st_ino == first  # nothing changed
    kept.time_out("198.51.100.8")
    kept.guard.close()
    assert file.stat().st_ino != first
    again = start()
    again.guard.restore()
    assert running(again) == {"198.51.100.7": 500, "198.51.100.8": 600}


def test_nothing_is_saved_within_the_interval(start, tmp_path, monkeypatch):
    saves: list[int] = []
    monkeypatch.setattr(guard.timeouts, "save", lambda *_: saves.append(threading.get_ident()))
    kept = start(save_interval="30")
    for _ in range(90):
        kept.time_out("198.51.100.7")
        kept.clock.pass_by(1)
        kept.guard.tick()
        until("the thread's end", lambda: all(thread.name != "tt-save" for thread in threading.enumerate()))
    assert len(saves) == 3
    assert threading.get_ident() not in saves


def test_failed_save_is_said_and_tried_again(start, tmp_path):
    directory = tmp_path / "later"
    kept = start(directory / "timeouts", save_interval="30")
    kept.time_out("198.51.100.7")
    for failures in (1, 2):
        kept.clock.pass_by(30)
        # A tick that meets the last thread, which has said it and is about to end, leaves it to the next one.
        until("the failure", lambda n=failures: kept.guard.tick() or len(kept.logged("time-outs not saved")) == n)
    assert str(directory) in kept.logged("time-outs not saved")[0]["error"]
    directory.mkdir()
    kept.clock.pass_by(30)
    until("the save", lambda: kept.guard.tick() or (directory / "timeouts").exists())
    assert running(kept) == {"198.51.100.7": 510}  # the failure weakened no time-out


def test_save_at_the_end_that_fails_is_said(start, tmp_path):
    kept = start(tmp_path / "never" / "timeouts")
    kept.time_out("198.51.100.7")
    kept.guard.close()
    assert len(kept.logged("time-outs not saved")) == 1


def test_save_at_the_end_makes_up_for_one_that_failed_in_the_thread(start, tmp_path):
    directory = tmp_path / "later"
    kept = start(directory / "timeouts", save_interval="1")
    kept.time_out("198.51.100.7")
    kept.clock.pass_by(1)
    kept.guard.tick()
    until("the failure", lambda: kept.logged("time-outs not saved"))
    directory.mkdir()
    kept.guard.close()
    assert (directory / "timeouts").exists()


def test_time_out_that_comes_while_a_save_runs_is_saved_later(start, tmp_path, monkeypatch):
    """And no second save begins meanwhile, however long the disk takes."""
    saved: list[bytes] = []
    disk = threading.Event()

    def slow(_path: Path, dump: bytes, *_: object) -> None:
        assert disk.wait(10)
        saved.append(dump)

    monkeypatch.setattr(guard.timeouts, "save", slow)
    kept = start(save_interval="1")
    kept.time_out("198.51.100.7")
    for _ in range(5):
        kept.clock.pass_by(1)
        kept.guard.tick()
        kept.time_out("198.51.100.8")
    disk.set()
    kept.guard.close()
    assert len(saved) == 2
    restored = TimeoutTable(1024)
    assert restored.load(saved[1], 0) == 2


def test_history_is_saved_with_the_table_and_numbers_and_notes_go_on(start, tmp_path):
    kept = start(save_interval="30")
    kept.guard.notes[packed("198.51.100.7")] = "seen"
    kept.time_out("198.51.100.7", "198.51.100.8")
    kept.clock.pass_by(30)
    kept.guard.tick()
    until("the save", (tmp_path / "ban-history").exists)
    assert (tmp_path / "ban-history").stat().st_mode & 0o777 == 0o600
    again = start()
    again.guard.restore()
    assert again.guard.notes == {packed("198.51.100.7"): "seen"}
    again.time_out("198.51.100.9")
    shown = [entry.shown() for entry in again.guard.history.snapshot()]
    assert [(item["number"], item["state"], item["note"]) for item in shown] == [
        (1, "running", "seen"), (2, "running", None), (3, "running", None),
    ]  # fmt: skip


def test_damaged_history_is_said_and_starts_empty_and_the_table_is_restored(start, tmp_path):
    kept = start()
    kept.time_out("198.51.100.7")
    kept.guard.close()
    file = tmp_path / "ban-history"
    file.write_bytes(file.read_bytes()[:-1])
    again = start()
    again.guard.restore()
    assert running(again) == {"198.51.100.7": 600}
    assert again.guard.history.snapshot() == []
    (event,) = again.logged("ban history not restored, starting with none")
    assert str(file) in event["error"]


def test_who_is_exempt_at_the_start_was_lifted_then(start):
    kept = start()
    kept.time_out("198.51.100.7")
    kept.guard.close()
    again = start(exempt=["198.51.100.0/24"])
    again.guard.restore()
    assert running(again) == {}
    assert [entry.state for entry in again.guard.history.snapshot()] == ["lifted"]
    assert not again.guard.history._lifting  # of which no loop would tell


# ---- exempt ----


def test_words_of_exemptions_stand_for_what_the_host_has(start):
    kept = start(exempt=["loopback", "gateways", "198.51.100.0/24"])
    assert set(kept.guard.exempt) == {
        ip_network("127.0.0.0/8"), ip_network("::1/128"), ip_network("198.51.100.0/24"), *GATEWAYS,
    }  # fmt: skip
    kept.guard.configure(config.load(None, {}, {}), GATEWAYS)
    assert not kept.guard.exempt


def test_lifting_of_many_goes_in_pieces_and_one_that_is_left_off_does_the_rest_at_once(start):
    kept = start()
    network = ip_network("198.51.100.0/22")
    for end in (False, True):
        kept.time_out(*sources(300))
        kept.guard.take_exemptions({network: Exemption(str(network), None, "")})
        lifting = kept.guard.lifting_exempt()
        assert next(lifting) == LIFTED_AT_ONCE
        assert kept.table.running == 300 - LIFTED_AT_ONCE
        if end:
            assert list(lifting)[-1] == 300
        else:
            lifting.close()
        assert kept.table.running == 0
    assert [event["count"] for event in kept.logged("time-outs lifted of sources that are exempt now")] == [300, 300]
