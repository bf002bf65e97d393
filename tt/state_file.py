"""Files in which the server keeps its state over a restart: replaced whole, and sealed against damage.

A sealed file, integers in host byte order (it stays on its host): magic, version, a stamp, the UTC time of saving, the
length of what it holds; that; SHA-256 of all before it.

Rules: a reader sees the old file or the new one, never a part; nothing of a sealed file is used before its checksum is
right; mode 0600.  Only file work, and long only in calls that hold no GIL: made for a thread beside the loop.
It must not know what a file holds, nor read a clock.
"""

import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

HEAD = struct.Struct("=8sIIqQ")  # magic, version, stamp, UTC of saving in ns since 1970, length of what it holds
CHECKSUM = 32


class StateFileError(Exception):
    """The file cannot be written, read or believed; the text is one line that names it and says what to do."""


def replace(path: Path, parts: Iterable[bytes]) -> None:
    """Replaces the file by one that holds the parts.  When it returns, the new one is on the disk.

    OSError: it is not, and the old one stands.  One call at a time for one path.
    """
    # One fixed name: what a kill leaves behind is overwritten the next time instead of piling up.
    temporary = path.with_name(path.name + ".new")
    try:
        _write(temporary, parts)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def _write(path: Path, parts: Iterable[bytes]) -> None:
    # O_NOFOLLOW: a link left under this name must not lead the write to another file.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # one that was there already keeps its mode through O_CREAT
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Without this a new name in it may be lost in a power cut, and with it what was reported done.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Sealed(NamedTuple):
    """A kind of sealed file."""

    what: str  # as the operator calls what is in it, for the errors
    magic: bytes  # 8 bytes
    version: int
    most: int  # bytes of what it may hold

    def save(self, path: Path, parts: Iterable[bytes], utc_now: int, stamp: int = 0) -> None:
        """Replaces the file; `utc_now` in ns since 1970, `stamp` of 32 bits for the caller.  StateFileError."""
        parts = list(parts)
        length = sum(map(len, parts))
        parts.insert(0, HEAD.pack(self.magic, self.version, stamp, utc_now, length))
        checksum = sha256()
        for part in parts:
            checksum.update(part)
        try:
            replace(path, (*parts, checksum.digest()))
        except OSError as error:
            reason = error.strerror or str(error)
            remedy = f"make the directory writable, with room for {length} bytes"
            raise StateFileError(f"{path}: {self.what} not saved: {reason}: {remedy}") from error

    def load(self, path: Path) -> tuple[int, int, bytes] | None:
        """UTC of saving, stamp, and what the file holds; None where there is none.  StateFileError."""
        try:
            with path.open("rb") as file:
                # One byte beyond the bound is enough to know that it is too long.
                return self._parse(file.read(HEAD.size + self.most + CHECKSUM + 1))
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror or str(error)
            remedy = "make the file readable, or remove it"
            raise StateFileError(f"{path}: {self.what} not restored: {reason}: {remedy}") from error
        except ValueError as error:
            raise self.bad(path, error) from error

    def bad(self, path: Path, error: Exception) -> StateFileError:
        """The error for what is not as it was written; the caller's own, where only he can know."""
        return StateFileError(f"{path}: {self.what} not restored: {error}: the next save replaces the file")

    def _parse(self, data: bytes) -> tuple[int, int, bytes]:
        if len(data) < HEAD.size + CHECKSUM:
            raise ValueError(f"{len(data)} bytes are too few for a saved file")
        magic, version, stamp, saved_utc, length = HEAD.unpack_from(data)
        if magic != self.magic:
            raise ValueError(f"this is no file of {self.what}")
        if version != self.version:
            raise ValueError(f"its version is {version}, this server reads {self.version}")
        if length > self.most or len(data) != HEAD.size + length + CHECKSUM:
            raise ValueError(f"its {len(data)} bytes are not the length that it names")
        end = HEAD.size + length
        if sha256(memoryview(data)[:end]).digest() != data[end:]:
            raise ValueError("its checksum is wrong, so it was damaged")
        return saved_utc, stamp, data[HEAD.size : end]
