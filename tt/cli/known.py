"""`tt known`: the servers that this user trusts.  The file and its rules are in tt.known_servers."""

import argparse

from tt import keys, known_servers
from tt.cli import output


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt known add`, `list` and `remove`."""
    text = "Add, list or remove the servers that you trust, with their public keys."
    known = commands.add_parser("known", help=text, description=text)
    actions = known.add_subparsers(metavar="ACTION", required=True, title="actions")

    text = (
        "Trust a server that holds KEY. A key that was known before stays valid, so that a server can change its key."
    )
    add = actions.add_parser("add", help=text, description=text)
    _server_argument(add)
    add.add_argument(
        "key", metavar="KEY", type=server_key, help="The server's public key, as its file server.pub holds it."
    )
    add.set_defaults(run=_add)

    text = "List the known servers and their keys, the newest key first."
    show = actions.add_parser("list", help=text, description=text)
    show.add_argument("--json", action="store_true", help="Print one JSON object a server.")
    show.set_defaults(run=_list)

    text = "Forget a server and all its keys."
    remove = actions.add_parser("remove", help=text, description=text)
    _server_argument(remove)
    remove.set_defaults(run=_remove)


def server_key(text: str) -> bytes:
    """Read a server's public key as an argument: the 32 bytes of its text form."""
    try:
        return keys.from_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def server_address(text: str) -> tuple[str, int | None]:
    """Read HOST[:PORT] as an argument; the port is None where none is given."""
    try:
        return known_servers.parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _server_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "server",
        metavar="HOST[:PORT]",
        type=server_address,
        help=f"The server; the port is {known_servers.DEFAULT_PORT} unless given. An IPv6 address with a port is "
        "written [ADDRESS]:PORT.",
    )


def _server(args: argparse.Namespace) -> tuple[str, int]:
    host, port = args.server
    return host, known_servers.DEFAULT_PORT if port is None else port


def _add(args: argparse.Namespace) -> int:
    host, port = _server(args)
    address = known_servers.format_address(host, port)
    changed = known_servers.add(host, port, args.key)
    output.message(f"{address} is known now" if changed else f"{address} was known with this key already")
    return output.OK


def _list(args: argparse.Namespace) -> int:
    for server in known_servers.entries():
        texts = [keys.to_text(key) for key in server.keys]
        if args.json:
            output.json_line({"host": server.host, "port": server.port, "keys": texts})
        else:
            output.line(f"{known_servers.format_address(server.host, server.port)} {' '.join(texts)}")
    return output.OK


def _remove(args: argparse.Namespace) -> int:
    host, port = _server(args)
    address = known_servers.format_address(host, port)
    if not known_servers.remove(host, port):
        raise output.Exit(output.FAILED, f"{address} is not known, so nothing was removed; see 'tt known list'")
    output.message(f"{address} is removed")
    return output.OK
