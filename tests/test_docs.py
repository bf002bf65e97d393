"""The documents against the code: tables, names, commands, links; and a client made from docs/protocol.md alone.

`Peer` is that client.  Its numbers are read from the document, its Noise is noiseprotocol's, it has nothing of `tt`; so
what it can do with the real server shows that the document is complete.
"""

import base64
import codecs
import hashlib
import os
import re
import struct
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from docs_kit import README, ROOT, between, code, table, understood
from harness import Running, ended, read_exactly
from noise.connection import Keypair, NoiseConnection
from noise.state import CipherState

from tt import config, connection, dispatch, keys, noise, spoke, wire
from tt._core import HARD_REASONS, PROTOCOL, REASONS, STATES

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text("utf-8")
WIRE = (ROOT / "docs/protocol.md").read_text("utf-8")
DOCUMENTS = {path: path.read_text("utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
SOURCES = {
    path: path.read_text("utf-8")
    for path in sorted(ROOT.glob("ext/*.[ph]*")) + sorted(ROOT.glob("tt/**/*.py"))
    if path.suffix in (".pyx", ".pxd", ".pxi", ".h", ".py")
}


# ---- reading a document -------------------------------------------------------------------------------------------


def numbers() -> dict[str, Any]:
    """Section 1: each name with its value, an int or a text."""
    rows = table(WIRE, "name", "value", "unit", "meaning")
    return {code(name): code(value) if value.startswith("`") else int(value) for name, value, _, _ in rows}


def examples() -> dict[str, str]:
    """Section 11: each title, up to its colon, with the text below it."""
    found = re.findall(r"^(\S.*)\n\n((?: {4}.*\n)+)", between(WIRE, "examples"), re.MULTILINE)
    return {title.partition(":")[0]: "".join(text.split()) for title, text in found}


N = numbers()
TIMES_OUT = {name for name, times_out, _ in REASONS if times_out}
EXAMPLES = examples()


def example(title: str) -> bytes:
    return bytes.fromhex(EXAMPLES[title])


# ---- a client made from docs/protocol.md --------------------------------------------------------------------------


def read_key(text: str) -> bytes:
    """Section 10."""
    body = text.strip().removeprefix(N["PREFIX"])
    assert len(body) == N["TEXT_LENGTH"]
    data = base64.urlsafe_b64decode(body)
    public, check = data[: N["KEY"]], data[N["KEY"] :]
    assert hashlib.sha256(public).digest()[: N["CHECK_SIZE"]] == check
    return public


def header(kind: str, length: int) -> bytes:
    """Section 2."""
    return bytes.fromhex(N["MAGIC"]) + struct.pack(">BBI", N["VERSION"], N[kind], length)


def noise_of(*, public: bytes = b"", private: bytes = b"", ephemeral: bytes = b"") -> NoiseConnection:
    """Section 3: the client's side with the server's public key, or the server's with its private one."""
    end = NoiseConnection.from_name(N["PROTOCOL_NAME"].encode())
    end.set_prologue(N["PROLOGUE"].encode())
    if public:
        end.set_as_initiator()
        end.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, public)
    else:
        end.set_as_responder()
        end.set_keypair_from_private_bytes(Keypair.STATIC, private)
    with warnings.catch_warnings(action="ignore"):  # that a fixed ephemeral key is for examples alone
        if ephemeral:
            end.set_keypair_from_private_bytes(Keypair.EPHEMERAL, ephemeral)
        end.start_handshake()
    return end


class Direction:
    """Section 4: one direction's key and counter."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._n = 0

    def seal(self, plaintext: bytes) -> bytes:
        self._step()
        head = header("DATA", len(plaintext) + N["TAG"])
        return head + bytes(self._state.encrypt_with_ad(head, plaintext))

    def open(self, frame: bytes) -> bytes:
        self._step()
        return bytes(self._state.decrypt_with_ad(frame[: N["HEADER"]], frame[N["HEADER"] :]))

    def _step(self) -> None:
        if self._n and self._n % N["REKEY_INTERVAL"] == 0:
            self._state.rekey()
        self._n += 1


def directions(end: NoiseConnection) -> tuple[Direction, Direction]:
    """What it sends under, and what it receives under."""
    return Direction(end.noise_protocol.cipher_state_encrypt), Direction(end.noise_protocol.cipher_state_decrypt)


class Peer:
    """A client on a new connection to a running server; after `welcome` it is in the state `open`."""

    def __init__(self, server: Running) -> None:
        self.socket = server.connect()
        self.public = read_key((server.settings.data / "server.pub").read_text())
        self.logged_in = False

    def welcome(self, payload: bytes = b"", ephemeral: bytes = b"") -> "Peer":
        """The handshake, with a payload and an ephemeral key of the examples, or with its own."""
        end = noise_of(public=self.public, ephemeral=ephemeral)
        own = msgspec.msgpack.encode({"name": "from the document", "version": "1", "unknown": 0})
        message = bytes(end.write_message(payload or own))
        self.hello = header("HELLO", len(message)) + message
        self.socket.sendall(self.hello)
        frame = self.read_frame("WELCOME", N["HELLO_LEAST"], N["HELLO_MOST"])
        welcome = msgspec.msgpack.decode(bytes(end.read_message(frame[N["HEADER"] :])))
        assert isinstance(welcome["name"], str)
        assert isinstance(welcome["version"], str)
        assert welcome.get("dictionary", 0) == 0
        self.sends, self.receives = directions(end)
        return self

    def read_frame(self, kind: str, least: int, most: int) -> bytes:
        head = read_exactly(self.socket, N["HEADER"])
        length = int.from_bytes(head[4:], "big")
        assert head == header(kind, length)
        assert least <= length <= most
        return head + read_exactly(self.socket, length)

    def send(self, plaintext: bytes) -> None:
        self.socket.sendall(self.sends.seal(plaintext))

    def receive(self) -> bytes:
        """The next plaintext, flags byte first."""
        return self.receives.open(self.read_frame("DATA", N["DATA_LEAST"], N["DATA_MOST"]))

    def send_message(self, body: bytes) -> None:
        """Section 5."""
        flags = 0
        if self.logged_in and len(body) >= N["MIN_COMPRESSED"]:
            body, flags = zstandard.ZstdCompressor().compress(body), N["COMPRESSED"]
        most = N["DATA_MOST"] if self.logged_in else N["DATA_MOST_GUEST"]
        room = most - N["DATA_LEAST"]
        while len(body) > room:
            self.send(bytes([flags | N["MORE"]]) + body[:room])
            body = body[room:]
        self.send(bytes([flags]) + body)

    def receive_message(self) -> bytes:
        body = b""
        while True:
            flags, part = (plaintext := self.receive())[0], plaintext[1:]
            assert self.logged_in or flags == 0
            assert flags & ~(N["COMPRESSED"] | N["MORE"]) == 0
            body += part
            assert len(body) <= N["MAX_TO_CLIENT"]
            if not flags & N["MORE"]:
                return zstandard.ZstdDecompressor().decompress(body) if flags & N["COMPRESSED"] else body

    def ask(self, *requests: list[Any]) -> dict[Any, tuple[Any, Any]]:
        """Section 6: error and result of each request, by its id."""
        self.send_message(msgspec.msgpack.encode(requests))
        replies = {}
        while len(replies) < len(requests):
            replies |= {reply[0]: (reply[1], reply[2]) for reply in msgspec.msgpack.decode(self.receive_message())}
        return replies

    def log_in(self) -> Any:
        error, result = self.ask([0, "login", {}])[0]
        assert error is None
        self.logged_in = True
        return result


def test_a_client_made_from_the_document_is_welcomed_and_pings(run_server: Callable[..., Running]) -> None:
    server = run_server()
    peer = Peer(server).welcome()
    for _ in range(3):
        peer.send(b"\0")
        assert peer.receive() == b"\0"
    peer.socket.close()
    server.await_closed("peer_closed")


def test_its_requests_are_answered_one_by_one(run_server: Callable[..., Running]) -> None:
    def echo(_: dispatch.Session, arguments: msgspec.Raw) -> object:
        return msgspec.msgpack.decode(arguments)

    peer = Peer(run_server({"echo": echo})).welcome()
    replies = peer.ask([7, "echo", {"a": [1]}], [8, "nothing", {}], [9, ""], [2**32 - 1, "echo", {}, "surplus"])
    assert replies[7] == (None, {"a": [1]})
    assert replies[8][0][0] == "unknown_operation"
    assert replies[9][0][0] == "malformed"
    assert replies[2**32 - 1] == (None, {})
    assert peer.ask([2**32, "echo"])[None][0][0] == "malformed"
    documented = [code(name) for name, _ in table(WIRE, "code", "when")]
    assert documented == ["malformed", "unknown_operation"]


def test_after_login_its_long_messages_are_compressed_split_and_understood(run_server: Callable[..., Running]) -> None:
    def echo(_: dispatch.Session, arguments: msgspec.Raw) -> object:
        return msgspec.msgpack.decode(arguments)

    peer = Peer(run_server({"login": lambda session, _: session.log_in(), "echo": echo})).welcome()
    peer.log_in()
    noisy = os.urandom(300_000)  # does not become shorter, so it takes several frames each way
    assert peer.ask([1, "echo", {"noisy": noisy}])[1] == (None, {"noisy": noisy})
    even = "a" * 1_000_000
    assert peer.ask([2, "echo", {"even": even}])[2] == (None, {"even": even})


def test_the_reply_to_login_is_under_the_rules_before_login(run_server: Callable[..., Running]) -> None:
    def login(session: dispatch.Session, _: object) -> object:
        session.log_in()
        return {"notice": "a" * 500}

    assert Peer(run_server({"login": login})).welcome().log_in() == {"notice": "a" * 500}


def test_the_example_of_a_hello_is_welcomed_by_a_server_with_its_key(
    run_server: Callable[..., Running], tmp_path: Path
) -> None:
    pair = X25519PrivateKey.from_private_bytes(example("server private key"))
    file = tmp_path / "data" / "server.key"
    file.parent.mkdir()
    file.touch(0o600)
    file.write_bytes(pair.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    peer = Peer(run_server(data=file.parent))
    peer.welcome(example("payload of HELLO"), example("client ephemeral private key"))
    assert peer.hello == example("HELLO")
    peer.send(b"\0")
    assert peer.receive() == b"\0"


def test_another_version_is_answered_with_the_refuse_of_the_document(run_server: Callable[..., Running]) -> None:
    server = run_server()
    peer = server.connect()
    peer.sendall(bytes.fromhex(N["MAGIC"]) + b"\x02")
    assert ended(peer) == example("REFUSE of a server that speaks version 1")
    assert not server.is_dropped()


def second_hello(peer: Peer) -> None:
    peer.socket.sendall(example("HELLO"))


def too_short(peer: Peer) -> None:
    peer.socket.sendall(header("DATA", N["DATA_LEAST"] - 1))


def too_long(peer: Peer) -> None:
    peer.socket.sendall(header("DATA", N["DATA_MOST_GUEST"] + 1))


def longest(peer: Peer) -> None:
    peer.socket.sendall(header("DATA", N["DATA_MOST_GUEST"]) + bytes(N["DATA_MOST_GUEST"]))


def too_many_requests(peer: Peer) -> None:
    requests = [[number, "nothing", {}] for number in range(N["MAX_REQUESTS_BEFORE_LOGIN"] + 1)]
    peer.send_message(msgspec.msgpack.encode(requests))
    assert len(msgspec.msgpack.decode(peer.receive_message())) == N["MAX_REQUESTS_BEFORE_LOGIN"]


def flags_before_login(peer: Peer) -> None:
    peer.send(example("plaintext of a compressed message"))


def no_array(peer: Peer) -> None:
    peer.send(b"\0" + msgspec.msgpack.encode({}))


def ping_between_parts(peer: Peer) -> None:
    peer.log_in()
    peer.send(bytes([N["MORE"]]) + b"\x91")
    peer.send(b"\0")


def unknown_flag(peer: Peer) -> None:
    peer.log_in()
    peer.send(b"\x04" + example("body of a request"))


def body_too_long(peer: Peer) -> None:
    peer.log_in()
    peer.send_message(msgspec.msgpack.encode([[1, "nothing", {"a": bytes(N["MAX_TO_SERVER"])}]]))


@pytest.mark.parametrize(
    ("abuse", "reason"),
    [
        (second_hello, "not_protocol"), (too_short, "not_protocol"), (too_long, "too_long"), (longest, "tampered"),
        (too_many_requests, "too_long"), (flags_before_login, "tampered"), (no_array, "tampered"),
        (ping_between_parts, "tampered"), (unknown_flag, "tampered"), (body_too_long, "tampered"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_what_the_document_forbids_ends_for_the_reason_that_it_names(
    run_server: Callable[..., Running], abuse: Callable[[Peer], None], reason: str
) -> None:
    server = run_server({"login": lambda session, _: session.log_in()})
    peer = Peer(server).welcome()
    abuse(peer)
    server.await_closed(reason)
    assert server.is_dropped() == (reason in TIMES_OUT)


# ---- docs/protocol.md: its examples and tables --------------------------------------------------------------------


def test_the_examples_of_keys_hold() -> None:
    private = X25519PrivateKey.from_private_bytes(example("server private key"))
    public = private.public_key().public_bytes_raw()
    assert public == example("server public key")
    assert read_key(EXAMPLES["its text form"]) == public
    assert keys.to_text(public) == EXAMPLES["its text form"]


def test_the_examples_of_a_connection_follow_from_its_keys() -> None:
    one = noise_of(public=example("server public key"), ephemeral=example("client ephemeral private key"))
    two = noise_of(private=example("server private key"), ephemeral=example("server ephemeral private key"))
    for sender, receiver, kind in ((one, two, "HELLO"), (two, one, "WELCOME")):
        payload = example(f"payload of {kind}")
        message = bytes(sender.write_message(payload))
        assert header(kind, len(message)) + message == example(kind)
        assert bytes(receiver.read_message(message)) == payload
    (to_server, from_server), (to_client, _) = directions(one), directions(two)
    assert to_server.seal(b"\0") == example("ping")
    assert to_client.seal(b"\0") == example("answer to the ping")
    assert to_server.seal(b"\0" + example("body of a request")) == example("request")
    assert to_client.seal(b"\0" + example("body of its reply")) == example("reply")
    assert [from_server.open(example(name))[:1] for name in ("answer to the ping", "reply")] == [b"\0", b"\0"]


def test_the_examples_are_what_the_code_makes_and_takes() -> None:
    assert wire.decode_hello(example("payload of HELLO")) == wire.Hello("example", "1")
    assert wire.encode_welcome(wire.Welcome("example", "1")) == example("payload of WELCOME")
    assert wire.encode_requests([wire.Request(1, "example")]) == example("body of a request")
    error = wire.ReplyError("unknown_operation", "this server has no such operation")
    assert wire.encode_replies([wire.Reply(1, error)]) == example("body of its reply")
    assembler = wire.Assembler(N["MAX_TO_SERVER"])
    assembler.flags_allowed = True
    body = assembler.feed(example("plaintext of a compressed message"))
    assert msgspec.msgpack.decode(body) == [[2, "example", {"text": "a" * 128}]]


def test_the_example_of_a_rekey_holds() -> None:
    state = CipherState(noise_of(private=example("server private key")).noise_protocol)
    state.initialize_key(example("key before a rekey"))
    state.rekey()
    assert state.k == example("key after it")


def test_every_number_of_the_document_is_that_of_the_code() -> None:
    for name, documented in N.items():
        found = [PROTOCOL[name]] if name in PROTOCOL else []
        found += [
            getattr(module, name) for module in (wire, noise, dispatch, keys, connection) if hasattr(module, name)
        ]
        assert found, f"{name} is in no module"
        written = {value.hex() if name == "MAGIC" else value.decode() for value in found if isinstance(value, bytes)}
        assert (written or set(found)) == {documented}, name


def test_every_number_of_the_wire_is_in_the_document() -> None:
    other_names = {"MAX_DATA": "DATA_MOST", "MAX_BEFORE_LOGIN": "DATA_MOST_GUEST"}
    assert {name: getattr(wire, name) for name in other_names} == {a: N[b] for a, b in other_names.items()}
    of_wire = {name for name in vars(wire) if re.fullmatch("[A-Z][A-Z_]+", name)} - {"COMPRESSION_LEVEL"}
    assert (of_wire - other_names.keys() | PROTOCOL.keys()) - N.keys() == set()
    assert N["HELLO_LEAST"] == N["KEY"] + N["TAG"]
    assert N["HELLO_MOST"] == N["HELLO_LEAST"] + N["MAX_PAYLOAD"]


def test_the_payloads_have_the_limits_of_the_document() -> None:
    decoders = {"HELLO": wire.decode_hello, "WELCOME": wire.decode_welcome}
    for message, key, kind, most, default in table(WIRE, "message", "key", "type", "most", "default"):
        payload: dict[str, Any] = {"name": "n", "version": "v"}
        size = int(most.split()[0]) if most else 0
        if kind.startswith("text"):
            good, bad = "x" * size, "x" * (size + 1)
        elif kind.startswith("array"):
            good, bad = [2**32 - 1] * size, [0] * (size + 1)
        else:
            good, bad = 2**32 - 1, 2**32
        decode = decoders[message]
        assert getattr(decode(msgspec.msgpack.encode(payload | {code(key): good})), code(key)) == good
        with pytest.raises(wire.Tampered):
            decode(msgspec.msgpack.encode(payload | {code(key): bad}))
        del payload["name"]
        if default:
            assert default in ("empty", "0")
        elif key == "`name`":
            with pytest.raises(wire.Tampered):
                decode(msgspec.msgpack.encode(payload))


def reasons_table() -> list[list[str]]:
    return [[f"`{name}`", "yes" if times_out else "no", meaning] for name, times_out, meaning in REASONS]


def states_table() -> list[list[str]]:
    return [[f"`{name}`", meaning] for name, meaning in STATES]


def lines(rows: list[list[str]]) -> str:
    """A table as the document must have it, for the one who has to put it there."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_table_of_reasons_is_that_of_the_code() -> None:
    assert table(WIRE, "reason", "times out", "when") == reasons_table(), lines(reasons_table())


def test_the_table_of_states_is_that_of_the_code() -> None:
    assert table(ARCHITECTURE, "state", "meaning") == states_table(), lines(states_table())


def test_the_document_says_how_long_each_verdict_lasts() -> None:
    expected = []
    for name, _, _ in REASONS:
        option = f"timeout_{name}" if f"timeout_{name}" in config.OPTIONS else "timeout"
        if name in TIMES_OUT and (option != "timeout" or name in HARD_REASONS):
            default = config.show(option, config.default(option))
            expected.append([f"`{name}`", f"`{option}`", default, "yes" if name in HARD_REASONS else "no"])
    assert table(WIRE, "reason", "option", "default", "a repeat doubles") == expected, lines(expected)


def test_the_documented_limits_have_the_defaults_of_the_code() -> None:
    rows = table(WIRE, "option", "default", "what it bounds")
    documented = {code(name): default for name, default, _ in rows}
    assert documented == {name: config.show(name, config.default(name)) for name in documented}


# ---- docs/architecture.md -----------------------------------------------------------------------------------------


def functions_with_gil(text: str) -> list[str]:
    """The functions of the loop that take the GIL, in their order."""
    found: dict[str, None] = {}
    function = ""
    for line in text.splitlines():
        if match := re.match(r"cdef\b[^(=]*?\b(\w+)\(", line):
            function = match[1]
        if "with gil" in line and not line.lstrip().startswith("#"):
            found[function] = None
    return list(found)


def test_the_document_names_every_function_that_takes_the_gil() -> None:
    documented = [code(name).removesuffix("()") for name, _ in table(ARCHITECTURE, "function", "when")]
    assert documented == functions_with_gil(SOURCES[ROOT / "ext/_core.pyx"])


def test_the_documents_name_nothing_that_is_not_in_the_code() -> None:
    everything = "\n".join(SOURCES.values())
    defined = set(re.findall(r"^\s*(?:async )?(?:def|cdef|cpdef)\b[^(=]*?\b(\w+)\(", everything, re.MULTILINE))
    words = set(re.findall(r"\w+", everything)) | {name for name, *_ in (*REASONS, *STATES)}
    for path in ROOT.glob("docs/*.md"):
        functions = set(re.findall(r"`(?:\w+\.)?(\w+)\(\)`", DOCUMENTS[path]))
        assert functions - defined == set(), path.name
        names = {name for name in re.findall(r"`(\w+)`", DOCUMENTS[path]) if "_" in name} - {"PROTOCOL_NAME"}
        assert names - words - set(PROTOCOL) - {N["PROTOCOL_NAME"]} == set(), path.name


# ---- README and links ---------------------------------------------------------------------------------------------


def tracked(*folders: str) -> set[str]:
    done = subprocess.run(["git", "ls-files", "--", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"git does not know what is tracked here: {done.stderr.strip()}")
    return set(done.stdout.split())


def test_the_file_map_names_every_test_document_and_kernel_program() -> None:
    # That it names every file of the rest, and none that is not there, is checked in test_build.py.
    assert tracked("bench", "bpf", "docs", "tests") - set(re.findall(r"`([\w./-]+)`", README)) == set()


def test_every_command_in_readme_is_understood() -> None:
    assert {"make", "tt", "TapeTrackServer"} <= understood()


def test_the_lines_of_the_log_in_readme_are_what_the_server_says() -> None:
    found = re.findall(r' timed out source=\S+ reason=(\w+) .*looks="([^"]*)" first="([^"]*)"', README)
    assert found
    for reason, looks, first in found:
        assert reason in TIMES_OUT
        assert spoke.identify(codecs.decode(first, "unicode_escape").encode("latin-1")) == looks


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_internal_link_resolves() -> None:
    count = 0
    for path, text in DOCUMENTS.items():
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
            if "://" in target:
                continue
            file = path.parent / target if target else path
            assert file.is_file(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(file.read_text("utf-8")), f"{path.name}: {target}#{anchor}"
            count += 1
    assert count
