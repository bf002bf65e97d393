"""timeout_table.pxd against a plain dict, by hypothesis: any operations in any order give what the model says."""

from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_timeout_table import CAP, DAY, HOUR, LONGEST, RING, SECOND, TICK, expire_all

from tt._core import TimeoutTable


@dataclass(frozen=True)
class Known:
    """What the model holds of one source."""

    start: int
    end: int
    reason: int
    before: int = 0
    hard: int = 0
    swept: int | None = None  # number of the call that swept it; None while it stands in the ring


CAPACITY = 5
POOL = [f"192.0.2.{n}" for n in range(9)]
SIXES = [f"2001:db8:0:{n}::/64" for n in range(1, 8)]
STEP = st.one_of(
    st.sampled_from([0, 1, TICK - 1, TICK, SECOND // 2, SECOND, HOUR, DAY - SECOND, DAY]),
    st.sampled_from([RING // 2, RING - SECOND, RING, RING + 1, 2 * RING + SECOND, 31 * DAY]),
    st.integers(0, 5 * SECOND),
    st.integers(0, 2 * DAY),
)
LENGTH = st.one_of(
    st.sampled_from([1, TICK, SECOND, 10 * SECOND, 600 * SECOND, DAY]),
    st.sampled_from(
        [RING // 2, RING - SECOND - 1, RING - SECOND, RING - 1, RING, RING + 1, 3 * RING, 40 * HOUR, LONGEST]
    ),
    st.integers(1, 5 * SECOND),
    st.integers(1, 2 * RING),
)


class TableAgainstDict(RuleBasedStateMachine):
    """The model knows what must be in the table; where the order within a list decides, it allows the whole list."""

    @initialize(now=st.one_of(st.just(0), st.integers(0, 2 * RING), st.just(2**61)))
    def start(self, now: int) -> None:
        self.now = now
        self.table = TimeoutTable(CAPACITY, now=now)
        self.hand = now // SECOND  # the second up to which all has been swept; meaningless while not settled
        self.settled = True
        self.known: dict[str, Known] = {}
        self.calls = 0
        self.evictions = 0

    def over(self, known: Known) -> bool:
        """Ended so long ago that the source counts as unknown, whether its slot was given back or not."""
        return known.end + DAY <= self.now

    def family(self, source: str) -> dict[str, Known]:
        return {s: k for s, k in self.known.items() if (":" in s) == (":" in source)}

    def first_ended(self, family: dict[str, Known]) -> set[str]:
        """The remembered ones that the earliest sweep ended."""
        ended = {s: k.swept for s, k in family.items() if k.swept is not None and not self.over(k)}
        return {s for s, swept in ended.items() if swept == min(ended.values())}

    def nearest_end(self, family: dict[str, Known]) -> set[str]:
        """Those of the list that ends first, seen from the hand."""
        unswept = {s: k.end for s, k in family.items() if k.swept is None}
        if not self.settled:
            return set(unswept)
        nearest = min(unswept.values()) // SECOND
        if nearest - self.hand >= 16384:  # perhaps beyond the ring, where there is no order
            return {s for s, end in unswept.items() if end // SECOND - self.hand >= 16384}
        if nearest == self.hand:
            tick = min(unswept.values()) // TICK
            return {s for s, end in unswept.items() if end // TICK == tick}
        return {s for s, end in unswept.items() if end // SECOND == nearest}

    @rule(step=STEP)
    def time_passes(self, step: int) -> None:
        self.now += step

    @rule(
        source=st.sampled_from(POOL + SIXES),
        length=LENGTH,
        reason=st.integers(0, 255),
        hard=st.booleans(),
        cap=st.sampled_from([1, 600 * SECOND, CAP, LONGEST]),
    )
    def add(self, source: str, length: int, reason: int, hard: bool, cap: int) -> None:
        old = self.known.get(source)
        if old is not None and self.over(old):
            old = None
            del self.known[source]
        before = self.present() - {source}
        record = self.table.add(source, reason, length, self.now, hard=hard, cap_ns=cap)
        self.check_who_gave_way(source, old is None, before - self.present())
        new = self.expected(old, length, reason, hard, cap)
        self.known[source] = new
        assert record == (source, new.start, new.end, new.reason, 0, new.before, new.hard, 0, False)
        assert self.table.evictions == self.evictions

    def check_who_gave_way(self, source: str, new: bool, gone: set[str]) -> None:
        family = self.family(source)
        given = self.table.gave_way
        if given is not None:
            assert new
            for ended in [s for s, k in family.items() if k.swept is not None]:
                assert self.over(family.pop(ended)), "a remembered one goes first"
                del self.known[ended]
            assert len(family) == CAPACITY
            assert given in self.nearest_end(family)
            self.evictions += family[given].end > self.now
            assert gone == ({given} if not self.over(family[given]) else set())
            del self.known[given]
        elif gone:
            assert new
            assert len(gone) == 1
            assert gone <= self.first_ended(family)
            assert len(family) >= CAPACITY
            del self.known[gone.pop()]
        elif new:
            assert sum(k.swept is None or not self.over(k) for k in family.values()) < CAPACITY

    def expected(self, old: Known | None, length: int, reason: int, hard: bool, cap: int) -> Known:
        if hard and length < cap:
            length = min(length * 2 ** (old.hard if old else 0), cap)
        end = self.now + length
        new = Known(self.now, end, reason, hard=int(hard))
        if old is not None:
            new = replace(new, before=old.before + 1, hard=old.hard + hard)
            if old.end > end:
                new = replace(new, start=old.start, end=old.end, reason=old.reason)
        return new

    @rule(source=st.sampled_from(POOL + SIXES))
    def remove(self, source: str) -> None:
        known = self.known.pop(source, None)
        removed = self.table.remove(source)
        if known is None or not self.over(known):
            assert removed == (known is not None)

    @rule(limit=st.sampled_from([1, 2, 3, 4096]))
    def expire(self, limit: int) -> None:
        due = {s for s, k in self.known.items() if k.swept is None and k.end // TICK < self.now // TICK}
        ended = expire_all(self.table, self.now, limit)
        assert len(ended) == len(set(ended))
        assert set(ended) == due
        self.swept(ended)
        self.settled, self.hand = True, self.now // SECOND

    @rule()
    def expire_one(self) -> None:
        due = {s for s, k in self.known.items() if k.swept is None and k.end // TICK < self.now // TICK}
        ended = self.table.expire(self.now, 1)
        assert len(ended) == min(1, len(due))
        assert set(ended) <= due
        self.swept(ended)
        self.settled = False

    def swept(self, ended: list[str]) -> None:
        self.calls += 1
        for source in ended:
            self.known[source] = replace(self.known[source], swept=self.calls)
        # Slots are given back from the front of the list: surely those that nothing remembered stands in front of.
        for family in (self.family("."), self.family(":")):
            kept = [k.swept for k in family.values() if k.swept is not None and not self.over(k)]
            for source, known in family.items():
                if known.swept is not None and self.over(known) and known.swept < min(kept, default=self.calls + 1):
                    del self.known[source]

    @rule(down=STEP, now=st.integers(0, 40 * DAY))
    def save_and_restore(self, down: int, now: int) -> None:
        other = TimeoutTable(CAPACITY, now=now)
        count = other.load(self.table.dump(self.now), now, down)
        shift = now - self.now - down
        moved = {s: replace(k, start=k.start + shift, end=k.end + shift) for s, k in self.known.items()}
        self.known = {s: k for s, k in moved.items() if k.end + DAY > now}
        assert count == len(self.known)
        self.table, self.now, self.hand, self.settled, self.evictions = other, now, now // SECOND, True, 0
        # Ended ones stand in the order of their ends now, each in front of all that a later sweep ends.
        ended = sorted((s for s, k in self.known.items() if k.end <= now), key=lambda s: self.known[s].end)
        self.known = {s: replace(k, swept=None) for s, k in self.known.items()}
        self.swept(ended)

    def present(self) -> set[str]:
        return {record.source for record in self.table.entries(self.now, remembered=True)}

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        if not hasattr(self, "table"):
            return
        running = {s: k for s, k in self.known.items() if k.end > self.now}
        lately = {s: k for s, k in self.known.items() if not self.over(k)}
        records = self.table.entries(self.now, remembered=True)
        assert {r.source: (r.start, r.end, r.reason, r.before, r.hard) for r in records} == {
            s: (k.start, k.end, k.reason, k.before, k.hard) for s, k in lately.items()
        }
        for source in POOL + SIXES:
            assert (self.table.find(source, self.now) is not None) == (source in running)
        unswept = [k for k in self.known.values() if k.swept is None]
        assert self.table.running == len(unswept)
        self.wakes_in_time(unswept)

    def wakes_in_time(self, unswept: list[Known]) -> None:
        due = self.table.next(self.now)
        if not unswept:
            assert due is None
            return
        assert due is not None
        assert self.now <= due
        first = min(k.end for k in unswept)
        assert due <= max(self.now, (first // TICK + 1) * TICK), "not later than the first end's tick is over"


TestTableAgainstDict = TableAgainstDict.TestCase
TestTableAgainstDict.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
