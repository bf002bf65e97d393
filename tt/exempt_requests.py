"""What can be asked about exemptions at the control socket.

    exempt.list    -> {"network", "from": "configuration" | "run time", "note", "since"}, ..., {"end": true}
    exempt.add     network, reason -> {"end": true, "network", "added", "lifted": time-outs within, "caveats": [text]}
    exempt.remove  network -> {"end": true, "network", "still": whether the configuration exempts it, too}

Rules: a change holds once it is on the disk, and then at once; who asked need not wait for it.  What the configuration
exempts is changed there.  One change at a time.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from tt import asking
from tt._core import Server
from tt.asking import PIECE_ENDS, Answer, Caller, RequestError, say_done
from tt.ban_history import utc_text
from tt.exemptions import MOST, Entries, Exemption, caveats
from tt.guard import Guard
from tt.option_kinds import EXEMPTIONS, Exempt
from tt.pending import Pending


class ExemptRequests:
    """All of them, by their names; the calls are the loop's."""

    def __init__(self, server: Server, guard: Guard) -> None:
        self._server = server
        self._guard = guard
        self._saving: Pending | None = None
        self.all: dict[str, Callable[[Mapping[str, Any], Caller], Answer]] = {
            "exempt.list": self._list,
            "exempt.add": self._add,
            "exempt.remove": self._remove,
        }

    def _list(self, _request: Mapping[str, Any], _caller: Caller) -> Answer:
        for network in self._guard.settings.exempt:
            yield {"network": str(network), "from": "configuration", "note": None, "since": None}
        for entry in self._guard.exemptions.entries.values():
            yield {"network": entry.network, "from": "run time", "note": entry.note, "since": entry.since}
        yield {"end": True}

    def _add(self, request: Mapping[str, Any], caller: Caller) -> Answer:
        network, note = _read(asking.text(request, "network")), asking.note(request)
        if network == "gateways" and not self._guard.gateways:
            raise RequestError("gateways: none is known on this host: name their addresses")
        answer = {
            "end": True, "network": str(network), "added": False, "lifted": 0,
            "caveats": list(caveats(network, self._guard.settings.ipv6_prefix)),
        }  # fmt: skip
        yield from self._one_at_a_time()
        entries = self._guard.exemptions.entries
        if network in self._guard.settings.exempt or (network in entries and note in (None, entries[network].note)):
            yield answer
            return
        if len(entries) >= MOST and network not in entries:
            raise RequestError(f"{MOST} networks are exempt: remove one, or name a wider one")
        entry = Exemption(str(network), note, utc_text(int(time.time())))
        yield from self._change({**entries, network: entry}, caller, "exempt.add", network=network, note=note)
        lifted = 0
        with closing(self._guard.lifting_exempt()) as lifting:
            for lifted in lifting:  # noqa: B007 - the last one counts
                yield PIECE_ENDS
        yield answer | {"added": True, "lifted": lifted}

    def _remove(self, request: Mapping[str, Any], caller: Caller) -> Answer:
        network = _read(asking.text(request, "network"))
        yield from self._one_at_a_time()
        entries, still = self._guard.exemptions.entries, network in self._guard.settings.exempt
        if network not in entries:
            raise RequestError(self._why_not(network))
        rest = {one: entry for one, entry in entries.items() if one != network}
        yield from self._change(rest, caller, "exempt.remove", network=network)
        yield {"end": True, "network": str(network), "still": still}

    def _why_not(self, network: Exempt) -> str:
        if network in self._guard.settings.exempt:
            remedy = "take it out of `exempt` there, then send the server a SIGHUP"
            return f"{network} is exempt by the configuration: {remedy}"
        part = isinstance(network, str) or self._guard.why_spared(str(network)) is None
        return f"{network} is not exempt{'' if part else ' by itself'}: see 'tt exempt list'"

    # ---- a change ---------------------------------------------------------------------------------------------------

    def _one_at_a_time(self) -> Answer:
        while self._saving is not None:
            yield self._saving

    def _change(self, entries: Entries, caller: Caller, do: str, **fields: object) -> Answer:
        """First on the disk, then here, whether or not who asked still waits."""

        def take() -> None:
            self._saving = None
            if saving.error is None:
                self._guard.take_exemptions(entries)
                self._server.configure(self._guard.settings, self._guard.exempt)
                say_done(caller, do, **fields)

        saving = self._saving = _beside(self._server, lambda: self._guard.exemptions.save(entries))
        saving.when_done(take)
        try:
            yield saving
        except GeneratorExit:
            saving.when_done(self._guard.lift_exempt)
            raise
        if saving.error is not None:
            raise RequestError(str(saving.error))


def _beside(server: Server, work: Callable[[], None]) -> Pending:
    """Work that waits for the disk, in a thread; done in the loop.  RequestError: it cannot begin."""
    pending, failures = Pending(), []

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, who asked is told
            failures.append(error)
        finally:
            os.eventfd_write(descriptor, 1)

    def done(_readable: bool, _writable: bool) -> None:
        server.unwatch(descriptor)
        os.close(descriptor)
        pending.finish(failures[0] if failures else None)

    try:
        descriptor = os.eventfd(0, os.EFD_CLOEXEC)
        server.watch(descriptor, done)
        threading.Thread(target=run, name="tt-exempt", daemon=True).start()
    except (OSError, RuntimeError) as error:
        raise RequestError(f"neither saved nor changed, try again: {error}") from error
    return pending


def _read(words: str) -> Exempt:
    try:
        network: Exempt = EXEMPTIONS.read(words)
    except ValueError:
        raise RequestError(f"{words[:80]!r} cannot be exempt: it must be {EXEMPTIONS.rule}") from None
    return network
