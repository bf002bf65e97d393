"""What the commands of the catalogue have in common: their options, arguments that are checked, and acknowledgements.

Must not know any single command.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import Struct

from tt.catalog.messages import Arguments
from tt.catalog.model import PARTS, Invalid, check, check_name
from tt.cli import output, server_option, table
from tt.client import RequestFailed

Actions = Any  # what add_subparsers returns; argparse has no public name for it


class Acknowledged(Struct, frozen=True):
    """A change that is on disk, as a row of the history."""

    name: str
    sequence: int
    hash: bytes


class Group(NamedTuple):
    """A first word of the command line with its actions."""

    actions: Actions

    def add(self, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        """An action with the options that all have; `run` does it."""
        parser: argparse.ArgumentParser = self.actions.add_parser(name, help=text, description=text)
        table.add_formats(parser)
        server_option.add(parser)
        parser.set_defaults(run=run)
        return parser


def add_group(commands: Actions, name: str, text: str) -> Group:
    """A group of actions."""
    return Group(commands.add_parser(name, help=text, description=text).add_subparsers(
        metavar="ACTION", required=True, title="actions"
    ))  # fmt: skip


def fitting(field: str) -> Callable[[str], str]:
    """The type of an argument: a full name of a "volume" and so on, or a field's value, as tt.catalog.model has it."""

    def read(text: str) -> str:
        try:
            return check_name(field, text) if field in PARTS else check(field, text)
        except Invalid as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def given(args: argparse.Namespace, *fields: str) -> Mapping[str, Any]:
    """Those of the arguments that stand on the command line."""
    return {field: value for field in fields if (value := getattr(args, field)) is not None}


def ask(args: argparse.Namespace, operation: str, arguments: Arguments) -> Any:
    """Log in, ask for one operation and give its result."""
    with server_option.connected(args) as client:
        return client.call(operation, arguments)


def change(args: argparse.Namespace, name: str, operation: str, arguments: Arguments) -> int:
    """Make one change and print its acknowledgement; returns the exit code."""
    written = ask(args, operation, arguments)
    acknowledge(args, [Acknowledged(name, written.sequence, written.hash)])
    return output.OK


def change_each(
    args: argparse.Namespace, names: Sequence[str], operation: str, make: Callable[[str], Arguments]
) -> int:
    """Make one change for each name, each for itself; what failed is said; returns the exit code."""
    results: list[Any] = []
    with server_option.connected(args) as client:
        try:
            client.pack(((operation, make(name)) for name in names), results)
        finally:  # also where the connection broke: what was acknowledged before is done
            _report(args, names, results)
    failures = [result for result in results if isinstance(result, RequestFailed)]
    if failures and all(failure.code in output.NOT_ALLOWED for failure in failures):
        return output.DENIED
    return output.FAILED if failures else output.OK


def _report(args: argparse.Namespace, names: Sequence[str], results: Sequence[Any]) -> None:
    """Print the results that came, which are those of the first names."""
    answered = list(zip(names, results, strict=False))
    acknowledge(
        args,
        [
            Acknowledged(name, result.sequence, result.hash)
            for name, result in answered
            if not isinstance(result, RequestFailed)
        ],
    )
    for name, result in answered:
        if isinstance(result, RequestFailed):
            output.message(f"{name}: {result}")


def acknowledge(args: argparse.Namespace, done: Iterable[Acknowledged]) -> None:
    """Print what was changed."""
    if args.json or args.csv:
        table.show(args, Acknowledged, done, {})
    else:
        output.lines(f"{one.name}: done, row {one.sequence} of the history" for one in done)
