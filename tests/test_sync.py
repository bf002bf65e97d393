"""tt.sync: the mapping file's rules, the lines of an inventory, and what differs from the catalogue; no server."""

import csv
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tt.catalog.messages import AddVolume, MoveVolume, UpdateVolume, VolumeRecord
from tt.sync import (
    BadLine,
    Change,
    InventoryError,
    Mapping,
    MappingError,
    Wanted,
    compare,
    open_text,
    read_inventory,
    read_mapping,
)

EXAMPLES = Path(__file__).parent.parent / "examples"

MAPPING = """
scope = "US01.LTO"
[may]
add = true
update = true
move = true
[columns]
volume = "Barcode"
repository = "Place"
description = "Label"
move_date = "Return"
[repositories]
"Iron vault" = "VLT1"
[flags]
E = "Encrypted"
"""
HEADINGS = "Barcode,Place,Label,Return,Encrypted\n"


def mapping(text: str = MAPPING, *changes: tuple[str, str]) -> Mapping:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return msgspec.toml.decode(text, type=Mapping)


def lines(text: str, mapped: Mapping | None = None) -> list[Wanted | BadLine]:
    return list(read_inventory(io.StringIO(text, newline=""), mapped or mapping()))


def wanted(text: str, mapped: Mapping | None = None) -> Wanted:
    (only,) = lines(HEADINGS + text, mapped)
    assert isinstance(only, Wanted), only
    return only


def bad(text: str, mapped: Mapping | None = None) -> str:
    """What is said of the one line below the headings."""
    (only,) = lines(HEADINGS + text, mapped)
    assert isinstance(only, BadLine), only
    assert only.line == 2
    return only.says


# ---- the mapping file -----------------------------------------------------------------------------------------------


def test_the_mapping_of_the_examples_is_one() -> None:
    mapped = read_mapping(EXAMPLES / "inventory.toml")
    assert mapped.scope == "US01.LTO"
    assert (mapped.may.add, mapped.may.update, mapped.may.move) == (True, True, False)
    assert dict(mapped.headings()) == {
        "volume": "Barcode", "repository": "Location", "description": "Contents", "move_date": "Return on",
        "flag E": "Encrypted",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('scope = "US01.LTO"', "", "Object missing required field `scope`"),
        ('scope = "US01.LTO"', 'scope = "us01"', "customer: must be 1 to 4 of A-Z and 0-9, not 'us01'"),
        ('scope = "US01.LTO"', 'scope = "US01.LTO.A1"', "media: must be written CUSTOMER.MEDIA, not 'US01.LTO.A1'"),
        ('volume = "Barcode"', "", "Object missing required field `volume` - at `$.columns`"),
        ('volume = "Barcode"', 'volume = ""', "columns.volume: must be the heading of a column, not ''"),
        ('volume = "Barcode"', 'volume = "B"\nvolum = "C"', "Object contains unknown field `volum` - at `$.columns`"),
        ('repository = "Place"', "", "columns.repository: must be the heading of a column where `may` has add or move"),
        ('"VLT1"', '"vault"', "repositories, 'Iron vault': must be 1 to 4 of A-Z and 0-9, not 'vault'"),
        ("add = true", "add = 1", "Expected `bool`, got `int` - at `$.may.add`"),
        ("add = true", "delete = true", "Object contains unknown field `delete` - at `$.may`"),
        ('E = "', 'M = "', "flags: must be letters of EGKLQSahlprt, not 'M'"),
        ('E = "', 'Eh = "', "flags: a key must be one letter, not 'Eh'"),
        ('scope = "US01.LTO"', 'scope = "US01"\ndelimiter = ";;"', "delimiter: must be one character that is no quote"),
        ('scope = "US01.LTO"', 'scope = "US01"\nencoding = "utf8000"', "encoding: must be one that Python knows, such"),
        ('scope = "US01.LTO"', 'scope = "US01"\nencoding = "hex"', "encoding: must be one that Python knows, such"),
        ('scope = "US01.LTO"', 'scope = "US01"\ndate_format = "%d.%m."', "date_format: must have year, month and day"),
        ('scope = "US01.LTO"', 'scope = "US01"\ndate_format = "%Q"', "date_format: must have year, month and day"),
        ("[may]", "[may", "not TOML: "),
    ],
)
def test_a_wrong_mapping_names_the_file_the_key_and_the_rule(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "mapping.toml"
    assert old in MAPPING
    path.write_text(MAPPING.replace(old, new))
    with pytest.raises(MappingError) as error:
        read_mapping(path)
    assert str(error.value).startswith(f"{path}: {says}")
    assert "\n" not in str(error.value)


def test_a_mapping_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="No such file or directory: give the mapping file with -d"):
        read_mapping(tmp_path / "none")
    with pytest.raises(MappingError, match="Is a directory"):
        read_mapping(tmp_path)
    (tmp_path / "latin").write_bytes(b'scope = "\xff"')
    with pytest.raises(MappingError, match="not TOML: 'utf-8' codec can't decode byte 0xff"):
        read_mapping(tmp_path / "latin")


# ---- the inventory --------------------------------------------------------------------------------------------------


def test_a_line_gives_each_mapped_field() -> None:
    assert wanted("A00001,Iron vault,' Full, mail01 ',2027-01-31,Yes\n".replace("'", '"')) == Wanted(
        2, "US01.LTO.A00001", "VLT1", "Full, mail01", "2027-01-31", "E", ""
    )


def test_an_empty_cell_of_a_mapped_column_is_an_empty_field() -> None:
    assert wanted("A00001,RACK,,,\n") == Wanted(2, "US01.LTO.A00001", "RACK", "", "", "", "E")


def test_a_column_that_is_not_mapped_says_nothing() -> None:
    mapped = Mapping("US01.LTO", mapping().columns.__class__(volume="Barcode"), mapping().may)
    assert wanted("A00001,RACK,x,2027-01-31,yes\n", mapped) == Wanted(2, "US01.LTO.A00001", None, None, None, "", "")


def test_the_full_name_comes_from_the_cell_or_its_columns_or_the_scope() -> None:
    mapped = mapping(
        MAPPING, ('scope = "US01.LTO"', 'scope = "US01"'), ("[columns]", '[columns]\nmedia = "Kind"\ncustomer = "Who"')
    )
    text = "Barcode,Place,Label,Return,Encrypted,Kind,Who\n"
    text += "A1,RACK,,,,LTO,US01\nUS01.DLT.A2,RACK,,,,LTO,US01\nA3,RACK,,,,LTO,US02\nA4,RACK,,,,,US01\n"
    text += "US01.A5,RACK,,,,LTO,US01\n"
    first, second, *others = lines(text, mapped)
    assert isinstance(first, Wanted)
    assert isinstance(second, Wanted)
    assert (first.volume, second.volume) == ("US01.LTO.A1", "US01.DLT.A2")
    assert others == [
        BadLine(4, "volume in column 'Barcode': US02.LTO.A3 is outside the mapping's scope US01"),
        BadLine(5, "media in column 'Kind': must be 1 to 4 of A-Z and 0-9, not ''"),
        BadLine(6, "volume: must be written CUSTOMER.MEDIA.VOLUME, not 'US01.A5'"),
    ]


def test_a_customer_whose_name_begins_like_the_scope_is_outside() -> None:
    assert "is outside the mapping's scope US01.LTO" in bad("US01.LTO2.A00001,RACK,,,\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (",RACK,,,\n", "volume in column 'Barcode': must be 2 to 10 of A-Z, 0-9 and '-', the first no '-', not ''"),
        ("a00001,RACK,,,\n", "volume in column 'Barcode': must be 2 to 10 of A-Z, 0-9 and '-', the first no '-', not"),
        ("A00001,,,,\n", "repository in column 'Place': must be 1 to 4 of A-Z and 0-9, not ''"),
        ("A00001,Cellar,,,\n", "repository in column 'Place': must be 1 to 4 of A-Z and 0-9, not 'Cellar'"),
        (f"A00001,RACK,{257 * 'x'},,\n", "description in column 'Label': must be at most 256 printable characters, "),
        ('A00001,RACK,"a\nb",,\n', "description in column 'Label': must be at most 256 printable characters, not"),
        ("A00001,RACK,,31.1.2027,\n", "move_date in column 'Return': must be a day as %Y-%m-%d, or empty, not '31.1."),
        ("A00001,RACK,,2027-02-30,\n", "move_date in column 'Return': must be a day as %Y-%m-%d, or empty, not '2027-"),
        ("A00001,RACK,,,maybe\n", "flag E in column 'Encrypted': must be yes, no, y, n, true, false, 1, 0 or empty"),
        ("A00001,RACK,,\n", "has 4 fields, where line 1 has 5 headings"),
        ("A00001,RACK,,,,\n", "has 6 fields, where line 1 has 5 headings"),
        ('A00001,"RA"CK,,,\n', "',' expected after '\"'"),
        ('A00001,"RACK,,,\n', "unexpected end of data"),
    ],
)
def test_a_bad_line_names_the_field_its_column_and_the_rule(text: str, says: str) -> None:
    assert bad(text).startswith(says)


def test_a_bad_line_costs_no_other_and_lines_count_as_in_an_editor() -> None:
    text = HEADINGS + '\nA1,RACK,"two\nlines",,\nA2,RACK,,,\nA3,?,,,\nA2,RACK,,,\nA4,RACK,,,\n'
    found = lines(text)
    assert [(type(one), one.line) for one in found] == [
        (BadLine, 3), (Wanted, 5), (BadLine, 6), (BadLine, 7), (Wanted, 8),
    ]  # fmt: skip
    assert found[3] == BadLine(7, "volume: US01.LTO.A2 stands on line 5 already")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not among the headings of line 1: there are none"),
        (
            "Barcode,Place,Label,Return\n",
            "column 'Encrypted', which the mapping names for flag E, is not among the",
        ),
        ("Barcode;Place;Label;Return;Encrypted\n", "is not among the headings of line 1: 'Barcode;Place;Label;Return;"),
        (
            "Barcode,Place,Place,Label,Return,Encrypted\n",
            "column 'Place', which the mapping names for repository, is t",
        ),
        ('"Barcode\n', "line 1 is no line of headings: unexpected end of data"),
    ],
)
def test_headings_that_do_not_fit_the_mapping_end_the_run(text: str, says: str) -> None:
    with pytest.raises(InventoryError) as error:
        lines(text)
    assert says in str(error.value)


def test_spreadsheets_in_other_encodings_delimiters_and_dates() -> None:
    german = mapping(
        MAPPING, ("[may]", 'delimiter = ";"\nencoding = "cp1252"\ndate_format = "%d.%m.%Y"\n[may]'),
        ("Iron vault", "Eisenschränke"),
    )  # fmt: skip
    data = "Barcode;Place;Label;Return;Encrypted\r\nA00001;Eisenschränke;Müll;31.01.2027;Y\r\n".encode("cp1252")
    (line,) = read_inventory(open_text(io.BytesIO(data), german), german)
    assert line == Wanted(2, "US01.LTO.A00001", "VLT1", "Müll", "2027-01-31", "E", "")


def test_a_byte_order_mark_is_no_part_of_the_first_heading() -> None:
    data = b"\xef\xbb\xbf" + HEADINGS.encode() + b"A00001,RACK,,,\n"
    (line,) = read_inventory(open_text(io.BytesIO(data), mapping()), mapping())
    assert isinstance(line, Wanted)


def test_bytes_that_are_not_in_the_encoding_are_a_bad_line() -> None:
    data = HEADINGS.encode() + "A00001,RACK,Müll,,\nA00002,RACK,,,\n".encode("cp1252")
    first, second = read_inventory(open_text(io.BytesIO(data), mapping()), mapping())
    assert first == BadLine(
        2, "description in column 'Label': is not in the mapping's encoding: set `encoding`, such as cp1252"
    )
    assert isinstance(second, Wanted)


def test_an_encoding_that_breaks_off_is_said_in_one_line() -> None:
    mapped = mapping(MAPPING, ("[may]", 'encoding = "utf-16"\n[may]'))
    whole = (HEADINGS + "A00001,RACK,,,\n").encode("utf-16")
    (line,) = read_inventory(open_text(io.BytesIO(whole), mapped), mapped)
    assert isinstance(line, Wanted)
    with pytest.raises(InventoryError, match="is not in the encoding: 'utf-16"):
        list(read_inventory(open_text(io.BytesIO(whole[:-1]), mapped), mapped))


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=6), max_size=8))
def test_whatever_a_file_holds_each_line_is_read_or_named(rows: list[list[str]]) -> None:
    out = io.StringIO(HEADINGS, newline="")
    out.seek(0, io.SEEK_END)
    csv.writer(out).writerows(rows)
    for one in lines(out.getvalue()):
        assert isinstance(one, Wanted) or one.says


# ---- what differs ---------------------------------------------------------------------------------------------------


def volume(**fields: object) -> VolumeRecord:
    plain = {
        "name": "US01.LTO.A00001", "current": "RACK", "target": "", "scanned": "", "flags": "E",
        "move_date": "2027-01-31", "requested": 0, "description": "Full", "last": 7,
    }  # fmt: skip
    return VolumeRecord(**(plain | fields))  # type: ignore[arg-type]


SAME = Wanted(2, "US01.LTO.A00001", "RACK", "Full", "2027-01-31", "E", "h")


def difference(line: Wanted, *volumes: VolumeRecord, may: str = "") -> tuple[list[Change], dict[str, int]]:
    """The changes and the statistics; `may` is what the mapping does not allow."""
    mapped = mapping(MAPPING, (f"{may} = true", f"{may} = false")) if may else mapping()
    statistics: Counter[str] = Counter()
    changes = list(compare(mapped, [line], {one.name: one for one in volumes}, statistics))
    return changes, {key: count for key, count in statistics.items() if count}


def test_a_volume_that_is_as_the_inventory_says_is_left_alone() -> None:
    assert difference(SAME, volume()) == ([], {"scope": 1, "unchanged": 1})


def test_fields_that_the_inventory_does_not_have_are_never_a_difference() -> None:
    silent = Wanted(2, "US01.LTO.A00001", None, None, None, "", "")
    assert difference(silent, volume(target="VLT1", flags="EMhp")) == ([], {"scope": 1, "unchanged": 1})


def test_a_volume_that_the_inventory_lacks_is_counted_and_kept() -> None:
    other = volume(name="US01.LTO.A00002")
    assert difference(SAME, volume(), other) == ([], {"scope": 2, "absent": 1, "unchanged": 1})


def test_a_new_volume_is_added_with_all_that_the_line_says() -> None:
    (change,), statistics = difference(SAME)
    assert change == Change(
        2, "added", "volume.add", AddVolume("US01.LTO.A00001", "RACK", "Full", "E", "2027-01-31"),
        "add US01.LTO.A00001 in RACK",
    )  # fmt: skip
    assert statistics == {}
    assert difference(SAME, may="add") == ([], {"new": 1})


def test_only_the_fields_that_differ_are_sent() -> None:
    line = SAME._replace(description="", flags="", no_flags="EK")
    (change,), statistics = difference(line, volume(flags="EMN"))
    assert change.arguments == UpdateVolume("US01.LTO.A00001", description="", clear_flags="E")
    assert change.says == "update US01.LTO.A00001: description 'Full' -> '', flag E cleared"
    assert statistics == {"scope": 1}
    (change,), _ = difference(SAME._replace(move_date="", flags="Eh", no_flags=""), volume())
    assert change.arguments == UpdateVolume("US01.LTO.A00001", move_date="", set_flags="h")
    assert change.says == "update US01.LTO.A00001: move date 2027-01-31 -> none, flag h set"
    assert difference(line, volume(), may="update") == ([], {"scope": 1, "different": 1})


def test_a_volume_elsewhere_is_asked_to_move_after_its_update() -> None:
    line = SAME._replace(repository="VLT1", description="new")
    (update, move), statistics = difference(line, volume())
    assert update.operation == "volume.update"  # first: it may clear a move lock
    assert move == Change(
        2, "moved", "volume.move", MoveVolume("US01.LTO.A00001", to="VLT1"), "move US01.LTO.A00001 from RACK to VLT1"
    )
    assert statistics == {"scope": 1}
    assert difference(SAME._replace(repository="VLT1"), volume(), may="move") == ([], {"scope": 1, "elsewhere": 1})


def test_a_volume_on_its_way_is_neither_called_back_nor_asked_again() -> None:
    moving = volume(target="VLT1")
    assert difference(SAME._replace(repository="VLT1"), moving) == ([], {"scope": 1, "unchanged": 1})
    assert difference(SAME, moving) == ([], {"scope": 1, "moving": 1})
    (change,), _ = difference(SAME._replace(repository="LIB"), moving)
    assert change.arguments == MoveVolume("US01.LTO.A00001", to="LIB")


# ---- the examples ---------------------------------------------------------------------------------------------------


def test_the_inventory_of_the_examples_is_10000_good_lines() -> None:
    made = subprocess.run(
        [sys.executable, EXAMPLES / "make_inventory.py"], capture_output=True, check=True, timeout=120
    ).stdout
    mapped = read_mapping(EXAMPLES / "inventory.toml")
    found = list(read_inventory(open_text(io.BytesIO(made), mapped), mapped))
    assert [one for one in found if isinstance(one, BadLine)] == []
    assert len({one.volume for one in found if isinstance(one, Wanted)}) == 10_000
    assert Counter(one.repository for one in found if isinstance(one, Wanted)) == {
        "RACK": 7473, "VLT1": 2491, "LIB": 36,
    }  # fmt: skip
