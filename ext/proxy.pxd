"""The PROXY protocol's header, version 2: who the client behind a proxy is (HAProxy's proxy-protocol.txt, section 2.2).

    offset  size  field
    0       12    signature
    12      1     version, 2, and command: 0 LOCAL, 1 PROXY
    13      1     address family and transport: 0x11 TCP over IPv4, 0x21 TCP over IPv6, 0x00 not told
    14      2     length of what follows, network byte order
    16            the client's address, the proxy's, their ports; then values of other kinds, which are skipped

The verdict depends on the bytes alone, never on how they were cut.  LOCAL and "not told" are the proxy's own connections,
such as its health checks.  Knows no socket and no clock, and not who may send such a header.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from frame cimport FRAME_MORE, FRAME_WHOLE
from names cimport R_BAD_PROXY

cdef extern from *:
    """
    #define TT_PROXY_SIGNATURE "\\r\\n\\r\\n\\0\\r\\nQUIT\\n"
    """
    const char* PROXY_SIGNATURE "TT_PROXY_SIGNATURE"

cdef enum:
    SIGNATURE = 12
    PROXY_HEADER = 16
    PROXY_MOST = PROXY_HEADER + 4096    # with all values: what nginx takes, too
    LOCAL = 0x20
    PROXY = 0x21
    NOT_TOLD = 0x00
    TCP_V4 = 0x11
    TCP_V6 = 0x21
    V4_ADDRESSES = 12
    V6_ADDRESSES = 36

cdef struct proxied:            # what a header tells of the client
    bint told                   # else it is the proxy's own connection
    uint8_t address[16]         # IPv4 as v4-mapped
    uint16_t port


cdef inline int proxy_verdict(const uint8_t* p, size_t n, uint32_t* total, proxied* client) noexcept nogil:
    """Judge the n bytes at p as the start of a proxy's connection: FRAME_MORE, R_BAD_PROXY or FRAME_WHOLE.

    FRAME_WHOLE sets *total to the bytes of the header and *client to whom it names.
    """
    cdef uint32_t length, least
    memset(client, 0, sizeof(proxied))
    if memcmp(p, PROXY_SIGNATURE, min(n, <size_t>SIGNATURE)) != 0:
        return R_BAD_PROXY
    if n > 12 and p[12] != LOCAL and p[12] != PROXY:
        return R_BAD_PROXY
    if n > 13 and p[12] == PROXY and p[13] != TCP_V4 and p[13] != TCP_V6 and p[13] != NOT_TOLD:
        return R_BAD_PROXY  # a datagram or a Unix socket cannot have become this connection
    if n < PROXY_HEADER:
        return FRAME_MORE
    length = <uint32_t>p[14] << 8 | p[15]
    client.told = p[12] == PROXY and p[13] != NOT_TOLD
    least = 0 if not client.told else V4_ADDRESSES if p[13] == TCP_V4 else V6_ADDRESSES
    if length < least or length > PROXY_MOST - PROXY_HEADER:
        return R_BAD_PROXY
    total[0] = PROXY_HEADER + length
    if n < total[0]:
        return FRAME_MORE
    if client.told and p[13] == TCP_V4:
        client.address[10] = client.address[11] = 0xFF
        memcpy(&client.address[12], p + PROXY_HEADER, 4)
        client.port = <uint16_t>(p[24] << 8 | p[25])
    elif client.told:
        memcpy(client.address, p + PROXY_HEADER, 16)
        client.port = <uint16_t>(p[48] << 8 | p[49])
    return FRAME_WHOLE
