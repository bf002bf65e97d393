"""The lock of a data directory: of a server as long as it runs, and of who writes its catalogue while none runs.

Must not know the server, nor what is in the directory.
"""

import fcntl
import os
from pathlib import Path


class DataInUseError(Exception):
    """Another process has the lock; the text is one line that names the directory, the rule and the remedy."""


def take(data: Path) -> int:
    """The lock, a descriptor, as long as that is open (flock(2)).  Raises DataInUseError, OSError.

    Two at once would overwrite each other's work.  Where the file system has no locks there is none.
    """
    descriptor = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataInUseError(
            f"data directory {data}: 'tt user reset' or another server uses it: stop that one, "
            "or name another with --data"
        ) from None
    except OSError:
        pass
    return descriptor
