"""What can be asked about time-outs: filters, the history, watching, importing; and that none holds up the loop."""

import calendar
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import until
from process import TT, Process
from test_control import MANY, Controlled, answer, exchange, fill

from tt import ban_history, timeouts
from tt._core import REASON_CODES, TimeoutTable
from tt.ban_requests import ITEMS
from tt.guard import NAMES_STAMP

NS = 10**9


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Controlled]:
    with Controlled(tmp_path / "data", exempt=["198.51.100.0/24"]) as server:
        yield server


# ---- filters --------------------------------------------------------------------------------------------------------


def test_a_list_is_filtered_by_network_reason_and_age_together(tmp_path: Path) -> None:
    now = 1000 * NS  # of a clock of its own: this machine's may have begun less than 500 s ago
    table = TimeoutTable(1024, now=now - 500 * NS)
    for source, reason, age in (
        ("192.0.2.1", "not_protocol", 500), ("192.0.2.3", "stalled", 500), ("203.0.113.1", "not_protocol", 500),
        ("2001:db8::1", "not_protocol", 500), ("192.0.2.2", "not_protocol", 100),
    ):  # fmt: skip
        table.add(source, REASON_CODES[reason], 3600 * NS, now - age * NS)
    (tmp_path / "data").mkdir()
    timeouts.save(tmp_path / "data" / "timeouts", table.dump(now), time.time_ns(), NAMES_STAMP)
    with Controlled(tmp_path / "data") as server:
        assert server.sources(reason="stalled") == ["192.0.2.3"]
        assert server.sources(newer=300) == ["192.0.2.2"]
        assert server.sources(older=300, newer=1000, reason="not_protocol", network="192.0.2.0/24") == ["192.0.2.1"]
        assert server.sources(older=1000) == server.sources(newer=50) == server.sources(reason="tampered") == []
        assert server.sources(network="2001:db8::/32") == ["2001:db8::/64"]
        assert len(server.sources(older=0.5)) == 5


@pytest.mark.parametrize("do", ["bans.list", "bans.history", "bans.watch"])
@pytest.mark.parametrize(
    ("request_", "rule"),
    [
        (
            {"reason": "rude"},
            "no reason 'rude'; there are not_protocol, tampered, bad_hello, stalled, login_failed, op",
        ),
        ({"reason": "silent"}, "no reason 'silent'; there are "),
        ({"reason": 5}, "the request needs 'reason', a text"),
        ({"network": "192.0.2.1/24"}, "'192.0.2.1/24' is no address or network: "),
        ({"network": 5}, "the request needs 'network', a text"),
    ],
)
def test_a_filter_that_can_match_nothing_is_refused(server: Controlled, do: str, request_: Any, rule: str) -> None:
    (line,) = server.ask(do, **request_)
    assert line["error"].startswith(rule)


@pytest.mark.parametrize(
    ("do", "name"),
    [("bans.list", "older"), ("bans.list", "newer"), ("bans.history", "after"), ("bans.history", "since")],
)
@pytest.mark.parametrize("value", ["1h", True, [], {}])
def test_what_must_be_a_number_is_refused_where_it_is_none(server: Controlled, do: str, name: str, value: Any) -> None:
    (line,) = server.ask(do, **{name: value})
    assert line["error"] == f"{name!r} is {value!r:.20}: it must be a number"


# ---- history --------------------------------------------------------------------------------------------------------


def test_the_history_has_what_runs_and_what_was_lifted_with_its_drops(server: Controlled) -> None:
    begun = time.time()
    with server.connect("127.0.0.2") as peer:
        peer.sendall(b'GET /"\r\n')
        server.await_timed_out("127.0.0.2")
    assert server.is_dropped("127.0.0.2")
    server.ask("bans.add", source="2001:db8::1", seconds=60, reason="seen")
    server.ask("bans.remove", source="127.0.0.2")
    first, second, end = server.ask("bans.history")
    assert end == {"end": True, "last": 2, "lost": 0}
    assert begun - 1 < first.pop("at_s") < time.time() + 1
    assert [time.strptime(first.pop(name), "%Y-%m-%dT%H:%M:%SZ") for name in ("at", "ended")]
    assert first == {
        "number": 1, "source": "127.0.0.2", "reason": "not_protocol", "seconds": 600.0, "before": 0,
        "looks": "HTTP request", "first": 'GET /\\x22\\r\\n', "note": None, "proxied": False, "state": "lifted",
        "dropped": 1,
    }  # fmt: skip
    assert (second["source"], second["reason"], second["seconds"]) == ("2001:db8::/64", "operator", 60)
    assert (second["note"], second["first"], second["looks"]) == ("seen", None, "unknown")
    assert (second["state"], second["ended"], second["dropped"]) == ("running", None, None)


def test_one_that_ends_by_itself_has_expired(server: Controlled) -> None:
    server.ask("bans.add", source="127.0.0.2", seconds=1)
    dropped = server.is_dropped("127.0.0.2")  # a machine under load may come too late
    until("its end", lambda: server.ask("bans.history")[0]["state"] == "expired")
    item, _ = server.ask("bans.history")
    assert item["dropped"] == dropped
    # A whole second, rounded down; and UTC, which is read at its start and its end, is adjusted meanwhile.
    lasted = calendar.timegm(time.strptime(item["ended"], "%Y-%m-%dT%H:%M:%SZ")) - item["at_s"]
    assert -0.1 < lasted <= 1.1


def numbers(server: Controlled, **request: Any) -> list[int]:
    return [item["number"] for item in server.ask("bans.history", **request)[:-1]]


def test_the_history_is_asked_for_by_number_time_network_and_reason(server: Controlled) -> None:
    for number in range(1, 6):
        server.ask("bans.add", source=f"192.0.2.{number}")
    assert numbers(server, after=3) == [4, 5]
    assert numbers(server, after=0) == numbers(server, since=0) == numbers(server, after=-7) == [1, 2, 3, 4, 5]
    assert numbers(server, after=5) == numbers(server, after=99) == numbers(server, since=time.time() + 9) == []
    assert numbers(server, network="192.0.2.2/31") == [2, 3]
    assert numbers(server, reason="stalled") == []
    third = server.ask("bans.history", after=2)[0]["at_s"]
    assert numbers(server, since=third) == [3, 4, 5]


def test_of_50000_that_run_the_last_10000_are_told_and_how_many_are_lost(server: Controlled) -> None:
    most, clock = ban_history.MOST, time.monotonic()
    with server.open() as client:
        for at in range(0, MANY, ITEMS):
            items = [
                {"source": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", "seconds": 3600} for n in range(at, at + ITEMS)
            ]
            outcomes = exchange(client, json.dumps({"do": "bans.import", "items": items}).encode() + b"\n")[0][
                "outcomes"
            ]
            assert outcomes == [["added", ""]] * ITEMS
    begun = -(-MANY // ITEMS) * ITEMS
    *items, end = server.ask("bans.history")
    assert [item["number"] for item in items] == list(range(begun - most + 1, begun + 1))
    assert end == {"end": True, "last": begun, "lost": begun - most}
    assert server.ask("bans.history", after=begun - most)[-1]["lost"] == 0
    assert server.ask("bans.history", after=begun - most - 3)[-1]["lost"] == 3
    assert server.ask("bans.history", since=items[-1]["at_s"] + 1)[-1]["lost"] == 0  # older than what is asked for
    assert server.ask("bans.list")[-1] == {"end": True, "running": begun}
    assert server.ask("bans.clear")[0]["removed"] == begun
    assert {item["state"] for item in server.ask("bans.history")[:-1]} == {"lifted"}
    # An import is one line in the log a second, not one for each request, of which there are 13 times as many as this.
    until("the log", lambda: sum(e["added"] for e in server.events.of("done by hand") if "added" in e) == begun)
    lines = len([e for e in server.events.of("done by hand") if e["request"] == "bans.import"])
    assert lines < max(60, time.monotonic() - clock)


# ---- watching -------------------------------------------------------------------------------------------------------


def watch(server: Controlled, **request: Any) -> socket.socket:
    """A client that watches, once the server knows."""
    before = len(server.guard.history.watchers)
    client = server.open()
    client.sendall(json.dumps({"do": "bans.watch", **request}).encode() + b"\n")
    until("the watcher", lambda: len(server.guard.history.watchers) > before)
    return client


def test_watchers_are_told_of_what_they_want_as_it_comes(server: Controlled) -> None:
    with watch(server) as all_, watch(server, network="192.0.2.0/31", reason="operator") as some:
        for number in range(3):
            server.ask("bans.add", source=f"192.0.2.{number}")
        server.ask("bans.remove", source="192.0.2.1")
        with all_.makefile("rb") as stream:
            seen = [json.loads(stream.readline()) for _ in range(4)]
        assert [(item["event"], item["number"], item["state"]) for item in seen] == [
            ("begun", 1, "running"), ("begun", 2, "running"), ("begun", 3, "running"), ("ended", 2, "lifted"),
        ]  # fmt: skip
        with some.makefile("rb") as stream:
            seen = [json.loads(stream.readline()) for _ in range(3)]
        assert [(item["event"], item["source"]) for item in seen] == [
            ("begun", "192.0.2.0"), ("begun", "192.0.2.1"), ("ended", "192.0.2.1"),
        ]  # fmt: skip
    until("their end", lambda: not server.guard.history.watchers)


def test_a_watcher_who_goes_away_is_forgotten_though_nothing_comes(server: Controlled) -> None:
    with watch(server), watch(server) as half, watch(server) as talks:
        half.shutdown(socket.SHUT_WR)
        talks.sendall(b"\n")
        until("the end of two", lambda: len(server.guard.history.watchers) == 1)
        assert half.recv(1) == b""
    until("the end of the third", lambda: not server.guard.history.watchers and not server.control._clients)


def test_a_watcher_who_waits_costs_the_loop_no_turn(server: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    with watch(server):

        def waiting() -> list[Any]:
            clients = list(server.control._clients.values())  # at once: the loop changes them
            return [client for client in clients if client.waits_for]

        until("it waits", waiting)
        server.ask("status")  # a turn later all that its beginning took is done
        calls: list[object] = []
        plain = type(server.control)._serve
        monkeypatch.setattr(
            type(server.control),
            "_serve",
            lambda self, *more, **named: (calls.append(more), plain(self, *more, **named)),
        )
        for _ in range(50):
            server.ask("status")
        (mine,) = waiting()
        assert not [call for call in calls if call[0] is mine]


def test_a_watcher_who_does_not_read_is_told_how_many_he_lost_and_holds_up_nobody(
    server: Controlled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ban_history, "UNREAD", 100)
    with watch(server) as deaf:
        for at in range(0, 200 * ITEMS, ITEMS):
            items = [{"source": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", "seconds": 60} for n in range(at, at + ITEMS)]
            server.ask("bans.import", items=items)
        server.ask("status")  # in a later turn: he is told at the end of the one that answers an import
        (watcher,) = server.guard.history.watchers
        assert len(watcher._events) == 100
        seen, lost = 0, 0
        with deaf.makefile("rb") as stream:
            while seen + lost < 200 * ITEMS:
                item = json.loads(stream.readline())
                seen, lost = seen + ("event" in item), lost + item.get("lost", 0)
        assert lost > 0


# ---- importing ------------------------------------------------------------------------------------------------------


def outcomes(server: Controlled, *items: dict[str, Any], dry_run: bool = False) -> list[tuple[str, str]]:
    (line,) = server.ask("bans.import", items=items, dry_run=dry_run)
    return [tuple(outcome) for outcome in line["outcomes"]]


def left(server: Controlled) -> dict[str, int]:
    return {item["source"]: round(item["ends_in_s"]) for item in server.ask("bans.list")[:-1]}


def test_the_time_left_of_an_import_counts_from_its_end_and_a_later_end_that_runs_stays(server: Controlled) -> None:
    begun, now = time.monotonic(), time.time()
    server.ask("bans.add", source="192.0.2.5", seconds=1000)
    server.ask("bans.add", source="192.0.2.6", seconds=100)
    items = [
        {"source": "192.0.2.1", "until": now + 300, "note": "imported: tampered"},
        {"source": "2001:db8::5", "seconds": 300},
        {"source": "192.0.2.3", "until": now - 5},
        {"source": "198.51.100.9", "until": now + 300},
        {"source": "192.0.2.5", "until": now + 300},
        {"source": "192.0.2.6", "until": now + 300},
    ]
    expected = ["added", "added", "ended", "exempt", "kept", "added"]
    for dry_run in (True, False):
        assert outcomes(server, *items, dry_run=dry_run) == [(outcome, "") for outcome in expected]
        assert len(left(server)) == (2 if dry_run else 4)
    ends, over = left(server), time.monotonic() - begun + 1  # s; those that are left are rounded
    assert 1000 - over <= ends.pop("192.0.2.5") <= 1000
    assert all(300 - over <= seconds <= 300 for seconds in ends.values())
    assert server.await_timed_out("192.0.2.1")["note"] == "imported: tampered"
    items[1]["seconds"] = 200  # 300 from now would be later than the end that runs
    assert [outcome for outcome, _ in outcomes(server, *items)] == ["kept", "kept", "ended", "exempt", "kept", "kept"]
    assert {item["before"] for item in server.ask("bans.list")[:-1] if item["source"] != "192.0.2.6"} == {0}


@pytest.mark.parametrize(
    ("item", "rule"),
    [
        ({}, "the request needs 'source', a text"),
        ({"source": "192.0.2.1"}, "a time-out of None s: it must be 1 s to 30 days"),
        ({"source": "192.0.2.0/24", "seconds": 9}, "'192.0.2.0/24' is no source: a prefix must be IPv6's /64 here"),
        ({"source": "example.org", "seconds": 9}, "'example.org' is no source: it must be an address"),
        ({"source": "192.0.2.1", "until": "noon"}, "'until' is 'noon': it must be a number"),
        ({"source": "192.0.2.1", "until": 1e300}, "its end is in "),
        ({"source": "192.0.2.1", "seconds": 9, "note": "x" * 201}, "a note of 201 characters: it must be at most 200"),
    ],
)
def test_an_item_that_is_wrong_is_named_and_the_others_are_done(server: Controlled, item: Any, rule: str) -> None:
    (wrong, text), good = outcomes(server, item, {"source": "192.0.2.9", "seconds": 60})
    assert (wrong, good) == ("wrong", ("added", ""))
    assert text.startswith(rule)


@pytest.mark.parametrize("items", [None, "x", {}, [1], [{}] * (ITEMS + 1)])
def test_what_is_no_list_of_items_is_refused(server: Controlled, items: Any) -> None:
    (line,) = server.ask("bans.import", items=items)
    assert line["error"] == f"the request needs 'items', a list of at most {ITEMS} objects"


def test_a_list_of_50000_is_made_while_others_are_served(tmp_path: Path) -> None:
    server = Controlled(tmp_path / "data")
    fill(server.table, MANY)
    with server, server.open() as client:
        client.sendall(b'{"do":"bans.list","reason":"not_protocol","network":"10.0.0.0/9"}\n')
        assert not server.is_dropped("127.0.0.5")
        assert len(answer(client)) == MANY + 1


# ---- a real server --------------------------------------------------------------------------------------------------


def test_the_history_outlives_a_kill_and_a_restart(tmp_path: Path) -> None:
    def history() -> list[tuple[int, str, str]]:
        command = [TT, "bans", "history", "--json", "--data", str(tmp_path / "data")]
        lines = subprocess.check_output(command, timeout=60).splitlines()
        return [(item["number"], item["source"], item["state"]) for item in map(json.loads, lines)]

    saved = tmp_path / "data/ban-history"
    often = {"TT_SAVE_INTERVAL": "1"}
    with Process(tmp_path, environ=often) as server:
        server.time_out("127.0.0.7")
        server.time_out("127.0.0.8")
        until("the save", lambda: saved.exists() and b"127.0.0.8" in saved.read_bytes())
        server.kill()
    with Process(tmp_path, environ=often) as server:
        server.time_out("127.0.0.9")
        assert history() == [(1, "127.0.0.7", "running"), (2, "127.0.0.8", "running"), (3, "127.0.0.9", "running")]
    with Process(tmp_path, "--exempt", "127.0.0.8/32") as server:
        assert history() == [(1, "127.0.0.7", "running"), (2, "127.0.0.8", "lifted"), (3, "127.0.0.9", "running")]
    saved.write_bytes(b"x")
    with Process(tmp_path) as server:
        server.await_line("ban history not restored, starting with none error=.*ban-history: .*the next save replaces")
        assert history() == []
        until("a drop", lambda: server.drops("127.0.0.9"))  # the time-outs are in another file
