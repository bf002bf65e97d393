"""The metrics: every name with its type and meaning, and the page of them in Prometheus' text format, version 0.0.4.

(prometheus.io/docs/instrumenting/exposition_formats; the names follow prometheus.io/docs/practices/naming, and those of
the process are what every Prometheus client calls them.)

Rules: a page is made of one object of tt.status, so of one moment.  A counter never falls while the process lives,
and stands at 0 from the start.  What the server does not have (a kernel map, a catalogue) is left out of its page.
No address of a source, no user and no tape is in it.  It must not know how the page is asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tt.status import process

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Samples = Iterator[tuple[str, Mapping[str, str], float]]  # what follows the name, labels, value


class Metric(NamedTuple):
    """One name of the page."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    meaning: str
    source: "str | Callable[[Mapping[str, Any]], Samples]"  # the path of its one value, or what gives its samples


# ---- where the values are in the object ---------------------------------------------------------------------------


def _value(status: Mapping[str, Any], path: str) -> Any:
    """What stands there; None also where a part of the path is null or missing."""
    value: Any = status
    for name in path.split("."):
        value = None if value is None else value.get(name)
    return value


def _each(label: str, path: str) -> Callable[[Mapping[str, Any]], Samples]:
    """All values there, which are named by a label."""

    def samples(status: Mapping[str, Any]) -> Samples:
        for name, value in _value(status, path).items():
            yield "", {label: name}, value

    return samples


def _maps(value: Callable[[Mapping[str, Any]], float]) -> Callable[[Mapping[str, Any]], Samples]:
    """One value of each kernel map."""

    def samples(status: Mapping[str, Any]) -> Samples:
        for one in (status["gate"] or {"maps": ()})["maps"]:
            yield "", {"map": one["map"], "family": one["family"]}, value(one)

    return samples


def _version(status: Mapping[str, Any]) -> Samples:
    yield "", {"version": status["version"]}, 1


def _exempt(status: Mapping[str, Any]) -> Samples:
    yield "", {}, len(status["exempt"])


def _commits(status: Mapping[str, Any]) -> Samples:
    catalog = status["catalog"]
    if catalog is not None:
        for bound, count in catalog["commit_buckets"].items():
            yield "_bucket", {"le": bound}, count
        yield "_sum", {}, catalog["commit_seconds"]
        yield "_count", {}, catalog["commits"]


# ---- the names ----------------------------------------------------------------------------------------------------

METRICS = (
    Metric("tt_build_info", "gauge", "Always 1; the version is its label.", _version),
    Metric("process_start_time_seconds", "gauge", "When the server started, in seconds since 1970 UTC.", "started_s"),
    Metric(
        "process_cpu_seconds_total",
        "counter",
        "CPU time of the process, user and system, in seconds.",
        "process.cpu_seconds",
    ),
    Metric(
        "process_resident_memory_bytes", "gauge", "Memory of the process that is in RAM, in bytes.", "process.rss_bytes"
    ),
    Metric("process_open_fds", "gauge", "Open descriptors; from Linux 6.2 on.", "process.descriptors"),
    Metric("process_max_fds", "gauge", "The limit of open descriptors.", "process.descriptor_limit"),
    Metric("process_threads", "gauge", "Threads of the process.", "process.threads"),
    Metric("tt_observe", "gauge", "1 where time-outs are only logged (--observe), else 0.", "observe"),
    Metric("tt_exempt_networks", "gauge", "Networks that are exempt from time-outs.", _exempt),
    Metric("tt_connections", "gauge", "Connections now, by state.", _each("state", "connections")),
    Metric(
        "tt_connections_accepted_total", "counter", "Connections accepted, those of timed-out sources too.", "accepted"
    ),
    Metric(
        "tt_connections_closed_total",
        "counter",
        "Connections ended, by reason; timed_out: dropped at once.",
        _each("reason", "closed"),
    ),
    Metric(
        "tt_accept_failures_total",
        "counter",
        "Times that accept failed for want of descriptors or memory.",
        "accept_failures",
    ),
    Metric("tt_handshakes_total", "counter", "Handshakes done.", "handshakes"),
    Metric(
        "tt_old_key_handshakes_total",
        "counter",
        "Handshakes with the key of server.key.old, while it is there.",
        "old_key_handshakes",
    ),
    Metric("tt_frames_total", "counter", "Whole frames received.", "frames"),
    Metric("tt_timeouts_begun_total", "counter", "Time-outs begun, by reason.", _each("reason", "timeouts")),
    Metric("tt_timeouts_expired_total", "counter", "Time-outs that came to their end.", "timeouts_expired"),
    Metric(
        "tt_timeouts_lifted_total",
        "counter",
        "Time-outs ended by hand, or since their source is exempt now.",
        "timeouts_lifted",
    ),
    Metric(
        "tt_timeouts_evicted_total",
        "counter",
        "Time-outs that gave way before their end: the table was full.",
        "table.evictions",
    ),
    Metric(
        "tt_timeouts_renewed_total",
        "counter",
        "Time-outs that a new one of the same source replaced.",
        "timeouts_renewed",
    ),
    Metric("tt_timeouts_running", "gauge", "Sources that are timed out now.", "table.running"),
    Metric(
        "tt_timeouts_remembered",
        "gauge",
        "Sources whose time-out ended within a day: the next may be longer.",
        "table.remembered",
    ),
    Metric("tt_timeout_table_size", "gauge", "Sources that the table holds, of IPv4 and of IPv6 each.", "table.size"),
    Metric("tt_ban_history_held", "gauge", "Time-outs that the ban history holds.", "history.held"),
    Metric("tt_ban_history_size", "gauge", "Time-outs that the ban history can hold.", "history.most"),
    Metric(
        "tt_kernel_map_entries",
        "gauge",
        "Time-outs of the server that are in the kernel map.",
        _maps(lambda one: one["entries"]),
    ),
    Metric("tt_kernel_map_size", "gauge", "Entries that the kernel map can hold.", _maps(lambda one: one["size"])),
    Metric(
        "tt_kernel_map_missing",
        "gauge",
        "Time-outs that could not be put into the kernel map.",
        _maps(lambda one: one["missing"]),
    ),
    Metric(
        "tt_kernel_map_errors_total",
        "counter",
        "Changes that the kernel map refused.",
        _maps(lambda one: sum(one["errors"].values())),
    ),
    Metric(
        "tt_listener_filter_attached",
        "gauge",
        "1 where the listener filter drops in the kernel, else 0.",
        "gate.filter.attached",
    ),
    Metric(
        "tt_listener_filter_dropped_syns_total",
        "counter",
        "SYNs that the listener filter dropped.",
        "gate.filter.dropped",
    ),
    Metric("tt_catalog_customers", "gauge", "Customers in the catalogue.", "catalog.customers"),
    Metric("tt_catalog_volumes", "gauge", "Volumes in the catalogue.", "catalog.volumes"),
    Metric("tt_catalog_volumes_moving", "gauge", "Volumes that are on their way.", "catalog.moving"),
    Metric("tt_catalog_users", "gauge", "Users in the catalogue.", "catalog.users"),
    Metric("tt_catalog_sessions", "gauge", "Connections that have logged in.", "catalog.sessions"),
    Metric(
        "tt_catalog_history_rows",
        "gauge",
        "Rows of the catalogue's history: the last sequence number.",
        "catalog.history",
    ),
    Metric(
        "tt_catalog_commit_seconds",
        "histogram",
        "Time that a COMMIT took until its changes were on disk, in seconds.",
        _commits,
    ),
    Metric(
        "tt_catalog_commit_max_seconds",
        "gauge",
        "The longest COMMIT of the last minute, in seconds.",
        "catalog.commit_seconds_max",
    ),
    Metric(
        "tt_catalog_commit_failures_total",
        "counter",
        "Groups of changes that did not get to the disk.",
        "catalog.commit_failures",
    ),
    Metric(
        "tt_log_dropped_lines_total",
        "counter",
        "Log lines dropped, since stderr was not read fast enough.",
        "log_dropped_lines",
    ),
)


# ---- the page -----------------------------------------------------------------------------------------------------


def page(status: Mapping[str, Any]) -> bytes:
    """The whole page, of an object that tt.status made."""
    return "".join(_lines(status)).encode()


def page_now(counts: Mapping[str, Any]) -> bytes:
    """The whole page, of Status.counts(); what the kernel counts of the process is asked here, in any thread."""
    return page({**counts, "process": process()})


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    for metric in METRICS:
        samples = list(_samples(metric, status))
        if samples:
            yield f"# HELP {metric.name} {metric.meaning}\n# TYPE {metric.name} {metric.kind}\n"
        for suffix, labels, value in samples:
            number = f"{value:d}" if isinstance(value, int) else repr(value)  # a bool is 1 or 0
            yield f"{metric.name}{suffix}{_label_text(labels)} {number}\n"


def _samples(metric: Metric, status: Mapping[str, Any]) -> Samples:
    if not isinstance(metric.source, str):
        yield from metric.source(status)
    elif (value := _value(status, metric.source)) is not None:
        yield "", {}, value


def _label_text(labels: Mapping[str, str]) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    """A map's path may hold anything; a byte that is no UTF-8 becomes a question mark."""
    text = value.encode(errors="replace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
