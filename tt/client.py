"""The client library: a typed method for each operation, several in one message, batches, and lists that stream.

    with Client("tapes.example.com") as client:
        client.login("jsmith", password)
        for volume in client.volumes(scope="US01.LTO", moving=True):
            print(volume.name, volume.current, "->", volume.target)

A method takes the arguments and gives the result that messages.OPERATIONS states for its operation: `volume_get` is
volume.get, takes those of OneVolume and gives a VolumeRecord.  Client has them, and so have Packing and Batch, where
each gives a promise.  Rules as in tt.connection; not thread-safe.  Must not know the server or the command line.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from inspect import signature
from types import NoneType, TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

import msgspec
from msgspec import Raw

from tt.catalog import messages as m
from tt.connection import (
    LOGIN,
    Asked,
    Call,
    Connection,
    ConnectionLost,
    NoConnection,
    NotAccepted,
    Pong,
    ProtocolError,
    Refused,
    RequestFailed,
    TapeTrackError,
    UnknownServer,
)

__all__ = [
    "Batch", "Client", "ConnectionLost", "NoConnection", "NotAccepted", "Packing", "Pong", "Promise", "ProtocolError",
    "Refused", "RequestFailed", "TapeTrackError", "UnknownServer",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")


class Promise(Generic[R]):
    """The result of an operation that is sent with others, when their `with` block ends."""

    __slots__ = ("_result", "_sent")

    def __init__(self) -> None:
        self._sent = False
        self._result: R | RequestFailed

    def keep(self, result: R | RequestFailed) -> None:
        self._sent = True
        self._result = result

    def result(self) -> R:
        """Raises RequestFailed where the operation failed, and ValueError before it was answered."""
        if not self._sent:
            raise ValueError("this operation is not answered: it is sent when its 'with' block ends without an error")
        if isinstance(self._result, RequestFailed):
            raise self._result
        return self._result


class Operation(Generic[P, R]):
    """A method that asks for the operation of its name: at once of a Client, later of a Packing or a Batch."""

    def __init__(self, arguments: Callable[P, m.Arguments], result: type[R]) -> None:
        self.arguments = arguments
        self.result = result

    def __set_name__(self, owner: type, attribute: str) -> None:
        self.name = attribute.replace("_", ".", 1)
        self.__doc__ = m.OPERATIONS[self.name].does
        self.__signature__ = signature(self.arguments)

    @overload
    def __get__(self, asker: "Client", owner: object = None) -> Callable[P, R]: ...
    @overload
    def __get__(self, asker: "Packing | Batch", owner: object = None) -> Callable[P, Promise[R]]: ...
    @overload
    def __get__(self, asker: None, owner: object = None) -> Self: ...
    def __get__(self, asker: "Client | Packing | Batch | None", owner: object = None) -> Any:
        if asker is None:
            return self

        def ask(*args: P.args, **kwargs: P.kwargs) -> Any:
            return asker.call(self.name, self.arguments(*args, **kwargs))

        return ask


class _Changes:
    """What may also stand in a batch."""

    customer_add = Operation(m.AddCustomer, m.Written)
    customer_change = Operation(m.ChangeCustomer, m.Written)
    media_add = Operation(m.AddMedia, m.Written)
    media_change = Operation(m.ChangeMedia, m.Written)
    repository_add = Operation(m.AddRepository, m.Written)
    repository_change = Operation(m.ChangeRepository, m.Written)
    volume_add = Operation(m.AddVolume, m.Written)
    volume_move = Operation(m.MoveVolume, m.Written)
    volume_cancel = Operation(m.OneVolume, m.Written)
    volume_scan_out = Operation(m.Scan, m.Scanned)
    volume_scan_in = Operation(m.Scan, m.Scanned)
    volume_update = Operation(m.UpdateVolume, m.Written)
    volume_delete = Operation(m.OneVolume, m.Written)


class _All(_Changes):
    """What one may ask for once one has logged in."""

    whoami = Operation(m.Arguments, m.WhoAmI)
    customer_list = Operation(m.Arguments, m.Customers)
    media_list = Operation(m.Scope, m.MediaTypes)
    repository_list = Operation(m.Scope, m.Repositories)
    volume_get = Operation(m.OneVolume, m.VolumeRecord)
    volume_list = Operation(m.ListVolumes, m.Volumes)
    volume_history = Operation(m.VolumeHistory, m.History)
    volume_move_pending = Operation(m.MovePending, m.MovedPage)
    reconcile = Operation(m.Reconcile, m.Reconciled)
    certificate_get = Operation(m.OneCertificate, m.CertificateRecord)
    certificate_list = Operation(m.OneRepository, m.Certificates)
    user_add = Operation(m.AddUser, m.NewPassword)
    user_list = Operation(m.Arguments, m.Users)
    user_change = Operation(m.ChangeUser, m.Written)
    user_reset = Operation(m.OneUser, m.NewPassword)
    access_set = Operation(m.SetAccess, m.Written)
    access_list = Operation(m.ListAccess, m.AccessList)
    session_list = Operation(m.Arguments, m.Sessions)
    session_disconnect = Operation(m.Disconnect, NoneType)
    statistics = Operation(m.Arguments, m.Statistics)


class Stream(Generic[P, R]):
    """A method of Client that gives the entries of a list one by one, through all its pages.

    The next page is asked for before the entries of this one are given, so that it comes while they are used.  Other
    operations may be asked meanwhile.  Raises, as it goes on, what the operation raises.
    """

    def __init__(self, operation: str, arguments: Callable[P, m.Arguments], entry: type[R], at: str) -> None:
        self._operation, self._arguments, self._at = operation, arguments, at
        self.entry = entry
        self.__doc__ = m.OPERATIONS[operation].does
        self.__signature__ = signature(arguments)

    @overload
    def __get__(self, client: None, owner: object = None) -> Self: ...
    @overload
    def __get__(self, client: "Client", owner: object = None) -> Callable[P, Iterator[R]]: ...
    def __get__(self, client: "Client | None", owner: object = None) -> Any:
        if client is None:
            return self

        def entries(*args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
            return client.pages(self._operation, self._arguments(*args, **kwargs), self._at)

        return entries


class Client(Connection, _All):
    """A connection (which see for its arguments) with which one logs in and works."""

    volumes = Stream("volume.list", m.ListVolumes, m.VolumeRecord, at="after")
    history = Stream("volume.history", m.VolumeHistory, m.HistoryRow, at="before")

    _login: m.Login | None = None  # what `reconnect` logs in with

    def login(self, user: str, password: str) -> m.LoggedIn:
        """Begin a session.  Raises as `call`."""
        login = m.Login(user, password)
        result: m.LoggedIn = self.call(LOGIN, login)
        self._login = login
        return result

    def password(self, old: str, new: str) -> m.Written:
        """Change one's own password.  Raises as `call`."""
        result: m.Written = self.call("password", m.ChangePassword(old, new))
        if self._login is not None:
            self._login = m.Login(self._login.user, new)
        return result

    def reconnect(self) -> None:
        """Connect anew and log in as before.  Raises as `connect` and `login`."""
        self.connect()
        if self._login is not None:
            self.call(LOGIN, self._login)

    def logout(self) -> None:
        """End the session and the connection."""
        self.call("logout", m.Arguments())
        self.close()

    def call(self, operation: str, arguments: m.Arguments) -> Any:
        """The result of an operation by its name, of the type in messages.OPERATIONS.

        Raises RequestFailed (the connection stays), ConnectionLost, ProtocolError.
        """
        (result,) = self.exchange([_call(operation, arguments)])
        if isinstance(result, RequestFailed):
            raise result
        return result

    def pack(self, asked: Iterable[tuple[str, m.Arguments]], results: list[Any] | None = None) -> list[Any]:
        """Ask for many operations in as few messages as hold them: each one's result or RequestFailed, in order.

        Each is for itself, and they take effect in their order.  Raises ConnectionLost, ProtocolError; a list given as
        `results`, to which they are added as they come, then has those of before.
        """
        return self.exchange([_call(operation, arguments) for operation, arguments in asked], results)

    def packing(self) -> "Packing":
        """A `with` block whose operations are sent together at its end, as `pack` sends them."""
        return Packing(self)

    def batch(self) -> "Batch":
        """A `with` block whose changes are made at its end, all or none; the first that fails raises RequestFailed."""
        return Batch(self)

    def pages(self, operation: str, arguments: m.Arguments, at: str) -> Iterator[Any]:
        """The entries of a list in pages; `at` names the argument in which the `next` of a page goes."""
        asked: Asked | None = self.begin(_call(operation, arguments))
        try:
            while asked is not None:
                page, asked = self.finish(asked), None
                if page.next:
                    arguments = msgspec.structs.replace(arguments, **{at: page.next})
                    asked = self.begin(_call(operation, arguments))
                yield from page.entries
        finally:
            if asked is not None:  # the caller has enough
                self.forget(asked)


class _Collected:
    """Operations that are sent together when a `with` block ends; when it ends with an error, none is."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._asked: list[tuple[str, m.Arguments]] = []
        self._promises: list[Promise[Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._asked:
            for promise, result in zip(self._promises, self._results(), strict=True):
                promise.keep(result)

    def call(self, operation: str, arguments: m.Arguments) -> Promise[Any]:
        """As Client.call, but its result comes later."""
        self._asked.append((operation, arguments))
        self._promises.append(Promise())
        return self._promises[-1]

    def _results(self) -> Iterable[Any]:
        raise NotImplementedError


class Packing(_Collected, _All):
    """Operations in as few messages as hold them, each for itself."""

    def _results(self) -> list[Any]:
        return self._client.pack(self._asked)


class Batch(_Collected, _Changes):
    """Changes that are made all or none; at most messages.MAX_BATCH of them, in one message."""

    def _results(self) -> list[Any]:
        packed = [(operation, Raw(msgspec.msgpack.encode(arguments))) for operation, arguments in self._asked]
        done: m.BatchDone = self._client.call("batch", m.Batch(packed))
        return self._client.decode([_decoder(operation) for operation, _ in self._asked], done.results)


@cache
def _decoder(operation: str) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(m.OPERATIONS[operation].result)


def _call(operation: str, arguments: m.Arguments) -> Call:
    return Call(operation, Raw(msgspec.msgpack.encode(arguments)), _decoder(operation), operation in m.SECRET)
