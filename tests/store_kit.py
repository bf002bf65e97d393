"""A catalogue's file for the tests of the store, its schema and its chain."""

import os
import resource
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace
from process import need, plain_environment

from tt.catalog.chain import Report, verify
from tt.catalog.model import Customer, Media, Repository, Volume
from tt.catalog.store import Author, Change, Store

AUTHOR = Author("jsmith", "tt 0.1", "192.0.2.7")
NOON = 1_800_000_000.25  # s since 1970 UTC
PATIENCE = 10_000  # ms
MEDIA = "US01.LTO"
ONE, TWO, THREE = (f"{MEDIA}.A0000{number}" for number in (1, 2, 3))
# Changes Volumes without end, and prints what was acknowledged: sequence, hash, name.
LOAD = """
import random, select, sys
from pathlib import Path
from msgspec.structs import replace
from tt.catalog.model import Volume
from tt.catalog.store import Author, Store

store, dice = Store(Path(sys.argv[1])), random.Random()
names = [volume.name for volume in store.volumes("", "~", limit=1000)]
poll = select.poll()
poll.register(store.descriptor, select.POLLIN)
while True:
    for _ in range(dice.randrange(1, 40)):
        with store.change(Author("load", "test", "::1")) as change:
            volume = change.get(Volume, dice.choice(names))
            row = change.put(replace(volume, description=str(dice.random()), flags=dice.choice(("", "E"))), "change")
    while not change.pending.done:
        poll.poll()
        store.turn()
    assert change.pending.error is None
    print(row.sequence, row.hash.hex(), volume.name, flush=True)
"""


def settle(opened: Store) -> None:
    """Turn as the loop does, until all that was written is on disk or has failed."""
    ready = select.poll()
    ready.register(opened.descriptor, select.POLLIN)
    while opened.busy is not None or ready.poll(0):
        assert ready.poll(PATIENCE), "nothing woke the loop"
        opened.turn()


def write(opened: Store, *records, event: str = "add") -> Change:
    """One change of these records, in the open group."""
    with opened.change(AUTHOR) as change:
        for record in records:
            change.put(record, event)
    return change


def altered(opened: Store, name: str, event: str = "change", **fields) -> Change:
    """One change of a Volume."""
    with opened.change(AUTHOR) as change:
        change.put(replace(change.get(Volume, name), **fields), event)
    return change


def filled(path: Path, **options) -> Store:
    """A catalogue with one Media type, two Repositories and two Volumes in the first of them."""
    opened = Store(path, clock=lambda: NOON, **options)
    write(opened, Customer("US01", "one"), Media(MEDIA), Repository(f"{MEDIA}.VLT1"), Repository(f"{MEDIA}.VLT2"))
    write(opened, Volume(ONE, "VLT1"), Volume(TWO, "VLT1", description="two"))
    settle(opened)
    return opened


def holds(path: Path) -> Report:
    report = verify(path)
    assert report.problem == ""
    return report


@contextmanager
def no_file_grows() -> Iterator[None]:
    """The kernel lets no file of this process become longer than a byte (EFBIG), as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _library_of_syncs(directory: Path) -> Path:
    """For LD_PRELOAD: fsync fails where $FAIL is a file, which it removes, and each time where that is a directory."""
    need("gcc")
    source = """
        #include <errno.h>
        #include <stdlib.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        static int sync_unless_told(long call, int fd)
        {
            if (unlink(getenv("FAIL")) == 0 || access(getenv("FAIL"), F_OK) == 0) {
                errno = EIO;
                return -1;
            }
            return syscall(call, fd);
        }
        int fsync(int fd) { return sync_unless_told(SYS_fsync, fd); }
        int fdatasync(int fd) { return sync_unless_told(SYS_fdatasync, fd); }
    """
    library = directory / "fail.so"
    command = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", library]
    subprocess.run(command, input=textwrap.dedent(source), text=True, check=True, env=plain_environment())
    return library


def run_with_syncs_that_fail(directory: Path, path: Path, script: str) -> None:
    """Run a script on a new catalogue with `kept` in ONE, then kill; `fail` is the $FAIL of _library_of_syncs."""
    fail = directory / "fail"
    head = """
        import os, signal, sqlite3, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[3])
        from store_kit import *
        from tt.catalog.store import StoreError
        path, fail = map(Path, sys.argv[1:3])
        opened = filled(path)
        altered(opened, ONE, description="kept")
        settle(opened)
    """
    end = "\nos.kill(os.getpid(), signal.SIGKILL)"
    preloaded = [one for one in (os.environ.get("LD_PRELOAD"),) if one]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(head) + textwrap.dedent(script) + end,
            path,
            fail,
            Path(__file__).parent,
        ],
        env=os.environ | {"LD_PRELOAD": ":".join([*preloaded, str(_library_of_syncs(directory))]), "FAIL": str(fail)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
