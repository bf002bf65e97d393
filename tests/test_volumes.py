"""Volumes: their life cycle with every letter, their fields at the limits, lists, histories, moves that are due."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from catalog_kit import NOON, TODAY, TOMORROW, YESTERDAY, Desk
from harness import Running

from tt.catalog import volumes
from tt.catalog.messages import MAX_BATCH, OPERATIONS, PAGE
from tt.catalog.model import FLAGS, OVERDUE_AFTER, SETTABLE, Access, Media, Volume
from tt.catalog.rights import Desk as Desktop
from tt.catalog.rights import Reader
from tt.client import RequestFailed

A = "US01.LTO.A00001"
LIBR, VLT1, RACK = "US01.LTO.LIBR", "US01.LTO.VLT1", "US01.LTO.RACK"
DAY = 86_400


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Desk(tmp_path) as made:
        yield made


def state(desk: Desk, name: str = A) -> tuple[str, str, str, str]:
    """Where it is, where it is to go, where it was scanned, its letters."""
    shown = desk.ask("read", "volume.get", volume=name)
    return shown.current, shown.target, shown.scanned, shown.flags


def events(desk: Desk, name: str = A) -> list[str]:
    """What its history says has happened, oldest first."""
    return [row.event for row in desk.ask("read", "volume.history", volume=name).entries[::-1]]


# ---- the life cycle -------------------------------------------------------------------------------------------------


def test_a_move_with_both_scans_leaves_the_letters_of_each_step(desk: Desk) -> None:
    desk.ask("alter", "volume.add", volume=A, repository="LIBR", flags="Kap")
    assert state(desk) == ("LIBR", "", "", "aKp")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    assert state(desk) == ("LIBR", "VLT1", "", "aKM")
    out = desk.ask("write", "volume.scan_out", volume="A00001", repository=LIBR)
    assert (out.verdict, out.volume, out.message) == ("ok", A, "on its way to VLT1")
    assert state(desk) == ("LIBR", "VLT1", "LIBR", "aKMU")
    at_target = desk.ask("write", "volume.scan_in", volume=A, repository=VLT1)
    assert (at_target.verdict, at_target.message) == ("ok", "arrived")
    assert state(desk) == ("VLT1", "", "VLT1", "CO")
    assert events(desk) == ["add", "move", "scan_out", "scan_in"]


def test_a_scan_where_a_volume_is_confirms_it(desk: Desk) -> None:
    desk.volume(flags="WaK")
    answer = desk.ask("write", "volume.scan_in", volume=A, repository=LIBR)
    assert (answer.verdict, answer.message) == ("ok", "confirmed")
    assert state(desk) == ("LIBR", "", "LIBR", "C")


@pytest.mark.parametrize(
    ("operation", "fields", "repository", "message"),
    [
        ("volume.scan_in", {}, VLT1, "should be in LIBR"),
        ("volume.scan_in", {"target": "VLT1"}, RACK, "should come to VLT1"),
        ("volume.scan_in", {"target": "VLT1"}, LIBR, "should come to VLT1"),
        ("volume.scan_out", {}, LIBR, "is not to move"),
        ("volume.scan_out", {}, VLT1, "should be in LIBR"),
        ("volume.scan_out", {"target": "VLT1"}, VLT1, "should be in LIBR"),
    ],
)
def test_a_scan_at_the_wrong_place_is_recorded_and_flagged(
    desk: Desk, operation: str, fields: dict[str, str], repository: str, message: str
) -> None:
    desk.volume(**fields, requested=int(NOON) if fields else 0)
    answer = desk.ask("write", operation, volume="A00001", repository=repository)
    assert (answer.verdict, answer.message) == ("wrong", message)
    assert state(desk) == ("LIBR", fields.get("target", ""), repository[-4:], "aM" if fields else "a")
    assert events(desk)[-1] == "wrong_scan"
    assert answer.sequence == desk.store.sequence
    assert answer.hash == desk.store.hash


@pytest.mark.parametrize("operation", ["volume.scan_in", "volume.scan_out"])
@pytest.mark.parametrize("barcode", ["A99999", "US01.DLT.D00001", "US01.LTO.A99999", "#", "a00001", "", "A" * 500])
def test_a_scan_of_what_is_no_volume_there_is_unknown_and_writes_nothing(
    desk: Desk, operation: str, barcode: str
) -> None:
    desk.volume("US01.DLT.D00001")
    before = desk.store.sequence
    answer = desk.ask("write", operation, volume=barcode, repository=LIBR)
    assert (answer.verdict, answer.sequence, answer.hash) == ("unknown", 0, b"")
    assert answer.message
    assert len(answer.message) < 200
    assert barcode.startswith(answer.volume) or answer.volume == f"US01.LTO.{barcode}"
    assert desk.store.sequence == before


def test_a_move_called_off_leaves_w_where_it_had_left(desk: Desk) -> None:
    desk.volume(flags="C")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    assert state(desk)[3] == "M"
    desk.ask("write", "volume.cancel", volume=A)
    assert state(desk) == ("LIBR", "", "", "")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    desk.ask("write", "volume.scan_out", volume=A, repository=LIBR)
    desk.ask("write", "volume.cancel", volume=A)
    assert state(desk) == ("LIBR", "", "LIBR", "W")
    desk.ask("write", "volume.scan_in", volume=A, repository=LIBR)
    assert state(desk)[3] == "C"


def test_a_move_clears_the_letters_of_the_one_before_and_that_it_was_pending(desk: Desk) -> None:
    desk.volume(flags="CEWp")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    assert state(desk)[3] == "EM"


def test_a_move_back_to_where_it_is_is_a_cancel(desk: Desk) -> None:
    desk.volume(target="VLT1", requested=5, flags="U")
    desk.ask("write", "volume.move", volume=A, to="LIBR", description="stays")
    assert state(desk) == ("LIBR", "", "", "NW")
    assert events(desk)[-1] == "cancel"
    assert desk.volume().requested == 0


def test_a_move_while_moving_has_the_new_target_and_the_scan_out_still_counts(desk: Desk) -> None:
    desk.volume(target="VLT1", requested=5, flags="U")
    desk.ask("write", "volume.move", volume=A, to="RACK")
    assert state(desk) == ("LIBR", "RACK", "", "MU")
    assert desk.volume().requested == int(NOON)


def test_who_asks_again_for_the_same_move_does_not_make_it_younger(desk: Desk) -> None:
    desk.ask("alter", "volume.add", volume=A, repository="LIBR")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    desk.now += OVERDUE_AFTER
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    assert state(desk)[3] == "Mo"


def test_a_move_is_overdue_two_days_after_it_was_asked_for(desk: Desk) -> None:
    desk.volume(target="VLT1", requested=int(NOON))
    for later, letters in ((0, "M"), (OVERDUE_AFTER - 1, "M"), (OVERDUE_AFTER, "Mo"), (10 * OVERDUE_AFTER, "Mo")):
        desk.now = NOON + later
        assert state(desk)[3] == letters


def test_a_date_has_come_at_midnight_in_utc(desk: Desk) -> None:
    desk.volume(move_date=TOMORROW)
    for now, letters in ((NOON, "D"), (NOON + DAY / 2 - 1, "D"), (NOON + DAY / 2, "Dd"), (NOON + 9 * DAY, "Dd")):
        desk.now = now
        assert state(desk)[3] == letters


@pytest.mark.parametrize(("date", "after"), [(TODAY, ""), (YESTERDAY, ""), (TOMORROW, TOMORROW), ("", "")])
def test_an_arrival_is_done_with_a_date_that_has_come_and_no_other(desk: Desk, date: str, after: str) -> None:
    desk.volume(target="VLT1", requested=5, move_date=date)
    desk.ask("write", "volume.scan_in", volume=A, repository=VLT1)
    assert desk.volume().move_date == after


def test_a_confirmation_keeps_a_date_that_has_come(desk: Desk) -> None:
    desk.volume(move_date=TODAY)
    desk.ask("write", "volume.scan_in", volume=A, repository=LIBR)
    assert desk.volume().move_date == TODAY


def test_a_move_may_set_date_and_description(desk: Desk) -> None:
    desk.volume(move_date=TODAY, description="old")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    assert (desk.volume().move_date, desk.volume().description) == (TODAY, "old")
    desk.ask("write", "volume.move", volume=A, to="VLT1", move_date="", description="new")
    assert (desk.volume().move_date, desk.volume().description) == ("", "new")


def test_an_answer_is_kept_until_something_of_it_changes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    shown = volumes.shown
    monkeypatch.setattr(volumes, "shown", lambda at, volume: made.append(volume.name) or shown(at, volume))
    steps: list[tuple[Callable[[], object], str]] = [
        (lambda: desk.volume(move_date=TOMORROW), "D"),
        (lambda: desk.ask("catalog", "repository.change", repository=LIBR, offsite=True), "DO"),
        (lambda: setattr(desk, "now", NOON + DAY / 2), "DdO"),
        (lambda: desk.ask("write", "volume.move", volume=A, to="VLT1"), "DdMO"),
        (lambda: setattr(desk, "now", NOON + DAY / 2 + OVERDUE_AFTER), "DdMOo"),
        (lambda: desk.ask("write", "volume.scan_in", volume=A, repository=VLT1), "CO"),
        (lambda: desk.ask("write", "volume.update", volume=A, description="x"), "CNO"),
    ]
    for number, (step, letters) in enumerate(steps, 1):
        step()
        assert [state(desk)[3] for _ in range(3)] == [letters] * 3
        assert len(made) == number
    desk.ask("write", "volume.move", volume=A, to="LIBR")
    desk.ask("write", "volume.scan_in", volume=A, repository=LIBR)
    state(desk)
    desk.ask("alter", "volume.delete", volume=A)
    assert desk.code("read", "volume.get", volume=A) == "not_found"
    desk.ask("alter", "volume.add", volume=A, repository="RACK")
    assert state(desk) == ("RACK", "", "", "")


def test_no_more_answers_are_kept_than_the_limit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "ANSWERS_KEPT", 3)
    names = [f"US01.LTO.A{n}" for n in range(8)]
    desk.put(*(Volume(name, "LIBR") for name in names))
    answers = volumes.Answers()
    at = Reader(Desktop(desk.store, desk.accounts.rights, lambda: desk.now), desk.seat("tapemaster").account, "read")
    desk.accounts.rights.current(at.account)
    for name in names:
        made = answers.make(at, name)
        assert answers.find(at, name) is made
        assert sum(answers.find(at, other) is not None for other in names) <= 3


def test_every_letter_is_reached_by_some_operation(desk: Desk) -> None:
    seen = set()
    desk.ask("alter", "volume.add", volume=A, repository="LIBR", flags="".join(sorted(SETTABLE - {"L", "l"})))
    seen |= set(state(desk)[3])
    desk.ask("write", "volume.update", volume=A, description="x", move_date=TODAY)
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    desk.ask("write", "volume.scan_out", volume=A, repository=LIBR)
    desk.now += OVERDUE_AFTER
    seen |= set(state(desk)[3])
    desk.ask("write", "volume.cancel", volume=A)
    seen |= set(state(desk)[3])
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    desk.ask("write", "volume.scan_in", volume=A, repository=VLT1)
    desk.ask("write", "volume.update", volume=A, set_flags="lL")
    seen |= set(state(desk)[3])
    assert seen == set(FLAGS)


# ---- what the state of a Volume forbids -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "operation", "arguments", "message"),
    [
        ({"flags": "l"}, "volume.move", {"to": "VLT1"}, f"{A} has the move lock: clear its flag l first"),
        ({}, "volume.move", {"to": "LIBR"}, f"{A} is in LIBR already"),
        ({}, "volume.cancel", {}, f"{A} is not moving"),
        ({"target": "VLT1"}, "volume.delete", {}, f"{A} is moving to VLT1: cancel the move first"),
        ({"current": "VLT1"}, "volume.delete", {}, f"{A} is in {VLT1}, which does not allow deletes"),
    ],
)
def test_a_state_that_forbids_an_operation_is_a_conflict_which_says_why(
    desk: Desk, fields: dict[str, str], operation: str, arguments: dict[str, str], message: str
) -> None:
    desk.volume(**fields)
    before = desk.store.sequence
    assert desk.error("alter", operation, volume=A, **arguments) == ("conflict", message)
    assert desk.store.sequence == before


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("volume.update", {"description": "x"}),
        ("volume.move", {"to": "RACK"}),
        ("volume.cancel", {}),
        ("volume.delete", {}),
    ],
)
def test_the_update_lock_leaves_a_volume_to_tapemaster(desk: Desk, operation: str, arguments: dict[str, str]) -> None:
    moving = {"target": "VLT1", "requested": 5} if operation == "volume.cancel" else {}
    desk.volume(flags="L", **moving)
    code, message = desk.error("alter", operation, volume=A, **arguments)
    assert code == "denied"
    assert "L" in message
    assert "tapemaster" in message
    assert desk.code("tapemaster", operation, volume=A, **arguments) == ""


def test_a_scan_is_a_fact_which_no_lock_hides(desk: Desk) -> None:
    desk.volume(flags="Ll", target="VLT1", requested=5)
    assert desk.ask("write", "volume.scan_out", volume=A, repository=LIBR).verdict == "ok"
    assert desk.ask("write", "volume.scan_in", volume=A, repository=VLT1).verdict == "ok"
    assert state(desk)[3] == "CLlO"


def test_a_move_under_way_can_be_called_off_under_the_move_lock(desk: Desk) -> None:
    desk.volume(flags="l", target="VLT1", requested=5)
    assert desk.code("write", "volume.cancel", volume=A) == ""


@pytest.mark.parametrize(
    ("operation", "arguments", "message"),
    [
        ("volume.add", {"repository": "NONE"}, "there is no Repository US01.LTO.NONE"),
        ("volume.move", {"to": "NONE"}, "there is no Repository US01.LTO.NONE"),
        ("volume.get", {"volume": "US01.LTO.A99999"}, "there is no Volume US01.LTO.A99999"),
        ("volume.add", {"volume": "US01.NONE.A1", "repository": "LIBR"}, "there is no Media type US01.NONE"),
        ("volume.scan_in", {"repository": "US01.LTO.NONE"}, "there is no Repository US01.LTO.NONE"),
    ],
)
def test_what_is_not_there_is_named(desk: Desk, operation: str, arguments: dict[str, str], message: str) -> None:
    desk.volume()
    assert desk.error("alter", operation, **{"volume": A, **arguments}) == ("not_found", message)


def test_a_volume_is_added_once(desk: Desk) -> None:
    desk.volume()
    assert desk.error("alter", "volume.add", volume=A, repository="LIBR") == (
        "exists", f"there is a Volume {A} already",
    )  # fmt: skip


def test_a_media_type_is_full_at_its_own_limit_also_within_a_batch(desk: Desk) -> None:
    desk.put(msgspec.structs.replace(desk.store.get(Media, "US01.LTO"), max_volumes=2))
    add = [["volume.add", {"volume": f"US01.LTO.A{n}", "repository": "LIBR"}] for n in range(3)]
    code, message = desk.error("alter", "batch", operations=add)
    assert (code, message) == (
        "full", "operation 3 (volume.add): US01.LTO has the 2 Volumes that its max_volumes allows",
    )  # fmt: skip
    assert desk.store.count("US01.LTO") == 0
    desk.ask("alter", "batch", operations=add[:2])
    assert desk.code("alter", "volume.add", **add[2][1]) == "full"
    desk.ask("alter", "volume.delete", volume="US01.LTO.A0")
    assert desk.code("alter", "volume.add", **add[2][1]) == ""


def test_a_name_that_was_deleted_goes_on_with_its_history(desk: Desk) -> None:
    desk.ask("alter", "volume.add", volume=A, repository="LIBR")
    desk.ask("alter", "volume.delete", volume=A)
    assert desk.code("read", "volume.get", volume=A) == "not_found"
    assert events(desk) == ["add", "delete"]
    desk.ask("alter", "volume.add", volume=A, repository="RACK")
    assert events(desk) == ["add", "delete", "add"]


def test_flags_are_set_and_cleared_together_and_never_the_same(desk: Desk) -> None:
    desk.volume(flags="EQ")
    desk.ask("write", "volume.update", volume=A, set_flags="hh", clear_flags="Qt")
    assert desk.volume().flags == "Eh"
    code, message = desk.error("write", "volume.update", volume=A, set_flags="Qh", clear_flags="hEQ")
    assert (code, message) == ("invalid", "set_flags, clear_flags: must not both have Qh")


# ---- fields ---------------------------------------------------------------------------------------------------------

# field of an operation -> what fits, what does not; `A` and LIBR stand where the others need something
DESCRIPTIONS = (["", "x" * 256, "\u00e4 \u65e5"], ["x" * 257, "a\nb", "\0"])
DATES = (["", TODAY, "9999-12-31", "0001-01-01"], ["2026-02-30", "20261123", "2026-1-1", "tomorrow", "2026-11-23T00"])
FLAG_SETS = (["", "".join(sorted(SETTABLE)), "EE"], ["M", "C", "x", "E ", "\u00e9"])
NAMES = (
    ["US01.LTO.AA", "US01.LTO.A123456789", "US01.LTO.0-"],
    ["", "A00001", "US01.LTO", "US01.LTO.A", "US01.LTO.A1234567890", "US01.LTO.-A", "US01.LTO.a1", "US01.LTO.A1\n",
     "us01.LTO.A1", "US011.LTO.A1", "US01.LTO.A1.A1", "US01.LTO.A_1", "\u00dcS.LTO.A1"],
)  # fmt: skip
IDS = (["LIBR"], ["", "LIBRA", "libr", LIBR, "L-", "\u00c4"])
REPOSITORIES = ([LIBR], ["LIBR", "US01.LTO.LIBRA", "US01..LIBR", "us01.lto.libr"])
LIMITS: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("volume.add", "volume"): NAMES,
    ("volume.add", "repository"): IDS,
    ("volume.add", "description"): DESCRIPTIONS,
    ("volume.add", "flags"): FLAG_SETS,
    ("volume.add", "move_date"): DATES,
    ("volume.get", "volume"): NAMES,
    ("volume.move", "volume"): NAMES,
    ("volume.move", "to"): (["VLT1"], IDS[1]),
    ("volume.move", "move_date"): DATES,
    ("volume.move", "description"): DESCRIPTIONS,
    ("volume.cancel", "volume"): NAMES,
    ("volume.update", "volume"): NAMES,
    ("volume.update", "description"): DESCRIPTIONS,
    ("volume.update", "move_date"): DATES,
    ("volume.update", "set_flags"): FLAG_SETS,
    ("volume.update", "clear_flags"): FLAG_SETS,
    ("volume.delete", "volume"): NAMES,
    ("volume.history", "volume"): NAMES,
    ("volume.history", "before"): ([0, 1, 2**63 - 1], [-1, 2**63]),
    ("volume.history", "limit"): ([1, PAGE], [0, -1, PAGE + 1]),
    ("volume.scan_in", "repository"): REPOSITORIES,
    ("volume.scan_in", "volume"): (["A00001", A, "no barcode"], []),
    ("volume.scan_out", "repository"): REPOSITORIES,
    ("volume.scan_out", "volume"): (["A00001", A, "no barcode"], []),
    ("volume.list", "scope"): (
        ["", "US01", "US01.LTO", "US01.LTO.A*", "US01.LTO.[A-C]?0[!1]*", A, "US01.LTO." + "?" * 40],
        ["us01", "US01*", "US01.L*", "US01.LTO.a*", "US01.LTO.", "US01.LTO." + "?" * 41, "US01.LTO.A.B", "*"],
    ),
    ("volume.list", "repository"): (["", LIBR], REPOSITORIES[1]),
    ("volume.list", "target"): (["", LIBR], REPOSITORIES[1]),
    ("volume.list", "flags"): (["", "".join(FLAGS)], ["x", "M "]),
    ("volume.list", "after"): (["", A, "~" * 40], ["~" * 41, "\n"]),
    ("volume.list", "limit"): ([1, PAGE], [0, -1, PAGE + 1]),
    ("volume.move_pending", "scope"): (["", "US01", "US01.LTO"], ["us01", "US01*", "US011"]),
    ("volume.move_pending", "after"): (["", A], ["~" * 41]),
}
BASE: dict[str, dict[str, Any]] = {
    "volume.add": {"volume": "US01.LTO.NEW", "repository": "LIBR"},
    "volume.move": {"volume": A, "to": "VLT1"},
    "volume.scan_in": {"volume": A, "repository": LIBR},
    "volume.scan_out": {"volume": A, "repository": LIBR},
    "volume.list": {},
    "volume.move_pending": {},
}


@pytest.mark.parametrize(("operation", "field"), LIMITS, ids=map(" ".join, LIMITS))
def test_a_field_is_taken_at_its_limits_and_named_beyond_them(desk: Desk, operation: str, field: str) -> None:
    desk.volume()
    fitting, wrong = LIMITS[operation, field]
    base = BASE.get(operation, {"volume": A})
    for value in fitting:
        assert desk.code("tapemaster", operation, **{**base, field: value}) in ("", "not_found", "conflict", "exists")
    before = desk.store.sequence
    for value in wrong:
        code, message = desk.error("tapemaster", operation, **{**base, field: value})
        assert code == "invalid", (value, code, message)
        assert ": must be " in message
        assert "\n" not in message
        assert len(message) < 250
    assert desk.store.sequence == before


# ---- two at once, batches -------------------------------------------------------------------------------------------


def test_of_two_who_move_one_tape_in_one_commit_the_second_sees_what_the_first_did(desk: Desk) -> None:
    desk.volume()
    first = desk.begin("write", "volume.move", volume=A, to="VLT1")
    second = desk.begin("alter", "volume.move", volume=A, to="RACK")
    assert desk.store.get(Volume, A).target == ""  # nothing is shown before it is on disk
    one, two = desk.finish(first), desk.finish(second)
    assert two.sequence == one.sequence + 1
    assert state(desk)[1] == "RACK"
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
    assert state(desk) == ("VLT1", "", "VLT1", "CO")
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


# ---- lists ----------------------------------------------------------------------------------------------------------


def listed(desk: Desk, user: str = "read", **asked: Any) -> list[str]:
    """The ids of all pages."""
    found: list[str] = []
    after = ""
    while True:
        page = desk.ask(user, "volume.list", after=after, **asked)
        found += [entry.name.removeprefix("US01.LTO.") for entry in page.entries]
        if not page.next:
            return found
        assert page.next > after
        after = page.next


@pytest.fixture
def shelf(desk: Desk) -> Desk:
    """Twelve Volumes of several kinds."""
    desk.put(
        *(Volume(f"US01.LTO.A{n}0", "LIBR") for n in range(4)),
        *(Volume(f"US01.LTO.B{n}0", "VLT1", target="LIBR", requested=int(NOON)) for n in range(2)),
        Volume("US01.LTO.C00", "RACK", target="VLT1", requested=5, flags="QU"),
        Volume("US01.LTO.D00", "RACK", move_date=TODAY, description="x", flags="Eh"),
        Volume("US01.DLT.A00", "LIBR"),
        Volume("US02.LTO.A00", "LIBR", target="LIBR", requested=5),
    )
    return desk


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, ["US01.DLT.A00", "A00", "A10", "A20", "A30", "B00", "B10", "C00", "D00"]),
        ({"scope": "US01"}, ["US01.DLT.A00", "A00", "A10", "A20", "A30", "B00", "B10", "C00", "D00"]),
        ({"scope": "US01.DLT"}, ["US01.DLT.A00"]),
        ({"scope": "US01.LTO.*10"}, ["A10", "B10"]),
        ({"scope": "US01.LTO.[AB]?0", "repository": VLT1}, ["B00", "B10"]),
        ({"scope": "US01.LTO.[!A]*"}, ["B00", "B10", "C00", "D00"]),
        ({"scope": "US01.LTO.A20"}, ["A20"]),
        ({"scope": "US01.LTO.A2"}, []),
        ({"repository": LIBR}, ["A00", "A10", "A20", "A30"]),
        ({"repository": LIBR, "scope": "US01.DLT"}, []),
        ({"target": VLT1}, ["C00"]),
        ({"target": LIBR, "repository": VLT1}, ["B00", "B10"]),
        ({"target": LIBR, "repository": "US01.DLT.LIBR"}, []),
        ({"moving": True}, ["B00", "B10", "C00"]),
        ({"moving": True, "repository": RACK}, ["C00"]),
        ({"moving": True, "scope": "US01.LTO.B1*"}, ["B10"]),
        ({"overdue": True}, ["C00"]),
        ({"flags": "UQ"}, ["C00"]),
        ({"flags": "dN"}, ["D00"]),
        ({"flags": "O"}, ["B00", "B10"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [1, 3, PAGE])
def test_a_list_has_what_fits_all_that_is_asked_for_whatever_its_pages(
    shelf: Desk, asked: dict[str, Any], found: list[str], limit: int
) -> None:
    assert listed(shelf, limit=limit, **asked) == found


def test_a_list_of_all_has_the_customers_that_the_user_may_read(shelf: Desk) -> None:
    assert listed(shelf, "none") == []
    assert len(listed(shelf, "tapemaster")) == 10
    assert listed(shelf, "tapemaster", scope="US02") == ["US02.LTO.A00"]
    shelf.put(Access("none US*", 1), Access("none US02", 1))
    assert len(listed(shelf, "none", limit=2)) == 10
    assert shelf.code("read", "volume.list", scope="US02") == "not_found"
    assert shelf.code("read", "volume.list", repository="US02.LTO.LIBR") == "not_found"


def test_a_page_looks_at_four_times_its_limit_and_no_more(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.put(*(Volume(f"US01.LTO.A{n:04}", "LIBR", flags="E" * (n == 99)) for n in range(100)))
    looked_at = []
    volumes_of = desk.store.volumes

    def counting(*arguments: Any, **options: Any) -> list[Volume]:
        looked_at.append(len(found := volumes_of(*arguments, **options)))
        return found

    monkeypatch.setattr(desk.store, "volumes", counting)
    page = desk.ask("read", "volume.list", flags="E", limit=10)
    assert (page.entries, page.next, sum(looked_at)) == ([], "US01.LTO.A0039", 40)
    assert listed(desk, flags="E", limit=10) == ["A0099"]


def test_who_pages_while_others_add_and_delete_sees_each_volume_that_stays_exactly_once(desk: Desk) -> None:
    stays = [f"US01.LTO.A{n:04}" for n in range(0, 600, 2)]
    goes = [f"US01.LTO.A{n:04}" for n in range(1, 600, 2)]
    desk.put(*(Volume(name, "LIBR") for name in stays + goes[::2]))
    seen: list[str] = []
    after = ""
    turns = 0
    while True:
        work = desk.begin("read", "volume.list", after=after, limit=250)
        while True:
            try:
                next(work)
            except StopIteration as end:
                page = end.value
                break
            turns += 1
            changes = [desk.begin("alter", "volume.add", volume=goes[2 * turns + 1], repository="LIBR")]
            changes.append(desk.begin("alter", "volume.delete", volume=goes[2 * turns]))
            for change in changes:
                desk.finish(change)
        seen += [entry.name for entry in page.entries]
        if not page.next:
            break
        after = page.next
    assert turns >= 3
    assert seen == sorted(set(seen))
    assert set(stays) <= set(seen)


def test_a_list_ends_its_page_where_rights_change_under_way(desk: Desk) -> None:
    desk.put(*(Volume(f"US01.LTO.A{n:04}", "LIBR") for n in range(700)))
    work = desk.begin("read", "volume.list")
    assert next(work) is None
    desk.put(msgspec.structs.replace(desk.store.get(Access, "read US01"), level=0))
    with pytest.raises(StopIteration) as end:
        next(work)
    page = end.value.value
    assert (len(page.entries), page.next) == (volumes.SLICE, f"US01.LTO.A{volumes.SLICE - 1:04}")
    assert listed(desk) == []


# ---- history --------------------------------------------------------------------------------------------------------


def test_a_history_is_paged_newest_first(desk: Desk) -> None:
    desk.ask("alter", "volume.add", volume=A, repository="LIBR")
    for n in range(12):
        desk.ask("write", "volume.update", volume=A, description=f"{n}")
    rows: list[Any] = []
    before = 0
    while True:
        page = desk.ask("read", "volume.history", volume=A, before=before, limit=5)
        rows += page.entries
        if not page.next:
            break
        before = page.next
    assert [row.changes.get("description") for row in rows[:2]] == [("10", "11"), ("9", "10")]
    assert [row.event for row in rows] == ["change"] * 12 + ["add"]
    assert [row.previous for row in rows] == [row.sequence for row in rows[1:]] + [0]
    assert {(row.user, row.interface, row.source, row.place) for row in rows[:-1]} == {
        ("write", "tests", "127.0.0.2", "LIBR")
    }


def test_a_row_of_another_record_is_no_place_to_go_on_from(desk: Desk) -> None:
    desk.volume()
    other = desk.volume("US02.LTO.A00001")
    page = desk.ask("read", "volume.history", volume=A, before=other.last)
    assert (page.entries, page.next) == ([], 0)


def test_a_long_history_is_given_in_slices(desk: Desk) -> None:
    for n in range(volumes.HISTORY_SLICE + 1):
        desk.volume(description=f"{n}")
    work = desk.begin("read", "volume.history", volume=A, limit=PAGE)
    assert next(work) is None
    assert len(desk.finish(work).entries) == volumes.HISTORY_SLICE + 1


# ---- the moves that are due -----------------------------------------------------------------------------------------


@pytest.fixture
def due(desk: Desk) -> Desk:
    """Volumes of which some are due."""
    desk.put(
        Volume("US01.LTO.DATE", "LIBR", move_date=TODAY),
        Volume("US01.LTO.EARLY", "LIBR", move_date=TOMORROW),
        Volume("US01.LTO.FLAG", "LIBR", flags="p"),
        Volume("US01.LTO.GOES", "LIBR", target="RACK", requested=5, flags="p", move_date=TODAY),
        Volume("US01.LTO.HELD", "LIBR", flags="lp"),
        Volume("US01.LTO.KEPT", "LIBR", flags="L", move_date=YESTERDAY),
        Volume("US01.LTO.LAST", "VLT1", flags="p"),
        Volume("US01.LTO.REST", "LIBR"),
        Volume("US02.LTO.FLAG", "LIBR", flags="p"),
    )
    return desk


DUE = [
    ("US01.LTO.DATE", "LIBR", "VLT1", ""),
    ("US01.LTO.FLAG", "LIBR", "VLT1", ""),
    ("US01.LTO.HELD", "LIBR", "VLT1", "has the move lock (flag l)"),
    ("US01.LTO.KEPT", "LIBR", "VLT1", "has the update lock (flag L): only tapemaster may move it"),
    ("US01.LTO.LAST", "VLT1", "", "VLT1 has no next Repository"),
]


def entries(page: Any) -> list[tuple[str, str, str, str]]:
    return [(entry.volume, entry.origin, entry.target, entry.problem) for entry in page.entries]


@pytest.mark.parametrize("scope", ["", "US01", "US01.LTO"])
def test_a_dry_run_says_what_would_move_and_moves_nothing(due: Desk, scope: str) -> None:
    before = due.store.sequence
    page = due.ask("write", "volume.move_pending", scope=scope, dry_run=True)
    assert entries(page) == DUE
    assert (page.next, page.sequence, page.hash, due.store.sequence) == ("", 0, b"", before)


def test_the_moves_that_are_due_are_started_once(due: Desk) -> None:
    page = due.ask("write", "volume.move_pending")
    assert entries(page) == DUE
    assert (page.sequence, page.hash) == (due.store.sequence, due.store.hash)
    assert state(due, "US01.LTO.DATE") == ("LIBR", "VLT1", "", "DdM")
    assert state(due, "US01.LTO.FLAG") == ("LIBR", "VLT1", "", "M")
    assert events(due, "US01.LTO.DATE")[-1] == "move"
    assert due.store.get(Volume, "US02.LTO.FLAG").target == ""
    again = due.ask("write", "volume.move_pending")
    assert entries(again) == DUE[2:]
    assert (again.sequence, again.hash) == (0, b"")


def test_a_date_moves_a_volume_when_it_comes_and_no_more_once_it_has_arrived(due: Desk) -> None:
    due.now += DAY
    assert "US01.LTO.EARLY" in [entry[0] for entry in entries(due.ask("write", "volume.move_pending"))]
    due.ask("write", "volume.scan_in", volume="EARLY", repository=VLT1)
    due.now += DAY
    assert "US01.LTO.EARLY" not in [entry[0] for entry in entries(due.ask("write", "volume.move_pending"))]


def test_tapemaster_moves_what_is_under_the_update_lock(due: Desk) -> None:
    page = due.ask("tapemaster", "volume.move_pending")
    assert ("US01.LTO.KEPT", "LIBR", "VLT1", "") in entries(page)
    assert "US02.LTO.FLAG" in [entry[0] for entry in entries(page)]


def test_what_was_moved_by_another_since_it_was_found_due_is_left_alone(due: Desk) -> None:
    work = due.begin("write", "volume.move_pending")
    assert next(work) is None  # it has looked
    due.ask("alter", "volume.move", volume="US01.LTO.DATE", to="RACK")
    due.ask("alter", "volume.delete", volume="US01.LTO.FLAG")
    assert entries(due.finish(work)) == DUE[2:]
    assert state(due, "US01.LTO.DATE")[1] == "RACK"


def test_who_has_lost_the_right_since_it_was_found_due_moves_nothing(due: Desk) -> None:
    work = due.begin("write", "volume.move_pending")
    assert next(work) is None
    due.put(msgspec.structs.replace(due.store.get(Access, "write US01"), level=1))
    assert entries(due.finish(work)) == []
    assert state(due, "US01.LTO.DATE")[1] == ""


def test_moves_that_are_due_wait_for_the_commit_under_way(due: Desk) -> None:
    work = due.begin("write", "volume.move_pending")
    assert next(work) is None
    other = due.begin("alter", "volume.update", volume="US01.LTO.REST", description="x")
    due.store.turn()
    busy = due.store.busy
    assert busy is not None
    assert next(work) is busy
    due.finish(other)
    assert entries(due.finish(work)) == DUE


def test_many_moves_that_are_due_come_in_pages(desk: Desk) -> None:
    desk.put(*(Volume(f"US01.LTO.A{n:04}", "LIBR", flags="p") for n in range(PAGE + volumes.SLICE + 50)))
    first = desk.ask("write", "volume.move_pending")
    assert first.next == f"US01.LTO.A{PAGE - 1:04}"
    second = desk.ask("write", "volume.move_pending", after=first.next)
    assert (len(first.entries), len(second.entries), second.next) == (PAGE, volumes.SLICE + 50, "")
    assert desk.store.moving == PAGE + volumes.SLICE + 50


# ---- the store fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["volume.move", "batch", "volume.move_pending"])
def test_a_change_that_could_not_be_stored_says_so_and_has_not_happened(desk: Desk, operation: str) -> None:
    desk.volume(flags="p")
    move = {"volume": A, "to": "VLT1"}
    arguments = {"volume.move": move, "batch": {"operations": [["volume.move", move]]}}.get(operation, {})
    with desk.full_disk():
        code, message = desk.error("write", operation, **arguments)
        assert state(desk) == ("LIBR", "", "", "p")  # reads go on
    assert code == "storage"
    assert "disk" in message
    assert desk.code("write", operation, **arguments) == ""
    assert state(desk) == ("LIBR", "VLT1", "", "M")
