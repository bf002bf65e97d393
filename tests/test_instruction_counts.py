"""The guard against getting slower unnoticed: instruction counts of this build beside those in bench/counts/."""

import os
import shutil
from pathlib import Path

import pytest
from process import need

from bench import counts
from bench.counts.book import TOLERANCE, Book, differences

BUILD = {"machine": "x86_64", "compiler": "gcc 12.2.0"}


@pytest.fixture
def release() -> None:
    """Skips where there is nothing to count."""
    flavour = os.environ.get("TT_BUILD", "release")
    if flavour != "release":
        pytest.skip(f"counts are those of the release build, and this one is {flavour}")
    need("gcc", "valgrind")


def kept(part: str, build: counts.Build) -> counts.Counts:
    book = Book.read()
    found = book.find(part, build)
    if found is None:
        pytest.skip(book.why_not(part, build))
    return found


@pytest.mark.usefixtures("release")
def test_look_up_and_verdict_take_as_many_instructions_as_before(tmp_path: Path) -> None:
    expected = kept("compiled", counts.compiled_build())
    assert differences(expected, counts.inline_counts(tmp_path)) == []


@pytest.mark.usefixtures("release")
def test_handshake_ping_and_get_take_as_many_instructions_as_before() -> None:
    expected = kept("server", counts.server_build())
    assert differences(expected, counts.server_counts()) == []


@pytest.mark.usefixtures("release")
def test_a_look_up_with_one_more_round_of_its_hash_is_noticed(tmp_path: Path) -> None:
    expected = kept("compiled", counts.compiled_build())
    slower = tmp_path / "ext"
    shutil.copytree(counts.kit.ROOT / "ext", slower, ignore=shutil.ignore_patterns("*.c"))
    source = slower / "source.pxd"
    text = source.read_text()
    assert text.count("    v[2] ^= 0xFF\n") == 1
    source.write_text(text.replace("    v[2] ^= 0xFF\n", "    v[2] ^= 0xFF\n    sip_round(v)\n"))
    (line,) = differences(expected, counts.inline_counts(tmp_path, slower))
    assert line.startswith("table look-up: ")


def test_a_count_within_the_tolerance_is_the_same_and_one_beyond_it_is_not_in_either_direction() -> None:
    kept_counts = {"ping": 1000.0}
    inside, outside = TOLERANCE * 0.9, TOLERANCE * 1.1
    for change in (-inside, 0, inside):
        assert differences(kept_counts, {"ping": 1000 * (1 + change)}) == []
    (more,) = differences(kept_counts, {"ping": 1000 * (1 + outside)})
    assert more.startswith("ping: 1,033 instructions, +3.3% to the 1,000 in counts.json: look why")
    (less,) = differences(kept_counts, {"ping": 1000 * (1 - outside)})
    assert "a gain" in less


def test_a_count_that_is_new_or_gone_is_a_difference() -> None:
    assert len(differences({"ping": 1.0}, {"get": 1.0})) == 2


def test_another_build_has_no_counts_and_is_told_in_what_it_differs(tmp_path: Path) -> None:
    book = Book({})
    book.keep("compiled", BUILD, {"ping": 1000.04})
    book.keep("compiled", BUILD | {"machine": "aarch64", "compiler": "gcc 14.2.0"}, {"ping": 2000.0})
    book.write(tmp_path / "counts.json")
    book = Book.read(tmp_path / "counts.json")
    assert book.find("compiled", BUILD) == {"ping": 1000.0}
    newer = BUILD | {"compiler": "gcc 12.3.0"}
    assert book.find("compiled", newer) is None
    assert book.why_not("compiled", newer).startswith(
        "no counts for this build (compiler gcc 12.3.0, not gcc 12.2.0): run `make counts`"
    )
    assert Book({}).why_not("server", newer).startswith("no counts for this build: run `make counts`")


def test_counts_of_the_same_build_take_the_place_of_the_old_ones() -> None:
    book = Book({})
    for count in (1.0, 2.0):
        book.keep("compiled", BUILD, {"ping": count})
    assert book.parts == {"compiled": [(BUILD, {"ping": 2.0})]}
