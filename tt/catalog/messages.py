"""What travels: the arguments and the result of every operation, and the one table of operations.

Server, client, command line and docs all take them from here.  Arguments are MessagePack maps, results arrays, so that
a later version can add keys and elements at the end.  Names are full names (catalog/model.py); times are whole seconds
since 1970 UTC, days YYYY-MM-DD; "" stands for none.
Must not know how an operation is done.
"""

from typing import Any, NamedTuple

from msgspec import UNSET, Raw, Struct, UnsetType

from tt.catalog.model import ALTER, NONE, READ, WRITE

PAGE = 1000  # entries of a list in one reply
MAX_BATCH = 100  # operations in one `batch`: nobody else is served meanwhile, about 2 ms
MAX_SCANNED = 50_000  # Volumes of one reconciliation


class Arguments(Struct, frozen=True, gc=False, omit_defaults=True):
    """A map; unknown keys are ignored."""


class Result(Struct, array_like=True, frozen=True, gc=False):
    """An array; surplus elements are ignored."""


# ---------------------------------------------------------------------------------------------------------------------
# Results that several operations have
# ---------------------------------------------------------------------------------------------------------------------


class Written(Result, frozen=True):
    """Acknowledges a change: it is on disk, as the row `sequence` of the history, whose chain then had this hash."""

    sequence: int
    hash: bytes  # SHA-256


class CustomerRecord(Result, frozen=True):
    name: str
    description: str


class MediaRecord(Result, frozen=True):
    name: str
    description: str
    max_volumes: int


class RepositoryRecord(Result, frozen=True):
    name: str
    description: str
    kind: str
    offsite: bool
    next: str
    allow_deletes: bool


class VolumeRecord(Result, frozen=True):
    """`flags` are all letters (model.FLAGS); `last` is the sequence number of its newest row of history."""

    name: str
    current: str
    target: str
    scanned: str
    flags: str
    move_date: str
    requested: int
    description: str
    last: int


class Customers(Result, frozen=True):
    entries: list[CustomerRecord]


class MediaTypes(Result, frozen=True):
    entries: list[MediaRecord]


class Repositories(Result, frozen=True):
    entries: list[RepositoryRecord]


class Volumes(Result, frozen=True):
    """A page; `next` is the `after` of the next one, "" behind the last.  Short pages need not be the last."""

    entries: list[VolumeRecord]
    next: str


class HistoryRow(Result, frozen=True):
    """A link of the chain of custody."""

    sequence: int
    time: int  # microseconds since 1970 UTC
    user: str
    interface: str  # what the client calls itself
    source: str  # the peer's address
    event: str  # one of EVENTS; of a wrong scan with the Repository's id behind it: "wrong_scan_in RACK"
    name: str  # of the record: "US01.LTO.A00001"; of users and access with what it is: "user jsmith"
    place: str  # the Repository's id where a Volume was then; "" for all else
    changes: dict[str, tuple[Any, Any]]  # field -> old, new; old is None for what was added, new for what was deleted
    previous: int  # the sequence number of the row before of the same record, 0 for the first
    hash: bytes


class History(Result, frozen=True):
    """A page, newest first; `next` is the `before` of the next one, 0 behind the last."""

    entries: list[HistoryRow]
    next: int


# What a row of history says has happened.
EVENTS = {
    "add": "a record was added",
    "change": "a record was changed",
    "delete": "a record was deleted",
    "move": "a move was asked for",
    "cancel": "a move was called off",
    "scan_out": "scanned out for its move",
    "scan_in": "scanned in at its target, or confirmed where it is",
    "wrong_scan_out": "scanned out where it should not be",
    "wrong_scan_in": "scanned in where it should not be",
    "reconcile": "a Repository was compared with what was scanned there",
}

# ---------------------------------------------------------------------------------------------------------------------
# Sessions
# ---------------------------------------------------------------------------------------------------------------------


class Login(Arguments, frozen=True):
    user: str
    password: str


class LoggedIn(Result, frozen=True):
    user: str
    administrator: bool
    must_change_password: bool


class ChangePassword(Arguments, frozen=True):
    old: str
    new: str


class AccessRecord(Result, frozen=True):
    user: str
    pattern: str
    level: str  # one of model.LEVELS
    catalog: bool


class WhoAmI(Result, frozen=True):
    user: str
    administrator: bool
    source: str
    access: list[AccessRecord]


class SessionRecord(Result, frozen=True):
    id: int
    user: str
    source: str
    interface: str
    since: int
    requests: int


class Sessions(Result, frozen=True):
    entries: list[SessionRecord]


class Disconnect(Arguments, frozen=True):
    id: int


# ---------------------------------------------------------------------------------------------------------------------
# Structure
# ---------------------------------------------------------------------------------------------------------------------


class AddCustomer(Arguments, frozen=True):
    customer: str
    description: str = ""


class ChangeCustomer(Arguments, frozen=True):
    customer: str
    description: str | UnsetType = UNSET


class Scope(Arguments, frozen=True):
    """ "" for all that the user may see."""

    scope: str = ""


class AddMedia(Arguments, frozen=True):
    media: str
    description: str = ""
    max_volumes: int = 0


class ChangeMedia(Arguments, frozen=True):
    media: str
    description: str | UnsetType = UNSET
    max_volumes: int | UnsetType = UNSET


class AddRepository(Arguments, frozen=True):
    repository: str
    description: str = ""
    kind: str = "rack"
    offsite: bool = False
    next: str = ""
    allow_deletes: bool = False


class ChangeRepository(Arguments, frozen=True):
    repository: str
    description: str | UnsetType = UNSET
    kind: str | UnsetType = UNSET
    offsite: bool | UnsetType = UNSET
    next: str | UnsetType = UNSET
    allow_deletes: bool | UnsetType = UNSET


# ---------------------------------------------------------------------------------------------------------------------
# Volumes
# ---------------------------------------------------------------------------------------------------------------------


class AddVolume(Arguments, frozen=True):
    volume: str
    repository: str  # its id
    description: str = ""
    flags: str = ""
    move_date: str = ""


class OneVolume(Arguments, frozen=True):
    volume: str


class ListVolumes(Arguments, frozen=True):
    """Those that fit all that is given; `scope` is a Customer, a Media type, or a Volume with ? * [ ] in its id."""

    scope: str = ""
    repository: str = ""  # a full name: those whose current Repository it is
    target: str = ""  # a full name: those that are to go there
    flags: str = ""  # those that show all of these letters
    moving: bool = False
    overdue: bool = False
    after: str = ""
    limit: int = PAGE


class MoveVolume(Arguments, frozen=True):
    volume: str
    to: str  # a Repository's id
    move_date: str | UnsetType = UNSET
    description: str | UnsetType = UNSET


class Scan(Arguments, frozen=True):
    """`volume` is a full name, or an id alone, then of the Repository's Media type."""

    volume: str
    repository: str


class Scanned(Result, frozen=True):
    """`verdict`: "ok", "wrong" (misplaced; `message` says why) or "unknown" (there is none; no history)."""

    verdict: str
    volume: str
    message: str
    sequence: int
    hash: bytes


class UpdateVolume(Arguments, frozen=True):
    volume: str
    description: str | UnsetType = UNSET
    move_date: str | UnsetType = UNSET
    set_flags: str = ""
    clear_flags: str = ""


class VolumeHistory(Arguments, frozen=True):
    volume: str
    before: int = 0
    limit: int = 100


class MovePending(Arguments, frozen=True):
    """Volumes of the scope with flag p, or whose date has come, go to the Next Repository of where they are."""

    scope: str = ""
    dry_run: bool = False
    after: str = ""


class Moved(Result, frozen=True):
    volume: str
    origin: str
    target: str
    problem: str  # why it was left; "": it moves now


class MovedPage(Result, frozen=True):
    entries: list[Moved]
    next: str
    sequence: int
    hash: bytes


class Reconcile(Arguments, frozen=True):
    repository: str
    volumes: list[str]  # what was scanned: full names or ids


class CertificateRecord(Result, frozen=True):
    id: str
    repository: str
    time: int
    user: str
    correct: int
    surplus: list[str]
    deficit: list[str]


class Reconciled(Result, frozen=True):
    certificate: CertificateRecord
    sequence: int
    hash: bytes


class OneCertificate(Arguments, frozen=True):
    id: str


class OneRepository(Arguments, frozen=True):
    repository: str


class Certificates(Result, frozen=True):
    """Newest first, without the names of Volumes; at most PAGE."""

    entries: list[CertificateRecord]


# ---------------------------------------------------------------------------------------------------------------------
# Users and access, the server, several at once
# ---------------------------------------------------------------------------------------------------------------------


class AddUser(Arguments, frozen=True):
    """Without a password one is made, to be used once."""

    user: str
    description: str = ""
    password: str = ""
    administrator: bool = False
    networks: str = ""


class NewPassword(Result, frozen=True):
    """`password` is "" where it was given by the caller."""

    password: str
    sequence: int
    hash: bytes


class OneUser(Arguments, frozen=True):
    user: str


class ChangeUser(Arguments, frozen=True):
    user: str
    description: str | UnsetType = UNSET
    administrator: bool | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET
    networks: str | UnsetType = UNSET


class UserRecord(Result, frozen=True):
    user: str
    description: str
    administrator: bool
    disabled: bool
    must_change_password: bool
    networks: str


class Users(Result, frozen=True):
    entries: list[UserRecord]


class SetAccess(Arguments, frozen=True):
    """Level "none" without catalog takes the entry away."""

    user: str
    pattern: str
    level: str
    catalog: bool = False


class ListAccess(Arguments, frozen=True):
    user: str = ""


class AccessList(Result, frozen=True):
    entries: list[AccessRecord]


class Statistics(Result, frozen=True):
    """Of what the user may read; administrators get the counts of all."""

    customers: int
    volumes: int
    moving: int  # 0 for who may not read all
    users: int  # 0 for who is no administrator
    sessions: int  # likewise
    sequence: int  # of the newest row of history
    hash: bytes
    commits: int
    size: int  # of the database, bytes


class Batch(Arguments, frozen=True):
    """[operation, arguments] each, all of them writes; all are done, or none."""

    operations: list[tuple[str, Raw]]


class BatchDone(Result, frozen=True):
    results: list[Raw]


# ---------------------------------------------------------------------------------------------------------------------
# The table of operations
# ---------------------------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """One operation."""

    arguments: type[Arguments]
    result: type[Result] | None
    right: str  # one of RIGHTS
    does: str
    writes: bool = False
    batch: bool = False  # may stand in a batch
    errors: tuple[str, ...] = ()  # of ERRORS, besides those of every operation


# Who may: what is asked of the user for the Customer that the arguments name.
RIGHTS = {
    "anyone": NONE,  # also before login
    "user": NONE,  # who has logged in
    "read": READ,
    "write": WRITE,
    "alter": ALTER,
    "catalog": NONE,
    "administrator": NONE,
}

# The words for programs in a reply's error.
ERRORS = {
    "invalid": "a field breaks its rule; the message names both",
    "not_found": "there is no such record, or the user may not see it",
    "exists": "there is such a record already",
    "denied": "the user may see it, but lacks the right",
    "conflict": "the state of the record does not allow it; the message says which",
    "full": "a limit is reached; the message names it",
    "login": "name, password and address together do not let anybody in",
    "login_first": "the operation needs a login",
    "password_change_first": "this password may only be used to set another",
    "busy": "too many of these are under way, of passwords eight from one source: again in a second",
    "storage": "the change could not be stored and has not happened, unless the message says that it may have",
    "malformed": "the arguments are not of the operation's types",
    "unknown_operation": "the server has no operation of that name",
    "too_long": "the result is longer than a message: ask for less",
}

_ALTERS = ("invalid", "not_found", "exists", "denied", "conflict", "full")
_READS = ("invalid", "not_found")
_WRITES = ("invalid", "not_found", "denied", "conflict")

OPERATIONS: dict[str, Spec] = {
    "login": Spec(Login, LoggedIn, "anyone", "Begin a session.", errors=("login", "busy", "conflict")),
    "logout": Spec(Arguments, None, "user", "End the connection."),
    "whoami": Spec(Arguments, WhoAmI, "user", "Who is logged in, from where, with which rights."),
    "password": Spec(
        ChangePassword, Written, "user", "Change one's own password.", writes=True, errors=("invalid", "login", "busy")
    ),
    "customer.add": Spec(AddCustomer, Written, "administrator", "Add a Customer.", True, True, _ALTERS),
    "customer.list": Spec(Arguments, Customers, "user", "The Customers that one may read."),
    "customer.change": Spec(ChangeCustomer, Written, "administrator", "Describe a Customer.", True, True, _WRITES),
    "media.add": Spec(AddMedia, Written, "catalog", "Add a Media type.", True, True, _ALTERS),
    "media.list": Spec(Scope, MediaTypes, "user", "The Media types of a Customer, or of all.", errors=_READS),
    "media.change": Spec(ChangeMedia, Written, "catalog", "Change a Media type.", True, True, _WRITES),
    "repository.add": Spec(AddRepository, Written, "catalog", "Add a Repository.", True, True, _ALTERS),
    "repository.list": Spec(
        Scope, Repositories, "user", "The Repositories of a Media type, Customer, all.", errors=_READS
    ),
    "repository.change": Spec(ChangeRepository, Written, "catalog", "Change a Repository.", True, True, _WRITES),
    "volume.add": Spec(AddVolume, Written, "alter", "Add a Volume, in a Repository.", True, True, _ALTERS),
    "volume.get": Spec(OneVolume, VolumeRecord, "read", "One Volume.", errors=_READS),
    "volume.list": Spec(ListVolumes, Volumes, "user", "Volumes, a page at a time, by name.", errors=_READS),
    "volume.move": Spec(MoveVolume, Written, "write", "Ask for a move.", True, True, _WRITES),
    "volume.cancel": Spec(OneVolume, Written, "write", "Call a move off.", True, True, _WRITES),
    "volume.scan_out": Spec(
        Scan, Scanned, "write", "A Volume leaves its Repository for its move.", True, True, _WRITES
    ),
    "volume.scan_in": Spec(Scan, Scanned, "write", "A Volume has come to a Repository.", True, True, _WRITES),
    "volume.update": Spec(UpdateVolume, Written, "write", "Change description, flags, move date.", True, True, _WRITES),
    "volume.history": Spec(VolumeHistory, History, "read", "What happened to a Volume.", errors=_READS),
    "volume.delete": Spec(OneVolume, Written, "alter", "Delete, where the Repository allows it.", True, True, _WRITES),
    "volume.move_pending": Spec(MovePending, MovedPage, "user", "Start the moves that are due.", True, False, _WRITES),
    "reconcile": Spec(
        Reconcile, Reconciled, "write", "Compare a Repository with what was scanned there.", True, False, _WRITES
    ),
    "certificate.get": Spec(OneCertificate, CertificateRecord, "read", "One reconciliation.", errors=_READS),
    "certificate.list": Spec(
        OneRepository, Certificates, "read", "The reconciliations of a Repository.", errors=_READS
    ),
    "user.add": Spec(
        AddUser,
        NewPassword,
        "administrator",
        "Add a user.",
        True,
        False,
        ("invalid", "exists", "denied", "full", "busy"),
    ),
    "user.list": Spec(Arguments, Users, "administrator", "All users."),
    "user.change": Spec(ChangeUser, Written, "administrator", "Change a user.", True, False, _WRITES),
    "user.reset": Spec(
        OneUser,
        NewPassword,
        "administrator",
        "Give a user a password to be used once.",
        True,
        False,
        ("not_found", "denied", "busy"),
    ),
    "access.set": Spec(SetAccess, Written, "administrator", "Give or take a right.", True, False, (*_WRITES, "full")),
    "access.list": Spec(ListAccess, AccessList, "administrator", "The rights of a user, or of all.", errors=_READS),
    "session.list": Spec(Arguments, Sessions, "administrator", "Who is logged in now."),
    "session.disconnect": Spec(Disconnect, None, "administrator", "End a session.", errors=("not_found",)),
    "statistics": Spec(Arguments, Statistics, "user", "How much there is, and how far the history goes."),
    "batch": Spec(Batch, BatchDone, "user", "Several writes as one: all or none.", True, False, _ALTERS),
}

_PASSWORDS = {"password", "old", "new"}
# Operations with a password among the arguments or in the result: no message with one of them is compressed.
SECRET = frozenset(
    name
    for name, spec in OPERATIONS.items()
    for fields in (spec.arguments, spec.result)
    if fields is not None and not _PASSWORDS.isdisjoint(fields.__struct_fields__)
)
