"""`tt status`: what a running server does, counted."""

import argparse
from collections.abc import Iterator
from typing import Any

from tt.cli import output
from tt.cli.ask import add_server_options, ask
from tt.option_kinds import MIB

CATALOG = ("customers", "volumes", "moving", "users", "sessions", "history")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt status`."""
    text = (
        "Show what the server on this host does: connections, time-outs, the kernel map, the catalogue, each counted."
    )
    parser = commands.add_parser("status", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and show."""
    for item in ask(args, {"do": "status"}):
        del item["end"]
        if args.json:
            output.json_line(item)
        else:
            for text in _lines(item):
                output.line(text)
    return output.OK


def _lines(status: dict[str, Any]) -> list[str]:
    ends = {name: status[f"timeouts_{name}"] for name in ("expired", "lifted", "renewed")}
    rows = [
        ("server", f"TapeTrackServer {status['version']}, pid {status['pid']}, up {round(status['uptime_s'])} s"),
        *_process(status["process"]),
        ("mode", "only observing" if status["observe"] else "timing out"),
        ("exempt", ", ".join(status["exempt"]) or "nobody"),
        ("connections", _counts(status["connections"])),
        ("accepted", _counts({name: status[name] for name in ("accepted", "accept_failures", "handshakes", "frames")})),
        *([] if (old := status["old_key_handshakes"]) is None else [("old key", f"handshakes {old}")]),
        ("closed", _counts(status["closed"])),
        ("time-outs", _all(status["table"], "running", "remembered", "evictions", "size")),
        ("begun", _counts(status["timeouts"])),
        ("ended", _counts(ends)),
        ("history", "{held} time-outs of at most {most} held, the last is number {begun}".format(**status["history"])),
        *_kernel(status["gate"]),
        *_catalog(status["catalog"]),
        *([("log", f"{count} lines dropped")] if (count := status["log_dropped_lines"]) else []),
    ]
    return [f"{name:<12} {text}" for name, text in rows]


def _process(process: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if process is not None:
        memory, limit = f"{process['rss_bytes'] / MIB:.1f} MiB", process["descriptor_limit"]
        open_now = "at most" if process["descriptors"] is None else f"{process['descriptors']} of"
        used = f"{memory}, {process['cpu_seconds']:.1f} s of CPU time, {process['threads']} threads"
        yield "process", f"{used}, {open_now} {limit} descriptors"


def _catalog(catalog: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if catalog is not None:
        yield "catalogue", _counts({name: catalog[name] for name in CATALOG})
        mean = catalog["commit_seconds"] / (catalog["commits"] or 1)
        times = f"{mean * 1000:.2f} ms each, at most {catalog['commit_seconds_max'] * 1000:.2f} ms in the last minute"
        yield "commits", f"{catalog['commits']} done, {catalog['commit_failures']} failed, {times}"


def _kernel(gate: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if gate is None:
        yield "kernel map", "none (-B)"
        return
    for one in gate["maps"]:
        kind = f"{one['family']}, {one['kind']}, values of {one['value_bytes']} bytes"
        fill = f"{one['entries']} of {one['size']} entries, {one['missing']} missing, errors: {_counts(one['errors'])}"
        yield "kernel map", f"{one['map']}: {kind}, {fill}"
    attached = gate["filter"]
    state = (
        f"attached, {attached['dropped']} SYNs dropped" if attached["attached"] else f"not attached: {attached['why']}"
    )
    yield "filter", state


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def _all(counts: dict[str, int], *names: str) -> str:
    return ", ".join(f"{name} {counts[name]}" for name in names)
