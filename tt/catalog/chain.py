"""The chain of custody in a catalogue's file: the hash of a row, `tt verify` and `tt backup`.

`verify` proves that the rows of history are those that were written, in their order and without a gap; with an anchor,
which was noted elsewhere, also that nobody made the chain anew up to there.  Then, that the history leads to the
records as they stand: the changes that it tells of, added up, are what is there.  Before all, that the tables, indexes
and triggers are those that tt makes.
Rules: both only read the catalogue, in one snapshot, beside a running server, in a process of their own (they take
long).  Must not know how a change is made.
"""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from tt.catalog.schema import (
    MIGRATIONS,
    SECRET,
    TABLES,
    StoreError,
    check_version,
    connect,
    explain,
    fingerprint,
    foreign_object,
)
from tt.state_file import sync_directory

START = bytes(32)  # what the first row is chained to
HEAD = "SELECT sequence, hash FROM history ORDER BY sequence DESC LIMIT 1"
# What the indexes go by has no history of its own.
_MISLAID = (
    "SELECT volume.name, volume.last FROM volume LEFT JOIN media ON media.row = volume.media WHERE media.name IS NULL"
    " OR substr(volume.name, 1, length(media.name) + 1) <> media.name || '.' LIMIT 1"
)
_BUCKETS = 1 << 16
_FOLLOWED = 1000  # of the buckets that are wrong, so that a file altered throughout does not fill the memory
_pack = msgspec.msgpack.Encoder().encode
_Integer = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]  # as SQLite's
_Value = str | _Integer | bool | None
_unpack_changes = msgspec.json.Decoder(dict[str, tuple[_Value, _Value]]).decode


class Head(NamedTuple):
    """Where a chain ends, or an anchor: what a history must come by.  As text 12:a0b1..., the hash in hexadecimal."""

    sequence: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash.hex()}"


class Report(NamedTuple):
    """What `verify` found."""

    head: Head  # the last row that was looked at
    records: int  # how many were compared with the history
    row: int  # the first row of history that is not as it was written, or that a record contradicts; 0: none
    problem: str  # in one line; "": the chain holds


def link(before: bytes, columns: Iterable[Any]) -> bytes:
    """The hash of a row of history.

    SHA-256 of the hash of the row before and of the row's other columns, in their order, as a MessagePack array in the
    shortest form.
    """
    return sha256(before + _pack(columns)).digest()


def parse_head(text: str) -> Head:
    """A head from its text.  ValueError: it is none."""
    sequence, _, digest = text.strip().partition(":")
    if not (sequence.isascii() and sequence.isdigit() and len(digest) == 2 * len(START)):
        raise ValueError("must be written SEQUENCE:HASH, as tt verify --head prints it")
    head = Head(int(sequence), bytes.fromhex(digest))
    if head.sequence == 0 and head.hash != START:
        raise ValueError(f"is no head: there is no row 0, and before the first row it is {Head(0, START)}")
    return head


def read_head(connection: sqlite3.Connection) -> Head:
    """Where the chain of the file ends now."""
    rows = connection.execute(HEAD).fetchall()
    return Head(*rows[0]) if rows else Head(0, START)


# ---------------------------------------------------------------------------------------------------------------------
# Verify
# ---------------------------------------------------------------------------------------------------------------------


def verify(path: Path, anchor: tuple[int, bytes] | None = None) -> Report:
    """Walk the chain, then compare the records with it.  StoreError: the file cannot be read, or is damaged."""
    with closing(_open_to_read(path)) as connection:
        try:
            connection.execute("BEGIN")
            damage = connection.execute("PRAGMA integrity_check(1)").fetchall()[0][0]
            if damage != "ok":
                raise StoreError(f"{path}: the catalogue is damaged: restore a backup ({' '.join(damage.split())})")
            return _verify(connection, anchor)
        except sqlite3.Error as error:
            raise StoreError(f"{path}: {explain(error)}") from error


def _verify(connection: sqlite3.Connection, anchor: tuple[int, bytes] | None) -> Report:
    head = Head(0, START)
    foreign = foreign_object(connection)
    if foreign:
        return Report(head, 0, 0, foreign)  # what stands in such tables, or was written past a trigger, proves nothing
    sums = [0] * _BUCKETS
    weigh = _scale()
    for row in connection.execute("SELECT * FROM history ORDER BY sequence"):
        problem = _misfit(head, row, anchor)
        if problem:
            return Report(head, 0, min(row[0], head.sequence + 1), problem)
        head = Head(row[0], row[-1])
        for weight in _weights(weigh, *_told(row)):
            sums[_bucket(row[6], row[7])] += weight
    if anchor is not None and anchor[0] > head.sequence:
        return Report(
            head, 0, head.sequence + 1, f"rows {head.sequence + 1} to {anchor[0]} of the history were removed"
        )
    records = 0
    for kind, name, fields in _records(connection):
        records += 1
        for weight in _weights(weigh, kind, name, fields):
            sums[_bucket(kind, name)] -= weight
    wrong = frozenset(islice((bucket for bucket, total in enumerate(sums) if total), _FOLLOWED))
    if wrong:
        return Report(head, records, *_contradiction(connection, wrong))
    for name, last in connection.execute(_MISLAID).fetchall():
        return Report(head, records, last, f"volume {name} was altered: it stands under another Media type")
    return Report(head, records, 0, "")


def _misfit(head: Head, row: tuple[Any, ...], anchor: tuple[int, bytes] | None) -> str:
    """What is wrong with the row behind this head; "" where it fits."""
    sequence, expected = row[0], head.sequence + 1
    if sequence != expected:
        return f"row {expected} of the history was removed" if sequence > expected else f"row {sequence} was inserted"
    if link(head.hash, row[:-1]) != row[-1]:
        return f"row {sequence} of the history was altered, or stands where another was removed or inserted"
    if anchor is not None and sequence == anchor[0] and row[-1] != anchor[1]:
        return (
            f"row {sequence} of the history is not the anchor's: it or one before was altered, and the chain made anew"
        )
    return ""


# A record is a set of (kind, name, field, value), empty values left out.  Each has a weight, a number that nobody can
# foresee; a row of history takes those of the old values away and adds those of the new.  What is left must be the
# weights of the records.  So no record is kept in memory, only a sum for each of a number of buckets of names; where it
# is not 0, the records of the bucket are followed in full.


def _scale() -> Callable[[tuple[str, str, str, Any]], int]:
    """What weighs, with a key of its own.  Not Python's hash: that of n is also that of n + 2^61 - 1."""
    keyed = blake2b(key=os.urandom(32), digest_size=16)

    def weigh(part: tuple[str, str, str, Any]) -> int:
        digest = keyed.copy()
        digest.update(_pack(part))
        return int.from_bytes(digest.digest(), "little")

    return weigh


def _bucket(kind: str, name: str) -> int:
    return hash((kind, name)) % _BUCKETS


def _told(row: tuple[Any, ...]) -> tuple[str, str, list[tuple[str, Any, Any]]]:
    """Kind, name, and the fields that a row of history changes, each with old and new."""
    changes: dict[str, tuple[_Value, _Value]]
    try:
        changes = _unpack_changes(row[9])
    except msgspec.DecodeError:
        changes = {"changes": (None, "unreadable")}  # no record has such a field, so the comparison finds it
    fields: list[tuple[str, Any, Any]] = [(field, old, new) for field, (old, new) in changes.items()]
    fields.append(("last", row[10], row[0]))
    return row[6], row[7], fields


def _weights(
    weigh: Callable[[tuple[str, str, str, Any]], int], kind: str, name: str, fields: Iterable[tuple[str, Any, Any]]
) -> Iterator[int]:
    for field, old, new in fields:
        if old:
            yield -weigh((kind, name, field, 1 if old is True else old))  # as it stands in the record's row
        if new:
            yield weigh((kind, name, field, 1 if new is True else new))


def _records(connection: sqlite3.Connection) -> Iterator[tuple[str, str, list[tuple[str, Any, Any]]]]:
    """All records, and the ends of those that were deleted, as if each had been made by one row of history."""
    for table in TABLES.values():
        fields = (*table.fields, "last")
        columns = f"SELECT name, {', '.join(fields)} FROM {table.name}"  # noqa: S608 - names of ours alone
        for name, *values in connection.execute(columns):
            pairs = zip(fields, values, strict=True)
            shown = [(field, None, fingerprint(value) if field == SECRET else value) for field, value in pairs]
            yield table.name, name, shown
    for kind, name, last in connection.execute("SELECT kind, name, last FROM deleted"):
        yield kind, name, [("last", None, last)]


def _contradiction(connection: sqlite3.Connection, buckets: frozenset[int]) -> tuple[int, str]:
    """The first row that does not go on from those before it; else, of the records that differ, the one whose last row
    comes first."""
    told: dict[tuple[str, str], dict[str, Any]] = {}
    for row in connection.execute("SELECT * FROM history ORDER BY sequence"):
        if _bucket(row[6], row[7]) not in buckets:
            continue
        kind, name, fields = _told(row)
        record = told.setdefault((kind, name), {})
        for field, old, new in fields:
            if (record.get(field) or None) != (old or None):
                was = f"{_shown(old)}, but by the rows before it was {_shown(record.get(field))}"
                return row[0], f"row {row[0]} of the history says that {field} of {kind} {name} was {was}"
            record[field] = new
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for kind, name, fields in _records(connection):
        if _bucket(kind, name) in buckets:
            found.setdefault((kind, name), {}).update({field: value for field, _, value in fields})
    for key in sorted(told.keys() | found.keys(), key=lambda key: (told.get(key, {}).get("last", 0), key)):
        by_history, stored = told.get(key, {}), found.get(key, {})
        for field in sorted(by_history.keys() | stored.keys()):
            if (by_history.get(field) or None) != (stored.get(field) or None):
                values = f"{_shown(stored.get(field))}, but {_shown(by_history.get(field))} by the history"
                return by_history.get("last", 0), f"{' '.join(key)} was altered: {field} is {values}"
    return 0, "the records are not those of the history"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Backup
# ---------------------------------------------------------------------------------------------------------------------


def backup(path: Path, target: Path) -> Head:
    """Copy the catalogue as it is at one moment into a new file (0600); the head of the chain in the copy.

    Under the name `target` stands the whole copy or nothing.  StoreError: it cannot be made, or something is there.
    """
    part = target.with_name(target.name + ".part")
    if os.path.lexists(target):
        raise StoreError(f"{target}: it is there already: give another name, or remove it")
    with closing(_open_to_read(path)) as source:
        try:
            os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            with closing(connect(part, lambda copy, _: source.backup(copy))) as copy:
                copy.execute("PRAGMA journal_mode = DELETE").fetchall()  # one file, which can be moved as it is
                head = read_head(copy)
            part.rename(target)
            sync_directory(target.parent)
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else explain(error)
            raise StoreError(f"{target}: no backup was made: {reason}") from error
        finally:
            with suppress(OSError):
                part.unlink()
    return head


def _open_to_read(path: Path) -> sqlite3.Connection:
    """A connection that cannot write.  StoreError: no file of ours, or one that cannot be read."""
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file")
    # A file that nobody has open needs no lock; where its directory cannot be written none could be taken.
    alone = not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()
    return connect(path, _check_tables, "mode=ro&immutable=1" if alone else "mode=ro")


def _check_tables(connection: sqlite3.Connection, path: Path) -> None:
    if check_version(connection, path) != len(MIGRATIONS):
        raise StoreError(f"{path}: its tables are not those of this tt: start the server with it once")
