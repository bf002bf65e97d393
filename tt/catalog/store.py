"""The catalogue's records and their history in one SQLite file, with what is read often in memory.

    change -> SAVEPOINT in the open group -> turn: COMMIT in a thread -> turn: memory follows, the waiting are told

Rules: all but COMMIT runs in the loop's thread, and while COMMIT runs nobody touches the writer (`busy`).  What `Store`
shows is committed; what a `Change` sees is that and the open group.  A row of history and the change that it tells of
are in one SAVEPOINT, which is kept whole or not at all, in the file and in memory.
Must not know operations, rights, or what the fields of a record mean beyond place and move of a Volume.
"""

import os
import sqlite3
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import msgspec

from tt.catalog.chain import link, read_head
from tt.catalog.messages import HistoryRow
from tt.catalog.model import Access, Certificate, Customer, Media, Record, Repository, User, Volume, own_id, parent
from tt.catalog.schema import TABLES, StoreError, changed, connect, explain, open_to_write
from tt.durations import Durations
from tt.pending import Pending

__all__ = ["Author", "Change", "Row", "Store", "StoreError"]

R = TypeVar("R", bound=Record)

_IN_MEMORY = (Customer, Media, Repository, User, Access)  # few, and asked for with every operation
_DONE = Pending()
_DONE.finish()
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, tuple[Any, Any]]).decode
_ABSENT = object()

_INSERT_HISTORY = f"INSERT INTO history VALUES ({', '.join('?' * 12)})"  # noqa: S608
# Each row leads to the one before of the same record, by the primary key; LIMIT ends the recursion.
_WALK = (
    "WITH RECURSIVE walk AS (SELECT * FROM history WHERE sequence = ?"
    " UNION ALL SELECT history.* FROM walk JOIN history ON history.sequence = walk.previous) SELECT * FROM walk LIMIT ?"
)
# A COMMIT that failed so has not written its last frame, without which the others count for nothing.
_NOT_IN_LOG = ("SQLITE_FULL", "SQLITE_IOERR_WRITE")
_COUNT = "SELECT media, count(*) FROM volume GROUP BY media"
_COUNT_MOVING = "SELECT count(*) FROM volume INDEXED BY volume_moving WHERE target <> ''"
_DELETED = "SELECT last FROM deleted WHERE kind = ? AND name = ?"
_NO_LONGER_DELETED = "DELETE FROM deleted WHERE kind = ? AND name = ? RETURNING last"
_CERTIFICATES = (
    "SELECT name, user, correct, '', '', row, last FROM certificate WHERE name > ? AND name < ?"
    " ORDER BY name DESC LIMIT ?"
)
_VOLUMES = TABLES[Volume].select
_RANGE = "name > ? AND name < ? ORDER BY name LIMIT ?"
_BY_NAME = f"{_VOLUMES} WHERE {_RANGE}"
_BY_CURRENT = f"{_VOLUMES} INDEXED BY volume_current WHERE media = ? AND current = ? AND {_RANGE}"
_BY_TARGET = f"{_VOLUMES} INDEXED BY volume_target WHERE target <> '' AND media = ? AND target = ? AND {_RANGE}"
_BY_MOVING = f"{_VOLUMES} INDEXED BY volume_moving WHERE target <> '' AND {_RANGE}"


class Author(NamedTuple):
    """Who makes a change, as the history names him."""

    user: str
    interface: str  # what the client calls itself
    source: str  # the peer's address


class Row(NamedTuple):
    """A row of history: what acknowledges a change once its group is on disk."""

    sequence: int
    hash: bytes


class _Group:
    """The changes of one transaction, from BEGIN to the end of COMMIT."""

    __slots__ = ("counts", "error", "hash", "moving", "over", "pending", "records", "seconds", "sequence")

    def __init__(self, sequence: int, head: bytes) -> None:
        self.sequence = sequence
        self.hash = head
        self.records: dict[tuple[type, str], Record | None] = {}  # as they will be; None: deleted
        self.counts: dict[str, int] = {}  # Volumes more or less, a Media type
        self.moving = 0
        self.pending = Pending()
        self.seconds = 0.0  # that COMMIT took; set by the commit thread, before `over`
        self.over = False  # set by the commit thread, after `error`
        self.error: StoreError | None = None


class Store:
    """The catalogue in one file.  All of it belongs to one thread, the loop's.

    `descriptor`, an eventfd, is readable when `turn` has something to do.  StoreError where the file cannot be opened.
    """

    def __init__(self, path: Path, *, cache: int = 100_000, clock: Callable[[], float] = time.time) -> None:
        """`cache`: Volumes kept in memory, the last used; `clock`: seconds since 1970 UTC, for the history."""
        self.path = path
        self.commits = 0
        self.commit_failures = 0
        self.durations = Durations()  # of those that succeeded
        self._clock = clock
        self._most_volumes = cache
        self._volumes: OrderedDict[str, Volume] = OrderedDict()
        self._records: dict[type, dict[str, Any]] = {kind: {} for kind in _IN_MEMORY}
        self._names: dict[type, list[str] | None] = dict.fromkeys(_IN_MEMORY)  # sorted; None: to be sorted again
        self._open: _Group | None = None
        self._committing: _Group | None = None
        self._lost: list[tuple[Pending, StoreError]] = []  # of groups that ended before their COMMIT
        self._changing = False
        self._failed = False  # set by the commit thread; from then on there are no changes
        self._orders: SimpleQueue[_Group | None] = SimpleQueue()
        with ExitStack() as undo:
            self._writer = open_to_write(path)
            undo.callback(self._writer.close)
            self._cursor = self._writer.cursor()
            self._reader = connect(path, lambda reader, _: reader.execute("PRAGMA query_only = ON"))
            undo.callback(self._reader.close)
            self._load()
            self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.pop_all()
        self._thread: Thread | None = Thread(target=self._commit_groups, name="commit", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            for kind in _IN_MEMORY:
                for record in self._select(kind, ""):
                    self._records[kind][record.name] = record
            self.sequence, self.hash = read_head(self._reader)
            # Counted at each start: a number kept in the file could come to differ from what it counts.
            media = {record.row: record.name for record in self._records[Media].values()}
            self._counts = {media[row]: number for row, number in self._read(_COUNT)}
            ((self.moving,),) = self._read(_COUNT_MOVING)
        except (StoreError, sqlite3.Error) as error:
            reason = error if isinstance(error, StoreError) else explain(error)
            raise StoreError(f"{self.path}: {reason}") from error
        except (TypeError, KeyError) as error:
            raise StoreError(f"{self.path}: the catalogue is damaged: run tt verify, or restore a backup") from error

    def close(self) -> None:
        """Wait for the COMMIT under way, commit what is open, close the file.  Harmless when repeated."""
        if self._thread is None:
            return
        if self._open is not None:
            self._hand_over(self._open)
        self._orders.put(None)
        self._thread.join()
        self._thread = None
        if self._committing is not None:
            self._take_in(self._committing)
        self._tell_the_lost()
        for connection in (self._reader, self._writer):  # the last one moves the log into the file and removes it
            with suppress(sqlite3.Error):
                connection.close()
        os.close(self.descriptor)

    # -----------------------------------------------------------------------------------------------------------------
    # What is committed
    # -----------------------------------------------------------------------------------------------------------------

    def get(self, kind: type[R], name: str) -> R | None:
        """The record of that full name."""
        records = self._records.get(kind)
        if records is not None:
            return records.get(name)
        if kind is Volume:
            volume = self._volumes.get(name)
            if volume is not None:
                self._volumes.move_to_end(name)
                return volume  # type: ignore[return-value]
        found = self._select(kind, "WHERE name = ?", name)
        if found and kind is Volume:
            self._keep(found[0])  # type: ignore[arg-type]
        return found[0] if found else None

    def all(self, kind: type[R], prefix: str = "") -> list[R]:
        """Those whose names begin with `prefix`, sorted by name; of all kinds but Volume and Certificate."""
        records = self._records[kind]
        names = self._names[kind]
        if names is None:
            names = self._names[kind] = sorted(records)
        first = bisect_left(names, prefix)
        return [records[name] for name in names[first : bisect_left(names, prefix + "\U0010ffff", first)]]

    def volumes(  # noqa: PLR0913
        self, low: str, high: str, *, repository: str = "", target: str = "", moving: bool = False, limit: int
    ) -> list[Volume]:
        """The next Volumes with low < name < high, by name, at most `limit`: fewer mean that there are no more.

        Of `target`, `moving` and `repository` (full names) the first that is given chooses an index, and the Volumes
        that it leads to are returned whether they fit the others or not: that is for the caller, who so knows what was
        read, and that the next page begins behind the last of them.
        """
        fixed: tuple[Any, ...] = ()
        statement = _BY_MOVING if moving else _BY_NAME
        place = target or ("" if moving else repository)
        if place:
            media = self.get(Media, parent(place))
            if media is None:
                return []
            fixed = media.row, own_id(place)
            statement = _BY_TARGET if target else _BY_CURRENT
        return [Volume(*columns) for columns in self._read(statement, *fixed, low, high, limit)]

    def certificates(self, repository: str, limit: int) -> list[Certificate]:
        """Of a Repository, the newest first, `surplus` and `deficit` left empty: they may be long."""
        return [Certificate(*row) for row in self._read(_CERTIFICATES, f"{repository} ", f"{repository}!", limit)]

    def number(self, kind: type[Record]) -> int:
        """How many there are of a kind that `all` lists, without making the list."""
        return len(self._records[kind])

    def count(self, media: str = "") -> int:
        """How many Volumes a Media type has; without one, how many there are."""
        return self._counts.get(media, 0) if media else sum(self._counts.values())

    @property
    def size(self) -> int:
        """Of the file, bytes."""
        return self.path.stat().st_size

    def history(self, kind: type[Record], name: str, before: int, limit: int) -> list[HistoryRow]:
        """Rows about a record, newest first, also where it has been deleted.

        `before`: the sequence number of the last row of the page before, 0 for the first page.  A row of another
        record, or none, leads nowhere.
        """
        table = TABLES[kind]
        if before:
            last = self._read(
                "SELECT previous FROM history WHERE sequence = ? AND kind = ? AND name = ?", before, table.name, name
            )
        else:
            last = self._read(f"SELECT last FROM {table.name} WHERE name = ?", name)  # noqa: S608 - a name of ours
            last = last or self._read(_DELETED, table.name, name)
        shown = f"{table.name} {name}" if kind in (User, Access) else name
        return [
            HistoryRow(*(*row[:6], shown, row[8], _decode(row[9]), *row[10:]))
            for row in (self._read(_WALK, last[0][0], limit) if last else [])
        ]

    def _read(self, statement: str, *values: Any) -> list[Any]:
        # Always all of the rows: a statement that is not at its end would hold its snapshot, and the log would grow.
        try:
            return self._reader.execute(statement, values).fetchall()
        except (sqlite3.Error, MemoryError) as error:
            raise StoreError(explain(error)) from error

    def _select(self, kind: type[R], condition: str, *values: Any) -> list[R]:
        table = TABLES[kind]
        return [table.record(columns) for columns in self._read(f"{table.select} {condition}", *values)]

    def _keep(self, volume: Volume) -> None:
        volumes = self._volumes
        volumes[volume.name] = volume
        volumes.move_to_end(volume.name)
        while len(volumes) > self._most_volumes:
            volumes.popitem(last=False)

    # -----------------------------------------------------------------------------------------------------------------
    # Writes
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> Pending | None:
        """The COMMIT under way, during which nothing may be changed; None: go on."""
        return None if self._committing is None else self._committing.pending

    def idle(self) -> Generator[Pending, None, None]:
        """Gives what to wait for, until no COMMIT is under way: then a change may be made."""
        while (pending := self.busy) is not None:
            yield pending

    def change(self, author: Author) -> "Change":
        """For a `with` statement, which an exception leaves with nothing changed.  One at a time, and not while busy.

        StoreError, also from what is called inside: the file takes no change.
        """
        if self._committing is not None or self._changing:
            raise RuntimeError("a change was begun during a COMMIT or within another change")
        if self._thread is None:
            raise StoreError("the catalogue is closed: the server is ending")
        if self._failed:
            known = "it is not known whether the last changes are kept"
            raise StoreError(f"the disk of the catalogue failed, and {known}: restart the server")
        return Change(self, author)

    def _begin(self) -> _Group:
        """The open group, begun where there is none."""
        group = self._open
        if group is None:
            self._cursor.execute("BEGIN IMMEDIATE")
            group = self._open = _Group(self.sequence, self.hash)
            os.eventfd_write(self.descriptor, 1)
        return group

    def _lose(self, error: StoreError) -> None:
        """The transaction is gone (SQLite itself ends it when, say, the disk is full), with all that the group had."""
        if self._open is not None:
            self.commit_failures += 1
            self._lost.append((self._open.pending, error))
            self._open = None
            os.eventfd_write(self.descriptor, 1)  # told in `turn`: here an operation is under way

    def turn(self) -> None:
        """Take in the group whose COMMIT has ended, or hand the open one over.  For when `descriptor` is readable."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        self._tell_the_lost()
        group = self._committing
        if group is None:
            if self._open is not None:
                self._hand_over(self._open)
        elif group.over:
            # What those who waited write now is handed over a turn later, together with what others write till then.
            self._take_in(group)

    def _hand_over(self, group: _Group) -> None:
        self._open, self._committing = None, group
        self._orders.put(group)

    def _take_in(self, group: _Group) -> None:
        self._committing = None
        if group.error is not None:
            self.commit_failures += 1
        else:
            self.commits += 1
            self.durations.add(group.seconds, time.monotonic())
            self.sequence, self.hash = group.sequence, group.hash
            self.moving += group.moving
            for media, more in group.counts.items():
                self._counts[media] = self._counts.get(media, 0) + more
            for (kind, name), record in group.records.items():
                self._replace(kind, name, record)
        group.pending.finish(group.error)

    def _replace(self, kind: type, name: str, record: Any) -> None:
        if kind is Volume:
            if record is None:
                self._volumes.pop(name, None)
            else:
                self._keep(record)
        elif kind in self._records:
            records = self._records[kind]
            if (record is None) == (name in records):
                self._names[kind] = None
            if record is None:
                records.pop(name, None)
            else:
                records[name] = record

    def _tell_the_lost(self) -> None:
        lost, self._lost = self._lost, []
        for pending, error in lost:
            pending.finish(error)

    def _commit_groups(self) -> None:
        """The commit thread: it runs little but COMMIT, which holds no GIL."""
        while (group := self._orders.get()) is not None:
            began = time.monotonic()
            try:
                self._cursor.execute("COMMIT")
            except (sqlite3.Error, MemoryError) as error:
                group.error = self._roll_back(error)
            group.seconds = time.monotonic() - began
            group.over = True
            os.eventfd_write(self.descriptor, 1)

    def _roll_back(self, error: sqlite3.Error | MemoryError) -> StoreError:
        """After a COMMIT that failed: what its group is told.

        Frames of it may stand whole in the log, where fsync alone failed: were the process killed now, they would be
        taken for committed.  So the log is emptied.  Where that fails too, nobody knows what the disk has, and what
        was written behind those frames could go with them: there are no more changes until the log is read anew.
        """
        emptied = False
        with suppress(sqlite3.Error, MemoryError):
            if self._writer.in_transaction:
                self._cursor.execute("ROLLBACK")
            ((busy, _, _),) = self._cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            emptied = not busy  # a reader beside us, such as tt verify, also keeps the log
        if emptied or getattr(error, "sqlite_errorname", "") in _NOT_IN_LOG:
            return StoreError(explain(error))
        self._failed = True
        return StoreError(f"the change may or may not have happened: {explain(error)}; restart the server")


class Change:
    """Of one record or several, kept whole or not at all.  `pending` is done when it is on disk, or has failed."""

    __slots__ = (
        "_author",
        "_counts",
        "_error",
        "_group",
        "_moving",
        "_records",
        "_store",
        "hash",
        "pending",
        "sequence",
    )

    def __init__(self, store: Store, author: Author) -> None:
        group = store._open
        self._store = store
        self._author = author
        self._group: _Group | None = None  # from the first `put` or `delete` on
        self._error: StoreError | None = None
        self._records: dict[tuple[type, str], Record | None] = {}
        self._counts: dict[str, int] = {}
        self._moving = 0
        self.sequence: int = (group or store).sequence
        self.hash: bytes = (group or store).hash
        # What it reads may be of the open group, so that also an answer that changes nothing waits for that.
        self.pending = _DONE if group is None else group.pending

    def __enter__(self) -> "Change":
        self._store._changing = True
        return self

    def get(self, kind: type[R], name: str) -> R | None:
        """As Store.get, with what this change and those before it in the group have made of it."""
        key = (kind, name)
        found: Any = self._records.get(key, _ABSENT)
        if found is _ABSENT:
            group = self._store._open
            found = _ABSENT if group is None else group.records.get(key, _ABSENT)
        return self._store.get(kind, name) if found is _ABSENT else found

    def count(self, media: str) -> int:
        """As Store.count."""
        group = self._store._open
        before = self._store.count(media) + (0 if group is None else group.counts.get(media, 0))
        return before + self._counts.get(media, 0)

    def put(self, record: Record, event: str) -> Row:
        """Add a record (its `row` is 0) or change the one that was got; with its row of history.

        A record that changes nothing has its row all the same: that a tape was seen where it should be is worth one.
        """
        kind, name = type(record), record.name
        table = TABLES[kind]
        old = self.get(kind, name)
        if (record.row, record.last) != ((0, 0) if old is None else (old.row, old.last)):
            raise ValueError(f"{table.name} {name}: not made from the record as this change sees it")
        changes = changed(table, old, record)
        sequence = self.sequence + 1
        if old is None:
            media = (self._media(record).row,) if isinstance(record, Volume) else ()
            gone = self._run(_NO_LONGER_DELETED, (table.name, name)).fetchall()
            previous = gone[0][0] if gone else 0
            number = self._run(table.insert, (*table.columns(record), sequence, *media)).lastrowid
        else:
            previous, number = old.last, old.row
            values = [getattr(record, field) for field in changes]
            assignments = "".join([f"{field} = ?, " for field in changes])
            self._run(f"UPDATE {table.name} SET {assignments}last = ? WHERE row = ?", (*values, sequence, number))  # noqa: S608
        row = self._append(event, table.name, old or record, changes, previous)
        self._note(kind, name, old, msgspec.structs.replace(record, row=number, last=sequence))
        return row

    def delete(self, record: Record, event: str) -> Row:
        """Delete the record that was got; its history stays."""
        kind, name = type(record), record.name
        table = TABLES[kind]
        old = self.get(kind, name)
        if old is None or (old.row, old.last) != (record.row, record.last):
            raise ValueError(f"{table.name} {name}: not the record as this change sees it")
        self._run(f"DELETE FROM {table.name} WHERE row = ?", (old.row,))  # noqa: S608 - a name of ours
        self._run("INSERT INTO deleted VALUES (?, ?, ?)", (table.name, name, self.sequence + 1))
        row = self._append(event, table.name, old, changed(table, old, None), old.last)
        self._note(kind, name, old, None)
        return row

    def _append(self, event: str, kind: str, at: Record, changes: dict[str, Any], previous: int) -> Row:
        """The row of history; `at` is the record whose place counts: as it was, or as it was added."""
        columns = (
            self.sequence + 1,
            int(self._store._clock() * 1_000_000),
            *self._author,
            event,
            kind,
            at.name,
            at.current if isinstance(at, Volume) else "",
            _encode(changes).decode(),
            previous,
        )
        head = link(self.hash, columns)
        self._run(_INSERT_HISTORY, (*columns, head))
        self.sequence, self.hash = columns[0], head
        return Row(columns[0], head)

    def _note(self, kind: type, name: str, old: Any, new: Any) -> None:
        self._records[kind, name] = new
        if kind is Volume:
            self._moving += bool(new and new.target) - bool(old and old.target)
            if old is None or new is None:
                media = parent(name)
                self._counts[media] = self._counts.get(media, 0) + (-1 if new is None else 1)

    def _media(self, volume: Volume) -> Media:
        media = self.get(Media, parent(volume.name))
        if media is None:
            raise ValueError(f"volume {volume.name}: there is no such Media type")
        return media

    def _run(self, statement: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
        """One statement of the change; the first begins its SAVEPOINT."""
        store = self._store
        if self._error is not None:  # the transaction may be gone: a statement would be one of its own
            raise self._error
        try:
            if self._group is None:
                group = store._begin()
                store._cursor.execute("SAVEPOINT change")
                self._group, self.pending = group, group.pending
            return store._cursor.execute(statement, values)
        except (sqlite3.Error, MemoryError) as error:
            self._error = StoreError(explain(error))
            raise self._error from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        store, group = self._store, self._group
        store._changing = False
        if error is None and self._error is None:
            if group is None:
                return
            try:
                store._cursor.execute("RELEASE change")
            except (sqlite3.Error, MemoryError) as failure:
                self._error = StoreError(explain(failure))
            else:
                group.sequence, group.hash = self.sequence, self.hash
                group.records.update(self._records)
                group.moving += self._moving
                for media, more in self._counts.items():
                    group.counts[media] = group.counts.get(media, 0) + more
                return
        self._undo()
        if error is None and self._error is not None:
            raise self._error

    def _undo(self) -> None:
        store = self._store
        if self._group is None:
            return
        try:
            store._cursor.execute("ROLLBACK TO change")
            store._cursor.execute("RELEASE change")
        except (sqlite3.Error, MemoryError) as failure:
            with suppress(sqlite3.Error, MemoryError):
                store._cursor.execute("ROLLBACK")
            store._lose(self._error or StoreError(explain(failure)))
