"""Arguments that several commands of the operator have, and how a length of time is shown.

Must not know any single command.
"""

import argparse

from tt.option_kinds import COUNT, DURATION


def duration(text: str) -> float:
    """Read a time as an argument, in seconds."""
    try:
        return float(DURATION.read(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: it must be {DURATION.rule}") from None


def whole(text: str) -> int:
    """Read a whole number as an argument."""
    try:
        return int(COUNT.read(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be {COUNT.rule}") from None


def length(seconds: float) -> str:
    """A length of time as 59:59 or 2:00:00."""
    rest = max(0, round(seconds))
    return f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}" if rest >= 3600 else f"{rest // 60}:{rest % 60:02}"


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Which time-outs: a network, and a reason."""
    parser.add_argument("network", metavar="CIDR", nargs="?", help="Only sources within this network.")
    parser.add_argument("--reason", metavar="NAME", help="Only those with this reason, as in not_protocol.")
