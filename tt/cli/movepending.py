"""`tt move-pending`: start the moves that are due.  Made for cron: it prints nothing where there is nothing to do."""

import argparse

from tt.cli import output, server_option


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt move-pending`."""
    parser = commands.add_parser(
        "move-pending",
        help="Start the moves that are due.",
        description="Ask for the move of each Volume with flag p, or whose move date has come, from its Repository to "
        "the next one of that. Made for cron: prints a line a Volume, and nothing where there is nothing to do.",
        epilog="Exit codes: 0 all that was due moves now; 1 some was left, and why is on standard error; 2 wrong "
        "usage; 3 no connection; 4 not allowed.",
    )
    add = parser.add_argument
    add("--scope", default="", help="Only the Volumes of this Customer or Media type (default: all that you may see).")
    add("--dry-run", action="store_true", help="Print what would move, and change nothing.")
    add("--json", action="store_true", help="Print one JSON object a Volume.")
    server_option.add(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    code, after = output.OK, ""
    with server_option.connected(args) as client:
        while True:
            page = client.volume_move_pending(args.scope, args.dry_run, after)
            for moved in page.entries:
                if moved.problem:
                    code = output.FAILED
                if args.json:
                    output.json_line(
                        {"volume": moved.volume, "from": moved.origin, "to": moved.target, "problem": moved.problem}
                    )
                elif moved.problem:
                    output.message(f"{moved.volume} stays in {moved.origin}: {moved.problem}")
                else:
                    output.line(f"{moved.volume} {moved.origin} -> {moved.target}")
            if not (after := page.next):
                return code
