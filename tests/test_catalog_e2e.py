"""The catalogue in a real server: first start, faults of disk and process, logins in a storm; honest clients beside.

The long form runs by hand: CATALOG_KILLS (rounds of kill -9 under load; 100 is the documented number).
"""

import os
import random
import re
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from faults import Faults, beside, client, pinging
from harness import until
from process import TT, Process, need

from tt.client import Client, ConnectionLost, NoConnection, RequestFailed

README = Path(__file__).parents[1] / "README.md"
KILLS = int(os.environ.get("CATALOG_KILLS", "8"))
LONG = 60.0  # s that an answer may take: what hashes a password lets all others on the machine go first
FREE = {"TT_HELLO_RATE": "100000", "TT_HELLO_BURST": "1000"}
PASSWORD = "twelve tapes in a vault"
US01, LTO, LIB, VAULT = "US01", "US01.LTO", "US01.LTO.LIB", "US01.LTO.VLT1"


@contextmanager
def logged_in(server: Process, password: str = PASSWORD, from_: str = "127.0.0.1") -> Iterator[Client]:
    """A client of tapemaster's."""
    with client(server, from_, LONG) as made:
        made.request("login", {"user": "tapemaster", "password": password})
        yield made


def found(server: Process, volumes: int = 0) -> None:
    """The first login; then a Customer with two Repositories, and Volumes in the first of them."""
    first = (server.place / "data/first-password").read_text().strip()
    with logged_in(server, first) as librarian:
        librarian.request("password", {"old": first, "new": PASSWORD})
        librarian.request("customer.add", {"customer": US01})
        librarian.request("media.add", {"media": LTO})
        librarian.request("repository.add", {"repository": LIB, "next": ""})
        librarian.request("repository.add", {"repository": VAULT, "offsite": True})
        for number in range(volumes):
            librarian.request("volume.add", {"volume": volume(number), "repository": "LIB"})


def volume(number: int) -> str:
    return f"{LTO}.A{number:05}"


def verified(server: Process) -> None:
    done = subprocess.run(
        [TT, "verify", "--data", str(server.place / "data")],
        env=server.environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout


def code_of(error: pytest.ExceptionInfo[RequestFailed]) -> str:
    return error.value.code


@contextmanager
def writing(server: Process, number: int) -> Iterator[list[int]]:
    """A client that describes one Volume with a growing count as long as there is a server; what was acknowledged."""
    acknowledged: list[int] = []
    over = threading.Event()

    def write() -> None:
        with suppress(ConnectionLost, NoConnection, RequestFailed), logged_in(server) as librarian:
            count = 0
            while not over.is_set():
                count += 1
                librarian.request("volume.update", {"volume": volume(number), "description": str(count)})
                acknowledged.append(count)

    with beside(write, over):
        yield acknowledged


# ---- the first start ------------------------------------------------------------------------------------------------


def test_the_first_password_opens_the_server_once_and_must_be_changed(tmp_path: Path) -> None:
    with Process(tmp_path) as server:
        file = tmp_path / "data/first-password"
        assert file.stat().st_mode & 0o777 == 0o600
        first = file.read_text().strip()
        with logged_in(server, first) as librarian:
            assert not file.exists()
            with pytest.raises(RequestFailed) as error:
                librarian.request("customer.add", {"customer": US01})
            assert code_of(error) == "password_change_first"
            librarian.request("password", {"old": first, "new": PASSWORD})
            librarian.request("customer.add", {"customer": US01})
        with client(server, timeout=LONG) as late, pytest.raises(RequestFailed) as error:
            late.request("login", {"user": "tapemaster", "password": first})
        assert code_of(error) == "login"
    with Process(tmp_path) as server:  # and it stays so
        assert not file.exists()
        with logged_in(server) as librarian:
            assert [entry[0] for entry in librarian.request("customer.list")[0]] == [US01]
    assert server.find(r"head of the history .*sequence=3 hash=[0-9a-f]{64}")


def test_a_user_is_given_a_password_on_the_host_with_and_without_a_server(tmp_path: Path) -> None:
    def reset() -> str:
        done = subprocess.run(
            [TT, "user", "reset", "tapemaster", "--data", str(tmp_path / "data")],
            env=server.environ, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    with Process(tmp_path) as server:
        found(server)
        with logged_in(server, reset()) as librarian:
            assert librarian.request("whoami")[0] == "tapemaster"
    password = reset()
    with Process(tmp_path) as server, logged_in(server, password) as librarian:
        librarian.request("password", {"old": password, "new": PASSWORD})
        verified(server)


def test_the_walk_through_of_the_readme_works_as_it_stands(tmp_path: Path) -> None:
    section = README.read_text("utf-8").partition("\n## Tapes\n")[2].partition("\n## ")[0]
    script = "".join(re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    assert script.startswith(". .venv/bin/activate\n")
    with Process(tmp_path) as server:
        script = script.partition("\n")[2].replace("var/", "data/").replace("@127.0.0.1", f"@127.0.0.1:{server.port}")
        (tmp_path / "examples").symlink_to(README.parent / "examples")
        path = f"{Path(TT).parent}:{server.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-xc", script], cwd=tmp_path, env=server.environ | {"PATH": path, "TT_DATA": "data"},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        for words in (r"\b50 ok, 1 wrong, 1 unknown", r"\b50 ok, 0 wrong", r"\b35 correct, 1 surplus, 1 deficit"):
            assert re.search(words, said), said
        assert re.search(r"^the chain holds: \d{5} rows", done.stdout.splitlines()[-1]), said
        assert "Traceback" not in said


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_after_each_kill_9_under_load_every_acknowledged_change_is_there_and_the_chain_holds(tmp_path: Path) -> None:
    random_ = random.Random(9)
    acknowledged: list[list[int]] = []
    for round_ in range(KILLS + 1):
        with Process(tmp_path, environ=FREE) as server, ExitStack() as writers:
            if round_ == 0:
                found(server, volumes=4)
            else:
                verified(server)
                with logged_in(server) as librarian:
                    for number, counts in enumerate(acknowledged):
                        described = librarian.request("volume.get", {"volume": volume(number)})[7]
                        assert int(described or 0) in {counts[-1], counts[-1] + 1} if counts else True
                        librarian.request("volume.update", {"volume": volume(number), "description": ""})
            if round_ < KILLS:
                acknowledged = [writers.enter_context(writing(server, number)) for number in range(4)]
                enough = random_.randrange(1, 60)
                until("enough is written", lambda: sum(map(len, acknowledged)) >= enough, LONG)  # noqa: B023
                server.kill()


def test_a_disk_that_is_slow_to_sync_holds_up_no_ping_and_no_reader(tmp_path: Path, faults: Faults) -> None:
    with Process(tmp_path, environ=FREE | faults.environ) as server:
        found(server, volumes=1)
        with logged_in(server, from_="127.0.0.3") as reader, writing(server, 0) as acknowledged:
            until("it writes", lambda: acknowledged, LONG)
            faults.slow(0.2)
            with pinging(server, "127.0.0.4") as pings:
                reads, before = 0, len(acknowledged)

                def many_for_each_write() -> bool:
                    """Who waited for the disk, too, would get one or two answers for each write."""
                    nonlocal reads
                    reader.request("volume.get", {"volume": volume(0)})
                    reads += 1
                    writes = len(acknowledged) - before
                    return writes >= 5 and reads > 10 * writes and len(pings) > 5 * writes

                until("many answers while each write waits for its disk", many_for_each_write, LONG)
            faults.slow(0)


def test_a_storm_of_logins_holds_up_no_ping_and_no_user(tmp_path: Path) -> None:
    with (
        Process(tmp_path, environ=FREE | {"TT_LOGIN_FAILURES": "1000", "TT_LOGIN_DELAY": "0"}) as server,
        ExitStack() as storm,
    ):
        found(server, volumes=1)
        over, answers = threading.Event(), []

        def guess(source: str) -> None:
            with client(server, source, LONG) as guesser:
                while not over.is_set():
                    with pytest.raises(RequestFailed) as error:
                        guesser.request("login", {"user": "tapemaster", "password": "guess of " + source})
                    answers.append(code_of(error))

        with logged_in(server, from_="127.0.0.3") as reader:
            threads = [threading.Thread(target=guess, args=(f"127.0.1.{number}",)) for number in range(1, 9)]
            for thread in threads:
                thread.start()
                storm.callback(thread.join)
            storm.callback(over.set)
            with pinging(server, "127.0.0.4") as pings:
                reads = 0

                def many_for_each_guess() -> bool:
                    """Who waited for the hash, too, would get one or two answers for each guess."""
                    nonlocal reads
                    reader.request("volume.get", {"volume": volume(0)})
                    reads += 1
                    guesses = len(answers)
                    return guesses >= 3 and reads > 10 * guesses and len(pings) > 5 * guesses

                until("many answers while each guess is hashed", many_for_each_guess, LONG)
            assert set(answers) <= {"login", "busy"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB for the data directory, in the place of a server; it goes with the test."""
    need("mount", root=True)
    place = tmp_path / "small"
    data = place / "data"
    data.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(data)], check=True)
    yield place
    subprocess.run(["umount", str(data)], check=True)


def described(count: int) -> str:
    return f"{count} " + 200 * "x"


def fill_with_changes(librarian: Client) -> int:
    """How many changes were made until the disk took no more."""
    for count in range(10_000):
        try:
            librarian.request("volume.update", {"volume": volume(0), "description": described(count)})
        except RequestFailed as error:
            if error.code != "storage":
                raise
            return count
    raise AssertionError("the disk is not full")


def test_a_full_disk_fails_writes_with_a_word_and_reads_go_on(small_disk: Path) -> None:
    with Process(small_disk) as server:
        found(server, volumes=1)
        ballast = small_disk / "data/ballast"
        with logged_in(server) as librarian:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            done = fill_with_changes(librarian)
            kept = librarian.request("volume.get", {"volume": volume(0)})[7]
            assert kept == (described(done - 1) if done else "")
            assert librarian.ping().size > 0
            ballast.unlink()
            librarian.request("volume.update", {"volume": volume(0), "description": "there is room again"})
        verified(server)
    with Process(small_disk) as server, logged_in(server) as librarian:
        assert librarian.request("volume.get", {"volume": volume(0)})[7] == "there is room again"


def damaged(path: Path) -> str:
    path.write_bytes(b"not a database, but something of the same name " * 100)
    return "not a database"


def newer(path: Path) -> str:
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version = 99")
    file.close()
    return "99"


@pytest.mark.parametrize("harm", [damaged, newer])
def test_a_catalogue_that_cannot_be_used_stops_the_start_with_one_line(tmp_path: Path, harm: Any) -> None:
    with Process(tmp_path) as server:
        found(server)
    word = harm(tmp_path / "data/tapetrack.db")
    done = subprocess.run(
        [TT, "serve", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0"],
        env=server.environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tt: ")]
    assert "tapetrack.db" in line
    assert word in line


# ---- vouching -------------------------------------------------------------------------------------------------------


def test_who_has_logged_in_vouches_for_his_office_and_nobody_else(tmp_path: Path) -> None:
    with Process(tmp_path) as server:
        found(server)
        with logged_in(server, from_="127.0.0.5"):
            pass
        server.send_http("127.0.0.5")
        server.send_http("127.0.0.6")
        assert re_seconds(server, "127.0.0.5") == 30
        assert re_seconds(server, "127.0.0.6") == 600
    with Process(tmp_path, environ={"TT_VOUCHING": "false"}) as server:
        with logged_in(server, from_="127.0.0.7"):
            pass
        server.send_http("127.0.0.7")
        assert re_seconds(server, "127.0.0.7") == 600


def re_seconds(server: Process, source: str) -> float:
    match = server.await_line(rf"timed out source={source}\b.* seconds=([0-9.]+)")
    return float(match[1])
