"""docs/catalog.md against the code: its tables are those of catalog/messages.py and catalog/model.py, row by row."""

import re
from pathlib import Path
from types import NoneType
from typing import Any

import msgspec
import pytest
from docs_kit import code, table
from msgspec import NODEFAULT, Raw, UnsetType

from tt.catalog import chain, messages, model, rights, structure, users, volumes
from tt.catalog.messages import ERRORS, EVENTS, OPERATIONS, Result
from tt.catalog.model import FLAGS, RULES, SETTABLE, STORED

TEXT = (Path(__file__).parents[1] / "docs/catalog.md").read_text("utf-8")
# How the document calls types.
TYPES: dict[Any, str] = {
    str: "text",
    int: "integer",
    bool: "boolean",
    bytes: "bytes",
    list[str]: "texts",
    list[tuple[str, Raw]]: "[operation, arguments] each",
    list[Raw]: "the result of each",
    dict[str, tuple[Any, Any]]: "map: field to [old, new]",
    NoneType: "",
}


def called(annotation: Any) -> str:
    """A type, as the document calls it."""
    if annotation in TYPES:
        return TYPES[annotation]
    parts = [part for part in getattr(annotation, "__args__", ()) if part is not UnsetType]
    if getattr(annotation, "__origin__", None) is list:
        return f"{parts[0].__name__} each"
    if parts:
        (annotation,) = parts
        return TYPES[annotation]
    return str(annotation.__name__)


def fields(kind: type[msgspec.Struct]) -> list[tuple[str, str, bool]]:
    """Each field's name, type, and whether it must be given."""
    return [(field.name, called(field.type), field.default is NODEFAULT) for field in msgspec.structs.fields(kind)]


def arguments(kind: type[msgspec.Struct]) -> str:
    return ", ".join(f"`{name}`{'' if must else '?'}" for name, _, must in fields(kind))


def results() -> dict[str, type[Result]]:
    """The results of operations and what is in them, by name."""
    kinds = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Result)]
    return {kind.__name__: kind for kind in kinds if kind is not Result}


def test_the_table_of_operations_is_that_of_the_code() -> None:
    written = table(TEXT, "operation", "arguments", "result", "right", "batch", "errors", "what it does")
    assert written == [
        [
            f"`{name}`",
            arguments(spec.arguments),
            f"`{spec.result.__name__}`" if spec.result else "",
            spec.right,
            "yes" if spec.batch else "",
            ", ".join(spec.errors),
            spec.does,
        ]
        for name, spec in OPERATIONS.items()
    ]


def test_the_table_of_arguments_is_that_of_the_code() -> None:
    kinds: dict[str, set[str]] = {}
    for spec in OPERATIONS.values():
        for name, kind, _ in fields(spec.arguments):
            kinds.setdefault(name, set()).add(kind)
    written = {code(name): kind for name, kind, _ in table(TEXT, "argument", "type", "meaning")}
    assert written == {name: " or ".join(sorted(kind)) for name, kind in kinds.items()}


def test_the_table_of_results_is_that_of_the_code() -> None:
    written = {code(name): elements for name, elements in table(TEXT, "result", "its elements")}
    assert written == {
        name: ", ".join(f"`{field}` {kind}" for field, kind, _ in fields(each)) for name, each in results().items()
    }


def test_the_tables_of_letters_errors_and_events_are_those_of_the_code() -> None:
    assert table(TEXT, "letter", "meaning", "set by") == [
        [f"`{letter}`", flag.meaning, set_by(letter)] for letter, flag in FLAGS.items()
    ]
    assert table(TEXT, "code", "meaning") == [[f"`{name}`", meaning] for name, meaning in ERRORS.items()]
    assert table(TEXT, "event", "meaning") == [[f"`{name}`", meaning] for name, meaning in EVENTS.items()]


def set_by(letter: str) -> str:
    return "users" if letter in SETTABLE else "scans and moves" if letter in STORED else "worked out when shown"


def test_the_table_of_rules_is_that_of_the_code() -> None:
    assert table(TEXT, "field", "must be") == [
        [name, rule.says.replace("|", "\\|").replace("*", "\\*")] for name, rule in RULES.items()
    ]


def test_the_table_of_limits_is_that_of_the_code() -> None:
    modules = (messages, model, rights, structure, users, volumes)
    for name, value, _ in table(TEXT, "limit", "value", "of what"):
        (defined,) = {getattr(module, code(name)) for module in modules if hasattr(module, code(name))}
        assert int(value.replace(",", "")) == defined, name
    written = {code(name) for name, _, _ in table(TEXT, "limit", "value", "of what")}
    named = {name for module in modules for name in vars(module) if re.match("MAX_|PAGE$|MOST_", name)}
    assert named <= written


def test_the_columns_of_a_row_of_history_are_those_that_are_hashed() -> None:
    columns = [code(name) for name, _, _ in table(TEXT, "column", "type", "content")]
    assert columns == ["sequence", "time", "user", "interface", "source", "event", "kind", "name", "place", "changes",
                       "previous", "hash"]  # fmt: skip
    example = dict(re.findall(r"^ {4}(\w+): +(.*)$", TEXT, re.MULTILINE))
    values = msgspec.json.decode(example["columns"])
    assert len(values) == len(columns) - 1
    assert msgspec.msgpack.encode(values).hex() == example["packed"]
    assert chain.link(bytes.fromhex(example["before"]), tuple(values)).hex() == example["hash"]


@pytest.mark.parametrize("words", ["Customer", "Media type", "Repository", "Volume"])
def test_the_terms_are_explained(words: str) -> None:
    assert re.search(rf"^- \*\*{words}\*\*", TEXT, re.MULTILINE)
