"""`tt user`: accounts, passwords, rights and sessions.

Rule: no password stands on the command line but, where the user wants that, behind "-" (tt.cli.server_option); who is
added or reset gets one that is made, to be used once.
"""

import argparse
import os
from pathlib import Path

from tt import data_lock
from tt.catalog.accounts import reset_in_file
from tt.catalog.messages import (
    AccessRecord,
    AddUser,
    Arguments,
    ChangeUser,
    Disconnect,
    ListAccess,
    NewPassword,
    OneUser,
    SessionRecord,
    SetAccess,
    UserRecord,
)
from tt.catalog.model import LEVELS, Invalid, check
from tt.catalog.service import FILE
from tt.catalog.store import Store, StoreError
from tt.cli import actions, output, server_option, table
from tt.cli.ask import ask as ask_host
from tt.dispatch import OperationError


def register(commands: actions.Actions) -> None:
    """Add `tt user add`, `list`, `change`, `reset`, `password`, `access`, `sessions` and `disconnect`."""
    group = actions.add_group(commands, "user", "Manage users, passwords, rights and sessions.")
    _register_accounts(group)
    _register_access(group)
    group.add("sessions", "List who is logged in now.", _sessions)
    disconnect = group.add("disconnect", "End a session.", _disconnect)
    disconnect.add_argument("id", metavar="ID", type=int, help="Its number, as 'tt user sessions' shows it.")


def _register_accounts(group: actions.Group) -> None:
    add = group.add("add", "Add a user, and print a password that he is to use once, to set his own.", _add)
    _user_argument(add)
    change = group.add("change", "Change a user; one that may come no more is disconnected.", _change)
    _user_argument(change)
    for parser in (add, change):
        parser.add_argument("--description", metavar="TEXT", help="At most 40 characters.")
        parser.add_argument(
            "--administrator", action=argparse.BooleanOptionalAction,
            help="Whether he manages users, rights, sessions and Customers.",
        )  # fmt: skip
        parser.add_argument(
            "--networks", metavar="CIDRS", type=actions.fitting("networks"),
            help='Where he may come from, as "192.0.2.0/24 2001:db8::/32"; "" for anywhere.',
        )  # fmt: skip
    change.add_argument("--disabled", action=argparse.BooleanOptionalAction, help="Whether he is kept out.")
    group.add("list", "List all users.", _list)
    reset = group.add("reset", "Give a user a password that he is to use once; his own is void from then on.", _reset)
    _user_argument(reset)
    reset.add_argument(
        "--data", type=Path, metavar="DIR",
        help="Without a login: for who may write in the server's data directory, on its host.",
    )  # fmt: skip
    password = group.add("password", "Set your own password; your other sessions end.", _password)
    password.add_argument(
        "--new", metavar="PASSWORD", default="",
        help=f"The new one, as in -S: the name of a file that holds it, or {server_option.LITERAL} and the password "
        "itself (default: it is asked for on the terminal, twice).",
    )  # fmt: skip


def _register_access(group: actions.Group) -> None:
    text = "Give users rights, or list them."
    access = actions.add_group(group.actions, "access", text)
    give = access.add(
        "set", "Give a user a level for the Customers of a pattern, in place of the old one.", _set_access
    )
    _user_argument(give)
    give.add_argument("pattern", metavar="PATTERN", type=actions.fitting("pattern"),
                      help="A Customer, all that begin so, or all: US01, 'US*', '*'.")  # fmt: skip
    give.add_argument("level", metavar="LEVEL", choices=LEVELS, help=f"{', '.join(LEVELS)}; none takes it away.")
    give.add_argument("--catalog", action="store_true", help="He may also define Media types and Repositories.")
    show = access.add("list", "List rights.", _list_access)
    show.add_argument("user", metavar="USER", nargs="?", default="", help="Those of this user alone.")


def _user_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("user", metavar="USER", type=actions.fitting("user"), help="The user's name.")


# ---- accounts -------------------------------------------------------------------------------------------------------


def _add(args: argparse.Namespace) -> int:
    arguments = AddUser(args.user, **actions.given(args, "description", "administrator", "networks"))
    return _print_password(args, actions.ask(args, "user.add", arguments))


def _change(args: argparse.Namespace) -> int:
    fields = actions.given(args, "description", "administrator", "disabled", "networks")
    if not fields:
        raise output.Exit(output.USAGE, "nothing is to be changed; see 'tt user change --help'")
    return actions.change(args, args.user, "user.change", ChangeUser(args.user, **fields))


def _list(args: argparse.Namespace) -> int:
    entries: list[UserRecord] = actions.ask(args, "user.list", Arguments()).entries
    table.show(
        args,
        UserRecord,
        entries,
        {
            "USER": lambda one: one.user,
            "ADMINISTRATOR": lambda one: one.administrator,
            "DISABLED": lambda one: one.disabled,
            "NEW PASSWORD": lambda one: one.must_change_password,
            "FROM": lambda one: one.networks or "anywhere",
            "DESCRIPTION": lambda one: one.description,
        },
    )
    return output.OK


def _reset(args: argparse.Namespace) -> int:
    if args.data is None:
        return _print_password(args, actions.ask(args, "user.reset", OneUser(args.user)))
    if args.server is not None:
        raise output.Exit(output.USAGE, "-S asks a server, --data its directory on this host: give one of them")
    return _print_password(args, _reset_on_host(args.data, args.user))


def _reset_on_host(data: Path, user: str) -> NewPassword:
    # The server is asked once more where it has come meanwhile.
    for way in (_reset_by_server, _reset_in_file, _reset_by_server):
        if (made := way(data, user)) is not None:
            return made
    raise output.Exit(
        output.NO_CONNECTION, f"data directory {data}: a server is starting or stopping there: try again in a second"
    )


def _reset_by_server(data: Path, user: str) -> NewPassword | None:
    """None where none listens."""
    try:
        (answer,) = ask_host(argparse.Namespace(control=None, data=data), {"do": "user.reset", "user": user})
    except output.Exit as error:
        # Only where none listens: past a server that does not answer, its file must not be written.
        if not isinstance(error.__cause__, (FileNotFoundError, ConnectionRefusedError)):
            raise
        return None
    return NewPassword(answer["password"], answer["sequence"], bytes.fromhex(answer["hash"]))


def _reset_in_file(data: Path, user: str) -> NewPassword | None:
    """Without a server; None where one has the directory."""
    path = data / FILE
    if not path.exists():
        raise output.Exit(output.USAGE, f"{path}: no catalogue is there: name the server's data directory with --data")
    try:
        lock = data_lock.take(data)  # before the file is opened, and until it is closed: no server starts meanwhile
    except data_lock.DataInUseError:
        return None
    except OSError as error:
        raise output.Exit(output.FAILED, f"{data}: {error.strerror or error}") from error
    try:
        store = Store(path)
        try:
            return reset_in_file(store, data, user)
        finally:
            store.close()
    except (OperationError, StoreError) as error:
        raise output.Exit(output.FAILED, str(error)) from error
    finally:
        os.close(lock)


def _print_password(args: argparse.Namespace, made: NewPassword) -> int:
    if args.json or args.csv:
        table.show(args, NewPassword, [made], {})
    else:
        output.line(f"password of {args.user}, to be used once, to set another: {made.password}")
    return output.OK


def _password(args: argparse.Namespace) -> int:
    server = server_option.named(args)
    new = server_option.read_password(args.new, f"New password of {server.user}: ")
    if not args.new and new != server_option.read_password("", "Once more: "):
        raise output.Exit(output.USAGE, "the two are not the same; nothing was changed")
    try:
        # Before the login: with a password that is to be used once there is no second.
        check("password", new)
    except Invalid as error:
        raise output.Exit(output.USAGE, f"new {error}") from error
    with server_option.connected(args, server, once=True) as client:
        written = client.password(server.password, new)
    actions.acknowledge(args, [actions.Acknowledged(server.user, written.sequence, written.hash)])
    return output.OK


# ---- rights and sessions --------------------------------------------------------------------------------------------


def _set_access(args: argparse.Namespace) -> int:
    arguments = SetAccess(args.user, args.pattern, args.level, args.catalog)
    return actions.change(args, f"{args.user} {args.pattern}", "access.set", arguments)


def _list_access(args: argparse.Namespace) -> int:
    entries: list[AccessRecord] = actions.ask(args, "access.list", ListAccess(args.user)).entries
    table.show(
        args,
        AccessRecord,
        entries,
        {
            "USER": lambda one: one.user,
            "CUSTOMERS": lambda one: one.pattern,
            "LEVEL": lambda one: one.level,
            "CATALOG": lambda one: one.catalog,
        },
    )
    return output.OK


def _sessions(args: argparse.Namespace) -> int:
    entries: list[SessionRecord] = actions.ask(args, "session.list", Arguments()).entries
    table.show(
        args,
        SessionRecord,
        entries,
        {
            "ID": lambda one: one.id,
            "USER": lambda one: one.user,
            "FROM": lambda one: one.source,
            "WITH": lambda one: one.interface,
            "SINCE": lambda one: table.utc(one.since),
            "REQUESTS": lambda one: one.requests,
        },
    )
    return output.OK


def _disconnect(args: argparse.Namespace) -> int:
    actions.ask(args, "session.disconnect", Disconnect(args.id))
    output.message(f"session {args.id} is ended")
    return output.OK
