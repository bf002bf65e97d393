"""`tt bans list --json` of 50,000 time-outs while an attack runs: how long it takes, and how much it delays a ping.

The pings come from this process, a millisecond apart, at a real-time priority where that is allowed, so that neither
the command nor the attacker takes the processor from them; what remains is the server's delay.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from bench import kit
from bench.growth import TimedOut
from bench.kit import Report, Row, Run, column
from bench.servers import HOSTILE
from tt.client import Client

BANS = 50_000
HOSTILE_RATE = 5_000  # connections a second of these sources
APART = 0.001  # s between two pings
LEAD = 0.5  # s of attack before anything counts


@contextmanager
def _real_time() -> Iterator[None]:
    """This process before all others, where it may; what it starts is as any."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))


def _pings(client: Client, done: Callable[[], bool]) -> list[float]:
    """Seconds that each took, until it is done."""
    took = []
    while not done():
        took.append(client.ping().seconds)
        time.sleep(APART)
    return took


def _listed(server: TimedOut, client: Client) -> Run:
    words = kit.command(kit.ROOT / ".venv/bin/tt", "bans", "list", "--json", "--data", server.folder, cpu=kit.LOAD_CPU)
    path = server.folder / "listed"
    with path.open("wb") as out:
        begun = time.monotonic()
        lister = subprocess.Popen(words, stdout=out)  # noqa: S603
        try:
            with _real_time():
                pings = _pings(client, lambda: lister.poll() is not None)
            seconds = time.monotonic() - begun
        finally:
            lister.kill()
            code = lister.wait()
    lines = path.read_bytes()
    if code or (found := _count(lines)) < BANS:
        raise RuntimeError(f"tt bans list ended with {code} and told of {0 if code else found} time-outs")
    end = time.monotonic() + seconds
    with _real_time():
        alone = _pings(client, lambda: time.monotonic() > end)
    return {"seconds": seconds, "slowest_ms": max(pings) * 1000, "slowest_alone_ms": max(alone) * 1000}


def _count(said: bytes) -> int:
    """One array, or an object a line."""
    if said.startswith(b"["):
        return len(json.loads(said))
    return len(said.splitlines())


def listing(report: Report) -> None:
    runs = 3 if report.quick else 9
    with TimedOut(BANS, "--exempt", "127.0.0.1") as server:
        hostile = kit.loading(
            "drop", "plain", server.port, block=HOSTILE, sources=BANS, rate=HOSTILE_RATE, connections=8192, give_up=50,
            seconds=600,
        )  # fmt: skip
        with hostile as attack, Client("127.0.0.1", server.port, key=bytes.fromhex(server.key)) as client:
            with kit.on_load_cpu():
                time.sleep(LEAD)
                results = [_listed(server, client) for _ in range(runs)]
            attack.send_signal(signal.SIGTERM)
            rate = json.loads(attack.communicate(timeout=60)[0])["rate"]
    report.keep("listing", results)
    name = f"tt bans list --json, {BANS:,} of them, {HOSTILE_RATE:,} hostile/s"
    row = Row(f"{name}: slowest ping", "ms", column(results, "slowest_ms"), "nobody lists")
    row.peer = column(results, "slowest_alone_ms")
    delay = [run["slowest_ms"] - run["slowest_alone_ms"] for run in results]
    report.add(
        Row(
            name, "s", column(results, "seconds"), wanted="at most 1", note=f"the hostile came at {rate:,.0f} a second"
        ),
        row,
        Row(f"{name}: delay of the slowest ping", "ms", delay, wanted="at most 5"),
    )
