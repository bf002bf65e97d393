"""The catalogue as the dispatcher sees it: a callable for each operation of the table in catalog/messages.py.

What every operation has in common is here: who is logged in, arguments decoded, the right that the table names handed
to the Reader or Writer which asks it, errors as words, and for writes the change, whose acknowledgement waits for the
disk.  What each of them does stands in structure, volumes, reconcile and accounts.
Rules: a change is made in one go, without a yield in it; a batch is one change.  An operation of several steps reads,
gives None or waits, and makes its changes at the end.
Must not know SQL, sockets, or how a session travels.
"""

import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

import msgspec

from tt.catalog import reconcile, structure, volumes
from tt.catalog.messages import (
    MAX_BATCH,
    OPERATIONS,
    SECRET,
    Arguments,
    Batch,
    BatchDone,
    OneVolume,
    Statistics,
)
from tt.catalog.model import Customer, Invalid, Media, User, shorten
from tt.catalog.rights import ANSWERED, Account, Desk, Editor, Reader, Rights, Writer, acknowledged, author, told
from tt.catalog.steps import answered
from tt.catalog.store import Store, StoreError
from tt.dispatch import Operation, OperationError, Read, Secret, Session, Write

# Each gives one record of what is committed, or a few.
READS: dict[str, Callable[[Reader, Any], object]] = {
    "certificate.get": reconcile.get_certificate,
    "certificate.list": reconcile.list_certificates,
}
# Each looks at many records in slices.
LISTS: dict[str, Callable[[Reader, Any], Generator[Any, None, object]]] = {
    "customer.list": structure.list_customers,
    "media.list": structure.list_media,
    "repository.list": structure.list_repositories,
    "volume.list": volumes.list_volumes,
    "volume.history": volumes.history,
}
# Each makes one change in one go; all of them may stand in a batch.
WRITES: dict[str, Callable[[Writer, Any], object]] = {
    "customer.add": structure.add_customer,
    "customer.change": structure.change_customer,
    "media.add": structure.add_media,
    "media.change": structure.change_media,
    "repository.add": structure.add_repository,
    "repository.change": structure.change_repository,
    "volume.add": volumes.add,
    "volume.move": volumes.move,
    "volume.cancel": volumes.cancel,
    "volume.scan_out": volumes.scan_out,
    "volume.scan_in": volumes.scan_in,
    "volume.update": volumes.update,
    "volume.delete": volumes.delete,
}
# Each looks at many records in slices, and makes its changes at the end.
EDITS: dict[str, Callable[[Editor, Any], Generator[Any, None, object]]] = {
    "volume.move_pending": volumes.move_pending,
    "reconcile": reconcile.reconcile,
}
# Arguments that are not decoded as the table says, but in part once the right was asked.
DECODED: dict[str, type[msgspec.Struct]] = {"reconcile": reconcile.Asked}

_encode = msgspec.msgpack.Encoder().encode


class Accounts(Protocol):
    """What is needed of catalog/accounts.py, which has the operations on sessions, users and access."""

    rights: Rights

    def operations(self) -> Mapping[str, Operation]: ...

    def sessions(self) -> int: ...


class Catalog:
    """The operations on one store; `clock` gives seconds since 1970 UTC."""

    def __init__(self, store: Store, accounts: Accounts, clock: Callable[[], float] = time.time) -> None:
        self._accounts = accounts
        self._desk = Desk(store, accounts.rights, clock)

    def operations(self) -> dict[str, Operation]:
        """A callable for each name in messages.OPERATIONS."""
        operations = {
            name: Secret(does) if name in SECRET else does for name, does in self._accounts.operations().items()
        }
        operations |= {name: self._reading(name, does) for name, does in READS.items()}
        operations |= {name: self._listing(name, does) for name, does in LISTS.items()}
        operations |= {name: self._writing(name, does) for name, does in WRITES.items()}
        operations |= {name: self._editing(name, does) for name, does in EDITS.items()}
        operations["volume.get"] = self._getting()
        operations["statistics"] = self._listing("statistics", self._statistics)
        operations["batch"] = self._batching()
        return operations

    # ---- what operations have in common -----------------------------------------------------------------------------

    def _reading(self, name: str, does: Callable[[Reader, Any], object]) -> Operation:
        desk, (right, decode) = self._desk, _asked(name)
        at = Reader(desk, Account(""), right)  # one for all, since none waits: to make one costs a fifth of volume.get
        account_of, clock = desk.rights.account, desk.clock

        def run(session: Session, arguments: msgspec.Raw) -> object:
            at.account = account_of(session)
            at.now = clock()
            asked = decode(arguments)
            try:
                return does(at, asked)
            except (Invalid, StoreError) as error:
                raise OperationError(*told(error)) from error

        return Read(run)

    def _getting(self) -> Operation:
        """volume.get, which is asked more often than all others together: as `_reading`, with the answers kept."""
        answers = volumes.Answers()
        find, make = answers.find, answers.make

        def get(at: Reader, asked: OneVolume) -> msgspec.Raw:
            return find(at, asked.volume) or make(at, asked.volume)

        return self._reading("volume.get", get)

    def _listing(self, name: str, does: Callable[[Reader, Any], Generator[Any, None, object]]) -> Operation:
        desk, (right, decode) = self._desk, _asked(name)

        def run(session: Session, arguments: msgspec.Raw) -> object:
            account = desk.rights.account(session)
            asked = decode(arguments)
            return answered(does(Reader(desk, account, right), asked))

        return run

    def _editing(self, name: str, does: Callable[[Editor, Any], Generator[Any, None, object]]) -> Operation:
        desk, (right, decode) = self._desk, _asked(name)

        def run(session: Session, arguments: msgspec.Raw) -> object:
            account = desk.rights.account(session)
            asked = decode(arguments)
            return answered(does(Editor(desk, account, right, author(session)), asked))

        return run

    def _writing(self, name: str, does: Callable[[Writer, Any], object]) -> Operation:
        desk, (right, decode) = self._desk, _asked(name)

        def run(session: Session, arguments: msgspec.Raw) -> object:
            account = desk.rights.account(session)
            asked = decode(arguments)
            try:
                with desk.store.change(author(session)) as change:
                    result = does(Writer(desk, account, right, change), asked)
            except (Invalid, StoreError) as error:
                raise OperationError(*told(error)) from error
            return acknowledged((change.pending,), result)

        return Write(run, lambda: desk.store.busy)

    # ---- what is about no record ------------------------------------------------------------------------------------

    def _statistics(self, at: Reader, _: Arguments) -> Generator[None, None, Statistics]:
        store, rights = at.store, None
        while rights != structure.rights_of(at.account):  # they may change under way
            rights = structure.rights_of(at.account)
            customers = yield from structure.listed(at, Customer, "", lambda each: each.name)
            counts = yield from structure.listed(at, Media, "", lambda each: store.count(each.name))
        administrator = at.account.administrator
        whole = administrator or "" in at.account.prefixes
        return Statistics(
            customers=len(customers),
            volumes=store.count() if whole else sum(counts),
            moving=store.moving if whole else 0,
            users=len(store.all(User)) if administrator else 0,
            sessions=self._accounts.sessions() if administrator else 0,
            sequence=store.sequence,
            hash=store.hash,
            commits=store.commits,
            size=store.size,
        )

    def _batching(self) -> Operation:
        """One change, in one go: nobody's may come between, so that the loop waits, and MAX_BATCH bounds how long."""
        desk, (right, decode) = self._desk, _asked("batch")
        steps = {name: (*_asked(name), does) for name, does in WRITES.items()}

        def step(at: Writer, name: str, arguments: msgspec.Raw) -> msgspec.Raw:
            if name not in steps:
                code = "invalid" if name in OPERATIONS else "unknown_operation"
                raise OperationError(code, "must be one that changes a record: see which a batch takes")
            at.right, decode, does = steps[name]
            return msgspec.Raw(_encode(does(at, decode(arguments))))

        def run(session: Session, arguments: msgspec.Raw) -> object:
            account = desk.rights.account(session)
            asked: Batch = decode(arguments)
            if len(asked.operations) > MAX_BATCH:
                raise OperationError("invalid", f"operations: must be at most {MAX_BATCH}, not {len(asked.operations)}")
            results: list[msgspec.Raw] = []
            name = ""
            try:
                with desk.store.change(author(session)) as change:
                    at = Writer(desk, account, right, change)
                    for name, each in asked.operations:
                        results.append(step(at, name, each))
            except ANSWERED as error:
                code, message = told(error)
                place = f"operation {len(results) + 1} ({name if name in OPERATIONS else shorten(name)})"
                raise OperationError(code, f"{place}: {message}") from error
            return acknowledged((change.pending,), BatchDone(results))

        return Write(run, lambda: desk.store.busy)


def _asked(name: str) -> tuple[str, Callable[[msgspec.Raw], Any]]:
    """The right that an operation takes, and what decodes its arguments."""
    spec = OPERATIONS[name]
    return spec.right, msgspec.msgpack.Decoder(DECODED.get(name, spec.arguments)).decode
