"""Volumes: added, shown, listed, moved, scanned, changed, deleted; and the life cycle that their letters tell.

Rules: what becomes of a Volume is said by the functions of the first section, which know nothing but the record.
Below them is one short function an operation; it gets its records from a Reader or a Writer, which ask the right.
Lists are generators: they give None after each slice, look at a bounded number of records a page, and begin the page
anew where the user's rights change meanwhile.
Must not know how requests arrive, nor how records are stored.
"""

import re
from calendar import timegm
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from fnmatch import translate
from functools import lru_cache
from math import inf
from time import gmtime, strftime, strptime
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from tt.catalog.messages import (
    PAGE,
    AddVolume,
    History,
    HistoryRow,
    ListVolumes,
    Moved,
    MovedPage,
    MovePending,
    MoveVolume,
    OneVolume,
    Scan,
    Scanned,
    UpdateVolume,
    VolumeHistory,
    VolumeRecord,
    Volumes,
    Written,
)
from tt.catalog.model import (
    NONE,
    OVERDUE_AFTER,
    PARTS,
    READ,
    SUPERUSER,
    Invalid,
    Media,
    Repository,
    Volume,
    check,
    check_name,
    check_number,
    customer_of,
    own_id,
    parent,
    shown_flags,
    with_flags,
)
from tt.catalog.rights import Editor, Reader, Writer, missing
from tt.catalog.store import StoreError
from tt.catalog.structure import given, place, rights_of, scope_of
from tt.dispatch import OperationError
from tt.pending import Pending

READ_A_PAGE = 4  # times its limit: so many records a page of a list looks at, at most
SLICE = 200  # records that are looked at before others are served
ANSWERS_KEPT = 50_000  # encoded Volumes, about 500 bytes each; the oldest goes
MOVES_A_SLICE = 50
HISTORY_SLICE = 100  # rows of history, likewise
MOST_SEQUENCE = 2**63 - 1
END = "~"  # behind every name
DAY = 86_400  # s
_encode = msgspec.msgpack.Encoder().encode


# ---- the life cycle -------------------------------------------------------------------------------------------------


def moved(volume: Volume, to: str, now: int) -> Volume:
    """A move is asked for, or its target changed.  Asked for again with the same target, it is as old as it was."""
    requested = volume.requested if volume.target == to else now
    return replace(volume, target=to, requested=requested, flags=with_flags(volume.flags, remove="CWp"))


def cancelled(volume: Volume) -> Volume:
    """It stays where it is; W tells that it had left."""
    had_left = "W" if "U" in volume.flags else ""
    return replace(volume, target="", requested=0, flags=with_flags(volume.flags, add=had_left, remove="U"))


def left(volume: Volume) -> Volume:
    return replace(volume, scanned=volume.current, flags=with_flags(volume.flags, add="U"))


def arrived(volume: Volume, today: str) -> Volume:
    """At its target, where the date of this move is done with; or confirmed where it is."""
    flags = with_flags(volume.flags, add="C", remove="UWaK")
    if not volume.target:
        return replace(volume, scanned=volume.current, flags=flags)
    to = volume.target
    date = "" if volume.move_date <= today else volume.move_date
    return replace(volume, current=to, target="", scanned=to, requested=0, move_date=date, flags=flags)


def misplaced(volume: Volume, where: str) -> Volume:
    return replace(volume, scanned=where, flags=with_flags(volume.flags, add="a"))


def is_due(volume: Volume, today: str) -> bool:
    """Whether its next move is to be started."""
    return not volume.target and ("p" in volume.flags or "" < volume.move_date <= today)


@lru_cache(maxsize=4)
def _day(number: int) -> str:
    return strftime("%Y-%m-%d", gmtime(number * DAY))


def today(at: Reader) -> str:
    """The day in UTC."""
    return _day(int(at.now // DAY))


# ---- one Volume -----------------------------------------------------------------------------------------------------


def shown(at: Reader, volume: Volume) -> VolumeRecord:
    name, date = volume.name, volume.move_date
    here = at.store.get(Repository, f"{name.rpartition('.')[0]}.{volume.current}")
    flags = shown_flags(volume, offsite=here is not None and here.offsite, today=today(at) if date else "", now=at.now)
    return VolumeRecord(
        name, volume.current, volume.target, volume.scanned, flags, date, volume.requested, volume.description,
        volume.last,
    )  # fmt: skip


class Answer(Struct, frozen=True, gc=False):
    """A Volume as `get` shows it, encoded, with what it was made of."""

    customer: str
    volume: Volume
    place: str  # the full name of its Repository
    here: Repository | None
    until: float  # when time alone changes its letters, seconds since 1970 UTC
    encoded: Raw


class Answers:
    """What `get` has answered: encoded again only where a record or the day has changed it.

    Whether the user may read it is asked each time, and never kept.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Answer] = OrderedDict()

    def find(self, at: Reader, name: str) -> Raw | None:
        """The answer, where it is kept and true, and the account may have it."""
        answer = self._kept.get(name)
        if (
            answer is not None
            and at.account.levels.get(answer.customer, NONE) >= READ
            and at.store.get(Volume, name) is answer.volume
            and at.store.get(Repository, answer.place) is answer.here
            and at.now < answer.until
        ):
            return answer.encoded
        return None

    def make(self, at: Reader, name: str) -> Raw:
        """The answer, from now on kept.  Raises as Reader.record does."""
        volume = at.record(Volume, name)
        place = f"{parent(name)}.{volume.current}"
        encoded = Raw(_encode(shown(at, volume)))
        if len(self._kept) >= ANSWERS_KEPT:
            self._kept.popitem(last=False)
        here = at.store.get(Repository, place)
        self._kept[name] = Answer(customer_of(name), volume, place, here, _until(at, volume), encoded)
        return encoded


def _until(at: Reader, volume: Volume) -> float:
    """When time alone changes the letters of a Volume: its date comes, or its move is overdue."""
    until = inf
    if volume.move_date and volume.move_date > today(at):
        until = timegm(strptime(volume.move_date, "%Y-%m-%d"))
    if volume.target and (overdue := volume.requested + OVERDUE_AFTER) > at.now:
        until = min(until, overdue)
    return until


def add(at: Writer, asked: AddVolume) -> Written:
    media = at.record(Media, parent(check_name("volume", asked.volume)))
    flags = with_flags("", add=check("flags", asked.flags))
    here = check("repository", asked.repository)
    volume = _checked(Volume(asked.volume, here, flags=flags, move_date=asked.move_date, description=asked.description))
    place(at, media.name, here)
    at.must_be_new(Volume, asked.volume)
    if media.max_volumes and at.change.count(media.name) >= media.max_volumes:
        raise OperationError("full", f"{media.name} has the {media.max_volumes} Volumes that its max_volumes allows")
    return at.put(volume, "add")


def update(at: Writer, asked: UpdateVolume) -> Written:
    volume = _unlocked(at, at.record(Volume, asked.volume))
    check("flags", asked.set_flags, "set_flags")
    check("flags", asked.clear_flags, "clear_flags")
    if both := set(asked.set_flags) & set(asked.clear_flags):
        raise Invalid(f"set_flags, clear_flags: must not both have {''.join(sorted(both))}")
    flags = with_flags(volume.flags, add=asked.set_flags, remove=asked.clear_flags)
    changes = given(asked, "volume", "set_flags", "clear_flags")
    return at.put(_checked(replace(volume, flags=flags, **changes)), "change")


def delete(at: Writer, asked: OneVolume) -> Written:
    volume = _unlocked(at, at.record(Volume, asked.volume))
    if volume.target:
        raise OperationError("conflict", f"{volume.name} is moving to {volume.target}: cancel the move first")
    here = place(at, parent(volume.name), volume.current)
    if not here.allow_deletes:
        raise OperationError("conflict", f"{volume.name} is in {here.name}, which does not allow deletes")
    return at.delete(volume, "delete")


def move(at: Writer, asked: MoveVolume) -> Written:
    """Back to where it is, it is a cancel."""
    volume = _unlocked(at, at.record(Volume, asked.volume))
    place(at, parent(volume.name), check("repository", asked.to, "to"))
    changed = _checked(replace(volume, **given(asked, "volume", "to")))
    if asked.to == volume.current:
        if not volume.target:
            raise OperationError("conflict", f"{volume.name} is in {asked.to} already")
        return at.put(cancelled(changed), "cancel")
    if "l" in volume.flags:
        raise OperationError("conflict", f"{volume.name} has the move lock: clear its flag l first")
    return at.put(moved(changed, asked.to, int(at.now)), "move")


def cancel(at: Writer, asked: OneVolume) -> Written:
    volume = _unlocked(at, at.record(Volume, asked.volume))
    if not volume.target:
        raise OperationError("conflict", f"{volume.name} is not moving")
    return at.put(cancelled(volume), "cancel")


def _checked(volume: Volume) -> Volume:
    check("volume description", volume.description, "description")
    check("move date", volume.move_date, "move_date")
    return volume


def _unlocked(at: Writer, volume: Volume) -> Volume:
    if "L" in volume.flags and at.account.name != SUPERUSER:
        raise OperationError("denied", f"{volume.name} has the update lock (flag L): only {SUPERUSER} may change it")
    return volume


# ---- scans ----------------------------------------------------------------------------------------------------------
# A scan is a fact: it is also recorded of a Volume with a lock.


def scan_out(at: Writer, asked: Scan) -> Scanned:
    return _scan(at, asked, "scan_out", _judged_out)


def scan_in(at: Writer, asked: Scan) -> Scanned:
    return _scan(at, asked, "scan_in", _judged_in)


def _judged_out(at: Writer, volume: Volume, where: str) -> tuple[Volume | None, str]:
    """The Volume afterwards, None where it is misplaced; and what to say."""
    if volume.current != where:
        return None, f"should be in {volume.current}"
    if not volume.target:
        return None, "is not to move"
    return left(volume), f"on its way to {volume.target}"


def _judged_in(at: Writer, volume: Volume, where: str) -> tuple[Volume | None, str]:
    if where == (volume.target or volume.current):
        return arrived(volume, today(at)), "arrived" if volume.target else "confirmed"
    if volume.target:
        return None, f"should come to {volume.target}"
    return None, f"should be in {volume.current}"


Judge = Callable[[Writer, Volume, str], tuple[Volume | None, str]]


def _scan(at: Writer, asked: Scan, event: str, judged: Judge) -> Scanned:
    here = at.record(Repository, asked.repository)
    media, where = parent(here.name), own_id(here.name)
    name = asked.volume if "." in asked.volume else f"{media}.{asked.volume}"
    try:
        check_name("volume", name)
    except Invalid as error:  # a label that cannot be read, or another's: what was scanned, not what was asked
        return Scanned("unknown", asked.volume[:40], str(error), 0, b"")
    volume = at.get(Volume, name) if parent(name) == media else None
    if volume is None:
        return Scanned("unknown", name, f"there is no Volume {own_id(name)} in {media}", 0, b"")
    after, message = judged(at, volume, where)
    if after is None:
        # A row tells of what changed, and `scanned` may have this value already: so the event says where.
        written = at.put(misplaced(volume, where), f"wrong_{event} {where}")
        return Scanned("wrong", name, message, written.sequence, written.hash)
    written = at.put(after, event)
    return Scanned("ok", name, message, written.sequence, written.hash)


# ---- history --------------------------------------------------------------------------------------------------------


def history(at: Reader, asked: VolumeHistory) -> Generator[None, None, History]:
    """Also of a Volume that was deleted."""
    check_number("limit", asked.limit, 1, PAGE)
    check_number("before", asked.before, 0, MOST_SEQUENCE)
    check_name("volume", asked.volume)
    rows: list[HistoryRow] = []
    before = asked.before
    while len(rows) < asked.limit:
        at.rights.current(at.account)
        at.permit("volume", asked.volume)
        part = at.store.history(Volume, asked.volume, before, min(HISTORY_SLICE, asked.limit - len(rows)))
        if not part and not asked.before:
            raise missing("volume", asked.volume)
        rows += part
        if not part or not part[-1].previous:
            return History(rows, 0)
        before = part[-1].sequence
        yield
    return History(rows, before)


# ---- lists ----------------------------------------------------------------------------------------------------------


def list_volumes(at: Reader, asked: ListVolumes) -> Generator[None, None, Volumes]:
    check_number("limit", asked.limit, 1, PAGE)
    check("after", asked.after)
    while True:
        page = yield from _page(at, asked)
        if page is not None:
            return page


def _page(at: Reader, asked: ListVolumes) -> Generator[None, None, Volumes | None]:
    """None where the user's rights have changed under way: what was found may not be his to see."""
    for name in (asked.repository, asked.target):
        if name:
            at.record(Repository, name)
    media = parent(asked.repository or asked.target)
    spans, fits = _scoped(at, asked.scope or media), _filter(asked)
    index = {"repository": asked.repository, "target": asked.target, "moving": asked.moving or asked.overdue}
    found: list[VolumeRecord] = []
    rights, position = rights_of(at.account), ""
    for part in slices(at, spans, asked.after, READ_A_PAGE * asked.limit, **index):
        position = part.next
        for volume in part.volumes:
            record = shown(at, volume)
            if fits(record):
                found.append(record)
                if len(found) == asked.limit:
                    return Volumes(found, record.name)
        yield
        if rights_of(at.rights.current(at.account)) != rights:
            return None
    return Volumes(found, position)


class Slice(NamedTuple):
    """Some Volumes by name."""

    volumes: list[Volume]
    next: str  # the position behind them, "" at the end of all


def slices(at: Reader, spans: Iterable[tuple[str, str]], after: str, most: int, **index: Any) -> Iterator[Slice]:
    """The Volumes of these spans behind a position.

    Looks at `most` records at most.  When rights change meanwhile, the spans may not be the user's any more, which is
    for the caller to see.
    """
    spans = [(max(low, after), high) for low, high in spans if after < high]
    for number, (low, high) in enumerate(spans, 1):
        position = low
        while position < high:
            wanted = min(SLICE, most)
            if not wanted:
                return
            volumes = at.store.volumes(position, high, limit=wanted, **index)
            most -= max(len(volumes), 1)
            position = volumes[-1].name if len(volumes) == wanted else high
            yield Slice(volumes, "" if position == high and number == len(spans) else position)


def _scoped(at: Reader, scope: str) -> list[tuple[str, str]]:
    """Where the names of a scope are: Volumes with low < name < high."""
    if not scope:
        return [span(prefix) for prefix in at.account.prefixes]
    if scope.count(".") < len(PARTS["volume"]) - 1:
        return [span(f"{scope_of(at, scope).name}.")]
    media, _, ids = scope.rpartition(".")
    at.record(Media, media)
    literal = re.match("[A-Z0-9-]*", check("ids", ids, "scope"))
    return [span(f"{media}.{literal[0] if literal else ''}")]


def span(prefix: str) -> tuple[str, str]:
    """Between these are the names that begin so, and no others."""
    return prefix and prefix[:-1] + chr(ord(prefix[-1]) - 1) + END, prefix + END


def _filter(asked: ListVolumes) -> Callable[[VolumeRecord], bool]:
    """Whether one fits all that is asked for; the store's indexes see to one of it alone."""
    letters = set(check("letters", asked.flags, "flags") + "M" * asked.moving + "o" * asked.overdue)
    ids = own_id(asked.scope) if asked.scope.count(".") == len(PARTS["volume"]) - 1 else "*"
    matches = re.compile(translate(ids)).match

    def fits(record: VolumeRecord) -> bool:
        media, _, own = record.name.rpartition(".")
        return (
            letters <= set(record.flags)
            and (not asked.repository or f"{media}.{record.current}" == asked.repository)
            and (not asked.target or f"{media}.{record.target}" == asked.target)
            and (ids == "*" or bool(matches(own)))
        )

    return fits


# ---- the moves that are due -----------------------------------------------------------------------------------------


def move_pending(at: Editor, asked: MovePending) -> Generator[Pending | None, None, MovedPage]:
    """The table lets every user ask, since the scope may be all; what is moved takes the right to write."""
    at.right = "write"
    check("after", asked.after)
    found = None
    while found is None:
        found = yield from _due(at, asked)
    due, position = found
    if asked.dry_run:
        return MovedPage([_next_leg(at, volume) for volume in due], position, 0, b"")
    page = MovedPage([], position, 0, b"")
    for start in range(0, len(due), MOVES_A_SLICE):
        names = [volume.name for volume in due[start : start + MOVES_A_SLICE]]
        try:
            page = yield from _started(at, page, names)
        except StoreError:
            if not page.sequence:
                raise
            return page  # what was done is told; who goes on behind it is told why the rest fails
    return MovedPage(page.entries, position, page.sequence, page.hash)


def _due(at: Editor, asked: MovePending) -> Generator[None, None, tuple[list[Volume], str] | None]:
    """The Volumes of a page, and the position behind them; None where the user's rights have changed under way."""
    if asked.scope:
        scope_of(at, asked.scope)
    due: list[Volume] = []
    rights, position = rights_of(at.account), ""
    for part in slices(at, _scoped(at, asked.scope), asked.after, READ_A_PAGE * PAGE):
        position = part.next
        due += [volume for volume in part.volumes if is_due(volume, today(at)) and at.may(volume.name)]
        if len(due) >= PAGE:
            break
        yield
        if rights_of(at.rights.current(at.account)) != rights:
            return None
    return due, position


def _started(at: Editor, page: MovedPage, names: list[str]) -> Generator[Pending | None, None, MovedPage]:
    """The page with these too.  Raises StoreError: none of these was moved.

    They are on disk before the next ones begin: what fails is then always the last, and a page has no gap.
    """
    entries: list[Moved] = []
    done = Written(page.sequence, page.hash)
    yield from at.store.idle()
    with at.writing() as writer:
        for name in names:
            done = _start(writer, name, entries) or done
    pending = writer.change.pending
    while not pending.done:
        yield pending
    if pending.error is not None:
        raise pending.error
    yield None
    return MovedPage(page.entries + entries, names[-1], done.sequence, done.hash)


def _start(at: Writer, name: str, entries: list[Moved]) -> Written | None:
    """Starts the move of a Volume that was due a moment ago."""
    volume = at.get(Volume, name)
    if volume is None or not is_due(volume, today(at)) or not at.may(name):
        return None
    entries.append(leg := _next_leg(at, volume))
    return None if leg.problem else at.put(moved(volume, leg.target, int(at.now)), "move")


def _next_leg(at: Reader, volume: Volume) -> Moved:
    here = at.get(Repository, f"{parent(volume.name)}.{volume.current}")
    target = here.next if here is not None else ""
    problem = "" if target else f"{volume.current} has no next Repository"
    if "l" in volume.flags:
        problem = "has the move lock (flag l)"
    if "L" in volume.flags and at.account.name != SUPERUSER:
        problem = f"has the update lock (flag L): only {SUPERUSER} may move it"
    return Moved(volume.name, volume.current, target, problem)
