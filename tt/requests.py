"""What can be asked of a running server at its control socket, but for the time-outs: its status, exemptions, accounts.

The requests and their answers, as JSON:

    status          -> one object, made by tt.status
    bans.*          tt.ban_requests
    exempt.*        tt.exempt_requests
    user.reset      user -> password, sequence, hash: a one-time password for an account of the catalogue

It must not know the socket, nor how the command line shows an answer.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tt._core import Server, TimeoutTable
from tt.asking import Answer, Caller, RequestError, say_done, text
from tt.ban_requests import BanRequests
from tt.catalog.service import Service
from tt.dispatch import Dispatcher, OperationError
from tt.exempt_requests import ExemptRequests
from tt.guard import Guard
from tt.status import Status


class Requests:
    """All of them, by their names; the calls are the loop's."""

    def __init__(
        self, server: Server, table: TimeoutTable, guard: Guard, dispatcher: Dispatcher, catalog: Service | None = None
    ) -> None:
        self._catalog = catalog
        self.status = Status(server, table, guard, dispatcher, catalog)
        self._bans = BanRequests(server, table, guard)
        self.tick = self._bans.tick
        self.all: dict[str, Callable[[Mapping[str, Any], Caller], Answer]] = {
            "status": self._status,
            **self._bans.all,
            **ExemptRequests(server, guard).all,
            "user.reset": self._reset,
        }

    def _status(self, _request: Mapping[str, Any], _caller: Caller) -> Answer:
        yield {"end": True, **self.status.take()}

    def _reset(self, request: Mapping[str, Any], caller: Caller) -> Answer:
        if self._catalog is None:
            raise RequestError("this server has no catalogue")
        try:
            account = text(request, "user")
            later = self._catalog.reset(account)
            say_done(caller, "user.reset", account=account)
            yield later.pending
            made: Any = later.result()
        except OperationError as error:
            raise RequestError(str(error)) from error
        yield {"end": True, "password": made.password, "sequence": made.sequence, "hash": made.hash.hex()}
