"""`tt volume`: tapes, added, shown, listed, moved, changed and deleted.

Rule: what takes several Volumes does each for itself, so that one that fails costs no other.
"""

import argparse
import sys

from tt.catalog.messages import AddVolume, MoveVolume, OneVolume, UpdateVolume, VolumeRecord
from tt.catalog.model import FLAGS, SETTABLE
from tt.cli import actions, output, server_option, table

STDIN = "-"  # in place of names
SETTABLE_LETTERS = "".join(sorted(SETTABLE))


def register(commands: actions.Actions) -> None:
    """Add `tt volume add`, `show`, `list`, `move`, `cancel`, `update` and `delete`."""
    group = actions.add_group(commands, "volume", "Add, show, list, move, change or delete Volumes.")
    _register_reads(group)
    add = group.add("add", "Add Volumes, in a Repository.", _add)
    _names(add)
    add.add_argument("--repository", metavar="ID", required=True, help="The id of the Repository where they are.")
    _fields(add)
    add.add_argument("--flags", metavar="LETTERS", default="", help=f"Letters of {SETTABLE_LETTERS}.")
    move = group.add("move", "Ask that Volumes be moved to another Repository of their Media type.", _move)
    _names(move)
    move.add_argument("--to", metavar="ID", required=True, help="The id of the Repository where they are to go.")
    _fields(move)
    _names(group.add("cancel", "Call the moves of Volumes off.", _cancel))
    update = group.add("update", "Change descriptions, flags and move dates.", _update)
    _names(update)
    _fields(update)
    for option, word in (("set_flags", "set"), ("clear_flags", "clear")):
        update.add_argument(
            f"--{word}", dest=option, metavar="LETTERS", help=f"Flags to {word}: letters of {SETTABLE_LETTERS}."
        )
    _names(group.add("delete", "Delete Volumes, where their Repository allows it.", _delete))


def _register_reads(group: actions.Group) -> None:
    show = group.add("show", "Show a Volume.", _show)
    show.add_argument("volume", metavar="VOLUME", type=actions.fitting("volume"), help="Its full name.")
    listed = group.add("list", "List the Volumes that fit all that is given, by name.", _list)
    add = listed.add_argument
    add("scope", metavar="SCOPE", nargs="?", default="",
        help="A Customer, a Media type, or a Volume with ? * [ ] in its id, as 'US01.LTO.A*'.")  # fmt: skip
    add("--from", "--at", dest="repository", metavar="R", type=actions.fitting("repository"),
        help="Those that are in this Repository, by its full name; with --moving a pick list.")  # fmt: skip
    add("--to", dest="target", metavar="R", type=actions.fitting("repository"),
        help="Those that are to go to this Repository, by its full name.")  # fmt: skip
    add("--flags", metavar="LETTERS", default="", help="Those that show all of these flags.")
    add("--moving", action="store_true", help="Those that are to move.")
    add("--overdue", action="store_true", help="Those whose move was asked for two days ago or longer.")


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "volumes", metavar="VOLUME", nargs="+",
        help=f"Full names, as US01.LTO.A00001; {STDIN} reads them from standard input, a line each.",
    )  # fmt: skip


def _fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--description", metavar="TEXT", help='At most 256 characters; "" for none.')
    parser.add_argument(
        "--move-date", metavar="DAY", type=actions.fitting("move date"),
        help='The day of the next move, YYYY-MM-DD; "" for none.',
    )  # fmt: skip


# ---- what changes them ----------------------------------------------------------------------------------------------


def _add(args: argparse.Namespace) -> int:
    more = actions.given(args, "description", "flags", "move_date")
    return actions.change_each(args, _read(args), "volume.add", lambda name: AddVolume(name, args.repository, **more))


def _move(args: argparse.Namespace) -> int:
    more = actions.given(args, "description", "move_date")
    return actions.change_each(args, _read(args), "volume.move", lambda name: MoveVolume(name, args.to, **more))


def _cancel(args: argparse.Namespace) -> int:
    return actions.change_each(args, _read(args), "volume.cancel", OneVolume)


def _update(args: argparse.Namespace) -> int:
    more = actions.given(args, "description", "move_date", "set_flags", "clear_flags")
    if not more:
        raise output.Exit(output.USAGE, "nothing is to be changed: give --description, --move-date, --set or --clear")
    return actions.change_each(args, _read(args), "volume.update", lambda name: UpdateVolume(name, **more))


def _delete(args: argparse.Namespace) -> int:
    return actions.change_each(args, _read(args), "volume.delete", OneVolume)


def _read(args: argparse.Namespace) -> list[str]:
    """The names, all checked before the first is sent.  Raises output.Exit."""
    names = list(args.volumes)
    if names == [STDIN]:
        names = [line.strip() for line in sys.stdin if line.strip()]
    check = actions.fitting("volume")
    try:
        return [check(name) for name in names]
    except argparse.ArgumentTypeError as error:
        raise output.Exit(output.USAGE, str(error)) from error


# ---- what shows them ------------------------------------------------------------------------------------------------


def _show(args: argparse.Namespace) -> int:
    volume: VolumeRecord = actions.ask(args, "volume.get", OneVolume(args.volume))
    rows: dict[str, object] = {
        "volume": volume.name,
        "is in": volume.current,
        "is to go to": volume.target,
        "asked for": table.utc(volume.requested),
        "last scanned in": volume.scanned,
        "move date": volume.move_date,
        "description": volume.description,
        "row of history": volume.last,
    }
    table.details(args, volume, rows | {f"flag {letter}": FLAGS[letter].meaning for letter in volume.flags})
    return output.OK


def _list(args: argparse.Namespace) -> int:
    fields = ("scope", "repository", "target", "flags", "moving", "overdue")
    with server_option.connected(args) as client:
        table.show(
            args,
            VolumeRecord,
            client.volumes(**actions.given(args, *fields)),
            {
                "VOLUME": lambda one: one.name,
                "IN": lambda one: one.current,
                "TO": lambda one: one.target,
                "SEEN": lambda one: one.scanned,
                "FLAGS": lambda one: one.flags,
                "MOVE DATE": lambda one: one.move_date,
                "DESCRIPTION": lambda one: one.description,
            },
        )
    return output.OK
