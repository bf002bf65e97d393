"""Accounts: who gets in, and the operations on passwords, users, access and sessions.

    login -> a password is checked beside the loop -> right: the session has an account
                                                   -> wrong: counted, the answer held back, at last a time-out

Rules: an unknown user, a disabled one, one from a wrong network and a wrong password cost the same work and get the
same answer.  A hash is there before the change that keeps it begins, and what was true before is asked again then.
Once a change of a user is committed, all rights are asked anew and sessions end that would not be let in any more.
Must not know how a password is hashed, how a change is stored, or what a time-out is.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import GeneratorType
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from tt import keys, log
from tt.catalog import login_budget
from tt.catalog.login_budget import LoginBudget
from tt.catalog.messages import (
    ERRORS,
    OPERATIONS,
    AccessRecord,
    Arguments,
    ChangePassword,
    Disconnect,
    LoggedIn,
    Login,
    NewPassword,
    SessionRecord,
    WhoAmI,
    Written,
)
from tt.catalog.messages import Sessions as SessionList
from tt.catalog.model import ALTER, LEVELS, SUPERUSER, Access, Invalid, User, check
from tt.catalog.passwords import Job, Passwords, hash_password, one_time_password, same_password
from tt.catalog.rights import Account, Rights, acknowledged, author, told
from tt.catalog.sessions import ENDED, Sessions
from tt.catalog.steps import Steps, answered, drive, hashed, settle
from tt.catalog.store import Author, Store, StoreError
from tt.catalog.timer import Timer
from tt.catalog.users import SLICE, Users, find, may_enter, shown
from tt.dispatch import Operation, OperationError, Session, Write
from tt.pending import Later

FIRST_PASSWORD = "first-password"  # noqa: S105 - a file in the data directory
HOST = Author("", "tt", "local")  # who works on the server's own host: nobody's account


class Settings(login_budget.Settings, Protocol):
    """Of tt/config.py."""

    @property
    def vouching(self) -> bool: ...


class Accounts:
    """All of it belongs to the loop's thread.

    `descriptor` is readable when `turn` has something to do.  `operations` have the names of messages.OPERATIONS.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        store: Store,
        passwords: Passwords,
        data: Path,
        settings: Settings,
        vouch: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`vouch`: called with the source of each good login, where vouching is on; `clock`: monotonic seconds."""
        self.rights = Rights(store)
        self._store = store
        self._passwords = passwords
        self._settings = settings
        self._vouch = vouch
        self._budget = LoginBudget(settings, clock)
        self._sessions = Sessions(self.rights)
        self._first = data / FIRST_PASSWORD
        self._timer = Timer(clock)
        self.descriptor = self._timer.descriptor
        self.turn = self._timer.turn
        self.close = self._timer.close

    def configure(self, settings: Settings) -> None:
        """Take a new configuration."""
        self._settings = self._budget.settings = settings

    def sessions(self) -> int:
        """How many have logged in."""
        return len(self._sessions)

    def ended(self, session: Session) -> None:
        """A session that had an account is over."""
        self._sessions.remove(session)

    def operations(self) -> Mapping[str, Operation]:
        """A callable for each of the operations that are about accounts."""
        users = Users(self._store, self._passwords, self._sessions, self._permit)
        steps: dict[str, Callable[[Session, Any], object]] = {
            "login": self._login,
            "logout": self._logout,
            "whoami": self._whoami,
            "password": self._password,
            "user.add": users.add,
            "user.list": users.list,
            "user.reset": users.reset,
            "access.list": users.list_access,
            "session.list": self._list_sessions,
            "session.disconnect": self._disconnect,
        }
        writes: dict[str, Callable[[Session, Any], object]] = {
            "user.change": users.change,
            "access.set": users.set_access,
        }
        operations = {name: self._operation(name, does) for name, does in steps.items()}
        busy = lambda: self._store.busy  # noqa: E731
        return operations | {name: Write(self._operation(name, does), busy) for name, does in writes.items()}

    def _operation(self, name: str, does: Callable[[Session, Any], object]) -> Operation:
        decode = msgspec.msgpack.Decoder(OPERATIONS[name].arguments).decode

        def run(session: Session, arguments: msgspec.Raw) -> object:
            self._permit(session, name)
            asked = decode(arguments)
            try:
                result = does(session, asked)
            except (Invalid, StoreError) as error:
                raise OperationError(*told(error)) from error
            return answered(result) if isinstance(result, GeneratorType) else result

        return run

    def _permit(self, session: Session, name: str) -> None:
        """Raises OperationError: login_first, password_change_first, denied."""
        if name == "login":
            return
        if name in ("logout", "password", "whoami") and session.account is not None:  # also before a change of password
            return
        account = self.rights.account(session)
        if OPERATIONS[name].right == "administrator" and not account.administrator:
            raise OperationError("denied", f"{account.name} is no administrator")

    # -----------------------------------------------------------------------------------------------------------------
    # One's own session
    # -----------------------------------------------------------------------------------------------------------------

    def _login(self, session: Session, asked: Login) -> Steps:
        if session.account is not None:
            raise OperationError("conflict", f"logged in as {session.account.name} already: log out first")
        self._may_try(session)
        user = self._store.get(User, asked.user)
        stored = user.password if user is not None and may_enter(user, session.address) else ""
        first = self._budget.vouched(session.source)
        job = self._passwords.check(asked.password, stored, session.source, asked.user, first=first)
        yield from self._prove(session, asked.user, asked.password, user, job)
        if session.closing:  # its end may have been told already: a session that is added now would never be removed
            raise OperationError("conflict", "the connection has ended")
        assert user is not None  # noqa: S101 - nobody's password is right
        session.account = Account(user.name)
        session.log_in()
        self._sessions.add(session)
        if self._settings.vouching:
            self._vouch(session.source)
        if user.name == SUPERUSER:
            self._forget_first()
        if job.made:
            drive(self._keep_stronger(user, job.made, author(session)))
        account = self.rights.current(session.account)
        return LoggedIn(account.name, account.administrator, account.must_change)

    def _may_try(self, session: Session) -> None:
        """Who used up his tries and left before he was told is told now."""
        if self._budget.used_up(session.source):
            session.close("login_failed")
            raise OperationError("login", ERRORS["login"])

    def _prove(self, session: Session, name: str, password: str, user: User | None, job: Job) -> Steps:
        """Waits until the password is checked, and where it is wrong until that may be said.

        Raises OperationError: login, busy.
        """
        source = session.source
        right, delay = False, 0.0

        def judge() -> None:
            # Not in the steps below: those of a connection that is gone are never gone on with, and would cost nothing.
            nonlocal right, delay
            if job.error is not None:
                return
            right = job.right
            if right:
                self._budget.succeeded(source, name)
                return
            delay = self._budget.failed(source, name, password)
            log.event(logging.INFO, "login failed", user=name if user is not None else None, source=session.address)

        job.when_done(judge)
        yield from hashed(self._passwords, job)
        if right and self._still(user, session.address):
            return
        if self._budget.used_up(source):
            session.close("login_failed")
        elif delay:
            yield self._timer.after(delay)
        raise OperationError("login", ERRORS["login"])

    def _still(self, user: User | None, address: str) -> bool:
        """Whether this user's password is what it was, and he would be let in."""
        now = self._store.get(User, user.name) if user is not None else None
        if now is None or user is None:
            return False
        return same_password(now.password, user.password) and may_enter(now, address)

    def _keep_stronger(self, user: User, made: str, by: Author) -> Steps:
        yield from self._store.idle()
        with self._store.change(by) as change:
            now = change.get(User, user.name)
            if now is not None and now.password == user.password:
                change.put(replace(now, password=made), "change")

    def _logout(self, session: Session, _: Arguments) -> None:
        session.close(ENDED)

    def _whoami(self, session: Session, _: Arguments) -> WhoAmI:
        account = self.rights.current(session.account)
        if account.name == SUPERUSER:
            access = [AccessRecord(SUPERUSER, "*", LEVELS[ALTER], catalog=True)]
        else:
            access = [shown(entry) for entry in self._store.all(Access, f"{account.name} ")]
        return WhoAmI(account.name, account.administrator, session.address, access)

    def _password(self, session: Session, asked: ChangePassword) -> Steps:
        check("password", asked.new, "new")
        if asked.new == asked.old:
            raise Invalid("new: must be another than the old password")
        self._may_try(session)
        name = session.account.name
        user = self._store.get(User, name)
        stored = user.password if user is not None and may_enter(user, session.address) else ""
        job = self._passwords.change(asked.old, stored, asked.new, session.source)
        yield from self._prove(session, name, asked.old, user, job)
        yield from self._store.idle()
        with self._store.change(author(session)) as change:
            now = find(change, name)
            if not same_password(now.password, stored):
                raise OperationError("login", ERRORS["login"])
            row = change.put(replace(now, password=job.made, must_change=False), "change")
        self._sessions.when_stored(change, lambda other: other.account.name == name and other is not session)
        return acknowledged((change.pending,), Written(*row))

    # -----------------------------------------------------------------------------------------------------------------
    # Sessions
    # -----------------------------------------------------------------------------------------------------------------

    def _list_sessions(self, session: Session, _: Arguments) -> Steps:
        entries: list[SessionRecord] = []
        for number, (identity, each, since) in enumerate(self._sessions, 1):
            user, interface = each.account.name, each.hello.name
            entries.append(SessionRecord(identity, user, each.address, interface, since, each.requests))
            if number % SLICE == 0:
                yield None
                self._permit(session, "session.list")
        return SessionList(entries)

    def _disconnect(self, _session: Session, asked: Disconnect) -> None:
        session = self._sessions.find(asked.id)
        if session is None:
            raise OperationError("not_found", f"there is no session {asked.id} (any more)")
        session.close(ENDED)

    # -----------------------------------------------------------------------------------------------------------------
    # The host: the first password, and one for who has lost his
    # -----------------------------------------------------------------------------------------------------------------

    def first(self) -> None:
        """Where there is no user: makes tapemaster, and leaves a one-time password in the data directory (0600).

        For before the loop runs: it takes the time of a hash and a commit.  Raises StoreError.
        """
        if self._store.all(User):
            return
        once = one_time_password()
        try:  # first the file: a user whose password nobody knows would be worse than a password without a user
            keys.write_file(self._first, f"{once}\n".encode(), 0o600, replace=True)
        except OSError as error:
            raise StoreError(f"{self._first}: not written: {error.strerror}: make the directory writable") from error
        with self._store.change(HOST) as change:
            change.put(User(SUPERUSER, "", hash_password(once), administrator=True, must_change=True), "add")
        settle(self._store, change.pending)
        log.event(logging.INFO, "one-time password of tapemaster written", file=str(self._first))

    def reset(self, name: str, by: Author) -> Later:
        """A one-time password for a user, asked for on this host: a messages.NewPassword.

        tapemaster, who has nobody else to ask, may then come from anywhere.  OperationError: not_found, busy, storage.
        """
        return drive(answered(self._reset(name, by)))

    def _reset(self, name: str, by: Author) -> Steps:
        find(self._store, name)
        once = one_time_password()
        job = self._passwords.make(once)
        yield from hashed(self._passwords, job)
        yield from self._store.idle()
        with self._store.change(by) as change:
            row = change.put(_with_once(find(change, name), job.made), "change")
        self._sessions.when_stored(change, lambda session: session.account.name == name)
        yield change.pending
        if change.pending.error is not None:
            raise change.pending.error
        if name == SUPERUSER:
            self._forget_first()
        return NewPassword(once, *row)

    def _forget_first(self) -> None:
        try:
            self._first.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            log.event(
                logging.ERROR, "first password used, and its file not removed", file=str(self._first),
                error=error.strerror, remedy="remove it",
            )  # fmt: skip


def reset_in_file(store: Store, data: Path, name: str) -> NewPassword:
    """Does what Accounts.reset does, where no server runs on this store.  Raises OperationError, StoreError."""
    user = find(store, name)
    once = one_time_password()
    made = hash_password(once)
    with store.change(HOST) as change:
        row = change.put(_with_once(user, made), "change")
    settle(store, change.pending)
    if name == SUPERUSER:
        with suppress(OSError):
            (data / FIRST_PASSWORD).unlink()
    return NewPassword(once, *row)


def _with_once(user: User, made: str) -> User:
    networks = "" if user.name == SUPERUSER else user.networks
    return replace(user, password=made, must_change=True, networks=networks)
