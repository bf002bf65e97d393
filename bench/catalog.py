"""The tape catalogue's figures: gets, durable updates, bytes on the wire, and the cost of many more Volumes.

The Volumes are those of examples/, and more of their kind.  Each side logs in, or connects, once; the generator sends
requests made here, and compares every answer with what is given here too.
Rules: the data of all that are compared lies on one file system, on a disk.
"""

import os
import random
import runpy
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from bench import kit
from bench.kit import NotMeasuredError, Report, Row, Run, Side
from bench.servers import HONEST, PLACE, DurableRedis, Ours, Postgres, Redis, resp
from bench.userspace import CONNECTIONS, MICRO, peer, row_of, rows_beside_get
from tt import wire
from tt.catalog import messages
from tt.catalog.model import SUPERUSER, Customer, Media, Record, Repository, User, Volume
from tt.catalog.passwords import hash_password
from tt.catalog.service import FILE
from tt.catalog.steps import settle
from tt.catalog.store import Author, Store
from tt.client import Client

VOLUMES = 10_000
PACKED = 16
MEDIA = "US01.LTO"
PASSWORD = "ten thousand tapes in a rack"  # noqa: S105 - of a server that lives for a minute
LOCATIONS = {"Library": "LIB", "Rack": "RACK", "Vault": "VLT1"}  # as in examples/inventory.toml
MOST_LOADED = 10_000  # records in one transaction
SEED = 6
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")

_pack = msgspec.msgpack.Encoder().encode
Asked = tuple[str, messages.Arguments]
Exchange = tuple[bytes, bytes]  # a request, and what its answer must begin with


# ---- the catalogue --------------------------------------------------------------------------------------------------


def structure() -> Iterator[Record]:
    yield User(SUPERUSER, password=hash_password(PASSWORD), administrator=True)
    yield Customer("US01")
    yield Media(MEDIA)
    for name in LOCATIONS.values():
        yield Repository(f"{MEDIA}.{name}", kind="vault" if name == "VLT1" else "rack", offsite=name == "VLT1")


def volumes(count: int) -> Iterator[Volume]:
    row: Callable[[int], list[str]] = runpy.run_path(str(kit.ROOT / "examples/make_inventory.py"))["row"]
    for number in range(1, count + 1):
        barcode, location, contents, encrypted, back = row(number)
        day = "-".join(reversed(back.split("/")))
        flags = "E" if encrypted == "yes" else ""
        yield Volume(f"{MEDIA}.{barcode}", LOCATIONS[location], flags=flags, move_date=day, description=contents)


def load_records(path: Path, records: Iterator[Record]) -> None:
    """Add them as the server would, with their history, but many in a transaction."""
    with closing(Store(path)) as store:
        while some := list(islice(records, MOST_LOADED)):
            with store.change(Author("bench", "bench", "local")) as change:
                for record in some:
                    change.put(record, "add")
            settle(store, change.pending)


class Stocked(Ours):
    """Our server with a catalogue of so many Volumes."""

    def __init__(self, count: int = VOLUMES) -> None:
        super().__init__()
        self.count = count

    def prepare(self) -> None:
        super().prepare()
        load_records(self.folder / FILE, chain(structure(), volumes(self.count)))

    @contextmanager
    def client(self) -> Iterator[Client]:
        with Client("127.0.0.1", self.port, key=bytes.fromhex(self.key), timeout=60) as client:
            client.login(SUPERUSER, PASSWORD)
            yield client

    @contextmanager
    def turns(self, exchanges: Iterable[Exchange], **options: Any) -> Iterator[Side]:
        """kit.turns() of connections that have logged in."""
        login = plaintext([("login", messages.Login(SUPERUSER, PASSWORD))], compress=False)
        script = write_script(self.folder / "script", [(login, succeeded(SUPERUSER, elements=3)), *exchanges])
        with kit.turns("tt", self.port, script=script, key=self.key, pid=self.pid, **SOURCE, **options) as turn:
            yield turn


SOURCE: dict[str, Any] = {"block": HONEST, "sources": 64}


# ---- what the generator sends and expects ---------------------------------------------------------------------------


def plaintext(asked: Sequence[Asked], *, compress: bool = True) -> bytes:
    """Of the one DATA frame in which our client asks these."""
    requests = [
        wire.Request(number, operation, msgspec.Raw(_pack(arguments)))
        for number, (operation, arguments) in enumerate(asked, 1)
    ]
    return framed(wire.encode_requests(requests), compress=compress)


def framed(body: bytes, *, compress: bool = True) -> bytes:
    (only,) = wire.split_message(body, wire.MAX_DATA, compress=compress)
    return only


def answered(results: Sequence[object]) -> bytes:
    """Plaintext of the frame that answers requests with these results."""
    replies = [wire.Reply(number, None, msgspec.Raw(_pack(result))) for number, result in enumerate(results, 1)]
    return framed(wire.encode_replies(replies))


def succeeded(*begins: object, elements: int = 0) -> bytes:
    """What the plaintext of the answer to one request begins with, whose result is an array of so many elements."""
    # No flags; an array of one reply, which is an array of 3: id 1, no error, and the result.
    return b"\0\x91\x93\x01\xc0" + bytes([0x90 + elements]) + b"".join(map(_pack, begins))


def exchange(client: Client, asked: Sequence[Asked]) -> Exchange:
    return plaintext(asked), answered(client.pack(asked))


def write_script(path: Path, exchanges: Iterable[Exchange]) -> Path:
    """As load.c reads it."""
    with path.open("wb") as file:
        for part in chain.from_iterable(exchanges):
            file.write(struct.pack("=I", len(part)) + part)
    return path


def get(name: str) -> Asked:
    return "volume.get", messages.OneVolume(name)


def update(name: str, description: str) -> Asked:
    return "volume.update", messages.UpdateVolume(name, description)


# ---- gets -----------------------------------------------------------------------------------------------------------


def connections(report: Report) -> int:
    """How many log in: each login takes a quarter of a second by design."""
    return 8 if report.quick else CONNECTIONS


def gets(report: Report) -> None:
    """volume.get beside redis-server's GET of the same bytes by the same name, 50 connections."""
    count, runs = (10_000, 3) if report.quick else (40_000, 9)
    names = [volume.name for volume in volumes(VOLUMES)]
    random.Random(SEED).shuffle(names)  # noqa: S311 - an order that is the same at every run
    with ExitStack() as stack:
        ours = stack.enter_context(Stocked())
        client = stack.enter_context(ours.client())
        values = dict(zip(names, map(_pack, client.pack([get(name) for name in names])), strict=True))
        redis = peer(report, stack, partial(Redis, {name.encode(): value for name, value in values.items()}))
        for outstanding, wanted in ((1, "at least 1.2"), (PACKED, "at least 0.9")):
            options = {"connections": connections(report), "count": count, "warmup": count // 20, "deadline": 60}
            packed = [names[first : first + outstanding] for first in range(0, VOLUMES, outstanding)]
            frames = [exchange(client, [get(name) for name in some]) for some in packed]
            with ExitStack() as runs_of:
                sides = {"ours": runs_of.enter_context(ours.turns(frames, each=outstanding, **options))}
                if redis is not None:
                    script = [(b"", b""), *(_redis_get(name.encode(), values[name]) for name in names)]
                    path = write_script(redis.folder / "script", script)
                    side = kit.turns(
                        "tls", redis.port, script=path, outstanding=outstanding, pid=redis.pid, **SOURCE, **options
                    )
                    sides["redis GET, TLS"] = runs_of.enter_context(side)
                results = kit.compare(sides, runs, "server_ns")
            report.keep(f"gets_{outstanding}", results)
            name = f"volume.get, {outstanding} outstanding"
            report.add(*rows_beside_get(name, results, wanted))


def _redis_get(name: bytes, value: bytes) -> Exchange:
    return resp(b"GET", name), b"$%d\r\n%b\r\n" % (len(value), value)


# ---- updates --------------------------------------------------------------------------------------------------------


def updates(report: Report) -> None:
    """Changes that are on the disk before they are acknowledged, 50 connections, one outstanding on each."""
    seconds, runs = (1, 2) if report.quick else (2, 7)
    disk, flush = _disk(PLACE)
    report.machine["disk"] = f"{disk}, fdatasync of 4 KiB {flush:.0f} us"
    descriptions = [f"an incremental backup of last night, job {job}" for job in (10_000, 20_000)]
    changes = [(volume.name, text) for text in descriptions for volume in volumes(VOLUMES)]
    options = {"connections": connections(report), "seconds": seconds, "warmup": CONNECTIONS * 10}
    with ExitStack() as stack:
        ours = stack.enter_context(Stocked())
        frames = [(plaintext([update(name, text)]), succeeded(elements=2)) for name, text in changes]
        sides = {"ours": stack.enter_context(ours.turns(frames, **options))}
        redis = peer(report, stack, DurableRedis)
        if redis is not None:
            sets = [(resp(b"SET", name.encode(), text.encode()), b"+OK\r\n") for name, text in changes]
            path = write_script(redis.folder / "script", [(b"", b""), *sets])
            side = kit.turns("tls", redis.port, script=path, pid=redis.pid, **SOURCE, **options)
            sides["redis SET, TLS, fsync always"] = stack.enter_context(side)
        postgres = peer(report, stack, Postgres)
        if postgres is not None:
            sides["PostgreSQL, TLS, pgbench"] = partial(postgres.updates, connections(report), seconds)
        results = kit.compare(sides, runs, "rate")
        with ours.client() as client:
            _at_least("our history", client.statistics().sequence, results["ours"])
        if postgres is not None:
            kept = int(postgres.ask("SELECT count(*) FROM history"))
            _at_least("PostgreSQL's history", kept, results["PostgreSQL, TLS, pgbench"])
    report.keep("updates", results)
    name = "durable update with its history"
    rows = [
        row_of(name, "/s", results, side, "rate", ours_over_peer=True, wanted=wanted)
        for side, wanted in (
            ("redis SET, TLS, fsync always", "at least 0.6"),
            ("PostgreSQL, TLS, pgbench", "at least 3"),
        )
    ]
    rows[0].note = report.machine["disk"]
    report.add(
        *rows,
        row_of(name, "us p99", results, "redis SET, TLS, fsync always", "p99_ns", scale=MICRO),
        row_of(name, "us CPU", results, "redis SET, TLS, fsync always", "server_ns", scale=MICRO),
    )


def _at_least(what: str, kept: int, runs: Sequence[Run]) -> None:
    acknowledged = sum(run["units"] for run in runs)
    if kept < acknowledged:
        raise RuntimeError(f"{what} has {kept} rows, but {acknowledged:.0f} changes were acknowledged")


def _disk(folder: Path) -> tuple[str, float]:
    """The file system, and the time in us in which its disk takes 4 KiB for good."""
    kind, source = kit.output_of("findmnt", "--noheadings", "--output", "FSTYPE,SOURCE", "--target", folder).split()
    if kind in MEMORY_FILE_SYSTEMS:
        raise NotMeasuredError(f"{folder} is {kind}: durable writes need a disk there")
    path = folder / f"bench_flush_{os.getpid()}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.pwrite(descriptor, bytes(4096 * 200), 0)
        os.fsync(descriptor)
        times = []
        for number in range(200):
            begun = time.monotonic_ns()
            os.pwrite(descriptor, b"1" * 4096, number * 4096)
            os.fdatasync(descriptor)
            times.append(time.monotonic_ns() - begun)
        return f"{kind} on {source}", median(times) / MICRO
    finally:
        os.close(descriptor)
        path.unlink()


# ---- bytes on the wire ----------------------------------------------------------------------------------------------


def sizes(report: Report) -> None:
    """Bytes that our client and server exchange, both ways, as the kernel counts them for the client's socket."""
    with Stocked() as ours, ours.client() as client:
        before = _exchanged(ours.port)
        if sum(1 for _ in client.volumes()) != VOLUMES:
            raise RuntimeError("not all Volumes came")
        listed = _exchanged(ours.port) - before
        changes = [update(volume.name, f"{volume.description}, verified") for volume in islice(volumes(VOLUMES), 100)]
        before += listed
        client.pack(changes)
        packed = _exchanged(ours.port) - before
        before += packed
        for operation, arguments in changes:
            client.call(operation, arguments)
        alone = _exchanged(ours.port) - before
    report.add(
        Row("10,000 Volumes to a client", "bytes", [listed], wanted="at most 500000"),
        Row("100 updates, packed", "bytes", [packed], wanted="at most 10000"),
        Row("100 updates, a message each", "bytes", [alone]),
    )


def _exchanged(port: int) -> int:
    """Bytes of TCP's stream, sent and received, of the one connection to that port."""
    words = kit.output_of("ss", "--tcp", "--info", "--no-header", "--oneline", f"dport = :{port}").split()
    fields = dict(word.split(":", 1) for word in words if word.startswith(("bytes_sent:", "bytes_received:")))
    return int(fields["bytes_sent"]) + int(fields["bytes_received"])


# ---- growth ---------------------------------------------------------------------------------------------------------


def growth(report: Report) -> None:
    """Server CPU of a get and of a page of a list, any of all Volumes, in a large catalogue beside a small one."""
    many = 20_000 if report.quick else 1_000_000
    runs = 2 if report.quick else 9
    small, large = f"{VOLUMES:,} Volumes", f"{many:,} Volumes"
    with ExitStack() as stack:
        servers = {"ours": stack.enter_context(Stocked(many)), small: stack.enter_context(Stocked())}
        for name, count, frames in (
            (f"volume.get in {large}", 5_000, _any_gets),
            (f"page of volume.list in {large}", 200, _any_pages),
        ):
            options = {"connections": 4 if report.quick else 16, "warmup": count // 10}
            options["count"] = count // (5 if report.quick else 1)
            with ExitStack() as runs_of:
                sides = {
                    side: runs_of.enter_context(server.turns(frames(server), **options))
                    for side, server in servers.items()
                }
                for _ in range(VOLUMES // int(options["count"]) if frames is _any_gets else 0):
                    kit.alternate(sides, 1)  # until the small one has all in memory, as it would be in the long run
                results = kit.compare(sides, runs, "server_ns")
            report.keep(name, results)
            row = row_of(name, "us CPU", results, small, "server_ns", scale=MICRO, ours_over_peer=True)
            row.wanted = "at most 1.5"
            report.add(row)


def _any_gets(server: Stocked) -> list[Exchange]:
    """No name twice in 150,000, more than all runs take: what the server keeps in memory is met as by chance."""
    chosen = random.Random(SEED)  # noqa: S311
    every = [(volume.name, volume.current) for volume in volumes(server.count)]
    return [
        (plaintext([get(name)]), succeeded(name, current, elements=9))
        for name, current in chosen.sample(every, min(150_000, server.count))
    ]


def _any_pages(server: Stocked) -> list[Exchange]:
    chosen = random.Random(SEED)  # noqa: S311
    names = [volume.name for volume in volumes(server.count)]
    last = server.count - messages.PAGE - 1
    with server.client() as client:
        return [
            exchange(client, [("volume.list", messages.ListVolumes(MEDIA, after=names[chosen.randint(0, last)]))])
            for _ in range(50)
        ]
