"""What failed logins cost: how many a source has before its time-out, and how long the answer to each is held back.

A failed login counts for its source and for the name as sent.  The more of them, the longer the answer is held back:
0.25 s, 0.5 s, ... up to a limit; a right password is never held back, so that nobody can lock another out.  Failed
pairs of name and password are told apart, and only different ones lead to a time-out: a script with an old password is
no attack.  A source with a good login within a day is vouched for: failures elsewhere of the same name leave it alone.
Rules: every table is bounded, and who failed longest ago gives way; names and passwords are kept as keyed digests.
Must not know users, sessions, or how a password is checked.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, Protocol, TypeVar

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


class _Failures:
    """Of one source."""

    __slots__ = ("count", "pairs")

    def __init__(self) -> None:
        self.count = 0
        self.pairs: dict[bytes, float] = {}  # when each failed last


class LoginBudget:
    """Counts failed logins; `clock` gives monotonic seconds."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self.settings = settings
        self._clock = clock
        self._key = os.urandom(32)
        self._sources: _Recent[_Failures] = _Recent()
        self._names: _Recent[int] = _Recent()
        self._vouched: _Recent[bool] = _Recent()

    def succeeded(self, source: str) -> None:
        self._sources.remove(source)
        self._vouched.put(source, self._clock(), value=True)

    def vouched(self, source: str) -> bool:
        """Whether it had a good login within a day."""
        return self._vouched.get(source, self._clock() - VOUCHED) is not None

    def failed(self, source: str, name: str, password: str) -> float:
        """Counts it; how long its answer is to be held back, s."""
        now, since = self._clock(), self._clock() - self.settings.login_window
        failures = self._sources.get(source, since) or _Failures()
        failures.count += 1
        failures.pairs = {pair: last for pair, last in failures.pairs.items() if last > since}
        failures.pairs[self._digest(name, password)] = now
        self._sources.put(source, now, failures)
        key = self._digest(name)
        of_name = (self._names.get(key, since) or 0) + 1
        self._names.put(key, now, of_name)
        worst = failures.count if self.vouched(source) else max(failures.count, of_name)
        return min(FIRST_DELAY * 2.0 ** min(worst - 1, 30), self.settings.login_delay)

    def used_up(self, source: str) -> bool:
        """Whether so many different pairs failed that its time-out is due; said once, and it begins anew."""
        since = self._clock() - self.settings.login_window
        failures = self._sources.get(source, since)
        if failures is None or sum(last > since for last in failures.pairs.values()) < self.settings.login_failures:
            return False
        failures.pairs.clear()
        return True

    def _digest(self, *texts: str) -> bytes:
        digest = blake2b(key=self._key, digest_size=16)
        for text in texts:
            part = text.encode()
            digest.update(len(part).to_bytes(4, "big") + part)
        return digest.digest()
