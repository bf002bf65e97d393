"""Loads our compiled kernel programs, and attaches the listener filter, which drops the SYNs of timed-out sources.

A program gets its maps by descriptor, and its constants in an array that is frozen before it is loaded: the verifier
then takes them as known and leaves out what they exclude.  No compiler and no library is needed; Linux 5.10 or newer.
Errors are OSError with the kernel's errno and one sentence.
Rules: a map that a program uses lives as long as that program, whoever closes it here; nothing is pinned unasked.
It must not know time-outs: what keys and values mean stands in bpf/tt_ban.h.
"""

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from tt import bpf
from tt.bpf import Map, address
from tt.bpf_programs import LISTENER, Program

MAP_CREATE, PROG_LOAD, OBJ_PIN, MAP_FREEZE = 0, 5, 6, 22
PSEUDO_MAP_FD, PSEUDO_MAP_VALUE = 1, 2  # what the number in a two-part load is: a map; the array that holds constants
NO_PREALLOC, READ_ONLY_FOR_PROGRAMS = 1, 1 << 7  # BPF_F_NO_PREALLOC, BPF_F_RDONLY_PROG
SO_DETACH_FILTER, SO_ATTACH_BPF = 27, 50
CALL, KTIME_GET_NS, KTIME_GET_COARSE_NS = 0x85, 5, 160  # BPF_JMP | BPF_CALL, and the numbers of two helpers
LOG_BYTES = 1 << 20  # of the verifier's log, asked for after a failure alone
NAME_BYTES = 15  # of a map's or program's name
CONSTANTS = "tt_rodata"  # the name of the array that holds a program's constants

CREATING = {
    errno.EPERM: "no right to make map {0}: needs CAP_BPF or root (before Linux 5.11 also room under ulimit -l)"
}
PINNING = {
    errno.ENOENT: "cannot pin at {0}: there is no such folder",
    errno.EEXIST: "cannot pin at {0}: something is there already",
    errno.EPERM: "cannot pin at {0}: needs a BPF file system (/sys/fs/bpf), a name without a dot, and CAP_BPF or root",
}
LOADING = {
    errno.EPERM: "no right to load the {0}: needs {1} (before Linux 5.11 also room under ulimit -l)",
    errno.ENOSYS: "cannot load the {0}: this kernel has no bpf(2)",
}
ATTACHING = {
    errno.EPERM: "cannot change the filter of this socket: whoever opened it locked it (SO_LOCK_FILTER)",
    errno.ENOTSOCK: "cannot attach the listener filter: this descriptor is no socket",
}


class Kind(NamedTuple):
    """What the kernel is told of a program besides its instructions."""

    number: int  # enum bpf_prog_type
    name: str
    words: str  # what a message calls it
    rights: str  # who may load it
    flags: int = 0  # BPF_F_*; left out where the kernel does not know them


LISTENER_FILTER = Kind(1, "tt_listener", "listener filter", "CAP_BPF or root")  # BPF_PROG_TYPE_SOCKET_FILTER


# ---- maps -----------------------------------------------------------------------------------------------------------


def create_map(kind: str, sizes: tuple[int, int], max_entries: int, name: str, flags: int = 0) -> Map:
    """Make a map of a kind of bpf.KINDS, with sizes (key, value) in bytes; the kernel keeps 15 bytes of the name."""
    number = next(number for number, word in bpf.KINDS.items() if word == kind)
    flags |= NO_PREALLOC if kind == "lpm_trie" else 0  # it has no other form
    attr = struct.pack("=7I16s", number, *sizes, max_entries, flags, 0, 0, name.encode("ascii")[:NAME_BYTES])
    return Map(bpf.call(MAP_CREATE, attr, CREATING, name))


def pin_map(pinned: Map, path: str) -> None:
    """Give a map a name in a BPF file system: it lives until that is removed."""
    pin(pinned.fd, path)


def pin(fd: int, path: str) -> None:
    """The same for any object of BPF, by its descriptor."""
    name = os.fsencode(path)
    bpf.call(OBJ_PIN, struct.pack("=QII", address(name), fd, 0), PINNING, path)


def freeze_map(frozen: Map) -> None:
    """Forbid user space to change a map, for as long as it lives."""
    bpf.call(MAP_FREEZE, struct.pack("=I", frozen.fd), bpf.IN_USE, frozen.name, frozen.max_entries)


# ---- the listener filter --------------------------------------------------------------------------------------------


class Filter:
    """The listener filter, loaded: attach it to any number of sockets, each of which keeps it until it is closed."""

    def __init__(self, fd: int, dropped_syns: Map) -> None:
        self.fd = fd
        self._dropped_syns = dropped_syns

    def counters(self) -> dict[str, int]:
        """`dropped_syns`: SYNs dropped at all sockets since it was loaded."""
        each_cpu = self._dropped_syns.lookup(bytes(4)) or b""
        return {"dropped_syns": sum(count for (count,) in struct.iter_unpack("=Q", each_cpu))}

    def close(self) -> None:
        """Let go of it; sockets that have it keep it.  Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        self._dropped_syns.close()


def load_listener_filter(maps: Mapping[int, Map | None], ipv6_prefix: int) -> Filter:
    """Load a filter that reads the map of family 4 and that of family 6; None or left out: that family passes.

    The maps' forms are those of bpf/tt_ban.h; the keys of an IPv6 hash hold `ipv6_prefix` bits, 1 to 128.  Raises
    OSError, PermissionError where the process has no CAP_BPF.
    """
    dropped_syns = create_map("percpu_array", (4, 8), 1, "tt_dropped_syns")
    try:
        bound, constants = bind(maps, ipv6_prefix, unused=dropped_syns)
        return Filter(load(LISTENER_FILTER, LISTENER, bound | {"dropped_syns": dropped_syns}, constants), dropped_syns)
    except BaseException:
        dropped_syns.close()
        raise


def bind(maps: Mapping[int, Map | None], ipv6_prefix: int, unused: Map) -> tuple[dict[str, Map], dict[str, bytes]]:
    """What bpf/tt_ban.h names, for the maps by family: a map for each name, and the constants.

    `unused` has keys of 4 bytes and values of at least 8: where there is no map, the constants exclude the branches
    that name it, and they take any that they can read.
    """
    bound, constants = {}, {"ipv6_mask": _mask(ipv6_prefix)}
    for family in (4, 6):
        one = maps.get(family)
        constants[f"ipv{family}_key_size"] = struct.pack("=I", one.key_size if one else 0)
        constants[f"ipv{family}_value_size"] = struct.pack("=I", one.value_size if one else 0)
        for value_size, unit in ((4, "seconds"), (8, "ns")):
            bound[f"ipv{family}_{unit}"] = one if one and one.value_size == value_size else unused
    return bound, constants


def _mask(prefix: int) -> bytes:
    return ((1 << prefix) - 1 << 128 - prefix).to_bytes(16, "big")


def attach(listener_filter: Filter, socket_fd: int) -> None:
    """Make it the filter of a socket, in place of any other.  Raises OSError."""
    _set_option(socket_fd, SO_ATTACH_BPF, listener_filter.fd)


def detach(socket_fd: int) -> bool:
    """Take away the filter that a socket has, whoever attached it; False where it has none.  Raises OSError."""
    try:
        _set_option(socket_fd, SO_DETACH_FILTER, 0)
    except FileNotFoundError:
        return False
    return True


def _set_option(socket_fd: int, option: int, value: int) -> None:
    try:
        borrowed = socket.socket(fileno=socket_fd)
        try:
            borrowed.setsockopt(socket.SOL_SOCKET, option, value)
        finally:
            borrowed.detach()
    except OSError as error:
        raise bpf.error(error.errno or 0, ATTACHING, "filter of a socket") from None


# ---- programs -------------------------------------------------------------------------------------------------------


def load(kind: Kind, program: Program, maps: Mapping[str, Map], constants: Mapping[str, bytes]) -> int:
    """The descriptor of a program with its maps and constants by name.  Raises OSError with what the verifier said."""
    if sys.byteorder != "little":
        raise OSError(errno.ENOEXEC, f"cannot load the {kind.words}: it is compiled for little-endian processors")
    rodata = _freeze_constants(program, constants)
    try:
        code = _fill_in(program, maps, rodata)
        # The only way to ask a kernel for a flag, or for a helper, is to load what needs it: the newest kernel first.
        for known in dict.fromkeys((kind, kind._replace(flags=0))):
            with suppress(OSError):
                return _load_instructions(known, code)
        return _load_or_say_why(kind._replace(flags=0), _exact_clock(code))
    finally:
        rodata.close()


def lay_out(program: Program, constants: Mapping[str, bytes]) -> bytes:
    """A program's constants as it reads them; every one must be given."""
    data = bytearray(max(offset + size for offset, size in program.layout.values()))
    for name, (offset, size) in program.layout.items():
        memoryview(data)[offset : offset + size] = constants[name]
    return bytes(data)


def _freeze_constants(program: Program, constants: Mapping[str, bytes]) -> Map:
    data = lay_out(program, constants)
    rodata = create_map("array", (4, len(data)), 1, CONSTANTS, READ_ONLY_FOR_PROGRAMS)
    try:
        rodata.update(bytes(4), data)
        freeze_map(rodata)
    except BaseException:
        rodata.close()
        raise
    return rodata


def _fill_in(program: Program, maps: Mapping[str, Map], rodata: Map) -> bytes:
    """The instructions with descriptors: in a pair, the source register says what the first number is."""
    code = bytearray(program.instructions)
    loads = [(at, PSEUDO_MAP_FD, maps[name].fd, 0) for at, name in program.maps.items()]
    loads += [(at, PSEUDO_MAP_VALUE, rodata.fd, offset) for at, offset in program.constants.items()]
    for at, kind, fd, offset in loads:
        code[at * 8 + 1] |= kind << 4
        struct.pack_into("=i", code, at * 8 + 4, fd)
        struct.pack_into("=i", code, at * 8 + 12, offset)
    return bytes(code)


def _exact_clock(instructions: bytes) -> bytes:
    """The same program for a kernel without the coarse clock (before 5.11): with the exact one."""
    coarse, exact = (struct.pack("=BBhi", CALL, 0, 0, helper) for helper in (KTIME_GET_COARSE_NS, KTIME_GET_NS))
    parts = (instructions[at : at + 8] for at in range(0, len(instructions), 8))
    return b"".join(exact if part == coarse else part for part in parts)


def _load_or_say_why(kind: Kind, instructions: bytes) -> int:
    log = ctypes.create_string_buffer(LOG_BYTES)
    try:
        return _load_instructions(kind, instructions, log)
    except OSError:
        if not (said := _telling_line(log.value.decode("ascii", "replace"))):
            raise  # it did not come to the verifier, whose EACCES is no matter of rights
        raise OSError(errno.EINVAL, f"the kernel's verifier refused the {kind.words}: {said}") from None


def _load_instructions(kind: Kind, instructions: bytes, log: ctypes.Array[ctypes.c_char] | None = None) -> int:
    license_text = b"\0"  # no helper that we call asks for one
    wanted = (1, len(log), address(log)) if log else (0, 0, 0)
    attr = struct.pack(
        "=IIQQIIQII16s", kind.number, len(instructions) // 8, address(instructions), address(license_text), *wanted,
        0, kind.flags, kind.name.encode("ascii"),
    )  # fmt: skip
    return bpf.call(PROG_LOAD, attr, LOADING, kind.words, kind.rights)


def _telling_line(log: str) -> str:
    """What the verifier stumbled on: its last line but for the statistics."""
    lines = [line for line in log.splitlines() if line and not line.startswith(("processed ", "verification time "))]
    return lines[-1] if lines else ""
