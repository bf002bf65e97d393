"""Pendings that end at a time: what is held back without a thread or a sleep.

Rules: of the loop's thread, which watches `descriptor` and calls `turn`.  The clock is an argument, and the kernel's
timer only wakes: what is due is decided by the clock.  Must not know what is held back, or why.
"""

import ctypes
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count

from tt.pending import Pending

_libc = ctypes.CDLL(None, use_errno=True)
CLOCK_MONOTONIC = 1
SOONEST = 1e-6  # s: 0 would stop the timer


class Timer:
    """Ends Pendings at their time.  `descriptor`, a timerfd(2), is readable when `turn` has something to do."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds.  OSError."""
        self._clock = clock
        self._heap: list[tuple[float, int, Pending]] = []
        self._number = count()  # of equal times the first comes first
        self.descriptor: int = _libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def after(self, seconds: float) -> Pending:
        """Ends in so many seconds."""
        pending = Pending()
        heappush(self._heap, (self._clock() + seconds, next(self._number), pending))
        self._set()
        return pending

    def turn(self) -> None:
        """In the loop's thread, when `descriptor` is readable: ends what is due."""
        with suppress(BlockingIOError):
            os.read(self.descriptor, 8)
        now = self._clock()
        due: list[Pending] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heappop(self._heap)[2])
        self._set()
        for pending in due:
            pending.finish()

    def close(self) -> None:
        os.close(self.descriptor)

    def _set(self) -> None:
        """To the first that is due."""
        if self._heap:
            wait = max(self._heap[0][0] - self._clock(), SOONEST)
            once = struct.pack("@4l", 0, 0, int(wait), int(wait % 1 * 1e9))  # struct itimerspec
            _libc.timerfd_settime(self.descriptor, 0, once, None)
