"""How long something took, counted: sum, buckets, and the longest of the last minute.

Rules: adding one is cheap and needs no memory; time is an argument, monotonic seconds.  One thread adds and asks.
It must not know what took so long.
"""

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # s, each within its bucket
MINUTE = 60  # seconds that `longest` looks back


class Durations:
    """Counts since it was made."""

    def __init__(self) -> None:
        self.sum = 0.0  # s
        self._counts = [0] * (len(BOUNDS) + 1)
        self._longest = [(0, 0.0)] * MINUTE  # of each second: which one, and the longest that ended in it

    def add(self, seconds: float, now: float) -> None:
        """One that has just ended."""
        self.sum += seconds
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        second = int(now)
        held, longest = self._longest[second % MINUTE]
        self._longest[second % MINUTE] = (second, max(seconds, longest) if held == second else seconds)

    def longest(self, now: float) -> float:
        """Of those that ended within the last minute, s; 0 where none did."""
        return max((longest for second, longest in self._longest if second > now - MINUTE), default=0.0)

    def buckets(self) -> Mapping[str, int]:
        """How many took at most so many seconds, by that bound as text, "+Inf" last: a Prometheus histogram's."""
        names = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
        return dict(zip(names, accumulate(self._counts), strict=True))
