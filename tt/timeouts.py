"""The file `timeouts`: the time-out table on disk, so that a restart forgives nobody.

Layout, integers in host byte order (the file stays on its host): magic, version, the UTC time of saving, the length of
the dump; the dump of `TimeoutTable.dump`; SHA-256 of all before it. The dump's times are relative to the moment of
saving, so an entry's end in UTC is that time plus its own, and time spent down counts.

Rules: a reader sees the old file or the new one, never a part; nothing of a file is used before its checksum is right.
It must not know what an entry holds (that is the table's), nor read a clock.
"""

import os
import struct
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Protocol

MAGIC = b"TTBANNED"
VERSION = 1
HEAD = struct.Struct("=8sIIqQ")  # magic, version, stamp, UTC of saving in ns since 1970, length of the dump
CHECKSUM = 32
MAX_DUMP = 128 << 20  # two families of 2^20 sources, 48 bytes each, take 96 MiB


class TimeoutsFileError(Exception):
    """The file cannot be written, read or believed; the text is one line that names it and says what to do."""


class Restorable(Protocol):
    """What `load` needs of a `TimeoutTable`."""

    def load(self, data: bytes, now: int, elapsed: int = 0, /, *, same_names: bool = True) -> int: ...


def save(path: str | os.PathLike[str], dump: bytes, utc_now: int, stamp: int = 0) -> None:
    """Replaces the file by one that holds `dump`, made at `utc_now` (ns since 1970); mode 0600.

    `stamp`, 32 bits, stands for the lists of names whose numbers are in the dump: another version may have others.

    Only file work, and long only in calls that hold no GIL: made for a thread beside the loop, one at a time. When it
    returns, the new file is on the disk. TimeoutsFileError: it is not, and the old file stands.
    """
    path = Path(path)
    # One fixed name: what a kill leaves behind is overwritten the next time instead of piling up.
    temporary = path.with_name(path.name + ".new")
    try:
        _write(temporary, HEAD.pack(MAGIC, VERSION, stamp, utc_now, len(dump)), dump)
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        reason = error.strerror or str(error)
        raise TimeoutsFileError(
            f"{path}: time-outs not saved: {reason}: make the directory writable, with room for {len(dump)} bytes"
        ) from error


def load(path: str | os.PathLike[str], table: Restorable, now: int, utc_now: int, stamp: int = 0) -> int:
    """Restores the file into `table`; returns how many sources that were, 0 where there is no file.

    `now` is CLOCK_MONOTONIC and `utc_now` UTC, both ns. Time spent down counts. Where the wall clock has gone back
    since, none is taken to have passed: nobody is held longer than he still was to be when the file was saved.
    TimeoutsFileError: the file is unreadable or not as it was written; the table is as before.
    """
    path = Path(path)
    try:
        saved_utc, saved_stamp, dump = _parse(_read(path))
        return table.load(dump, now, max(0, utc_now - saved_utc), same_names=saved_stamp == stamp)
    except FileNotFoundError:
        return 0
    except OSError as error:
        reason = error.strerror or str(error)
        raise TimeoutsFileError(
            f"{path}: time-outs not restored: {reason}: make the file readable, or remove it"
        ) from error
    except ValueError as error:
        raise TimeoutsFileError(f"{path}: time-outs not restored: {error}: the next save replaces the file") from error


def _write(path: Path, head: bytes, dump: bytes) -> None:
    # O_NOFOLLOW: a link left under this name must not lead the write to another file.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # one that was there already keeps its mode through O_CREAT
        checksum = sha256(head)
        checksum.update(dump)
        for part in (head, dump, checksum.digest()):
            file.write(part)
        file.flush()
        os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    # Without this the rename may be lost in a power cut, and with it a save that was reported done.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    """All of the file. One byte beyond the bound is enough to know that it is too long."""
    with path.open("rb") as file:
        return file.read(HEAD.size + MAX_DUMP + CHECKSUM + 1)


def _parse(data: bytes) -> tuple[int, int, bytes]:
    """UTC of saving, stamp and dump. ValueError: not a file of ours, or damaged."""
    if len(data) < HEAD.size + CHECKSUM:
        raise ValueError(f"{len(data)} bytes are too few for a saved table")
    magic, version, stamp, saved_utc, length = HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("this is no file of time-outs")
    if version != VERSION:
        raise ValueError(f"its version is {version}, this server reads {VERSION}")
    if length > MAX_DUMP or len(data) != HEAD.size + length + CHECKSUM:
        raise ValueError(f"its {len(data)} bytes are not the length that it names")
    end = HEAD.size + length
    if sha256(memoryview(data)[:end]).digest() != data[end:]:
        raise ValueError("its checksum is wrong, so it was damaged")
    return saved_utc, stamp, data[HEAD.size : end]
