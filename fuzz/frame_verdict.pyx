"""Fuzz target: the verdict on the first packet, ext/frame.pxd.

Input: a byte that picks the state, then what a stranger sends.  Properties: the verdict does not depend on the cuts (it
falls at the first byte that decides it, and no further byte changes it), and it is the one that the table of
docs/protocol.md gives, written down here a second time in another way.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport abort

from frame cimport (
    DATA, DATA_LEAST, DATA_MOST, DATA_MOST_GUEST, FRAME_MORE, FRAME_WHOLE, HEADER, HELLO, HELLO_LEAST, HELLO_MOST,
    frame_verdict,
)
from names cimport R_BAD_VERSION, R_NOT_PROTOCOL, R_TOO_LONG, S_LOGGED_IN, S_NEW, S_OPEN, tt_state


cdef inline void must(bint holds) noexcept nogil:
    if not holds:
        abort()


cdef int expected(const uint8_t* p, size_t n, tt_state state) noexcept nogil:
    """The verdict on n bytes, of which all of the header's must be there; judged field by field."""
    cdef uint32_t length = <uint32_t>p[4] << 24 | <uint32_t>p[5] << 16 | <uint32_t>p[6] << 8 | p[7]
    if p[0] != 0x54 or p[1] != 0x54:
        return R_NOT_PROTOCOL
    if p[2] != 1:
        return R_BAD_VERSION if state == S_NEW else R_NOT_PROTOCOL
    if state == S_NEW:
        if p[3] != HELLO or length < HELLO_LEAST or length > HELLO_MOST:
            return R_NOT_PROTOCOL
    elif p[3] != DATA or length < DATA_LEAST:
        return R_NOT_PROTOCOL
    elif length > <uint32_t>(DATA_MOST if state == S_LOGGED_IN else DATA_MOST_GUEST):
        return R_TOO_LONG
    return FRAME_WHOLE if n >= <size_t>HEADER + length else FRAME_MORE


cdef public int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) noexcept nogil:
    cdef tt_state[3] states = [S_NEW, S_OPEN, S_LOGGED_IN]
    cdef tt_state state
    cdef uint32_t total = 0, before = 0
    cdef int verdict, earlier = FRAME_MORE
    cdef size_t n, count
    if size == 0:
        return 0
    state = states[data[0] % 3]
    data += 1
    count = size - 1
    for n in range(count + 1):
        verdict = frame_verdict(data, n, state, &total)
        if earlier == FRAME_MORE:
            must(before == 0 or total == before)
        else:
            must(verdict == earlier and total == before)
        must(total == 0 or n >= HEADER)
        must(verdict != FRAME_WHOLE or n >= total > HEADER)
        must(verdict != FRAME_MORE or total == 0 or n < total)
        earlier, before = verdict, total
    if count >= HEADER:
        must(earlier == expected(data, count, state))
    return 0
