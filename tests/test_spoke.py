"""The names of first bytes: what scanners and lost clients really send, cut anywhere, and anything at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tt.spoke import LOOK, NAMES, UNKNOWN, identify

# Name -> first packets, each as its client or a service scanner sends it.
PACKETS: dict[str, list[bytes]] = {
    "TLS ClientHello": [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x16\x03\x00\x00S\x01\x00\x00O\x03\x00?G\xd7\xf7\xba,\xee\xea\xb2`~\xf3\x00\xfd\x82{",
        b"\x80\x9e\x01\x03\x01\x00u\x00\x00\x00 \x00\x00f",
    ],
    "HTTP request": [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /nice%20ports%2C/Tri%6Eity.txt%2ebak HTTP/1.0\r\n\r\n",
        b"OPTIONS / HTTP/1.0\r\n\r\n",
        b"POST /api/login HTTP/1.1\r\nHost: a",
        b"CONNECT example.com:443 HTTP/1.1\r\n",
        b"GET http://example.com/ HTTP/1.1\r\n",
    ],
    "HTTP/2 preface": [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    "UPnP/SSDP": [b"M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900", b"NOTIFY * HTTP/1.1\r\n"],
    "UPnP SOAP": [
        b"POST /upnp/control/WANIPConn1 HTTP/1.1\r\n",
        b"POST /ctl/IPConn HTTP/1.1\r\nHost: 127.0.0.1",
        b"POST /picsdesc.xml HTTP/1.1\r\n",
        b"SUBSCRIBE /upnp/event/x HTTP/1.1\r\n",
    ],
    "SSH": [b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n"],
    "RDP": [
        b"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x00\x01\x00\x08\x00\x03\x00\x00\x00",
        b"\x03\x00\x00*%\xe0\x00\x00\x00\x00\x00Cookie: mstshash=nmap\r\n",
    ],
    "Siemens S7": [b"\x03\x00\x00\x16\x11\xe0\x00\x00\x00\x05\x00\xc1\x02\x01\x00\xc2\x02\x01\x02\xc0\x01\x0a"],
    "SMB": [b"\x00\x00\x00\xa4\xffSMBr\x00\x00\x00\x00\x08\x01@", b"\x00\x00\x00\x66\xfeSMB\x40\x00"],
    "SIP": [b"OPTIONS sip:nm SIP/2.0\r\nVia: SIP/2.0/TCP nm", b"REGISTER sip:example.com SIP/2.0\r\n"],
    "Redis": [b"*1\r\n$4\r\ninfo\r\n", b"INFO\r\n", b"PING\r\n"],
    "MySQL": [b"\x54\x00\x00\x01\x8d\xa6\x0f\x00\x00\x00\x00\x01\x08" + bytes(23) + b"root\x00"],
    "PostgreSQL": [b"\x00\x00\x00\x08\x04\xd2\x16/", b"\x00\x00\x00\x26\x00\x03\x00\x00user\x00postgres\x00"],
    "MongoDB": [b"A\x00\x00\x00:0\x00\x00\xff\xff\xff\xff\xd4\x07\x00\x00\x00\x00\x00\x00test.$cmd"],
    "memcached": [b"stats\r\n", b"version\r\n", b"get a\r\n"],
    "SOCKS4": [b"\x04\x01\x00\x16\x7f\x00\x00\x01root\x00"],
    "SOCKS5": [b"\x05\x04\x00\x01\x02\x80\x05\x01\x00\x03", b"\x05\x01\x00"],
    "RTSP": [b"OPTIONS / RTSP/1.0\r\n\r\n", b"DESCRIBE rtsp://10.0.0.1/live RTSP/1.0\r\n"],
    "DNS over TCP": [
        b"\x00\x1e\x00\x06\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07version\x04bind\x00\x00\x10\x00\x03",
        b"\x00\x0c\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x00\x00",
    ],
    "LDAP": [
        b"0\x84\x00\x00\x00-\x02\x01\x07c\x84\x00\x00\x00$\x04\x00\n\x01\x00",
        b"0\x0c\x02\x01\x01`\x07\x02\x01\x02\x04\x00\x80\x00",
    ],
    "SNMP": [b"0\x26\x02\x01\x01\x04\x06public\xa0\x19"],
    "MQTT": [b"\x10\x10\x00\x04MQTT\x04\x02\x00<\x00\x04nmap", b"\x10\x12\x00\x06MQIsdp\x03\x02"],
    "AMQP": [b"AMQP\x00\x00\x09\x01"],
    "Kafka": [b"\x00\x00\x00\x1b\x00\x12\x00\x03\x00\x00\x00\x01\x00\x0bconsole-pro"],
    "X11": [b"l\x00\x0b\x00\x00\x00\x00\x00\x00\x00\x00\x00"],
    "RPC portmap": [
        b"\x80\x00\x00(r\xfe\x1d\x13\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01\x86\xa0\x00\x01\x97|\x00\x00\x00\x00"
    ],
    "Java RMI": [b"JRMI\x00\x02K"],
    "AJP": [b"\x124\x00\x01\n"],
    "TFTP": [b"\x00\x01r7tftp.txt\x00octet\x00"],
    "NetBIOS": [
        b"\x81\x00\x00D CKFDENECFDEFFCFGEFFCCACACACACA",
        b"\x80\xf0\x00\x10\x00\x01\x00\x00\x00\x00\x00\x00 CKAAAAAAAAAAAA",
    ],
    "Kerberos": [b"\x00\x00\x00qj\x81n0\x81k\xa1\x03\x02\x01\x05"],
    "Oracle TNS": [b"\x00Z\x00\x00\x01\x00\x00\x00\x016\x01,\x00\x00\x08\x00"],
    "MS SQL (TDS)": [b"\x12\x01\x004\x00\x00\x00\x00\x00\x00\x15"],
    "MS RPC": [b"\x05\x00\x0b\x03\x10\x00\x00\x00H\x00"],
    "printer (LPD)": [b"\x01default\n"],
    "NetWare NCP": [b"DmdT\x00\x00\x00\x17\x00\x00\x00\x01"],
    "Lotus Notes": [b":\x00\x00\x00/\x00\x00\x00\x02\x00\x00@"],
    "Windows Media": [b"\x01\x00\x00\xfd\xce\xfa\x0b\xb0\xa0\x00\x00\x00MMS"],
    "SMTP": [b"EHLO\r\n"],
    "STOMP": [b"HELP\n\n\x00"],
    "HELP line": [b"HELP\r\n"],
    "CORBA": [b"GIOP\x01\x00\x01\x00$\x00\x00\x00"],
    "AFP": [b"\x00\x03\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x0f\x00"],
    "Modbus": [b"\x00\x00\x00\x00\x00\x05\x01+\x0e\x01\x00"],
    "Firebird": [b"\x00\x00\x00\x01\x00\x00\x00\x13\x00\x00\x00\x02\x00\x00\x00$"],
    "Telnet": [b"\xff\xfb\x01\xff\xfd\x03"],
    "JSON-RPC": [b'{"id": 1, "method": "mining.subscribe"}\n'],
    "PROXY protocol": [b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11"],
    "blank lines": [b"\r\n\r\n", b"\n"],
    "tape-tracking frame": [b"TT\x01\x03\x00\x00\x00\x20", b"TT"],
    UNKNOWN: [b"", b"\x00", b"\x16", b"G", b"\x03", b"\xde\xad\xbe\xef\x01\x02\x03\x04", b"QQQQ"],
}
ROWS = [(name, packet) for name, packets in PACKETS.items() for packet in packets]


@pytest.mark.parametrize(("name", "packet"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_stranger_is_named_by_its_first_packet(name: str, packet: bytes) -> None:
    assert identify(packet) == name
    assert identify(packet[:LOOK]) == name, "only the first 32 bytes are kept"


@pytest.mark.parametrize(("name", "packet"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_first_packet_cut_anywhere_gets_some_name(name: str, packet: bytes) -> None:
    for end in range(len(packet)):
        assert identify(packet[:end]) in NAMES


@given(st.binary(max_size=64))
def test_arbitrary_bytes_get_one_of_the_names(first: bytes) -> None:
    assert identify(first) in NAMES
    assert identify(first) == identify(first[:LOOK])


@given(st.integers(0, 255))
def test_one_byte_accuses_nobody_of_a_protocol(byte: int) -> None:
    assert identify(bytes([byte])) in (UNKNOWN, "blank lines")


def test_a_name_fits_into_one_byte_and_zero_is_unknown() -> None:
    assert NAMES[0] == UNKNOWN
    assert len(set(NAMES)) == len(NAMES) <= 256


def test_names_are_plain_words_for_a_log_line() -> None:
    assert [name for name in NAMES if not name.isascii() or not name.isprintable() or '"' in name] == []
