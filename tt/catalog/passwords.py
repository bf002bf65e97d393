"""Passwords: their hashes, and the thread beside the loop that works them out.

A hash is kept as text with its parameters, `$scrypt$ln=14,r=8,p=5$SALT$HASH` in base64, so that a later version can
ask for more work: who logs in with an older one gets a new one.
Rules: one thread at nice 10, a bounded queue, a few of a source at most, and sources served by turns.  The thread holds
the GIL only to take a job and to give it back: the work is `hashlib.scrypt`, which lets go of it; `cryptography` does
so in its newer versions alone.  Results come through an eventfd, and all but the work belongs to the loop's thread.
Must not know who logs in, what he may, or where hashes are kept.
"""

import hashlib
import os
import re
import secrets
import unicodedata
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from hmac import compare_digest
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, TypeVar

from tt.pending import Pending

K = TypeVar("K")
NICE = 10  # of the thread, added to the process's own
SALT = 16  # bytes
SIZE = 32  # bytes of a hash
SHARE = 8  # passwords of one source, waiting or in work, while the queue is not half full; one when it is
SHARE_OF_NAME = 4  # of these with one name: a script with an old password leaves places for its colleagues
CUT = 1024  # characters that are looked at: far more than a password may have, and a stranger may send a megabyte
# What a password given to be used once is made of: 16 of 32 letters that nobody takes for another, 80 bits.
LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"


class Cost(NamedTuple):
    """The parameters of scrypt (RFC 7914): N = 2^ln, r, p.  It takes 128 * r * N bytes, and goes over them p times."""

    ln: int
    r: int
    p: int


# 16 MiB; what OWASP's Password Storage Cheat Sheet asks for at the least memory, so that the hash leaves the loop its
# cache.  A quarter of a second on a small machine.
COST = Cost(14, 8, 5)
_TEXT = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]{22})\$([A-Za-z0-9+/]{43})")


class Busy(Exception):  # noqa: N818 - it is no failure
    """No place for another password just now."""


def one_time_password() -> str:
    """A password that somebody reads and types once: four groups of four."""
    return "-".join("".join(secrets.choice(LETTERS) for _ in range(4)) for _ in range(4))


def hash_password(password: str, cost: Cost = COST, salt: bytes = b"") -> str:
    """The text to keep; with a new salt, unless it is the password that had this one.

    Takes long: for the thread, and for who has no loop.  MemoryError.
    """
    salt = salt or os.urandom(SALT)
    return _text(cost, salt, _derive(password, cost, salt))


def same_password(one: str, other: str) -> bool:
    """Whether these texts are about one password, perhaps at different costs: every new password has a new salt."""
    first, second = _parse(one), _parse(other)
    return first is not None and second is not None and first[1] == second[1]


def _text(cost: Cost, salt: bytes, key: bytes) -> str:
    salt_text, key_text = (b64encode(part).decode().rstrip("=") for part in (salt, key))
    return f"$scrypt$ln={cost.ln},r={cost.r},p={cost.p}${salt_text}${key_text}"


def _parse(text: str) -> tuple[Cost, bytes, bytes] | None:
    """The parameters, the salt and the hash; None where it is no such text."""
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    salt, key = (b64decode(match[group] + "==") for group in (4, 5))  # what is too much of "=" is ignored
    return Cost(int(match[1]), int(match[2]), int(match[3])), salt, key


def _derive(password: str, cost: Cost, salt: bytes) -> bytes:
    # NFC (RFC 8265, OpaqueString): one keyboard's letter with an accent is another's letter and accent.
    text = unicodedata.normalize("NFC", password[:CUT]).encode()
    ln, r, p = cost
    memory = 128 * r * ((1 << ln) + p + 2)  # what OpenSSL asks for; hashlib's own default is too little
    return hashlib.scrypt(text, salt=salt, n=1 << ln, r=r, p=p, maxmem=memory, dklen=SIZE)


class Job(Pending):
    """Something about a password, until the thread has done it; `error` where that could not be done."""

    __slots__ = ("_failure", "_new", "_old", "_stored", "made", "name", "right", "source")

    def __init__(
        self, source: str, name: str = "", *, old: str = "", stored: str | None = None, new: str | None = None
    ) -> None:
        super().__init__()
        self.source = source  # "": nobody's, and not counted
        self.name = name  # as whom; "": not counted
        self.right = stored is None  # the old password is right
        self.made = ""  # the hash to keep from now on; "": none, or as before
        self._old = old
        self._stored = stored  # None: nothing is to be checked
        self._new = new  # to be hashed where the old one is right; None: the old one, where its hash has become weak
        self._failure: Exception | None = None

    def work(self, cost: Cost, dummy: tuple[Cost, bytes, bytes]) -> None:
        """In the thread."""
        try:
            if self._stored is not None:
                # Who has none, or none that can be read, costs what everybody costs: the dummy is of no password.
                kept, salt, key = _parse(self._stored) or dummy
                self.right = compare_digest(_derive(self._old, kept, salt), key)
                if self.right and self._new is None and kept != cost:
                    self.made = hash_password(self._old, cost, salt)
            if self.right and self._new is not None:
                self.made = hash_password(self._new, cost)
        except Exception as error:  # noqa: BLE001 - no memory, or a text that asks for too much: the thread goes on
            self.right = False
            self._failure = error

    def hand_back(self) -> None:
        """In the loop."""
        self._old, self._new = "", None
        self.finish(self._failure)


class _Turns:
    """Jobs that wait: by turns among their sources, of each the oldest first."""

    def __init__(self) -> None:
        self._sources: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._sources.values()))

    def add(self, job: Job) -> None:
        self._sources.setdefault(job.source, deque()).append(job)

    def take(self) -> Job:
        """The next one; there must be one."""
        source, jobs = self._sources.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._sources[source] = jobs  # behind all others
        return job

    def remove(self, job: Job) -> bool:
        """Whether it was there."""
        jobs = self._sources.get(job.source, ())
        if job not in jobs:
            return False
        self._sources[job.source].remove(job)
        if not jobs:
            del self._sources[job.source]
        return True

    def clear(self) -> None:
        self._sources.clear()


def _uncount(counter: Counter[K], key: K) -> None:
    """A Counter keeps those that are at 0."""
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]


class Passwords:
    """Checks and hashes passwords.  `descriptor`, an eventfd, is readable when `turn` has something to do."""

    def __init__(self, *, queue: int = 64, cost: Cost = COST) -> None:
        """`queue`: how many may wait, for those who come first and for the others each."""
        self._most = queue
        self._cost = cost
        self._dummy = cost, os.urandom(SALT), os.urandom(SIZE)
        self._first = _Turns()
        self._others = _Turns()
        self._sources: Counter[str] = Counter()  # how many wait or are in work
        self._names: Counter[tuple[str, str]] = Counter()  # the same of a source and name
        self._working: Job | None = None
        self._orders: SimpleQueue[Job | None] = SimpleQueue()  # one at a time; None: the end
        self._done: deque[Job] = deque()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: Thread | None = Thread(target=self._work, name="tt-passwords", daemon=True)
        self._thread.start()

    def check(self, password: str, stored: str, source: str, name: str = "", *, first: bool = False) -> Job:
        """Is this the password?  Its `made` is a new hash where the one that is stored asks for less work than today.

        `stored`: the text kept; "" for nobody's, with which no password is right, at the same cost.  `first`: before
        all who are not.  Raises Busy.
        """
        return self._submit(Job(source, name, old=password, stored=stored), first=first)

    def change(self, old: str, stored: str, new: str, source: str) -> Job:
        """Is this the old password, and if so, what is the hash of the new one?  Raises Busy."""
        return self._submit(Job(source, old=old, stored=stored, new=new), first=True)

    def make(self, new: str, source: str = "") -> Job:
        """The hash of a new password.  Raises Busy."""
        return self._submit(Job(source, new=new), first=True)

    def drop(self, job: Job) -> None:
        """Nobody waits for it any more: it leaves the queue and is never done, unless the thread has it already."""
        if self._first.remove(job) or self._others.remove(job):
            self._leave(job)

    def turn(self) -> None:
        """In the loop's thread, when `descriptor` is readable: finishes what is done."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        while self._done:
            job = self._done.popleft()
            self._working = None
            self._leave(job)
            self._start()  # before the result is looked at, so that the thread has something to do meanwhile
            job.hand_back()

    def close(self) -> None:
        """Ends the thread, after the password that it works on; what waits is never done.  Harmless when repeated."""
        if self._thread is None:
            return
        self._first.clear()
        self._others.clear()
        self._orders.put(None)
        self._thread.join()
        self._thread = None
        os.close(self.descriptor)

    def _submit(self, job: Job, *, first: bool) -> Job:
        own = self._sources[job.source]
        # Only one of a source comes first: with more it could keep all others waiting for ever.
        waiting = self._first if first and not own else self._others
        # Half of the places are for one of each source: a few sources are not to fill them all.
        if len(waiting) >= self._most or own >= (SHARE if len(waiting) < self._most // 2 else 1):
            raise Busy
        if job.name and self._names[job.source, job.name] >= SHARE_OF_NAME:
            raise Busy
        if job.source:
            self._sources[job.source] += 1
            self._names[job.source, job.name] += 1
        waiting.add(job)
        self._start()
        return job

    def _leave(self, job: Job) -> None:
        _uncount(self._sources, job.source)
        _uncount(self._names, (job.source, job.name))

    def _start(self) -> None:
        """Give the thread the next one, if it has none."""
        waiting = self._first or self._others
        if self._working is None and waiting:
            self._working = waiting.take()
            self._orders.put(self._working)

    def _work(self) -> None:
        with suppress(OSError):  # a seccomp filter may forbid it: then hashing is only less polite
            os.nice(NICE)  # of this thread alone: Linux keeps it by the thread (nice(2))
        while (job := self._orders.get()) is not None:
            job.work(self._cost, self._dummy)
            self._done.append(job)
            os.eventfd_write(self.descriptor, 1)
