"""`tt backup`: a copy of the catalogue as it is at one moment."""

import argparse
from pathlib import Path

from tt.catalog import chain
from tt.cli import catalog_file, output


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt backup`."""
    text = "Copy the catalogue as it is at one moment, also while the server runs."
    parser = commands.add_parser("backup", help=text, description=text)
    parser.add_argument("target", metavar="TARGET", type=Path, help="The new file: nothing may be there.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    catalog_file.add_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    with catalog_file.failing_with_its_word():
        head = str(chain.backup(catalog_file.path_of(args), args.target))
    if args.json:
        output.json_line({"file": str(args.target), "head": head})
    else:
        output.line(f"{args.target}: the catalogue with head {head}")
    return output.OK
