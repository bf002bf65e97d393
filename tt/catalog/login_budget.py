"""What failed logins cost: how many a source has before its time-out, and how long the answer to each is held back.

A failed login counts for its source and for the name as sent.  The more of them, the longer the answer is held back:
0.25 s, 0.5 s, ... up to a limit; a right password is never held back, so that nobody can lock another out.  Failed
pairs of name and password are told apart, and only different ones lead to a time-out: a script with an old password is
no attack.  A good login ends its source's failures of its own name, not of others: who has an account guesses no more
freely than who has none.  For a day after it, failures elsewhere of that name do not delay answers to that source.
Rules: every table is bounded, and who failed longest ago gives way; names and passwords are kept as keyed digests.
Must not know users, sessions, or how a password is checked.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, NamedTuple, Protocol, TypeVar

from tt.config import DAY

PLACES = 16_384  # sources, and names, that are remembered
FIRST_DELAY = 0.25  # s
VOUCHED = DAY  # s that a good login vouches for its source

V = TypeVar("V")


class Settings(Protocol):
    """Of tt/config.py."""

    @property
    def login_failures(self) -> int: ...

    @property
    def login_window(self) -> float: ...

    @property
    def login_delay(self) -> float: ...


class _Recent(Generic[V]):
    """The newest entries of at most PLACES keys."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str | bytes, tuple[float, V]] = OrderedDict()

    def get(self, key: str | bytes, since: float) -> V | None:
        """What was put since then."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] > since else None

    def put(self, key: str | bytes, now: float, value: V) -> None:
        self._entries[key] = now, value
        self._entries.move_to_end(key)
        if len(self._entries) > PLACES:
            self._entries.popitem(last=False)

    def remove(self, key: str | bytes) -> None:
        self._entries.pop(key, None)


class _Pair(NamedTuple):
    """A name and a password that failed."""

    name: bytes
    last: float  # when
    times: int


class _Failures:
    """Of one source."""

    __slots__ = ("pairs", "rest")

    def __init__(self) -> None:
        self.pairs: dict[bytes, _Pair] = {}
        self.rest = 0  # failures of the pairs that led to a time-out

    @property
    def count(self) -> int:
        return self.rest + sum(pair.times for pair in self.pairs.values())


class LoginBudget:
    """Counts failed logins; `clock` gives monotonic seconds."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self.settings = settings
        self._clock = clock
        self._key = os.urandom(32)
        self._sources: _Recent[_Failures] = _Recent()
        self._names: _Recent[int] = _Recent()
        self._vouched: _Recent[bool] = _Recent()  # sources
        self._owners: _Recent[bool] = _Recent()  # pairs of source and name

    def succeeded(self, source: str, name: str) -> None:
        now, key = self._clock(), self._digest(name)
        failures = self._sources.get(source, now - self.settings.login_window)
        if failures is not None:
            failures.pairs = {digest: pair for digest, pair in failures.pairs.items() if pair.name != key}
            if not failures.count:
                self._sources.remove(source)
        self._vouched.put(source, now, value=True)
        self._owners.put(self._digest(source, name), now, value=True)

    def vouched(self, source: str) -> bool:
        """Whether it had a good login within a day."""
        return self._vouched.get(source, self._clock() - VOUCHED) is not None

    def failed(self, source: str, name: str, password: str) -> float:
        """Counts it; how long its answer is to be held back, s."""
        now, since = self._clock(), self._clock() - self.settings.login_window
        failures = self._sources.get(source, since) or _Failures()
        failures.pairs = {digest: pair for digest, pair in failures.pairs.items() if pair.last > since}
        key, digest = self._digest(name), self._digest(name, password)
        before = failures.pairs.get(digest)
        failures.pairs[digest] = _Pair(key, now, before.times + 1 if before is not None else 1)
        self._sources.put(source, now, failures)
        of_name = (self._names.get(key, since) or 0) + 1
        self._names.put(key, now, of_name)
        owner = self._owners.get(self._digest(source, name), now - VOUCHED) is not None
        worst = failures.count if owner else max(failures.count, of_name)
        return min(FIRST_DELAY * 2.0 ** min(worst - 1, 30), self.settings.login_delay)

    def used_up(self, source: str) -> bool:
        """Whether so many different pairs failed that its time-out is due; said once, and it begins anew."""
        since = self._clock() - self.settings.login_window
        failures = self._sources.get(source, since)
        if failures is None:
            return False
        if sum(pair.last > since for pair in failures.pairs.values()) < self.settings.login_failures:
            return False
        failures.rest = failures.count
        failures.pairs.clear()
        return True

    def _digest(self, *texts: str) -> bytes:
        digest = blake2b(key=self._key, digest_size=16)
        for text in texts:
            part = text.encode()
            digest.update(len(part).to_bytes(4, "big") + part)
        return digest.digest()
