"""Users and their access entries: added, listed, changed, given a password to be used once; never deleted.

Rules: only administrators come here, and tapemaster is changed by tapemaster alone.  A hash is there before the change
that keeps it begins, and what was true before is asked again then; the right, also between the slices of a list.
Must not know who logs in, or how a password is hashed.
"""

from collections.abc import Callable
from ipaddress import ip_address, ip_network

from msgspec.structs import replace

from tt.catalog.messages import (
    AccessList,
    AccessRecord,
    AddUser,
    Arguments,
    ChangeUser,
    ListAccess,
    NewPassword,
    OneUser,
    SetAccess,
    UserRecord,
    Written,
)
from tt.catalog.messages import Users as UserList
from tt.catalog.model import LEVELS, NONE, SUPERUSER, Access, Invalid, User, check, shorten
from tt.catalog.passwords import Passwords, one_time_password
from tt.catalog.rights import acknowledged, author
from tt.catalog.sessions import Sessions
from tt.catalog.steps import Steps, hashed
from tt.catalog.store import Change, Store
from tt.catalog.structure import given
from tt.dispatch import OperationError, Session

MAX_USERS = 10_000
MAX_ACCESS = 1000  # entries of one user
MAX_NETWORKS = 1000  # characters
SLICE = 500  # entries of a list, before others are served


class Users:
    """Each method is an operation, of the name that catalog/accounts.py gives it."""

    def __init__(
        self, store: Store, passwords: Passwords, sessions: Sessions, permit: Callable[[Session, str], None]
    ) -> None:
        """`permit`: raises OperationError where the session may not do the operation of that name."""
        self._store = store
        self._passwords = passwords
        self._sessions = sessions
        self._permit = permit

    def add(self, session: Session, asked: AddUser) -> Steps:
        user = _checked(User(check("user", asked.user), asked.description, networks=asked.networks))
        if asked.password:
            check("password", asked.password)
        _must_be_new(self._store, self._store, asked.user)
        once = "" if asked.password else one_time_password()
        job = self._passwords.make(asked.password or once, session.source)
        yield from hashed(self._passwords, job)
        yield from self._store.idle()
        self._permit(session, "user.add")
        with self._store.change(author(session)) as change:
            _must_be_new(self._store, change, asked.user)
            user = replace(user, password=job.made, administrator=asked.administrator, must_change=bool(once))
            row = change.put(user, "add")
        self._sessions.when_stored(change)
        return acknowledged((change.pending,), NewPassword(once, *row))

    def list(self, session: Session, _: Arguments) -> Steps:
        entries: list[UserRecord] = []
        for number, user in enumerate(self._store.all(User), 1):
            flags = user.administrator, user.disabled, user.must_change
            entries.append(UserRecord(user.name, user.description, *flags, user.networks))
            if number % SLICE == 0:
                yield None
                self._permit(session, "user.list")
        return UserList(entries)

    def change(self, session: Session, asked: ChangeUser) -> object:
        name = asked.user
        with self._store.change(author(session)) as change:
            user = _checked(replace(find(change, name), **given(asked, "user")))
            _may_change(session, name)
            if name == SUPERUSER and (user.disabled or not user.administrator):
                raise OperationError("conflict", f"{SUPERUSER} stays an administrator, and enabled")
            if name == session.account.name and not may_enter(user, session.address):
                raise OperationError("conflict", f"it would lock out {name} himself, from {session.address}")
            row = change.put(user, "change")
        self._sessions.when_stored(
            change, lambda other: other.account.name == name and not may_enter(user, other.address)
        )
        return acknowledged((change.pending,), Written(*row))

    def reset(self, session: Session, asked: OneUser) -> Steps:
        find(self._store, asked.user)
        _may_change(session, asked.user)
        once = one_time_password()
        job = self._passwords.make(once, session.source)
        yield from hashed(self._passwords, job)
        yield from self._store.idle()
        self._permit(session, "user.reset")
        with self._store.change(author(session)) as change:
            row = change.put(replace(find(change, asked.user), password=job.made, must_change=True), "change")
        self._sessions.when_stored(change, lambda other: other.account.name == asked.user and other is not session)
        return acknowledged((change.pending,), NewPassword(once, *row))

    # ---- access -----------------------------------------------------------------------------------------------------

    def set_access(self, session: Session, asked: SetAccess) -> object:
        check("pattern", asked.pattern)
        level = LEVELS.index(check("level", asked.level))
        name = f"{asked.user} {asked.pattern}"
        with self._store.change(author(session)) as change:
            find(change, asked.user)
            if asked.user == SUPERUSER:
                raise OperationError("conflict", f"{SUPERUSER} may everything, without an entry")
            entry = change.get(Access, name)
            if level != NONE or asked.catalog:
                if entry is None and len(self._store.all(Access, f"{asked.user} ")) >= MAX_ACCESS:
                    raise OperationError("full", f"{asked.user} has {MAX_ACCESS} entries: that is the most")
                entry = replace(entry or Access(name), level=level, catalog=asked.catalog)
                row = change.put(entry, "change" if entry.row else "add")
            elif entry is not None:
                row = change.delete(entry, "delete")
            else:
                raise OperationError("not_found", f"{asked.user} has no entry {asked.pattern}")
        self._sessions.when_stored(change)
        return acknowledged((change.pending,), Written(*row))

    def list_access(self, session: Session, asked: ListAccess) -> Steps:
        if asked.user:
            find(self._store, asked.user)
        entries: list[AccessRecord] = []
        for number, entry in enumerate(self._store.all(Access, f"{asked.user} " if asked.user else ""), 1):
            entries.append(shown(entry))
            if number % SLICE == 0:
                yield None
                self._permit(session, "access.list")
        return AccessList(entries)


def find(records: Store | Change, name: str) -> User:
    """Raises OperationError: not_found."""
    user = records.get(User, name)
    if user is None:
        raise OperationError("not_found", f"there is no user {shorten(name)}")
    return user


def may_enter(user: User, address: str) -> bool:
    """Whether this user is let in from this address, with his password."""
    if user.disabled or not user.password:
        return False
    if not user.networks:
        return True
    peer = ip_address(address)
    return any(peer in ip_network(network) for network in user.networks.split())


def shown(entry: Access) -> AccessRecord:
    user, _, pattern = entry.name.partition(" ")
    return AccessRecord(user, pattern, LEVELS[entry.level], entry.catalog)


def _must_be_new(store: Store, records: Store | Change, name: str) -> None:
    if records.get(User, name) is not None:
        raise OperationError("exists", f"there is a user {name} already")
    if len(store.all(User)) >= MAX_USERS:
        raise OperationError("full", f"there are {MAX_USERS} users: that is the most")


def _may_change(session: Session, name: str) -> None:
    if name == SUPERUSER != session.account.name:
        raise OperationError("denied", f"only {SUPERUSER} may change {SUPERUSER}")


def _checked(user: User) -> User:
    check("user description", user.description, "description")
    if len(user.networks) > MAX_NETWORKS:
        raise Invalid(f"networks: must be at most {MAX_NETWORKS} characters, not {len(user.networks)}")
    check("networks", user.networks)
    return user
