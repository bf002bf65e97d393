"""Volumes: their life cycle with every letter, what their state forbids, their fields at the limits."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from catalog_kit import DAY, LIBR, NOON, RACK, TODAY, TOMORROW, VLT1, YESTERDAY, A, Desk

from tt.catalog import volumes
from tt.catalog.chain import verify
from tt.catalog.messages import EVENTS, PAGE
from tt.catalog.model import FLAGS, OVERDUE_AFTER, SETTABLE, Media, Volume
from tt.catalog.rights import Desk as Desktop
from tt.catalog.rights import Reader

# ---- the life cycle -------------------------------------------------------------------------------------------------


def test_a_move_with_both_scans_leaves_the_letters_of_each_step(desk: Desk) -> None:
    desk.ask("alter", "volume.add", volume=A, repository="LIBR", flags="Kap")
    assert desk.state() == ("LIBR", "", "", "aKp")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    assert desk.state() == ("LIBR", "VLT1", "", "aKM")
    out = desk.ask("write", "volume.scan_out", volume="A00001", repository=LIBR)
    assert (out.verdict, out.volume, out.message) == ("ok", A, "on its way to VLT1")
    assert desk.state() == ("LIBR", "VLT1", "LIBR", "aKMU")
    at_target = desk.ask("write", "volume.scan_in", volume=A, repository=VLT1)
    assert (at_target.verdict, at_target.message) == ("ok", "arrived")
    assert desk.state() == ("VLT1", "", "VLT1", "CO")
    assert desk.events() == ["add", "move", "scan_out", "scan_in"]


def test_a_scan_where_a_volume_is_confirms_it(desk: Desk) -> None:
    desk.volume(flags="WaK")
    answer = desk.ask("write", "volume.scan_in", volume=A, repository=LIBR)
    assert (answer.verdict, answer.message) == ("ok", "confirmed")
    assert desk.state() == ("LIBR", "", "LIBR", "C")


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
    assert desk.state() == ("LIBR", fields.get("target", ""), repository[-4:], "aM" if fields else "a")
    assert desk.events()[-1] == f"wrong_{operation.partition('.')[2]} {repository[-4:]}"
    assert answer.sequence == desk.store.sequence
    assert answer.hash == desk.store.hash


def test_each_row_of_a_wrong_scan_tells_direction_and_repository_also_where_nothing_changes(desk: Desk) -> None:
    desk.volume()
    for operation in ("volume.scan_in", "volume.scan_in", "volume.scan_out"):
        assert desk.ask("write", operation, volume=A, repository=RACK).verdict == "wrong"
    rows = desk.ask("read", "volume.history", volume=A).entries[:3]
    assert [row.event for row in rows] == ["wrong_scan_out RACK", "wrong_scan_in RACK", "wrong_scan_in RACK"]
    assert [row.changes for row in rows[:2]] == [{}, {}]
    assert {row.event.partition(" ")[0] for row in rows} <= set(EVENTS)
    assert verify(desk.store.path).problem == ""


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
    assert desk.state()[3] == "M"
    desk.ask("write", "volume.cancel", volume=A)
    assert desk.state() == ("LIBR", "", "", "")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    desk.ask("write", "volume.scan_out", volume=A, repository=LIBR)
    desk.ask("write", "volume.cancel", volume=A)
    assert desk.state() == ("LIBR", "", "LIBR", "W")
    desk.ask("write", "volume.scan_in", volume=A, repository=LIBR)
    assert desk.state()[3] == "C"


def test_a_move_clears_the_letters_of_the_one_before_and_that_it_was_pending(desk: Desk) -> None:
    desk.volume(flags="CEWp")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    assert desk.state()[3] == "EM"


def test_a_move_back_to_where_it_is_is_a_cancel(desk: Desk) -> None:
    desk.volume(target="VLT1", requested=5, flags="U")
    desk.ask("write", "volume.move", volume=A, to="LIBR", description="stays")
    assert desk.state() == ("LIBR", "", "", "NW")
    assert desk.events()[-1] == "cancel"
    assert desk.volume().requested == 0


def test_a_move_while_moving_has_the_new_target_and_the_scan_out_still_counts(desk: Desk) -> None:
    desk.volume(target="VLT1", requested=5, flags="U")
    desk.ask("write", "volume.move", volume=A, to="RACK")
    assert desk.state() == ("LIBR", "RACK", "", "MU")
    assert desk.volume().requested == int(NOON)


def test_who_asks_again_for_the_same_move_does_not_make_it_younger(desk: Desk) -> None:
    desk.ask("alter", "volume.add", volume=A, repository="LIBR")
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    desk.now += OVERDUE_AFTER
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    assert desk.state()[3] == "Mo"


def test_a_move_is_overdue_two_days_after_it_was_asked_for(desk: Desk) -> None:
    desk.volume(target="VLT1", requested=int(NOON))
    for later, letters in ((0, "M"), (OVERDUE_AFTER - 1, "M"), (OVERDUE_AFTER, "Mo"), (10 * OVERDUE_AFTER, "Mo")):
        desk.now = NOON + later
        assert desk.state()[3] == letters


def test_a_date_has_come_at_midnight_in_utc(desk: Desk) -> None:
    desk.volume(move_date=TOMORROW)
    for now, letters in ((NOON, "D"), (NOON + DAY / 2 - 1, "D"), (NOON + DAY / 2, "Dd"), (NOON + 9 * DAY, "Dd")):
        desk.now = now
        assert desk.state()[3] == letters


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
        assert [desk.state()[3] for _ in range(3)] == [letters] * 3
        assert len(made) == number
    desk.ask("write", "volume.move", volume=A, to="LIBR")
    desk.ask("write", "volume.scan_in", volume=A, repository=LIBR)
    desk.state()
    desk.ask("alter", "volume.delete", volume=A)
    assert desk.code("read", "volume.get", volume=A) == "not_found"
    desk.ask("alter", "volume.add", volume=A, repository="RACK")
    assert desk.state() == ("RACK", "", "", "")


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
    seen |= set(desk.state()[3])
    desk.ask("write", "volume.update", volume=A, description="x", move_date=TODAY)
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    desk.ask("write", "volume.scan_out", volume=A, repository=LIBR)
    desk.now += OVERDUE_AFTER
    seen |= set(desk.state()[3])
    desk.ask("write", "volume.cancel", volume=A)
    seen |= set(desk.state()[3])
    desk.ask("write", "volume.move", volume=A, to="VLT1")
    desk.ask("write", "volume.scan_in", volume=A, repository=VLT1)
    desk.ask("write", "volume.update", volume=A, set_flags="lL")
    seen |= set(desk.state()[3])
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
    assert desk.state()[3] == "CLlO"


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
    assert desk.events() == ["add", "delete"]
    desk.ask("alter", "volume.add", volume=A, repository="RACK")
    assert desk.events() == ["add", "delete", "add"]


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
