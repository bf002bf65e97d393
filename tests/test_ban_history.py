"""The history of time-outs: what became of each, what is kept over a restart, and who is told.  No socket."""

from pathlib import Path

import pytest

from tt import ban_history
from tt._core import REASON_CODES, TimedOut, TimeoutTable
from tt.ban_history import MOST, UNREAD, BanHistory, Watcher
from tt.kernel_gate import packed
from tt.state_file import StateFileError

NS = 10**9
NOON = 1_800_000_000 * NS  # some UTC time, ns


class Told:
    """A table and the history of it, told what the loop tells."""

    def __init__(self, table: TimeoutTable | None = None, now: int = 1000) -> None:
        self.table = table or TimeoutTable(65536, now=now * NS)
        self.history = BanHistory(self.table)
        self.now = now  # s
        self.drift = NOON - now * NS  # of UTC before CLOCK_MONOTONIC

    @property
    def utc(self) -> int:
        return self.now * NS + self.drift

    def begin(self, *sources: str, seconds: int = 600, reason: str = "not_protocol", note: str | None = None) -> None:
        for source in sources:
            record = self.table.add(source, REASON_CODES[reason], seconds * NS, self.now * NS)
            times = record.start, record.end, record.before
            told = TimedOut(record.source, packed(record.source), reason, *times, False, b"\r\n", False)
            self.history.begin(told, "blank lines", note, self.now * NS, self.utc)

    def sweep(self, *more: str) -> None:
        """What a turn of the loop does: the ended ones, and these."""
        ended = self.table.expire(self.now * NS)
        self.history.end(map(packed, (*more, *ended)), self.history.last, self.now * NS, self.utc)

    def lift(self, source: str) -> None:
        record = self.table.find(source, self.now * NS)
        self.table.remove(source)
        self.history.lift(packed(source), record and record.dropped, self.now * NS, self.utc)

    def states(self) -> list[tuple[str, str, int | None]]:
        """Source, state, and when it ended, in s after the first moment of the clock."""
        return [
            (entry.source, entry.state, None if entry.ended is None else (entry.ended - NOON) // NS)
            for entry in self.history.snapshot()
        ]


@pytest.fixture
def told() -> Told:
    return Told()


# ---- what became of each --------------------------------------------------------------------------------------------


def test_what_is_shown_of_a_time_out(told: Told) -> None:
    told.begin("192.0.2.1", note="seen")
    entry = told.history.get(1)
    assert entry is not None
    assert entry.shown() == {
        "number": 1, "source": "192.0.2.1", "reason": "not_protocol", "at": "2027-01-15T08:00:00Z",
        "at_s": 1_800_000_000.0, "seconds": 600.0, "before": 0, "looks": "blank lines", "first": "\\r\\n",
        "note": "seen", "proxied": False, "state": "running", "ended": None, "dropped": None,
    }  # fmt: skip


def test_one_that_is_over_by_the_clock_expired_at_its_end_however_late_the_sweep(told: Told) -> None:
    told.begin("192.0.2.1", "2001:db8::1", seconds=10)
    told.now += 15
    told.sweep()
    assert told.states() == [("192.0.2.1", "expired", 10), ("2001:db8::/64", "expired", 10)]
    assert told.history.ended == {"expired": 2, "lifted": 0, "renewed": 0, "gave way": 0}


def test_one_whose_place_was_needed_gave_way() -> None:
    told = Told(TimeoutTable(1, now=1000 * NS))
    told.begin("192.0.2.1")
    told.now += 5
    told.begin("192.0.2.2")
    assert told.table.gave_way == "192.0.2.1"
    told.sweep("192.0.2.1")
    assert told.states() == [("192.0.2.1", "gave way", 5), ("192.0.2.2", "running", None)]


def test_one_that_is_lifted_ends_then_with_what_it_dropped_and_the_loops_word_of_it_ends_nothing(told: Told) -> None:
    told.begin("192.0.2.1")
    told.now += 5
    told.lift("192.0.2.1")
    told.begin("192.0.2.1")  # in the same turn again
    told.sweep("192.0.2.1")
    assert told.states() == [("192.0.2.1", "lifted", 5), ("192.0.2.1", "running", None)]
    assert [entry.dropped for entry in told.history.snapshot()] == [0, None]
    told.now += 601
    told.sweep()
    assert told.states()[1] == ("192.0.2.1", "expired", 605)


def test_a_repeat_renews_the_one_that_runs_and_one_that_is_not_swept_yet_has_expired(told: Told) -> None:
    told.begin("192.0.2.1", "192.0.2.2", seconds=10)
    told.now += 5
    told.begin("192.0.2.1", seconds=10)
    told.now += 6
    told.begin("192.0.2.2", seconds=10)
    assert told.states() == [
        ("192.0.2.1", "renewed", 5), ("192.0.2.2", "expired", 10), ("192.0.2.1", "running", None),
        ("192.0.2.2", "running", None),
    ]  # fmt: skip


def test_one_that_is_counted_while_a_longer_one_runs_begins_now_and_ends_with_that(told: Told) -> None:
    told.begin("192.0.2.1", seconds=600)
    told.now += 100
    told.begin("192.0.2.1", seconds=30, reason="stalled")
    entry = told.history.get(2)
    assert entry is not None
    assert (entry.at - NOON, entry.length) == (100 * NS, 500 * NS)


def test_evicted_and_timed_out_again_in_one_turn_the_new_one_runs(told: Told) -> None:
    told.begin("192.0.2.1")
    since = told.history.last
    told.table.remove("192.0.2.1")
    told.begin("192.0.2.1")
    told.history.end([packed("192.0.2.1")], since, told.now * NS, told.utc)
    assert [state for _, state, _ in told.states()] == ["renewed", "running"]


def test_begun_and_evicted_in_one_turn_it_gave_way(told: Told) -> None:
    since = told.history.last
    told.begin("192.0.2.1")
    told.table.remove("192.0.2.1")
    told.history.end([packed("192.0.2.1")], since, told.now * NS, told.utc)
    assert told.states() == [("192.0.2.1", "gave way", 0)]


def many(count: int, first: int = 0) -> list[str]:
    return [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(first, first + count)]


def test_more_may_run_than_are_held_and_all_are_counted(told: Told) -> None:
    told.begin(*many(3 * MOST))
    assert (told.history.held, told.history.last, told.history.oldest) == (MOST, 3 * MOST, 2 * MOST + 1)
    assert told.history.begun["not_protocol"] == 3 * MOST
    assert told.history.get(2 * MOST) is None
    assert [entry.number for entry in told.history.snapshot()] == list(range(2 * MOST + 1, 3 * MOST + 1))
    assert len(told.history._running) == MOST
    told.lift("10.0.0.0")  # one that is not held
    told.now += 601
    for _ in range(10):
        told.sweep()
    assert told.history.ended["expired"] == 3 * MOST - 1
    assert told.history.ended["lifted"] == 1
    assert {state for _, state, _ in told.states()} == {"expired"}
    assert not told.history._running
    assert told.history.status() == {"held": MOST, "most": MOST, "begun": 3 * MOST}


# ---- over a restart -------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ban-history"


def again(told: Told, path: Path, *, later: int = 100) -> Told:
    """What the next process has, `later` s after the last one saved, with a monotonic clock that began anew."""
    ban_history.save(path, told.history.snapshot(), told.utc)
    table = TimeoutTable(65536, now=5 * NS)
    table.load(told.table.dump(told.now * NS), 5 * NS, later * NS)
    fresh = Told(table, now=5)
    fresh.drift = told.utc + later * NS - 5 * NS
    fresh.history.restore(path, 5 * NS, fresh.utc)
    return fresh


def test_numbers_states_and_ends_go_on_over_a_restart(told: Told, path: Path) -> None:
    told.begin("192.0.2.1", "192.0.2.2", note="why")
    told.begin("192.0.2.3", seconds=50)
    told.lift("192.0.2.2")
    fresh = again(told, path)
    assert fresh.states() == [
        ("192.0.2.1", "running", None), ("192.0.2.2", "lifted", 0), ("192.0.2.3", "expired", 50),
    ]  # fmt: skip
    assert fresh.history.snapshot()[:2][1] == told.history.snapshot()[1]
    fresh.begin("192.0.2.4")
    assert fresh.history.last == 4
    fresh.now += 501
    fresh.sweep()
    assert fresh.states()[0] == ("192.0.2.1", "expired", 600)


def test_the_notes_of_those_that_run_are_given_back(told: Told, path: Path) -> None:
    told.begin("192.0.2.1", "192.0.2.2", note="why")
    told.lift("192.0.2.2")
    ban_history.save(path, told.history.snapshot(), told.utc)
    assert BanHistory(told.table).restore(path, told.now * NS, told.utc) == {packed("192.0.2.1"): "why"}


def test_one_that_the_table_lost_gave_way_and_one_that_it_still_has_runs(told: Told, path: Path) -> None:
    """As after a kill, where one file is newer than the other."""
    told.begin("192.0.2.1", "192.0.2.2")
    entry = told.history.get(2)
    assert entry is not None
    told.table.remove("192.0.2.1")
    entry.state = "lifted"
    assert [state for _, state, _ in again(told, path).states()] == ["gave way", "running"]


def test_a_later_time_out_that_was_not_saved_is_not_taken_for_the_earlier_one(told: Told, path: Path) -> None:
    told.begin("192.0.2.1", seconds=10)
    ban_history.save(path, told.history.snapshot(), told.utc)
    told.now += 20
    told.sweep()
    told.table.add("192.0.2.1", 0, 600 * NS, told.now * NS)
    fresh = BanHistory(told.table)
    fresh.restore(path, told.now * NS, told.utc)
    assert [entry.state for entry in fresh.snapshot()] == ["expired"]


def test_a_full_history_is_kept_whole(told: Told, path: Path) -> None:
    told.begin(*many(MOST + 5000))
    fresh = again(told, path)
    assert [entry.number for entry in fresh.history.snapshot()] == list(range(5001, MOST + 5001))
    assert fresh.history.held == MOST
    assert len(fresh.history._running) == MOST


def test_without_a_file_nothing_is_restored(told: Told, path: Path) -> None:
    assert told.history.restore(path, 0, NOON) == {}
    ban_history.save(path, [], NOON)
    assert told.history.restore(path, 0, NOON) == {}
    assert told.history.last == 0


@pytest.mark.parametrize(
    "lines",
    [b"{}\n", b"[1]\n", b'[1,"","192.0.2.1"]\n', b"\xff\n"],
    ids=["an object", "too short", "cut", "no text"],
)
def test_what_is_no_history_is_named_and_nothing_of_it_is_taken(told: Told, path: Path, lines: bytes) -> None:
    ban_history.FILE.save(path, [lines], NOON)
    with pytest.raises(StateFileError, match="ban history not restored: ") as error:
        told.history.restore(path, 0, NOON)
    assert "\n" not in str(error.value)
    assert told.history.snapshot() == []


def test_numbers_that_do_not_follow_each_other_are_not_believed(told: Told, path: Path) -> None:
    told.begin("192.0.2.1", "192.0.2.2", "192.0.2.3")
    entries = told.history.snapshot()
    ban_history.save(path, [entries[0], entries[2]], NOON)
    with pytest.raises(StateFileError, match="its numbers do not follow each other"):
        BanHistory(told.table).restore(path, 0, NOON)


# ---- who watches ----------------------------------------------------------------------------------------------------


@pytest.fixture
def watcher(told: Told) -> Watcher:
    watcher = Watcher(lambda entry: entry.source != "192.0.2.9")
    told.history.watchers.add(watcher)
    return watcher


def test_a_watcher_is_told_of_what_he_wants_as_it_was_when_it_came(told: Told, watcher: Watcher) -> None:
    told.begin("192.0.2.1", "192.0.2.9", seconds=10)
    told.now += 11
    told.sweep()
    begun, ended = watcher.take(10)
    assert (begun["event"], begun["source"], begun["state"], begun["ended"]) == ("begun", "192.0.2.1", "running", None)
    assert (ended["event"], ended["state"], ended["number"]) == ("ended", "expired", 1)
    assert watcher.take(10) == []


def test_a_watcher_who_does_not_read_loses_the_oldest_and_is_told_how_many(told: Told, watcher: Watcher) -> None:
    told.begin(*many(UNREAD + 7))
    lost, *events = watcher.take(10 * UNREAD)
    assert lost == {"lost": 7}
    assert [event["number"] for event in events] == list(range(8, UNREAD + 8))
    told.begin("192.0.2.1")
    assert len(watcher.take(10)) == 1  # what was lost is said once


def test_who_waits_goes_on_with_the_first_event_and_at_once_where_there_is_one(told: Told, watcher: Watcher) -> None:
    waits = watcher.wait()
    assert not waits.done
    told.begin("192.0.2.9")
    assert not waits.done
    told.begin("192.0.2.1", "192.0.2.2")
    assert waits.done
    assert watcher.wait().done
    assert len(watcher.take(1)) == 1
    assert len(watcher.take(1)) == 1
    assert not watcher.wait().done
