"""Who is logged in now: the sessions, by the number that administrators see, and what a change of a user does to them.

Must not know what was changed, nor what a session may do.
"""

import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import NamedTuple

from tt.catalog.rights import Rights
from tt.catalog.store import Change
from tt.dispatch import Session

ENDED = "logged_out"  # one of tt._core.REASONS


class Entry(NamedTuple):
    """A session that has logged in."""

    id: int
    session: Session
    since: int  # seconds since 1970 UTC


class Sessions:
    """Sessions from their login to their end."""

    def __init__(self, rights: Rights) -> None:
        self._rights = rights
        self._numbers = count(1)  # never used twice: what was listed a while ago means no other
        self._by_id: dict[int, Entry] = {}
        self._ids: dict[Session, int] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Entry]:
        """Oldest first; of those that are there now, and so while some are added or removed."""
        return iter(list(self._by_id.values()))

    def add(self, session: Session) -> None:
        number = next(self._numbers)
        self._by_id[number] = Entry(number, session, int(time.time()))
        self._ids[session] = number

    def remove(self, session: Session) -> None:
        """Harmless where it is not there."""
        self._by_id.pop(self._ids.pop(session, 0), None)

    def find(self, number: int) -> Session | None:
        entry = self._by_id.get(number)
        return entry and entry.session

    def when_stored(self, change: Change, ends: Callable[[Session], bool] = lambda _: False) -> None:
        """Once the change is committed, rights are asked anew, and the sessions end of which `ends` is true."""

        def stored() -> None:
            if change.pending.error is None:
                self._rights.changed()
                for entry in self:
                    if ends(entry.session):
                        entry.session.close(ENDED)

        change.pending.when_done(stored)
