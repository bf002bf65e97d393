"""`tt ping`: is the server there, and how fast does it answer?  Prints in the manner of ping(8).

Every sequence number ends in an answer or a loss; after a loss the next number connects anew.  What cannot get better
by trying again (an unknown server, a WELCOME that is not accepted) ends the run at once.
Must not know the server or its configuration.
"""

import argparse
import ipaddress
import itertools
import math
import re
import time
from dataclasses import dataclass

from tt import known_servers
from tt.cli import output
from tt.cli.known import server_address, server_key
from tt.client import Client, ConnectionLost, NoConnection, Pong, ProtocolError, TapeTrackError

MAX_COUNT = 10**9
MAX_SECONDS = 86400


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt ping`."""
    parser = commands.add_parser(
        "ping",
        help="Ping a server over the encrypted protocol, without a login.",
        description="Ping a server over the encrypted protocol, without a login. The server must be known "
        "('tt known add'), or its key be given.",
        epilog="Exit codes: 0 all pings were answered; 1 some were lost; 2 wrong usage, or the server is not known; "
        "3 no ping was answered; 4 the server's WELCOME was not accepted.",
    )
    add = parser.add_argument
    add(
        "host",
        metavar="HOST",
        type=server_address,
        help="The server's name or address; HOST:PORT and [ADDRESS6]:PORT are possible.",
    )
    add("-P", "--port", type=_port, help=f"The server's TCP port (default: {known_servers.DEFAULT_PORT}).")
    add("-c", "--count", type=_count, help="Stop after this many pings (default: go on until Ctrl-C).")
    add(
        "-i",
        "--interval",
        metavar="SECONDS",
        type=_seconds,
        default=1.0,
        help="Start a ping this many seconds after the one before; 0 sends each as soon as the one before is answered "
        "(default: %(default)g).",
    )
    add(
        "-W",
        "--timeout",
        metavar="SECONDS",
        type=_timeout,
        default=10.0,
        help="Wait so long for an answer, and so long for a connection (default: %(default)g).",
    )
    add("--source", metavar="ADDR", type=_source, help="Connect from this address (default: the system chooses).")
    add(
        "--key",
        type=server_key,
        help="The server's public key, as its file server.pub holds it (default: the known servers are asked).",
    )
    add("--json", action="store_true", help="Print one JSON object a ping and one for the statistics.")
    parser.set_defaults(run=run)


@dataclass(slots=True)
class _Statistics:
    """Sums only: a run may go on for months.  Times in milliseconds."""

    transmitted: int = 0
    received: int = 0
    least: float = math.inf
    total: float = 0.0
    most: float = 0.0

    def answer(self, ms: float) -> None:
        self.received += 1
        self.least = min(self.least, ms)
        self.total += ms
        self.most = max(self.most, ms)

    @property
    def average(self) -> float:
        return self.total / self.received

    @property
    def loss_percent(self) -> float:
        return 100 * (self.transmitted - self.received) / self.transmitted


def run(args: argparse.Namespace) -> int:
    """Ping until the count is reached or Ctrl-C, print the statistics and return the exit code."""
    host, port = _server(args)
    client = Client(host, port, key=args.key, source=args.source, timeout=args.timeout)
    report = _JsonReport(host, port) if args.json else _TextReport(host)
    statistics = _Statistics()
    try:
        _ping(client, args, report, statistics)
    except KeyboardInterrupt:  # the ping under way counts as lost, as with ping(8)
        pass
    except TapeTrackError:
        if statistics.received:
            report.summary(statistics)
        raise
    finally:
        client.close()
    report.summary(statistics)
    if not statistics.received:
        return output.NO_CONNECTION
    return output.OK if statistics.received == statistics.transmitted else output.FAILED


def _ping(
    client: Client, args: argparse.Namespace, report: "_TextReport | _JsonReport", statistics: _Statistics
) -> None:
    """Send the pings.  Raises what cannot get better by trying again."""
    due = time.monotonic()
    for seq in itertools.count(1) if args.count is None else range(1, args.count + 1):
        time.sleep(max(0.0, due - time.monotonic()))
        due = time.monotonic() + args.interval
        statistics.transmitted = seq
        try:
            if not client.connected:
                client.connect()
            pong = client.ping()
        except (NoConnection, ConnectionLost, ProtocolError) as error:
            report.loss(seq, str(error))
        else:
            statistics.answer(pong.seconds * 1000)
            report.answer(seq, client.address, pong)


class _TextReport:
    def __init__(self, host: str) -> None:
        self._host = host
        self._last_loss = ""

    def answer(self, seq: int, address: str, pong: Pong) -> None:
        output.line(f"{pong.size} bytes from {address}: seq={seq} time={pong.seconds * 1000:.2f} ms")
        self._last_loss = ""

    def loss(self, seq: int, error: str) -> None:
        # The whole sentence once: a run against a server that is down would otherwise repeat it every second.
        output.message(f"seq={seq} lost: {'as before' if error == self._last_loss else error}")
        self._last_loss = error

    def summary(self, statistics: _Statistics) -> None:
        sent, received = statistics.transmitted, statistics.received
        output.blank_line()
        output.line(f"--- {self._host} TMSS10Ping statistics ---")
        output.line(f"{sent} packets transmitted, {received} received, {statistics.loss_percent:.4g}% loss")
        if received:
            times = statistics.least, statistics.average, statistics.most
            output.line(f"round-trip min/avg/max = {'/'.join(f'{ms:.2f}' for ms in times)} ms")


class _JsonReport:
    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    def answer(self, seq: int, address: str, pong: Pong) -> None:
        output.json_line({"seq": seq, "address": address, "bytes": pong.size, "ms": round(pong.seconds * 1000, 3)})

    def loss(self, seq: int, error: str) -> None:
        output.json_line({"seq": seq, "error": error})

    def summary(self, statistics: _Statistics) -> None:
        answered = statistics.received > 0
        output.json_line(
            {
                "host": self._host,
                "port": self._port,
                "transmitted": statistics.transmitted,
                "received": statistics.received,
                "loss_percent": round(statistics.loss_percent, 4),
                "min_ms": round(statistics.least, 3) if answered else None,
                "avg_ms": round(statistics.average, 3) if answered else None,
                "max_ms": round(statistics.most, 3) if answered else None,
            }
        )


def _server(args: argparse.Namespace) -> tuple[str, int]:
    host, port = args.host
    if port is not None and args.port not in (None, port):
        raise output.Exit(output.USAGE, f"port {port} stands behind the host and -P says {args.port}: give one port")
    return host, port or args.port or known_servers.DEFAULT_PORT


def _port(text: str) -> int:
    try:
        return known_servers.parse_port(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or not 1 <= int(text) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"'{text}' is no count: give a whole number from 1 to {MAX_COUNT}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"'{text}' is no time: give seconds from 0 to {MAX_SECONDS}")
    return value


def _timeout(text: str) -> float:
    if not (value := _seconds(text)):
        raise argparse.ArgumentTypeError("a time-out of 0 leaves no time for an answer: give more than 0 seconds")
    return value


def _source(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no IP address: give an address of this machine") from error
