"""`tt repository`: the Repositories of Media types, added, changed and listed."""

import argparse

from tt.catalog.messages import AddRepository, ChangeRepository, RepositoryRecord, Scope
from tt.catalog.model import REPOSITORY_KINDS
from tt.cli import actions, output, table

FIELDS = ("description", "kind", "offsite", "next", "allow_deletes")


def register(commands: actions.Actions) -> None:
    """Add `tt repository add`, `change` and `list`."""
    group = actions.add_group(commands, "repository", "Add, change or list Repositories.")
    for name, text in (("add", "Add a Repository to a Media type."), ("change", "Change a Repository.")):
        parser = group.add(name, text, _write)
        add = parser.add_argument
        add("repository", metavar="REPOSITORY", type=actions.fitting("repository"),
            help="Its full name, as US01.LTO.VLT1.")  # fmt: skip
        add("--description", metavar="TEXT", help="At most 20 characters.")
        add("--kind", choices=REPOSITORY_KINDS, help="What it is (default of a new one: rack).")
        add("--offsite", action=argparse.BooleanOptionalAction, help="Whether it is offsite.")
        add("--next", metavar="ID",
            help='The Repository where Volumes go from here when they are due, as VLT1; "" for none.')  # fmt: skip
        add("--allow-deletes", action=argparse.BooleanOptionalAction, help="Whether Volumes in it may be deleted.")
        parser.set_defaults(
            operation=f"repository.{name}", arguments=AddRepository if name == "add" else ChangeRepository
        )
    show = group.add("list", "List Repositories.", _list)
    show.add_argument("scope", metavar="SCOPE", nargs="?", default="",
                      help="Those of this Customer or Media type alone, as US01 or US01.LTO.")  # fmt: skip


def _write(args: argparse.Namespace) -> int:
    arguments = args.arguments(args.repository, **actions.given(args, *FIELDS))
    return actions.change(args, args.repository, args.operation, arguments)


def _list(args: argparse.Namespace) -> int:
    entries: list[RepositoryRecord] = actions.ask(args, "repository.list", Scope(args.scope)).entries
    table.show(
        args,
        RepositoryRecord,
        entries,
        {
            "REPOSITORY": lambda one: one.name,
            "KIND": lambda one: one.kind,
            "OFFSITE": lambda one: one.offsite,
            "NEXT": lambda one: one.next,
            "DELETES": lambda one: one.allow_deletes,
            "DESCRIPTION": lambda one: one.description,
        },
    )
    return output.OK
