"""`tt config`, docs/config.md, and what a SIGHUP changes in a running server."""

import argparse
import json
import signal
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from docs_kit import ROOT, between
from harness import ended, until
from hypothesis import given
from hypothesis import strategies as st
from process import Process

from tt import cli, config
from tt.cli import config as tt_config
from tt.cli import output, serve
from tt.config import OPTIONS, load

Capture = pytest.CaptureFixture[str]
DOCUMENT = (ROOT / "docs/config.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def _no_options_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONS:
        monkeypatch.delenv(config.ENVIRONMENT + name.upper(), raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tt.toml"


def check(file: Path, capture: Capture, text: str) -> tuple[int, list[str]]:
    """The exit code, and the lines without the file's name; nothing goes to stdout."""
    file.write_text(text, "utf-8")
    code = cli.main(["config", "check", str(file)])
    out, err = capture.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith(f"tt: {file}: ") for line in lines), lines
    return code, [line.removeprefix(f"tt: {file}: ") for line in lines]


# ---- tt config check ------------------------------------------------------------------------------------------------


def test_every_error_of_a_file_is_a_line_in_the_order_of_the_file(file: Path, capsys: Capture) -> None:
    text = """
        timeout = 0
        timeot = 5
        exempt = ["10.0.0.1/8", "192.0.2.0/24", "everyone"]
        backlog = "x"
        listen = []
        timeout_max = 5
        observe = 1
        [table_size]
        x = 1
    """
    code, lines = check(file, capsys, text)
    assert code == output.USAGE
    assert [line.partition(":")[0] for line in lines] == [
        "timeout = 0", "'timeot'", "exempt = '10.0.0.1/8'", "exempt = 'everyone'", "backlog = 'x'", "observe = 1",
        "table_size = {'x'", "listen",
    ]  # fmt: skip


def test_what_a_wrong_option_would_break_is_no_error_of_its_own(file: Path, capsys: Capture) -> None:
    """timeout's default is longer than this timeout_max; but what timeout is to be is not known."""
    assert len(check(file, capsys, 'timeout = "soon"\ntimeout_max = 5')[1]) == 1
    file.write_text("timeout_max = 5")
    assert cli.main(["config", "check", str(file)]) == output.USAGE
    assert capsys.readouterr().err.startswith(f"tt: timeout 10m (default) is longer than timeout_max 5s ({file}: ")
    assert check(file, capsys, "timeout = 3\ntimeout_max = 5")[0] == output.OK


@pytest.mark.parametrize(("text", "error"), [("timeout = ", "not TOML: "), ("timeout = 1\ntimeout = 2", "not TOML: ")])
def test_what_is_no_toml_is_one_line(file: Path, capsys: Capture, text: str, error: str) -> None:
    code, (line,) = check(file, capsys, text)
    assert code == output.USAGE
    assert line.startswith(error)
    assert "line " in line


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["config", "check", str(tmp_path / "none.toml")]) == output.USAGE
    assert capsys.readouterr().err.startswith(f"tt: {tmp_path / 'none.toml'}: No such file or directory: ")


def test_a_good_file_is_called_so(file: Path, capsys: Capture) -> None:
    assert check(file, capsys, "") == (output.OK, [f"good; options set: 0 of {len(OPTIONS)}"])
    good = 'timeout = "5m"\nexempt = ["loopback", "10.0.0.0/8", "2001:db8::/32", "fc00::/7", "fe80::1", "192.0.2.1"]'
    assert check(file, capsys, good) == (output.OK, [f"good; options set: 2 of {len(OPTIONS)}"])


def test_a_check_looks_at_the_file_alone(file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TT_TIMEOUT", "0")
    assert check(file, capsys, "")[0] == output.OK


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ('exempt = ["0.0.0.0/0"]', "exempt = 0.0.0.0/0: all IPv4 addresses are never timed out; name networks"),
        ('exempt = ["::/0"]', "exempt = ::/0: all IPv6 addresses are never timed out; name networks of your own"),
        ('exempt = ["64.0.0.0/2"]', "exempt = 64.0.0.0/2: 1/4 of all IPv4 addresses are never timed out; name"),
        ('exempt = ["::ffff:192.0.2.0/120"]', "exempt = ::ffff:c000:200/120: exempts nobody, since such a"),
        ('exempt = ["64:ff9b::192.0.2.1"]', "exempt = 64:ff9b::c000:201/128: exempts nobody, since such a"),
        ('exempt = ["2001:db8::5"]', "exempt = 2001:db8::5/128: exempts all of 2001:db8::/64, which is one source"),
        ("observe = true", "observe = true: nobody is timed out, only logged"),
        ("ipv6_prefix = 128", "ipv6_prefix = 128: a host has a /64 of addresses, so one that is timed out comes"),
        ("ipv6_prefix = 32", "ipv6_prefix = 32: one time-out is for many sites; use 48 to 64"),
        ("vouching = false\ntimeout_vouched = 60", "timeout_vouched = 1m: no effect, since vouching = false; set"),
        ('escalate = false\ntimeout_max = "1h"', "timeout_max = 1h: no effect, since escalate = false; set escalate"),
        ("listener_filter = true", "listener_filter = true: no effect, since block_map = none; name a block_map"),
        ("timeout = 20", "timeout_vouched = 30s: more than timeout = 20s: a source with a good login waits longer"),
        ("output_limit_before_login = 131072\noutput_limit = 65536", "output_limit_before_login = 128 KiB: more than"),
        ("max_connections = 50", "connections_per_source = 64: more than max_connections = 50: one source can have"),
        ('data = "var"', "data = var: depends on the folder that the server is started in; give the whole path"),
        ('block_map = ["/sys/x", "map"]', "block_map = map: depends on the folder that the server is started in"),
        ('listen = ["127.0.0.1:0"]', "listen = 127.0.0.1:0: another port at each start, which no client knows"),
        ('listen = ["0.0.0.0:5000", "127.0.0.1:5000", "[::1]:5000"]', "listen = 127.0.0.1:5000: the start will fail,"),
    ],
)  # fmt: skip
def test_what_will_not_do_what_it_seems_is_a_warning(file: Path, capsys: Capture, text: str, warning: str) -> None:
    code, (line, last) = check(file, capsys, text)
    assert code == output.OK
    assert line.startswith(f"warning: {warning}")
    assert last.startswith("no error, warnings: 1;")


# ---- tt config show -------------------------------------------------------------------------------------------------


def show(capture: Capture, *words: str) -> str:
    assert cli.main(["config", "show", *words]) == output.OK
    out, err = capture.readouterr()
    assert err == ""
    return out


def test_each_option_is_shown_with_its_value_and_where_that_comes_from(
    file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('timeout = "5m"\nbacklog = 7\ntable_size = 2048\nexempt = ["loopback", "192.0.2.0/24"]')
    monkeypatch.setenv("TT_BACKLOG", "8")
    words = ("-c", str(file), "--table-size", "4096", "--observe")
    text = {line.split()[0]: " ".join(line.split()[1:]) for line in show(capsys, *words).splitlines()}
    assert list(text) == ["OPTION", *OPTIONS]
    assert text["OPTION"] == "FROM CHANGES AT VALUE"
    assert text["timeout"] == f"{file} SIGHUP 5m"
    assert text["exempt"] == f"{file} SIGHUP loopback, 192.0.2.0/24"
    assert text["backlog"] == "environment TT_BACKLOG restart 8"
    assert text["table_size"] == "option --table-size restart 4096"
    assert text["observe"] == "option --observe SIGHUP true"
    assert text["user"] == "default restart none"
    listed = {item["option"]: item for item in map(json.loads, show(capsys, "--json", *words).splitlines())}
    assert listed["timeout"] == {
        "option": "timeout", "value": 300.0, "default": 600.0, "from": "file", "changes_at": "SIGHUP",
    }  # fmt: skip
    assert listed["exempt"]["value"] == ["loopback", "192.0.2.0/24"]
    assert [listed[name]["from"] for name in ("backlog", "table_size", "user")] == [
        "environment", "command line", "default",
    ]  # fmt: skip
    assert [listed[name]["value"] for name in ("backlog", "observe", "data")] == [8, True, "var"]


def test_what_is_wrong_is_said_of_every_source_and_nothing_is_shown(
    file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("timeout = 0")
    monkeypatch.setenv("TT_BACKLOG", "x")
    assert cli.main(["config", "show", "-c", str(file), "--table-size", "1"]) == output.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    starts = [f"tt: {file}: timeout = 0: ", "tt: environment TT_BACKLOG = 'x': ", "tt: option --table-size = '1': "]
    assert all(line.startswith(start) for line, start in zip(err.splitlines(), starts, strict=True))


def uncommented(text: str) -> str:
    return "\n".join(line.removeprefix("#") if line[1:2].isalpha() else line for line in text.splitlines())


def test_the_file_that_show_prints_has_every_option_and_is_accepted(file: Path, capsys: Capture) -> None:
    text = show(capsys, "--toml", "--timeout", "90", "--exempt", "10.0.0.0/8")
    assert list(tomllib.loads(text)) == ["timeout", "exempt"]
    assert check(file, capsys, text) == (output.OK, [f"good; options set: 2 of {len(OPTIONS)}"])
    whole = uncommented(text)
    assert list(tomllib.loads(whole)) == list(OPTIONS)
    code, lines = check(file, capsys, whole)
    assert (code, [line.partition(":")[0] for line in lines[:-1]]) == (output.OK, ["warning"] * (len(lines) - 1))
    assert load(file, {}, {}) == replace(
        config.Config(), timeout=90.0, exempt=load(None, {}, {"exempt": ["10.0.0.0/8"]}).exempt
    )
    assert all(len(line) <= 120 for line in text.splitlines())
    assert [line[7:-5] for line in text.splitlines() if line.startswith("# ----")] == list(config.SECTIONS.values())


NUMBERS = {name: option for name, option in OPTIONS.items() if isinstance(config.default(name), (int, float))}


@given(st.data())
def test_a_printed_file_holds_exactly_the_values(data: Any) -> None:
    name = data.draw(st.sampled_from(sorted({*NUMBERS} - {"vouching", "timeout", "timeout_max"} | {"data", "user"})))
    kind = OPTIONS[name].kind
    if kind in (config.DURATION,):
        value: Any = data.draw(st.floats(OPTIONS[name].least, OPTIONS[name].most))
    elif kind is config.SWITCH:
        value = data.draw(st.booleans())
    elif name in NUMBERS:
        value = data.draw(st.integers(int(OPTIONS[name].least), int(min(OPTIONS[name].most, 1 << 40))))
    else:
        text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
        value = data.draw(text.filter(lambda text: not text.startswith("~")))
    loaded = load(None, {}, {name: value})
    (line,) = [line for line in tt_config.toml_file(loaded) if line.startswith(f"{name} = ")]
    assert output.printable(line) == line, "nothing is escaped once more"
    table = tomllib.loads(line)
    assert getattr(load(None, {}, table), name) == getattr(loaded, name)
    assert isinstance(table[name], OPTIONS[name].kind.toml)


def test_a_value_that_toml_cannot_hold_is_named() -> None:
    with pytest.raises(output.Exit, match=r"^data = '/x.udcff': it is not UTF-8"):
        list(tt_config.toml_file(load(None, {}, {"data": "/x\udcff"})))


# ---- docs/config.md -------------------------------------------------------------------------------------------------


def flags() -> dict[str, str]:
    """How the command line has an option: its forms, of the real parser."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    serve.register(commands)
    actions = commands.choices["serve"]._actions
    return {action.dest: ", ".join(f"`{form}`" for form in action.option_strings) for action in actions}


def option_tables() -> Iterator[str]:
    """What the document must have between its marks."""
    forms = flags()
    for name, option in OPTIONS.items():
        if name in config.SECTIONS:
            yield f"\n### {config.SECTIONS[name]}\n"
            yield "| option | default | may be | command line | changes at | what it is |"
            yield "| --- | --- | --- | --- | --- | --- |"
        shown = config.show(name, config.default(name))
        may_be = config.limits(name) or option.kind.rule
        cells = (f"`{name}`", shown, may_be, forms.get(name, ""), tt_config.changes_at(name), option.help)
        yield f"| {' | '.join(cells)} |"


def test_the_document_has_every_option_as_it_is() -> None:
    expected = "\n".join(option_tables()) + "\n\n"
    assert between(DOCUMENT, "options") == expected, expected


def test_the_sections_begin_with_options_that_are_there_and_with_the_first() -> None:
    assert set(config.SECTIONS) <= set(OPTIONS)
    assert next(iter(config.SECTIONS)) == next(iter(OPTIONS))


# ---- SIGHUP ---------------------------------------------------------------------------------------------------------


def reload(server: Process, file: Path, text: str, count: int) -> str:
    """The log line of the count-th reload."""
    file.write_text(text)
    server.send(signal.SIGHUP)
    lines: list[str] = until("the reload", lambda: reloads(server)[count - 1 : count])
    return lines[0].partition(" info ")[2]


def reloads(server: Process) -> list[str]:
    return [
        line for line in server.log.splitlines(keepends=True) if " configuration reloaded" in line and line[-1] == "\n"
    ]


def test_a_reload_changes_time_outs_exemptions_and_observing_at_once(tmp_path: Path, file: Path) -> None:
    file.write_text("timeout = 500\ntable_size = 2048\n")
    with Process(tmp_path, "-c", str(file)) as server:
        assert " seconds=500 " in server.time_out("127.0.0.2")
        line = reload(server, file, 'timeout = 70\ntable_size = 2048\nexempt = ["127.0.0.2"]\n', 1)
        assert line == "configuration reloaded\n"
        assert not server.drops("127.0.0.2"), "the exempt are lifted"
        assert " seconds=70 " in server.time_out("127.0.0.3")
        line = reload(server, file, "timeout = 70\ntable_size = 4096\nobserve = true\n", 2)
        assert line == "configuration reloaded needs_restart=table_size\n"
        server.time_out("127.0.0.4")
        assert not server.drops("127.0.0.4")
        line = reload(server, file, "timeout = 70\ntable_size = 2048\nobserve = true\n", 3)
        assert line == "configuration reloaded\n", "as it was at the start"


def test_a_reload_shortens_the_deadlines_of_connections_that_are_there(tmp_path: Path, file: Path) -> None:
    file.write_text('hello_deadline = "5m"\n')
    with Process(tmp_path, "-c", str(file)) as server, server.connect() as silent, server.connect("127.0.0.3") as other:
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.recv(1)
        assert reload(server, file, "hello_deadline = 1\n", 1) == "configuration reloaded\n"
        assert ended(silent) == b""


def test_a_reload_bounds_new_connections_of_a_source_that_has_many(tmp_path: Path, file: Path) -> None:
    file.write_text("connections_per_source = 3\n")
    with Process(tmp_path, "-c", str(file)) as server, server.connect(), server.connect():
        assert not server.drops("127.0.0.2")
        reload(server, file, "connections_per_source = 2\n", 1)
        until("a third to be turned away", lambda: server.drops("127.0.0.2"))
        reload(server, file, "connections_per_source = 3\n", 2)
        until("a third to be let in", lambda: not server.drops("127.0.0.2"))


def test_a_reload_with_an_error_changes_nothing_and_says_it(tmp_path: Path, file: Path) -> None:
    file.write_text("timeout = 500\n")
    with Process(tmp_path, "-c", str(file)) as server:
        file.write_text('timeout = 70\nexempt = ["everyone"]\n')
        server.send(signal.SIGHUP)
        line = server.await_line("error configuration not reloaded, the running one stays error=(.*)\n")[1]
        assert "exempt = 'everyone': it must be a network" in line
        assert " seconds=500 " in server.time_out("127.0.0.2")
