"""The bench: its arithmetic, what becomes of a run that is repeated or fails, its pictures, and its peers' files."""

import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import kit, pictures, servers
from bench.kit import NotMeasuredError, Report, Row, Run
from tt.client import Client, TapeTrackError

ROOT = Path(__file__).parents[1]
LARGEST_PICTURE = 60 * 1024  # bytes


def run(value: float) -> Run:
    """What a run of the generator says, as far as it is drawn."""
    return dict.fromkeys(("rate", "server_ns", "p50_ns", "p99_ns"), value)


def report() -> Report:
    """Of every measurement, as if each had two sides."""
    made = Report(
        quick=True, machine={"commit": "1234567", "cpu": "a processor", "redis": "Redis server v=7.0.15 sha=0"}
    )
    for name in pictures.TITLES:
        with made.measuring(name):
            made.add(Row(f"figure of {name}", "us CPU", [3.0, 2.0, 4.0], "HAProxy", [6.0, 5.0, 9.0], [2.0, 2.5, 2.25]))
            sides = {"ours": [run(1e3), run(2e3)], "HAProxy": [run(2e3), run(5e3)]}
            sizes = (1, 10, 1000) if name in pictures.LINE_PANELS else (name,)
            for size in sizes:
                made.keep(str(size), sides)
    return made


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("a", "us", [1.0], "peer", [2.0], [1.4, 1.6, 1.7], wanted="at least 1.5"), True),
        (Row("a", "us", [1.0], "peer", [2.0], [1.4, 1.4, 1.7], wanted="at least 1.5"), False),
        (Row("a", "us", [1.0, 2.0, 9.0], wanted="at most 2"), True),
        (Row("a", "us", [1.0, 2.1, 9.0], wanted="at most 2"), False),
        (Row("a", "us", [1.0], "peer", wanted="at least 1.5"), None),
        (Row("a", "us", [1.0]), None),
    ],
)
def test_a_figure_is_judged_by_the_median_ratio_and_not_where_its_peer_is_missing(row: Row, met: bool | None) -> None:
    assert row.met() is met


def test_sides_run_by_turns_and_every_second_round_backwards() -> None:
    order: list[str] = []

    def side(name: str) -> Run:
        order.append(name)
        return {"x": 1.0}

    kit.alternate({name: lambda name=name: side(name) for name in ("ours", "b", "c")}, 3)  # type: ignore[misc]
    assert order == ["ours", "b", "c", "c", "b", "ours", "ours", "b", "c"]


@pytest.mark.parametrize(("values", "runs", "made"), [((1.0, 1.0), 4, 4), ((1.0, 3.0), 4, 8), ((1.0, 3.0), 3, 3)])
def test_runs_whose_ratios_are_far_apart_are_doubled_once_but_not_in_a_quick_look(
    values: tuple[float, float], runs: int, made: int
) -> None:
    answers = iter(values * 100)
    results = kit.compare({"ours": lambda: {"x": next(answers)}, "peer": lambda: {"x": 1.0}}, runs, "x")
    assert [len(of_side) for of_side in results.values()] == [made, made]


# ---- a run, repeated and failed -------------------------------------------------------------------------------------


def test_a_run_that_is_written_and_read_is_the_same(tmp_path: Path) -> None:
    made = report()
    made.write(tmp_path / "run.json")
    again = Report.read(tmp_path / "run.json")
    assert (again.rows, again.details, again.parts) == (made.rows, made.details, made.parts)


def test_what_is_measured_again_replaces_its_own_part_and_stays_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    made = report()
    monkeypatch.setitem(bench.MEASUREMENTS, "drops", lambda one: one.add(Row("new", "us", [1.0])))
    assert bench.measure(made, ["drops"]) == []
    assert [row.name for row in made.rows if row.measurement == "drops"] == ["new"]
    assert made.rows[0].name == "new"
    assert "drops" not in made.details
    assert {row.measurement for row in made.rows} == set(bench.MEASUREMENTS)


def test_a_measurement_that_fails_is_tried_again_then_named_and_leaves_the_earlier_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, calls = report(), list[str]()

    def fails(one: Report) -> None:
        calls.append("drops")
        one.add(Row("half", "us", [1.0]))
        raise RuntimeError("the server ended a connection")

    before = (list(made.rows), dict(made.details))
    monkeypatch.setitem(bench.MEASUREMENTS, "drops", fails)
    monkeypatch.setitem(bench.MEASUREMENTS, "table", lambda one: one.add(Row("new", "us", [1.0])))
    assert bench.measure(made, ["drops", "table"]) == ["drops"]
    assert calls == ["drops", "drops"]
    assert "FAILED: drops: the server ended a connection" in capsys.readouterr().out
    assert [row for row in made.rows if row.measurement == "drops"] == before[0][:1]
    assert made.details["drops"] == before[1]["drops"]
    assert "new" in {row.name for row in made.rows}


def test_what_cannot_be_had_is_said_with_its_reason_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: Report) -> None:
        raise NotMeasuredError("nginx is not installed: run: make bench-deps")

    made = Report(quick=True)
    monkeypatch.setitem(bench.MEASUREMENTS, "drops", missing)
    assert bench.measure(made, ["drops"]) == []
    assert "not measured: nginx is not installed: run: make bench-deps" in capsys.readouterr().out
    assert made.missing == {"drops": ["nginx is not installed: run: make bench-deps"]}
    assert "Not measured: nginx is not installed" in pictures.figures(made)


def test_a_peer_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(NotMeasuredError, match=r"^memcached is not installed: run: make bench-deps$"):
        servers.Memcached()


def test_a_measurement_that_does_not_exist_is_named_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.options_of(["drips"])
    assert "drips: no such measurement; there are drops, ladder" in capsys.readouterr().err


def test_a_file_that_is_no_run_of_the_bench_is_refused_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"rows": [], "colour": "red"}')
    assert bench.main(["--into", str(path), "drops"]) == 2
    assert f"--into {path}: no run of this bench" in capsys.readouterr().err
    assert path.read_text() == '{"rows": [], "colour": "red"}'


# ---- pictures and the table -----------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path: Path) -> Iterator[dict[str, str]]:
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("matplotlib's own libraries end the process under the address sanitizer")
    pytest.importorskip("matplotlib", reason="matplotlib is not in .venv: run: make bench")
    (tmp_path / "old.svg").write_text("of a measurement that is no more")
    yield {path.stem: path.read_text() for path in pictures.draw(report(), tmp_path)}
    assert not (tmp_path / "old.svg").exists()


def test_every_measurement_has_a_picture_that_names_its_sides_and_is_small(drawn: dict[str, str]) -> None:
    assert set(drawn) == set(bench.MEASUREMENTS)
    for name, svg in drawn.items():
        assert pictures.TITLES[name].replace("'", "") in svg.replace("'", "")
        assert "ours" in svg
        assert "HAProxy" in svg
        assert len(svg) < LARGEST_PICTURE


def test_the_same_run_gives_the_same_picture(drawn: dict[str, str], tmp_path: Path) -> None:
    again = {path.stem: path.read_text() for path in pictures.draw(report(), tmp_path / "again")}
    assert {name for name, svg in drawn.items() if svg != again[name]} == set()


def test_the_table_in_the_text_is_that_of_the_run_and_nothing_else_changes() -> None:
    text = f"before\n{pictures.BEGIN}\na table of yesterday\n{pictures.END}\nafter\n"
    run_of_all = report()
    made = pictures.with_table(text, run_of_all)
    assert made.startswith(f"before\n{pictures.BEGIN}\n")
    assert made.endswith(f"\n{pictures.END}\nafter\n")
    assert "yesterday" not in made
    assert (
        "| figure of drops | us CPU | 3.00 (2.00-4.00) | HAProxy 6.00 (5.00-9.00) | **2.25 (2.00-2.50)** |  |" in made
    )
    assert "![Bytes on the wire](pictures/sizes.svg)" in made
    assert pictures.with_table(made, run_of_all) == made
    with pytest.raises(ValueError, match="has not both marks"):
        pictures.with_table("before", run_of_all)


def test_the_readme_has_the_marks_describes_every_measurement_and_shows_no_picture_that_is_not_there() -> None:
    text = (ROOT / "bench/README.md").read_text()
    assert text.count(pictures.BEGIN) == text.count(pictures.END) == 1
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(bench.MEASUREMENTS)
    for name in re.findall(r"\]\((pictures/[\w.]+)\)", text):
        assert (ROOT / "bench" / name).stat().st_size < LARGEST_PICTURE


# ---- the peers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "bench/peers").rglob("*.*")), ids=lambda path: path.name)
def test_a_peers_file_begins_with_what_it_is_for(path: Path) -> None:
    assert re.match(r'# \w|-- \w|"""\w', path.read_text())


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="server and generator need a processor each")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_peer_in_python_answers_pings_and_times_out_who_speaks_something_else(loop: str) -> None:
    if importlib.util.find_spec(loop) is None:
        pytest.skip(f"{loop} is not in .venv: run: make bench")
    with servers.Python(loop) as server:
        key = bytes.fromhex(server.key)
        with Client("127.0.0.1", server.port, key=key, timeout=60) as client:
            assert [client.ping().size for _ in range(3)] == [25, 25, 25]
        with socket.create_connection(("127.0.0.1", server.port), 60, ("127.0.0.9", 0)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(1) == b""
        with pytest.raises(TapeTrackError), Client("127.0.0.1", server.port, key=key, source="127.0.0.9", timeout=60):
            pass
        with Client("127.0.0.1", server.port, key=key, timeout=60) as client:
            assert client.ping().size == 25
