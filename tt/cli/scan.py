"""`tt scan out|in`: barcodes from a scanner or a file, a line each, and what is to be said of each, at once.

Rules: each scan is sent as it comes, since it is a fact; none waits for another.  When the connection is lost a scan is
sent a second time, on a new one: whether the first was recorded or not, it says the same of the tape.
Must not know how a scan is judged: the server does that.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from tt.catalog.messages import Scanned
from tt.cli import actions, output, server_option
from tt.client import Client, ConnectionLost

MAX_BARCODE = 20  # characters, as of the longest full name
VERDICTS = ("ok", "wrong", "unknown")
DIRECTIONS = ("out", "in")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt scan`."""
    parser = commands.add_parser(
        "scan",
        help="Scan Volumes out of a Repository, or into it.",
        description="Scan Volumes out of the Repository that they are to leave, or into the one where they have come "
        "or are. Reads a barcode a line from standard input (A00001, or US01.LTO.A00001) and answers each at once: ok, "
        "wrong or unknown. Ctrl-D ends; then the sums are printed.",
        epilog="Exit codes: 0 all were ok; 1 some were not, or it failed; 2 wrong usage; 3 no connection; "
        "4 not allowed.",
    )
    parser.add_argument("direction", choices=DIRECTIONS, help="Whether they leave the Repository or come to it.")
    add_repository(parser, "The Repository where you scan")
    parser.add_argument("--json", action="store_true", help="Print one JSON object a barcode and one for the sums.")
    server_option.add(parser)
    parser.set_defaults(run=_run)


def add_repository(parser: argparse.ArgumentParser, text: str, *, required: bool = True) -> None:
    """Add --repository."""
    parser.add_argument(
        "--repository",
        metavar="R",
        type=actions.fitting("repository"),
        required=required,
        help=f"{text}, by its full name, such as US01.LTO.VLT1.",
    )


def barcodes(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """(number of the line, text) of each line that is not empty, as soon as it is there."""
    for number, line in enumerate(stream, 1):
        if text := line.decode("utf-8", "replace").strip():
            yield number, text


def _run(args: argparse.Namespace) -> int:
    sums: Counter[str] = Counter()
    with server_option.connected(args) as client:
        if sys.stdin.isatty():
            output.message(f"scan {args.direction} at {args.repository}; Ctrl-D ends")
        try:
            for _, text in barcodes(sys.stdin.buffer):
                scanned = _scan(client, args.direction, args.repository, text)
                sums[scanned.verdict] += 1
                _print(args, scanned)
        except KeyboardInterrupt:
            sums["interrupted"] = 1  # what was scanned is recorded, but perhaps not all that was to be
        finally:
            _print_sums(args, sums)
    return output.OK if sums.keys() <= {"ok"} else output.FAILED


def _scan(client: Client, direction: str, repository: str, text: str) -> Scanned:
    if len(text) > MAX_BARCODE:
        return Scanned("unknown", text, f"a barcode has at most {MAX_BARCODE} characters", 0, b"")
    scan = client.volume_scan_out if direction == "out" else client.volume_scan_in
    try:
        return scan(text, repository)
    except ConnectionLost as error:  # a server ends a connection that was idle too long, and people have breaks
        output.message(f"{error}; connecting again")
        server_option.while_busy(client.reconnect)
        return scan(text, repository)


def _print(args: argparse.Namespace, scanned: Scanned) -> None:
    if args.json:
        output.json_line({"verdict": scanned.verdict, "volume": scanned.volume, "message": scanned.message})
    else:
        width = max(map(len, VERDICTS))
        output.line(f"{scanned.verdict:{width}} {scanned.volume}: {scanned.message}")


def _print_sums(args: argparse.Namespace, sums: Counter[str]) -> None:
    if args.json:
        output.json_line({verdict: sums[verdict] for verdict in VERDICTS})
    else:
        output.line(", ".join(f"{sums[verdict]} {verdict}" for verdict in VERDICTS))
