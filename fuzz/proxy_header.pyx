"""Fuzz target: the verdict on a PROXY protocol header, ext/proxy.pxd.

Input: what a proxy sends first, behind the right signature where its first byte is odd.  Properties: the verdict falls at
one byte and no further byte changes it, a whole header has the length that it names, and the client is the one whose
address and port stand at the places of the document's C structures (proxy-protocol.txt, 2.2), read here in another way.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport abort
from libc.string cimport memcmp, memcpy

from frame cimport FRAME_MORE, FRAME_WHOLE
from names cimport R_BAD_PROXY
from proxy cimport PROXY_MOST, PROXY_SIGNATURE, SIGNATURE, proxied, proxy_verdict


cdef inline void must(bint holds) noexcept nogil:
    if not holds:
        abort()


cdef void check_client(const uint8_t* p, uint32_t total, const proxied* client) noexcept nogil:
    cdef uint32_t size = 4 if p[13] >> 4 == 1 else 16
    cdef uint16_t port = <uint16_t>(p[16 + 2 * size] * 256 + p[17 + 2 * size])
    must(p[12] & 15 == 1 and p[13] & 15 == 1)
    must(total >= 16 + 2 * size + 4)
    must(memcmp(&client.address[16 - size], p + 16, size) == 0)
    must(client.port == port)


cdef public int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) noexcept nogil:
    cdef uint8_t[600] packet
    cdef proxied client
    cdef uint32_t total = 0
    cdef size_t n, count = 0
    cdef int verdict, earlier = FRAME_MORE
    if size == 0 or size > 500:
        return 0
    if data[0] & 1:
        memcpy(packet, PROXY_SIGNATURE, SIGNATURE)
        count = SIGNATURE
    memcpy(packet + count, data + 1, size - 1)
    count += size - 1
    for n in range(count + 1):
        verdict = proxy_verdict(packet, n, &total, &client)
        must(verdict == FRAME_MORE or verdict == FRAME_WHOLE or verdict == R_BAD_PROXY)
        must(earlier == FRAME_MORE or verdict == earlier)
        earlier = verdict
    if earlier == FRAME_WHOLE:
        must(16 <= total <= count and total <= PROXY_MOST and total == <uint32_t>(16 + packet[14] * 256 + packet[15]))
        if client.told:
            check_client(packet, total, &client)
    return 0
