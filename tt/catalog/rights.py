"""Who may see and do what: accounts, their rights, and the records as far as an account may reach them.

A right belongs to a Customer; entries name Customers by pattern (US01, US*, *), and of all that fit the strongest
counts.  Catalog includes Read.  `tapemaster` may everything; administrators manage users, access and Customers.
Rules: operations get records only from a `Reader` or a `Writer`, which ask the right that the table of operations
(catalog/messages.py) names; what a user may not read does not exist for him.  An account's rights are a snapshot that
holds until a User or an Access entry changes (`Rights.changed`), so that a look-up costs nothing and is never stale.
Must not know how an operation is done, how users log in, or how records are stored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from tt import dispatch
from tt.catalog.messages import RIGHTS, Written
from tt.catalog.model import (
    ALTER,
    NONE,
    READ,
    SUPERUSER,
    Access,
    Certificate,
    Customer,
    Invalid,
    Media,
    Record,
    Repository,
    User,
    Volume,
    check_name,
    customer_of,
)
from tt.catalog.store import Author, Change, Store, StoreError
from tt.dispatch import OperationError, Session
from tt.pending import Later, Pending

LEVELS_KEPT = 1000  # Customers whose level an account's snapshot holds; it is emptied beyond

# The level that gives a right; no level gives the others.
_ENOUGH = {right: level or READ for right, level in RIGHTS.items()} | {"catalog": ALTER + 1, "administrator": ALTER + 1}

R = TypeVar("R", bound=Record)
KINDS: dict[type, str] = {
    Customer: "customer", Media: "media", Repository: "repository", Volume: "volume", Certificate: "certificate",
}  # fmt: skip
TITLES = {
    "customer": "Customer", "media": "Media type", "repository": "Repository", "volume": "Volume",
    "certificate": "Certificate",
}  # fmt: skip


class Account:
    """A user who has logged in.  What it holds besides the name is a snapshot: use it behind `Rights.current`."""

    __slots__ = ("administrator", "catalogs", "levels", "must_change", "name", "patterns", "prefixes", "version")

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = -1  # of Rights, when the rest was true
        self.administrator = False
        self.must_change = False
        self.patterns: dict[str, int] = {}  # pattern -> level
        self.catalogs: frozenset[str] = frozenset()  # the patterns with catalog
        self.levels: dict[str, int] = {}  # Customer -> level, as far as asked
        self.prefixes: tuple[str, ...] = ()  # what begins the names that it may read; none begins another


class Rights:
    """What accounts may do, by the committed records."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.version = 0

    def changed(self) -> None:
        """A User or an Access entry has: call it when the change is committed."""
        self.version += 1

    def account(self, session: Session) -> Account:
        """Who has logged in.  Raises OperationError: login_first, password_change_first."""
        account = session.account
        if account is None:
            raise OperationError("login_first", "log in first")
        if self.current(account).must_change:
            raise OperationError("password_change_first", "change the password first: it was given to be used once")
        return account  # type: ignore[no-any-return]

    def current(self, account: Account) -> Account:
        """The account, with a snapshot that is true now."""
        if account.version != self.version:
            self._refresh(account)
        return account

    def level(self, account: Account, customer: str) -> int:
        """NONE, READ, WRITE or ALTER, of a current account."""
        level = account.levels.get(customer)
        if level is None:
            level = max((account.patterns.get(pattern, NONE) for pattern in _patterns(customer)), default=NONE)
            if len(account.levels) >= LEVELS_KEPT:
                account.levels.clear()
            account.levels[customer] = level
        return level

    def permits(self, account: Account, right: str, customer: str) -> bool:
        """Whether a current account has one of messages.RIGHTS for a Customer."""
        if right == "administrator":
            return account.administrator
        if right == "catalog":
            return not account.catalogs.isdisjoint(_patterns(customer))
        return self.level(account, customer) >= _ENOUGH[right]

    def _refresh(self, account: Account) -> None:
        user = self._store.get(User, account.name)
        enabled = user is not None and not user.disabled
        account.must_change = user is not None and user.must_change
        if account.name == SUPERUSER:
            entries = [Access(f"{SUPERUSER} *", ALTER, catalog=True)]
        else:
            entries = self._store.all(Access, f"{account.name} ")
        usable = {entry.name.partition(" ")[2]: entry for entry in entries} if enabled else {}
        account.administrator = enabled and user is not None and (user.administrator or account.name == SUPERUSER)
        account.patterns = {pattern: max(entry.level, READ * entry.catalog) for pattern, entry in usable.items()}
        account.catalogs = frozenset(pattern for pattern, entry in usable.items() if entry.catalog)
        account.levels = {}
        account.prefixes = _prefixes(pattern for pattern, level in account.patterns.items() if level >= READ)
        account.version = self.version


def _patterns(customer: str) -> list[str]:
    """Those that name this Customer."""
    return [customer, *(customer[:length] + "*" for length in range(min(len(customer), 3) + 1))]


def _prefixes(patterns: Iterable[str]) -> tuple[str, ...]:
    """What begins the full names in the Customers of these patterns; none begins another."""
    found: list[str] = []
    for prefix in sorted(pattern[:-1] if pattern.endswith("*") else f"{pattern}." for pattern in patterns):
        if not found or not prefix.startswith(found[-1]):
            found.append(prefix)
    return tuple(found)


class Desk(NamedTuple):
    """What every operation works with; `clock` gives seconds since 1970 UTC."""

    store: Store
    rights: Rights
    clock: Callable[[], float]


class Reader:
    """The committed records for one operation of one current account."""

    __slots__ = ("account", "desk", "get", "now", "right", "rights", "store")

    def __init__(self, desk: Desk, account: Account, right: str) -> None:
        self.desk = desk
        self.store, self.rights, clock = desk
        self.account = account
        self.right = right  # what the operation needs: one of messages.RIGHTS
        self.now = clock()  # seconds since 1970 UTC
        self.get = self.store.get

    def record(self, kind: type[R], name: str) -> R:
        """The record.  Raises Invalid, or OperationError: not_found, where the user may not read it too; denied."""
        record = self.get(kind, name)
        if record is not None and self.may(name):
            return record
        what = KINDS[kind]
        if record is None:
            check_name(what, name)
        self.permit(what, name)
        raise missing(what, name)

    def may(self, name: str) -> bool:
        """Whether the account has the right for the Customer in the name."""
        customer = name.partition(".")[0]
        level = self.account.levels.get(customer)
        if level is not None and level >= _ENOUGH[self.right]:
            return True
        return self.rights.permits(self.account, self.right, customer)

    def permit(self, what: str, name: str) -> None:
        """Raises OperationError where the account lacks the right for the Customer in the name."""
        if self.may(name):
            return
        customer = customer_of(name)
        if self.right != "administrator" and self.rights.level(self.account, customer) < READ:
            raise missing(what, name)
        raise OperationError("denied", f"{self.account.name} has no {self.right} right for Customer {customer}")


class Writer(Reader):
    """The same with what was changed since, and a change to make more in."""

    __slots__ = ("change",)

    def __init__(self, desk: Desk, account: Account, right: str, change: Change) -> None:
        super().__init__(desk, account, right)
        self.change = change
        self.get = change.get

    def must_be_new(self, kind: type[Record], name: str) -> None:
        if self.get(kind, name) is not None:
            raise OperationError("exists", f"there is a {TITLES[KINDS[kind]]} {name} already")

    def put(self, record: Record, event: str) -> Written:
        return Written(*self.change.put(record, event))

    def delete(self, record: Record, event: str) -> Written:
        return Written(*self.change.delete(record, event))


class Editor(Reader):
    """The committed records, for work of several steps that makes a change in some of them.

    It reads what is committed, gives None or waits (`yield from at.store.idle()`), and changes with `at.writing()` at
    once after that: what it read before may have changed, and the account's rights too.
    """

    __slots__ = ("author",)

    def __init__(self, desk: Desk, account: Account, right: str, author: Author) -> None:
        super().__init__(desk, account, right)
        self.author = author

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        account = self.rights.current(self.account)
        with self.store.change(self.author) as change:
            yield Writer(self.desk, account, self.right, change)


def acknowledged(pendings: Sequence[Pending], result: object) -> object:
    """The result, once all of these changes are on disk."""

    def finished() -> object:
        for pending in pendings:
            if pending.error is not None:
                raise OperationError("storage", str(pending.error))
        return result

    return Later(pendings[-1], finished) if pendings else result


def author(session: Session) -> Author:
    """Who makes a change, as the history names him."""
    return Author(session.account.name, session.hello.name, session.address)


ANSWERED = (Invalid, StoreError, *dispatch.ANSWERED)


def told(error: Exception) -> tuple[str, str]:
    """The code and the message with which one of ANSWERED is answered."""
    if isinstance(error, Invalid):
        return "invalid", str(error)
    if isinstance(error, StoreError):
        return "storage", str(error)
    return dispatch.told(error)


def missing(what: str, name: str) -> OperationError:
    return OperationError("not_found", f"there is no {TITLES[what]} {name}")
