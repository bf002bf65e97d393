"""The page of metrics: each value against what was done to a real server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ended, until
from metrics_kit import Measured, always_fresh, parsed
from process import need
from prometheus_client.parser import text_string_to_metric_families

from tt import bpf_load
from tt._core import REASONS, STATES
from tt.catalog.model import Customer
from tt.catalog.store import Author
from tt.kernel_gate import BlockMap, KernelGate
from tt.metrics import METRICS, page


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measured]:
    always_fresh(monkeypatch)
    with Measured(tmp_path / "data") as server:
        yield server


def misbehave(server: Measured, source: str) -> None:
    with server.connect(source) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert ended(peer) == b""


# ---- the values -----------------------------------------------------------------------------------------------------


def test_under_an_attack_the_counters_grow_as_counted(server: Measured) -> None:
    before = server.values()
    for number in range(2, 12):
        misbehave(server, f"127.0.1.{number}")
        server.await_timed_out(f"127.0.1.{number}")
        assert server.is_dropped(f"127.0.1.{number}")
    after = server.values()
    grown = {key: value - before[key] for key, value in after.items() if not key[0].startswith("process_")}
    assert {key: value for key, value in grown.items() if value} == {
        ("tt_connections_accepted_total", ""): 20,
        ("tt_connections_closed_total", "not_protocol"): 10,
        ("tt_connections_closed_total", "timed_out"): 10,
        ("tt_timeouts_begun_total", "not_protocol"): 10,
        ("tt_timeouts_running", ""): 10,
        ("tt_ban_history_held", ""): 10,
    }


def test_how_time_outs_end_is_counted_and_none_is_lost(server: Measured) -> None:
    for number in (2, 3, 4, 5, 2):
        server.ask("bans.add", source=f"127.0.1.{number}", seconds=600)
    server.ask("bans.add", source="127.0.1.6", seconds=1)
    server.ask("bans.remove", source="127.0.1.3")
    values = until("the end of one", lambda: (found := server.values())["tt_timeouts_expired_total", ""] and found)
    assert values["tt_timeouts_begun_total", "operator"] == 6
    ends = [values[f"tt_timeouts_{how}_total", ""] for how in ("expired", "lifted", "renewed", "evicted")]
    assert ends == [1, 1, 1, 0]
    assert (values["tt_timeouts_running", ""], values["tt_timeouts_remembered", ""]) == (3, 1)


def test_time_outs_that_give_way_in_a_full_table_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_fresh(monkeypatch)
    with Measured(tmp_path / "small", table_size=1024) as server:
        for number in range(1034):
            server.ask("bans.add", source=f"192.0.{number >> 8}.{number & 255}", seconds=600)
        values = server.values()
    assert values["tt_timeout_table_size", ""] == values["tt_timeouts_running", ""] == 1024
    assert values["tt_timeouts_evicted_total", ""] == 10


def test_connections_are_counted_by_their_state(server: Measured) -> None:
    server.handshake()
    server.connect("127.0.0.3")
    values = until("both", lambda: (found := server.values())["tt_connections", "new"] and found)
    assert {state: values["tt_connections", state] for state, _ in STATES if state != "free"} == {
        "new": 1, "waiting": 0, "open": 1, "logged_in": 0, "closing": 0,
    }  # fmt: skip
    assert values["tt_handshakes_total", ""] == values["tt_frames_total", ""] == 1


def test_commits_and_what_is_in_the_catalogue_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_fresh(monkeypatch)
    server = Measured(tmp_path / "data")
    with server.catalog._store.change(Author("tests", "pytest", "127.0.0.1")) as change:
        for name in ("US01", "US02"):
            change.put(Customer(name), "add")
    with server:
        until("the commit", lambda: server.values()["tt_catalog_customers", ""] == 2)
        values = server.values()
    assert values["tt_catalog_users", ""] == 1  # tapemaster, by a commit of his own
    assert values["tt_catalog_history_rows", ""] == 3
    assert values["tt_catalog_commit_seconds_count", ""] == values["tt_catalog_commit_seconds_bucket", "+Inf"] == 2
    longest, sum_ = values["tt_catalog_commit_max_seconds", ""], values["tt_catalog_commit_seconds_sum", ""]
    assert 0 < longest < sum_
    buckets = [value for (name, _), value in values.items() if name == "tt_catalog_commit_seconds_bucket"]
    assert buckets == sorted(buckets)


def test_the_process_is_measured(server: Measured) -> None:
    values = server.values()
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]
    later = server.values()
    for descriptor in held:
        os.close(descriptor)
    if ("process_open_fds", "") in values:  # from Linux 6.2 on
        assert later["process_open_fds", ""] - values["process_open_fds", ""] == 50
    assert later["process_cpu_seconds_total", ""] > values["process_cpu_seconds_total", ""]
    assert values["process_resident_memory_bytes", ""] > 1 << 20
    assert values["process_threads", ""] >= 4  # this one, the loop, commits, metrics


def test_the_kernel_map_and_its_filter_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(root=True)
    always_fresh(monkeypatch)
    server = Measured(tmp_path / "data")
    block_map = BlockMap(bpf_load.create_map("hash", (4, 4), 4, "tt_test"), 4, 64)
    gate = server.guard.gate = KernelGate([block_map], 64)
    gate.load_filter()
    server.dispatcher.keys = [server.key, server.key]  # the old one, too
    try:
        with server:
            for number in range(6):
                server.ask("bans.add", source=f"192.0.2.{number}", seconds=600)
            values = until("all six", lambda: (found := server.values())["tt_timeouts_running", ""] == 6 and found)
    finally:
        gate.close()
    mine = {name: value for (name, labels), value in values.items() if labels == f"{block_map.map.path} IPv4"}
    assert mine == {
        "tt_kernel_map_entries": 4,
        "tt_kernel_map_size": 4,
        "tt_kernel_map_missing": 2,
        "tt_kernel_map_errors_total": 2,
    }
    assert values["tt_listener_filter_attached", ""] == 1
    assert values["tt_listener_filter_dropped_syns_total", ""] == 0
    # Here is all that a server can have: no name of the table stays away.
    families = {family.name for family in text_string_to_metric_families(server.last_page)}
    assert families == {metric.name.removesuffix("_total") for metric in METRICS}


# ---- the page -------------------------------------------------------------------------------------------------------


def test_every_reason_and_state_is_there_from_the_start_as_0(server: Measured) -> None:
    values = server.values()
    for name, times_out, _ in REASONS:
        assert values["tt_connections_closed_total", name] == 0
        assert values.get(("tt_timeouts_begun_total", name)) == (0 if times_out else None)


def test_the_page_says_type_and_meaning_of_each_and_has_nothing_that_there_is_not(server: Measured) -> None:
    families = {family.name: family for family in text_string_to_metric_families(server.get()[1])}
    assert not [name for name in families if "kernel" in name or "filter" in name]
    for metric in METRICS:
        family = families.get(metric.name.removesuffix("_total"))
        if family is not None:
            assert (family.type, family.documentation) == (metric.kind, metric.meaning)


def test_names_are_by_the_conventions() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith(("tt_", "process_"))
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.kind in ("counter", "gauge", "histogram")
        assert metric.meaning.endswith(".")


def test_what_is_not_known_is_left_out(server: Measured) -> None:
    status = server.status.take()
    uncounted = status["process"] | {"descriptors": None}
    for changed, name in (
        ({"process": uncounted}, "process_open_fds"), ({"process": None}, "process_threads"),
        ({"catalog": None}, "tt_catalog_users"), ({"catalog": None}, "tt_catalog_commit_seconds_count"),
    ):  # fmt: skip
        assert (name, "") not in parsed(page(status | changed).decode())


def test_the_path_of_a_map_cannot_break_the_page(server: Measured) -> None:
    path = 'a"b\\c\nd} 1\n\udcff'
    one = {"map": path, "family": "IPv4", "entries": 1, "size": 2, "missing": 0, "errors": {}}
    gate = {"maps": [one], "filter": {"attached": False, "why": "--no-listener-filter"}}
    values = parsed(page(server.status.take() | {"gate": gate}).decode())
    assert values["tt_kernel_map_entries", f"{path[:-1]}? IPv4"] == 1
    assert values["tt_listener_filter_attached", ""] == 0
    assert ("tt_listener_filter_dropped_syns_total", "") not in values
