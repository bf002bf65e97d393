"""How a command finds the catalogue's file on the host of its server, whether that runs or not."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tt.catalog.schema import StoreError
from tt.catalog.service import FILE
from tt.cli import output
from tt.cli.ask import add_data_option


def add_options(parser: argparse.ArgumentParser) -> None:
    """--data and --file."""
    which = add_data_option(parser)
    which.add_argument("--file", type=Path, metavar="FILE", help="The catalogue's file itself, such as a backup.")


def path_of(args: argparse.Namespace) -> Path:
    """The file that the options name."""
    path: Path = args.file or args.data / FILE
    return path


@contextmanager
def failing_with_its_word() -> Iterator[None]:
    """Where the file cannot be used, the command fails with what the store says."""
    try:
        yield
    except StoreError as error:
        raise output.Exit(output.FAILED, str(error)) from error
