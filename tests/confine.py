"""Runs a command under what a systemd unit takes away from it, without systemd: `confine.py UNIT... -- COMMAND...`.

Of the units' text it takes SystemCallFilter=, SystemCallErrorNumber=EPERM, RestrictAddressFamilies=,
MemoryDenyWriteExecute= and NoNewPrivileges=; later files add to earlier ones, as drop-ins do.  Capabilities and the
file system are `setpriv`'s and `mount`'s, before it (see test_deploy.py).
"""

import ctypes
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 38, 65, 1
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM  # seccomp.h of libseccomp: SCMP_ACT_*
EQUAL = 4  # SCMP_CMP_EQ


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def settings(texts: Iterable[str], name: str) -> list[str]:
    """The values of a setting in the order of its lines; an empty one forgets those before it."""
    values: list[str] = []
    for line in "\n".join(texts).splitlines():
        key, equals, value = line.partition("=")
        if equals and key == name:
            values = [*values, value] if value else []
    return values


def groups() -> dict[str, set[str]]:
    """The groups of system calls, as this systemd has them, and what is in each."""
    shown = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, set[str]] = {}
    for line in shown.splitlines():
        if line.startswith("@"):
            now = found.setdefault(line.strip(), set())
        elif line.startswith("    ") and not line.strip().startswith("#"):
            now.add(line.strip())
    return found


def allowed_calls(texts: Sequence[str]) -> set[str]:
    """The system calls that the units' lists leave."""
    known = groups()

    def expand(name: str) -> set[str]:
        return set().union(*map(expand, known[name])) if name.startswith("@") else {name}

    allowed = expand("@default")
    for value in settings(texts, "SystemCallFilter"):
        named = set().union(*(expand(name) for name in value.removeprefix("~").split()))
        allowed = allowed - named if value.startswith("~") else allowed | named
    return allowed


def confine(texts: Sequence[str]) -> None:
    """This process, and what it becomes."""
    calls, families = allowed_calls(texts), settings(texts, "RestrictAddressFamilies")[0].split()
    libc, seccomp = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    assert settings(texts, "SystemCallErrorNumber") == ["EPERM"]
    assert settings(texts, "NoNewPrivileges") == settings(texts, "MemoryDenyWriteExecute") == ["yes"]
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    if libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
        assert ctypes.get_errno() == errno.EINVAL, "before Linux 6.3"
    context = ctypes.c_void_p(seccomp.seccomp_init(REFUSE))
    for name in calls - {"socket"}:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # else another architecture's, or newer than this libseccomp
            assert seccomp.seccomp_rule_add_array(context, ALLOW, number, 0, None) == 0, name
    number = seccomp.seccomp_syscall_resolve_name(b"socket")
    for family in families:
        comparison = Comparison(0, EQUAL, int(getattr(socket, family)), 0)
        assert seccomp.seccomp_rule_add_array(context, ALLOW, number, 1, ctypes.byref(comparison)) == 0
    assert seccomp.seccomp_load(context) == 0


if __name__ == "__main__":
    at = sys.argv.index("--")
    confine([Path(name).read_text("ascii") for name in sys.argv[1:at]])
    os.execvp(sys.argv[at + 1], sys.argv[at + 1 :])
