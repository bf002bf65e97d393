"""`tt status`: what a running server does, counted."""

import argparse
from collections.abc import Iterator
from typing import Any

from tt.cli import output
from tt.cli.ask import add_server_options, ask


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt status`."""
    text = "Show what the server on this host does: connections, why they ended, the time-out table, the kernel map."
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
    table = status["table"]
    rows = [
        ("server", f"TapeTrackServer {status['version']}, pid {status['pid']}, up {round(status['uptime_s'])} s"),
        ("mode", "only observing" if status["observe"] else "timing out"),
        ("exempt", ", ".join(status["exempt"]) or "nobody"),
        ("connections", _counts(status["connections"])),
        ("accepted", _counts({name: status[name] for name in ("accepted", "accept_failures", "handshakes", "frames")})),
        ("closed", _counts(status["closed"])),
        ("time-outs", ", ".join(f"{name} {table[name]}" for name in ("running", "remembered", "evictions", "size"))),
        *_kernel(status["gate"]),
        *([("catalogue", _counts(status["catalog"]))] if status["catalog"] else []),
    ]
    return [f"{name:<12} {text}" for name, text in rows]


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
