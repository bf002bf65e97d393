"""Real scanners and clients of other protocols against the real server, while an honest client goes on pinging."""

import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness import HOST, until
from process import TT, Process, need, netns, plain_environment

PATIENCE = 180  # s: longer than any of them takes, an nmap that gives up on silence included

SOAP = (
    '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>'
    '<u:AddPortMapping xmlns:u="urn:schemas-upnp-org:service:WANIPConnection:1"/></s:Body></s:Envelope>'
)
ACTION = 'SOAPAction: "urn:schemas-upnp-org:service:WANIPConnection:1#AddPortMapping"'
CURL = "curl --silent --insecure --max-time 20 --interface"
SSH = "ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=20"
# The source -> its command, and what the log is to call what it sends.
CLIENTS: dict[str, tuple[list[str], str]] = {
    "127.0.0.21": ([*CURL.split(), "127.0.0.21", "http://{host}:{port}/"], "HTTP request"),
    "127.0.0.22": ([*CURL.split(), "127.0.0.22", "https://{host}:{port}/"], "TLS ClientHello"),
    "127.0.0.23": (
        [*CURL.split(), "127.0.0.23", "--header", ACTION, "--data", SOAP, "http://{host}:{port}/ctl/IPConn"],
        "UPnP SOAP",
    ),
    "127.0.0.24": (["openssl", "s_client", "-bind", "127.0.0.24:0", "-connect", "{host}:{port}"], "TLS ClientHello"),
    "127.0.0.25": ([*SSH.split(), "-b", "127.0.0.25", "-p", "{port}", "nobody@{host}", "true"], "SSH"),
}


@contextmanager
def honest_client(server: Process, *, enter: Sequence[str] = ()) -> Iterator[None]:
    """Pings all the time from 127.0.0.1; none may be lost."""
    command = [*enter, TT, "ping", "-i", "0.01", "--source", HOST, f"{HOST}:{server.port}"]
    output = server.place / "pings"
    with output.open("wb") as file, subprocess.Popen(command, env=server.environ, stdout=file, stderr=file) as client:
        try:
            until("the first pings", lambda: "seq=3 " in output.read_text())
            yield
        finally:
            client.send_signal(signal.SIGINT)
            client.wait(PATIENCE)
    text = output.read_text()
    assert "lost" not in text, text
    match = re.search(r"^(\d+) packets transmitted, (\d+) received", text, re.M)
    assert match, text
    assert int(match[1]) - int(match[2]) <= 1, "more than the one that was under way at the end"


def names_it_at_its_first_packet(server: Process, source: str, looks: str) -> None:
    line = server.await_timed_out(source)
    quoted = f'"{looks}"' if " " in looks else looks
    assert f" reason=not_protocol seconds=600 before=0 looks={quoted} first=" in line
    assert server.log.count(f" timed out source={source} ") == 1


def test_clients_of_other_protocols_are_timed_out_under_their_names(tmp_path: Path) -> None:
    need("curl", "openssl", "ssh")
    with Process(tmp_path) as server, honest_client(server):
        running = [
            subprocess.Popen(
                [word.format(host=HOST, port=server.port) for word in command],
                env=plain_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for command, _ in CLIENTS.values()
        ]  # fmt: skip
        for program in running:
            with program:
                assert program.wait(PATIENCE) != 0, f"{program.args} takes it for its own protocol"
        for source, (_, looks) in CLIENTS.items():
            names_it_at_its_first_packet(server, source, looks)
            assert server.drops(source)


def test_nmap_learns_nothing_and_is_timed_out_at_the_first_thing_it_says(tmp_path: Path) -> None:
    need("nmap", "unshare", "nsenter", "ip", root=True)
    # The scanner is another host: a namespace that waits until a cable to it is laid, and ends with the scan.
    script = """
        echo ready; read _
        ip address add 192.0.2.2/30 dev scan1; ip link set scan1 up
        exec nmap -n -sV --version-all -p 5000 192.0.2.1"""
    with Process(tmp_path, listen="0.0.0.0:5000", wrap=netns()) as server:
        scanner = subprocess.Popen(
            ["unshare", "--net", "sh", "-ec", script],
            env=plain_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        with scanner:
            assert scanner.stdout is not None
            assert scanner.stdout.readline() == "ready\n"
            cable = "ip link add scan0 type veth peer name scan1 netns"
            server.inside(*cable.split(), str(scanner.pid))
            server.inside("ip", "address", "add", "192.0.2.1/30", "dev", "scan0")
            server.inside("ip", "link", "set", "scan0", "up")
            with honest_client(server, enter=("nsenter", f"--net=/proc/{server.pid}/ns/net")):
                found, _ = scanner.communicate("\n", PATIENCE)
        # A port is open, and that is all: nmap has no version to show, and puts a "?" behind what the number suggests.
        assert re.search(r"^5000/tcp open +\S+\?\s*$", found, re.M), found
        names_it_at_its_first_packet(server, "192.0.2.2", "blank lines")
