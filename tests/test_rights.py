"""Rights: every operation against every right, patterns of Customers, and rights that change while they are used."""

from typing import Any

import msgspec
import pytest
from catalog_kit import KINDS, Desk

from tt.catalog import rights, structure
from tt.catalog.messages import ERRORS, OPERATIONS, RIGHTS
from tt.catalog.model import ALTER, NONE, READ, WRITE, Access, Certificate, Customer, User, Volume
from tt.catalog.rights import Account, Rights
from tt.dispatch import Write

A = "US01.LTO.A00001"
LIBR = "US01.LTO.LIBR"
CERTIFICATE = f"{LIBR} 20261123T120000.000000Z"

# Arguments with which tapemaster succeeds, each operation after those above it.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "login": {"user": "nobody", "password": "nothing"},
    "whoami": {},
    "password": {"old": "the same one", "new": "the same one"},
    "customer.add": {"customer": "US03"},
    "customer.list": {},
    "customer.change": {"customer": "US01"},
    "media.add": {"media": "US01.NEW"},
    "media.list": {},
    "media.change": {"media": "US01.LTO"},
    "repository.add": {"repository": "US01.LTO.NEW"},
    "repository.list": {},
    "repository.change": {"repository": LIBR},
    "volume.add": {"volume": "US01.LTO.NEW", "repository": "LIBR"},
    "volume.get": {"volume": A},
    "volume.list": {},
    "volume.update": {"volume": A},
    "volume.move": {"volume": A, "to": "VLT1"},
    "volume.scan_out": {"volume": "A00001", "repository": LIBR},
    "volume.scan_in": {"volume": A, "repository": LIBR},
    "volume.cancel": {"volume": "US01.LTO.MOVES"},
    "volume.history": {"volume": A},
    "volume.delete": {"volume": "US01.LTO.GOES"},
    "volume.move_pending": {},
    "reconcile": {"repository": LIBR, "volumes": ["A00001"]},
    "certificate.get": {"id": CERTIFICATE},
    "certificate.list": {"repository": LIBR},
    "user.add": {"user": "somebody"},
    "user.list": {},
    "user.change": {"user": "read"},
    "user.reset": {"user": "write"},
    "access.set": {"user": "read", "pattern": "US01", "level": "read"},
    "access.list": {},
    "session.list": {},
    "session.disconnect": {"id": 9},
    "statistics": {},
    "batch": {"operations": []},
    "logout": {},
}
# What the right is asked before: with these codes the operation was allowed.
ALLOWED = {"login": "conflict", "password": "invalid", "session.disconnect": "not_found"}
# right of an operation -> whom it is refused, and how
REFUSED: dict[str, dict[str, str]] = {
    "anyone": {},
    "user": {},
    "read": {"none": "not_found", "administrator": "not_found"},
    "write": {"none": "not_found", "administrator": "not_found", "read": "denied", "catalog": "denied"},
    "alter": {
        "none": "not_found", "administrator": "not_found", "read": "denied", "catalog": "denied", "write": "denied",
    },
    "catalog": {
        "none": "not_found", "administrator": "not_found", "read": "denied", "write": "denied", "alter": "denied",
    },
    "administrator": dict.fromkeys(("none", "read", "write", "alter", "catalog"), "denied"),
}  # fmt: skip
EVEN_WITH_A_PASSWORD_FOR_ONCE = ("login", "whoami", "password", "logout")


@pytest.fixture
def desk(desk: Desk) -> Desk:
    desk.put(
        Volume(A, "LIBR"),
        Volume("US01.LTO.MOVES", "LIBR", target="VLT1", requested=5),
        Volume("US01.LTO.GOES", "LIBR"),
        Certificate(CERTIFICATE, "write"),
    )
    return desk


def expected(kind: str, operation: str) -> str:
    if not kind:
        return "login" if operation == "login" else "login_first"
    if kind == "must-change" and operation not in EVEN_WITH_A_PASSWORD_FOR_ONCE:
        return "password_change_first"
    return REFUSED[OPERATIONS[operation].right].get(kind, ALLOWED.get(operation, ""))


@pytest.mark.parametrize("kind", [*KINDS, ""], ids=lambda kind: kind or "not logged in")
def test_every_operation_asks_for_its_right(desk: Desk, kind: str) -> None:
    before = desk.store.sequence
    found = {operation: desk.code(kind, operation, **asked) for operation, asked in ARGUMENTS.items()}
    assert found == {operation: expected(kind, operation) for operation in ARGUMENTS}
    if kind in ("", "none", "must-change"):
        assert desk.store.sequence == before


def test_the_matrix_is_of_every_operation_and_every_right(desk: Desk) -> None:
    assert set(ARGUMENTS) == set(OPERATIONS) == set(desk.operations)
    assert set(REFUSED) == set(RIGHTS) == {spec.right for spec in OPERATIONS.values()}
    assert {error for spec in OPERATIONS.values() for error in spec.errors} <= set(ERRORS)


def test_what_may_stand_in_a_batch_is_a_write_that_needs_no_waiting(desk: Desk) -> None:
    for name, spec in OPERATIONS.items():
        assert spec.writes or not spec.batch
        if spec.batch:
            assert isinstance(desk.operations[name], Write), name
            code, _ = desk.error("tapemaster", "batch", operations=[[name, {}]])
            assert code == "malformed", name
        else:
            assert desk.code("tapemaster", "batch", operations=[[name, {}]]) == "invalid"


def test_statistics_count_what_the_user_may_read(desk: Desk) -> None:
    desk.volume("US02.LTO.A00001")

    def counts(user: str) -> tuple[int, ...]:
        told = desk.ask(user, "statistics")
        assert (told.sequence, told.hash) == (desk.store.sequence, desk.store.hash)
        return told.customers, told.volumes, told.moving, told.users, told.sessions

    assert counts("none") == (0, 0, 0, 0, 0)
    assert counts("read") == counts("catalog") == (1, 3, 0, 0, 0)
    sessions = desk.accounts.sessions()
    assert counts("tapemaster") == counts("administrator") == (2, 4, 1, len(KINDS), sessions)
    desk.put(Access("none *", 1))
    assert counts("none") == (2, 4, 1, 0, 0)


def test_statistics_are_by_the_rights_at_their_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "SLICE", 2)
    work = desk.begin("read", "statistics")
    assert next(work) is None  # it has counted Customers
    assert next(work) is None
    desk.put(msgspec.structs.replace(desk.store.get(Access, "read US01"), level=0))
    told = desk.finish(work)
    assert (told.customers, told.volumes) == (0, 0)


@pytest.mark.parametrize("operation", ["media.list", "repository.list", "volume.list", "volume.move_pending"])
def test_a_scope_asks_for_the_right_for_its_customer(desk: Desk, operation: str) -> None:
    refused = REFUSED["write" if operation == "volume.move_pending" else "read"]
    for kind in set(KINDS) - {"must-change"}:
        assert desk.code(kind, operation, scope="US01") == refused.get(kind, "")
        assert desk.code(kind, operation, scope="US02") == ("" if kind == "tapemaster" else "not_found")


@pytest.mark.parametrize("kind", ["none", "read", "administrator"])
def test_what_a_user_may_not_read_is_answered_like_what_is_not_there(desk: Desk, kind: str) -> None:
    desk.volume("US02.LTO.A00001")
    desk.put(Certificate(CERTIFICATE.replace("US01", "US02"), "write"))
    asked = [
        (operation, msgspec.json.encode(arguments).decode())
        for operation, arguments in ARGUMENTS.items()
        if OPERATIONS[operation].right in ("read", "write", "alter", "catalog")
    ]
    assert len(asked) > 10
    for operation, text in asked:
        there = desk.error(kind, operation, **msgspec.json.decode(text.replace("US01", "US02")))
        gone = desk.error(kind, operation, **msgspec.json.decode(text.replace("US01", "US99")))
        assert there[0] == "not_found"
        assert there == (gone[0], gone[1].replace("US99", "US02"))


# ---- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "levels"),
    [
        ({}, {"US01": NONE}),
        ({"US01": READ}, {"US01": READ, "US0": NONE, "US02": NONE, "S01": NONE}),
        ({"US*": WRITE}, {"US01": WRITE, "US": WRITE, "USA": WRITE, "U": NONE, "EU": NONE}),
        ({"*": READ}, {"US01": READ, "X": READ, "": READ}),
        ({"US0*": ALTER}, {"US01": ALTER, "US0": ALTER, "US1": NONE}),
        ({"US0": READ, "US": WRITE}, {"US0": READ, "US": WRITE, "US01": NONE, "U": NONE}),
        # Of all that fit the strongest counts: no entry takes away what another gives.
        ({"*": READ, "US*": WRITE, "US01": ALTER}, {"US01": ALTER, "US02": WRITE, "EU": READ}),
        ({"*": ALTER, "US01": READ}, {"US01": ALTER}),
    ],
)
def test_a_pattern_names_customers(desk: Desk, entries: dict[str, int], levels: dict[str, int]) -> None:
    desk.put(*(Access(f"none {pattern}", level) for pattern, level in entries.items() if pattern != "US01"))
    if "US01" in entries:
        desk.put(msgspec.structs.replace(desk.store.get(Access, "none US01"), level=entries["US01"]))
    asked = Rights(desk.store)
    account = asked.current(Account("none"))
    for _ in range(2):  # the second time out of the snapshot
        assert {customer: asked.level(account, customer) for customer in levels} == levels
    for customer, level in levels.items():
        assert f"{customer}.LTO".startswith(account.prefixes) == (level >= READ)


def test_catalog_includes_read_and_nothing_more(desk: Desk) -> None:
    desk.put(Access("none US*", NONE, catalog=True))
    asked = Rights(desk.store)
    account = asked.current(Account("none"))
    assert [asked.permits(account, right, "US02") for right in ("read", "catalog", "write", "alter")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert not asked.permits(account, "catalog", "EU")


def test_the_snapshot_holds_a_bounded_number_of_customers(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "LEVELS_KEPT", 10)
    for n in range(35):
        desk.code("read", "volume.get", volume=f"C{n}.LTO.A00001")
    assert 0 < len(desk.seat("read").account.levels) <= 10
    assert desk.code("read", "volume.get", volume=A) == ""


# ---- rights that change ---------------------------------------------------------------------------------------------


def test_a_right_taken_away_between_two_gets_is_gone_for_the_second(desk: Desk) -> None:
    assert desk.code("read", "volume.get", volume=A) == ""
    taking = desk.begin("administrator", "access.set", user="read", pattern="US01", level="none")
    assert desk.code("read", "volume.get", volume=A) == ""  # it is not on disk yet
    desk.finish(taking)
    assert desk.code("read", "volume.get", volume=A) == "not_found"
    desk.ask("administrator", "access.set", user="read", pattern="US*", level="read")
    assert desk.code("read", "volume.get", volume=A) == ""


def test_a_right_is_asked_again_for_each_operation_of_a_session(desk: Desk) -> None:
    assert desk.code("write", "volume.update", volume=A) == ""
    desk.ask("administrator", "access.set", user="write", pattern="US01", level="read")
    assert desk.code("write", "volume.update", volume=A) == "denied"
    desk.ask("administrator", "access.set", user="write", pattern="US01", level="none")
    assert desk.code("write", "volume.update", volume=A) == "not_found"


def test_a_disabled_user_may_nothing_even_where_his_session_is_still_there(desk: Desk) -> None:
    desk.put(msgspec.structs.replace(desk.store.get(User, "tapemaster"), disabled=True))
    desk.put(msgspec.structs.replace(desk.store.get(User, "alter"), disabled=True))
    assert desk.code("alter", "volume.get", volume=A) == "not_found"
    assert desk.code("tapemaster", "volume.get", volume=A) == "not_found"
    assert desk.code("tapemaster", "customer.add", customer="US04") == "denied"


def test_an_administrator_is_one_until_he_is_none(desk: Desk) -> None:
    assert desk.code("administrator", "customer.add", customer="US04") == ""
    desk.put(msgspec.structs.replace(desk.store.get(User, "administrator"), administrator=False))
    assert desk.code("administrator", "customer.add", customer="US05") == "denied"
    assert desk.store.get(Customer, "US05") is None


# ---- types ----------------------------------------------------------------------------------------------------------

WRONG: dict[type, list[Any]] = {
    str: [None, 5, 1.5, True, b"US01", ["US01"], {}],
    int: [None, "5", 1.5, True, b"", [5], {}],
    bool: [None, 0, 1, "true", [], {}],
    list: [None, 5, "A0", {}, [None], [5], [[1]], [["volume.add"]], [["volume.add", {}, {}]]],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_field_of_a_wrong_type_is_named(desk: Desk, operation: str) -> None:
    before = desk.store.sequence
    for field in msgspec.structs.fields(OPERATIONS[operation].arguments):
        kinds = [kind for kind in (str, bool, int, list) if kind in possible(field.type)]
        assert len(kinds) == 1, field
        for value in WRONG[kinds[0]]:
            code, message = desk.error("tapemaster", operation, **{**ARGUMENTS[operation], field.name: value})
            assert code == "malformed", (field.name, value, code)
            assert f"$.{field.name}" in message
        if field.required:
            without = {name: value for name, value in ARGUMENTS[operation].items() if name != field.name}
            code, message = desk.error("tapemaster", operation, **without)
            assert (code, message) == ("malformed", f"Object missing required field `{field.name}`")
    assert desk.store.sequence == before


@pytest.mark.parametrize("arguments", [[], None, "x", 5, {"volume": "\ud800"}, {5: 5}], ids=repr)
def test_arguments_that_are_no_map_of_texts_are_malformed(desk: Desk, arguments: Any) -> None:
    packed = msgspec.msgpack.encode(arguments) if arguments != {"volume": "\ud800"} else b"\x81\xa6volume\xa1\xff"
    with pytest.raises(rights.ANSWERED) as error:
        desk.operations["volume.get"](desk.seat("read"), msgspec.Raw(packed))
    assert rights.told(error.value)[0] == "malformed"


def test_the_largest_integers_of_the_wire_are_answered(desk: Desk) -> None:
    for number in (2**63 - 1, 2**63, 2**64 - 1, -(2**63)):
        for operation, field in (
            ("volume.history", "limit"),
            ("volume.list", "limit"),
            ("media.change", "max_volumes"),
        ):
            assert desk.code("tapemaster", operation, **{**ARGUMENTS[operation], field: number}) == "invalid"
        assert desk.code("tapemaster", "session.disconnect", id=number) == "not_found"
        assert desk.code("tapemaster", "volume.history", volume=A, before=number) in ("invalid", "")


def test_keys_that_a_later_version_adds_are_ignored(desk: Desk) -> None:
    assert desk.code("read", "volume.get", volume=A, later=[1, 2]) == ""


def possible(annotation: Any) -> tuple[Any, ...]:
    """The plain types that a field takes."""
    parts = getattr(annotation, "__args__", ())
    origin = getattr(annotation, "__origin__", None)
    return (origin,) if origin else parts or (annotation,)


def test_every_level_that_the_table_names_is_a_level() -> None:
    assert {level for level in RIGHTS.values() if level} == {READ, WRITE, ALTER}
