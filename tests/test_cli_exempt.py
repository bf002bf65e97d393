"""`tt exempt`: what it prints, on which stream, and its exit codes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli_bans import Capture, Tt
from test_control import Controlled

from tt import cli, config
from tt.cli import output


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Controlled]:
    with Controlled(tmp_path / "data", exempt=["198.51.100.0/24"]) as server:
        yield server


@pytest.fixture
def tt(server: Controlled, capsys: Capture) -> Tt:
    return Tt(server.settings.data, capsys)


def test_add_list_and_remove(tt: Tt) -> None:
    for number in range(2):
        tt("bans", "add", f"192.0.2.{number}")
    assert tt("exempt", "add", "192.0.2.0/24", "--reason", "office") == (
        "", "tt: 192.0.2.0/24 is exempt now; 2 time-outs lifted\n",
    )  # fmt: skip
    assert tt("exempt", "add", "192.0.2.0/24")[1] == "tt: 192.0.2.0/24 was exempt already\n"
    assert tt("exempt", "add", "loopback")[1] == "tt: loopback is exempt now\n"
    heading, *rows = tt("exempt", "list")[0].splitlines()
    assert heading.split() == ["NETWORK", "FROM", "SINCE", "NOTE"]
    assert rows[0].split() == ["198.51.100.0/24", "configuration"]
    assert rows[1].split()[:3] == ["192.0.2.0/24", "run", "time"]
    assert rows[1].split()[4] == "office"
    assert rows[2].split()[0] == "loopback"
    items = [json.loads(line) for line in tt("exempt", "list", "--json")[0].splitlines()]
    assert [list(item) for item in items] == [["network", "from", "note", "since"]] * 3
    assert tt("exempt", "remove", "192.0.2.0/24") == ("", "tt: 192.0.2.0/24 is no longer exempt\n")
    assert tt("exempt", "remove", "192.0.2.0/24", code=output.FAILED)[1] == (
        "tt: 192.0.2.0/24 is not exempt: see 'tt exempt list'\n"
    )


def test_what_the_configuration_exempts_is_refused_with_the_remedy(tt: Tt, server: Controlled) -> None:
    remedy = "take it out of `exempt` there, then send the server a SIGHUP"
    assert tt("exempt", "remove", "198.51.100.0/24", code=output.FAILED)[1] == (
        f"tt: 198.51.100.0/24 is exempt by the configuration: {remedy}\n"
    )
    tt("exempt", "add", "192.0.2.0/24")
    # As after a SIGHUP with a configuration that has it, too.
    server.guard.configure(config.load(None, {}, {"exempt": ["192.0.2.0/24"]}), ())
    assert tt("exempt", "remove", "192.0.2.0/24", code=output.FAILED)[1] == (
        f"tt: 192.0.2.0/24 is still exempt by the configuration: {remedy}\n"
    )


def test_a_warning_comes_with_what_is_done(server: Controlled, capsys: Capture) -> None:
    assert cli.main(["exempt", "add", "0.0.0.0/0", "--data", str(server.settings.data)]) == output.OK
    warning, done = capsys.readouterr().err.splitlines()
    assert warning == (
        "tt: warning: exempt 0.0.0.0/0: all IPv4 addresses are never timed out; name networks of your own"
    )
    assert done == "tt: 0.0.0.0/0 is exempt now"


def test_without_a_server_is_exit_code_3(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["exempt", "list", "--data", str(tmp_path)]) == output.NO_CONNECTION
    assert "no server runs there" in capsys.readouterr().err
