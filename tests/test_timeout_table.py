"""timeout_table.pxd, through its face: each rule by itself; all of them together are in test_timeout_model.py."""

import pytest

from tt._core import TimeoutTable

SECOND = 10**9
TICK = SECOND // 64
HOUR = 3600 * SECOND
DAY = 24 * HOUR
RING = 32768 * SECOND
LONGEST = 30 * DAY
CAP = 6 * HOUR

A, B, C, D = "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"
SIX = "2001:db8::/64"


def expire_all(table: TimeoutTable, now: int, limit: int = 4096) -> list[str]:
    """Calls expire until nothing is due, as the loop does."""
    ended: list[str] = []
    while True:
        part = table.expire(now, limit)
        assert len(part) <= limit
        ended += part
        if len(part) < limit and table.next(now) != now:
            return ended


# Looking up


def test_a_time_out_runs_until_its_end_and_no_longer() -> None:
    table = TimeoutTable(4)
    record = table.add(A, 3, 10 * SECOND, 5 * SECOND)
    assert record == (A, 5 * SECOND, 15 * SECOND, 3, 0, 0, 0, 0, False)
    assert table.find(A, 15 * SECOND - 1) == record
    assert table.find(A, 15 * SECOND) is None, "ended, although no sweep has passed"
    assert table.running == 1
    assert table.find(B, 5 * SECOND) is None


def test_any_address_of_an_ipv6_prefix_finds_it() -> None:
    table = TimeoutTable(4)
    table.add("2001:db8::1", 1, SECOND, 0)
    assert table.find("2001:db8::ffff", 0).source == SIX
    assert table.find("2001:db8:0:1::1", 0) is None
    assert TimeoutTable(4, ipv6_prefix=48).add("2001:db8:0:1::1", 1, SECOND, 0).source == "2001:db8::/48"


def test_a_mapped_address_is_its_ipv4() -> None:
    table = TimeoutTable(4)
    table.add("::ffff:192.0.2.1", 1, SECOND, 0)
    assert table.find(A, 0).source == A
    assert table.find("64:ff9b::192.0.2.1", 0).source == A


def test_a_clock_that_goes_back_counts_as_the_last_seen() -> None:
    table = TimeoutTable(4)
    table.add(A, 1, SECOND, 100 * SECOND)
    assert table.add(B, 1, SECOND, 5 * SECOND).end == 101 * SECOND
    assert table.expire(101 * SECOND + TICK) == [A, B]
    assert table.find(A, 5 * SECOND) is None
    assert table.expire(0) == []


def test_what_the_first_bytes_looked_like_is_kept_until_the_next_time_out() -> None:
    table = TimeoutTable(4)
    table.add(A, 1, SECOND, 0)
    table.set_spoke(A, 7, 0)
    table.set_spoke(B, 7, 0)
    assert table.find(A, 0).spoke == 7
    assert table.find(B, 0) is None
    assert table.add(A, 1, SECOND, 2 * SECOND).spoke == 0


# Repeats


def test_a_hard_repeat_doubles_up_to_the_cap() -> None:
    table = TimeoutTable(4)
    now, lengths = 0, []
    for _ in range(9):
        record = table.add(A, 1, 600 * SECOND, now, hard=True, cap_ns=CAP)
        lengths.append((record.end - record.start) // SECOND)
        now = record.end
    assert lengths == [600, 1200, 2400, 4800, 9600, 19200, 21600, 21600, 21600]
    assert (record.before, record.hard) == (8, 9)


def test_a_hard_repeat_while_the_time_out_runs_doubles_too() -> None:
    table = TimeoutTable(4)
    table.add(A, 1, 600 * SECOND, 0, hard=True)
    assert table.add(A, 1, 600 * SECOND, SECOND, hard=True).end == 1201 * SECOND


def test_a_mild_repeat_keeps_its_length_and_does_not_double_the_next_hard_one() -> None:
    table = TimeoutTable(4)
    for number in range(3):
        record = table.add(A, 2, 10 * SECOND, number * HOUR)
        assert (record.end - record.start, record.before, record.hard) == (10 * SECOND, number, 0)
    record = table.add(A, 1, 600 * SECOND, 5 * HOUR, hard=True)
    assert (record.end - record.start, record.before, record.hard) == (600 * SECOND, 3, 1)


def test_a_length_beyond_the_cap_is_kept_whole() -> None:
    table = TimeoutTable(4)
    for number in range(2):
        record = table.add(A, 1, 7 * HOUR, number * 8 * HOUR, hard=True, cap_ns=CAP)
        assert record.end - record.start == 7 * HOUR


@pytest.mark.parametrize("swept", [True, False])
def test_a_repeat_counts_until_24_h_after_the_end(swept: bool) -> None:
    for late, doubled in ((DAY - 1, True), (DAY, False)):
        table = TimeoutTable(4)
        table.add(A, 1, 600 * SECOND, 0, hard=True)
        if swept:
            expire_all(table, 601 * SECOND)
        record = table.add(A, 1, 600 * SECOND, 600 * SECOND + late, hard=True)
        assert record.end - record.start == 600 * SECOND * (2 if doubled else 1)
        assert record.before == (1 if doubled else 0)


def test_a_running_time_out_is_never_shortened() -> None:
    table = TimeoutTable(4)
    table.add(A, 1, 600 * SECOND, 0, hard=True)
    record = table.add(A, 2, 10 * SECOND, SECOND)
    assert (record.start, record.end, record.reason, record.before) == (0, 600 * SECOND, 1, 1)
    record = table.add(A, 2, 600 * SECOND, SECOND)
    assert (record.start, record.end, record.reason, record.before) == (SECOND, 601 * SECOND, 2, 2)


def test_the_counts_of_repeats_saturate() -> None:
    table = TimeoutTable(1)
    for _ in range(2**16 + 2):
        record = table.add(A, 1, SECOND, 0, hard=True)
    assert (record.before, record.hard) == (2**16 - 1, 255)
    assert record.end == CAP


def test_a_lifted_source_is_forgotten_with_its_repeats() -> None:
    table = TimeoutTable(4)
    table.add(A, 1, 600 * SECOND, 0, hard=True)
    table.add(B, 1, SECOND, 0, hard=True)
    table.expire(2 * SECOND)
    assert table.remove(A)
    assert table.remove(B), "remembered only"
    assert not table.remove(C)
    assert not table.remove(A)
    assert (table.running, table.remembered, table.next(0)) == (0, 0, None)
    assert table.add(A, 1, 600 * SECOND, SECOND, hard=True).before == 0


# Sweeping


@pytest.mark.parametrize("start", [0, SECOND - 1, 12345 * SECOND + 678, RING - 1, RING, 10**18 + 1])
@pytest.mark.parametrize(
    "length",
    [1, TICK - 1, TICK, TICK + 1, SECOND - 1, SECOND, 90 * SECOND, RING - SECOND, RING, RING + 1, 40 * HOUR, LONGEST],
)
def test_a_sweep_removes_within_a_64th_of_a_second_of_the_end(start: int, length: int) -> None:
    table = TimeoutTable(4, now=start)
    end = table.add(A, 1, length, start).end
    now, calls = start, 0
    while (due := table.next(now)) is not None:
        assert due > now or calls == 0
        assert table.expire(due - 1) == []
        ended = table.expire(due)
        now, calls = due, calls + 1
    assert ended == [A]
    assert end < now <= end + TICK
    assert calls <= 3 + 2 * (length // RING + 1), "a wake-up for the bucket, one for the tick, two a turn of the ring"
    assert (table.running, table.remembered) == (0, 1)


def test_ends_in_the_same_tick_are_swept_together_within_the_limit() -> None:
    table = TimeoutTable(64)
    sources = [f"192.0.2.{n}" for n in range(20)]
    for number, source in enumerate(sources):
        table.add(source, 1, 10 * SECOND + number, 0)
    assert table.expire(10 * SECOND + TICK - 1) == []
    parts = [table.expire(10 * SECOND + TICK, 8) for _ in range(4)]
    assert [len(part) for part in parts] == [8, 8, 4, 0]
    assert [source for part in parts for source in part] == sources


@pytest.mark.parametrize("jump", [RING - SECOND, RING, 2 * RING + 5, 100 * RING, 2**62, 2**63 - 1])
def test_a_jump_of_more_than_a_turn_ends_everything_that_is_over(jump: int) -> None:
    table = TimeoutTable(64, now=SECOND)
    lengths = {
        f"192.0.2.{n}": length
        for n, length in enumerate([1, SECOND, HOUR, RING - SECOND, RING, RING + SECOND, 2 * RING, LONGEST])
    }
    for source, length in lengths.items():
        table.add(source, 1, length, SECOND)
    now = min(SECOND + jump, 2**63 - 1)
    over = {source for source, length in lengths.items() if (SECOND + length) // TICK < now // TICK}
    assert set(expire_all(table, now, limit=3)) == over
    assert table.running == len(lengths) - len(over)
    assert {r.source for r in table.entries(now)} == {s for s, length in lengths.items() if SECOND + length > now}


def test_more_ends_in_one_second_than_a_call_moves_are_all_swept() -> None:
    table = TimeoutTable(10_000)
    for number in range(10_000):
        table.add(f"10.0.{number >> 8}.{number & 255}", 1, 100 * SECOND + 40 * TICK + number, 0)
    now = table.next(0)
    assert now == 100 * SECOND
    for _ in range(2):
        assert table.expire(now) == []
        assert table.next(now) == now, "work is left"
    assert table.expire(now) == []
    assert table.next(now) == now + 41 * TICK
    assert len(expire_all(table, now + 41 * TICK)) == 10_000
    assert (table.running, table.remembered) == (0, 10_000)


def test_more_ends_beyond_the_ring_than_a_call_examines_come_into_it_in_time() -> None:
    table = TimeoutTable(10_000)
    for number in range(10_000):
        table.add(f"10.0.{number >> 8}.{number & 255}", 1, RING + 5 * SECOND, 0)
    now = table.next(0)
    assert now == RING // 2
    calls = 0
    while table.next(now) == now:
        assert table.expire(now) == []
        calls += 1
    assert calls == 3
    assert table.next(now) == RING + 5 * SECOND, "all are in the ring now"
    assert len(expire_all(table, RING + 6 * SECOND)) == 10_000


def test_those_that_leave_while_the_far_ones_are_examined_do_not_confuse_it() -> None:
    table = TimeoutTable(10_000)
    sources = [f"10.0.{number >> 8}.{number & 255}" for number in range(10_000)]
    for source in sources:
        table.add(source, 1, RING + 5 * SECOND, 0)
    now = table.next(0)
    table.expire(now)
    for source in sources[5_000:]:
        assert table.remove(source)
    assert expire_all(table, now) == []
    assert table.next(now) == RING + 5 * SECOND
    assert len(expire_all(table, RING + 6 * SECOND)) == 5_000


def test_ended_ones_are_forgotten_after_24_h() -> None:
    table = TimeoutTable(64)
    table.add(A, 1, SECOND, 0)
    table.expire(SECOND + TICK)
    table.expire(SECOND + DAY - 1)
    assert table.remembered == 1
    table.expire(SECOND + DAY)
    assert (table.remembered, table.entries(SECOND + DAY, remembered=True)) == (0, [])


# A full table


def test_a_free_slot_comes_first_then_the_longest_ended() -> None:
    table = TimeoutTable(3)
    table.add(A, 1, 2 * SECOND, 0)
    table.add(B, 1, 1 * SECOND, 0)
    table.add(C, 1, HOUR, 0)
    expire_all(table, 10 * SECOND)
    table.add(D, 1, HOUR, 10 * SECOND)
    assert table.gave_way is None
    assert {r.source for r in table.entries(10 * SECOND, remembered=True)} == {A, C, D}
    assert (table.running, table.remembered, table.evictions) == (2, 1, 0)


@pytest.mark.parametrize(
    "lengths",
    [
        (SECOND + 2 * TICK, SECOND + TICK, SECOND + 3 * TICK),  # under the hand once it is there
        (50 * SECOND, 20 * SECOND, 30 * SECOND),
        (RING + 9 * SECOND, 20 * SECOND, 3 * RING),
        (RING - SECOND, RING - 2 * SECOND, RING),
    ],
)
def test_in_a_full_table_the_nearest_to_its_end_gives_way(lengths: tuple[int, int, int]) -> None:
    table = TimeoutTable(3)
    for source, length in zip((A, B, C), lengths, strict=True):
        table.add(source, 1, length, 0)
    table.expire(SECOND)
    table.add(D, 1, HOUR, SECOND)
    assert (table.gave_way, table.evictions, table.running) == (B, 1, 3)
    assert table.find(B, SECOND) is None
    table.add(A, 1, HOUR, SECOND)
    assert table.gave_way is None


def test_one_that_ended_unswept_gives_way_and_is_named_but_is_no_eviction() -> None:
    table = TimeoutTable(2)
    table.add(A, 1, SECOND, 0)
    table.add(B, 1, HOUR, 0)
    table.add(C, 1, HOUR, 2 * SECOND)
    assert (table.gave_way, table.evictions) == (A, 0)
    assert table.expire(2 * SECOND) == []


def test_a_flood_of_one_family_costs_the_other_nothing() -> None:
    table = TimeoutTable(2)
    table.add(SIX, 1, SECOND, 0)
    for number in range(100):
        table.add(f"192.0.2.{number}", 1, HOUR, 0)
    assert table.find(SIX, 0) is not None
    assert (table.running, table.evictions) == (3, 98)


# Saving and restoring


def filled() -> TimeoutTable:
    """At 100 s: A ended at 50 s, B ends at 300 s, D beyond the ring, SIX at 200 s."""
    table = TimeoutTable(8)
    table.add(A, 1, 50 * SECOND, 0, hard=True)
    table.add(B, 2, 10 * SECOND, 0)
    table.add(B, 2, 200 * SECOND, 100 * SECOND)
    table.set_spoke(B, 5, 100 * SECOND)
    table.add(D, 3, LONGEST, 100 * SECOND)
    table.add(SIX, 1, 100 * SECOND, 100 * SECOND, hard=True)
    expire_all(table, 100 * SECOND)
    return table


def test_a_restored_table_is_the_saved_one_on_another_clock() -> None:
    table = filled()
    records = table.entries(100 * SECOND, remembered=True)
    other = TimeoutTable(8, now=7 * SECOND)
    assert other.load(table.dump(100 * SECOND), 7 * SECOND) == 4
    shift = -93 * SECOND
    assert sorted(other.entries(7 * SECOND, remembered=True)) == sorted(
        record._replace(start=record.start + shift, end=record.end + shift) for record in records
    )
    assert (other.running, other.remembered) == (table.running, table.remembered) == (3, 1)
    assert other.add(A, 1, 50 * SECOND, 7 * SECOND, hard=True).end == 107 * SECOND, "the repeat rule goes on"


def test_time_spent_down_counts() -> None:
    other = TimeoutTable(8, now=7 * SECOND)
    assert other.load(filled().dump(100 * SECOND), 7 * SECOND, 150 * SECOND) == 4
    assert {r.source: r.end for r in other.entries(0)} == {B: 57 * SECOND, D: LONGEST + 7 * SECOND - 150 * SECOND}
    assert (other.running, other.remembered) == (2, 2)
    assert set(expire_all(other, HOUR)) == {B}


@pytest.mark.parametrize(("elapsed", "left"), [(DAY + 99 * SECOND, 3), (DAY + 200 * SECOND, 1), (2**63 - 1, 0)])
def test_what_ended_a_day_ago_is_not_restored(elapsed: int, left: int) -> None:
    assert TimeoutTable(8).load(filled().dump(100 * SECOND), 0, elapsed) == left


def test_a_smaller_table_keeps_those_that_end_last() -> None:
    table = TimeoutTable(8)
    for number in range(8):
        table.add(f"192.0.2.{number}", 1, (8 - number) * 10 * SECOND, 0)
    expire_all(table, 31 * SECOND)
    for capacity, kept in ((2, {0, 1}), (7, set(range(7)))):
        other = TimeoutTable(capacity)
        other.load(table.dump(31 * SECOND), 0)
        assert {r.source for r in other.entries(0, remembered=True)} == {f"192.0.2.{n}" for n in kept}


def test_a_source_known_with_a_later_end_keeps_it() -> None:
    other = TimeoutTable(8)
    other.add(B, 9, HOUR, 0)
    other.add(D, 9, SECOND, 0)
    assert other.load(filled().dump(100 * SECOND), 0) == 3
    assert other.find(B, 0).reason == 9
    assert other.find(D, 0).reason == 3
    assert (other.running, other.remembered) == (3, 1)


def test_ipv6_sources_of_another_prefix_are_left_out() -> None:
    other = TimeoutTable(8, ipv6_prefix=56)
    assert other.load(filled().dump(100 * SECOND), 0) == 3
    assert {r.source for r in other.entries(0, remembered=True)} == {A, B, D}


def test_an_empty_table_is_saved_and_restored() -> None:
    assert TimeoutTable(8).load(TimeoutTable(8).dump(5), 0) == 0


HEADER = 16  # of a dump; then the entries
ENTRY = 48
START, END, DROPPED = 16, 24, 32  # where an entry has these fields


def test_a_full_table_gives_no_running_time_out_for_a_remembered_one() -> None:
    dump = filled().dump(100 * SECOND)
    other = TimeoutTable(2)
    other.add(C, 1, SECOND, 0)
    other.add(B, 1, HOUR, 0)
    assert other.load(dump[: HEADER - 8] + (1).to_bytes(8, "little") + dump[HEADER : HEADER + ENTRY], 0) == 0
    assert {r.source for r in other.entries(0, remembered=True)} == {B, C}


def test_the_count_of_dropped_connections_is_of_this_time_out() -> None:
    saved = TimeoutTable(1)
    saved.add(A, 1, 10 * SECOND, 0)
    dump = saved.dump(0)
    at = HEADER + DROPPED
    table = TimeoutTable(1)
    table.load(dump[:at] + (7).to_bytes(4, "little") + dump[at + 4 :], 0)
    assert table.find(A, 0).dropped == 7
    assert table.add(A, 1, 20 * SECOND, 10 * SECOND - 1).dropped == 7, "renewed while it ran"
    assert table.add(A, 1, SECOND, 30 * SECOND - 1).dropped == 0


def test_a_dump_with_an_impossible_time_is_refused_whole() -> None:
    dump = filled().dump(100 * SECOND)
    for offset in (START, END):
        for value in (-(2**63), -32 * DAY, LONGEST + 1, 2**63 - 1):
            at = len(dump) - ENTRY + offset
            table = TimeoutTable(8)
            with pytest.raises(ValueError, match="source 4 of the dump has times"):
                table.load(dump[:at] + value.to_bytes(8, "little", signed=True) + dump[at + 8 :], 0)
            assert table.entries(0, remembered=True) == []


def test_what_is_no_dump_is_refused() -> None:
    dump = filled().dump(100 * SECOND)
    assert len(dump) == HEADER + 4 * ENTRY
    table = TimeoutTable(8)
    wrong = [dump[:n] for n in range(len(dump))]
    wrong += [dump + b"\0", bytes(len(dump)), b"\xff" * len(dump), dump[:8] + b"\xff" * 8 + dump[16:]]
    for data in wrong:
        with pytest.raises(ValueError, match="dump"):
            table.load(data, 0)
    with pytest.raises(ValueError, match="elapsed"):
        table.load(dump, 0, -1)
    assert table.entries(0, remembered=True) == []


# Bounds of the face


@pytest.mark.parametrize("capacity", [0, 2**20 + 1])
def test_a_table_of_impossible_size_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match="the table size is"):
        TimeoutTable(capacity)


@pytest.mark.parametrize(("length", "cap"), [(0, CAP), (-1, CAP), (LONGEST + 1, CAP), (1, 0), (1, LONGEST + 1)])
def test_a_length_out_of_range_is_refused(length: int, cap: int) -> None:
    table = TimeoutTable(4)
    with pytest.raises(ValueError, match=r"must be 1 ns \.\. 30 days"):
        table.add(A, 1, length, 0, hard=True, cap_ns=cap)
    assert table.running == 0


def test_a_limit_of_nothing_sweeps_nothing() -> None:
    table = TimeoutTable(4)
    table.add(A, 1, SECOND, 0)
    assert table.expire(HOUR, 0) == []
    assert table.expire(HOUR, 1) == [A]
