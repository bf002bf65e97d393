"""`tt bans history` and `tt bans watch`: what they print, and how they end."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import until
from process import TT
from test_cli_bans import Capture, Tt
from test_control import Controlled

from tt.cli import output
from tt.cli.bans_past import _event, _row

ITEM = {
    "number": 12, "source": "192.0.2.1", "reason": "not_protocol", "at": "2026-01-31T12:00:00Z", "at_s": 1769860800.0,
    "seconds": 600.0, "before": 1, "looks": "SSH", "first": "SSH-2.0", "note": None, "proxied": False,
    "state": "expired", "ended": "2026-01-31T12:10:00Z", "dropped": 22,
}  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Controlled]:
    with Controlled(tmp_path / "data") as server:
        yield server


@pytest.fixture
def tt(server: Controlled, capsys: Capture) -> Tt:
    return Tt(server.settings.data, capsys)


# ---- history --------------------------------------------------------------------------------------------------------


def test_the_history_is_a_table_or_json_with_all_that_is_known(tt: Tt) -> None:
    tt("bans", "add", "192.0.2.1", "--for", "2h", "--reason", "seen at the gate")
    tt("bans", "add", "203.0.113.1")
    tt("bans", "remove", "192.0.2.1")
    heading, first, second = tt("bans", "history")[0].splitlines()
    assert heading.split() == [
        "NUMBER",
        "BEGAN",
        "SOURCE",
        "REASON",
        "FOR",
        "BEFORE",
        "STATE",
        "ENDED",
        "DROPPED",
        "SPOKE",
    ]
    assert re.fullmatch(r" +1 \S+Z +192\.0\.2\.1 +operator +2:00:00 +0 lifted +\S+Z +0 seen at the gate", first), first
    assert re.fullmatch(r" +2 \S+Z +203\.0\.113\.1 +operator +10:00 +0 running +unknown", second), second
    items = [json.loads(line) for line in tt("bans", "history", "--json")[0].splitlines()]
    assert [item.keys() for item in items] == [ITEM.keys()] * 2


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["192.0.2.0/24"], [1]), (["--after", "1"], [2]), (["--since", "1h"], [1, 2]), (["--since", "0"], []),
        (["--reason", "operator"], [1, 2]), (["--reason", "stalled"], []),
    ],
)  # fmt: skip
def test_of_the_history_a_part_is_shown(tt: Tt, words: list[str], numbers: list[int]) -> None:
    tt("bans", "add", "192.0.2.1")
    tt("bans", "add", "203.0.113.1")
    out, _ = tt("bans", "history", "--json", *words)
    assert [json.loads(line)["number"] for line in out.splitlines()] == numbers


def test_what_is_no_longer_held_is_said(tt: Tt, server: Controlled) -> None:
    for number in range(3):
        tt("bans", "add", f"192.0.2.{number}")
    until("the end of the turn that answered", lambda: server.guard.history.held == 3)
    server.guard.history.held = 1
    out, err = tt("bans", "history")
    assert out.count("\n") == 2
    assert err == "tt: 2 earlier time-outs are no longer held\n"


def test_an_error_prints_no_heading(tt: Tt) -> None:
    out, err = tt("bans", "history", "nonsense", code=output.FAILED)
    assert (out, err[:24]) == ("", "tt: 'nonsense' is no add")
    assert "must be a whole number" in tt("bans", "history", "--after", "x", code=output.USAGE)[1]


def test_a_row_of_one_that_is_over() -> None:
    assert _row(ITEM).split() == [
        "12", "2026-01-31T12:00:00Z", "192.0.2.1", "not_protocol", "10:00", "1", "expired", "2026-01-31T12:10:00Z",
        "22", "SSH",
    ]  # fmt: skip


# ---- watch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "line"),
    [
        (ITEM | {"event": "begun"}, "2026-01-31T12:00:00Z timed out 192.0.2.1 not_protocol for 10:00: SSH"),
        (
            ITEM | {"event": "ended"},
            "2026-01-31T12:10:00Z expired 192.0.2.1 not_protocol, 22 connections dropped: SSH",
        ),
        (
            ITEM | {"event": "ended", "dropped": None, "note": "why", "state": "lifted"},
            "2026-01-31T12:10:00Z lifted 192.0.2.1 not_protocol: why",
        ),
        ({"lost": 5}, "5 events lost: they were not read fast enough"),
    ],
)
def test_an_event_is_one_line(item: dict[str, object], line: str) -> None:
    assert _event(item) == line


def test_events_are_printed_as_they_come_until_ctrl_c_which_is_no_failure(tt: Tt, server: Controlled) -> None:
    for form in ([], ["--json"]):
        command = [TT, "bans", "watch", "192.0.2.0/24", *form, "--control", str(server.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
            assert watch.stdout is not None
            assert watch.stderr is not None
            until("the watcher", lambda: server.guard.history.watchers)
            tt("bans", "add", "203.0.113.1")
            tt("bans", "add", "192.0.2.1", "--reason", "gate")
            line = watch.stdout.readline()  # while it runs
            assert (
                json.loads(line)["note"] == "gate" if form else "timed out 192.0.2.1 operator for 10:00: gate" in line
            )
            watch.send_signal(signal.SIGINT)
            assert (watch.stdout.read(), watch.stderr.read()) == ("", "")
            assert watch.wait(10) == output.OK
        until("its end", lambda: not server.guard.history.watchers)
        tt("bans", "clear")


def test_the_end_of_the_server_ends_it_with_exit_code_3(tmp_path: Path) -> None:
    with Controlled(tmp_path / "data") as server:
        command = [TT, "bans", "watch", "--control", str(server.path)]
        watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until("the watcher", lambda: server.guard.history.watchers)
    out, err = watch.communicate(timeout=30)
    assert (out, watch.returncode) == ("", output.NO_CONNECTION)
    assert err == f"tt: {server.path}: the server ended before it had answered\n"
