"""The real server as a process, for the tests: started as an operator starts it, read by its log, ended by a signal.

`Process` starts it on a free port of the loopback network with all its files in one folder; `refused` runs one that is
not to start.  Whatever a test does with it, at its end the process must go with exit code 0 and without a traceback.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pytest
from harness import HOST, ended, until

from tt import keys
from tt.noise import create_hello
from tt.wire import HELLO, Hello, encode_hello, header

BIN = Path(sys.executable).parent  # not resolved: the virtual environment's, which holds our commands
SERVER = str(BIN / "TapeTrackServer")
TT = str(BIN / "tt")
STOP = 20.0  # s: within these a server ends after SIGTERM, on a machine that may stand still for some of them


def netns(*first: str) -> tuple[str, ...]:
    """A `wrap` for a network namespace of its own, with loopback alone; `first` are shell commands to run in it."""
    return ("unshare", "--net", "sh", "-ec", "; ".join(["ip link set lo up", *first, 'exec "$@"']), "sh")


def environment(place: Path, **more: str) -> dict[str, str]:
    """The tests' own, but no option of ours from it, and the known servers in `place`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TT_")}
    return kept | {"XDG_CONFIG_HOME": str(place / "config")} | more


def plain_environment() -> dict[str, str]:
    """For programs that are not ours: without the sanitizer's library, and with one language."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"LC_ALL": "C"}


def need(*programs: str, root: bool = False) -> None:
    """Skip where the test cannot run; in continuous integration it has to."""
    missing = [name for name in programs if shutil.which(name) is None]
    if root and os.geteuid() != 0:
        missing.append("root, for a network namespace of its own")
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"it needs {', '.join(missing)}")


class Process:
    """A server in `place`, which another one may have used before; use it in a `with` statement.

    `wrap` is a command that runs the one behind it, in the same process; `blind` that its log cannot be read.
    """

    def __init__(
        self,
        place: Path,
        *arguments: str,
        listen: str | None = f"{HOST}:0",
        command: Sequence[str] = (SERVER,),
        wrap: Sequence[str] = (),
        stderr: int | None = None,
        blind: bool = False,
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
    ) -> None:
        self.place = place
        self.environ = environment(place, **(environ or {}))
        self._log = place / f"log{len(list(place.glob('log*')))}"
        where = [] if listen is None else ["--listen", listen]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*wrap, *command, "--data", str(place / "data"), *where, *arguments],
                env=self.environ,
                pass_fds=pass_fds,
                cwd=cwd or place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log if stderr is None else stderr,
            )
        self._blind = blind or stderr is not None
        self.pid = self._process.pid
        self.port = 0

    def __enter__(self) -> "Process":
        try:
            if self._blind:
                self.port = self._known_port()
            else:
                self.port = int(self.await_line(r'\blistening\b.*address"?[=:] ?"?\S*?:(\d+)')[1])
                self.await_line(r"\bstarted\b")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
            sys.stderr.write(self.log)
        elif self._process.poll() is None:
            assert self.stop() == 0
        if kind is None:
            assert "raceback" not in self.log, self.log

    def _known_port(self) -> int:
        known = self.place / "config/tt/known_servers"
        return int(until("an entry in the known servers", lambda: known.exists() and known.read_text()).split()[0][10:])

    # ---- its log ----------------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        return self._log.read_text("ascii")

    def find(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, self.log)

    def await_line(self, pattern: str) -> re.Match[str]:
        """The first match in the log, once it is there."""

        def found() -> re.Match[str] | None:
            over = self._process.poll() is not None  # before the look: what it said last is there then
            match = self.find(pattern)
            assert match or not over, f"no {pattern!r}, and the server has ended: {self.log}"
            return match

        return until(f"{pattern!r} in the log", found)

    def await_timed_out(self, source: str) -> str:
        """The log line of a source's time-out."""
        return self.await_line(rf"(.* timed out source={re.escape(source)} .*)\n")[1]  # all of it

    # ---- its peers --------------------------------------------------------------------------------------------------

    def connect(self, source: str = "127.0.0.2", *, buffer: int | None = None) -> socket.socket:
        """A connection; the caller closes it.  `buffer`: bytes to receive into."""
        peer = socket.socket()
        peer.settimeout(10)
        if buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        peer.bind((source, 0))
        try:
            peer.connect((HOST, self.port))
        except OSError:  # a reset may be here before connect() returns
            peer.close()
            raise
        return peer

    def send_http(self, source: str) -> None:
        """Speak what is not the protocol; it answers nothing."""
        with self.connect(source) as peer:
            peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert ended(peer) == b""

    def time_out(self, source: str) -> str:
        """Make it time out a source; the log line that says so."""
        self.send_http(source)
        return self.await_timed_out(source)

    def drops(self, source: str) -> bool:
        """Whether a new connection from there is closed at once."""
        # Its own view of the data directory, which may be mounted for it alone.
        public = keys.from_text(Path(f"/proc/{self.pid}/root{self.place}/data/server.pub").read_text())
        message, _ = create_hello(public, encode_hello(Hello("test", "0")))
        try:
            with self.connect(source) as peer:  # whoever may come gets a WELCOME, however late
                peer.sendall(header(HELLO, len(message)) + message)
                return not peer.recv(1)
        except ConnectionError:
            return True

    def ping(self, *options: str, count: int = 1) -> subprocess.CompletedProcess[str]:
        """`tt ping`, as the user who started the server."""
        return subprocess.run(
            [TT, "ping", "-c", str(count), "-i", "0", *options, f"{HOST}:{self.port}"],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def inside(self, *command: str) -> str:
        """What a command prints that must succeed in the server's network namespace."""
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self.pid}/ns/net", *command],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done
        return done.stdout

    # ---- its end ----------------------------------------------------------------------------------------------------

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, patience: float = STOP) -> int:
        return self._process.wait(patience)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code; fails where it takes longer than STOP."""
        self.send(number)
        return self.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def refused(place: Path, *arguments: str, wrap: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> str:
    """The one line with which a server does not start.  It must have left everything below `place` as it was."""

    def files() -> dict[str, tuple[int, bytes]]:
        return {str(p): (p.stat().st_mode, p.read_bytes() if p.is_file() else b"") for p in place.rglob("*")}

    before = files()
    done = subprocess.run(
        [*wrap, SERVER, *arguments],
        env=environment(place, **(environ or {})),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("tt: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert files() == before
    return done.stderr
