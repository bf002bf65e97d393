"""An operator's day with the installed commands on a real server: 50,000 time-outs in its table, an attack under way.

Honest clients come and go all the while, and each of them is answered, also while the server restarts.
"""

import json
import re
import select
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from activation import Manager
from harness import HOST, until
from hostile import Crowd
from metrics_kit import parsed
from process import TT, Process
from test_control import MANY, saved_time_outs
from test_systemd import THREADS, Load, key_of

ATTACKERS = 4000  # sources in each of two crowds: with them all still fit into the table, and into the history
CROWDS = {
    "HTTP request": b"GET / HTTP/1.1\r\n\r\n",
    "TLS ClientHello": bytes.fromhex("16030100ba010000b60303") + bytes(64),
}
# Whom neither the attack nor the honest have: their networks are 127.64.0.0/10, and 127.1.0.0/16 and some above it.
OFFICE, COLLEAGUE, NETWORK = "127.40.0.7", "127.40.0.8", "127.40.0.0/24"
MONITOR = "127.41.0.1"
TIMEOUT = ("--timeout", "1h")  # longer than the day
LONG = 60.0  # s: within these a server ends that has tens of thousands of time-outs to save
STRANGERS, STRANGER = "127.42.0.0/24", "127.42.0.1"
BY_HAND = "198.51.100.66"


class Day:
    """The server of this day, and its commands."""

    def __init__(self, server: Process) -> None:
        self.server = server

    def tt(self, *words: str, code: int = 0, stdin: str = "") -> str:
        """What a command prints on standard output."""
        data = () if words[0] == "config" else ("--data", str(self.server.place / "data"))
        done = subprocess.run(
            [TT, *words, *data], env=self.server.environ, cwd=self.server.place, input=stdin,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, (done.args, done.returncode, done.stdout[-500:], done.stderr)
        return done.stdout

    def objects(self, *words: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.tt(*words, "--json").splitlines()]

    def status(self) -> dict[str, Any]:
        (status,) = self.objects("status")
        return status

    def running(self) -> set[str]:
        """The sources of all time-outs that run."""
        return {item["source"] for item in self.objects("bans", "list")}


@contextmanager
def attack(port: int) -> Iterator[None]:
    """From many sources, those that are timed out too, without a pause."""
    with ExitStack() as stack:
        for number, data in enumerate(CROWDS.values()):
            crowd = Crowd(port, number * ATTACKERS, ATTACKERS, 8, does="flood", data=data)
            stack.enter_context(crowd).await_line()
        yield


@contextmanager
def pinging(server: Process) -> Iterator[None]:
    """`tt ping` all the while; every ping is answered but the one under way at Ctrl-C."""
    command = [TT, "ping", "-i", "0.1", "--json", "--source", MONITOR, f"{HOST}:{server.port}"]
    with subprocess.Popen(command, env=server.environ, stdout=subprocess.PIPE, text=True) as ping:
        try:
            yield
        finally:
            ping.send_signal(signal.SIGINT)
            said, _ = ping.communicate(timeout=60)
    summary = json.loads(said.splitlines()[-1])
    assert summary["transmitted"] - 1 <= summary["received"] > 0, said


def sees_why_and_lifts(day: Day) -> None:
    day.server.send_http(OFFICE)
    # Not by the log, which leaves lines out in an attack.
    (item,) = until("the office is timed out", lambda: day.objects("bans", "list", OFFICE))
    assert (item["reason"], item["looks"]) == ("not_protocol", "HTTP request")
    (past,) = day.objects("bans", "history", OFFICE)
    assert (past["first"], past["state"]) == (r"GET / HTTP/1.1\r\n\r\n", "running")
    day.tt("bans", "remove", OFFICE)
    assert day.server.ping("--source", OFFICE).returncode == 0
    assert day.tt("bans", "list", "10.0.7.0/24").count("\n") == 1 + 256
    assert day.tt("bans", "list", "10.0.7.0/24", "--reason", "stalled", "--newer", "1h").count("\n") == 1
    assert day.tt("bans", "list").count("\n") > MANY


def exempts_the_office(day: Day) -> None:
    day.tt("exempt", "add", NETWORK, "--reason", "head office")
    day.server.send_http(COLLEAGUE)
    assert day.server.ping("--source", COLLEAGUE).returncode == 0
    day.tt("exempt", "add", "127.5.0.0/16")
    day.tt("exempt", "remove", "127.5.0.0/16")
    assert "head office" in day.tt("exempt", "list")
    day.tt("bans", "add", BY_HAND, "--for", "2h", "--reason", "abuse report")
    day.tt("bans", "add", COLLEAGUE, code=1)


def watches(day: Day, metrics: str) -> None:
    def shows_the_attack() -> bool:
        picture = day.tt("top", "--once", "--ascii", "--interval", "0.5")
        return bool(re.search(r"drops +[1-9].*", picture)) and any(looks in picture for looks in CROWDS)

    until("a picture of the attack", shows_the_attack)  # in half a second the attackers may have had no turn
    command = [TT, "bans", "watch", STRANGERS, "--data", str(day.server.place / "data")]
    with subprocess.Popen(command, env=day.server.environ, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        for number in range(250):  # strangers, until it watches
            day.server.send_http(f"127.42.0.{number + 1}")
            if select.select([watch.stdout], [], [], 0.2)[0]:
                break
        assert re.search(r"timed out 127\.42\.0\.\d+ not_protocol for 1:00:00: HTTP request", watch.stdout.readline())
        watch.send_signal(signal.SIGINT)
        watch.communicate()
    begun_before = day.status()["history"]["begun"]
    day.tt("bans", "report", "-o", "day.html")
    page = (day.server.place / "day.html").read_text()
    assert all(looks in page for looks in CROWDS)
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=60) as reply:
        values = parsed(reply.read().decode())
    begun = sum(value for (name, _), value in values.items() if name == "tt_timeouts_begun_total")
    assert begun >= begun_before > 0


def shares_and_checks(day: Day) -> None:
    exported = day.tt("bans", "export")
    assert exported.count("\n") > MANY
    some = "".join(exported.splitlines(keepends=True)[:5000])
    day.tt("bans", "import", "--dry-run", stdin=some)
    day.tt("bans", "import", "--for", "1h", "--reason", "list", stdin="198.51.100.67\n198.51.100.68 # twice\n")
    assert "timeout" in day.tt("config", "show")
    assert day.tt("bans", "history", "--since", "1h").count("\n") > 1


def keeps(day: Day, before: set[str]) -> None:
    """What the one before had timed out and exempted."""
    assert before <= day.running()
    (item,) = day.objects("bans", "list", BY_HAND)
    assert item["note"] == "abuse report"
    assert NETWORK in day.tt("exempt", "list")
    assert {one["state"] for one in day.objects("bans", "history", OFFICE)} == {"lifted"}
    day.server.send_http(COLLEAGUE)
    assert day.server.drops(STRANGER)


def test_every_command_works_beside_50000_bans_and_an_attack_and_a_restart_loses_nothing(tmp_path: Path) -> None:
    saved_time_outs(tmp_path / "data", MANY)
    with ExitStack() as stack:
        manager = stack.enter_context(Manager(tmp_path, [socket.create_server((HOST, 0), backlog=4096)]))
        options = ("--metrics", f"{HOST}:0", *TIMEOUT)
        with Process(tmp_path, *options, **manager.start()) as server:
            load = stack.enter_context(Load(server.port, key_of(tmp_path)))
            stack.enter_context(attack(server.port))
            metrics = server.await_line(rf" metrics address=({HOST}:\d+)")[1]
            day = Day(server)
            until("attackers are timed out", lambda: day.status()["table"]["running"] > MANY + 100)
            with pinging(server):
                sees_why_and_lifts(day)
                exempts_the_office(day)
                watches(day, metrics)
                shares_and_checks(day)
            before = day.running()
            assert len(before) > MANY
            load.await_answers()
            server.send(signal.SIGTERM)
            assert server.wait(LONG) == 0
        with Process(tmp_path, *options, **manager.start()) as server:
            load.await_answers()
            keeps(Day(server), before)
            load.end()
    assert load.outcomes["answered"] > 0
    assert set(load.outcomes) <= {"answered", "cut off"}, load.outcomes
    assert load.outcomes["cut off"] <= THREADS, load.outcomes  # what was open at the stop
