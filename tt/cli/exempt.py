"""`tt exempt`: who is never timed out, seen and changed while the server runs.

Must not know how the server is asked, nor decide what is right: the server does, and its words are shown.
"""

import argparse

from tt.cli import output
from tt.cli.ask import add_server_options, ask

HEADING = ("NETWORK", "FROM", "SINCE", "NOTE")
ROW = "{:<24} {:<13} {:<20} {}"


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt exempt list`, `add` and `remove`."""
    text = "See and change, while the server on this host runs, who is never timed out; kept over a restart."
    exempt = commands.add_parser("exempt", help=text, description=text)
    actions = exempt.add_subparsers(metavar="ACTION", required=True, title="actions")

    text = "List who is exempt, by the configuration or since it runs."
    show = actions.add_parser("list", help=text, description=text)
    show.add_argument("--json", action="store_true", help="Print one JSON object a network.")
    add_server_options(show)
    show.set_defaults(run=_list)

    text = "Exempt a network from now on: its sources are disconnected and logged, but not timed out."
    add = actions.add_parser("add", help=text, description=f"{text} Time-outs that run there are lifted.")
    _network_argument(add)
    add.add_argument("--reason", metavar="TEXT", help="Why, for the list and the log.")
    add_server_options(add)
    add.set_defaults(run=_add)

    text = "End an exemption that was added while the server ran."
    remove = actions.add_parser("remove", help=text, description=text)
    _network_argument(remove)
    add_server_options(remove)
    remove.set_defaults(run=_remove)


def _network_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "network", metavar="CIDR|WORD", help="A network like 192.0.2.0/24, an address, or loopback or gateways."
    )


def _list(args: argparse.Namespace) -> int:
    items = [item for item in ask(args, {"do": "exempt.list"}) if "end" not in item]
    if args.json:
        output.lines(map(output.json_text, items))
        return output.OK
    rows = [(item["network"], item["from"], item["since"] or "", item["note"] or "") for item in items]
    output.lines(ROW.format(*row).rstrip() for row in (HEADING, *rows))
    return output.OK


def _add(args: argparse.Namespace) -> int:
    (answer,) = ask(args, {"do": "exempt.add", "network": args.network, "reason": args.reason})
    network, lifted = answer["network"], answer["lifted"]
    for caveat in answer["caveats"]:
        output.message(f"warning: exempt {network}: {caveat}")
    freed = f"; {lifted} time-out{'s' * (lifted != 1)} lifted" if lifted else ""
    output.message(f"{network} is exempt now{freed}" if answer["added"] else f"{network} was exempt already")
    return output.OK


def _remove(args: argparse.Namespace) -> int:
    (answer,) = ask(args, {"do": "exempt.remove", "network": args.network})
    if answer["still"]:
        remedy = "take it out of `exempt` there, then send the server a SIGHUP"
        output.message(f"{answer['network']} is still exempt by the configuration: {remedy}")
        return output.FAILED
    output.message(f"{answer['network']} is no longer exempt")
    return output.OK
