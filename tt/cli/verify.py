"""`tt verify`: the chain of custody, checked from its first row to its last."""

import argparse

from tt.catalog import chain
from tt.cli import catalog_file, output


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt verify`."""
    text = "Check that the history is the one that was written, and that the catalogue is what it leads to."
    parser = commands.add_parser("verify", help=text, description=text)
    parser.add_argument(
        "--anchor", metavar="HEAD", type=_head,
        help="A head that was kept elsewhere (SEQUENCE:HASH): the history must come by it.",
    )  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--head", action="store_true", help="Print the head alone, to keep elsewhere.")
    form.add_argument("--json", action="store_true", help="Print one JSON object.")
    catalog_file.add_options(parser)
    parser.set_defaults(run=_run)


def _head(text: str) -> chain.Head:
    try:
        return chain.parse_head(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from error


def _run(args: argparse.Namespace) -> int:
    path = catalog_file.path_of(args)
    with catalog_file.failing_with_its_word():
        report = chain.verify(path, args.anchor)
    head = str(report.head)
    if args.json:
        found = {"row": report.row, "problem": report.problem} if report.problem else {}
        output.json_line({"holds": not report.problem, "head": head, "records": report.records, **found})
    elif report.problem:
        output.message(f"{path}: {report.problem}")
    elif args.head:
        output.line(head)
    else:
        output.line(f"the chain holds: {report.head.sequence} rows, {report.records} records, head {head}")
    return output.FAILED if report.problem else output.OK
