"""Maps of the kernel's BPF by bpf(2) alone: open a pinned one, look up, change singly or in batches, walk.

Mechanism only.  Layouts of union bpf_attr are those of <linux/bpf.h>, in host byte order.  Errors are OSError with the
kernel's errno and, in `strerror`, one sentence that says what it means for a map.
Rules: a Map keeps its buffers, so one change costs about 1 us, and a Map is for one thread; a walk collects first, so
its caller may change the map, as others may meanwhile.
Must not know what keys and values mean, nor the server.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

KINDS = {1: "hash", 2: "array", 5: "percpu_hash", 6: "percpu_array", 9: "lru_hash", 11: "lpm_trie"}
PER_CPU = (5, 6, 10, 21)  # kinds that give and take one value, rounded up to 8 bytes, per possible CPU
ENOTSUPP = 524  # the kernel's own number, not in errno.h: this kind of map has no such command
LOOKUP, UPDATE, DELETE, NEXT_KEY, OBJ_GET, INFO = 1, 2, 3, 4, 7, 15
LOOKUP_BATCH, UPDATE_BATCH, DELETE_BATCH = 24, 26, 27
CHUNK = 1024  # entries that one LOOKUP_BATCH asks for

IN_USE = {
    errno.E2BIG: "map {0} is full: {1} entries",
    errno.ENOSPC: "map {0} is full: {1} entries",  # an LPM trie's word for it
    errno.ENOENT: "map {0} has no such entry",
    errno.EPERM: "no right to change map {0}: it is frozen or read-only, or this kernel asks for CAP_BPF",
    errno.EINVAL: "map {0} takes no such key or value",
    ENOTSUPP: "map {0} cannot do this: its kind has no such command",
}
OPENING = {
    errno.ENOENT: "there is no {0}: pin a map there first, for example with bpftool map create",
    errno.EPERM: "no right to open {0}: needs root or CAP_BPF, or a file mode that lets this user read and write",
    errno.EACCES: "no right to open {0}: needs root, or a file and folder mode that lets this user read and write",
    errno.EINVAL: "{0} is not a pinned map: give the path of one, as bpftool map create makes it",
}

_bpf = ctypes.PyDLL(None, use_errno=True).syscall  # keeps the GIL: no call waits, and another thread might hold it long
_bpf.restype = ctypes.c_long
_NUMBER = {"x86_64": 321, "ppc64le": 361, "s390x": 351}.get(platform.machine(), 280)  # of bpf(2); 280: asm-generic


def call(command: int, attr: bytes, meanings: dict[int, str], *words: object) -> int:
    """bpf(2) with the first bytes of union bpf_attr; returns its result.  Raises OSError, worded by `meanings`."""
    if (result := int(_bpf(_NUMBER, command, attr, len(attr)))) < 0:
        raise error(ctypes.get_errno(), meanings, *words)
    return result


def error(number: int, meanings: dict[int, str], *words: object) -> OSError:
    """The exception of an errno: its sentence in `meanings` filled with `words`, else the kernel's text."""
    return OSError(number, meanings.get(number, os.strerror(number) + ": {0}").format(*words))


def address(data: bytes | ctypes.Array[ctypes.c_char]) -> int:
    """Where bytes or a buffer lie in memory, for as long as the caller holds them."""
    return ctypes.cast(data, ctypes.c_void_p).value or 0  # type: ignore[arg-type]  # it takes bytes as well


def possible_cpus() -> int:
    """How many CPUs the kernel can have, on line or not: so many values a per-CPU entry has."""
    ranges = (part.split("-") for part in Path("/sys/devices/system/cpu/possible").read_text("ascii").split(","))
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ranges)


class Map:
    """An open map.  `kind` is a word of KINDS, or the kernel's number as text; sizes are bytes; `path` is "" unpinned.

    Keys and values are bytes of exactly `key_size` and `value_size` (else ValueError), as the kernel holds them; the
    value of a per-CPU kind holds `value_size`, rounded up to 8, for each possible CPU.  Methods raise OSError.
    """

    def __init__(self, fd: int, path: str = "") -> None:
        self.fd, self.path = fd, path
        info = ctypes.create_string_buffer(40)  # the beginning of struct bpf_map_info
        call(INFO, struct.pack("=IIQ", fd, len(info), address(info)), IN_USE, path)
        kind, _, self.key_size, self.value_size, self.max_entries, self.flags = struct.unpack_from("=6I", info)
        self.kind = KINDS.get(kind, str(kind))
        self.name = info.raw[24:].rstrip(b"\0").decode("ascii", "replace")
        self._words = (path or self.name or "without a name", self.max_entries)
        self._held = -(-self.value_size // 8) * 8 * possible_cpus() if kind in PER_CPU else self.value_size
        key, value = (ctypes.create_string_buffer(size or 1) for size in (self.key_size, self._held))
        # A memoryview refuses bytes of another length; a ctypes buffer takes shorter ones and keeps its old rest.
        self._key, self._value = memoryview(key).cast("B"), memoryview(value).cast("B")
        self._attr = struct.pack("=IIQQQ", fd, 0, address(key), address(value), 0)
        self._attr_new = self._attr[:24] + struct.pack("=Q", 1)  # flags: BPF_NOEXIST

    @classmethod
    def open(cls, path: str) -> "Map":
        """Open a pinned map for reading and writing."""
        name = os.fsencode(path)
        try:
            fd = call(OBJ_GET, struct.pack("=QII", address(name), 0, 0), OPENING, path)
        except PermissionError:
            if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
                raise
            raise error(errno.EINVAL, OPENING, path) from None  # EACCES is also the word for a file that is not of BPF
        if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:bpf-map":  # a pinned program opens as well
            os.close(fd)
            raise error(errno.EINVAL, OPENING, path)
        return cls(fd, path)

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        self._key[:] = key
        return None if _bpf(_NUMBER, LOOKUP, self._attr, 32) and self._is(errno.ENOENT) else bytes(self._value)

    def update(self, key: bytes, value: bytes, *, new: bool = False) -> bool:
        """Add an entry, or change it.  `new`: add alone, False where one stands (before 6.13 a trie changes it)."""
        self._key[:] = key
        self._value[:] = value
        return not (_bpf(_NUMBER, UPDATE, self._attr_new if new else self._attr, 32) and self._is(errno.EEXIST))

    def delete(self, key: bytes) -> bool:
        """Remove an entry; False where there was none."""
        self._key[:] = key
        return not (_bpf(_NUMBER, DELETE, self._attr, 16) and self._is(errno.ENOENT))  # 32 bytes: a value is EINVAL

    def update_batch(self, keys: Sequence[bytes], values: Sequence[bytes]) -> tuple[int, int]:
        """Add or change entries in order, up to the first that fails: how many were done, and its errno (0: all done).

        `error` makes its exception.  Where this kind of map has no batches: (-1, ENOTSUP).
        """
        return self._batch(UPDATE_BATCH, keys, values)

    def delete_batch(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """Remove entries in order, up to the first that is not there (ENOENT); returns as update_batch."""
        return self._batch(DELETE_BATCH, keys, None)

    def entries(self) -> list[tuple[bytes, bytes]]:
        """All entries, each key once; those added or removed meanwhile may be among them or not."""
        return list(dict(self.walk()).items())

    def walk(self) -> Iterator[tuple[bytes, bytes]]:
        """The same while it is asked for, CHUNK by CHUNK; a key may come twice, and the map may change meanwhile."""
        return self._walk_by_batch() if self.kind in ("hash", "lru_hash") else self._walk_by_key()

    def close(self) -> None:
        """Close the descriptor; an unpinned map goes with its last user.  Idempotent."""
        fd, self.fd = self.fd, -1
        self._attr = self._attr_new = struct.pack("=i28x", -1)  # the number may soon be another map's
        if fd >= 0:
            os.close(fd)

    def error(self, number: int) -> OSError:
        """The exception for an errno of this map, as the batches return it."""
        return error(number, IN_USE, *self._words)

    def _is(self, expected: int) -> bool:
        if (number := ctypes.get_errno()) != expected:
            raise self.error(number)
        return True

    def _batch(self, command: int, keys: Sequence[bytes], values: Sequence[bytes] | None) -> tuple[int, int]:
        joined, joined_values, count = b"".join(keys), b"".join(values or ()), len(keys)
        if len(joined) != count * self.key_size or len(joined_values) != (values is not None) * count * self._held:
            raise ValueError(f"map {self._words[0]} has keys of {self.key_size} and values of {self._held} bytes")
        done, number = self._call_batch(command, 0, 0, address(joined), address(joined_values), count)
        if number == ENOTSUPP:
            return -1, errno.ENOTSUP
        return (0 if number and done == count else done), number  # refused as a whole, the count comes back as it was

    def _call_batch(self, command: int, *form: int) -> tuple[int, int]:
        """`form`: the addresses of position, next position, keys and values, and the count of entries."""
        attr = ctypes.create_string_buffer(struct.pack("=4QIi2Q", *form, self.fd, 0, 0), 56)
        number = ctypes.get_errno() if _bpf(_NUMBER, command, attr, 56) else 0
        return struct.unpack_from("=I", attr, 32)[0], number

    def _walk_by_batch(self) -> Iterator[tuple[bytes, bytes]]:
        """A hash, bucket by bucket: changes by others move nothing that stays."""
        size, number, begin, position = CHUNK, 0, 0, ctypes.create_string_buffer(4)
        while number != errno.ENOENT:  # the end
            keys, values = (ctypes.create_string_buffer(size * each) for each in (self.key_size, self.value_size))
            places = begin, address(position), address(keys), address(values)
            count, number = self._call_batch(LOOKUP_BATCH, *places, size)
            if number == errno.ENOSPC:  # the next bucket holds more than there is room for
                size *= 2
                continue
            if number not in (0, errno.ENOENT):
                raise self.error(number)
            rows = (struct.unpack(f"{len(buffer) // size}s" * size, buffer) for buffer in (keys, values))
            yield from islice(zip(*rows, strict=True), count)
            begin = address(position)

    def _walk_by_key(self) -> Iterator[tuple[bytes, bytes]]:
        """Key by key: a key that others remove under us sends the walk back to the start, past keys seen before."""
        found: set[bytes] = set()
        again, key_buffer = 0, ctypes.create_string_buffer(self.key_size)  # the key now, and the next in its place
        begin, place = 0, address(key_buffer)
        while again <= len(found):  # not yet a whole round that brought nothing new
            if _bpf(_NUMBER, NEXT_KEY, struct.pack("=iIQQ", self.fd, 0, begin, place), 24) and self._is(errno.ENOENT):
                break
            begin, key = place, key_buffer.raw
            if (value := self.lookup(key)) is not None:
                again = again + 1 if key in found else 0
                found.add(key)
                yield key, value
