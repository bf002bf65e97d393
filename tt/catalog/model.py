"""What the catalogue holds: the records, the rules of their fields, and the letters of a Volume's state.

    Customer  US01                 Media type  US01.LTO           (of the Customer)
    Repository  US01.LTO.VLT1      Volume  US01.LTO.A00001        (both of the Media type)

A record is known by its full name: ids joined by periods.  Records are frozen: a change is a new record.  A Volume
names its Repositories by id alone, since they are of its own Media type, which it never leaves.
Rules: every rule about a field stands here, once, and its error names the field, the rule and the value.
Must not know how records are stored, who may change them, or how they travel.
"""

import re
from collections.abc import Callable
from datetime import date
from functools import lru_cache
from ipaddress import ip_network
from typing import NamedTuple

from msgspec import Struct


class Invalid(ValueError):  # noqa: N818 - it is shown to users as it stands
    """A field's value breaks its rule; the text names the field, the rule and the value."""


# ---------------------------------------------------------------------------------------------------------------------
# Records, as they are stored: each has `name`, by which it is found, and `row`, 0 as long as it is not stored
# ---------------------------------------------------------------------------------------------------------------------


class Customer(Struct, frozen=True, gc=False):
    """A company whose tapes are kept."""

    name: str  # US01
    description: str = ""
    row: int = 0
    last: int = 0  # the sequence number of its newest row of history


class Media(Struct, frozen=True, gc=False):
    """A Media type of a Customer: what kind of tape."""

    name: str  # US01.LTO
    description: str = ""
    max_volumes: int = 0  # 0: no limit
    row: int = 0
    last: int = 0


class Repository(Struct, frozen=True, gc=False):
    """A place where Volumes of one Media type are."""

    name: str  # US01.LTO.VLT1
    description: str = ""
    kind: str = "rack"  # one of REPOSITORY_KINDS
    offsite: bool = False
    next: str = ""  # the id of the Repository to which a Volume goes from here when its date has come; "": none
    allow_deletes: bool = False
    row: int = 0
    last: int = 0


class Volume(Struct, frozen=True, gc=False):
    """A tape: where it is, where it should go, where it was last seen."""

    name: str  # US01.LTO.A00001
    current: str  # the id of the Repository where it is
    target: str = ""  # where it is to go; "": it is not moving
    scanned: str = ""  # where it was last scanned; "": never
    flags: str = ""  # the stored ones of FLAGS, sorted
    move_date: str = ""  # the day of its next move, YYYY-MM-DD; "": none
    requested: int = 0  # when the move under way was asked for, seconds since 1970 UTC; 0: it is not moving
    description: str = ""
    row: int = 0
    last: int = 0


class User(Struct, frozen=True, gc=False):
    """An account."""

    name: str  # jsmith
    description: str = ""
    password: str = ""  # its hash, in the text form of catalog/passwords.py; "": nobody gets in
    administrator: bool = False  # manages users, access, sessions and Customers
    disabled: bool = False
    must_change: bool = False  # the password, before anything else
    networks: str = ""  # where he may come from: CIDRs separated by spaces; "": from anywhere
    row: int = 0
    last: int = 0


class Access(Struct, frozen=True, gc=False):
    """What one user may do with the Customers that a pattern names."""

    name: str  # jsmith US*: the user, a space, the pattern
    level: int = 0  # NONE, READ, WRITE or ALTER
    catalog: bool = False  # may define Media types and Repositories
    row: int = 0
    last: int = 0


class Certificate(Struct, frozen=True, gc=False):
    """The kept result of a reconciliation: what should have been there, and what was."""

    name: str  # US01.LTO.VLT1 20261123T101500.000001Z: the Repository and when
    user: str
    correct: int = 0
    surplus: str = ""  # ids of Volumes that were scanned and should not be there, separated by spaces
    deficit: str = ""  # ids of those that should be there and were not scanned
    row: int = 0
    last: int = 0


Record = Customer | Media | Repository | Volume | User | Access | Certificate

# Levels of access, each with all before it, and the right to define Media types and Repositories.
NONE, READ, WRITE, ALTER = range(4)
LEVELS = ("none", "read", "write", "alter")

REPOSITORY_KINDS = (
    "destruction", "disaster_recovery", "legal_hold", "library", "ordered", "rack", "scratch", "transport", "vault",
)  # fmt: skip
SUPERUSER = "tapemaster"


# ---------------------------------------------------------------------------------------------------------------------
# The letters of a Volume's state
# ---------------------------------------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """One letter."""

    meaning: str
    settable: bool = False  # by `volume.update`; the others follow from what happens


FLAGS = {
    "a": Flag("audit failed: scanned where it should not be", settable=True),
    "C": Flag("confirmed at its Repository"),
    "D": Flag("has a move date"),
    "d": Flag("its move date has come"),
    "E": Flag("encrypted", settable=True),
    "G": Flag("missed a report's deadline", settable=True),
    "h": Flag("hidden", settable=True),
    "K": Flag("picked up", settable=True),
    "L": Flag("update lock: only tapemaster may change it", settable=True),
    "l": Flag("move lock", settable=True),
    "M": Flag("moving"),
    "N": Flag("described"),
    "O": Flag("offsite"),
    "o": Flag("overdue at its target"),
    "p": Flag("move pending", settable=True),
    "Q": Flag("unhealthy", settable=True),
    "r": Flag("requested back", settable=True),
    "S": Flag("always Simple Management", settable=True),
    "t": Flag("no slot", settable=True),
    "U": Flag("scanned out"),
    "W": Flag("moved back before it was confirmed"),
}
SETTABLE = frozenset(letter for letter, flag in FLAGS.items() if flag.settable)
STORED = SETTABLE | frozenset("CUW")  # the others are worked out when a Volume is shown
OVERDUE_AFTER = 2 * 86_400  # seconds from the request of a move to the letter "o"


def with_flags(flags: str, *, add: str = "", remove: str = "") -> str:
    """The stored letters after some were added and some removed, sorted."""
    return "".join(sorted((set(flags) | set(add)) - set(remove)))


def shown_flags(volume: Volume, *, offsite: bool, today: str, now: float) -> str:
    """All letters of a Volume, in the order of FLAGS; `today` is the day in UTC, `now` seconds since 1970."""
    letters = volume.flags
    if volume.target:
        letters += "Mo" if now - volume.requested >= OVERDUE_AFTER else "M"
    if volume.move_date:
        letters += "Dd" if volume.move_date <= today else "D"
    if volume.description:
        letters += "N"
    if offsite:
        letters += "O"
    return _ordered(letters)


@lru_cache(maxsize=4096)  # a list shows a few sets of letters thousands of times
def _ordered(letters: str) -> str:
    return "".join(letter for letter in FLAGS if letter in letters)


# ---------------------------------------------------------------------------------------------------------------------
# The rules of fields
# ---------------------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What a text must match, and how that is said."""

    says: str
    fits: Callable[[str], object]
    secret: bool = False  # no error shows the value


def _pattern(says: str, expression: str) -> Rule:
    return Rule(says, re.compile(expression).fullmatch)


def _text(most: int) -> Rule:
    return Rule(f"at most {most} printable characters", lambda text: len(text) <= most and text.isprintable())


def _is_date(text: str) -> bool:
    if not text:
        return True
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _are_networks(text: str) -> bool:
    try:
        return [str(ip_network(one)) for one in text.split()] == text.split()
    except ValueError:
        return False


_ID = "1 to 4 of A-Z and 0-9"
RULES = {
    "customer": _pattern(_ID, "[A-Z0-9]{1,4}"),
    "media": _pattern(_ID, "[A-Z0-9]{1,4}"),
    "repository": _pattern(_ID, "[A-Z0-9]{1,4}"),
    "volume": _pattern("2 to 10 of A-Z, 0-9 and '-', the first no '-'", "[A-Z0-9][A-Z0-9-]{1,9}"),
    "certificate": _pattern(
        "a Repository, a space and a time as 20261123T101500.000001Z",
        r"[A-Z0-9]{1,4}([.][A-Z0-9]{1,4}){2} [0-9]{8}T[0-9]{6}[.][0-9]{6}Z",
    ),
    "user": _pattern("1 to 16 of letters, digits, '.' and '-'", "[A-Za-z0-9.-]{1,16}"),
    "pattern": _pattern("a Customer's id, the beginning of one and '*', or '*'", "[A-Z0-9]{1,4}|[A-Z0-9]{0,3}[*]"),
    "customer description": _text(40),
    "media description": _text(20),
    "repository description": _text(20),
    "volume description": _text(256),
    "user description": _text(40),
    "kind": Rule("one of " + ", ".join(REPOSITORY_KINDS), REPOSITORY_KINDS.__contains__),
    "level": Rule("one of " + ", ".join(LEVELS), LEVELS.__contains__),
    "ids": _pattern("1 to 40 of A-Z, 0-9, '-' and of ? * [ ] !", r"[A-Z0-9?*\[\]!-]{1,40}"),
    "after": _text(40),
    "move date": Rule("a day as YYYY-MM-DD, or empty", _is_date),
    "flags": Rule("letters of " + "".join(sorted(SETTABLE)), lambda text: set(text) <= SETTABLE),
    "letters": Rule("letters of " + "".join(FLAGS), lambda text: set(text) <= set(FLAGS)),
    "networks": Rule("CIDRs separated by spaces, or empty", _are_networks),
    "password": Rule("8 to 128 characters", lambda text: 8 <= len(text) <= 128, secret=True),
}
# What each part of a full name is, by what the whole is.
PARTS = {
    "customer": ("customer",),
    "media": ("customer", "media"),
    "repository": ("customer", "media", "repository"),
    "volume": ("customer", "media", "volume"),
}


def check(field: str, value: str, label: str = "") -> str:
    """The value, where it fits the rule of the field.  Raises Invalid, which calls it `label`, or else by the field."""
    rule = RULES[field]
    if not rule.fits(value):
        raise Invalid(f"{label or field}: must be {rule.says}" + ("" if rule.secret else f", not {shorten(value)}"))
    return value


def check_number(field: str, value: int, least: int, most: int) -> int:
    """The value, where it is in the range, both ends included.  Raises Invalid."""
    if not least <= value <= most:
        raise Invalid(f"{field}: must be {least} to {most}, not {value}")
    return value


def check_name(what: str, name: str) -> str:
    """A full name of a "customer", "media", "repository", "volume" or "certificate".  Raises Invalid."""
    if what not in PARTS:
        return check(what, name)
    parts = name.split(".")
    if len(parts) != len(PARTS[what]):
        form = ".".join(part.upper() for part in PARTS[what])
        raise Invalid(f"{what}: must be written {form}, not {shorten(name)}")
    for field, part in zip(PARTS[what], parts, strict=True):
        check(field, part)
    return name


def parent(name: str) -> str:
    """The full name of what it is part of: of US01.LTO.A00001 US01.LTO."""
    return name.rpartition(".")[0]


def own_id(name: str) -> str:
    """The last part of a full name."""
    return name.rpartition(".")[2]


def customer_of(name: str) -> str:
    """The Customer's id in a full name."""
    return name.partition(".")[0]


def shorten(value: str) -> str:
    """A text that came from outside, as an error quotes it."""
    most = 40
    return repr(value if len(value) <= most else value[:most] + "...")
