"""The file `timeouts`: the time-out table on disk, so that a restart forgives nobody.

It is sealed (tt.state_file) and holds the dump of `TimeoutTable.dump`.  The dump's times are relative to the moment of
saving, so an entry's end in UTC is that time plus its own, and time spent down counts.

It must not know what an entry holds (that is the table's), nor read a clock.
"""

import os
from pathlib import Path
from typing import Protocol

from tt.state_file import Sealed

# Two families of 2^20 sources, 48 bytes each, take 96 MiB.
FILE = Sealed("time-outs", magic=b"TTBANNED", version=1, most=128 << 20)


class Restorable(Protocol):
    """What `load` needs of a `TimeoutTable`."""

    def load(self, data: bytes, now: int, elapsed: int = 0, /, *, same_names: bool = True) -> int: ...


def save(path: str | os.PathLike[str], dump: bytes, utc_now: int, stamp: int = 0) -> None:
    """Replaces the file by one that holds `dump`, made at `utc_now` (ns since 1970).

    `stamp`, 32 bits, stands for the lists of names whose numbers are in the dump: another version may have others.

    When it returns, the new file is on the disk. StateFileError: it is not, and the old file stands.
    """
    FILE.save(Path(path), [dump], utc_now, stamp)


def load(path: str | os.PathLike[str], table: Restorable, now: int, utc_now: int, stamp: int = 0) -> int:
    """Restores the file into `table`; returns how many sources that were, 0 where there is no file.

    `now` is CLOCK_MONOTONIC and `utc_now` UTC, both ns. Time spent down counts. Where the wall clock has gone back
    since, none is taken to have passed: nobody is held longer than he still was to be when the file was saved.
    StateFileError: the file is unreadable or not as it was written; the table is as before.
    """
    path = Path(path)
    saved = FILE.load(path)
    if saved is None:
        return 0
    saved_utc, saved_stamp, dump = saved
    try:
        return table.load(dump, now, max(0, utc_now - saved_utc), same_names=saved_stamp == stamp)
    except ValueError as error:
        raise FILE.bad(path, error) from error
