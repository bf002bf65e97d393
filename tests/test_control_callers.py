"""The control socket's callers: root, the server's user, members of the service group, strangers; each a real user.

Where the caller is to be somebody else, `tt` runs as that user, by setpriv(1); the kernel says who he is.
"""

import grp
import json
import logging
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Running
from process import TT, Process, need, refused
from test_control import Controlled, answer, fill

from tt import control, log
from tt.cli import output
from tt.control import MAX_CLIENTS, Control, ControlError, find_group, open_socket
from tt.requests import Requests

NOBODY = pwd.getpwnam("nobody")
DAEMON = pwd.getpwnam("daemon")
OPERATORS = grp.getgrnam("users")  # stands for the service group
REFUSED = "tt: uid {} may not ask this server: root{} may"


@pytest.fixture(autouse=True)
def _root() -> None:
    need("setpriv", root=True)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can enter; the tests' own is root's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


class Grouped(Controlled):
    """With a service group."""

    group = OPERATORS.gr_gid


@pytest.fixture
def server(place: Path) -> Iterator[Grouped]:
    """Its socket is open to every user: that only some may ask is then its own doing."""
    with Grouped(place / "data") as server:
        server.settings.data.chmod(0o755)
        server.path.chmod(0o666)
        yield server


def person(user: pwd.struct_passwd, *groups: int) -> list[str]:
    """A command that runs another as this user, in his own group and these."""
    more = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", more, "--inh-caps=-all", "--"]


def tt(who: list[str], path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*who, TT, *words, "--control", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/")


def by_hand(server: Running) -> list[tuple[object, ...]]:
    """What the log says was done: request, source, how many lifted, uid, user."""
    events = server.events.of("done by hand")
    return [(e["request"], e.get("source"), e.get("removed"), e["uid"], e["user"]) for e in events]


# ---- who may --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [person(NOBODY, OPERATORS.gr_gid), person(NOBODY, 5, OPERATORS.gr_gid, 7)])
def test_a_member_of_the_group_does_an_operators_day_and_the_log_names_him(server: Grouped, member: list[str]) -> None:
    assert tt(member, server.path, "bans", "add", "192.0.2.1", "--for", "60s", "--reason", "seen").returncode == 0
    assert server.events.of("done by hand")[0]["note"] == "seen"
    assert json.loads(tt(member, server.path, "bans", "list", "--json").stdout)["source"] == "192.0.2.1"
    assert json.loads(tt(member, server.path, "status", "--json").stdout)["pid"] == os.getpid()
    assert tt(member, server.path, "bans", "remove", "192.0.2.1").returncode == 0
    who = (NOBODY.pw_uid, "nobody")
    assert by_hand(server) == [("bans.add", "192.0.2.1", None, *who), ("bans.remove", "192.0.2.1", 1, *who)]


def test_the_group_counts_too_where_it_is_the_callers_own(server: Grouped) -> None:
    own = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={OPERATORS.gr_gid}", "--clear-groups", "--"]
    assert tt(own, server.path, "status").returncode == 0


def test_of_more_groups_than_python_asks_for_each_counts(server: Grouped) -> None:
    member = person(NOBODY, *range(200_000, 200_400), OPERATORS.gr_gid, *range(300_000, 300_400))
    assert tt(member, server.path, "status").returncode == 0


def test_a_member_gets_no_account_of_the_catalogue(server: Grouped) -> None:
    member = person(NOBODY, OPERATORS.gr_gid)
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
        's.sendall(b\'{"do":"user.reset","user":"tapemaster"}\\n\'); print(s.makefile().readline())'
    )
    done = subprocess.run(
        [*member, sys.executable, "-c", code, server.path], capture_output=True, text=True, check=True
    )
    line = "user.reset is for root alone, not for all members of users"
    assert json.loads(done.stdout) == {"error": line, "denied": True}
    assert server.ask("user.reset", user="tapemaster")[0]["error"] == "this server has no catalogue"  # but root


@pytest.mark.parametrize("who", [person(NOBODY), person(DAEMON, 5, 7)])
@pytest.mark.parametrize("words", [("bans", "add", "192.0.2.1"), ("bans", "clear"), ("bans", "list"), ("status",)])
def test_a_stranger_gets_one_line_and_nothing_happens(server: Grouped, who: list[str], words: tuple[str, ...]) -> None:
    server.ask("bans.add", source="192.0.2.7")
    done = tt(who, server.path, *words)
    uid = int(who[1].partition("=")[2])
    assert (done.stdout, done.stderr) == ("", REFUSED.format(uid, "") + " and members of users\n")
    assert done.returncode != 0
    assert server.sources() == ["192.0.2.7"]
    assert len(by_hand(server)) == 1, "roots"


def test_without_a_service_group_a_stranger_is_told_how_one_is_let_in(place: Path) -> None:
    with Controlled(place / "data") as server:
        server.settings.data.chmod(0o755)
        server.path.chmod(0o666)
        done = tt(person(NOBODY, OPERATORS.gr_gid), server.path, "status")
        assert done.stderr == REFUSED.format(NOBODY.pw_uid, "") + " (control_group = GROUP lets a group in)\n"


def test_strangers_do_not_push_out_who_is_let_in(server: Grouped) -> None:
    code = (
        "import socket, sys\n"
        f"for _ in range({2 * MAX_CLIENTS}):\n"
        "    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); assert b'may not' in s.recv(999)"
    )
    with server.open() as client:
        client.sendall(b'{"do":')
        subprocess.run([*person(NOBODY), sys.executable, "-c", code, server.path], check=True)
        client.sendall(b'"status"}\n')
        assert answer(client)[0]["end"] is True


def test_a_stranger_who_asked_before_he_is_turned_away_still_gets_the_line(server: Grouped) -> None:
    """What he sent is unread when the server closes; that must not take the line from him."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b'{"do":"status"}\n')
    server.control._turn_away(ours, control.Caller(5, frozenset()))
    with theirs.makefile("rb") as stream:
        assert json.loads(stream.readline())["error"].startswith("uid 5 may not")
    theirs.close()


# ---- what the log says ----------------------------------------------------------------------------------------------


def test_the_log_has_each_change_with_who_made_it_and_nothing_else(server: Grouped) -> None:
    for number in range(3):
        server.ask("bans.add", source=f"192.0.2.{number}")
    server.ask("bans.add", source="2001:db8::1:2:3:4")
    server.ask("bans.remove", source="192.0.2.0/31")
    for do, request in (("bans.remove", {"source": "192.0.2.0/31"}), ("bans.remove", {"source": "192.0.2.0"}),
                        ("bans.add", {"source": "nonsense"}), ("bans.list", {}), ("status", {})):  # fmt: skip
        server.ask(do, **request)
    server.ask("bans.clear")
    server.ask("bans.clear")
    added = [("bans.add", source, None) for source in ("192.0.2.0", "192.0.2.1", "192.0.2.2", "2001:db8::/64")]
    changed = [*added, ("bans.remove", "192.0.2.0/31", 2), ("bans.clear", None, 2)]
    assert [(do, source and str(source), count) for do, source, count, *_ in by_hand(server)] == changed
    assert {tuple(who) for *_, who in ((*e[:3], e[3:]) for e in by_hand(server))} == {(0, "root")}


def test_a_change_that_its_caller_left_half_done_is_logged_with_what_was_done(tmp_path: Path) -> None:
    running = Running(tmp_path / "data")
    fill(running.table, 1000)
    door = open_socket(tmp_path / "control.sock", None)
    requests = Requests(running.server, running.table, running.guard, running.dispatcher)
    desk = Control(door, running.server, requests)
    ours, theirs = socket.socketpair()
    client = control._Client(ours, control._caller(ours))
    desk._clients[ours.fileno()] = client
    theirs.sendall(b'{"do":"bans.clear"}\n')
    log.LOGGER.addHandler(running.events)
    log.LOGGER.setLevel(logging.INFO)
    for _ in range(3):
        client.step(desk._answer, readable=True)
    desk._drop(client)
    left = running.table.running
    assert 0 < left < 1000
    assert by_hand(running) == [("bans.clear", None, 1000 - left, 0, "root")]
    theirs.close()
    desk.close()
    with running:  # which closes what it has opened
        pass


def test_a_user_without_a_name_is_logged_by_his_number(server: Grouped) -> None:
    unnamed = pwd.struct_passwd(("", "", 54321, 54321, "", "", ""))
    assert tt(person(unnamed, OPERATORS.gr_gid), server.path, "bans", "add", "192.0.2.1").returncode == 0
    assert by_hand(server)[0][3:] == (54321, "54321")


# ---- the socket and its folder --------------------------------------------------------------------------------------


def mode(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


def test_a_server_that_has_become_another_user_is_asked_by_him_by_members_and_by_root(place: Path) -> None:
    path, options = place / "data/control.sock", ("--user", "nobody", "--control-group", OPERATORS.gr_name)
    with Process(place, *options) as server:
        assert mode(path) == (0o660, NOBODY.pw_uid, OPERATORS.gr_gid)
        assert mode(path.parent) == (0o710, NOBODY.pw_uid, OPERATORS.gr_gid)
        groups = Path(f"/proc/{server.pid}/status").read_text().split("\nGroups:")[1].split("\n")[0].split()
        assert groups == [str(NOBODY.pw_gid)], "the server has no rights from the service group"
        member = person(DAEMON, OPERATORS.gr_gid)
        for who in ([], person(NOBODY), member):
            assert tt(who, path, "bans", "add", "192.0.2.1").returncode == 0
        with_files = subprocess.run([*member, "ls", place / "data"], capture_output=True, check=False)
        assert with_files.returncode != 0, "a member sees nothing else there"
        assert tt(person(DAEMON), path, "status").returncode == output.DENIED
        reset = [TT, "user", "reset", "--data", str(place / "data"), "tapemaster"]
        assert subprocess.run([*member, *reset], capture_output=True, check=False).returncode != 0
        subprocess.run([*person(NOBODY), *reset], capture_output=True, check=True)
        server.await_line("done by hand request=user.reset account=tapemaster uid=65534 user=nobody")
        assert [server.find(f"request=bans.add .* user={name}\n") is not None for name in ("root", "nobody", "daemon")]
    assert not path.exists()


def test_a_folder_that_another_group_may_enter_is_left_as_it_is_and_said(place: Path) -> None:
    data = place / "data"
    data.mkdir()
    data.chmod(0o750)
    with Process(place, "--control-group", OPERATORS.gr_name) as server:
        assert mode(data) == (0o750, 0, 0)
        server.await_line(f'closed to the control group group=users remedy="chgrp users {data}; chmod g\\+x {data}"')
    data.chmod(0o755)
    with Process(place, "--control-group", OPERATORS.gr_name) as server:
        assert mode(data) == (0o755, 0, 0)
        assert not server.find("closed to the control group")
        assert tt(person(NOBODY, OPERATORS.gr_gid), data / "control.sock", "status").returncode == 0


def test_a_user_who_is_not_in_the_group_cannot_give_it_the_socket(place: Path) -> None:
    place.chmod(0o777)
    text = refused(place, "--data", str(place / "own"), "--control-group", "users", wrap=person(NOBODY))
    assert "--control-group users: nobody cannot give it the control socket: make nobody a member of it" in text


def test_a_group_is_found_by_name_or_number_and_one_that_is_not_there_is_refused(place: Path) -> None:
    assert [find_group(name) for name in ("", "users", "0", "54321")] == [None, OPERATORS.gr_gid, 0, 54321]
    for name in ("nosuchgroup", "-1", str(2**32 - 1), "9" * 30, "no group"):
        with pytest.raises(ControlError, match=f"^--control-group {name}: there is no such group: name one of"):
            find_group(name)
    assert "there is no such group" in refused(place, "--control-group", "nosuch", "--data", str(place / "data"))
