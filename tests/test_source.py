"""source.pxd: what a source is, its hash against CPython's own SipHash-1-3, and the index against a plain dict."""

import struct
import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tt import sources
from tt._core import Networks, SourceIndex, source_text


@pytest.mark.parametrize(
    ("address", "prefix", "source"),
    [
        ("192.0.2.1", 64, "192.0.2.1"),
        ("0.0.0.0", 64, "0.0.0.0"),
        ("255.255.255.255", 1, "255.255.255.255"),
        ("::ffff:192.0.2.1", 64, "192.0.2.1"),
        ("::ffff:192.0.2.1", 8, "192.0.2.1"),
        ("64:ff9b::192.0.2.1", 64, "192.0.2.1"),
        ("64:ff9b:1::192.0.2.1", 64, "64:ff9b:1::/64"),
        ("2001:db8:1:2:3:4:5:6", 64, "2001:db8:1:2::/64"),
        ("2001:db8:1:2:3:4:5:6", 56, "2001:db8:1::/56"),
        ("2001:db8:1:2:3:4:5:6", 65, "2001:db8:1:2::/65"),
        ("2001:db8:1:2:8000::", 65, "2001:db8:1:2:8000::/65"),
        ("2001:db8:1:2:3:4:5:6", 128, "2001:db8:1:2:3:4:5:6"),
        ("ffff::", 1, "8000::/1"),
        ("::1", 64, "::/64"),
        ("fe80::1", 64, "fe80::1"),
        ("febf:ffff::1", 64, "febf:ffff::1"),
        ("fec0::1", 64, "fec0::/64"),
        ("fe80::1%eth0", 64, "fe80::1"),
        ("2001:db8::/64", 64, "2001:db8::/64"),
        ("2001:db8::1/64", 64, "2001:db8::/64"),
    ],
)
def test_an_address_counts_as_this_source(address: str, prefix: int, source: str) -> None:
    assert source_text(address, prefix) == source
    assert source_text(source, prefix) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "192.0.2.256",
        "192.0.2.1\0",
        "192.0.2.01",
        "192.0.2.0/24",
        "2001:db8::/56",
        "2001:db8::/064",
        "2001:db8::/",
        "fe80::1/64",
        "::ffff:192.0.2.1/64",
        "2001:db8::/64/64",
        "\u0661.2.3.4",
    ],
)
def test_what_is_no_source_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="is no source: ") as error:
        source_text(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", [0, 129])
def test_a_prefix_out_of_range_is_refused(prefix: int) -> None:
    with pytest.raises(ValueError, match=r"must be 1\.\.128"):
        source_text("2001:db8::1", prefix)


@given(
    st.one_of(
        st.integers(0, 2**128 - 1),
        st.integers(0, 2**32 - 1).map(lambda n: 0xFFFF << 32 | n),
        st.integers(0, 2**32 - 1).map(lambda n: 0x64FF9B << 96 | n),
        st.integers(0, 2**118 - 1).map(lambda n: 0x3FA << 118 | n),
    ),
    st.integers(1, 128),
)
def test_an_ipv6_source_is_its_network(number: int, prefix: int) -> None:
    address = IPv6Address(number)
    embedded = address.ipv4_mapped or (number >> 32 == 0x64FF9B << 64 and IPv4Address(number & 0xFFFFFFFF))
    if embedded:
        expected = str(embedded)
    elif address.is_link_local or prefix == 128:
        expected = str(address)
    else:
        expected = str(IPv6Network((number, prefix), strict=False))
    # The network before the text: ::1.2.3.4 and ::102:304 are two texts of one address.
    assert ip_network(source_text(str(address), prefix)) == ip_network(expected)


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[str, "sources.Network"]:
    """An address, and a network of either family whose address has all but a few of its bits."""
    number = draw(st.integers(0, 2**128 - 1) | st.integers(0, 2**32 - 1).map(lambda n: 0xFFFF << 32 | n))
    address = IPv6Address(number)
    near = number ^ sum(1 << bit for bit in draw(st.sets(st.integers(0, 127), max_size=2)))
    if address.ipv4_mapped and draw(st.booleans()):
        return str(address.ipv4_mapped), IPv4Network((near & 0xFFFFFFFF, draw(st.integers(0, 32))), strict=False)
    return str(address.ipv4_mapped or address), IPv6Network((near, draw(st.integers(0, 128))), strict=False)


@given(neighbours(), st.integers(32, 128))
def test_networks_touch_the_sources_with_which_they_share_an_address(
    pair: tuple[str, "sources.Network"], prefix: int
) -> None:
    address, network = pair
    source = source_text(address, prefix)
    for text in (address, source):
        assert Networks((network,), prefix).touches(text) == sources.holds((network,), source)


@pytest.mark.parametrize(
    ("network", "source", "touched"),
    [
        ("2001:db8::5/128", "2001:db8::6", True),  # another address of the same /64
        ("2001:db8::5/128", "2001:db8::/64", True),
        ("2001:db8::5/128", "2001:db8:0:1::5", False),
        ("2001:db8::/32", "2001:db8:9::1", True),
        ("fe80::5/128", "fe80::6", False),  # link-local addresses stay whole
        ("::/0", "2001:db8::1", True),
        ("::/0", "192.0.2.1", False),  # though it covers its v4-mapped form
        ("::ffff:192.0.2.0/120", "192.0.2.1", False),
        ("0.0.0.0/0", "192.0.2.1", True),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("192.0.2.0/31", "192.0.2.2", False),
    ],
)
def test_a_network_touches_a_source(network: str, source: str, touched: bool) -> None:
    assert Networks((ip_network(network),)).touches(source) is touched
    assert not Networks(()).touches(source)


# The hash: CPython hashes bytes with SipHash-1-3, under a seed that a small LCG makes of PYTHONHASHSEED
# (Python/bootstrap_hash.c).


def seed_of_python(number: int) -> bytes:
    """The first 16 bytes that CPython derives from PYTHONHASHSEED=number; all zero for 0."""
    if number == 0:
        return bytes(16)
    seed = bytearray()
    for _ in range(16):
        number = (number * 214013 + 2531011) % 2**32
        seed.append(number >> 16 & 0xFF)
    return bytes(seed)


SOURCES = ["0.0.0.0", "192.0.2.1", "255.255.255.255", "2001:db8::", "2001:db8:1:2:3:4:5:6", "::", "fe80::1"]


@pytest.mark.skipif(sys.hash_info.algorithm != "siphash13", reason="this Python does not hash with SipHash-1-3")
@pytest.mark.parametrize("number", [0, 1, 42, 2**32 - 1])
def test_the_hash_is_siphash_1_3(number: int) -> None:
    index = SourceIndex(1, seed_of_python(number))
    messages = []
    for source in SOURCES:
        value = int(IPv6Address(f"::ffff:{source}" if "." in source else source))
        messages.append(struct.pack("<QQ", value >> 64, value & (2**64 - 1)))
    answer = subprocess.run(
        [sys.executable, "-c", f"print(*(hash(m) % 2**64 for m in {messages!r}))"],
        env={"PYTHONHASHSEED": str(number)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert [index.hash(source) for source in SOURCES] == [int(word) for word in answer.stdout.split()]


def test_another_seed_gives_other_hashes() -> None:
    one, two = SourceIndex(1), SourceIndex(1)
    assert [one.hash(source) for source in SOURCES] != [two.hash(source) for source in SOURCES]


@pytest.mark.parametrize("seed", [b"", bytes(15), bytes(17)])
def test_a_seed_of_another_length_is_refused(seed: bytes) -> None:
    with pytest.raises(ValueError, match="must have 16"):
        SourceIndex(4, seed)


@pytest.mark.parametrize("capacity", [0, 2**30 + 1])
def test_an_index_of_impossible_capacity_is_refused(capacity: int) -> None:
    with pytest.raises(MemoryError):
        SourceIndex(capacity)


# The index: 7 slots in 16 cells, and 24 sources that come and go, make chains that wrap and close over holes.

CAPACITY = 7
POOL = [f"192.0.2.{n}" for n in range(12)] + [f"2001:db8::{n:x}" for n in range(12)]


class IndexAgainstDict(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = SourceIndex(CAPACITY, bytes(range(16)))
        self.slots: dict[str, int] = {}

    @precondition(lambda self: len(self.slots) < CAPACITY)
    @rule(source=st.sampled_from(POOL))
    def put(self, source: str) -> None:
        if source not in self.slots:
            slot = min(set(range(CAPACITY)) - set(self.slots.values()))
            self.index.put(source, slot)
            self.slots[source] = slot

    @rule(slot=st.integers(0, CAPACITY - 1))
    def drop(self, slot: int) -> None:
        self.index.drop(slot)
        self.slots = {source: s for source, s in self.slots.items() if s != slot}

    @invariant()
    def finds_what_the_dict_holds(self) -> None:
        assert {source: self.index.find(source) for source in POOL} == {s: self.slots.get(s) for s in POOL}


TestIndexAgainstDict = IndexAgainstDict.TestCase


def test_a_full_index_finds_all_and_answers_a_miss() -> None:
    index = SourceIndex(1000)
    sources = [str(IPv4Address(0x0A000000 + n)) for n in range(1000)]
    for slot, source in enumerate(sources):
        index.put(source, slot)
    assert [index.find(source) for source in sources] == list(range(1000))
    assert index.find("192.0.2.1") is None
    for slot in range(0, 1000, 2):
        index.drop(slot)
    assert [index.find(source) for source in sources] == [None if n % 2 == 0 else n for n in range(1000)]


def test_a_slot_beyond_the_capacity_is_refused() -> None:
    index = SourceIndex(4)
    with pytest.raises(ValueError, match="below the capacity"):
        index.put("192.0.2.1", 4)
    index.drop(4)


def test_text_of_a_source_within_64_ff9b_is_its_source():
    assert source_text("64:ff9b::1:0:1") == "64:ff9b::/64"  # of the /64, but outside of the /96 that means IPv4
    assert source_text("64:ff9b::/64") == "64:ff9b::/64"
    assert source_text("64:ff9b::c000:201") == "192.0.2.1"
