"""Accounts for the tests: a catalogue with users who have passwords, a cheap hasher, sessions from anywhere."""

import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from catalog_kit import AUTHOR, Desk, Seat
from harness import PATIENCE
from msgspec.structs import replace

from tt import config
from tt.catalog import passwords
from tt.catalog.accounts import Accounts
from tt.catalog.messages import ERRORS
from tt.catalog.model import SUPERUSER, User
from tt.catalog.operations import Catalog
from tt.catalog.passwords import Cost, Passwords, hash_password
from tt.catalog.store import Store
from tt.pending import Pending

CHEAP = Cost(4, 1, 1)
WORD = "right horse"
HASH = hash_password(WORD, CHEAP)
REFUSED = "login", ERRORS["login"]


class Guest(Seat):
    """A session that may end while it logs in."""

    @property
    def closing(self) -> bool:
        return bool(self.closed_for)


class House(Desk):
    """A catalogue with users who have passwords, a hasher that is cheap, and seats from any source."""

    def __init__(self, data: Path, *, empty: bool = False, real_time: bool = False, **options: Any) -> None:
        self._own = None
        self.now = self.tick = 1_795_435_200.0
        self.data = data
        self.vouched: list[str] = []
        settings = config.load(None, {}, {"data": str(data), **options})
        self.store = Store(data / "tapetrack.db", clock=lambda: self.now)
        self.passwords = Passwords(queue=settings.password_queue, cost=CHEAP)
        clock = time.monotonic if real_time else lambda: self.tick
        self.accounts = Accounts(self.store, self.passwords, data, settings, self.vouched.append, clock)
        self.operations = Catalog(self.store, self.accounts, lambda: self.now).operations()
        self.seats: dict[str, Seat] = {}
        if not empty:
            self.put(
                User("jsmith", password=HASH),
                User("boss", password=HASH, administrator=True),
                User(SUPERUSER, password=HASH, administrator=True),
                User("gone", password=HASH, disabled=True),
                User("abroad", password=HASH, networks="192.0.2.0/24 2001:db8::/32"),
                User("nobody"),
            )

    def come(self, seat: str, source: str = "127.0.0.2", interface: str = "tests") -> Seat:
        """A session before its login, by a name of the test's."""
        self.seats[seat] = Guest("", interface)
        self.seats[seat].source = self.seats[seat].address = source
        return self.seats[seat]

    def log_in(self, user: str, password: str = WORD, source: str = "127.0.0.2") -> Seat:
        """A session that is logged in, of the user's name; fails where he is not let in."""
        seat = self.come(user, source)
        self.ask(user, "login", user=user, password=password)
        return seat

    def try_login(self, user: str, password: str, source: str = "127.0.0.2") -> tuple[str, str]:
        """The error that a login of a new session gets; no delay is waited for."""
        self.come("stranger", source)
        return self.error("stranger", "login", user=user, password=password)

    def end(self, seat: Seat) -> None:
        """What the dispatcher does at the end of a session that had an account."""
        self.accounts.ended(seat)

    def listed(self) -> list[tuple[str, str]]:
        """Who is logged in, from where."""
        return [(entry.user, entry.source) for entry in self.ask("boss", "session.list").entries]

    def changed(self, name: str, **fields: Any) -> User:
        """The user's record with other fields, to be put."""
        user = self.store.get(User, name)
        assert user is not None
        return replace(user, **fields)

    def commit(self) -> Pending:
        """A commit of something, not yet under way."""
        with self.store.change(AUTHOR) as change:
            change.put(change.get(User, "nobody"), "change")
        return change.pending

    def hash(self, pending: Pending) -> None:
        """Wait for a password, while the store stands still."""
        while not pending.done:
            assert select.select([self.passwords.descriptor], [], [], PATIENCE)[0]
            self.passwords.turn()


class Gate:
    """Every hash waits until the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.free = threading.Event()
        derive = passwords._derive

        def wait(word: str, cost: Cost, salt: bytes) -> bytes:
            self.begun.append(word)
            assert self.free.wait(PATIENCE)
            return derive(word, cost, salt)

        monkeypatch.setattr(passwords, "_derive", wait)


@contextmanager
def building(place: Path) -> Iterator[Callable[..., House]]:
    """Makes houses, in which no answer is held back unless a test says so."""
    with ExitStack() as houses:
        count = 0

        def make(**options: Any) -> House:
            nonlocal count
            count += 1
            data = place / f"house{count}"
            data.mkdir()
            return houses.enter_context(House(data, **({"login_delay": "0 s"} | options)))

        yield make
