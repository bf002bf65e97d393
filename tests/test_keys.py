"""tt.keys: the text form of a public key, and the two key files of a data directory."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from tt import keys

PUBLIC = bytes(range(32))


@given(st.binary(min_size=32, max_size=32))
def test_text_form_is_as_documented_and_read_back(public: bytes) -> None:
    text = keys.to_text(public)
    expected = base64.urlsafe_b64encode(public + hashlib.sha256(public).digest()[:4]).rstrip(b"=").decode()
    assert text == "tt1-" + expected
    assert len(text) == 52
    assert keys.from_text(f"  {text}\n") == public


@given(st.integers(4, 51), st.sampled_from("ABCXYZabcxyz0189-_"))
def test_any_single_wrong_character_is_found(position: int, character: str) -> None:
    text = keys.to_text(PUBLIC)
    wrong = text[:position] + character + text[position + 1 :]
    if wrong != text:
        with pytest.raises(ValueError, match="typing error"):
            keys.from_text(wrong)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "begins with 'tt1-'"),
        ("TT1-" + keys.to_text(PUBLIC)[4:], "begins with 'tt1-'"),
        ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5", "begins with 'tt1-'"),
        (keys.to_text(PUBLIC)[:-1], "48 letters"),
        (keys.to_text(PUBLIC) + "A", "48 letters"),
        (keys.to_text(PUBLIC) + "=", "48 letters"),
        (keys.to_text(PUBLIC)[:10] + " " + keys.to_text(PUBLIC)[10:], "48 letters"),
        (keys.to_text(PUBLIC)[:10] + "*" + keys.to_text(PUBLIC)[11:], "48 letters"),
        (keys.to_text(PUBLIC)[:10] + "é" + keys.to_text(PUBLIC)[11:], "48 letters"),
        (keys.to_text(PUBLIC)[:10] + "+" + keys.to_text(PUBLIC)[11:], "48 letters"),
        (keys.to_text(PUBLIC)[:-1] + "\n" + keys.to_text(PUBLIC)[-1], "48 letters"),
    ],
)
def test_what_is_no_text_form_is_named(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as error:
        keys.from_text(text)
    assert "\n" not in str(error.value)


def test_a_public_key_of_another_length_has_no_text_form() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        keys.to_text(PUBLIC[:31])


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_first_start_makes_both_files_whatever_the_umask_and_the_second_reads_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        key, created = keys.create_or_load(tmp_path)
    finally:
        os.umask(before)
    again, created_again = keys.create_or_load(tmp_path)
    assert (created, created_again) == (True, False)
    assert key.public == again.public == key.private.public_key().public_bytes_raw()
    assert (tmp_path / "server.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "server.pub").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "server.pub").read_text() == keys.to_text(key.public) + "\n"
    assert sorted(os.listdir(tmp_path)) == ["server.key", "server.pub"]


def test_two_servers_that_start_at_once_use_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file = keys.write_file
    others: list[keys.ServerKey] = []

    def overtaken(path: Path, data: bytes, mode: int, *, replace: bool) -> None:
        monkeypatch.setattr(keys, "write_file", write_file)
        others.append(keys.create_or_load(tmp_path)[0])  # the other server is done before we write
        write_file(path, data, mode, replace=replace)

    monkeypatch.setattr(keys, "write_file", overtaken)
    key, created = keys.create_or_load(tmp_path)
    assert not created
    assert key.public == others[0].public
    assert sorted(os.listdir(tmp_path)) == ["server.key", "server.pub"]


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o666, 0o610])
def test_a_private_key_that_others_may_touch_is_not_used(tmp_path: Path, mode: int) -> None:
    keys.create_or_load(tmp_path)
    (tmp_path / "server.key").chmod(mode)
    with pytest.raises(keys.KeyFileError, match=f"mode {mode:04o}.*'chmod 600 {re.escape(str(tmp_path))}/server.key'"):
        keys.create_or_load(tmp_path)
    (tmp_path / "server.key").chmod(0o400)  # stricter is well
    assert not keys.create_or_load(tmp_path)[1]


def pem(key: X25519PrivateKey | Ed25519PrivateKey, passphrase: bytes | None = None) -> bytes:
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "damaged"),
        (b"\xff" * 10_000, "damaged"),
        (bytes(range(32)), "damaged"),
        (pem(X25519PrivateKey.from_private_bytes(bytes(range(32))))[:-40], "damaged"),
        (pem(X25519PrivateKey.generate(), b"secret"), "without a passphrase"),
        (pem(Ed25519PrivateKey.generate()), "another kind than X25519"),
    ],
)
def test_a_file_that_is_no_key_is_named_and_kept(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "server.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(keys.KeyFileError, match=fault) as error:
        keys.create_or_load(tmp_path)
    assert str(path) in str(error.value)
    assert "move it away" in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_a_directory_a_fifo_or_a_dangling_link_in_place_of_the_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "server.key"
    path.mkdir()
    with pytest.raises(keys.KeyFileError, match="no regular file"):
        keys.create_or_load(tmp_path)
    path.rmdir()
    os.mkfifo(path, 0o600)  # nobody writes, so an open that waits would wait for ever: in a process with a time-out
    script = "import sys, pathlib; from tt import keys; keys.create_or_load(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=60, check=False)
    assert b"no regular file" in done.stderr
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(keys.KeyFileError, match="link to a file that is not there"):
        keys.create_or_load(tmp_path)


def test_a_missing_data_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        keys.KeyFileError, match=r"server\.key \(No such file or directory\): the data directory must exist"
    ):
        keys.create_or_load(tmp_path / "missing")


def test_a_wrong_or_lost_public_file_is_repaired(tmp_path: Path) -> None:
    key, _ = keys.create_or_load(tmp_path)
    public = tmp_path / "server.pub"
    public.write_text(keys.to_text(PUBLIC) + "\n")
    keys.create_or_load(tmp_path)
    assert keys.from_text(public.read_text()) == key.public
    public.unlink()
    keys.create_or_load(tmp_path)
    assert keys.from_text(public.read_text()) == key.public


def test_right_files_in_a_directory_that_cannot_be_written_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = keys.create_or_load(tmp_path)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(keys, "write_file", read_only)
    assert keys.create_or_load(tmp_path)[0].public == key.public
    (tmp_path / "server.pub").unlink()
    with pytest.raises(keys.KeyFileError, match=r"server\.pub.*Read-only file system"):
        keys.create_or_load(tmp_path)


def test_the_private_key_is_what_openssl_reads(tmp_path: Path) -> None:
    key, _ = keys.create_or_load(tmp_path)
    if not (openssl := shutil.which("openssl")):
        pytest.skip("openssl is not installed")
    command = [openssl, "pkey", "-in", str(tmp_path / "server.key"), "-pubout", "-outform", "DER"]
    assert subprocess.run(command, check=True, capture_output=True).stdout[-32:] == key.public


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        keys.write_file(path, b"new", 0o600, replace=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
