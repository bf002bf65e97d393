"""`tt bans history` and `tt bans watch`: the time-outs that were, and those that come.

Must not know how the server is asked, nor decide what is right: the server does, and its words are shown.
"""

import argparse
import time
from itertools import islice
from typing import Any

from tt.cli import output
from tt.cli.arguments import add_filters, duration, length, whole
from tt.cli.ask import add_server_options, ask

TOGETHER = 500  # items of a list
HEADING = ("NUMBER", "BEGAN", "SOURCE", "REASON", "FOR", "BEFORE", "STATE", "ENDED", "DROPPED", "SPOKE")
ROW = "{:>8} {:<20} {:<24} {:<13} {:>8} {:>6} {:<8} {:<20} {:>8} {}"


def register(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt bans history` and `tt bans watch` to the actions of `tt bans`."""
    text = "Show the last 10,000 time-outs that began, oldest first, also those that have ended."
    past = actions.add_parser("history", help=text, description=text)
    add_filters(past)
    past.add_argument("--since", type=duration, metavar="TIME", help="Only those that began within TIME, as in 24h.")
    past.add_argument("--after", type=whole, metavar="NUMBER", help="Only those with a higher number.")
    past.add_argument("--json", action="store_true", help="Print one JSON object a time-out.")
    add_server_options(past)
    past.set_defaults(run=_history)

    text = "Show time-outs as they begin and end, until Ctrl-C."
    watch = actions.add_parser("watch", help=text, description=text)
    add_filters(watch)
    watch.add_argument("--json", action="store_true", help="Print one JSON object an event.")
    add_server_options(watch)
    watch.set_defaults(run=_watch)


def _history(args: argparse.Namespace) -> int:
    request = {
        "do": "bans.history", "network": args.network, "reason": args.reason, "after": args.after,
        "since": None if args.since is None else time.time() - args.since,
    }  # fmt: skip
    answer = ask(args, request)
    first = True
    while some := list(islice(answer, TOGETHER)):
        if first and not args.json:  # only now: an error prints no heading
            output.line(ROW.format(*HEADING))
        first = False
        shown = [item for item in some if "end" not in item]
        output.lines(map(output.json_text if args.json else _row, shown))
        if lost := some[-1].get("lost"):
            output.message(f"{lost} earlier time-out{'s are' if lost > 1 else ' is'} no longer held")
    return output.OK


def _row(item: dict[str, Any]) -> str:
    dropped = "" if item["dropped"] is None else item["dropped"]
    cells = item["number"], item["at"], item["source"], item["reason"], length(item["seconds"]), item["before"]
    return ROW.format(*cells, item["state"], item["ended"] or "", dropped, item["note"] or item["looks"])


def _watch(args: argparse.Namespace) -> int:
    request = {"do": "bans.watch", "network": args.network, "reason": args.reason}
    try:
        for item in ask(args, request, patience=None):
            output.line(output.json_text(item) if args.json else _event(item))
    except KeyboardInterrupt:  # the only end that it has while the server runs
        pass
    return output.OK


def _event(item: dict[str, Any]) -> str:
    if "event" not in item:
        return f"{item['lost']} events lost: they were not read fast enough"
    said = item["note"] or item["looks"]
    if item["event"] == "begun":
        return f"{item['at']} timed out {item['source']} {item['reason']} for {length(item['seconds'])}: {said}"
    dropped = "" if item["dropped"] is None else f", {item['dropped']} connections dropped"
    return f"{item['ended']} {item['state']} {item['source']} {item['reason']}{dropped}: {said}"
