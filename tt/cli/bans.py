"""`tt bans`: see, add and lift the time-outs of a running server.

Must not know how the server is asked, nor decide what is right: the server does, and its words are shown.
"""

import argparse
from itertools import islice
from typing import Any

from tt.cli import bans_file, bans_past, bans_report, output
from tt.cli.arguments import add_filters, duration, length
from tt.cli.ask import add_server_options, ask, ask_lines

TOGETHER = 500  # items of a list
HEADING = ("SOURCE", "REASON", "SINCE", "ENDS IN", "BEFORE", "DROPPED", "KERNEL", "SPOKE")
ROW = "{:<24} {:<13} {:<20} {:>8} {:>6} {:>8} {:<6} {}"


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt bans` with all that can be done."""
    text = "See, add, lift, export and import time-outs of the server that runs on this host."
    bans = commands.add_parser("bans", help=text, description=text)
    actions = bans.add_subparsers(metavar="ACTION", required=True, title="actions")

    text = "List who is timed out: why, since when, for how long, how often before, and what it spoke."
    show = actions.add_parser("list", help=text, description=text)
    add_filters(show)
    for name, words in (("older", "began longer ago than"), ("newer", "began within")):
        show.add_argument(f"--{name}", type=duration, metavar="TIME", help=f"Only those that {words} TIME, as in 10m.")
    show.add_argument("--json", action="store_true", help="Print one JSON object a source.")
    add_server_options(show)
    show.set_defaults(run=_list)

    text = "Time out a source by hand; its connections without a login are reset."
    add = actions.add_parser("add", help=text, description=text)
    add.add_argument("source", metavar="SOURCE", help="An IPv4 address, or an IPv6 address, which stands for its /64.")
    add.add_argument(
        "--for", dest="seconds", type=duration, metavar="TIME",
        help="How long, as in 90s, 10m, 2h, 30d (default: the server's timeout; at most 30d).",
    )  # fmt: skip
    add.add_argument("--reason", metavar="TEXT", help="Why, for the list and the log.")
    add_server_options(add)
    add.set_defaults(run=_add)

    text = "Lift the time-out of a source, or all within a network, and forget the repeats of those lifted."
    remove = actions.add_parser("remove", help=text, description=text)
    remove.add_argument("source", metavar="SOURCE|CIDR", help="An address, or a network like 192.0.2.0/24.")
    add_server_options(remove)
    remove.set_defaults(run=_remove)

    text = "Lift all time-outs that run, and forget the repeats of those lifted."
    clear = actions.add_parser("clear", help=text, description=text)
    add_server_options(clear)
    clear.set_defaults(run=_clear)

    for more in (bans_past, bans_file, bans_report):
        more.register(actions)


def _list(args: argparse.Namespace) -> int:
    request = {name: getattr(args, name) for name in ("network", "reason", "older", "newer")}
    request["do"] = "bans.list"
    if args.json:
        listed = ask_lines(args, request)
        while some := list(islice(listed, TOGETHER)):
            output.json_lines(some)
        return output.OK
    for number, item in enumerate(ask(args, request)):
        if number == 0:  # only now: an error prints no heading
            output.line(ROW.format(*HEADING))
        if "end" not in item:
            output.line(_row(item))
    return output.OK


def _row(item: dict[str, Any]) -> str:
    if item["reason"] == "preloaded":
        return ROW.format(item["source"], "preloaded", "", "never", "", "", "yes", "").rstrip()
    in_kernel = {None: "", True: "yes", False: "no"}[item["in_kernel"]]
    counts = item["before"], item["dropped"]
    text = item["note"] or item["looks"]
    return ROW.format(
        item["source"], item["reason"], item["since"], length(item["ends_in_s"]), *counts, in_kernel, text
    )


def _add(args: argparse.Namespace) -> int:
    request = {"do": "bans.add", "source": args.source, "reason": args.reason}
    if args.seconds is not None:
        request["seconds"] = args.seconds
    for item in ask(args, request):
        output.message(f"{item['source']} is timed out for {length(item['ends_in_s'])}")
    return output.OK


def _remove(args: argparse.Namespace) -> int:
    return _lifted(args, {"do": "bans.remove", "source": args.source}, f"{args.source} is not timed out")


def _clear(args: argparse.Namespace) -> int:
    _lifted(args, {"do": "bans.clear"}, "nobody is timed out")
    return output.OK


def _lifted(args: argparse.Namespace, request: dict[str, Any], none: str) -> int:
    (answer,) = ask(args, request)
    count = answer["removed"]
    forgotten = answer.get("forgotten", False)
    words = f"{none}; its earlier time-outs are forgotten" if forgotten else none
    output.message(f"{count} time-out{'s' * (count != 1)} lifted" if count else words)
    if others := answer.get("others"):
        output.message(
            f"{args.source} is still dropped by an entry of {others} that this server did not write: "
            f"see 'bpftool map dump pinned {others}', and delete it there"
        )
        return output.FAILED
    return output.OK if count or forgotten else output.FAILED
