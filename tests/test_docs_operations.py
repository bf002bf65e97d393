"""docs/operations.md on real servers: its walk-through word by word, its recipes, and what it says that the log says.

The page's addresses (192.0.2.0/24, the office; 198.51.100.0/24, strangers) are loopback ones here, of the same length.
"""

import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from activation import Manager
from docs_kit import ROOT, code, table, understood
from harness import HOST, ended, until
from netns import HOST as HOST_ADDRESS
from netns import MAP, NEIGHBOURS, PORT, Lab, Namespace
from process import BIN, TT, Process, need, plain_environment
from test_cli_catalog import actions, fits
from test_metrics_docs import SAMPLES, alerts
from test_systemd import saved_of

from tt import cli, config, keys

TEXT = (ROOT / "docs/operations.md").read_text("utf-8")
HTTP = b"GET /health HTTP/1.1\r\nHost: tapes.example.com\r\n\r\n"
TLS = bytes.fromhex("16030100ba010000b60303") + bytes(64)
STANDS_FOR = {"192.0.2.": "127.0.2.", "198.51.100.": "127.51.100."}
TIME = r"\d{4}-\d\d-\d\dT[\d:.]+Z "  # of a line of the log


def blocks(kind: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S)


def marked(mark: str) -> str:
    """The blocks below such a mark, one after the other."""
    found = re.findall(rf"^<!-- {mark} -->\n```\w+\n(.*?)^```$", TEXT, re.M | re.S)
    assert found
    return "".join(found)


def block_of(kind: str, words: str) -> str:
    """The one block that has these words."""
    (found,) = (block for block in blocks(kind) if words in block)
    return found


def here(text: str, **more: str) -> str:
    """A text of the page with what its addresses, and other words, stand for."""
    for name, stands_for in {**STANDS_FOR, **more}.items():
        text = text.replace(name, stands_for)
    return text


def shell(script: str, server: Process, **environ: str) -> str:
    """What a script prints that must succeed, data and messages, where our commands are found and know the server."""
    script = 'curl() { env -u LD_PRELOAD curl "$@"; }\n' + script  # it hangs with the sanitizer's library
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        env=server.environ
        | {"PATH": f"{BIN}:{os.environ['PATH']}", "TT_DATA": str(server.place / "data"), "LC_ALL": "C"}
        | environ,
        cwd=server.place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (script, done.stdout, server.log)
    return done.stdout


def says(text: str, words: str) -> bool:
    """Whether one line of a log, or of what a command printed, is the page's line with these words."""
    (line,) = (one for block in blocks("text") for one in block.splitlines() if words in one)
    return any(fits(here(line), re.sub(f"^{TIME}", "", one)) for one in text.splitlines())


# ---- what the page names --------------------------------------------------------------------------------------------


def test_every_command_in_its_blocks_is_understood() -> None:
    unmarked = re.sub(r"^<!-- [\w ]+ -->\n```.*?^```$", "", TEXT, flags=re.M | re.S)  # the marked ones are run
    assert {"tt", "TapeTrackServer"} <= understood(unmarked)


def test_every_command_in_its_sentences_is_one_with_these_options() -> None:
    commands = [span.split() for span in re.findall(r"`(tt [^`]+)`", TEXT)]
    assert len(commands) > 10
    for _, *words in commands:
        there = list(actions(words[:1]))
        (action,) = (one for one in there if one == words[: len(one)])
        parser = cli._parser(words)
        for name in action:
            (below,) = (one.choices for one in parser._actions if one.dest == "==SUPPRESS==" and one.choices)
            parser = below[name]
        for option in (word for word in words[len(action) :] if word.startswith("-") and word != "-"):
            assert option in parser._option_string_actions, words


def test_every_metric_and_alert_is_one() -> None:
    assert set(re.findall(r"\btt_\w+", TEXT)) <= SAMPLES
    assert (named := set(re.findall(r"\bTapeTrack(?!Server)[A-Z]\w+", TEXT))) <= set(alerts())
    assert named


def test_every_value_beside_an_option_is_its_default() -> None:
    """Written as (`option`, value) or `option` (value)."""
    found = [one for one in re.findall(r"`(\w+)`(?:, | \()([\d,]+(?: \w+)?)\)", TEXT) if one[0] in config.OPTIONS]
    assert {"save_interval", "backlog"} <= {name for name, _ in found}
    for name, text in found:
        assert re.sub("[, ]", "", text) == config.show(name, config.default(name)), name


# ---- the walk-through -----------------------------------------------------------------------------------------------


def send(server: Process, source: str, data: bytes) -> None:
    with suppress(ConnectionError), server.connect(source) as peer:
        peer.sendall(data)
        ended(peer)


def time_out(server: Process, data: bytes, *sources: str) -> None:
    for source in sources:
        send(server, source, data)
        server.await_timed_out(source)


def office(server: Process) -> None:
    time_out(server, HTTP, "127.0.2.7")
    send(server, "127.0.2.7", HTTP)


# What happens before a command of the page.
BEFORE: dict[str, Callable[[Process], None]] = {
    "tt bans list 192.0.2.7": office,
    "tt bans list 198.51.100.0/24": lambda server: time_out(server, TLS, "127.51.100.7", "127.51.100.8"),
}


FAIL = {"tt bans add 192.0.2.8"}  # commands that are to


def watched(line: str, server: Process) -> str:
    """What `tt bans watch` prints first of a stranger, who comes until it does; then Ctrl-C."""
    command = [TT, *line.split()[1:], "--data", str(server.place / "data")]
    with subprocess.Popen(command, env=server.environ, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        while not select.select([watch.stdout], [], [], 0.2)[0]:
            shell("tt bans remove 127.51.100.9 || true", server)
            send(server, "127.51.100.9", TLS)
        while " timed out " not in (printed := watch.stdout.readline()):
            assert " lifted " in printed  # the one before, which came too early
        watch.send_signal(signal.SIGINT)
        watch.stdout.read()
        assert watch.wait(60) == 0
    return printed


def test_the_walk_through_prints_what_the_page_says(tmp_path: Path) -> None:
    need("bash", "curl")
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(blocks("console")), re.M)
    assert len(steps) == TEXT.count("\n$ ") > 12
    with Process(tmp_path, "--metrics", "127.0.0.1:0") as server:
        metrics = server.await_line(r" metrics address=127\.0\.0\.1:(\d+)")[1]
        for line, expected in steps:
            for begin, happens in BEFORE.items():
                if line.startswith(begin):
                    happens(server)
            command = here(line, **{":9500": f":{metrics}"})
            if command.startswith("tt ping"):
                command += f":{server.port}"
            command += " || test $? = 1" if line in FAIL else ""
            printed = (watched if line.startswith("tt bans watch") else shell)(command, server)
            if expected == "...\n":
                assert printed.count("\n") > 10, printed
            else:
                assert fits(here(expected), printed), f"{command}\nprinted:\n{printed}\ninstead of:\n{here(expected)}"
        server.await_line("request=exempt.add")
        assert says(server.log, "request=exempt.add")
    assert (tmp_path / "report.html").read_text().startswith("<!")


# ---- a load balancer, and checks ------------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    need("haproxy")
    with Lab(tmp_path) as lab:
        yield lab


@contextmanager
def balancer(lab: Lab, *, line: str | None = None, extra: str = "") -> Iterator[None]:
    """The page's HAProxy in the host, in front of the server there, with another `server` line where one is given."""
    text = block_of("haproxy", "listen tapes").replace("10.0.0.20:5000", f"{HOST_ADDRESS}:{PORT}")
    text = text.replace("bind :5000", f"bind {HOST_ADDRESS}:5001\n    {extra}")
    if line is not None:
        text = re.sub(r"(server tt \S+) .*", rf"\1 {line}", text)
    text = re.sub(r"(server tt .*)", rf"\1 inter 100 source {HOST_ADDRESS}", text)
    file, log = lab.place / "haproxy.cfg", lab.place / "haproxy.log"
    file.write_text(f"global\n    maxconn 100\n    log stdout format raw local0\ndefaults\n    log global\n{text}")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*lab.host.wrap, "haproxy", "-db", "-f", str(file)], env=plain_environment(), stdout=out, stderr=out
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def down(lab: Lab) -> bool:
    return "Server tapes/tt is DOWN" in (lab.place / "haproxy.log").read_text()


def accepted(lab: Lab, server: Process) -> int:
    (status,) = lab.ask(server, {"do": "status"})
    return int(status["accepted"])


PROXY = ("--proxy-from", f"{HOST_ADDRESS}/32")


@pytest.mark.root
def test_behind_the_pages_balancer_a_stranger_is_timed_out_for_himself(lab: Lab) -> None:
    with lab.serve("--proxy-from", f"{HOST_ADDRESS}/32") as server, balancer(lab):
        stranger, client = NEIGHBOURS[:2]
        until("the balancer serves", lambda: lab.meet(server, client, 5001) == "served")
        lab.misbehave(server, stranger, 5001)
        assert lab.meet(server, stranger, 5001) == "closed"
        assert lab.meet(server, client, 5001) == "served"
        until("checks with a header", lambda: accepted(lab, server) > 8)
        assert set(lab.bans(server)) == {stranger}
        assert not down(lab)


@pytest.mark.root
@pytest.mark.parametrize("line", ["check", "check-send-proxy send-proxy-v2 check port 5000"])
def test_checks_by_connecting_time_nobody_out(lab: Lab, line: str) -> None:
    options = PROXY if "proxy" in line else ()
    with lab.serve(*options) as server, balancer(lab, line=line):
        until("the balancer serves", lambda: lab.meet(server, NEIGHBOURS[0], 5001) == "served")
        for _ in range(50):  # what a plain check resets may never reach the server: these do
            lab.connect(NEIGHBOURS[1]).close()
        until("all have come", lambda: accepted(lab, server) >= 50)
        assert lab.meet(server, NEIGHBOURS[1]) == "served"
        assert not lab.bans(server)
        assert not down(lab)


@pytest.mark.root
def test_a_check_by_http_times_the_balancer_out_and_the_log_says_it(lab: Lab) -> None:
    with lab.serve() as server, balancer(lab, line="check", extra="option httpchk"):
        server.await_timed_out(HOST_ADDRESS)
        until("the check fails", lambda: down(lab))
        assert set(lab.bans(server)) == {HOST_ADDRESS}
        assert says(server.log, "OPTIONS / HTTP/1.0")


@pytest.mark.root
def test_a_check_by_http_of_a_proxy_fails_and_times_nobody_out(lab: Lab) -> None:
    with lab.serve(*PROXY) as server:
        with balancer(lab, line="send-proxy-v2 check", extra="option httpchk"):
            server.await_line("exempt, disconnected source=")
            until("the check fails", lambda: down(lab))
        with balancer(lab, line="check", extra="option httpchk"):
            server.await_line("no PROXY protocol v2 header")
            assert says(server.log, "no PROXY protocol v2 header")
        assert not lab.bans(server)


@pytest.mark.root
def test_a_header_that_nobody_expects_times_out_while_the_check_is_content(lab: Lab) -> None:
    with lab.serve() as server, balancer(lab):
        server.await_timed_out(HOST_ADDRESS)
        assert says(server.log, 'looks="PROXY protocol"')
        seen = accepted(lab, server)
        until("ten checks more", lambda: accepted(lab, server) > seen + 10)
        assert not down(lab)


@pytest.mark.root
def test_a_hidden_crowd_is_said_with_the_remedy(lab: Lab) -> None:
    with lab.serve() as server, balancer(lab, line=""):
        until("the balancer serves", lambda: lab.meet(server, NEIGHBOURS[0], 5001) == "served")
        for _ in range(20):
            lab.meet(server, NEIGHBOURS[0], 5001)
        with lab.connect(NEIGHBOURS[1], 5001) as stranger, suppress(ConnectionError):
            stranger.sendall(HTTP)
            ended(stranger)
        server.await_line("all clients and strangers arrive")
        assert says(server.log, "all clients and strangers arrive")


@pytest.mark.root
def test_with_the_kernels_map_the_host_is_reached_on_every_other_port(lab: Lab) -> None:
    lab.make_map()
    with lab.host.network():
        ssh = socket.create_server((HOST_ADDRESS, 22))
    with ssh, lab.serve("-B", MAP) as server:
        lab.misbehave(server, NEIGHBOURS[0])
        assert lab.meet(server, NEIGHBOURS[0]) == "silent"
        lab.connect(NEIGHBOURS[0], 22).close()
        lab.tt(server, "bans", "remove", NEIGHBOURS[0])
        assert lab.meet(server, NEIGHBOURS[0]) == "served"


# ---- another key, a backup ------------------------------------------------------------------------------------------


def client(place: Path, name: str) -> dict[str, str]:
    """The environment of a client with known servers of its own."""
    return {"XDG_CONFIG_HOME": str(place / name)}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Manager]:
    """Who keeps the port while one server goes and the next one comes."""
    with Manager(tmp_path, [socket.create_server((HOST, 0))]) as manager:
        yield manager


def test_a_key_is_changed_as_the_page_says_and_nobody_is_cut_off_before_the_old_one_goes(
    tmp_path: Path, kept: Manager
) -> None:
    def run(words: str, server: Process) -> None:
        """The block with these words; the restart in it is the test's."""
        block = block_of("sh", words).replace("/var/lib/tapetrack", str(tmp_path / "data"))
        shell("systemctl() { :; }\n" + block, server)

    def ping(who: str, source: str, server: Process, end: str = "") -> None:
        shell(f"tt ping -c 1 --source {source} 127.0.0.1:{server.port} {end}", server, **client(tmp_path, who))

    def knows(who: str, server: Process) -> None:
        key = (tmp_path / "data/server.pub").read_text().strip()
        shell(f"tt known add 127.0.0.1:{server.port} {key}", server, **client(tmp_path, who))

    with Process(tmp_path, **kept.start()) as server:
        for who in ("early", "late"):
            knows(who, server)
        run("mv /var/lib/tapetrack/server.key", server)
    with Process(tmp_path, **kept.start()) as server:
        assert says(server.log, "old key in force, too")
        for who in ("early", "late"):
            ping(who, "127.51.100.5", server)
        knows("early", server)
        ping("early", "127.51.100.5", server)
        assert "\nold key      handshakes 2\n" in shell("tt status", server)
        run("rm /var/lib/tapetrack/server.key.old", server)
    with Process(tmp_path, **kept.start()) as server:
        ping("early", "127.51.100.5", server)
        ping("late", "127.51.100.6", server, end="|| test $? = 3")
        server.await_timed_out("127.51.100.6")
        assert says(server.log, "reason=bad_hello")


def test_a_backup_that_the_page_makes_is_a_server_again(tmp_path: Path) -> None:
    need("bash")
    own = f"{os.getuid()}:{os.getgid()}"
    data, copy, again = tmp_path / "data", tmp_path / "backup", tmp_path / "again"
    words = {"/var/lib/tapetrack": str(data), "/root/backup": str(copy), "tapetrack:tapetrack": own}
    with Process(tmp_path, environ={"TT_SAVE_INTERVAL": "1s"}) as server:
        server.time_out("127.51.100.7")
        shell("tt bans add 127.51.100.8 --for 2h --reason 'by hand'; tt exempt add 127.0.2.0/24", server)
        key = (data / "server.pub").read_text()
        server.await_line("source=127.51.100.8 reason=operator")
        until("both are saved", lambda: saved_of(data / "timeouts") == 2)
        printed = shell(here(marked("run"), **words), server)
        assert "the chain holds" in printed
        assert "it would be: 2 timed out here for as long or longer" in printed
        written = {code(name) for row in table(TEXT, "file in the data directory", "what it is", "how to copy it")
                   for name in row[0].split(", ")}  # fmt: skip
        rest = {file.name for file in data.iterdir()} - {"tapetrack.db-wal", "tapetrack.db-shm"}
        assert written == rest
        copied = written - {"server.pub", "first-password", "control.sock"}
        assert {file.name for file in copy.iterdir()} == copied | {"bans.json"}
        shell(here(marked("restore"), **(words | {"/var/lib/tapetrack": str(again / "data")})), server)
    with Process(again) as server:
        assert (again / "data/server.pub").read_text() == key
        server.await_line("time-outs restored running=2")
        assert server.drops("127.51.100.7")
        assert "by hand" in shell("tt bans list 127.51.100.8", server)
        assert "127.0.2.0/24" in shell("tt exempt list", server)


# ---- beside others --------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The log, as text and as the journal shows it, of a server that has timed out 127.51.100.7 and .9.

    Besides there is an IPv6 source; and what tries to name 127.9.9.9, or is no reason to act.
    """
    aims = b" timed out source=127.9.9.9 reas"
    stranger, _ = keys.create_or_load(tmp_path)
    with Process(tmp_path, "--exempt", "127.0.2.0/24") as server:
        time_out(server, TLS, "127.51.100.7")
        time_out(server, aims, "127.51.100.9")
        send(server, "127.0.2.9", aims)
        shell("tt bans add 127.51.100.66 --reason 'warning timed out source=127.9.9.9 reason=not_protocol '", server)
        name = f"--key {keys.to_text(stranger.public)} 127.0.0.1:{server.port}"
        shell(f"tt ping -c 1 --source 127.51.100.70 {name} || test $? = 3", server)
        server.await_timed_out("127.51.100.70")
        server.await_line("exempt, disconnected")
    (line,) = re.findall(".* timed out source=127.51.100.7 .*\n", server.log)
    text = server.log + line.replace("127.51.100.7", "2001:db8:1:2::/64")
    file = tmp_path / "both"
    file.write_text(text + re.sub(rf"^{TIME}\w+ ", "Nov 23 01:14:56 host TapeTrackServer[12]: ", text, flags=re.M))
    return file


def test_the_line_that_others_read_is_what_the_server_says(log: Path) -> None:
    (line,) = (one for block in blocks("text") for one in block.splitlines() if one.startswith("2026-"))
    quoted = re.sub(f"^{TIME}", "", here(line))
    assert any(fits(quoted, re.sub(f"^{TIME}", "", one)) for one in log.read_text().splitlines())


def test_fail2ban_reads_who_was_timed_out_and_nobody_else(log: Path, tmp_path: Path) -> None:
    need("fail2ban-regex")
    (tmp_path / "tapetrack.conf").write_text(block_of("ini", "failregex"))
    done = subprocess.run(
        ["fail2ban-regex", "-o", "id", str(log), str(tmp_path / "tapetrack.conf")],
        env=plain_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert done.stdout.split() == ["127.51.100.7", "127.51.100.9", "2001:db8:1:2::/64"] * 2


def test_crowdsec_decides_on_who_was_timed_out_and_nobody_else(log: Path, tmp_path: Path) -> None:
    need("crowdsec", "cscli")
    folder = tmp_path / "crowdsec"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shutil.copytree("/etc/crowdsec/patterns", folder / "patterns")
    for file in (ROOT / "bench/peers/crowdsec").glob("*.yaml"):
        filled = file.read_text().format(dir=tmp_path, port2=port, log=log)
        (folder / file.name).write_text(filled)
    for stage, words in (("parsers/s01-parse", "onsuccess"), ("scenarios", "type: trigger")):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "tapetrack.yaml").write_text(block_of("yaml", words))
    (tmp_path / "hub").symlink_to("/usr/share/crowdsec/hub")
    whole = folder / "config.yaml"
    for command in (
        [
            "cscli",
            "-c",
            whole,
            "machines",
            "add",
            "test",
            "--password",
            "test",
            "--file",
            tmp_path / "credentials.yaml",
        ],
        ["crowdsec", "-c", whole, "-dsn", f"file://{log}", "-type", "tapetrack"],
    ):
        done = subprocess.run(
            list(map(str, command)), env=plain_environment(), capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done
    found = sqlite3.connect(tmp_path / "crowdsec.db")
    decided = {value for (value,) in found.execute("SELECT value FROM decisions WHERE scenario = 'local/tapetrack'")}
    found.close()
    assert decided == {"127.51.100.7", "127.51.100.9", "2001:db8:1:2::"}


@pytest.mark.root
def test_the_set_for_nftables_has_who_is_timed_out_now(tmp_path: Path) -> None:
    need("nft", "jq", "unshare", "nsenter", root=True)
    firewall = Namespace()
    try:
        with Process(tmp_path) as server:
            time_out(server, TLS, "127.51.100.7", "127.51.100.8")
            for _ in range(2):  # as a timer does
                shell(f'nft() {{ {" ".join(firewall.wrap)} $(which nft) "$@"; }}\n{marked("nft")}', server)
            shown = firewall.run("nft", "list", "set", "inet", "tapes", "timed_out")
        assert sorted(re.findall(r"([\d.]+) timeout (?:10|[5-9])m", shown)) == ["127.51.100.7", "127.51.100.8"]
    finally:
        firewall.close()
