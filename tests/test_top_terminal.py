"""`tt top` on terminals: what is read and painted on a pseudo-terminal, and all of it in tmux with a real server."""

import argparse
import json
import os
import pty
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, until
from process import TT, Process, need

from tt import cli
from tt.cli import output, top_terminal
from tt.cli.top import sample
from tt.cli.top_model import KEPT, PER_SAMPLE, Model
from tt.cli.top_terminal import ENTER, LEAVE, Terminal

Capture = pytest.CaptureFixture[str]

# ---- keys and pictures on a pseudo-terminal -------------------------------------------------------------------------


class Pty:
    """A Terminal on one side of a pseudo-terminal, and the person at the other."""

    def __init__(self, person: int, inside: int) -> None:
        self._person = person
        self.inside = inside
        termios.tcsetwinsize(inside, (24, 80))

    def terminal(self, *, colour: bool = True, encoding: str = "utf-8") -> Terminal:
        return Terminal(self.inside, self.inside, colour=colour, encoding=encoding)

    def type(self, data: bytes) -> None:
        os.write(self._person, data)

    def seen(self, end: str) -> str:
        """What was painted until then."""
        data = b""
        while not data.decode().endswith(end):
            assert select.select([self._person], [], [], PATIENCE)[0], data
            data += os.read(self._person, 65536)
        return data.decode()


@pytest.fixture
def at_pty() -> Iterator[Pty]:
    person, inside = pty.openpty()
    yield Pty(person, inside)
    os.close(inside)
    os.close(person)


@pytest.fixture
def terminal(at_pty: Pty) -> Iterator[Terminal]:
    with at_pty.terminal() as made:
        assert at_pty.seen(ENTER) == ENTER
        yield made


def keys_of(terminal: Terminal, count: int) -> list[Any]:
    """The next events, at least so many."""
    found: list[Any] = []
    until(f"{count} keys, and not only {found}", lambda: found.extend(terminal.events(1)) or len(found) >= count)
    return found


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]), (b"jk/?", ["j", "k", "/", "?"]), (b"\x1b[A\x1b[B", ["up", "down"]),
        (b"\x1bOA\x1bOB", ["up", "down"]),  # in the application's mode
        (b"\x1b[5~\x1b[6~\x1b[H\x1b[F\x1b[1~\x1b[4~", ["pageup", "pagedown", "home", "end", "home", "end"]),
        (b"\r\n\x7f\b\x03\x15", ["enter", "enter", "backspace", "backspace", "ctrl-c", "ctrl-u"]),
        (b"\x1b", ["escape"]), (b"\x1bj", ["escape", "j"]), ("\u00e9\u78c1".encode(), ["\u00e9", "\u78c1"]),
        (b"\x1b[1;5C\x1b[15~\x1b[<0;1;1M\x00\x01q", ["q"]),  # what is not known does nothing
    ],
)  # fmt: skip
def test_keys_have_names(at_pty: Pty, terminal: Terminal, data: bytes, keys: list[str]) -> None:
    at_pty.type(data)
    assert keys_of(terminal, len(keys)) == keys


def test_a_character_that_comes_in_two_parts_is_one(at_pty: Pty, terminal: Terminal) -> None:
    at_pty.type("\u00e9".encode()[:1])
    assert list(terminal.events(1)) == []
    at_pty.type("\u00e9".encode()[1:])
    assert keys_of(terminal, 1) == ["\u00e9"]


@pytest.mark.parametrize("first", [b"\x1b", b"\x1b[", b"\x1b[5"])
def test_a_sequence_that_comes_in_two_parts_is_one_key(
    at_pty: Pty, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    monkeypatch.setattr(top_terminal, "ESCAPE_WAIT", PATIENCE)
    read = terminal._read

    def read_and_type() -> bytes:
        """The second part comes after the first was read."""
        monkeypatch.setattr(terminal, "_read", read)
        data = read()
        at_pty.type(b"\x1b[5~"[len(first) :])
        return data

    monkeypatch.setattr(terminal, "_read", read_and_type)
    at_pty.type(first)
    assert keys_of(terminal, 1) == ["pageup"]


def test_only_changed_lines_are_painted_and_all_at_once(at_pty: Pty, terminal: Terminal) -> None:
    end = "\x1b[?2026l"
    terminal.paint([[("one", ""), ("two", "alarm")], [("three", "")]])
    first = "\x1b[?2026h\x1b[2J\x1b[1;1Hone\x1b[1;31mtwo\x1b[0m\x1b[2;1Hthree"
    assert at_pty.seen(end) == first + end
    terminal.paint([[("one", ""), ("two", "alarm")], [("four ", "dim")]])
    assert at_pty.seen(end) == "\x1b[?2026h\x1b[2;1H\x1b[2mfour \x1b[0m" + end
    terminal.paint([[("one", ""), ("two", "alarm")], [("four ", "dim")]])  # nothing new: nothing is written
    terminal.forget()
    terminal.paint([[("one", ""), ("two", "alarm")], [("three", "")]])
    assert at_pty.seen(end) == first + end


def test_no_color_leaves_the_colours_out(at_pty: Pty) -> None:
    with at_pty.terminal(colour=False, encoding="ascii") as terminal:
        at_pty.seen(ENTER)
        terminal.paint([[("one", "warn"), ("two", "chart"), ("\u2588", "")]])
        painted = at_pty.seen("\x1b[?2026l")
        assert re.findall(r"\x1b\[([0-9;]*)m", painted) == ["1", "0"]
        assert painted.isascii()


def test_a_new_size_is_seen_and_paints_all_anew(at_pty: Pty, terminal: Terminal) -> None:
    terminal.paint([[("one", "")]])
    at_pty.seen("\x1b[?2026l")
    termios.tcsetwinsize(at_pty.inside, (40, 132))
    os.kill(os.getpid(), signal.SIGWINCH)  # its terminal is not this process's own
    until("the new size", lambda: list(terminal.events(1)) or (terminal.width, terminal.height) == (132, 40))
    terminal.paint([[("one", "")]])
    assert "\x1b[2J" in at_pty.seen("\x1b[?2026l")


def test_a_terminal_that_does_not_know_its_size_is_taken_for_80_columns_and_24_lines(at_pty: Pty) -> None:
    termios.tcsetwinsize(at_pty.inside, (0, 0))
    with at_pty.terminal() as terminal:
        assert (terminal.width, terminal.height) == (80, 24)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_event_and_its_handler_comes_back(terminal: Terminal, number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    assert keys_of(terminal, 1) == [number]
    terminal.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    terminal.__enter__()


def test_an_exception_leaves_the_terminal_as_it_was(at_pty: Pty) -> None:
    before = termios.tcgetattr(at_pty.inside)

    def fail() -> None:
        with at_pty.terminal():
            assert termios.tcgetattr(at_pty.inside) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert at_pty.seen(LEAVE) == ENTER + LEAVE
    assert termios.tcgetattr(at_pty.inside) == before


# ---- without a terminal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["top"], output.USAGE, "tt top needs a terminal for its input and output: --once prints one picture"),
        (["top", "--interval", "0"], output.USAGE, "argument --interval: '0': it must be a number of seconds from 0.2"),
        (["top", "--interval", "nan"], output.USAGE, "argument --interval: 'nan': it must be a number of seconds"),
        (["top", "--once", "--data", "/nonexistent"], output.NO_CONNECTION, "/nonexistent/control.sock: no server"),
    ],
)
def test_what_cannot_be_watched_is_one_line(capsys: Capture, words: list[str], code: int, says: str) -> None:
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"tt: {says}")


def test_a_terminal_that_cannot_be_painted_on_is_said(
    at_pty: Pty, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with open(at_pty.inside, closefd=False) as typed, open(at_pty.inside, "w", closefd=False) as painted:
        monkeypatch.setattr(sys, "stdin", typed)
        monkeypatch.setattr(sys, "stdout", painted)
        for name in ("dumb", ""):
            monkeypatch.setenv("TERM", name)
            assert cli.main(["top"]) == output.USAGE
            assert "TERM says that this terminal cannot be painted on" in capsys.readouterr().err
        monkeypatch.undo()


# ---- with a real server ---------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    with Process(tmp_path) as server:
        yield server


def attack(server: Process, *sources: str) -> None:
    for source in sources:
        server.time_out(source)


def listed(server: Process) -> str:
    return tt(server, "bans", "list").stdout


def tt(server: Process, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TT, *words, "--data", str(server.place / "data")],
        env=server.environ | environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("locale", "ascii_only"), [("C.UTF-8", False), ("C", True)])
def test_once_prints_a_picture_of_plain_text(server: Process, locale: str, ascii_only: bool) -> None:
    attack(server, "127.0.1.1")
    done = tt(server, "top", "--once", "--interval", "0.2", LC_ALL=locale, COLUMNS="100", LINES="30")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 29
    assert max(map(len, lines)) <= 100
    assert re.match(r"server      tt \S+, pid \d+, up 0:\d\d; timing out, nobody exempt$", lines[0])
    assert re.search(r"^not_protocol +1 +1  127\.0\.1\.0/24 +1 ", done.stdout, re.M)
    row = r"^ [\d:]{8} 127\.0\.1\.1 +not_protocol +(10:00|9:\d\d) HTTP request +GET / HTTP/1\.1\\r\\n\\r\\n$"
    assert re.search(row, done.stdout, re.M), done.stdout
    assert done.stdout.replace("\n", "").isprintable()
    assert not ascii_only or done.stdout.isascii()


class Tmux:
    """A shell in a tmux of its own, 100 columns and 30 lines, that can start `tt top`."""

    def __init__(self, server: Process) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tt-tmux-")  # a short path: it is that of a socket
        self._server = server
        preload = f"LD_PRELOAD={shlex.quote(os.environ['LD_PRELOAD'])} " if "LD_PRELOAD" in os.environ else ""
        top = Path(self._folder.name) / "top"
        top.write_text(f'#!/bin/sh\nexec env {preload}{TT} top --data {shlex.quote(str(server.place / "data"))} "$@"\n')
        top.chmod(0o755)

    def __enter__(self) -> "Tmux":
        self("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", "-c", self._folder.name, "sh")
        self.line("PS1='''here> '")
        self.shows("here>")
        self.line("stty -g > before; echo as it ''was")
        self.shows("as it was")
        return self

    def __exit__(self, *reason: object) -> None:
        if reason[0] is not None:
            sys.stderr.write(self.screen())
        self("kill-server")
        self._folder.cleanup()

    def __call__(self, *words: str) -> str:
        environ = {name: value for name, value in self._server.environ.items() if name not in ("LD_PRELOAD", "TMUX")}
        done = subprocess.run(
            ["tmux", "-u", "-S", f"{self._folder.name}/socket", *words],
            env=environ | {"LC_ALL": "C.UTF-8"}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done
        return done.stdout

    def keys(self, *names: str) -> None:
        self("send-keys", *names)

    def line(self, text: str) -> None:
        self("send-keys", "-l", text)
        self.keys("Enter")

    def screen(self) -> str:
        return self("capture-pane", "-p")

    def shows(self, pattern: str) -> str:
        """The screen, once it has a match of this."""
        seen = ""

        def found() -> bool:
            nonlocal seen
            seen = self.screen()
            return re.search(pattern, seen, re.M) is not None

        with suppress(AssertionError):
            until(pattern, found, 30)
        assert re.search(pattern, seen, re.M), f"no {pattern!r} on the screen:\n{seen}"
        return seen

    def start(self, *options: str) -> None:
        self.line(" ".join(["./top --interval 0.2", *options, '; echo "ended with $?"']))
        self.shows(r"^server +tt ")

    def ended(self, code: int) -> str:
        """The screen behind the end, which must be what it was before the start."""
        seen = self.shows(rf"^ended with {code}$")
        assert "as it was" in seen
        assert not re.search(r"^server +tt ", seen, re.M), seen
        state = self("display-message", "-p", "#{alternate_on} #{cursor_flag} #{wrap_flag}")
        assert state.split() == ["0", "1", "1"]
        self.line('[ "$(stty -g)" = "$(cat before)" ] && echo same \'\'modes')
        self.shows("^same modes$")
        return seen


@pytest.fixture
def tmux(server: Process) -> Iterator[Tmux]:
    need("tmux")
    with Tmux(server) as made:
        yield made


def test_an_attack_shows_and_a_time_out_is_lifted_by_key(server: Process, tmux: Tmux) -> None:
    tmux.start()
    attack(server, "127.0.1.1", "127.0.1.2", "127.0.1.3")
    tmux.shows(r"^ [\d:]{8} 127\.0\.1\.3 +not_protocol +(10:00|9:\d\d) HTTP request +GET / HTTP/1\.1\\r\\n\\r\\n$")
    seen = tmux.shows(r"^not_protocol +3 +3  127\.0\.1\.0/24 +3 ")
    assert re.search(r"^time-outs +3 of 65,536 run", seen, re.M)
    tmux.keys("Down", "j")
    tmux.shows(r"^>[\d:]{8} 127\.0\.1\.2 ")
    tmux.keys("l")
    tmux.shows(r"lift the time-out of 127\.0\.1\.2\? \(y/n\)$")
    tmux.keys("y")
    tmux.shows(r"the time-out of 127\.0\.1\.2 is lifted$")
    tmux.shows(r"^>[\d:]{8} 127\.0\.1\.2 +not_protocol +lifted ")
    assert re.findall(r"^127\S+", listed(server), re.M) == ["127.0.1.1", "127.0.1.3"]
    tmux.keys("q")
    tmux.ended(0)


def test_a_network_is_exempted_by_key(server: Process, tmux: Tmux) -> None:
    attack(server, "127.0.1.1", "127.0.1.2")
    tmux.start()
    tmux.keys("Down", "e")
    tmux.shows(r"exempt network: 127\.0\.1\.0/24_$")
    tmux.keys("Enter")
    tmux.shows(r"exempt 127\.0\.1\.0/24: 256 addresses, and lift its 2 time-outs listed here\? \(y/n\)$")
    tmux.keys("y")
    tmux.shows(r"127\.0\.1\.0/24 is exempt, 2 time-outs lifted")
    tmux.shows(r"timing out, 1 network exempt")
    tmux.shows(r"127\.0\.1\.2 +not_protocol +lifted .*\n.*127\.0\.1\.1 +not_protocol +lifted ")
    assert "127.0.1." not in listed(server)
    server.send_http("127.0.1.3")
    server.await_line(r"exempt, disconnected source=127\.0\.1\.3")
    tmux.keys("q")
    tmux.ended(0)


def test_a_filter_shows_only_what_it_finds(server: Process, tmux: Tmux) -> None:
    attack(server, "127.0.1.1", "127.0.2.2")
    tmux.start()
    tmux.shows(r"^ [\d:]{8} 127\.0\.2\.2 ")
    tmux.keys("/", "0", ".", "1", ".", "1", "Enter")
    tmux.shows(r"\(1 of 2 with '0\.1\.1'\)\n [\d:]{8} 127\.0\.1\.1 .*\n\n")
    tmux.keys("Escape")
    tmux.shows(r" \(2\)\n [\d:]{8} 127\.0\.2\.2 .*\n [\d:]{8} 127\.0\.1\.1 ")
    tmux.keys("C-c")
    tmux.ended(0)


def test_a_pause_stops_the_picture_and_not_the_keys(server: Process, tmux: Tmux) -> None:
    attack(server, "127.0.1.1")
    tmux.start()
    tmux.keys("Down", "p")
    tmux.shows("paused")
    attack(server, "127.0.2.2")
    for said in ("the time-out of 127.0.1.1 is lifted", "127.0.1.1 was not timed out any more"):
        tmux.keys("l", "y")
        tmux.shows(f"^ {said}$")
    # Between the two answers came a sample, which has both.
    assert re.search(r"^>[\d:]{8} 127\.0\.1\.1 +not_protocol +(10|9):", seen := tmux.screen(), re.M), seen
    assert "127.0.2.2" not in seen
    tmux.keys("p")
    tmux.shows(r"^ [\d:]{8} 127\.0\.2\.2 .*\n>[\d:]{8} 127\.0\.1\.1 +not_protocol +lifted ")
    tmux.keys("q")
    tmux.ended(0)


def test_a_new_size_and_help(tmux: Tmux) -> None:
    tmux.start()
    tmux("resize-window", "-x", "70", "-y", "20")
    tmux.shows("tt top needs 80 columns and 24 lines; here are 70 and 20")
    tmux("resize-window", "-x", "140", "-y", "45")
    seen = tmux.shows(r"^a second(.*\n)+.* \(0\)\n(.*\n)+ q quit")
    assert len(seen.splitlines()) == 45
    tmux.keys("?")
    tmux.shows("any key goes back")
    tmux.keys("x", "q")
    tmux.shows("ended with 0")


def running_top(server: Process) -> int:
    """The process of `tt top`."""
    data = str(server.place / "data").encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"top" in words and data in words:
                return int(folder.name)
    raise AssertionError("tt top does not run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_the_terminal_as_it_was(
    server: Process, tmux: Tmux, number: signal.Signals
) -> None:
    tmux.start()
    os.kill(running_top(server), number)
    tmux.ended(128 + number)


def test_the_shell_can_have_the_terminal_meanwhile(tmux: Tmux) -> None:
    tmux.start()
    tmux.keys("C-z")
    seen = tmux.shows("Stopped")
    assert "as it was" in seen
    tmux.line("fg")
    tmux.shows(r"^server +tt ")
    tmux.keys("q")
    assert "as it was" in tmux.shows(r"^\./top --interval 0\.2\nhere>$")


def test_a_server_that_ends_is_said_and_asked_again(tmp_path: Path) -> None:
    need("tmux")
    with ExitStack() as stack:
        with Process(tmp_path) as first:
            tmux = stack.enter_context(Tmux(first))
            tmux.start()
        tmux.shows(r"NO ANSWER$")
        tmux.shows(r"^ asking again: /")
        with Process(tmp_path) as second:
            attack(second, "127.0.1.1")
            seen = tmux.shows(r"^ [\d:]{8} 127\.0\.1\.1 ")
            assert "NO ANSWER" not in seen
            assert f"pid {second.pid}," in seen
            tmux.keys("q")
            tmux.ended(0)


def test_a_server_that_hangs_does_not_hang_the_keys(server: Process, tmux: Tmux) -> None:
    tmux.start()
    server.send(signal.SIGSTOP)
    try:
        tmux.keys("?")
        tmux.shows("any key goes back")
        tmux.keys("x", "q")
        tmux.ended(0)
    finally:
        server.send(signal.SIGCONT)


def test_of_a_long_history_only_what_is_new_or_on_the_screen_is_asked_for(server: Process) -> None:
    control = server.place / "data/control.sock"
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as answers:
        client.connect(str(control))
        for number in range(KEPT + 200):
            source = f"10.0.{number >> 8}.{number & 255}"
            client.sendall(json.dumps({"do": "bans.add", "source": source}).encode() + b"\n")
            assert b'"end":true' in answers.readline()
    args, model = argparse.Namespace(control=control), Model()
    first = sample(args, 0, None)
    assert len(first.entries) == KEPT
    model.add(first)
    assert len(sample(args, model.seen, None).entries) == 0
    assert len(sample(args, model.seen, model.latest()[19].number).entries) == 20
    assert len(sample(args, model.seen, 1).entries) == PER_SAMPLE
