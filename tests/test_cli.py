"""tt.cli: what the commands print, on which stream, and their exit codes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from test_client import (
    Link,
    Peer,
    Start,
    answer_pings,
    fin_after_welcome,
    new_key,
    no_known_servers,
    reset_before_welcome,
    send,
    silence,
    start,
)

from tt import __main__, __version__, cli, known_servers, wire
from tt.cli import output
from tt.keys import to_text

__all__ = ["no_known_servers", "start"]  # fixtures

REPLY = r"25 bytes from 127\.0\.0\.1: seq={} time=\d+\.\d\d ms\n"
STATISTICS = r"\n--- 127\.0\.0\.1 TMSS10Ping statistics ---\n{} packets transmitted, {} received, {}% loss\n"
ROUND_TRIP = r"round-trip min/avg/max = \d+\.\d\d/\d+\.\d\d/\d+\.\d\d ms\n"

LONG = 60.0  # s in which a command ends on any machine

Capture = pytest.CaptureFixture[str]


def ping(peer: Peer, *options: str) -> int:
    return cli.main(["ping", "--key", to_text(peer.key.public), "-i", "0", *options, f"127.0.0.1:{peer.port}"])


# --- tt ping ----------------------------------------------------------------------------------------------------------


def test_ping_prints_like_ping(start: Start, capsys: Capture) -> None:
    assert ping(start(answer_pings), "-c", "4") == output.OK
    out, err = capsys.readouterr()
    replies = "".join(REPLY.format(seq) for seq in range(1, 5))
    assert re.fullmatch(replies + STATISTICS.format(4, 4, 0) + ROUND_TRIP, out)
    assert err == ""


def test_ping_of_a_known_server_needs_no_key(start: Start, capsys: Capture) -> None:
    peer = start(answer_pings)
    known_servers.add("127.0.0.1", peer.port, peer.key.public)
    assert cli.main(["ping", "-c", "1", "-P", str(peer.port), "127.0.0.1"]) == output.OK
    assert re.match(REPLY.format(1), capsys.readouterr().out)


def test_ping_as_json(start: Start, capsys: Capture) -> None:
    peer = start(answer_pings, reset_before_welcome)
    assert ping(peer, "-c", "2", "--json") == output.OK
    first, second, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"seq": 1, "address": "127.0.0.1", "bytes": 25, "ms": first["ms"]}
    assert second["seq"] == 2
    assert summary["min_ms"] <= summary["avg_ms"] <= summary["max_ms"]
    assert {key: summary[key] for key in ("host", "port", "transmitted", "received", "loss_percent")} == {
        "host": "127.0.0.1",
        "port": peer.port,
        "transmitted": 2,
        "received": 2,
        "loss_percent": 0,
    }
    assert ping(peer, "-c", "1", "--json") == output.NO_CONNECTION
    lost, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert lost["seq"] == 1
    assert "dropped before WELCOME" in lost["error"]
    assert (summary["received"], summary["loss_percent"], summary["min_ms"]) == (0, 100, None)


def test_a_connection_lost_in_the_run_is_one_loss_and_the_next_ping_connects_anew(
    start: Start, capsys: Capture
) -> None:
    assert ping(start(fin_after_welcome, answer_pings), "-c", "3") == output.FAILED
    out, err = capsys.readouterr()
    assert re.fullmatch(REPLY.format(2) + REPLY.format(3) + STATISTICS.format(3, 2, r"33\.33") + ROUND_TRIP, out)
    assert re.fullmatch(r"tt: seq=1 lost: the connection to 127\.0\.0\.1:\d+ was lost .*\n", err)


def test_a_dropped_client_is_told_once_where_to_look(start: Start, capsys: Capture) -> None:
    assert ping(start(reset_before_welcome), "-c", "3") == output.NO_CONNECTION
    out, err = capsys.readouterr()
    assert re.fullmatch(STATISTICS.format(3, 0, 100), out)
    first, *others = err.splitlines()
    assert "this address may be timed out" in first
    assert "see the server's log, or run 'tt bans list' on the server" in first
    assert others == ["tt: seq=2 lost: as before", "tt: seq=3 lost: as before"]


def test_silence_is_a_loss_after_the_time_out(start: Start, capsys: Capture) -> None:
    assert ping(start(silence), "-c", "1", "-W", "0.1") == output.NO_CONNECTION
    # What is left of the time when the attempt begins, and it may be over before that where the machine is busy.
    assert re.search(r"no (WELCOME|connection) within 0(\.\d+)? s", capsys.readouterr().err)


def test_an_unknown_server_is_a_usage_error_that_says_how_to_add_it(start: Start, capsys: Capture) -> None:
    peer = start(answer_pings)
    assert cli.main(["ping", f"127.0.0.1:{peer.port}"]) == output.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tt: 127.0.0.1:{peer.port} is not a known server: ")
    assert f"'tt known add 127.0.0.1:{peer.port} KEY'" in err


def test_a_welcome_that_is_not_accepted_ends_the_run_with_4(start: Start, capsys: Capture) -> None:
    welcome = wire.header(wire.WELCOME, 60) + new_key().public + bytes(28)
    assert ping(start(send(welcome)), "-c", "3") == output.DENIED
    out, err = capsys.readouterr()
    assert out == ""
    assert "does not hold the key that is known for it" in err
    assert len(err.splitlines()) == 1
    assert ping(start(send(b"TT\x02\x04\x00\x00\x00\x01\x02")), "-c", "3") == output.DENIED
    assert "speaks version 2 of the protocol, not 1" in capsys.readouterr().err
    # After some answers their statistics are not lost.
    assert ping(start(fin_after_ping, send(welcome)), "-c", "3") == output.DENIED
    assert re.fullmatch(REPLY.format(1) + STATISTICS.format(3, 1, r"66\.67") + ROUND_TRIP, capsys.readouterr().out)


def fin_after_ping(link: Link) -> None:
    """Answers one ping and closes at the second."""
    link.accept()
    link.read()
    link.sock.sendall(link.seal(b"\0"))
    link.read()


def test_ctrl_c_ends_an_endless_ping_with_the_statistics(start: Start, tmp_path: Path) -> None:
    peer = start(answer_pings)
    command = [sys.executable, "-m", "tt", "ping", "-i", "600", "--key", to_text(peer.key.public)]
    with subprocess.Popen([*command, f"127.0.0.1:{peer.port}"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(LONG) == output.OK
    assert re.fullmatch(REPLY.format(1), first)
    assert re.fullmatch(STATISTICS.format(1, 1, 0) + ROUND_TRIP, rest)


class Recorder(io.StringIO):
    """Keeps each write by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_ctrl_c_cannot_come_between_a_line_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    monkeypatch.setattr(sys, "stderr", recorder)
    output.line("one")
    output.blank_line()
    output.json_line({"two": 2})
    output.lines(["three", "four"])
    output.json_lines([b'{"five":5}\n', b'{"six":6}\n'])
    output.message("seven")
    assert recorder.writes == ["one\n", "\n", '{"two": 2}\n', "three\nfour\n", '{"five":5}\n{"six":6}\n', "tt: seven\n"]


@pytest.mark.parametrize("text", ["\x7f", "\x1b[2J", "\u202e", "\U0001f4fc", '"\\'])
def test_json_holds_nothing_that_a_terminal_obeys_and_loses_nothing(text: str, capsys: Capture) -> None:
    value = {"name": text}
    output.json_line(value)
    output.line(output.json_text(value))
    output.json_lines([msgspec.json.encode(value) + b"\n"])
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [value] * 3
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_a_reader_that_goes_away_gets_no_traceback(start: Start) -> None:
    peer = start(answer_pings)
    command = [sys.executable, "-m", "tt", "ping", "-i", "0", "--key", to_text(peer.key.public)]
    with subprocess.Popen(
        [*command, f"127.0.0.1:{peer.port}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(LONG) == output.FAILED


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is not there")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    known_servers.add("host", 1, bytes(32))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tt", "known", "list"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == output.FAILED
    assert done.stderr == "tt: No space left on device: the command could not finish\n"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["ping"], "required: HOST"),
        (["ping", "two words"], "'two words' is no host"),
        (["ping", "host:0"], "'0' is no port"),
        (["ping", "-P", "65536", "host"], "'65536' is no port"),
        (["ping", "-P", "1", "host:2"], "port 2 stands behind the host and -P says 1: give one port"),
        (["ping", "-c", "0", "host"], "'0' is no count"),
        (["ping", "-c", "1" * 5000, "host"], "is no count"),
        (["ping", "-i", "-1", "host"], "'-1' is no time"),
        (["ping", "-i", "nan", "host"], "'nan' is no time"),
        (["ping", "-W", "0", "host"], "more than 0 seconds"),
        (["ping", "-W", "inf", "host"], "'inf' is no time"),
        (["ping", "-W", "soon", "host"], "'soon' is no time"),
        (["ping", "--source", "eth0", "host"], "'eth0' is no IP address"),
        (["ping", "--key", "tt1-x", "host"], "a server key has 48 letters"),
        (["ping", "--time", "1", "host"], "unrecognized arguments: --time"),
        (["ping", "host\x1b[2J"], r"host\x1b[2J"),
        (["known"], "required: ACTION"),
        (["known", "add", "host"], "required: KEY"),
        (["known", "add", "host", "key"], "begins with 'tt1-'"),
        (["known", "remove", "host:"], "'' is no port"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(words: list[str], fault: str, capsys: Capture) -> None:
    assert cli.main(words) == output.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tt: ")
    assert fault in err
    assert len(err.splitlines()) == 1
    assert err.isascii()


# --- tt known ---------------------------------------------------------------------------------------------------------


def test_known_servers_are_added_listed_and_removed(capsys: Capture) -> None:
    first, second = to_text(b"\x01" * 32), to_text(b"\x02" * 32)
    assert cli.main(["known", "list"]) == output.OK
    assert cli.main(["known", "add", "Tapes.example", first]) == output.OK
    assert cli.main(["known", "add", "tapes.example:5000", second]) == output.OK
    assert cli.main(["known", "add", "[::1]:5001", first]) == output.OK
    assert cli.main(["known", "add", "[::1]:5001", first]) == output.OK
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "tt: tapes.example:5000 is known now",
        "tt: tapes.example:5000 is known now",
        "tt: [::1]:5001 is known now",
        "tt: [::1]:5001 was known with this key already",
    ]
    assert cli.main(["known", "list"]) == output.OK
    assert capsys.readouterr().out == f"tapes.example:5000 {second} {first}\n[::1]:5001 {first}\n"
    assert cli.main(["known", "list", "--json"]) == output.OK
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"host": "tapes.example", "port": 5000, "keys": [second, first]},
        {"host": "::1", "port": 5001, "keys": [first]},
    ]
    assert cli.main(["known", "remove", "tapes.example"]) == output.OK
    assert cli.main(["known", "remove", "tapes.example"]) == output.FAILED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "tt: tapes.example:5000 is removed",
        "tt: tapes.example:5000 is not known, so nothing was removed; see 'tt known list'",
    ]


def test_a_damaged_known_servers_file_is_a_configuration_error(capsys: Capture) -> None:
    known_servers.add("127.0.0.1", 5000, bytes(32))
    known_servers.path().write_text("127.0.0.1:5000 ssh-rsa\n")
    for words in (["known", "list"], ["ping", "127.0.0.1"]):
        assert cli.main(words) == output.USAGE
        assert re.fullmatch(r"tt: .*/known_servers, line 1: a server key begins with .*\n", capsys.readouterr().err)


# --- the command line as a whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["nonsense"], ["--nonsense"], ["--verb"]])
def test_no_command_or_an_unknown_one_is_one_line(words: list[str], capsys: Capture) -> None:
    assert cli.main(words) == output.USAGE
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "see 'tt --help'" in err


def test_the_version_is_the_packages(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"tt {__version__}\n"


@pytest.mark.parametrize(
    "words", [[], ["ping"], ["known"], ["known", "add"], ["known", "list"], ["known", "remove"], ["serve"]]
)
def test_every_command_has_help(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {' '.join(['tt', *words])}")
    assert "%(" not in out


@pytest.mark.parametrize("words", [["ping", "--help"], ["known", "list"]])
def test_light_commands_do_not_load_the_server(words: list[str]) -> None:
    script = (
        "import sys; from tt import cli\n"
        f"try: cli.main({words!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'pyroute2', 'tt.config', 'tt.serve', 'tt._core', 'tt.cli.serve'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_console_scripts_are_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str] | None] = []

    def main(argv: list[str] | None = None) -> int:
        called.append(argv)
        return output.OK

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(sys, "argv", ["program", "-x", "host"])
    assert [__main__.main(), __main__.serve(), __main__.ping()] == [output.OK] * 3
    assert called == [None, ["serve", "-x", "host"], ["ping", "-x", "host"]]
