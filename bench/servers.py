"""The servers that are measured: ours, the bare loop, and the peers with the configuration in bench/peers/.

Each has its own processor, listens on a free port of 127.0.0.1, logs nothing a request, and is gone, with its files,
when its `with` block ends; all but PostgreSQL are one process.  Rules: a peer that is not installed is
NotMeasuredError; a server that does not start shows what it said.  It must not know what is measured.
"""

import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from pwd import getpwnam, getpwuid
from resource import RLIMIT_NOFILE, getrlimit
from types import TracebackType
from typing import Self

from bench import kit
from tt import keys

PATIENCE = 20.0  # s to start or to stop
SOURCES = 65536  # timed-out sources: what our table holds by default
# Blocks of 65,536 sources each, for kit.block().
HOSTILE, HONEST, IDLE, OFFENDERS = range(4)
PEERS = kit.ROOT / "bench/peers"
DEPS = "run: make bench-deps"
NOBODY = getpwnam("nobody").pw_uid
PLACE = Path("/var/tmp")  # noqa: S108 - of their files: what outlives a reboot is on a disk, as /tmp need not be


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Process:
    """A server process; its files are in `folder`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cpu = kit.SERVER_CPU
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"bench_{name}_", dir=PLACE))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None  # noqa: S101 - a fact for the type checker: asked inside the `with` block
        return self._process.pid

    def command(self) -> Sequence[object]:
        raise NotImplementedError

    def prepare(self) -> None:
        """Files that it needs before it starts."""

    def ready(self) -> None:
        """What it needs once it listens."""

    def await_until(self, there: Callable[[], bool]) -> None:
        """Wait until it is so; shows what the server said where that takes too long."""
        assert self._process is not None  # noqa: S101
        end = time.monotonic() + PATIENCE
        while not there():
            if self._process.poll() is not None or time.monotonic() > end:
                said = (self.folder / "log").read_text(errors="replace").strip()
                raise RuntimeError(f"{self.name} did not start: {said}")
            time.sleep(0.02)

    def time_out_hostile(self, sources: int = SOURCES) -> None:
        """Time out so many sources from HOSTILE on, as everybody is: each sends an HTTP request."""
        kit.load("junk", "plain", self.port, connections=64, block=HOSTILE, sources=sources, count=sources)

    def __enter__(self) -> Self:
        try:
            self.prepare()
            # However the bench ends, its servers end with it.
            words = ["setpriv", "--pdeathsig", "KILL", "--", *kit.command(*self.command(), cpu=self.cpu)]
            environment = os.environ | {"XDG_CONFIG_HOME": str(self.folder)}  # our server enters itself as known there
            with (self.folder / "log").open("wb") as log:
                self._process = subprocess.Popen(  # noqa: S603
                    words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=kit.ROOT
                )
            self.await_until(self._listens)
            self.ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1, ("127.255.0.1", 0)):
            return True
        return False

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Ours(Process):
    """`tt serve`, with all its defaults but the length of a time-out; `options` are added."""

    def __init__(self, *options: object) -> None:
        super().__init__("ours")
        self.options = options
        self.key = ""  # its public key, hexadecimal

    def command(self) -> Sequence[object]:
        listen = f"127.0.0.1:{self.port}"
        fixed = ("--listen", listen, "--data", self.folder, "--timeout", "6h")
        return (kit.ROOT / ".venv/bin/TapeTrackServer", *fixed, *self.options)

    def prepare(self) -> None:
        key, _ = keys.create_or_load(self.folder)
        self.key = key.public.hex()

    def ready(self) -> None:
        """It listens before it has brought a kernel map in line, and connections wait meanwhile."""
        self.await_until(lambda: " started " in (self.folder / "log").read_text(errors="replace"))


class Bare(Process):
    """bench/drop.c."""

    def __init__(self) -> None:
        super().__init__("drop")

    def command(self) -> Sequence[object]:
        return kit.program("drop"), "127.0.0.1", self.port


class Peer(Process):
    """A peer whose configuration is a file of bench/peers/, with {dir} and the ports filled in."""

    configuration = ""

    def __init__(self, program: str, name: str = "") -> None:
        if shutil.which(program) is None:
            raise kit.NotMeasuredError(f"{program} is not installed: {DEPS}")
        super().__init__(name or program)
        self.port2 = free_port()

    @property
    def file(self) -> Path:
        return self.folder / self.configuration

    def fill_in(self, configuration: str, **more: object) -> None:
        """That file of bench/peers/ into the folder, with what stands in braces filled in."""
        room, _ = getrlimit(RLIMIT_NOFILE)
        values = more | {
            "dir": self.folder,
            "port": self.port,
            "port2": self.port2,
            "user": getpwuid(os.getuid() or NOBODY).pw_name,
            "connections": min(100_000, room - 300),
            "half": min(100_000, (room - 1_000) // 2),  # HAProxy wants two descriptors for each
        }
        (self.folder / configuration).write_text((PEERS / configuration).read_text().format(**values))

    def prepare(self) -> None:
        self.fill_in(self.configuration)
        certificate, key = self.folder / "cert.pem", self.folder / "key.pem"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
        subject = ("-subj", "/CN=bench", "-days", "30")
        kit.output_of("openssl", "req", "-x509", *curve, "-nodes", "-keyout", key, "-out", certificate, *subject)
        (self.folder / "both.pem").write_text(certificate.read_text() + key.read_text())


class Nginx(Peer):
    configuration = "nginx.conf"

    def __init__(self) -> None:
        super().__init__("nginx")

    def command(self) -> Sequence[object]:
        return "nginx", "-p", self.folder, "-c", self.file


class Redis(Peer):
    """Holds these values; without any, one key, `k`, with 64 bytes."""

    configuration = "redis.conf"
    request = "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"
    reply = len("$64\r\n") + 64 + len("\r\n")

    def __init__(self, values: Mapping[bytes, bytes] | None = None) -> None:
        super().__init__("redis-server")
        self.values = values or {b"k": 64 * b"x"}

    def command(self) -> Sequence[object]:
        return "redis-server", self.file

    def ready(self) -> None:
        sets = b"".join(resp(b"SET", key, value) for key, value in self.values.items())
        ask_tls(self.port, sets, len(self.values) * b"+OK\r\n")


class DurableRedis(Redis):
    """Each SET that it has answered is on the disk."""

    configuration = "redis-durable.conf"

    def prepare(self) -> None:
        super().prepare()
        self.fill_in(Redis.configuration)


def resp(*words: bytes) -> bytes:
    """A command of Redis."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class Memcached(Peer):
    """Holds one key, `k`, with 64 bytes."""

    configuration = "memcached.options"
    request = "get k\r\n"
    reply = len("VALUE k 0 64\r\n") + 64 + len("\r\nEND\r\n")

    def __init__(self) -> None:
        super().__init__("memcached")

    def command(self) -> Sequence[object]:
        options = [line for line in self.file.read_text().splitlines() if not line.startswith("#")]
        return "memcached", *options

    def ready(self) -> None:
        ask_tls(self.port, b"set k 0 0 64\r\n" + 64 * b"x" + b"\r\n", b"STORED\r\n")


class Python(Process):
    """bench/peers/asyncio_server.py, on asyncio's own loop or on uvloop's."""

    def __init__(self, loop: str = "asyncio") -> None:
        if find_spec(loop) is None:
            raise kit.NotMeasuredError(f"{loop} is not in .venv: run: make bench")
        super().__init__(loop)
        key, _ = keys.create_or_load(self.folder)
        self.key = key.public.hex()

    def command(self) -> Sequence[object]:
        return kit.ROOT / ".venv/bin/python", PEERS / "asyncio_server.py", self.folder, self.port, self.name


class Haproxy(Peer):
    """`port` refuses the hostile sources in the clear; `port2` does so too and answers HTTP over TLS to others."""

    configuration = "haproxy.cfg"
    request = "GET / HTTP/1.1\r\nHost: tape\r\n\r\n"

    def __init__(self, sources: int = SOURCES) -> None:
        super().__init__("haproxy")
        self.sources = sources

    def command(self) -> Sequence[object]:
        return "haproxy", "-db", "-f", self.file

    def prepare(self) -> None:
        super().prepare()
        sources = (kit.source(HOSTILE, number) for number in range(self.sources))
        (self.folder / "sources").write_text("\n".join(sources) + "\n")

    def reply(self) -> int:
        """Bytes of its answer to `request`: always the same."""
        return len(ask_tls(self.port2, self.request.encode(), b"\r\n\r\n"))


class Postgres(Peer):
    """A cluster of its own, with the rows of bench/peers/postgresql.sql; never as root, which it refuses to be."""

    configuration = "postgresql.conf"
    script = "postgresql.pgbench"

    def __init__(self) -> None:
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        # Debian keeps the server's programs off the path.
        self._programs = installed[-1] if installed else Path(shutil.which("pgbench") or "pgbench").parent
        super().__init__(str(self._programs / "pgbench"), "postgresql")
        nobody = getpwnam("nobody")
        self._owner = (nobody.pw_uid, nobody.pw_gid) if os.geteuid() == 0 else None

    def _as_owner(self, name: str, *words: object) -> Sequence[object]:
        if not self._owner:
            return (self._programs / name, *words)
        uid, gid = self._owner  # with another user the kernel forgets the signal, so that it is asked for again
        who = ("setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", "--pdeathsig", "KILL", "--")
        return (*who, self._programs / name, *words)

    def _as_client(self, name: str, *words: object) -> Sequence[object]:
        address = ("--host", "127.0.0.1", "--port", self.port, "--username", "bench")
        return ("env", "PGSSLMODE=require", "PGDATABASE=postgres", self._programs / name, *address, *words)

    def prepare(self) -> None:
        super().prepare()
        if self._owner:
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, *self._owner)
        locale = ("--encoding", "UTF8", "--locale", "C")
        kit.output_of(*self._as_owner("initdb", "--pgdata", self.folder / "data", "--username", "bench", *locale))

    def command(self) -> Sequence[object]:
        return self._as_owner("postgres", "-D", self.folder / "data", "-c", f"config_file={self.file}")

    def ready(self) -> None:
        """It listens before it can answer."""
        kit.output_of(*self._as_client("pg_isready", "--timeout", int(PATIENCE)))
        self.ask((PEERS / "postgresql.sql").read_text())

    def ask(self, sql: str) -> str:
        words = ("--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set", "ON_ERROR_STOP=1", "--file", "-")
        return kit.output_of(*self._as_client("psql", *words), stdin=sql).strip()

    def updates(self, connections: int, seconds: int) -> dict[str, float]:
        """One run of pgbench: how many changes, and the rate a second without the time to connect."""
        words = ("--no-vacuum", "--protocol", "prepared", "--file", PEERS / self.script)
        load = ("--client", connections, "--jobs", 1, "--time", seconds)
        said = kit.output_of(*self._as_client("pgbench", *words, *load), cpu=kit.LOAD_CPU)
        units = re.search(r"transactions actually processed: (\d+)", said)
        rate = re.search(r"tps = ([\d.]+)", said)
        if units is None or rate is None:
            raise RuntimeError(f"pgbench said {said!r}")
        return {"units": float(units[1]), "rate": float(rate[1])}


def ask_tls(port: int, request: bytes, until: bytes) -> bytes:
    """The answer to one request, up to and with `until`."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the certificate was made a moment ago, by the bench
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE) as plain,
        context.wrap_socket(plain) as peer,
    ):
        peer.sendall(request)
        answer = b""
        while not answer.endswith(until):
            part = peer.recv(4096)
            if not part:
                raise RuntimeError(f"port {port} ended the connection after {answer!r}")
            answer += part
        return answer
