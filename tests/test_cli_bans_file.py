"""`tt bans export` and `tt bans import`: what one prints the other takes, and a wrong line changes nothing."""

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from harness import until
from process import TT
from test_cli_bans import Capture, Tt
from test_control import MANY, Controlled, fill

from tt import cli
from tt.cli import output


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Controlled]:
    with Controlled(tmp_path / "data", exempt=["198.51.100.0/24"]) as server:
        yield server


@pytest.fixture
def tt(server: Controlled, capsys: Capture) -> Tt:
    return Tt(server.settings.data, capsys)


class Taker:
    """Runs `tt bans import` on text; what it says, a line each."""

    def __init__(self, data: Path, capture: Capture, patch: pytest.MonkeyPatch) -> None:
        self._data, self._capture, self._patch = data, capture, patch

    def __call__(self, text: str | bytes, *words: str, code: int = output.OK) -> list[str]:
        stdin = io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()))
        self._patch.setattr(sys, "stdin", stdin)
        assert cli.main(["bans", "import", *words, "--data", str(self._data)]) == code
        out, err = self._capture.readouterr()
        assert out == ""
        return [line.removeprefix("tt: ") for line in err.splitlines()]


@pytest.fixture
def take(server: Controlled, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Taker:
    return Taker(server.settings.data, capsys, monkeypatch)


def written(source: str, seconds: float, **more: Any) -> str:
    """A line of JSON with an end that is so far away."""
    until_ = datetime.fromtimestamp(time.time() + seconds, UTC).isoformat()
    return json.dumps({"source": source, "until": until_, **more}) + "\n"


def listed(server: Controlled) -> dict[str, tuple[int, str | None]]:
    """Seconds left, rounded up to tens since they only get fewer, and note."""
    return {item["source"]: (-(-item["ends_in_s"] // 10) * 10, item["note"]) for item in server.ask("bans.list")[:-1]}


def test_what_was_exported_is_imported_with_its_end_and_whose_word_it_was(
    tt: Tt, server: Controlled, take: Taker
) -> None:
    with server.connect("127.0.0.2") as peer:
        peer.sendall(b"SSH-2.0-x\r\n")
        server.await_timed_out("127.0.0.2")
    tt("bans", "add", "2001:db8::1", "--for", "1h", "--reason", "seen \u2028")
    tt("bans", "add", "192.0.2.1", "--for", "2h")
    out, _ = tt("bans", "export")
    assert all(
        list(json.loads(line)) == ["source", "reason", "since", "until", "before", "looks", "note"]
        for line in out.splitlines()
    )
    tt("bans", "clear")
    assert take(out, "--dry-run") == ["it would be: 3 imported"]
    assert listed(server) == {}
    assert take(out) == ["3 imported"]
    assert listed(server) == {
        "127.0.0.2": (600, "imported: not_protocol, SSH"), "2001:db8::/64": (3600, "seen \u2028"),
        "192.0.2.1": (7200, "imported"),
    }  # fmt: skip
    assert take(out) == ["3 timed out here for as long or longer"]
    again, _ = tt("bans", "export")
    tt("bans", "clear")
    take(again)
    assert listed(server)["127.0.0.2"][1] == "imported: not_protocol, SSH"  # and no longer at each hop
    assert {item["reason"] for item in server.ask("bans.list")[:-1]} == {"operator"}


def test_of_the_export_a_part_is_printed(tt: Tt) -> None:
    tt("bans", "add", "192.0.2.1")
    tt("bans", "add", "203.0.113.1")
    assert [json.loads(line)["source"] for line in tt("bans", "export", "192.0.2.0/24")[0].splitlines()] == [
        "192.0.2.1"
    ]
    assert tt("bans", "export", "--reason", "stalled") == ("", "")


def test_what_becomes_of_each_line_is_counted(server: Controlled, take: Taker) -> None:
    text = (
        written("192.0.2.1", 300) + "\n" + written("192.0.2.2", -5) + written("198.51.100.1", 300)
        + written("192.0.2.1", 100) + written("192.0.2.3", 300, others="let be", before=7)
    )  # fmt: skip
    assert take(text, "--dry-run") == ["it would be: 3 imported, 1 over already, 1 exempt here, or a proxy"]
    assert take(text) == [
        "2 imported, 1 timed out here for as long or longer, 1 over already, 1 exempt here, or a proxy"
    ]
    assert listed(server) == {"192.0.2.1": (300, "imported"), "192.0.2.3": (300, "imported")}
    assert take("") == ["nothing to import"]


def test_plain_addresses_are_taken_for_a_time_that_is_given(server: Controlled, take: Taker) -> None:
    text = "# a list\n192.0.2.1\n\n  2001:db8::7 # and why\r\n"
    assert take(text, "--for", "1h", "--reason", "fail2ban sshd") == ["2 imported"]
    assert listed(server) == {"192.0.2.1": (3600, "fail2ban sshd"), "2001:db8::/64": (3600, "fail2ban sshd")}


FORM = "no time-out as 'tt bans export' prints it: "
WRONG = [
    ("192.0.2.9\n", r"'192\.0\.2\.9' does not say until when: give --for TIME"),
    ("{}\n", f"{FORM}Object missing required field `source`"),
    ('{"source":1,"until":""}\n', rf"{FORM}Expected `str`, got `int` - at `\$\.source`"),
    ('{"source":"192.0.2.9"\n', f"{FORM}Input data was truncated"),
    (
        '{"source":"192.0.2.9","until":"soon"}\n',
        "'until' is 'soon': it must be a time and its zone, as in 2026-01-31T12",
    ),
    (
        '{"source":"192.0.2.9","until":"2026-01-31T12:00:00"}\n',
        "'until' is '2026-01-31T12:00:00': it must be a time and",
    ),
    (written("192.0.2.9", 31 * 86400), "its end is in 31 days: it must be within 30"),
    (written("192.0.2.0/24", 60), r"'192\.0\.2\.0/24' is no source: a prefix must be IPv6's /64 here; give"),
    (written("x" * 900, 60), "'x{40,}.*' is no source: it must be an address"),
    ("y" * 5000 + "\n", "over 4096 bytes"),
    (b"\xff\xfe\n", "'utf-8' codec can't decode byte 0xff"),
]


@pytest.mark.parametrize(("line", "rule"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_line_is_named_and_nothing_is_done(
    server: Controlled, take: Taker, line: str | bytes, rule: str
) -> None:
    text = written("192.0.2.1", 60).encode() * 70 + (line if isinstance(line, bytes) else line.encode())
    for words in ([], ["--dry-run"]):
        named, last = take(text, *words, code=output.FAILED)
        assert re.match(f"line 71: {rule}", named), named
        assert last == "nothing imported; lines that are wrong: 1: mend them, or leave them out with --skip-bad"
    assert listed(server) == {}


def test_wrong_lines_are_left_out_where_that_is_wished_and_the_exit_code_says_so(
    server: Controlled, take: Taker
) -> None:
    text = "nonsense\n" * 30 + "192.0.2.1\n"
    *named, last = take(text, "--skip-bad", "--for", "60", code=output.FAILED)
    assert len(named) == 20
    assert last == "1 imported, 30 wrong"
    assert list(listed(server)) == ["192.0.2.1"]


def test_a_length_that_cannot_be_is_refused_for_each_line(server: Controlled, take: Taker) -> None:
    named, _ = take("192.0.2.1\n", "--for", "31d", code=output.FAILED)
    assert named == "line 1: a time-out of 2678400.0 s: it must be 1 s to 30 days"
    assert listed(server) == {}


def test_a_note_that_is_too_long_with_whose_word_it_was_is_cut(server: Controlled, take: Taker) -> None:
    take(written("192.0.2.1", 60, reason="tampered", note="\u20ac" * 200))
    note = listed(server)["192.0.2.1"][1]
    assert note is not None
    assert (len(note), note[:21]) == (200, "imported: tampered, \u20ac")


def test_50000_go_from_one_server_to_another(tmp_path: Path) -> None:
    one, other = Controlled(tmp_path / "one"), Controlled(tmp_path / "other")
    fill(one.table, MANY)
    with one:
        exported = subprocess.check_output([TT, "bans", "export", "--control", str(one.path)])
        assert exported.count(b"\n") == MANY
    with other:
        with subprocess.Popen([TT, "bans", "import", "--control", str(other.path)], stdin=subprocess.PIPE) as taking:
            assert taking.stdin is not None
            taking.stdin.write(exported)
            taking.stdin.close()
            until("the first", lambda: other.table.running, 60)  # behind a check of all
            assert not other.is_dropped("127.0.0.5")  # it serves meanwhile
        assert taking.returncode == output.OK
        assert other.table.running == MANY
