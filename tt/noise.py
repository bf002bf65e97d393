"""The handshake, Noise_NK_25519_AESGCM_SHA256 (Noise Protocol Framework, revision 34), and the two transport ciphers.

    HELLO    client -> server   e, es    ephemeral key (32 bytes), payload and its tag (16 bytes)
    WELCOME  server -> client   e, ee    the same layout; then both sides split into two transport keys

Rules: one fixed pattern, no negotiation.  Commit last: every function checks all before it changes anything, so an
object that met a bad message takes the good one after it.  Whatever is wrong with a peer's message is a NoiseError,
which says nothing that the peer may learn.  Knows no frames, sockets or clock.  The variables have the names of the
Noise specification: h the handshake hash, ck the chaining key, n the nonce, e, s the ephemeral, static keys.
"""

from hashlib import sha256
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PROTOCOL_NAME = b"Noise_NK_25519_AESGCM_SHA256"
PROLOGUE = b"tapetrack/1"
KEY = 32  # bytes of a public key, a cipher key, a hash, a Diffie-Hellman output
TAG = 16  # bytes that AES-GCM adds
REKEY_INTERVAL = 2**20  # messages under one transport key

# HELLO and WELCOME are each the only message under their key.
_NONCE_0 = bytes(12)
# 4 zero bytes and 2^64 - 1: the nonce that Noise reserves for REKEY (section 4.2).  The counters of a transport are
# not checked against it: at a million messages a second they are there after 584,000 years.
_MAX_NONCE = (2**64 - 1).to_bytes(12, "big")
_REKEY_MASK = REKEY_INTERVAL - 1
_ZEROS = bytes(KEY)
_HASH = SHA256()
# Sections 5.2 and 5.3: a name of at most 32 bytes is padded, not hashed; it is the first h and ck.
_CK = PROTOCOL_NAME.ljust(KEY, b"\0")
_H = sha256(_CK + PROLOGUE).digest()


class NoiseError(Exception):
    """A message did not authenticate, or cannot be one of this protocol."""


class StaticKey(Protocol):
    """The server's key pair; tt.keys.ServerKey is one.  `public` is stored, so that no HELLO has to derive it."""

    @property
    def private(self) -> X25519PrivateKey: ...

    @property
    def public(self) -> bytes: ...


class PendingClient:
    """A client between HELLO and WELCOME."""

    __slots__ = ("ck", "ephemeral", "h")

    def __init__(self, ephemeral: X25519PrivateKey, h: bytes, ck: bytes) -> None:
        self.ephemeral = ephemeral
        self.h = h
        self.ck = ck


class PendingServer:
    """A server between HELLO and WELCOME."""

    __slots__ = ("ck", "h", "remote_ephemeral")

    def __init__(self, remote_ephemeral: X25519PublicKey, h: bytes, ck: bytes) -> None:
        self.remote_ephemeral = remote_ephemeral
        self.h = h
        self.ck = ck


class Transport:
    """The two ciphers after the handshake: a counter and a key for each direction (Noise, sections 5.1 and 11.3).

    Both sides renew a key before its nonces n > 0 with n % 2^20 = 0; n goes on.
    """

    __slots__ = ("_open_n", "_opener", "_seal_n", "_sealer")

    def __init__(self, sealer: AESGCM, opener: AESGCM) -> None:
        self._sealer = sealer
        self._opener = opener
        self._seal_n = 0
        self._open_n = 0

    def seal(self, ad: bytes, plaintext: bytes) -> bytes:
        """Return the ciphertext, 16 bytes longer than the plaintext, for the next nonce."""
        n = self._seal_n
        sealer = self._sealer
        if not n & _REKEY_MASK and n:
            sealer = _rekeyed(sealer)
        # 12 bytes, big-endian: 4 zero bytes and the 64-bit counter (section 12.4).
        ciphertext = sealer.encrypt(n.to_bytes(12, "big"), plaintext, ad)
        self._sealer = sealer
        self._seal_n = n + 1
        return ciphertext

    def open(self, ad: bytes, ciphertext: bytes) -> bytes:
        """Return the plaintext for the next nonce.  Raises NoiseError, and then has changed nothing."""
        n = self._open_n
        opener = self._opener
        if not n & _REKEY_MASK and n:
            # Stored only below: a forged message at this nonce must not move the key.
            opener = _rekeyed(opener)
        try:
            plaintext = opener.decrypt(n.to_bytes(12, "big"), ciphertext, ad)
        except InvalidTag:
            raise NoiseError("a message does not authenticate") from None
        self._opener = opener
        self._open_n = n + 1
        return plaintext


def create_hello(server_public: bytes, payload: bytes) -> tuple[bytes, PendingClient]:
    """Return HELLO, 32 + 16 + len(payload) bytes, for the server with this public key (32 bytes).

    The payload can be read by who holds the server's private key, now or later: no secret belongs in it.
    Raises NoiseError for what cannot be a public key.
    """
    s = _public_key(server_public)
    ephemeral = X25519PrivateKey.generate()
    e = ephemeral.public_key().public_bytes_raw()
    h = sha256(sha256(_H + server_public).digest() + e).digest()
    ck, cipher = _mix_key(_CK, _exchange(ephemeral, s))
    ciphertext = cipher.encrypt(_NONCE_0, payload, h)
    return e + ciphertext, PendingClient(ephemeral, sha256(h + ciphertext).digest(), ck)


def consume_hello(static: StaticKey, message: bytes) -> tuple[bytes, PendingServer]:
    """Return the payload of HELLO and the state for WELCOME.  Raises NoiseError.

    Noise, section 7.7: a HELLO may be a copy of another client's; only who can open a WELCOME is its sender.
    """
    e = message[:KEY]
    ciphertext = message[KEY:]
    remote_ephemeral = _public_key(e)
    h = sha256(sha256(_H + static.public).digest() + e).digest()
    ck, cipher = _mix_key(_CK, _exchange(static.private, remote_ephemeral))
    payload = _decrypt(cipher, h, ciphertext)
    return payload, PendingServer(remote_ephemeral, sha256(h + ciphertext).digest(), ck)


def create_welcome(pending: PendingServer, payload: bytes) -> tuple[bytes, Transport]:
    """Return WELCOME, 32 + 16 + len(payload) bytes, and the server's transport.  Raises NoiseError."""
    ephemeral = X25519PrivateKey.generate()
    e = ephemeral.public_key().public_bytes_raw()
    h = sha256(pending.h + e).digest()
    ck, cipher = _mix_key(pending.ck, _exchange(ephemeral, pending.remote_ephemeral))
    to_server, to_client = _split(ck)
    return e + cipher.encrypt(_NONCE_0, payload, h), Transport(to_client, to_server)


def consume_welcome(pending: PendingClient, message: bytes) -> tuple[bytes, Transport]:
    """Return the payload of WELCOME and the client's transport.  Raises NoiseError; `pending` can be used again then.

    A second transport from one `pending` and one WELCOME would use its nonces a second time: take one.
    """
    e = message[:KEY]
    h = sha256(pending.h + e).digest()
    ck, cipher = _mix_key(pending.ck, _exchange(pending.ephemeral, _public_key(e)))
    payload = _decrypt(cipher, h, message[KEY:])
    to_server, to_client = _split(ck)
    return payload, Transport(to_server, to_client)


def _public_key(data: bytes) -> X25519PublicKey:
    try:
        return X25519PublicKey.from_public_bytes(data)
    except ValueError:
        raise NoiseError(f"a public key has {KEY} bytes") from None


def _exchange(private: X25519PrivateKey, public: X25519PublicKey) -> bytes:
    """DH of section 4.1.  An output of zeros, which every low-order point gives, is an error (RFC 7748, section 6.1).

    Without that check one side could make the keys of the connection such that everybody who watches it knows them.
    """
    try:
        return private.exchange(public)  # raises ValueError for zeros
    except ValueError:
        raise NoiseError("a public key has a low order") from None


def _mix_key(ck: bytes, material: bytes) -> tuple[bytes, AESGCM]:
    """MixKey of section 5.2: the next ck, and the cipher of the message that follows."""
    ck, key = _hkdf(ck, material)
    return ck, AESGCM(key)


def _split(ck: bytes) -> tuple[AESGCM, AESGCM]:
    """Split of section 5.2: the ciphers from client to server and from server to client."""
    to_server, to_client = _hkdf(ck, b"")
    return AESGCM(to_server), AESGCM(to_client)


def _hkdf(ck: bytes, material: bytes) -> tuple[bytes, bytes]:
    """HKDF of section 4.3 with two outputs: that of RFC 5869 with ck as the salt and an empty info."""
    output = HKDF(algorithm=_HASH, length=2 * KEY, salt=ck, info=b"").derive(material)
    return output[:KEY], output[KEY:]


def _decrypt(cipher: AESGCM, h: bytes, ciphertext: bytes) -> bytes:
    try:
        return cipher.decrypt(_NONCE_0, ciphertext, h)
    except InvalidTag:
        raise NoiseError("a handshake message does not authenticate") from None


def _rekeyed(cipher: AESGCM) -> AESGCM:
    """REKEY of section 4.2: the first 32 bytes of ENCRYPT(k, 2^64 - 1, empty, 32 zero bytes) are the next key."""
    return AESGCM(cipher.encrypt(_MAX_NONCE, _ZEROS, b"")[:KEY])
