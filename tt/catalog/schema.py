"""The tables of the catalogue's file, how an older file becomes a newer one, and how a connection to it is opened.

    customer media repository volume user access certificate    one a kind of record (catalog/model.py), by row id
    history                                                     the chain of custody: never changed, never deleted from
    deleted                                                     where the history of a record that is gone ends

A Volume's row also has `media`, the row of its Media type, so that its indexes are short and tell Media types apart.
Rules: a step of MIGRATIONS that has been released is never edited; a file is opened whole or refused with one line
that names it.  Must not know what is written when.
"""

import errno
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from tt.catalog.model import Access, Certificate, Customer, Media, Record, Repository, User, Volume

APPLICATION_ID = 0x54544442  # "TTDB", in the file's header: the catalogue of tt
CACHE = 64 << 10  # KiB of pages a connection: so much a transaction may change before it is written early
CHECKPOINT = 4000  # pages of the write-ahead log, after which a COMMIT copies them into the file
WAL_LIMIT = 64 << 20  # bytes to which the log is cut when it starts again


class StoreError(Exception):
    """The catalogue's file cannot be used, or a change could not be stored; one line that says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Records as rows
# ---------------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Where records of one kind are."""

    kind: type
    name: str  # of the table, and `kind` in the history
    fields: tuple[str, ...]  # whose changes are history: all but name, row and last
    columns: Callable[[Any], tuple[Any, ...]]  # of a record: its name, and its values in the order of `fields`
    select: str  # all columns in the order of the record's fields; a condition can follow
    insert: str
    booleans: tuple[int, ...]  # which of the selected columns, 0 and 1 in the file, are bool

    def record(self, columns: Sequence[Any]) -> Any:
        """The record that a selected row stands for."""
        if self.booleans:
            columns = [bool(value) if at in self.booleans else value for at, value in enumerate(columns)]
        return self.kind(*columns)


def _table(kind: type) -> Table:
    name = kind.__name__.lower()
    every: tuple[str, ...] = kind.__struct_fields__  # type: ignore[attr-defined]
    fields = tuple(field for field in every if field not in ("name", "row", "last"))
    into = ("name", *fields, "last", *(["media"] if kind is Volume else []))
    return Table(
        kind,
        name,
        fields,
        attrgetter("name", *fields),
        f"SELECT {', '.join(every)} FROM {name}",  # noqa: S608 - names of ours alone
        f"INSERT INTO {name} ({', '.join(into)}) VALUES ({', '.join('?' * len(into))})",  # noqa: S608
        tuple(at for at, field in enumerate(every) if kind.__annotations__[field] is bool),
    )


TABLES: dict[type, Table] = {
    kind: _table(kind) for kind in (Customer, Media, Repository, Volume, User, Access, Certificate)
}
SECRET = "password"  # noqa: S105 - the field of which only fingerprints stand in the history


def changed(table: Table, old: Record | None, new: Record | None) -> dict[str, tuple[Any, Any]]:
    """What the history says of a change: field -> old and new.

    Of a record that is added or deleted, None stands for what was or will not be, and empty fields are left out.  For
    a password stands its fingerprint.
    """
    changes: dict[str, tuple[Any, Any]]
    if old is None or new is None:
        values = zip(table.fields, table.columns(new or old)[1:], strict=True)
        changes = {field: (value, None) if new is None else (None, value) for field, value in values if value}
    else:
        pairs = zip(("name", *table.fields), table.columns(old), table.columns(new), strict=True)
        changes = {field: (was, now) for field, was, now in pairs if was != now}
    if SECRET in changes:
        was, now = changes[SECRET]
        changes[SECRET] = (was and fingerprint(was), now and fingerprint(now))
    return changes


def fingerprint(password: str) -> str:
    """What the history shows of a password, which is an Argon2 hash with its salt: the first 16 hex digits of SHA-256.

    A hash that was put in another's place no longer fits; without the salt nobody can try passwords on it.
    """
    return sha256(password.encode()).hexdigest()[:16] if password else ""


# ---------------------------------------------------------------------------------------------------------------------
# The schema, version by version
# ---------------------------------------------------------------------------------------------------------------------

# Element n makes version n + 1 of version n: statements, all of them in one transaction.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        f"PRAGMA application_id = {APPLICATION_ID}",
        """CREATE TABLE customer (
            row INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, description TEXT NOT NULL, last INTEGER NOT NULL
        ) STRICT""",
        """CREATE TABLE media (
            row INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, description TEXT NOT NULL,
            max_volumes INTEGER NOT NULL, last INTEGER NOT NULL
        ) STRICT""",
        """CREATE TABLE repository (
            row INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, description TEXT NOT NULL, kind TEXT NOT NULL,
            offsite INTEGER NOT NULL, next TEXT NOT NULL, allow_deletes INTEGER NOT NULL, last INTEGER NOT NULL
        ) STRICT""",
        """CREATE TABLE volume (
            row INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, media INTEGER NOT NULL, current TEXT NOT NULL,
            target TEXT NOT NULL, scanned TEXT NOT NULL, flags TEXT NOT NULL, move_date TEXT NOT NULL,
            requested INTEGER NOT NULL, description TEXT NOT NULL, last INTEGER NOT NULL
        ) STRICT""",
        "CREATE INDEX volume_current ON volume (media, current, name)",
        # Partial: few Volumes move at a time, so these stay small, and a Volume that rests costs them nothing.
        "CREATE INDEX volume_target ON volume (media, target, name) WHERE target <> ''",
        "CREATE INDEX volume_moving ON volume (name) WHERE target <> ''",
        """CREATE TABLE user (
            row INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, description TEXT NOT NULL, password TEXT NOT NULL,
            administrator INTEGER NOT NULL, disabled INTEGER NOT NULL, must_change INTEGER NOT NULL,
            networks TEXT NOT NULL, last INTEGER NOT NULL
        ) STRICT""",
        """CREATE TABLE access (
            row INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, level INTEGER NOT NULL, catalog INTEGER NOT NULL,
            last INTEGER NOT NULL
        ) STRICT""",
        """CREATE TABLE certificate (
            row INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, user TEXT NOT NULL, correct INTEGER NOT NULL,
            surplus TEXT NOT NULL, deficit TEXT NOT NULL, last INTEGER NOT NULL
        ) STRICT""",
        # No index but its key: a record's rows are found through `previous`, which keeps a write cheap.
        """CREATE TABLE history (
            sequence INTEGER PRIMARY KEY, time INTEGER NOT NULL, user TEXT NOT NULL, interface TEXT NOT NULL,
            source TEXT NOT NULL, event TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, place TEXT NOT NULL,
            changes TEXT NOT NULL, previous INTEGER NOT NULL, hash BLOB NOT NULL
        ) STRICT""",
        """CREATE TRIGGER history_no_update BEFORE UPDATE ON history
            BEGIN SELECT RAISE(ABORT, 'history is never changed'); END""",
        """CREATE TRIGGER history_no_delete BEFORE DELETE ON history
            BEGIN SELECT RAISE(ABORT, 'history is never deleted'); END""",
        """CREATE TABLE deleted (
            kind TEXT NOT NULL, name TEXT NOT NULL, last INTEGER NOT NULL, PRIMARY KEY (kind, name)
        ) STRICT, WITHOUT ROWID""",
    ),
)


def migrate(connection: sqlite3.Connection, path: Path, steps: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Bring the file to version len(steps): all of the steps that it lacks, or none.

    StoreError: it is newer, or no file of ours.  sqlite3.Error: it is damaged, or cannot be written.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = check_version(connection, path, newest=len(steps))
        for statements in steps[version:]:
            for statement in statements:
                connection.execute(statement)
        # Also where there was nothing to do: BEGIN IMMEDIATE alone succeeds on a file that can only be read.
        connection.execute(f"PRAGMA user_version = {len(steps)}")
        connection.execute("ROLLBACK" if version == len(steps) else "COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def check_version(connection: sqlite3.Connection, path: Path, *, newest: int = len(MIGRATIONS)) -> int:
    """The version of the file's schema, 0 where it is empty.  StoreError: it is newer, or no file of ours."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if not (application or version or objects):
        return 0
    if application != APPLICATION_ID or version < 1:
        raise StoreError(f"{path}: a database, but no tape catalogue: give another file")
    if version > newest:
        raise StoreError(f"{path}: its version is {version}, this tt reads up to {newest}: use a newer tt")
    return int(version)


def foreign_object(connection: sqlite3.Connection) -> str:
    """A table, index or trigger of the file that is not as MIGRATIONS make it, in one line; "": there is none."""
    query = "SELECT type, name, tbl_name, sql FROM sqlite_schema"
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as made:
        for statements in MIGRATIONS:
            for statement in statements:
                made.execute(statement)
        ours = {row[:2]: row for row in made.execute(query)}
    theirs = {row[:2]: row for row in connection.execute(query)}
    for kind, name in sorted(ours.keys() | theirs.keys()):
        if (kind, name) not in theirs:
            return f"{kind} {name} was removed from the catalogue"
        if (kind, name) not in ours:
            return f"{kind} {name} was added to the catalogue: it is none of tt's"
        if ours[kind, name] != theirs[kind, name]:
            return f"{kind} {name} of the catalogue was altered: it is not as tt makes it"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def open_to_write(path: Path) -> sqlite3.Connection:
    """The one connection that writes; the file is made (mode 0600) where there is none.  StoreError: it cannot be.

    A COMMIT returns when the disk has it (WAL, synchronous=FULL).  Checked are the header, the version, the schema and
    that a transaction can begin; damage inside is met where it is read, and looked for by `tt verify`.
    """
    try:
        # Not made by SQLite, which would take the umask's mode.  Never opened by us where it is there: closing any
        # descriptor of it drops all POSIX locks that this process has on it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}: {_REMEDY.get(error.errno or 0, _WRITABLE)}") from error
    return connect(path, _prepare)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    check_version(connection, path)  # before the first change to what may be no file of ours
    connection.execute("PRAGMA journal_mode = WAL").fetchone()
    migrate(connection, path)


def connect(
    path: Path, prepare: Callable[[sqlite3.Connection, Path], object], parameters: str = "mode=rw"
) -> sqlite3.Connection:
    """A connection on which statements run as they are given, each its own transaction unless BEGIN says otherwise.

    It is given to `prepare` first.  StoreError: the file cannot be opened, or `prepare` raised that or a sqlite3.Error.
    """
    try:
        with ExitStack() as undo:
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?{parameters}",
                uri=True,
                timeout=0,  # to wait for another's lock would stop the loop
                isolation_level=None,
                check_same_thread=False,  # COMMIT runs in a thread
                cached_statements=512,  # an UPDATE for each set of fields that change together, and the few others
            )
            undo.callback(connection.close)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA cache_size = -{CACHE}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT}").fetchone()
            connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}").fetchone()
            connection.execute("PRAGMA temp_store = MEMORY")  # else what a SAVEPOINT keeps may go to a file in /tmp
            connection.execute("PRAGMA trusted_schema = OFF")
            prepare(connection, path)
            undo.pop_all()
            return connection
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {explain(error)}") from error


_WRITABLE = "it must be a file, which can be written like its directory"
_REMEDY = {
    errno.ENOENT: "make the directory",
    errno.ENOSPC: "free some space",
    errno.EROFS: "mount it writable",
}
_EXPLAINED = {
    "SQLITE_BUSY": "another program is writing to the catalogue: end it",
    "SQLITE_CANTOPEN": f"the catalogue cannot be opened: {_WRITABLE}",
    "SQLITE_CONSTRAINT": "another program has written to the catalogue: restart the server",
    "SQLITE_CORRUPT": "the catalogue is damaged: restore a backup",
    "SQLITE_FULL": "the disk of the catalogue is full: free some space",
    "SQLITE_IOERR": "the disk of the catalogue fails: see the kernel's log",
    "SQLITE_NOTADB": "no tape catalogue, or a damaged one: give another file, or restore a backup",
    "SQLITE_READONLY": f"the catalogue is read-only: {_WRITABLE}",
}


def explain(error: Exception) -> str:
    """What an error of SQLite means, in one line that names no file."""
    if isinstance(error, MemoryError):
        return "the server is out of memory: again later"
    name = getattr(error, "sqlite_errorname", "") or ""
    primary = "_".join(name.split("_")[:2])
    detail = " ".join(str(error).split())
    return f"{_EXPLAINED[primary]} ({detail}, {name})" if primary in _EXPLAINED else f"{detail} ({name or 'SQLite'})"
