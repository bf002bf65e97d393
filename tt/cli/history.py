"""`tt history`: what happened to a Volume, the newest first: its chain of custody."""

import argparse
from itertools import islice

from tt.catalog.messages import HistoryRow
from tt.cli import actions, output, server_option, table

MICROSECONDS = 1_000_000


def register(commands: actions.Actions) -> None:
    """Add `tt history`."""
    text = "Show what happened to a Volume, the newest first, also when it is deleted."
    parser = commands.add_parser("history", help=text, description=text)
    parser.add_argument("volume", metavar="VOLUME", type=actions.fitting("volume"), help="Its full name.")
    parser.add_argument("-n", "--count", type=int, help="Show so many rows at most (default: all).")
    table.add_formats(parser)
    server_option.add(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.count is not None and args.count < 1:
        raise output.Exit(output.USAGE, f"-n must be at least 1, not {args.count}")
    with server_option.connected(args) as client:
        table.show(
            args,
            HistoryRow,
            islice(client.history(args.volume), args.count),
            {
                "TIME": lambda row: table.utc(row.time / MICROSECONDS),
                "EVENT": lambda row: row.event,
                "IN": lambda row: row.place,
                "USER": lambda row: row.user,
                "FROM": lambda row: row.source,
                "WITH": lambda row: row.interface,
                "CHANGES": _changes,
            },
        )
    return output.OK


def _changes(row: HistoryRow) -> str:
    """What a reader wants to see: of an added record what it is, of a changed one from what to what."""
    texts = []
    for field, (old, new) in row.changes.items():
        if field == "requested":  # the row of the move tells when that was
            continue
        if old is None:
            texts += [f"{field} {_text(new)}"] if new else []
        else:
            texts.append(f"{field} {_text(old)} -> {_text(new)}" if new is not None else f"{field} {_text(old)} gone")
    return ", ".join(texts)


def _text(value: object) -> str:
    return '""' if value == "" else str(value)
