"""What a stranger spoke: a name for the first bytes of a connection, for the log alone.

One table of (name, pattern), tried in order: what is told by a text or a long signature stands first, what is told by
a few bytes of length or type last.  Signatures are of the protocols' own documents and of what scanners send.

Rules: takes at most LOOK bytes, which may end anywhere; never fails; names nothing on a single byte, unless the whole
message is that byte; a verdict never depends on a name.
Must not know: connections, verdicts, the log.
"""

import re

LOOK = 32  # bytes of a connection that are kept for this and for the log
UNKNOWN = "unknown"

# In the patterns "." is any byte.  A name may have several rows.  \Z lets a row take a message that ends there.
_ROWS: tuple[tuple[str, bytes], ...] = (
    # ours, but broken: a frame that is not allowed there
    ("tape-tracking frame", rb"TT(\Z|[\x00-\x1f])"),
    # texts
    ("PROXY protocol", rb"PROXY (TCP|UNK)|\r\n\r\n\x00\r\nQUIT\n"),
    ("HTTP/2 preface", rb"PRI \* HTTP/2"),
    ("UPnP/SSDP", rb"(M-SEARCH|NOTIFY) \*"),
    ("SIP", rb"(OPTIONS|INVITE|REGISTER|SUBSCRIBE|NOTIFY|MESSAGE|ACK|BYE|CANCEL|INFO|PUBLISH|REFER) sips?:|SIP/2\.0 "),
    ("RTSP", rb"[A-Z_]{4,14} (rtspu?://|[/*]\S* RTSP/)"),
    ("UPnP SOAP", rb"(SUBSCRIBE|UNSUBSCRIBE|NOTIFY|M-POST) /"),
    ("UPnP SOAP", rb"POST /\S*(?i:upnp|soap|control|ctl/|ctrlt/|wan(ip|ppp|com)|picsdesc|HNAP1)"),
    (
        "HTTP request",
        rb"(GET|HEAD|POST|PUT|DELETE|OPTIONS|TRACE|CONNECT|PATCH|PROPFIND|MKCOL|SEARCH|DEBUG) [/*a-zA-Z0-9\[]",
    ),
    ("SSH", rb"SSH-"),
    ("VNC", rb"RFB [0-9]"),
    ("Redis", rb"\*[0-9]{1,7}\r\n\$|(?i:PING|INFO|COMMAND|MONITOR)\r\n|(?i:CONFIG (GET|SET)|SLAVEOF|FLUSHALL|AUTH) ?"),
    ("memcached", rb"(stats|version|flush_all|gets?|set|add)( [!-~]|\r\n)|\x80[\x00-\x24].{2}.{3}\x00.{16}"),
    ("SMTP", rb"(?i:EHLO|HELO|MAIL FROM:)[ \r\n]?"),
    ("STOMP", rb"(CONNECT|STOMP|HELP)\n"),
    ("HELP line", rb"(?i:HELP|\?)\r?\n"),
    ("IRC", rb"(NICK|CAP LS|JOIN) ?"),
    ("FTP or mail login", rb"(?i:USER|CAPA|STLS|LOGIN|A?[0-9]{1,4} (LOGIN|CAPABILITY))[ \r\n]"),
    ("rsync", rb"@RSYNCD:"),
    ("BitTorrent", rb"\x13BitTorrent"),
    ("Java RMI", rb"JRMI"),
    ("Java debug wire", rb"JDWP-"),
    ("Java serialization", rb"\xac\xed\x00\x05"),
    ("CORBA", rb"GIOP"),
    ("AMQP", rb"AMQP"),
    ("Android debug bridge", rb"CNXN\x00"),
    ("NetWare NCP", rb"DmdT\x00"),
    ("IBM MQ", rb"TSH[ M]"),
    ("Db2 administration", rb"\x00{4}DB2DAS"),
    ("LANDesk", rb"TNMP\x04"),
    ("Domino console", rb"#ST\n"),
    ("printer (PJL)", rb"\x1b%-12345X"),
    ("printer (LPD)", rb"[\x01-\x05][a-z]{3,}[^\n]*\n"),
    ("XMPP or XML", rb"<\?xml|<stream|<[a-z]+[ >]"),
    ("JSON-RPC", rb"\{\s*\"(id|method|params|jsonrpc)\""),
    ("command injection", rb"(cd /|wget |sh -c|/bin/|enable\r|system\r|shell\r)"),
    # binary, told by a signature
    ("TLS ClientHello", rb"\x16\x03[\x00-\x04]"),
    ("TLS ClientHello", rb"[\x80-\x8f].\x01(\x00\x02|\x03[\x00-\x03])"),  # in the form of SSL 2
    ("SMB", rb"(\x00\x00..)?[\xfe\xff]SMB"),
    ("MongoDB", rb".{12}[\xd2\xd4\xd5\xdc\xdd]\x07\x00\x00"),
    ("X11", rb"l\x00\x0b\x00|B\x00\x00\x0b"),
    ("AJP", rb"\x12\x34\x00"),
    ("MQTT", rb"\x10[^\x00].?\x00(\x04MQTT|\x06MQIsdp)"),
    ("PPTP", rb".{2}\x00\x01\x1a\x2b\x3c\x4d"),
    ("Bitcoin", rb"\xf9\xbe\xb4\xd9"),
    ("PostgreSQL", rb"\x00\x00\x00\x08\x04\xd2\x16[\x2e-\x30]|\x00\x00.{2}\x00\x03\x00[\x00-\x02]([a-z_]|\Z)"),
    ("Kerberos", rb"\x00\x00.{2}[\x6a\x6c](\x81|\x82|[\x30-\x7f])"),
    ("Oracle TNS", rb"[\x00-\x0f].\x00\x00\x01\x00\x00\x00.[\x2c-\x40]"),
    ("RPC portmap", rb"\x80\x00.{2}.{4}\x00{4}\x00\x00\x00\x02"),
    ("Cisco Smart Install", rb"\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00[\x04-\x08]"),
    ("Firebird", rb"\x00\x00\x00\x01\x00\x00\x00[\x10-\x20]"),
    ("AFP", rb"\x00[\x01-\x08].{2}\x00{7}\x02|\x00\x03\x00\x01\x00{6}"),
    ("TFTP", rb"\x00[\x01\x02][ -~]{2,}\x00((?i:octet|netascii|mail)|\Z)"),
    ("NetBIOS", rb"\x81\x00\x00[\x44-\x48]|.{4}\x00[\x00\x01]\x00{6} C[A-P]"),
    ("Lotus Notes", rb"\x3a\x00\x00\x00\x2f\x00"),
    ("Windows Media", rb"\x01\x00\x00\xfd\xce\xfa"),
    ("Radmin", rb"\x01\x00\x00\x00\x01\x00\x00\x00[\x08\x1b]"),
    ("ZeroMQ", rb"\xff\x00{7}[\x01-\x80]\x7f"),
    ("MySQL", rb".{2}\x00\x01.{8}.\x00{8}"),
    ("DRDA (Db2)", rb"\x00[\x06-\xff]\xd0[\x01-\x51]"),
    ("Erlang port mapper", rb"\x00[\x01-\x40][nzxy](\Z|[ -~])"),
    # binary, told by little
    ("Siemens S7", rb"\x03\x00\x00.[\x06-\x30]\xe0.{5}[\xc0-\xc2]"),
    ("RDP", rb"\x03\x00\x00"),
    ("MS SQL (TDS)", rb"\x12\x01\x00"),
    ("MS RPC", rb"\x05\x00[\x00-\x13]\x03"),
    ("SOCKS5", rb"\x05([\x01-\x09][\x00-\x09\x80-\x8f])"),
    ("SOCKS4", rb"\x04[\x01\x02].{2}"),
    ("DNP3", rb"\x05\x64"),
    ("SNMP", rb"\x30(\x81.|\x82.{2}|[\x10-\x7f])\x02\x01[\x00\x01\x03][\x04\x30]"),
    ("LDAP", rb"\x30(\x84.{4}|\x82.{2}|\x81.|[\x05-\x7f])\x02[\x01-\x04]"),
    ("Telnet", rb"\xff[\xfb-\xfe]"),
    ("DNS over TCP", rb"(?!\x00\x00)[\x00-\x02].{3}[\x00-\x7f].\x00[\x00\x01]\x00{4}\x00[\x00-\x02]"),
    ("Modbus", rb".{2}\x00\x00\x00[\x02-\x20].[\x01-\x2b]"),
    ("Kafka", rb"\x00[\x00-\x0f].{2}\x00[\x00-\x4f]\x00[\x00-\x13].{2}"),
    # a greeting and no more, to see what answers
    ("blank lines", rb"[\r\n]+\Z"),
    ("zero bytes", rb"\x00{2,}\Z"),
)
_TABLE = tuple((name, re.compile(pattern, re.DOTALL)) for name, pattern in _ROWS)

# Every name once, so that a table of sources can keep one byte; 0 is UNKNOWN.  The order is not kept from one version
# to the next: what outlives the process keeps the name.
NAMES: tuple[str, ...] = (UNKNOWN, *dict.fromkeys(name for name, _ in _ROWS))
assert len(NAMES) <= 256  # noqa: S101 - a fact about the table above, not about input


def identify(first: bytes) -> str:
    """Name what the first bytes of a connection look like: one of NAMES; UNKNOWN where no row tells."""
    first = first[:LOOK]
    return next((name for name, pattern in _TABLE if pattern.match(first)), UNKNOWN)
