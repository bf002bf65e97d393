"""tt.noise against vectors of noiseprotocol 0.3.1, against that implementation itself, and against abuse."""

import hashlib
import hmac
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from noise.connection import Keypair, NoiseConnection

from tt import noise
from tt.noise import NoiseError

NAME = b"Noise_NK_25519_AESGCM_SHA256"
PROLOGUE = b"tapetrack/1"
AD = bytes.fromhex("5454010300000016")  # the header of a DATA frame of 22 bytes
PLAINTEXT = b"\0tape!"
BOUNDARY = 2**20

# Made with noiseprotocol 0.3.1: SHA-256 of three phrases as private keys, the payloads below, AD and PLAINTEXT above;
# the keys of both directions renewed with its rekey() before nonces 2^20 and 2^21 are used.
SERVER_PRIVATE = "47d894bb8c178b92dcfd7686a5eb3df62d5075537503334082c4f35945915ee7"
SERVER_PUBLIC = "4f99611047f927779e41bb0bfcbcd30186ae742319061cd3b18773c25b03897b"
CLIENT_EPHEMERAL = "5d754b1525f7888cc442addc92a848f59c0bfc7ad472f69b64971bedf0f8a1d0"
SERVER_EPHEMERAL = "7df9cc3b806c5da0ac3ac164fa86980a65dc8c2ad9f34956aec34f90b161f2b8"
CLIENT_PAYLOAD = b"a payload of the client"
SERVER_PAYLOAD = b"a payload of the server"
HELLO = (
    "4095096d694d77183fb75629bc9d141a845296ed4d44506a8d9bfe7a24170908"
    "5871c7759c625adae187db9dbabbf5425cc32f12dd368b88b9bdab847117f2d42598fd0a012372"
)
WELCOME = (
    "dfe945eacf0a936033e910a8d14d710ecf0e770ebc83dbb8da5f59794eb2011d"
    "472b807c8471038b3c65061d89ca4b25527e9afd215f6b3db5615331ce08a556a2d5f6823b4368"
)
TO_SERVER = {
    0: "9297a98b80cc2dcbc51c052e690996583ab3044c41d5",
    1: "0dd970cbb5baf8c157d43bb8f2ea2d000b4c5837c25a",
    BOUNDARY - 1: "e745a21da8d5cc3c2dbf1b6474e30427e4ec21647475",
    BOUNDARY: "5e0cc4e5a43647d2e8e54b41210d0d6e1ed074da03f8",
    BOUNDARY + 1: "d0343ddc6dd3febd61c699bbbbdbeff8c97fa3d12945",
    2 * BOUNDARY: "9a4405c3791a98b0659400de8c56e9278da497a34d0a",
}
TO_CLIENT = {
    0: "830b1472fd94be402a336d1b97a465b6c27d70f6f794",
    1: "1a9bc11691c429a757d1005b5f92a92448ac3feb5b53",
    BOUNDARY - 1: "8bad7d59344ec8b368c26bff1a9af9010d11e077ffd4",
    BOUNDARY: "1651496a48d6f96f48b997a5b239b04af5e8fb8b738f",
    BOUNDARY + 1: "f1564fc7bdc621c82ce7a9fae41eb0222b282ef8b614",
    2 * BOUNDARY: "4bb7e1291d697d30e82e0e0c547416078c5944e24b80",
}

# The points whose order divides 8 (https://cr.yp.to/ecdh.html#validate), each as it is and with the ignored top bit.
P = 2**255 - 19
ORDER_8 = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
LOW_ORDER = [
    (point | top << 255).to_bytes(32, "little") for point in (0, 1, *ORDER_8, P - 1, P, P + 1) for top in (0, 1)
]


def static_key(private: X25519PrivateKey) -> SimpleNamespace:
    return SimpleNamespace(private=private, public=private.public_key().public_bytes_raw())


@pytest.fixture(scope="module")
def server() -> SimpleNamespace:
    return static_key(X25519PrivateKey.generate())


def connected(server: SimpleNamespace) -> tuple[noise.Transport, noise.Transport]:
    """Return the transports of a client and of a server that have shaken hands."""
    hello, pending_client = noise.create_hello(server.public, CLIENT_PAYLOAD)
    _, pending_server = noise.consume_hello(server, hello)
    welcome, to_client = noise.create_welcome(pending_server, SERVER_PAYLOAD)
    _, to_server = noise.consume_welcome(pending_client, welcome)
    return to_server, to_client


def reference(*, server_public: bytes | None = None, server: SimpleNamespace | None = None) -> NoiseConnection:
    """Return noiseprotocol's end of a connection: a client of `server_public`, or the server."""
    end = NoiseConnection.from_name(NAME)
    end.set_prologue(PROLOGUE)
    if server is None:
        end.set_as_initiator()
        end.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, server_public)
    else:
        end.set_as_responder()
        end.set_keypair_from_private_bytes(Keypair.STATIC, server.private.private_bytes_raw())
    end.start_handshake()
    return end


def use_ephemeral(monkeypatch: pytest.MonkeyPatch, private: str) -> None:
    key = X25519PrivateKey.from_private_bytes(bytes.fromhex(private))
    monkeypatch.setattr(noise, "X25519PrivateKey", SimpleNamespace(generate=lambda: key))


def sender_at(transport: noise.Transport, n: int) -> None:
    transport._seal_n = n


def receiver_at(transport: noise.Transport, n: int) -> None:
    transport._open_n = n


def flipped(message: bytes, bit: int) -> bytes:
    changed = bytearray(message)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# ---- agreement with others ----


def test_handshake_and_transport_equal_the_vectors(monkeypatch):
    server = static_key(X25519PrivateKey.from_private_bytes(bytes.fromhex(SERVER_PRIVATE)))
    assert server.public.hex() == SERVER_PUBLIC
    use_ephemeral(monkeypatch, CLIENT_EPHEMERAL)
    hello, pending_client = noise.create_hello(server.public, CLIENT_PAYLOAD)
    assert hello.hex() == HELLO
    payload, pending_server = noise.consume_hello(server, hello)
    assert payload == CLIENT_PAYLOAD
    use_ephemeral(monkeypatch, SERVER_EPHEMERAL)
    welcome, server_end = noise.create_welcome(pending_server, SERVER_PAYLOAD)
    assert welcome.hex() == WELCOME
    payload, client_end = noise.consume_welcome(pending_client, welcome)
    assert payload == SERVER_PAYLOAD
    for sender, receiver, vectors in ((client_end, server_end, TO_SERVER), (server_end, client_end, TO_CLIENT)):
        for n, ciphertext in vectors.items():
            sender_at(sender, n)
            receiver_at(receiver, n)
            assert sender.seal(AD, PLAINTEXT).hex() == ciphertext
            assert receiver.open(AD, bytes.fromhex(ciphertext)) == PLAINTEXT


def exchange_ten(end: noise.Transport, other: NoiseConnection) -> None:
    encrypt = other.noise_protocol.cipher_state_encrypt.encrypt_with_ad
    decrypt = other.noise_protocol.cipher_state_decrypt.decrypt_with_ad
    for n in range(10):
        assert decrypt(AD, end.seal(AD, PLAINTEXT * n)) == PLAINTEXT * n
        assert end.open(AD, encrypt(AD, PLAINTEXT * n)) == PLAINTEXT * n


def test_our_client_talks_to_an_independent_server(server):
    other = reference(server=server)
    hello, pending = noise.create_hello(server.public, CLIENT_PAYLOAD)
    assert len(hello) == 32 + 16 + len(CLIENT_PAYLOAD)
    assert other.read_message(hello) == CLIENT_PAYLOAD
    payload, transport = noise.consume_welcome(pending, bytes(other.write_message(SERVER_PAYLOAD)))
    assert payload == SERVER_PAYLOAD
    exchange_ten(transport, other)


def test_our_server_talks_to_an_independent_client(server):
    other = reference(server_public=server.public)
    payload, pending = noise.consume_hello(server, bytes(other.write_message(CLIENT_PAYLOAD)))
    assert payload == CLIENT_PAYLOAD
    welcome, transport = noise.create_welcome(pending, SERVER_PAYLOAD)
    assert len(welcome) == 32 + 16 + len(SERVER_PAYLOAD)
    assert other.read_message(welcome) == SERVER_PAYLOAD
    exchange_ten(transport, other)


@pytest.mark.parametrize("payload", [b"", bytes(192)])
def test_the_shortest_and_the_longest_payload(server, payload):
    hello, pending_client = noise.create_hello(server.public, payload)
    received, pending_server = noise.consume_hello(server, hello)
    assert received == payload
    welcome, _ = noise.create_welcome(pending_server, payload)
    received, _ = noise.consume_welcome(pending_client, welcome)
    assert received == payload


# ---- rekey ----


@pytest.mark.parametrize("boundary", [BOUNDARY, 7 * BOUNDARY])
def test_both_directions_cross_the_rekey_boundary_as_noise_defines(server, boundary):
    other = reference(server=server)
    hello, pending = noise.create_hello(server.public, b"")
    other.read_message(hello)
    _, transport = noise.consume_welcome(pending, bytes(other.write_message(b"")))
    to_server = other.noise_protocol.cipher_state_decrypt.k
    to_client = other.noise_protocol.cipher_state_encrypt.k
    sender_at(transport, boundary - 1)
    receiver_at(transport, boundary - 1)
    for n in range(boundary - 1, boundary + 2):
        if n == boundary:
            maximum = b"\0\0\0\0" + b"\xff" * 8
            to_server = AESGCM(to_server).encrypt(maximum, b"\0" * 32, b"")[:32]
            to_client = AESGCM(to_client).encrypt(maximum, b"\0" * 32, b"")[:32]
        nonce = b"\0\0\0\0" + n.to_bytes(8, "big")
        assert transport.seal(AD, PLAINTEXT) == AESGCM(to_server).encrypt(nonce, PLAINTEXT, AD)
        assert transport.open(AD, AESGCM(to_client).encrypt(nonce, PLAINTEXT, AD)) == PLAINTEXT


def test_the_first_message_is_under_the_key_of_the_handshake(server):
    client_end, server_end = connected(server)
    first = client_end._sealer
    client_end.seal(AD, PLAINTEXT)
    assert client_end._sealer is first
    server_end.seal(AD, PLAINTEXT)


def test_forged_messages_at_the_rekey_boundary_do_not_move_the_key(server):
    client_end, server_end = connected(server)
    sender_at(client_end, BOUNDARY)
    receiver_at(server_end, BOUNDARY)
    good = client_end.seal(AD, PLAINTEXT)
    for bit in range(8 * len(good)):
        with pytest.raises(NoiseError):
            server_end.open(AD, flipped(good, bit))
    assert server_end.open(AD, good) == PLAINTEXT


# ---- bad handshake messages ----


def test_hello_truncated_at_every_length_or_extended(server):
    hello, _ = noise.create_hello(server.public, CLIENT_PAYLOAD)
    for message in [*(hello[:length] for length in range(len(hello))), hello + b"\0"]:
        with pytest.raises(NoiseError):
            noise.consume_hello(server, message)
    assert noise.consume_hello(server, hello)[0] == CLIENT_PAYLOAD


def test_hello_with_any_bit_flipped(server):
    hello, _ = noise.create_hello(server.public, CLIENT_PAYLOAD)
    for bit in range(8 * len(hello)):
        with pytest.raises(NoiseError):
            noise.consume_hello(server, flipped(hello, bit))
    assert noise.consume_hello(server, hello)[0] == CLIENT_PAYLOAD


def test_welcome_truncated_flipped_or_extended_leaves_the_client_able_to_take_the_good_one(server):
    hello, pending_client = noise.create_hello(server.public, CLIENT_PAYLOAD)
    _, pending_server = noise.consume_hello(server, hello)
    welcome, to_client = noise.create_welcome(pending_server, SERVER_PAYLOAD)
    bad = [welcome[:length] for length in range(len(welcome))]
    bad += [flipped(welcome, bit) for bit in range(8 * len(welcome))]
    for message in [*bad, welcome + b"\0", hello]:
        with pytest.raises(NoiseError):
            noise.consume_welcome(pending_client, message)
    payload, to_server = noise.consume_welcome(pending_client, welcome)
    assert payload == SERVER_PAYLOAD
    assert to_server.open(AD, to_client.seal(AD, PLAINTEXT)) == PLAINTEXT


def known_to_all(ck: bytes, h: bytes, point: bytes, payload: bytes) -> bytes:
    """Make the message that authenticates for whoever takes a shared secret of zeros."""
    secret = hmac.digest(ck, bytes(32), "sha256")
    first = hmac.digest(secret, b"\1", "sha256")
    key = hmac.digest(secret, first + b"\2", "sha256")
    h = hashlib.sha256(h + point).digest()
    return point + AESGCM(key).encrypt(bytes(12), payload, h)


@pytest.mark.parametrize("point", LOW_ORDER, ids=bytes.hex)
def test_low_order_ephemeral_key_of_a_client(server, point):
    name = NAME + bytes(4)
    h = hashlib.sha256(hashlib.sha256(name + PROLOGUE).digest() + server.public).digest()
    with pytest.raises(NoiseError):
        noise.consume_hello(server, known_to_all(name, h, point, CLIENT_PAYLOAD))


@pytest.mark.parametrize("point", LOW_ORDER, ids=bytes.hex)
def test_low_order_ephemeral_key_of_a_server(server, point):
    hello, pending_client = noise.create_hello(server.public, CLIENT_PAYLOAD)
    _, pending_server = noise.consume_hello(server, hello)
    forged = known_to_all(pending_server.ck, pending_server.h, point, SERVER_PAYLOAD)
    with pytest.raises(NoiseError):
        noise.consume_welcome(pending_client, forged)
    welcome, _ = noise.create_welcome(pending_server, SERVER_PAYLOAD)
    assert noise.consume_welcome(pending_client, welcome)[0] == SERVER_PAYLOAD


@pytest.mark.parametrize("public", [*LOW_ORDER, b"", bytes(31), bytes(33)], ids=bytes.hex)
def test_server_key_that_can_be_no_server_key(public):
    with pytest.raises(NoiseError):
        noise.create_hello(public, b"")


def test_hello_for_another_server(server):
    other = static_key(X25519PrivateKey.generate())
    hello, pending = noise.create_hello(other.public, CLIENT_PAYLOAD)
    with pytest.raises(NoiseError):
        noise.consume_hello(server, hello)
    _, pending_server = noise.consume_hello(other, hello)
    welcome, _ = noise.create_welcome(pending_server, SERVER_PAYLOAD)
    assert noise.consume_welcome(pending, welcome)[0] == SERVER_PAYLOAD


def test_hello_of_another_protocol_version(server):
    other = NoiseConnection.from_name(NAME)
    other.set_prologue(b"tapetrack/2")
    other.set_as_initiator()
    other.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, server.public)
    other.start_handshake()
    with pytest.raises(NoiseError):
        noise.consume_hello(server, bytes(other.write_message(b"")))


def test_recorded_hello_gets_a_welcome_that_its_thief_cannot_use(server):
    hello, pending_client = noise.create_hello(server.public, CLIENT_PAYLOAD)
    _, first = noise.consume_hello(server, hello)
    _, second = noise.consume_hello(server, hello)
    welcome, first_end = noise.create_welcome(first, SERVER_PAYLOAD)
    replayed, second_end = noise.create_welcome(second, SERVER_PAYLOAD)
    assert welcome[:32] != replayed[:32]
    _, client_end = noise.consume_welcome(pending_client, welcome)
    recorded = client_end.seal(AD, PLAINTEXT)
    with pytest.raises(NoiseError):
        second_end.open(AD, recorded)
    assert first_end.open(AD, recorded) == PLAINTEXT


def test_welcome_of_another_connection(server):
    _, pending = noise.create_hello(server.public, b"")
    other_hello, _ = noise.create_hello(server.public, b"")
    _, other = noise.consume_hello(server, other_hello)
    welcome, _ = noise.create_welcome(other, b"")
    with pytest.raises(NoiseError):
        noise.consume_welcome(pending, welcome)


def test_a_failure_tells_the_peer_nothing_about_its_cause(server):
    hello, _ = noise.create_hello(server.public, CLIENT_PAYLOAD)
    texts = set()
    for bit in range(8 * len(hello)):
        with pytest.raises(NoiseError) as caught:
            noise.consume_hello(server, flipped(hello, bit))
        texts.add(str(caught.value))
        assert caught.value.__cause__ is None
    assert len(texts) == 1


# ---- bad transport messages ----


def test_data_replayed(server):
    client_end, server_end = connected(server)
    first = client_end.seal(AD, PLAINTEXT)
    assert server_end.open(AD, first) == PLAINTEXT
    with pytest.raises(NoiseError):
        server_end.open(AD, first)
    assert server_end.open(AD, client_end.seal(AD, PLAINTEXT)) == PLAINTEXT


def test_data_reordered_or_left_out(server):
    client_end, server_end = connected(server)
    first, second = client_end.seal(AD, b"1"), client_end.seal(AD, b"2")
    with pytest.raises(NoiseError):
        server_end.open(AD, second)
    assert server_end.open(AD, first) == b"1"
    assert server_end.open(AD, second) == b"2"


def test_data_with_any_bit_flipped_or_truncated_changes_nothing(server):
    client_end, server_end = connected(server)
    good = client_end.seal(AD, PLAINTEXT)
    bad = [flipped(good, bit) for bit in range(8 * len(good))]
    for message in [*bad, *(good[:length] for length in range(len(good))), good + b"\0"]:
        with pytest.raises(NoiseError):
            server_end.open(AD, message)
    assert server_end.open(AD, good) == PLAINTEXT


def test_data_with_any_bit_of_its_header_flipped(server):
    client_end, server_end = connected(server)
    good = client_end.seal(AD, PLAINTEXT)
    for ad in [*(flipped(AD, bit) for bit in range(8 * len(AD))), b"", AD[:-1]]:
        with pytest.raises(NoiseError):
            server_end.open(ad, good)
    assert server_end.open(AD, good) == PLAINTEXT


def test_data_reflected_to_its_sender(server):
    client_end, server_end = connected(server)
    for end in (client_end, server_end):
        with pytest.raises(NoiseError):
            end.open(AD, end.seal(AD, PLAINTEXT))


def test_what_lives_per_connection_has_no_dictionary(server):
    hello, pending_client = noise.create_hello(server.public, b"")
    _, pending_server = noise.consume_hello(server, hello)
    _, transport = noise.create_welcome(pending_server, b"")
    assert not any(hasattr(each, "__dict__") for each in (pending_client, pending_server, transport))
