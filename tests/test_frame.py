"""The verdict on a frame's header: bytes and a state in, a verdict out.  No socket."""

import struct
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tt._core import PROTOCOL, REASONS, STATES, judge_frame

HELLO_LEAST, HELLO_MOST = 32 + 16, 32 + 16 + 192
DATA_LEAST, DATA_MOST_BEFORE_LOGIN, DATA_MOST = 17, 4096, 65535
HELLO, WELCOME, DATA, REFUSE = 1, 2, 3, 4

# State: its one type of frame, the least and the most length, and the verdict beyond the most.
LIMITS = {
    "new": (HELLO, HELLO_LEAST, HELLO_MOST, "not_protocol"),
    "open": (DATA, DATA_LEAST, DATA_MOST_BEFORE_LOGIN, "too_long"),
    "logged_in": (DATA, DATA_LEAST, DATA_MOST, "too_long"),
}


def head(kind: int = HELLO, length: int = HELLO_LEAST, *, magic: bytes = b"TT", version: int = 1) -> bytes:
    return magic + struct.pack(">BBI", version, kind, length)


# What strangers send first: the bytes, and the verdict.  "whole" is a well-formed HELLO that does not authenticate.
FIRST_PACKETS: dict[str, tuple[bytes, str]] = {
    "HTTP": (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "not_protocol"),
    "UPnP SOAP": (b"POST /upnp/control/WANIPConn1 HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "not_protocol"),
    "TLS ClientHello": (bytes.fromhex("1603010200010001fc0303") + bytes(64), "not_protocol"),
    "SSH": (b"SSH-2.0-OpenSSH_9.2p1\r\n", "not_protocol"),
    "RDP": (bytes.fromhex("0300001300e00000000000010008000b000000"), "not_protocol"),
    "SMB": (b"\0\0\0\x85\xffSMBr" + bytes(50), "not_protocol"),
    "SIP": (b"OPTIONS sip:nm SIP/2.0\r\n\r\n", "not_protocol"),
    "Redis": (b"*1\r\n$4\r\nINFO\r\n", "not_protocol"),
    "blank lines": (b"\r\n\r\n", "not_protocol"),
    "zero byte": (b"\0", "not_protocol"),
    "a quarter of a MiB of zeros": (bytes(1 << 18), "not_protocol"),
    "magic in lower case": (b"tt\1\1\0\0\0\x30", "not_protocol"),
    "half the magic, then text": (b"Telnet", "not_protocol"),
    "second byte of the magic wrong": (b"Tt\1\1\0\0\0\x30", "not_protocol"),
    "half the magic": (b"T", "more"),
    "magic": (b"TT", "more"),
    "magic and version": (b"TT\1", "more"),
    "version 0": (head(version=0), "bad_version"),
    "version 2": (head(version=2), "bad_version"),
    "version 255": (head(version=255), "bad_version"),
    "version 2 of a type that there never was": (head(200, 2**32 - 1, version=2), "bad_version"),
    "text that begins with the magic": (b"TTL expired", "bad_version"),
    "type 0": (head(0), "not_protocol"),
    "WELCOME": (head(WELCOME), "not_protocol"),
    "DATA before HELLO": (head(DATA), "not_protocol"),
    "REFUSE": (head(REFUSE, 1) + b"\1", "not_protocol"),
    "type 5": (head(5), "not_protocol"),
    "type 255": (head(255), "not_protocol"),
    "HELLO of length 0": (head(length=0), "not_protocol"),
    "HELLO of the least length - 1": (head(length=HELLO_LEAST - 1) + bytes(HELLO_LEAST - 1), "not_protocol"),
    "HELLO of the most length + 1": (head(length=HELLO_MOST + 1) + bytes(HELLO_MOST + 1), "not_protocol"),
    "HELLO of length 2^16 + the least": (head(length=2**16 + HELLO_LEAST), "not_protocol"),
    "HELLO of length 2^31": (head(length=2**31), "not_protocol"),
    "HELLO of length 2^31 + the least": (head(length=2**31 + HELLO_LEAST), "not_protocol"),
    "HELLO of length 2^32 - 1": (head(length=2**32 - 1), "not_protocol"),
    "HELLO in the other byte order": (head(length=HELLO_LEAST << 24), "not_protocol"),
    "header of a HELLO": (head(), "more"),
    "HELLO but its last byte": (head() + bytes(HELLO_LEAST - 1), "more"),
    "least HELLO of zeros": (head() + bytes(HELLO_LEAST), "whole"),
    "longest HELLO of ones": (head(length=HELLO_MOST) + b"\xff" * HELLO_MOST, "whole"),
}


def fed(data: bytes, state: str, cuts: Iterable[int]) -> str:
    """The verdict of who hands the bytes on as they arrive, and stops at the first that is one."""
    for size in (*sorted(cuts), len(data)):
        verdict, _ = judge_frame(data[:size], state)
        if verdict != "more":
            break
    return verdict


def assert_independent_of_cuts(data: bytes, state: str) -> None:
    """Once there is a verdict, more bytes do not change it; so no way to cut the bytes leads to another."""
    verdicts = [judge_frame(data[:size], state)[0] for size in range(len(data) + 1)]
    assert all(before in ("more", after) for before, after in pairwise(verdicts)), verdicts


def test_numbers_of_the_protocol():
    assert dict(PROTOCOL) == {
        "HEADER": 8, "VERSION": 1, "TAG": 16, "HELLO": HELLO, "WELCOME": WELCOME, "DATA": DATA, "REFUSE": REFUSE,
        "HELLO_LEAST": HELLO_LEAST, "HELLO_MOST": HELLO_MOST, "DATA_LEAST": DATA_LEAST,
        "DATA_MOST_GUEST": DATA_MOST_BEFORE_LOGIN, "DATA_MOST": DATA_MOST,
    }  # fmt: skip


@pytest.mark.parametrize("name", FIRST_PACKETS)
def test_first_packet_whole_byte_by_byte_and_at_every_cut(name):
    packet, expected = FIRST_PACKETS[name]
    packet = packet[:600]  # the verdict on a longer one fell long before
    assert judge_frame(packet, "new")[0] == expected
    assert fed(packet, "new", range(len(packet))) == expected
    for cut in range(len(packet)):
        assert fed(packet, "new", [cut]) == expected
    assert_independent_of_cuts(packet, "new")


def test_no_byte_is_no_verdict():
    for state in LIMITS:
        assert judge_frame(b"", state) == ("more", 0)


@pytest.mark.parametrize("state", LIMITS)
def test_wrong_first_byte_is_a_verdict_after_one_byte(state):
    for byte in set(range(256)) - {ord("T")}:
        assert judge_frame(bytes([byte]), state) == ("not_protocol", 0)


@pytest.mark.parametrize("state", LIMITS)
def test_each_header_byte_is_judged_as_soon_as_it_is_there(state):
    kind, _, _, beyond = LIMITS[state]
    for byte in range(256):
        for good, rest, allowed, verdict in (
            (b"T", bytes([byte]), {ord("T")}, "not_protocol"),
            (b"TT", bytes([byte]), {1}, "bad_version" if state == "new" else "not_protocol"),
            (b"TT\1", bytes([byte]), {kind}, "not_protocol"),
            (b"TT\1" + bytes([kind]), bytes([byte]), {0}, beyond),
            (b"TT\1" + bytes([kind, 0]), bytes([byte]), {0}, beyond),
        ):
            assert judge_frame(good + rest, state) == (("more", 0) if byte in allowed else (verdict, 0))


@pytest.mark.parametrize("state", LIMITS)
def test_lengths_at_and_beyond_the_limits(state):
    kind, least, most, beyond = LIMITS[state]
    for length, expected in (
        (0, "not_protocol"),
        (1, "not_protocol"),
        (least - 1, "not_protocol"),
        (least, "more"),
        (most, "more"),
        (most + 1, beyond),
        (2**16 + least, beyond),
        (2**31 - 1, beyond),
        (2**31, beyond),
        (2**31 + least, beyond),
        (2**32 - 1, beyond),
    ):
        header = head(kind, length)
        assert judge_frame(header, state) == (expected, 8 + length if expected == "more" else 0), length
        assert_independent_of_cuts(header, state)
        if expected == "more":
            assert judge_frame(header + bytes(length - 1), state) == ("more", 8 + length)
            assert judge_frame(header + bytes(length), state) == ("whole", 8 + length)
            assert judge_frame(header + bytes(length + 100), state) == ("whole", 8 + length)


def test_a_length_that_cannot_be_reached_any_more_is_a_verdict_before_its_last_byte():
    assert judge_frame(b"TT\1\1\0\0\1", "new") == ("not_protocol", 0)  # 256 or more
    assert judge_frame(b"TT\1\3\0\0\x11", "open") == ("too_long", 0)  # 4,352 or more
    assert judge_frame(b"TT\1\3\0\1", "logged_in") == ("too_long", 0)  # 65,536 or more
    assert judge_frame(b"TT\1\1\0\0\0", "new") == ("more", 0)


@pytest.mark.parametrize("state", ["open", "logged_in"])
def test_after_the_handshake_only_data_of_the_same_version(state):
    for kind in set(range(256)) - {DATA}:
        assert judge_frame(head(kind, 100), state) == ("not_protocol", 0)
    for version in set(range(256)) - {1}:
        assert judge_frame(head(DATA, 100, version=version), state) == ("not_protocol", 0)


def test_unknown_state_is_refused():
    with pytest.raises(KeyError):
        judge_frame(b"T", "drunk")


# ---- any bytes ----

STATE = st.sampled_from(list(LIMITS))
CUTS = st.sets(st.integers(0, 400), max_size=20)
LENGTHS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.integers(0, 300),
    st.sampled_from([most + more for _, least, most, _ in LIMITS.values() for more in (-1, 0, 1)]),
)


@st.composite
def mutated_frames(draw: st.DrawFn) -> bytes:
    """A frame that is right but for a few bytes."""
    frame = bytearray(head(draw(st.integers(0, 5)), draw(LENGTHS)) + draw(st.binary(max_size=300)))
    for position in draw(st.lists(st.integers(0, 12), max_size=2)):
        if position < len(frame):
            frame[position] = draw(st.integers(0, 255))
    return bytes(frame)


@given(st.binary(max_size=400) | mutated_frames(), STATE, CUTS)
def test_the_verdict_depends_on_no_cut_and_is_one_of_the_named(data, state, cuts):
    verdict = fed(data, state, cuts)
    assert verdict == judge_frame(data, state)[0]
    assert verdict == fed(data, state, range(len(data)))
    assert verdict in {"more", "whole"} | {name for name, _, _ in REASONS}
    assert_independent_of_cuts(data[:40], state)


@given(st.binary(max_size=100) | mutated_frames(), STATE, st.binary(max_size=50))
def test_a_verdict_is_not_changed_by_what_follows(data, state, rest):
    verdict = judge_frame(data, state)
    if verdict[0] != "more":
        assert judge_frame(data + rest, state) == verdict


# ---- the lists of names ----


def test_names_are_distinct_and_explained():
    for rows in (REASONS, STATES):
        names = [row[0] for row in rows]
        assert len(set(names)) == len(names)
        assert all(row[-1] for row in rows)


def test_no_silence_no_close_no_budget_and_no_failure_of_our_own_times_out():
    never = {
        "silent", "peer_closed", "bad_version", "bad_proxy", "too_long", "too_many", "idle", "slow_reader", "shutdown",
        "timed_out", "logged_out", "internal",
    }  # fmt: skip
    assert {name for name, times_out, _ in REASONS if not times_out} == never
