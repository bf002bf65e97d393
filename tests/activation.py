"""A small stand-in for systemd: it holds the listening sockets, starts servers on them, and hears what they notify.

As a program it is what runs between fork and exec: `activation.py SOCKETS NAMES COMMAND...` puts the descriptors
SOCKETS ("7,8") where sd_listen_fds(3) has them, says how they are named and for which process, and becomes the command.
"""

import os
import socket
import sys
from collections.abc import Sequence
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from types import TracebackType

FIRST = 3  # of the passed descriptors


class Manager:
    """The sockets and the notifications of one service; use it in a `with` statement.

    `watchdog` is in seconds.  `abstract`: the notify socket is in the abstract name space, and not in `place`.
    """

    def __init__(
        self, place: Path, sockets: Sequence[socket.socket], *, watchdog: float = 0, abstract: bool = False
    ) -> None:
        self.sockets = list(sockets)
        self.heard: list[dict[str, str]] = []  # notifications, as they came
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        name = f"@tt-test-{os.getpid()}-{id(self)}" if abstract else str(place / "notify")
        self._notify.bind(name.replace("@", "\0") if abstract else name)
        self.environ = {"NOTIFY_SOCKET": name}
        if watchdog:
            self.environ["WATCHDOG_USEC"] = str(int(watchdog * 1e6))

    def start(self, names: str = "tapetrack.socket") -> dict[str, object]:
        """What makes a `process.Process` one of this service."""
        numbers = [one.fileno() for one in self.sockets]
        passed = ",".join(map(str, numbers))
        wrap = (sys.executable, __file__, passed, names) if numbers else ()
        return {"wrap": wrap, "pass_fds": numbers, "environ": self.environ, "listen": None if numbers else HERE}

    def hear(self) -> list[dict[str, str]]:
        """All notifications so far, each with its variables."""
        while True:
            try:
                message = self._notify.recv(65536)
            except BlockingIOError:
                return self.heard
            self.heard.append(dict(line.split("=", 1) for line in message.decode().split("\n")))

    def heard_with(self, variable: str) -> list[dict[str, str]]:
        """Those that have this variable."""
        return [one for one in self.hear() if variable in one]

    def __enter__(self) -> "Manager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._notify.close()
        for one in self.sockets:
            one.close()


HERE = "127.0.0.1:0"


def become(passed: str, names: str, command: Sequence[str]) -> None:
    """This process, and no other, has the descriptors from FIRST on."""
    numbers = [int(one) for one in passed.split(",")]
    aside = [fcntl(one, F_DUPFD, FIRST + len(numbers)) for one in numbers]  # none of them is overwritten by another
    for i, one in enumerate(aside):
        os.dup2(one, FIRST + i)
        os.close(one)
    for one in numbers:
        if one >= FIRST + len(numbers):
            os.close(one)
    pid = str(os.getpid())
    os.environ |= {"LISTEN_PID": pid, "LISTEN_FDS": str(len(numbers)), "LISTEN_FDNAMES": names}
    if "WATCHDOG_USEC" in os.environ:
        os.environ["WATCHDOG_PID"] = pid
    os.execvp(command[0], command)


if __name__ == "__main__":
    become(sys.argv[1], sys.argv[2], sys.argv[3:])
