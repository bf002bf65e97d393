"""Records printed: as a table for people, or with --json (an object a line, RFC 8259) or --csv (RFC 4180) for scripts.

For scripts all fields of a record are printed, by their names in tt.catalog.messages; for people the columns that a
command chooses.  A terminal gets a table by `rich` where that is installed; all else plain, aligned text.
Rule: a long list is printed as it comes; the widths of its columns are those of its first block.
Must not know any single command.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, TypeVar

import msgspec

from tt.cli import output

R = TypeVar("R", bound=msgspec.Struct)
Columns = Mapping[str, Callable[[R], object]]  # heading -> what stands below it
BLOCK = 1000  # records that are printed together
GAP = "  "


def add_formats(parser: argparse.ArgumentParser) -> None:
    """Add --json and --csv."""
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="Print one JSON object a record, with all its fields.")
    formats.add_argument("--csv", action="store_true", help="Print CSV with a line of headings, and all fields.")


def show(args: argparse.Namespace, kind: type[R], records: Iterable[R], columns: Columns[R]) -> None:
    """Print records of this kind as the options say."""
    blocks = _blocks(iter(records))
    if args.json:
        for block in blocks:
            output.lines(output.json_text(_fields(record)) for record in block)
    elif args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(kind.__struct_fields__)
        for block in blocks:
            writer.writerows(map(_cell, _fields(record).values()) for record in block)
        sys.stdout.flush()
    else:
        headings = tuple(columns)
        rows = ([tuple(_text(cell(record)) for cell in columns.values()) for record in block] for block in blocks)
        _show_table(headings, rows)


def details(args: argparse.Namespace, record: R, rows: Mapping[str, object]) -> None:
    """Print one record as the options say; for people a line each of `rows`."""
    if args.json or args.csv:
        show(args, type(record), [record], {})
        return
    width = max(map(len, rows))
    output.lines(f"{name:{width}}{GAP}{_text(value)}".rstrip() for name, value in rows.items())


def utc(seconds: float) -> str:
    """A time since 1970 in UTC, to the second; "" for 0, which stands for none."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else ""


def _blocks(records: Iterator[R]) -> Iterator[list[R]]:
    while block := list(islice(records, BLOCK)):
        yield block


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    """A result travels as an array; scripts want names."""
    return {name: _plain(getattr(record, name)) for name in record.__struct_fields__}


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _text(value: object) -> str:
    """A cell."""
    match _plain(value):
        case bool(truth):
            return "yes" if truth else "no"
        case list(values):
            return " ".join(map(str, values))
        case dict(values):
            return output.json_text(values)
        case plain:
            return str(plain)


def _cell(value: object) -> str:
    """A cell of CSV: also that may be shown on a terminal."""
    return output.printable(_text(value))


# ---- for people -----------------------------------------------------------------------------------------------------


def _show_table(headings: Sequence[str], blocks: Iterator[list[tuple[str, ...]]]) -> None:
    first = next(blocks, [])
    if not first:
        output.message("nothing to show")
    elif len(first) == BLOCK or not sys.stdout.isatty() or not _show_rich(headings, first):
        widths = [max(map(len, column)) for column in zip(headings, *first, strict=True)]
        output.lines(_line(row, widths) for row in (headings, *first))
        for block in blocks:
            output.lines(_line(row, widths) for row in block)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return GAP.join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _show_rich(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """False where `rich` is not installed: it is of the extra "cli"."""
    try:
        from rich.console import Console  # noqa: PLC0415 - it takes longer to import than most commands take
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        return False
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, len(GAP), 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(output.printable(cell)) for cell in row))  # as Text, "[b]" is no markup
    Console(highlight=False).print(table)
    return True
