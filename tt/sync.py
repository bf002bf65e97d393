"""Bringing the catalogue in line with an inventory: the mapping file, the lines of the CSV, and what differs.

    mapping (TOML) + inventory (CSV)  ->  Wanted, a line      read_mapping, read_inventory
    Wanted + the Volumes of the scope ->  Change, a request   compare

Rules: a column that the mapping names is the truth about its field, also where a cell is empty; what it does not name
is left alone, and so are Volumes that the inventory does not have.  A bad line is named and costs no other line.
Must not know the client, the terminal or the server.
"""

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as AnyMapping
from datetime import date, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import msgspec
from msgspec import UNSET, Struct, UnsetType

from tt.catalog.messages import AddVolume, Arguments, MoveVolume, UpdateVolume, VolumeRecord
from tt.catalog.model import Invalid, check, check_name

YES = ("yes", "y", "true", "1")
NO = ("no", "n", "false", "0", "")


class MappingError(Exception):
    """The mapping file cannot be used; the text names the file, the key and the rule."""


class InventoryError(Exception):
    """The inventory as a whole cannot be used; the text says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# The mapping file
# ---------------------------------------------------------------------------------------------------------------------


class Columns(Struct, frozen=True, forbid_unknown_fields=True):
    """Field -> the heading of its column; "" for a field that the inventory does not have."""

    volume: str  # an id, or a full name
    customer: str = ""  # without it, that of the scope
    media: str = ""  # as well
    repository: str = ""
    description: str = ""
    move_date: str = ""


class May(Struct, frozen=True, forbid_unknown_fields=True):
    """What a run may do."""

    add: bool = False  # Volumes that are new
    update: bool = False  # descriptions, flags and move dates
    move: bool = False  # ask for a move where the Volume is in another Repository, and not on its way


class Mapping(Struct, frozen=True, forbid_unknown_fields=True):
    """The mapping file."""

    scope: str  # a Customer or a Media type: what is fetched and compared
    columns: Columns
    may: May
    repositories: dict[str, str] = {}  # what the column says -> a Repository's id; else the column holds the id
    flags: dict[str, str] = {}  # a letter of a Volume's flags -> the heading of its column, of yes and no
    delimiter: str = ","
    encoding: str = "utf-8"
    date_format: str = "%Y-%m-%d"  # as strftime(3) has it

    def headings(self) -> Iterator[tuple[str, str]]:
        """(field, heading of its column), in the order of the mapping."""
        for field in Columns.__struct_fields__:
            if heading := getattr(self.columns, field):
                yield field, heading
        for letter, heading in self.flags.items():
            yield f"flag {letter}", heading


def read_mapping(path: Path) -> Mapping:
    """The mapping in a TOML file.  Raises MappingError."""
    try:
        mapping = msgspec.toml.decode(path.read_bytes(), type=Mapping)
    except OSError as error:
        raise MappingError(f"{path}: {error.strerror}: give the mapping file with -d") from error
    except msgspec.ValidationError as error:
        raise MappingError(f"{path}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MappingError(f"{path}: not TOML: {error}") from error
    try:
        _check_mapping(mapping)
    except Invalid as error:
        raise MappingError(f"{path}: {error}") from error
    return mapping


def _check_mapping(mapping: Mapping) -> None:
    check_name("media" if "." in mapping.scope else "customer", mapping.scope)
    for letter in mapping.flags:
        if len(letter) != 1:
            raise Invalid(f"flags: a key must be one letter, not {letter!r}")
        check("flags", letter)
    for text, repository in mapping.repositories.items():
        check("repository", repository, f"repositories, {text!r}")
    if not mapping.columns.volume:
        raise Invalid("columns.volume: must be the heading of a column, not ''")
    if (mapping.may.add or mapping.may.move) and not mapping.columns.repository:
        raise Invalid("columns.repository: must be the heading of a column where `may` has add or move")
    if len(mapping.delimiter) != 1 or mapping.delimiter in '"\r\n':
        raise Invalid(f"delimiter: must be one character that is no quote or line end, not {mapping.delimiter!r}")
    try:
        "".encode(mapping.encoding)
    except (LookupError, ValueError):
        raise Invalid(f"encoding: must be one that Python knows, such as utf-8, not {mapping.encoding!r}") from None
    day = date(2026, 11, 23)
    try:
        whole = _day(day.strftime(mapping.date_format), mapping.date_format) == day.isoformat()
    except ValueError:
        whole = False
    if not whole:
        raise Invalid(f"date_format: must have year, month and day, such as %Y-%m-%d, not {mapping.date_format!r}")


def _day(text: str, form: str) -> str:
    return datetime.strptime(text, form).date().isoformat()  # noqa: DTZ007  a day has no time zone


# ---------------------------------------------------------------------------------------------------------------------
# The inventory
# ---------------------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """What a line of the inventory says of a Volume; None, or a letter in no string: it says nothing of that."""

    line: int  # where it begins, counted from 1
    volume: str
    repository: str | None
    description: str | None
    move_date: str | None
    flags: str  # letters that it must have
    no_flags: str  # letters that it must not have


class BadLine(NamedTuple):
    """A line that breaks a rule; `says` names the field, its column and the rule."""

    line: int
    says: str


def open_text(stream: BinaryIO, mapping: Mapping) -> TextIO:
    """The text of an inventory in the mapping's encoding; a byte that is none of it makes a bad line later."""
    # Spreadsheets write a byte order mark before UTF-8, which would else be part of the first heading.
    encoding = "utf-8-sig" if codecs.lookup(mapping.encoding).name == "utf-8" else mapping.encoding
    return io.TextIOWrapper(stream, encoding, "surrogateescape", newline="")  # newline: csv joins quoted lines itself


def read_inventory(lines: Iterable[str], mapping: Mapping) -> Iterator[Wanted | BadLine]:
    """The lines of a CSV (RFC 4180, with the mapping's delimiter) below its headings.  Raises InventoryError."""
    reader = csv.reader(lines, delimiter=mapping.delimiter, strict=True)
    try:
        heading = next(reader, [])
    except (csv.Error, UnicodeError) as error:
        raise InventoryError(f"line 1 is no line of headings: {error}") from error
    places = _places([name.strip() for name in heading], mapping)
    seen: dict[str, int] = {}
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
            if not row:
                continue
            _check_length(row, heading)
            wanted = _wanted(line, _Cells(row, places), mapping)
            _check_first(wanted, seen)
        except StopIteration:
            return
        except UnicodeError as error:  # of an encoding that surrogateescape cannot help, such as utf-16
            raise InventoryError(f"line {line} and what follows it is not in the encoding: {error}") from error
        except (csv.Error, Invalid) as error:
            yield BadLine(line, str(error))
        else:
            yield wanted


def _check_length(row: list[str], heading: list[str]) -> None:
    if len(row) != len(heading):
        raise Invalid(f"has {len(row)} fields, where line 1 has {len(heading)} headings")


def _check_first(wanted: Wanted, seen: dict[str, int]) -> None:
    if (first := seen.setdefault(wanted.volume, wanted.line)) != wanted.line:
        raise Invalid(f"volume: {wanted.volume} stands on line {first} already")


def _places(heading: list[str], mapping: Mapping) -> dict[str, tuple[str, int]]:
    """Field -> the heading and the place of its column.  Raises InventoryError."""
    places = {}
    for field, name in mapping.headings():
        if heading.count(name) != 1:
            has = "is twice" if name in heading else "is not"
            raise InventoryError(
                f"column {name!r}, which the mapping names for {field}, {has} among the headings of line 1: "
                f"{', '.join(map(repr, heading)) or 'there are none'}"
            )
        places[field] = (name, heading.index(name))
    return places


class _Cells:
    """One line, by field."""

    def __init__(self, row: list[str], places: dict[str, tuple[str, int]]) -> None:
        self._row, self._places = row, places

    def get(self, field: str) -> str | None:
        """What stands in the field's column; None where it has none."""
        if field not in self._places:
            return None
        text = self._row[self._places[field][1]].strip()
        if any("\udc80" <= character <= "\udcff" for character in text):  # as surrogateescape leaves them
            raise Invalid(f"{self.label(field)}: is not in the mapping's encoding: set `encoding`, such as cp1252")
        return text

    def label(self, field: str) -> str:
        """The field, for an error."""
        return f"{field} in column {self._places[field][0]!r}" if field in self._places else field


def _wanted(line: int, cells: _Cells, mapping: Mapping) -> Wanted:
    """Raises Invalid."""
    repository = cells.get("repository")
    if repository is not None:
        repository = mapping.repositories.get(repository, repository)
        check("repository", repository, cells.label("repository"))
    description = cells.get("description")
    if description is not None:
        check("volume description", description, cells.label("description"))
    yes = no = ""
    for letter in mapping.flags:
        if _truth(cells, f"flag {letter}"):
            yes += letter
        else:
            no += letter
    return Wanted(line, _name(cells, mapping), repository, description, _move_date(cells, mapping), yes, no)


def _name(cells: _Cells, mapping: Mapping) -> str:
    """The Volume's full name."""
    name = cells.get("volume") or ""
    if "." in name:
        check_name("volume", name)
    else:
        check("volume", name, cells.label("volume"))
        customer, _, media = mapping.scope.partition(".")
        above = {"customer": customer, "media": media}
        for field, otherwise in above.items():
            found = cells.get(field)
            above[field] = check(field, otherwise if found is None else found, cells.label(field))
        name = ".".join([*above.values(), name])
    if not name.startswith(mapping.scope + "."):
        raise Invalid(f"{cells.label('volume')}: {name} is outside the mapping's scope {mapping.scope}")
    return name


def _move_date(cells: _Cells, mapping: Mapping) -> str | None:
    if not (text := cells.get("move_date")):
        return text
    try:
        return _day(text, mapping.date_format)
    except ValueError:
        raise Invalid(
            f"{cells.label('move_date')}: must be a day as {mapping.date_format}, or empty, not {text[:40]!r}"
        ) from None


def _truth(cells: _Cells, field: str) -> bool:
    word = (cells.get(field) or "").lower()
    if word not in YES + NO:
        raise Invalid(f"{cells.label(field)}: must be yes, no, y, n, true, false, 1, 0 or empty, not {word[:40]!r}")
    return word in YES


# ---------------------------------------------------------------------------------------------------------------------
# What differs
# ---------------------------------------------------------------------------------------------------------------------

# What is counted of a run, in the order of its statistics.
STATISTICS = {
    "lines": "Lines read",
    "bad": "Lines with an error",
    "scope": "Volumes in the scope",
    "absent": "Volumes that the inventory does not have",
    "unchanged": "Volumes without a difference",
    "new": "New Volumes left out (may.add)",
    "different": "Different Volumes left so (may.update)",
    "elsewhere": "Volumes elsewhere left there (may.move)",
    "moving": "Volumes on their way, left to arrive",
    "added": "Volumes added",
    "updated": "Volumes updated",
    "moved": "Moves asked for",
    "refused": "Changes that the server refused",
}
LEFT = frozenset(("new", "different", "elsewhere", "moving"))  # those that are no news where they are 0
TO_DO = {"added": "Volumes to add", "updated": "Volumes to update", "moved": "Moves to ask for"}  # in a dry run


class Change(NamedTuple):
    """One request that brings a Volume in line with its line of the inventory."""

    line: int
    counts: str  # what it counts as once it is done, of STATISTICS
    operation: str
    arguments: Arguments
    says: str  # for people


def compare(
    mapping: Mapping, inventory: Iterable[Wanted], volumes: AnyMapping[str, VolumeRecord], statistics: Counter[str]
) -> Iterator[Change]:
    """The changes that the mapping allows; what it does not allow, and what is right already, is counted."""
    statistics["scope"] = statistics["absent"] = len(volumes)
    for wanted in inventory:
        volume = volumes.get(wanted.volume)
        if volume is None:
            if mapping.may.add:
                yield _addition(wanted)
            else:
                statistics["new"] += 1
            continue
        statistics["absent"] -= 1
        update = _update(wanted, volume)
        where = _whereabouts(wanted, volume)
        if update is None and not where:
            statistics["unchanged"] += 1
        if update is not None:
            if mapping.may.update:
                yield update
            else:
                statistics["different"] += 1
        if where == "elsewhere" and mapping.may.move and wanted.repository:
            yield Change(
                wanted.line,
                "moved",
                "volume.move",
                MoveVolume(volume.name, to=wanted.repository),
                f"move {volume.name} from {volume.current} to {wanted.repository}",
            )
        elif where:
            statistics[where] += 1


def _addition(wanted: Wanted) -> Change:
    volume = AddVolume(
        wanted.volume,
        repository=wanted.repository or "",
        description=wanted.description or "",
        flags="".join(sorted(wanted.flags)),
        move_date=wanted.move_date or "",
    )
    return Change(wanted.line, "added", "volume.add", volume, f"add {wanted.volume} in {wanted.repository}")


def _update(wanted: Wanted, volume: VolumeRecord) -> Change | None:
    """None where description, move date and flags are as they should be."""
    description: str | UnsetType = UNSET
    move_date: str | UnsetType = UNSET
    differs = []
    if wanted.description not in (None, volume.description):
        description = wanted.description or ""
        differs.append(f"description {volume.description!r} -> {description!r}")
    if wanted.move_date not in (None, volume.move_date):
        move_date = wanted.move_date or ""
        differs.append(f"move date {volume.move_date or 'none'} -> {move_date or 'none'}")
    add = "".join(letter for letter in wanted.flags if letter not in volume.flags)
    remove = "".join(letter for letter in wanted.no_flags if letter in volume.flags)
    differs += [f"flag {letter} set" for letter in add] + [f"flag {letter} cleared" for letter in remove]
    if not differs:
        return None
    arguments = UpdateVolume(volume.name, description, move_date, set_flags=add, clear_flags=remove)
    return Change(wanted.line, "updated", "volume.update", arguments, f"update {volume.name}: {', '.join(differs)}")


def _whereabouts(wanted: Wanted, volume: VolumeRecord) -> str:
    """ "" where it is or goes as the inventory says, "moving" where it is on its way from there, else "elsewhere"."""
    if wanted.repository is None or wanted.repository == (volume.target or volume.current):
        return ""
    # An inventory that is made before a tape arrives still has it where it was: that is no wish to call the move off.
    return "moving" if wanted.repository == volume.current else "elsewhere"
