"""Several at once: two who change one tape, batches, and changes that the disk does not take."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from catalog_kit import VLT1, A, Desk
from harness import Running
from store_kit import no_file_grows

from tt.catalog.messages import MAX_BATCH, OPERATIONS
from tt.catalog.model import Volume
from tt.client import RequestFailed

# ---- two at once, batches -------------------------------------------------------------------------------------------


def test_of_two_who_move_one_tape_in_one_commit_the_second_sees_what_the_first_did(desk: Desk) -> None:
    desk.volume()
    first = desk.begin("write", "volume.move", volume=A, to="VLT1")
    second = desk.begin("alter", "volume.move", volume=A, to="RACK")
    assert desk.store.get(Volume, A).target == ""  # nothing is shown before it is on disk
    one, two = desk.finish(first), desk.finish(second)
    assert two.sequence == one.sequence + 1
    assert desk.state()[1] == "RACK"
    rows = desk.ask("read", "volume.history", volume=A).entries
    assert [(row.user, row.changes.get("target")) for row in rows[:2]] == [
        ("alter", ("VLT1", "RACK")), ("write", ("", "VLT1")),
    ]  # fmt: skip


def test_of_two_who_cancel_one_move_in_one_commit_the_second_is_told_that_it_is_not_moving(desk: Desk) -> None:
    desk.volume(target="VLT1", requested=5)
    first = desk.begin("write", "volume.cancel", volume=A)
    assert desk.code("alter", "volume.cancel", volume=A) == "conflict"
    assert desk.finish(first).sequence


def test_two_clients_of_a_server_move_one_tape_and_a_third_reads_who_did_what(desk: Desk, tmp_path: Path) -> None:
    desk.volume()

    def log_in(session: Any, arguments: msgspec.Raw) -> None:
        session.account = desk.seat(msgspec.msgpack.decode(arguments)["user"]).account
        session.log_in()

    server = Running(tmp_path / "server", {**desk.operations, "login": log_in})
    server.server.watch(desk.store.descriptor, lambda _r, _w: desk.store.turn())
    with server, server.client("127.0.0.3") as one, server.client("127.0.0.4") as two:
        one.request("login", {"user": "write"})
        two.request("login", {"user": "read"})
        moved = one.request("volume.move", {"volume": A, "to": "VLT1"})
        with pytest.raises(RequestFailed) as refused:
            two.request("volume.move", {"volume": A, "to": "RACK"})
        assert refused.value.code == "denied"
        history = two.request("volume.history", {"volume": A})
        assert history[0][0][0] == moved[0]
        assert history[0][0][2:6] == ["write", history[0][0][3], "127.0.0.3", "move"]
        assert one.request("volume.list", {"moving": True})[0][0][0] == A


def test_a_batch_does_all_in_one_and_gives_each_result(desk: Desk) -> None:
    answer = desk.ask(
        "alter",
        "batch",
        operations=[
            ["volume.add", {"volume": A, "repository": "LIBR"}],
            ["volume.move", {"volume": A, "to": "VLT1"}],
            ["volume.scan_in", {"volume": "A00001", "repository": VLT1}],
        ],
    )
    written = [msgspec.msgpack.decode(result) for result in answer.results]
    assert [written[0][0] + 1, written[1][0] + 1] == [written[1][0], written[2][3]]
    assert written[2][0] == "ok"
    assert desk.state() == ("VLT1", "", "VLT1", "CO")
    assert desk.ask("alter", "batch", operations=[]).results == []


@pytest.mark.parametrize(
    ("step", "code", "message"),
    [
        (["volume.move", {"volume": A, "to": "NONE"}], "not_found", "there is no Repository US01.LTO.NONE"),
        (["volume.move", {"volume": A}], "malformed", "Object missing required field `to`"),
        (["volume.add", {"volume": "a", "repository": "LIBR"}], "invalid", "volume: must be written CUSTOMER.MEDIA"),
        (["volume.get", {"volume": A}], "invalid", "must be one that changes a record"),
        (["user.add", {"user": "x"}], "invalid", "must be one that changes a record"),
        (["nothing", {}], "unknown_operation", "must be one that changes a record"),
        (["customer.add", {"customer": "US09"}], "denied", "alter has no administrator right for Customer US09"),
    ],
)
def test_a_batch_that_fails_in_the_middle_changes_nothing_and_says_where(
    desk: Desk, step: list[Any], code: str, message: str
) -> None:
    desk.volume()
    before = desk.store.sequence, desk.store.hash
    first = [["volume.update", {"volume": A, "description": "x"}], ["volume.delete", {"volume": A}]]
    again = ["volume.add", {"volume": A, "repository": "RACK"}]
    found = desk.error("alter", "batch", operations=[*first, again, step, ["volume.delete", {"volume": A}]])
    assert found[0] == code
    name = step[0] if step[0] in OPERATIONS else f"{step[0]!r}"  # what a client made up is quoted
    assert found[1].startswith(f"operation 4 ({name}): {message}")
    assert (desk.store.sequence, desk.store.hash) == before
    assert desk.volume().description == ""
    desk.ask("alter", "volume.update", volume=A, description="y")  # and what comes next is as if it had never been
    assert desk.store.sequence == before[0] + 1


def test_a_batch_has_a_limit(desk: Desk) -> None:
    desk.volume()
    step = ["volume.update", {"volume": A}]
    code, message = desk.error("write", "batch", operations=[step] * (MAX_BATCH + 1))
    assert (code, message) == ("invalid", f"operations: must be at most {MAX_BATCH}, not {MAX_BATCH + 1}")
    assert len(desk.ask("write", "batch", operations=[step] * MAX_BATCH).results) == MAX_BATCH


# ---- the store fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["volume.move", "batch", "volume.move_pending"])
def test_a_change_that_could_not_be_stored_says_so_and_has_not_happened(desk: Desk, operation: str) -> None:
    desk.volume(flags="p")
    move = {"volume": A, "to": "VLT1"}
    arguments = {"volume.move": move, "batch": {"operations": [["volume.move", move]]}}.get(operation, {})
    with no_file_grows():
        code, message = desk.error("write", operation, **arguments)
        assert desk.state() == ("LIBR", "", "", "p")  # reads go on
    assert code == "storage"
    assert "disk" in message
    assert desk.code("write", operation, **arguments) == ""
    assert desk.state() == ("LIBR", "VLT1", "", "M")
