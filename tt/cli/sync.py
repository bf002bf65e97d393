"""`tt sync`: Volumes brought in line with an inventory, a CSV on standard input.  What the mapping means is in tt.sync.

Rules: the inventory is read whole before anything is sent; only differences are sent, many in a message, each for
itself, so that one that the server refuses costs no other.  Running it again sends only what still differs.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tt.catalog.messages import PAGE, VolumeRecord
from tt.cli import output, server_option
from tt.client import Client, RequestFailed
from tt.sync import (
    LEFT,
    STATISTICS,
    TO_DO,
    BadLine,
    Change,
    InventoryError,
    Mapping,
    MappingError,
    Wanted,
    compare,
    open_text,
    read_inventory,
    read_mapping,
)

BATCH = 500  # changes in a message
WRITE_OVER = "\r\x1b[K"  # ECMA-48: to the first column, and erase to the end of the line


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt sync`."""
    parser = commands.add_parser(
        "sync",
        help="Bring Volumes in line with an inventory.",
        description="Bring Volumes in line with an inventory, a CSV on standard input, as a mapping file says: fetch "
        "the scope, compare, send only the changes, and print the statistics.",
        epilog="Exit codes: 0 done; 1 some lines had an error or some changes were refused, and the others are done; "
        "2 wrong usage, mapping or headings; 3 no connection; 4 not allowed.",
    )
    add = parser.add_argument
    add(
        "-d",
        "--definition",
        metavar="FILE",
        type=Path,
        required=True,
        help="The mapping file (TOML); examples/inventory.toml shows all keys.",
    )
    add("--dry-run", action="store_true", help="Print the changes, a line each, and send none.")
    add("--json", action="store_true", help="Print the statistics as one JSON object.")
    server_option.add(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    statistics: Counter[str] = Counter()
    try:
        mapping = read_mapping(args.definition)
        if sys.stdin.isatty():
            raise output.Exit(output.USAGE, "the inventory comes from standard input: tt sync -d FILE < inventory.csv")
        inventory = _read(mapping, statistics)
    except (MappingError, InventoryError) as error:
        raise output.Exit(output.USAGE, str(error)) from error
    with server_option.connected(args) as client, _Progress() as progress:
        volumes = _fetch(client, mapping.scope, progress)
        changes = list(compare(mapping, inventory, volumes, statistics))
        if not args.dry_run:
            try:
                _send(client, changes, statistics, progress)
            finally:  # also where the connection broke: what was acknowledged before is done
                progress.clear()
                _print(args, statistics)
    if args.dry_run:
        statistics.update(change.counts for change in changes)
        output.lines(change.says for change in changes)
        _print(args, statistics)
    return output.FAILED if statistics["bad"] or statistics["refused"] else output.OK


def _read(mapping: Mapping, statistics: Counter[str]) -> list[Wanted]:
    """The good lines; the bad ones are said."""
    inventory = []
    for line in read_inventory(open_text(sys.stdin.buffer, mapping), mapping):
        statistics["lines"] += 1
        if isinstance(line, BadLine):
            statistics["bad"] += 1
            output.message(f"line {line.line}: {line.says}")
        else:
            inventory.append(line)
    return inventory


def _fetch(client: Client, scope: str, progress: "_Progress") -> dict[str, VolumeRecord]:
    volumes = {}
    for volume in client.volumes(scope=scope):
        volumes[volume.name] = volume
        if len(volumes) % PAGE == 0:
            progress.show(f"{len(volumes)} Volumes fetched")
    return volumes


def _send(client: Client, changes: Sequence[Change], statistics: Counter[str], progress: "_Progress") -> None:
    for start in range(0, len(changes), BATCH):
        batch = changes[start : start + BATCH]
        for change, result in zip(batch, client.pack([(one.operation, one.arguments) for one in batch]), strict=True):
            if isinstance(result, RequestFailed):
                statistics["refused"] += 1
                progress.clear()
                output.message(f"line {change.line}: {result}")
            else:
                statistics[change.counts] += 1
        progress.show(f"{start + len(batch)} of {len(changes)} changes sent")


def _print(args: argparse.Namespace, statistics: Counter[str]) -> None:
    if args.json:
        output.json_line({key: statistics[key] for key in STATISTICS})
        return
    texts = STATISTICS | (TO_DO if args.dry_run else {})
    width = max(map(len, texts.values()))
    output.lines(
        f"{text:{width}} {statistics[key]:>8}" for key, text in texts.items() if statistics[key] or key not in LEFT
    )


class _Progress:
    """A line on standard error that is written over, where that is a terminal."""

    def __init__(self) -> None:
        self._shown = False

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        if sys.stderr.isatty():
            self._shown = True
            print(f"{WRITE_OVER}{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            self._shown = False
            print(WRITE_OVER, end="", file=sys.stderr, flush=True)
