"""Operations that wait: steps that give what they wait for, as the dispatcher takes them, and as others do.

Rules: no change stays open while steps wait, and what was read before the wait is read again behind it.
Must not know what the operations are about.
"""

import logging
import select
from collections.abc import Generator
from typing import Any

from tt import log
from tt.catalog.model import Invalid
from tt.catalog.passwords import Busy, Job, Passwords
from tt.catalog.rights import told
from tt.catalog.store import Store, StoreError
from tt.dispatch import OperationError
from tt.pending import Later, Pending

Steps = Generator[Pending | None, None, Any]  # gives what it waits for, None where others may be served


def answered(steps: Steps) -> Steps:
    """The same steps, with their errors as answers."""
    try:
        return (yield from steps)
    except (Invalid, StoreError) as error:
        raise OperationError(*told(error)) from error
    except Busy:
        raise OperationError("busy", "too many passwords are being checked just now: again in a second") from None


def hashed(passwords: Passwords, job: Job) -> Steps:
    """Until the thread has done it.  Raises OperationError: busy."""
    try:
        yield job
    finally:
        if not job.done:  # the connection has gone
            passwords.drop(job)
    if job.error is not None:
        log.event(logging.ERROR, "a password could not be hashed", error=repr(job.error))
        raise OperationError("busy", "the server has no memory for a password just now: again in a second")


def drive(steps: Steps) -> Later:
    """Goes through steps that no connection waits for: their result, once they are over."""
    over = Pending()
    value: object = None
    failure: Exception | None = None

    def go_on() -> None:
        nonlocal value, failure
        try:
            while (pending := next(steps)) is None:
                pass
        except StopIteration as end:
            value = end.value
        except Exception as error:  # noqa: BLE001 - it is raised where the result is asked for
            failure = error
        else:
            pending.when_done(go_on)
            return
        if isinstance(value, Later):
            value.pending.when_done(over.finish)
        else:
            over.finish()

    def result() -> object:
        if failure is not None:
            raise failure
        return value.result() if isinstance(value, Later) else value

    go_on()
    return Later(over, result)


def settle(store: Store, pending: Pending) -> None:
    """Waits, in this thread and without a loop, until the change is on disk.  Raises StoreError."""
    poll = select.poll()
    poll.register(store.descriptor, select.POLLIN)
    while not pending.done:
        poll.poll()
        store.turn()
    if pending.error is not None:
        raise pending.error
