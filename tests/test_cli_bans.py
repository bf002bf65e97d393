"""`tt bans`: what it prints, on which stream, and its exit codes; and where no server of ours answers."""

import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from process import TT, need
from test_control import MANY, Controlled, fill

from tt import cli
from tt.cli import bans, output

Capture = pytest.CaptureFixture[str]
HEADING = r"SOURCE +REASON +SINCE +ENDS IN +BEFORE +DROPPED +KERNEL +SPOKE\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Controlled]:
    with Controlled(tmp_path / "data", exempt=["198.51.100.0/24"]) as server:
        yield server


class Tt:
    """Runs `tt` on one data directory, with what it printed."""

    def __init__(self, data: Path, capture: Capture) -> None:
        self._data, self._capture = data, capture

    def __call__(self, *words: str, code: int = output.OK) -> tuple[str, str]:
        assert cli.main([*words, "--data", str(self._data)]) == code
        out, err = self._capture.readouterr()
        assert err.count("\n") == (1 if err else 0), err
        return out, err


@pytest.fixture
def tt(server: Controlled, capsys: Capture) -> Tt:
    return Tt(server.settings.data, capsys)


# ---- tt bans --------------------------------------------------------------------------------------------------------


def test_add_list_and_remove(tt: Tt) -> None:
    assert tt("bans", "list") == (re.fullmatch(HEADING, tt("bans", "list")[0])[0], "")  # type: ignore[index]
    assert tt("bans", "add", "192.0.2.1", "--for", "2h", "--reason", "seen at the gate") == (
        "", "tt: 192.0.2.1 is timed out for 2:00:00\n",
    )  # fmt: skip
    assert tt("bans", "add", "2001:db8::1", "--for", "90s")[1] == "tt: 2001:db8::/64 is timed out for 1:30\n"
    assert tt("bans", "add", "192.0.2.2")[1] == "tt: 192.0.2.2 is timed out for 10:00\n"  # the server's time-out
    out, _ = tt("bans", "list")
    assert re.match(HEADING, out)
    two_hours = r"(2:00:00|1:59:\d\d)"
    assert re.search(rf"^192\.0\.2\.1 +operator +\d{{4}}-\S+Z +{two_hours} +0 +0 +seen at the gate$", out, re.M), out
    assert re.search(r"^2001:db8::/64 +operator +\d{4}-\S+Z +1:\d\d +0 +0 +", out, re.M), out
    assert tt("bans", "list", "192.0.2.0/31")[0].count("\n") == 2
    assert tt("bans", "remove", "192.0.2.1") == ("", "tt: 1 time-out lifted\n")
    assert tt("bans", "remove", "192.0.2.1", code=output.FAILED) == ("", "tt: 192.0.2.1 is not timed out\n")
    assert tt("bans", "clear") == ("", "tt: 2 time-outs lifted\n")
    assert tt("bans", "clear") == ("", "tt: nobody is timed out\n")


def test_a_network_is_lifted_and_one_without_time_outs_said(tt: Tt) -> None:
    for number in range(3):
        tt("bans", "add", f"192.0.2.{number}")
    assert tt("bans", "remove", "192.0.2.0/24")[1] == "tt: 3 time-outs lifted\n"
    assert tt("bans", "remove", "192.0.2.0/24", code=output.FAILED)[1] == "tt: 192.0.2.0/24 is not timed out\n"


def test_json_is_one_object_a_source(tt: Tt) -> None:
    tt("bans", "add", "192.0.2.1", "--reason", "caf\u00e9")
    item = json.loads(tt("bans", "list", "--json")[0])
    assert (item["source"], item["reason"], item["note"]) == ("192.0.2.1", "operator", "caf\u00e9")
    assert list(item) == [
        "source", "reason", "since", "until", "ends_in_s", "before", "dropped", "in_kernel", "looks", "note", "proxied",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("add", "192.0.2.0/24"),
            "'192.0.2.0/24' is no source: a prefix must be IPv6's /64 here; give the address",
        ),
        (
            ("add", "198.51.100.1"),
            "198.51.100.1 is exempt: take it out of `exempt` first, then send the server",
        ),
        (("add", "192.0.2.1", "--for", "31d"), "a time-out of 2678400.0 s: it must be 1 s to 30 days"),
        (("add", "192.0.2.1", "--for", "0.5s"), "a time-out of 0.5 s: it must be 1 s to 30 days"),
        (("add", "192.0.2.1", "--reason", "x" * 300), "a reason of 300 characters: it must be at most 200"),
        (("add", "192.0.2.1", "--reason", "x" * 99_999), "a request of over 16384 bytes: it must be one JSON object a"),
        (("remove", "192.0.2.7/24"), "'192.0.2.7/24' is no address or network: 192.0.2.7/24 has host bits set"),
        (("list", "nonsense"), "'nonsense' is no address or network: "),
    ],
)
def test_what_the_server_refuses_is_one_line_and_exit_code_1(tt: Tt, words: tuple[str, ...], line: str) -> None:
    out, err = tt("bans", *words, code=output.FAILED)
    assert out == ""
    assert err.startswith(f"tt: {line}")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("bans", "add", "192.0.2.1", "--for", "soon"), "argument --for: 'soon' is no time: it must be a number of"),
        (("bans", "add"), "the following arguments are required: SOURCE"),
        (("status", "--control", "x"), "argument --data: not allowed with argument --control"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(capsys: Capture, words: tuple[str, ...], line: str) -> None:
    assert cli.main([*words, "--data", "x"]) == output.USAGE
    assert line in capsys.readouterr().err


def test_what_a_server_sent_cannot_drive_the_terminal(tt: Tt) -> None:
    tt("bans", "add", "192.0.2.1", "--reason", "\x1b[2J\nroot")
    assert r"\x1b[2J\nroot" in tt("bans", "list")[0]


def test_a_preloaded_entry_and_one_that_is_not_in_the_kernel_are_shown_so() -> None:
    item = {
        "source": "192.0.2.1", "reason": "not_protocol", "since": "2026-01-31T12:00:00Z", "ends_in_s": 59.7,
        "before": 1, "dropped": 22, "in_kernel": False, "looks": "SSH", "note": None,
    }  # fmt: skip
    assert bans._row(item).split() == [
        "192.0.2.1", "not_protocol", "2026-01-31T12:00:00Z", "1:00", "1", "22", "no", "SSH",
    ]  # fmt: skip
    assert bans._row(item | {"in_kernel": True}).split()[-2] == "yes"
    shown = bans._row({"source": "192.0.2.0/24", "reason": "preloaded"})
    assert shown.split() == ["192.0.2.0/24", "preloaded", "never", "yes"]


# ---- no server, or none of ours -------------------------------------------------------------------------------------


def test_without_a_server_is_exit_code_3(tmp_path: Path, capsys: Capture) -> None:
    stale = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    (tmp_path / "file").write_text("")
    for words in (["--data", str(tmp_path)], ["--data", str(tmp_path / "none")], ["--control", str(tmp_path / "file")]):
        for command in (["bans", "list"], ["status"], ["bans", "add", "192.0.2.1"]):
            assert cli.main([*command, *words]) == output.NO_CONNECTION
            out, err = capsys.readouterr()
            assert out == ""
            assert re.fullmatch(r"tt: \S+: no server runs there: name its data directory with --data, .*\n", err)
    assert cli.main(["status", "--control", "/" + "x" * 200]) == output.NO_CONNECTION
    assert "AF_UNIX path too long" in capsys.readouterr().err


def test_the_data_directory_comes_from_the_environment(
    server: Controlled, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TT_DATA", str(server.settings.data))
    assert cli.main(["status", "--json"]) == output.OK
    assert json.loads(capsys.readouterr().out)["pid"] == os.getpid()


def test_who_may_not_open_the_socket_is_told_exit_code_4(server: Controlled) -> None:
    need("setpriv", root=True)
    server.path.chmod(0o600)
    os.chown(server.path, 65534, 65534)
    powerless = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    done = subprocess.run(
        [*powerless, TT, "status", "--control", str(server.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == output.DENIED
    assert done.stderr == (
        f"tt: {server.path}: not allowed: be root or the user that runs the server, or be let in by a group\n"
    )


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "what answers there is no TapeTrackServer"),
        (b"5\n", "what answers there is no TapeTrackServer"),
        (b"[]\n", "what answers there is no TapeTrackServer"),
        (b"\xff\n", "what answers there is no TapeTrackServer"),
        (b"", "the server ended before it had answered"),
        (b'{"source":"192.0.2.1","reason":"preloaded"}\n', "the server ended before it had answered"),
    ],
)
def test_what_is_no_server_of_ours_is_exit_code_3(tmp_path: Path, capsys: Capture, answer: bytes, line: str) -> None:
    path = tmp_path / "other.sock"

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(1000)
            peer.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        assert cli.main(["bans", "list", "--control", str(path)]) == output.NO_CONNECTION
        thread.join()
    assert capsys.readouterr().err == f"tt: {path}: {line}\n"


# ---- many -----------------------------------------------------------------------------------------------------------


def test_50000_are_printed_as_json_and_their_reader_may_go_away(tmp_path: Path) -> None:
    server = Controlled(tmp_path / "data")
    fill(server.table, MANY)
    with server:
        command = [TT, "bans", "list", "--json", "--control", str(server.path)]
        assert subprocess.check_output(command).count(b"\n") == MANY
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            assert reader.stderr is not None
            reader.stdout.readline()
            reader.stdout.close()
            assert reader.stderr.read() == b""
        assert reader.returncode == output.FAILED
