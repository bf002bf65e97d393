"""The real server under faults: no memory, descriptors or disk, a wrong clock, signals, kills; honest clients beside.

Each test brings one fault and asks the same of the server: honest clients are served, without an error that the fault
does not explain; nobody honest is timed out; when the fault is over, so is its effect.  What strangers do on purpose
is in test_floods.py.  The long forms run by hand: FAULTS_KILLS (rounds of kill -9; 100 is the documented number).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from faults import LONG, Faults, client, pinging
from harness import HOST, until
from hostile import Crowd
from process import SERVER, TT, Process, environment, need

from tt import timeouts
from tt._core import TimeoutTable
from tt.client import TapeTrackError
from tt.state_file import StateFileError

NS = 10**9
KILLS = int(os.environ.get("FAULTS_KILLS", "5"))
SANITIZED = os.environ.get("TT_BUILD") == "asan"
# The clients of a test come from one source.  Idle is longer than a busy machine lets a client wait for its next turn.
FREE = {"TT_HELLO_RATE": "100000", "TT_HELLO_BURST": "1000", "TT_IDLE_BEFORE_LOGIN": "8"}


def ask(server: Process, *words: str) -> Any:
    """What `tt WORDS --json` says of this server: one object a line."""
    command = [TT, *words, "--json", "--data", str(server.place / "data")]
    done = subprocess.run(command, env=server.environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def running(server: Process) -> int:
    return int(ask(server, "status")[0]["table"]["running"])


def bans(server: Process) -> dict[str, float]:
    """Seconds left, by source."""
    return {item["source"]: item["ends_in_s"] for item in ask(server, "bans", "list")}


def is_timed_out(server: Process, source_: str = "127.0.0.1") -> bool:
    return source_ in bans(server)


# ---- descriptors and memory -----------------------------------------------------------------------------------------


def test_20000_silent_connections_of_400_sources_keep_out_nobody_honest_and_stop_no_work(
    tmp_path: Path,
) -> None:
    options = {"TT_SAVE_INTERVAL": "1", "TT_HELLO_DEADLINE": "300"}
    with Process(tmp_path, environ=options) as server, pinging(server) as pings:

        def silent() -> int:
            return int(ask(server, "status")[0]["connections"]["new"])

        with ExitStack() as started:
            crowds = [
                started.enter_context(Crowd(server.port, first, 100, 5000, does="silent"))
                for first in range(0, 400, 100)
            ]
            for crowd in crowds:
                crowd.await_line()
            places = int(server.await_line(r"started .*connections=(\d+)")[1])
            # The last of them may still be in the backlog.  Who pings has a place too.
            until("all that have a place", lambda: silent() >= min(places, 20_000) - 10, 60)
            assert server.ping(count=20).returncode == 0
            with client(server, "127.0.0.7", timeout=LONG) as newcomer:
                newcomer.ping()
            server.time_out("127.0.0.9")
            until("a save", (tmp_path / "data/timeouts").exists)
            assert list(bans(server)) == ["127.0.0.9"]
        until("an empty server", lambda: silent() == 0, 60)
        assert server.ping().returncode == 0
    assert max(pings) < LONG


@pytest.mark.parametrize(
    ("call", "every"), [("extension", 3), ("accept", 2), ("epoll_ctl", 3), ("send", 7), ("recv", 7)]
)
def test_a_call_that_fails_now_and_then_costs_its_connection_alone(
    tmp_path: Path, faults: Faults, call: str, every: int
) -> None:
    if SANITIZED and call == "extension":
        pytest.skip("the sanitizer has its own malloc, which cannot be made to fail")
    with Process(tmp_path, environ=faults.environ | FREE) as server:
        with client(server) as before:
            before.ping()
            faults.every(call, every)
            lost = [fails(server) for _ in range(100)]
            faults.every(call, 0)
        assert faults.failed(call) >= 10
        assert sum(lost) <= faults.failed(call), "no more connections than calls failed"
        assert lost.count(False) >= 20, "the others were served"
        assert not bans(server)
        assert server.ping(count=20).returncode == 0
        until("an end of all", lambda: not any(ask(server, "status")[0]["connections"].values()))


def fails(server: Process) -> bool:
    """Whether an honest client that comes, pings and goes met an error."""
    try:
        with client(server, timeout=LONG) as visitor:
            for _ in range(3):
                visitor.ping()
    except TapeTrackError:
        return True
    return False


@pytest.mark.skipif(SANITIZED, reason="the sanitizer has its own malloc, which cannot be made to fail")
def test_an_interpreter_without_memory_loses_connections_and_neither_the_server_nor_a_good_name(
    tmp_path: Path, faults: Faults
) -> None:
    options = faults.environ | FREE | {"PYTHONMALLOC": "malloc"}  # every object is then a call
    with Process(tmp_path, blind=True, stderr=subprocess.DEVNULL, environ=options) as server:
        until("it has started", lambda: not fails(server))
        for every in (300, 100, 30, 10):
            faults.every("interpreter", every)
            for _ in range(50):
                fails(server)
            faults.every("interpreter", 0)
        assert faults.failed("interpreter") >= 50
        assert not bans(server)
        assert server.ping(count=20).returncode == 0
        until("an end of all", lambda: not any(ask(server, "status")[0]["connections"].values()))


# ---- the log and the disk -------------------------------------------------------------------------------------------


def test_a_stderr_that_nobody_reads_and_10000_time_outs_hold_up_no_ping(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    options = {"TT_LOG_TIMEOUTS_PER_SECOND": "100000", "TT_LOG_BUFFER": "64 KiB"}
    with Process(tmp_path, stderr=writer, environ=options) as server:
        os.close(writer)
        with pinging(server) as pings, Crowd(server.port, 0, 10_000, 10_000, does="once", data=b"GET /") as crowd:
            crowd.await_line()
            until("10,000 time-outs", lambda: running(server) == 10_000)
        assert server.ping(count=100).returncode == 0
        assert max(pings) < LONG
        assert server.stop() == 0
    os.close(reader)


def inside(server: Process, *command: str) -> None:
    """Run a command in the server's mount namespace."""
    subprocess.run(
        ["nsenter", f"--mount=/proc/{server.pid}/ns/mnt", *command], check=True, env=environment(server.place)
    )


def fill(server: Process, disk: Path) -> None:
    inside(server, "sh", "-c", f"cat /dev/zero >{disk}/filler 2>/dev/null || true")


def empty(server: Process, disk: Path) -> None:
    inside(server, "rm", f"{disk}/filler")


def lock(server: Process, disk: Path) -> None:
    # The kernel makes no file system read-only in which a file is open to be written, as the catalogue's is.
    inside(server, "chattr", "+i", str(disk))


def unlock(server: Process, disk: Path) -> None:
    inside(server, "chattr", "-i", str(disk))


@pytest.mark.root
@pytest.mark.parametrize(
    ("damage", "repair", "says"),
    [(fill, empty, "No space left on device"), (lock, unlock, "Operation not permitted")],
    ids=["full", "immutable"],
)
def test_a_disk_that_takes_nothing_is_said_and_weakens_no_ban_and_is_made_up_for(
    tmp_path: Path, damage: Callable[..., None], repair: Callable[..., None], says: str
) -> None:
    need("unshare", "nsenter", "mount", "chattr", root=True)
    disk = tmp_path / "data"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=256k none "{disk}"; exec "$@"'
    wrap = ("unshare", "--mount", "sh", "-ec", mount, "sh")
    with Process(tmp_path, wrap=wrap, environ={"TT_SAVE_INTERVAL": "1"}) as server:
        saved = Path(f"/proc/{server.pid}/root{disk}")
        shutil.copy(saved / "server.pub", tmp_path / "server.pub")
        damage(server, disk)
        server.time_out("127.0.0.9")
        server.await_line(f"time-outs not saved.*{says}")
        assert server.ping(count=20).returncode == 0
        assert server.drops("127.0.0.9")
        assert not (saved / "timeouts").exists()
        server.time_out("127.0.0.10")
        repair(server, disk)
        until("the save", (saved / "timeouts").exists)
        table = TimeoutTable(1024)
        until("both in it", lambda: timeouts.load(saved / "timeouts", table, 0, time.time_ns()) == 2)


def test_a_start_without_threads_is_refused_in_one_line(tmp_path: Path, faults: Faults) -> None:
    faults.every("thread", 1)
    words = [SERVER, "--data", str(tmp_path / "data"), "--listen", f"{HOST}:0"]
    environ = environment(tmp_path) | faults.environ
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tt: ")]
    assert "no thread can be had to commit and to hash: raise the limit of tasks" in line
    assert "Traceback" not in done.stderr


def test_a_save_for_which_no_thread_can_be_had_is_made_up_for(tmp_path: Path, faults: Faults) -> None:
    """As under a service manager's limit of tasks."""
    for stops in (False, True):
        place = tmp_path / ("stops" if stops else "goes on")
        place.mkdir()
        saved = place / "data/timeouts"
        options = faults.environ | {"TT_SAVE_INTERVAL": "1"}
        # What it says of each try is a failure with its traceback.
        with Process(place, stderr=subprocess.DEVNULL, environ=options) as server:
            assert server.ping().returncode == 0  # it has its threads
            faults.every("thread", 1)
            tries = faults.failed("thread")
            server.send_http("127.0.0.9")
            until("a try", lambda t=tries: faults.failed("thread") > t)
            assert server.ping().returncode == 0
            if not stops:
                faults.every("thread", 0)
                until("the save", saved.exists)
        table = TimeoutTable(1024)
        assert timeouts.load(saved, table, 0, time.time_ns()) == 1, place.name


# ---- the clock ------------------------------------------------------------------------------------------------------


def test_a_step_of_the_wall_clock_neither_ends_nor_lengthens_a_running_time_out(tmp_path: Path, faults: Faults) -> None:
    with Process(tmp_path, environ=faults.environ) as server:
        server.time_out("127.0.0.9")
        for days in (10, -10, 365 * 20):
            faults.step(days * 86400)
            assert 500 < bans(server)["127.0.0.9"] <= 600
            assert server.drops("127.0.0.9")
            assert server.ping(count=3).returncode == 0


@pytest.mark.parametrize(
    ("step", "left"), [(300, (200, 300)), (-86400, (500, 600)), (86400, None), (20 * 365 * 86400, None)],
    ids=["5 minutes on", "a day back", "a day on", "20 years on"],
)  # fmt: skip
def test_a_saved_table_read_under_another_wall_clock_holds_nobody_longer_than_he_had_left(
    tmp_path: Path, faults: Faults, step: int, left: tuple[int, int] | None
) -> None:
    with Process(tmp_path, environ=faults.environ) as server:
        server.time_out("127.0.0.9")
    faults.step(step)
    with Process(tmp_path, environ=faults.environ) as again:
        found = bans(again).get("127.0.0.9")
        assert (found is None) == (left is None)
        if found is not None and left is not None:
            assert left[0] <= found <= left[1]
        assert again.ping().returncode == 0


# ---- signals and kills ----------------------------------------------------------------------------------------------


def test_a_storm_of_signals_costs_no_ping_and_no_ban_and_ends_with_a_clean_stop(tmp_path: Path) -> None:
    with Process(tmp_path) as server:
        with pinging(server):
            for number in range(400):
                server.send(signal.SIGHUP)
                if number % 100 == 50:
                    server.time_out(f"127.0.0.{number // 100 + 9}")
            until("the reloads", lambda: server.find("configuration reloaded"))
        for _ in range(50):
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                with suppress(ProcessLookupError):
                    server.send(number)
        assert server.wait() == 0
    with Process(tmp_path) as again:
        assert sorted(bans(again)) == ["127.0.0.10", "127.0.0.11", "127.0.0.12", "127.0.0.9"]


def test_a_signal_at_any_moment_of_the_start_ends_it_and_harms_no_later_one(tmp_path: Path) -> None:
    dice = random.Random(4)
    with Process(tmp_path) as server:
        server.time_out("127.0.0.9")
    began = time.monotonic()
    with Process(tmp_path):
        length = time.monotonic() - began
    words = [SERVER, "--data", str(tmp_path / "data"), "--listen", f"{HOST}:0"]
    for _ in range(10):
        process = subprocess.Popen(words, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
        with suppress(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0, 1.1 * length))
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)  # one that came early is heard when all of the start is done
        assert process.returncode in (0, -signal.SIGTERM), log
        assert "Traceback" not in log
    with Process(tmp_path) as again:
        assert list(bans(again)) == ["127.0.0.9"]
        assert again.ping().returncode == 0


def test_after_each_kill_9_the_server_starts_with_the_bans_of_the_last_save(tmp_path: Path) -> None:
    dice = random.Random(9)
    file = tmp_path / "data/timeouts"
    expected: set[str] = set()
    for number in range(KILLS):
        with Process(tmp_path, environ={"TT_SAVE_INTERVAL": "1"}) as server:
            assert expected <= set(bans(server)), f"round {number}"
            before = file.stat().st_mtime_ns if file.exists() else 0
            server.time_out(f"127.1.{number // 250}.{1 + number % 250}")
            assert server.ping().returncode == 0
            until("a save", lambda b=before: file.exists() and file.stat().st_mtime_ns != b)
            # Under way: perhaps in the next save, perhaps not; then its source is timed out in the next round.
            server.send_http(f"127.2.{number // 250}.{1 + number % 250}")
            threading.Event().wait(dice.uniform(0, 0.05))
            server.kill()
        table = TimeoutTable(65536)
        timeouts.load(file, table, 0, time.time_ns())
        expected = {record.source for record in table.entries(0)}
        assert len(expected) >= number + 1


SAVER = """
import sys, time
from tt import timeouts
from tt._core import TimeoutTable
table, number = TimeoutTable(65536), int(sys.argv[2])
while True:
    for _ in range(200):
        number += 1
        table.add(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0, 10**12, 1)
    timeouts.save(sys.argv[1], table.dump(1), time.time_ns())
    print(table.running, flush=True)
"""


def test_a_kill_9_at_any_moment_of_a_save_leaves_the_old_table_or_the_new_one(tmp_path: Path) -> None:
    dice = random.Random(7)
    file = tmp_path / "timeouts"
    for _ in range(100):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(file), "0"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.readline()
        threading.Event().wait(dice.uniform(0, 0.03))
        process.kill()
        said += process.communicate()[0]
        acknowledged = int(said.split()[-1])
        table = TimeoutTable(65536)
        expected = (acknowledged, min(acknowledged + 200, 65536))  # as many as it holds, where the kill came late
        assert timeouts.load(file, table, 1, time.time_ns()) in expected


def test_no_damaged_file_keeps_the_server_from_its_start(tmp_path: Path) -> None:
    with Process(tmp_path) as server:
        server.time_out("127.0.0.9")
    file = tmp_path / "data/timeouts"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:40] + bytes([whole[40] ^ 0xFF]) + whole[41:], b""):
        file.write_bytes(damaged)
        with Process(tmp_path) as again:
            again.await_line("time-outs not restored, starting with none")
            assert again.ping().returncode == 0


def test_a_saved_table_with_any_bit_flipped_or_cut_anywhere_is_refused_whole(tmp_path: Path) -> None:
    table = TimeoutTable(1024)
    table.add("192.0.2.1", 0, 600 * NS, 1)
    file = tmp_path / "timeouts"
    timeouts.save(file, table.dump(1), 1)
    whole = file.read_bytes()
    flipped = [
        whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in range(8)
    ]
    fresh = TimeoutTable(1024)
    for damaged in (*flipped, *(whole[:size] for size in range(len(whole)))):
        file.write_bytes(damaged)
        with pytest.raises(StateFileError):
            timeouts.load(file, fresh, 1, 1)
        assert not fresh.entries(1, remembered=True)
