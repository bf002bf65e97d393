"""The snapshot of all that is counted, and `tt status`, which shows it."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import until
from metrics_kit import Measured
from store_kit import no_file_grows, settle, write
from test_cli_bans import Tt

from tt import config, status
from tt.catalog.model import Customer, User
from tt.catalog.service import Service
from tt.cli import status as tt_status


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Measured]:
    with Measured(tmp_path / "data", exempt=["198.51.100.0/24"]) as server:
        yield server


def shown(taken: dict[str, Any]) -> dict[str, str]:
    """The lines of `tt status` by their names."""
    return {line[:12].strip(): line[13:] for line in tt_status._lines(taken)}


# ---- the snapshot ---------------------------------------------------------------------------------------------------


def test_it_is_what_json_can_hold_and_counts_only_grow(server: Measured) -> None:
    first = server.status.take()
    assert json.loads(json.dumps(first)) == first
    server.ask("bans.add", source="192.0.2.1")
    server.handshake()
    server.ask("status")  # answered in a later turn of the loop: what came before is counted
    second = server.status.take()
    assert set(first) == set(second)
    grown = {name: second[name] - first[name] for name in ("accepted", "handshakes", "frames", "timeouts_lifted")}
    assert grown == {"accepted": 1, "handshakes": 1, "frames": 1, "timeouts_lifted": 0}
    assert second["timeouts"] == {**first["timeouts"], "operator": 1}
    assert second["history"] == {"held": 1, "most": 10_000, "begun": 1}
    assert second["process"]["cpu_seconds"] > first["process"]["cpu_seconds"]
    assert second["started_s"] == first["started_s"]
    assert second["uptime_s"] >= first["uptime_s"]


def test_the_control_socket_gives_it(server: Measured) -> None:
    (asked,) = server.ask("status")
    assert asked.pop("end") is True
    assert set(asked) == set(server.status.take())


def test_the_process_is_what_proc_says() -> None:
    process = status.process()
    assert process is not None
    lines = Path("/proc/self/status").read_text()
    in_ram = int(re.search(r"VmRSS:\s+(\d+) kB", lines)[1]) * 1024  # type: ignore[index]
    assert process["rss_bytes"] == pytest.approx(in_ram, rel=0.2)
    assert process["cpu_seconds"] == pytest.approx(sum(os.times()[:2]), rel=0.2)
    if process["descriptors"] is not None:
        assert process["descriptors"] == len(os.listdir("/proc/self/fd")) - 1  # that of the listing

    def agree() -> bool:
        """A thread of an earlier test may just leave the kernel, after it was joined."""
        seen = re.search(r"Threads:\s+(\d+)", Path("/proc/self/status").read_text())
        now = status.process()
        return now is not None and seen is not None and now["threads"] == int(seen[1])

    until("as many threads", agree)


def test_without_proc_there_is_all_but_the_process(server: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "PROC", Path("/nonexistent"))
    taken = server.status.take()
    assert taken["process"] is None
    assert "process" not in shown(taken)


def test_commits_that_fail_are_counted_apart(tmp_path: Path) -> None:
    catalog = Service(tmp_path, config.load(None, {}, {}), lambda _source: None)
    store = catalog._store
    settle(store)
    before = catalog.status()
    write(store, Customer("US01"), User("anna"))
    settle(store)
    write(store, Customer("US02"))
    with no_file_grows():
        settle(store)
    after = catalog.status()
    catalog.close()
    grown = {name: after[name] - before[name] for name in ("commits", "commit_failures", "customers", "users")}
    assert grown == {"commits": 1, "commit_failures": 1, "customers": 1, "users": 1}
    assert after["commit_buckets"]["+Inf"] == after["commits"]
    assert after["commit_seconds"] > before["commit_seconds"]


def test_dropped_log_lines_are_counted(tmp_path: Path) -> None:
    with Measured(tmp_path / "data") as server:
        assert server.status.take()["log_dropped_lines"] == 0
        server.guard._handler._drop(3)
        assert server.status.take()["log_dropped_lines"] == 3


# ---- tt status ------------------------------------------------------------------------------------------------------


def test_it_is_shown_as_text_and_as_json(server: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    tt = Tt(server.settings.data, capsys)
    server.handshake("127.0.0.3")
    tt("bans", "add", "127.0.0.4")
    tt("bans", "add", "192.0.2.1")
    tt("bans", "remove", "192.0.2.1")
    assert server.is_dropped("127.0.0.4")
    until("the drop", lambda: server.closed("timed_out"))
    lines = {line[:12].strip(): line[13:] for line in tt("status")[0].splitlines()}
    assert re.fullmatch(r"TapeTrackServer \S+, pid \d+, up \d+ s", lines.pop("server"))
    process = r"\d+\.\d MiB, \d+\.\d s of CPU time, \d+ threads, (\d+ of|at most) \d+ descriptors"
    assert re.fullmatch(process, lines.pop("process"))
    assert lines == {
        "mode": "timing out",
        "exempt": "198.51.100.0/24",
        "connections": "open 1",
        "accepted": "accepted 2, handshakes 1, frames 1",
        "closed": "timed_out 1",
        "time-outs": "running 1, remembered 0, evictions 0, size 65536",
        "begun": "operator 2",
        "ended": "lifted 1",
        "history": "2 time-outs of at most 10000 held, the last is number 2",
        "kernel map": "none (-B)",
    }
    asked = json.loads(tt("status", "--json")[0])
    assert (asked["closed"]["timed_out"], asked["table"]["running"], asked["gate"]) == (1, 1, None)


def test_the_catalogue_commits_and_lost_log_lines_are_shown_where_there_are_any(server: Measured) -> None:
    taken = server.status.take()
    taken["catalog"] |= {"commits": 4, "commit_seconds": 0.01, "commit_seconds_max": 0.0075, "commit_failures": 1}
    lines = shown(taken | {"log_dropped_lines": 7})
    assert lines["catalogue"] == "users 1, history 1"
    assert lines["commits"] == "4 done, 1 failed, 2.50 ms each, at most 7.50 ms in the last minute"
    assert lines["log"] == "7 lines dropped"
    taken["catalog"]["commits"] = 0  # nothing to divide by
    assert shown(taken)["commits"].startswith("0 done, 1 failed, ")


def test_the_maps_are_shown_and_why_there_is_no_filter() -> None:
    one = {
        "map": "/pin", "family": "IPv6", "kind": "hash", "value_bytes": 8, "size": 1024, "entries": 3, "missing": 2,
        "errors": {"E2BIG": 2},
    }  # fmt: skip
    for attached, text in (
        ({"attached": True, "dropped": 7}, "attached, 7 SYNs dropped"),
        ({"attached": False, "why": "--no-listener-filter"}, "not attached: --no-listener-filter"),
    ):
        assert list(tt_status._kernel({"maps": [one], "filter": attached})) == [
            ("kernel map", "/pin: IPv6, hash, values of 8 bytes, 3 of 1024 entries, 2 missing, errors: E2BIG 2"),
            ("filter", text),
        ]
