"""The catalogue in a running server: opened, watched by the loop, told of the clock, closed.

Rules: the store comes first and goes last; what hashes passwords ends before what its results would change.  The head
of the chain of custody goes to the log at the start, at the end, and hourly where it has moved.
Must not know what an operation does, nor what a frame is.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from tt import log
from tt.catalog.accounts import HOST, Accounts
from tt.catalog.model import Customer, User
from tt.catalog.operations import Catalog
from tt.catalog.passwords import Passwords
from tt.catalog.store import Store, StoreError
from tt.config import Config
from tt.dispatch import Operation, Session
from tt.pending import Later

FILE = "tapetrack.db"  # in the data directory
HEAD_INTERVAL = 3600.0  # s between two words about the head


class Loop(Protocol):
    """What watches descriptors: tt._core.Server."""

    def watch(self, fd: int, watcher: Callable[[bool, bool], None], /) -> None: ...

    def unwatch(self, fd: int, /) -> None: ...


class Service:
    """All calls are the loop's thread.  Raises StoreError where the catalogue cannot be opened."""

    def __init__(self, data: Path, settings: Config, vouch: Callable[[str], None]) -> None:
        with ExitStack() as undo, _threads_that_start(data):
            self._store = Store(data / FILE, cache=settings.cached_volumes)
            undo.callback(self._store.close)
            self._passwords = Passwords(queue=settings.password_queue)
            undo.callback(self._passwords.close)
            self._accounts = Accounts(self._store, self._passwords, data, settings, vouch)
            undo.callback(self._accounts.close)
            self._accounts.first()
            undo.pop_all()
        self._loop: Loop | None = None
        self._said: int = -1  # the sequence number that the log has
        self._say_at = 0.0
        self.operations: Mapping[str, Operation] = Catalog(self._store, self._accounts).operations()

    def start(self, loop: Loop) -> None:
        """The loop that calls from here on."""
        self._loop = loop
        for part in (self._store, self._passwords, self._accounts):
            loop.watch(part.descriptor, _turn_of(part))

    def configure(self, settings: Config) -> None:
        """Take a new configuration."""
        self._accounts.configure(settings)

    def ended(self, session: Session) -> None:
        """A session that had logged in is over."""
        self._accounts.ended(session)

    def reset(self, user: str) -> Later:
        """A new one-time password for a user, asked for on this host.  Raises OperationError."""
        return self._accounts.reset(user, HOST)

    def tick(self, now: float) -> None:
        """About once a second; monotonic seconds."""
        if now >= self._say_at:
            self._say_at = now + HEAD_INTERVAL
            self._say_head()

    def _say_head(self) -> None:
        if self._store.sequence != self._said:
            self._said = self._store.sequence
            log.event(logging.INFO, "head of the history", sequence=self._said, hash=self._store.hash.hex())

    def status(self) -> dict[str, Any]:
        """Counts for `tt status` and the metrics."""
        store = self._store
        return {
            "customers": store.number(Customer),
            "volumes": store.count(),
            "moving": store.moving,
            "users": store.number(User),
            "sessions": self._accounts.sessions(),
            "history": store.sequence,
            "commits": store.commits,
            "commit_failures": store.commit_failures,
            "commit_seconds": store.durations.sum,
            "commit_seconds_max": store.durations.longest(time.monotonic()),
            "commit_buckets": store.durations.buckets(),
        }

    def close(self) -> None:
        """After the loop has ended."""
        for part in (self._passwords, self._accounts, self._store):
            if self._loop is not None:
                self._loop.unwatch(part.descriptor)
            part.close()
        self._say_head()


@contextmanager
def _threads_that_start(data: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # threading's word
        remedy = "raise the limit of tasks (ulimit -u, TasksMax)"
        raise StoreError(f"{data / FILE}: no thread can be had to commit and to hash: {remedy}") from error


def _turn_of(part: "Store | Passwords | Accounts") -> Callable[[bool, bool], None]:
    return lambda _readable, _writable: part.turn()
