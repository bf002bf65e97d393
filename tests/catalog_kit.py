"""A catalogue without a server for the tests: a real store and its operations, asked by users who need no password.

`Desk.ask` does what the dispatcher does with one operation: steps, waits, gives the result.  The clock stands still
until a test moves it.
"""

import select
import tempfile
from pathlib import Path
from types import GeneratorType, SimpleNamespace
from typing import Any

import msgspec

from tt import config
from tt.catalog.accounts import Accounts
from tt.catalog.messages import OPERATIONS
from tt.catalog.model import ALTER, READ, WRITE, Access, Customer, Media, Repository, User, Volume
from tt.catalog.operations import Catalog
from tt.catalog.passwords import Passwords
from tt.catalog.rights import ANSWERED, Account, told
from tt.catalog.store import Author, Store
from tt.pending import Later, Pending

NOON = 1_795_435_200.0  # 2026-11-23 12:00 UTC
TODAY, TOMORROW, YESTERDAY = "2026-11-23", "2026-11-24", "2026-11-22"
AUTHOR = Author("tests", "pytest", "127.0.0.1")
PATIENCE = 10.0  # s
# What every operation may be answered with, whatever the table says.
OF_EVERY = ("login_first", "password_change_first", "malformed", "storage", "unknown_operation")

DAY = 86_400  # s
A = "US01.LTO.A00001"
LIBR, VLT1, RACK = "US01.LTO.LIBR", "US01.LTO.VLT1", "US01.LTO.RACK"

# What there is, before a test adds to it.
STRUCTURE = (
    Customer("US01", "one"),
    Customer("US02", "another"),
    Media("US01.LTO"),
    Media("US01.DLT"),
    Media("US02.LTO"),
    Repository("US01.LTO.LIBR", "library", kind="library", next="VLT1", allow_deletes=True),
    Repository("US01.LTO.VLT1", "vault", kind="vault", offsite=True),
    Repository("US01.LTO.RACK", "rack"),
    Repository("US01.DLT.LIBR"),
    Repository("US02.LTO.LIBR", allow_deletes=True),
)
# A user of each kind: his record, and his level and catalog for US01.
KINDS: dict[str, tuple[dict[str, bool], int, bool]] = {
    "none": ({}, 0, False),
    "read": ({}, READ, False),
    "write": ({}, WRITE, False),
    "alter": ({}, ALTER, False),
    "catalog": ({}, 0, True),
    "administrator": ({"administrator": True}, 0, False),
    "tapemaster": ({}, 0, False),
    "must-change": ({"must_change": True}, ALTER, True),
}


class Seat:
    """A session, as far as operations use it."""

    def __init__(self, user: str, interface: str = "tests") -> None:
        self.account = Account(user) if user else None
        self.hello = SimpleNamespace(name=interface)
        self.source = self.address = "127.0.0.2"
        self.requests = 0
        self.closed_for = ""

    def log_in(self) -> None:
        """Nothing of the transport's is here."""

    def close(self, reason: str) -> None:
        self.closed_for = reason


class Desk:
    """A catalogue with STRUCTURE and the users of KINDS; use it in a `with` statement."""

    def __init__(self, data: Path | None = None) -> None:
        self._own = None if data else tempfile.TemporaryDirectory()
        data = data or Path(self._own.name)
        self.now = NOON
        settings = config.load(None, {}, {"data": str(data)})
        self.store = Store(data / "tapetrack.db", clock=lambda: self.now)
        self.passwords = Passwords()
        self.accounts = Accounts(self.store, self.passwords, data, settings, lambda _source: None)
        self.operations = Catalog(self.store, self.accounts, lambda: self.now).operations()
        self.seats: dict[str, Seat] = {}
        access = [Access(f"{name} US01", level, catalog) for name, (_, level, catalog) in KINDS.items()]
        self.put(*STRUCTURE, *(User(name, **options) for name, (options, _, _) in KINDS.items()), *access)

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, *_: object) -> None:
        self.passwords.close()
        self.accounts.close()
        self.store.close()
        if self._own:
            self._own.cleanup()

    # ---- the store --------------------------------------------------------------------------------------------------

    def put(self, *records: Any) -> None:
        """Write records as they are, past all rules."""
        with self.store.change(AUTHOR) as change:
            for record in records:
                change.put(record, "change" if record.row else "add")
        change.pending.when_done(self.accounts.rights.changed)
        self.wait(change.pending)

    def volume(self, name: str = A, **fields: Any) -> Volume:
        """The Volume, after its record was made or changed to have these fields, past all rules."""
        old = self.store.get(Volume, name)
        if old is None or fields:
            self.put(msgspec.structs.replace(old, **fields) if old else Volume(name, **{"current": "LIBR", **fields}))
        volume = self.store.get(Volume, name)
        assert volume is not None
        return volume

    def wait(self, pending: Pending) -> None:
        """Turn as the loop does, until it is done."""
        parts = {part.descriptor: part for part in (self.store, self.passwords, self.accounts)}
        while not pending.done:
            ready, _, _ = select.select(list(parts), [], [], PATIENCE)
            assert ready, f"waited {PATIENCE} s in vain"
            for descriptor in ready:
                parts[descriptor].turn()

    # ---- operations -------------------------------------------------------------------------------------------------

    def seat(self, user: str) -> Seat:
        """The session of a user, always the same; of nobody where the name is empty."""
        return self.seats.setdefault(user, Seat(user))

    def begin(self, user: str, operation: str, /, **arguments: Any) -> Any:
        """What the operation returns: a result, a Later or a generator.  Raises OperationError, msgspec's errors."""
        while self.store.busy is not None:
            self.wait(self.store.busy)
        return self.operations[operation](self.seat(user), msgspec.Raw(msgspec.msgpack.encode(arguments)))

    def finish(self, begun: Any) -> Any:
        """The result of that."""
        while isinstance(begun, GeneratorType):
            try:
                pending = next(begun)
            except StopIteration as end:
                begun = end.value
            else:
                if pending is not None:
                    self.wait(pending)
        if isinstance(begun, Later):
            self.wait(begun.pending)
            begun = begun.result()
        return begun

    def ask(self, user: str, operation: str, /, **arguments: Any) -> Any:
        """The result, as the struct that a client makes of it."""
        result = self.finish(self.begin(user, operation, **arguments))
        if isinstance(result, msgspec.Raw):
            return msgspec.msgpack.decode(result, type=OPERATIONS[operation].result)
        return result

    def error(self, user: str, operation: str, /, **arguments: Any) -> tuple[str, str]:
        """The code and the message of the error, both empty where there is none."""
        spec = OPERATIONS[operation]
        try:
            self.ask(user, operation, **arguments)
        except ANSWERED as error:
            code, message = told(error)
            promised = {*spec.errors, *OF_EVERY} | ({"denied"} if spec.right == "administrator" else set())
            assert code in promised, f"{operation} answered {code}, which the table does not say: {message}"
            return code, message
        return "", ""

    def code(self, user: str, operation: str, /, **arguments: Any) -> str:
        return self.error(user, operation, **arguments)[0]

    # ---- a Volume as users see it -----------------------------------------------------------------------------------

    def state(self, name: str = A) -> tuple[str, str, str, str]:
        """Where it is, where it is to go, where it was scanned, its letters."""
        shown = self.ask("tapemaster", "volume.get", volume=name)
        return shown.current, shown.target, shown.scanned, shown.flags

    def events(self, name: str = A) -> list[str]:
        """What its history says has happened, oldest first."""
        return [row.event for row in self.ask("tapemaster", "volume.history", volume=name).entries[::-1]]
