"""The commands of the catalogue: -S, tables, what each prints and its exit code, and docs/commands.md run as it stands.

The commands run in this process, against a real server in another.
"""

import argparse
import io
import json
import os
import pty
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from faults import client as client_of
from harness import HOST
from process import Process
from scripted_server import converse
from shells import read_all
from test_client import Start, no_known_servers, start
from test_client_catalog import PASSWORD, in_order, librarian, server

from tt import cli, data_lock, keys, wire
from tt.catalog.messages import OPERATIONS, CustomerRecord
from tt.catalog.service import FILE
from tt.catalog.store import Store
from tt.cli import GROUPS, output, server_option, table
from tt.cli import user as user_commands
from tt.cli.server_option import Server, parse
from tt.client import Client

__all__ = ["no_known_servers", "server", "start"]  # fixtures

COMMANDS = Path(__file__).parents[1] / "docs/commands.md"
Capture = pytest.CaptureFixture[str]


class Tt:
    """Runs `tt` in this process: the exit code, and what it printed on both streams."""

    def __init__(self, capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        self._capture, self._monkeypatch = capture, monkeypatch
        # What hashes a password lets all others on the machine go first.
        monkeypatch.setattr(server_option, "Client", partial(Client, timeout=60.0))

    def __call__(self, *words: str, stdin: str = "") -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = cli.main(list(words))
        return code, *self._capture.readouterr()

    def done(self, *words: str, stdin: str = "") -> str:
        """What a command prints that succeeds and has nothing to remark."""
        code, out, err = self(*words, stdin=stdin)
        assert (code, err) == (output.OK, "")
        return out

    def error(self, *words: str, stdin: str = "") -> tuple[int, str]:
        """The exit code and the one line of a command that prints nothing else."""
        code, out, err = self(*words, stdin=stdin)
        assert out == ""
        assert err.startswith("tt: ")
        assert err.count("\n") == 1
        return code, err[4:-1]


@pytest.fixture
def tt(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Tt:
    monkeypatch.delenv("TT_SERVER", raising=False)
    return Tt(capsys, monkeypatch)


@pytest.fixture
def master(server: Process, tt: Tt, monkeypatch: pytest.MonkeyPatch) -> Tt:
    """`tt` with TT_SERVER of the tapemaster."""
    monkeypatch.setenv("XDG_CONFIG_HOME", server.environ["XDG_CONFIG_HOME"])
    monkeypatch.setenv("TT_SERVER", login(server))
    return tt


def login(server: Process, user: str = "tapemaster", password: str = PASSWORD) -> str:
    return f"{user}:-{password}@{HOST}:{server.port}"


# ---- -S -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("jsmith:-hackme@host", ("jsmith", "-hackme", "host", 5000)),
        ("jsmith:/etc/tt/pw@host:5001", ("jsmith", "/etc/tt/pw", "host", 5001)),
        ("jsmith:@192.0.2.1:1", ("jsmith", "", "192.0.2.1", 1)),
        ("jsmith@[2001:db8::1]:5001", ("jsmith", "", "2001:db8::1", 5001)),
        ("jsmith:-@2001:db8::1", ("jsmith", "-", "2001:db8::1", 5000)),
        ("j:-a:b@c@HOST.example", ("j", "-a:b@c", "host.example", 5000)),
    ],
)
def test_the_parts_of_a_server(text: str, server: tuple[str, str, str, int]) -> None:
    assert parse(text) == Server(*server)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no server: give it with -S USER:PASSWORD@SERVER[:PORT], or in the variable TT_SERVER"),
        ("host", "-S: it must be written USER:PASSWORD@SERVER[:PORT], with an '@'"),
        ("@host", "-S: user: must be 1 to 16 of letters, digits, '.' and '-', not ''; it must be written USER:PASS"),
        ("a b:-hackme@host", "-S: user: must be 1 to 16 of letters"),
        ("jsmith:-hackme@", "-S: '' is no host"),
        ("jsmith:-hackme@host:port", "-S: 'port' is no port: give a number from 1 to 65535"),
        ("jsmith:-hackme@host:0", "-S: '0' is no port"),
        ("jsmith:/nonexistent/file@host", "/nonexistent/file: cannot be read (No such file or directory): a password"),
        ("jsmith:hackme@host", "the password's file: cannot be read (No such file or directory): a password itself"),
        ("jsmith:/@host", "/: cannot be read (Is a directory): a password itself is written with '-' before it"),
    ],
)
def test_a_server_that_cannot_be_understood_is_a_usage_error_without_the_password(tt: Tt, text: str, says: str) -> None:
    code, line = tt.error("customer", "list", "-S", text)
    assert code == output.USAGE
    assert line.startswith(says)
    assert "hackme" not in line


def test_a_password_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    for text in ("hack me\nmore\n", "hack me\r\n", "hack me"):
        file.write_text(text)
        assert server_option.read_password(str(file), "") == "hack me"
    file.write_bytes(b"\n")
    with pytest.raises(output.Exit, match="its first line, which is to be the password, is empty"):
        server_option.read_password(str(file), "")
    file.write_bytes(b"\xff\n")
    with pytest.raises(output.Exit, match="it is not UTF-8"):
        server_option.read_password(str(file), "")


def test_a_password_is_asked_for_on_the_terminal_and_not_shown(tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        try:
            password = server_option.read_password("", "Password of jsmith on host: ")
            (tmp_path / "password").write_text(password)
        finally:
            os._exit(0)
    shown = bytearray()
    while b"host: " not in shown:
        shown += os.read(terminal, 1000)
    os.write(terminal, b"hack me\n")
    read_all(terminal, shown)
    os.waitpid(child, 0)
    os.close(terminal)
    assert (tmp_path / "password").read_text() == "hack me"
    assert b"hack me" not in shown


def test_without_a_terminal_an_empty_password_is_an_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()  # it has no terminal any more
            server_option.read_password("", "Password: ")
        except output.Exit as error:
            os.write(write, f"{error.code} {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read) as said:
        assert said.read().startswith("2 there is no terminal to ask for the password: give a file's name in -S ")


def test_the_variable_names_the_server_and_the_option_overrides_it(
    start: Start, tt: Tt, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = start(converse(in_order(librarian)))
    where = f"{HOST}:{peer.port}"
    monkeypatch.setenv("TT_SERVER", f"fred:-from the variable@{where}")
    key = keys.to_text(peer.key.public)
    for more in ([], ["-S", f"jsmith:-from the option@{where}"]):
        tt("volume", "cancel", "US01.LTO.A1", "--key", key, *more)
    logins = [msgspec.msgpack.decode(link.messages[0][0].arguments) for link in peer.links]
    assert logins == [
        {"user": "fred", "password": "from the variable"},
        {"user": "jsmith", "password": "from the option"},
    ]
    assert {link.hello.name for link in peer.links} == {"tt volume cancel"}


def busy(request: wire.Request) -> wire.Reply:
    return wire.Reply(request.id, wire.ReplyError("busy", "too many passwords are being checked just now"))


def in_turn(answers: list[Callable[[wire.Request], wire.Reply]]) -> Callable[[wire.Request], wire.Reply]:
    def answer(request: wire.Request) -> wire.Reply:
        return answers.pop(0)(request)

    return answer


def test_a_login_is_tried_again_while_the_server_is_busy(start: Start, tt: Tt, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [busy, busy, librarian, librarian]
    peer = start(converse(in_order(in_turn(answers))))
    monkeypatch.setattr(server_option, "BUSY_PAUSE", (0.001, 0.002))
    options = "--key", keys.to_text(peer.key.public), "-S", f"jsmith:-secret12@{HOST}:{peer.port}"
    assert tt.done("volume", "cancel", "US01.LTO.A1", *options).startswith("US01.LTO.A1: done")
    assert [one.operation for (one,) in peer.links[0].messages] == ["login"] * 3 + ["volume.cancel"]


class Clock:
    """In the place of the module `time`: only who sleeps lets time pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_login_that_stays_busy_or_another_operation_that_is_fails(
    start: Start, tt: Tt, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [busy] * 1000
    peer = start(converse(in_order(in_turn(answers))))
    monkeypatch.setattr(server_option, "time", Clock())
    monkeypatch.setattr(server_option, "BUSY_PAUSE", (0.1, 0.2))
    monkeypatch.setattr(server_option, "BUSY_FOR", 2.05)
    words = (
        "volume", "cancel", "US01.LTO.A1", "--key", keys.to_text(peer.key.public),
        "-S", f"jsmith:-secret12@{HOST}:{peer.port}",
    )  # fmt: skip
    failed = output.FAILED, "too many passwords are being checked just now (busy)"
    assert tt.error(*words) == failed
    assert 11 <= len(peer.links[0].messages) <= 21
    answers[:] = [librarian, busy]
    code, out, err = tt(*words)
    assert (code, out, err) == (failed[0], "", f"tt: US01.LTO.A1: {failed[1]}\n")
    assert answers == []


# ---- tables ---------------------------------------------------------------------------------------------------------

COLUMNS = {"CUSTOMER": lambda one: one.name, "DESCRIPTION": lambda one: one.description}
TWO = [CustomerRecord("US01", "tapes of \u20ac"), CustomerRecord("U", 'a "b", c\x1b[31m')]


def shown(records: list[CustomerRecord], *, as_json: bool = False, as_csv: bool = False) -> None:
    table.show(argparse.Namespace(json=as_json, csv=as_csv), CustomerRecord, records, COLUMNS)


def test_a_table_for_people_is_aligned_and_shows_no_control_characters(capsys: Capture) -> None:
    shown(TWO)
    assert capsys.readouterr().out == (
        'CUSTOMER  DESCRIPTION\nUS01      tapes of \u20ac\nU         a "b", c\\x1b[31m\n'
    )
    shown([])
    assert capsys.readouterr() == ("", "tt: nothing to show\n")


def test_json_is_ascii_and_an_object_a_line(capsys: Capture) -> None:
    shown(TWO, as_json=True)
    out = capsys.readouterr().out
    assert out.isascii()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"name": one.name, "description": one.description} for one in TWO
    ]
    shown([], as_json=True)
    assert capsys.readouterr() == ("", "")


def test_csv_has_headings_also_without_lines_and_no_control_characters(capsys: Capture) -> None:
    shown(TWO, as_csv=True)
    assert capsys.readouterr().out == 'name,description\nUS01,tapes of \u20ac\nU,"a ""b"", c\\x1b[31m"\n'
    shown([], as_csv=True)
    assert capsys.readouterr().out == "name,description\n"


def test_a_long_list_is_printed_as_it_comes(capsys: Capture) -> None:
    def records() -> Iterator[CustomerRecord]:
        for number in range(table.BLOCK + 1):
            if number == table.BLOCK:
                assert capsys.readouterr().out.count("\n") == table.BLOCK + 1
            yield CustomerRecord(str(number), "x" * (number // 500))

    table.show(argparse.Namespace(json=False, csv=False), CustomerRecord, records(), COLUMNS)
    assert capsys.readouterr().out == f"{table.BLOCK}      xx\n"


@pytest.mark.parametrize("has_rich", [True, False])
def test_a_terminal_gets_a_table_that_fits_and_plain_text_without_rich(
    monkeypatch: pytest.MonkeyPatch, *, has_rich: bool
) -> None:
    pytest.importorskip("rich")
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    long = " ".join(20 * ["tape"])
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        shown([CustomerRecord("US01", f"[b]{long}")])
        monkeypatch.undo()
    text = read_all(ours, bytearray()).decode()
    os.close(ours)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r", "").splitlines()
    assert "[b]tape" in lines[1]  # no markup of rich's
    assert (max(map(len, lines)) <= 40) is has_rich
    assert ("\x1b[1m" in text) is has_rich


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_every_command_of_the_catalogue_has_help_with_its_options(tt: Tt) -> None:
    for group in ("customer", "media", "repository", "volume", "history", "user"):
        assert GROUPS[group] == f"tt.cli.{group}"
        for words in actions([group]):
            with pytest.raises(SystemExit) as end:
                tt(*words, "--help")
            assert end.value.code == 0
            help_ = tt._capture.readouterr().out
            assert "-S USER:PASSWORD@SERVER[:PORT]" in help_, words
            assert "--json" in help_


def actions(words: list[str]) -> Iterator[list[str]]:
    """The command lines below a group, without arguments."""
    parser = cli._parser(words)
    found: list[tuple[list[str], argparse.ArgumentParser]] = [([], parser)]
    while found:
        path, parser = found.pop()
        below = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
        if not below:
            yield path
        for one in below:
            found += [([*path, name], choice) for name, choice in one.choices.items() if path or name == words[0]]


def test_the_exit_code_says_who_is_not_let_in_or_may_not(server: Process, master: Tt) -> None:
    code, line = master.error("customer", "list", "-S", login(server, password="not the one"))
    assert (code, line) == (output.DENIED, "name, password and address together do not let anybody in (login)")
    made = json.loads(master.done("user", "add", "reader", "--json"))
    code, line = master.error("customer", "list", "-S", login(server, "reader", made["password"]))
    assert code == output.DENIED
    assert line.startswith("the password of reader is to be used once, to set another: run 'tt user password' with it")
    own = "the reader's own"
    master.done("user", "password", "-S", login(server, "reader", made["password"]), f"--new=-{own}")
    master.done("user", "access", "set", "reader", "US01", "read")
    master.done("volume", "add", "US01.LTO.READ", "--repository", "LIB")
    reads = ["-S", login(server, "reader", own)]
    assert master.done("volume", "show", "US01.LTO.READ", *reads).startswith("volume ")
    for words in (["volume", "move", "US01.LTO.READ", "--to", "VLT1"], ["user", "list"]):
        assert master.error(*words, *reads)[0] == output.DENIED
    assert master.error("volume", "show", "US01.LTO.NONE", *reads) == (
        output.FAILED, "there is no Volume US01.LTO.NONE (not_found)",
    )  # fmt: skip
    assert master.error("customer", "list", "-S", f"reader:-{own}@{HOST}:1")[0] == output.USAGE  # it is not known
    key = (server.place / "data/server.pub").read_text().strip()
    assert master.error("customer", "list", "-S", f"reader:-{own}@{HOST}:1", "--key", key)[0] == output.NO_CONNECTION


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["volume", "show", "A1"], "argument VOLUME: volume: must be written CUSTOMER.MEDIA.VOLUME, not 'A1'"),
        (["volume", "move", "US01.LTO.A1", "A2", "--to", "VLT1"], "volume: must be written CUSTOMER.MEDIA.VOLUME"),
        (["volume", "move", "US01.LTO.A1"], "the following arguments are required: --to"),
        (["volume", "update", "US01.LTO.A1"], "nothing is to be changed: give --description, --move-date, --set or"),
        (["volume", "move", "US01.LTO.A1", "--to", "X", "--move-date", "tomorrow"], "argument --move-date: move date:"),
        (["volume", "list", "--from", "VLT1"], "argument --from/--at: repository: must be written CUSTOMER.MEDIA.REP"),
        (["history", "US01.LTO.A1", "-n", "0"], "-n must be at least 1, not 0"),
        (["repository", "add", "US01.LTO.X", "--kind", "shed"], "argument --kind: invalid choice: 'shed'"),
        (["user", "access", "set", "fred", "*US", "read"], "argument PATTERN: pattern: must be a Customer's id"),
        (["user", "change", "fred"], "nothing is to be changed"),
        (["user", "add", "fred", "--networks", "10.0.0.1/8"], "argument --networks: networks: must be CIDRs"),
        (["user", "reset", "fred", "--data", "/", "-S", "a:-b@c"], "-S asks a server, --data its directory on this"),
        (["user", "password", "--new=-short"], "new password: must be 8 to 128 characters"),
        (["customer", "change", "US01"], "the following arguments are required: --description"),
    ],
)
def test_wrong_usage_is_one_line_and_sends_nothing(tt: Tt, words: list[str], says: str) -> None:
    more = [] if "-S" in words else ["-S", f"fred:-password@{HOST}:1"]
    code, line = tt.error(*words, *more)
    assert code == output.USAGE
    assert line.startswith(says)


def test_of_several_volumes_each_is_for_itself(master: Tt) -> None:
    names = [f"US01.LTO.EACH{number}" for number in range(3)]
    assert master.done("volume", "add", "-", "--repository", "LIB", stdin="\n".join(names) + "\n\n").count("done") == 3
    code, out, err = master("volume", "move", names[0], "US01.LTO.NONE", names[2], "--to", "VLT1", "--json")
    assert code == output.FAILED
    assert [json.loads(line)["name"] for line in out.splitlines()] == [names[0], names[2]]
    assert err == "tt: US01.LTO.NONE: there is no Volume US01.LTO.NONE (not_found)\n"
    listed = master.done("volume", "list", "US01.LTO.EACH*", "--moving", "--csv").splitlines()
    assert [line.split(",")[0] for line in listed[1:]] == [names[0], names[2]]
    late = master.done("volume", "list", "US01.LTO.EACH*", "--to", "US01.LTO.VLT1", "--overdue", "--csv")
    assert late.count("\n") == 1
    assert master.error("volume", "show", "US01.LTO.NONE")[0] == output.FAILED


def test_what_was_acknowledged_before_the_connection_broke_is_printed(
    start: Start, tt: Tt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_and_no_more(requests: list[wire.Request]) -> Iterator[bytes]:
        yield from in_order(librarian)(requests[:2])
        if len(requests) > 1:
            raise ConnectionResetError

    peer = start(converse(two_and_no_more))
    names = [f"US01.LTO.A{number}" for number in range(4)]
    code, out, err = tt(
        "volume", "cancel", *names, "--key", keys.to_text(peer.key.public),
        "-S", f"jsmith:-secret12@{HOST}:{peer.port}",
    )  # fmt: skip
    assert out.splitlines() == [f"{name}: done, row 7 of the history" for name in names[:2]]
    assert (code, err.count("\n")) == (output.NO_CONNECTION, 1)
    assert "was lost" in err


def test_a_users_own_password_is_changed_once_for_all(server: Process, master: Tt) -> None:
    made = json.loads(master.done("user", "add", "owner", "--json"))["password"]
    once = ["-S", login(server, "owner", made)]
    code, line = master.error("user", "password", "--new=-short", *once)
    assert (code, line) == (output.USAGE, "new password: must be 8 to 128 characters")
    assert master.done("user", "password", "--new=-long enough", *once).startswith("owner: done, row ")
    assert master.error("user", "password", "--new=-long enough", *once)[0] == output.DENIED
    with client_of(server) as client:
        assert not client.login("owner", "long enough").must_change_password


def test_a_session_is_listed_and_ended(server: Process, master: Tt) -> None:
    with client_of(server, "127.0.0.9") as other:
        other.login("tapemaster", PASSWORD)
        (session,) = [
            one for one in map(json.loads, master.done("user", "sessions", "--json").splitlines())
            if one["source"] == "127.0.0.9"
        ]  # fmt: skip
        code, out, err = master("user", "disconnect", str(session["id"]))
        assert (code, out, err) == (output.OK, "", f"tt: session {session['id']} is ended\n")
        with pytest.raises(Exception, match="lost"):
            other.whoami()


def test_on_the_host_a_directory_without_a_catalogue_is_named(tt: Tt, tmp_path: Path) -> None:
    code, line = tt.error("user", "reset", "fred", "--data", str(tmp_path))
    assert code == output.USAGE
    assert line == f"{tmp_path}/tapetrack.db: no catalogue is there: name the server's data directory with --data"


def test_on_the_host_a_password_is_made_with_and_without_a_running_server(tt: Tt, tmp_path: Path) -> None:
    words = ("user", "reset", "tapemaster", "--data", str(tmp_path / "data"), "--json")
    passwords = []
    with Process(tmp_path) as server:
        passwords.append(json.loads(tt.done(*words))["password"])
        with client_of(server) as client:
            assert client.login("tapemaster", passwords[0]).must_change_password
    passwords.append(json.loads(tt.done(*words))["password"])
    code, line = tt.error("user", "reset", "nobody", "--data", str(tmp_path / "data"))
    assert (code, line) == (output.FAILED, "there is no user 'nobody'")
    with Process(tmp_path) as server, client_of(server) as client:
        assert client.login("tapemaster", passwords[1]).must_change_password
    assert passwords[0] != passwords[1]


def test_on_the_host_no_server_starts_while_the_file_is_changed(
    tt: Tt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def fail_with_the_lock(store: object, data: Path, user: str) -> None:
        opened.append(user)
        with pytest.raises(data_lock.DataInUseError, match="'tt user reset' or another server uses it: stop that one"):
            data_lock.take(data)
        raise user_commands.StoreError("the end")

    Store(tmp_path / FILE).close()
    monkeypatch.setattr(user_commands, "reset_in_file", fail_with_the_lock)
    assert tt.error("user", "reset", "fred", "--data", str(tmp_path)) == (output.FAILED, "the end")
    assert opened == ["fred"]
    os.close(data_lock.take(tmp_path))


def test_on_the_host_the_file_is_left_alone_while_a_server_starts(tt: Tt, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"")
    lock = data_lock.take(tmp_path)
    code, line = tt.error("user", "reset", "fred", "--data", str(tmp_path))
    os.close(lock)
    assert code == output.NO_CONNECTION
    assert line == f"data directory {tmp_path}: a server is starting or stopping there: try again in a second"
    assert (tmp_path / FILE).read_bytes() == b""


def test_on_the_host_a_server_that_came_meanwhile_is_asked(
    tt: Tt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plain = [], user_commands.ask_host

    def too_early_at_first(*arguments: Any) -> Iterator[dict[str, Any]]:
        asked.append(arguments)
        if len(asked) == 1:
            raise output.Exit(output.NO_CONNECTION, "none yet") from FileNotFoundError()
        return plain(*arguments)

    monkeypatch.setattr(user_commands, "ask_host", too_early_at_first)
    with Process(tmp_path) as server:
        out = tt.done("user", "reset", "tapemaster", "--data", str(tmp_path / "data"), "--json")
        with client_of(server) as client:
            assert client.login("tapemaster", json.loads(out)["password"]).must_change_password
    assert len(asked) == 2


# ---- the document ---------------------------------------------------------------------------------------------------


def fits(expected: str, printed: str) -> bool:
    """Whether it is what the document has, where "..." stands for anything within a line."""
    return re.fullmatch(re.escape(expected).replace(r"\.\.\.", "[^\n]*"), printed) is not None


def test_the_commands_of_the_document_print_what_it_says(
    tt: Tt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(re.findall(r"^```console\n(.*?)^```$", COMMANDS.read_text("utf-8"), re.M | re.S))
    steps = re.findall(r"^\$ (?:echo (\S+) \| )?tt (.*)\n((?:(?!\$ ).+\n)*)", text, re.M)
    assert len(steps) == len(re.findall(r"^\$ ", text, re.M)) > 30
    with Process(tmp_path) as server:
        monkeypatch.setenv("XDG_CONFIG_HOME", server.environ["XDG_CONFIG_HOME"])
        monkeypatch.chdir(tmp_path)
        (tmp_path / "var").symlink_to("data")
        monkeypatch.setenv("TT_SERVER", f"{login(server)}")
        for stdin, line, expected in steps:
            words = [re.sub(rf"@{HOST}$", f"@{HOST}:{server.port}", word) for word in shlex.split(line)]
            code, out, err = tt(*words, stdin=stdin)
            assert fits(expected, out + err), f"tt {line}\nprinted:\n{out}{err}\ninstead of:\n{expected}"
            assert (code == output.OK) is (not err), line


def test_the_document_has_an_example_of_every_action() -> None:
    text = COMMANDS.read_text("utf-8")
    for group in ("customer", "media", "repository", "volume", "history", "user"):
        for words in actions([group]):
            assert f"tt {' '.join(words)} " in text or f"tt {' '.join(words)}\n" in text, words


def test_every_operation_has_a_command() -> None:
    sources = "".join(path.read_text("utf-8") for path in Path(cli.__file__).parent.glob("*.py"))
    by_group = {f"{one}.{name}" for one in ("customer", "media", "repository") for name in ("add", "change")}
    programs = {"logout", "whoami", "statistics", "batch"}  # of use to programs alone
    for name in OPERATIONS.keys() - by_group - programs:
        method = {"volume.list": "volumes", "volume.history": "history"}.get(name, name.replace(".", "_", 1))
        assert f'"{name}"' in sources or f"client.{method}" in sources, name
