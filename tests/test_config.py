"""The options: where a value comes from, what is refused and how, what a reload changes, and the help."""

import argparse
import os
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tt import config, option_kinds
from tt.cli import output, serve
from tt.config import OPTIONS, Address, Config, ConfigError, load


def write(folder: Path, text: str) -> Path:
    path = folder / "tt.toml"
    path.write_text(text)
    return path


def refusal(path: Path | None = None, environ: dict[str, str] | None = None, **overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {}, overrides)
    text = str(caught.value)
    assert "\n" not in text, "one line"
    return text


# ---- where a value comes from -------------------------------------------------------------------------------------


def test_without_anything_every_option_has_its_default() -> None:
    loaded = load(None, {}, {})
    assert loaded == Config()
    assert loaded.listen == (Address("0.0.0.0", 5000), Address("::", 5000))
    assert {loaded.origin(name) for name in OPTIONS} == {config.DEFAULT}


def test_the_command_line_beats_the_environment_and_that_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "timeout = 1\nbacklog = 1\ntable_size = 1025")
    environ = {"TT_TIMEOUT": "2", "TT_BACKLOG": "2", "HOME": "/"}
    loaded = load(path, environ, {"timeout": "3"})
    assert (loaded.timeout, loaded.backlog, loaded.table_size) == (3, 2, 1025)
    assert loaded.origin("timeout") == "option --timeout"
    assert loaded.origin("backlog") == "environment TT_BACKLOG"
    assert loaded.origin("table_size") == f"{path}: table_size"


def test_a_later_source_replaces_a_list_whole(tmp_path: Path) -> None:
    path = write(tmp_path, 'exempt = ["loopback", "192.0.2.0/24"]')
    assert load(path, {}, {}).exempt == ("loopback", ip_network("192.0.2.0/24"))
    assert load(path, {"TT_EXEMPT": "gateways, 2001:db8::/32"}, {}).exempt == ("gateways", ip_network("2001:db8::/32"))
    assert load(path, {"TT_EXEMPT": ""}, {}).exempt == ()
    assert load(path, {}, {"exempt": ["10.0.0.1", "10.0.0.1"]}).exempt == (ip_network("10.0.0.1/32"),)


@pytest.mark.parametrize(
    ("text", "seconds"), [("600", 600), ("10m", 600), ("2h", 7200), ("1 d", 86400), ("1.5m", 90), ("30s", 30)]
)
def test_a_duration_is_the_same_in_file_and_environment(tmp_path: Path, text: str, seconds: float) -> None:
    rest = "escalate = false\n"
    assert load(write(tmp_path, f'{rest}timeout = "{text}"'), {}, {}).timeout == seconds
    assert load(write(tmp_path, rest), {"TT_TIMEOUT": text}, {}).timeout == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("65536", 65536), ("64 KiB", 65536), ("2MiB", 2 << 20), ("0.5 MiB", 1 << 19)]
)
def test_a_size_may_have_a_unit(text: str, size: int) -> None:
    assert load(None, {"TT_OUTPUT_LIMIT": text}, {}).output_limit == size


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("[::1]:5000", Address("::1", 5000)),
        ("[2001:DB8:0:0::1]:65535", Address("2001:db8::1", 65535)),
    ],
)
def test_an_address_is_read_and_printed_in_one_form(text: str, address: Address) -> None:
    (read,) = load(None, {}, {"listen": [text]}).listen
    assert read == address
    assert load(None, {}, {"listen": [str(read)]}).listen == (address,)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("timeot = 5", ["timeot", "no such option", "timeout"]),
        ("colour = 5", ["colour", "no such option", "--help"]),
        ("[timeout]\nx = 1", ["timeout = {'x': 1}", "seconds"]),
        ("timeout = true", ["timeout = True", "seconds"]),
        ("timeout = 0", ["timeout = 0", "out of range", "1s to 30d", "10m"]),
        ("timeout = -5", ["timeout = -5", "out of range"]),
        ("timeout = nan", ["timeout = nan", "out of range"]),
        ("timeout = inf", ["timeout = inf", "out of range"]),
        ('timeout = "soon"', ["timeout = 'soon'", "10m"]),
        ('backlog = "5"', ["backlog = '5'", "a whole number"]),
        ("backlog = 5.5", ["backlog = 5.5", "a whole number"]),
        ("table_size = 1023", ["table_size = 1023", "1024 to 1048576", "65536"]),
        ("table_size = 1048577", ["table_size = 1048577", "1024 to 1048576"]),
        ('observe = "yes"', ["observe = 'yes'", "true or false"]),
        ("observe = 1", ["observe = 1", "true or false"]),
        ('listen = "127.0.0.1:5000"', ["listen", "a list"]),
        ("listen = [5000]", ["listen = 5000", "PORT"]),
        ("listen = []", ["listen", "at least one"]),
        ('exempt = ["10.0.0.1/8"]', ["exempt = '10.0.0.1/8'", "host bits"]),
        ('exempt = ["everyone"]', ["exempt = 'everyone'", "loopback, gateways"]),
        ('log_format = "xml"', ["log_format = 'xml'", "text or json"]),
        ('data = ""', ["data = ''", "directory"]),
        ('user = "a\\u0000b"', [r"user = 'a\x00b'", "the name or number of a user"]),
        ("control_group = true", ["control_group = True", "the name or number of a group, or none"]),
        ('output_limit = "5 GB"', ["output_limit = '5 GB'", "KiB"]),
        ("timeout = ", ["not TOML"]),
        ('timeout = 7200\ntimeout_max = "1h"', ["timeout 2h", "timeout_max 1h", "escalate = false"]),
    ],
)
def test_a_bad_file_is_refused_with_place_rule_and_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path, text)
    answer = refusal(path)
    assert str(path) in answer
    assert [part for part in parts if part not in answer] == [], answer


@pytest.mark.parametrize(
    "text",
    ["localhost:5000", "127.0.0.1", "::1:5000", "[127.0.0.1]:5000", "1.2.3.4:65536", "1.2.3.4:-1", ":5000", "*:5000"],
)
def test_what_is_no_address_with_a_port_is_refused(text: str) -> None:
    assert f"option --listen = {text!r}: it must be IPv4:PORT or [IPv6]:PORT" in refusal(listen=[text])


@pytest.mark.parametrize("text", ["٣", "1e3", "0x10", "1_000", "+5", "", "9" * 30])
def test_a_number_is_written_in_plain_digits(text: str) -> None:
    assert "option --backlog" in refusal(backlog=text)


def test_a_value_with_a_line_break_is_answered_in_one_line() -> None:
    assert r"'1\n2'" in refusal(timeout="1\n2")
    assert len(refusal(timeout="x" * 10_000)) < 300


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml").startswith(f"{tmp_path / 'none.toml'}: No such file")
    assert "Is a directory" in refusal(tmp_path)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tt.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not TOML" in refusal(path)


def test_a_mistyped_variable_is_refused_and_one_of_another_program_is_not() -> None:
    assert refusal(environ={"TT_TIMOUT": "5"}) == "environment TT_TIMOUT: no such option; did you mean TT_TIMEOUT?"
    others = {"TT_BUILD": "asan", "TT_SERVICE_HOST": "10.0.0.1", "TT_PORT_5000_TCP_ADDR": "10.0.0.1", "TT_PORT": "x"}
    assert load(None, others, {}) == Config()


@given(st.sampled_from(sorted(OPTIONS)), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_arbitrary_text_is_a_value_or_one_line(name: str, text: str) -> None:
    answer = ""
    try:
        load(None, {"TT_" + name.upper(): text}, {})
    except ConfigError as error:
        answer = str(error)
    assert answer.isprintable()  # no line break, no control character


# ---- the table of options itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_every_default_is_in_its_own_range_and_reads_back_from_its_text(name: str) -> None:
    option, value = OPTIONS[name], config.default(name)
    if isinstance(value, (int, float)):
        assert option.least <= value <= option.most
    text: Any = [option.kind.show(item) for item in value] if option.kind.many else option.kind.show(value)
    if option.kind is not option_kinds.RATE:  # is shown with "a second"
        assert getattr(load(None, {}, {name: text}), name) == value


def test_loading_twice_shares_nothing_that_can_change() -> None:
    first = load(None, {}, {"exempt": ["loopback"]})
    with pytest.raises(AttributeError):
        first.timeout = 5  # type: ignore[misc]
    hash(first.listen)
    hash(first.exempt)


# ---- reload -------------------------------------------------------------------------------------------------------


def test_a_reload_takes_what_can_change_and_names_what_needs_a_restart(tmp_path: Path) -> None:
    path = write(tmp_path, "timeout = 100\ntable_size = 2048")
    running = load(path, {"TT_BACKLOG": "7"}, {"observe": True})
    write(tmp_path, "timeout = 200\ntable_size = 4096\nobserve = false")
    fresh, held = config.reload(running)
    assert (fresh.timeout, fresh.table_size, fresh.observe, fresh.backlog) == (200, 2048, True, 7)
    assert held == ["table_size"]
    assert config.reload(fresh)[1] == ["table_size"], "it still differs"


def test_a_bad_file_at_a_reload_changes_nothing(tmp_path: Path) -> None:
    running = load(write(tmp_path, "timeout = 100"), {}, {})
    write(tmp_path, "timeout = 0")
    with pytest.raises(ConfigError, match="out of range"):
        config.reload(running)
    assert running.timeout == 100


# ---- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tt", exit_on_error=False)
    serve.register(parser.add_subparsers())
    return parser


def test_the_help_names_every_option_with_its_default(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["serve", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, option in OPTIONS.items():
        flag = config.flag(f"no_{name}" if option.kind is config.SWITCH and config.default(name) else name)
        assert (flag if option.flag else f" {name} ") in text
        assert f"(default: {config.show(name, config.default(name))})." in text


def test_a_bad_option_ends_with_exit_code_2(parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    args = parser.parse_args(["serve", "--timeout", "never"])
    with pytest.raises(output.Exit, match="option --timeout = 'never'") as caught:
        args.run(args)
    assert caught.value.code == output.USAGE
