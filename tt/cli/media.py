"""`tt media`: the Media types of Customers, added, changed and listed."""

import argparse

from tt.catalog.messages import AddMedia, ChangeMedia, MediaRecord, Scope
from tt.cli import actions, output, table


def register(commands: actions.Actions) -> None:
    """Add `tt media add`, `change` and `list`."""
    group = actions.add_group(commands, "media", "Add, change or list Media types.")
    for name, text in (("add", "Add a Media type to a Customer."), ("change", "Change a Media type.")):
        parser = group.add(name, text, _write)
        parser.add_argument("media", metavar="MEDIA", type=actions.fitting("media"), help="Its full name, as US01.LTO.")
        parser.add_argument("--description", metavar="TEXT", help="At most 20 characters.")
        parser.add_argument(
            "--max-volumes", metavar="COUNT", type=int, help="How many Volumes there may be; 0 for any number."
        )
        parser.set_defaults(operation=f"media.{name}", arguments=AddMedia if name == "add" else ChangeMedia)
    show = group.add("list", "List Media types.", _list)
    show.add_argument("scope", metavar="CUSTOMER", nargs="?", default="", help="Those of this Customer alone.")


def _write(args: argparse.Namespace) -> int:
    arguments = args.arguments(args.media, **actions.given(args, "description", "max_volumes"))
    return actions.change(args, args.media, args.operation, arguments)


def _list(args: argparse.Namespace) -> int:
    entries: list[MediaRecord] = actions.ask(args, "media.list", Scope(args.scope)).entries
    table.show(
        args,
        MediaRecord,
        entries,
        {
            "MEDIA": lambda one: one.name,
            "MAX VOLUMES": lambda one: one.max_volumes or "",
            "DESCRIPTION": lambda one: one.description,
        },
    )
    return output.OK
