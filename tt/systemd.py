"""What a service manager like systemd gives a service and hears from it, by the documented protocols and no library:
listening sockets (sd_listen_fds(3)), the state of the service (sd_notify(3)), the watchdog (sd_watchdog_enabled(3)).

Rules: each variable is taken out of the environment when it is read, so that it is nobody else's; nothing here ever
waits: what the manager does not take at once goes with the next tick.  Without a manager every call does nothing.
It must not know what the service serves, nor what makes a socket fit for it (listeners.py).
"""

import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import MutableMapping
from typing import NamedTuple

from tt import log

FIRST = 3  # SD_LISTEN_FDS_START: the number of the first descriptor that is passed
TICK = 1.0  # s between two calls of Manager.tick
ADDRESS = 107  # bytes of a Unix socket's address (unix(7))
KEPT = 64  # messages that wait for a manager that takes none; of more, the newest


class ManagerError(Exception):
    """What the service manager has set cannot be used; the text is one line that names it, the rule and the remedy."""


class Passed(NamedTuple):
    """A descriptor from the service manager."""

    descriptor: int
    name: str  # FileDescriptorName= of the socket unit; without one, the unit's own name


def take_passed(environ: MutableMapping[str, str]) -> list[Passed]:
    """The descriptors that are passed to this process (sd_listen_fds(3)); none where they are for another.

    They may be anything, open or not: whoever uses one looks at it first.  Raises ManagerError.
    """
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()):
        return []
    soft_limit = os.sysconf("SC_OPEN_MAX")
    if not (count.isascii() and count.isdecimal() and len(count) < 10 and int(count) <= soft_limit - FIRST):
        raise ManagerError(
            f"LISTEN_FDS={count[:20]!r}: it must be the number of descriptors from {FIRST} on: "
            "start through a socket unit, or take LISTEN_FDS and LISTEN_PID out of the environment"
        )
    named = names.split(":")
    return [
        Passed(FIRST + i, named[i] if i < len(named) and named[i] else "unknown")  # as sd_listen_fds_with_names(3)
        for i in range(int(count))
    ]


class Manager:
    """Who started the service and wants to know how it is; calls are the loop's thread."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Raises ManagerError."""
        address = environ.pop("NOTIFY_SOCKET", "")
        watchdog, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        self._unsent: deque[bytes] = deque(maxlen=KEPT)
        self._address = _address(address) if address else b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if address else None
        self._watchdog = _interval(watchdog) if watchdog and pid in ("", str(os.getpid())) else 0.0
        self._pinged = time.monotonic()
        if 0 < self._watchdog < 2 * TICK:
            words = "the watchdog's time is shorter than two ticks of the loop: a healthy server may be killed"
            log.event(logging.WARNING, words, seconds=self._watchdog, remedy="WatchdogSec=2 or more")

    def close(self) -> None:
        """Nothing is said any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self, status: str) -> None:
        """It serves; also after `reloading`.  The status is a line for a person."""
        self._say("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """It reads its configuration again, until `ready`."""
        # The time lets the manager tell this reload from one before (sd_notify(3), of systemd 253 and newer).
        self._say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It ends."""
        self._say("STOPPING=1", "STATUS=stopping")

    def tick(self) -> None:
        """About every TICK: the watchdog's ping, at the latest after half of its time; and what could not be sent."""
        now = time.monotonic()
        self._send()
        if self._watchdog and not self._unsent and now - self._pinged >= self._watchdog / 2 - TICK:
            self._pinged = now
            self._say("WATCHDOG=1")

    def _say(self, *lines: str) -> None:
        if self._socket is not None:
            self._unsent.append("\n".join(line.replace("\n", " ") for line in lines).encode())
            self._send()

    def _send(self) -> None:
        while self._unsent and self._socket is not None:
            try:
                self._socket.sendto(self._unsent[0], socket.MSG_NOSIGNAL, self._address)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.ECONNREFUSED, errno.ENOENT):
                    return  # full, or the manager starts itself anew: it hears all of it later
                log.event(logging.WARNING, "the service manager does not hear this server", error=error.strerror)
                self.close()
                return
            self._unsent.popleft()


def _address(text: str) -> bytes:
    """The address of NOTIFY_SOCKET: a path, or with "@" a name of the abstract name space (unix(7))."""
    address = os.fsencode(text)
    if not address.startswith((b"/", b"@")) or len(address) > ADDRESS or b"\0" in address:
        raise ManagerError(
            f"NOTIFY_SOCKET={text[:200]!r}: it must be an absolute path or @NAME of at most {ADDRESS} bytes: "
            "start through a service unit, or take it out of the environment"
        )
    return b"\0" + address[1:] if address.startswith(b"@") else address


def _interval(text: str) -> float:
    """Seconds of WATCHDOG_USEC."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:20]) < 1 << 63):
        raise ManagerError(
            f"WATCHDOG_USEC={text[:20]!r}: it must be a number of microseconds: "
            "start through a service unit with WatchdogSec=, or take it out of the environment"
        )
    return int(text[:20]) / 1e6
