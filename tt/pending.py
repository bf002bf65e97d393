"""Something that is under way in another thread, and an operation's result that waits for it.

All of this belongs to the loop's thread: who works elsewhere wakes the loop, and `finish` is called there.
"""

from collections.abc import Callable
from typing import NamedTuple


class Pending:
    """Under way until `finish`; then `error` says what failed, None where nothing did."""

    __slots__ = ("_calls", "done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error: Exception | None = None
        self._calls: list[Callable[[], None]] = []

    def when_done(self, call: Callable[[], None]) -> None:
        """Call it once, at the end; at once where that has come."""
        if self.done:
            call()
        else:
            self._calls.append(call)

    def finish(self, error: Exception | None = None) -> None:
        self.done = True
        self.error = error
        calls, self._calls = self._calls, []
        for call in calls:
            call()


class Later(NamedTuple):
    """What an operation gives whose result is not there yet: `result()` gives it, or raises, when `pending` is done."""

    pending: Pending
    result: Callable[[], object]
