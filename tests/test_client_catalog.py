"""The operations of tt.client: their types, packing, batches and streams against a scripted peer, all with a server.

The tutorial docs/client.md is run here, block by block.
"""

import doctest
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

import msgspec
import pytest
from faults import client as client_of
from process import Process
from scripted_server import Peer, converse
from test_client import Start, no_known_servers, start

from tt import wire
from tt.catalog import messages
from tt.catalog.messages import (
    OPERATIONS,
    PAGE,
    SECRET,
    AddUser,
    AddVolume,
    ListVolumes,
    OneVolume,
    VolumeRecord,
    Volumes,
    Written,
)
from tt.client import Batch, Client, ConnectionLost, Operation, Packing, ProtocolError, RequestFailed, Stream

__all__ = ["no_known_servers", "start"]  # fixtures

TUTORIAL = Path(__file__).parents[1] / "docs/client.md"
PASSWORD = "twelve tapes in a vault"
Answer = Callable[[wire.Request], wire.Reply]


# ---- the table of operations ----------------------------------------------------------------------------------------


def methods(kind: type) -> dict[str, Operation[..., Any]]:
    """The operations that a class has, by name."""
    found = [getattr(kind, name) for name in dir(kind) if not name.startswith("_")]
    return {one.name: one for one in found if isinstance(one, Operation)}


def test_every_operation_is_a_method_with_the_types_of_the_table() -> None:
    for name, method in methods(Client).items():
        spec = OPERATIONS[name]
        assert (method.arguments, method.result) == (spec.arguments, spec.result or NoneType), name
    by_hand = {"login", "logout", "password", "batch"}
    assert methods(Client).keys() == OPERATIONS.keys() - by_hand
    assert all(callable(getattr(Client, name)) for name in by_hand)
    assert methods(Packing).keys() == methods(Client).keys()
    assert methods(Batch).keys() == {name for name, spec in OPERATIONS.items() if spec.batch}


def test_every_list_that_has_pages_can_be_streamed() -> None:
    for stream in (Client.volumes, Client.history):
        assert isinstance(stream, Stream)
    paged = {name for name, spec in OPERATIONS.items() if spec.result and "next" in spec.result.__struct_fields__}
    assert paged == {"volume.list", "volume.history", "volume.move_pending"}  # the last one writes, page by page
    assert {field.name: field.type for field in msgspec.structs.fields(Volumes)}["entries"] == list[
        Client.volumes.entry
    ]


def test_operations_with_a_password_are_known() -> None:
    assert {"login", "password", "user.add", "user.reset"} == SECRET


def test_a_method_tells_what_it_does_and_takes() -> None:
    assert Client.volume_get.__doc__ == OPERATIONS["volume.get"].does
    assert list(Client.volume_move.__signature__.parameters) == ["volume", "to", "move_date", "description"]
    with pytest.raises(TypeError):
        Client("localhost").volume_get()


# ---- several in one message -----------------------------------------------------------------------------------------


def packed(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


def volume_of(request: wire.Request) -> str:
    return str(msgspec.msgpack.decode(request.arguments).get("volume", ""))


def record(name: str) -> VolumeRecord:
    return VolumeRecord(name, "LIB", "", "", "", "", 0, "", 1)


def librarian(request: wire.Request) -> wire.Reply:
    """Lets everybody in, and has every Volume but those named NONE."""
    if request.operation == "login":
        return wire.Reply(request.id, None, packed(["jsmith", False, False]))
    if request.operation == "volume.get":
        if volume_of(request).endswith("NONE"):
            return wire.Reply(request.id, wire.ReplyError("not_found", "there is none"))
        return wire.Reply(request.id, None, packed(record(volume_of(request))))
    return wire.Reply(request.id, None, packed([7, bytes(32)]))


def in_order(answer: Answer) -> Callable[[list[wire.Request]], Iterable[bytes]]:
    return lambda requests: [wire.encode_replies([answer(request) for request in requests])]


def one_by_one_backwards(answer: Answer) -> Callable[[list[wire.Request]], Iterable[bytes]]:
    """As the protocol allows: in any order, in any number of messages."""
    return lambda requests: [wire.encode_replies([answer(request)]) for request in reversed(requests)]


@pytest.fixture
def connect(start: Start) -> Iterator[Callable[..., tuple[Client, Peer]]]:
    """A client that has logged in at a peer."""
    opened = []

    def connect(answer: Callable[[list[wire.Request]], Iterable[bytes]]) -> tuple[Client, Peer]:
        peer = start(converse(answer))
        made = peer.client()
        made.connect()
        made.login("jsmith", "secret12")
        opened.append(made)
        return made, peer

    yield connect
    for made in opened:
        made.close()


Connect = Callable[..., tuple[Client, Peer]]


@pytest.mark.parametrize("arrange", [in_order, one_by_one_backwards])
def test_many_requests_are_one_message_and_each_has_its_own_answer(connect: Connect, arrange: Any) -> None:
    made, peer = connect(arrange(librarian))
    with made.packing() as pack:
        volumes = [pack.volume_get(f"US01.LTO.A{number}") for number in range(1000)]
        none = pack.volume_get("US01.LTO.NONE")
        added = pack.volume_add("US01.LTO.B1", repository="LIB")
        with pytest.raises(ValueError, match="is not answered"):
            none.result()
    assert [volume.result().name for volume in volumes] == [f"US01.LTO.A{number}" for number in range(1000)]
    with pytest.raises(RequestFailed, match=r"there is none \(not_found\)"):
        none.result()
    assert added.result() == Written(7, bytes(32))
    assert [len(message) for message in peer.links[0].messages] == [1, 1002]
    results = made.pack([("volume.get", OneVolume("US01.LTO.NONE")), ("volume.get", OneVolume("US01.LTO.A1"))])
    assert isinstance(results[0], RequestFailed)
    assert results[1].name == "US01.LTO.A1"
    assert made.pack([]) == []


def test_more_than_a_message_holds_goes_in_several(connect: Connect) -> None:
    made, peer = connect(in_order(librarian))
    count = wire.MAX_ENTRIES + 5
    results = made.pack(("volume.get", OneVolume(f"US01.LTO.A{number}")) for number in range(count))
    assert [result.name for result in results] == [f"US01.LTO.A{number}" for number in range(count)]
    assert [len(message) for message in peer.links[0].messages] == [1, wire.MAX_ENTRIES, 5]
    long = "x" * (wire.MAX_TO_SERVER // 3)
    results = made.pack([("volume.add", AddVolume(f"US01.LTO.A{number}", "LIB", long)) for number in range(5)])
    assert results == [Written(7, bytes(32))] * 5
    assert [len(message) for message in peer.links[0].messages[3:]] == [2, 2, 1]


def test_what_was_answered_before_the_connection_broke_is_known(connect: Connect) -> None:
    messages = 0

    def two_messages(requests: list[wire.Request]) -> Iterable[bytes]:
        nonlocal messages
        messages += 1
        if messages > 2:
            raise ConnectionResetError
        return in_order(librarian)(requests)

    made, _ = connect(two_messages)
    results: list[Any] = []
    asked = [("volume.get", OneVolume(f"US01.LTO.A{number}")) for number in range(wire.MAX_ENTRIES + 5)]
    with pytest.raises(ConnectionLost):
        made.pack(asked, results)
    assert [result.name for result in results] == [one.volume for _, one in asked[: wire.MAX_ENTRIES]]


def test_one_that_no_message_holds_fails_alone(connect: Connect) -> None:
    made, _ = connect(in_order(librarian))
    one = OneVolume("US01.LTO.A1")
    results = made.pack(
        [("volume.get", one), ("volume.add", AddVolume("A", "L", "x" * wire.MAX_TO_SERVER)), ("volume.get", one)]
    )
    assert [getattr(result, "code", "ok") for result in results] == ["ok", "too_long", "ok"]


def test_nothing_is_sent_behind_a_login_that_is_not_answered(start: Start) -> None:
    peer = start(converse(in_order(librarian)))
    with peer.client() as made:
        results = made.pack([("login", messages.Login("jsmith", "secret12")), ("volume.get", OneVolume("US01.LTO.A1"))])
    assert results[1].name == "US01.LTO.A1"
    assert [len(message) for message in peer.links[0].messages] == [1, 1]


def test_an_error_inside_the_block_sends_nothing(connect: Connect) -> None:
    made, peer = connect(in_order(librarian))
    for block in (made.packing, made.batch):
        with pytest.raises(KeyError), block() as operations:  # noqa: PT012
            operations.volume_cancel("US01.LTO.A1")
            raise KeyError
        with block():
            pass  # nor does an empty one
    assert len(peer.links[0].messages) == 1


def test_what_holds_a_password_is_not_compressed(connect: Connect) -> None:
    made, peer = connect(in_order(librarian))
    made.volume_update("US01.LTO.A1", description="x" * 600)
    made.password("secret12", "x" * 600)
    with pytest.raises(ProtocolError):  # the peer's answer is that to a change
        made.pack([("user.add", AddUser("fred", password="x" * 600)), ("volume.get", OneVolume("A" * 600))])
    assert peer.links[0].flags == [0, wire.COMPRESSED, 0, 0]


# ---- batches --------------------------------------------------------------------------------------------------------


def batches(answer: Callable[[list[Any]], wire.Reply]) -> Callable[[list[wire.Request]], Iterable[bytes]]:
    """Answers the operations in a batch with what `answer` makes of them; its id is set here."""

    def reply(request: wire.Request) -> wire.Reply:
        if request.operation != "batch":
            return librarian(request)
        made = answer(msgspec.msgpack.decode(request.arguments)["operations"])
        return msgspec.structs.replace(made, id=request.id)

    return in_order(reply)


def test_a_batch_is_one_request_and_its_results_are_typed(connect: Connect) -> None:
    seen = []

    def answer(operations: list[Any]) -> wire.Reply:
        seen.extend(operations)
        return wire.Reply(0, None, packed([[[7, bytes(32)], ["ok", "US01.LTO.A1", "fine", 8, bytes(32)]]]))

    made, _ = connect(batches(answer))
    with made.batch() as batch:
        moved = batch.volume_move("US01.LTO.A1", to="VLT1")
        scanned = batch.volume_scan_out("US01.LTO.A1", "US01.LTO.LIB")
    assert seen == [
        ["volume.move", {"volume": "US01.LTO.A1", "to": "VLT1"}],
        ["volume.scan_out", {"volume": "US01.LTO.A1", "repository": "US01.LTO.LIB"}],
    ]
    assert moved.result().sequence == 7
    assert scanned.result().verdict == "ok"


def test_a_batch_that_fails_raises_and_has_no_results(connect: Connect) -> None:
    made, _ = connect(batches(lambda _: wire.Reply(0, wire.ReplyError("conflict", "operation 1 (volume.cancel): no"))))
    with pytest.raises(RequestFailed, match="operation 1") as error, made.batch() as batch:
        cancelled = batch.volume_cancel("US01.LTO.A1")
    assert error.value.code == "conflict"
    with pytest.raises(ValueError, match="is not answered"):
        cancelled.result()
    assert made.connected


@pytest.mark.parametrize("results", [[[]], [[[7, bytes(32)]] * 2], [[["seven", bytes(32)]]]])
def test_a_batch_with_an_answer_that_does_not_fit_ends_the_connection(connect: Connect, results: Any) -> None:
    made, _ = connect(batches(lambda _: wire.Reply(0, None, packed(results))))
    with pytest.raises(ProtocolError), made.batch() as batch:
        batch.volume_cancel("US01.LTO.A1")
    assert not made.connected


# ---- streams --------------------------------------------------------------------------------------------------------


def pages(count: int) -> Callable[[list[wire.Request]], Iterable[bytes]]:
    """A list of so many Volumes, ten to a page."""

    def reply(request: wire.Request) -> wire.Reply:
        if request.operation != "volume.list":
            return librarian(request)
        after = msgspec.msgpack.decode(request.arguments, type=ListVolumes).after
        first = int(after[1:]) + 1 if after else 0
        last = min(first + 10, count)
        entries = [record(f"A{number}") for number in range(first, last)]
        return wire.Reply(request.id, None, packed(Volumes(entries, entries[-1].name if last < count else "")))

    return in_order(reply)


def test_a_stream_asks_for_the_next_page_while_one_is_used(connect: Connect) -> None:
    made, peer = connect(pages(25))
    volumes = made.volumes(scope="US01", moving=True)
    assert [next(volumes).name for _ in range(3)] == ["A0", "A1", "A2"]
    made.volume_get("US01.LTO.A1")  # its answer comes behind that of the second page, which waits
    assert made.ping().size == 25
    asked = [[request.operation for request in message] for message in peer.links[0].messages[1:]]
    assert asked == [["volume.list"], ["volume.list"], ["volume.get"]]
    assert [volume.name for volume in volumes] == [f"A{number}" for number in range(3, 25)]
    assert msgspec.msgpack.decode(peer.links[0].messages[2][0].arguments) == {
        "scope": "US01", "moving": True, "after": "A9",
    }  # fmt: skip


def test_two_streams_at_once_do_not_mix(connect: Connect) -> None:
    made, _ = connect(pages(25))
    pairs = list(zip(made.volumes(), made.volumes(scope="US01"), strict=True))
    assert [(one.name, other.name) for one, other in pairs] == [(f"A{number}", f"A{number}") for number in range(25)]


def test_a_stream_that_is_left_leaves_nothing_behind(connect: Connect) -> None:
    made, _ = connect(pages(100))
    for _ in range(3):
        assert next(made.volumes()).name == "A0"  # dropped with a page under way
    made.volume_get("US01.LTO.A1")
    assert made._session is not None
    assert not made._session._asked
    assert not made._session._arrived


def test_a_stream_does_not_outlive_its_connection(connect: Connect) -> None:
    made, _ = connect(pages(100))
    volumes = made.volumes()
    assert len(list(islice(volumes, 10))) == 10
    made.reconnect()
    with pytest.raises(ConnectionLost, match="on which this was asked is closed: ask again"):
        next(volumes)
    assert made.connected  # the new one is not concerned


def test_a_reply_comes_once(connect: Connect) -> None:
    made, _ = connect(lambda requests: 2 * list(in_order(librarian)(requests)))
    with pytest.raises(ProtocolError, match="a reply to another request"):  # that to login is here twice
        made.volume_get("US01.LTO.A1")


# ---- connecting again -----------------------------------------------------------------------------------------------


def test_reconnecting_logs_in_with_the_password_of_now(connect: Connect) -> None:
    made, peer = connect(in_order(librarian))
    made.password("secret12", "secret34")
    made.close()
    made.reconnect()
    (request,) = peer.links[1].messages[0]
    assert msgspec.msgpack.decode(request.arguments) == {"user": "jsmith", "password": "secret34"}
    assert made.volume_get("US01.LTO.A1").name == "US01.LTO.A1"


def test_reconnecting_without_a_login_only_connects(start: Start) -> None:
    peer = start(converse(in_order(librarian)))
    made = peer.client()
    made.reconnect()
    assert made.connected
    made.close()
    assert peer.links[0].messages == []


# ---- the server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server with Media type US01.LTO and its Repositories LIB and VLT1, whose tapemaster has PASSWORD."""
    with Process(tmp_path_factory.mktemp("server")) as server, client_of(server) as made:
        first = (server.place / "data/first-password").read_text().strip()
        assert made.login("tapemaster", first).must_change_password
        made.password(first, PASSWORD)
        with made.batch() as batch:
            batch.customer_add("US01")
            batch.media_add("US01.LTO")
            batch.repository_add("US01.LTO.VLT1", kind="vault", offsite=True)
            batch.repository_add("US01.LTO.LIB", next="VLT1")
        yield server


@pytest.fixture
def master(server: Process) -> Iterator[Client]:
    with client_of(server) as made:
        made.login("tapemaster", PASSWORD)
        yield made


def test_what_one_client_does_another_reads_in_the_history(server: Process, master: Client) -> None:
    name = "US01.LTO.PATH"
    added = master.volume_add(name, "LIB", description="backup of Friday")
    moved = master.volume_move(name, to="VLT1")
    assert master.volume_get(name) == VolumeRecord(
        name, "LIB", "VLT1", "", "MN", "", master.volume_get(name).requested, "backup of Friday", moved.sequence
    )
    assert master.volume_scan_out(name, "US01.LTO.LIB").verdict == "ok"
    assert master.volume_scan_in(name, "US01.LTO.VLT1").verdict == "ok"
    with client_of(server, "127.0.0.2") as other:
        other.login("tapemaster", PASSWORD)
        rows = list(other.history(name, limit=1))  # a page each
        assert [row.event for row in rows] == ["scan_in", "scan_out", "move", "add"]
        assert (rows[-1].sequence, rows[-1].hash) == (added.sequence, added.hash)
        assert rows[2].changes["target"] == ("", "VLT1")
        assert {row.source for row in rows} == {"127.0.0.1"}
        assert [row.previous for row in rows] == [row.sequence for row in rows[1:]] + [0]
        other.logout()
        assert not other.connected


def test_a_long_list_streams_whole_and_in_order(master: Client) -> None:
    names = [f"US01.LTO.S{number:05}" for number in range(2 * PAGE + 500)]
    results = master.pack(("volume.add", AddVolume(name, "LIB")) for name in names)
    assert not [result for result in results if isinstance(result, RequestFailed)]
    assert [volume.name for volume in master.volumes(scope="US01.LTO.S*")] == names
    assert [volume.name for volume in master.volumes(scope="US01.LTO.S*", limit=7, after=names[-10])] == names[-9:]
    with master.packing() as pack:
        moves = [pack.volume_move(volume.name, to="VLT1") for volume in master.volumes(scope="US01.LTO.S000*")]
    assert len({move.result().sequence for move in moves}) == 100
    assert sum(1 for _ in master.volumes(scope="US01.LTO.S*", moving=True)) == 100


def test_a_batch_that_fails_in_the_middle_changes_nothing(master: Client) -> None:
    before = master.statistics().sequence
    with pytest.raises(RequestFailed) as error, master.batch() as batch:  # noqa: PT012
        batch.volume_add("US01.LTO.BATCH1", "LIB")
        batch.volume_add("US01.LTO.BATCH2", "NONE")
        batch.volume_add("US01.LTO.BATCH3", "LIB")
    assert error.value.code == "not_found"
    assert "operation 2 (volume.add)" in error.value.message
    assert master.statistics().sequence == before
    with pytest.raises(RequestFailed, match="not_found"):
        master.volume_get("US01.LTO.BATCH1")


def test_the_rest_of_the_operations_decode(master: Client) -> None:
    assert master.whoami().user == "tapemaster"
    assert [one.name for one in master.customer_list().entries] == ["US01"]
    assert [one.name for one in master.media_list("US01").entries] == ["US01.LTO"]
    assert [one.kind for one in master.repository_list().entries] == ["rack", "vault"]
    master.customer_change("US01", description="one")
    master.media_change("US01.LTO", max_volumes=100_000)
    master.repository_change("US01.LTO.LIB", allow_deletes=True)
    master.volume_add("US01.LTO.REST", "LIB")
    master.volume_update("US01.LTO.REST", set_flags="p")
    assert [moved.target for moved in master.volume_move_pending("US01").entries] == ["VLT1"]
    master.volume_cancel("US01.LTO.REST")
    master.volume_delete("US01.LTO.REST")
    certificate = master.reconcile("US01.LTO.VLT1", ["PATH", "REST"]).certificate
    assert master.certificate_get(certificate.id) == certificate
    assert [one.id for one in master.certificate_list("US01.LTO.VLT1").entries] == [certificate.id]
    assert master.user_add("fred").password
    master.user_change("fred", networks="127.0.0.0/8")
    assert master.user_reset("fred").password
    master.access_set("fred", "US*", "write")
    assert [(one.pattern, one.level) for one in master.access_list("fred").entries] == [("US*", "write")]
    assert [one.user for one in master.user_list().entries] == ["fred", "tapemaster"]
    (session,) = [one for one in master.session_list().entries if one.user == "tapemaster"][-1:]
    with pytest.raises(RequestFailed, match="not_found"):
        master.session_disconnect(session.id + 1000)


# ---- the tutorial ---------------------------------------------------------------------------------------------------


def test_the_tutorial_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Process(tmp_path) as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "var").symlink_to("data")
        text = TUTORIAL.read_text("utf-8")
        blocks = re.findall(r"^```pycon\n(.*?)^```$", text, re.M | re.S)
        assert len(blocks) > 10
        code = "\n".join(blocks).replace("5000", str(server.port))
        example = doctest.DocTestParser().get_doctest(code, {}, TUTORIAL.name, str(TUTORIAL), 0)
        said: list[str] = []
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        doctest.DocTestRunner(optionflags=flags).run(example, out=said.append)
        assert not said, "".join(said)
