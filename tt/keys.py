"""The server's identity: an X25519 key pair (RFC 7748), its files and its text form.

server.key  the private key, PKCS #8 in PEM (RFC 8410), mode 0600: `openssl pkey -in server.key -text` shows it
server.key.old  the key before, for as long as the operator leaves it there: a server has both in force
server.pub  the public key's text form and a newline
Text form:  "tt1-" and base64url (RFC 4648, section 5) of the 32 key bytes and 4 check bytes, 52 characters in all.

Rules: a private key is never readable by others, not even while it is written, and is never overwritten; server.pub
is derived, so it is repaired.  Must not know sockets, the protocol or the command line.
"""

import base64
import contextlib
import hashlib
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tt.state_file import sync_directory

PRIVATE_FILE = "server.key"
OLD_FILE = "server.key.old"
PUBLIC_FILE = "server.pub"

PREFIX = "tt1-"
KEY_SIZE = 32  # bytes of an X25519 public key
CHECK_SIZE = 4  # bytes of SHA-256: a typing error passes once in 2^32
TEXT_LENGTH = 48  # characters behind the prefix: 36 bytes fill them exactly, so a key has one text form only
MAX_FILE = 4096  # bytes read of either file; an X25519 key in PEM has 119


class KeyFileError(Exception):
    """A key file cannot be used; the text is one line that names the file, the rule and the remedy."""


@dataclass(frozen=True, slots=True)
class ServerKey:
    """The server's static key pair; `public`, 32 bytes, is kept so that no HELLO derives it anew."""

    private: X25519PrivateKey
    public: bytes


def to_text(public: bytes) -> str:
    """Return the text form of a public key of 32 bytes."""
    if len(public) != KEY_SIZE:
        raise ValueError(f"a public key has {KEY_SIZE} bytes, not {len(public)}")
    return PREFIX + base64.urlsafe_b64encode(public + _check_bytes(public)).decode("ascii")


def from_text(text: str) -> bytes:
    """Return the 32 bytes of a public key in text form; white space around it is ignored.

    Raises ValueError, one sentence, for what is no text form or has a typing error.
    """
    text = text.strip()
    if not text.startswith(PREFIX):
        raise ValueError(f"a server key begins with '{PREFIX}': copy the whole line of the server's {PUBLIC_FILE}")
    # b64decode skips characters outside its alphabet, so the alphabet is checked here.
    if not re.fullmatch(f"[A-Za-z0-9_-]{{{TEXT_LENGTH}}}", body := text.removeprefix(PREFIX)):
        raise ValueError(
            f"a server key has {TEXT_LENGTH} letters, digits, '-' or '_' after '{PREFIX}': "
            f"copy the whole line of the server's {PUBLIC_FILE}"
        )
    data = base64.urlsafe_b64decode(body)
    public, check = data[:KEY_SIZE], data[KEY_SIZE:]
    if check != _check_bytes(public):
        raise ValueError(f"the server key has a typing error: copy the whole line of the server's {PUBLIC_FILE}")
    return public


def create_or_load(directory: Path) -> tuple[ServerKey, bool]:
    """Return the key of the data directory, and whether it was made now.

    Two servers that start at once agree on one key.  Raises KeyFileError.
    """
    path = directory / PRIVATE_FILE
    try:
        key, created = _load(path), False
    except FileNotFoundError:
        key, created = _create(path)
    _keep_public(directory / PUBLIC_FILE, to_text(key.public) + "\n")
    return key, created


def write_file(path: Path, data: bytes, mode: int, *, replace: bool) -> None:
    """Write a whole file or nothing: readers see the old content or the new, also after a power failure.

    Raises OSError; FileExistsError where the file is there and `replace` is false.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # rename would overwrite a file that appeared meanwhile; link fails
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    sync_directory(path.parent)


def load_old(directory: Path) -> ServerKey | None:
    """Return the key before, which clients may still have; None where there is none.  Raises KeyFileError."""
    try:
        return _load(directory / OLD_FILE)
    except FileNotFoundError:
        return None


def _check_bytes(public: bytes) -> bytes:
    return hashlib.sha256(public).digest()[:CHECK_SIZE]


def _create(path: Path) -> tuple[ServerKey, bool]:
    private = X25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        write_file(path, pem, 0o600, replace=False)
    except FileExistsError:  # another server made it between our look and now: its key is the one
        try:
            return _load(path), False
        except FileNotFoundError as error:  # a symbolic link to nowhere
            raise KeyFileError(
                f"{path} is a link to a file that is not there: restore the file or remove the link"
            ) from error
    except OSError as error:
        raise KeyFileError(
            f"cannot make the server key {path} ({_why(error)}): "
            f"the data directory must exist and be writable for the server's user"
        ) from error
    return ServerKey(private, private.public_key().public_bytes_raw()), True


def _load(path: Path) -> ServerKey:
    """Read the private key.  Raises KeyFileError, and FileNotFoundError where there is none."""
    try:
        # O_NONBLOCK: opening a FIFO left there must not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KeyFileError(
            f"cannot read the server key {path} ({_why(error)}): "
            f"it must be a file that belongs to the server's user, with mode 0600"
        ) from error
    try:
        status = os.fstat(descriptor)  # of what was opened: the name may be exchanged between two looks
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"{path} is no regular file, as a server key must be: move it away: {_without(path)}")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise KeyFileError(
                f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, but nobody else may have access "
                f"to the server's private key: run 'chmod 600 {path}'"
            )
        pem = os.read(descriptor, MAX_FILE)
    except OSError as error:
        raise KeyFileError(f"cannot read the server key {path} ({_why(error)}): restore it from a backup") from error
    finally:
        os.close(descriptor)
    return _parse(path, pem)


def _parse(path: Path, pem: bytes) -> ServerKey:
    remedy = f"restore it from a backup, or move it away: {_without(path)}"
    try:
        private = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: encrypted with a passphrase
        raise KeyFileError(
            f"{path} is damaged or is no private key without a passphrase in PEM form: {remedy}"
        ) from error
    if not isinstance(private, X25519PrivateKey):
        raise KeyFileError(f"{path} holds a private key of another kind than X25519: {remedy}")
    return ServerKey(private, private.public_key().public_bytes_raw())


def _keep_public(path: Path, text: str) -> None:
    """Write server.pub unless it is right already: a data directory that is read-only afterwards must serve too."""
    try:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if file.read(MAX_FILE) == text.encode("ascii"):
                return
        write_file(path, text.encode("ascii"), 0o644, replace=True)
    except OSError as error:
        raise KeyFileError(
            f"cannot write {path}, where clients find the server's public key ({_why(error)}): "
            f"the data directory must be writable for the server's user"
        ) from error


def _without(path: Path) -> str:
    if path.name == OLD_FILE:
        return "who has the old key alone is not let in then"
    return "the next start makes a new key, which every client needs then"


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
