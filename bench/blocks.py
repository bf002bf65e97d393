"""Time from an offence until the kernel drops its sender: our server, fail2ban, CrowdSec with its firewall bouncer.

The offence is the same for all: bytes that are no protocol of the server's.  Ours answers them itself; fail2ban and
CrowdSec read of them in nginx's access log.  Blocked is who gets no answer to a SYN: probes connect from the source
again and again until one is unanswered, and the time is that of sending this one.
Rules: everything in the bench's own namespaces, on one processor; nothing is told to anybody outside.
"""

import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Self

from bench import kit
from bench.kernel import pinned_map
from bench.kit import NotMeasuredError, Report, Row, Run, column
from bench.servers import DEPS, OFFENDERS, PATIENCE, PEERS, Nginx, Ours, Peer, Process
from bench.userspace import peer

JUNK = b"\x16\x03\x01 this is not the protocol\r\n\r\n"  # begins as TLS does; nginx answers 400
CROWD = 200  # offenders at once
UNANSWERED = 0.05  # s without an answer to a SYN on loopback, after which it counts as dropped
APART = 0.05  # of the time that has passed lies between two probes of a source
LEAST_APART = 200e-6  # s for each source that is probed
LONGEST = 20.0  # s, after which an offender counts as never dropped
WARM = 3.0, 20  # s for the first offender to be dropped, and how often another one tries: until all of a chain runs


# ---- the peers ------------------------------------------------------------------------------------------------------


class Logging(Nginx):
    """nginx whose access log the next two read."""

    configuration = "nginx-logging.conf"

    @property
    def access_log(self) -> Path:
        return self.folder / "access.log"


class Banner(Peer):
    """A program beside nginx that reads its access log; its configuration is a folder of bench/peers/."""

    def __init__(self, program: str, nginx: Logging) -> None:
        super().__init__(program)
        self.nginx = nginx
        self.port = nginx.port

    def prepare(self) -> None:
        for path in sorted((PEERS / self.configuration).iterdir()):
            self.fill_in(f"{self.configuration}/{path.name}", log=self.nginx.access_log)

    def fill_in(self, configuration: str, **values: object) -> None:
        (self.folder / configuration).parent.mkdir(exist_ok=True)
        super().fill_in(configuration, **values)


class Fail2ban(Banner):
    configuration = "fail2ban"

    def __init__(self, nginx: Logging) -> None:
        super().__init__("fail2ban-server", nginx)

    def prepare(self) -> None:
        super().prepare()
        for folder in ("action.d", "filter.d"):  # those of the package
            (self.folder / self.configuration / folder).symlink_to(Path("/etc/fail2ban") / folder)

    def _files(self) -> Sequence[object]:
        return "-c", self.folder / self.configuration, "-s", self.folder / "socket", "-p", self.folder / "pid"

    def command(self) -> Sequence[object]:
        return "fail2ban-server", *self._files(), "-x", "-f", "start"

    def ready(self) -> None:
        """nginx has its port already: asked until the jail is there."""
        asked = kit.command("fail2ban-client", *self._files(), "status", "tape")
        self.await_until(lambda: subprocess.run(asked, capture_output=True, check=False).returncode == 0)  # noqa: S603


class Crowdsec(Banner):
    """The engine; Bouncer is what it tells."""

    configuration = "crowdsec"
    key = "a key between two programs of one namespace"

    def __init__(self, nginx: Logging) -> None:
        super().__init__("crowdsec", nginx)

    @property
    def folder_of(self) -> Path:
        return self.folder / self.configuration

    def _cscli(self, *words: object) -> None:
        kit.output_of("cscli", "-c", self.folder_of / "config.yaml", *words)

    def prepare(self) -> None:
        super().prepare()
        for name, stage in (("parser.yaml", "parsers/s01-parse"), ("scenario.yaml", "scenarios")):
            (self.folder_of / stage).mkdir(parents=True)
            (self.folder_of / name).rename(self.folder_of / stage / name)
        shutil.copytree("/etc/crowdsec/patterns", self.folder_of / "patterns")
        (self.folder / "hub").symlink_to("/usr/share/crowdsec/hub")
        self._cscli("machines", "add", "bench", "--password", "bench", "--file", self.folder / "credentials.yaml")
        self._cscli("bouncers", "add", "bench", "--key", self.key.replace(" ", ""))

    def command(self) -> Sequence[object]:
        return "crowdsec", "-c", self.folder_of / "config.yaml"

    def ready(self) -> None:
        self.await_until(lambda: answers(self.port2))


class Bouncer(Banner):
    configuration = "crowdsec-bouncer"

    def __init__(self, engine: Crowdsec) -> None:
        super().__init__("crowdsec-firewall-bouncer", engine.nginx)
        self.engine = engine
        self.port2 = engine.port2

    def fill_in(self, configuration: str, **values: object) -> None:
        super().fill_in(configuration, key=self.engine.key.replace(" ", ""), **values)

    def command(self) -> Sequence[object]:
        return "crowdsec-firewall-bouncer", "-c", self.folder / self.configuration / "bouncer.yaml"

    def ready(self) -> None:
        self.await_until(lambda: "crowdsec" in kit.output_of("nft", "list", "sets"))


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


# ---- offenders ------------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """A SYN on its way."""

    number: int  # of the offender
    begun: float
    socket: socket.socket


class Offenders:
    """Sources that offend at one moment; `watch` tells after how many seconds each was dropped."""

    def __init__(self, port: int, first: int, count: int) -> None:
        self._port = port
        self._sources = [kit.source(OFFENDERS + 1, first + number) for number in range(count)]
        self._epoll = select.epoll()
        self._probes: dict[int, Probe] = {}
        self._due: dict[int, float] = {}
        self._blocked: dict[int, float] = {}
        self._begun = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for probe in self._probes.values():
            probe.socket.close()
        self._epoll.close()

    def _connect(self, number: int) -> socket.socket:
        one = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset: no TIME_WAIT
        one.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        one.bind((self._sources[number], 0))
        with suppress(BlockingIOError):
            one.connect(("127.0.0.1", self._port))
        return one

    def watch(self, longest: float) -> list[float]:
        """Offend, and wait until all are dropped, or so long: after how many seconds each was that was."""
        offending = [self._connect(number) for number in range(len(self._sources))]
        for one in offending:
            select.select([], [one], [], PATIENCE)
        self._begun = time.monotonic()
        self._due = dict.fromkeys(range(len(self._sources)), self._begun)
        try:
            for one in offending:
                one.send(JUNK)
            while len(self._blocked) < len(self._sources) and time.monotonic() < self._begun + longest:
                self._turn()
        finally:
            for one in offending:
                one.close()
        return sorted(self._blocked.values())

    def _turn(self) -> None:
        now = time.monotonic()
        for number, due in list(self._due.items()):
            if due <= now:
                del self._due[number]
                probe = Probe(number, time.monotonic(), self._connect(number))
                self._probes[probe.socket.fileno()] = probe
                self._epoll.register(probe.socket, select.EPOLLOUT)
        spare = min(self._due.values(), default=now + UNANSWERED) - time.monotonic()
        for descriptor, _ in self._epoll.poll(0.001 if spare > 0.001 else 0):
            self._answered(self._probes.pop(descriptor))
        for descriptor, probe in list(self._probes.items()):
            if now - probe.begun > UNANSWERED:
                self._blocked[probe.number] = probe.begun - self._begun
                self._probes.pop(descriptor).socket.close()

    def _answered(self, probe: Probe) -> None:
        """Accepted, or accepted and reset: either way the kernel has let its SYN through."""
        now = time.monotonic()
        probe.socket.close()
        apart = max(LEAST_APART * len(self._sources), APART * (now - self._begun))
        self._due[probe.number] = now + apart if len(self._sources) > 1 or now - self._begun > 0.01 else now


# ---- the comparison -------------------------------------------------------------------------------------------------


def _reading(report: Report, stack: ExitStack) -> dict[str, Process]:
    """fail2ban and CrowdSec, each beside an nginx of its own."""
    sides: dict[str, Process] = {}
    if fail2ban := peer(report, stack, lambda: Fail2ban(stack.enter_context(Logging()))):
        sides["fail2ban"] = fail2ban
    engine = peer(report, stack, lambda: Crowdsec(stack.enter_context(Logging())))
    if engine and peer(report, stack, lambda: Bouncer(engine)):
        sides["CrowdSec"] = engine
    return sides


def blocks(report: Report) -> None:
    """One offender after another, and 200 at once."""
    if not kit.IN_NAMESPACE:
        raise NotMeasuredError("what the kernel drops needs root")
    alone, crowds = (2, 1) if report.quick else (10, 3)
    if shutil.which("nft") is None:
        raise NotMeasuredError(f"nft is not installed: {DEPS}")
    with ExitStack() as stack:
        _, path = stack.enter_context(pinned_map())
        stack.callback(kit.output_of, "nft", "flush", "ruleset")  # of this namespace: whatever a peer has left in it
        sides: dict[str, Process] = {"ours": stack.enter_context(Ours("-B", path)), **_reading(report, stack)}
        firsts = count(step=CROWD)  # of them all: CrowdSec's bouncer drops a source before every port
        for server in sides.values():
            _warm(server, firsts)
        one = kit.alternate({name: partial(_run, server, firsts, 1) for name, server in sides.items()}, alone)
        crowd = kit.alternate({name: partial(_run, server, firsts, CROWD) for name, server in sides.items()}, crowds)
    report.keep("one", one)
    report.keep("crowd", crowd)
    for name in ("fail2ban", "CrowdSec"):
        report.add(
            _row("offence to block", one, name), _row(f"{CROWD} offences at once to the last block", crowd, name)
        )


def _warm(server: Process, firsts: Iterator[int]) -> None:
    """Until its chain works: a log is not followed at once, and fail2ban makes its table with its first ban."""
    longest, tries = WARM
    for _ in range(tries):
        with Offenders(server.port, next(firsts), 1) as offenders:
            if offenders.watch(longest):
                return
    raise RuntimeError(f"{server.name}: {tries} offenders in turn were not dropped within {longest:g} s each")


def _run(server: Process, firsts: Iterator[int], offenders_at_once: int) -> Run:
    with Offenders(server.port, next(firsts), offenders_at_once) as offenders, kit.on_load_cpu():
        took = offenders.watch(LONGEST)
    missed = offenders_at_once - len(took)
    if not took or (missed and isinstance(server, Ours)):
        raise RuntimeError(
            f"{server.name}: {missed} of {offenders_at_once} offenders were not dropped in {LONGEST:g} s"
        )
    return {
        "last_ms": took[-1] * 1000,
        "median_ms": median(took) * 1000,
        "offenders": offenders_at_once,
        "missed": missed,
    }


def _row(name: str, results: dict[str, list[Run]], peer_name: str) -> Row:
    ours, other = results["ours"], results.get(peer_name, [])
    row = Row(name, "ms", column(ours, "last_ms"), peer_name, column(other, "last_ms"))
    if other:
        row.ratio = kit.ratios(other, ours, "last_ms")
        if missed := sum(column(other, "missed")):
            of = sum(column(other, "offenders"))
            row.note = f"{peer_name} never dropped {missed:.0f} of {of:.0f}; what is told is the last that it did drop"
    return row
