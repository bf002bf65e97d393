"""From root to an ordinary user: what `--user` does once the maps are open and the listeners have their filter.

Order: the data directory is handed over, the user's own files are opened as that user, then all is dropped for good:
groups, ids, every capability, and the way back to any (capabilities(7), PR_SET_NO_NEW_PRIVS).  Maps are changed through
the open descriptors after that; before Linux 5.19 that takes CAP_BPF, which then is kept alone, and said.
Rules: nothing in a folder that an ordinary user can write is made or changed as root; called before any thread runs,
since a thread has capabilities of its own.
It must not know what the server does with files and maps.
"""

import codecs
import ctypes
import errno
import logging
import os
import pwd
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tt import config, keys, log
from tt.bpf import Map
from tt.guard import EXEMPT_FILE, HISTORY_FILE

CAP_BPF = 39
PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 8, 24, 38, 47, 4
CAPABILITIES_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
LAST_CAP = Path("/proc/sys/kernel/cap_last_cap")
FULL = (errno.E2BIG, errno.ENOSPC)
# The files of a data directory; root's own are handed over with it.
FILES = (
    keys.PRIVATE_FILE, keys.OLD_FILE, keys.PUBLIC_FILE, "timeouts", "timeouts.new", config.CONTROL_SOCKET,
    EXEMPT_FILE, f"{EXEMPT_FILE}.new", HISTORY_FILE, f"{HISTORY_FILE}.new",
    "tapetrack.db", "tapetrack.db-wal", "tapetrack.db-shm", "first-password",
)  # fmt: skip
RIGHTS = "to become another user the server needs CAP_SETUID, CAP_SETGID and CAP_SETPCAP: start it as root"
_libc = ctypes.CDLL(None, use_errno=True)


class PrivilegesError(Exception):
    """The user cannot be had; the text is one line that names the thing, the rule and the remedy."""


class User(NamedTuple):
    """Who the server is to be."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]  # all of them, `gid` too


def find(name: str) -> User | None:
    """The user of a name or number; None for "".  A number without a name stands for the group of that number, too.

    Raises PrivilegesError where there is no such user, where it is root, or where only root could become it.
    """
    if not name:
        return None
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        user = User(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)))
    except (KeyError, OverflowError):
        if not name.isdecimal() or int(name) >= (1 << 32) - 1:  # the last number means "no change" to setuid(2)
            raise PrivilegesError(
                f"--user {name}: there is no such user: name one of /etc/passwd, or a number"
            ) from None
        user = User(name, int(name), int(name), (int(name),))
    if user.uid == 0:
        raise PrivilegesError(f"--user {name}: that is root: name an ordinary user, or leave --user out")
    if os.geteuid() not in (0, user.uid):
        raise PrivilegesError(f"--user {name}: only root can become another user: start as root, or as {user.name}")
    return user


def hand_over(data: Path, user: User | None) -> None:
    """Give root's data directory, and root's FILES in it, to the user.  Raises PrivilegesError.

    Only where root alone could have put something there: what an ordinary user put into a directory may be a link to
    any file of the system.  And only where it is a data directory, or new: /etc must not change hands for a slip.
    """
    if user is None or os.geteuid() != 0:
        return
    with _worded(f"data directory {data}", f"give it to {user.name} (chown), or name another with --data"):
        folder = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _hand_over(folder, data, user)
        finally:
            os.close(folder)


def _hand_over(folder: int, data: Path, user: User) -> None:
    status, names = os.fstat(folder), os.listdir(folder)
    if status.st_uid != 0:
        return
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or (names and keys.PRIVATE_FILE not in names):
        raise PrivilegesError(
            f"data directory {data}: it is root's, and others can write there, or it holds something else: "
            f"make {user.name} one (install -d -m 700 -o {user.name} DIR) and name it with --data"
        )
    for name in set(FILES).intersection(names):
        if os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid == 0:
            os.chown(name, user.uid, user.gid, dir_fd=folder, follow_symlinks=False)
    os.fchown(folder, user.uid, user.gid)  # last: until then nobody else could put a link there


@contextmanager
def acting_as(user: User | None) -> Iterator[None]:
    """Make and open files as the user, and be root again after that.  Raises PrivilegesError."""
    if user is None or os.geteuid() != 0:
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    with _worded(f"--user {user.name}", RIGHTS):
        os.setgroups(user.groups)
        os.setegid(user.gid)
        os.seteuid(user.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def drop(user: User | None, maps: Iterable[Map]) -> None:
    """Be the user for good, without any capability; the maps are then still changed.  None: stay who you are.

    Raises PrivilegesError.
    """
    if user is None:
        return
    # Python loads a codec when it is first used, from a folder that may be closed to the user: this is the log's.
    codecs.lookup("unicode_escape")
    with _worded(f"--user {user.name}", RIGHTS):
        _shut_the_ways_back()
        _prctl(PR_SET_KEEPCAPS, 1)
        if os.geteuid() == 0:
            os.setgroups(user.groups)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
        kept = _drop_capabilities(list(maps))
    if kept:
        words = "CAP_BPF is kept: this kernel asks for it when a map is changed (Linux 5.19 and newer do not)"
        log.event(logging.WARNING, words)
    for folder in (Path(os.__file__).parent, Path(__file__).parent):
        if not os.access(folder, os.R_OK | os.X_OK):
            words = "this user cannot read the server's own library: what is first needed later will fail"
            log.event(logging.WARNING, words, folder=str(folder), remedy="install it where every user can read")
    log.event(logging.INFO, "running as", user=user.name, uid=user.uid, capabilities="CAP_BPF" if kept else "none")


def warn_of_root() -> None:
    """Once the server runs, where it still is root."""
    if os.geteuid() == 0:
        remedy = "--user NAME: opens maps and ports as root, and then is NAME"
        log.event(logging.WARNING, "running as root: a fault in here would have all rights", remedy=remedy)


def _drop_capabilities(maps: list[Map]) -> bool:
    """All but CAP_BPF, and that, too, unless a map is changed with it alone; returns whether it is kept."""
    reserve = {CAP_BPF} & _permitted()
    _set_capabilities(effective=set(), permitted=reserve)
    refused = [one for one in maps if not may_change(one)]
    if refused and reserve:
        _set_capabilities(effective=reserve, permitted=reserve)
        if any(may_change(one) for one in refused):
            return True
    _set_capabilities(effective=set(), permitted=set())
    return False


def may_change(one: Map) -> bool:
    """Whether this process may change a map, by trying: an entry of no host (0.0.0.0 or ::, RFC 6890) comes and goes.

    An entry that is there already is written as it stands.
    """
    bits = 8 * (one.key_size - 4)
    key = (struct.pack("=I", bits) + bytes(one.key_size - 4)) if one.kind == "lpm_trie" else bytes(one.key_size)
    try:
        value = one.lookup(key)
        one.update(key, (1).to_bytes(one.value_size, "little") if value is None else value)
        if value is None:
            one.delete(key)
    except OSError as error:
        return error.errno in FULL  # it was let as far as the map
    return True


@contextmanager
def _worded(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PrivilegesError(f"{what}: {error.strerror}: {remedy}") from error


def _shut_the_ways_back() -> None:
    """No program started later, and no file's capabilities, can give anything back."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(int(LAST_CAP.read_text("ascii")) + 1):
        with suppress(PermissionError):  # without CAP_SETPCAP; what the bounding set then holds, no_new_privs withholds
            _prctl(PR_CAPBSET_DROP, number)


def _permitted() -> set[int]:
    data = ctypes.create_string_buffer(24)
    if _libc.capget(struct.pack("=Ii", CAPABILITIES_VERSION, 0), data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _, low, _, _, high, _ = struct.unpack("=6I", data.raw)
    return {number for number in range(64) if (low | high << 32) >> number & 1}


def _set_capabilities(effective: set[int], permitted: set[int]) -> None:
    """capset(2) in its third form: effective, permitted and inheritable, for the lower and the upper 32 bits."""
    masks = [sum(1 << number for number in part) for part in (effective, permitted, set())]
    data = struct.pack("=6I", *(mask & 0xFFFFFFFF for mask in masks), *(mask >> 32 for mask in masks))
    if _libc.capset(struct.pack("=Ii", CAPABILITIES_VERSION, 0), data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _prctl(option: int, value: int) -> None:
    # Arguments of prctl(2) are longs; what an option does not use must be 0.
    if _libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
